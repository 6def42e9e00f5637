"""Every verb once in a process of its own, as a shell starts it."""

from __future__ import annotations

import json

import pytest
from typer.main import get_command

from everytoken.cli.app import app

from .common import process

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": "The tea was", "chosen": " wonderful.", "rejected": " terrible."}] * 4


@pytest.fixture
def files(tmp_path, letters_model):
    """What the verbs below need, by the names that their arguments use."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "corpus.txt").write_text("a good day and a good night\n\n" * 40)
    (tmp_path / "results").mkdir()
    return {"here": str(tmp_path), "letters": str(letters_model)}


VERBS = {
    "papers": (["papers", "speculative", "--words"], "dyspec"),
    "try": (["try", "stochastok", "--prompt", "strawberry", "--set", "expand_prop=1"], "unchanged"),
    "compare": (["compare", "stochastok", "stochastok:expand_prop=1"], "bytes per token"),
    "data": (["data", "--help"], "sentiment"),
    "train": (
        ["train", "tdpo", "--model", "{letters}", "--data", "{here}/pairs.jsonl",
         "--set", "steps=1", "--out", "{here}/out"],
        "written",
    ),
    "tokenizer": (
        ["tokenizer", "supertokens", "--data", "{here}/corpus.txt", "--out", "{here}/new", "--vocab-size", "300"],
        "span words",
    ),
    "reproduce": (["reproduce", "absent"], "No method is called"),
    "scoreboard": (["scoreboard", "--results", "{here}/results", "--out", "{here}/board.md"], "board.md"),
    "doctor": (["doctor"], "cache folder"),
    "mcp": (["mcp", "search", "a tool", "--store", "{here}/none.db"], "There is no store"),
    "audit": (["audit", "--help"], "provide"),
    "serve": (["serve", "--host", "0.0.0.0"], "EVERYTOKEN_API_KEY"),
}  # fmt: skip


def test_every_verb_is_here():
    assert set(VERBS) == set(get_command(app).commands)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_in_a_process(verb, files):
    arguments, words = VERBS[verb]
    result = process(*(argument.format(**files) for argument in arguments))
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == (2 if verb in ("reproduce", "mcp", "serve") else 0)
