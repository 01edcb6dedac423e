"""No tensor crashes the interpreter: none without memory of its own, none with less than its shape says.

Each is given as each argument of each function of `_core`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cat_rs
from cat_rs._native import _core
from cat_rs.errors import AdapterError, LayoutError

Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]


def calls() -> Calls:
    """A valid call of every function that takes tensors."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def write(tensor: Tensor) -> None:
        with open(os.devnull, "wb") as file:
            _core.write_safetensors(file.fileno(), os.devnull, [("x", tensor)], {})

    def write_parts(part: Tensor) -> None:
        with open(os.devnull, "wb") as file:
            source = ("float32", (4, 6), iter([part]))
            _core.write_safetensors(file.fileno(), os.devnull, [("x", source)], {})

    def layers(lora_A: Tensor, lora_B: Tensor, alpha: Tensor) -> None:
        _core.adapter_layers([("m.lora_A.weight", lora_A), ("m.lora_B.weight", lora_B), ("m.alpha", alpha)], {}, False)

    def tensors(lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> None:
        _core.adapter_tensors([("unet", "m", lora_A, lora_B, bias, None, 1.0)], "diffusers", None)

    latents = {name: draw(2, 4, 3, 3) for name in ("model_pred", "target", "model_pred_no_trigger", "base_pred")}
    weights = {
        **{name: torch.rand(2) for name in ("sample_weight", "preserve_weight")},
        **{name: torch.rand(2, 1, 3, 3) for name in ("mask", "preserve_mask")},
    }
    lora = {"lora_a": draw(2, 6), "lora_b": draw(5, 2)}
    numbers = {name: torch.tensor(1.0, dtype=torch.float64) for name in ("cat_factor", "scale")}
    sizes = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    state = {name: torch.rand(8) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    settings = torch.tensor([1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0], dtype=torch.float64)
    counts = {"step": torch.tensor(1.0), "skipped": torch.tensor(0)}
    both = (True, True)
    return {
        "cat_loss": (
            _core.cat_loss,
            {**latents, **weights, "cat_factor": 1.0, "mask_normalize": False, "scale": 1.0, "wanted": both},
        ),
        "scale_gradients": (_core.scale_gradients, {"first": draw(3), "second": draw(3), "factor": torch.tensor(2.0)}),
        "student_loss": (
            _core.student_loss,
            {
                "student": draw(4, 4, 3, 3),
                "target": draw(2, 4, 3, 3),
                "base_pred": draw(2, 4, 3, 3),
                **weights,
                **numbers,
            },
        ),
        "noising": (
            _core.noising,
            {
                "latents": draw(2, 4, 3),
                "noise": draw(2, 4, 3),
                "signal_rate": torch.rand(2),
                "noise_rate": torch.rand(2),
                "prediction_type": "epsilon",
                "copies": 2,
            },
        ),
        "lora_linear_forward": (
            _core.lora_linear_forward,
            {"x": draw(3, 6), "weight": draw(5, 6), "bias": draw(5), **lora, "scaling": 1.0},
        ),
        "lora_linear_backward": (
            _core.lora_linear_backward,
            {
                "grad": draw(3, 5),
                "x": draw(3, 6),
                "weight": draw(5, 6),
                **lora,
                "hidden": draw(3, 2),
                "scaling": 1.0,
                "wanted": (True, True, True),
            },
        ),
        "lora_up_forward": (
            _core.lora_up_forward,
            {"y": draw(3, 5), "hidden": draw(3, 2), "lora_b": draw(5, 2), "scaling": 1.0, "channels_second": False},
        ),
        "lora_up_backward": (
            _core.lora_up_backward,
            {
                "grad": draw(3, 5),
                "hidden": draw(3, 2),
                "lora_b": draw(5, 2),
                "scaling": 1.0,
                "channels_second": False,
                "wanted": both,
            },
        ),
        "frozen_conv2d_forward": (
            _core.frozen_conv2d_forward,
            {"x": draw(1, 3, 4, 4), "weight": draw(2, 3, 3, 3), "bias": draw(2), **sizes},
        ),
        "frozen_conv2d_backward": (
            _core.frozen_conv2d_backward,
            {"grad": draw(1, 2, 4, 4), "weight": draw(2, 3, 3, 3), "size": (4, 4), **sizes},
        ),
        "frozen_linear_forward": (
            _core.frozen_linear_forward,
            {"x": draw(3, 6), "weight": draw(5, 6), "bias": draw(5)},
        ),
        "frozen_linear_backward": (_core.frozen_linear_backward, {"grad": draw(3, 5), "weight": draw(5, 6)}),
        "sum_of_squares": (
            _core.sum_of_squares,
            {"grad": draw(8), "sums": torch.zeros(2, dtype=torch.float64), "index": 0},
        ),
        "adamw_step": (
            _core.adamw_step,
            {
                **state,
                "low_precision": torch.zeros(8, dtype=torch.bfloat16),
                "settings": settings,
                "sums": torch.ones(1, dtype=torch.float64),
                **counts,
            },
        ),
        "paired_similarity": (_core.paired_similarity, {"a": draw(3, 4), "b": draw(3, 4)}),
        "cross_similarity": (_core.cross_similarity, {"a": draw(3, 4), "b": draw(2, 4), "reduce": "mean"}),
        "write_safetensors": (write, {"tensor": draw(4, 6)}),
        "write_safetensors, parts": (write_parts, {"part": draw(4, 6)}),
        "adapter_layers": (
            layers,
            {"lora_A": draw(2, 6), "lora_B": draw(5, 2), "alpha": torch.tensor(2.0)},
        ),
        "adapter_tensors": (tensors, {"lora_A": draw(2, 6), "lora_B": draw(5, 2), "bias": draw(5)}),
    }


class Wrapper(Tensor):
    """A subclass that computes in its own way, and has no memory."""

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(function)


def resized(tensor: Tensor, size: int) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(size)
    return tensor


def shifted(tensor: Tensor) -> Tensor:
    """A view behind the start of a storage that was freed: its address is not null."""
    whole = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    view = whole[64:].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return view


def fake(tensor: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def distributed(tensor: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Replicate()])


def csr(tensor: Tensor) -> Tensor:
    return (tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)).to_sparse_csr()


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": lambda tensor: resized(tensor, 0),
    "cut": lambda tensor: resized(tensor, tensor.numel() * tensor.element_size() - 1),
    "freed, shifted": shifted,
    "zero": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "negated": lambda tensor: torch._neg_view(tensor),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed": csr,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.reshape(-1)]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor.reshape(-1)], layout=torch.jagged),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
    "fake": fake,
    "DTensor": distributed,
    "wrapper": Wrapper,
    "parameter of a wrapper": lambda tensor: torch.nn.Parameter(Wrapper(tensor), requires_grad=False),
}


