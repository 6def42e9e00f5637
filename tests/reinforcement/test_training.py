"""``everytoken train`` for the methods of the station, on a tiny model: files, figures, resuming, bad input."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("trl")

from everytoken.catalog import load_catalog
from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.core.progress import silent
from everytoken.reinforcement.recipe_training import TRAINING, assembled
from everytoken.reinforcement.training import is_method
from everytoken.testing.models import tiny_llama, tiny_tokenizer
from everytoken.training.base import TrainingContext, read_config

from .common import PROMPTS

METHODS = [
    card.slug
    for card in load_catalog().values()
    if card.station == "reinforcement"
    and card.status != "planned"
    and is_method(card.load())
    and not getattr(card.load(), "any_order", False)
]
SMALL = ["steps=2", "batch_size=4", "num_generations=4", "lr=0.01", "samples=1", "sample_tokens=6", "eval_share=0.25"]


def letters(folder):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), seed=1, eos=0)
    model.config.pad_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row | {"text": 2 * row["prompt"]}) + "\n" for row in PROMPTS)
    )
    return folder


def train(folder, training, *settings, out="out", data="prompts.jsonl", file=None, report=silent):
    reward = (
        []
        if data is None or "ntp_coef" in training.config.__dataclass_fields__
        else ["reward=tests.reinforcement.common:varied"]
    )
    config = read_config(training, file, [*SMALL, *reward, *settings])
    where = None if data is None else str(folder / data)
    return training.run(config, TrainingContext(str(folder / "model"), where, folder / out, report))


def test_methods_are_found():
    assert {"d3s", "tempo", "thr", "hapo", "tw-grpo"} <= set(METHODS) and "rto" not in METHODS


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_every_method_trains(tmp_path, name):
    place, training = letters(tmp_path), load_catalog()[name].load_training()
    result = train(place, training, "save_steps=1")
    assert result.figures["reward, last quarter"] == result.figures["reward, last quarter"]  # is a number
    report = (place / "out" / "report.html").read_text()
    assert "Before and after" in report and "Credit of every token" in report
    record = json.loads((place / "out" / "training.json").read_text())
    assert len(record["curves"]["reward"]) == 2 and record["settings"]["num_generations"] == 4
    again = train(place, training, "steps=3")
    assert any("Went on from" in note for note in again.notes)


COMPOSED = """
pieces:
  - hapo: {temperature_tau: 0.2, token_average: false, adv_beta: 0, clip_alpha: 0}
  - tempo
  - d3s: {tokens_end: 0.5}
  - tests.reinforcement.test_training:FirstTokens: {count: 2}
grpo_arguments: {loss_type: dapo, delta: null}
"""


class FirstTokens:
    """A piece of the user's own: tokens behind the first few count half."""

    kind = "token_weight"

    def __init__(self, count):
        self.count = count

    def __call__(self, batch, advantages):
        return torch.where(batch.positions < self.count, 1.0, 0.5)


