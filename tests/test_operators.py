"""The registered operators: functions and models under torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.ops.lora_up import lora_up_
from cat_rs.ops.noising import noising
from tests.models import LAYERS, add_lora, batch, tiny_unet
from tests.operators import draw
from tests.tolerances import assert_close, max_abs

CONVOLUTIONS = [*LAYERS, "conv1", "conv_in"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def result(model: Callable[..., Any], parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The output, and the gradients of the latents and of the parameters."""
    one = batch(0, dtype=model.dtype)
    latents = one["latents"].requires_grad_()
    prediction = model(latents, one["timesteps"], one["cond"], return_dict=False)[0]
    return [prediction.detach(), *torch.autograd.grad(prediction.square().sum(), [latents, *parameters])]


@pytest.mark.parametrize(
    "settings", [{}, {"lora_bias": True, "target_modules": ["to_out.0", "conv1"]}], ids=["", "bias"]
)
def test_a_compiled_model_is_one_graph_with_the_same_numbers(settings: dict[str, Any]) -> None:
    model = add_lora(tiny_unet(), **{"target_modules": CONVOLUTIONS, **settings})
    assert not cat_rs.patch_peft(model).kept
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = result(model, parameters)
    # The plain backend: fused kernels are opaque to any compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(result(compiled, parameters), expected, strict=True):
        assert_close(ours, theirs, factor=20, scale=max_abs(theirs))
    one = batch(0)
    with torch.no_grad(), cat_rs.adapter_disabled(model):
        base = compiled(one["latents"], one["timesteps"], one["cond"], return_dict=False)[0]
        assert_close(base, model(one["latents"], one["timesteps"], one["cond"], return_dict=False)[0], factor=20)
    for ours, theirs in zip(result(compiled, parameters), expected, strict=True):
        assert_close(ours, theirs, factor=20, scale=max_abs(theirs))


def test_a_compiled_model_with_a_float32_adapter() -> None:
    from diffusers.training_utils import cast_training_params

    # diffusers' upsampling breaks the graph in bfloat16.
    model = add_lora(tiny_unet().half(), target_modules=CONVOLUTIONS)
    cast_training_params(model, torch.float32)
    assert not cat_rs.patch_peft(model).kept
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = result(model, parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(result(compiled, parameters), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, dtype=torch.float16, factor=20, scale=max_abs(theirs))


def test_compiled_functions_with_float32_adapters() -> None:
    weight = draw(7, 6, dtype=torch.bfloat16)
    leaves = [draw(2, 5, 6, grad=True, dtype=torch.bfloat16), draw(3, 6, grad=True), draw(7, 3, grad=True)]

    def function(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        y = cat_rs.lora_linear(x, weight, None, lora_A, lora_B, 0.5)
        return lora_up_(y * 2, x[..., :3], lora_B, 0.25)

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = call(*leaves)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for ours, theirs, like in zip(*results, [leaves[0], *leaves], strict=True):
        assert ours.dtype == theirs.dtype == like.dtype
        assert_close(ours, theirs, dtype=torch.bfloat16, factor=2, scale=max_abs(theirs))


def test_a_compiled_loss_is_one_graph_with_the_same_numbers() -> None:
    def loss(pred: torch.Tensor, pred_no_trigger: torch.Tensor, *constants: torch.Tensor) -> Any:
        target, base, weight = constants
        return cat_rs.cat_loss(
            pred, target, pred_no_trigger, base, cat_factor=0.5, sample_weight=weight, return_parts=True
        )

    constants = (draw(2, 4, 8, 8), draw(2, 4, 8, 8), torch.rand(2))
    predictions = [draw(2, 4, 8, 8, grad=True) for _ in range(2)]
    eager, compiled = (
        loss(*predictions, *constants),
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*predictions, *constants),
    )
    for ours, theirs in zip(compiled, eager, strict=True):
        assert_close(ours, theirs)
    gradients = [torch.autograd.grad(parts.total * 3, predictions) for parts in (compiled, eager)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_functions_compile_to_one_graph() -> None:
    def function(x: torch.Tensor, noise: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noisy, target = noising(x, noise, torch.full((2,), 0.8), torch.full((2,), 0.6), "epsilon")
        return lora_up_(noisy * 2, noisy[..., :3], lora_B, 0.5), target

    arguments = (draw(2, 5, 7), draw(2, 5, 7), draw(7, 3))
    for ours, theirs in zip(
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments), function(*arguments), strict=True
    ):
        assert_close(ours, theirs)


def test_a_patched_model_can_be_exported() -> None:
    model = add_lora(tiny_unet(), target_modules=CONVOLUTIONS).eval()
    cat_rs.patch_peft(model)
    one = batch(0)
    arguments = (one["latents"], one["timesteps"], one["cond"])
    exported = torch.export.export(model, arguments, {"return_dict": False})
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"cat_rs.lora_linear.default", "cat_rs.lora_up.default"} <= called
    with torch.no_grad():
        expected = model(*arguments, return_dict=False)[0]
        assert_close(exported.module()(*arguments, return_dict=False)[0], expected, factor=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_a_step_of_a_compiled_model_is_a_step_of_the_model(dtype: torch.dtype) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params

    losses = []
    for compiled in (False, True):
        model = add_lora(tiny_unet().to(dtype), target_modules=CONVOLUTIONS)
        cast_training_params(model, torch.float32)
        step = cat_rs.CatStep(
            torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model, DDPMScheduler(), lr=1e-2
        )
        losses.append([float(step(**batch(number, dtype=dtype)).loss) for number in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 0.01)
