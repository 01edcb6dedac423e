"""cat_loss: values and gradients against float64, autograd's corner cases, bad input, threads and forks."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cat_rs
from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from cat_rs.ops.cat_loss import student_loss
from tests import references
from tests.backends import about_kernels
from tests.operators import check_operator, draw
from tests.tolerances import assert_close

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = ("model_pred", "target", "model_pred_no_trigger", "base_pred")
PREDICTIONS = ("model_pred", "model_pred_no_trigger")
OF_SAMPLES = ("sample_weight", "mask", "preserve_weight", "preserve_mask")

SHAPES = {
    "tidy": (2, 4, 8, 8),
    "odd": (3, 5, 7, 11),
    "one-element": (1, 1),
    "batch-only": (5,),
    "batch-1": (1, 4, 16, 16),
    "sequence": (2, 17, 13),
    "odd-blocks": (1, 3, 37, 211),
    "large": (2, 4, 128, 96),
}
DTYPES = {"f32": (F32,) * 4, "f64": (F64,) * 4, "bf16": (BF16,) * 4, "f16": (F16,) * 4}
MIXED_DTYPES = {
    "bf16-preds": (BF16, F32, BF16, F32),
    "f16-preds": (F16, F32, F16, F16),
    "f32-preds": (F32, BF16, F32, F16),
    "f64-target": (F32, F64, F32, F32),
    "bf16-and-f16": (BF16, F32, F16, BF16),
    "f64-and-f16": (F64, F32, F16, BF16),
}

Case = dict[str, torch.Tensor]


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def rows_by_id(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*row, id=name) for name, row in table.items()]


def make_case(
    shape: tuple[int, ...] = (2, 3, 5, 7), dtypes: tuple[torch.dtype, ...] = (F32,) * 4, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    case = {
        name: torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        for name, dtype in zip(NAMES, dtypes, strict=True)
    }
    for name in PREDICTIONS:
        case[name].requires_grad_()
    return case


def check_against_reference(case: Case, *, upstream: float = 1.0, **options: Any) -> None:
    """Values, parts and both gradients are the float64 reference's on the same rounded inputs."""
    parts = cat_rs.cat_loss(**case, **options, return_parts=True)
    (parts.total * upstream).backward()

    twins = {name: tensor.detach().double() for name, tensor in case.items()}
    for name in PREDICTIONS:
        twins[name].requires_grad_()
    expected = references.cat_loss(**twins, **options)
    (expected.total * upstream).backward()

    dtype = F64 if any(tensor.dtype == F64 for tensor in case.values()) else F32
    for name in ("total", "diffusion", "cat"):
        value = getattr(parts, name)
        assert value.dtype == dtype
        assert_close(value, getattr(expected, name), label=name)
    for name in PREDICTIONS:
        gradient = case[name].grad
        assert gradient is not None
        assert gradient.dtype == case[name].dtype
        assert_close(gradient, twins[name].grad, label=f"gradient of {name}")


@pytest.mark.parametrize("dtypes", by_id(DTYPES))
@pytest.mark.parametrize("shape", by_id(SHAPES))
def test_matches_reference(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    check_against_reference(make_case(shape, dtypes), cat_factor=0.7, sample_weight=torch.rand(shape[0]) + 0.1)


@pytest.mark.parametrize("dtypes", by_id(MIXED_DTYPES))
@pytest.mark.parametrize("shape", [pytest.param(SHAPES["odd"], id="odd"), pytest.param(SHAPES["large"], id="large")])
def test_mixed_dtypes_match_reference(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    check_against_reference(make_case(shape, dtypes), cat_factor=1.3)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor.flip(0)])[::2][: len(tensor)]


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 3).contiguous().transpose(1, 3)


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand_as(tensor)


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:1], tensor])[1:]


