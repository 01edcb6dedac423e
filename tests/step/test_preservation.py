"""The preservation terms beside CAT's: against float64 references, in a step against the plain recipe, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.errors import AdapterError, InvalidValueError, ShapeError
from cat_rs.peft import adapter_disabled, layer_changes, patch_peft, update_norm
from cat_rs.step.preservation import PRESERVATIONS, consistency_loss
from tests import references
from tests.comparison import cat_step, compare_with_recipe
from tests.models import add_lora, batch, lora_parameters, tiny_text_encoder, tiny_unet
from tests.references import lora_layers
from tests.step import test_text_encoders as text
from tests.step.test_cat_step import preserved_batch, unet_pair
from tests.tolerances import assert_close, max_abs

DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.float64, id="f64"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
]
FACTORS = {"prior": 0.7, "dco": 30.0, "l2": 0.01, "layers": 0.5}


def one_step(kind: str, number: int, size: int = 2) -> dict[str, Any]:
    """A batch with what the kind of term looks at."""
    return preserved_batch(number, 3) if kind == "prior" else batch(number, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 3), (3, 5, 7), (5, 333)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_consistency_loss_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    student, target, base = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.rand(shape[0]) + 0.1 if weighted else None
    mask = (torch.rand(shape[0], *[1] * (len(shape) - 1)) > 0.3).float() if weighted else None
    beta, scale = 1.7, 0.25
    factors = (torch.tensor(value, dtype=torch.float64) for value in (beta, scale))
    loss, parts, grad = consistency_loss(student, target, base, weight, mask, *factors)
    exact = student.double().requires_grad_()
    expected = references.consistency_loss(exact, target, base, beta, weight, mask)
    expected.total.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == parts.dtype == wide
    assert grad.dtype == dtype
    # Sums of a sample's elements, and differences of them.
    scale_of_sums = float((expected.diffusion.abs() + expected.cat.abs()).detach()) + 1
    assert_close(loss, expected.total, scale=scale_of_sums, factor=10, label="loss")
    assert_close(parts, torch.stack([expected.diffusion, expected.cat]), scale=scale_of_sums, factor=10, label="parts")
    assert exact.grad is not None
    assert_close(grad, scale * exact.grad, scale=max_abs(scale * exact.grad), factor=4, label="gradient")


def test_consistency_loss_of_large_margins_is_finite() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    factors = torch.tensor(1e6, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for student, base, expected in ((ones, zeros, 1e6), (zeros, ones, 0.0)):
        loss, _, grad = consistency_loss(student, zeros, base, None, None, *factors)
        assert loss == expected
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 4, 40])
def test_update_norm_equals_its_definition(r: int, dtype: torch.dtype) -> None:
    model = add_lora(tiny_unet(), r=r, target_modules=["to_k", "to_out.0", "conv1", "proj_in"]).to(dtype)
    expected = references.update_norm(exact := copy.deepcopy(model).double())
    expected.backward()
    norm = update_norm([model])
    norm.backward()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(norm.detach(), expected.detach(), factor=10, label="norm")
    # Products of r and more elements, accumulated in float32, and rounded once.
    for (name, _, *ours), (_, _, *theirs) in zip(lora_layers(model), lora_layers(exact), strict=True):
        for part, wide in zip(ours, theirs, strict=True):
            assert_close(part.weight.grad, wide.weight.grad, scale=max_abs(wide.weight.grad), factor=10, label=name)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("patched", [False, True], ids=["peft", "fused"])
def test_layer_changes_equal_their_definition(dtype: torch.dtype, patched: bool) -> None:
    base = tiny_unet()
    model = add_lora(copy.deepcopy(base), target_modules=["to_q", "to_out.0", "conv1", "proj_in"])
    model, base = model.to(dtype), base.to(dtype)
    # Activations are the model's own; what is compared is what follows from them.
    exact = copy.deepcopy(model).double()
    if patched:
        patch_peft(model)
    one = batch(0, dtype=dtype)
    arguments = one["latents"], one["timesteps"], one["cond"]
    with torch.no_grad(), adapter_disabled(model), layer_changes(model) as changes:
        model(*arguments)
    ours = torch.stack(changes).mean()
    ours.backward()
    theirs = references.layer_changes(exact, base, lambda base: base(*arguments))
    theirs.backward()
    assert_close(ours.detach(), theirs.detach(), dtype=dtype, factor=10, label="changes")
    for (name, _, *mine), (_, _, *wide) in zip(lora_layers(model), lora_layers(exact), strict=True):
        for part, other in zip(mine, wide, strict=True):
            scale = max_abs(other.weight.grad)
            assert_close(part.weight.grad, other.weight.grad, scale=scale, factor=10, label=name)
    assert not any(param.grad is not None for name, param in model.named_parameters() if "lora_" not in name)
    before = len(changes)
    model(*arguments)
    assert len(changes) == before


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"snr_gamma": 5.0, "prediction_type": "v_prediction"}, id="min-snr-velocity"),
        pytest.param({"accumulate": 2}, id="accumulation"),
        pytest.param({"cat_factor": 0.0}, id="no-preservation"),
    ],
)
@pytest.mark.parametrize("kind", FACTORS)
def test_equals_the_plain_recipe(kind: str, options: dict[str, Any]) -> None:
    batches = [one_step(kind, n) for n in range(4)]
    settings = {"preservation": kind, "cat_factor": FACTORS[kind], **options}
    # DCO's margin is a difference of errors that are nearly the same.
    compare_with_recipe(*unet_pair(), batches, tolerance=1e-3 if kind == "dco" else 1e-4, **settings)


@pytest.mark.parametrize("kind", FACTORS)
def test_equals_the_plain_recipe_with_weights_and_mask(kind: str) -> None:
    given = {"sample_weight": torch.tensor([0.5, 2.0]), "mask": (torch.rand(2, 1, 8, 8) > 0.3).float()}
    batches = [{**one_step(kind, n), **given} for n in range(3)]
    compare_with_recipe(*unet_pair(), batches, preservation=kind, cat_factor=FACTORS[kind])


@pytest.mark.parametrize("kind", ["prior", "layers"])
def test_equals_the_plain_recipe_with_preservation_samples(kind: str) -> None:
    batches = [preserved_batch(n, 3, weighted=True) for n in range(3)]
    compare_with_recipe(*unet_pair(), batches, preservation=kind, cat_factor=FACTORS[kind], snr_gamma=5.0)


@pytest.mark.parametrize("kind", ["prior", "l2", "layers"])
def test_equals_the_plain_recipe_with_a_term_in_every_second_step(kind: str) -> None:
    batches = [one_step(kind, n) for n in range(4)]
    compare_with_recipe(*unet_pair(), batches, preservation=kind, cat_factor=FACTORS[kind], preserve_every=2)


@pytest.mark.parametrize("kind", ["dco", "l2"])
def test_trains_text_encoders(kind: str) -> None:
    base = tiny_text_encoder()
    encoder = text.adapted(base)
    step = cat_step(unet_pair()[0], text_encoders=[encoder], preservation=kind, cat_factor=FACTORS[kind])
    one, tokens, _ = text.draw(0)
    seen: list[tuple[bool, torch.Tensor]] = []

    def cond() -> dict[str, torch.Tensor]:
        value = text.encode([encoder], tokens)
        seen.append((torch.is_grad_enabled(), value["encoder_hidden_states"].detach()))
        return value

    before = lora_parameters(encoder)
    metrics = step(**one, cond=cond)
    assert [has_grad for has_grad, _ in seen] == ([True, False] if kind == "dco" else [True])
    if kind == "dco":
        # The base model's prompt is that of the base text encoder.
        assert torch.equal(seen[1][1], base(tokens)[0])
    else:
        expected = references.update_norm(unet_pair()[0]) + references.update_norm(text.adapted(base))
        assert_close(metrics.cat, expected.detach(), factor=10)
    assert not any(torch.equal(param, before[name]) for name, param in lora_parameters(encoder).items())


@pytest.mark.parametrize("kind", PRESERVATIONS)
def test_a_step_says_what_it_looks_at(kind: str) -> None:
    step = cat_step(unet_pair()[0], preservation=kind, cat_factor=FACTORS.get(kind, 1.0))
    calls: list[int] = []
    step.model.register_forward_hook(lambda model, given, output: calls.append(len(output[0])))
    one = one_step(kind, 0)
    assert step.preserves_next == (kind in ("cat", "prior", "layers"))
    if not step.preserves_next:
        del one["cond_no_trigger"]
    assert step(**one).loss.isfinite()
    expected = {"cat": [2, 4], "prior": [5], "dco": [2, 2], "l2": [2], "layers": [2, 2]}
    assert calls == expected[kind]


def test_new_adapters_have_nothing_to_preserve() -> None:
    for kind in ("dco", "l2", "layers"):
        step = cat_step(add_lora(tiny_unet(), start=True), preservation=kind, cat_factor=FACTORS[kind])
        assert abs(float(step(**batch(0)).cat)) < 1e-6


@pytest.mark.parametrize("kind", ["l2", "layers"])
def test_a_penalty_keeps_the_update_small(kind: str) -> None:
    norms = []
    for cat_factor in (0.0, 1.0):
        step = cat_step(add_lora(tiny_unet(), start=True), lr=3e-2, preservation=kind, cat_factor=cat_factor)
        for _ in range(10):
            step(**batch(0))
        norms.append(float(references.update_norm(step.model).detach()))
    assert norms[1] < 0.5 * norms[0]


def test_a_scaler_scales_a_penalty_too() -> None:
    plain = cat_step(unet_pair()[0], preservation="l2")
    scaled = cat_step(unet_pair()[0], preservation="l2", grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for n in range(3):
        ours, theirs = scaled(**batch(n)), plain(**batch(n))
        assert_close(ours.grad_norm, theirs.grad_norm, factor=10)
        assert_close(ours.loss, theirs.loss, factor=10)


@pytest.mark.parametrize("kind", ["dco", "l2", "layers"])
def test_trains_under_autocast(kind: str) -> None:
    model, _ = unet_pair()
    before = lora_parameters(model)
    step = cat_step(model, preservation=kind, cat_factor=FACTORS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(**batch(0))
    theirs = cat_step(unet_pair()[0], preservation=kind, cat_factor=FACTORS[kind])(**batch(0))
    for name in ("loss", "diffusion", "grad_norm"):
        assert float(getattr(ours, name)) == pytest.approx(float(getattr(theirs, name)), rel=0.05), name
    assert not any(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"preservation": "ewc"}, "`preservation` must be one of cat, prior, dco, l2, layers, got 'ewc'"),
    "every": ({"preservation": "dco", "preserve_every": 2}, "`preserve_every` must not be given .*='dco'"),
    "ratio": (
        {"preservation": "dco", "cat_factor": cat_rs.CatFactorRatio(0.1)},
        "`cat_factor` must be a number or a function of the step with preservation='dco'.* got a CatFactorRatio",
    ),
}


@pytest.mark.parametrize(("options", "message"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^CatStep: {message}"):
        cat_step(unet_pair()[0], **options)


def test_a_penalty_of_layers_trains_no_text_encoders() -> None:
    with pytest.raises(InvalidValueError, match="`text_encoders` must not be given with preservation='layers'"):
        cat_step(unet_pair()[0], text_encoders=[text.adapted(tiny_text_encoder())], preservation="layers")


@pytest.mark.parametrize("kind", ["prior", "dco", "l2", "layers"])
def test_a_bank_is_of_cat(kind: str) -> None:
    from tests.cuda.test_step import bank_of

    bank, _ = bank_of(model := unet_pair()[0])
    with pytest.raises(InvalidValueError, match=f"`teacher_bank` must not be given with preservation='{kind}'"):
        cat_step(model, teacher_bank=bank, preservation=kind)


def test_the_concepts_own_pictures_are_no_prior() -> None:
    with pytest.raises(InvalidValueError, match="`preserve` must be PreservationSamples with preservation='prior'"):
        cat_step(unet_pair()[0], preservation="prior")(**batch(0))


def test_a_mask_of_another_shape_is_named() -> None:
    step = cat_step(unet_pair()[0], preservation="dco")
    with pytest.raises(ShapeError, match=r"`mask` must have shape \[2, 4, 8, 8\] up to dimensions of size 1"):
        step(**batch(0), mask=torch.ones(2, 1, 8, 7))


@pytest.mark.parametrize("kind", ["l2", "layers"])
def test_adapters_without_low_rank_layers_are_named(kind: str) -> None:
    from peft import LoHaConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["to_q"]), tiny_unet())
    with pytest.raises(AdapterError, match="`model` must have LoRA layers for this preservation, got none"):
        cat_step(model, preservation=kind)(**batch(0))