def transformed(call: Callable[[Tensor], Any], tensor: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The call inside of function transforms, which wrap the tensor."""
    calls = {
        "vmap": lambda: torch.func.vmap(lambda each: (call(each), each)[1])(torch.stack([tensor, tensor])),
        "grad": lambda: torch.func.grad(lambda each: (call(each), each.sum())[1])(tensor),
        "jvp": lambda: torch.func.jvp(lambda each: (call(each), each)[1], (tensor,), (tensor,)),
        "functionalize": lambda: torch.func.functionalize(call)(tensor),
    }
    for name, each in calls.items():
        if tensor.is_floating_point() or name in ("vmap", "functionalize"):
            yield name, each


def attempts() -> Iterator[tuple[str, Callable[[], Any]]]:
    for function, (call, arguments) in calls().items():
        for argument, value in arguments.items():
            if not isinstance(value, Tensor):
                continue

            def with_tensor(
                tensor: Tensor, call: Any = call, arguments: dict[str, Any] = arguments, argument: str = argument
            ) -> None:
                call(**{**arguments, argument: tensor})

            for kind, make in TENSORS.items():
                # Not every dtype has every kind.
                try:
                    tensor = make(value)
                except (RuntimeError, NotImplementedError):
                    continue
                yield f"{function}, {argument}: {kind}", lambda call=with_tensor, tensor=tensor: call(tensor)
            for kind, attempt in transformed(with_tensor, value):
                yield f"{function}, {argument}: {kind}", attempt


def attempt_all() -> None:
    """Print each attempt before it is made, and what came of it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for name, attempt in attempts():
        print(name, end=" -> ", flush=True)
        try:
            attempt()
            print("accepted", flush=True)
        except Exception as error:
            text = str(error).partition("\n")[0]
            print(f"{type(error).__name__}: {text}", flush=True)


def test_no_tensor_without_its_memory_is_accepted() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from tests.test_core_arguments import attempt_all; attempt_all()"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=600,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} {done.stderr[-2000:]}"
    assert len(lines) > 800
    assert not [line for line in lines if " -> accepted" in line]
    outcomes = [line.split(" -> ")[1] for line in lines]
    assert not [line for line in lines if line.endswith(": ")], "an error without a text"
    known = (
        "TypeError",
        "LayoutError",
        "DeviceError",
        "DtypeError",
        "ShapeError",
        "AdapterError",
        "InvalidValueError",
    )
    assert not [line for line, outcome in zip(lines, outcomes, strict=True) if not outcome.startswith(known)]


def test_every_function_that_takes_tensors_is_called() -> None:
    stub = (Path(cat_rs.__file__).parent / "_core.pyi").read_text().split("\ndef ")[1:]
    # A _Layer holds tensors too.
    taking = {
        text.split("(")[0] for text in stub if {"Tensor", "_Layer"} & set(re.findall(r"\w+", text.split(") ->")[0]))
    }
    assert taking == {name.split(",")[0] for name in calls()}
    for name, (call, arguments) in calls().items():
        call(**arguments)
        assert hasattr(_core, name.split(",")[0])


def test_plain_subclasses_are_accepted() -> None:
    class Mine(Tensor):
        pass

    for tensor in (torch.ones(2, 3).as_subclass(Mine), torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)):
        assert torch.equal(_core.frozen_linear_forward(tensor, torch.ones(1, 3), None), torch.full((2, 1), 3.0))


