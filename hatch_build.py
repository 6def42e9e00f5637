"""A wheel holds ``results/`` and ``configs/`` inside the package; an editable one finds them in the checkout."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class InsideThePackage(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"] |= {name: f"everytoken/{name}" for name in ("results", "configs")}
