"""What the text of a fuzzed call is made of: tensors and what is wrong with them, models, files and contexts.

Everything is made anew, and alike, in every call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import cat_rs
from cat_rs import _core
from tests.models import CROSS, add_lora, tiny_unet

# Names that a call's text may use.
inf, nan = math.inf, math.nan
F32, F64, BF16, F16, I64 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64

HUGE = 10**12
"""Rows of an expanded view that no memory holds."""


# ---- tensors


def tensor(shape: tuple[int, ...], dtype: torch.dtype = F32, fill: Any = None) -> torch.Tensor:
    """Random values, the same for the same arguments, or one value."""
    if fill is not None:
        return torch.full(shape, fill, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    else:
        values = torch.arange(math.prod(shape)).reshape(shape) % 3
    try:
        return values.to(dtype)
    except RuntimeError:  # dtypes that hold bits without a meaning
        return torch.empty(shape, dtype=dtype)


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=I64)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# ---- the same tensor, stored or wrapped in another way


def strided(value: torch.Tensor) -> torch.Tensor:
    """Every second element of a larger tensor."""
    return value.repeat_interleave(2, -1)[..., ::2] if value.dim() else value


def transposed(value: torch.Tensor) -> torch.Tensor:
    return value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value


def expanded(value: torch.Tensor) -> torch.Tensor:
    """All rows are one."""
    return value[:1].expand(value.shape) if value.dim() and value.numel() else value


def huge(value: torch.Tensor) -> torch.Tensor:
    """A view of more rows than any memory holds."""
    return value[:1].expand(HUGE, *value.shape[1:]) if value.dim() and value.numel() else value


def overlapping(value: torch.Tensor) -> torch.Tensor:
    """Rows share their elements."""
    return value.flatten().repeat(2).as_strided(value.shape, (1,) * value.dim())


def negative(value: torch.Tensor) -> torch.Tensor:
    """A view whose values are negated when they are read."""
    if value.is_quantized:
        raise TypeError("PyTorch's own operations end the process where they read such a view")
    return torch._neg_view(value)


def conjugate(value: torch.Tensor) -> torch.Tensor:
    return torch.complex(value.float(), value.float()).conj()


def imaginary(value: torch.Tensor) -> torch.Tensor:
    """The imaginary part of a conjugated view: strided and lazily negated."""
    return torch.complex(value.float(), value.float()).conj().imag


def misaligned(value: torch.Tensor) -> torch.Tensor:
    """Elements that begin at an odd address."""
    plain = value.contiguous().flatten()
    memory = bytearray(b"\0" + plain.view(torch.uint8).numpy().tobytes() + b"\0")
    return torch.frombuffer(memory, dtype=value.dtype, offset=1, count=plain.numel()).view(value.shape)


def sparse(value: torch.Tensor) -> torch.Tensor:
    return value.to_sparse()


def csr(value: torch.Tensor) -> torch.Tensor:
    return value.to_sparse_csr()


def mkldnn(value: torch.Tensor) -> torch.Tensor:
    return value.to_mkldnn()


def nested(value: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(value))


def jagged(value: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(value), layout=torch.jagged)


def quantized(value: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)


def meta(value: torch.Tensor) -> torch.Tensor:
    return value.to("meta")


def freed(value: torch.Tensor) -> torch.Tensor:
    """Its storage was freed, as FSDP leaves parameters."""
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def shortened(value: torch.Tensor) -> torch.Tensor:
    """Its storage holds half of what the sizes say."""
    value = value.clone()
    value.untyped_storage().resize_(value.untyped_storage().nbytes() // 2)
    return value


def trained(value: torch.Tensor) -> torch.Tensor:
    """A leaf that requires a gradient."""
    return value.detach().requires_grad_()


def computed(value: torch.Tensor) -> torch.Tensor:
    """Not a leaf, and requires a gradient."""
    return trained(value) * 1


def parameter(value: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(value)


def inference(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return value.clone()


def fake(value: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(value)


def functional(value: torch.Tensor) -> torch.Tensor:
    """As torch.compile wraps tensors to trace them."""
    return torch._to_functional_tensor(value)


def escaped(value: torch.Tensor) -> torch.Tensor:
    """A tensor of vmap that outlived it."""
    kept: list[torch.Tensor] = []
    torch.vmap(lambda each: (kept.append(each), each)[1])(value.unsqueeze(0))
    return kept[0]


def escaped_grad(value: torch.Tensor) -> torch.Tensor:
    """A tensor of torch.func.grad that outlived it."""
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda each: (kept.append(each), each.sum())[1])(value)
    return kept[0]


def distributed(value: torch.Tensor) -> torch.Tensor:
    """A DTensor of a mesh of one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not torch.distributed.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return distribute_tensor(value, init_device_mesh("cpu", (1,)), [Shard(0)])


