"""What a report shows of a group of rollouts, against the pieces themselves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from everytoken.reinforcement.hapo import HAPO, EntropyStatistics
from everytoken.reinforcement.pictures import group_pictures
from everytoken.reinforcement.tempo import TEMPO

from .common import TOKENIZER, distance, made, varied, weights


class Half:
    kind = "token_weight"

    def __call__(self, batch, advantages):
        self.advantages = advantages
        return torch.where(batch.positions < 2, 1.0, 0.5)


class Early:
    kind = "tokens"
    divisor = "all"

    def __call__(self, batch, advantages, kept):
        return batch.positions < 3


def shown(trainer):
    torch.manual_seed(4)
    return group_pictures(trainer, trainer.train_dataset[0], TOKENIZER)


def test_columns_of_all_kinds_of_pieces(tmp_path):
    hapo = HAPO(temperature_tau=0.5, token_average=False)
    sampling, redistribution, clip = hapo.recipe().pieces
    sampling.statistics = EntropyStatistics(0.0, 1.0, -1.0, 1.0)
    half, tempo = Half(), TEMPO().recipe().pieces[0]
    pieces = (sampling, tempo, half, Early(), clip, redistribution)
    trainer = made(tmp_path, *pieces, reward=varied, temperature=0.8, loss_type="bnpo")
    before = weights(trainer)
    traces, pictures = shown(trainer)
    assert list(pictures) == ["Rollouts of one prompt", "The prefix tree of these rollouts"]
    assert pictures["The prefix tree of these rollouts"].count('class="end"') == len(traces) == 4
    assert distance(weights(trainer), before) == 0.0 and not trainer._metrics["train"]
    for number, trace in enumerate(traces):
        columns, count = trace.columns, len(trace)
        assert list(columns) == [
            "advantage", "weight", "entropy", "temperature", "clip_from", "clip_to", "trained"
        ]  # fmt: skip
        assert columns["trained"] == (["trained"] * 3 + ["left out"] * 9)[:count]
        own = half.advantages[number, :count] * torch.tensor(columns["weight"])
        own = own * torch.tensor([value == "trained" for value in columns["trained"]])
        assert torch.tensor(columns["advantage"]) == pytest.approx(own, abs=1e-5)
        # the entropy at the training temperature says the signal of clip bounds; that of plain logits the temperature's
        assert all(low <= 0.8 + 1e-6 and high >= 1.2 - 1e-6 for low, high in
                   zip(columns["clip_from"], columns["clip_to"], strict=True))  # fmt: skip
        assert all(0.4 - 1e-3 <= value <= 1.2 + 1e-3 for value in columns["temperature"])
        assert f"Rollout {number + 1}, reward " in trace.title
    spread = [value for trace in traces for value in trace.columns["temperature"]]
    assert max(spread) - min(spread) > 0.01


def test_temperatures_are_those_that_sampled(tmp_path):
    """By the processor's own formula, from the logits of a plain forward."""
    sampling = HAPO(temperature_tau=0.5).recipe().one("temperature")
    sampling.statistics = EntropyStatistics(0.0, 1.0, -1.0, 1.0)
    trainer = made(tmp_path, sampling, temperature=0.7)
    traces, _ = shown(trainer)
    prompt = TOKENIZER(trainer.train_dataset[0]["prompt"])["input_ids"]
    for trace in traces:
        logits = trainer.model(torch.tensor([prompt + trace.ids])).logits[0, len(prompt) - 1 : -1]
        entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
        expected = 0.7 * (1 + 0.5 * entropy.log().clamp(-1, 1))
        assert torch.tensor(trace.columns["temperature"]) == pytest.approx(expected, abs=1e-3)


def test_without_pieces_there_are_advantage_and_entropy(tmp_path):
    trainer = made(tmp_path, reward=varied)
    traces, pictures = shown(trainer)
    assert list(traces[0].columns) == ["advantage", "entropy"] and len(pictures) == 1
    assert len(set(traces[0].columns["advantage"])) == 1
