"""A hook of mkdocs: fills the sections Stations and Floors of the navigation from the files of the house."""

from __future__ import annotations

from typing import Any

from everytoken.catalog.house import load_house


def on_config(config: Any) -> Any:
    """Called by mkdocs once the configuration is read."""
    for entry in config["nav"]:
        for kind in ("station", "floor"):
            title = f"{kind.capitalize()}s"
            if title in entry:
                places = [place for place in load_house().values() if place.kind == kind]
                entry[title] = [{place.name: f"{title.lower()}/{place.name}.md"} for place in places]
    return config
