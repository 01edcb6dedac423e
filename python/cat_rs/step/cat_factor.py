"""The weight of the preservation term: a number, or a schedule of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cat_rs.arguments import as_float, check, check_plain, refusing
from cat_rs.dtypes import wide_dtype
from cat_rs.errors import ShapeError

__all__ = ["CatFactor", "CatFactorRamp", "CatFactorRatio", "check_cat_factor", "factor_after"]

CatFactor = float | Callable[[int], float]
"""A number, or a function of the number of finished optimizer steps."""


def check_cat_factor(value: float, op: str = "CatStep", argument: str = "cat_factor") -> float:
    """The value as a float.

    Raises:
        InvalidValueError: It is negative or not finite.
    """
    check(op, argument, value, "a finite number >= 0", lambda value: 0 <= value < math.inf)
    return as_float(op, argument, value)


@dataclass(frozen=True)
class CatFactorRamp:
    """A ``cat_factor`` that goes from one value to another over a number of optimizer steps, and stays there.

    Attributes:
        start: The factor in the first step.
        end: The factor from step ``steps`` on.
        steps: Length of the ramp, >= 1.
        shape: "linear", or "cosine" for half a wave.
    """

    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        op = "CatFactorRamp"
        check_cat_factor(self.start, op, "start")
        check_cat_factor(self.end, op, "end")
        check(op, "steps", self.steps, "at least 1", lambda steps: steps >= 1)
        check(op, "shape", self.shape, "'linear' or 'cosine'", lambda shape: shape in ("linear", "cosine"))

    def __call__(self, step: int) -> float:
        """The factor after ``step`` finished optimizer steps."""
        done = min(as_float("CatFactorRamp", "step", step) / self.steps, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class CatFactorRatio:
    """A ``cat_factor`` that keeps the preservation term at a chosen fraction of the diffusion term.

    cat_factor = ratio * mean(L_diff) / mean(L_cat), with exponentially decaying means over the steps so far, at most
    ``maximum``. The useful factor depends on model, data and learning rate; a useful ratio depends on them less. L_cat
    is zero where training starts, so the first steps use ``maximum``. Note the direction: where preservation gets
    worse, L_cat grows and the factor falls, so that the two terms keep their proportion. Each of several processes
    follows its own terms.

    Args:
        ratio: cat_factor * L_cat / L_diff, > 0.
        maximum: The largest factor, > 0.
        decay: Decay of the means, in [0, 1); 0 uses the last step alone.
    """

    def __init__(self, ratio: float, *, maximum: float = 1000.0, decay: float = 0.9) -> None:
        for name, value in (("ratio", ratio), ("maximum", maximum)):
            check("CatFactorRatio", name, value, "a finite number > 0", lambda value: 0 < value < math.inf)
        check("CatFactorRatio", "decay", decay, "in [0, 1)", lambda decay: 0 <= decay < 1)
        self.ratio = ratio
        self.maximum = maximum
        self.decay = decay
        # Means of L_diff and L_cat: where they begin, and since then, on the terms' device, so that nothing waits.
        self._start = [0.0, 0.0]
        self._means: torch.Tensor | None = None

    def __call__(self, step: int) -> float:
        """The factor of the coming step."""
        return float(self.factor())

    def factor(self) -> float | torch.Tensor:
        """The factor of the coming step: a 0-dim tensor on the device of the terms; a number before the first.

        Both means start at zero, so their common bias cancels.
        """
        if self._means is None:
            diffusion, cat = self._start
            return self.ratio * diffusion / cat if self.ratio * diffusion < self.maximum * cat else self.maximum
        wanted, mean = self.ratio * self._means[0], self._means[1]
        return torch.where(wanted < self.maximum * mean, wanted / mean, self.maximum)

    def update(self, diffusion: float | torch.Tensor, cat: float | torch.Tensor) -> None:
        """Updates the means with a step's terms; terms that are not finite are left out."""
        terms = torch.stack([_term("diffusion", diffusion), _term("cat", cat)])
        means = self._means_on(terms.device)
        self._means = torch.where(terms.isfinite().all(), self.decay * means + (1 - self.decay) * terms, means)

    def _means_on(self, device: torch.device) -> torch.Tensor:
        if self._means is not None:
            return self._means.to(device)
        # A kernel takes a number by value; a copy from the host would wait.
        return torch.stack([torch.full((), mean, dtype=wide_dtype(device), device=device) for mean in self._start])

    def state_dict(self) -> dict[str, Any]:
        """The means."""
        diffusion, cat = self._start if self._means is None else self._means.tolist()
        return {"diffusion": diffusion, "cat": cat}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` was called."""
        with refusing("CatFactorRatio", "state_dict", "what state_dict() returned", state_dict):
            self._start = [float(state_dict["diffusion"]), float(state_dict["cat"])]
        self._means = None


def _term(argument: str, term: float | torch.Tensor) -> torch.Tensor:
    if isinstance(term, torch.Tensor):
        check_plain("CatFactorRatio", argument, term)
    with refusing("CatFactorRatio", argument, "a number or a 0-dim tensor", term):
        tensor = torch.as_tensor(term)
        tensor = tensor.to(wide_dtype(tensor.device))
    if tensor.dim() != 0:
        raise ShapeError(f"CatFactorRatio: `{argument}` must be a number or a 0-dim tensor, got {list(tensor.shape)}")
    return tensor


def factor_after(cat_factor: CatFactor, steps_done: int) -> float | torch.Tensor:
    """The factor of the step after ``steps_done`` others; a ratio's is a tensor, whose value need not be waited for.

    Raises:
        InvalidValueError: The function returned a factor that is negative or not finite.
    """
    if isinstance(cat_factor, CatFactorRatio):
        return cat_factor.factor()
    return check_cat_factor(cat_factor(steps_done) if callable(cat_factor) else cat_factor)
