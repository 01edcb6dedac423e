"""Files of adapters, mutated: each is read, or refused by an error that names it.

``python -m tests.fuzz.adapter_files SEED`` reads one of them in this process.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cat_rs
from cat_rs.errors import CatRsError
from tests.fuzz import make
from tests.fuzz.children import run_all
from tests.fuzz.outcome import Outcome

__all__ = ["MutatedFile", "mutated", "run"]

MEMORY = 128 << 20
"""Address space that reading may take; the files have some kilobytes."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "F32", "F64", "F4", "I64", "BOOL", "C64", "F8_E4M3", "\ud800", "\0", "ü" * 1000, "NaN", "1" * 5000),
    *("(a+)+$", "(.*)*x", "(", "[", "*", "^" * 2000, "(?P<a>", "a{1000000000}", "(" * 500, "\\", ".*" * 60 + "z"),
    *("{}", "[]", "null", "1e999", "[" * 3000, "{" * 3000, '{"lora_alpha": NaN}', '{"r": -1}', "LORA", "lora"),
    *([], {}, [0], [0, 0], [-1, 4], [2**40, 2**40], [2**63, 2**63], [0.5], [[1]], ["a"], {"a": {}}, [1] * 5000),
    *(float("nan"), float("inf")),
)
KEYS = ("", "a", "__metadata__", "dtype", "shape", "data_offsets", "lora_alpha", "r", "alpha_pattern", "rank_pattern")
NAMES = (
    "lora_A.weight",
    ".alpha",
    "lora_up.weight",
    "unet..lora_A.weight",
    "a" * 100_000,
    "unet.\n.lora_A.weight",
    "/",
)


@dataclass(frozen=True)
class MutatedFile:
    """A file that its seed tells."""

    seed: str

    def reproduction(self) -> str:
        """A command that reads it."""
        return f"python -m tests.fuzz.adapter_files {self.seed}"

    def write(self) -> str:
        """Writes it, and returns its path."""
        rng = random.Random(self.seed)
        contents = dict(make.adapter_contents(rng.choice(make.ADAPTER_FORMATS)))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            name = rng.choice(sorted(contents))
            mutate = rng.choice(_JSON if name.endswith(".json") else _TENSORS)
            contents[name] = mutate(contents[name], rng)
        folder = Path(tempfile.mkdtemp())
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        if rng.random() < 0.02:
            _make_special(folder / rng.choice(sorted(contents)), rng)
        return str(folder if len(contents) > 1 else folder / next(iter(contents)))


def mutated(seed: int, count: int) -> list[MutatedFile]:
    """Files, the same for the same seed."""
    return [MutatedFile(f"{seed}/{number}") for number in range(count)]


def run(files: Sequence[MutatedFile]) -> Iterator[Outcome]:
    """What becomes of reading each."""
    return run_all(files, _read, memory=MEMORY)


def _read(file: MutatedFile) -> Outcome:
    make.begun[0] = False
    path = file.write()
    make.begun[0] = True
    try:
        cat_rs.load_lora(path).load_into(make.bare_unet())
    except BaseException as error:
        named = os.path.dirname(path) in str(error) or "`model`" in str(error)
        # What does not fit the model is refused by layer, the file itself was read.
        named = named or (isinstance(error, CatRsError) and "load_into" in _functions(error))
        clear = named and isinstance(error, CatRsError | OSError)
        return Outcome("clear" if clear else "unclear", type(error).__name__, str(error)[:2000], _functions(error)[-1])
    return Outcome("ok")


def _functions(error: BaseException) -> list[str]:
    """Those that the error came through, the innermost last."""
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return names


# ---- mutations of bytes


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _lengthened(content: bytes, rng: random.Random) -> bytes:
    return content + bytes(rng.choice((1, 8, 5000)))


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 20))):
        if changed:
            # Mostly in the header, which is what is read with care.
            changed[rng.randrange(min(len(changed), rng.choice((8, 600, len(changed)))))] = rng.randrange(256)
    return bytes(changed)


def _repeated(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start : start + 50] * 3 + content[start + 50 :]


def _other_length(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little") + rng.choice((-8, -1, 1, 8, 1000))
    length = rng.choice((length, 0, 2, 100_000_000, 2**32, 2**63, 2**64 - 1))
    return (length % 2**64).to_bytes(8, "little") + content[8:]


# ---- mutations of JSON


def _changed_json(text: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except ValueError:
        return _flipped(text, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed(value, rng)
    changed = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        changed = changed.replace(b"{", b'{"r": 1, "r": 1e999, ', 1)
    return changed


def _changed(value: Any, rng: random.Random) -> Any:
    """One value somewhere within replaced, added or taken out; JSON within strings too."""
    if isinstance(value, str) and value.startswith("{") and rng.random() < 0.7:
        return _changed_json(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.75:
            return {**value, key: _changed(value[key], rng)}
        if kind < 0.85:
            return {name: each for name, each in value.items() if name != key}
        renamed = rng.choice((*KEYS, *NAMES, key + rng.choice(NAMES), key[:-1], *sorted(value)))
        return {**value, renamed: rng.choice((value[key], rng.choice(VALUES)))}
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], _changed(value[index], rng), *value[index + 1 :]]
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-8, -1, 1, 8))
    return rng.choice(VALUES)


def _changed_header(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = _changed_json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_cut, _lengthened, _flipped, _repeated)
_JSON = (*_BYTES, *[_changed_json] * 12)
_TENSORS = (*_BYTES, _other_length, *[_changed_header] * 12)


def _make_special(path: Path, rng: random.Random) -> None:
    """Something else in the file's place."""
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind < 4:
        path.symlink_to(("/dev/zero", path)[kind - 2])


if __name__ == "__main__":
    cat_rs.load_lora(MutatedFile(sys.argv[1]).write()).load_into(make.bare_unet())
