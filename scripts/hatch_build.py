"""Puts the starter model and the demo catalogue into a real wheel; an editable install reads them in place."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundledData(BuildHookInterface[Any]):
    """Adds data folders that live outside the packages."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Extend the wheel, unless it is the editable one."""
        if version != "editable":
            build_data["force_include"]["models/starter/bundle"] = "catalens/bundles/starter"
            build_data["force_include"]["demo"] = "catalens_standalone/demo"
