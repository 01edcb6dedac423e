"""What is installed and what this build can do: `cat-rs info`, for people and for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from cat_rs._native import KERNEL_DEVICES, WHY_COMPOSED, _core
from cat_rs._version import __version__

_PACKAGES = ("numpy", "diffusers", "transformers", "peft", "safetensors", "accelerate")
_DTYPES = "float32 float64 bfloat16 float16"
_OPERATIONS = {
    "cat_loss": _DTYPES,
    "lora_linear": _DTYPES,
    "noising": _DTYPES,
    "adamw": "float32 float64, and copies of the weights in bfloat16 float16",
    "similarity": _DTYPES,
}
_INSTRUCTION_SETS = {"v3": "AVX2 and FMA", "v4": "AVX-512", "neon": "NEON"}


@dataclass(frozen=True)
class Settings:
    """`cat-rs info` has no settings."""


def run(_settings: Settings) -> None:
    """Print the facts, one a line."""
    facts = collect()
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name:{width}}{value}")


def collect() -> dict[str, str]:
    """Return every fact: name -> value."""
    packages = {name: _version(name) for name in _PACKAGES}
    operations = {f"operation {name}": _runs_on(dtypes) for name, dtypes in _OPERATIONS.items()}
    return _build() | _machine() | packages | operations


def _runs_on(dtypes: str) -> str:
    """Say where an operation has kernels, and what runs elsewhere."""
    if not KERNEL_DEVICES:
        return f"PyTorch's own operations: {dtypes}"
    return f"kernels on {' and '.join(KERNEL_DEVICES)}, PyTorch's own operations elsewhere: {dtypes}"


def _build() -> dict[str, str]:
    if WHY_COMPOSED is not None:
        return {"cat-rs": __version__, "PyTorch": str(torch.__version__), "kernels": f"none: {WHY_COMPOSED}"}
    build = _core.build_info()
    return {
        "cat-rs": build["version"],
        "built for PyTorch": build["torch"],
        "PyTorch": str(torch.__version__),
        "instruction set used": _INSTRUCTION_SETS.get(build["simd"], build["simd"]),
        "CUDA kernels": _cuda_kernels(),
    }


def _cuda_kernels() -> str:
    """Say with what they run here, or why they cannot."""
    if torch.version.hip is not None:
        return f"not usable: this PyTorch is for AMD GPUs (ROCm {torch.version.hip})"
    (driver, no_driver), (compiler, no_compiler) = _core.cuda_versions()
    missing = [reason for reason in (no_driver, no_compiler) if reason is not None]
    if not missing and not torch.cuda.is_available():
        missing = ["PyTorch sees no CUDA device"]
    if missing:
        return "not usable: " + "; ".join(missing)
    first = min(_core.cuda_architectures())
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    too_old = [
        f"{torch.cuda.get_device_name(index)} (compute {major}.{minor})"
        for index, (major, minor) in enumerate(capabilities)
        if 10 * major + minor < first
    ]
    needed = (
        f"; not usable on {', '.join(too_old)}: this NVRTC compiles from {first // 10}.{first % 10} on, so install a "
        "PyTorch build for CUDA 12.6"
    )
    return f"driver for CUDA {driver}, NVRTC {compiler}{needed if too_old else ''}"


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "processor features": torch.backends.cpu.get_cpu_capability(),
        "GPU": ", ".join(gpus) or "none",
    }


def _processor() -> str:
    """Return the processor's name, where the system knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
