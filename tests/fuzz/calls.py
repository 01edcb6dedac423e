"""Random calls: valid arguments, of which some are made wrong.

A call is text. The same ``random.Random`` makes the same calls.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tests.fuzz import make
from tests.fuzz.targets import SIZES, Target

__all__ = ["Argument", "Call", "random_call"]

DTYPES = sorted(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))

WRAPPERS = (
    *("strided", "transposed", "expanded", "huge", "overlapping", "negative", "conjugate", "imaginary", "misaligned"),
    *("sparse", "csr", "mkldnn", "nested", "jagged", "quantized", "meta", "freed", "shortened", "trained", "computed"),
    *("parameter", "inference", "fake", "functional", "escaped", "escaped_grad", "distributed", "dispatching"),
    *("subclass", "tiled"),
)
"""Functions of a tensor in :mod:`tests.fuzz.make`."""

METHODS = (
    *(".unsqueeze(0)", ".flatten()", "[0]", "[..., :1]", "[:0]", "[..., :0]", ".squeeze()", ".sum()", ".mT", ".T"),
    *(".tolist()", ".numpy()", ".item()", " * nan", " * inf", " * 1e38", " * 1e-42", " * 0", " - 1", ".abs()"),
    *(".unsqueeze(-1)", ".repeat(2, *[1] * 9)", ".view(torch.uint8)", ".storage()", ".__dlpack__()", ".shape", ".t"),
    *(".to_mkldnn().to_dense()", ".contiguous(memory_format=torch.channels_last)", ".expand(3, *[-1] * 4)"),
)
"""What is written behind a tensor."""

NUMBERS = (
    *("0", "1", "-1", "2", "3", "17", "1000", "2**31", "2**32", "2**62", "2**63 - 1", "2**63", "2**64", "-2**63"),
    *("10**12", "10**400", "0.0", "-0.0", "0.5", "1.0", "-1.0", "1e-300", "1e300", "3.4e38", "nan", "inf", "-inf"),
    *("True", "np.float32(0.5)", "np.int64(3)", "torch.tensor(0.5)", "torch.tensor(3)", "Boolean(1)", "1j"),
    *("Fraction(1, 3)", 'Decimal("0.5")', 'Decimal("nan")'),
)
TEXTS = (
    *('""', '"text"', '"mean"', '"max"', '"epsilon"', '"v_prediction"', '"flow"', '"kohya"', '"peft"', '"sdxl"'),
    *('"a" * 100_000', '"\\ud800"', '"a\\0b"', '"ß İ ſ"', '"\\n"', 'b"bytes"', '"."', "path()"),
    *('file_with(b"")', 'file_with(b"\\x08" + b"\\0" * 7 + b"{}      ")', 'adapter_file("peft")', 'Path("\\ud800")'),
    *('adapter_file("kohya")', "Path(path())", "folder()", '"%s" * 9', "lora_file()", "bank_file()"),
)
SPECIAL_FILES = ('"/dev/zero"', '"/dev/null"', '"/proc/self/mem"', '"/"', "fifo()", 'link_to("/dev/zero")')
"""What only readers are given."""
OTHERS = (
    *("None", "[]", "()", "{}", "set()", "object()", "object", "Hostile()", "[None]", "(1,)", "(1, 2)", "(1, 2, 3)"),
    *("[1.5, 2]", "[nan, 1.0]", '["a", "b"]', '{"a": 1}', '{1: "a"}', "lambda *_: None", "iter(())", "range(3)"),
    *("(x for x in (1, 2))", "deep()", "cyclic()", "slice(1)", "...", "NotImplemented", "torch", "torch.float32"),
    *('torch.device("meta")', "torch.Generator()", "np.zeros(3)", "np.zeros((2, 2), dtype=object)", "np.zeros(())"),
    *('np.array(["a"])', "np.arange(4)[::-1]", 'np.zeros(4, dtype=">f8")', 'np.zeros(4, dtype="f4")', "np.ones(0)"),
    *("np.array([nan, 1.0, 0.0, 2.0])", 'np.arange(4).astype("u8") + 2**63', 'bytearray(b"abc")', 'memoryview(b"ab")'),
    *("bare()", "model()", "unet()", "torch.nn.Linear(2, 2)", "scheduler()", "flow_scheduler()", "optimizer()"),
    *("model(use_dora=True)", "model().half()", 'model().to("meta")', "model().requires_grad_(False)", "ratio()"),
    *("parameters((2, 3), dtype=BF16)", "parameters((0,), (3,))", "parameters((2,)) * 2", "[tensor((2,))]"),
    *("[trained(huge(tensor((1, 3))))]", "[computed(tensor((3,)))]", "[trained(sparse(tensor((3, 3))))]", "ramp()"),
    *("[trained(freed(tensor((3,))))]", "[trained(meta(tensor((3,))))]", "[trained(fake(tensor((3,))))]", "state()"),
    *("[trained(distributed(tensor((4,))))]", "[trained(subclass(tensor((3,))))]", "optimizer_state()", "lora_file()"),
    *("[trained(dispatching(tensor((3,))))]", "[trained(tensor((3,), torch.complex64))]", "cat_step_state()"),
    *(
        'changed(optimizer_state(), "state", 0, "exp_avg", value=freed(tensor((3, 2))))',
        "layers()",
        "layers(fill=nan)",
    ),
    *('changed(optimizer_state(), "state", 0, "step", value="a")', 'changed(optimizer_state(), "state", value=None)'),
    *('changed(optimizer_state(), "param_groups", value=[])', 'without(optimizer_state(), "state")'),
    *('changed(optimizer_state(), "param_groups", 0, "lr", value=nan)', 'without(cat_step_state(), "optimizer")'),
    *('changed(cat_step_state(), "parameters", value={})', 'changed(cat_step_state(), "steps_done", value="a")'),
    *('{"params": parameters((2, 2)), "lr": "a"}', '{"params": []}', '{"params": parameters((2,)), "betas": 0.5}'),
    *('{"encoder_hidden_states": tensor((2, 2, 16))}', "lambda: tensor((2, 2, 16))", '{"a": tensor((2, 2, 16))}'),
    *('{"sks": None}', '{"sks": "cat", "SKS": "dog"}', '["sks", "sks toy"]', "pictures()", "[adapter_file()]"),
)

WRONG_CALLS = 0.04
"""How many calls miss an argument, or have one too many."""


@dataclass(frozen=True)
class Argument:
    """An argument, as it is given and as it would be valid."""

    name: str
    text: str
    valid: str
    named: bool = True


@dataclass(frozen=True)
class Call:
    """A call and how it is made, which can be made simpler piece by piece.

    Attributes:
        target: What is called.
        arguments: In the order in which they are given.
        way: The start of the text up to the function: which of the functions of ``make`` calls it.
    """

    target: Target
    arguments: tuple[Argument, ...]
    way: str = "called("

    def text(self) -> str:
        """The call as it is evaluated."""
        given = [f"{each.name}={each.text}" if each.named else each.text for each in self.arguments]
        return f"{self.way}{', '.join([self.target.call, *given])})"

    def simpler(self) -> list[Call]:
        """The same call with one of its oddities taken back, each."""
        calls = [replace(self, way=way) for way in ("called(", "used(") if len(way) < len(self.way)]
        for index, argument in enumerate(self.arguments):
            if argument.text != argument.valid:
                kept = (*self.arguments[:index], replace(argument, text=argument.valid), *self.arguments[index + 1 :])
                calls.append(replace(self, arguments=kept))
        return calls


_OFTEN_NONE = ("bias", "sample_weight", "mask", "preserve_weight", "preserve_mask", "low_precision", "clusters")


def random_call(targets: Sequence[Target], rng: random.Random) -> Call:
    """Any of the targets, with arguments that are valid or not."""
    (target,) = rng.choices(targets, [each.weight for each in targets])
    sizes = {name: rng.choice(choices) for name, choices in SIZES.items()}
    arguments = []
    for parameter in target.parameters:
        if parameter.optional and (parameter.text is None or rng.random() < 0.5) and rng.random() < 0.8:
            continue
        valid = (parameter.text or "None").format(**sizes)
        if parameter.name in _OFTEN_NONE and rng.random() < 0.3:
            valid = "None"
        arguments.append(Argument(parameter.name, valid, valid, not parameter.positional_only))
    arguments = _made_wrong(arguments, rng)
    if target.name.startswith("torch.ops"):
        arguments = [replace(each, text="None") if _fails_the_dispatcher(each) else each for each in arguments]
    if re.search("load|read", target.name) and rng.random() < 0.1:
        special = rng.choice(SPECIAL_FILES)
        arguments = [replace(each, text=special) if each.name == "path" else each for each in arguments]
    if rng.random() < WRONG_CALLS:
        arguments = _wrongly_given(arguments, rng)
    return Call(target, tuple(arguments), _way(arguments, rng))


def _made_wrong(arguments: list[Argument], rng: random.Random) -> list[Argument]:
    if rng.random() < 0.15:
        # Every tensor in the same way: a check of one against another does not see it.
        change = _change_of_tensor(rng)
        return [replace(each, text=change(each.text)) if _is_tensor(each.text) else each for each in arguments]
    count = min(len(arguments), rng.choices((0, 1, 2, 3, len(arguments)), (10, 55, 20, 10, 5))[0])
    changed = set(rng.sample(range(len(arguments)), count))
    return [
        replace(each, text=_wrong(each.text, rng)) if index in changed else each
        for index, each in enumerate(arguments)
    ]


def _fails_the_dispatcher(argument: Argument) -> bool:
    """Whether PyTorch itself fails before an operator is reached.

    It prints a tensor in place of another type in its own complaint, which fails for tensors of many kinds, and which
    it does not survive for one without memory. It asserts that a tensor of torch.func has not outlived it. Its nested
    tensors refuse operators themselves.
    """
    if not _is_tensor(argument.valid):
        return "tensor(" in argument.text
    without_memory = re.search(r"freed\(|shortened\(", argument.text) is not None
    return (
        "escaped" in argument.text
        or "jagged" in argument.text
        or (without_memory and not argument.text.startswith(WRAPPERS))
    )


def _is_tensor(text: str) -> bool:
    return text.startswith(("tensor(", "indices("))


def _change_of_tensor(rng: random.Random) -> Callable[[str], str]:
    kind = rng.random()
    if kind < 0.6:
        wrapper = rng.choice(WRAPPERS)
        return lambda text: f"{wrapper}({text})"
    if kind < 0.8:
        dtype = rng.choice(DTYPES)
        return lambda text: re.sub(r"^tensor\((\(.*?\))(, \w+)?\)", rf"tensor(\1, {dtype})", text)
    method = rng.choice(METHODS)
    return lambda text: f"({text}){method}"


def _wrong(text: str, rng: random.Random) -> str:
    """Another argument in place of a valid one."""
    kind = rng.random()
    if _is_tensor(text):
        if kind < 0.75:
            changed = _change_of_tensor(rng)(text)
            return _change_of_tensor(rng)(changed) if rng.random() < 0.1 else changed
        if kind < 0.85:
            return _random_tensor(rng)
    elif kind < 0.6:
        if re.fullmatch(r"-?[\d.]+|True|False", text):
            return rng.choice(NUMBERS)
        if text.startswith("(") and text.endswith(")"):
            return _changed_tuple(text, rng)
        if text.startswith(('"', "path(", "adapter_file(", "bank_file(")):
            return rng.choice(TEXTS)
    return rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS, OTHERS))) if rng.random() < 0.8 else _random_tensor(rng)


def _random_tensor(rng: random.Random) -> str:
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 8)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 5))))
    fill = rng.choice(("", "", "", ", fill=nan", ", fill=inf", ", fill=0", ", fill=-1"))
    dtype = rng.choice((*DTYPES, *["torch.float32"] * len(DTYPES)))
    if fill in (", fill=nan", ", fill=inf"):
        dtype = "torch.float32"
    text = f"tensor({shape}, {dtype}{fill})"
    return f"{rng.choice(WRAPPERS)}({text})" if rng.random() < 0.2 else text


def _changed_tuple(text: str, rng: random.Random) -> str:
    items = [item.strip() for item in text[1:-1].split(",") if item.strip()]
    kind = rng.random()
    if kind < 0.6 and items:
        items[rng.randrange(len(items))] = rng.choice(NUMBERS)
    elif kind < 0.8:
        items = [*items, rng.choice(NUMBERS)]
    else:
        items = items[:-1]
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _wrongly_given(arguments: list[Argument], rng: random.Random) -> list[Argument]:
    kind = rng.randrange(4)
    if kind == 0 and arguments:
        return arguments[:-1]
    if kind == 1:
        return [*arguments, Argument("no_such_argument", "1", "1")]
    if kind == 2:
        return [replace(each, named=False) for each in arguments]
    return [*(replace(each, named=False) for each in arguments), Argument("", "1", "1", named=False)]


def _way(arguments: list[Argument], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.06:
        return f'under("{rng.choice(make.CONTEXTS)}", '
    tensors = [each.name for each in arguments if "tensor(" in each.text and each.named]
    if kind < 0.14 and tensors:
        chosen = tensors if rng.random() < 0.4 else [rng.choice(tensors)]
        names = ", ".join(f'"{name}"' for name in chosen)
        return f'inside("{rng.choice(make.TRANSFORMS)}", [{names}], '
    return rng.choices(("used(", "used_twice(", "called("), (80, 10, 10))[0]
