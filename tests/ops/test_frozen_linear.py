"""frozen_linear: output and gradients against float64, the layer that uses it, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import cat_rs
from cat_rs._native import _core
from cat_rs.errors import DeviceError, DtypeError, ShapeError
from cat_rs.frozen_layers import FrozenLinear, patch_frozen, unpatch_frozen
from cat_rs.ops.frozen_linear import FrozenLinearFunction, frozen_linear
from cat_rs.ops.operator import OWN_MATMUL_IS_FASTER
from tests.backends import about_kernels
from tests.models import add_lora, tiny_unet
from tests.tolerances import assert_close, max_abs

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
# leading dimensions, in, out; those of more than 2^16 multiplications take the kernel, where it is the faster one
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "tidy": ((2, 64), 64, 96),
    "odd": ((3, 37), 61, 83),
    "one": ((1,), 1, 1),
    "a row": ((1,), 300, 500),
    "few rows": ((5,), 320, 640),
    "text": ((77,), 768, 320),
    "many rows": ((4096,), 40, 24),
    "long": ((16,), 5000, 70),
    "narrow": ((512,), 130, 4),
    "empty": ((0, 4), 8, 8),
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Output and input gradient are the float64 layer's on the same rounded inputs."""
    x = x.requires_grad_()
    y = FrozenLinearFunction.apply(x, weight, bias)
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, weight.double(), None if bias is None else bias.double())
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    upstream = draw(*y.shape, dtype=y.dtype, seed=9)
    (dx,) = torch.autograd.grad(y, x, upstream)
    (dx_expected,) = torch.autograd.grad(expected, exact, upstream.double())
    if not y.numel():
        return
    assert_close(y, expected, factor=math.sqrt(x.shape[-1]) + 1, scale=max_abs(expected), label="y")
    assert_close(dx, dx_expected, factor=math.sqrt(y.shape[-1]) + 1, scale=max_abs(dx_expected), label="dx")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape: Any, dtype: torch.dtype, bias: bool) -> None:
    leading, inner, out = shape
    check(
        draw(*leading, inner, dtype=dtype),
        draw(out, inner, dtype=dtype, seed=1),
        draw(out, dtype=dtype, seed=2) if bias else None,
    )


def test_views_of_any_strides() -> None:
    x, weight, bias = draw(60, 2, 90), draw(120, 180, seed=1), draw(240, seed=2)
    views = {
        "x transposed": (x.movedim(0, 1), weight[:, :90].contiguous(), bias[:120]),
        "x sliced": (x[::2, :, :64], weight[:, :64].contiguous(), None),
        "weight sliced": (x, weight[:, 45:135], None),
        "weight transposed": (x, weight[:90, :90].T, None),
        "bias strided": (x, weight[:, :90].contiguous(), bias[::2]),
        "misaligned": (draw(60 * 90 + 1)[1:].view(60, 90), weight[:, :90].contiguous(), bias[1:121]),
    }
    for x_view, weight_view, bias_view in views.values():
        check(x_view.detach(), weight_view, bias_view)


def test_a_gradient_of_any_strides() -> None:
    x, weight = draw(64, 80).requires_grad_(), draw(96, 80, seed=1)
    for upstream in (draw(1, 1, seed=2).expand(64, 96), draw(96, 64, seed=2).T):
        (dx,) = torch.autograd.grad(FrozenLinearFunction.apply(x, weight, None), x, upstream)
        expected = upstream.double() @ weight.double()
        assert_close(dx, expected, factor=12, scale=max_abs(expected))


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        for leading, inner, out in SHAPES.values():
            x, weight = draw(*leading, inner), draw(out, inner, seed=1)
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                y = _core.frozen_linear_forward(x, weight, None)
                results.append((y, _core.frozen_linear_backward(y, weight)))
            if not OWN_MATMUL_IS_FASTER:
                continue  # PyTorch's library makes no such promise
            if min(math.prod(leading), out) >= 4 and math.prod(leading) * inner * out >= 1 << 16:
                for y, dx in results[1:]:
                    assert torch.equal(y, results[0][0])
                    assert torch.equal(dx, results[0][1])
    finally:
        torch.set_num_threads(threads)


def test_values_that_are_not_finite_stay_where_they_belong() -> None:
    x, weight = draw(40, 64), draw(50, 64, seed=1)
    x[3, 5], x[7, 0] = math.nan, math.inf
    y = _core.frozen_linear_forward(x, weight, None)
    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    others = [row for row in range(40) if row not in (3, 7)]
    assert y[others].isfinite().all()


