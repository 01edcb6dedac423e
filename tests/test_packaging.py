"""Versions agree wherever they are written, and a build for the wrong PyTorch is refused."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def torch_env() -> ModuleType:
    return script("torch_env")


@pytest.fixture(scope="module")
def release_check() -> ModuleType:
    return script("release_check")


def test_the_version_is_the_newest_release_of_the_changelog() -> None:
    released = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"))
    assert released == sorted(released, key=lambda version: [*map(int, version.split("."))], reverse=True)
    (version,) = re.findall(r'(?m)^version = "(.+)"$', read("Cargo.toml"))
    (locked,) = re.findall(r'(?m)^name = "cat-rs"\nversion = "(.+)"$', read("Cargo.lock"))
    assert version == locked == released[0]
    assert read("CHANGELOG.md").index("## [Unreleased]") < read("CHANGELOG.md").index(f"## [{version}]")


def test_one_default_pytorch(torch_env: ModuleType) -> None:
    text = read("pyproject.toml") + read("Makefile")
    pins = re.findall(r"torch==(\d+\.\d+)\.\*", text)
    assert len(pins) == 2
    assert len(set(pins)) == 1
    assert torch_env.TCH_FOR_TORCH[pins[0]] == torch_env.locked_tch(read("Cargo.lock"))


def test_metadata_allows_every_pytorch_of_the_table(torch_env: ModuleType) -> None:
    first, *_, last = torch_env.TCH_FOR_TORCH
    following = f"2.{int(last.split('.')[1]) + 1}"
    assert f'dependencies = ["torch>={first},<{following}", ' in read("pyproject.toml")


def test_cargo_allows_every_tch_of_the_table(torch_env: ModuleType) -> None:
    bounds = re.findall(r'(?m)^(?:tch|torch-sys|pyo3-tch) = \{ version = ">=0\.(\d+), <0\.(\d+)"', read("Cargo.toml"))
    minors = [int(tch.split(".")[1]) for tch in torch_env.TCH_FOR_TORCH.values()]
    assert bounds == [(str(min(minors)), str(max(minors) + 1))] * 3


def test_lock_for_another_pytorch_is_refused(torch_env: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"tch 0\.24, which is for PyTorch 2\.11, but .* has PyTorch 2\.13"):
        torch_env.variables("2.13", "0.24")


@pytest.mark.parametrize(("minor", "added"), [("2.13", False), ("2.14", True), ("2.15", True)])
def test_a_pytorch_that_dropped_functions_gets_them_back(minor: str, added: bool, torch_env: ModuleType) -> None:
    flags = torch_env.variables(minor, "0.26").get("CXXFLAGS", "")
    header = re.search(r"-std=c\+\+20 -include (\S+)", flags)
    assert (header is not None) == added
    assert header is None or Path(header[1]).is_file()


def test_unknown_pytorch_is_refused(torch_env: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"has PyTorch 3\.0.*2\.11, 2\.12, 2\.13, 2\.14, 2\.15"):
        torch_env.variables("3.0", "0.26")


def test_tests_of_planted_faults_exist() -> None:
    named = re.findall(r'"(tests/[^"]+)"', read("scripts/mutants.py"))
    assert named
    assert all((ROOT / name).exists() for name in named)


RELEASE = {
    "Cargo.toml": '[package]\nname = "cat-rs"\nversion = "1.2.3"\n',
    "Cargo.lock": '[[package]]\nname = "cat-rs"\nversion = "1.2.3"\n',
    "CHANGELOG.md": "## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n- New.\n\n## [1.2.2] - 2026-01-01\n\n- Old.\n",
    "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\ndate-released: 2026-01-02\n",
}


@pytest.mark.parametrize("tags", [([], []), (["v1.2.3"], ["v1.2.2", "v1.2.3"]), (["nightly"], ["nightly"])])
def test_a_release_that_agrees(release_check: ModuleType, tags: tuple[list[str], list[str]]) -> None:
    assert release_check.disagreements(RELEASE, *tags) == []
    assert release_check.notes(RELEASE["CHANGELOG.md"], "1.2.3") == "- New.\n"


@pytest.mark.parametrize(
    ("file", "before", "after", "expected"),
    [
        ("Cargo.toml", "1.2.3", "1.3.0", ["Cargo.lock", "CHANGELOG.md", "CITATION.cff"]),
        ("Cargo.lock", "1.2.3", "1.2.2", ["Cargo.lock"]),
        ("CHANGELOG.md", "[Unreleased]", "[Unreleased]\n\n- Not yet.", ["CHANGELOG.md"]),
        ("CHANGELOG.md", "## [1.2.3] - 2026-01-02", "## [1.2.3]", ["CHANGELOG.md", "CITATION.cff"]),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", ["CITATION.cff"]),
        ("CITATION.cff", "2026-01-02", "2026-01-03", ["CITATION.cff"]),
    ],
)
def test_files_that_disagree_stop_a_release(
    release_check: ModuleType, file: str, before: str, after: str, expected: list[str]
) -> None:
    found = release_check.disagreements(RELEASE | {file: RELEASE[file].replace(before, after)}, [], [])
    assert [text.partition(":")[0] for text in found] == expected, found


@pytest.mark.parametrize(
    ("head", "everywhere", "message"),
    [
        (["v1.2.2"], ["v1.2.2"], "expected v1.2.3 at this commit, got v1.2.2"),
        (["v1.2.3", "v2.0.0"], ["v1.2.3", "v2.0.0"], "expected v1.2.3 at this commit, got v1.2.3, v2.0.0"),
        ([], ["v1.2.3"], "got it at another"),
    ],
)
def test_tags_that_disagree_stop_a_release(
    release_check: ModuleType, head: list[str], everywhere: list[str], message: str
) -> None:
    (found,) = release_check.disagreements(RELEASE, head, everywhere)
    assert message in found


@pytest.mark.parametrize(
    ("requirement", "minors"), [("torch==2.13.*", ["2.13"]), ("torch>=2.11,<2.13", ["2.11", "2.12"])]
)
def test_a_wheel_is_tested_beside_what_it_allows(
    release_check: ModuleType, tmp_path: Path, requirement: str, minors: list[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a-1.dist-info/METADATA", f"Name: a\nRequires-Dist: numpy>=1\nRequires-Dist: {requirement}\n")
    assert release_check.minors_beside(tmp_path / "a.whl") == minors


def test_the_citation_names_the_newest_release(release_check: ModuleType) -> None:
    texts = {name: read(name) for name in RELEASE}
    found = release_check.disagreements(texts, [], [])
    assert all("[Unreleased]" in text for text in found), found


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("dependabot", ".github/dependabot.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_for_a_forge_fit_their_schemas(schema: str, files: str) -> None:
    pytest.importorskip("check_jsonschema")
    paths = sorted(ROOT.glob(files))
    assert paths
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_run_what_is_there_on_every_python() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / ".github/workflows").glob("*.yml"))
    targets = set(re.findall(r"(?m)^([\w-]+):", read("Makefile")))
    assert {*re.findall(r"\bmake ([\w-]+)", text)} <= targets
    for path in re.findall(r"(?:python|=python) (\S+\.py|\S+/run)\b", text):
        assert (ROOT / path).is_file(), path
    versions = re.findall(r'(?m)^    "Programming Language :: Python :: (3\.\d+)",$', read("pyproject.toml"))
    for matrix in re.findall(r"python: \[(.+)\]", text):
        assert re.findall(r"[\d.]+", matrix) == versions
    # An action by its tag may change under us.
    for action in re.findall(r"uses: \S+@(\S+)", text):
        assert re.fullmatch(r"[0-9a-f]{40}", action), action
