"""FlatAdamW: step by step against clip_grad_norm_ and torch.optim.AdamW, its state, and bad input."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from cat_rs import FlatAdamW
from cat_rs.errors import CatRsError, DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from cat_rs.ops.adamw import adamw_step, sum_of_squares
from tests.tolerances import assert_close, max_abs

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
SHAPES = [(7, 5), (3,), (2, 3, 4), (1,), (), (513,), (64, 33)]
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}

Params = list[torch.nn.Parameter]


def by_id(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in table.items()]


def make_params(dtype: torch.dtype = F32, seed: int = 0, shapes: list[tuple[int, ...]] = SHAPES) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params: Params, steps: int, seed: int = 1) -> Iterator[list[torch.Tensor]]:
    """Gradients of each step, small and large in turn, so that some steps clip and some do not."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        size = (0.003, 0.3, 1.0)[step % 3]
        yield [(size * torch.randn(param.shape, generator=generator)).to(param.dtype) for param in params]


def add_gradients(params: Params, grads: list[torch.Tensor]) -> None:
    """As autograd does: into .grad where there is one."""
    for param, grad in zip(params, grads, strict=True):
        if param.grad is None:
            param.grad = grad.clone()
        else:
            param.grad.add_(grad)


class TorchAdamW:
    """clip_grad_norm_ and torch.optim.AdamW over float32 copies of parameters in lower precision."""

    def __init__(
        self, params: Params, max_grad_norm: float | None = None, groups: Any = None, **settings: Any
    ) -> None:
        self.params, self.max_grad_norm = params, max_grad_norm
        self.masters = [
            param if param.dtype in (F32, F64) else torch.nn.Parameter(param.detach().float()) for param in params
        ]
        twins = dict(zip(params, self.masters, strict=True))
        groups = groups or [{"params": params}]
        groups = [{**group, "params": [twins[param] for param in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, foreach=False, **settings)

    def step(self, grads: Sequence[torch.Tensor | None]) -> float:
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = None if grad is None else grad.to(master.dtype)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, limit))
        self.optimizer.step()
        for param, master in zip(self.params, self.masters, strict=True):
            param.data.copy_(master.data)
        return norm


def assert_params_close(ours: Params, theirs: Params, step: int) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # Each step adds a rounding error of the parameter's magnitude; 8 covers 50 of them.
        assert_close(a, b, factor=8, scale=max_abs(b), label=f"step {step}, parameter {index}")


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e-3], ids=["no-clipping", "some-clip", "all-clip"])
@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_equals_clip_grad_norm_and_torch_adamw(dtype: torch.dtype, max_grad_norm: float | None) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    optimizer = FlatAdamW(ours, max_grad_norm=max_grad_norm, **SETTINGS)
    twin = TorchAdamW(theirs, max_grad_norm, **SETTINGS)
    for step, grads in enumerate(gradients(ours, 50)):
        add_gradients(ours, grads)
        optimizer.step()
        norm = twin.step(grads)
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5)
        assert_params_close(ours, theirs, step)
        masters = [optimizer.state[param].get("master", param) for param in ours]
        assert_params_close(masters, twin.masters, step)


def test_groups_with_their_own_settings_clip_together() -> None:
    def groups(params: Params) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": 0.1, "weight_decay": 0.0},
            {"params": params[2:5], "betas": (0.5, 0.9), "eps": 1e-3},
            {"params": params[5:]},
        ]

    ours, theirs = make_params(), make_params()
    optimizer = FlatAdamW(groups(ours), max_grad_norm=0.5, **SETTINGS)
    twin = TorchAdamW(theirs, 0.5, groups(theirs), **SETTINGS)
    for step, grads in enumerate(gradients(ours, 20)):
        add_gradients(ours, grads)
        optimizer.step()
        assert twin.step(grads) == pytest.approx(optimizer.grad_norm, rel=1e-5)
        assert_params_close(ours, theirs, step)


