"""How a call ended, and whether its error tells what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cat_rs.errors import CatRsError
from tests.fuzz.make import HostileError
from tests.fuzz.targets import Target

__all__ = ["KINDS", "Outcome", "outcome_of"]

KINDS = ("unmade", "ok", "clear", "unclear", "crash", "hang")
"""Its arguments could not be made; returned; raised an error that names argument, expectation and what came; raised
another; and did not return."""

# Python's own, of a call that does not fit the signature.
_SIGNATURE = re.compile(
    r"missing \d+ required|missing a required|unexpected keyword argument|positional argument|multiple values for"
    r"|takes no (keyword )?arguments"
)
# The dispatcher's own, of torch.ops: argument, expected type, type that came; operator and what it is not made for.
_SCHEMA = re.compile(
    r"Expected a value of type '.+' for argument '.+' but instead found type|is missing value for argument '"
    r"|Unknown keyword argument '|Expected at most \d+ argument|expected at most \d+ argument"
    r"|Could not run 'cat_rs::\w+' with arguments from the '\w+' backend|Batching rule not implemented for cat_rs::"
    r"|cat_rs\.\w+\.default (got mixed torch.Tensor and DTensor|does not have a sharding strategy registered)"
    r"|Trying to backward through cat_rs\.\w+\.default but no autograd formula was registered"
)
# PyO3's own: argument, type that came, type expected.
_CONVERSION = re.compile(
    r"argument '.+': ('.+' object (cannot be (converted to|interpreted as)|is not an instance of) "
    r"|must be .+, not |expected .+, not )"
)
_EXPECTED = re.compile(r"\bmust\b|\bexpected\b|\bshould be\b", re.IGNORECASE)
_GOT = re.compile(r"\bgot\b|\bbut\b")
_MEMORY = re.compile(r"not enough memory|allocate \d+ bytes")


@dataclass(frozen=True)
class Outcome:
    """Of a call.

    Attributes:
        kind: One of ``KINDS``.
        error: The exception's class, the signal's name, or empty.
        text: The exception's text, or what the process wrote as it died.
        place: Where the error was raised, function and line of the innermost frame.
    """

    kind: str
    error: str = ""
    text: str = ""
    place: str = ""

    def group(self) -> tuple[str, str, str]:
        """Equal for failures that look alike."""
        text = re.sub(r"0x[0-9a-f]+|\d[\d.e+]*", "N", self.text.strip().partition("\n")[0])
        return self.kind, self.error, re.sub(r"'[^']{0,200}'|\[[N, -]*\]|/\S+", "_", text)[:160]


def outcome_of(target: Target, error: BaseException | None) -> Outcome:
    """What a call that returned, or raised, is counted as."""
    if error is None or isinstance(error, HostileError):
        return Outcome("ok")
    # What the package adds to an error of the caller's own code.
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    kind = "clear" if is_clear(target, error, text) else "unclear"
    return Outcome(kind, type(error).__name__, text[:2000], _place(error))


def is_clear(target: Target, error: BaseException, text: str) -> bool:
    """Whether the text names an argument, what was expected and what came; or says the same in Python's own words."""
    if isinstance(error, TypeError) and (_SIGNATURE.search(text) or _CONVERSION.search(text)):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if isinstance(error, RuntimeError) and _SCHEMA.search(text):
        return True
    if _MEMORY.search(text):
        return True
    own = isinstance(error, CatRsError) or hasattr(error, "__notes__")
    if not own and type(error) not in (TypeError, ValueError, OverflowError):
        return False
    return bool(_EXPECTED.search(text) and _GOT.search(text) and _names_argument(target, text))


def _names_argument(target: Target, text: str) -> bool:
    names = {each.name for each in target.parameters} | _OF_OBJECTS
    # A reader of files names the file.
    named = (re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) for name in names)
    return any(named) or "/" in text or "outside of FakeTensorMode" in text


_OF_OBJECTS = frozenset(
    ("params", "model", "scheduler", "latents", "pictures", "encoder", "lr", "betas", "eps", "weight_decay")
)
"""What an object or a parameter group was made of, and its methods may complain of."""


def _place(error: Any) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_name}, {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
