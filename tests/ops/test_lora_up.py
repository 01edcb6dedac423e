"""lora_up_: the sum in place and its gradients against float64 in every layout, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from cat_rs.ops.lora_up import lora_up_
from tests import references
from tests.operators import check_operator, draw
from tests.tolerances import assert_close, max_abs

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
OUT, RANK = 7, 3
# The shape of y, and whether channels are its second dimension.
SHAPES = {
    "vector": ((OUT,), False),
    "rows": ((5, OUT), False),
    "sequence": ((2, 9, OUT), False),
    "picture": ((2, OUT, 5, 3), True),
    "one-position": ((3, OUT, 1, 1), True),
    "one-row": ((1, OUT, 1, 6), True),
    "line": ((2, OUT, 11), True),
    "volume": ((2, OUT, 2, 3, 4), True),
    "matrix": ((4, OUT), True),
}
# Large enough for the products of this package: the outer size is that of y's channels, the rank follows.
LARGE = {
    "rows": ((3, 50, 40), False, 9),
    "picture": ((1, 40, 16, 15), True, 16),
    "pictures": ((3, 33, 17, 16), True, 8),
    "narrow": ((2, 300, 9, 11), True, 4),
}
EMPTY = {"rows": ((0, OUT), False), "batch": ((0, OUT, 4, 4), True), "positions": ((2, OUT, 0, 4), True)}

Case = dict[str, Any]


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def make_case(
    shape: tuple[int, ...] = (2, 9, OUT),
    channels_second: bool = False,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    rank: int = RANK,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    hidden = list(shape)
    channel = 1 if channels_second else -1
    hidden[channel] = rank
    return {
        "y": draw(*shape).requires_grad_(),
        "hidden": draw(*hidden).requires_grad_(),
        "lora_B": draw(shape[channel], rank, dtype=adapter or dtype).requires_grad_(),
        "scaling": 0.75,
        "channels_second": channels_second,
    }


def in_layout(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    return tensor.detach().contiguous(memory_format=layout).requires_grad_(tensor.requires_grad)


def check_against_reference(case: Case, upstream: torch.Tensor | None = None) -> None:
    """The sum and every gradient that is wanted are the float64 reference's on the same rounded inputs."""
    # In place: on a copy, because a leaf may not be written to.
    y = case["y"].clone()
    result = lora_up_(**{**case, "y": y})
    assert result.data_ptr() == y.data_ptr()
    upstream = torch.randn(result.shape, dtype=torch.float64).to(result.dtype) if upstream is None else upstream
    result.backward(upstream)

    tensors = ("y", "hidden", "lora_B")
    twins = {name: case[name].detach().double().requires_grad_(case[name].requires_grad) for name in tensors}
    expected = references.lora_up(**twins, scaling=case["scaling"], channels_second=case["channels_second"])
    expected.backward(upstream.double())
    out, rank = case["lora_B"].shape
    positions = result.numel() // out
    for name, ours, theirs, length in [
        ("result", result, expected, rank),
        *((name, case[name].grad, twins[name].grad, positions + out) for name in tensors),
    ]:
        assert (ours is None) == (theirs is None), f"{name}: a gradient where none was wanted, or none where one was"
        if theirs is not None:
            assert ours.dtype == (result if name == "result" else case[name]).dtype
            # Beside a float32 B, too, the products are in y's dtype.
            scale = max_abs(theirs)
            assert_close(ours, theirs, dtype=result.dtype, factor=math.sqrt(length), scale=scale, label=name)


@pytest.mark.parametrize("dtype", by_id(DTYPES))
@pytest.mark.parametrize(("shape", "channels_second"), [pytest.param(*row, id=name) for name, row in SHAPES.items()])
def test_shapes_match_reference(shape: tuple[int, ...], channels_second: bool, dtype: torch.dtype) -> None:
    check_against_reference(make_case(shape, channels_second, dtype))