def test_mixed_dtypes_in_a_group() -> None:
    def params() -> Params:
        return [*make_params(F32), *make_params(BF16, seed=2), *make_params(F64, seed=3)]

    ours, theirs = params(), params()
    optimizer, twin = FlatAdamW(ours, max_grad_norm=1.0, **SETTINGS), TorchAdamW(theirs, 1.0, **SETTINGS)
    for grads in gradients(ours, 10):
        add_gradients(ours, grads)
        optimizer.step()
        twin.step(grads)
        # clip_grad_norm_ takes the joint norm in float32.
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, dtype=F32 if a.dtype == F64 else a.dtype, factor=8, scale=max_abs(b))


def test_a_group_added_later() -> None:
    ours, theirs = make_params(), make_params()
    optimizer, twin = FlatAdamW(ours[:3], **SETTINGS), TorchAdamW(theirs[:3], **SETTINGS)
    for step, grads in enumerate(gradients(ours, 6)):
        if step == 3:
            optimizer.add_param_group({"params": ours[3:], "lr": 0.05})
            twin.optimizer.add_param_group({"params": theirs[3:], "lr": 0.05})
            twin.params, twin.masters = theirs, theirs
        count = len(twin.params)
        add_gradients(ours[:count], grads[:count])
        optimizer.step()
        twin.step(grads[:count])
        assert_params_close(ours, theirs, step)


def test_a_learning_rate_scheduler() -> None:
    ours, theirs = make_params(), make_params()
    optimizer, twin = FlatAdamW(ours, **SETTINGS), TorchAdamW(theirs, **SETTINGS)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.05, total_steps=20, cycle_momentum=True)
        for one in (optimizer, twin.optimizer)
    ]
    for step, grads in enumerate(gradients(ours, 19)):
        add_gradients(ours, grads)
        optimizer.step()
        twin.step(grads)
        for schedule in schedules:
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == twin.optimizer.param_groups[0]["lr"]
        assert_params_close(ours, theirs, step)


def test_parameters_and_gradients_lie_in_one_buffer_each_in_a_storage_of_its_own() -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    FlatAdamW(params)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    for tensors in (params, [param.grad for param in params]):
        ends = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in tensors]
        assert [tensor.data_ptr() for tensor in tensors[1:]] == ends[:-1]
        storages = [tensor.untyped_storage() for tensor in tensors]
        assert [storage.data_ptr() for storage in storages] == [tensor.data_ptr() for tensor in tensors]
        assert [storage.nbytes() for storage in storages] == [tensor.nbytes for tensor in tensors]


def test_a_gradient_from_before_the_optimizer_counts() -> None:
    ours, theirs = make_params(), make_params()
    grads = next(gradients(ours, 1))
    add_gradients(ours, grads)
    optimizer = FlatAdamW(ours, **SETTINGS)
    optimizer.step()
    TorchAdamW(theirs, **SETTINGS).step(grads)
    assert_params_close(ours, theirs, 0)


