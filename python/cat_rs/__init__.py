"""Contrastive Adapter Training (arXiv 2404.07554): personalize a diffusion model without damaging it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cat_rs import errors
from cat_rs._version import __version__ as __version__
from cat_rs.adapter_file import LoraFile, MergedLora, load_lora, merge_loras, save_lora
from cat_rs.ops.cat_loss import CatLossParts, cat_loss
from cat_rs.ops.lora_linear import lora_linear
from cat_rs.ops.noising import snr_weights
from cat_rs.ops.similarity import cross_similarity, similarity
from cat_rs.ops.statistics import bootstrap_difference, bootstrap_interval, harmonic_mean
from cat_rs.preservation_score import KpsResult, kps, kps_difference
from cat_rs.prompts import remove_trigger
from cat_rs.step import CatStep, PreservationSamples, StepMetrics
from cat_rs.step.cat_factor import CatFactorRamp, CatFactorRatio, CatFactorTarget
from cat_rs.step.optimizer import FlatAdamW
from cat_rs.step.teacher_bank import TeacherBank, TeacherDraws

if TYPE_CHECKING:
    from cat_rs.adapter_check import CheckResult, check
    from cat_rs.evaluation import KpsEvaluator
    from cat_rs.peft import adapter_disabled, patch_peft, unpatch_peft
    from cat_rs.training.preservation_set import PreservationDraw, PreservationSet

__all__ = [
    "CatFactorRamp",
    "CatFactorRatio",
    "CatFactorTarget",
    "CatLossParts",
    "CatStep",
    "CheckResult",
    "FlatAdamW",
    "KpsEvaluator",
    "KpsResult",
    "LoraFile",
    "MergedLora",
    "PreservationDraw",
    "PreservationSamples",
    "PreservationSet",
    "StepMetrics",
    "TeacherBank",
    "TeacherDraws",
    "adapter_disabled",
    "bootstrap_difference",
    "bootstrap_interval",
    "cat_loss",
    "check",
    "cross_similarity",
    "errors",
    "harmonic_mean",
    "kps",
    "kps_difference",
    "load_lora",
    "lora_linear",
    "merge_loras",
    "patch_peft",
    "remove_trigger",
    "save_lora",
    "similarity",
    "snr_weights",
    "unpatch_peft",
]

# What needs PEFT, diffusers or transformers is imported when first used: cat_loss alone needs only PyTorch.
_LAZY = {
    "CheckResult": "cat_rs.adapter_check",
    "KpsEvaluator": "cat_rs.evaluation",
    "PreservationDraw": "cat_rs.training.preservation_set",
    "PreservationSet": "cat_rs.training.preservation_set",
    "adapter_disabled": "cat_rs.peft",
    "check": "cat_rs.adapter_check",
    "patch_peft": "cat_rs.peft",
    "unpatch_peft": "cat_rs.peft",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
