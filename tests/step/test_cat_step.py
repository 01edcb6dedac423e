"""CatStep: the adapter after some steps against the plain recipe, resume, conditions, and bad input."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

import cat_rs
from cat_rs.errors import AdapterError, CatRsError, DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.step.inputs import PreservationSamples, draw_noise
from tests.comparison import SETTINGS, cat_step, compare_with_recipe, ddpm, flow_matching
from tests.models import CROSS, add_lora, batch, lora_parameters, tiny_transformer, tiny_unet
from tests.references import PlainRecipe
from tests.tolerances import assert_close

DRAWN = ("noise", "timesteps")


@functools.cache
def _unet_pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    base = tiny_unet()
    return add_lora(copy.deepcopy(base)), base


def unet_pair(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with an adapter, and the model without."""
    model, base = copy.deepcopy(_unet_pair())
    return model.to(dtype), base.to(dtype)


def float64_pair(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Models with the weights of ``unet_pair(dtype)`` that compute in float64."""
    model, base = unet_pair(dtype)
    return model.double(), base.double()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0], ids=["uniform", "min-snr"])
def test_equals_the_plain_recipe(prediction_type: str, snr_gamma: float | None) -> None:
    compare_with_recipe(
        *unet_pair(), [batch(n) for n in range(5)], prediction_type=prediction_type, snr_gamma=snr_gamma
    )


def test_equals_the_plain_recipe_in_float64() -> None:
    # The schedule's tables are float32: they bound the agreement.
    batches = [batch(n, dtype=torch.float64) for n in range(5)]
    compare_with_recipe(*unet_pair(torch.float64), batches, tolerance=1e-6)


def test_is_as_exact_in_bfloat16_as_the_plain_recipe() -> None:
    # Adam's first steps turn bfloat16's rounding of small gradients into whole steps: so both are compared with
    # float64 arithmetic on the same weights.
    steps = [batch(n, dtype=torch.bfloat16) for n in range(5)]

    def plain(pair: tuple[torch.nn.Module, torch.nn.Module], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        recipe = PlainRecipe(*pair, ddpm(), **SETTINGS)
        for one in steps:
            recipe(**{name: value if name == "timesteps" else value.to(dtype) for name, value in one.items()})
        return lora_parameters(pair[0])

    model, _ = unet_pair(torch.bfloat16)
    before = lora_parameters(model)
    step = cat_step(model)
    for one in steps:
        step(**one)
    exact = plain(float64_pair(torch.bfloat16), torch.float64)

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm())

    ours = distance(lora_parameters(model), exact)
    theirs = distance(plain(unet_pair(torch.bfloat16), torch.bfloat16), exact)
    assert ours < 1.2 * theirs
    assert ours < 0.5 * distance(before, exact)


@pytest.mark.parametrize("size", [1, 3], ids=["batch-1", "batch-3"])
def test_equals_the_plain_recipe_at_batch_size(size: int) -> None:
    compare_with_recipe(*unet_pair(), [batch(n, size) for n in range(3)])


def test_equals_the_plain_recipe_with_weights_and_mask() -> None:
    batches = [
        {
            **batch(n, 3),
            "sample_weight": torch.tensor([1.0, 0.0, 2.5]),
            "mask": (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(n)) > 0.3).float(),
        }
        for n in range(3)
    ]
    compare_with_recipe(*unet_pair(), batches)


def test_equals_the_plain_recipe_with_weights_on_top_of_min_snr() -> None:
    batches = [{**batch(n), "sample_weight": torch.tensor([0.5, 2.0])} for n in range(3)]
    compare_with_recipe(*unet_pair(), batches, snr_gamma=5.0)


def test_equals_the_plain_recipe_with_accumulation() -> None:
    compare_with_recipe(*unet_pair(), [batch(n) for n in range(6)], accumulate=3)


@pytest.mark.parametrize("cat_factor", [0.0, 0.3], ids=str)
def test_equals_the_plain_recipe_with_cat_factor(cat_factor: float) -> None:
    compare_with_recipe(*unet_pair(), [batch(n) for n in range(3)], cat_factor=cat_factor)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3], ids=["no-clipping", "all-clip"])
def test_equals_the_plain_recipe_with_clipping(max_grad_norm: float | None) -> None:
    compare_with_recipe(*unet_pair(), [batch(n) for n in range(3)], max_grad_norm=max_grad_norm)


def preserved_batch(
    number: int, size: int, *, weighted: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A batch whose preservation samples are other latents."""
    other = batch(100 + number, size, dtype=dtype)
    samples = PreservationSamples(other["latents"], other["noise"], other["timesteps"])
    if weighted:
        mask = (torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(number)) > 0.3).float()
        samples = samples._replace(sample_weight=torch.rand(size) + 0.1, mask=mask)
    return {**batch(number, dtype=dtype), "cond_no_trigger": other["cond_no_trigger"], "preserve": samples}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("snr_gamma", [None, 5.0], ids=["uniform", "min-snr"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_equals_the_plain_recipe_with_preservation_samples(size: int, snr_gamma: float | None, weighted: bool) -> None:
    batches = [preserved_batch(n, size, weighted=weighted) for n in range(3)]
    if weighted:
        batches = [
            {**one, "sample_weight": torch.tensor([0.5, 2.0]), "mask": torch.ones(1, 1, 8, 8)} for one in batches
        ]
    compare_with_recipe(*unet_pair(), batches, snr_gamma=snr_gamma, cat_factor=0.7)


def test_equals_the_plain_recipe_with_preservation_samples_and_accumulation() -> None:
    compare_with_recipe(*unet_pair(), [preserved_batch(n, 1 + n % 3) for n in range(4)], accumulate=2)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("own", [False, True], ids=["concept", "samples"])
def test_equals_the_plain_recipe_with_a_term_in_every_kth_step(every: int, accumulate: int, own: bool) -> None:
    batches = [preserved_batch(n, 3) if own else batch(n) for n in range(5 * accumulate)]
    options = {"preserve_every": every, "accumulate": accumulate, "cat_factor": 0.7}
    compare_with_recipe(*unet_pair(), batches, **options)


def test_equals_the_plain_recipe_with_a_term_in_every_kth_step_that_a_scaler_skips() -> None:
    # The second step overflows: the term of the third and the fourth's turn are where they were.
    model, base = unet_pair()
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) for _ in range(2)]
    recipe = PlainRecipe(copy.deepcopy(model), base, ddpm(), preserve_every=2, grad_scaler=scalers[0], **SETTINGS)
    step = cat_step(model, preserve_every=2, grad_scaler=scalers[1])
    for n in range(6):
        one = batch(n)
        if n == 1:
            one["latents"][0, 0, 0, 0] = torch.inf
        ours, theirs = step(**one), recipe(**one)
        assert ours.cat.isnan() == (n % 2 == 0 or n == 1)
        assert float(ours.loss) == pytest.approx(theirs["loss"], rel=1e-4, nan_ok=True)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    theirs = lora_parameters(recipe.model)
    for name, param in lora_parameters(model).items():
        assert_close(param, theirs[name], factor=10, scale=1.0, label=name)