def test_replaced_and_missing_gradients() -> None:
    ours, theirs = make_params(), make_params()
    optimizer, twin = FlatAdamW(ours, **SETTINGS), TorchAdamW(theirs, **SETTINGS)
    for step, grads in enumerate(gradients(ours, 6)):
        given = [None if (index + step) % 3 == 0 else grad for index, grad in enumerate(grads)]
        for param, grad in zip(ours, given, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
        twin.step(given)
        assert_params_close(ours, theirs, step)
        assert all(param.grad.count_nonzero() == 0 for param in ours)


def test_transposed_parameters() -> None:
    ours, theirs = (torch.nn.Parameter(torch.arange(12.0).view(3, 4).T) for _ in range(2))
    optimizer, twin = FlatAdamW([ours], **SETTINGS), TorchAdamW([theirs], **SETTINGS)
    grad = torch.randn(4, 3)
    ours.grad = grad.clone()
    optimizer.step()
    twin.step([grad])
    assert_params_close([ours], [theirs], 0)


def test_autograd_accumulates_into_the_flat_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    optimizer = FlatAdamW([weight])
    view = weight.grad
    for _ in range(3):
        (2 * weight).sum().backward()
    assert weight.grad is view
    assert weight.grad.tolist() == [6.0] * 4
    optimizer.step()
    assert weight.grad is view
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_zeroes_whatever_is_there(set_to_none: bool) -> None:
    params = make_params()
    optimizer = FlatAdamW(params)
    views = [param.grad for param in params]
    first, second = gradients(params, 2)

    add_gradients(params, first)
    optimizer.zero_grad(set_to_none)
    assert all(param.grad is view and view.count_nonzero() == 0 for param, view in zip(params, views, strict=True))

    add_gradients(params, first)
    optimizer.step()
    optimizer.zero_grad(set_to_none)
    add_gradients(params, second)
    params[0].grad = None
    params[1].grad = torch.ones(3)
    optimizer.zero_grad(set_to_none)
    assert all(param.grad is view and view.count_nonzero() == 0 for param, view in zip(params, views, strict=True))


def test_zero_grad_drops_gradients_that_stand_elsewhere() -> None:
    params, untouched = make_params(), make_params()
    optimizer = FlatAdamW(params, weight_decay=0.5)
    # The flat gradients are zero: only the tensors that took their places are not.
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.zero_grad()
    assert all(param.grad is not None and param.grad.count_nonzero() == 0 for param in params)
    optimizer.step()
    assert all(torch.equal(param, before) for param, before in zip(params, untouched, strict=True))


def test_a_graph_over_the_old_weights_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    optimizer = FlatAdamW([weight])
    loss = weight.square().sum()
    weight.grad.fill_(1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_a_step_that_is_not_finite_is_skipped(dtype: torch.dtype, value: float) -> None:
    params, undisturbed = make_params(dtype), make_params(dtype)
    optimizer, twin = (FlatAdamW(one, max_grad_norm=1.0, **SETTINGS) for one in (params, undisturbed))
    first, second = gradients(params, 2)
    for one, each in ((optimizer, params), (twin, undisturbed)):
        add_gradients(each, first)
        one.step()
    add_gradients(params, second)
    params[3].grad.fill_(value)
    optimizer.step()
    assert not math.isfinite(optimizer.grad_norm)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(params, undisturbed, strict=True))
    assert all(param.grad.count_nonzero() == 0 for param in params)
    # The next step goes on as if the skipped one had not been.
    for one, each in ((optimizer, params), (twin, undisturbed)):
        add_gradients(each, second)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, undisturbed, strict=True))
    assert optimizer.skipped_steps == 1


def test_a_zero_gradient_only_decays() -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    optimizer = FlatAdamW(params, lr=0.5, weight_decay=0.5, max_grad_norm=1.0)
    for param in params:
        param.grad.zero_()
    optimizer.step()
    assert optimizer.grad_norm == 0
    for param, old in zip(params, before, strict=True):
        assert_close(param, 0.75 * old.double())