def test_second_derivatives() -> None:
    x = draw(6, 200, dtype=torch.float64).requires_grad_()
    weight = draw(100, 200, dtype=torch.float64, seed=1)
    y = FrozenLinearFunction.apply(x, weight, None)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    gram = weight.T @ weight
    torch.testing.assert_close(second, 8 * x.detach() @ gram @ gram)


def model_of_linear_layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 128))


@pytest.mark.skipif(not OWN_MATMUL_IS_FASTER, reason="PyTorch's products are as fast on this processor")
def test_a_frozen_model_is_patched_and_restored() -> None:
    model = model_of_linear_layers().requires_grad_(False)
    x = draw(40, 256).requires_grad_()
    expected = model(x)
    (dx_expected,) = torch.autograd.grad(expected.sum(), x)
    state = model.state_dict()
    assert patch_frozen(model).linear == ["0", "2"]
    assert [type(layer) for layer in model[::2]] == [FrozenLinear, FrozenLinear]
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(y, expected, factor=20, scale=max_abs(expected))
    assert_close(dx, dx_expected, factor=20, scale=max_abs(dx_expected))
    assert list(model.state_dict()) == list(state)
    unpatch_frozen(model)
    assert [type(layer) for layer in model[::2]] == [torch.nn.Linear, torch.nn.Linear]
    assert torch.equal(model(x), expected)


def test_trained_layers_stay_pytorchs() -> None:
    model = model_of_linear_layers()
    assert patch_frozen(model).linear == []
    if OWN_MATMUL_IS_FASTER:
        model.requires_grad_(False)
        patch_frozen(model)
        model.requires_grad_()
        model(draw(40, 256)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_and_small_products_are_pytorchs() -> None:
    x, weight, bias = draw(64, 256), draw(512, 256, seed=1), draw(512, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen_linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(frozen_linear(x[:1], weight[:8], None), F.linear(x[:1], weight[:8]))


def test_the_output_may_be_added_to_in_place() -> None:
    x, weight = draw(2, 64, 64).requires_grad_(), draw(96, 64, seed=1)
    y = FrozenLinearFunction.apply(x, weight, None)
    added = torch.zeros(96, requires_grad=True)
    y += added
    y.sum().backward()
    assert_close(
        x.grad, weight.double().sum(dim=0).expand(2, 64, 64), factor=10, scale=max_abs(weight) * 96, label="dx"
    )
    assert torch.equal(added.grad, torch.full((96,), 2 * 64.0))


@about_kernels
def test_lora_layers_with_dropout_run_on_it() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def gradients(patched: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(320, 320).requires_grad_(False))
        config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["0"], init_lora_weights=False)
        model = inject_adapter_in_model(config, model).train()
        if patched:
            assert cat_rs.patch_peft(model).fused
        torch.manual_seed(4)
        x = draw(2, 64, 320).requires_grad_()
        model(x).square().mean().backward()
        return [x.grad, *(param.grad for param in model.parameters() if param.requires_grad)]

    for ours, pefts in zip(gradients(True), gradients(False), strict=True):
        assert_close(ours, pefts.double(), factor=20, scale=max_abs(pefts), label="gradient")


@about_kernels
def test_patch_peft_takes_the_frozen_layers_too() -> None:
    model = add_lora(tiny_unet())
    report = cat_rs.patch_peft(model)
    plain = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    assert report.linear == plain
    assert bool(plain) == OWN_MATMUL_IS_FASTER
    assert report.fused
    assert all("lora_" not in name for name in plain)
    cat_rs.unpatch_peft(model)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (draw(4, 5), draw(3, 6), None, ShapeError, r"`x` must have shape \[\.\.\., 6\], got \[4, 5\]"),
        (draw(4, 6), draw(3, 6, 1), None, ShapeError, r"`weight` must have shape \[out, in\]"),
        (draw(4, 6), draw(3, 6), draw(4), ShapeError, "`bias`"),
        (draw(4, 6), draw(3, 6).double(), None, DtypeError, "`weight`"),
        (draw(4, 6).long(), draw(3, 6), None, DtypeError, "`x`"),
        (draw(4, 6), torch.empty(3, 6, device="meta"), None, DeviceError, "`weight`"),
        (torch.tensor(1.0), draw(3, 6), None, ShapeError, "`x`"),
    ],
)
def test_bad_input(x: Any, weight: Any, bias: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _core.frozen_linear_forward(x, weight, bias)