def test_steps_without_a_term_look_at_no_preservation_inputs() -> None:
    step, predicted = cat_step(unet_pair()[0], preserve_every=2, accumulate=2), list[int]()
    step.model.register_forward_hook(lambda model, given, output: predicted.append(len(output[0])))
    asked = []
    for n in range(8):
        asked.append(step.preserves_next)
        one: dict[str, Any] = batch(n)
        if not step.preserves_next:
            del one["cond_no_trigger"]
        metrics = step(**one)
        assert metrics.cat.isnan() != asked[-1]
        assert float(metrics.loss) == pytest.approx(
            float(metrics.diffusion + 2 * metrics.cat) if asked[-1] else float(metrics.diffusion)
        )
        assert metrics.cat_factor == 1.0
    assert asked == [False, False, True, True] * 2
    assert predicted == [2, 2, 2, 4, 2, 4] * 2


def test_what_a_step_without_a_term_does_not_look_at_changes_no_draws() -> None:
    def losses(*, given: bool) -> list[float]:
        step = cat_step(unet_pair()[0], preserve_every=2, generator=torch.Generator().manual_seed(7))
        values = []
        for n in range(4):
            one = {name: value for name, value in preserved_batch(n, 3).items() if name not in DRAWN}
            one["preserve"] = PreservationSamples(one["preserve"].latents) if given or step.preserves_next else None
            values.append(float(step(**one).loss))
        return values

    assert losses(given=True) == losses(given=False)


def test_without_a_factor_no_step_has_a_term() -> None:
    step = cat_step(unet_pair()[0], cat_factor=lambda done: float(done == 1), preserve_every=2)
    cats = []
    for n in range(4):
        assert step.preserves_next == (n == 1)
        cats.append(float(step(**batch(n)).cat))
    assert cats == pytest.approx([torch.nan, cats[1], torch.nan, 0.0], nan_ok=True)
    assert cats[1] > 0


