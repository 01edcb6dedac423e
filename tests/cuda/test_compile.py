"""The CUDA kernels compile for every architecture; without a GPU, calls that need one say so."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs._native import _core, stream_of
from cat_rs.commands.info import collect
from cat_rs.errors import DeviceError, InvalidValueError, KernelError

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


def _step(**changes: Any) -> dict[str, Any]:
    zeros = torch.zeros(4)
    step = {"settings": torch.zeros(6), "sums": torch.zeros(1).double(), "step": torch.zeros(()), "skipped": None}
    buffers = {"param": zeros, "grad": zeros, "exp_avg": zeros, "exp_avg_sq": zeros, "low_precision": None}
    return {**buffers, **step, "stream": 0, **changes}


ON_THE_CPU: dict[str, Callable[[], Any]] = {
    "sum_of_squares": lambda: _core.sum_of_squares_cuda(torch.zeros(4), torch.zeros(1).double(), 0, stream=0),
    "adamw": lambda: _core.adamw_step_cuda(**_step()),
    "scale_gradients": lambda: _core.scale_gradients_cuda(torch.zeros(4), None, torch.ones(()), stream=0),
}


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_functions_for_cuda_refuse_tensors_on_the_cpu(name: str) -> None:
    with pytest.raises(DeviceError, match="must be on CUDA, got a tensor on the CPU"):
        ON_THE_CPU[name]()


def test_a_factor_on_a_device_is_refused_for_tensors_on_the_cpu() -> None:
    zeros, factors = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(InvalidValueError, match="`cat_factor` must be a number for tensors on the CPU, got a tensor"):
        _core.student_loss_cuda(zeros, zeros[:1], zeros[:1], None, None, factors, stream=0)
    with pytest.raises(cat_rs.errors.ShapeError, match=r"`factors` must have shape \[2\], got \[3\]"):
        _core.student_loss_cuda(zeros, zeros[:1], zeros[:1], None, None, torch.ones(3), stream=0)
