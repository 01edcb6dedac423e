"""Fixtures: the compiler of kernels for the CPU."""

from __future__ import annotations

import pytest

from tests.cuda.shim import Compiler


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles each program once a session."""
    return Compiler(tmp_path_factory.mktemp("shim"))
