"""CatStep with adapters on text encoders too: against the plain recipe with two models of each, resume, bad input."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.errors import AdapterError, InvalidValueError
from tests.comparison import SETTINGS, cat_step, ddpm
from tests.models import (
    CROSS,
    VOCABULARY,
    WORDS,
    add_lora,
    batch,
    lora_parameters,
    randomize_b,
    tiny_text_encoder,
    tiny_unet,
)
from tests.references import PlainRecipe


def inject(encoder: torch.nn.Module) -> torch.nn.Module:
    """Adds an adapter in place."""
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(_config(), encoder)


def wrap(encoder: torch.nn.Module) -> torch.nn.Module:
    """Makes it a PeftModel."""
    from peft import get_peft_model

    return get_peft_model(encoder, _config())


def _config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])


def adapted(encoder: torch.nn.Module, add: Callable[[Any], torch.nn.Module] = inject) -> torch.nn.Module:
    """A copy with an adapter."""
    torch.manual_seed(4)
    encoder = add(copy.deepcopy(encoder))
    randomize_b(encoder)
    return encoder


@functools.cache
def _unet_pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    base = tiny_unet()
    return add_lora(copy.deepcopy(base)), base


def unet_pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with an adapter, and the model without."""
    return copy.deepcopy(_unet_pair())


