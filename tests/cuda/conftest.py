"""Fixtures: the compiler of kernels for the CPU, and a GPU where there is none."""

from __future__ import annotations

import pytest

from tests.cuda.shim import Compiler
from tests.cuda.simulation import simulate_gpu


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles each program once a session."""
    return Compiler(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for a GPU runs on the CPU."""
    simulate_gpu(monkeypatch)
