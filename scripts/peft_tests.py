"""Run PEFT's own LoRA tests on its layers as they are and on the fused ones; fail on a failure that is new.

Downloads the source archive of the installed PEFT, which holds the tests, and what they import, into a folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
SUITES = ("tests/test_custom_models.py", "tests/test_stablediffusion.py", "tests/test_lora_variants.py")
# Imported by the tests' helpers; without their dependencies, which would bring another torch or numpy.
NEEDED = (
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "attrs",
    "datasets",
    "dill",
    "frozenlist",
    "multidict",
    "multiprocess",
    "pandas",
    "parameterized",
    "propcache",
    "pyarrow",
    "python-dateutil",
    "pytz",
    "six",
    "tzdata",
    "xxhash",
    "yarl",
)
# PEFT's other methods with "lora" in their name have layers of their own.
CHOICE = "(Lora or lora) and not AdaLora and not Randlora"
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def fetch(folder: Path) -> Path:
    """The unpacked source archive."""
    version = importlib.metadata.version("peft")
    source = folder / f"peft-{version}"
    if not source.exists():
        archive = ["download", f"peft=={version}", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
        subprocess.run([*PIP, *archive, "--dest", str(folder)], check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as file:
            file.extractall(folder, filter="data")
        # The tests import each other relatively, and the archive lacks this file.
        (source / "tests" / "__init__.py").touch()
        subprocess.run([*PIP, "install", "--target", str(folder / "needed"), "--no-deps", *NEEDED], check=True)
    return source


def run(source: Path, *, fused: bool) -> tuple[set[str], str]:
    """The tests that did not pass, and pytest's closing line."""
    options = ["-q", "-o", "addopts=", "-o", "filterwarnings=", "-p", "peft_fused", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "CAT_RS_FUSED": str(int(fused)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(source.parent / "needed")]),
    }
    command = [sys.executable, "-m", "pytest", *options, "-k", CHOICE, "--tb=no", "-rfE", *SUITES]
    done = subprocess.run(command, cwd=source, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    bad = set(re.findall(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)", done.stdout, re.MULTILINE))
    return bad, done.stdout.strip().splitlines()[-1]


def main() -> int:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the archive is kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = fetch(options.folder.resolve())
    plain, plain_line = run(source, fused=False)
    fused, fused_line = run(source, fused=True)
    print(f"PEFT's layers:  {plain_line}\nfused layers:   {fused_line}")
    new = sorted(fused - plain)
    print(*(f"new: {name}" for name in new), sep="\n")
    print(f"{len(plain)} fail on PEFT's layers, {len(fused)} on the fused ones, {len(new)} of those are new")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
