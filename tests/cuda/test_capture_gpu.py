"""CatStep on a GPU: against the CPU, recorded against eager, and what stands in the way of a recording."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from benchmarks.gpu.meter import without_tf32
from torch.nn.attention import SDPBackend, sdpa_kernel

import cat_rs
from cat_rs import CatFactorRatio
from cat_rs.step import cuda_graphs
from tests.comparison import cat_step, ddpm
from tests.models import CROSS, add_lora, batch, lora_parameters, tiny_unet
from tests.step.test_cat_step import unet_pair

pytestmark = [
    pytest.mark.gpu,
    # PyTorch makes its context when a library is first called, and says so.
    pytest.mark.filterwarnings("ignore:.*no current CUDA context:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

STEPS = cuda_graphs.WARM_UP + 5
DRAWN = ("noise", "timesteps")
DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
]
# Relative to the adapters' change: libraries may choose other algorithms in a recording, and Adam's first steps turn
# the rounding of small gradients into whole steps.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}

Step = cat_rs.CatStep


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """No TF32, and attention without atomic additions."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with without_tf32(), sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.cudnn.deterministic = before


def to(value: Any, device: str) -> Any:
    return {name: tensor.to(device) for name, tensor in value.items()}


def drawn(number: int, size: int = 2, *, dtype: torch.dtype = torch.float32, device: str = "cuda") -> dict[str, Any]:
    return to(batch(number, size, dtype=dtype), device)


def undrawn(number: int, size: int = 2, **settings: Any) -> dict[str, Any]:
    return {name: value for name, value in drawn(number, size, **settings).items() if name not in DRAWN}


def model_of(dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.nn.Module:
    return unet_pair(dtype)[0].to(device)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Operations that wait for the device are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(step: Step) -> None:
    for n in range(STEPS):
        step(**undrawn(n))


def assert_trained_alike(
    ours: torch.nn.Module, theirs: torch.nn.Module, start: dict[str, torch.Tensor], tolerance: float
) -> None:
    mine, other = lora_parameters(ours), lora_parameters(theirs)
    change, error = (
        torch.cat([(a[name].double().cpu() - b[name].double().cpu()).flatten() for name in start]).norm()
        for a, b in ((other, start), (mine, other))
    )
    assert change > 0
    assert error <= tolerance * change, f"the changes differ by {float(error / change):.2g} of their size"


def compare(
    options: Callable[[], dict[str, Any]] = dict,
    batches: list[dict[str, Any]] | None = None,
    between: Callable[[Step, int], Any] = lambda step, number: None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    make: Callable[[], torch.nn.Module] | None = None,
) -> Step:
    """Trains eagerly and through graphs, from the same draws, without waiting; returns the recorded step."""
    batches = [undrawn(n, dtype=dtype, device=device) for n in range(STEPS)] if batches is None else batches
    make = make or functools.partial(model_of, dtype, device)
    start = lora_parameters(make())
    steps, losses = [], []
    for more in ({}, {"capture": True}):
        step = cat_step(make(), **options(), **more)
        torch.manual_seed(11)
        metrics = []
        for number, one in enumerate(batches):
            between(step, number)
            # A recording itself waits for the device.
            with no_waiting() if number > cuda_graphs.WARM_UP or not more else warnings.catch_warnings():
                metrics.append(step(**one))
        steps.append(step)
        losses.append([float(one.loss) for one in metrics])
    eager, captured = steps
    assert captured._captured is not None
    assert not captured._captured._graphs._given_up
    assert_trained_alike(captured.model, eager.model, start, TOLERANCES[dtype])
    assert losses[1] == pytest.approx(losses[0], rel=10 * TOLERANCES[dtype])
    return captured


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"snr_gamma": 5.0, "noise_offset": 0.1}, id="min-snr-offset"),
        pytest.param({"cat_factor": 0.0}, id="no-preservation"),
        pytest.param({"accumulate": 2}, id="accumulation"),
    ],
)
def test_replays_equal_eager_steps(options: dict[str, Any], dtype: torch.dtype) -> None:
    compare(lambda: options, dtype=dtype)


