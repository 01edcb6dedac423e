"""CatStep on a model in bfloat16 or float16 with a float32 adapter: the plain recipe's results, and the copies."""

from __future__ import annotations

import copy
import functools
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

import cat_rs
from cat_rs import peft
from tests.backends import about_kernels
from tests.comparison import SETTINGS, cat_step, ddpm
from tests.models import LAYERS, add_lora, batch, lora_parameters, tiny_unet
from tests.references import PlainRecipe

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
CONVOLUTIONS = [*LAYERS, "conv1", "conv_in"]


@functools.cache
def _unet_pair(targets: tuple[str, ...]) -> tuple[torch.nn.Module, torch.nn.Module]:
    base = tiny_unet()
    return add_lora(copy.deepcopy(base), target_modules=list(targets)), base


def unet_pair(dtype: torch.dtype, targets: list[str] = CONVOLUTIONS) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model in a lower dtype with its adapter in float32, as diffusers' scripts train it, and the model without."""
    from diffusers.training_utils import cast_training_params

    model, base = copy.deepcopy(_unet_pair(tuple(targets)))
    cast_training_params(model.to(dtype), torch.float32)
    torch.manual_seed(4)
    # New values, which the lower dtype does not hold.
    for param in model.parameters():
        if param.requires_grad:
            param.data += 1e-3 * torch.randn(param.shape)
    return model, base.to(dtype)


def scaler_for(dtype: torch.dtype) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=2.0**12) if dtype == torch.float16 else None


def output(model: torch.nn.Module, number: int = 0) -> torch.Tensor:
    one = batch(number, dtype=next(model.parameters()).dtype)
    return model(one["latents"], one["timesteps"], one["cond"], return_dict=False)[0]


def without_copies(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> cat_rs.CatStep:
    """A step whose layers round their weights in every call."""
    with monkeypatch.context() as patch:
        patch.setattr(peft, "lower_dtype", lambda models: None)
        return cat_step(*arguments, **options)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm())


