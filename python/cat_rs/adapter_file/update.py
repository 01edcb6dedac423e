"""The update scale * B A of a layer, from its factors: it is never formed, since its rank is small."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cat_rs.adapter_file.layer import Layer

__all__ = ["Factors", "decomposition", "factors", "joined", "singular_values"]


class Factors(NamedTuple):
    """An update B A of rank at most r, float64, with the scale in B.

    Attributes:
        B: [out, r].
        A: [r, in]; of a convolution [r, in * height * width].
    """

    B: torch.Tensor
    A: torch.Tensor


def factors(layer: Layer, *, rslora: bool, strength: float = 1.0) -> Factors:
    """The factors of ``strength * scale * B A``."""
    scale = strength * layer.scale(rslora)
    return Factors(layer.lora_B.double().flatten(1) * scale, layer.lora_A.double().flatten(1))


def joined(parts: list[Factors]) -> Factors:
    """The factors of a sum of updates: ranks add up."""
    return Factors(torch.cat([part.B for part in parts], dim=1), torch.cat([part.A for part in parts]))


def singular_values(update: Factors) -> torch.Tensor:
    """The min(r, in, out) singular values of B A, descending.

    With B = Q_B R_B and A^T = Q_A R_A they are those of R_B R_A^T.
    """
    return torch.linalg.svdvals(_triangular(update.B) @ _triangular(update.A.T).T)


def decomposition(update: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, k], s [k] descending and V^T [k, in] of B A, with k = min(r, in, out)."""
    q_b, r_b = torch.linalg.qr(update.B)
    q_a, r_a = torch.linalg.qr(update.A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def _triangular(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix, mode="r").R
