"""Build a wheel of cat-rs for one PyTorch minor and the interpreter that runs this; optionally test it.

`python3.11 scripts/wheel.py 2.11 --test` writes dist/cat_rs-VERSION+torch2.11-cp311-cp311-linux_x86_64.whl. Work is
done in build/cp311-torch2.11: a virtual environment, a copy of the sources with the versions moved, a target folder.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from torch_env import ROOT, TCH_FOR_TORCH

SOURCES = (".cargo", "src", "python", "scripts", "Cargo.toml", "Cargo.lock", "build.rs", "pyproject.toml")
DOCUMENTS = ("README.md", "LICENSE-MIT", "LICENSE-APACHE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", metavar="TORCH", choices=TCH_FOR_TORCH, help=", ".join(TCH_FOR_TORCH))
    parser.add_argument("--test", action="store_true", help="install the wheel with its extras and run the tests")
    parser.add_argument("--jobs", help="compilers to run at once (default: Cargo's)")
    options = parser.parse_args()
    folder = ROOT / "build" / f"cp{sys.version_info.major}{sys.version_info.minor}-torch{options.torch}"
    python = prepare_environment(folder / "venv", options.torch)
    prepare_sources(folder / "source", options.torch)
    wheel = build(python, folder, options.jobs)
    print(f"wrote {wheel.relative_to(ROOT)}", flush=True)
    if options.test:
        test(python, wheel)


def prepare_environment(folder: Path, torch: str) -> Path:
    """A virtual environment with the PyTorch to build for; its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    run(python, "-m", "pip", "install", f"torch=={torch}.*", "maturin>=1.9,<2", "setuptools")
    return python


def prepare_sources(folder: Path, torch: str) -> None:
    """A copy of the sources whose pins and Cargo.lock are those of `torch`; the work tree stays as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # New times of change: by the old ones Cargo would miss what was edited while the last build ran.
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES + DOCUMENTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore, copy_function=shutil.copy)
        else:
            shutil.copy(ROOT / name, folder / name)
    replace(folder / "pyproject.toml", r"torch==\d+\.\d+\.\*", f"torch=={torch}.*")
    # A local version: wheels for several PyTorch minors can lie side by side.
    replace(folder / "Cargo.toml", r'(?m)^(version = "[^"+]+)"$', rf'\1+torch{torch}"')
    for package in ("pyo3-tch", "tch"):
        run("cargo", "update", "-p", package, "--precise", f"{TCH_FOR_TORCH[torch]}.0", cwd=folder)


def replace(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"))
    if count == 0:
        raise SystemExit(f"error: {path.name} has nothing that matches {pattern}")
    path.write_text(text, encoding="utf-8")


def build(python: Path, folder: Path, jobs: str | None) -> Path:
    """The wheel's path in dist/."""
    staging = folder / "wheel"
    shutil.rmtree(staging, ignore_errors=True)
    environment = {"CARGO_TARGET_DIR": str(folder / "target"), **({"CARGO_BUILD_JOBS": jobs} if jobs else {})}
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", staging)
    run(python, "-m", "pip", "wheel", *options, folder / "source", environment=environment)
    (wheel,) = staging.glob("*.whl")
    (ROOT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy2(wheel, ROOT / "dist"))


def test(python: Path, wheel: Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[train,dev]")
    run(python, "-m", "pytest", cwd=ROOT)


def run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | (environment or {}), check=False)
    if result.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed with exit status {result.returncode}")


if __name__ == "__main__":
    main()
