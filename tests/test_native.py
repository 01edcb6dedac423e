"""The extension module and its twin on PyTorch's own operations: which one runs, and as the stub file says."""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs import _native, composed
from cat_rs._native import _core
from tests.backends import about_kernels

PACKAGE = Path(cat_rs.__file__).parent
INSTALLED = ".".join(torch.__version__.split("+")[0].split(".")[:2])


# One fresh interpreter for all cases: importing PyTorch is what takes time.
IMPORT_CASES = f"""
import json, os, sys, warnings
import torch

sys.path.insert(0, {str(PACKAGE.parent)!r})
installed = torch.__version__


def attempt(version, backend=""):
    os.environ["CAT_RS_BACKEND"], torch.__version__ = backend, version
    error = why = loss = None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            import cat_rs
            from cat_rs import _native
            why = _native.WHY_COMPOSED
            loss = float(cat_rs.cat_loss(*[torch.full((1, 2), float(n)) for n in range(4)]))
        except ImportError as refused:
            error = str(refused)
    for name in [name for name in sys.modules if name.startswith("cat_rs")]:
        del sys.modules[name]
    texts = [str(warning.message) for warning in seen if "cat_rs" in str(warning.message)]
    return {{"error": error, "why": why, "loss": loss, "warnings": texts}}


print(json.dumps({{
    "another": attempt("9.99.1+cpu"),
    "patch-release": attempt("{INSTALLED}.99"),
    "installed": attempt(installed),
    "forced": attempt(installed, "torch"),
    "unknown": attempt(installed, "cuda"),
}}))
"""


@functools.cache
def import_results() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CASES], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@about_kernels
def test_beside_another_pytorch_its_own_operations_run_and_one_warning_says_why() -> None:
    result = import_results()["another"]
    (warning,) = result["warnings"]
    assert result["why"] in warning
    assert "9.99.1" in warning
    assert INSTALLED in warning
    assert result["loss"] == 1.0 + 1.0


@about_kernels
@pytest.mark.parametrize("case", ["patch-release", "installed"])
def test_the_extension_runs_beside_its_own_minor(case: str) -> None:
    assert import_results()[case] == {"error": None, "why": None, "loss": 2.0, "warnings": []}


def test_pytorchs_own_operations_can_be_asked_for() -> None:
    result = import_results()["forced"]
    assert result == {"error": None, "why": "CAT_RS_BACKEND=torch", "loss": 2.0, "warnings": []}
    assert "must be torch or unset, got 'cuda'" in import_results()["unknown"]["error"]


def test_a_wheel_with_extensions_for_many_is_read_by_the_installed_minor(tmp_path: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    tagged = {minor: tmp_path / f"_core_torch{minor.replace('.', '_')}{suffix}" for minor in ("2.12", "2.13")}
    for file in tagged.values():
        file.touch()
    (tmp_path / "_core_torch2_14.cpython-39-x86_64-linux-gnu.so").touch()
    assert _native._extension_file(tmp_path, "2.12") == tagged["2.12"]
    assert _native._extension_file(tmp_path, "2.13") == tagged["2.13"]
    assert _native._extension_file(tmp_path, "2.14") is None
    with pytest.raises(
        ImportError, match=r"no extension for PyTorch 2\.14\.1\+cpu .*\(for 2\.12 and 2\.13 and 2\.14\)"
    ):
        _native._load(tmp_path, "2.14.1+cpu")
    built = tmp_path / f"_core{suffix}"
    built.touch()
    assert _native._extension_file(tmp_path, "2.14") == built
    # One that does not load, as where PyTorch lacks its symbols.
    with pytest.raises(ImportError, match=r"does not load beside PyTorch 2\.14\.1"):
        _native._load(tmp_path, "2.14.1+cpu")


@about_kernels
def test_build_info_is_complete() -> None:
    info = _core.build_info()
    assert {"version", "torch", "simd"} <= set(info)
    assert info["torch"].startswith(INSTALLED)
    assert all(isinstance(value, str) and value for value in info.values())


def _stub_functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


# What only an extension can say.
BUILD_FUNCTIONS = {"build_info", "compile_kernels", "cuda_architectures", "cuda_versions"}


@about_kernels
def test_the_stub_lists_the_modules_functions() -> None:
    assert set(_stub_functions()) == {name for name in dir(_core) if not name.startswith("_")}


def test_both_implementations_have_the_same_functions() -> None:
    assert set(composed.__all__) == set(_stub_functions()) - BUILD_FUNCTIONS


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(pytest.param(_core, name, marks=about_kernels, id=name) for name in sorted(_stub_functions())),
        *(pytest.param(composed, name, id=f"composed {name}") for name in composed.__all__),
    ],
)
def test_the_stub_has_the_functions_arguments(module: Any, name: str) -> None:
    stub = _stub_functions()[name].args
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    keyword_only = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert [argument.arg for argument in stub.args] == positional
    assert [argument.arg for argument in stub.kwonlyargs] == keyword_only


def test_every_public_name_exists_and_is_documented() -> None:
    for name in cat_rs.__all__:
        assert (getattr(cat_rs, name).__doc__ or "").strip(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = cat_rs.no_such_name
