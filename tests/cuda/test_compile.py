"""The CUDA kernels compile for every architecture."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from cat_rs._native import _core
from cat_rs.commands.info import collect
from cat_rs.errors import InvalidValueError, KernelError
from cat_rs.ops.operator import stream_of

PROGRAMS = ("adamw", "cat_loss", "noising", "similarity")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NO_COMPILER = _core.cuda_versions()[1][1]
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(architecture, "bfloat16") for architecture in ARCHITECTURES]
    + [(90, dtype) for dtype in ("float32", "float64", "float16")],
)
def test_every_kernel_compiles_without_a_warning(architecture: int, dtype: str) -> None:
    assert _core.compile_kernels(architecture, dtype) == [(program, "") for program in PROGRAMS]


@needs_compiler
def test_an_architecture_that_the_compiler_dropped_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"NVRTC does not compile for compute capability 3\.5"):
        _core.compile_kernels(35, "float32")


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match=r"`dtype` must be float32, .*, got 'int8'"):
        _core.compile_kernels(90, "int8")


def test_info_says_whether_kernels_can_run() -> None:
    shown = collect()["CUDA kernels"]
    (_, no_driver), (compiler, _) = _core.cuda_versions()
    if torch.cuda.is_available():
        assert shown.endswith(f"NVRTC {compiler}")
    else:
        assert shown.startswith("not usable: ")
    if no_driver is not None:
        assert "no NVIDIA driver was found (libcuda.so.1)" in shown


def test_the_extension_is_linked_to_nothing_of_cuda() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run([readelf, "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert any(name.startswith("libtorch") for name in needed)
    assert not [name for name in needed if re.search("cuda|nvrtc|cudart|cublas", name)]


def test_the_cpu_has_no_stream() -> None:
    assert stream_of(torch.zeros(1)) == 0
