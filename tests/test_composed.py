"""PyTorch's own operations in place of the kernels: where they run, and that they train the same adapter."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cat_rs
from cat_rs import _native, composed, peft
from cat_rs.errors import CatRsError
from tests.backends import about_kernels
from tests.comparison import cat_step
from tests.models import add_lora, batch, lora_parameters, tiny_unet
from tests.tolerances import assert_close, max_abs


def on_pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of this process, from now on."""
    monkeypatch.setattr(_native, "_core", composed)
    monkeypatch.setattr(peft, "KERNEL_DEVICES", ())


def trained(**options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """An adapter after five steps, and its gradient norms."""
    model = add_lora(copy.deepcopy(tiny_unet()))
    step = cat_step(model, cat_factor=0.7, snr_gamma=5.0, **options)
    norms = [float(step(**batch(number), mask=torch.rand(2, 1, 8, 8)).grad_norm) for number in range(5)]
    return lora_parameters(model), norms


@about_kernels
def test_five_steps_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = lora_parameters(add_lora(copy.deepcopy(tiny_unet())))
    torch.manual_seed(0)
    ours, our_norms = trained()
    on_pytorch_alone(monkeypatch)
    torch.manual_seed(0)
    theirs, their_norms = trained()
    assert our_norms == pytest.approx(their_norms, rel=1e-4)
    for name, values in theirs.items():
        change = max_abs(values - before[name])
        assert change > 0
        # AdamW divides rounding by the size of the gradient.
        assert max_abs(ours[name] - values) <= 1e-3 * change, name


@about_kernels
def test_where_kernels_are_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("PyTorch's own operations ran")

    for name in composed.__all__:
        monkeypatch.setattr(composed, name, refuse)
    trained()
    embeddings = torch.randn(4, 3)
    cat_rs.kps(embeddings, embeddings + 0.1, embeddings, embeddings - 0.1)
    # Not even where a kernel refuses.
    with pytest.raises(CatRsError, match="cat_loss"):
        cat_rs.cat_loss(*[torch.ones(2, 3).long()] * 4)


@about_kernels
def test_on_a_device_without_kernels_pytorchs_own_operations_run_and_one_warning_says_so() -> None:
    _native._warn_of_device.cache_clear()
    tensor = SimpleNamespace(is_cpu=False, is_meta=False, device=torch.device("xpu"))
    with pytest.warns(UserWarning, match="no kernels for xpu: it runs on PyTorch's own operations"):
        assert _native.core_of(tensor) is composed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.core_of(tensor) is composed
        assert _native.core_of(torch.ones(1)) is _native._core


class NoFloat64(TorchDispatchMode):
    """A device that does not know float64, as Apple's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return result


@pytest.mark.parametrize(
    "cat_factor", [1.0, cat_rs.CatFactorRatio(0.5), cat_rs.CatFactorTarget(0.1)], ids=["number", "ratio", "target"]
)
def test_a_device_without_float64_trains(cat_factor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_pytorch_alone(monkeypatch)

    def narrow(device: torch.device) -> torch.dtype:
        return torch.float32

    for name, module in list(sys.modules.items()):
        if name.startswith("cat_rs.") and hasattr(module, "wide_dtype"):
            monkeypatch.setattr(module, "wide_dtype", narrow)
    model = add_lora(copy.deepcopy(tiny_unet()))
    if callable(cat_factor):
        # From here on its means are on the device.
        cat_factor.update(1.0, 1.0)
    step, before = cat_step(model, cat_factor=cat_factor), lora_parameters(model)
    with NoFloat64():
        for number in range(3):
            assert step(**batch(number)).grad_norm > 0
        a = torch.randn(5, 7)
        similarity = cat_rs.similarity(a, a.flip(0))
    assert all(not torch.equal(values, before[name]) for name, values in lora_parameters(model).items())
    assert_close(similarity, cat_rs.similarity(a.double(), a.flip(0).double()).float())


@about_kernels
@pytest.mark.parametrize("groups", [1, 2])
def test_intervals_are_those_of_the_kernels(groups: int) -> None:
    values = torch.rand(groups, 40, dtype=torch.float64).numpy()
    clusters = torch.randint(0, 9, (groups, 40)).numpy()
    settings = {"harmonic": True, "confidence": 0.9, "resamples": 500, "seed": 2**64 - 1}
    for numbers in ([None] * groups, clusters):
        calls: list[Callable[..., Any]] = [_native._core.bootstrap_interval, composed.bootstrap_interval]
        ours, theirs = (call(list(zip(values, numbers, strict=True)), **settings) for call in calls)
        assert ours == pytest.approx(theirs, rel=1e-12)
