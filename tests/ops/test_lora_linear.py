"""lora_linear: output and gradients against float64 and against PEFT's layer, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from tests import references
from tests.operators import check_operator, draw
from tests.tolerances import assert_close, max_abs

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
LOW = {"bf16": torch.bfloat16, "f16": torch.float16}
LEADING = {"vector": (), "rows": (6,), "sequence": (2, 7), "image": (2, 3, 5), "four": (2, 1, 3, 2)}
# in, out, r
OF_NO_OUTPUTS = ((2, 8), (0, 8), (0,), (2, 8), (0, 2))
SIZES = {"tidy": (16, 32, 4), "odd": (13, 7, 3), "rank-1": (5, 11, 1), "one": (1, 1, 1), "rank-above-width": (3, 2, 5)}

Case = dict[str, Any]


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def make_case(
    leading: tuple[int, ...] = (2, 7),
    sizes: tuple[int, int, int] = (13, 7, 3),
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    adapter: torch.dtype | None = None,
) -> Case:
    inner, out, rank = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": draw(*leading, inner).requires_grad_(),
        "weight": draw(out, inner),
        "bias": draw(out) if bias else None,
        "lora_A": draw(rank, inner, dtype=adapter or dtype).requires_grad_(),
        "lora_B": draw(out, rank, dtype=adapter or dtype).requires_grad_(),
        "scaling": 0.75,
    }


def check_against_reference(case: Case, upstream: torch.Tensor | None = None) -> None:
    """The output and every gradient that is wanted are the float64 reference's on the same rounded inputs."""
    y = cat_rs.lora_linear(**case)
    upstream = torch.randn(y.shape, dtype=torch.float64).to(y.dtype) if upstream is None else upstream
    if y.requires_grad:
        y.backward(upstream)

    twins = {
        name: value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }
    expected = references.lora_linear(**twins)
    if expected.requires_grad:
        expected.backward(upstream.double())

    inner, rank = case["weight"].shape[1], case["lora_A"].shape[0]
    rows = y.numel() // case["weight"].shape[0]
    # Low precisions round x A^T and each of the two products' sums; errors grow with the root of the sum's length.
    for name, ours, theirs, length in [
        ("y", y, expected, inner + rank),
        *((name, case[name].grad, twins[name].grad, rows + rank) for name in ("x", "lora_A", "lora_B")),
        *([("bias", case["bias"].grad, twins["bias"].grad, rows)] if case["bias"] is not None else []),
    ]:
        if theirs is None:
            assert ours is None, f"{name} has a gradient that nobody wanted"
            continue
        assert ours is not None, f"{name} has no gradient"
        assert ours.dtype == (y if name == "y" else case[name]).dtype
        # Beside float32 A and B, too, the products are in y's dtype.
        assert_close(ours, theirs, dtype=y.dtype, factor=math.sqrt(length), scale=max_abs(theirs), label=name)


