"""Safetensors files, and the layers of adapters from tensors by name and back.

FLUX files of kohya hold query, key and value as one layer: these are split and joined here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cat_rs.composed.checks import Checks, dtype_name
from cat_rs.composed.names import (
    ANY_DENOISER,
    COMPONENTS,
    KohyaNames,
    Slot,
    Target,
    canonical,
    diffusers_key,
    is_tabled,
    parse_dotted,
    parse_kohya,
    peft_key,
)
from cat_rs.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from cat_rs.errors import AdapterError, CatRsError, InvalidValueError

__all__ = ["adapter_layers", "adapter_tensors", "names_that_fit", "read_safetensors", "write_safetensors"]

_READ, _WRITE = "load_lora", "save_lora"
_WRITE_FILE = "write_safetensors"
# PyTorch's dtypes and the files' names of them, in the order in which they are written.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPE_NAMES = "float64, float32, float16, bfloat16 or integers"
# The longest header that safetensors reads.
_LONGEST_HEADER = 100_000_000
# How many names an error lists.
_LISTED = 8
# How to read what only diffusers has tables for.
_ADVICE = (
    '; what diffusers reads, pipe.load_lora_weights(file, adapter_name="other") gives to a pipeline\'s models, and '
    'save_lora(path, pipe.transformer, adapter_name="other") writes'
)

Path = str | os.PathLike[str]
Named = Sequence[tuple[str, Tensor]]
# The tensors of a layer by part, each with its name.
_Parts = dict[str, tuple[str, Tensor]]


class _Layer(NamedTuple):
    """As `cat_rs.adapter_file.layer.Layer`."""

    component: str
    module: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    alpha: float | None

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        named = {"A": self.lora_A, "B": self.lora_B, "bias": self.bias, "magnitude": self.magnitude}
        return ((part, tensor) for part, tensor in named.items() if tensor is not None)

    @property
    def kohya_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def kohya_scale(self) -> float:
        return self.kohya_alpha / self.rank


def read_safetensors(path: Path) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
    """The tensors of a safetensors file, by name, and its metadata."""
    from safetensors import SafetensorError, safe_open

    _encoded(path)
    damaged = f"{_READ}: {os.fspath(path)}: expected a whole safetensors file, but"
    # safe_open's own errors do not tell a missing file from a folder, or another kind of file from a damaged one.
    if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise AdapterError(f"{damaged} it is a pipe or a device")
    with open(path, "rb") as file:
        length, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        text = file.read(header) if header <= min(length - 8, _LONGEST_HEADER) else b""
    if length < 8:
        raise AdapterError(f"{damaged} it has {length} bytes, less than a header's length takes")
    if header > length - 8:
        raise AdapterError(f"{damaged} its header would have {header} bytes, but the file has {length}")
    if header > _LONGEST_HEADER:
        raise AdapterError(f"{damaged} its header is larger than 100 MB")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            # Copies: the file may be written anew while they are alive.
            tensors = [(name, opened.get_tensor(name).clone()) for name in sorted(opened.keys())]
            json.loads(text, object_pairs_hook=_once)
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{damaged} its header is not valid: {error}") from error
    for name, tensor in tensors:
        if tensor.dtype not in _DTYPES:
            got = dtype_name(tensor.dtype)
            raise AdapterError(f"{_READ}: {os.fspath(path)}: `{name}` must have dtype {_DTYPE_NAMES}, got {got}")
    return tensors, metadata


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuses a name that is there twice, of which readers of JSON keep one in silence."""
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"it has `{name}` twice")
        names.add(name)