@pytest.mark.parametrize("scaling", [1.0, 0.75], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "last"])
@pytest.mark.parametrize(
    ("shape", "channels_second", "rank"), [pytest.param(*row, id=name) for name, row in LARGE.items()]
)
def test_large_shapes_match_reference(
    shape: tuple[int, ...], channels_second: bool, rank: int, layout: torch.memory_format, scaling: float
) -> None:
    case = {**make_case(shape, channels_second, rank=rank), "scaling": scaling}
    if channels_second:
        case["y"], case["hidden"] = (in_layout(case[name], layout) for name in ("y", "hidden"))
    check_against_reference(case)


@pytest.mark.parametrize("dtype", by_id({"bf16": torch.bfloat16, "f16": torch.float16}))
@pytest.mark.parametrize(("shape", "channels_second"), [pytest.param(*row, id=name) for name, row in SHAPES.items()])
def test_a_float32_b_matches_reference(shape: tuple[int, ...], channels_second: bool, dtype: torch.dtype) -> None:
    check_against_reference(make_case(shape, channels_second, dtype, torch.float32))


@pytest.mark.parametrize("dtype", by_id({"f32": torch.float32, "bf16": torch.bfloat16}))
@pytest.mark.parametrize("y_layout", [torch.contiguous_format, torch.channels_last], ids=["y-plain", "y-last"])
@pytest.mark.parametrize("h_layout", [torch.contiguous_format, torch.channels_last], ids=["h-plain", "h-last"])
@pytest.mark.parametrize("g_layout", [torch.contiguous_format, torch.channels_last], ids=["g-plain", "g-last"])
def test_memory_layouts(
    y_layout: torch.memory_format, h_layout: torch.memory_format, g_layout: torch.memory_format, dtype: torch.dtype
) -> None:
    case = make_case((2, OUT, 5, 3), True, dtype)
    case["y"], case["hidden"] = in_layout(case["y"], y_layout), in_layout(case["hidden"], h_layout)
    check_against_reference(case, torch.randn(2, OUT, 5, 3).to(dtype).contiguous(memory_format=g_layout))


def test_expanded_and_strided_gradients() -> None:
    for shape, channels_second in SHAPES.values():
        check_against_reference(make_case(shape, channels_second), torch.ones(()).expand(shape))
        check_against_reference(make_case(shape, channels_second), torch.randn(*shape, 2)[..., 1])


@pytest.mark.parametrize(("shape", "channels_second"), [pytest.param(*row, id=name) for name, row in EMPTY.items()])
def test_an_empty_batch_has_zero_gradients(shape: tuple[int, ...], channels_second: bool) -> None:
    check_against_reference(make_case(shape, channels_second))


@pytest.mark.parametrize("wanted", ["y", "hidden", "lora_B", "y+hidden", "y+lora_B", "hidden+lora_B"])
@pytest.mark.parametrize("shape", ["sequence", "picture"])
def test_gradients_only_where_wanted(shape: str, wanted: str) -> None:
    case = make_case(*SHAPES[shape])
    for name in ("y", "hidden", "lora_B"):
        case[name] = case[name].detach().requires_grad_(name in wanted.split("+"))
    check_against_reference(case)


@pytest.mark.parametrize("scaling", [0.0, 1.0, -2.5], ids=str)
@pytest.mark.parametrize("shape", ["sequence", "picture"])
def test_any_scaling(shape: str, scaling: float) -> None:
    check_against_reference({**make_case(*SHAPES[shape]), "scaling": scaling})


