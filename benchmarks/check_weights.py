"""`cat-rs check --weights-only` on an adapter of SDXL's size: random, rank 64, the 722 linear layers of attention."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import cat_rs
from benchmarks import harness
from benchmarks.harness import OURS, Case, Contender
from cat_rs.adapter_check.weights import check_weights

NAME = "check_weights"
RANK = 64
SECONDS_BAR = "<= 20"
# Singular values, relative to the largest.
TOLERANCE = 1e-5
COMPARED = 6
FULL = "torch, SVD of the full product"
# Of stable-diffusion-xl-base-1.0's U-Net, what decides the sizes of its attention.
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}

State = Mapping[str, torch.Tensor]


def adapter(every: int = 1) -> dict[str, torch.Tensor]:
    """A and B of every n-th layer, in float16."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    generator = torch.Generator().manual_seed(0)
    linear = [
        each for each in unet.named_modules() if ".attentions." in each[0] and isinstance(each[1], torch.nn.Linear)
    ]
    state = {}
    for name, module in linear[::every]:
        for part, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
            state[f"unet.{name}.lora_{part}.weight"] = (torch.randn(shape, generator=generator) / RANK).half()
    return state


def layers_of(state: State) -> list[str]:
    """The layers' names, with the component."""
    return [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]


def full_products(state: State) -> dict[str, torch.Tensor]:
    """The singular values of each update, from the matrix that is added to the model."""
    return {
        layer: torch.linalg.svdvals(state[f"{layer}.lora_B.weight"].float() @ state[f"{layer}.lora_A.weight"].float())
        for layer in layers_of(state)
    }


def check(state: State, file: Path) -> None:
    """Norm and largest singular value of each layer, against float64."""
    found = {f"{layer.component}.{layer.module}": layer for layer in check_weights(file).layers}
    for layer in layers_of(state):
        b, a = (state[f"{layer}.lora_{part}.weight"].double() for part in "BA")
        expected = torch.linalg.svdvals(b @ a)
        mine = torch.tensor([found[layer].largest, found[layer].norm], dtype=torch.float64)
        harness.check_close(f"{NAME} {layer}", mine, torch.stack([expected[0], expected.norm()]), TOLERANCE)


def command(file: Path) -> None:
    """What a user types."""
    subprocess.run(
        [sys.executable, "-m", "cat_rs.cli", "check", str(file), "--weights-only", "--overwrite"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=file.parent,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser((__doc__ or "").splitlines()[0], repeats=3).parse_args(argv)
    report = harness.start(NAME, "Weights of an adapter of SDXL's size", options, argv)
    state = adapter(300 if options.smoke else 1)
    names = layers_of(state)
    compared = names[:: max(len(names) // COMPARED, 1)]
    some = {name: tensor for name, tensor in state.items() if name.rpartition(".lora_")[0] in compared}
    with tempfile.TemporaryDirectory() as folder:
        few, whole = Path(folder, "few.safetensors"), Path(folder, "whole.safetensors")
        cat_rs.save_lora(few, some)
        check(some, few)
        samples = harness.measure(
            [Contender(FULL, lambda: full_products(some)), Contender(OURS, lambda: check_weights(few))],
            report.repeats,
            warm_up=1,
            sample_seconds=0,
        )
        report.add_times(Case("check_weights", "float16", f"{len(compared)} layers, rank {RANK}"), samples)
        report.add_ratio(f"{FULL} / {OURS}", samples[FULL], samples[OURS])
        cat_rs.save_lora(whole, state)
        samples = harness.measure([Contender(OURS, lambda: command(whole))], report.repeats, warm_up=1)
        size = f"{len(names)} layers, rank {RANK}, {whole.stat().st_size / 2**20:.0f} MiB"
        report.add_times(Case("cat-rs check --weights-only", "float16", size), samples)
        low, middle, high = harness.quantiles(samples[OURS])
        report.add_value(f"seconds, cat-rs check --weights-only, {size}", middle, low, high, SECONDS_BAR)
    report.note("The command's time is that of a new process, its imports and the reading of the file included.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
