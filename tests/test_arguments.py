"""What an argument cannot be is refused by an error that names it, what was expected and what came.

Found by the fuzzer, ``make fuzz``; a line each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cat_rs
from cat_rs import PreservationSet, _core
from cat_rs.arguments import shown
from cat_rs.errors import CatRsError, KernelError
from cat_rs.ops.lora_up import lora_up_operator
from cat_rs.ops.noising import noising_operator
from tests.fuzz import make
from tests.fuzz.make import freed, inference, tensor

VALUES = [0.5, 0.75, 1.0]
LATENTS = {name: tensor((2, 4, 4, 4)) for name in ("model_pred", "target", "model_pred_no_trigger", "base_pred")}
LAYER = {
    "x": tensor((2, 8)),
    "weight": tensor((6, 8)),
    "bias": None,
    "lora_A": tensor((2, 8)),
    "lora_B": tensor((6, 2)),
}
GRID = {"weight": tensor((6, 8, 3, 3)), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
BACKWARD = {
    "grad": tensor((2, 6)),
    "x": tensor((2, 8)),
    "weight": tensor((6, 8)),
    "lora_a": tensor((2, 8)),
    "lora_b": tensor((6, 2)),
    "hidden": tensor((2, 2)),
    "scaling": 0.5,
    "wanted": (True, True, True),
}

Case = tuple[Callable[[], Any], str]


def core(name: str, **arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(_core, name)(**arguments)


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(3))]


def step(**arguments: Any) -> cat_rs.StepMetrics:
    cond = tensor((2, 2, 16))
    return make.cat_step()(**{"latents": tensor((2, 4, 4, 4)), "cond": cond, "cond_no_trigger": cond, **arguments})


def quantized(*shape: int) -> torch.Tensor:
    """PyTorch warns that it will not make such tensors for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.empty(shape, dtype=torch.quint8)