class Dispatching(torch.Tensor):
    """A wrapper without memory of its own, as quantized weights are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Dispatching:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(cls, lambda each: each.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


def dispatching(value: torch.Tensor) -> torch.Tensor:
    return Dispatching(value)


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


def subclass(value: torch.Tensor) -> torch.Tensor:
    return value.as_subclass(Plain)


def tiled(value: torch.Tensor) -> torch.Tensor:
    """More than the kernels take in one block."""
    return value.repeat(*(9,) * value.dim()) if 0 < value.numel() < 2000 else value


# ---- what is no tensor


class HostileError(Exception):
    """Raised by an argument, not by what it was given to."""


class Hostile:
    """Raises whatever is asked of it."""

    def _refuse(self, *_: Any) -> Any:
        raise HostileError

    __bool__ = __float__ = __index__ = __int__ = __len__ = __iter__ = __fspath__ = __array__ = __getitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __call__ = _refuse


class Boolean(int):
    """An int that is no bool."""


def endless() -> Iterator[int]:
    """Never ends by itself, but takes memory of nobody who does not keep it."""
    yield from iter(int, 1)


def deep(levels: int = 5000) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


# ---- models, optimizers and files


class TinyDenoiser(torch.nn.Module):
    """As a diffusers denoiser is called, but only two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4)
        self.to_q = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.to_k = torch.nn.Linear(CROSS, 4)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        context = self.to_k(encoder_hidden_states).mean(1)
        return self.to_q(sample) + context[:, :, None, None]


def bare() -> torch.nn.Module:
    """A model without an adapter."""
    torch.manual_seed(0)
    return TinyDenoiser().requires_grad_(False)


@functools.cache
def _unet() -> torch.nn.Module:
    return tiny_unet()


def bare_unet() -> torch.nn.Module:
    """A tiny UNet2DConditionModel."""
    return copy.deepcopy(_unet())


