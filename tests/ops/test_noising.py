"""noising and NoiseSchedule: against float64 and against diffusers' own schedulers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from cat_rs.ops.noising import noising, snr_weights
from cat_rs.step.noise_schedule import NoiseSchedule
from tests import references
from tests.operators import check_operator
from tests.tolerances import assert_close

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = {"tidy": (2, 4, 8, 8), "odd": (3, 5, 7), "one": (1, 1), "batch-only": (4,), "large": (2, 4, 96, 96)}
DTYPES = {
    "f32": (F32, F32),
    "f64": (F64, F64),
    "bf16": (BF16, BF16),
    "f16": (F16, F16),
    "bf16-latents": (BF16, F32),
    "f16-noise": (F32, F16),
    "f64-noise": (F32, F64),
}
TYPES = ["epsilon", "v_prediction", "flow"]


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def make_case(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.randn(shape).to(dtypes[0]),
        "noise": torch.randn(shape).to(dtypes[1]),
        "signal_rate": torch.rand(shape[0]),
        "noise_rate": torch.rand(shape[0]),
    }


def check_against_reference(case: dict[str, torch.Tensor], prediction_type: str, copies: int = 1) -> None:
    noisy, target = noising(**case, prediction_type=prediction_type, copies=copies)
    expected_noisy, expected_target = references.noising(**case, prediction_type=prediction_type)
    assert noisy.dtype == case["latents"].dtype
    assert target.dtype == case["noise"].dtype
    # Signal and noise can cancel: the error is relative to what was added.
    for start in range(0, len(noisy), len(expected_noisy)):
        copy = noisy[start : start + len(expected_noisy)]
        assert_close(copy, expected_noisy, scale=4.0, label=f"{prediction_type}: z_t")
    assert noisy.shape == (copies * case["latents"].shape[0], *case["latents"].shape[1:])
    assert_close(target, expected_target, scale=4.0, label=f"{prediction_type}: target")


@pytest.mark.parametrize("dtypes", by_id(DTYPES))
@pytest.mark.parametrize("shape", by_id(SHAPES))
@pytest.mark.parametrize("prediction_type", TYPES)
def test_matches_reference(
    prediction_type: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check_against_reference(make_case(shape, dtypes), prediction_type, copies=2)


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_copies_repeat_the_batch(prediction_type: str, copies: int) -> None:
    check_against_reference(make_case((3, 5, 7)), prediction_type, copies)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_any_strides(prediction_type: str) -> None:
    case = make_case((4, 3, 6, 5))
    case["latents"] = case["latents"].contiguous(memory_format=torch.channels_last)
    case["noise"] = case["noise"].transpose(1, 3).contiguous().transpose(1, 3)
    case["signal_rate"] = torch.rand(8)[::2]
    case["noise_rate"] = torch.rand(1).expand(4)
    check_against_reference(case, prediction_type)


def test_epsilon_hands_out_the_noise_itself() -> None:
    case = make_case((2, 4, 8, 8))
    assert noising(**case, prediction_type="epsilon")[1].data_ptr() == case["noise"].data_ptr()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_inputs_stay_as_they_are(prediction_type: str) -> None:
    case = make_case((2, 4, 8, 8))
    before = {name: tensor.clone() for name, tensor in case.items()}
    noising(**case, prediction_type=prediction_type, copies=2)
    assert all(torch.equal(case[name], tensor) for name, tensor in before.items())


def test_same_bits_on_any_number_of_threads() -> None:
    case = make_case((3, 4, 128, 96))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(torch.cat(noising(**case, prediction_type="v_prediction")))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _ddpm(**settings: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def _zero_snr(**settings: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, **settings)


@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16, "f16": F16}))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler_of", [_ddpm, _zero_snr], ids=["ddpm", "ddim-zero-snr"])
def test_equals_diffusers(scheduler_of: Any, prediction_type: str, dtype: torch.dtype) -> None:
    scheduler = scheduler_of(prediction_type=prediction_type)
    schedule = NoiseSchedule(scheduler)
    assert schedule.prediction_type == prediction_type
    # Both ends of the schedule: at the last timestep of a zero-SNR schedule no signal is left.
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    latents, noise = torch.randn(2, 5, 4, 8, 8).to(dtype)
    noisy, target = noising(latents, noise, *schedule.rates(timesteps, 5), prediction_type)
    # In float32: below it diffusers rounds alphas_cumprod before it takes 1 - alphas_cumprod, ours does not.
    wide = latents.float(), noise.float(), timesteps
    assert_close(noisy, scheduler.add_noise(*wide), scale=4.0)
    expected = scheduler.get_velocity(*wide) if prediction_type == "v_prediction" else noise
    assert_close(target, expected, scale=4.0)
    if scheduler_of is _zero_snr:
        assert torch.equal(noisy[-1], noise[-1])


def test_equals_diffusers_flow_matching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = NoiseSchedule(scheduler)
    assert schedule.prediction_type == "flow"
    timesteps = scheduler.timesteps[[0, 1, 500, 999]]
    latents, noise = torch.randn(2, 4, 4, 8, 8)
    noisy, target = noising(latents, noise, *schedule.rates(timesteps, 4), "flow")
    assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise), scale=4.0)
    assert torch.equal(target, noise - latents)


@pytest.mark.parametrize("scheduler_of", [_ddpm, _zero_snr], ids=["ddpm", "ddim-zero-snr"])
def test_drawn_timesteps_cover_the_schedule(scheduler_of: Any) -> None:
    schedule = NoiseSchedule(scheduler_of(num_train_timesteps=10))
    drawn = schedule.draw(1000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(10))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9], ids=str)
def test_snr_weights_match_reference(gamma: float, prediction_type: str) -> None:
    alphas = _ddpm().alphas_cumprod.double()
    timesteps = torch.arange(1000)
    ours = snr_weights(timesteps, alphas, gamma, prediction_type)
    assert_close(ours, references.snr_weights(timesteps, alphas, gamma, prediction_type))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_snr_weights_at_the_ends_of_a_schedule(prediction_type: str) -> None:
    alphas = torch.tensor([1.0, 0.5, 0.0])
    weights = snr_weights(torch.arange(3), alphas, 5.0, prediction_type)
    # SNR = infinity, 1, 0.
    expected = [0.0, 1.0, 1.0] if prediction_type == "epsilon" else [0.0, 0.5, 0.0]
    assert weights.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_timesteps_of_any_integer_dtype_are_indices(dtype: torch.dtype) -> None:
    alphas = torch.tensor([0.9, 0.5, 0.25])
    expected = snr_weights(torch.tensor([1, 0, 1]), alphas, 0.5)
    assert torch.equal(snr_weights(torch.tensor([1, 0, 1], dtype=dtype), alphas, Fraction(1, 2)), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        pytest.param({"gamma": 0.0}, InvalidValueError, "`gamma` must be > 0, got 0.0", id="gamma-zero"),
        pytest.param({"gamma": float("nan")}, InvalidValueError, "`gamma` must be > 0, got nan", id="gamma-nan"),
        pytest.param(
            {"prediction_type": "flow"}, InvalidValueError, "'epsilon' or 'v_prediction', got 'flow'", id="flow"
        ),
        pytest.param(
            {"timesteps": torch.tensor(3)}, ShapeError, r"`timesteps` must be dense of shape \[B\]", id="scalar"
        ),
    ],
)
def test_bad_snr_weights_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {"timesteps": torch.tensor([1]), "alphas_cumprod": torch.rand(10), "gamma": 5.0}
    with pytest.raises(error, match=f"^snr_weights: .*{text}"):
        snr_weights(**{**good, **arguments})


BAD = {
    "noise-shape": ({"noise": torch.ones(2, 4)}, ShapeError, r"`noise` must have shape \[2, 3\], got \[2, 4\]"),
    "rate-shape": ({"signal_rate": torch.ones(3)}, ShapeError, r"`signal_rate` must have shape \[2\], got \[3\]"),
    "rate-dims": ({"noise_rate": torch.ones(2, 1)}, ShapeError, r"`noise_rate` must have shape \[2\], got \[2, 1\]"),
    "rate-int": ({"noise_rate": torch.ones(2).long()}, DtypeError, "`noise_rate` .* got int64"),
    "latents-int": ({"latents": torch.ones(2, 3).int()}, DtypeError, "`latents` .* got int32"),
    "latents-bool": ({"latents": torch.ones(2, 3).bool()}, DtypeError, "`latents` .* got bool"),
    "noise-meta": ({"noise": torch.ones(2, 3, device="meta")}, DeviceError, "`noise` must be on the CPU"),
    "noise-sparse": ({"noise": torch.ones(2, 3).to_sparse()}, LayoutError, "`noise` must be a dense tensor"),
    "latents-grad": ({"latents": torch.ones(2, 3, requires_grad=True)}, InvalidValueError, "`latents` .* detach"),
    "type": ({"prediction_type": "sample"}, InvalidValueError, "`prediction_type` .* got 'sample'"),
    "copies": ({"copies": 0}, InvalidValueError, "`copies` must be at least 1, got 0"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {**make_case((2, 3)), "prediction_type": "epsilon"}
    with pytest.raises(error, match=f"^noising: {text}") as caught:
        noising(**{**good, **arguments})
    assert isinstance(caught.value, CatRsError)


@pytest.mark.parametrize("shape", by_id({"empty-batch": (0, 4), "empty-sample": (2, 0)}))
def test_an_empty_batch_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"`latents` must have shape \[B, ...\] with no empty dimension"):
        noising(**make_case(shape), prediction_type="epsilon")


@pytest.mark.parametrize(("prediction_type", "copies"), [("v_prediction", 2), ("epsilon", 1)])
def test_the_operator_passes_pytorchs_checks(prediction_type: str, copies: int) -> None:
    latents, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    check_operator("noising", latents, noise, torch.rand(2), torch.rand(2), prediction_type, copies)
