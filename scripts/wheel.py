"""Build a wheel of cat-rs for the interpreter that runs this, with an extension for each PyTorch; optionally test it.

`python3.11 scripts/wheel.py --test` writes dist/cat_rs-VERSION-cp311-cp311-linux_x86_64.whl. Work is done in
build/cp311: a virtual environment, made anew for one PyTorch after the other (they are large), and below it
torch2.11 and so on: a copy of the sources with tch moved, and a target folder.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from torch_env import ROOT, TCH_FOR_TORCH

SOURCES = (".cargo", "src", "python", "scripts", "Cargo.toml", "Cargo.lock", "build.rs", "pyproject.toml")
DOCUMENTS = ("README.md", "LICENSE-MIT", "LICENSE-APACHE")
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
LARGEST_WHEEL = 8_000_000
WORK = ROOT / "build" / PYTHON
INTERPRETER = WORK / "venv" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ", ".join(TCH_FOR_TORCH)
    parser.add_argument("torch", metavar="TORCH", nargs="*", help=f"PyTorch minors to build for (default: {known})")
    parser.add_argument("--test", action="store_true", help="run the tests beside each of them")
    parser.add_argument("--jobs", help="compilers to run at once (default: Cargo's)")
    options = parser.parse_args()
    minors = options.torch or list(TCH_FOR_TORCH)
    if not {*minors} <= {*TCH_FOR_TORCH}:
        parser.error(f"TORCH must be of {known}, got {' '.join(minors)}")
    wheels = {minor: build(minor, options.jobs) for minor in minors}
    wheel = merge(wheels)
    print(f"wrote {wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    if wheel.stat().st_size > LARGEST_WHEEL:
        raise SystemExit(f"error: the wheel has more than {LARGEST_WHEEL / 1e6:.0f} MB")
    if options.test:
        for minor in minors:
            test(minor, wheel)


def folder_of(torch: str) -> Path:
    return WORK / f"torch{torch}"


def install_torch(torch: str) -> None:
    """Make the environment anew with one PyTorch: in one whose last change was killed, two may answer."""
    venv.create(WORK / "venv", with_pip=True, clear=True)
    run(INTERPRETER, "-m", "pip", "install", f"torch=={torch}.*", "maturin>=1.9,<2", "setuptools", "wheel")


def build(torch: str, jobs: str | None) -> Path:
    """A wheel with the extension for one PyTorch."""
    folder = folder_of(torch)
    install_torch(torch)
    prepare_sources(folder / "source", torch)
    staging = folder / "wheel"
    shutil.rmtree(staging, ignore_errors=True)
    environment = {"CARGO_TARGET_DIR": str(folder / "target"), **({"CARGO_BUILD_JOBS": jobs} if jobs else {})}
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", staging)
    run(INTERPRETER, "-m", "pip", "wheel", *options, folder / "source", environment=environment)
    (wheel,) = staging.glob("*.whl")
    return wheel


def prepare_sources(folder: Path, torch: str) -> None:
    """A copy of the sources whose Cargo.lock has the tch for `torch`; the work tree stays as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # New times of change: by the old ones Cargo would miss what was edited while the last build ran.
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES + DOCUMENTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore, copy_function=shutil.copy)
        else:
            shutil.copy(ROOT / name, folder / name)
    for package in ("pyo3-tch", "tch"):
        run("cargo", "update", "-p", package, "--precise", f"{TCH_FOR_TORCH[torch]}.0", cwd=folder)


def merge(wheels: dict[str, Path]) -> Path:
    """One wheel in dist/ with the extensions of all, each named for its PyTorch."""
    first = next(iter(wheels))
    folder = folder_of(first) / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    for minor, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            (extension,) = (name for name in archive.namelist() if re.fullmatch(r"cat_rs/_core\.[^/]*\.so", name))
            names = archive.namelist() if minor == first else [extension]
            archive.extractall(folder, names)
        file = folder / extension
        file.rename(file.with_name(file.name.replace("_core.", f"_core_torch{minor.replace('.', '_')}.")))
    (ROOT / "dist").mkdir(exist_ok=True)
    # It writes the list of files and their hashes anew.
    run(INTERPRETER, "-m", "wheel", "pack", folder, "--dest-dir", ROOT / "dist")
    return ROOT / "dist" / wheels[first].name


def test(torch: str, wheel: Path) -> None:
    install_torch(torch)
    run(INTERPRETER, "-m", "pip", "install", "--quiet", f"{wheel}[train,dev]")
    run(INTERPRETER, "-m", "pytest", cwd=ROOT)


def run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | (environment or {}), check=False)
    if result.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed with exit status {result.returncode}")


if __name__ == "__main__":
    main()
