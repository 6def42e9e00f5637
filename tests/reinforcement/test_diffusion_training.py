"""``everytoken train`` and ``everytoken try`` of MDPO, diffusion GDPO and CJ-GRPO, on the small network that ships."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("trl")

from everytoken.catalog import find_card
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.canvas.loading import load_denoiser
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.reinforcement.diffusion_training import sudoku_reward, sudoku_rows
from everytoken.reinforcement.diffusion_trial import answer_reward
from everytoken.reinforcement.recipe_training import assembled
from everytoken.testing.models import tiny_llama, tiny_tokenizer
from everytoken.training.base import TrainingContext, read_config
from everytoken.training.datasets.sudoku import grids

METHODS = ("mdpo", "gdpo", "cj-grpo")
SMALL = ["steps=2", "batch_size=8", "num_generations=4", "lr=0.001", "samples=2", "items=12", "eval_share=0.25"]


def train(folder, name, *settings, model=None, data=None, out="out"):
    training = find_card(name).load_training()
    config = read_config(training, None, [*SMALL, *settings])
    return training.run(config, TrainingContext(model, data, folder / out))


def last_digit(completions, **_):
    return [float(text[-1:] == "1") for text in completions]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_every_method_trains_on_sudokus_and_goes_on(tmp_path, name):
    settings = ["save_steps=1", *([] if name == "cj-grpo" else ["denoising_steps=3"])]  # few: rewards must differ
    result = train(tmp_path, name, *settings)
    assert 0 <= result.figures["reward, last quarter"] <= 1
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Credit of every token" in report and 'type="range"' in report
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["method"] == name and len(record["curves"]["reward"]) == 2
    before, after = load_denoiser().state_dict(), load_denoiser(str(tmp_path / "out" / "model")).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    again = train(tmp_path, name, *settings, "steps=3")
    assert any("Went on from" in note for note in again.notes)


@pytest.mark.slow
def test_own_prompts_own_reward_and_own_model(tmp_path):
    rows = [{"prompt": text} for text in ("12", "3", "41", "2314", "1", "24")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "reward=tests.reinforcement.test_diffusion_training:last_digit"
    train(tmp_path, "mdpo", "denoising_steps=2", "sample_tokens=6", reward, data=str(tmp_path / "rows.jsonl"))
    model = str(tmp_path / "out" / "model")
    given = dict(model=model, data=str(tmp_path / "rows.jsonl"), out="two")
    result = train(tmp_path, "gdpo", "sample_tokens=6", "lora_r=2", reward, **given)
    assert result.figures["tokens a response"] == 6 and (tmp_path / "two" / "model" / "adapter_config.json").is_file()


def test_what_a_training_refuses(tmp_path):
    for settings, message in (
        (["holes=17"], "open cells"),
        (["trained_steps=0"], "At least one step"),
        (["reward=a:b"], "its own reward"),
        (["lora_r=2"], "all of it is trained"),
    ):
        with pytest.raises(BadInputError, match=message):
            train(tmp_path, "mdpo", *settings)
    with pytest.raises(BadInputError, match="models that write in any order"):
        assembled("[mdpo]", "")


def test_a_causal_model_is_refused_by_name(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tiny_llama(len(tokenizer), seed=1, eos=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n')
    reward = "reward=tests.reinforcement.test_diffusion_training:last_digit"
    with pytest.raises(UnsupportedModelError, match="is causal"):
        train(tmp_path, "gdpo", "samples=0", reward, model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"))


def test_the_reward_of_a_sudoku():
    grid = "".join(str(digit + 1) for digit in grids(held=True)[0])
    assert sudoku_reward([grid, grid[:-1] + grid[0], grid[:3], "_" + grid[1:], grid + "1", ""]) == [1.0, 0, 0, 0, 0, 0]
    rows = sudoku_rows(3, 0, 10)
    assert [row["prompt"].count(".") for row in rows] == [10] * 3 and all(len(row["prompt"]) == 16 for row in rows)
    assert answer_reward(["abc", "ab", "", "xyz"], ["abc", "abcd", "a", "abc"]) == [1.0, 0.5, 0, 0]


def tried(*names, **settings):
    card = find_card(names[0])
    trials = [Trial(name, find_card(name).load(), {}) for name in names]
    return card.load_trial()(TrialRequest(trials, **settings))


@pytest.mark.slow
def test_a_trial_shows_the_credit_of_every_token():
    result = tried("mdpo", "cj-grpo")
    assert list(result.rows) == ["diffu-GRPO", "mdpo", "cj-grpo"] and len(result.traces) == 8
    assert [row["forwards of a rollout"] for row in result.rows.values()] == [10, 10, 3]
    assert [row["forwards of a loss"] for row in result.rows.values()] == [1, 8, 3]
    for trace in result.traces:
        assert set(trace.columns) == {"credit", "step", "probability", "logp"} and len(trace) == 10
        assert all(0 < value <= 1 for value in trace.columns["probability"])
    assert 'type="range"' in result.pictures[0]


@pytest.mark.slow
def test_a_trial_of_own_data_and_what_it_refuses(tmp_path):
    (tmp_path / "row.jsonl").write_text('{"prompt": "12", "answer": "3412"}\n')
    result = tried("gdpo", data=str(tmp_path / "row.jsonl"), options={"max_new_tokens": 4})
    assert result.rows["gdpo"]["forwards of a rollout"] == 4 and len(result.traces[0]) == 4
    for settings in ({"prompt": "Some words"}, {"prompt": "1234 3412 2143 4321"}):
        with pytest.raises(BadInputError, match="no sudoku"):
            tried("gdpo", **settings)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "12"}\n')
    with pytest.raises(BadInputError, match="answer"):
        tried("gdpo", data=str(tmp_path / "bad.jsonl"))
