"""Adapter files: those of diffusers, PEFT and kohya's trainers, written and read.

========= ============================================= ==================================== ====================
format    is                                            scale stands in                      read by
========= ============================================= ==================================== ====================
diffusers ``pytorch_lora_weights.safetensors``          LoraConfig in the file's metadata    load_lora_weights
peft      folder: ``adapter_model.safetensors``,        ``adapter_config.json``              PeftModel
          ``adapter_config.json``
kohya     one safetensors file                          an ``alpha`` tensor for each layer   web UIs, diffusers
========= ============================================= ==================================== ====================

A PEFT folder holds one model. An adapter of several is written as one folder each, named for the component:
``unet/`` or ``transformer/``, ``text_encoder/``, ``text_encoder_2/``.

Bytes, names and layers are the Rust side's; this package knows models: which layers they have, and their PEFT
adapters.
"""

from cat_rs.adapter_file.lora_file import LoraFile
from cat_rs.adapter_file.merge import CappedLayer, MergedLora, merge_loras
from cat_rs.adapter_file.read import load_lora
from cat_rs.adapter_file.save import save_lora

__all__ = ["CappedLayer", "LoraFile", "MergedLora", "load_lora", "merge_loras", "save_lora"]
