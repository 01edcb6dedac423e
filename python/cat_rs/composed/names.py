"""What the formats call a layer, and how one name is found from another.

kohya writes a module's path with `_` for `.`, which alone cannot be undone: names are resolved against the structure
of the families' models, and against the model's own module names where they are given.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "ANY_DENOISER",
    "COMPONENTS",
    "Key",
    "KohyaNames",
    "Slot",
    "Target",
    "canonical",
    "diffusers_key",
    "is_tabled",
    "parse_dotted",
    "parse_kohya",
    "peft_key",
]

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
# What parse_dotted calls the component of ComfyUI's `diffusion_model.`, which is any denoiser.
ANY_DENOISER = "diffusion_model"
# How ComfyUI's names start: its words for a component, and ours.
_COMFY_PREFIXES = {
    "diffusion_model.": ANY_DENOISER,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
# How diffusers, by its versions, PEFT and trainers with kohya's words call the parts of a layer.
_DOTTED_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_linear_layer.up.bias": "bias",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora.up.bias": "bias",
    ".alpha": "alpha",
}
_KOHYA_PARTS = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".alpha": "alpha",
}
_PROCESSOR_PARTS = {".down.weight": "A", ".up.weight": "B"}
# The parts of a layer, as PEFT and as diffusers' loader of text encoders call them.
_SUFFIXES = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}
_ENCODER_SUFFIXES = {
    "A": ".lora_linear_layer.down.weight",
    "B": ".lora_linear_layer.up.weight",
    "bias": ".lora_linear_layer.up.bias",
}
# How the names of denoisers start that the tables below know.
_TABLED_BLOCKS = (
    *("double_blocks.", "single_blocks.", "input_blocks.", "middle_block.", "output_blocks."),
    *("down_blocks.", "mid_block.", "up_blocks."),
)
# Parts of names that models have in their authors' code and not in diffusers: Wan, Lumina, Z-Image, Cosmos ...
_AUTHORS_PARTS = ("qkv", "self_attn", "cross_attn", "attention.out", "ffn.0", "ffn.2")
# The first layout of diffusers, attention processors with a LoRA of their own: denoisers' layers, text encoders'.
_PROCESSOR_LAYERS = {
    "to_q_lora": ("to_q", "q_proj"),
    "to_k_lora": ("to_k", "k_proj"),
    "to_v_lora": ("to_v", "v_proj"),
    "to_out_lora": ("to_out.0", "out_proj"),
}
_PEFT_PREFIX = "base_model.model."


class Key(NamedTuple):
    """A tensor's name, taken apart: the component is empty where the name does not tell."""

    component: str
    module: str
    part: str


class _Entry(NamedTuple):
    """One name of kohya and the module, or the modules joined in it; `{}` stands for a number."""

    kohya: str
    modules: tuple[str, ...]
    # The family whose files alone have the name.
    family: str | None


class Slot(NamedTuple):
    """Where a layer stands in a kohya file: the whole name, and all modules that are joined under it, in order."""

    name: str
    modules: tuple[str, ...]


class Target(NamedTuple):
    """What a name means: the component, the modules joined under it, and the family, where the name tells."""

    component: str
    modules: tuple[str, ...]
    family: str | None


def parse_dotted(key: str) -> Key | None:
    """Takes a name of diffusers, PEFT or ComfyUI apart."""
    rest = key.removeprefix(_PEFT_PREFIX)
    component = ""
    comfy = next((prefix for prefix in _COMFY_PREFIXES if rest.startswith(prefix)), None)
    first, dot, behind = rest.partition(".")
    if comfy is not None:
        component, rest = _COMFY_PREFIXES[comfy], rest.removeprefix(comfy)
    elif dot and first in COMPONENTS:
        component, rest = first, behind
    found = _split_part(rest, _DOTTED_PARTS)
    if found is None:
        found = _split_part(rest, _PROCESSOR_PARTS)
        if found is None or not found[0].endswith("_lora"):
            return None
    module, part = found
    module = _processor_layer(component, module.replace(".processor.", "."))
    return Key(component, module, part) if module else None