@pytest.mark.parametrize("kind", ["dco", "l2", "layers"])
def test_replays_equal_eager_steps_with_other_preservations(kind: str) -> None:
    compare(lambda: {"preservation": kind, "cat_factor": 0.1})


def test_replays_equal_eager_steps_with_the_term_in_every_second() -> None:
    compare(lambda: {"preserve_every": 2})


@pytest.mark.parametrize("stored", [False, True], ids=["predicted", "stored"])
def test_replays_equal_eager_steps_with_preservation_samples(stored: bool) -> None:
    batches = []
    for n in range(STEPS):
        other = drawn(50 + n, 3)
        samples = cat_rs.PreservationSamples(other["latents"], other["noise"], other["timesteps"])
        if stored:
            prediction = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(n))
            samples = samples._replace(base_pred=prediction.bfloat16().cuda())
        batches.append({**undrawn(n), "cond_no_trigger": other["cond_no_trigger"], "preserve": samples})
    compare(batches=batches)


@pytest.mark.parametrize("options", [{}, {"snr_gamma": 5.0}, {"cat_factor": 0.0}], ids=str)
def test_equals_the_cpu(options: dict[str, Any]) -> None:
    start = lora_parameters(model_of())
    here, there = model_of(device="cuda"), model_of(device="cpu")
    ours, theirs = cat_step(here, **options), cat_step(there, **options)
    for n in range(4):
        mine, other = ours(**drawn(n)), theirs(**batch(n))
        for name, value in other._asdict().items():
            assert float(getattr(mine, name)) == pytest.approx(float(value), rel=1e-3, abs=1e-9), name
    assert_trained_alike(here, there, start, 1e-2)


@pytest.mark.parametrize("given", [False, True], ids=["global", "generator"])
def test_every_replay_draws_anew(given: bool) -> None:
    def options() -> dict[str, Any]:
        return {"generator": torch.Generator("cuda").manual_seed(3)} if given else {}

    step = compare(options)
    assert len({float(step(**undrawn(0)).loss) for _ in range(4)}) == 4


def test_dropout_draws_anew() -> None:
    step = cat_step(add_lora(tiny_unet(), lora_dropout=0.3).cuda().train(), lr=0.0, weight_decay=0.0, capture=True)
    losses = [float(step(**drawn(0)).loss) for _ in range(STEPS)]
    assert len(set(losses[cuda_graphs.WARM_UP :])) == STEPS - cuda_graphs.WARM_UP


def test_settings_take_effect() -> None:
    schedules: dict[int, Any] = {}

    def between(step: Step, number: int) -> None:
        if number == 0:
            schedules[id(step)] = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda n: 1 / (1 + n))
        else:
            schedules[id(step)].step()
        step.cat_factor = 0.1 + number

    compare(between=between)


def test_a_ratio_of_the_terms_takes_effect() -> None:
    compare(lambda: {"cat_factor": CatFactorRatio(0.3)})


def test_a_new_shape_is_a_new_graph() -> None:
    sizes = [2] * STEPS + [3] * STEPS + [2, 3, 2, 3]
    step = cat_step(model_of(), capture=True)
    metrics = [step(**drawn(n, size)) for n, size in enumerate(sizes)]
    assert all(one.loss.isfinite() for one in metrics)
    assert len({float(one.loss) for one in metrics}) == len(metrics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_and_a_scaler(dtype: torch.dtype) -> None:
    def options() -> dict[str, Any]:
        return {"grad_scaler": torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=3)}

    with torch.autocast("cuda", dtype):
        compare(options, make=model_of)


