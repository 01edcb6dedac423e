"""frozen_conv2d: output and gradient against float64, the layer that uses it, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cat_rs import frozen_layers
from cat_rs._native import _core
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.frozen_layers import FrozenConv2d, patch_frozen, unpatch_frozen
from cat_rs.ops.frozen_conv2d import FrozenConv2dFunction
from tests.models import add_lora, tiny_unet
from tests.operators import check_operator, draw
from tests.tolerances import assert_close, max_abs

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
# batch, in, out, (H, W), kernel
SHAPES = {
    "tidy": (2, 8, 16, (4, 4), (3, 3)),
    "odd": (3, 5, 7, (5, 3), (3, 3)),
    "one": (1, 1, 1, (1, 1), (1, 1)),
    "one-position": (1, 6, 4, (1, 1), (3, 3)),
    "oblong": (2, 3, 4, (6, 9), (1, 5)),
}
# stride, padding, dilation
GEOMETRIES = {
    "plain": ((1, 1), (0, 0), (1, 1)),
    "same": ((1, 1), (1, 1), (1, 1)),
    "down": ((2, 2), (1, 1), (1, 1)),
    "uneven": ((3, 1), (2, 4), (1, 2)),
}


def make(shape: Any, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[torch.Tensor, ...]:
    batch, inner, out, size, kernel = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    return draw(batch, inner, *size).requires_grad_(), draw(out, inner, *kernel), draw(out) if bias else None


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Any) -> None:
    """Output and input gradient are the float64 convolution's on the same rounded inputs."""
    y = FrozenConv2dFunction.apply(x, weight, bias, *geometry)
    exact = x.detach().double().requires_grad_()
    expected = F.conv2d(exact, weight.double(), None if bias is None else bias.double(), *geometry)
    length = weight[0].numel()
    assert_close(y, expected, factor=math.sqrt(length) + 1, scale=max_abs(expected), label="y")
    upstream = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    (dx,) = torch.autograd.grad(y, x, upstream)
    (expected_dx,) = torch.autograd.grad(expected, exact, upstream.double())
    length = weight.shape[0] * weight[0, 0].numel()
    assert_close(dx, expected_dx, factor=math.sqrt(length) + 1, scale=max_abs(expected_dx), label="dx")


@pytest.mark.parametrize("dtype", [pytest.param(value, id=name) for name, value in DTYPES.items()])
@pytest.mark.parametrize("geometry", [pytest.param(value, id=name) for name, value in GEOMETRIES.items()])
@pytest.mark.parametrize("shape", [pytest.param(value, id=name) for name, value in SHAPES.items()])
def test_matches_float64(shape: Any, geometry: Any, dtype: torch.dtype) -> None:
    size, kernel = shape[3:]
    _, padding, dilation = geometry
    if any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)):
        with pytest.raises(ShapeError, match=r"^frozen_conv2d: `x` must have shape .* with room for the kernel"):
            FrozenConv2dFunction.apply(*make(shape, dtype), *geometry)
        return
    check(*make(shape, dtype), geometry)
    check(*make(shape, dtype, bias=False), geometry)


def test_strided_input_and_weight() -> None:
    x, weight, bias = make(SHAPES["tidy"])
    view = x.detach().contiguous(memory_format=torch.channels_last)[:, :, ::2].requires_grad_()
    check(view, weight.contiguous(memory_format=torch.channels_last), bias, GEOMETRIES["same"])