def parse_kohya(key: str) -> Key | None:
    """Takes a name of kohya apart; the component stays empty."""
    found = _split_part(key, _KOHYA_PARTS)
    return None if found is None else Key("", *found)


def _split_part(key: str, parts: Mapping[str, str]) -> tuple[str, str] | None:
    suffix = next((suffix for suffix in parts if key.endswith(suffix)), None)
    return None if suffix is None else (key.removesuffix(suffix), parts[suffix])


def _processor_layer(component: str, module: str) -> str:
    parent, _, last = module.rpartition(".")
    if not parent or last not in _PROCESSOR_LAYERS:
        return module
    denoiser, encoder = _PROCESSOR_LAYERS[last]
    return f"{parent}.{encoder if component.startswith('text_encoder') else denoiser}"


def is_tabled(module: str) -> bool:
    """Whether the tables know how the denoiser with this module calls its blocks."""
    return module.startswith(_TABLED_BLOCKS)


def diffusers_key(component: str, module: str, part: str) -> str:
    """The name that diffusers reads."""
    suffixes = {**_SUFFIXES, **_ENCODER_SUFFIXES} if component.startswith("text_encoder") else _SUFFIXES
    return f"{component}.{canonical(component, module)}{suffixes[part]}"


def peft_key(module: str, part: str) -> str:
    """The name that PEFT reads."""
    return f"{_PEFT_PREFIX}{module}{_SUFFIXES[part]}"


def canonical(component: str, module: str) -> str:
    """A module's name as files have it: newer versions of transformers leave CLIP's `text_model.` away."""
    short = component.startswith("text_encoder") and module.startswith("encoder.layers.")
    return f"text_model.{module}" if short else module


class KohyaNames:
    """kohya's names of the families' layers, checked against a model's modules where these are given."""

    def __init__(self, known: Mapping[str, Iterable[str]]) -> None:
        self._modules = {
            (component, canonical(component, module))
            for component in COMPONENTS
            for module in known.get(component, ())
        }
        self._components = {component for component, _ in self._modules}

    def resolve_denoiser(self, module: str, tabled: bool) -> list[Target]:
        """What ComfyUI's name of a denoiser's module means; as `resolve`."""
        given = [component for component in ("unet", "transformer") if component in self._components]
        exact = [component for component in given if (component, module) in self._modules]
        if exact:
            return [Target(exact[0], (module,), None)]
        if tabled or given:
            return self.resolve(f"lora_unet_{module.replace('.', '_')}")
        path = f".{module}."
        if any(f".{part}." in path for part in _AUTHORS_PARTS):
            return []
        return [Target("transformer", (module,), None)]

    def resolve(self, name: str) -> list[Target]:
        """What a name means; several answers where it is ambiguous, none where nothing fits."""
        targets = []
        for prefix, component, entries in _TABLES:
            if not name.startswith(prefix):
                continue
            for entry in entries:
                modules = _filled(entry.kohya, entry.modules, name.removeprefix(prefix))
                # Of joined layers some may be absent from an adapter, none from the model.
                is_there = component not in self._components or all(
                    (component, module) in self._modules for module in modules
                )
                if modules and is_there:
                    targets.append(Target(component, modules, entry.family))
        for prefix, components in _PREFIXES.items():
            if name.startswith(prefix):
                flat = name.removeprefix(prefix)
                targets += [
                    Target(component, (module,), None)
                    for component, module in sorted(self._modules)
                    if component in components and module.replace(".", "_") == flat
                ]
        unique: dict[tuple[str, tuple[str, ...]], Target] = {}
        for target in targets:
            unique.setdefault((target.component, target.modules), target)
        return list(unique.values())

    @staticmethod
    def slot(family: str, component: str, module: str) -> Slot | None:
        """Where kohya's trainer writes a layer of the family; None where it has no name for it."""
        prefix = _WRITTEN_PREFIXES.get((family, component))
        if prefix is None:
            return None
        entries = next(each for p, c, each in _TABLES if (p, c) == (prefix, component))
        # kohya's SDXL trainer has LDM's U-Net, the others have that of diffusers.
        ldm = (family, component) == ("sdxl", "unet")
        for entry in entries:
            if component == "unet" and (entry.family is not None) != ldm:
                continue
            for template in entry.modules:
                filled = _filled(template, (entry.kohya, *entry.modules), canonical(component, module))
                if filled:
                    return Slot(f"{prefix}{filled[0]}", filled[1:])
        return None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("([0-9]+)".join(map(re.escape, template.split("{}"))))


