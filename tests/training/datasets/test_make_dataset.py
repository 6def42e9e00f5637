"""``everytoken data``: deterministic by seed, kept, with cards; and the arithmetic of traces."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("reasoning_gym")
pytest.importorskip("vaderSentiment")

from everytoken.cli.app import app
from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.training.datasets.arithmetic import (
    ArithmeticData,
    Trace,
    final_answer,
    is_correct,
    make_task,
    pairs_of,
)
from everytoken.training.datasets.make_dataset import data_kinds, make_dataset
from everytoken.training.datasets.pairs import load_pairs
from everytoken.training.datasets.sentiment import SentimentData


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Built data goes to a folder of the test's own; the embedded model stays where it is."""
    from everytoken.core import converted, loading

    folder = converted.embedded_folder()
    monkeypatch.setattr(loading, "embedded_folder", lambda *_args, **_kwargs: folder)
    monkeypatch.setattr(converted, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path


@pytest.mark.rotating
def test_sentiment_is_deterministic_kept_and_described(own_cache, embedded):
    settings = SentimentData(count=3, max_new_tokens=6, seed=4)
    one = make_dataset("sentiment", settings, out=own_cache / "one")
    assert not one.kept
    again = make_dataset("sentiment", settings, out=own_cache / "again")
    assert again.kept
    first = (own_cache / "one" / "train.jsonl").read_text()
    assert first == (own_cache / "again" / "train.jsonl").read_text()
    for path in (own_cache / "cache" / "data").iterdir():  # made anew, it is the same
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert make_dataset("sentiment", settings).figures == one.figures
    assert len(load_pairs(own_cache / "one" / "train.jsonl")) == 3
    card = (own_cache / "one" / "README.md").read_text()
    assert card.startswith("---\n")
    for piece in ("SmolLM2-135M-Instruct", "seed: 4", "no person looked", "everytoken data sentiment"):
        assert piece in card
    assert one.figures["mean score, chosen"] > one.figures["mean score, rejected"]


@pytest.mark.rotating
def test_own_openings(own_cache, embedded):
    (own_cache / "openings.txt").write_text("Our garden party\n\nThe letter she wrote\n")
    built = make_dataset(
        "sentiment", SentimentData(count=2, max_new_tokens=6, margin=0.05, prompts=str(own_cache / "openings.txt"))
    )
    assert set(load_pairs(built.folder / "train.jsonl")["prompt"]) <= {"Our garden party", "The letter she wrote"}


@pytest.mark.rotating
def test_arithmetic_from_the_command_line(own_cache, embedded):
    options = [item for pair in ("count=12", "samples=4", "max_new_tokens=24") for item in ("--set", pair)]
    result = CliRunner().invoke(app, ["data", "arithmetic", "--out", str(own_cache / "sums"), "--json", *options])
    assert result.exit_code == 0, result.output + str(result.exception)
    figures = json.loads(result.stdout[result.stdout.index("{") :])["figures"]
    assert figures["traces"] == 48
    assert 0 < figures["correct"] < 1
    rows = load_pairs(own_cache / "sums" / "train.jsonl").to_list()
    assert len(rows) == figures["pairs"]
    dataset = make_task("chain_sum", 12, 0)
    items = {dataset[index]["question"]: dataset[index] for index in range(12)}
    for row in rows:
        item = items[row["prompt"][0]["content"]]
        assert is_correct(dataset, item, row["chosen"][0]["content"])
        assert not is_correct(dataset, item, row["rejected"][0]["content"])


def test_final_answers():
    assert final_answer("The sum is 1,234.") == "1234"
    assert final_answer("first 3, then <answer> 7 </answer> done 9") == "7"
    assert final_answer("It is -5") == "-5"
    assert final_answer("nothing but words") == "words"
    assert final_answer("...") == ""


def test_only_full_marks_count():
    dataset = make_task("chain_sum", 1, 3)
    item = dataset[0]
    assert is_correct(dataset, item, f"So it is {item['answer']}")
    assert not is_correct(dataset, item, f"So it is {item['answer']}1")
    assert not is_correct(dataset, item, "")
    with pytest.raises(BadInputError, match="no task 'juggling'"):
        make_task("juggling", 1, 0)


def test_pairs_take_the_most_frequent_wrong_answers():
    def trace(text, good=False):
        return Trace("1 + 1 = ?", "2", text, good)

    group = [trace("it is 2", True), trace("it is 3"), trace("so 3"), trace("must be 3"), trace("5"), trace("7")]
    rows = pairs_of([group, [trace("9")], [trace("2", True)]], chat=False, per_question=5)
    assert [row["rejected"] for row in rows] == ["it is 3", "so 3", "must be 3"]  # 3 of 5 wrong traces: half is covered
    assert {row["chosen"] for row in rows} == {"it is 2"}
    assert len(pairs_of([group], chat=True, per_question=1)) == 1
    assert pairs_of([group], chat=True)[0]["rejected"] == [{"role": "assistant", "content": "it is 3"}]


def test_bad_input(own_cache):
    with pytest.raises(UnknownNameError, match="Did you mean sentiment"):
        make_dataset("sentimant", SentimentData())
    with pytest.raises(BadInputError, match="count must be"):
        make_dataset("sentiment", SentimentData(count=0))
    (own_cache / "empty.txt").write_text("\n")
    with pytest.raises(BadInputError, match="no prompts"):
        make_dataset("sentiment", SentimentData(prompts=str(own_cache / "empty.txt")))
    with pytest.raises(BadInputError, match=r"absent\.txt"):
        make_dataset("sentiment", SentimentData(prompts=str(own_cache / "absent.txt")))
    assert ArithmeticData().task == "chain_sum"


def test_the_kinds_are_the_modules_that_declare_one():
    assert set(data_kinds()) == {"arithmetic", "sentiment", "tasks"}
    for name, kind in data_kinds().items():
        assert kind.name == name
        help_text = CliRunner().invoke(app, ["data", name, "--help"]).output
        assert kind.summary.split()[0] in help_text
        assert "seed" in help_text  # its settings are listed


def test_data_made_from_another_file_are_other_data(own_cache, monkeypatch):
    """The same settings, but the file that they name has changed: it is part of the key in the cache."""
    from everytoken.training.datasets import make_dataset as module
    from everytoken.training.datasets.base import MadeRows

    made = []

    def rows(settings, model, report):
        made.append(settings.own_openings())
        return MadeRows([{"prompt": "a", "chosen": " b", "rejected": " c"}], {"pairs": 1.0})

    kind = dataclasses.replace(data_kinds()["sentiment"], make=rows)
    monkeypatch.setattr(module, "data_kinds", lambda: {"sentiment": kind})
    path = own_cache / "openings.txt"
    for text in ("Our garden\n", "Our garden\n", "The letter\n"):
        path.write_text(text)
        make_dataset("sentiment", SentimentData(prompts=str(path)))
    assert made == [["Our garden"], ["The letter"]]