def write_safetensors(
    descriptor: int,
    path: Path,
    tensors: Sequence[tuple[str, Tensor | tuple[str, Sequence[int], Iterator[Tensor]]]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file into an open file, from where it is; `path` names it in errors."""
    _encoded(path)
    if not tensors:
        raise AdapterError(f"{_WRITE_FILE}: {os.fspath(path)}: expected tensors to write, got none")
    sources = [(name, *_described(name, source)) for name, source in tensors]
    order = list(_DTYPES)
    # As safetensors does: the widest first, so that all are aligned.
    sources.sort(key=lambda source: (order.index(source[1]), source[0]))
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, dtype, shape, _ in sources:
        if name in fields:
            raise AdapterError(f"{_WRITE_FILE}: expected tensors of different names, got two of `{name}`")
        start, end = end, end + dtype.itemsize * math.prod(shape)
        fields[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    fields = dict(sorted(fields.items()))
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    # As the format asks for, tensors begin at a multiple of 8.
    header += b" " * (-len(header) % 8)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, dtype, shape, parts in sources:
                written = 0
                for part in parts:
                    written += file.write(_bytes(name, part, dtype))
                expected = dtype.itemsize * math.prod(shape)
                if written != expected:
                    raise AdapterError(
                        f"{_WRITE_FILE}: `{name}` must come in parts of {expected} bytes together, got {written}"
                    )
    except OSError as error:
        error.filename = os.fspath(path)
        raise


def _encoded(path: Path) -> None:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        expected = "a path that the file system can encode"
        raise TypeError(f"argument 'path': must be {expected}, got {os.fspath(path)!a}") from None


def _described(name: str, source: Any) -> tuple[torch.dtype, Sequence[int], Iterator[Tensor]]:
    """Dtype, shape and parts of a tensor to write."""
    if isinstance(source, Tensor):
        _check_named(_WRITE_FILE, name, source)
        return source.dtype, source.shape, iter([source])
    name_of_dtype, shape, parts = source
    dtype = next((dtype for dtype in _DTYPES if dtype_name(dtype) == name_of_dtype), None)
    if dtype is None:
        raise _unknown_dtype(_WRITE_FILE, name, name_of_dtype)
    return dtype, shape, parts


def _bytes(name: str, part: Tensor, dtype: torch.dtype) -> Any:
    _check_named(_WRITE_FILE, name, part)
    if part.dtype != dtype:
        expected, got = _DTYPES[dtype], _DTYPES[part.dtype]
        raise AdapterError(f"{_WRITE_FILE}: `{name}` must come in parts of dtype {expected}, got {got}")
    return part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _check_named(op: str, name: str, tensor: object) -> None:
    """Checks a tensor that has a name: dense, on the CPU, with memory for its elements, of a dtype that files hold."""
    try:
        checked = Checks(op).dense(name, tensor)
    except TypeError as error:
        if isinstance(error, CatRsError):
            raise
        raise AdapterError(f"{op}: `{name}`: {str(error).partition(': ')[2]}") from error
    except CatRsError as error:
        raise AdapterError(str(error)) from error
    if not checked.is_cpu:
        raise AdapterError(f"{op}: `{name}` must be on the CPU, got a tensor on {checked.device}")
    if checked.dtype not in _DTYPES:
        raise _unknown_dtype(op, name, dtype_name(checked.dtype))


def _unknown_dtype(op: str, name: str, got: str) -> AdapterError:
    return AdapterError(f"{op}: `{name}` must have dtype {_DTYPE_NAMES}, got {got}")


def adapter_layers(
    tensors: Named, known: Mapping[str, Sequence[str]], saving: bool
) -> tuple[str, str | None, list[tuple[str, str, Tensor, Tensor, Tensor | None, Tensor | None, float | None]]]:
    """Format, family and layers of tensors by name; ``saving`` says which function errors are of."""
    try:
        return _adapter_layers(tensors, known)
    except CatRsError as error:
        if saving:
            raise type(error)(str(error).replace(_READ, _WRITE, 1)) from error
        raise


def names_that_fit(pattern: str, names: Sequence[str]) -> list[bool]:
    """Which names a pattern of a LoraConfig fits."""
    try:
        compiled = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        expected = "a regular expression without look-around and back references"
        raise AdapterError(f"{_READ}: a pattern must be {expected}, got {pattern[:60]!r}: {error}") from error
    return [compiled.fullmatch(name) is not None for name in names]


def _adapter_layers(tensors: Named, known: Mapping[str, Sequence[str]]) -> Any:
    if not tensors:
        raise AdapterError(f"{_READ}: expected tensors of a LoRA, got none")
    for name, tensor in tensors:
        _check_named(_READ, name, tensor)
    # A file may name its layers in several ways at once.
    unknown: list[str] = []
    kohya = _by_place([each for each in tensors if each[0].startswith("lora_")], parse_kohya, unknown)
    dotted = _by_place([each for each in tensors if not each[0].startswith("lora_")], parse_dotted, unknown)
    _refuse_unknown(unknown)
    named = bool(kohya) or any(component for component, _ in dotted)
    unnamed = [module for component, module in dotted if named and not component]
    if unnamed:
        expected = f"names that start with one of {', '.join(COMPONENTS)}"
        raise AdapterError(f"{_READ}: expected {expected}, got {_shown(unnamed)}{_ADVICE}")
    found = _Found()
    denoiser = {module: parts for (component, module), parts in dotted.items() if component == ANY_DENOISER}
    for (component, module), parts in dotted.items():
        if component != ANY_DENOISER:
            found.add(_layer(component, module, parts), 0)
    names, tabled = KohyaNames(known), any(map(is_tabled, denoiser))
    for module, parts in denoiser.items():
        found.add_target(module, names.resolve_denoiser(module, tabled), parts, 0)
    for (_, name), parts in kohya.items():
        found.add_target(name, names.resolve(name), parts, 2 if name.startswith("lora_unet_") else 1)
    found.check()
    layers = [tuple(found.layers[place][0]) for place in sorted(found.layers)]
    return "kohya" if kohya else "diffusers" if named else "peft", found.family, layers


def _by_place(tensors: Named, parse: Any, unknown: list[str]) -> dict[tuple[str, str], _Parts]:
    """The tensors by component and module, or nothing and kohya's name, sorted; `unknown` gets the other names."""
    places: defaultdict[tuple[str, str], _Parts] = defaultdict(dict)
    for name, tensor in tensors:
        key = parse(name)
        if key is None:
            unknown.append(name)
            continue
        parts = places[key.component, key.module]
        if key.part in parts:
            raise AdapterError(f"{_READ}: `{name}` and `{parts[key.part][0]}` are the same tensor of a layer")
        parts[key.part] = (name, tensor)
    return dict(sorted(places.items()))


def _refuse_unknown(names: Sequence[str]) -> None:
    if names:
        dora = any(name.endswith(".dora_scale") for name in names)
        note = " (DoRA in kohya's format is not supported)" if dora else ""
        expected = "expected tensors of LoRA layers, got unknown names"
        raise AdapterError(f"{_READ}: {expected}: {_shown(names)}{note}{_ADVICE}")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more


def _layer(component: str, module: str, parts: _Parts) -> _Layer:
    """A layer from its parts, checked."""
    if "A" not in parts or "B" not in parts:
        raise AdapterError(f"{_READ}: `{module}` must have both matrices of a LoRA, got one")
    (name_A, lora_A), (name_B, lora_B) = parts["A"], parts["B"]
    for name, tensor in (parts["A"], parts["B"]):
        if tensor.dtype not in FLOAT_DTYPES:
            raise AdapterError(f"{_READ}: `{name}` must have dtype {FLOAT_NAMES}, got {dtype_name(tensor.dtype)}")
    a, b = list(lora_A.shape), list(lora_B.shape)
    if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or a[0] == 0:
        expected = f"`{name_A}` must be [r, ...] and `{name_B}` [out, r, ...] with r >= 1"
        raise AdapterError(f"{_READ}: {expected}, got {a} and {b}")
    alpha = _scalar(*parts["alpha"]) if "alpha" in parts else None
    bias, magnitude = (parts[part][1] if part in parts else None for part in ("bias", "magnitude"))
    return _Layer(component, module, lora_A, lora_B, bias, magnitude, alpha)


def _scalar(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise AdapterError(f"{_READ}: `{name}` must be one number, got shape {list(tensor.shape)}")
    value = float(tensor)
    if not math.isfinite(value):
        raise AdapterError(f"{_READ}: `{name}` must be a finite number, got {value}")
    return value


class _Found:
    """The layers found so far, and what stood for none."""

    def __init__(self) -> None:
        # By component and module, with the rank of the name that stood for it.
        self.layers: dict[tuple[str, str], tuple[_Layer, int]] = {}
        self._families: list[str] = []
        self._unknown: list[str] = []
        self._ambiguous: list[str] = []

    def add(self, layer: _Layer, rank: int) -> None:
        """Adds a layer. Of names of different kinds for one layer the first kind counts, as for diffusers."""
        place = layer.component, layer.module
        if place in self.layers and self.layers[place][1] == rank:
            raise AdapterError(f"{_READ}: several names stand for the layer `{layer.module}`")
        self.layers.setdefault(place, (layer, rank))

    def add_target(self, name: str, targets: list[Target], parts: _Parts, rank: int) -> None:
        """Adds what a name of kohya or ComfyUI stands for."""
        if len(targets) != 1:
            (self._ambiguous if targets else self._unknown).append(name)
            return
        (target,) = targets
        if target.family is not None:
            self._families.append(target.family)
        whole = _layer(target.component, name, parts)
        # Files of the first versions have no alpha: their scale is 1.
        for part in _split(whole._replace(alpha=whole.kohya_alpha), target.modules):
            self.add(part, rank)

    def check(self) -> None:
        """Refuses names that stood for nothing, or for several layers."""
        _refuse_unknown(self._unknown)
        if self._ambiguous:
            names = _shown(self._ambiguous)
            raise AdapterError(f"{_READ}: names that fit several layers of the model: {names}")

    @property
    def family(self) -> str | None:
        """The family, where the names tell."""
        return "flux" if "flux" in self._families else self._families[-1] if self._families else None


def _split(whole: _Layer, modules: Sequence[str]) -> list[_Layer]:
    """The layers of a joined one: rows of B each.

    Where every block has columns of B of its own, each gets its share of A; else all have the same A. A block of zeros
    is a layer that has no LoRA.
    """
    if len(modules) == 1:
        return [whole._replace(module=modules[0])]
    blocks, share = len(modules), whole.rank // len(modules)
    B_blocks = whole.lora_B.split(_block_rows(whole, blocks))
    columns = [slice(index * share, (index + 1) * share) for index in range(blocks)]
    own = whole.rank % blocks == 0 and all(
        not block[:, : own.start].any() and not block[:, own.stop :].any()
        for block, own in zip(B_blocks, columns, strict=True)
    )
    layers = []
    for module, block, column in zip(modules, B_blocks, columns, strict=True):
        lora_A, lora_B = (whole.lora_A[column], block[:, column]) if own else (whole.lora_A, block)
        if own and not lora_A.any() and not lora_B.any():
            continue
        alpha = None if whole.alpha is None else whole.alpha / blocks if own else whole.alpha
        layers.append(_Layer(whole.component, module, lora_A.clone(), lora_B.clone(), None, None, alpha))
    return layers


def _block_rows(whole: _Layer, blocks: int) -> list[int]:
    """Rows of each block: query, key and value are as wide as the input, the rest is the feed-forward layer's."""
    rows, width = len(whole.lora_B), whole.lora_A.shape[1]
    sizes = [width] * 3 + ([rows - 3 * width] if blocks > 3 else [])
    if sum(sizes) != rows or min(sizes) <= 0:
        how = "more than" if blocks > 3 else "exactly"
        raise AdapterError(
            f"{_READ}: `{whole.module}` joins {blocks} layers with {width} inputs: expected {how} 3 * {width} rows, "
            f"got {rows}"
        )
    return sizes


def adapter_tensors(layers: Sequence[Any], format: str, family: str | None) -> list[tuple[str, Tensor]]:
    """The tensors that a format has for layers; the family is needed for kohya's alone."""
    for argument, value, known in (
        ("format", format, ("diffusers", "peft", "kohya")),
        ("family", family, ("sd", "sdxl", "flux", None)),
    ):
        if value not in known:
            expected = {"format": "diffusers, peft or kohya", "family": "sd, sdxl or flux"}[argument]
            raise InvalidValueError(f"{_WRITE}: `{argument}` must be {expected}, got {value}")
    if not layers:
        raise AdapterError(f"{_WRITE}: expected an adapter with layers, got none")
    checked = [_Layer(*layer) for layer in layers]
    for layer in checked:
        for part, tensor in layer.parts():
            _check_named(_WRITE, peft_key(layer.module, part), tensor)
    if format == "kohya":
        if family is None:
            expected = "sd, sdxl or flux: this model's is not recognized"
            raise InvalidValueError(f"{_WRITE}: `family` must be {expected}, got None")
        return _to_kohya(checked, family)
    if format == "peft":
        return [(peft_key(layer.module, part), tensor) for layer in checked for part, tensor in layer.parts()]
    for layer in checked:
        if layer.component not in COMPONENTS:
            got = json.dumps(layer.component)
            raise AdapterError(f"{_WRITE}: the component must be one of {', '.join(COMPONENTS)}, got {got}")
    return [
        (diffusers_key(layer.component, layer.module, part), tensor)
        for layer in checked
        for part, tensor in layer.parts()
    ]


def _to_kohya(layers: Sequence[_Layer], family: str) -> list[tuple[str, Tensor]]:
    slots: dict[str, tuple[Slot, dict[int, _Layer]]] = {}
    unknown = []
    for layer in layers:
        if layer.bias is not None or layer.magnitude is not None:
            what = "DoRA" if layer.bias is None else "a bias of lora_B"
            raise AdapterError(f"{_WRITE}: kohya's format has no place for {what}, got one at `{layer.module}`")
        module = canonical(layer.component, layer.module)
        slot = KohyaNames.slot(family, layer.component, module)
        if slot is None:
            unknown.append(f"{layer.component}.{module}")
            continue
        slots.setdefault(slot.name, (slot, {}))[1][slot.modules.index(module)] = layer
    if unknown:
        expected = f"kohya has no names for these layers of family {family}"
        raise AdapterError(f"{_WRITE}: {expected}: {_shown(unknown)}")
    tensors = []
    for name, (slot, joined) in sorted(slots.items()):
        if len(slot.modules) == 1:
            down, up, alpha = joined[0].lora_A, joined[0].lora_B, joined[0].kohya_alpha
        else:
            down, up, alpha = _join(name, len(slot.modules), joined)
        number = torch.tensor(alpha, dtype=torch.float32)
        if not number.isfinite():
            raise AdapterError(f"{_WRITE}: `{name}.alpha` must be a finite number in float32, got {alpha}")
        tensors += [
            (f"{name}.lora_down.weight", down),
            (f"{name}.lora_up.weight", up),
            (f"{name}.alpha", number),
        ]
    return tensors


def _join(name: str, blocks: int, layers: Mapping[int, _Layer]) -> tuple[Tensor, Tensor, float]:
    """One layer that computes what several do.

    B is block-diagonal, and every block has the largest rank, so that the blocks can be told apart again. Exact where
    all scales are the same.
    """
    first = layers[min(layers)]
    width, rank = first.lora_A.shape[1], max(layer.rank for layer in layers.values())
    # Where every scale is 0, any other than 0 leaves the values of B as they are.
    scale = next((layer.kohya_scale for _, layer in sorted(layers.items()) if layer.kohya_scale), None)
    rows = [width] * 3
    if blocks > 3:
        # FLUX's feed-forward layer is four times as wide; an absent layer's rows are zeros.
        rows.append(len(layers[3].lora_B) if 3 in layers else 4 * width)
    down = torch.zeros(rank * blocks, width, dtype=first.lora_A.dtype)
    up = torch.zeros(sum(rows), rank * blocks, dtype=first.lora_B.dtype)
    for index, layer in sorted(layers.items()):
        a, b = list(layer.lora_A.shape), list(layer.lora_B.shape)
        if len(a) != 2 or a[1] != width or b[0] != rows[index]:
            expected = f"must map {width} to {rows[index]} values to fit `{name}`"
            raise AdapterError(f"{_WRITE}: `{layer.module}` {expected}, got {a} and {b}")
        start = index * rank
        down[start : start + layer.rank] = layer.lora_A
        ratio = 1.0 if scale is None else layer.kohya_scale / scale
        block = up[sum(rows[:index]) :][: rows[index], start : start + layer.rank]
        block.copy_(layer.lora_B).mul_(ratio)
    return down, up, (scale or 0.0) * rank * blocks
