"""Which servers there are: files of ``mcpServers`` (Claude, VS Code) and a registry's ``server.json``, read alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError
from ..core.settings import read_text
from .safety import NAME, check_values

FILE = 2_000_000
RUNNERS = {"npm": "npx", "pypi": "uvx"}
"""What starts a package of a registry."""


@dataclass(frozen=True)
class ServerEntry:
    """A server and how to reach it.

    Attributes:
        id: its name here.
        command, args, env: a program that speaks over its standard streams. Values of ``env`` may hold ``${NAME}``.
        url, headers: a server of streamable HTTP. Values of ``headers`` may hold ``${NAME}``.
        target: a server object of the SDK in this process; for tests and generated tools.
        registry: whether a registry's file named it.

    Raises:
        BadInputError: not exactly one way to reach it, an id that is no name, or a secret that is written out.
    """

    id: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    target: Any = None
    registry: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not NAME.fullmatch(self.id.replace("/", "_")):
            raise BadInputError(f"A server's id has up to 64 of the characters A-Z a-z 0-9 _ . - /; got {self.id!r}.")
        if sum(way is not None for way in (self.command, self.url, self.target)) != 1:
            raise BadInputError(f"The server {self.id} needs a command or a url, and not both.")
        check_values(self.env, f"{self.id}: the variable")
        check_values(self.headers, f"{self.id}: the header")


def read_servers(path: Path) -> list[ServerEntry]:
    """The servers of a file: a map ``mcpServers`` or ``servers``, or one ``server.json`` of the registry.

    Raises:
        BadInputError: no such file, no JSON, neither form, or an entry that cannot be used; the entry is named.
    """
    text = read_text(path)
    if len(text) > FILE:
        raise BadInputError(f"{path} is larger than {FILE // 1_000_000} MB.")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}.") from error
    return parse_servers(raw, str(path))


def parse_servers(raw: Any, source: str) -> list[ServerEntry]:
    """As ``read_servers``, for JSON that was read."""
    if isinstance(raw, Mapping):
        for name in ("mcpServers", "servers"):
            if isinstance(raw.get(name), Mapping):
                return [_of_map(key, value) for key, value in raw[name].items()]
        if isinstance(raw.get("name"), str) and ("packages" in raw or "remotes" in raw):
            return [_of_registry(raw, source)]
    raise BadInputError(
        f"{source} names no servers.", 'Write {"mcpServers": {"NAME": {"command": ...}}} or a registry\'s server.json.'
    )


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadInputError(f"{what} must be a list of texts.")
    return tuple(value)


def _map(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadInputError(f"{what} must be a map of names to texts.")
    return dict(value)


def _of_map(key: str, value: Any) -> ServerEntry:
    if not isinstance(value, Mapping):
        raise BadInputError(f"The server {key} must be a map with a command or a url.")
    kind = value.get("type")
    if kind not in (None, "stdio", "http", "streamable-http", "streamableHttp"):
        raise BadInputError(
            f"The server {key} is of the type {kind!r}.", "stdio and http (streamable) are spoken here."
        )
    command, url = value.get("command"), value.get("url")
    for name, item in (("command", command), ("url", url)):
        if item is not None and not isinstance(item, str):
            raise BadInputError(f"The server {key}: {name} must be text.")
    args, env = _texts(value.get("args"), f"{key}: args"), _map(value.get("env"), f"{key}: env")
    return ServerEntry(key, command, args, env, url, _map(value.get("headers"), f"{key}: headers"))


def _of_registry(raw: Mapping[str, Any], source: str) -> ServerEntry:
    name = raw["name"]
    if name.count("/") != 1:
        raise BadInputError(f"{source}: a registry's name has exactly one slash; got {name!r}.")
    for remote in raw.get("remotes") or []:
        if (
            isinstance(remote, Mapping)
            and remote.get("type") == "streamable-http"
            and isinstance(remote.get("url"), str)
        ):
            headers = {item["name"]: f"${{{_variable(item['name'])}}}" for item in _named(remote.get("headers"))}
            return ServerEntry(name, url=remote["url"], headers=headers, registry=True)
    for package in raw.get("packages") or []:
        transport = package.get("transport") if isinstance(package, Mapping) else None
        if not isinstance(transport, Mapping) or transport.get("type") != "stdio":
            continue
        runner = RUNNERS.get(str(package.get("registryType")))
        identifier, version = package.get("identifier"), package.get("version")
        if runner is None or not isinstance(identifier, str) or identifier.startswith("-"):
            continue
        pinned = f"{identifier}@{version}" if isinstance(version, str) and version else identifier
        more = [item["value"] for item in package.get("packageArguments") or [] if isinstance(item.get("value"), str)]
        env = {item["name"]: f"${{{item['name']}}}" for item in _named(package.get("environmentVariables"))}
        args = ["-y", pinned, *more] if runner == "npx" else [pinned, *more]
        return ServerEntry(name, runner, tuple(args), env, registry=True)
    raise BadInputError(f"{source} offers no way that is spoken here.", "npm or PyPI over stdio, or streamable HTTP.")


def _named(items: Any) -> Iterable[Mapping[str, Any]]:
    """Variables and headers that are required."""
    return [item for item in items or [] if isinstance(item, Mapping) and item.get("isRequired") and "name" in item]


def _variable(header: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in header).upper()