def test_the_concepts_own_samples_are_those_of_cat() -> None:
    ours, theirs = cat_step(unet_pair()[0]), cat_step(unet_pair()[0])
    for n in range(3):
        one = batch(n)
        own = PreservationSamples(one["latents"], one["noise"], one["timesteps"])
        assert_close(ours(**one, preserve=own).loss, theirs(**one).loss)
    for name, param in lora_parameters(ours.model).items():
        assert_close(param, lora_parameters(theirs.model)[name], factor=100, label=name)


def test_preservation_samples_are_drawn_after_the_concepts() -> None:
    one = {name: value for name, value in preserved_batch(0, 3).items() if name not in DRAWN}
    given = one.pop("preserve")
    step = cat_step(unet_pair()[0], generator=torch.Generator().manual_seed(7))
    drawn = step(**one, preserve=PreservationSamples(given.latents))
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    timesteps = torch.randint(1000, (2,), generator=generator)
    own = PreservationSamples(
        given.latents, torch.randn(3, 4, 8, 8, generator=generator), torch.randint(1000, (3,), generator=generator)
    )
    again = cat_step(unet_pair()[0])(**one, noise=noise, timesteps=timesteps, preserve=own)
    assert torch.equal(drawn.loss, again.loss)
    assert torch.equal(drawn.cat, again.cat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_stored_base_predictions_are_those_that_the_step_would_make(dtype: torch.dtype) -> None:
    predictions: list[torch.Tensor] = []

    def predict(
        model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        prediction = model(latents, timesteps, **cond).sample
        predictions.append(prediction.detach())
        return prediction

    predicting, stored = (cat_step(unet_pair(dtype)[0], predict=predict, accumulate=2) for _ in range(2))
    for n in range(4):
        one = preserved_batch(n, 3, weighted=True, dtype=dtype)
        predictions.clear()
        theirs = predicting(**one)
        base_pred, _ = predictions
        predictions.clear()
        ours = stored(**{**one, "preserve": one["preserve"]._replace(base_pred=base_pred)})
        # The concept's samples and those of the preservation term at once.
        assert [len(prediction) for prediction in predictions] == [2 + 3]
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.cat, theirs.cat)
    expected = lora_parameters(predicting.model)
    assert all(torch.equal(param, expected[name]) for name, param in lora_parameters(stored.model).items())


def test_base_predictions_may_be_stored_in_a_lower_dtype() -> None:
    one = preserved_batch(0, 3)
    rounded = torch.randn(3, 4, 8, 8).bfloat16()
    ours, theirs = (
        cat_step(unet_pair()[0])(**{**one, "preserve": one["preserve"]._replace(base_pred=base_pred)}).cat
        for base_pred in (rounded, rounded.float())
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"base_pred": 1.0}, DtypeError, "`preserve.base_pred` must be a torch.Tensor, got float"),
        (
            {"base_pred": torch.ones(2, 4, 8, 8)},
            ShapeError,
            r"`preserve.base_pred` must have shape \[3, 4, 8, 8\] on cpu, got \[2, 4, 8, 8\] on cpu",
        ),
        (
            {"base_pred": torch.ones(3, 4, 8, 8), "noise": None},
            InvalidValueError,
            "`preserve.noise` and `preserve.timesteps` must be those of the base predictions, got none",
        ),
        ({"preserve": torch.ones(3, 4, 8, 8)}, InvalidValueError, "`preserve` must be PreservationSamples or None"),
        ({"latents": torch.ones(3, 4, 8, 9)}, ShapeError, r"`preserve.latents` must have shape \[P, 4, 8, 8\]"),
        ({"latents": torch.ones(3, 4, 8, 8).double()}, ShapeError, r"`preserve.latents` .* dtype torch.float32"),
        ({"noise": torch.ones(2, 4, 8, 8)}, ShapeError, r"noise.* must have shape"),
        ({"timesteps": torch.ones(2, dtype=torch.long)}, ShapeError, r"timesteps.* must have shape"),
        ({"sample_weight": torch.ones(2)}, ShapeError, r"`preserve_weight` must have shape \[3\]"),
        ({"mask": torch.ones(2, 4, 8, 8)}, ShapeError, r"`preserve_mask` must have shape \[3, 4, 8, 8\]"),
    ],
)
def test_bad_preservation_samples_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    one = preserved_batch(0, 3)
    if "preserve" not in change:
        change = {"preserve": one["preserve"]._replace(**change)}
    with pytest.raises(error, match=text):
        cat_step(unet_pair()[0])(**{**one, **change})


