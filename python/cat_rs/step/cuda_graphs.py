"""CUDA graphs: one launch replays all kernels of a recorded function."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cat_rs.errors import InvalidValueError
from cat_rs.step.pytree import map_tensors, tensors

__all__ = ["CapturedFunctions", "can_record"]

# Eager calls before a recording, in which libraries choose their algorithms and kernels are compiled.
WARM_UP = 3
TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
# Recomputing activations saves and restores the state of the random numbers, which a recording before refuses.
RECORDS_CHECKPOINTING = TORCH_VERSION >= (2, 10)

Outputs = tuple[torch.Tensor, ...]


def can_record(device: torch.device) -> bool:
    """Whether work on the device can be recorded."""
    return device.type == "cuda"


# Graphs whose recording failed: PyTorch's allocators may still ask them whether they are recording.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


class NotCapturable(Exception):
    """A function cannot be recorded; the message says why in one line."""


class CudaGraphs:
    """Records work on one device; all recordings share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Runs work on the stream that recordings are made on, in order with the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """Collects the Python lines within that wait for the device, which nothing recorded may do."""
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            # Turning the mode on warns that it is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for one in caught:
            if "synchronizing CUDA operation" in str(one.message):
                found.append(f"{one.filename}:{one.lineno}")
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def record(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Records the function's kernels without running them.

        Returns:
            A function that runs them on the current stream and returns their outputs, the same tensors every time.

        Raises:
            NotCapturable: The function does something that cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        outputs: list[Outputs] = []
        # Texts alone are kept of errors, whose tracebacks hold all that was computed before.
        reasons: list[str] = []
        with torch.cuda.device(self._device):
            try:
                # As torch.compile does: other threads, of data loaders for example, may go on meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        outputs.append(function())
                    except Exception as error:
                        reasons.append(_first_line(error))
                        raise
            except Exception as error:
                reasons.append(_first_line(error))
            if reasons:
                outputs.clear()
                self._clean_up(graph, current)
                raise NotCapturable(reasons[0])

        def replay() -> Outputs:
            graph.replay()
            return outputs[0]

        return replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """Puts PyTorch in order after a recording that failed: it does not end one that the driver gave up."""
        torch.cuda.set_stream(stream)
        # An error where the recording ended after all: then the graph gives its memory back.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        graph.reset()
        _ABANDONED.append(graph)
        if TORCH_VERSION < (2, 13):
            # The generator believes that it is still being recorded, and draws no more. Its state's copy does.
            generator = torch.cuda.default_generators[self._device.index]
            generator.graphsafe_set_state(generator.clone_state())
        gc.collect()
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class _TensorSignature:
    """The properties of an input tensor that a recording depends on."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    # Position among the distinct tensors: one that is given twice is one buffer.
    index: int


@dataclass
class _Recording:
    """Inputs of one signature, and their graph once it is recorded."""

    signature: Any
    calls: int = 0
    inputs: Any = None
    replay: Callable[[], Outputs] | None = None

    def load(self, inputs: Any) -> None:
        """Copies the inputs into the buffers that the graph reads."""
        for buffer, given in zip(tensors(self.inputs), tensors(inputs), strict=True):
            buffer.copy_(given)


class CapturedFunctions:
    """Calls functions of nested tensors through graphs, one for each signature of their inputs.

    A signature is structure, shapes, dtypes, devices, and the values of all that is not a tensor. The first calls with
    a signature run the function eagerly on a side stream; the next one records it; later ones copy the inputs into the
    buffers that the graph reads, and replay. A tensor that a function reads beside its inputs is recorded by address,
    any other value as it is at that time.

    Where a function cannot be recorded, one warning says why, and all functions run eagerly from then on.

    Args:
        owner: Name in warnings and errors.
        device: Device of the inputs.
        limit: Largest number of signatures.
    """

    def __init__(self, owner: str, device: torch.device, limit: int) -> None:
        self._owner, self._device, self._limit = owner, device, limit
        self._graphs = CudaGraphs(device)
        self._recordings: list[_Recording] = []
        self._given_up = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A recording holds the addresses of what it was made with: a copy records anew.
        return type(self), (self._owner, self._device, self._limit)

    def forget(self) -> None:
        """Drops all recordings, and the memory that they keep."""
        self._recordings.clear()

    def __call__(self, function: Callable[[Any], Outputs], inputs: Any, variant: Any) -> Outputs:
        """Returns the function's outputs in new tensors.

        Args:
            function: Takes the inputs; queues work on the device and waits for none of it.
            inputs: Nested mappings and sequences of tensors and other values.
            variant: Identifies the function, and all else that its work depends on; part of the signature.

        Raises:
            InvalidValueError: An input requires a gradient, or the inputs have one signature too many.
        """
        if self._given_up:
            return function(inputs)
        recording = self._recording_of(inputs, variant)
        if recording.replay is None:
            recording.calls += 1
            if recording.calls <= WARM_UP:
                return self._warm_up(function, inputs, watched=recording.calls == WARM_UP)
            self._record(recording, function, inputs)
            if recording.replay is None:
                return function(inputs)
        recording.load(inputs)
        return tuple(output.clone() for output in recording.replay())

    def _recording_of(self, inputs: Any, variant: Any) -> _Recording:
        indices: dict[int, int] = {}

        def signature_of(tensor: torch.Tensor) -> _TensorSignature:
            if tensor.requires_grad:
                raise InvalidValueError(
                    f"{self._owner}: with capture=True no input must require a gradient, which a replay does not "
                    f"give, got a tensor of shape {list(tensor.shape)} that does"
                )
            index = indices.setdefault(id(tensor), len(indices))
            return _TensorSignature(tensor.shape, tensor.dtype, tensor.device, index)

        signature = (variant, map_tensors(signature_of, inputs))
        for recording in self._recordings:
            if recording.signature == signature:
                return recording
        if len(self._recordings) == self._limit:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors(inputs))
            raise InvalidValueError(
                f"{self._owner}: `max_captures` must be at least the number of input signatures, got {self._limit} "
                f"and inputs of another signature: tensors of shapes {shapes}"
            )
        self._recordings.append(_Recording(signature))
        return self._recordings[-1]

    def _warm_up(self, function: Callable[[Any], Outputs], inputs: Any, *, watched: bool) -> Outputs:
        with self._graphs.side_stream():
            if not watched:
                return function(inputs)
            # A recording that waits fails and may leave PyTorch in disorder, so none is begun.
            with self._graphs.waits() as found:
                outputs = function(inputs)
        if found:
            more = f" and at {len(found) - 1} more places" if len(found) > 1 else ""
            self._give_up(f"waits for the device at {found[0]}{more}")
        return outputs

    def _record(self, recording: _Recording, function: Callable[[Any], Outputs], inputs: Any) -> None:
        buffers: dict[int, torch.Tensor] = {}

        def buffer_of(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in buffers:
                buffers[id(tensor)] = tensor.clone()
            return buffers[id(tensor)]

        recording.inputs = map_tensors(buffer_of, inputs)
        try:
            recording.replay = self._graphs.record(lambda: function(recording.inputs))
        except NotCapturable as error:
            self._give_up(f"does what a graph cannot hold: {error}")

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self.forget()
        warnings.warn(
            f"{self._owner}: capture=True has no effect, every step runs eagerly: it {reason}",
            RuntimeWarning,
            stacklevel=6,
        )
