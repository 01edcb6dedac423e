"""CatStep beside the tools around it: copies, pickles, compiled models, schedulers that sampled, accelerate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from cat_rs import CatStep, FlatAdamW
from cat_rs.errors import DtypeError, InvalidValueError
from tests.models import add_lora, batch, tiny_transformer, tiny_unet
from tests.tolerances import assert_close


def ddpm() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler()


def run(step: CatStep, number: int = 0, **options: Any) -> Any:
    one = batch(number)
    noise = torch.randn(one["latents"].shape, generator=torch.Generator().manual_seed(number))
    cond, cond_no_trigger = one["cond"], one["cond"].flip(0)
    return step(one["latents"], cond, cond_no_trigger, noise=noise, timesteps=one["timesteps"], **options)


def weights(step: CatStep) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in step.trainable.items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alone(through: str) -> None:
    step = CatStep(add_lora(tiny_unet()), ddpm(), lr=1e-2, generator=torch.Generator().manual_seed(0))
    run(step)
    other = copy.deepcopy(step) if through == "deepcopy" else pickle.loads(pickle.dumps(step))
    before = weights(step)
    for number in (1, 2):
        run(other, number)
    assert_equal(weights(step), before)
    for number in (1, 2):
        run(step, number)
    assert_equal(weights(step), weights(other))
    assert step.steps_done == other.steps_done == 3
    assert all(param is dict(other.model.named_parameters())[name] for name, param in other.trainable.items())


def test_a_copy_uses_its_own_low_precision_weights() -> None:
    model = add_lora(tiny_unet().to(torch.bfloat16))
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.float()
    step = CatStep(model, ddpm(), lr=1e-1)
    one = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in batch(0).items()}
    other = copy.deepcopy(step)
    for each in (step, other):
        torch.manual_seed(0)
        for _ in range(2):
            each(one["latents"], one["cond"], one["cond"].flip(0))
    assert_equal(weights(step), weights(other))


def test_the_state_of_a_compiled_model_has_plain_names() -> None:
    plain = CatStep(add_lora(tiny_unet()), ddpm())
    compiled = CatStep(torch.compile(add_lora(tiny_unet()), backend="eager"), ddpm())
    assert plain.state_dict()["parameters"].keys() == compiled.state_dict()["parameters"].keys()
    run(plain)
    compiled.load_state_dict(plain.state_dict())
    assert_equal(weights(compiled), weights(plain))
    state = compiled.state_dict()
    # As versions before 0.2 wrote it.
    state["parameters"] = {f"_orig_mod.{name}": tensor for name, tensor in state["parameters"].items()}
    plain.load_state_dict(state)


def test_a_scheduler_that_sampled_trains_on_all_timesteps() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    def drawn(sampled: bool) -> torch.Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        if sampled:
            scheduler.set_timesteps(4)
        step = CatStep(add_lora(tiny_transformer()), scheduler)
        return step._schedule.draw(4096, torch.Generator().manual_seed(0))

    assert torch.equal(drawn(True), drawn(False))
    assert drawn(True).unique().numel() > 900


def test_conditions_of_a_text_encoder_that_trains_are_refused_without_it() -> None:
    step = CatStep(add_lora(tiny_unet()), ddpm())
    one = batch(0)
    encoder = torch.nn.Embedding(5, one["cond"].shape[-1])
    cond = encoder(torch.zeros(one["cond"].shape[:2], dtype=torch.long))
    with pytest.raises(InvalidValueError, match=r"`cond` must be constant without text_encoders, .* text_encoders=\["):
        step(one["latents"], cond, one["cond"])


# ---- accelerate


def test_accelerates_accumulation_ends_with_the_data() -> None:
    from accelerate import Accelerator
    from accelerate.state import GradientState

    def recipe(calls: list[tuple[int, bool]]) -> dict[str, torch.Tensor]:
        step = CatStep(add_lora(tiny_unet()), ddpm(), lr=1e-2, accumulate=3)
        for number, update in calls:
            run(step, number, sync_gradients=update)
        assert step.steps_done == sum(update for _, update in calls)
        return weights(step)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    try:
        loader = accelerator.prepare(torch.utils.data.DataLoader(list(range(5)), batch_size=1))
        step = CatStep(add_lora(tiny_unet()), ddpm(), lr=1e-2, accumulate=3)
        for _ in range(2):
            for number in loader:
                with accelerator.accumulate(step.model):
                    run(step, int(number), sync_gradients=accelerator.sync_gradients)
        assert step.steps_done == 4
        update = [False, False, True, False, True]
        assert_equal(weights(step), recipe([*zip(range(5), update, strict=True)] * 2))

        unaware = CatStep(add_lora(tiny_unet()), ddpm(), lr=1e-2, accumulate=3)

        def drift() -> None:
            for number in loader:
                with accelerator.accumulate(unaware.model):
                    run(unaware, int(number))

        with pytest.raises(InvalidValueError, match=r"must be accelerator\.sync_gradients within"):
            drift()
    finally:
        GradientState._reset_state()


def test_accumulating_with_accumulate_one_is_refused() -> None:
    step = CatStep(add_lora(tiny_unet()), ddpm())
    with pytest.raises(InvalidValueError, match="`sync_gradients` must be True with accumulate=1"):
        run(step, sync_gradients=False)


# ---- moved parameters


def test_parameters_that_were_given_other_memory_are_taken_back() -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = FlatAdamW(params, lr=0.5, weight_decay=0.0)
    address = params[0].data_ptr()
    params[0].data = torch.full((3,), 2.0)
    for param in params:
        param.grad.fill_(1.0)
    optimizer.step()
    assert params[0].data_ptr() == address
    assert_close(params[0], torch.full((3,), 1.5, dtype=torch.float64))


def test_parameters_that_were_converted_are_named() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FlatAdamW([param])
    param.data = torch.ones(3, dtype=torch.float64)
    with pytest.raises(DtypeError, match=r"must stay torch.float32 .* accelerator.prepare, before"):
        optimizer.step()