REFUSED: dict[str, Case] = {
    # Operations and statistics.
    "factor-text": (lambda: cat_rs.cat_loss(**LATENTS, cat_factor="a"), "`cat_factor` must be a number, got 'a'"),  # type: ignore[arg-type]
    "factor-huge": (lambda: cat_rs.cat_loss(**LATENTS, cat_factor=10**400), "`cat_factor` must be a number, got 1000"),
    "scaling": (lambda: cat_rs.lora_linear(**LAYER, scaling=None), "`scaling` must be a number, got None"),  # type: ignore[arg-type]
    "loss-in-vmap": (
        lambda: torch.vmap(lambda target: cat_rs.cat_loss(**{**LATENTS, "target": target}))(tensor((3, 2, 4, 4, 4))),
        "`target` must be a plain tensor, got one of torch.func",
    ),
    "loss-of-inference": (
        lambda: cat_rs.cat_loss(
            **{**LATENTS, "model_pred": make.trained(tensor((2, 4, 4, 4))), "target": inference(tensor((2, 4, 4, 4)))}
        ),
        "`target` must be usable for a gradient, got an inference tensor",
    ),
    "snr-timesteps": (lambda: cat_rs.snr_weights([1], torch.rand(9), 5.0), "`timesteps` must be a torch.Tensor"),  # type: ignore[arg-type]
    "snr-range": (
        lambda: cat_rs.snr_weights(torch.tensor([9]), torch.rand(9), 5.0),
        "`timesteps` must be in 0..8, got 9..9",
    ),
    "snr-freed": (
        lambda: cat_rs.snr_weights(freed(torch.tensor([1])), torch.rand(9), 5.0),
        "`timesteps` must have 8 bytes of memory, got a tensor with 0",
    ),
    "snr-escaped": (
        lambda: cat_rs.snr_weights(torch.tensor([1]), make.escaped(torch.rand(9)), 5.0),
        "`alphas_cumprod` must be a plain tensor, got one that outlived its torch.func call",
    ),
    "snr-gamma-huge": (lambda: cat_rs.snr_weights(torch.tensor([1]), torch.rand(9), 10**400), "`gamma` must be > 0"),
    "operator-none": (
        lambda: noising_operator(None, tensor((2, 4)), tensor((2,)), tensor((2,)), "flow", 1),
        "'latents': .*NoneType",
    ),
    "operator-freed": (
        lambda: lora_up_operator(freed(tensor((2, 6))), tensor((2, 2)), tensor((6, 2)), 0.5, False),
        "`y` must have 48 bytes of memory, got a tensor with 0",
    ),
    "snr-gamma": (lambda: cat_rs.snr_weights(torch.tensor([1]), torch.rand(9), "a"), "`gamma` must be > 0, got 'a'"),  # type: ignore[arg-type]
    "objects": (
        lambda: cat_rs.similarity(np.zeros((2, 2), dtype=object), np.zeros((2, 2))),
        "`a` must be an array of floats, got a ndarray",
    ),
    "values": (lambda: cat_rs.harmonic_mean({}), "`values` must be numbers, got a dict of length 0"),
    "values-bits": (
        lambda: cat_rs.harmonic_mean(torch.empty(1, dtype=torch.bits8)),
        "`values` must be numbers, got torch.bits8",
    ),
    "values-list-freed": (
        lambda: cat_rs.harmonic_mean([freed(torch.ones(3))]),
        "`values` must have 12 bytes of memory, got a tensor with 0",
    ),
    "clusters-list-freed": (
        lambda: cat_rs.bootstrap_interval(VALUES, clusters=[freed(torch.ones(2)), 1, 2]),
        "`clusters` must have 8 bytes of memory, got a tensor with 0",
    ),
    "clusters": (lambda: cat_rs.bootstrap_interval(VALUES, clusters=[[1], 2]), "`clusters` must be integers"),
    "seed": (lambda: cat_rs.bootstrap_interval(VALUES, seed="a"), "`seed` must be in 0..2.*64 - 1, got 'a'"),  # type: ignore[arg-type]
    "statistic": (lambda: cat_rs.bootstrap_interval(VALUES, np.zeros(2)), "`statistic` must be 'mean' or"),  # type: ignore[arg-type]
    "resamples-2**63": (
        lambda: cat_rs.bootstrap_interval(VALUES, resamples=2**63),
        "'resamples': must be an integer in .*, got 9223372036854775808",
    ),
    "two-groups": (lambda: cat_rs.kps_difference(3, 3), "`a` must be two groups, without and with the trigger, got 3"),  # type: ignore[arg-type]
    # The extension.
    "conv-padding": (
        core("frozen_conv2d_backward", **GRID, grad=tensor((2, 6, 4, 4)), size=(4, 4, 4)),
        "'size': must be two integers .*, got a tuple of length 3",
    ),
    "conv-overflow": (
        core("frozen_conv2d_forward", **{**GRID, "padding": (2**62, 2**62)}, x=tensor((2, 8, 4, 4)), bias=None),
        r"`padding` must be small enough for sizes below 2\^63",
    ),
    "conv-no-batch": (
        core("frozen_conv2d_backward", **GRID, grad=tensor((0, 6, 4, 4)), size=(4, 4)),
        r"`grad` must have shape \[1, 6, 4, 4\], got \[0, 6, 4, 4\]",
    ),
    "up-inference": (
        core(
            "lora_up_forward",
            y=inference(tensor((2, 6))),
            hidden=tensor((2, 2)),
            lora_b=tensor((6, 2)),
            scaling=0.5,
            channels_second=False,
        ),
        "`y` must be a tensor that may be written, got an inference tensor",
    ),
    "conv-empty": (
        core("frozen_conv2d_forward", **{**GRID, "weight": tensor((0, 8, 3, 3))}, x=tensor((2, 8, 4, 4)), bias=None),
        "`weight` must have shape .* with no empty dimension",
    ),
    "copies": (
        core(
            "noising",
            latents=tensor((2, 4)),
            noise=tensor((2, 4)),
            signal_rate=tensor((2,)),
            noise_rate=tensor((2,)),
            prediction_type="flow",
            copies=2**63,
        ),
        r"`copies` must be few enough for a batch below 2\^63",
    ),
    "wanted": (
        core("lora_linear_backward", **{**BACKWARD, "wanted": (True, 2)}),
        "'wanted': must be a tuple of three bools, got a tuple of length 2",
    ),
    "gradient-shape": (
        core("lora_linear_backward", **{**BACKWARD, "grad": tensor((2, 5))}),
        r"`grad` must have shape \[2, 6\], got \[2, 5\]",
    ),
    "gradient-dtype": (
        core("lora_linear_backward", **{**BACKWARD, "grad": tensor((2, 6), torch.uint8)}),
        "`grad` must have dtype .*, got uint8",
    ),
    "adamw-int5": (
        core(
            "adamw_step",
            param=tensor((2,)),
            grad=tensor((2,)),
            exp_avg=tensor((2,)),
            exp_avg_sq=tensor((2,)),
            low_precision=None,
            settings=torch.ones(6, dtype=torch.float64),
            sums=torch.ones(1, dtype=torch.float64),
            step=tensor((), torch.int5),
            skipped=None,
        ),
        "`step` must have dtype numbers of whole bytes, got one of raw bits or parts of a byte",
    ),
    "int5": (core("paired_similarity", a=tensor((2, 2), torch.int5), b=tensor((2, 2))), "`a` must have dtype"),
    "reduce": (
        core("cross_similarity", a=tensor((2, 2)), b=tensor((2, 2)), reduce="\ud800"),
        "'reduce': must be a text",
    ),
    "tensors": (core("adapter_layers", tensors="a", known={}, saving=False), "'tensors': must be a sequence of"),
    # Factors, the optimizer and the step.
    "ramp": (lambda: cat_rs.CatFactorRamp(0.0, "a", 3), "`end` must be a finite number >= 0, got 'a'"),  # type: ignore[arg-type]
    "ramp-step": (lambda: make.ramp()("a"), "`step` must be a number, got 'a'"),  # type: ignore[arg-type]
    "ratio": (lambda: cat_rs.CatFactorRatio(np.zeros(2)), "`ratio` must be a finite number > 0, got a ndarray"),  # type: ignore[arg-type]
    "ratio-term": (lambda: make.ratio().update(torch.ones(2), 1.0), r"`diffusion` must be a number .*, got \[2\]"),
    "ratio-state": (lambda: make.ratio().load_state_dict([]), "`state_dict` must be what state_dict"),  # type: ignore[arg-type]
    "lr": (lambda: cat_rs.FlatAdamW(params(), lr="a"), "`lr` must be a finite number >= 0, got 'a'"),  # type: ignore[arg-type]
    "betas": (lambda: cat_rs.FlatAdamW(params(), betas=0.5), "`betas` must be two numbers in .*, got 0.5"),  # type: ignore[arg-type]
    "betas-freed": (
        lambda: cat_rs.FlatAdamW(params(), betas=(freed(torch.ones(())), 0.9)),  # type: ignore[arg-type]
        "`betas` must have 4 bytes of memory, got a tensor with 0",
    ),
    "shares-freed": (
        lambda: PreservationSet.joined([make.preservation_set()] * 2, shares=[freed(torch.ones(())), 1.0]),  # type: ignore[list-item]
        "`shares` must have 4 bytes of memory, got a tensor with 0",
    ),
    "shares-deep": (
        lambda: PreservationSet.joined([make.preservation_set()] * 2, shares=[make.deep(), 1.0]),  # type: ignore[list-item]
        "`shares` must be ",
    ),
    "group": (lambda: make.optimizer().add_param_group({"lr": 1.0}), "`param_group` must be a parameter group"),
    "group-betas": (
        lambda: make.optimizer().add_param_group({"params": params(), "betas": 0.5}),
        "`betas` must be two numbers in",
    ),
    "closure": (lambda: make.optimizer().step(closure=3), "`closure` must be a function or None, got 3"),  # type: ignore[arg-type]
    "copy": (lambda: make.optimizer().low_precision_copy({}), "`param` must be a torch.Tensor, got dict"),  # type: ignore[arg-type]
    "optimizer-state": (lambda: make.optimizer().load_state_dict(3), "`state_dict` must be a state dict of"),  # type: ignore[arg-type]
    "optimizer-sparse": (
        lambda: cat_rs.FlatAdamW([torch.nn.Parameter(torch.eye(3).to_sparse())]),
        "`params` must be dense, got one of layout torch.sparse_coo",
    ),
    "optimizer-model": (lambda: cat_rs.FlatAdamW(torch.nn.Linear(2, 2)), "`params` must be parameters or groups"),  # type: ignore[arg-type]
    "optimizer-freed": (
        lambda: cat_rs.FlatAdamW([freed(torch.ones(3)).requires_grad_()]),
        "`params` must have 12 bytes of memory",
    ),
    "model": (lambda: cat_rs.CatStep(3, make.scheduler()), "`model` must be a torch.nn.Module, got 3"),  # type: ignore[arg-type]
    "accumulate": (lambda: make.cat_step(accumulate=1.5), "`accumulate` must be an integer of at least 1, got 1.5"),
    "generator": (lambda: make.cat_step(generator=3), "`generator` must be a torch.Generator or None, got 3"),
    "predict": (lambda: make.cat_step(predict=3), "`predict` must be a function or None, got 3"),
    "encoders": (lambda: make.cat_step(text_encoders=3), "`text_encoders` must be a sequence of modules, got 3"),
    "step-latents": (
        lambda: step(latents=tensor((2, 4, 4, 4), torch.int16)),
        "`latents` must have dtype float32, .*, got int16",
    ),
    "step-sync": (lambda: step(sync_gradients=torch.ones(0)), "`sync_gradients` must be True, False or None, got"),
    "step-fake": (
        lambda: step(mask=make.fake(torch.ones(2, 1, 4, 4))),
        "`mask` must be a plain dense tensor, got a Fake",
    ),
    "step-nested": (
        lambda: step(cond=make.jagged(tensor((2, 2, 16)))),
        "`cond` must be a plain dense tensor, got a NestedTensor",
    ),
    "step-escaped": (
        lambda: step(timesteps=make.escaped(torch.ones(2, dtype=torch.int64))),
        "`timesteps` must be a plain dense tensor, got one of torch.func",
    ),
    "follower-quantized": (
        lambda: make.drift_target().update(diffusion=1.0, cat=quantized()),
        "`cat` must be a plain tensor, got a quantized one",
    ),
    "snr-bytes-of-quantized": (
        lambda: cat_rs.snr_weights(quantized(1).view(torch.uint8), torch.rand(9), 5.0),
        "`timesteps` must be a plain tensor, got a quantized one",
    ),
    "kps-functional-freed": (
        lambda: cat_rs.kps(*[make.functional(freed(torch.ones(2, 2)))] * 4),
        "`a` must have 16 bytes of memory",
    ),
    "bank-functional-freed": (
        lambda: cat_rs.TeacherBank.load(make.bank_file(), latents=make.functional(freed(tensor((3, 4, 4, 4))))),
        "`latents` must have 768 bytes of memory",
    ),
    "trigger-freed": (
        lambda: cat_rs.remove_trigger("a sks cat", [freed(torch.ones(3))]),  # type: ignore[list-item]
        "trigger_words: expected words, got a Tensor",
    ),
    "step-state": (lambda: make.cat_step().load_state_dict([]), "`state_dict` must be what state_dict"),  # type: ignore[arg-type]
    "patch": (lambda: cat_rs.patch_peft(None), "`model` must be a torch.nn.Module, got None"),  # type: ignore[arg-type]
    "unpatch": (lambda: cat_rs.unpatch_peft("a"), "`model` must be a torch.nn.Module, got 'a'"),  # type: ignore[arg-type]
    "disabled": (lambda: cat_rs.adapter_disabled(3).__enter__(), "`model` must be a torch.nn.Module, got 3"),  # type: ignore[arg-type]
    # Files.
    "load-path": (lambda: cat_rs.load_lora(3), "`path` must be a path, got 3"),  # type: ignore[arg-type]
    "load-zero-byte": (lambda: cat_rs.load_lora("a\0b"), "`path` must be a path, got"),
    "load-model": (lambda: cat_rs.load_lora(make.adapter_file(), model=3), "`model` must be a torch.nn.Module, got 3"),  # type: ignore[arg-type]
    "load-name": (lambda: make.lora_file().load_into(make.bare_unet(), adapter_name="."), "`adapter_name` must be"),
    "save-path": (lambda: cat_rs.save_lora(3, make.state()), "`path` must be a path, got 3"),  # type: ignore[arg-type]
    "save-state": (lambda: cat_rs.save_lora(make.path(), 3), "`model_or_state` must be a module, a LoraFile or"),  # type: ignore[arg-type]
    "save-dtype": (lambda: cat_rs.save_lora(make.path(), make.state(), dtype="a"), "`dtype` must be a floating dtype"),  # type: ignore[arg-type]
    "save-metadata": (lambda: cat_rs.save_lora(make.path(), make.state(), metadata=3), "`metadata` must be a mapping"),  # type: ignore[arg-type]
    "load-list": (lambda: make.lora_file().load_into(make.bare_unet(), adapter_name=["a"]), "`adapter_name` must be"),  # type: ignore[arg-type]
    "load-component": (
        lambda: cat_rs.load_lora(make.adapter_file(), model=make.model()),
        "`model` or `component`: expected layers of transformer, got only unet",
    ),
    "save-nothing": (lambda: cat_rs.save_lora(make.path(), {}), "`model_or_state` must have tensors of a LoRA, got"),
    "save-half-a-letter": (
        lambda: cat_rs.save_lora(make.path(), {"a\ud800.lora_A.weight": torch.ones(2, 2)}),
        r"`model_or_state` must be tensors by names in Unicode, got 'a\\ud800.lora_A.weight'",
    ),
    "kps-wrapped": (
        lambda: cat_rs.kps(*[make.dispatching(torch.ones(2, 2))] * 4),
        "base_no_trigger .*'a': must be a plain torch.Tensor, got a tests.fuzz.make.Dispatching",
    ),
    "bank-draws-huge": (
        lambda: cat_rs.TeacherBank.build(
            make.model(), make.scheduler(), tensor((2, 4, 4, 4)), tensor((2, 2, 16)), draws=2**62
        ),
        "`draws` must be few enough for the memory, got 4611686018427387904",
    ),
    "bank-draws": (
        lambda: cat_rs.TeacherBank.build(
            make.model(), make.scheduler(), tensor((2, 4, 4, 4)), tensor((2, 2, 16)), draws="a"
        ),  # type: ignore[arg-type]
        "`draws` must be an integer of at least 1, got 'a'",
    ),
    "bank-pipe": (lambda: cat_rs.TeacherBank.load(make.fifo(), latents=None), "`path` must be a file, got .* a pipe"),
    "bank-index": (
        lambda: make.bank().draw(make.jagged(torch.zeros(2, 2, dtype=torch.int64))),
        "must be a plain dense tensor, got a NestedTensor",
    ),
    "bank-path": (lambda: cat_rs.TeacherBank.load(3, latents=None), "`path` must be a path, got 3"),  # type: ignore[arg-type]
    "encoder-pictures": (lambda: cat_rs.KpsEvaluator(make.encoder()).embed_images(3), "expected a folder, .* got 3"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "text"), [pytest.param(*row, id=name) for name, row in REFUSED.items()])