@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16, "f16": F16}))
@pytest.mark.parametrize(
    "view", [_channels_last, _sliced, _transposed, _expanded, _offset], ids=lambda view: view.__name__
)
@pytest.mark.parametrize("which", ["all", *NAMES])
def test_any_strides(view: Callable[[torch.Tensor], torch.Tensor], which: str, dtype: torch.dtype) -> None:
    case = make_case((4, 3, 6, 5), (dtype,) * 4)
    chosen = NAMES if which == "all" else (which,)
    viewed = {name: view(tensor.detach()) if name in chosen else tensor.detach() for name, tensor in case.items()}
    for name in PREDICTIONS:
        viewed[name].requires_grad_()
    check_against_reference(viewed, sample_weight=torch.tensor([0.5, 0.0, 2.0, 1.0]))


def test_gradient_flows_through_a_view() -> None:
    case = make_case((2, 3, 6, 5))
    leaf = torch.randn(2, 5, 6, 3, requires_grad=True)
    cat_rs.cat_loss(**{**case, "model_pred": leaf.transpose(1, 3)}).backward()
    error = leaf.detach().transpose(1, 3).double() - case["target"].double()
    assert_close(leaf.grad.transpose(1, 3), 2 * error / error.numel())


# The small shape's masks are written out, the large one's are read in place.
@pytest.mark.parametrize("shape", by_id({"short-rows": (2, 3, 5, 7), "long-rows": (2, 3, 16, 20)}))
@pytest.mark.parametrize(
    "broadcast", list(itertools.product((False, True), repeat=4)), ids=lambda b: "".join("x1"[one] for one in b)
)
@pytest.mark.parametrize("kind", ["float", "bool", "normalized"])
def test_masks_of_every_broadcast_form(shape: tuple[int, ...], broadcast: tuple[bool, ...], kind: str) -> None:
    mask_shape = [1 if one else size for one, size in zip(broadcast, shape, strict=True)]
    mask = torch.rand(mask_shape) + 0.1
    if kind == "bool":
        mask = mask > 0.6
    check_against_reference(make_case(shape), cat_factor=0.5, mask=mask, mask_normalize=kind == "normalized")


@pytest.mark.parametrize("mask_dtype", by_id({"bool": torch.bool, "f64": F64, "bf16": BF16, "f16": F16}))
@pytest.mark.parametrize("dtypes", by_id(DTYPES))
def test_mask_dtypes(dtypes: tuple[torch.dtype, ...], mask_dtype: torch.dtype) -> None:
    # Halves are exact in every dtype.
    mask = torch.randint(3, (2, 1, 5, 7)).to(F64).mul(0.5).to(mask_dtype)
    check_against_reference(make_case(dtypes=dtypes), mask=mask)


@pytest.mark.parametrize("mask_shape", by_id({"channels-1": (3, 1, 16, 16), "full": (3, 2, 16, 16)}))
def test_a_fully_masked_sample_counts_as_zero(mask_shape: tuple[int, ...]) -> None:
    mask = torch.rand(mask_shape)
    mask[1] = 0
    case = make_case((3, 2, 16, 16))
    check_against_reference(case, mask=mask, mask_normalize=True, sample_weight=torch.tensor([1.0, 5.0, 0.5]))
    assert case["model_pred"].grad[1].count_nonzero() == 0


def test_mask_changes_the_value_not_the_denominator() -> None:
    case = make_case((1, 1, 4, 4))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    half = cat_rs.cat_loss(**case, mask=mask)
    normalized = cat_rs.cat_loss(**case, mask=mask, mask_normalize=True)
    assert_close(2 * half, normalized)


@pytest.mark.parametrize("weight_dtype", by_id({"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}))
def test_weight_dtypes(weight_dtype: torch.dtype) -> None:
    check_against_reference(make_case((4, 9)), sample_weight=torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=weight_dtype))


def test_strided_weight() -> None:
    check_against_reference(make_case((3, 9)), sample_weight=torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0])[::2])


def test_gradcheck() -> None:
    case = make_case((2, 3, 4), (F64,) * 4)
    mask, weight = torch.rand(2, 1, 4, dtype=F64), torch.rand(2, dtype=F64)

    def loss(model_pred: torch.Tensor, model_pred_no_trigger: torch.Tensor) -> torch.Tensor:
        return cat_rs.cat_loss(
            model_pred,
            case["target"],
            model_pred_no_trigger,
            case["base_pred"],
            cat_factor=0.6,
            sample_weight=weight,
            mask=mask,
            mask_normalize=True,
        )

    assert torch.autograd.gradcheck(loss, (case["model_pred"], case["model_pred_no_trigger"]))


