"""Tasks as data: the same at every time, sets that do not meet, answers that their own scorer accepts, and rewards."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest

pytest.importorskip("reasoning_gym")

from everytoken.core.errors import BadInputError, MissingExtraError
from everytoken.training.datasets.make_dataset import make_dataset
from everytoken.training.datasets.tasks import TaskData, math_reward, task_reward, task_rows


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    from everytoken.core import converted

    monkeypatch.setattr(converted, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sets_and_their_card(own_cache):
    settings = TaskData("gcd", count=12, warmup=10, test=5)
    made = make_dataset("tasks", settings, out=own_cache / "one")
    again = make_dataset("tasks", settings, out=own_cache / "two")
    assert again.kept and not made.kept
    train, warm, test = (read(own_cache / "one" / f"{name}.jsonl") for name in ("train", "warmup", "test"))
    assert train == read(own_cache / "two" / "train.jsonl")
    assert (len(train), len(warm), len(test)) == (12, 10, 5)
    assert len({row["seed"] for row in (*train, *test)}) == 2
    assert made.figures["warm-up answers that are accepted"] == 1.0
    columns = {name: [row[name] for row in train] for name in ("task", "seed", "count", "item", "answer")}
    right = [[{"role": "assistant", "content": f"It is <answer>{row['answer']}</answer>"}] for row in train]
    assert task_reward(right, **columns) == [1.0] * 12
    assert task_reward([f"<answer>{row['answer']}0</answer>" for row in train], **columns) == [0.0] * 12
    assert set(warm[0]) == {"prompt", "completion"} and warm[0]["completion"][0]["content"].startswith("<answer>")
    card = (own_cache / "one" / "README.md").read_text()
    assert "gcd with checkable answers" in card and "reasoning_gym" in card and "--set task=gcd" in card


def test_text_prompts_and_scorers_that_raise():
    rows = task_rows(TaskData("prime_factorization", chat=False), 2, "train")
    assert all(row["prompt"].endswith("\n") for row in rows)
    columns = {name: [row[name] for row in rows] for name in ("task", "seed", "count", "item")}
    assert task_reward(["no number", "<answer>x</answer>"], **columns) == [0.0, 0.0]


def test_bad_input(own_cache):
    for changes in ({"count": 0}, {"warmup": -1}, {"test": -1}):
        with pytest.raises(BadInputError, match="count"):
            TaskData(**changes)
    with pytest.raises(BadInputError, match="no task"):
        make_dataset("tasks", TaskData("levitation"))
    with pytest.raises(BadInputError, match="without a model"):
        make_dataset("tasks", TaskData(count=2), model="any")


def test_answers_of_mathematics_are_compared_by_math_verify(monkeypatch):
    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(MissingExtraError, match="math"):
            math_reward(["1"], answer=["1"])

        def parse(text):
            if "broken" in text:
                raise ValueError(text)
            return [text.strip("$")]

        stub = types.ModuleType("math_verify")
        stub.parse, stub.verify = parse, lambda gold, found: gold == found
        stub.__spec__ = importlib.util.spec_from_loader("math_verify", None)
        monkeypatch.setitem(sys.modules, "math_verify", stub)
    found = math_reward(["1/2", "broken (", [{"role": "assistant", "content": "3"}]], answer=["1/2", "1", "4"])
    assert found == [1.0, 0.0, 0.0]