def _filled(template: str, others: Sequence[str], text: str) -> tuple[str, ...]:
    """The other templates with the numbers that `text` has for the `{}` of the first; empty where it does not fit."""
    match = _pattern(template).fullmatch(text)
    return () if match is None else tuple(other.format(*match.groups()) for other in others)


def _by_path(modules: Iterable[str], family: str | None) -> list[_Entry]:
    """Modules that kohya calls by their paths."""
    return [_Entry(module.replace(".", "_"), (module,), family) for module in modules]


_ATTENTION_LAYERS = (
    *("proj_in", "proj_out"),
    *(
        f"transformer_blocks.{{}}.{attention}.{layer}"
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    *("transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2"),
)
# Layers of a residual block, and layers outside the blocks: diffusers' name, LDM's name.
_RESNET_LAYERS = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_OUTER_LAYERS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


def _unet() -> list[_Entry]:
    """diffusers' U-Net by the paths of its modules."""
    modules = [*_OUTER_LAYERS, "down_blocks.{}.downsamplers.{}.conv", "up_blocks.{}.upsamplers.{}.conv"]
    for block in ("down_blocks.{}", "mid_block", "up_blocks.{}"):
        modules += [f"{block}.attentions.{{}}.{layer}" for layer in _ATTENTION_LAYERS]
        modules += [f"{block}.resnets.{{}}.{layer}" for layer in _RESNET_LAYERS]
    return _by_path(modules, None)


def _ldm_unet() -> list[_Entry]:
    """SDXL's U-Net in the naming of LDM: three levels, two layers each on the way down and three on the way up."""
    names = {kohya: module for module, kohya in _OUTER_LAYERS.items()}
    resnets = {"middle_block_0": "mid_block.resnets.0", "middle_block_2": "mid_block.resnets.1"}
    attentions = {"middle_block_1": "mid_block.attentions.0"}
    for level in range(3):
        blocks = [(f"input_blocks_{3 * level + layer + 1}", f"down_blocks.{level}", layer) for layer in range(2)]
        blocks += [(f"output_blocks_{3 * level + layer}", f"up_blocks.{level}", layer) for layer in range(3)]
        for kohya, block, layer in blocks:
            resnets[f"{kohya}_0"] = f"{block}.resnets.{layer}"
            attentions[f"{kohya}_1"] = f"{block}.attentions.{layer}"
    for level in range(2):
        names[f"input_blocks_{3 * level + 3}_0_op"] = f"down_blocks.{level}.downsamplers.0.conv"
        names[f"output_blocks_{3 * level + 2}_2_conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for kohya, module in resnets.items():
        names |= {f"{kohya}_{name}": f"{module}.{layer}" for layer, name in _RESNET_LAYERS.items()}
    for kohya, module in attentions.items():
        names |= {f"{kohya}_{layer.replace('.', '_')}": f"{module}.{layer}" for layer in _ATTENTION_LAYERS}
    return [_Entry(kohya, (module,), "sdxl") for kohya, module in names.items()]


def _clip(family: str | None) -> list[_Entry]:
    attention = [f"self_attn.{layer}" for layer in ("q_proj", "k_proj", "v_proj", "out_proj")]
    layers = [f"text_model.encoder.layers.{{}}.{layer}" for layer in (*attention, "mlp.fc1", "mlp.fc2")]
    return _by_path([*layers, "text_projection"], family)


def _t5() -> list[_Entry]:
    attention = [f"encoder.block.{{}}.layer.0.SelfAttention.{layer}" for layer in "qkvo"]
    feed = [f"encoder.block.{{}}.layer.1.DenseReluDense.{layer}" for layer in ("wi_0", "wi_1", "wo")]
    return _by_path([*attention, *feed], "flux")


# FLUX in the naming of its authors, where query, key and value are one layer: diffusers' parents and layers.
_DOUBLE, _SINGLE, _EMBEDDER = "transformer_blocks.{}.", "single_transformer_blocks.{}.", "time_text_embed."
_FLUX = {
    "double_blocks_{}_img_attn_qkv": (_DOUBLE, "attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks_{}_txt_attn_qkv": (_DOUBLE, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks_{}_img_attn_proj": (_DOUBLE, "attn.to_out.0"),
    "double_blocks_{}_txt_attn_proj": (_DOUBLE, "attn.to_add_out"),
    "double_blocks_{}_img_mlp_0": (_DOUBLE, "ff.net.0.proj"),
    "double_blocks_{}_img_mlp_2": (_DOUBLE, "ff.net.2"),
    "double_blocks_{}_txt_mlp_0": (_DOUBLE, "ff_context.net.0.proj"),
    "double_blocks_{}_txt_mlp_2": (_DOUBLE, "ff_context.net.2"),
    "double_blocks_{}_img_mod_lin": (_DOUBLE, "norm1.linear"),
    "double_blocks_{}_txt_mod_lin": (_DOUBLE, "norm1_context.linear"),
    "single_blocks_{}_linear1": (_SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "single_blocks_{}_linear2": (_SINGLE, "proj_out"),
    "single_blocks_{}_modulation_lin": (_SINGLE, "norm.linear"),
    "img_in": ("", "x_embedder"),
    "txt_in": ("", "context_embedder"),
    "time_in_in_layer": (_EMBEDDER, "timestep_embedder.linear_1"),
    "time_in_out_layer": (_EMBEDDER, "timestep_embedder.linear_2"),
    "vector_in_in_layer": (_EMBEDDER, "text_embedder.linear_1"),
    "vector_in_out_layer": (_EMBEDDER, "text_embedder.linear_2"),
    "guidance_in_in_layer": (_EMBEDDER, "guidance_embedder.linear_1"),
    "guidance_in_out_layer": (_EMBEDDER, "guidance_embedder.linear_2"),
}


def _flux() -> list[_Entry]:
    return [
        _Entry(kohya, tuple(f"{parent}{layer}" for layer in layers), "flux")
        for kohya, (parent, *layers) in _FLUX.items()
    ]


def _flux_by_path() -> list[_Entry]:
    """FLUX by the paths of diffusers' modules, as some trainers write it."""
    modules = [module for entry in _flux() for module in entry.modules]
    return _by_path([*modules, "norm_out.linear", "proj_out"], "flux")


# Prefix, component, entries.
_TABLES = (
    ("lora_unet_", "unet", [*_ldm_unet(), *_unet()]),
    ("lora_unet_", "transformer", _flux()),
    ("lora_transformer_", "transformer", _flux_by_path()),
    ("lora_te_", "text_encoder", _clip("sd")),
    ("lora_te1_", "text_encoder", _clip(None)),
    ("lora_te2_", "text_encoder_2", _clip("sdxl")),
    ("lora_te3_", "text_encoder_2", _t5()),
)
# The components whose flattened module names may follow a prefix.
_PREFIXES = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_2",),
}
_WRITTEN_PREFIXES = {
    ("sd", "unet"): "lora_unet_",
    ("sdxl", "unet"): "lora_unet_",
    ("flux", "transformer"): "lora_unet_",
    ("sd", "text_encoder"): "lora_te_",
    ("sdxl", "text_encoder"): "lora_te1_",
    ("flux", "text_encoder"): "lora_te1_",
    ("sdxl", "text_encoder_2"): "lora_te2_",
    ("flux", "text_encoder_2"): "lora_te3_",
}
