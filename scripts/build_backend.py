"""What pip calls to build cat-rs: maturin, in the environment of torch_env.py."""

import os
from collections.abc import Mapping
from typing import Any

import maturin
from maturin import (  # noqa: F401  (pip looks these up here)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_env import torch_environment

Settings = Mapping[str, Any] | None


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with torch_environment() as environment:
        os.environ.update(environment)
        return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    with torch_environment() as environment:
        os.environ.update(environment)
        return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