def test_refused_by_name(call: Callable[[], Any], text: str) -> None:
    with pytest.raises((CatRsError, TypeError), match=text):
        call()


# More memory than there is: an error, where an allocation that must succeed would end the process.
TOO_LARGE: dict[str, Case] = {
    "resamples": (
        lambda: cat_rs.bootstrap_interval(VALUES, resamples=10**14),
        "not enough memory for the .* `resamples`",
    ),
    "resamples-2**62": (
        lambda: cat_rs.bootstrap_interval(VALUES, resamples=2**62),
        "not enough memory .* `resamples`",
    ),
    "rows": (
        lambda: cat_rs.similarity(torch.ones(1, 4).expand(10**14, 4), torch.ones(1, 4).expand(10**14, 4)),
        "not enough memory for the .* `a`",
    ),
    "expanded": (
        lambda: cat_rs.cat_loss(**{name: value[:1].expand(10**14, 4, 4, 4) for name, value in LATENTS.items()}),
        "cat_loss: libtorch: not enough memory for .* bytes",
    ),
}


@pytest.mark.parametrize(("call", "text"), [pytest.param(*row, id=name) for name, row in TOO_LARGE.items()])
def test_too_large_for_memory_is_an_error(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(KernelError, match=text):
        call()


def test_a_loss_beyond_float32_is_infinite() -> None:
    large = {name: value * 1e30 for name, value in LATENTS.items()}
    large["target"] = -large["target"]
    assert cat_rs.cat_loss(**large).item() == float("inf")


def test_an_error_of_the_model_tells_what_it_was_called_with() -> None:
    with pytest.raises(RuntimeError) as caught:
        make.cat_step()(tensor((2, 4, 4, 4)), tensor((2, 2, 5)), tensor((2, 2, 5)))
    if hasattr(caught.value, "__notes__"):
        assert "`latents` and `cond` must be what `model` takes, got latents [2, 4, 4, 4]" in caught.value.__notes__[0]


SHOWN = {
    "number": (3, "3"),
    "text": ("a", "'a'"),
    "long": ("a" * 100, f"'{'a' * 29}...{'a' * 29}'"),
    "digits": (10**5000, "a int"),
    "few": ((1, 2), "(1, 2)"),
    "list": (["a", 2], "a list of length 2"),
    "path": (Path("a"), "'a'"),
    "dtype": (torch.float32, "torch.float32"),
    "freed": (freed(torch.ones(3)), "a Tensor"),
    "cycle": (make.cyclic(), "a dict of length 1"),
}


@pytest.mark.parametrize(("value", "text"), [pytest.param(*row, id=name) for name, row in SHOWN.items()])
def test_values_are_shown_shortly(value: object, text: str) -> None:
    assert shown(value) == text