def test_a_closure_runs_with_gradients_and_is_returned() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = FlatAdamW([weight], lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9
    assert weight.item() == pytest.approx(2.9)


def test_same_bits_on_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = make_params(shapes=[(300, 401), (77,)])
        optimizer = FlatAdamW(params, max_grad_norm=1.0, **SETTINGS)
        for grads in gradients(params, 3):
            add_gradients(params, grads)
            optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("through", by_id({"copy": copy.deepcopy, "file": _through_a_file}))
@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_resumes_bit_for_bit(dtype: torch.dtype, through: Any) -> None:
    params = make_params(dtype)
    optimizer = FlatAdamW(params, max_grad_norm=1.0, **SETTINGS)
    steps = list(gradients(params, 8))
    for grads in steps[:4]:
        add_gradients(params, grads)
        optimizer.step()
    state = through(optimizer.state_dict())
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
    successor = FlatAdamW(resumed, lr=123.0, max_grad_norm=1.0)
    successor.load_state_dict(state)
    for grads in steps[4:]:
        for one, each in ((optimizer, params), (successor, resumed)):
            add_gradients(each, grads)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_every_state_dict_has_the_step_count_of_its_time() -> None:
    params = make_params()
    optimizer = FlatAdamW(params, **SETTINGS)
    counts = []
    for grads in gradients(params, 3):
        add_gradients(params, grads)
        optimizer.step()
        state = optimizer.state_dict()["state"]
        counts.append({float(each["step"]) for each in state.values()})
    assert counts == [{1.0}, {2.0}, {3.0}]


@pytest.mark.parametrize("through", by_id({"copy": copy.deepcopy, "file": _through_a_file}))
@pytest.mark.parametrize("dtype", by_id({"f32": F32, "f64": F64}))
@pytest.mark.parametrize("direction", ["to-torch", "from-torch"])
def test_state_interchanges_with_torch_adamw(direction: str, dtype: torch.dtype, through: Any) -> None:
    steps = list(gradients(make_params(dtype), 8))

    def optimizer_of(ours: bool, params: Params) -> torch.optim.Optimizer:
        return FlatAdamW(params, **SETTINGS) if ours else torch.optim.AdamW(params, foreach=False, **SETTINGS)

    def run(optimizer: torch.optim.Optimizer, params: Params, steps: list[list[torch.Tensor]]) -> None:
        for grads in steps:
            optimizer.zero_grad()
            add_gradients(params, grads)
            optimizer.step()

    straight = make_params(dtype)
    run(optimizer_of(False, straight), straight, steps)

    first = make_params(dtype)
    before = optimizer_of(direction == "to-torch", first)
    run(before, first, steps[:4])
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    after = optimizer_of(direction == "from-torch", second)
    after.load_state_dict(through(before.state_dict()))
    run(after, second, steps[4:])
    assert_params_close(second, straight, 8)


def test_state_has_the_layout_of_torch_adamw() -> None:
    params = make_params()
    optimizer = FlatAdamW(params, **SETTINGS)
    add_gradients(params, next(gradients(params, 1)))
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert list(state["state"]) == list(range(len(params)))
    assert {key: state["param_groups"][0][key] for key in SETTINGS} == SETTINGS
    for index, param in enumerate(params):
        assert set(state["state"][index]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["state"][index]["exp_avg"].shape == param.shape
        assert state["state"][index]["step"] == 1


@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16}))
def test_weights_written_from_outside_stay(dtype: torch.dtype) -> None:
    # As model.load_state_dict does after the optimizer was made.
    params, fresh = make_params(dtype), make_params(dtype, seed=5)
    optimizer = FlatAdamW(params, lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        for param, new in zip(params, fresh, strict=True):
            param.copy_(new)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))


