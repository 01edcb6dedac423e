"""The code for a GPU, run on the CPU: with the kernels for the CPU, and graphs that replay PyTorch's operations.

A simulated graph behaves as a CUDA graph does: recording runs nothing, a replay runs the recorded operations on the
recorded tensors, with the numbers that Python had when it recorded, and an operation that would wait for the device is
an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from cat_rs._native import _core
from cat_rs.step import cuda_graphs, device_values

# On a GPU each of these waits for the device, or copies from memory of the host.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::allclose",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
}
# Wait where they copy from one device to another, unless told not to.
COPIES = {"aten::_to_copy", "aten::copy_"}


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The operation's name where it waits."""
    name = func._schema.name
    if name in COPIES and not kwargs.get("non_blocking", name == "aten::copy_" and any(args[2:3])):
        # The CPU's devices differ in no simulation: this sees fake tensors.
        target = args[0].device if name == "aten::copy_" else kwargs.get("device") or args[0].device
        source = args[1].device if name == "aten::copy_" else args[0].device
        return f"{name} from {source} to {target}" if torch.device(target).type != source.type else None
    if name.startswith("aten::index") and any(
        isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1:2])
    ):
        return name
    return name if name in WAITING else None


class NoWaiting(TorchDispatchMode):
    """Lists operations that would wait for a GPU; raises where told to."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = waits(func, args, kwargs or {})
        if name is not None:
            if self.strict:
                raise RuntimeError(f"{name} waits for the device")
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


class Recorder(TorchDispatchMode):
    """Records operations, and undoes what they did to memory that was there before."""

    active: Recorder | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := waits(func, args, kwargs or {})) is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}\nmore lines")
        return self.call(func, args, kwargs or {})

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls and records; nothing within is recorded on its own."""
        with _disable_current_modes():
            given = {storage._cdata for storage in _storages((args, kwargs))}
            for storage in _storages((args, kwargs)):
                if storage._cdata not in self._own and storage._cdata not in self._before:
                    self._before[storage._cdata] = storage, storage.clone()
            result = function(*args, **kwargs)
            self._own |= {storage._cdata for storage in _storages(result)} - given
        self.calls.append((function, args, kwargs, result))
        return result

    def __enter__(self) -> Any:
        Recorder.active = self
        self._rng_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Recorder.active = None
        super().__exit__(*error)
        # Backwards: storages may share memory, as those of parameters and of a flat buffer do.
        for storage, before in reversed(self._before.values()):
            storage.copy_(before)
        self._before.clear()
        torch.set_rng_state(self._rng_state)

    def replay(self) -> None:
        """Runs the operations again, on the same memory; no version is raised, as a GPU raises none."""
        versions = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(versions):
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class SimulatedGraphs:
    """In the place of :class:`cuda_graphs.CudaGraphs`."""

    made = 0

    def __init__(self, device: torch.device) -> None:
        pass

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        mode = NoWaiting(strict=False)
        found: list[str] = []
        with mode:
            yield found
        found += [f"model.py:{name}" for name in mode.found]

    def record(self, function: Callable[[], cuda_graphs.Outputs]) -> Callable[[], cuda_graphs.Outputs]:
        recorder = Recorder()
        try:
            with recorder:
                outputs = function()
        except Exception as error:
            raise cuda_graphs.NotCapturable(str(error).splitlines()[0]) from error
        SimulatedGraphs.made += 1

        def replay() -> cuda_graphs.Outputs:
            recorder.replay()
            return outputs

        return replay


def _recordable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the extension, whose work PyTorch does not see."""

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = Recorder.active
        return function(*args, **kwargs) if recorder is None else recorder.call(function, args, kwargs)

    return call


def simulate_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU pass for a GPU."""
    monkeypatch.setattr(device_values, "is_gpu", lambda place: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", SimulatedGraphs)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    for name, function in vars(_core).copy().items():
        if callable(function) and not isinstance(function, type):
            monkeypatch.setattr(_core, name, _recordable(function))