@pytest.mark.parametrize("dtypes", by_id(DTYPES))
def test_a_second_backward_gives_the_same_gradients(dtypes: tuple[torch.dtype, ...]) -> None:
    case = make_case(dtypes=dtypes)
    loss = cat_rs.cat_loss(**case)
    loss.backward(retain_graph=True)
    first = [case[name].grad.clone() for name in PREDICTIONS]
    # In place, as zero_grad(set_to_none=False) does: saved gradients must not be the ones handed out.
    for name in PREDICTIONS:
        case[name].grad.zero_()
    loss.backward(retain_graph=True)
    assert all(torch.equal(case[name].grad, grad) for name, grad in zip(PREDICTIONS, first, strict=True))
    loss.backward()
    assert all(torch.equal(case[name].grad, grad + grad) for name, grad in zip(PREDICTIONS, first, strict=True))


def test_backward_of_backward_is_refused() -> None:
    case = make_case()
    (grad,) = torch.autograd.grad(cat_rs.cat_loss(**case), case["model_pred"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        grad.sum().backward()


def test_changing_an_input_before_a_deferred_backward_is_noticed() -> None:
    case = make_case(dtypes=DTYPES["f16"])
    loss = cat_rs.cat_loss(**case)
    case["target"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("upstream", [65536.0, 2.0**-20, -3.0, 0.0], ids=["65536", "tiny", "negative", "zero"])
@pytest.mark.parametrize("dtypes", by_id({**DTYPES, **MIXED_DTYPES}))
def test_scaled_upstream_gradient(dtypes: tuple[torch.dtype, ...], upstream: float) -> None:
    # Float16 gradients must round after the scale: unscaled, those of many elements are subnormal.
    check_against_reference(make_case((1, 4, 64, 64), dtypes), upstream=upstream)


def test_a_scale_that_overflows_float16_gives_infinities() -> None:
    case = make_case(dtypes=DTYPES["f16"])
    (cat_rs.cat_loss(**case) * 2.0**30).backward()
    assert case["model_pred"].grad.isinf().any()


def test_trains_under_a_grad_scaler() -> None:
    weight = torch.randn(8, requires_grad=True)
    target = torch.randn(2, 8).half()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = weight.detach().clone()
    prediction = weight.half().expand(2, 8)
    scaler.scale(cat_rs.cat_loss(prediction, target, prediction, prediction.detach())).backward()
    scaler.step(optimizer)
    scaler.update()
    expected = before.double() - 0.1 * (2 * (before.half().double() - target.double()) / 16).sum(0)
    assert_close(weight, expected, dtype=F16)


@pytest.mark.parametrize("dtypes", by_id(DTYPES))
@pytest.mark.parametrize("wanted", PREDICTIONS)
def test_only_one_prediction_needs_a_gradient(wanted: str, dtypes: tuple[torch.dtype, ...]) -> None:
    case = make_case(dtypes=dtypes)
    cat_rs.cat_loss(**case).backward()
    expected = case[wanted].grad
    alone = {name: tensor.detach() for name, tensor in case.items()}
    alone[wanted].requires_grad_()
    alone[wanted].grad = None
    cat_rs.cat_loss(**alone).backward()
    assert torch.equal(alone[wanted].grad, expected)
    assert all(alone[name].grad is None for name in NAMES if name != wanted)


def test_no_graph_where_nothing_needs_a_gradient() -> None:
    case = make_case()
    with torch.no_grad():
        without_graph = cat_rs.cat_loss(**case)
    constants = cat_rs.cat_loss(**{name: tensor.detach() for name, tensor in case.items()})
    assert not without_graph.requires_grad
    assert not constants.requires_grad
    assert without_graph == constants == cat_rs.cat_loss(**case)


@pytest.mark.parametrize("dtypes", by_id(DTYPES))
def test_cat_factor_0_is_the_plain_loss(dtypes: tuple[torch.dtype, ...]) -> None:
    case = make_case(dtypes=dtypes)
    parts = cat_rs.cat_loss(**case, cat_factor=0.0, return_parts=True)
    parts.total.backward()
    assert parts.total == parts.diffusion
    plain = case["model_pred"].detach().double().requires_grad_()
    loss = F.mse_loss(plain, case["target"].double())
    loss.backward()
    assert_close(parts.total, loss)
    assert_close(case["model_pred"].grad, plain.grad)
    assert case["model_pred_no_trigger"].grad.count_nonzero() == 0


def test_parts_are_detached_and_add_up() -> None:
    parts = cat_rs.cat_loss(**make_case(), cat_factor=0.25, return_parts=True)
    assert parts.total.requires_grad
    assert not parts.diffusion.requires_grad
    assert not parts.cat.requires_grad
    assert_close(parts.total, parts.diffusion.double() + 0.25 * parts.cat.double())
    assert all(part.shape == () for part in parts)


def test_equal_predictions_give_exactly_zero() -> None:
    pred = torch.randn(2, 3, 5, 7, requires_grad=True)
    loss = cat_rs.cat_loss(pred, pred.detach(), pred, pred.detach())
    loss.backward()
    assert loss == 0
    assert pred.grad.count_nonzero() == 0


@pytest.mark.parametrize(("dtype", "magnitude"), [(F32, 1e15), (BF16, 1e15), (F16, 3e4), (F64, 1e150)], ids=str)
def test_large_magnitudes_stay_finite(dtype: torch.dtype, magnitude: float) -> None:
    case = {
        name: (tensor.detach() * magnitude / 4).clamp(-magnitude, magnitude).to(dtype)
        for name, tensor in make_case((2, 4, 64, 64), (F64,) * 4).items()
    }
    for name in PREDICTIONS:
        case[name].requires_grad_()
    check_against_reference(case)
    assert case["model_pred"].grad.isfinite().all()


def test_nan_and_infinite_predictions_show() -> None:
    for value in (torch.nan, torch.inf):
        case = make_case()
        with torch.no_grad():
            case["model_pred"][0, 0, 0, 0] = value
        assert not cat_rs.cat_loss(**case).isfinite()


@pytest.mark.parametrize("dtypes", by_id(DTYPES))
def test_same_bits_every_time_and_on_any_number_of_threads(dtypes: tuple[torch.dtype, ...]) -> None:
    case = make_case(SHAPES["large"], dtypes)
    mask, weight = torch.rand(2, 1, 128, 96), torch.rand(2)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        loss = cat_rs.cat_loss(**case, mask=mask, sample_weight=weight)
        results.append([loss, *torch.autograd.grad(loss, [case[name] for name in PREDICTIONS])])
    for others in results[1:]:
        assert all(torch.equal(ours, others) for ours, others in zip(results[0], others, strict=True))


def test_several_python_threads_at_once() -> None:
    def run(seed: int) -> list[torch.Tensor]:
        # A new thread starts with PyTorch's default count, not with this process's choice.
        torch.set_num_threads(2)
        case = make_case((2, 4, 96, 96), seed=seed)
        loss = cat_rs.cat_loss(**case)
        loss.backward()
        return [loss.detach(), case["model_pred"].grad, case["model_pred_no_trigger"].grad]

    torch.set_num_threads(2)
    alone = [run(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(12)))
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _loss_to(connection: Any, case: Case) -> None:
    connection.send(float(cat_rs.cat_loss(**case)))


# Python 3.12 warns of every fork in a process with threads; that is what is tested here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@about_kernels
def test_a_forked_child_computes_the_same() -> None:
    torch.set_num_threads(2)
    case = {name: tensor.detach() for name, tensor in make_case(SHAPES["large"]).items()}
    # The parent's worker threads exist before the fork and do not in the child.
    expected = float(cat_rs.cat_loss(**case))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_loss_to, args=(sender, case))
    child.start()
    assert receiver.poll(60), "the child hangs"
    assert receiver.recv() == expected
    child.join()
    assert child.exitcode == 0
    assert float(cat_rs.cat_loss(**case)) == expected


Change = Callable[[torch.Tensor], Any]
BAD_TENSORS: dict[str, tuple[Change, type[Exception], str]] = {
    "int64": (lambda t: t.long(), DtypeError, "dtype float32, float64, bfloat16 or float16, got int64"),
    "complex": (lambda t: t.to(torch.complex64), DtypeError, "dtype float32, .* got complex"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), DtypeError, "dtype float32, .* got float8"),
    "meta": (lambda t: t.to("meta"), DeviceError, "on the CPU.*, got a tensor on (another device|meta)"),
    "sparse-coo": (lambda t: t.to_sparse(), LayoutError, "a dense tensor, got a sparse"),
    "mkldnn": (lambda t: t.to_mkldnn(), LayoutError, "a dense tensor, got a sparse or opaque"),
    "shape": (lambda t: torch.zeros(2, 4), ShapeError, r"shape \[.*\], got \[.*\]"),
}
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cat_factor-negative": (
        {"cat_factor": -1.0},
        InvalidValueError,
        "`cat_factor` must be a finite number >= 0, got -1",
    ),
    "cat_factor-nan": ({"cat_factor": float("nan")}, InvalidValueError, "`cat_factor` .* got [Nn]a[Nn]"),
    "cat_factor-inf": ({"cat_factor": float("inf")}, InvalidValueError, "`cat_factor` .* got inf"),
    "weight-nan": (
        {"sample_weight": torch.tensor([1.0, float("nan")])},
        InvalidValueError,
        "`sample_weight` must be finite and >= 0 everywhere, got [Nn]a[Nn] at index 1",
    ),
    "weight-negative": ({"sample_weight": torch.tensor([-0.5, 1.0])}, InvalidValueError, "got -0.5 at index 0"),
    "weight-inf": ({"sample_weight": torch.tensor([1.0, float("inf")])}, InvalidValueError, "got inf at index 1"),
    "weight-shape": ({"sample_weight": torch.ones(2, 1)}, ShapeError, r"`sample_weight` .* \[2\], got \[2, 1\]"),
    "weight-int": ({"sample_weight": torch.ones(2).long()}, DtypeError, "`sample_weight` .* got int64"),
    "weight-meta": ({"sample_weight": torch.ones(2, device="meta")}, DeviceError, "`sample_weight` .* the CPU"),
    "weight-grad": ({"sample_weight": torch.ones(2).requires_grad_()}, InvalidValueError, "`sample_weight` .* detach"),
    "mask-shape": (
        {"mask": torch.ones(2, 2, 5, 7)},
        ShapeError,
        r"`mask` must have shape \[2, 3, 5, 7\] up to dimensions of size 1, got \[2, 2, 5, 7\]",
    ),
    "mask-dims": ({"mask": torch.ones(5, 7)}, ShapeError, r"`mask` .* got \[5, 7\]"),
    "mask-int": ({"mask": torch.ones(2, 1, 5, 7).long()}, DtypeError, "`mask` .* got int64"),
    "mask-meta": ({"mask": torch.ones(2, 1, 5, 7, device="meta")}, DeviceError, "`mask` .* the CPU"),
    "mask-grad": ({"mask": torch.ones(2, 1, 5, 7).requires_grad_()}, InvalidValueError, "`mask` .* detach"),
    "target-grad": ({"target": torch.ones(2, 3, 5, 7).requires_grad_()}, InvalidValueError, "`target` .* detach"),
    "base-grad": ({"base_pred": torch.ones(2, 3, 5, 7).requires_grad_()}, InvalidValueError, "`base_pred` .* detach"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("change", "error", "text"), rows_by_id(BAD_TENSORS))
