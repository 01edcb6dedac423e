"""The one place that imports the extension module, after checking that it fits the installed PyTorch."""

import importlib.metadata

# libtorch's libraries are found through the already imported PyTorch: the extension carries no path to them.
import torch


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _required_torch() -> str | None:
    """The PyTorch minor that the installed distribution asks for, e.g. "2.13"; None for a source tree."""
    try:
        requirements = importlib.metadata.requires("cat-rs") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pins = [line for line in requirements if line.split("==")[0].strip() == "torch"]
    return _minor(pins[0].split("==")[1].split(";")[0].strip()) if pins else None


def _mismatch(built: str) -> ImportError:
    return ImportError(
        f"cat_rs was built for PyTorch {built}, but PyTorch {torch.__version__} is installed. "
        f'Install the PyTorch it was built for: pip install "torch=={built}.*" '
        f"or a cat-rs built for PyTorch {_minor(torch.__version__)}."
    )


# Before the import, because another PyTorch may lack the symbols that the extension needs.
_required = _required_torch()
if _required is not None and _required != _minor(torch.__version__):
    raise _mismatch(_required)

from cat_rs import _core  # noqa: E402

if _minor(_core.build_info()["torch"]) != _minor(torch.__version__):
    raise _mismatch(_minor(_core.build_info()["torch"]))

__all__ = ["_core"]
