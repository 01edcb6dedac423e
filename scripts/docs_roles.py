"""Docstrings for the site: Sphinx's roles become links, its formulas fences that `docs_site.format_math` shows.

Settings show their defaults.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from docs_site import public_names

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
_FORMULA = re.compile(r"(?m)^\.\. math::\n((?:[ \t]+\S.*\n?|\n)+?)(?=^\S|\Z)")


class SphinxRoles(griffe.Extension):
    """Rewrites all docstrings of a package."""

    def on_package(self, *, pkg: griffe.Module, **_arguments: Any) -> None:
        modules = public_names()["modules"]
        self._paths = {name: f"{module}.{name}" for module in reversed(modules) for name in modules[module]}
        self._members = {
            f"{self._paths[name]}.{member}"
            for names in modules.values()
            for name, described in names.items()
            for member in (described["members"] if isinstance(described, dict) else ())
        }
        self._rewrite(pkg)

    def _rewrite(self, owner: griffe.Object) -> None:
        for member in owner.members.values():
            if not member.is_alias:
                self._rewrite(member)
        # A setting's default, without what the command line says of it.
        call = owner.value if owner.is_attribute else None
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option":
            positional = [argument for argument in call.arguments if not isinstance(argument, griffe.ExprKeyword)]
            owner.value = positional[0] if positional else None
        if owner.docstring is not None:
            enclosing = owner if owner.is_class else owner.parent
            text = _ROLE.sub(lambda role: self._link(role[1], enclosing), owner.docstring.value)
            owner.docstring.value = _FORMULA.sub(
                lambda formula: f"```math\n{textwrap.dedent(formula[1]).strip()}\n```\n\n", text
            )

    def _link(self, name: str, enclosing: griffe.Object | None) -> str:
        short = name.removeprefix("cat_rs.")
        within = self._paths.get(enclosing.name, "") if enclosing is not None else ""
        if f"{within}.{name}" in self._members:
            return f"[`{name}`][{within}.{name}]"
        return f"[`{short}`][{self._paths[short]}]" if short in self._paths else f"`{name}`"
