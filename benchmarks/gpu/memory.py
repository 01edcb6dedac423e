"""What a CAT step needs of a GPU's memory, counted on tensors without values: ``python -m benchmarks.gpu.memory``.

Counted are the weights, the adapter with its gradient, moments and low-precision copy, and what autograd keeps of
the doubled batch for the backward pass, with attention as flash attention keeps it. With gradient checkpointing that
is the input of each block, and of one block all. A kernel's own memory, fragments and the driver come on top.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import harness, models

GIB = 2**30
# Of an adapter's value: itself, its gradient and two moments in float32, and its copy in 16 bits.
ADAPTER_BYTES = 4 * 4 + 2
FLUX_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Attention(torch.autograd.Function):
    """What flash attention keeps: q, k, v, the result, and a float32 number for each row of the softmax."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result


class Kept:
    """The memory that autograd keeps, of which weights are no part."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {param.untyped_storage()._cdata for param in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor's memory once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is kept within."""
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield


def activations(model: torch.nn.Module, call: Callable[[], Any], *, checkpointing: bool) -> int:
    """Bytes that autograd keeps of a call."""
    kept, largest = Kept(model), 0

    def checkpointed(block: Any, *inputs: Any, **more: Any) -> Any:
        nonlocal largest
        for value in (*inputs, *more.values()):
            if isinstance(value, torch.Tensor):
                kept.add(value)
        within = Kept(model)
        with within.counting():
            result = block(*inputs, **more)
        largest = max(largest, within.bytes)
        return result

    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing(checkpointed)
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: Attention.apply(query, key, value)
    try:
        with kept.counting():
            call()
    finally:
        F.scaled_dot_product_attention = attention
    return kept.bytes + largest


def unet(config: dict[str, Any], scale: int = 1) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """A U-Net with its adapter, and its call with the doubled batch of one picture."""
    model = models.add_lora(models.unet(config, "meta").to(torch.bfloat16))
    options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    size = config["sample_size"] // scale
    latents = torch.empty(2, 4, size, size, **options)
    timesteps = torch.zeros(2, dtype=torch.long, device="meta")
    return model, lambda: model(latents, timesteps, **models.conditions(config, 2, **options))


def flux(pixels: int) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """FLUX.1's transformer, likewise."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).requires_grad_(False)
        model.add_adapter(LoraConfig(r=models.RANK, target_modules=FLUX_TARGETS))
    tokens, options = (pixels // 16) ** 2, {"device": "meta", "dtype": torch.bfloat16}
    given = {
        "hidden_states": torch.empty(2, tokens, 64, **options),
        "encoder_hidden_states": torch.empty(2, 512, 4096, **options),
        "pooled_projections": torch.empty(2, 768, **options),
        "timestep": torch.empty(2, **options),
        "img_ids": torch.empty(tokens, 3, **options),
        "txt_ids": torch.empty(512, 3, **options),
        "guidance": torch.empty(2, device="meta"),
    }
    return model, lambda: model(**given)


SUBJECTS: dict[str, Callable[[], tuple[torch.nn.Module, Callable[[], Any]]]] = {
    "SD1.5, 512 px": lambda: unet(models.SD15),
    "SDXL, 512 px": lambda: unet(models.SDXL, 2),
    "SDXL, 1024 px": lambda: unet(models.SDXL),
    "FLUX.1, 512 px": lambda: flux(512),
    "FLUX.1, 1024 px": lambda: flux(1024),
}


def lines() -> list[list[str]]:
    """A line for each model, without and with gradient checkpointing."""
    found = []
    for name, make in SUBJECTS.items():
        for checkpointing in (False, True):
            model, call = make()
            frozen = sum(param.nbytes for param in model.parameters() if not param.requires_grad)
            adapter = ADAPTER_BYTES * sum(param.numel() for param in model.parameters() if param.requires_grad)
            kept = activations(model, call, checkpointing=checkpointing)
            sizes = [frozen, adapter, kept, frozen + adapter + kept]
            found.append([name, "yes" if checkpointing else "no", *(f"{size / GIB:.2f}" for size in sizes)])
    return found


def main() -> int:
    """Writes benchmarks/results/gpu_memory.md."""
    header = ("model", "checkpointing", "weights", "adapter", "activations", "sum")
    text = [
        "# Memory of a CAT step, counted",
        "",
        f"`python -m benchmarks.gpu.memory`: GiB, 16-bit weights, rank {models.RANK}, one picture (with and without",
        "the trigger a batch of 2). Counted on tensors without values: weights, adapter and what autograd keeps. What",
        "kernels need while they run, fragments and the driver come on top.",
        "",
        *harness.table(header, lines()),
    ]
    harness.write_file(harness.RESULTS / "gpu_memory.md", "\n".join(text) + "\n")
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