def model(**settings: Any) -> torch.nn.Module:
    """A tiny denoiser with a LoRA adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k"], **settings), bare())


def unet(**settings: Any) -> torch.nn.Module:
    """The same with a LoRA adapter."""
    return add_lora(bare_unet(), **settings)


def scheduler(**settings: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**settings)


def flow_scheduler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor(shape, dtype)) for shape in shapes]


def optimizer(**settings: Any) -> cat_rs.FlatAdamW:
    return cat_rs.FlatAdamW(parameters((3, 2), (4,)), **settings)


def optimizer_state(**settings: Any) -> dict[str, Any]:
    return optimizer(**settings).state_dict()


def changed(state: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """A copy of a nested state with one value replaced."""
    state = copy.deepcopy(state)
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state


def without(state: dict[str, Any], key: Any) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def cat_step(**settings: Any) -> cat_rs.CatStep:
    return cat_rs.CatStep(model(), scheduler(), **settings)


def cat_step_state() -> dict[str, Any]:
    return cat_step().state_dict()


def ratio() -> cat_rs.CatFactorRatio:
    return cat_rs.CatFactorRatio(0.5)


def drift_target() -> cat_rs.CatFactorTarget:
    return cat_rs.CatFactorTarget(0.05)


def ramp() -> cat_rs.CatFactorRamp:
    return cat_rs.CatFactorRamp(0.0, 1.0, 10)


_folder: list[Path] = []


def folder() -> Path:
    """A folder for files of this process, kept until it ends."""
    if not _folder:
        _folder.append(Path(tempfile.mkdtemp(prefix="cat-rs-fuzz-")))
    return _folder[0]


def prepare() -> None:
    """Makes now what takes long, so that child processes have it already."""
    for format in ADAPTER_FORMATS:
        adapter_contents(format)
    _lora_file()
    cat_step()


def path(name: str = "adapter.safetensors") -> str:
    """A path where nothing is."""
    place = folder() / f"{len(os.listdir(folder()))}"
    place.mkdir()
    return str(place / name)


ADAPTER_FORMATS = ("diffusers", "kohya", "peft")


@functools.cache
def adapter_contents(format: str) -> dict[str, bytes]:
    """The files of a written adapter: one, or those of a folder for "peft"."""
    with tempfile.TemporaryDirectory() as place:
        written = Path(place, "peft" if format == "peft" else "adapter.safetensors")
        model = unet(alpha_pattern={"to_q": 4}, rank_pattern={"to_k": 2})
        metadata = {"trigger_words": ["sks"], "cat_factor": 1.0}
        cat_rs.save_lora(written, model, format=format, family="sd", metadata=metadata)
        files = sorted(written.iterdir()) if written.is_dir() else [written]
        return {file.name: file.read_bytes() for file in files}


def adapter_file(format: str = "diffusers") -> str:
    """A written adapter, a folder for "peft"."""
    contents = adapter_contents(format)
    place = Path(path()).parent
    for name, content in contents.items():
        (place / name).write_bytes(content)
    return str(place if len(contents) > 1 else place / next(iter(contents)))


@functools.cache
def _lora_file() -> cat_rs.LoraFile:
    return cat_rs.load_lora(adapter_file())


def lora_file() -> cat_rs.LoraFile:
    return copy.deepcopy(_lora_file())


def file_with(content: bytes) -> str:
    place = path()
    Path(place).write_bytes(content)
    return place


def fifo() -> str:
    """A pipe that nobody writes to."""
    place = path()
    os.mkfifo(place)
    return place


def link_to(target: str) -> str:
    place = path()
    os.symlink(target, place)
    return place


def descriptor() -> int:
    """An open file."""
    return os.open(path(), os.O_RDWR | os.O_CREAT)


def state(**settings: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors by PEFT's names."""
    return {
        "unet.mid.to_q.lora_A.weight": tensor((2, 8), **settings),
        "unet.mid.to_q.lora_B.weight": tensor((8, 2), **settings),
    }


def layers(**settings: Any) -> list[Any]:
    """As the extension has them."""
    return [("unet", "mid.to_q", tensor((2, 8), **settings), tensor((8, 2), **settings), None, None, 2.0)]


def bank(**settings: Any) -> cat_rs.TeacherBank:
    place = bank_file(**settings)
    return cat_rs.TeacherBank.load(place, latents=None)


def bank_file(**settings: Any) -> str:
    place = path("bank.safetensors")
    latents, cond = tensor((3, 4, 4, 4)), tensor((3, 2, CROSS))
    cat_rs.TeacherBank.build(model(), scheduler(), latents, cond, path=place, **{"draws": 2, **settings})
    return place


def preservation_set() -> cat_rs.PreservationSet:
    return cat_rs.PreservationSet.load(set_file(), model(), scheduler())


def set_file() -> str:
    from cat_rs.training.preservation_set import write_set

    place, pipeline = path("set.safetensors"), SimpleNamespace(unet=model(), scheduler=scheduler())
    made = {"latents": tensor((3, 4, 4, 4)), "prompt": torch.arange(3)}
    write_set(Path(place), pipeline, ["a", "b", "c"], {"text": tensor((3, 2, CROSS))}, [made], "key")
    return place


def encoder() -> Callable[[Any], torch.Tensor]:
    """An image encoder, as KpsEvaluator takes it."""
    return lambda images: torch.ones(len(images), 4)


def pictures(count: int = 2) -> list[Any]:
    from PIL import Image

    return [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(count)]


# ---- contexts


