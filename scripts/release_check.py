"""Check a release: version, tag and changelog agree; its wheel and source archive work beside every PyTorch.

`make release-check` stops at the first thing that is not as it should be. It builds into dist/, and tests in
environments in build/release, each with nothing but PyTorch, the file, what its extra `train` names, and pytest.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from torch_env import ROOT, TCH_FOR_TORCH

# Operations, the step, and files: what differs from one PyTorch to another.
TESTS = ("tests/ops", "tests/step", "tests/adapter_file", "tests/test_native.py", "tests/test_peft.py")
TOOLS = ("pytest>=8", "tokenizers")
WORK = ROOT / "build" / "release"


def disagreements(texts: dict[str, str], head_tags: Sequence[str], all_tags: Sequence[str]) -> list[str]:
    """Return what keeps the sources from being a release.

    Args:
        texts: Cargo.toml, Cargo.lock, CHANGELOG.md and CITATION.cff.
        head_tags: The tags of the commit.
        all_tags: Those of the repository.
    """
    version = _only(r'^version = "(.+)"$', texts["Cargo.toml"])
    released = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", texts["CHANGELOG.md"])
    newest, date = released[0] if released else ("none", "none")
    tag = f"v{version}"
    versions = [name for name in head_tags if re.match(r"v\d", name)]
    found = {
        f"Cargo.lock: expected cat-rs {version}": _only(r'^name = "cat-rs"\nversion = "(.+)"$', texts["Cargo.lock"])
        == version,
        f"CHANGELOG.md: expected {version} as the newest released section, got {newest}": newest == version,
        f"CHANGELOG.md: expected nothing under [Unreleased]; its entries belong to {version}": not _section(
            texts["CHANGELOG.md"], "Unreleased"
        ),
        f"CITATION.cff: expected version {version} of {date}": (
            _only(r"^version: (.+)$", texts["CITATION.cff"]),
            _only(r"^date-released: (.+)$", texts["CITATION.cff"]),
        )
        == (version, date),
        f"tags: expected {tag} at this commit, got {', '.join(versions)}": versions in ([], [tag]),
        f"tags: expected {tag} at this commit, got it at another": tag in head_tags or tag not in all_tags,
    }
    return [text for text, agrees in found.items() if not agrees]


def notes(changelog: str, version: str) -> str:
    """Return the section of a version."""
    return _section(changelog, version) + "\n"


def minors_beside(wheel: Path) -> list[str]:
    """Return the PyTorch minors that a wheel's metadata allows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    requirements = map(Requirement, metadata.get_all("Requires-Dist", []))
    (torch,) = (requirement for requirement in requirements if requirement.name == "torch")
    return [minor for minor in TCH_FOR_TORCH if torch.specifier.contains(f"{minor}.0")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--versions-only", action="store_true", help="build nothing")
    part.add_argument("--files-only", action="store_true", help="build and test what may not be a release")
    part.add_argument("--notes", action="store_true", help="print what the changelog says of the version")
    options = parser.parse_args()
    texts = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("Cargo.toml", "Cargo.lock", "CHANGELOG.md", "CITATION.cff")
    }
    if options.notes:
        print(notes(texts["CHANGELOG.md"], _only(r'^version = "(.+)"$', texts["Cargo.toml"])), end="")
        return
    if not options.files_only:
        found = disagreements(texts, git("tag", "--points-at", "HEAD"), git("tag"))
        if changed := git("status", "--porcelain"):
            found.append(f"expected a work tree without changes, got {', '.join(changed)}")
        if found:
            raise SystemExit("\n".join(f"error: {text}" for text in found))
        print("version, tag and changelog agree", flush=True)
    if not options.versions_only:
        check_files()


def check_files() -> None:
    """Build both files and test them."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run("make", "wheel", f"PYTHON={sys.executable}")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    # Without isolation: an environment of its own would get a PyTorch, which an archive of sources does not need.
    options = ("--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", ROOT / "dist")
    run(sys.executable, "-m", "build", *options, ROOT)
    (archive,) = (ROOT / "dist").glob("*.tar.gz")
    minors = minors_beside(wheel)
    for minor in minors:
        test(f"torch=={minor}.*", f"{wheel}[train]")
    # From source it is built for one PyTorch.
    default = _only(r'^requires = .*"torch==(.+)\.\*"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    test(f"torch=={default}.*", f"{archive}[train]")
    print(f"{wheel.name} works beside PyTorch {', '.join(minors)}, and so does {archive.name}")


def test(*packages: str) -> None:
    """Run the tests with the packages in a fresh environment, of which only one is kept: each holds gigabytes."""
    venv.create(WORK, with_pip=True, clear=True)
    python = WORK / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *packages, *TOOLS)
    run(python, "-m", "pytest", "-q", *TESTS)


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def run(*command: str | Path) -> None:
    """Run a command in the repository's root, without what would lead it to this repository's package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed with exit status {done.returncode}")


def _section(changelog: str, name: str) -> str:
    """Return what stands under a heading of the second level; nothing if it is absent."""
    found = re.search(rf"(?ms)^## \[{re.escape(name)}\][^\n]*\n(.*?)(?=^## |^\[[^\]]+\]: |\Z)", changelog)
    return found[1].strip() if found else ""


def _only(pattern: str, text: str) -> str:
    """Return the group of a line that stands once; "none" where it does not."""
    found = re.findall(pattern, text, re.MULTILINE)
    return found[0] if len(found) == 1 else "none"


if __name__ == "__main__":
    main()