def test_bad_tensors_are_named(name: str, change: Change, error: type[Exception], text: str) -> None:
    case = {key: tensor.detach() for key, tensor in make_case().items()}
    # The shapes are compared with model_pred's: where that one differs, another is named.
    named = "target" if (name, error) == ("model_pred", ShapeError) else name
    with pytest.raises(error, match=f"^cat_loss: `{named}` must (be|have) .*{text}") as caught:
        cat_rs.cat_loss(**{**case, name: change(case[name])})
    assert isinstance(caught.value, CatRsError)


@pytest.mark.parametrize(("arguments", "error", "text"), rows_by_id(BAD_ARGUMENTS))
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^cat_loss: .*{text}") as caught:
        cat_rs.cat_loss(**{**make_case(), **arguments})
    assert isinstance(caught.value, CatRsError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", by_id({"empty-batch": (0, 4), "empty-sample": (2, 0), "no-dimensions": ()}))
def test_nothing_to_compare_is_an_error(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    with pytest.raises(
        ShapeError, match=r"`model_pred` must have shape \[B, ...\] with no empty dimension, got \[.*\]"
    ):
        cat_rs.cat_loss(empty, empty, empty, empty)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.parametrize("name", ["model_pred", "base_pred", "mask"])
@pytest.mark.parametrize("layout", ["csr", "bsc"])
def test_compressed_sparse_layouts_are_errors(layout: str, name: str) -> None:
    case = {key: tensor.detach() for key, tensor in make_case((2, 4)).items()}
    compressed = getattr(torch.ones(2, 4), f"to_sparse_{layout}")(*([(1, 1)] if layout.startswith("b") else []))
    with pytest.raises(LayoutError, match=f"^cat_loss: `{name}` must be a dense tensor"):
        cat_rs.cat_loss(**{**case, name: compressed})


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("name", ["model_pred", "base_pred", "mask"])
def test_nested_tensors_are_errors(name: str) -> None:
    case = {key: tensor.detach() for key, tensor in make_case((2, 4)).items()}
    nested = torch.nested.nested_tensor([torch.ones(4), torch.ones(3)])
    with pytest.raises(LayoutError, match=f"^cat_loss: `{name}` must be a dense tensor"):
        cat_rs.cat_loss(**{**case, name: nested})


def test_a_lazily_negated_tensor_is_an_error() -> None:
    case = {key: tensor.detach() for key, tensor in make_case((2, 4)).items()}
    negated = torch.randn(2, 4, dtype=torch.complex64).conj().imag
    with pytest.raises(LayoutError, match=r"`target` .* negated view \(call .resolve_neg\(\)\)"):
        cat_rs.cat_loss(**{**case, "target": negated})


@about_kernels
def test_unaligned_memory_is_an_error() -> None:
    case = {key: tensor.detach() for key, tensor in make_case((1, 4)).items()}
    unaligned = torch.frombuffer(bytearray(33), dtype=F32, count=4, offset=1)[None]
    with pytest.raises(LayoutError, match="`target` must be a tensor aligned to its dtype"):
        cat_rs.cat_loss(**{**case, "target": unaligned})


@pytest.mark.parametrize("value", by_id({"list": [1.0], "none": None, "numpy": np.zeros((2, 3, 5, 7)), "float": 1.0}))
@pytest.mark.parametrize("name", [*NAMES, "mask", "sample_weight"])
def test_what_is_not_a_tensor_is_a_type_error(name: str, value: Any) -> None:
    if value is None and name not in NAMES:
        pytest.skip("None is a value of this argument")
    with pytest.raises(TypeError, match=f"'?{name}'?.* torch.Tensor, got"):
        cat_rs.cat_loss(**{**make_case(), name: value})


def test_the_operator_passes_pytorchs_checks() -> None:
    predictions = [draw(3, 4, 5, grad=True) for _ in range(2)]
    none = [None] * 4
    check_operator("cat_loss", predictions[0], draw(3, 4, 5), predictions[1], draw(3, 4, 5), *none, 0.5, False)
    weighted = torch.tensor([1.0, 0.5]), torch.rand(2, 1, 3), torch.rand(3), torch.rand(1, 4, 3), 2.0, True
    predictions = [draw(size, 4, 3, grad=grad, dtype=BF16) for size, grad in ((2, True), (3, False))]
    check_operator("cat_loss", predictions[0], draw(2, 4, 3), predictions[1], draw(3, 4, 3, dtype=F64), *weighted)


# Preservation samples of their own


def preserved_case(
    shape: tuple[int, ...], preserved: int, dtypes: tuple[torch.dtype, ...] = (F32,) * 4, seed: int = 0
) -> Case:
    case = make_case(shape, dtypes, seed)
    return {**case, **{name: make_case((preserved, *shape[1:]), dtypes, seed + 1)[name] for name in NAMES[2:]}}


@pytest.mark.parametrize("dtypes", by_id(DTYPES | MIXED_DTYPES))
@pytest.mark.parametrize("preserved", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", by_id({name: SHAPES[name] for name in ("odd", "batch-only", "odd-blocks", "large")}))
def test_preservation_samples_match_reference(
    shape: tuple[int, ...], preserved: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    weights = {"sample_weight": torch.rand(shape[0]) + 0.1, "preserve_weight": torch.rand(preserved) + 0.1}
    check_against_reference(preserved_case(shape, preserved, dtypes), cat_factor=0.7, upstream=3.0, **weights)


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "normalized"])
@pytest.mark.parametrize("preserve_shape", [(5, 1, 37, 61), (1, 1, 37, 61), (5, 3, 37, 61), (1, 3, 1, 61)], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 37, 61), (1, 3, 37, 61), None], ids=str)
def test_preservation_samples_have_masks_of_their_own(
    shape: tuple[int, ...] | None, preserve_shape: tuple[int, ...], normalize: bool
) -> None:
    masks = {"preserve_mask": torch.rand(preserve_shape).gt(0.4)}
    if shape is not None:
        masks["mask"] = torch.rand(shape)
    check_against_reference(preserved_case((2, 3, 37, 61), 5), mask_normalize=normalize, **masks)


