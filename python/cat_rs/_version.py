"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cat-rs")
except PackageNotFoundError:  # an uninstalled source tree
    __version__ = "0"
