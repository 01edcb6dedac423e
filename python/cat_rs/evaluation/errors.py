"""The exceptions of `cat_rs.evaluation` and `cat_rs.report`."""

from __future__ import annotations

from cat_rs.errors import CatRsError


class EvaluationInputError(CatRsError, ValueError):
    """A picture, prompt, setting or result that cannot be evaluated; the text names it."""


class EvaluationFileError(CatRsError, OSError):
    """A file or folder that is missing or cannot be read; the text names it."""