def test_equals_the_plain_recipe_with_flow_matching() -> None:
    base = tiny_transformer()
    model = add_lora(copy.deepcopy(base), target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    scheduler = flow_matching()
    batches = []
    for n in range(3):
        one: dict[str, Any] = batch(n)
        one["timesteps"] = scheduler.timesteps[one["timesteps"]]
        for name in ("cond", "cond_no_trigger"):
            one[name] = {"encoder_hidden_states": one[name], "pooled_projections": torch.randn(2, 8)}
        batches.append(one)
    compare_with_recipe(model, base, batches, scheduler=scheduler, prediction_type="flow")


def test_equals_the_plain_recipe_with_convolution_adapters() -> None:
    base = tiny_unet()
    model = add_lora(copy.deepcopy(base), target_modules=["to_k", "to_v", "conv1", "proj_in", "time_emb_proj"])
    compare_with_recipe(model, base, [batch(n) for n in range(3)])


def test_equals_the_plain_recipe_with_gradient_checkpointing() -> None:
    model, base = unet_pair()
    model.enable_gradient_checkpointing()
    model.train()
    compare_with_recipe(model, base, [batch(n) for n in range(3)])


@pytest.mark.parametrize("frames", [None, 3], ids=["picture", "video"])
def test_noise_offset_adds_one_draw_for_each_sample_and_channel(frames: int | None) -> None:
    shape = (2, 4, 8, 8) if frames is None else (2, 4, frames, 8, 8)
    step = cat_step(unet_pair()[0], noise_offset=0.1, generator=torch.Generator().manual_seed(7))
    twin = torch.Generator().manual_seed(7)
    expected = torch.randn(shape, generator=twin)
    expected += 0.1 * torch.randn((2, 4) + (1,) * (len(shape) - 2), generator=twin)
    assert torch.equal(draw_noise(torch.zeros(shape), step.noise_offset, step.generator), expected)
    given = {name: value for name, value in batch(0).items() if name != "noise"}
    if frames is None:
        noise = draw_noise(given["latents"], step.noise_offset, step.generator)
        step.generator.manual_seed(7)
        drawn, _ = step(**given), step.generator.manual_seed(7)
        plain = cat_step(unet_pair()[0])(
            **given, noise=draw_noise(given["latents"], step.noise_offset, step.generator)
        )
        assert noise.shape == shape
        assert torch.equal(drawn.loss, plain.loss)


def test_noise_offset_needs_channels() -> None:
    step = cat_step(unet_pair()[0], noise_offset=0.1)
    with pytest.raises(
        ShapeError, match=r"`latents` must have shape \[B, C, H, W\] .* for noise_offset, got \[2, 16, 4\]"
    ):
        step(**{**batch(0), "latents": torch.zeros(2, 16, 4), "noise": None})
    with pytest.raises(InvalidValueError, match="`noise_offset` must be a finite number, got nan"):
        cat_step(unet_pair()[0], noise_offset=float("nan"))


class OwnModel(torch.nn.Module):
    """A model that is not called like a diffusers denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16 + 3, 12)
        self.second = torch.nn.Linear(12, 16)

    def forward(self, z: torch.Tensor, words: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([z, words], 1) * (1 + when[:, None] / 1000)
        return self.second(torch.tanh(self.first(hidden)))


def test_equals_the_plain_recipe_with_a_predict_callable() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def predict(
        model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        return model(latents, cond["words"], timesteps.float())

    base = OwnModel().requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model = inject_adapter_in_model(config, copy.deepcopy(base))
    batches = []
    for n in range(5):
        generator = torch.Generator().manual_seed(n)
        latents, noise = torch.randn(2, 4, 16, generator=generator)
        words, others = torch.randn(2, 4, 3, generator=generator)
        batches.append(
            {
                "latents": latents,
                "noise": noise,
                "timesteps": torch.randint(1000, (4,), generator=generator),
                "cond": {"words": words},
                "cond_no_trigger": {"words": others},
            }
        )
    compare_with_recipe(model, base, batches, predict=predict)


def test_nested_conditions() -> None:
    settings = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    batches = []
    for n in range(3):
        one: dict[str, Any] = batch(n)
        for name in ("cond", "cond_no_trigger"):
            added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
            one[name] = {"encoder_hidden_states": one[name], "added_cond_kwargs": added, "class_labels": None}
        batches.append(one)
    base = tiny_unet(**settings)
    compare_with_recipe(add_lora(copy.deepcopy(base)), base, batches)


def test_sequences_of_tensors_in_conditions() -> None:
    # As a ControlNet gives them to a U-Net.
    model, base = unet_pair()
    residuals = tuple(torch.randn(2, channels, size, size) for channels, size in ((8, 8), (8, 8), (8, 4), (16, 4)))
    options = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": torch.randn(2, 16, 4, 4)}
    batches = []
    for n in range(2):
        one: dict[str, Any] = batch(n)
        for name in ("cond", "cond_no_trigger"):
            one[name] = {"encoder_hidden_states": one[name], **options}
        batches.append(one)
    compare_with_recipe(model, base, batches)


def test_the_preservation_term_starts_at_rounding() -> None:
    model = add_lora(tiny_unet(), start=True)
    metrics = cat_step(model)(**batch(0))
    assert 0 <= metrics.cat < 1e-9 * metrics.diffusion
    assert metrics.loss == pytest.approx(float(metrics.diffusion), rel=1e-6)


def test_the_preservation_term_keeps_the_base_model() -> None:
    drifts = []
    for cat_factor in (0.0, 4.0):
        base = tiny_unet()
        model = add_lora(copy.deepcopy(base), start=True)
        step = cat_step(model, lr=3e-2, cat_factor=cat_factor)
        one = batch(0)
        for _ in range(10):
            step(**one)
        with torch.no_grad():
            arguments = one["latents"], one["timesteps"], one["cond_no_trigger"]
            drifts.append(float((model(*arguments).sample - base(*arguments).sample).square().mean()))
    assert drifts[1] < 0.5 * drifts[0]


def test_the_factor_may_change_between_steps() -> None:
    model, base = unet_pair()
    plain = copy.deepcopy(model)
    recipe = PlainRecipe(plain, base, ddpm(), **SETTINGS)
    step = cat_step(model)
    for n, factor in enumerate([1.0, 0.0, 2.0]):
        step.cat_factor = recipe.cat_factor = factor
        metrics, expected = step(**batch(n)), recipe(**batch(n))
        assert float(metrics.loss) == pytest.approx(expected["loss"], rel=1e-4)
        assert (metrics.cat == 0) == (factor == 0)
    theirs = lora_parameters(plain)
    for name, param in lora_parameters(model).items():
        assert_close(param, theirs[name], factor=10, scale=1.0, label=name)


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")], ids=str)
def test_a_bad_factor_between_steps_is_refused(value: float) -> None:
    step = cat_step(unet_pair()[0])
    with pytest.raises(InvalidValueError, match="`cat_factor` must be a finite number >= 0, got"):
        step.cat_factor = value
    assert step.cat_factor == 1.0


def test_a_learning_rate_scheduler_attaches_to_the_optimizer() -> None:
    model, _ = unet_pair()
    step = cat_step(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda n: 1.0 if n < 1 else 0.0)
    step(**batch(0))
    schedule.step()
    before = lora_parameters(model)
    step(**batch(1))
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())


def test_only_the_adapter_changes() -> None:
    model, base = unet_pair()
    before = lora_parameters(model)
    step = cat_step(model)
    for n in range(2):
        step(**batch(n))
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in base.state_dict().items():
        assert torch.equal(after[name], value), name
    assert all(not torch.equal(param, before[name]) for name, param in lora_parameters(model).items())
    assert all(param.grad is None for name, param in model.named_parameters() if "lora_" not in name)


def test_inputs_stay_as_they_are() -> None:
    one = batch(0)
    before = {name: value.clone() for name, value in one.items()}
    cat_step(unet_pair()[0])(**one)
    assert all(torch.equal(one[name], value) for name, value in before.items())


def test_metrics_are_detached_scalars() -> None:
    metrics = cat_step(unet_pair()[0], cat_factor=0.5)(**batch(0))
    assert all(isinstance(value, torch.Tensor) and value.shape == () for value in metrics)
    assert not any(value.requires_grad for value in metrics)
    assert float(metrics.loss) == pytest.approx(float(metrics.diffusion + 0.5 * metrics.cat))
    assert metrics.grad_norm > 0


def test_a_step_that_is_not_finite_leaves_the_adapter() -> None:
    model, _ = unet_pair()
    step, undisturbed = cat_step(model), cat_step(unet_pair()[0])
    step(**batch(0))
    undisturbed(**batch(0))
    before = lora_parameters(model)
    one = batch(1)
    one["latents"][0, 0, 0, 0] = torch.inf
    assert not step(**one).grad_norm.isfinite()
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())
    assert torch.equal(step(**batch(2)).grad_norm, undisturbed(**batch(2)).grad_norm)


def test_noise_and_timesteps_come_from_the_generator() -> None:
    drawn = batch(0)
    del drawn["noise"], drawn["timesteps"]
    losses = []
    for seed in (7, 7, 8):
        step = cat_step(unet_pair()[0], generator=torch.Generator().manual_seed(seed))
        losses.append([float(step(**drawn).loss) for _ in range(3)])
    assert losses[0] == losses[1] != losses[2]
    assert len(set(losses[0])) == 3


def test_without_a_generator_torchs_own_draws() -> None:
    drawn = batch(0)
    del drawn["noise"], drawn["timesteps"]
    losses = []
    for seed in (7, 7, 8):
        step = cat_step(unet_pair()[0])
        torch.manual_seed(seed)
        losses.append(float(step(**drawn).loss))
    assert losses[0] == losses[1] != losses[2]


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("steps_before", [3, 4, 5], ids=["update-due", "mid-accumulation-1", "mid-accumulation-2"])
@pytest.mark.parametrize("every", [1, 2])
def test_resumes_bit_for_bit(steps_before: int, every: int, dtype: torch.dtype) -> None:
    def fresh(seed: int) -> tuple[torch.nn.Module, cat_rs.CatStep]:
        model, _ = unet_pair(dtype)
        generator = torch.Generator().manual_seed(seed)
        return model, cat_step(model, accumulate=3, preserve_every=every, generator=generator)

    def drawn(number: int) -> dict[str, torch.Tensor]:
        return {name: value for name, value in batch(number, dtype=dtype).items() if name not in DRAWN}

    model, step = fresh(0)
    for n in range(steps_before):
        step(**drawn(n))
    state = _through_a_file(step.state_dict())
    # The model it resumes into has taken other steps: everything must come from the state.
    resumed_model, resumed = fresh(1)
    for n in range(2):
        resumed(**drawn(50 + n))
    resumed.load_state_dict(state)
    for n in range(steps_before, 7):
        ours, theirs = resumed(**drawn(n)), step(**drawn(n))
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.grad_norm.nan_to_num(-1), theirs.grad_norm.nan_to_num(-1))
    expected = lora_parameters(model)
    assert all(torch.equal(param, expected[name]) for name, param in lora_parameters(resumed_model).items())


def test_a_state_does_not_change_with_later_steps() -> None:
    step = cat_step(unet_pair()[0])
    step(**batch(0))
    state = step.state_dict()
    before = copy.deepcopy(state)
    step(**batch(1))
    for key, value in before["parameters"].items():
        assert torch.equal(value, state["parameters"][key])
    for index, value in before["optimizer"]["state"].items():
        for key in value:
            assert torch.equal(value[key], state["optimizer"]["state"][index][key]), f"{key} follows the optimizer"


def test_a_state_of_another_adapter_is_refused() -> None:
    state = cat_step(add_lora(tiny_unet(), r=2)).state_dict()
    model, _ = unet_pair()
    before = lora_parameters(model)
    with pytest.raises(AdapterError, match=r"`state_dict` must be of this adapter, got .* differ, e.g. .*\[4, "):
        cat_step(model).load_state_dict(state)
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())


def test_training_a_peft_model() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_unet()
    config = LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False)
    compare_with_recipe(get_peft_model(copy.deepcopy(base), config), base, [batch(n) for n in range(3)])


def test_bias_that_trains_with_the_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_unet()
    config = LoraConfig(r=4, target_modules=["to_out.0"], bias="lora_only", init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    metrics = cat_step(model)(**batch(0))
    assert metrics.loss.isfinite()


def model_without_adapter() -> torch.nn.Module:
    return tiny_unet()


def frozen_model() -> torch.nn.Module:
    return add_lora(tiny_unet()).requires_grad_(False)


@pytest.mark.parametrize(
    ("model_of", "text"),
    [
        pytest.param(model_without_adapter, "must have PEFT adapter layers .* got none", id="no-adapter"),
        pytest.param(frozen_model, "must have trainable adapter parameters, got all of them frozen", id="frozen"),
    ],
)
def test_a_model_that_cannot_train_is_named(model_of: Any, text: str) -> None:
    with pytest.raises(AdapterError, match=f"^CatStep: `model` {text}") as caught:
        cat_step(model_of())
    assert isinstance(caught.value, CatRsError)


class NoTables:
    """A scheduler without the tables that training needs."""

    config: ClassVar[dict[str, Any]] = {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({"cat_factor": -1.0}, "`cat_factor` must be a finite number >= 0, got -1.0", id="cat_factor"),
        pytest.param({"cat_factor": float("nan")}, "`cat_factor` .* got nan", id="cat_factor-nan"),
        pytest.param({"accumulate": 0}, "`accumulate` must be an integer of at least 1, got 0", id="accumulate"),
        pytest.param({"preserve_every": 1.5}, "`preserve_every` must be an integer .* got 1.5", id="preserve_every"),
        pytest.param({"snr_gamma": 0.0}, "`snr_gamma` must be > 0 or None, got 0.0", id="snr_gamma"),
        pytest.param({"prediction_type": "sample"}, "`prediction_type` must be .* got 'sample'", id="prediction_type"),
        pytest.param({"prediction_type": "flow"}, "`prediction_type` must be .* got 'flow'", id="flow-on-ddpm"),
        pytest.param({"scheduler": NoTables()}, "`scheduler` must be .* got NoTables", id="no-tables"),
        pytest.param({"scheduler": None}, "`scheduler` must be .* got NoneType", id="no-scheduler"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    model, _ = unet_pair()
    with pytest.raises(InvalidValueError, match=f"^CatStep: {text}"):
        cat_rs.CatStep(model, **{"scheduler": ddpm(), **options})


def test_a_learning_rate_out_of_range_is_named() -> None:
    with pytest.raises(InvalidValueError, match="`lr` must be a finite number >= 0, got -1"):
        cat_rs.CatStep(unet_pair()[0], ddpm(), lr=-1.0)


def test_min_snr_needs_a_noise_schedule() -> None:
    model = add_lora(tiny_transformer(), target_modules=["to_q"])
    with pytest.raises(InvalidValueError, match="`snr_gamma` must be None for a flow-matching scheduler"):
        cat_rs.CatStep(model, flow_matching(), snr_gamma=5.0)


def test_a_scheduler_that_predicts_samples_is_named() -> None:
    with pytest.raises(InvalidValueError, match=r"`prediction_type` must be .* got 'sample'"):
        cat_rs.CatStep(unet_pair()[0], ddpm(prediction_type="sample"))


def test_a_model_with_another_signature_needs_predict() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), OwnModel())
    with pytest.raises(InvalidValueError, match=r"'timestep', got OwnModel .* pass predict="):
        cat_step(model)


def test_a_notebook_cell_runs_twice() -> None:
    """Patching again and a second step over the same adapter train on, from where the first one stopped."""
    from cat_rs import patch_peft

    model, _ = unet_pair()
    steps = []
    for number in range(2):
        patch_peft(model)
        steps.append(cat_step(model))
        before = {name: param.clone() for name, param in lora_parameters(model).items()}
        steps[-1](**batch(number))
        assert not any(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())
    again, _ = unet_pair()
    first = cat_step(again)
    first(**batch(0))
    second = cat_step(again)
    second(**batch(1))
    assert all(
        torch.equal(one, other)
        for one, other in zip(*(lora_parameters(each).values() for each in (model, again)), strict=True)
    )


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "latents-dims": ({"latents": torch.ones(4)}, ShapeError, r"`latents` must have shape \[B, ...\]"),
    "empty-batch": ({"latents": torch.ones(0, 4, 8, 8)}, ShapeError, r"`latents` .* B >= 1, got \[0, 4, 8, 8\]"),
    "latents-int": ({"latents": torch.ones(2, 4, 8, 8).long()}, DtypeError, "`latents` must have dtype .* got int64"),
    "latents-bytes": (
        {"latents": torch.ones(2, 4, 8, 8).byte()},
        DtypeError,
        "`latents` must have dtype .* got uint8",
    ),
    "pixels": (
        {"latents": torch.ones(2, 3, 8, 8), "noise": torch.ones(2, 3, 8, 8)},
        ShapeError,
        r"`latents` must have 4 channels, as UNet2DConditionModel takes, got \[2, 3, 8, 8\].* VAE",
    ),
    "other-dtype": (
        {name: torch.ones(2, 4, 8, 8).bfloat16() for name in ("latents", "noise")},
        DtypeError,
        "`latents` must have the model's dtype float32, got bfloat16",
    ),
    "cond-dtype": (
        {name: torch.ones(2, 5, CROSS).bfloat16() for name in ("cond", "cond_no_trigger")},
        DtypeError,
        r"`cond_no_trigger\['encoder_hidden_states'\]` must have the model's dtype float32, got bfloat16",
    ),
    "cond-batch": (
        {name: torch.ones(3, 5, CROSS) for name in ("cond", "cond_no_trigger")},
        ShapeError,
        r"`cond_no_trigger.*` must have the latents' batch size 2, got \[3, 5, 16\]",
    ),
    "latents-meta": ({"latents": torch.ones(2, 4, 8, 8, device="meta")}, DeviceError, "`latents` must be on the CPU"),
    "latents-grad": (
        {"latents": torch.ones(2, 4, 8, 8, requires_grad=True)},
        InvalidValueError,
        "`latents` .* detach",
    ),
    "noise-shape": ({"noise": torch.ones(2, 4, 8, 9)}, ShapeError, r"`noise` .* got \[2, 4, 8, 9\]"),
    "timesteps-shape": ({"timesteps": torch.tensor([1])}, ShapeError, r"`timesteps` must have shape \[2\], got \[1\]"),
    "timesteps-scalar": ({"timesteps": torch.tensor(1)}, ShapeError, r"`timesteps` must have shape \[2\], got \[\]"),
    "timesteps-high": ({"timesteps": torch.tensor([1, 1000])}, InvalidValueError, r"in 0..999, got 1..1000"),
    "timesteps-negative": ({"timesteps": torch.tensor([-1, 5])}, InvalidValueError, r"in 0..999, got -1..5"),
    "timesteps-float": (
        {"timesteps": torch.tensor([1.0, 2.0])},
        InvalidValueError,
        "must be integers, got torch.float32",
    ),
    "weight-shape": ({"sample_weight": torch.ones(3)}, ShapeError, r"`sample_weight` .* \[2\], got \[3\]"),
    "weight-nan": ({"sample_weight": torch.tensor([1.0, torch.nan])}, InvalidValueError, "got [Nn]a[Nn] at index 1"),
    "weight-negative": ({"sample_weight": torch.tensor([-1.0, 1.0])}, InvalidValueError, "got -1(\\.0)? at index 0"),
    "mask-shape": ({"mask": torch.ones(2, 1, 8, 7)}, ShapeError, r"`mask` .* got \[2, 1, 8, 7\]"),
    "cond-type": ({"cond": [1, 2]}, InvalidValueError, "`cond` must be a tensor .* or a mapping .* got list"),
    "cond-none": ({"cond_no_trigger": None}, InvalidValueError, "`cond_no_trigger` must be .* got NoneType"),
    "cond-shapes": (
        {"cond_no_trigger": torch.ones(2, 6, CROSS)},
        ShapeError,
        r"`cond_no_trigger.*` must have shape \[2, 5, 16\] .* got \[2, 6, 16\]",
    ),
    "cond-keys": (
        {"cond_no_trigger": {"encoder_hidden_states": torch.ones(2, 5, CROSS), "class_labels": None}},
        InvalidValueError,
        r"`cond_no_trigger` must have cond's keys \['encoder_hidden_states'\], got \['class_labels', .*\]",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model, _ = unet_pair()
    step = cat_step(model)
    before = lora_parameters(model)
    with pytest.raises(error, match=text) as caught:
        step(**{**batch(0), **arguments})
    assert isinstance(caught.value, CatRsError)
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())


def test_accumulation_may_change_between_steps() -> None:
    step = cat_step(unet_pair()[0], accumulate=2)
    updates = []
    for number, accumulate in enumerate([2, 2, 1, 3, 3, 3]):
        step.accumulate = accumulate
        updates.append(not step(**batch(number)).grad_norm.isnan())
    assert updates == [False, True, True, False, False, True]


def test_a_failed_call_leaves_nothing_behind() -> None:
    step, undisturbed = cat_step(unet_pair()[0]), cat_step(unet_pair()[0])
    with pytest.raises(ShapeError):
        step(**{**batch(1), "mask": torch.ones(2, 1, 8, 7)})
    assert torch.equal(step(**batch(0)).grad_norm, undisturbed(**batch(0)).grad_norm)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)], ids=str)
def test_a_weight_of_another_shape_is_named_under_min_snr(shape: tuple[int, ...]) -> None:
    step = cat_step(unet_pair()[0], snr_gamma=5.0)
    with pytest.raises(ShapeError, match=r"`sample_weight` must have shape \[2\], got"):
        step(**batch(0), sample_weight=torch.ones(shape))


def test_a_condition_that_is_not_a_tensor_must_be_the_same() -> None:
    one: dict[str, Any] = batch(0)
    one["cond"] = {"encoder_hidden_states": one["cond"], "cross_attention_kwargs": {"scale": 1.0}}
    one["cond_no_trigger"] = {
        "encoder_hidden_states": one["cond_no_trigger"],
        "cross_attention_kwargs": {"scale": 0.5},
    }
    with pytest.raises(InvalidValueError, match=r"cross_attention_kwargs.*scale.* must equal cond's 1.0, got 0.5"):
        cat_step(unet_pair()[0])(**one)


def test_a_model_that_fails_leaves_the_adapter_on() -> None:
    model, _ = unet_pair()
    step = cat_step(model)
    one = batch(0)
    expected = model(one["latents"], one["timesteps"], one["cond"]).sample
    with pytest.raises(RuntimeError):
        step(**{**one, "cond": torch.ones(2, 5, 3), "cond_no_trigger": torch.ones(2, 5, 3)})
    assert torch.equal(model(one["latents"], one["timesteps"], one["cond"]).sample, expected)
