"""Recordings that fail: what they leave behind, with PyTorch's part of a recording in Python."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cat_rs.step import cuda_graphs
from cat_rs.step.cuda_graphs import CudaGraphs, NotCapturable


class Generator:
    """A generator of PyTorch before 2.13, which knows whether it is being recorded."""

    def __init__(self, offset: int = 8, capturing: bool = False) -> None:
        self.state = {"offset": offset, "capturing": capturing}

    def clone_state(self) -> Generator:
        return Generator(self.state["offset"])

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def draw(self) -> None:
        if self.state["capturing"]:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state["offset"] += 4


class Cuda:
    """What a recording does to PyTorch: its allocator's pools, the current stream and the generator."""

    def __init__(self) -> None:
        self.recording, self.users, self.emptied = False, 0, 0
        self.stream, self.generator = "own", Generator()
        self.kept: list[Any] = []
        # Whether the driver gives the recording up.
        self.invalid = False

    def end_allocate_to_pool(self, device: int, pool: Any) -> None:
        if not self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording = False

    def release_pool(self, device: int, pool: Any) -> None:
        self.users -= 1

    def empty_cache(self) -> None:
        gc_was_enough = not [one for one in self.kept if one() is not None]
        assert gc_was_enough, "what was computed before the error is still held"
        self.emptied += 1

    @contextlib.contextmanager
    def graph(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.stream, self.recording, self.generator.state["capturing"] = "side", True, True
        self.users += 1
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError(
                    "operation would make the legacy stream depend on a capturing blocking stream\nmore"
                )
            self.recording = self.generator.state["capturing"] = False
            self.stream, graph.ended = "own", True


class Graph:
    cuda: Cuda

    def __init__(self) -> None:
        self.ended = False

    def reset(self) -> None:
        if self.ended:
            self.cuda.users -= 1
        self.ended = False

    def replay(self) -> None:
        """Does nothing."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(Graph, "cuda", cuda, raising=False)
    replacements: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": cuda.graph,
        "Stream": lambda device: "side",
        "current_stream": lambda device: cuda.stream,
        "set_stream": lambda stream: setattr(cuda, "stream", stream),
        "graph_pool_handle": lambda: (0, 1),
        "device": contextlib.nullcontext,
        "empty_cache": cuda.empty_cache,
        "default_generators": [cuda.generator],
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool, raising=False)
    monkeypatch.setattr(cuda_graphs, "TORCH_VERSION", (2, 11))
    return cuda


def failing(cuda: Cuda) -> Callable[[], Any]:
    def function() -> Any:
        activations = torch.zeros(3)
        cuda.kept.append(weakref.ref(activations))
        raise RuntimeError("no recording, please\nat length")

    return function


@pytest.mark.parametrize("invalid", [False, True], ids=["the model's error", "the driver's error"])
def test_a_failed_recording_leaves_nothing_behind(cuda: Cuda, invalid: bool) -> None:
    cuda.invalid = invalid
    graphs = CudaGraphs(torch.device("cuda", 0))
    gc.disable()
    try:
        with pytest.raises(NotCapturable, match=r"^no recording, please$"):
            graphs.record(failing(cuda))
    finally:
        gc.enable()
    assert (cuda.stream, cuda.recording, cuda.users, cuda.emptied) == ("own", False, 0, 1)
    cuda.generator.draw()
    assert cuda.generator.state["offset"] == 12


def test_a_recording_that_the_driver_gave_up_is_not_capturable(cuda: Cuda) -> None:
    cuda.invalid = True
    with pytest.raises(NotCapturable, match=r"^operation would make the legacy stream depend"):
        CudaGraphs(torch.device("cuda", 0)).record(lambda: (torch.zeros(1),))
    assert (cuda.stream, cuda.recording, cuda.users) == ("own", False, 0)


def test_a_generator_that_keeps_a_state_for_each_recording_stays(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    # Graphs recorded before draw from it too.
    monkeypatch.setattr(cuda_graphs, "TORCH_VERSION", (2, 13))
    before = cuda.generator.state
    with pytest.raises(NotCapturable):
        CudaGraphs(torch.device("cuda", 0)).record(failing(cuda))
    assert cuda.generator.state is before


def test_a_recording_keeps_its_memory(cuda: Cuda) -> None:
    output = torch.ones(2)
    replay = CudaGraphs(torch.device("cuda", 0)).record(lambda: (output,))
    assert replay()[0] is output
    assert (cuda.users, cuda.emptied) == (1, 0)