def test_resumes() -> None:
    def fresh(seed: int) -> Step:
        return cat_step(model_of(), capture=True, generator=torch.Generator("cuda").manual_seed(seed))

    step, resumed = fresh(0), fresh(1)
    for n in range(STEPS):
        step(**undrawn(n))
        resumed(**undrawn(50 + n))
    start = lora_parameters(step.model)
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    for n in range(3):
        assert float(resumed(**undrawn(n)).loss) == pytest.approx(float(step(**undrawn(n)).loss), rel=1e-4)
    assert_trained_alike(resumed.model, step.model, start, 1e-3)


def test_a_step_that_is_not_finite_leaves_the_adapter() -> None:
    step = cat_step(model_of(), capture=True)
    for n in range(STEPS):
        step(**drawn(n))
    before = lora_parameters(step.model)
    one = drawn(0)
    one["latents"][0, 0, 0, 0] = torch.inf
    assert not step(**one).grad_norm.isfinite()
    assert step.optimizer.skipped_steps == 1
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(step.model).items())


def test_on_another_stream() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        compare()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device() -> None:
    compare(device="cuda:1")


def predict_with(extra: Callable[[torch.Tensor], Any]) -> Any:
    def predict(
        model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        extra(latents)
        return model(latents, timesteps, **cond, return_dict=False)[0]

    return predict


def synchronize_while_recording(latents: torch.Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


def fail_while_recording(latents: torch.Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("no recording, please")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        pytest.param(
            lambda latents: latents.sum().item(), "waits for the device at .*test_capture_gpu.py:", id="item"
        ),
        pytest.param(synchronize_while_recording, "does what a graph cannot hold: ", id="synchronize"),
        pytest.param(fail_while_recording, "does what a graph cannot hold: no recording, please", id="error"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly(extra: Callable[[torch.Tensor], Any], text: str) -> None:
    start = lora_parameters(model_of())
    step, undisturbed = cat_step(model_of(), predict=predict_with(extra), capture=True), cat_step(model_of())
    torch.manual_seed(4)
    with pytest.warns(RuntimeWarning, match=f"^CatStep: capture=True has no effect, .* it {text}"):
        run(step)
    torch.manual_seed(4)
    run(undisturbed)
    assert_trained_alike(step.model, undisturbed.model, start, 1e-3)
    # Nothing of the failure is left behind: streams, random numbers and memory serve the next recording.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    compare()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_is_recorded(dropout: float) -> None:
    def make() -> torch.nn.Module:
        model = add_lora(tiny_unet(), lora_dropout=dropout).cuda().train()
        model.enable_gradient_checkpointing()
        return model

    if not dropout:
        compare(make=make)
        return
    # The recomputed forward draws what the first one drew, or the gradient would be another's.
    step = cat_step(make(), capture=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run(step)


def test_replays_equal_eager_steps_with_a_bank() -> None:
    latents, cond = torch.randn(3, 4, 8, 8), torch.randn(3, 5, CROSS, device="cuda")
    bank = cat_rs.TeacherBank.build(model_of(), ddpm(), latents, cond, draws=2)
    batches = []
    for number in range(STEPS):
        pictures = torch.tensor([number % 3, (number + 1) % 3])
        of_pictures = cond[pictures.cuda()]
        batches.append({"latents": pictures, "cond": of_pictures + 1, "cond_no_trigger": of_pictures})
    # The first step compares the conditions, and waits for them.
    first = cat_step(model_of(), teacher_bank=bank, generator=torch.Generator())
    first(**batches[0])
    with no_waiting():
        first(**batches[1])
    captured = cat_step(model_of(), teacher_bank=bank, generator=torch.Generator(), capture=True)
    losses = [float(captured(**one).loss) for one in batches]
    eager = cat_step(model_of(), teacher_bank=bank, generator=torch.Generator())
    assert losses == pytest.approx([float(eager(**one).loss) for one in batches], rel=1e-2)
    assert not captured._captured._graphs._given_up
