"""CatStep's way on a GPU, on the CPU: eager, and recorded as a graph."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cat_rs
from cat_rs import CatFactorRamp, CatFactorRatio, CatFactorTarget
from cat_rs._native import _core
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.step import cuda_graphs, device_values, inputs, teacher_bank
from cat_rs.step.conditions import Conditions
from tests.comparison import SETTINGS, cat_step, compare_with_recipe, ddpm, flow_matching
from tests.cuda import reference_core
from tests.cuda.simulation import NoWaiting, Recorder, SimulatedGraphs
from tests.models import CROSS, add_lora, batch, lora_parameters, tiny_text_encoder, tiny_transformer, tiny_unet
from tests.step.test_cat_step import preserved_batch, unet_pair
from tests.step.test_text_encoders import adapted

EAGER_STEPS = cuda_graphs.WARM_UP
STEPS = EAGER_STEPS + 4
DRAWN = ("noise", "timesteps")

Step = cat_rs.CatStep


@pytest.fixture(autouse=True)
def _gpu(simulated_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedGraphs, "made", 0)


def undrawn(number: int, size: int = 2, **settings: Any) -> dict[str, Any]:
    return {name: value for name, value in batch(number, size, **settings).items() if name not in DRAWN}


def run(step: Step, batches: list[dict[str, Any]], between: Callable[[int], Any] = lambda number: None) -> list[Any]:
    """The metrics of all steps, read at the end: nothing may write to them later."""
    metrics = []
    for number, one in enumerate(batches):
        between(number)
        metrics.append(step(**one))
    return metrics


def assert_same(ours: Step, theirs: Step, *metrics: list[Any]) -> None:
    """The same bits in the adapters and in all metrics."""
    expected = lora_parameters(theirs.model)
    for name, param in lora_parameters(ours.model).items():
        assert torch.equal(param, expected[name]), name
    for number, (mine, other) in enumerate(zip(*metrics, strict=True)):
        for name, value in mine._asdict().items():
            assert torch.equal(value.nan_to_num(-1), getattr(other, name).nan_to_num(-1)), f"{name} of step {number}"


# The eager step.


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"snr_gamma": 5.0}, id="min-snr"),
        pytest.param({"snr_gamma": 5.0, "prediction_type": "v_prediction"}, id="velocity"),
        pytest.param({"accumulate": 3}, id="accumulation"),
        pytest.param({"cat_factor": 0.0}, id="no-preservation"),
        pytest.param({"cat_factor": 0.3, "max_grad_norm": 1e-3}, id="clipping"),
    ],
)
def test_equals_the_plain_recipe(options: dict[str, Any]) -> None:
    compare_with_recipe(*unet_pair(), [batch(n) for n in range(6)], **options)


def test_equals_the_plain_recipe_with_weights_and_mask() -> None:
    weights = {"sample_weight": torch.tensor([0.5, 2.0]), "mask": (torch.rand(2, 1, 8, 8) > 0.3).float()}
    compare_with_recipe(*unet_pair(), [{**batch(n), **weights} for n in range(3)], snr_gamma=5.0)


def test_equals_the_plain_recipe_with_flow_matching() -> None:
    base = tiny_transformer()
    model = add_lora(copy.deepcopy(base), target_modules=["to_q", "to_k", "to_v"])
    batches = []
    for n in range(3):
        one: dict[str, Any] = batch(n)
        one["timesteps"] = flow_matching().timesteps[one["timesteps"]]
        for name in ("cond", "cond_no_trigger"):
            one[name] = {"encoder_hidden_states": one[name], "pooled_projections": torch.randn(2, 8)}
        batches.append(one)
    compare_with_recipe(model, base, batches, scheduler=flow_matching(), prediction_type="flow")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"snr_gamma": 5.0, "noise_offset": 0.1, "accumulate": 2}, id="weights-offset-accumulation"),
        pytest.param({"cat_factor": CatFactorRatio(0.3), "generator": torch.Generator()}, id="ratio-generator"),
        pytest.param({"cat_factor": CatFactorRamp(0.0, 1.0, 4)}, id="ramp"),
        pytest.param({"cat_factor": CatFactorRatio(0.3), "preserve_every": 2}, id="every-second"),
        pytest.param({"cat_factor": CatFactorTarget(1e-3), "accumulate": 2}, id="target"),
        *(pytest.param({"preservation": kind}, id=kind) for kind in ("dco", "l2", "layers")),
    ],
)
def test_a_step_waits_for_nothing(options: dict[str, Any]) -> None:
    step = cat_step(unet_pair()[0], **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda n: 1 / (1 + n))
    with NoWaiting(strict=True):
        metrics = run(step, [undrawn(n) for n in range(4)], lambda number: number > 1 and schedule.step())
        shared = {"encoder_hidden_states": torch.zeros(2, 5, CROSS), "attention_mask": None}
        step(batch(0)["latents"], shared, shared)
    assert all(one.loss.isfinite() for one in metrics)


def test_a_flow_matching_step_waits_for_nothing() -> None:
    model = add_lora(tiny_transformer(), target_modules=["to_q", "to_k"])
    step = cat_step(model, flow_matching())
    one: dict[str, Any] = undrawn(0)
    for name in ("cond", "cond_no_trigger"):
        one[name] = {"encoder_hidden_states": one[name], "pooled_projections": torch.randn(2, 8)}
    with NoWaiting(strict=True):
        step(**one)


def test_everything_is_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors that say they are on CUDA, and have no values: an operation on two devices, or one that needs a value,
    # is an error. Autograd's engine needs a device that is there.
    monkeypatch.undo()
    for name in ("adamw_step", "noising", "student_loss", "sum_of_squares"):
        monkeypatch.setattr(_core, name, getattr(reference_core, name))
    for module in ("adamw", "cat_loss", "noising"):
        monkeypatch.setattr(f"cat_rs.ops.{module}.stream_of", lambda tensor: 0)
    monkeypatch.setattr(torch.autograd, "backward", lambda student, grad: None)
    monkeypatch.setattr("cat_rs.step.flat_buffers.from_dlpack", lambda view: view)
    # What refuses tensors without memory.
    monkeypatch.setattr("cat_rs.step.optimizer.check_no_mode", lambda op: None)
    for module in ("cat_factor", "conditions", "inputs"):
        monkeypatch.setattr(f"cat_rs.step.{module}.check_plain", lambda op, name, tensor: None)
    model = add_lora(tiny_unet())
    with FakeTensorMode(), torch.device("cuda"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        model = on_cuda(model)
        with torch.device("cpu"):
            ratio = CatFactorRatio(0.5)
        step = cat_step(model, snr_gamma=5.0, noise_offset=0.1, cat_factor=ratio, accumulate=2)
        one = [torch.empty(2, *shape) for shape in ((4, 8, 8), (5, CROSS), (5, CROSS))]
        with NoWaiting(strict=True):
            metrics = [
                step(*one, sample_weight=torch.ones(2), mask=torch.ones(2, 1, 8, 8)),
                step(*one, timesteps=torch.zeros(2, dtype=torch.long), noise=torch.empty(2, 4, 8, 8)),
            ]
        places = {value.device for values in metrics for value in values} | {torch.as_tensor(ratio.factor()).device}
        assert places == {torch.device("cuda", 0)}
        with pytest.raises(DeviceError, match="`latents` must be on cuda:0, got cpu"):
            step(torch.empty(2, 4, 8, 8, device="cpu"), *one[1:])
        with pytest.raises(DeviceError, match="`timesteps` must be on cuda:0, got cpu"):
            step(*one, timesteps=torch.zeros(2, dtype=torch.long, device="cpu"))
        with pytest.raises(DeviceError, match="`generator` must be on cuda:0, got one on cpu"):
            cat_step(model, generator=torch.Generator("cpu"))


def on_cuda(model: torch.nn.Module) -> torch.nn.Module:
    """The model with parameters that say they are on CUDA."""
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            fake = torch.empty(param.shape, device="cuda")
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=param.requires_grad))
    return model


@pytest.mark.parametrize(("capability", "warns"), [((7, 5), True), ((6, 0), True), ((8, 0), False), ((12, 0), False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_on_a_card_that_emulates_it_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], warns: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    warns = warns and dtype == torch.bfloat16
    text = rf"^CatStep: .* compute capability {capability[0]}\.\d emulates slowly: use float16 with a grad_scaler"
    with pytest.warns(RuntimeWarning, match=text) if warns else contextlib.nullcontext():
        device_values.warn_of_slow_bfloat16("CatStep", torch.device("cuda", 0), [torch.zeros(1, dtype=dtype)])


def test_a_step_asks_whether_its_dtype_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[torch.dtype]] = []
    monkeypatch.setattr(
        device_values,
        "warn_of_slow_bfloat16",
        lambda op, device, tensors: asked.append({tensor.dtype for tensor in tensors}),
    )
    cat_step(unet_pair(torch.bfloat16)[0])
    assert asked == [{torch.bfloat16}]


def shifted(
    model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
) -> torch.Tensor:
    """A model with a tensor that belongs to no sample, as position ids do."""
    shift = cond["shift"].mean()
    return model(latents, timesteps, cond["encoder_hidden_states"] + shift, return_dict=False)[0]


def shifted_batch(number: int, shift: torch.Tensor, shift_no_trigger: torch.Tensor) -> dict[str, Any]:
    one: dict[str, Any] = undrawn(number)
    for name, given in (("cond", shift), ("cond_no_trigger", shift_no_trigger)):
        one[name] = {"encoder_hidden_states": one[name], "shift": given}
    return one


@pytest.mark.parametrize("capture", [False, True])
def test_a_condition_of_all_samples_is_one_tensor(capture: bool) -> None:
    # Comparing values would wait for them.
    step = cat_step(unet_pair()[0], predict=shifted, capture=capture)
    shift = torch.ones(7)
    with NoWaiting(strict=True):
        step(**shifted_batch(0, shift, shift))
        step(**shifted_batch(0, shift, shift.view(7)))
    with pytest.raises(ShapeError, match=r"be cond's tensor itself on a GPU, got another tensor of shape \[7\]"):
        step(**shifted_batch(0, shift, shift.clone()))


def test_a_bank_compares_the_first_conditions_that_it_is_given() -> None:
    bank, cond = bank_of(model := unet_pair()[0])
    step = cat_step(model, teacher_bank=bank, generator=torch.Generator(), preserve_every=2)
    step(**stored_batch(0, cond))
    with pytest.raises(InvalidValueError, match="must be what the teacher bank's predictions were made with"):
        step(**{**stored_batch(1, cond), "cond_no_trigger": cond[:2] + 1})


def bank_of(model: torch.nn.Module) -> tuple[cat_rs.TeacherBank, torch.Tensor]:
    """A bank of three pictures, and their conditions."""
    generator = torch.Generator().manual_seed(0)
    latents, cond = (torch.randn(3, *shape, generator=generator) for shape in ((4, 8, 8), (5, CROSS)))
    return cat_rs.TeacherBank.build(model, ddpm(), latents, cond, draws=2, generator=generator), cond


def stored_batch(number: int, cond: torch.Tensor) -> dict[str, Any]:
    pictures = torch.tensor([number % 3, (number + 1) % 3])
    return {"latents": pictures, "cond": cond[pictures] + 1, "cond_no_trigger": cond[pictures]}


def test_a_step_with_a_bank_waits_for_nothing_but_the_first() -> None:
    bank, cond = bank_of(model := unet_pair()[0])
    step = cat_step(model, teacher_bank=bank, generator=torch.Generator())
    step(**stored_batch(0, cond))
    compared: list[str] = []
    sampled = teacher_bank._sampled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_bank, "_sampled", lambda tensor: compared.append("") or sampled(tensor))
        step(**stored_batch(1, cond))
        assert not compared
        with pytest.raises(ShapeError, match=r"must have shape \[2, 5, 16\] as in the teacher bank"):
            step(**{**stored_batch(1, cond), "cond": cond[:2, :3], "cond_no_trigger": cond[:2, :3]})
    other = cat_step(unet_pair()[0], teacher_bank=bank)
    with pytest.raises(InvalidValueError, match="must be what the teacher bank's predictions were made with"):
        other(**{**stored_batch(0, cond), "cond_no_trigger": cond[:2] + 1})


def test_stored_draws_go_to_the_model_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(), NoWaiting(strict=True):
        assert device_values.send(torch.ones(3), gpu).device == gpu
    assert len(pinned) == 1

    sent: list[torch.Tensor] = []
    monkeypatch.setattr(device_values, "send", lambda tensor, device: sent.append(tensor) or tensor)
    bank, cond = bank_of(unet_pair()[0])
    conditions = Conditions({"encoder_hidden_states": cond}, {"encoder_hidden_states": cond}, None)
    drawn = inputs.draw_stored(torch.tensor([0, 1, 2]), None, None, bank, conditions, None, gpu, compare=False)
    assert all(ours is theirs for ours, theirs in zip(drawn, sent, strict=True))


# The recorded step.


def compare(
    options: Callable[[], dict[str, Any]] = dict,
    batches: list[dict[str, Any]] | None = None,
    between: Callable[[Step, int], None] = lambda step, number: None,
    *,
    graphs: int = 1,
    model_of: Callable[[], torch.nn.Module] = lambda: unet_pair()[0],
) -> Step:
    """Trains eagerly and through graphs; everything must be the same, bit for bit."""
    batches = [batch(n) for n in range(STEPS)] if batches is None else batches
    eager, captured = (cat_step(model_of(), **options(), **more) for more in ({}, {"capture": True}))
    results = []
    for step in (captured, eager):
        torch.manual_seed(11)
        results.append(run(step, batches, functools.partial(between, step)))
    assert_same(captured, eager, *results)
    assert SimulatedGraphs.made == graphs
    return captured


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"snr_gamma": 5.0}, id="min-snr"),
        pytest.param({"prediction_type": "v_prediction", "cat_factor": 0.3}, id="velocity"),
        pytest.param({"cat_factor": 0.0}, id="no-preservation"),
        pytest.param({"max_grad_norm": 1e-3}, id="clipping"),
    ],
)
def test_replays_equal_eager_steps(options: dict[str, Any]) -> None:
    compare(lambda: options)


def test_replays_equal_eager_steps_in_bfloat16() -> None:
    compare(
        batches=[batch(n, dtype=torch.bfloat16) for n in range(STEPS)], model_of=lambda: unet_pair(torch.bfloat16)[0]
    )


def test_replays_equal_eager_steps_with_weights_and_mask() -> None:
    generator = torch.Generator().manual_seed(5)

    def given() -> dict[str, torch.Tensor]:
        mask = (torch.rand(2, 1, 8, 8, generator=generator) > 0.3).float()
        return {"sample_weight": torch.rand(2, generator=generator), "mask": mask}

    compare(lambda: {"snr_gamma": 5.0}, [{**batch(n), **given()} for n in range(STEPS)])


def test_replays_equal_eager_steps_with_nested_conditions() -> None:
    settings = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    batches = []
    for n in range(STEPS):
        one: dict[str, Any] = batch(n)
        for name in ("cond", "cond_no_trigger"):
            added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
            one[name] = {"encoder_hidden_states": one[name], "added_cond_kwargs": added, "class_labels": None}
        batches.append(one)
    compare(batches=batches, model_of=lambda: add_lora(tiny_unet(**settings)))


@pytest.mark.parametrize("given", [False, True], ids=["global", "generator"])
def test_every_replay_draws_anew(given: bool) -> None:
    def options() -> dict[str, Any]:
        return {"noise_offset": 0.1, **({"generator": torch.Generator().manual_seed(3)} if given else {})}

    step = compare(options, [undrawn(n) for n in range(STEPS)])
    losses = [float(step(**undrawn(0)).loss) for _ in range(4)]
    assert len(set(losses)) == 4
    assert SimulatedGraphs.made == 1


def test_dropout_draws_anew() -> None:
    def model_of() -> torch.nn.Module:
        return add_lora(tiny_unet(), lora_dropout=0.3).train()

    step = compare(batches=[batch(0)] * STEPS, model_of=model_of)
    step.optimizer.param_groups[0]["lr"] = 0.0
    step.optimizer.param_groups[0]["weight_decay"] = 0.0
    assert len({float(step(**batch(0)).loss) for _ in range(4)}) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_with_and_without_a_term_are_two_graphs(accumulate: int) -> None:
    options = {"preserve_every": 3, "cat_factor": CatFactorRatio(0.3), "accumulate": accumulate}
    batches = [undrawn(n) for n in range(3 * STEPS * accumulate)]
    # The ratio of one step is not the other's.
    step = compare(lambda: copy.deepcopy(options), batches, graphs=2)
    assert step.steps_done == 3 * STEPS


def test_a_learning_rate_scheduler_takes_effect() -> None:
    schedules: dict[int, Any] = {}

    def between(step: Step, number: int) -> None:
        if number == 0:
            schedules[id(step)] = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda n: 1 / (1 + n))
        else:
            schedules[id(step)].step()

    compare(between=between)


def test_snr_gamma_takes_effect() -> None:
    gammas = [None] * STEPS + [5.0] * STEPS + [0.5] * STEPS + [None, 5.0, 0.5]

    def between(step: Step, number: int) -> None:
        step.snr_gamma = gammas[number]

    compare(between=between, batches=[batch(n) for n in range(len(gammas))], graphs=3)


def test_autocast_takes_effect() -> None:
    dtypes = [None, torch.bfloat16, torch.float16]
    numbers = [0] * STEPS + [1] * STEPS + [2] * STEPS + [0, 1, 2]
    with contextlib.ExitStack() as entered:

        def between(step: Step, number: int) -> None:
            entered.close()
            if (dtype := dtypes[numbers[number]]) is not None:
                entered.enter_context(torch.autocast("cpu", dtype))

        compare(between=between, batches=[batch(n) for n in range(len(numbers))], graphs=3)


def test_settings_take_effect() -> None:
    def between(step: Step, number: int) -> None:
        group = step.optimizer.param_groups[0]
        group["lr"], group["betas"] = 1e-3 / (1 + number), (0.9 - number / 100, 0.99)
        group["eps"], group["weight_decay"] = 1e-8 * (1 + number), number / 100
        step.optimizer.max_grad_norm = None if number % 2 else 10.0**-number

    compare(between=between)


def test_cat_factor_takes_effect() -> None:
    def between(step: Step, number: int) -> None:
        step.cat_factor = 0.1 + number

    compare(between=between)


def test_a_factor_of_zero_is_a_graph_of_its_own() -> None:
    factors = [1.0] * STEPS + [0.0] * STEPS + [2.0, 0.0, 3.0]

    def between(step: Step, number: int) -> None:
        step.cat_factor = factors[number]

    compare(between=between, batches=[batch(n) for n in range(len(factors))], graphs=2)


@pytest.mark.parametrize("make", [lambda: CatFactorRamp(0.5, 2.0, 6), lambda: CatFactorRatio(0.3)], ids=str)
def test_a_schedule_of_the_factor_takes_effect(make: Callable[[], Any]) -> None:
    step = compare(lambda: {"cat_factor": make()})
    factors = [float(step(**batch(n)).cat_factor) for n in range(2)]
    assert len(set(factors)) == (1 if isinstance(step.cat_factor, CatFactorRamp) else 2)


def test_replays_equal_eager_steps_with_accumulation() -> None:
    compare(lambda: {"accumulate": 3}, [batch(n) for n in range(9)])


def test_accumulation_may_change() -> None:
    def between(step: Step, number: int) -> None:
        step.accumulate = 1 if number < STEPS else 2

    compare(between=between, batches=[batch(n) for n in range(3 * STEPS)], graphs=2)


def test_zero_grad_sees_replayed_gradients() -> None:
    def between(step: Step, number: int) -> None:
        if number == STEPS - 2:
            assert any(param.grad.count_nonzero() for param in step.trainable.values())
            step.optimizer.zero_grad()
            assert not any(param.grad.count_nonzero() for param in step.trainable.values())

    compare(lambda: {"accumulate": 2}, between=between)


def test_gradients_that_were_dropped_are_zero() -> None:
    def between(step: Step, number: int) -> None:
        if number in (1, STEPS - 2):
            step.model.zero_grad(set_to_none=True)

    compare(between=between)
    SimulatedGraphs.made = 0
    compare(lambda: {"accumulate": 2}, between=between)


def test_replays_equal_eager_steps_with_autocast_and_a_scaler() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        compare()
        SimulatedGraphs.made = 0
        compare(lambda: {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)})


def test_a_process_group_averages_between_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ranks with the same gradients have their average.
    averaged: list[int] = []
    monkeypatch.setattr("cat_rs.step.collectives.check_group", lambda owner, group: None)
    monkeypatch.setattr("cat_rs.step.collectives.check_alike", lambda owner, group, params: None)
    monkeypatch.setattr("cat_rs.step.collectives.broadcast_", lambda tensor, group: None)
    monkeypatch.setattr("cat_rs.step.collectives.average_", lambda tensor, group: averaged.append(tensor.numel()))
    compare(lambda: {"process_group": object()})
    assert len(averaged) == 2 * STEPS


def test_a_step_that_is_not_finite_leaves_the_adapter() -> None:
    batches = [batch(n) for n in range(STEPS)]
    batches[-2]["latents"][0, 0, 0, 0] = torch.inf
    step = compare(batches=batches)
    assert step.optimizer.skipped_steps == 1
    assert step.optimizer.grad_norm > 0


def test_addresses_stay() -> None:
    step = cat_step(unet_pair()[0], capture=True)
    before = [param.data_ptr() for param in step.trainable.values()]
    grads = [param.grad.data_ptr() for param in step.trainable.values()]
    run(step, [batch(n) for n in range(STEPS)])
    assert [param.data_ptr() for param in step.trainable.values()] == before
    assert [param.grad.data_ptr() for param in step.trainable.values()] == grads


def test_weights_written_between_replays_count() -> None:
    # As model.load_state_dict writes them; in bfloat16 the optimizer has to take them over.
    fresh = lora_parameters(add_lora(tiny_unet(), seed=9))

    def between(step: Step, number: int) -> None:
        if number == STEPS - 2:
            step.model.load_state_dict(fresh, strict=False)

    batches = [batch(n, dtype=torch.bfloat16) for n in range(STEPS)]
    compare(batches=batches, between=between, model_of=lambda: unet_pair(torch.bfloat16)[0])


def _replace(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Gives the frozen weights other memory, as ``model.to`` and whoever sets a parameter do."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.requires_grad:
                setattr(module, name, torch.nn.Parameter(change(param.detach()), requires_grad=False))


def test_frozen_weights_in_other_memory_count() -> None:
    def between(step: Step, number: int) -> None:
        if number in (STEPS - 2, 2 * STEPS):
            _replace(step.model, lambda weight: 1.1 * weight)

    step = compare(between=between, batches=[batch(n) for n in range(3 * STEPS)], graphs=3)
    # The graphs of the old memory are gone.
    assert len(step._captured._graphs._recordings) == 1


def test_frozen_weights_written_in_place_count() -> None:
    def between(step: Step, number: int) -> None:
        if number == STEPS - 2:
            for param in step.model.parameters():
                if not param.requires_grad:
                    param.mul_(1.1)

    compare(between=between)


def test_buffers_in_other_memory_count() -> None:
    def model_of() -> torch.nn.Module:
        model = unet_pair()[0]
        model.register_buffer("shift", torch.zeros(1))
        model.conv_in.register_forward_hook(lambda module, given, output: output + model.shift)
        return model

    def between(step: Step, number: int) -> None:
        if number == STEPS - 2:
            step.model.shift = step.model.shift + 0.5

    compare(between=between, model_of=model_of, batches=[batch(n) for n in range(2 * STEPS)], graphs=2)


def test_a_group_added_after_a_recording_is_a_new_graph() -> None:
    def between(step: Step, number: int) -> None:
        if number == STEPS - 2:
            step.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5})

    compare(between=between, batches=[batch(n) for n in range(2 * STEPS)], graphs=2)


def test_a_float16_adapter_with_a_scaler_is_refused() -> None:
    model = unet_pair(torch.float16)[0]
    with pytest.raises(DtypeError, match=r"adapter in float32 with a grad_scaler.*, got .*lora_A.* in float16"):
        cat_step(model, grad_scaler=torch.amp.GradScaler("cpu"))


def test_old_graphs_notice_new_weights() -> None:
    step = cat_step(unet_pair()[0], capture=True)
    run(step, [batch(n) for n in range(STEPS)])
    one = batch(0)
    loss = step.model(one["latents"], one["timesteps"], one["cond"]).sample.square().sum()
    step(**batch(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("before", [2, STEPS], ids=["in-the-warm-up", "after-replays"])
@pytest.mark.parametrize("factor", [CatFactorRatio(0.3), CatFactorTarget(1e-3)], ids=["ratio", "target"])
def test_resumes_bit_for_bit(factor: Any, before: int, accumulate: int) -> None:
    def fresh(seed: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        options = {"accumulate": accumulate, "cat_factor": copy.deepcopy(factor), "capture": True}
        return cat_step(unet_pair()[0], generator=generator, **options)

    step, resumed = fresh(0), fresh(1)
    run(step, [undrawn(n) for n in range(before)])
    # The step it resumes into has a graph and other weights.
    run(resumed, [undrawn(50 + n) for n in range(STEPS)])
    state = _through_a_file(step.state_dict())
    kept = copy.deepcopy(state)
    resumed.load_state_dict(state)
    batches = [undrawn(n) for n in range(before, before + 3)]
    assert_same(resumed, step, run(resumed, batches), run(step, batches))
    assert all(torch.equal(value, state["parameters"][name]) for name, value in kept["parameters"].items())


def test_frozen_parameters_are_a_graph_of_their_own() -> None:
    def between(step: Step, number: int) -> None:
        for name, param in step.trainable.items():
            param.requires_grad_("lora_A" not in name or not STEPS <= number < 2 * STEPS)

    # Parameters that were frozen have taken fewer steps: theirs are pieces of their own ever after.
    compare(between=between, batches=[batch(n) for n in range(3 * STEPS)], graphs=3)


def test_a_state_with_other_step_counts_is_a_new_graph() -> None:
    step, eager = (cat_step(unet_pair()[0], capture=capture) for capture in (True, False))
    for one in (step, eager):
        run(one, [batch(n) for n in range(STEPS)])
        state = one.state_dict()
        for index, values in state["optimizer"]["state"].items():
            values["step"] = values["step"] + 100 * (index % 2)
        one.load_state_dict(state)
    batches = [batch(n) for n in range(STEPS)]
    assert_same(step, eager, run(step, batches), run(eager, batches))


def test_a_new_shape_is_a_new_graph() -> None:
    sizes = [2] * STEPS + [3] * STEPS + [2, 3, 2, 3]
    compare(batches=[undrawn(n, size) for n, size in enumerate(sizes)], graphs=2)


def test_a_value_that_is_no_tensor_is_part_of_the_form() -> None:
    batches = []
    for n in range(2 * STEPS + 2):
        one: dict[str, Any] = undrawn(n)
        scale = [0.5, 2.0][n % 2]
        for name in ("cond", "cond_no_trigger"):
            one[name] = {"encoder_hidden_states": one[name], "cross_attention_kwargs": {"scale": scale}}
        batches.append(one)
    compare(batches=batches, graphs=2)


def test_training_and_evaluation_are_graphs_of_their_own() -> None:
    def between(step: Step, number: int) -> None:
        step.model.train(number >= STEPS)

    def model_of() -> torch.nn.Module:
        return add_lora(tiny_unet(), lora_dropout=0.3)

    compare(between=between, batches=[batch(n) for n in range(2 * STEPS)], graphs=2, model_of=model_of)


def test_a_form_too_many_is_refused() -> None:
    step = cat_step(unet_pair()[0], capture=True, max_captures=2)
    run(step, [batch(0, 1), batch(1, 2), batch(2, 1)])
    before = lora_parameters(step.model)
    with pytest.raises(
        InvalidValueError, match=r"^CatStep: `max_captures` must be at least .* got 2 and .* shapes \[3, 4, 8, 8\]"
    ):
        step(**batch(3, 3))
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(step.model).items())
    step(**batch(4, 2))


def test_replays_equal_eager_steps_with_a_bank() -> None:
    bank, cond = bank_of(unet_pair()[0])
    compare(
        lambda: {"teacher_bank": bank, "generator": torch.Generator().manual_seed(2)},
        [stored_batch(n, cond) for n in range(STEPS)],
    )


@pytest.mark.parametrize("kind", ["prior", "dco", "l2", "layers"])
def test_replays_equal_eager_steps_with_other_preservations(kind: str) -> None:
    batches = [preserved_batch(n, 3) if kind == "prior" else undrawn(n) for n in range(STEPS)]
    compare(lambda: {"preservation": kind, "cat_factor": 0.1}, batches)


@pytest.mark.parametrize("stored", [False, True], ids=["predicted", "stored"])
def test_replays_equal_eager_steps_with_preservation_samples(stored: bool) -> None:
    batches = []
    for n in range(STEPS):
        other = batch(50 + n, 3)
        samples = cat_rs.PreservationSamples(other["latents"], other["noise"], other["timesteps"])
        if stored:
            samples = samples._replace(base_pred=torch.randn(3, 4, 8, 8).bfloat16())
        batches.append({**undrawn(n), "cond_no_trigger": other["cond_no_trigger"], "preserve": samples})
    compare(batches=batches)


def test_replays_equal_eager_steps_with_gradient_checkpointing() -> None:
    def model_of() -> torch.nn.Module:
        model = unet_pair()[0].train()
        model.enable_gradient_checkpointing()
        return model

    compare(model_of=model_of)


def test_conditions_may_be_functions() -> None:
    batches = []
    for n in range(STEPS):
        one: dict[str, Any] = batch(n)
        for name in ("cond", "cond_no_trigger"):
            one[name] = functools.partial(lambda value: value, one[name])
        batches.append(one)
    compare(batches=batches)


def test_inputs_are_copied() -> None:
    step = cat_step(unet_pair()[0], capture=True)
    one = batch(0)
    before = {name: value.clone() for name, value in one.items()}
    run(step, [one] * STEPS)
    assert all(torch.equal(one[name], value) for name, value in before.items())


def test_a_tensor_given_twice_is_one_buffer() -> None:
    batches = [shifted_batch(n, shift := torch.randn(7), shift) for n in range(STEPS)]
    step = compare(lambda: {"predict": shifted}, batches)
    with pytest.raises(ShapeError, match="be cond's tensor itself on a GPU"):
        step(**shifted_batch(0, torch.ones(7), torch.ones(7)))


# Models that cannot be recorded.


def predict_with(extra: Callable[[torch.Tensor], Any]) -> Any:
    def predict(
        model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        extra(latents)
        return model(latents, timesteps, **cond, return_dict=False)[0]

    return predict


def while_recording(latents: torch.Tensor) -> None:
    if Recorder.active is not None:
        raise RuntimeError("Cannot copy between CPU and CUDA tensors\nTraceback of C++")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        pytest.param(
            lambda latents: latents.sum().item(),
            r"waits for the device at model.py:aten::_local_scalar_dense and at 1 more places$",
            id="item",
        ),
        pytest.param(lambda latents: latents[latents > 0], "waits for the device at .*aten::index", id="mask"),
        pytest.param(
            while_recording,
            "does what a graph cannot hold: Cannot copy between CPU and CUDA tensors$",
            id="while-recording",
        ),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly(extra: Callable[[torch.Tensor], Any], text: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"^CatStep: capture=True has no effect, .* it {text}") as caught:
        compare(lambda: {"predict": predict_with(extra)}, graphs=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_error_of_the_model_is_an_error() -> None:
    step = cat_step(unet_pair()[0], capture=True)
    one = batch(0)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(**{**one, "cond": torch.ones(2, 5, 3), "cond_no_trigger": torch.ones(2, 5, 3)})
    step(**one)


def test_an_input_that_requires_a_gradient_is_refused() -> None:
    mask = torch.ones(2, 1, 8, 8, requires_grad=True)
    with pytest.raises(InvalidValueError, match=r"no input must require a gradient, .* shape \[2, 1, 8, 8\]"):
        cat_step(unet_pair()[0], capture=True)(**batch(0), mask=mask)


def test_text_encoders_are_not_recorded() -> None:
    encoder = adapted(tiny_text_encoder())
    with pytest.raises(InvalidValueError, match="`capture` must be False with text_encoders, got True: a graph would"):
        cat_step(unet_pair()[0], text_encoders=[encoder], capture=True)


def test_max_captures_is_checked() -> None:
    with pytest.raises(InvalidValueError, match="`max_captures` must be at least 1, got 0"):
        cat_step(unet_pair()[0], capture=True, max_captures=0)


def test_a_model_on_the_cpu_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InvalidValueError, match=r"^CatStep: `capture` must be False for a model on cpu, got True"):
        cat_rs.CatStep(unet_pair()[0], ddpm(), capture=True, **SETTINGS)


# The simulation itself: what it would let pass, the tests above would too.


def test_a_simulated_recording_runs_nothing_and_keeps_numbers() -> None:
    total, source, numbers = torch.zeros(3), torch.ones(3), [2.0]
    graphs = SimulatedGraphs(torch.device("cpu"))
    replay = graphs.record(lambda: (total.add_(source * numbers[0]).clone(), torch.rand(3)))
    assert total.tolist() == [0.0] * 3
    numbers[0] = 100.0
    source.fill_(3.0)
    version, state = total._version, torch.get_rng_state()
    output, drawn = replay()
    assert total.tolist() == output.tolist() == [6.0] * 3
    assert total._version == version
    before = drawn.clone()
    assert replay()[0] is output
    assert output.tolist() == [12.0] * 3
    assert not torch.equal(drawn, before)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), before)


def test_a_simulated_recording_has_the_extensions_work() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    a, b = torch.randn(2, 3), torch.randn(5, 2)
    replay = SimulatedGraphs(torch.device("cpu")).record(lambda: (cat_rs.lora_linear(x, weight, None, a, b, 1.0),))
    x.copy_(torch.randn(4, 3))
    assert torch.allclose(replay()[0], x @ weight.T + x @ a.T @ b.T, atol=1e-5)


def test_a_simulated_recording_must_not_wait() -> None:
    with pytest.raises(cuda_graphs.NotCapturable, match="not permitted when stream is capturing: aten::_local_scalar"):
        SimulatedGraphs(torch.device("cpu")).record(lambda: (torch.ones(()) * math.floor(torch.ones(()).item()),))


def test_a_simulated_wait_is_a_copy_between_devices_too() -> None:
    source, target = torch.ones(2), torch.empty(2, device="meta")
    with NoWaiting(strict=False) as mode:
        source.to("meta")
        target.copy_(source)
        assert mode.found == ["aten::_to_copy from cpu to meta", "aten::copy_ from cpu to meta"]
        source.to("meta", non_blocking=True)
        target.copy_(source, non_blocking=True)
        source.to(torch.float64).copy_(source)
        assert len(mode.found) == 2