def test_gradcheck() -> None:
    x, weight, bias = make(SHAPES["odd"], torch.float64)
    geometry = GEOMETRIES["down"]
    assert torch.autograd.gradcheck(lambda x: FrozenConv2dFunction.apply(x, weight, bias, *geometry), (x,))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        pytest.param({"x": torch.ones(2, 7, 4, 4)}, ShapeError, r"`x` must have shape \[B, 8, H, W\]", id="channels"),
        pytest.param({"x": torch.ones(8, 4, 4)}, ShapeError, r"`x` must have shape .* got \[8, 4, 4\]", id="no-batch"),
        pytest.param({"x": torch.ones(2, 8, 4, 4).long()}, DtypeError, "`x` .* got int64", id="int"),
        pytest.param({"x": torch.ones(2, 8, 4, 4, device="meta")}, DeviceError, "`x` must be on the CPU", id="meta"),
        pytest.param({"weight": torch.ones(16, 8)}, ShapeError, r"`weight` .* \[out, in, kh, kw\]", id="weight-dims"),
        pytest.param({"bias": torch.ones(15)}, ShapeError, r"`bias` must have shape \[16\], got \[15\]", id="bias"),
        pytest.param({"bias": torch.ones(16).double()}, DtypeError, "`bias` .* float64 beside x of float32", id="mix"),
        pytest.param({"stride": (0, 1)}, InvalidValueError, r"`stride` must be two integers >= 1", id="stride"),
        pytest.param({"padding": (0, -1)}, InvalidValueError, r"`padding` must be two integers >= 0", id="padding"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    x, weight, bias = make(SHAPES["tidy"])
    arguments = {"x": x, "weight": weight, "bias": bias, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    with pytest.raises(error, match=f"^frozen_conv2d: {text}"):
        _core.frozen_conv2d_forward(**{**arguments, **change})


@pytest.fixture
def small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_layers, "max_output_positions", lambda weights: 128)


@pytest.mark.usefixtures("small_layers_count")
def test_only_plain_frozen_layers_are_patched() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3).requires_grad_(False),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Conv2d(4, 4, 3, groups=2).requires_grad_(False),
        torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False),
        torch.nn.Conv2d(4, 4, 3, padding="same").requires_grad_(False),
        torch.nn.ConvTranspose2d(4, 4, 3).requires_grad_(False),
    )
    keys = list(model.state_dict())
    assert patch_frozen(model).convolutions == ["0"]
    assert list(model.state_dict()) == keys
    unpatch_frozen(model)
    assert type(model[0]) is torch.nn.Conv2d


def test_small_layers_stay_as_they_are() -> None:
    assert patch_frozen(torch.nn.Conv2d(4, 4, 3).requires_grad_(False)).convolutions == []


class Recorder:
    """Counts the calls that run as a product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        apply = FrozenConv2dFunction.apply

        def counted(*arguments: Any) -> torch.Tensor:
            self.calls += 1
            return apply(*arguments)

        monkeypatch.setattr(FrozenConv2dFunction, "apply", counted)


@pytest.mark.usefixtures("small_layers_count")
def test_a_layer_picks_the_product_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    layer = torch.nn.Conv2d(4, 6, 3, padding=1, stride=2).requires_grad_(False)
    patch_frozen(layer)
    assert isinstance(layer, FrozenConv2d)
    at_limit, above = torch.randn(2, 4, 16, 16), torch.randn(3, 4, 16, 16)
    layer(at_limit)
    assert recorder.calls == 1
    layer(above)
    with torch.autocast("cpu", torch.bfloat16):
        layer(at_limit)
    layer.requires_grad_(True)
    layer(at_limit)
    layer.requires_grad_(False).double()(at_limit.double())
    assert recorder.calls == 1
    layer.float()(at_limit[0])
    # Its weight would be copied into rows in every call.
    layer.to(memory_format=torch.channels_last)(at_limit)
    assert recorder.calls == 1


@pytest.mark.usefixtures("small_layers_count")
def test_a_patched_unet_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(tiny_unet())
    size = model.config.sample_size
    latents = torch.randn(1, model.config.in_channels, size, size)
    text = torch.randn(1, 5, model.config.cross_attention_dim)
    trained = [param for param in model.parameters() if param.requires_grad]

    def run() -> list[torch.Tensor]:
        y = model(latents, 500, text, return_dict=False)[0]
        return [y, *torch.autograd.grad(y.square().sum(), trained)]

    expected = run()
    recorder = Recorder(monkeypatch)
    assert patch_frozen(model).convolutions
    got = run()
    assert recorder.calls > 0
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        # Rounding of a whole forward and backward.
        assert_close(ours, theirs, factor=100, scale=max_abs(theirs), label=f"result {index}")


def test_the_operator_passes_pytorchs_checks() -> None:
    x, weight = draw(2, 3, 8, 7, grad=True), draw(4, 3, 3, 3)
    check_operator("frozen_conv2d", x, weight, draw(4), [2, 1], [1, 0], [1, 2])