@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16}))
def test_a_torch_state_leaves_the_loaded_weights(dtype: torch.dtype) -> None:
    # A checkpoint of a script that used torch.optim.AdamW has no float32 copy of the weights.
    old = make_params(dtype)
    torch_optimizer = torch.optim.AdamW(old, foreach=False, **SETTINGS)
    for param, grad in zip(old, next(gradients(old, 1)), strict=True):
        param.grad = grad
    torch_optimizer.step()
    params = make_params(dtype, seed=5)
    optimizer = FlatAdamW(params, **SETTINGS)
    with torch.no_grad():
        for param, saved in zip(params, old, strict=True):
            param.copy_(saved)
    optimizer.load_state_dict(copy.deepcopy(torch_optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(params, old, strict=True))


def assert_copied(optimizer: FlatAdamW, params: Params, dtype: torch.dtype) -> None:
    for param in params:
        copy = optimizer.low_precision_copy(param)
        assert copy is not None
        assert copy.dtype == dtype
        assert torch.equal(copy, param.detach().to(dtype))


@pytest.mark.parametrize("low", by_id({"bf16": BF16, "f16": F16}))
def test_a_low_precision_copy_is_the_rounded_parameter(low: torch.dtype) -> None:
    params, others = make_params(), [*make_params(BF16), *make_params(F64)]
    optimizer = FlatAdamW([*params, *others], max_grad_norm=1.0, low_precision=low, **SETTINGS)
    assert_copied(optimizer, params, low)
    first = [optimizer.low_precision_copy(param) for param in params]
    for grads in gradients(params, 3):
        add_gradients(params, grads)
        optimizer.step()
        assert_copied(optimizer, params, low)
    # Layers may keep what they got: later steps write to the same memory.
    assert all(copy is optimizer.low_precision_copy(param) for copy, param in zip(first, params, strict=True))
    assert not any(copy.requires_grad for copy in first)
    assert all(optimizer.low_precision_copy(param) is None for param in [*others, torch.zeros(3)])


def test_a_low_precision_copy_changes_neither_steps_nor_state() -> None:
    states, results = [], []
    for low in (None, BF16):
        params = make_params()
        optimizer = FlatAdamW(params, max_grad_norm=1.0, low_precision=low, **SETTINGS)
        for grads in gradients(params, 5):
            add_gradients(params, grads)
            optimizer.step()
        states.append(optimizer.state_dict())
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for ours, theirs in zip(*(state["state"].values() for state in states), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_low_precision_copy_follows_what_is_written_from_outside() -> None:
    params = make_params()
    optimizer = FlatAdamW(params, low_precision=BF16, **SETTINGS)

    def write() -> None:
        with torch.no_grad():
            params[0].add_(1)

    write()
    assert optimizer.low_precision_copy(params[0]) is None
    optimizer.step()
    assert_copied(optimizer, params, BF16)
    write()
    optimizer.load_state_dict(optimizer.state_dict())
    assert_copied(optimizer, params, BF16)
    write()
    params[1].grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_copied(optimizer, params, BF16)
    params[2].data = params[2].detach() + 1
    assert optimizer.low_precision_copy(params[2]) is None


def test_a_group_added_later_is_copied_too() -> None:
    params = make_params()
    optimizer = FlatAdamW(params[:3], low_precision=F16, **SETTINGS)
    optimizer.add_param_group({"params": params[3:]})
    assert_copied(optimizer, params, F16)
    optimizer.step()
    assert_copied(optimizer, params, F16)


def test_a_graph_over_the_old_copy_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    optimizer = FlatAdamW([weight], low_precision=BF16)
    x = torch.randn(4, dtype=BF16, requires_grad=True)
    loss = (x * optimizer.low_precision_copy(weight)).sum()
    weight.grad.fill_(1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_optimizing_a_real_loss_converges() -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    goal = torch.linspace(-1, 1, 8)
    optimizer = FlatAdamW([weight], lr=0.05, weight_decay=0.0, max_grad_norm=1.0)
    for _ in range(300):
        (weight - goal).square().sum().backward()
        optimizer.step()
    assert max_abs(weight - goal) < 1e-2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        pytest.param({"lr": -1.0}, "`lr` must be a finite number >= 0, got -1.0", id="lr-negative"),
        pytest.param({"lr": math.nan}, "`lr` must be a finite number >= 0, got nan", id="lr-nan"),
        pytest.param({"eps": -1e-8}, "`eps` must be a finite number >= 0, got -1e-08", id="eps"),
        pytest.param({"weight_decay": math.inf}, "`weight_decay` must be .* got inf", id="weight-decay"),
        pytest.param({"betas": (0.9, 1.0)}, r"`betas` must be two numbers in \[0, 1\), got \(0.9, 1.0\)", id="beta-1"),
        pytest.param({"betas": (0.9,)}, r"`betas` must be two numbers", id="one-beta"),
        pytest.param({"betas": (-0.1, 0.9)}, r"`betas` .* got \(-0.1, 0.9\)", id="beta-negative"),
        pytest.param({"max_grad_norm": 0.0}, "`max_grad_norm` must be > 0 or None, got 0.0", id="norm-zero"),
        pytest.param({"max_grad_norm": math.nan}, "`max_grad_norm` must be > 0 or None, got nan", id="norm-nan"),
        pytest.param(
            {"low_precision": F32},
            "`low_precision` must be torch.bfloat16, torch.float16 or None, got torch.float32",
            id="low-precision",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^FlatAdamW: {text}") as caught:
        FlatAdamW(make_params(), **settings)
    assert isinstance(caught.value, CatRsError)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_a_bad_setting_of_a_group_is_named(name: str) -> None:
    params = make_params()
    add_gradients(params, next(gradients(params, 1)))
    before = [param.detach().clone() for param in params]
    with pytest.raises(InvalidValueError, match=f"`{name}` must be a finite number >= 0, got -1"):
        FlatAdamW([{"params": params, name: -1.0}]).step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("param", "error", "text"),
    [
        pytest.param(torch.zeros(3, dtype=torch.int64), DtypeError, "a float dtype, got torch.int64", id="int"),
        pytest.param(
            torch.zeros(3, dtype=torch.complex64), DtypeError, "a float dtype, got torch.complex64", id="complex"
        ),
        pytest.param(
            torch.zeros(3, device="meta"),
            DeviceError,
            "on the CPU or an .*, got a parameter on meta",
            id="meta",
        ),
    ],
)
def test_bad_parameters_are_named(param: torch.Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^FlatAdamW: `params` must .*{text}"):
        FlatAdamW([torch.nn.Parameter(param, requires_grad=False)])


def test_a_state_dict_of_other_groups_is_named() -> None:
    optimizer = FlatAdamW(make_params())
    with pytest.raises(InvalidValueError, match=r"`state_dict` must have parameter groups of sizes \[7\], got \[2\]"):
        optimizer.load_state_dict(FlatAdamW(make_params()[:2]).state_dict())


def test_a_state_dict_of_other_shapes_is_an_error() -> None:
    optimizer = FlatAdamW(make_params(shapes=[(3,), (4,)]))
    other = FlatAdamW(make_params(shapes=[(3,), (5,)]))
    with pytest.raises(CatRsError, match="shape"):
        optimizer.load_state_dict(other.state_dict())


def test_parameters_of_a_state_may_have_taken_different_numbers_of_steps() -> None:
    ours, theirs = make_params(), make_params()
    twin = TorchAdamW(theirs, **SETTINGS)
    for step, grads in enumerate(gradients(theirs, 4)):
        twin.step([None if index < step else grad for index, grad in enumerate(grads)])
    with torch.no_grad():
        for param, other in zip(ours, theirs, strict=True):
            param.copy_(other)
    optimizer = FlatAdamW(ours, **SETTINGS)
    optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))
    assert [int(optimizer.state[param]["step"]) for param in ours] == [1, 2, 3, 4, 4, 4, 4]
    for step, grads in enumerate(gradients(ours, 3, seed=2)):
        add_gradients(ours, grads)
        optimizer.step()
        twin.step(grads)
        assert_params_close(ours, theirs, step)


def test_a_gradient_written_through_data_counts() -> None:
    (param,) = params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = FlatAdamW(params, 0.1, weight_decay=0.0)
    param.grad.data.fill_(1.0)
    optimizer.step()
    assert_close(param, torch.full((3,), 0.9, dtype=F64))


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_a_state_of_another_algorithm_is_an_error(option: str) -> None:
    params = make_params()
    state = torch.optim.AdamW(params, foreach=False, **{option: True}).state_dict()
    with pytest.raises(InvalidValueError, match=option):
        FlatAdamW(make_params()).load_state_dict(state)


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        pytest.param(
            torch.tensor(0.0, dtype=F64), DtypeError, "`step` must have dtype float32, got float64", id="dtype"
        ),
        pytest.param(torch.zeros(1), ShapeError, r"`step` must have shape \[\], got \[1\]", id="shape"),
        pytest.param(torch.tensor(-1.0), InvalidValueError, "`step` must be a count >= 0, got -1", id="negative"),
        pytest.param(torch.tensor(math.nan), InvalidValueError, "`step` must be a count >= 0, got .a.", id="nan"),
    ],
)
def test_a_bad_step_count_changes_nothing(step: torch.Tensor, error: type[Exception], text: str) -> None:
    buffers = [torch.ones(5) for _ in range(4)]
    settings, sums = settings_tensor(0.1, betas=(0.9, 0.99)), torch.ones(1, dtype=F64)
    with pytest.raises(error, match=f"^adamw: {text}"):
        adamw_step(*buffers, None, settings=settings, sums=sums, step=step, skipped=None)
    assert all(torch.equal(buffer, torch.ones(5)) for buffer in buffers)