def test_weights_and_masks_are_shared_unless_given() -> None:
    case = make_case((3, 4, 5))
    weight, mask = torch.rand(3), torch.rand(3, 1, 5)
    shared = cat_rs.cat_loss(**case, sample_weight=weight, mask=mask)
    both = {"preserve_weight": weight.clone(), "preserve_mask": mask.clone()}
    assert torch.equal(shared, cat_rs.cat_loss(**case, sample_weight=weight, mask=mask, **both))
    other = cat_rs.cat_loss(**case, sample_weight=weight, mask=mask, **{**both, "preserve_weight": torch.ones(3)})
    assert not torch.equal(shared, other)


def test_preservation_samples_compile() -> None:
    case = preserved_case((2, 3, 5), 4)
    weights = {"sample_weight": torch.rand(2), "preserve_weight": torch.rand(4)}
    loss = torch.compile(lambda **given: cat_rs.cat_loss(**given, **weights), backend="aot_eager", fullgraph=True)(
        **case
    )
    loss.backward()
    compiled = [case[name].grad.clone() for name in PREDICTIONS]
    for name in PREDICTIONS:
        case[name].grad = None
    eager = cat_rs.cat_loss(**case, **weights)
    eager.backward()
    assert_close(loss, eager)
    for name, gradient in zip(PREDICTIONS, compiled, strict=True):
        assert_close(gradient, case[name].grad, label=name)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_pred_no_trigger": torch.ones(4, 3, 6)}, r"`model_pred_no_trigger` must have shape \[P >= 1, 3, 5\]"),
        (
            {"model_pred_no_trigger": torch.ones(0, 3, 5)},
            r"`model_pred_no_trigger` must have shape \[P >= 1, 3, 5\]",
        ),
        ({"base_pred": torch.ones(2, 3, 5)}, r"`base_pred` must have shape \[4, 3, 5\], got \[2, 3, 5\]"),
        ({"sample_weight": torch.ones(2)}, r"`preserve_weight` must have shape \[4\], got \[2\]"),
        ({"preserve_weight": torch.ones(3)}, r"`preserve_weight` must have shape \[4\], got \[3\]"),
        ({"mask": torch.ones(2, 3, 5)}, r"`preserve_mask` must have shape \[4, 3, 5\] up to dimensions of size 1"),
    ],
)
def test_bad_preservation_samples_are_named(change: Case, text: str) -> None:
    with pytest.raises(ShapeError, match=f"^cat_loss: {text}"):
        cat_rs.cat_loss(**{**preserved_case((2, 3, 5), 4), **change})