@LOW
@pytest.mark.parametrize("targets", [LAYERS, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_is_as_exact_as_the_plain_recipe(targets: list[str], dtype: torch.dtype) -> None:
    # Adam's first steps enlarge the rounding of small gradients: so both are compared with float64 arithmetic.
    pair = unet_pair(dtype, targets)
    exact_pair, plain_pair = ([each.double() for each in copy.deepcopy(pair)], copy.deepcopy(pair))
    exact = PlainRecipe(*exact_pair, ddpm(), **SETTINGS)
    plain = PlainRecipe(*plain_pair, ddpm(), grad_scaler=scaler_for(dtype), **SETTINGS)
    model, before = pair[0], lora_parameters(pair[0])
    step = cat_step(model, grad_scaler=scaler_for(dtype))
    for number in range(5):
        one = batch(number, dtype=dtype)
        exact(**{name: value if name == "timesteps" else value.double() for name, value in one.items()})
        theirs, ours = plain(**one), step(**one)
        for name, value in theirs.items():
            # The preservation term squares a small difference of predictions, and so their rounding.
            assert float(getattr(ours, name)) == pytest.approx(value, rel=0.05, abs=2e-4), name
    assert {param.dtype for param in step.trainable.values()} == {torch.float32}
    expected = lora_parameters(exact_pair[0])
    error = distance(lora_parameters(model), expected)
    # One run's ratio of the errors scatters around 1, more so in float16, whose errors are few and small.
    ratio, share = (1.2, 0.2) if dtype == torch.bfloat16 else (1.5, 0.06)
    assert error < ratio * distance(lora_parameters(plain_pair[0]), expected)
    assert error < share * distance(before, expected)


class Conversions(TorchDispatchMode):
    """Notes the conversions of a model's trained weights, and of its adapter layers' inputs to float32."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {param.data_ptr(): name for name, param in model.named_parameters() if param.requires_grad}
        self.shapes: set[tuple[int, ...]] = set()
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.register_forward_pre_hook(lambda layer, inputs: self.shapes.add(tuple(inputs[0].shape)))
        self.weights: list[str] = []
        self.inputs: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype", args[0].dtype) != args[0].dtype:
            if args[0].data_ptr() in self.names:
                self.weights.append(self.names[args[0].data_ptr()])
            if kwargs["dtype"] == torch.float32 and tuple(args[0].shape) in self.shapes:
                self.inputs.add(tuple(args[0].shape))
        return func(*args, **kwargs)


@about_kernels
@LOW
def test_no_weight_is_rounded_and_no_input_converted_in_a_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT's own forward, and layers without copies: what is noted, if anything is.
    plain, _ = unet_pair(dtype)
    with Conversions(plain) as seen:
        output(plain)
    assert seen.inputs == seen.shapes != set()
    for copies in (False, True):
        model, _ = unet_pair(dtype)
        step = cat_step(model) if copies else without_copies(monkeypatch, model)
        with Conversions(model) as seen:
            for number in range(2):
                step(**batch(number, dtype=dtype))
        assert seen.inputs == set() != seen.shapes
        assert sorted(seen.weights) == ([] if copies else sorted(2 * list(step.trainable)))


def _linear(model: torch.nn.Module) -> None:
    pass


def _dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    model.train()


def _two_adapters(model: torch.nn.Module) -> None:
    from peft import LoraConfig

    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(LoraConfig(r=2, target_modules=[*LAYERS, "conv1"], init_lora_weights=False), "second")
    model.set_adapters(["default", "second"], [0.7, 0.5])
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.float()


def _checkpointing(model: torch.nn.Module) -> None:
    model.enable_gradient_checkpointing()
    model.train()


@LOW
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("change", [_linear, _dropout, _two_adapters, _checkpointing])
def test_layers_see_every_write_to_their_weights(
    change: Any, autocast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounded in every call, a weight is what it was last set to: with the copies each number must be the same.
    torch.manual_seed(0)
    first, _ = unet_pair(dtype)
    change(first)
    second = copy.deepcopy(first)
    options: dict[str, Any] = {"accumulate": 2, "lr": 1e-2}
    steps = [
        cat_step(first, grad_scaler=scaler_for(dtype), **options),
        without_copies(monkeypatch, second, grad_scaler=scaler_for(dtype), **options),
    ]
    start = steps[0].state_dict()
    seen: list[list[torch.Tensor]] = [[], []]

    def run(number: int) -> None:
        for step, notes in zip(steps, seen, strict=True):
            torch.manual_seed(number)
            with torch.autocast("cpu", dtype, enabled=autocast):
                notes.extend(step(**batch(number, dtype=dtype)))
                notes.append(output(step.model).detach())
                with torch.no_grad():
                    notes.append(output(step.model))

    @contextmanager
    def written(through_data: bool = False) -> Iterator[None]:
        """Other weights, as averages of weights are used for validation."""
        params = [param for step in steps for param in step.trainable.values()]
        before = [param.detach().clone() for param in params]
        for param in params:
            (param.data if through_data else param.detach()).mul_(1.5)
        yield
        for param, value in zip(params, before, strict=True):
            (param.data if through_data else param.detach()).copy_(value)

    for number in range(3):
        run(number)
    with written(through_data=True), torch.no_grad():
        for step, notes in zip(steps, seen, strict=True):
            torch.manual_seed(0)
            notes.append(output(step.model))
    with written():
        run(3)
    run(4)
    for step in steps:
        step.load_state_dict(start)
    run(5)
    for notes in zip(*seen, strict=True):
        assert torch.equal(*(value.nan_to_num(-1) for value in notes))
    ours, theirs = (lora_parameters(step.model) for step in steps)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _pickled(model: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, _pickled], ids=["copy", "file"])
def test_a_copied_model_uses_its_own_weights(through: Any) -> None:
    model, _ = unet_pair(torch.bfloat16)
    step = cat_step(model)
    step(**batch(0, dtype=torch.bfloat16))
    twin = through(model)
    with torch.no_grad():
        for param in twin.parameters():
            if param.requires_grad:
                param.mul_(2)
    adapted = output(model)
    assert not torch.equal(output(twin), adapted)
    plain = copy.deepcopy(twin)
    cat_rs.unpatch_peft(plain)
    cat_rs.patch_peft(plain)
    assert torch.equal(output(twin), output(plain))


def test_a_model_outlives_its_optimizer() -> None:
    model, _ = unet_pair(torch.bfloat16)
    step = cat_step(model)
    step(**batch(0, dtype=torch.bfloat16))
    expected, optimizer = output(model), step.optimizer
    del step
    assert torch.equal(output(model), expected)
    del optimizer
    gc.collect()
    assert torch.equal(output(model), expected)


def test_weights_replaced_in_place_are_seen() -> None:
    model, _ = unet_pair(torch.bfloat16)
    step = cat_step(model)
    expected = output(model)
    for param in step.trainable.values():
        param.data = torch.zeros_like(param)
    assert not torch.equal(output(model), expected)


@pytest.mark.parametrize("targets", [["to_q"], ["conv1"]], ids=["linear", "convolution"])
def test_a_step_between_forward_and_backward_is_noticed(targets: list[str]) -> None:
    model, _ = unet_pair(torch.bfloat16, targets)
    step = cat_step(model)
    loss = output(model).float().square().sum()
    step.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_with_copies_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    results = []
    for copies in (True, False):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5)]
        config = LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False)
        model = get_peft_model(torch.nn.Sequential(*layers).bfloat16(), config, autocast_adapter_dtype=True)
        cat_rs.patch_peft(model)
        params = [param for param in model.parameters() if param.requires_grad]
        assert {param.dtype for param in params} == {torch.float32}
        optimizer = cat_rs.FlatAdamW(params, low_precision=torch.bfloat16 if copies else None)
        peft.use_copies_of(optimizer, model)
        pictures = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
        (slope,) = torch.autograd.grad(model(pictures).float().square().sum(), pictures, create_graph=True)
        results.append(torch.autograd.grad(slope.float().square().sum(), params))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert ours.count_nonzero()
        assert torch.equal(ours, theirs)
