"""The CUDA kernels on the CPU: their sources compiled as C++ behind shim.hpp, called with addresses of tensors."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# A kernel and the structure that it takes.
KERNEL = re.compile(r"__launch_bounds__\(THREADS\) (\w+)\(const (\w+) \w+\)")
DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
# Elements around a tensor that must stay as they are.
GUARD = 64


def real_of(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class Guarded:
    """A contiguous tensor between NaNs, `offset` elements behind a 64-byte boundary."""

    def __init__(self, values: torch.Tensor, offset: int = 0) -> None:
        self._memory = torch.full((values.numel() + 2 * GUARD + offset,), torch.nan, dtype=values.dtype)
        self._bounds = GUARD + offset, GUARD + offset + values.numel()
        assert self._memory.data_ptr() % 64 == 0
        self.tensor = self._memory[slice(*self._bounds)].view(values.shape)
        self.tensor.copy_(values)

    def __int__(self) -> int:
        return self.tensor.data_ptr()

    def check(self) -> torch.Tensor:
        """The tensor, of which nothing was written beyond its ends."""
        first, last = self._bounds
        assert self._memory[:first].isnan().all()
        assert self._memory[last:].isnan().all()
        return self.tensor


def unwritten(shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> Guarded:
    """Memory for a result; what a kernel leaves out stays NaN."""
    return Guarded(torch.full(tuple(shape), torch.nan, dtype=dtype), offset)


Value = int | float | torch.Tensor | Guarded | None


def pack(*values: Value) -> bytes:
    """A kernel's structure: every field has 8 bytes."""

    def field(value: Value) -> bytes:
        if isinstance(value, float):
            return struct.pack("<d", value)
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        return struct.pack("<Q", 0 if value is None else int(value))

    return b"".join(map(field, values))


def scalar(value: float | torch.Tensor) -> tuple[Value, Value, Value]:
    """The fields of a Scalar."""
    return (value, int(value.dtype == torch.float64), 0.0) if isinstance(value, torch.Tensor) else (None, 0, value)


class Program:
    """A program's kernels."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def run(self, kernel: str, parameter: bytes, blocks: Sequence[int] = (1, 1), *, backwards: bool = False) -> None:
        """Runs a kernel to its end."""
        assert len(parameter) == getattr(self._library, f"size_of_{kernel}")()
        run = getattr(self._library, f"run_{kernel}")
        run.restype = ctypes.c_char_p
        error = run(parameter, blocks[0], blocks[1], backwards)
        assert error is None, error.decode()


def source_of(name: str) -> str:
    """What NVRTC compiles."""
    return "".join(
        (ROOT / "src" / part).read_text(encoding="utf-8") for part in ("cuda/common.cuh", f"ops/{name}/kernel.cu")
    )


class Compiler:
    """Compiles programs into a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def library(self, name: str, defines: Mapping[str, torch.dtype], source: str, more: str = "") -> Path:
        """The shared library of a program."""
        lines = ['#include "shim.hpp"', *(f"#define {key} {DTYPES[dtype]}" for key, dtype in defines.items())]
        exports = [f"EXPORT({kernel}, {structure})" for kernel, structure in KERNEL.findall(source)]
        text = "\n".join([*lines, source, *exports, more])
        path = self._folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            path.with_suffix(".cpp").write_text(text, encoding="utf-8")
            options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
            command = ["g++", *options, "-I", ROOT / "tests/cuda", path.with_suffix(".cpp"), "-o", path]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        return path

    def program(
        self, name: str, defines: Mapping[str, torch.dtype], mutation: tuple[str, str] | None = None
    ) -> Program:
        """A program with these dtypes; a mutation replaces one stretch of its source."""
        source = source_of(name)
        if mutation is not None:
            assert source.count(mutation[0]) == 1, f"{mutation[0]!r} occurs {source.count(mutation[0])} times"
            source = source.replace(*mutation)
        return Program(ctypes.CDLL(str(self.library(name, defines, source))))