def test_the_kernel_counts_its_steps() -> None:
    (param,) = params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = FlatAdamW(params, 0.1)
    for count in (1, 2, 3):
        param.grad.fill_(1.0)
        optimizer.step()
        assert optimizer.state[param]["step"] == count
    param.grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.state[param]["step"] == 3


# The kernels by themselves


def settings_tensor(
    lr: float = 0.01,
    betas: tuple[float, float] = (0.8, 0.95),
    eps: float = 1e-6,
    weight_decay: float = 0.1,
    max_grad_norm: float = math.inf,
) -> torch.Tensor:
    return torch.tensor([lr, *betas, eps, weight_decay, max_grad_norm], dtype=F64)


class FlatBuffers:
    """A flat buffer of each parameter, and what all share."""

    def __init__(self, params: Params) -> None:
        self.params = [param.detach().clone().to(F64 if param.dtype == F64 else F32) for param in params]
        self.grads = [torch.zeros_like(param) for param in params]
        self.moments = [[torch.zeros_like(param) for _ in range(2)] for param in self.params]
        self.low = [torch.empty_like(param) for param in params]
        self.sums = torch.full((len(params),), math.nan, dtype=F64)
        self.counts = [torch.tensor(0.0) for _ in params]
        self.skipped = torch.tensor(0)

    def step(self, settings: torch.Tensor) -> None:
        for index, grad in enumerate(self.grads):
            sum_of_squares(grad, self.sums, index)
        rows = zip(self.params, self.grads, self.moments, self.low, self.counts, strict=True)
        for index, (param, grad, moments, low, count) in enumerate(rows):
            skipped = self.skipped if index == 0 else None
            adamw_step(param, grad, *moments, low, settings=settings, sums=self.sums, step=count, skipped=skipped)