# student_loss


@pytest.mark.parametrize("preserved", [1, 2, 5])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=["f32", "f64", "bf16", "f16"])
def test_student_loss_has_samples_for_each_term(dtype: torch.dtype, preserved: int) -> None:
    student, target = draw(3 + preserved, 4, 5, 3, dtype=dtype), draw(3, 4, 5, 3, dtype=dtype)
    base = draw(preserved, 4, 5, 3, dtype=dtype)
    weights, masks = (torch.rand(3), torch.rand(preserved)), (torch.rand(3, 1, 5, 3), None)
    total, parts, grad = student_loss(student, target, base, weights[0], masks[0], weights[1], masks[1], 0.7, 0.25)
    twin = student.double().requires_grad_()
    expected = references.cat_loss(
        twin[:3],
        target,
        twin[3:],
        base,
        cat_factor=0.7,
        sample_weight=weights[0],
        mask=masks[0],
        preserve_weight=weights[1],
        preserve_mask=torch.ones(1, 1, 1, 1),
    )
    (0.25 * expected.total).backward()
    assert_close(total, expected.total)
    assert_close(parts, torch.stack([expected.diffusion, expected.cat]))
    assert_close(grad, twin.grad)


@pytest.mark.parametrize("preserve", [True, False], ids=["preserve", "plain"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=["f32", "f64", "bf16", "f16"])
def test_student_loss_is_the_loss_of_both_halves(dtype: torch.dtype, preserve: bool) -> None:
    student = draw(4 if preserve else 2, 4, 5, 3, dtype=dtype)
    target, base = draw(2, 4, 5, 3, dtype=dtype), draw(2, 4, 5, 3, dtype=dtype)
    weight, mask = torch.tensor([0.5, 2.0]), torch.rand(2, 1, 5, 3)
    total, parts, grad = student_loss(
        student, target, base if preserve else None, weight, mask, weight, mask, 0.7, 0.25
    )
    twin = student.double().requires_grad_()
    wide_base = base.double()
    expected = references.cat_loss(
        twin[:2],
        target.double(),
        twin[2:] if preserve else wide_base,
        wide_base,
        cat_factor=0.7,
        sample_weight=weight,
        mask=mask,
    )
    (0.25 * expected.total).backward()
    assert_close(total, expected.total)
    assert_close(parts, torch.stack([expected.diffusion, expected.cat]))
    assert_close(grad, twin.grad)
    assert grad.dtype == dtype


def test_student_loss_takes_factors_as_tensors() -> None:
    arguments = draw(4, 3, 5), draw(2, 3, 5), draw(2, 3, 5), *[None] * 4
    factors = torch.tensor([0.3, 0.25], dtype=F64)
    for ours, theirs in zip(student_loss(*arguments, *factors), student_loss(*arguments, 0.3, 0.25), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        pytest.param({"cat_factor": -1.0}, InvalidValueError, "cat_loss: `cat_factor` .* got -1", id="sign"),
        pytest.param(
            {"cat_factor": torch.tensor(math.nan)},
            InvalidValueError,
            "cat_loss: `cat_factor` .* got [Nn]a[Nn]",
            id="nan",
        ),
        pytest.param(
            {"cat_factor": torch.ones(2)},
            InvalidValueError,
            r"cat_loss: `cat_factor` must be one float32 or float64 element, got float32 of shape \[2\]",
            id="two-factors",
        ),
        pytest.param(
            {"scale": torch.ones((), dtype=F16)}, InvalidValueError, "cat_loss: `scale` .* got float16", id="scale-f16"
        ),
        pytest.param(
            {"scale": torch.ones((), device="meta")}, DeviceError, "cat_loss: `scale` must be on the CPU", id="device"
        ),
        pytest.param({"student": torch.ones(3, 3)}, ShapeError, r"CatStep: `student` must have shape \[2", id="odd"),
        pytest.param({"student": torch.ones(0, 3)}, ShapeError, r"CatStep: `student` must have shape", id="empty"),
        pytest.param({"base": torch.ones(2, 4)}, ShapeError, r"cat_loss: `base_pred` must have shape", id="base"),
    ],
)
def test_bad_arguments_of_student_loss_are_named(change: Case, error: type[Exception], text: str) -> None:
    arguments = {"student": torch.ones(4, 3), "target": torch.ones(2, 3), "base": torch.ones(2, 3)}
    others = {**dict.fromkeys(OF_SAMPLES), "cat_factor": 1.0, "scale": 1.0}
    with pytest.raises(error, match=f"^{text}"):
        student_loss(**{**arguments, **others, **change})