class _Modes(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _context(name: str) -> Any:
    if name == "fake_mode":
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode(allow_non_fake_inputs=True)
    return {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "meta_device": lambda: torch.device("meta"),
        "dispatch_mode": _Modes,
        "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
        "saved_on_cpu": torch.autograd.graph.save_on_cpu,
        "multithreading_off": lambda: torch.autograd.set_multithreading_enabled(False),
    }[name]()


CONTEXTS = (
    *("no_grad", "inference_mode", "autocast", "meta_device", "dispatch_mode", "fake_mode"),
    *("anomaly", "saved_on_cpu", "multithreading_off"),
)
TRANSFORMS = ("vmap", "grad", "jvp", "functionalize", "in_thread", "checkpoint")


# ---- calls: their arguments are made before they begin

begun = mmap.mmap(-1, 1)
"""Whether the arguments of the running call are made; the parent of a process that died reads it too."""


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    begun[0] = True
    return function(*args, **kwargs)


def used(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls, and does with the result what a caller would do next: backward, a step, entering, printing."""
    begun[0] = True
    return _use(function(*args, **kwargs))


def used_twice(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As ``used``, with a backward pass that can be differentiated again."""
    begun[0] = True
    return _use(function(*args, **kwargs), create_graph=True)


def under(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As ``used``, within a context."""
    with _context(name):
        begun[0] = True
        return _use(function(*args, **kwargs))


def inside(name: str, names: list[Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls within one of PyTorch's transformations of the named arguments, or in another thread."""
    chosen = [kwargs[each] if each in kwargs else args[each] for each in names]

    def call(*moved: Any) -> Any:
        begun[0] = True
        again = dict(zip(names, moved, strict=True))
        positional = [again.get(index, each) for index, each in enumerate(args)]
        return function(*positional, **{key: again.get(key, each) for key, each in kwargs.items()})

    return _transformed(name, call, chosen)


def _transformed(name: str, call: Callable[..., Any], chosen: list[Any]) -> Any:
    if name == "vmap":
        batched = [each.unsqueeze(0).expand(2, *each.shape) for each in chosen]
        return torch.vmap(lambda *each: _summed(call(*each)))(*batched)
    if name == "grad":
        return torch.func.grad(lambda *each: _summed(call(*each)))(*chosen)
    if name == "jvp":
        return torch.func.jvp(lambda *each: _summed(call(*each)), tuple(chosen), tuple(chosen))
    if name == "functionalize":
        return torch.func.functionalize(call)(*chosen)
    if name == "checkpoint":
        return _use(torch.utils.checkpoint.checkpoint(call, *chosen, use_reentrant=False))
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(_caught(call, *chosen)))
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return _use(outcome[0])


def _caught(call: Callable[..., Any], *chosen: Any) -> Any:
    try:
        return call(*chosen)
    except BaseException as error:
        return error


def _summed(value: Any) -> torch.Tensor:
    """A tensor that depends on a call's result, as the transformations ask for."""
    tensors = [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]
    # What only holds its arguments returns huge ones as they are; to read those takes hours.
    few = [each[:1] if each.numel() >= HUGE else each for each in tensors]
    return sum((each.float().sum() for each in few), torch.zeros(()))


def _use(result: Any, *, create_graph: bool = False) -> Any:
    if isinstance(result, cat_rs.FlatAdamW):
        _use_optimizer(result)
    elif isinstance(result, cat_rs.CatStep):
        result(tensor((2, 4, 4, 4)), tensor((2, 2, CROSS)), tensor((2, 2, CROSS)))
        result.load_state_dict(result.state_dict())
    elif isinstance(result, contextlib.AbstractContextManager) and not isinstance(result, torch.nn.Module):
        with result:
            pass
    if isinstance(result, cat_rs.PreservationSamples):
        # It holds what it was given, and computes nothing.
        return result
    leaves = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
    graphs = [each for each in leaves if each.grad_fn is not None and each.dtype in (F32, F64, BF16, F16)]
    if graphs:
        torch.autograd.backward([each.sum() for each in graphs], create_graph=create_graph)
    if not leaves:
        repr(result)
    return result


def _use_optimizer(made: cat_rs.FlatAdamW) -> None:
    for group in made.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    made.step()
    made.load_state_dict(made.state_dict())
    made.zero_grad()


NAMESPACE = {name: value for name, value in globals().items() if not name.startswith("_")} | {
    "_core": _core,
    "Decimal": Decimal,
    "Fraction": Fraction,
}
"""What the text of a call is evaluated in."""