@pytest.mark.slow
def test_a_recipe_of_three_methods_and_a_piece_of_ones_own(tmp_path, monkeypatch):
    """It trains; the progress bar, an integration and the report show what it does."""
    from transformers import TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    logged, stages = [], []

    class Notes(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notes", Notes)
    place = letters(tmp_path)
    (place / "recipe.yaml").write_text(COMPOSED)
    result = train(
        place, TRAINING, "report_to=notes", file=place / "recipe.yaml", report=lambda *stage: stages.append(stage)
    )
    assert any("reward" in logs for logs in logged)
    label, step, steps = next(stage for stage in reversed(stages) if "reward" in stage[0])
    assert all(name in label for name in ("entropy", "length", "tokens trained")) and (step, steps) == (2, 2)
    report = (place / "out" / "report.html").read_text()
    assert all(name in report for name in ("Rollouts of one prompt", "The prefix tree of these rollouts", "Curves"))
    columns = json.loads(report.split('type="application/json">')[1].split("</script>")[0])[0]["columns"]
    assert list(columns) == ["advantage", "weight", "entropy", "temperature", "trained"]
    assert 0 < result.figures["share of tokens trained"] < 0.6
    config = read_config(TRAINING, place / "recipe.yaml", SMALL)
    method = assembled(config.pieces, config.grpo_arguments)
    kinds = [piece.kind for piece in method.recipe().pieces]
    assert kinds == ["temperature", "group_advantage", "rollouts", "tokens", "token_weight"]
    assert method.arguments()["loss_type"] == "dapo" and method.arguments()["epsilon_high"] == 0.28


@pytest.mark.parametrize(
    ("pieces", "arguments", "message"),
    [
        ("", "", "pieces must be a list"),
        ("[]", "", "no pieces"),
        ("[tempi]", "", "Did you mean tempo"),
        ("[{tempo: {td_coeff: 1}}]", "", "td_coef"),
        ("[{tempo: {td_coef: -1}}]", "", "td_coef"),
        ("[tempo, hapo]", "", "would both set the group advantage"),
        ("[d3s, tw-grpo]", "", "d3s asks for loss_type='dapo' and tw-grpo"),
        ("[tempo]", "{epsilonn: 1}", "argument of GRPOConfig"),
        ("[tempo]", "{learning_rate: 1}", "the setting lr"),
        ("[3]", "", "names no piece"),
        ("[no.such:Piece]", "", "no module"),
        ("[tests.reinforcement.test_training:FirstTokens]", "", "cannot be made"),
    ],
)
def test_recipes_that_are_refused(pieces, arguments, message):
    with pytest.raises((BadInputError, UnknownNameError)) as error:
        assembled(pieces, arguments)
    assert message in f"{error.value} {getattr(error.value, 'hint', '')}"


@pytest.mark.slow
def test_tasks_are_made_where_there_are_no_data(tmp_path):
    pytest.importorskip("reasoning_gym")
    training = load_catalog()["tempo"].load_training()
    result = train(letters(tmp_path), training, "items=8", data=None)
    assert result.figures["reward, last quarter"] == 0.0  # letters are no sums


def test_a_task_rewards_its_own_answer_only(tmp_path):
    pytest.importorskip("reasoning_gym")
    from everytoken.reinforcement.rollout_training import rows_and_reward
    from everytoken.training.datasets.arithmetic import make_task

    config = read_config(load_catalog()["tempo"].load_training(), None, ["items=3"])
    rows, reward = rows_and_reward(config, TrainingContext(None, None, tmp_path))
    assert reward.__name__ == "correct"  # logs name it so
    right = make_task("chain_sum", 3, config.seed)[1]["answer"]
    texts = [f"<answer>{right}</answer>", f"It is {right}.", "", "x" * 50, f"{right}1"]
    columns = {name: [value] * 5 for name, value in rows[1].items()}
    assert reward(texts, **columns) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_method_of_texts_rewards_by_itself(tmp_path):
    place, training = letters(tmp_path), load_catalog()["rmt"].load_training()
    config = read_config(training, None, [*SMALL, "reward=tests.reinforcement.common:varied"])
    with pytest.raises(BadInputError, match="rewards by itself"):
        training.run(config, TrainingContext(str(place / "model"), str(place / "prompts.jsonl"), place / "out"))
    (place / "few.jsonl").write_text('{"text": "ab"}\n{"prompt": "ab"}\n')
    with pytest.raises(BadInputError, match="line 2: no object with a text 'text'"):
        train(place, training, data="few.jsonl")
    with pytest.raises(BadInputError, match="learns from texts"):
        assembled("[rmt]", "")


def test_bad_input(tmp_path):
    place, training = letters(tmp_path), load_catalog()["tempo"].load_training()
    for settings, message in (
        (["num_generations=1", "batch_size=4"], "at least 2"),
        (["num_generations=3"], "no multiple"),
        (["items=1"], "items"),
    ):
        with pytest.raises(BadInputError, match=message):
            train(place, training, *settings)
    with pytest.raises(BadInputError, match="need a reward"):
        config = read_config(training, None, SMALL)
        training.run(config, TrainingContext(str(place / "model"), str(place / "prompts.jsonl"), place / "out"))
    with pytest.raises(BadInputError, match="data of your own"):
        train(place, training, "reward=tests.reinforcement.common:varied", data=None)
    (place / "empty.jsonl").write_text('{"prompt": "ab"}\n{"prompt": ""}\n')
    with pytest.raises(BadInputError, match="row 1"):
        train(place, training, data="empty.jsonl")
    with pytest.raises(BadInputError, match="no task"):
        train(place, training, "task=levitation", data=None)
