"""Forward and backward of Stable Diffusion 1.5's U-Net with LoRA at 512 px: PEFT's layers as they are, and patched.

The time is measured with both in one process, taking turns; the memory with each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "peft_unet"
TIME_BAR, MEMORY_BAR = ">= 1.05", "<= 1.0"
PEFT = "peft"
PROVIDERS = (PEFT, OURS)
# The adapter on the attention's linear layers, and also on the residual blocks' convolutions.
ADAPTERS = {
    "attention": models.TARGET_MODULES,
    "attention and convolutions": [*models.TARGET_MODULES, "conv1", "conv2"],
}
TOLERANCE = 1e-3


def make(provider: str, unet: torch.nn.Module, targets: Sequence[str]) -> torch.nn.Module:
    """The U-Net with its own adapter."""
    model = models.add_lora(unet, targets=targets)
    if provider == OURS and (kept := cat_rs.patch_peft(model).kept):
        raise harness.BenchmarkError(f"{NAME}: patch_peft did not fuse {kept}")
    return model


def inputs(smoke: bool) -> list[torch.Tensor]:
    """Latents, timestep and text, batch 1."""
    settings = models.config(smoke)
    size = settings["sample_size"]
    text = torch.randn(1, models.TOKENS, settings["cross_attention_dim"])
    return [torch.randn(1, 4, size, size), torch.tensor([500]), text]


def gradients(model: torch.nn.Module, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
    """A training step's forward and backward; all gradients in one vector."""
    params = models.adapter(model)
    loss = model(*arguments, return_dict=False)[0].square().mean()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, params)])


def peak_of(provider: str, adapter: str, smoke: bool) -> None:
    """Runs in a process of its own: two steps, then the peak memory on the last line of the output."""
    harness.prepare(smoke)
    model = make(provider, models.unet(models.config(smoke)), ADAPTERS[adapter])
    arguments = inputs(smoke)
    for _ in range(2):
        gradients(model, arguments)
    print(json.dumps({"peak": harness.peak_memory()}))


def measure_memory(report: harness.Report, case: Case, adapter: str) -> None:
    """The peak of each contender; a smoke run starts one process only."""
    peaks = {}
    for provider in (OURS,) if report.smoke else PROVIDERS:
        command = [sys.executable, "-m", f"benchmarks.{NAME}", "--peak-of", provider, "--adapter", adapter]
        command += ["--smoke"] if report.smoke else []
        done = subprocess.run(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True, check=True)
        peaks[provider] = [json.loads(done.stdout.splitlines()[-1])["peak"] / 2**30]
        report.add(provider, case, "peak memory", "GiB", peaks[provider])
    if PEFT in peaks:
        bar = MEMORY_BAR if adapter == "attention" else None
        report.add_ratio(f"peak memory, {adapter}: patched / PEFT", peaks[OURS], peaks[PEFT], bar)


def measure_time(report: harness.Report, case: Case, adapter: str) -> None:
    """Both in turns, over the same frozen weights."""
    settings = models.config(report.smoke)
    unet, arguments = models.unet(settings), inputs(report.smoke)
    twins = {name: make(name, models.share_weights(unet, settings), ADAPTERS[adapter]) for name in PROVIDERS}
    theirs, ours = (gradients(model, arguments) for model in twins.values())
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"{adapter}: the gradients differ by {error:.2g} of their norm", flush=True)
    if not error <= TOLERANCE:
        raise harness.BenchmarkError(f"{NAME}: the gradients differ by {error:.3g}; expected at most {TOLERANCE}")
    contenders = [Contender(name, lambda model=model: gradients(model, arguments)) for name, model in twins.items()]
    samples = harness.measure(contenders, report.repeats, warm_up=1, sample_seconds=0)
    report.add_times(case, samples)
    bar = TIME_BAR if adapter == "attention" else None
    report.add_ratio(f"time, {adapter}: PEFT / patched", samples[PEFT], samples[OURS], bar)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    parser = harness.parser((__doc__ or "").splitlines()[0], repeats=10)
    parser.add_argument("--peak-of", choices=PROVIDERS, help="print the peak memory of this contender, and stop")
    parser.add_argument("--adapter", choices=tuple(ADAPTERS), default="attention", help="for --peak-of")
    options = parser.parse_args(argv)
    if options.peak_of is not None:
        peak_of(options.peak_of, options.adapter, options.smoke)
        return 0
    report = harness.start(NAME, "Stable Diffusion 1.5's U-Net with LoRA, forward and backward", options, argv)
    size = models.config(options.smoke)["sample_size"]
    for adapter in ADAPTERS:
        case = Case("forward+backward", "float32", f"latents 1x4x{size}x{size}, rank {models.RANK}, {adapter}")
        measure_memory(report, case, adapter)
        measure_time(report, case, adapter)
    report.note("peak memory: the largest resident size of a process that builds the model and takes two steps.")
    report.note("convolutions: conv1 and conv2 of each residual block.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
