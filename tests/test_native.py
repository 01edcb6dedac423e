"""The extension module: refused beside another PyTorch, and as its stub file says."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs import _core

PACKAGE = Path(cat_rs.__file__).parent
INSTALLED = ".".join(torch.__version__.split("+")[0].split(".")[:2])


# One fresh interpreter for all cases: importing PyTorch is what takes time.
IMPORT_CASES = f"""
import importlib.metadata, json, sys
import torch

sys.path.insert(0, {str(PACKAGE.parent)!r})
installed = torch.__version__


def no_metadata(name):
    raise importlib.metadata.PackageNotFoundError(name)


def attempt(requirements, version):
    importlib.metadata.requires = no_metadata if requirements is None else lambda name: requirements
    torch.__version__ = version
    try:
        import cat_rs
        error = None
    except ImportError as refused:
        error = str(refused)
    loaded = "cat_rs._core" in sys.modules
    for name in [name for name in sys.modules if name.startswith("cat_rs")]:
        del sys.modules[name]
    return {{"error": error, "loaded": loaded}}


print(json.dumps({{
    "pin": attempt(["numpy>=1.24", "torch==1.7.*", "torchvision==0.1"], installed),
    "marker": attempt(["torch ==1.7.*; python_version > '3'"], installed),
    "exact": attempt(["torch==1.7.1"], installed),
    "patch-release": attempt(["torch=={INSTALLED}.*"], "{INSTALLED}.99"),
    "built-with": attempt(None, "9.99.1+cpu"),
    "source-tree": attempt(None, installed),
}}))
"""


@functools.cache
def import_results() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CASES], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_names_both(error: str, built: str, installed: str) -> None:
    assert f"built for PyTorch {built}" in error
    assert f"PyTorch {installed} is installed" in error
    assert f'pip install "torch=={built}.*"' in error


@pytest.mark.parametrize("case", ["pin", "marker", "exact"])
def test_refuses_another_pytorch_by_its_metadata(case: str) -> None:
    result = import_results()[case]
    assert_names_both(result["error"], "1.7", torch.__version__)
    # Beside another PyTorch the extension may lack symbols, or crash.
    assert not result["loaded"]


def test_refuses_another_pytorch_by_what_it_was_built_with() -> None:
    # No distribution metadata, as in a source tree: the extension itself knows.
    assert_names_both(import_results()["built-with"]["error"], INSTALLED, "9.99.1+cpu")


@pytest.mark.parametrize("case", ["patch-release", "source-tree"])
def test_imports_beside_its_own_minor(case: str) -> None:
    assert import_results()[case] == {"error": None, "loaded": True}


def test_build_info_is_complete() -> None:
    info = _core.build_info()
    assert {"version", "torch", "simd"} <= set(info)
    assert info["torch"].startswith(INSTALLED)
    assert all(isinstance(value, str) and value for value in info.values())


def _stub_functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_stub_lists_the_modules_functions() -> None:
    assert set(_stub_functions()) == {name for name in dir(_core) if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(_stub_functions()))
def test_the_stub_has_the_functions_arguments(name: str) -> None:
    stub = _stub_functions()[name].args
    parameters = inspect.signature(getattr(_core, name)).parameters.values()
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
