"""CatStep against the plain recipe: the same batches, the same adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import cat_rs
from tests.models import lora_parameters
from tests.references import PlainRecipe

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


def ddpm(**settings: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def flow_matching() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def cat_step(model: torch.nn.Module, scheduler: Any = None, **options: Any) -> cat_rs.CatStep:
    return cat_rs.CatStep(model, scheduler or ddpm(), **{**SETTINGS, **options})


def compare_with_recipe(
    model: torch.nn.Module,
    base: torch.nn.Module,
    batches: list[dict[str, Any]],
    *,
    scheduler: Any = None,
    tolerance: float = 1e-4,
    prediction_type: str = "epsilon",
    recipe_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> float:
    """Trains a copy with the plain recipe; the adapters' changes must agree to ``tolerance`` of their size.

    Returns:
        By how much of their size they differ.
    """
    scheduler = scheduler or ddpm(prediction_type=prediction_type)
    plain = copy.deepcopy(model)
    recipe = PlainRecipe(
        plain, base, scheduler, prediction_type=prediction_type, **SETTINGS, **options, **(recipe_options or {})
    )
    step = cat_step(model, scheduler, **options)
    before = lora_parameters(model)
    for one in batches:
        ours, theirs = step(**one), recipe(**one)
        for name, value in theirs.items():
            assert float(getattr(ours, name)) == pytest.approx(value, rel=tolerance, abs=1e-9, nan_ok=True), name
        if "grad_norm" not in theirs:
            assert ours.grad_norm.isnan()
    ours, theirs = lora_parameters(model), lora_parameters(plain)
    assert ours.keys() == theirs.keys()
    change, error = (
        torch.cat([(one[name].double() - other[name].double()).flatten() for name in before]).norm()
        for one, other in ((theirs, before), (ours, theirs))
    )
    assert change > 0
    assert error <= tolerance * change, f"the changes differ by {float(error / change):.2g} of their size"
    return float(error / change)
