"""The environment in which Cargo builds against this interpreter's PyTorch.

As a script: `python scripts/torch_env.py cargo test --no-default-features` runs a command in it.

torch-sys asks the first `python3` on PATH (`python` where VIRTUAL_ENV is set) for libtorch, which need not be the
interpreter that the extension is built for: in a build with isolation it hardly ever is.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# tch 0.24 is made for PyTorch 2.11, tch 0.26 for 2.13; 0.25 was never released. tch 0.26 compiles against 2.12 as it
# is, and against 2.14 and 2.15 with the additions of `variables`.
TCH_FOR_TORCH = {"2.11": "0.24", "2.12": "0.26", "2.13": "0.26", "2.14": "0.26", "2.15": "0.26"}


def torch_minor() -> str:
    """The installed PyTorch as "2.13"."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"error: PyTorch is not installed for {sys.executable}: pip install torch") from None
    return ".".join(version.split(".")[:2])


def locked_tch(lock: str) -> str:
    """The minor version of tch in the text of a Cargo.lock, e.g. "0.26"."""
    match = re.search(r'name = "tch"\nversion = "(\d+\.\d+)\.', lock)
    if match is None:
        raise SystemExit("error: Cargo.lock names no version of tch")
    return match.group(1)


def variables(minor: str, tch: str) -> dict[str, str]:
    """What torch-sys and the compilers need to build `tch` against the installed PyTorch `minor`."""
    if TCH_FOR_TORCH.get(minor) != tch:
        fits = " or ".join(torch for torch, other in TCH_FOR_TORCH.items() if other == tch) or "no known one"
        raise SystemExit(
            f"error: Cargo.lock holds tch {tch}, which is for PyTorch {fits}, but {sys.executable} has PyTorch "
            f"{minor}. `make wheel` builds for the others ({', '.join(TCH_FOR_TORCH)})."
        )
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: PyTorch is not installed for {sys.executable}: pip install torch")
    torch = Path(spec.origin).parent
    result = {
        # torch-sys only looks whether it is set, but builds anew when its value changes: naming the PyTorch and
        # the interpreter keeps a target folder from linking to a PyTorch that is gone.
        "LIBTORCH_USE_PYTORCH": f"{torch} {importlib.metadata.version('torch')} {sys.implementation.cache_tag}",
        # torch-sys takes one patch version only; the minor was compared above.
        "LIBTORCH_BYPASS_VERSION_CHECK": "1",
        # Rust's test programs look for libtorch here; the Python module needs no such thing.
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(torch / "lib"), os.environ.get("LD_LIBRARY_PATH")])),
    }
    if minor in ("2.14", "2.15"):
        header = shlex.quote(str(ROOT / "scripts" / "torch_2_14.h"))
        result["CXXFLAGS"] = f"{os.environ.get('CXXFLAGS', '')} -std=c++20 -include {header}".strip()
        result["CC_SHELL_ESCAPED_FLAGS"] = "1"  # the path may hold a space
    return result


@contextmanager
def torch_environment() -> Iterator[dict[str, str]]:
    """This process's environment, with the variables and with this interpreter first on PATH."""
    with tempfile.TemporaryDirectory(prefix="cat-rs-python-") as folder:
        for name in ("python", "python3"):
            # Not a link: Python would not find its virtual environment through one.
            path = Path(folder, name)
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
            path.chmod(0o755)
        environment = dict(os.environ)
        environment |= variables(torch_minor(), locked_tch((ROOT / "Cargo.lock").read_text(encoding="utf-8")))
        scripts = Path(sys.executable).parent
        environment["PATH"] = os.pathsep.join([folder, str(scripts), os.environ.get("PATH", os.defpath)])
        if sys.prefix != sys.base_prefix:
            environment["VIRTUAL_ENV"] = sys.prefix
        yield environment


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python scripts/torch_env.py COMMAND [ARGUMENT...]", file=sys.stderr)
        return 2
    with torch_environment() as environment:
        return subprocess.run(sys.argv[1:], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
