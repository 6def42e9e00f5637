"""``everytoken try tokenweave`` on a tiny model, and the experiment's arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import LlamaConfig

from everytoken.core.errors import BadInputError
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.distributed.base import Link
from everytoken.distributed.measurement import MeasuredTimes, measure_layer
from everytoken.distributed.simulation import Setting
from everytoken.distributed.token_weave import TokenWeave
from everytoken.distributed.weave_trial import LINKS, metric, ranks_for, trial
from everytoken.reproduce.tokenweave import bandwidth_for


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_trial_draws_three_timelines(folder, monkeypatch):
    monkeypatch.setattr("everytoken.distributed.weave_trial.TOKENS", 96)
    settings = {"first": 40}
    result = trial(TrialRequest([Trial("tokenweave", TokenWeave, settings)], folder))
    assert list(result.rows) == ["plain", "fused", "tokenweave"]
    for row in result.rows.values():
        times = [row[metric(link)] for link in ("0.1 Gbit/s", "1 Gbit/s", "10 Gbit/s")]
        assert set(LINKS) == {"0.1 Gbit/s", "1 Gbit/s", "10 Gbit/s"} and times == sorted(times, reverse=True)
        assert row["difference of logits"] < 1e-5
    assert result.rows["tokenweave"]["tokens of part 1"] == 40
    assert len(result.traces) == 3 and "simulated" in result.traces[0].title and "exchange 2" in result.pictures[0]
    assert {"attention 1", "mlp 2"} <= set(result.traces[2].columns["what"])


def test_trials_refuse_what_they_do_not_read(folder):
    for words in ({"prompt": "x"}, {"data": "x.txt"}):
        with pytest.raises(BadInputError, match="no --prompt"):
            trial(TrialRequest([], folder, **words))
    config = LlamaConfig(intermediate_size=49, hidden_size=24, num_attention_heads=4)
    assert ranks_for(config) == 7
    config.intermediate_size = 11
    with pytest.raises(BadInputError, match="do not divide an MLP of 11"):
        ranks_for(config)
    config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 48, 9, 3
    assert ranks_for(config) == 3


def test_a_layer_is_timed_by_the_clock_that_is_given():
    ticks = iter(range(10_000))
    config = LlamaConfig(hidden_size=24, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    times = measure_layer(config, 2, [4, 8], 1, clock=lambda: float(next(ticks)))
    assert dataclasses.astuple(times)[:4] == (((4.0, 1.0), (8.0, 1.0)),) * 4
    assert times.wide == ((32.0, 1.0), (128.0, 1.0))
    with pytest.raises(BadInputError, match="7 ranks do not divide"):
        measure_layer(config, 7, [4])
    with pytest.raises(BadInputError, match="one number of tokens"):
        measure_layer(config, 2, [])


@pytest.mark.parametrize("share", [0.05, 0.2, 0.8])
def test_the_experiments_link_takes_the_share_that_it_says(share):
    curve = ((1000.0, 0.01),)
    times = MeasuredTimes(curve, curve, ((1000.0, 0.001),), curve, ((1e6, 0.01),))
    free = Setting(times, Link(1e-6, float("inf")), 3, 96, 4, 2)
    own = dataclasses.replace(free, link=Link(1e-6, bandwidth_for(free, 1000, share)))
    whole = own.plain(1000)
    assert whole.busy("communication") / whole.seconds == pytest.approx(share)