def draw(number: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """A step's arguments without the conditions, and the prompts' tokens with and without the trigger."""
    one = batch(number)
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(2, VOCABULARY - 1, (2, 2, WORDS), generator=generator)
    return {name: one[name] for name in ("latents", "noise", "timesteps")}, *tokens


def encode(encoders: list[torch.nn.Module], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The U-Net's condition: the encoders' hidden states side by side, as in Stable Diffusion XL."""
    return {"encoder_hidden_states": torch.cat([encoder(tokens)[0] for encoder in encoders], -1)}


def conditions(
    encoders: list[torch.nn.Module], tokens: torch.Tensor, tokens_no_trigger: torch.Tensor
) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Both conditions as functions."""
    return {
        "cond": lambda: encode(encoders, tokens),
        "cond_no_trigger": lambda: encode(encoders, tokens_no_trigger),
    }


def all_parameters(model: torch.nn.Module, encoders: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    parameters = {f"model.{name}": param for name, param in lora_parameters(model).items()}
    for index, encoder in enumerate(encoders):
        parameters.update({f"{index}.{name}": param for name, param in lora_parameters(encoder).items()})
    return parameters


def compare_with_recipe(
    bases: list[torch.nn.Module], encoders: list[torch.nn.Module], calls: int = 5, **options: Any
) -> float:
    """Trains copies with the plain recipe and a base of each model; returns how far the changes are apart."""
    model, base = unet_pair()
    plain, plain_encoders = copy.deepcopy(model), copy.deepcopy(encoders)
    recipe = PlainRecipe(plain, base, ddpm(), text_encoders=plain_encoders, **SETTINGS, **options)
    step = cat_step(model, text_encoders=encoders, **options)
    before = all_parameters(model, encoders)
    for number in range(calls):
        one, tokens, others = draw(number)
        ours = step(**one, **conditions(encoders, tokens, others))
        theirs = recipe(
            **one,
            cond=encode(plain_encoders, tokens),
            cond_no_trigger=encode(plain_encoders, others),
            cond_base=encode(bases, others),
        )
        for name, value in theirs.items():
            assert float(getattr(ours, name)) == pytest.approx(value, rel=1e-4), name
    ours, theirs = all_parameters(model, encoders), all_parameters(plain, plain_encoders)
    assert ours.keys() == theirs.keys() == before.keys()
    assert any(name.startswith("0.") for name in ours)
    assert not [name for name in ours if torch.equal(ours[name], before[name])]
    errors = []
    for part in {name.split(".")[0] for name in ours}:
        names = [name for name in ours if name.startswith(f"{part}.")]
        change, error = (
            torch.cat([(one[name].double() - other[name].double()).flatten() for name in names]).norm()
            for one, other in ((theirs, before), (ours, theirs))
        )
        errors.append(float(error / change))
    return max(errors)


# Names that transformers 5 deprecates, and PEFT uses.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulate"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("add", [inject, wrap])
def test_equals_the_plain_recipe(add: Callable[[Any], torch.nn.Module], checkpointing: bool, accumulate: int) -> None:
    base: Any = tiny_text_encoder()
    encoder: Any = adapted(base, add)
    if checkpointing:
        encoder.gradient_checkpointing_enable()
        encoder.train()
    assert compare_with_recipe([base], [encoder], 6, accumulate=accumulate) <= 1e-4


def test_equals_the_plain_recipe_with_two_text_encoders() -> None:
    bases = [tiny_text_encoder(seed, CROSS // 2) for seed in (3, 5)]
    assert compare_with_recipe(bases, [adapted(base) for base in bases]) <= 1e-4


def test_equals_the_plain_recipe_without_preservation() -> None:
    base = tiny_text_encoder()
    assert compare_with_recipe([base], [adapted(base)], cat_factor=0.0) <= 1e-4


def test_without_preservation_the_other_condition_is_not_computed() -> None:
    encoder = adapted(tiny_text_encoder())
    step = cat_step(unet_pair()[0], text_encoders=[encoder], cat_factor=0.0)
    one, tokens, _ = draw(0)

    def unwanted() -> dict[str, torch.Tensor]:
        raise AssertionError("cond_no_trigger was computed")

    step(**one, cond=lambda: encode([encoder], tokens), cond_no_trigger=unwanted)


def test_with_stored_base_predictions_the_base_text_encoder_is_not_called() -> None:
    encoder = adapted(tiny_text_encoder())
    step = cat_step(unet_pair()[0], text_encoders=[encoder])
    one, tokens, others = draw(0)
    calls: list[bool] = []

    def cond_no_trigger() -> dict[str, torch.Tensor]:
        calls.append(torch.is_grad_enabled())
        return encode([encoder], others)

    samples = cat_rs.PreservationSamples(*one.values(), base_pred=torch.randn(2, 4, 8, 8))
    step(**one, cond=lambda: encode([encoder], tokens), cond_no_trigger=cond_no_trigger, preserve=samples)
    assert calls == [True]


def test_the_base_prediction_uses_the_base_text_encoder() -> None:
    base = tiny_text_encoder()
    encoder = adapted(base)
    step = cat_step(unet_pair()[0], text_encoders=[encoder])
    one, tokens, others = draw(0)
    seen: list[tuple[bool, torch.Tensor]] = []

    def cond_no_trigger() -> dict[str, torch.Tensor]:
        cond = encode([encoder], others)
        seen.append((torch.is_grad_enabled(), cond["encoder_hidden_states"].detach()))
        return cond

    step(**one, cond=lambda: encode([encoder], tokens), cond_no_trigger=cond_no_trigger)
    states = {with_grad: value for with_grad, value in seen}
    assert len(seen) == len(states) == 2
    expected = encode([base], others)["encoder_hidden_states"]
    assert torch.equal(states[False], expected)
    assert not torch.allclose(states[True], expected, atol=1e-3)


def test_the_preservation_term_starts_at_rounding() -> None:
    encoder = inject(tiny_text_encoder())
    one, tokens, others = draw(0)
    step = cat_step(add_lora(tiny_unet(), start=True), text_encoders=[encoder])
    metrics = step(**one, **conditions([encoder], tokens, others))
    assert 0 <= metrics.cat < 1e-9 * metrics.diffusion


def test_a_function_without_text_encoders_is_called_once() -> None:
    model, _ = unet_pair()
    plain = copy.deepcopy(model)
    one, calls = batch(0), []

    def cond_no_trigger() -> torch.Tensor:
        calls.append(None)
        return one["cond_no_trigger"]

    ours = cat_step(model)(**{**one, "cond": lambda: one["cond"], "cond_no_trigger": cond_no_trigger})
    assert len(calls) == 1
    assert torch.equal(ours.loss, cat_step(plain)(**one).loss)


@pytest.mark.parametrize("steps_before", [2, 3], ids=["update-due", "mid-accumulation"])
def test_resumes_bit_for_bit(steps_before: int) -> None:
    def fresh() -> tuple[torch.nn.Module, list[torch.nn.Module], cat_rs.CatStep]:
        model, encoder = unet_pair()[0], adapted(tiny_text_encoder())
        return model, [encoder], cat_step(model, text_encoders=[encoder], accumulate=2)

    def run(step: cat_rs.CatStep, encoders: list[torch.nn.Module], number: int) -> torch.Tensor:
        one, tokens, others = draw(number)
        return step(**one, **conditions(encoders, tokens, others)).loss

    model, encoders, step = fresh()
    for number in range(steps_before):
        run(step, encoders, number)
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    buffer.seek(0)
    resumed_model, resumed_encoders, resumed = fresh()
    run(resumed, resumed_encoders, 50)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for number in range(steps_before, 6):
        assert torch.equal(run(resumed, resumed_encoders, number), run(step, encoders, number))
    expected = all_parameters(model, encoders)
    ours = all_parameters(resumed_model, resumed_encoders)
    assert all(torch.equal(param, expected[name]) for name, param in ours.items())


def test_names_in_the_state_do_not_collide() -> None:
    # Two encoders of one class have the same parameter names.
    encoders = [adapted(tiny_text_encoder(seed, CROSS // 2)) for seed in (3, 5)]
    model, _ = unet_pair()
    step = cat_step(model, text_encoders=encoders)
    names = step.state_dict()["parameters"].keys()
    assert len(names) == len(lora_parameters(model)) + sum(len(lora_parameters(encoder)) for encoder in encoders)
    assert {name.split(".")[0] for name in names if name.startswith("text_encoders")} == {
        "text_encoders[0]",
        "text_encoders[1]",
    }


def test_a_state_without_the_text_encoder_is_refused() -> None:
    state = cat_step(unet_pair()[0]).state_dict()
    step = cat_step(unet_pair()[0], text_encoders=[adapted(tiny_text_encoder())])
    with pytest.raises(AdapterError, match=r"`state_dict` must be of this adapter, .* e.g. text_encoders\[0\]\."):
        step.load_state_dict(state)


def without_adapter() -> list[torch.nn.Module]:
    return [adapted(tiny_text_encoder()), tiny_text_encoder()]


def frozen() -> list[torch.nn.Module]:
    return [adapted(tiny_text_encoder()).requires_grad_(False)]


def twice() -> list[torch.nn.Module]:
    return [adapted(tiny_text_encoder())] * 2


@pytest.mark.parametrize(
    ("encoders_of", "error", "text"),
    [
        (without_adapter, AdapterError, r"`text_encoders\[1\]` must have PEFT adapter layers .* got none"),
        (frozen, AdapterError, r"`text_encoders\[0\]` must have trainable .* got all of them frozen"),
        (twice, InvalidValueError, r"`text_encoders\[1\]` must be another module, got one that was given before"),
    ],
    ids=["no-adapter", "frozen", "twice"],
)
def test_text_encoders_that_cannot_train_are_named(
    encoders_of: Callable[[], list[torch.nn.Module]], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^CatStep: {text}"):
        cat_step(unet_pair()[0], text_encoders=encoders_of())


@pytest.mark.parametrize("name", ["cond", "cond_no_trigger"])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda states: states, "`{}` must be a function that calls the text encoders, .* got Tensor"),
        (lambda states: {"encoder_hidden_states": states}, "`{}` must be a function .* got dict"),
        (lambda states: lambda: states.detach(), "`{}` must return .* got no tensor that requires a gradient"),
        (
            lambda states: lambda: {"encoder_hidden_states": states.detach()},
            "`{}` must return .* got no tensor that requires a gradient",
        ),
    ],
    ids=["tensor", "mapping", "detached", "detached-mapping"],
)
def test_conditions_that_would_not_train_a_text_encoder_are_refused(given: Any, text: str, name: str) -> None:
    encoder = adapted(tiny_text_encoder())
    model, _ = unet_pair()
    step = cat_step(model, text_encoders=[encoder])
    before = all_parameters(model, [encoder])
    one, tokens, others = draw(0)
    arguments = conditions([encoder], tokens, others)
    states = arguments[name]()["encoder_hidden_states"]
    with pytest.raises(InvalidValueError, match=f"^CatStep: {text.format(name)}"):
        step(**one, **{**arguments, name: given(states)})
    after = all_parameters(model, [encoder])
    assert all(torch.equal(param, before[key]) for key, param in after.items())
    assert all(param.grad is None or not param.grad.any() for param in encoder.parameters())


def test_a_failing_condition_leaves_the_adapters_on() -> None:
    encoder = adapted(tiny_text_encoder())
    step = cat_step(unet_pair()[0], text_encoders=[encoder])
    one, tokens, others = draw(0)
    expected = encode([encoder], tokens)["encoder_hidden_states"]

    def fails_for_the_base() -> dict[str, torch.Tensor]:
        if not torch.is_grad_enabled():
            raise RuntimeError("no text")
        return encode([encoder], others)

    with pytest.raises(RuntimeError, match="no text"):
        step(**one, cond=lambda: encode([encoder], tokens), cond_no_trigger=fails_for_the_base)
    assert torch.equal(encode([encoder], tokens)["encoder_hidden_states"], expected)
