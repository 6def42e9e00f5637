"""``everytoken try scalemcp``, and the commands of ``everytoken mcp``, on real servers."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("mcp")

from everytoken.agents import tool_trial
from everytoken.agents.base import Key
from everytoken.agents.scalemcp import ScaleMCP
from everytoken.agents.store import SQLiteStore
from everytoken.agents.tool_trial import trial
from everytoken.cli.app import app
from everytoken.core.errors import BadInputError, EverytokenError
from everytoken.decoding.trial import Trial, TrialRequest

from .common import PATH, PROGRAM, spec


def invoke(*words):
    done = CliRunner().invoke(app, ["mcp", *map(str, words)], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_trial_without_meaning(monkeypatch):
    """BM25 against itself: the same work gives the same figures."""
    monkeypatch.setattr(tool_trial, "COMPANIES", 3)
    result = trial(TrialRequest([Trial("scalemcp", ScaleMCP, {"retriever": "bm25"})], prompt="revenue please"))
    figures = [{name: row[name] for name in ("recall at 1", "MAP at 10", "nDCG at 10")} for row in result.rows.values()]
    assert list(result.rows) == ["BM25", "scalemcp"] and figures[0] == figures[1]
    assert "15 tools written" in result.notes[0] and "second sync wrote 0" in result.notes[0]
    assert "revenue" in result.texts["scalemcp"]
    for more in ({"model": "x"}, {"data": "x"}):
        with pytest.raises(BadInputError, match="no --data"):
            trial(TrialRequest([Trial("scalemcp", ScaleMCP)], **more))
    with pytest.raises(BadInputError, match="questions"):
        trial(TrialRequest([Trial("scalemcp", ScaleMCP, {"questions": 11})]))


def test_searching_and_approving(tmp_path):
    store = tmp_path / "tools.db"
    with SQLiteStore(store) as opened:
        opened.apply("s", [spec("forecast", "[bold]Forecasts[/bold] rain\u202e."), spec("add", "Adds.")])
    words = ["--store", store, "--set", "retriever=bm25"]
    assert "[bold]Forecasts[/bold] rain." in invoke("search", "rain", *words)
    told = json.loads(invoke("search", "rain", *words, "--json"))
    assert told["tools"][0]["name"] == "forecast"
    assert "approved: s add" in invoke("approve", "s", "add", "--store", store)
    with SQLiteStore(store) as opened:
        opened.apply("s", [spec("forecast"), spec("add", "Sends.")])
        assert opened.tools()[0].spec.key == Key("s", "forecast")
    assert 'description is: "Sends."' in invoke("approve", "s", "add", "--store", store)
    with pytest.raises(EverytokenError, match="no store"):
        invoke("search", "rain", "--store", tmp_path / "none.db")
    with pytest.raises(EverytokenError, match="setting of scalemcp"):
        invoke("search", "rain", "--store", store, "--set", "retrieval=bm25")


@pytest.mark.slow
def test_the_commands_on_real_programs(tmp_path):
    """sync, a second sync, and the server that others talk to over standard streams (about 15 s)."""
    import asyncio

    from mcp import Client, StdioServerParameters

    servers, store = tmp_path / "servers.json", tmp_path / "tools.db"
    entries = {name: {"command": sys.executable, "args": [PROGRAM, name], "env": PATH} for name in ("good", "crash")}
    servers.write_text(json.dumps({"mcpServers": entries}))
    words = ["--servers", servers, "--store", store, "--set", "retriever=bm25"]
    first = invoke("sync", *words, "--timeout", 30)
    assert "failed: crash" in first
    again = json.loads(invoke("sync", *words, "--timeout", 30, "--json").strip())
    assert (again["created"], again["updated"], again["unchanged"], again["skipped"]) == (0, 0, 3, 1)

    async def use():
        command = ["-m", "everytoken", "mcp", "serve", *map(str, words)]
        async with Client(StdioServerParameters(command=sys.executable, args=command, env=PATH)) as client:
            hits = await client.call_tool("search_tools", {"query": "add two numbers"})
            result = await client.call_tool(
                "call_tool", {"server": "good", "name": "add", "arguments": {"a": 2, "b": 2}}
            )
            return hits.structured_content["result"][0]["name"], result.content[0].text

    assert asyncio.run(use()) == ("add", "4")