@pytest.mark.parametrize("settings_dtype", by_id({"f64": F64, "f32": F32}))
@pytest.mark.parametrize("max_grad_norm", [math.inf, 1.0, 1e-3], ids=["no-clipping", "some-clip", "all-clip"])
@pytest.mark.parametrize("dtype", by_id(DTYPES))
def test_kernels_equal_clip_grad_norm_and_torch_adamw(
    dtype: torch.dtype, max_grad_norm: float, settings_dtype: torch.dtype
) -> None:
    params = make_params(dtype)
    ours = FlatBuffers(params)
    twin = TorchAdamW(params, max_grad_norm, **SETTINGS)
    settings = settings_tensor(max_grad_norm=max_grad_norm).to(settings_dtype)
    for number, grads in enumerate(gradients(params, 10)):
        for mine, grad in zip(ours.grads, grads, strict=True):
            mine.copy_(grad)
        ours.step(settings)
        assert math.sqrt(ours.sums.sum()) == pytest.approx(twin.step(grads), rel=1e-5)
        for mine, theirs, low in zip(ours.params, twin.masters, ours.low, strict=True):
            # Settings in float32 carry an error of half a unit each.
            tolerance = {"dtype": mine.dtype, "factor": 8} if settings_dtype == F64 else {"dtype": F32, "factor": 50}
            assert_close(mine, theirs, scale=max_abs(theirs), label=f"step {number}", **tolerance)
            assert torch.equal(low, mine.to(dtype))
        assert all(grad.count_nonzero() == 0 for grad in ours.grads)
    assert [float(count) for count in ours.counts] == [10.0] * len(params)
    assert int(ours.skipped) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", by_id({"f32": F32, "bf16": BF16}))
def test_a_norm_that_is_not_finite_skips_the_step_of_every_buffer(dtype: torch.dtype, value: float) -> None:
    ours = FlatBuffers(make_params(dtype))
    for grad in ours.grads:
        grad.fill_(1.0)
    ours.step(settings_tensor())
    tensors = [*ours.params, *ours.low, *itertools.chain(*ours.moments)]
    before = [tensor.clone() for tensor in tensors]
    for grad in ours.grads:
        grad.fill_(1.0)
    ours.grads[3].fill_(value)
    ours.step(settings_tensor())
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    assert all(grad.count_nonzero() == 0 for grad in ours.grads)
    assert [float(count) for count in ours.counts] == [1.0] * len(ours.params)
    assert int(ours.skipped) == 1