@pytest.mark.parametrize("shape", ["sequence", "picture"])
def test_gradients_and_second_derivatives(shape: str) -> None:
    case = make_case(*SHAPES[shape], torch.float64)

    def add(y: torch.Tensor, hidden: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return lora_up_(y.clone(), hidden, lora_B, case["scaling"], channels_second=case["channels_second"])

    inputs = (case["y"], case["hidden"], case["lora_B"])
    assert torch.autograd.gradcheck(add, inputs)
    assert torch.autograd.gradgradcheck(add, inputs)


@pytest.mark.parametrize("shape", ["sequence", "picture"])
def test_second_derivatives_by_a_float32_b(shape: str) -> None:
    case = make_case(*SHAPES[shape], torch.bfloat16, torch.float32)
    names = ("y", "hidden", "lora_B")
    twins = {name: case[name].detach().double().requires_grad_() for name in names}

    def penalty(arguments: Case, add: Any) -> list[torch.Tensor]:
        wanted = [arguments[name] for name in names]
        total = add(**{**case, **arguments, "y": arguments["y"].clone()}).square().sum()
        slopes = torch.autograd.grad(total, wanted, create_graph=True)
        return list(torch.autograd.grad(sum(slope.double().square().sum() for slope in slopes), wanted))

    ours, theirs = penalty({name: case[name] for name in names}, lora_up_), penalty(twins, references.lora_up)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert one.dtype == case[name].dtype
        # A chain of several products, each of whose sums is rounded.
        assert_close(one, other, dtype=torch.bfloat16, factor=8, scale=max_abs(other), label=name)


def test_writing_to_a_tensor_that_autograd_saved_is_noticed() -> None:
    case = make_case()
    y = case["y"].exp()
    lora_up_(**{**case, "y": y})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BAD: dict[str, tuple[Case, type[Exception], str]] = {
    "y-int": ({"y": torch.ones(2, 9, 7).long()}, DtypeError, "`y` must have dtype float32, .* got int64"),
    "y-meta": ({"y": torch.ones(2, 9, 7, device="meta")}, DeviceError, "`y` must be on the CPU"),
    "y-scalar": ({"y": torch.tensor(1.0)}, ShapeError, r"`y` must have shape \[..., out\], got \[\]"),
    "y-vector": (
        {"y": torch.ones(7), "channels_second": True},
        ShapeError,
        r"`y` must have shape \[B, out, ...\], got \[7\]",
    ),
    "y-strided": (
        {"y": torch.ones(9, 2, 7).transpose(0, 1)},
        LayoutError,
        "`y` must be a contiguous or channels_last tensor",
    ),
    "hidden-rank": (
        {"hidden": torch.ones(2, 9, 4)},
        ShapeError,
        r"`hidden` must have shape \[2, 9, 3\], got \[2, 9, 4\]",
    ),
    "hidden-dtype": (
        {"hidden": torch.ones(2, 9, 3).double()},
        DtypeError,
        "`hidden` must have dtype the dtype of `y`, got float64 beside y of float32",
    ),
    "B-dtype": (
        {"lora_B": torch.ones(7, 3).half()},
        DtypeError,
        "`lora_B` must have dtype the dtype of `y`, got float16 beside y of float32",
    ),
    "B-dims": ({"lora_B": torch.ones(7, 3, 1)}, ShapeError, r"`lora_B` must have shape \[out, r\], got \[7, 3, 1\]"),
    "B-out": ({"lora_B": torch.ones(6, 3)}, ShapeError, r"`lora_B` must have shape \[7, 3\], got \[6, 3\]"),
    "scaling-nan": ({"scaling": float("nan")}, InvalidValueError, "`scaling` must be a finite number, got [Nn]a[Nn]"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_arguments_are_named(arguments: Case, error: type[Exception], text: str) -> None:
    case = {**make_case(), **arguments}
    if "y" not in arguments:
        case["y"] = case["y"].detach()
    before = case["y"].clone()
    with pytest.raises(error, match=f"^lora_up: {text}") as caught:
        lora_up_(**case)
    assert isinstance(caught.value, CatRsError)
    if before.device.type == "cpu":
        assert torch.equal(case["y"], before)


def test_the_operator_passes_pytorchs_checks() -> None:
    lora_B = draw(7, 3, grad=True)
    check_operator("lora_up", draw(2, 5, 7, grad=True), draw(2, 5, 3, grad=True), lora_B, 0.5, False)
    check_operator("lora_up", draw(2, 7, 4, 5), draw(2, 3, 4, 5, grad=True), lora_B, 1.0, True)
