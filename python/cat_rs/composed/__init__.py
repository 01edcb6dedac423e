"""The extension's functions on PyTorch's own operations, for where the extension has no kernels.

What each computes is documented on the public functions of cat_rs; `_core.pyi` has the signatures of both.
"""

from cat_rs.composed.adamw import adamw_step, sum_of_squares
from cat_rs.composed.adapter_file import (
    adapter_layers,
    adapter_tensors,
    names_that_fit,
    read_safetensors,
    write_safetensors,
)
from cat_rs.composed.cat_loss import cat_loss, scale_gradients, student_loss
from cat_rs.composed.frozen_conv2d import frozen_conv2d_backward, frozen_conv2d_forward
from cat_rs.composed.frozen_linear import frozen_linear_backward, frozen_linear_forward
from cat_rs.composed.lora_linear import lora_linear_backward, lora_linear_forward
from cat_rs.composed.lora_up import lora_up_backward, lora_up_forward
from cat_rs.composed.noising import noising
from cat_rs.composed.similarity import cross_similarity, paired_similarity
from cat_rs.composed.statistics import bootstrap_difference, bootstrap_interval, harmonic_mean, kps_difference

__all__ = [
    "adamw_step",
    "adapter_layers",
    "adapter_tensors",
    "bootstrap_difference",
    "bootstrap_interval",
    "cat_loss",
    "cross_similarity",
    "frozen_conv2d_backward",
    "frozen_conv2d_forward",
    "frozen_linear_backward",
    "frozen_linear_forward",
    "harmonic_mean",
    "kps_difference",
    "lora_linear_backward",
    "lora_linear_forward",
    "lora_up_backward",
    "lora_up_forward",
    "names_that_fit",
    "noising",
    "paired_similarity",
    "read_safetensors",
    "scale_gradients",
    "student_loss",
    "sum_of_squares",
    "write_safetensors",
]
