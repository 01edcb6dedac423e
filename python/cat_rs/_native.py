"""The one place that chooses what the operations run on.

The extension, where one fits the installed PyTorch and has kernels for the device; else `cat_rs.composed`, which has
the extension's functions on PyTorch's own operations.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

# libtorch's libraries are found through the already imported PyTorch: the extension carries no path to them.
import torch

from cat_rs import composed

__all__ = ["KERNEL_DEVICES", "WHY_COMPOSED", "_core", "core_of"]

_FOLDER = Path(__file__).parent
_NAME = "cat_rs._core"
_TAGGED = "_core_torch"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _extension_file(folder: Path, minor: str) -> Path | None:
    """The extension of a wheel for this interpreter and PyTorch; one that was built in place has no PyTorch's name."""
    names = (f"{_TAGGED}{minor.replace('.', '_')}", "_core")
    files = (folder / f"{name}{suffix}" for name in names for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next(filter(Path.is_file, files), None)


def _tagged_minors(folder: Path) -> list[str]:
    """The PyTorch minors for which a wheel brought extensions, e.g. ["2.12", "2.13"]."""
    files = folder.glob(f"{_TAGGED}*")
    return sorted({file.name.removeprefix(_TAGGED).partition(".")[0].replace("_", ".") for file in files})


def _load(folder: Path, installed: str) -> Any:
    """The extension for the installed PyTorch.

    Raises:
        ImportError: There is none, with the reason and what would bring one.
    """
    minor = _minor(installed)
    file = _extension_file(folder, minor)
    if file is None:
        others = " and ".join(_tagged_minors(folder)) or "none"
        raise ImportError(
            f"it has no extension for PyTorch {installed} and {sys.implementation.cache_tag} (for {others}): install "
            f'one of these PyTorch versions, or a newer cat-rs: pip install -U "cat-rs"'
        )
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(file))
    spec = importlib.util.spec_from_file_location(_NAME, file, loader=loader)
    assert spec is not None
    try:
        extension = importlib.util.module_from_spec(spec)
        built = extension.build_info()["torch"]
    except ImportError as error:
        # Of another PyTorch, the extension may lack symbols.
        raise ImportError(f"its extension does not load beside PyTorch {installed}: {error}. {_rebuild()}") from error
    if _minor(built) != minor:
        raise ImportError(f"its extension was built for PyTorch {built}, not for {installed}. {_rebuild()}")
    sys.modules[_NAME] = extension
    return extension


def _rebuild() -> str:
    return "A build beside this PyTorch fits: see docs/installing.md"


def _choose() -> tuple[Any, str | None]:
    """What runs on the CPU, and why where it is not the extension."""
    backend = os.environ.get("CAT_RS_BACKEND", "")
    if backend not in ("", "torch"):
        raise ImportError(f"cat_rs: CAT_RS_BACKEND must be torch or unset, got {backend!r}")
    if backend:
        return composed, "CAT_RS_BACKEND=torch"
    try:
        return _load(_FOLDER, torch.__version__), None
    except ImportError as error:
        warnings.warn(f"cat_rs runs on PyTorch's own operations, not on its kernels: {error}", stacklevel=2)
        return composed, str(error)


if TYPE_CHECKING:
    from cat_rs import _core

    WHY_COMPOSED: str | None
else:
    _core, WHY_COMPOSED = _choose()


KERNEL_DEVICES: tuple[str, ...] = ()
"""The kinds of devices for which the extension has kernels."""
if WHY_COMPOSED is None:
    # ROCm's devices are called cuda too.
    KERNEL_DEVICES = ("cpu", "cuda") if torch.version.hip is None else ("cpu",)


def core_of(tensor: torch.Tensor | None) -> Any:
    """What runs an operation on the tensor's device: the extension, or PyTorch's own operations."""
    # The operations refuse None, and what is on meta and has no values, whatever computes.
    if (
        tensor is None
        or tensor.is_cpu
        or tensor.is_meta
        or WHY_COMPOSED is not None
        or tensor.device.type in KERNEL_DEVICES
    ):
        return _core
    _warn_of_device(tensor.device.type)
    return composed


@functools.cache
def _warn_of_device(kind: str) -> None:
    name = "AMD ROCm" if kind == "cuda" else kind
    warnings.warn(
        f"cat_rs has no kernels for {name}: it runs on PyTorch's own operations there. The CPU and NVIDIA GPUs have "
        "kernels",
        stacklevel=3,
    )
