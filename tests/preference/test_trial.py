"""``everytoken try`` and ``compare`` for the whole station, on a tiny model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("trl")
pytest.importorskip("vaderSentiment")

from everytoken.cli.app import app

from .test_training import place

__all__ = ["place"]


def invoke(place, *arguments):
    options = ["--model", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--json"]
    return CliRunner().invoke(app, [*map(str, arguments), *options])


@pytest.mark.parametrize(
    ("name", "baseline", "column"),
    [
        ("tdpo", "DPO", "implicit_reward"), ("tgdpo", "DPO", "weight"), ("t-reg", "DPO", "contrast_of_prompts"),
        ("cdpo", "DPO", "criticality"), ("ift", "SFT", "prediction"), ("rto", "PPO", "dpo_reward"),
    ],
)  # fmt: skip
@pytest.mark.rotating
def test_every_method_can_be_tried(place, tmp_path, name, baseline, column):
    result = invoke(place, "try", name, "--trace", tmp_path / "trace.html")
    assert result.exit_code == 0, result.output + str(result.exception)
    payload = json.loads(result.stdout[result.stdout.index("{") :])
    assert payload["baseline"] == baseline
    assert set(payload["rows"]) == {baseline, name}
    assert all(value == value for row in payload["rows"].values() for value in row.values())
    assert f'"{column}"' in (tmp_path / "trace.html").read_text()


@pytest.mark.slow
def test_losses_are_compared_and_baselines_are_not_mixed(place):
    result = invoke(place, "compare", "tdpo", "tgdpo:alpha=2")
    assert result.exit_code == 0, result.output + str(result.exception)
    assert len(json.loads(result.stdout[result.stdout.index("{") :])["rows"]) == 3
    mixed = invoke(place, "compare", "tdpo", "ift")
    assert mixed.exit_code != 0
    assert "do different work" in str(mixed.exception)
