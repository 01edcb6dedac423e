"""Models on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

_SECONDS = 10.0


def refusal(model: str | os.PathLike[str]) -> str | None:
    """Ask the hub for a model once, and return why it cannot give it; None where it can, and for a folder.

    The loaders of diffusers and transformers ask for each file six times within half a minute, and then tell that the
    file does not exist. With a refusal, `local_files_only` lets them look into the hub's cache alone.
    """
    if Path(model).is_dir():
        return None
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(os.fspath(model), timeout=_SECONDS)
    except Exception as error:
        # Those of its HTTP library, whichever that is, of the hub, and of names that it cannot have.
        return f"no such folder, and the hub does not give it: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """Return the beginning of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
