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

__all__ = [
    "CatFactor",
    "CatFactorRamp",
    "CatFactorRatio",
    "CatFactorTarget",
    "TermFollower",
    "check_cat_factor",
    "factor_after",
]

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


class TermFollower:
    """A ``cat_factor`` that follows the terms of the loss.

    A step calls :meth:`update` once after each optimizer step that had a preservation term, with the terms' means over
    the step's calls and over all processes, so that it is the same in all of them. Its numbers stay on the terms'
    device: nothing waits.

    Args:
        decay: Decay of the terms' means, in [0, 1).
        numbers: Its state at the beginning, by name, the terms' means first.
    """

    def __init__(self, decay: float, **numbers: float) -> None:
        check(type(self).__name__, "decay", decay, "in [0, 1)", lambda decay: 0 <= decay < 1)
        self.decay = decay
        # Its state where it begins, and since the first update.
        self._start = numbers
        self._numbers: torch.Tensor | None = None

    def __call__(self, step: int) -> float:
        """The factor of the coming step."""
        return float(self.factor())

    def factor(self) -> float | torch.Tensor:
        """The factor of the coming step: a 0-dim tensor on the device of the terms; a number before the first."""
        raise NotImplementedError

    def _next(self, numbers: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """The state after a step with these terms."""
        raise NotImplementedError

    def _means(self, numbers: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """The terms' means after a step. Both begin at zero, so that their common bias cancels in a quotient."""
        return self.decay * numbers[:2] + (1 - self.decay) * terms

    def update(self, diffusion: float | torch.Tensor, cat: float | torch.Tensor) -> None:
        """Follows the terms of a step; terms that are not finite are left out."""
        op = type(self).__name__
        terms = torch.stack([_term(op, "diffusion", diffusion), _term(op, "cat", cat)])
        numbers = self._numbers_on(terms.device)
        self._numbers = torch.where(terms.isfinite().all(), self._next(numbers, terms), numbers)

    def _numbers_on(self, device: torch.device) -> torch.Tensor:
        if self._numbers is not None:
            return self._numbers.to(device)
        # A kernel takes a number by value; a copy from the host would wait.
        options: dict[str, Any] = {"dtype": wide_dtype(device), "device": device}
        return torch.stack([torch.full((), number, **options) for number in self._start.values()])

    def state_dict(self) -> dict[str, Any]:
        """The numbers that it goes on from."""
        numbers = self._start.values() if self._numbers is None else self._numbers.tolist()
        return dict(zip(self._start, numbers, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` was called."""
        with refusing(type(self).__name__, "state_dict", "what state_dict() returned", state_dict):
            self._start = {name: float(state_dict[name]) for name in self._start}
        self._numbers = None


class CatFactorRatio(TermFollower):
    """A ``cat_factor`` that keeps the preservation term at a chosen fraction of the diffusion term.

    cat_factor = ratio * mean(L_diff) / mean(L_cat), with exponentially decaying means over the steps so far, at most
    ``maximum``. The useful factor depends on model, data and learning rate; a useful ratio depends on them less. L_cat
    is zero where training starts, so the first steps use ``maximum``.

    Note the direction: where the adapter drifts away from the base model, L_cat grows and the factor falls, so that
    the two terms keep their proportion. That is the wrong way round for holding a drift: :class:`CatFactorTarget`
    raises the factor instead.

    Args:
        ratio: cat_factor * L_cat / L_diff, > 0.
        maximum: The largest factor, > 0.
        decay: Decay of the means, in [0, 1); 0 uses the last step alone.
    """

    def __init__(self, ratio: float, *, maximum: float = 1000.0, decay: float = 0.9) -> None:
        super().__init__(decay, diffusion=0.0, cat=0.0)
        for name, value in (("ratio", ratio), ("maximum", maximum)):
            _check_positive("CatFactorRatio", name, value)
        self.ratio = ratio
        self.maximum = maximum

    def factor(self) -> float | torch.Tensor:
        """The factor of the coming step: a 0-dim tensor on the device of the terms; a number before the first."""
        if self._numbers is None:
            diffusion, cat = self._start.values()
            return self.ratio * diffusion / cat if self.ratio * diffusion < self.maximum * cat else self.maximum
        wanted, mean = self.ratio * self._numbers[0], self._numbers[1]
        return torch.where(wanted < self.maximum * mean, wanted / mean, self.maximum)

    def _next(self, numbers: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return self._means(numbers, terms)


class CatFactorTarget(TermFollower):
    r"""A ``cat_factor`` that holds the adapter's drift from the base model at a target.

    The drift is measured as d = mean(L_cat) / mean(L_diff), with exponentially decaying means. After each step,

    .. math::
        e = \operatorname{clip}(d / d^* - 1, -1, 1)

        \lambda \leftarrow \operatorname{clip}(\lambda (1 + \rho e), \lambda_{min}, \lambda_{max})

    where d* is ``drift`` and rho ``rate``, so the factor rises while the drift is above the target, and falls while it
    is below. This is the controller of Ziegler et al. (arXiv 1909.08593, section 2.2), which holds a language model at
    a distance from its base model.

    Nothing in the rule has a scale. L_cat and L_diff are squared errors of predictions in the same units, so that a
    target does not depend on the latents, the prediction type or the weights of the samples, and the factor changes by
    a part of itself. L_cat by itself has no floor to compare with: it begins at zero.

    With the default rate, the factor grows tenfold within 47 steps at twice the target or more.

    Args:
        drift: The target of L_cat / L_diff, > 0. With cat_factor 1, a training of this repository's bundled model has
            about 0.1.
        start: The factor of the first step.
        minimum: The smallest factor, > 0.
        maximum: The largest factor.
        rate: The largest change in a step, as a part of the factor, in (0, 1).
        decay: Decay of the means, in [0, 1); 0 uses the last step alone.
    """

    def __init__(
        self,
        drift: float,
        *,
        start: float = 1.0,
        minimum: float = 0.1,
        maximum: float = 100.0,
        rate: float = 0.05,
        decay: float = 0.9,
    ) -> None:
        op = "CatFactorTarget"
        for name, value in (("drift", drift), ("start", start), ("minimum", minimum), ("maximum", maximum)):
            _check_positive(op, name, value)
        check(op, "start", start, f"in [{minimum:g}, {maximum:g}]", lambda start: minimum <= start <= maximum)
        check(op, "rate", rate, "in (0, 1)", lambda rate: 0 < rate < 1)
        super().__init__(decay, diffusion=0.0, cat=0.0, cat_factor=as_float(op, "start", start))
        self.drift, self.start, self.minimum, self.maximum, self.rate = drift, start, minimum, maximum, rate

    def factor(self) -> float | torch.Tensor:
        """The factor of the coming step: a 0-dim tensor on the device of the terms; a number before the first."""
        return self._start["cat_factor"] if self._numbers is None else self._numbers[2]

    def _next(self, numbers: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        means = self._means(numbers, terms)
        wanted = self.drift * means[0]
        # Where both are zero there is nothing to correct.
        error = ((means[1] - wanted) / wanted).nan_to_num(0.0).clamp(-1, 1)
        factor = (numbers[2] * (1 + self.rate * error)).clamp(self.minimum, self.maximum)
        return torch.stack([*means, factor])


def _check_positive(op: str, argument: str, value: float) -> None:
    check(op, argument, value, "a finite number > 0", lambda value: 0 < value < math.inf)


def _term(op: str, argument: str, term: float | torch.Tensor) -> torch.Tensor:
    if isinstance(term, torch.Tensor):
        check_plain(op, argument, term)
    with refusing(op, argument, "a number or a 0-dim tensor", term):
        tensor = torch.as_tensor(term)
        tensor = tensor.to(wide_dtype(tensor.device))
    if tensor.dim() != 0:
        raise ShapeError(f"{op}: `{argument}` must be a number or a 0-dim tensor, got {list(tensor.shape)}")
    return tensor


def factor_after(cat_factor: CatFactor, steps_done: int) -> float | torch.Tensor:
    """The factor of the step after ``steps_done`` others; where it follows the terms, a tensor that nobody waits for.

    Raises:
        InvalidValueError: The function returned a factor that is negative or not finite.
    """
    if isinstance(cat_factor, TermFollower):
        return cat_factor.factor()
    return check_cat_factor(cat_factor(steps_done) if callable(cat_factor) else cat_factor)
