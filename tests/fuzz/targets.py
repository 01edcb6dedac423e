"""What is fuzzed, found by introspection, and valid arguments for it.

A new function is fuzzed without being listed here: its arguments are then made from their names, where others have
arguments of that name, and from their types. What is listed are valid arguments by name, because a call that is
wrong in one place only gets deeper than one that is wrong in all.

Sizes in a text, such as ``{B}``, are filled in with the same number throughout a call.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cat_rs
from cat_rs import _core

__all__ = ["Parameter", "Target", "targets"]

SIZES: dict[str, tuple[int, ...]] = {
    "B": (2, 2, 2, 1, 3, 0, 5),
    "H": (4, 4, 2, 1, 8),
    "I": (8, 8, 5, 16, 1, 300, 0),
    "O": (8, 8, 3, 16, 1, 130, 0),
    "R": (2, 2, 1, 4, 0, 40),
    "N": (7, 7, 1, 2, 1000, 0, 70_000),
}
"""Sizes of valid tensors: batch, height, inputs, outputs, rank, anything else. The usual ones come first and often."""

LATENT = "tensor(({B}, 4, {H}, {H}))"
NUMBERS = "tensor(({N},))"
VALUES = "array(0.5, 0.75, 0.5, 1.0)"
EMBEDDINGS = "tensor(({B}, {I}))"
MODEL, SCHEDULER, STEP = "model()", "scheduler()", "cat_step()"

BY_NAME: dict[str, str] = {
    # Losses and noising.
    **dict.fromkeys(("model_pred", "target", "model_pred_no_trigger", "base_pred", "base"), LATENT),
    **dict.fromkeys(("latents", "noise"), LATENT),
    "student": "tensor((2 * {B}, 4, {H}, {H}))",
    **dict.fromkeys(("sample_weight", "preserve_weight"), "tensor(({B},)).abs()"),
    **dict.fromkeys(("mask", "preserve_mask"), "tensor(({B}, 1, {H}, {H})).abs()"),
    "grad_total": "tensor(())",
    "cat_factor": "0.5",
    "mask_normalize": "False",
    "preservation": '"cat"',
    "preserve_every": "2",
    "scale": "1.0",
    "wanted": "(True, True)",
    "factors": "tensor((2,))",
    "signal_rate": "tensor(({B},))",
    "noise_rate": "tensor(({B},))",
    "prediction_type": '"epsilon"',
    "copies": "2",
    "timesteps": "tensor(({B},), I64)",
    "alphas_cumprod": "tensor((10,), F64).sigmoid()",
    "gamma": "5.0",
    # Layers.
    "x": "tensor(({B}, {I}))",
    "y": "tensor(({B}, {O}))",
    "weight": "tensor(({O}, {I}))",
    "bias": "tensor(({O},))",
    **dict.fromkeys(("lora_A", "lora_a"), "tensor(({R}, {I}))"),
    **dict.fromkeys(("lora_B", "lora_b"), "tensor(({O}, {R}))"),
    "hidden": "tensor(({B}, {R}))",
    "grad": "tensor(({B}, {O}))",
    "scaling": "0.5",
    "channels_second": "False",
    "size": "({H}, {H})",
    "stride": "(1, 1)",
    "padding": "(1, 1)",
    "dilation": "(1, 1)",
    # The optimizer.
    **dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), NUMBERS),
    "settings": "torch.tensor([1e-3, 0.9, 0.999, 1e-8, 0.01, inf], dtype=F64)",
    "sums": "tensor((1,), F64)",
    "index": "0",
    "params": "parameters(({O}, {I}), ({N},))",
    "betas": "(0.9, 0.999)",
    "param_group": '{{"params": parameters((3, 2))}}',
    "state_dict": "optimizer_state()",
    # Statistics.
    **dict.fromkeys(("a", "b"), EMBEDDINGS),
    "values": VALUES,
    "clusters": "np.array([0, 0, 1, 2])",
    "confidence": "0.95",
    "resamples": "50",
    "seed": "1",
    "statistic": '"mean"',
    "harmonic": "False",
    "groups": f"[({VALUES}, None)]",
    "reduce": '"mean"',
    **dict.fromkeys(
        ("base_no_trigger", "adapted_no_trigger", "base_trigger", "adapted_trigger"), "tensor(({B} + 2, 8))"
    ),
    # Models, steps and files.
    "model": MODEL,
    "model_or_state": "unet()",
    "scheduler": SCHEDULER,
    "path": "path()",
    "format": '"diffusers"',
    "adapter_name": '"default"',
    "tensors": "list(state().items())",
    "known": '{{"unet": ["mid.to_q"]}}',
    "saving": "False",
    "pattern": '"(to_q|to_k)"',
    "names": '["mid.to_q", "to_k"]',
    "metadata": '{{"note": "1"}}',
    "layers": "layers()",
    "descriptor": "descriptor()",
    "cond": "tensor(({B}, 2, 16))",
    "cond_no_trigger": "tensor(({B}, 2, 16))",
    "draws": "2",
    "caption": '"a sks cat"',
    "trigger_words": '"sks"',
    "class_word": '"cat"',
    "dtype": "BF16",
    "encoder": "encoder()",
    "images": "pictures()",
    "texts": '["a cat"]',
    "steps": "10",
    "step": "tensor(())",
    "shape": '"cosine"',
    "ratio": "0.5",
    "drift": "0.05",
    "diffusion": "tensor(())",
    "cat": "tensor(())",
    "stream": "0",
}
"""Valid arguments by name."""

GRID = "tensor(({B}, 8, {H}, {H}))"
CONV = {"x": GRID, "grad": "tensor(({B}, {O}, {H}, {H}))", "weight": "tensor(({O}, 8, 3, 3))"}
PAIRS = {"a": VALUES, "b": VALUES}
BY_TARGET: dict[str, dict[str, str]] = {
    "frozen_conv2d": CONV,
    "frozen_conv2d_forward": CONV,
    "frozen_conv2d_backward": CONV,
    "lora_linear_backward": {"wanted": "(True, True, True)"},
    "grad_norm": {"grad": NUMBERS},
    "sum_of_squares": {"grad": NUMBERS},
    "sum_of_squares_cuda": {"grad": NUMBERS},
    "adamw_step": {"grad": NUMBERS},
    "adamw_step_cuda": {"grad": NUMBERS},
    "bootstrap_difference": PAIRS,
    "kps_difference": {name: f"({value}, {value})" for name, value in PAIRS.items()} | {"clusters": "(None, None)"},
    "kps": {"clusters": "(None, None)"},
    "read_safetensors": {"path": "adapter_file()"},
    "load_lora": {"path": "adapter_file()"},
    "check": {"adapters": '{{"a": adapter_file()}}', "encoder": "None"},
    "adapter_tensors": {"family": '"sd"'},
    "compile_kernels": {"architecture": "90", "dtype": '"float32"'},
    "add_param_group": {"param_group": '{{"params": parameters((3, 2))}}'},
    "low_precision_copy": {"param": "parameters((3, 2))[0]"},
    "CatStep": {"cat_factor": "ramp()", "dtype": "F32"},
    "CatStep.__call__": {
        "latents": "tensor(({B}, 4, 4, 4))",
        "noise": "tensor(({B}, 4, 4, 4))",
        "mask": "tensor(({B}, 1, 4, 4)).abs()",
    },
    "CatStep.load_state_dict": {"state_dict": "cat_step_state()"},
    "CatFactorRamp": {"start": "0.0", "end": "1.0"},
    "CatFactorRamp.__call__": {"step": "3"},
    "CatFactorRatio.__call__": {"step": "3"},
    "CatFactorRatio.load_state_dict": {"state_dict": "ratio().state_dict()"},
    "CatFactorTarget.__call__": {"step": "3"},
    "CatFactorTarget.load_state_dict": {"state_dict": "drift_target().state_dict()"},
    "TeacherBank.build": {"latents": "tensor((3, 4, 4, 4))", "cond_no_trigger": "tensor((3, 2, 16))"},
    "TeacherBank.load": {"path": "bank_file()", "latents": "tensor((3, 4, 4, 4))"},
    "TeacherBank.read": {"pictures": "indices(0, 1)", "draws": "indices(1, 0)"},
    "TeacherBank.draw": {"pictures": "indices(0, 2)"},
    "PreservationSet.load": {"path": "set_file()"},
    "PreservationSet.joined": {"sets": "[preservation_set()]", "shares": "[1.0]"},
    "PreservationSet.draw": {"count": "2"},
    "KpsEvaluator.score": dict.fromkeys(
        ("base_no_trigger", "adapted_no_trigger", "base_trigger", "adapted_trigger"), "pictures(3)"
    ),
    "LoraFile.load_into": {"model": "unet()"},
}
"""Valid arguments where the name alone does not tell, by function."""

RECEIVERS = {
    "CatStep": STEP,
    "FlatAdamW": "optimizer()",
    "CatFactorRamp": "ramp()",
    "CatFactorRatio": "ratio()",
    "CatFactorTarget": "drift_target()",
    "TeacherBank": "bank()",
    "PreservationSet": "preservation_set()",
    "LoraFile": "lora_file()",
    "KpsEvaluator": "cat_rs.KpsEvaluator(encoder())",
}
"""What methods are called on, by class."""

NOT_CALLED = {
    "TeacherBank": "is made by build and load",
    "CheckResult": "holds what it is given",
    "KpsResult": "holds what it is given",
    "LoraFile": "holds what it is given",
    "CatLossParts": "holds what it is given",
    "StepMetrics": "holds what it is given",
    "TeacherDraws": "holds what it is given",
    "PreservationDraw": "holds what it is given",
    "PreservationSet": "is made by build, load and joined",
    "PreservationSet.build": "needs a pipeline",
    "FlatAdamW.before_launch": "is half of a step",
    "FlatAdamW.launch": "is half of a step, on a GPU",
    "FlatAdamW.after_launch": "is half of a step",
    "FlatAdamW.after_gradients": "is half of a step",
    "TeacherBank.check_model": "is called by CatStep",
    "TeacherBank.check_cond": "is called by CatStep",
}
"""What is public by its name, but not for callers; with why."""

SELDOM = {
    "compile_kernels": 0.02,
    "KpsEvaluator": 0.2,
    "TeacherBank": 0.3,
    "PreservationSet": 0.3,
    "CatStep": 0.7,
    "LoraFile": 0.3,
}
"""Weights of what takes long, by function or class; of everything else 1."""


@dataclass(frozen=True)
class Parameter:
    """Of a function.

    Attributes:
        name: As the function has it.
        text: A valid argument, with sizes in braces; None where nothing tells one, or the default is better.
        keyword_only: Whether it can only be given by name.
        positional_only: Whether it cannot be given by name.
        optional: Whether it has a default.
    """

    name: str
    text: str | None
    keyword_only: bool = False
    positional_only: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Target:
    """A function, or a method of an object that ``call`` makes."""

    name: str
    call: str
    parameters: tuple[Parameter, ...]
    weight: float = 1.0


def targets() -> list[Target]:
    """Everything that is fuzzed, in order of name."""
    return sorted([*_public(), *_operators(), *_extension()], key=lambda target: target.name)


def _public() -> Iterator[Target]:
    for name in cat_rs.__all__:
        value = getattr(cat_rs, name)
        if inspect.isclass(value):
            yield from _of_class(name, value)
        elif callable(value):
            yield _python_target(f"cat_rs.{name}", f"cat_rs.{name}", name, value)


def _of_class(name: str, owner: type) -> Iterator[Target]:
    if name not in NOT_CALLED:
        yield _python_target(f"cat_rs.{name}", f"cat_rs.{name}", name, owner)
    if name not in RECEIVERS:
        return
    own = [base for base in reversed(owner.__mro__) if base.__module__.startswith("cat_rs")]
    for member, value in {name: value for base in own for name, value in vars(base).items()}.items():
        qualified = f"{name}.{member}"
        if qualified in NOT_CALLED or (member.startswith("_") and member != "__call__"):
            continue
        if isinstance(value, classmethod | staticmethod):
            yield _python_target(f"cat_rs.{qualified}", f"cat_rs.{qualified}", qualified, getattr(owner, member))
        elif inspect.isfunction(value):
            receiver = RECEIVERS[name]
            call = receiver if member == "__call__" else f"{receiver}.{member}"
            yield _python_target(f"cat_rs.{qualified}", call, qualified, value, method=True)


def _python_target(name: str, call: str, key: str, function: Any, *, method: bool = False) -> Target:
    signature = list(inspect.signature(function).parameters.values())[method:]
    types = {each.name: str(each.annotation) for each in signature}
    return _target(name, call, key, signature, types)


def _extension() -> Iterator[Target]:
    stubs = _stubs()
    for name in dir(_core):
        function = getattr(_core, name)
        if not name.startswith("_") and callable(function):
            signature = list(inspect.signature(function).parameters.values())
            yield _target(f"_core.{name}", f"_core.{name}", name, signature, stubs.get(name, {}))


def _stubs() -> dict[str, dict[str, str]]:
    """Function -> parameter -> type, of the extension's stub file."""
    tree = ast.parse(Path(cat_rs.__file__).with_name("_core.pyi").read_text())
    return {
        node.name: {
            each.arg: ast.unparse(each.annotation)
            for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if each.annotation is not None
        }
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def _operators() -> Iterator[Target]:
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "cat_rs" or "." in name:
            continue
        arguments = getattr(torch.ops.cat_rs, name).default._schema.arguments
        signature = [inspect.Parameter(each.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in arguments]
        types = {each.name: str(each.type) for each in arguments}
        yield _target(f"torch.ops.cat_rs.{name}", f"torch.ops.cat_rs.{name}", name, signature, types)


def _target(name: str, call: str, key: str, signature: list[inspect.Parameter], types: Mapping[str, str]) -> Target:
    named = {**BY_NAME, **BY_TARGET.get(key.rpartition(".")[2], {}), **BY_TARGET.get(key, {})}
    parameters = tuple(
        Parameter(
            each.name,
            named.get(each.name) or (_of_type(types.get(each.name, "")) if each.default is each.empty else None),
            each.kind is each.KEYWORD_ONLY,
            each.kind is each.POSITIONAL_ONLY,
            each.default is not each.empty,
        )
        for each in signature
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    )
    weight = SELDOM.get(key, SELDOM.get(key.partition(".")[0], 1.0))
    return Target(name, call, parameters, weight)


def _of_type(type_name: str) -> str | None:
    """A valid argument where only the type is known."""
    for part, text in (
        ("ndarray", VALUES),
        ("_Values", VALUES),
        ("_Layer", "layers()"),
        ("Tensor", "tensor(({N},))"),
        ("None", "None"),
        ("Optional", "None"),
        ("Path", "path()"),
        ("Module", MODEL),
        ("bool", "False"),
        ("float", "0.5"),
        ("int", "1"),
        ("str", '"a"'),
        ("Sequence", "[]"),
        ("Mapping", "{{}}"),
    ):
        if part in type_name:
            return text
    return "None"
