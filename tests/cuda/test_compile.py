"""The CUDA kernels compile for every architecture."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_rs._native import _core
from cat_rs.commands.info import collect
from cat_rs.errors import InvalidValueError, KernelError
from cat_rs.ops.operator import stream_of

PROGRAMS = ("adamw", "cat_loss", "noising", "similarity")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
NO_COMPILER = _core.cuda_versions()[1][1]
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(architecture, "bfloat16") for architecture in ARCHITECTURES]
    + [(architecture, dtype) for architecture in (75, 90) for dtype in ("float32", "float64", "float16")],
)
def test_every_kernel_compiles_without_a_warning(architecture: int, dtype: str) -> None:
    assert _core.compile_kernels(architecture, dtype) == [(program, "") for program in PROGRAMS]


@needs_compiler
def test_the_compiler_is_that_of_pytorchs_cuda() -> None:
    version = _core.cuda_versions()[1][0]
    if torch.version.cuda is not None:
        assert version.split(".")[0] == torch.version.cuda.split(".")[0]
    assert set(ARCHITECTURES) <= set(_core.cuda_architectures()) | {86, 89}


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


def info_with(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, tuple[int, int]]) -> str:
    """What cat-rs info says of the kernels on a machine with these GPUs, a driver and the NVRTC of CUDA 13."""
    monkeypatch.setattr(_core, "cuda_versions", lambda: (("13.0", None), ("13.0", None)))
    monkeypatch.setattr(_core, "cuda_architectures", lambda: [75, 80, 90, 120])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    return collect()["CUDA kernels"]


def test_info_names_the_build_that_an_old_card_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = info_with(monkeypatch, ("Tesla T4", (7, 5)), ("Tesla V100", (7, 0)), ("Tesla P100", (6, 0)))
    assert shown == (
        "driver for CUDA 13.0, NVRTC 13.0; not usable on Tesla V100 (compute 7.0), Tesla P100 (compute 6.0): this "
        "NVRTC compiles from 7.5 on, so install a PyTorch build for CUDA 12.6"
    )
    assert info_with(monkeypatch, ("NVIDIA T4", (7, 5)), ("B300", (10, 3))) == "driver for CUDA 13.0, NVRTC 13.0"


def test_pytorch_for_amd_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(_core, "cuda_versions", lambda: pytest.fail("looks for a CUDA driver"))
    assert collect()["CUDA kernels"] == "not usable: this PyTorch is for AMD GPUs (ROCm 6.4.1)"
    # PyTorch's own operations run there.
    with FakeTensorMode():
        assert stream_of(torch.empty(1, device="cuda")) == 0
    assert stream_of(torch.zeros(1)) == 0


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
