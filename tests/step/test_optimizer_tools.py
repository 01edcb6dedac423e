"""What saves, copies, averages, freezes or schedules parameters does the same with FlatAdamW as with AdamW."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs import FlatAdamW
from tests.tolerances import assert_close

Optimizer = Callable[..., torch.optim.Optimizer]
SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}


class Net(torch.nn.Module):
    """Several small layers, one of them in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 7)
        self.second = torch.nn.Linear(7, 6)
        self.third = torch.nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


@pytest.fixture(params=["net", "lora"])
def make_model(request: pytest.FixtureRequest) -> Callable[[], torch.nn.Module]:
    def lora() -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
        return model

    return Net if request.param == "net" else lora


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = model(torch.randn(4, 5, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: Any, theirs: Any, label: str = "") -> None:
    """Equal structures, with tensors up to the rounding of a few steps."""
    if isinstance(theirs, torch.Tensor) and not theirs.is_floating_point():
        assert torch.equal(ours, theirs), label
    elif isinstance(theirs, torch.Tensor):
        assert_close(ours, theirs, factor=8, scale=max(1.0, float(theirs.abs().max())), label=label)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), label
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{label}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), label
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{label}/{index}")
    else:
        assert ours == theirs, label


def both(act: Callable[[Optimizer], Any]) -> None:
    """Runs the scenario with either optimizer and compares what it returns."""
    assert_same(act(FlatAdamW), act(torch.optim.AdamW))


Make = Callable[[], torch.nn.Module]


# ---- saving


def test_safetensors_save_model(make_model: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model, save_model

    def act(kind: Optimizer) -> Any:
        model = make_model()
        train(model, kind(trainable(model), **SETTINGS), 3)
        file = tmp_path / f"{kind.__name__}.safetensors"
        save_model(model, str(file))
        fresh = make_model()
        missing, unexpected = load_model(fresh, str(file))
        assert not missing
        assert not unexpected
        return load_file(file), weights(fresh)

    both(act)


def test_accelerate_save_model(make_model: Make, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from safetensors.torch import load_file

    def act(kind: Optimizer) -> Any:
        accelerator = Accelerator(cpu=True)
        model = make_model()
        model, optimizer = accelerator.prepare(model, kind(trainable(model), **SETTINGS))
        train(model, optimizer, 3)
        accelerator.save_model(model, tmp_path / kind.__name__)
        return load_file(tmp_path / kind.__name__ / "model.safetensors")

    both(act)


def test_accelerate_save_state_and_load_state(make_model: Make, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def act(kind: Optimizer) -> Any:
        def prepared() -> tuple[Any, Any, Any, Any]:
            accelerator = Accelerator(cpu=True)
            model = make_model()
            optimizer = kind(trainable(model), **SETTINGS)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
            return accelerator, *accelerator.prepare(model, optimizer, scheduler)

        def go_on(model: Any, optimizer: Any, scheduler: Any, seed: int) -> None:
            for step in range(3):
                train(model, optimizer, 1, seed + step)
                scheduler.step()

        accelerator, *parts = prepared()
        go_on(*parts, seed=1)
        accelerator.save_state(str(tmp_path / kind.__name__))
        go_on(*parts, seed=11)
        resumed, *others = prepared()
        resumed.load_state(str(tmp_path / kind.__name__))
        go_on(*others, seed=11)
        assert_same(weights(others[0]), weights(parts[0]))
        return weights(others[0])

    both(act)


@pytest.mark.parametrize("whole", [False, True], ids=["state", "object"])
def test_torch_save_and_load(make_model: Make, whole: bool) -> None:
    def act(kind: Optimizer) -> Any:
        model = make_model()
        optimizer = kind(trainable(model), **SETTINGS)
        train(model, optimizer, 3)
        buffer = io.BytesIO()
        if whole:
            torch.save((model, optimizer), buffer)
        else:
            torch.save((model.state_dict(), optimizer.state_dict()), buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=not whole)
        if whole:
            other, resumed = loaded
        else:
            other = make_model()
            resumed = kind(trainable(other), **SETTINGS)
            other.load_state_dict(loaded[0])
            resumed.load_state_dict(loaded[1])
        train(model, optimizer, 3, seed=2)
        train(other, resumed, 3, seed=2)
        assert_same(weights(other), weights(model))
        return weights(other), resumed.state_dict()["state"]

    both(act)


def test_saving_one_parameter_saves_no_other() -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.parameters(), **SETTINGS)
        train(model, optimizer, 1)
        buffer = io.BytesIO()
        torch.save(
            [model.third.weight, model.third.weight.grad, optimizer.state[model.third.weight]["exp_avg"]], buffer
        )
        return len(buffer.getvalue()) < 4_000

    model = Net()
    both(act)
    assert sum(param.numel() for param in model.parameters()) * 4 * 3 > 1_000


# ---- copies


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_go_on_alone(make_model: Make, through: str) -> None:
    def act(kind: Optimizer) -> Any:
        model = make_model()
        optimizer = kind(trainable(model), **SETTINGS)
        train(model, optimizer, 3)
        pair = (model, optimizer)
        other, copied = copy.deepcopy(pair) if through == "deepcopy" else pickle.loads(pickle.dumps(pair))
        before = weights(model)
        train(other, copied, 3, seed=2)
        assert_same(weights(model), before)
        after = weights(other)
        train(model, optimizer, 3, seed=2)
        assert_same(weights(model), after)
        assert all(param in copied.state for param in trainable(other))
        return after, copied.param_groups[0]["lr"]

    both(act)


def test_a_copy_of_the_model_alone_is_not_trained(make_model: Make) -> None:
    def act(kind: Optimizer) -> Any:
        model = make_model()
        optimizer = kind(trainable(model), **SETTINGS)
        train(model, optimizer, 2)
        other = copy.deepcopy(model)
        train(model, optimizer, 2, seed=2)
        return weights(other), weights(model)

    both(act)


def test_averaged_models(make_model: Make) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def act(kind: Optimizer) -> Any:
        model = make_model()
        optimizer = kind(trainable(model), **SETTINGS)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for step in range(4):
            train(model, optimizer, 1, seed=step)
            average.update_parameters(model)
        return weights(average), weights(model)

    both(act)


def test_diffusers_ema(make_model: Make) -> None:
    from diffusers.training_utils import EMAModel

    def act(kind: Optimizer) -> Any:
        model = make_model()
        params = trainable(model)
        optimizer = kind(params, **SETTINGS)
        ema = EMAModel(params, decay=0.5)
        train(model, optimizer, 2)
        ema.step(params)
        ema.store(params)
        ema.copy_to(params)
        averaged = weights(model)
        ema.restore(params)
        train(model, optimizer, 2, seed=2)
        return averaged, weights(model)

    both(act)


# ---- freezing


def test_frozen_parameters_stay_and_go_on_when_thawed() -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.parameters(), **SETTINGS)
        seen = []
        train(model, optimizer, 3)
        for layer, thawed in ((model.second, False), (model.first, False), (model.second, True), (model.first, True)):
            layer.requires_grad_(thawed)
            train(model, optimizer, 2, seed=len(seen))
            seen.append(weights(model))
        return seen, optimizer.state_dict()["state"]

    both(act)


def test_a_gradient_from_before_the_freezing_counts() -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.parameters(), **SETTINGS)
        train(model, optimizer, 2)
        model(torch.ones(1, 5)).square().sum().backward()
        model.second.requires_grad_(False)
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, 1)
        return weights(model), optimizer.state_dict()["state"]

    both(act)


