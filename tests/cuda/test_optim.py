"""FlatAdamW's way on a GPU, on the CPU: against its way on the CPU, with everything read late."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_rs import FlatAdamW
from cat_rs._native import _core
from cat_rs.errors import DeviceError, InvalidValueError
from cat_rs.step import device_values
from tests.cuda.simulation import NoWaiting
from tests.ops.test_adamw import BF16, F32, SETTINGS, TorchAdamW, add_gradients, assert_params_close, by_id, gradients
from tests.ops.test_adamw import make_params as params_of

pytestmark = pytest.mark.usefixtures("simulated_gpu")


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e-3], ids=["no-clipping", "some-clip", "all-clip"])
@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16}))
def test_equals_clip_grad_norm_and_torch_adamw(dtype: torch.dtype, max_grad_norm: float | None) -> None:
    ours, theirs = params_of(dtype), params_of(dtype)
    optimizer = FlatAdamW(ours, max_grad_norm=max_grad_norm, **SETTINGS)
    twin = TorchAdamW(theirs, max_grad_norm, **SETTINGS)
    for step, grads in enumerate(gradients(ours, 20)):
        add_gradients(ours, grads)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(twin.step(grads), rel=1e-5)
        assert_params_close(ours, theirs, step)
        assert all(param.grad.count_nonzero() == 0 for param in ours)


def test_groups_with_their_own_settings_clip_together() -> None:
    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "lr": 0.1, "weight_decay": 0.0}, {"params": params[2:], "eps": 1e-3}]

    ours, theirs = params_of(), params_of()
    optimizer = FlatAdamW(groups(ours), max_grad_norm=0.5, **SETTINGS)
    twin = TorchAdamW(theirs, 0.5, groups(theirs), **SETTINGS)
    for step, grads in enumerate(gradients(ours, 10)):
        add_gradients(ours, grads)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(twin.step(grads), rel=1e-5)
        assert_params_close(ours, theirs, step)


def test_a_step_waits_for_nothing() -> None:
    params = params_of()
    optimizer = FlatAdamW(params, max_grad_norm=1.0, **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    for grads in gradients(params, 3):
        add_gradients(params, grads)
        with NoWaiting(strict=True):
            optimizer.step()
            schedule.step()
    with NoWaiting(strict=False) as mode:
        assert optimizer.grad_norm > 0
        assert optimizer.skipped_steps == 0
    assert mode.found == ["aten::_local_scalar_dense"] * 2


def test_a_step_that_is_not_finite_is_skipped() -> None:
    params, undisturbed = params_of(BF16), params_of(BF16)
    optimizer, twin = (FlatAdamW(one, max_grad_norm=1.0, **SETTINGS) for one in (params, undisturbed))
    first, second = gradients(params, 2)
    for one, each in ((optimizer, params), (twin, undisturbed)):
        add_gradients(each, first)
        one.step()
    params[3].grad.fill_(math.nan)
    optimizer.step()
    assert not math.isfinite(optimizer.grad_norm)
    assert optimizer.skipped_steps == 1
    assert all(param.grad.count_nonzero() == 0 for param in params)
    for one, each in ((optimizer, params), (twin, undisturbed)):
        add_gradients(each, second)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, undisturbed, strict=True))
    assert [float(optimizer.state[param]["step"]) for param in params] == [2.0] * len(params)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16}))
def test_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    params = params_of(dtype)
    optimizer = FlatAdamW(params, max_grad_norm=1.0, **SETTINGS)
    steps = list(gradients(params, 6))
    for grads in steps[:3]:
        add_gradients(params, grads)
        optimizer.step()
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
    successor = FlatAdamW(resumed, lr=123.0, max_grad_norm=1.0)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grads in steps[3:]:
        for one, each in ((optimizer, params), (successor, resumed)):
            add_gradients(each, grads)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_weights_written_from_outside_stay() -> None:
    params, fresh = params_of(BF16), params_of(BF16, seed=5)
    optimizer = FlatAdamW(params, lr=0.0, weight_decay=0.0)
    optimizer.step()
    with torch.no_grad():
        for param, new in zip(params, fresh, strict=True):
            param.copy_(new)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))


def test_a_learning_rate_may_be_a_tensor_on_the_device() -> None:
    ours, theirs = params_of(), params_of()
    rate = torch.tensor(0.01, dtype=torch.float64)
    optimizer = FlatAdamW(ours, **{**SETTINGS, "lr": rate})
    twin = FlatAdamW(theirs, **SETTINGS)
    for step, grads in enumerate(gradients(ours, 4)):
        rate.fill_(0.01 / (1 + step))
        twin.param_groups[0]["lr"] = 0.01 / (1 + step)
        for one, each in ((optimizer, ours), (twin, theirs)):
            add_gradients(each, grads)
            with NoWaiting(strict=True):
                one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_a_bad_setting_between_steps_is_named(name: str) -> None:
    params = params_of()
    optimizer = FlatAdamW(params, **SETTINGS)
    add_gradients(params, next(gradients(params, 1)))
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0][name] = -1.0
    with pytest.raises(InvalidValueError, match=f"^FlatAdamW: `{name}` must be a finite number >= 0, got -1"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_a_group_added_later_trains() -> None:
    ours, theirs = params_of(), params_of()
    optimizer = FlatAdamW(ours[:3], max_grad_norm=1.0, **SETTINGS)
    optimizer.add_param_group({"params": ours[3:]})
    twin = TorchAdamW(theirs, 1.0, **SETTINGS)
    for step, grads in enumerate(gradients(ours, 4)):
        add_gradients(ours, grads)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(twin.step(grads), rel=1e-5)
        assert_params_close(ours, theirs, step)


def test_parameters_on_two_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    # What refuses tensors without memory.
    monkeypatch.setattr("cat_rs.step.optimizer.check_no_mode", lambda op: None)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.zeros(3, device=place)) for place in ("cpu", "cuda")]
        with pytest.raises(DeviceError, match=r"^FlatAdamW: `params` must be on one device, .* on cpu and cuda:0"):
            FlatAdamW(params)


def test_the_stream_goes_to_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []

    def kernel(own: Any, *args: Any, stream: int, **kwargs: Any) -> None:
        streams.append(stream)
        own(*args, stream=stream, **kwargs)

    for name in ("sum_of_squares", "adamw_step"):
        monkeypatch.setattr(_core, name, functools.partial(kernel, getattr(_core, name)))
    monkeypatch.setattr("cat_rs.ops.adamw.stream_of", lambda tensor: 77)
    params = params_of()
    optimizer = FlatAdamW(params)
    params[0].grad.add_(1.0)
    optimizer.step()
    assert streams == [77, 77]


def test_a_cpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not device_values.is_gpu(torch.device("cpu"))
    assert device_values.is_gpu(torch.device("cuda", 1))


def test_memory_that_recorded_steps_write_to_stays() -> None:
    optimizer = FlatAdamW(params_of())
    sums = optimizer._sums.data_ptr(), weakref.ref(optimizer._sums)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert optimizer._sums.data_ptr() != sums[0]
    assert sums[1]() is not None