@pytest.mark.parametrize("index", [-1, 2])
def test_a_sum_of_squares_goes_where_it_belongs(index: int) -> None:
    sums = torch.full((2,), math.nan, dtype=F64)
    sum_of_squares(torch.full((5,), 2.0), sums, 1)
    assert sums.isnan().tolist() == [True, False]
    assert sums[1] == 20.0
    with pytest.raises(InvalidValueError, match=rf"^adamw: `index` must be in 0\.\.2, got {index}"):
        sum_of_squares(torch.ones(5), sums, index)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"settings": settings_tensor(lr=-1.0)}, InvalidValueError, "`lr` must be a finite number >= 0, got -1"),
        ({"settings": settings_tensor(lr=math.inf)}, InvalidValueError, "`lr` must be a finite number >= 0, got inf"),
        ({"settings": settings_tensor(betas=(1.0, 0.9))}, InvalidValueError, r"`beta1` must be in \[0, 1\), got 1"),
        ({"settings": settings_tensor(betas=(0.5, -1))}, InvalidValueError, r"`beta2` must be in \[0, 1\), got -1"),
        ({"settings": settings_tensor(eps=math.nan)}, InvalidValueError, "`eps` must be a finite .*, got [Nn]a[Nn]"),
        ({"settings": settings_tensor(weight_decay=-1.0)}, InvalidValueError, "`weight_decay` must be a finite .* -1"),
        ({"settings": settings_tensor(max_grad_norm=0.0)}, InvalidValueError, "`max_grad_norm` must be > 0, got 0"),
        ({"settings": torch.zeros(5).double()}, ShapeError, r"`settings` must have shape \[6\], got \[5\]"),
        ({"settings": torch.zeros(6).half()}, DtypeError, "`settings` .* float32 or float64, got float16"),
        ({"settings": torch.zeros(6, device="meta")}, DeviceError, "`settings` must be on the CPU"),
        ({"sums": torch.zeros(1)}, DtypeError, "`sums` must have dtype float64, got float32"),
        ({"sums": torch.zeros(0).double()}, ShapeError, r"`sums` must have shape \[K\] with K >= 1, got \[0\]"),
        ({"skipped": torch.tensor(0.0)}, DtypeError, "`skipped` must have dtype int64, got float32"),
        ({"param": torch.ones(5).bfloat16()}, DtypeError, "`param` must have dtype float32 or float64"),
        ({"exp_avg": torch.ones(5).double()}, DtypeError, "`exp_avg` must have .* dtype of `param`, got float64"),
        ({"grad": torch.ones(4)}, ShapeError, r"`grad` must have shape \[5\], got \[4\]"),
        ({"low_precision": torch.ones(10)[::2]}, LayoutError, "`low_precision` must be contiguous"),
    ],
)
def test_bad_arguments_of_a_step_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {name: torch.ones(5) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "low_precision")}
    numbers = {"settings": settings_tensor(), "sums": torch.ones(1).double(), "step": torch.tensor(0.0)}
    with pytest.raises(error, match=f"^adamw: {text}"):
        adamw_step(**{**arguments, **numbers, "skipped": torch.tensor(0), **change})
    assert all(torch.equal(tensor, torch.ones(5)) for tensor in arguments.values())


def test_gradients_that_a_recording_would_add_to_are_zeroed_when_asked() -> None:
    (param,) = params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = FlatAdamW(params, 0.1)
    param.grad.fill_(1.0)
    optimizer.before_launch()
    optimizer.zero_grad()
    assert param.grad.count_nonzero() == 0


def test_errors_of_hooks_are_their_own() -> None:
    params = make_params()
    optimizer = FlatAdamW(params)

    def hook(*_: Any) -> None:
        raise RuntimeError("mine")

    for register in (optimizer.register_load_state_dict_pre_hook, optimizer.register_load_state_dict_post_hook):
        handle = register(hook)
        with pytest.raises(RuntimeError, match=r"^mine$"):
            optimizer.load_state_dict(optimizer.state_dict())
        handle.remove()