def test_a_frozen_parameter_does_not_move() -> None:
    model = Net()
    optimizer = FlatAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, 2)
    model.second.requires_grad_(False)
    before = weights(model)
    train(model, optimizer, 3, seed=2)
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) == name.startswith("second") for name in before)


def test_set_adapter_freezes_the_others() -> None:
    from peft import LoraConfig, get_peft_model

    def act(kind: Optimizer) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        model = get_peft_model(Net(), config, adapter_name="one")
        model.add_adapter("two", config)
        optimizer = kind([param for name, param in model.named_parameters() if "lora_" in name], **SETTINGS)
        seen = []
        for name in ("one", "two", "one"):
            model.set_adapter(name)
            train(model, optimizer, 2, seed=len(seen))
            seen.append(weights(model))
        return seen

    both(act)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.parameters(), **SETTINGS)
        train(model, optimizer, 2)
        for step in range(4):
            # The first layer alone, then all: a part of the model that a batch does not use.
            out = model.first(torch.ones(1, 5)) if step % 2 == 0 else model(torch.ones(1, 5))
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model), optimizer.state_dict()["state"]

    both(act)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_and_zero_grad(set_to_none: bool) -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.parameters(), **SETTINGS)
        for step in range(4):
            for part in range(2):
                model(torch.full((1, 5), step + part / 2)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            model.zero_grad(set_to_none=set_to_none)
        return weights(model)

    both(act)


# ---- schedulers, groups and hooks


def test_a_scheduler_resumes_at_last_epoch() -> None:
    def act(kind: Optimizer) -> Any:
        def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
            return kind([{"params": list(model.parameters()), "name": "unet"}], **SETTINGS)

        model = Net()
        optimizer = optimizer_of(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for step in range(4):
            train(model, optimizer, 1, seed=step)
            scheduler.step()
        other = Net()
        resumed = optimizer_of(other)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        later = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, T_max=10, last_epoch=scheduler.last_epoch)
        train(other, resumed, 1, seed=5)
        later.step()
        group = {key: value for key, value in resumed.param_groups[0].items() if key in ("lr", "name", "initial_lr")}
        return group, later.get_last_lr()

    both(act)


def test_hooks_run_and_may_replace_the_state() -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.parameters(), **SETTINGS)
        calls: list[str] = []

        def saving(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            calls.append("state_dict post")
            return {**state, "mine": 1}

        def loading(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            calls.append(f"load_state_dict pre {state.get('mine')}")
            groups = [{**group, "lr": 0.01} for group in state["param_groups"]]
            return {**state, "param_groups": groups}

        optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("state_dict pre"))
        optimizer.register_state_dict_post_hook(saving)
        optimizer.register_load_state_dict_pre_hook(loading)
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load_state_dict post"))
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        return calls, optimizer.param_groups[0]["lr"]

    both(act)


def test_named_parameters() -> None:
    def act(kind: Optimizer) -> Any:
        model = Net()
        optimizer = kind(model.named_parameters(), **SETTINGS)
        train(model, optimizer, 1)
        return optimizer.param_groups[0]["param_names"], optimizer.state_dict()["param_groups"][0]["param_names"]

    both(act)