def test_save_lora_names_what_has_no_memory(tmp_path: Path) -> None:
    name = "unet.mid_block.x.lora_A.weight"
    state = {name: resized(torch.ones(1, 4), 0), "unet.mid_block.x.lora_B.weight": torch.ones(4, 1)}
    with pytest.raises(
        AdapterError, match=rf"`{name}` must be a tensor with memory for its elements, got one that ends"
    ):
        cat_rs.save_lora(tmp_path / "a.safetensors", state)
    with pytest.raises(AdapterError, match=rf"`{name}`: must be a plain torch\.Tensor, got a .*Hiding"):
        cat_rs.save_lora(tmp_path / "a.safetensors", {**state, name: Hiding(torch.ones(1, 4))})
    assert not list(tmp_path.iterdir())


class Hiding(Wrapper):
    """A wrapper that stays one wherever it is put."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


SAVE_SHARDED = """
import sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
import cat_rs

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
tensors = {"A": torch.arange(8.0).view(2, 4), "B": torch.arange(6.0).view(3, 2)}
names = {part: f"unet.mid_block.x.lora_{part}.weight" for part in tensors}
sharded = {names[part]: distribute_tensor(each, mesh, [Shard(0)]) for part, each in tensors.items()}
cat_rs.save_lora(sys.argv[1], sharded)
state = cat_rs.load_lora(sys.argv[1]).state["unet"]
assert all(torch.equal(state[names[part].removeprefix("unet.")], each) for part, each in tensors.items())
"""


def test_save_lora_gathers_what_is_sharded(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVE_SHARDED, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["cat_loss", "noising", "paired_similarity", "cross_similarity"])
def test_results_without_memory_are_an_error(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    function, arguments = calls()[name]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(LayoutError, match="outside of FakeTensorMode"):
        function(**arguments)


def test_files_are_not_read_without_memory(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = {"unet.mid_block.x.lora_A.weight": torch.ones(1, 4), "unet.mid_block.x.lora_B.weight": torch.ones(4, 1)}
    path = cat_rs.save_lora(tmp_path / "a.safetensors", state)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(LayoutError, match="outside of FakeTensorMode"):
        cat_rs.load_lora(path)
