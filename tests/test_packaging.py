"""Versions agree wherever they are written, and a build for the wrong PyTorch is refused."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def torch_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_env", ROOT / "scripts" / "torch_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_newest_release_of_the_changelog() -> None:
    released = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"))
    assert released == sorted(released, key=lambda version: [*map(int, version.split("."))], reverse=True)
    (version,) = re.findall(r'(?m)^version = "(.+)"$', read("Cargo.toml"))
    (locked,) = re.findall(r'(?m)^name = "cat-rs"\nversion = "(.+)"$', read("Cargo.lock"))
    assert version == locked == released[0]
    assert read("CHANGELOG.md").index("## [Unreleased]") < read("CHANGELOG.md").index(f"## [{version}]")


def test_one_default_pytorch(torch_env: ModuleType) -> None:
    text = read("pyproject.toml") + read("Makefile")
    pins = re.findall(r"torch==(\d+\.\d+)\.\*", text) + re.findall(r"(?m)^TORCH \?= (\S+)$", text)
    assert len(pins) == 4
    assert len(set(pins)) == 1
    assert torch_env.TCH_FOR_TORCH[pins[0]] == torch_env.locked_tch(read("Cargo.lock"))


def test_cargo_allows_every_tch_of_the_table(torch_env: ModuleType) -> None:
    bounds = re.findall(r'(?m)^(?:tch|torch-sys|pyo3-tch) = \{ version = ">=0\.(\d+), <0\.(\d+)"', read("Cargo.toml"))
    minors = [int(tch.split(".")[1]) for tch in torch_env.TCH_FOR_TORCH.values()]
    assert bounds == [(str(min(minors)), str(max(minors) + 1))] * 3


def test_lock_for_another_pytorch_is_refused(torch_env: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"tch 0\.24, which is for PyTorch 2\.11, but .* has PyTorch 2\.13"):
        torch_env.variables("2.13", "0.24")


def test_unknown_pytorch_is_refused(torch_env: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"has PyTorch 3\.0.*2\.11, 2\.12, 2\.13, 2\.15"):
        torch_env.variables("3.0", "0.26")


def test_tests_of_planted_faults_exist() -> None:
    named = re.findall(r'"(tests/[^"]+)"', read("scripts/mutants.py"))
    assert named
    assert all((ROOT / name).exists() for name in named)
