"""Files of servers: mcpServers maps and the registry's server.json."""

from __future__ import annotations

import json

import pytest

from everytoken.agents.servers import ServerEntry, parse_servers, read_servers
from everytoken.core.errors import BadInputError

REGISTRY = {
    "name": "io.github.owner/server",
    "description": "d",
    "version": "1.0.0",
    "packages": [
        {"registryType": "oci", "identifier": "x/y", "transport": {"type": "stdio"}},
        {
            "registryType": "npm",
            "identifier": "@owner/server",
            "version": "1.2.3",
            "transport": {"type": "stdio"},
            "packageArguments": [{"type": "positional", "value": "--quiet"}],
            "environmentVariables": [{"name": "API_KEY", "isRequired": True, "isSecret": True}, {"name": "MODE"}],
        },
    ],
}


def test_a_map_of_servers(tmp_path):
    path = tmp_path / "servers.json"
    entries = {
        "files": {"command": "npx", "args": ["-y", "@mcp/files", "/data"], "env": {"LEVEL": "2", "KEY": "${KEY}"}},
        "web": {"type": "http", "url": "https://tools.example/mcp", "headers": {"Authorization": "Bearer ${T}"}},
    }
    path.write_text(json.dumps({"mcpServers": entries}))
    files, web = read_servers(path)
    assert (files.command, files.args, files.registry) == ("npx", ("-y", "@mcp/files", "/data"), False)
    assert files.env == {"LEVEL": "2", "KEY": "${KEY}"}
    assert (web.url, web.headers) == ("https://tools.example/mcp", {"Authorization": "Bearer ${T}"})
    assert parse_servers({"servers": entries}, "VS Code") == [files, web]
    assert "Bearer" not in repr(web)


def test_the_registrys_file():
    (entry,) = parse_servers(REGISTRY, "server.json")
    assert (entry.command, entry.args) == ("npx", ("-y", "@owner/server@1.2.3", "--quiet"))
    assert entry.env == {"API_KEY": "${API_KEY}"}
    assert entry.registry
    pypi = {"registryType": "pypi", "identifier": "server", "transport": {"type": "stdio"}}
    assert parse_servers({**REGISTRY, "packages": [pypi]}, "f")[0].args == ("server",)
    header = {"name": "X-API-Key", "isRequired": True}
    remote = {"type": "streamable-http", "url": "https://a.example/mcp", "headers": [header]}
    (entry,) = parse_servers({**REGISTRY, "remotes": [{"type": "sse", "url": "x"}, remote]}, "f")
    assert (entry.url, entry.headers) == ("https://a.example/mcp", {"X-API-Key": "${X_API_KEY}"})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "names no servers"),
        ({}, "names no servers"),
        ({"mcpServers": {"a": 3}}, "must be a map"),
        ({"mcpServers": {"a": {}}}, "needs a command or a url"),
        ({"mcpServers": {"a": {"command": "x", "url": "https://y"}}}, "not both"),
        ({"mcpServers": {"a": {"command": ["x"]}}}, "command must be text"),
        ({"mcpServers": {"a": {"command": "x", "args": "y z"}}}, "args must be a list"),
        ({"mcpServers": {"a": {"command": "x", "env": []}}}, "env must be a map"),
        ({"mcpServers": {"a": {"command": "x", "env": {"N": 3}}}}, "must be text"),
        ({"mcpServers": {"a": {"command": "x", "env": {"TOKEN": "abc"}}}}, "written out"),
        ({"mcpServers": {"a b": {"command": "x"}}}, "id has up to 64"),
        ({"mcpServers": {"a": {"type": "sse", "url": "https://y"}}}, "of the type 'sse'"),
        ({**REGISTRY, "name": "noslash"}, "exactly one slash"),
        ({**REGISTRY, "packages": []}, "no way that is spoken"),
        ({**REGISTRY, "packages": [{**REGISTRY["packages"][1], "identifier": "--evil"}]}, "no way"),
    ],
)
def test_bad_files(raw, message):
    with pytest.raises(BadInputError, match=message):
        parse_servers(raw, "file")


def test_what_is_no_file(tmp_path):
    for text in ("{", "[" * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(BadInputError, match="not JSON"):
            read_servers(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(" " * 2_000_001)
    with pytest.raises(BadInputError, match="larger than 2 MB"):
        read_servers(tmp_path / "x.json")
    with pytest.raises(BadInputError):
        read_servers(tmp_path / "nothing.json")
    with pytest.raises(BadInputError, match="needs a command"):
        ServerEntry("a")