@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("sizes", by_id(SIZES))
def test_sizes_match_reference(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_against_reference(make_case((4, 9), sizes, dtype))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize("leading", by_id(LEADING))
def test_leading_dimensions_match_reference(leading: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    check_against_reference(make_case(leading, dtype=dtype, bias=bias))


@pytest.mark.parametrize("dtype", by_id(LOW))
@pytest.mark.parametrize("sizes", by_id(SIZES))
def test_float32_adapters_match_reference(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_against_reference(make_case((4, 9), sizes, dtype, adapter=torch.float32))


@pytest.mark.parametrize("dtype", by_id(LOW))
@pytest.mark.parametrize("leading", by_id(LEADING))
def test_float32_adapters_are_rounded_once(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(leading, dtype=dtype, adapter=torch.float32)
    low = {**case, "x": case["x"].detach().requires_grad_()}
    low.update({name: case[name].detach().to(dtype).requires_grad_() for name in ("lora_A", "lora_B")})
    y, expected = cat_rs.lora_linear(**case), cat_rs.lora_linear(**low)
    assert torch.equal(y, expected)
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)
    expected.backward(upstream)
    for name in ("x", "lora_A", "lora_B"):
        assert case[name].grad.dtype == case[name].dtype
        assert torch.equal(case[name].grad, low[name].grad.to(case[name].dtype))


@pytest.mark.parametrize("operator", [False, True])
def test_a_layer_without_outputs_has_gradients(operator: bool) -> None:
    x, weight, bias, lora_A, lora_B = (torch.zeros(shape, requires_grad=True) for shape in OF_NO_OUTPUTS)
    if operator:
        y, _ = torch.ops.cat_rs.lora_linear(x, weight.detach(), bias, lora_A, lora_B, 0.5)
    else:
        y = cat_rs.lora_linear(x, weight.detach(), bias, lora_A, lora_B, 0.5)
    y.sum().backward()
    for tensor in (x, bias, lora_A, lora_B):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("leading", by_id({"rows": (0,), "batch": (0, 7), "sequence": (2, 0)}))
def test_an_empty_batch_has_zero_gradients(leading: tuple[int, ...]) -> None:
    case = make_case(leading)
    y = cat_rs.lora_linear(**case)
    assert y.shape == (*leading, 7)
    y.sum().backward()
    assert case["x"].grad.shape == case["x"].shape
    assert case["lora_A"].grad.count_nonzero() == case["lora_B"].grad.count_nonzero() == 0


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "x+lora_A", "x+lora_B", "lora_A+lora_B", "none"])
@pytest.mark.parametrize("adapter", by_id({"": None, "f32-adapter": torch.float32}))
@pytest.mark.parametrize("dtype", by_id({"f32": torch.float32, "bf16": torch.bfloat16}))
def test_gradients_only_where_wanted(wanted: str, dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    case = make_case(dtype=dtype, adapter=adapter)
    for name in ("x", "lora_A", "lora_B"):
        case[name] = case[name].detach().requires_grad_(name in wanted.split("+"))
    check_against_reference(case)


@pytest.mark.parametrize("dtype", by_id({"f32": torch.float32, "f64": torch.float64}))
def test_strided_input_and_gradient(dtype: torch.dtype) -> None:
    case = make_case((4, 6), dtype=dtype)
    x = torch.randn(13, 6, 8, dtype=dtype)
    for view in (x.permute(2, 1, 0)[::2], x.permute(2, 1, 0)[4:]):
        case["x"] = view.detach().requires_grad_()
        for upstream in (
            torch.randn(7, 6, 4, dtype=dtype).permute(2, 1, 0),
            torch.ones((), dtype=dtype).expand(4, 6, 7),
        ):
            case["lora_A"].grad = case["lora_B"].grad = case["x"].grad = None
            check_against_reference(case, upstream)


def test_strided_weights() -> None:
    case = make_case()
    for name in ("weight", "lora_A", "lora_B"):
        transposed = case[name].detach().T.contiguous().T
        case[name] = transposed.requires_grad_(name != "weight")
    check_against_reference(case)


@pytest.mark.parametrize("dtype", by_id({"f32": torch.float32, "bf16": torch.bfloat16}))
@pytest.mark.parametrize("leading", by_id(LEADING))
def test_a_trained_bias(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(leading, dtype=dtype)
    case["bias"].requires_grad_()
    check_against_reference(case)


def test_gradients_and_second_derivatives() -> None:
    case = make_case((2, 3), (4, 5, 2), torch.float64)

    def layer(x: torch.Tensor, bias: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return cat_rs.lora_linear(x, case["weight"], bias, lora_A, lora_B, case["scaling"])

    inputs = (case["x"], case["bias"].requires_grad_(), case["lora_A"], case["lora_B"])
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("sizes", [(0, 5, 2), (4, 0, 2)], ids=["no-outputs", "no-inputs"])
def test_second_derivatives_of_an_empty_layer(sizes: tuple[int, int, int]) -> None:
    case = make_case((2, 3), sizes, torch.float64)
    wanted = [case[name] for name in ("x", "lora_A", "lora_B")]
    slopes = torch.autograd.grad(cat_rs.lora_linear(**case).square().sum(), wanted, create_graph=True)
    for slope, tensor in zip(slopes, wanted, strict=True):
        assert torch.equal(slope, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", by_id(LOW))
def test_second_derivatives_by_a_float32_adapter(dtype: torch.dtype) -> None:
    case = make_case((2, 3), dtype=dtype, adapter=torch.float32)
    twins = {
        name: value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }

    def penalty(arguments: Case, layer: Any) -> list[torch.Tensor]:
        wanted = [arguments[name] for name in ("x", "lora_A", "lora_B")]
        # A mean: float16 ends at 65504.
        slopes = torch.autograd.grad(layer(**arguments).square().mean(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(slope.double().square().sum() for slope in slopes), wanted))

    ours, theirs = penalty(case, cat_rs.lora_linear), penalty(twins, references.lora_linear)
    for name, one, other in zip(("x", "lora_A", "lora_B"), ours, theirs, strict=True):
        assert one.dtype == case[name].dtype
        # A chain of a dozen products, each of whose sums is rounded.
        assert_close(one, other, dtype=dtype, factor=12, scale=max_abs(other), label=name)


def test_a_second_backward_adds_the_same_gradients() -> None:
    case = make_case()
    loss = cat_rs.lora_linear(**case).square().sum()
    loss.backward(retain_graph=True)
    first = {name: case[name].grad.clone() for name in ("x", "lora_A", "lora_B")}
    for name in first:
        case[name].grad.zero_()
    loss.backward()
    assert all(torch.equal(case[name].grad, grad) for name, grad in first.items())


def test_changing_a_saved_weight_before_backward_is_noticed() -> None:
    case = make_case()
    y = cat_rs.lora_linear(**case)
    with torch.no_grad():
        case["lora_A"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("scaling", [0.0, 1.0, -2.5], ids=str)
def test_any_scaling(scaling: float) -> None:
    check_against_reference({**make_case(), "scaling": scaling})


@pytest.mark.parametrize("adapter", by_id({"": None, "f32-adapter": torch.float32}))
@pytest.mark.parametrize("dtype", by_id({"f32": torch.float32, **LOW}))
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_a_peft_layer(bias: bool, rslora: bool, dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = torch.nn.Linear(24, 17, bias=bias, dtype=dtype).requires_grad_(False)
    layer = Linear(base, "default", LoraConfig(r=5, lora_alpha=8, use_rslora=rslora), r=5, lora_alpha=8)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    layer.lora_A.to(adapter or dtype)
    layer.lora_B.to(adapter or dtype)
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 9, 24, dtype=dtype)
    upstream = torch.randn(2, 9, 17, dtype=dtype)

    def run(ours: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        scaling = layer.scaling["default"]
        y = cat_rs.lora_linear(leaf, base.weight, base.bias, lora_A, lora_B, scaling) if ours else layer(leaf)
        return [y, *torch.autograd.grad(y, [leaf, lora_A, lora_B], upstream)]

    for name, ours, theirs in zip(("y", "x", "lora_A", "lora_B"), run(True), run(False), strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, dtype=dtype, factor=8, scale=max_abs(theirs), label=name)


BAD = {
    "x-width": ({"x": torch.ones(2, 12)}, ShapeError, r"`x` must have shape \[..., 13\], got \[2, 12\]"),
    "x-scalar": ({"x": torch.tensor(1.0)}, ShapeError, r"`x` must have shape \[..., 13\], got \[\]"),
    "x-int": ({"x": torch.ones(2, 13).long()}, DtypeError, "`x` must have dtype float32, .* got int64"),
    "x-meta": ({"x": torch.ones(2, 13, device="meta")}, DeviceError, "`x` must be on the CPU"),
    "x-sparse": ({"x": torch.ones(2, 13).to_sparse()}, LayoutError, "`x` must be a dense tensor"),
    "weight-dims": ({"weight": torch.ones(13)}, ShapeError, r"`weight` must have shape \[out, in\].* got \[13\]"),
    "weight-dtype": (
        {"weight": torch.ones(7, 13, dtype=torch.bfloat16)},
        DtypeError,
        "`weight` must have dtype the dtype of `x`, got bfloat16 beside x of float32",
    ),
    "weight-grad": ({"weight": torch.ones(7, 13, requires_grad=True)}, InvalidValueError, "`weight` must be frozen"),
    "bias-shape": ({"bias": torch.ones(8)}, ShapeError, r"`bias` must have shape \[7\], got \[8\]"),
    "bias-meta": ({"bias": torch.ones(7, device="meta")}, DeviceError, "`bias` must be on the CPU"),
    "A-shape": ({"lora_A": torch.ones(3, 12)}, ShapeError, r"`lora_A` must have shape \[3, 13\], got \[3, 12\]"),
    "B-rank": ({"lora_B": torch.ones(7, 4)}, ShapeError, r"`lora_B` must have shape \[7, 3\], got \[7, 4\]"),
    "A-dtype": ({"lora_A": torch.ones(3, 13).double()}, DtypeError, "`lora_A` .* got float64 beside x of float32"),
    "A-lower": ({"lora_A": torch.ones(3, 13).half()}, DtypeError, "`lora_A` .* got float16 beside x of float32"),
    "B-higher": (
        {
            "x": torch.ones(2, 13).half(),
            "weight": torch.ones(7, 13).half(),
            "bias": None,
            "lora_B": torch.ones(7, 3).double(),
        },
        DtypeError,
        "`lora_B` .* got float64 beside x of float16",
    ),
    "scaling-nan": ({"scaling": float("nan")}, InvalidValueError, "`scaling` must be a finite number, got [Nn]a[Nn]"),
    "scaling-inf": ({"scaling": float("inf")}, InvalidValueError, "`scaling` .* got inf"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^lora_linear: {text}") as caught:
        cat_rs.lora_linear(**{**make_case(), **arguments})
    assert isinstance(caught.value, CatRsError)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_what_is_not_a_tensor_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=r"torch.Tensor, got"):
        cat_rs.lora_linear(**{**make_case(), name: [1.0]})


def test_the_output_may_be_added_to_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, lora_A, lora_B = (
        torch.randn(shape, generator=generator) for shape in ((2, 5, 6), (7, 6), (3, 6), (7, 3))
    )
    lora_B.requires_grad_()
    y = cat_rs.lora_linear(x, weight, None, lora_A, lora_B, 0.5)
    y += 1.0
    y.sum().backward()
    expected = 0.5 * (x @ lora_A.T).sum(dim=(0, 1)).expand(7, 3)
    torch.testing.assert_close(lora_B.grad, expected)


def test_the_operator_passes_pytorchs_checks() -> None:
    weight, lora_A, lora_B = draw(7, 6), draw(3, 6, grad=True), draw(7, 3, grad=True)
    check_operator("lora_linear", draw(2, 5, 6, grad=True), weight, draw(7, grad=True), lora_A, lora_B, 0.5)
    check_operator("lora_linear", draw(5, 6), weight, None, lora_A, lora_B, 1.0)
