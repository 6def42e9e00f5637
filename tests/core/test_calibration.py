"""Timing ways of running weights, with a clock of the test's own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from everytoken.core import calibration
from everytoken.core.calibration import SWEEPS, TABLE, TRIES, WIDTHS, Calibration, Curve, calibrate, kept, lookup
from everytoken.core.choosing import Choice, choose_weights, load_fastest
from everytoken.core.errors import BadInputError
from everytoken.core.one_layer import HEAD, OneLayer, timed_rows
from everytoken.testing.models import tiny_llama, tiny_tokenizer


class Clock:
    """Seconds that pass only where the test says so."""

    now = 0.0

    def __call__(self):
        return self.now


def benches(clock, costs, noise=lambda run: 1.0):
    """Makes benches of known cost, ``first + slope * (n - 1)`` seconds, and counts what was made and run."""
    made, runs = [], []

    def make(_config, _dtype, way):
        made.append(way)
        first, slope = costs[way]

        def bench(tokens):
            runs.append((way, tokens))
            seconds = (first + slope * (tokens - 1)) * noise(len(runs))
            clock.now += seconds
            return (seconds,)

        class Bench:
            __call__ = staticmethod(bench)

            @staticmethod
            def seconds(parts):
                return parts[0]

        return Bench()

    return make, made, runs


CONFIG = tiny_llama().config
COSTS = {"as they come": (0.010, 0.0001), "packed": (0.014, 0.0001), "int4": (0.004, 0.001)}


def measured(folder, ways=tuple(COSTS), costs=COSTS, config=CONFIG, **settings):
    clock = Clock()
    make, made, runs = benches(clock, costs, **settings)
    return calibrate(config, torch.float32, ways, folder, make=make, clock=clock), made, runs


def test_a_curve_goes_straight_between_what_was_measured_and_never_falls():
    curve = Curve((1, 2, 4), (1.0, 0.9, 2.0))
    assert [curve(n) for n in (1, 2, 3, 4, 6)] == pytest.approx([1, 1, 1.5, 2, 3])
    assert curve.merged(Curve((1, 2, 4, 8), (2.0, 0.5, 3.0, 9.0)))(8) == 9
    for widths, seconds in (((2,), (1.0,)), ((1, 2), (1.0,)), ((1, 2), (1.0, float("nan"))), ((1, 1), (1.0, 1.0))):
        with pytest.raises(ValueError):
            Curve(widths, seconds)


def test_the_fastest_way_is_chosen_among_those_allowed(tmp_path):
    found, _, _ = measured(tmp_path)
    assert found.fastest() == "int4"
    assert found.fastest(("as they come", "packed")) == "as they come"
    assert found.fastest(("bfloat16",)) is None
    for way, (first, slope) in COSTS.items():
        assert [found.ways[way](n) for n in (1, 3, 64)] == pytest.approx([first + slope * n for n in (0, 2, 63)])


def test_of_two_ways_about_as_fast_the_one_that_is_cheaper_for_many_tokens(tmp_path):
    found, _, _ = measured(tmp_path, ("a", "b"), {"a": (1e-3, 1e-3), "b": (1.03e-3, 1e-4)})
    assert found.fastest() == "b"


def test_what_was_measured_is_found_again_and_only_what_lacks_is_measured(tmp_path):
    first, made, runs = measured(tmp_path, ("as they come", "packed"))
    assert made == ["as they come", "packed"]
    assert sum(way == "packed" and tokens == 64 for way, tokens in runs) == SWEEPS
    again, made, _ = measured(tmp_path, ("as they come", "packed"))
    assert again == first and not made
    more, made, _ = measured(tmp_path)
    assert made == ["int4"] and set(more.ways) == set(COSTS) and len(kept(tmp_path)) == 1


def test_the_key_is_machine_threads_versions_shape_and_dtype(tmp_path, monkeypatch):
    key = measured(tmp_path)[0].key
    assert set(key) == {"processor", "cores", "threads", "torch", "kernels", "model"}
    named = tiny_llama().config
    named._name_or_path, named.eos_token_id = "another/name", 3
    assert not measured(tmp_path, config=named)[1]
    assert measured(tmp_path, config=tiny_llama(layers=3).config)[1]
    assert calibration.shape_hash(CONFIG, torch.float32) != calibration.shape_hash(CONFIG, torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert measured(tmp_path)[1]
    monkeypatch.setattr(calibration, "kernels_hash", lambda: "others")
    assert measured(tmp_path)[1]
    assert len(kept(tmp_path)) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[1]", '[{"key": {}}]', '[{"key": 1, "ways": {}}]', "null"])
def test_a_damaged_cache_file_is_measured_anew(tmp_path, text):
    (tmp_path / TABLE).write_text(text)
    found, made, _ = measured(tmp_path)
    assert made and lookup(tmp_path, found.key) == found


def test_a_damaged_entry_leaves_the_others(tmp_path):
    found, _, _ = measured(tmp_path)
    table = json.loads((tmp_path / TABLE).read_text())
    table.append(json.loads(json.dumps(table[0])))
    table[1]["ways"]["packed"]["seconds"][0] = -1
    (tmp_path / TABLE).write_text(json.dumps(table))
    assert kept(tmp_path) == [found]


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    assert measured(tmp_path / "file" / "below")[0].fastest() == "int4"


def test_a_busy_machine_is_measured_again_and_the_smallest_counts(tmp_path):
    """Two of three runs take twice as long."""
    busy, _, _ = measured(tmp_path, noise=lambda run: 1.0 if run % 3 == 0 else 2.0)
    assert busy.busy and busy.ways["int4"](1) == pytest.approx(0.004)
    slow, made, _ = measured(tmp_path, noise=lambda run: 3.0 if run % 3 == 0 else 9.0)
    assert made == list(COSTS) and slow.runs == 2
    assert slow.ways["int4"](1) == pytest.approx(0.004)
    for _ in range(TRIES):
        last, made, _ = measured(tmp_path, noise=lambda run: 1.0 if run % 3 == 0 else 2.0)
    assert not made and last.runs == TRIES
    quiet, _, _ = measured(tmp_path / "quiet")
    assert not quiet.busy


def test_time_is_limited_and_hopeless_ways_are_left(tmp_path):
    """Seconds of a forward as a model of 8B has them on two cores."""
    costs = {"as they come": (0.2, 0.02), "packed": (0.1, 0.02), "bfloat16": (9.0, 9.0)}
    large = SimpleNamespace(**CONFIG.to_dict() | {"hidden_size": 4096, "vocab_size": 128256})
    large.to_dict, large.get_text_config = CONFIG.to_dict, lambda: large
    found, _, runs = measured(tmp_path, tuple(costs)[:2], costs, large)
    assert found.took <= 10
    assert [tokens for way, tokens in runs if way == "packed"][3:10] == list(WIDTHS)
    found, _, runs = measured(tmp_path, tuple(costs), costs, large)
    assert {tokens for way, tokens in runs if way == "bfloat16"} == {1}
    assert found.fastest() == "packed"


def test_a_model_that_cannot_be_built_is_not_timed(tmp_path):
    def make(*_):
        raise AttributeError("no layers")

    assert calibrate(CONFIG, torch.float32, ["packed"], tmp_path, make=make) is None
    assert not (tmp_path / TABLE).exists()


# -- one layer ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["as they come", "packed", "bfloat16"])
def test_one_layer_and_the_head_are_timed_apart(way):
    bench = OneLayer(tiny_llama(layers=5).config, torch.float32, way)
    assert bench.model.config.num_hidden_layers == 1 and bench.seconds((1.0, 10.0, 100.0)) == 151
    once, layer, head = bench(3)
    assert min(once, layer, head) > 0


def test_a_large_head_is_cut_and_its_time_scaled():
    config = tiny_llama(vocab=11).config
    config.hidden_size, config.vocab_size = 4096, 128257
    rows = timed_rows(config)
    assert rows <= HEAD // 4096 and rows % 8 == 128257 % 8
    config.vocab_size = 1000
    assert timed_rows(config) == 1000


@pytest.mark.slow
def test_layers_of_4_bits_are_timed_by_the_compiled_forward_where_there_is_one():
    config = tiny_llama(vocab=24, hidden=64, layers=4).config
    bench = OneLayer(config, torch.float32, "int4")
    assert bench.compiled is not None and bench.seconds((3.0, 7.0, 8.0)) == pytest.approx(1 + 4 * 2 + 5)
    assert min(bench(2)) > 0
    config.attention_bias = True  # transformers' own forward
    bench = OneLayer(config, torch.float32, "int4")
    assert bench.compiled is None and bench.seconds(bench(2)) > 0


# -- the choice --------------------------------------------------------------------------------------------------------
def known(ways):
    """Measures as told, and counts."""
    asked = []

    def timed(config, dtype, wanted, folder, **_):
        asked.append(list(wanted))
        curves = {way: Curve((1, 8), (seconds, 2 * seconds)) for way, seconds in ways.items() if way in wanted}
        return Calibration({}, "a model", curves, 1)

    return timed, asked


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVERYTOKEN_CALIBRATE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_ways_that_round_are_only_spoken_of(folder):
    timed, asked = known({"as they come": 3.0, "packed": 2.0, "bfloat16": 1.0})
    choice = choose_weights(folder, timed=timed)
    assert choice.way == "packed" and choice.curve(8) == 4.0 and {"packed", "bfloat16"} <= set(asked[0])
    assert "--weights bfloat16 would be about 2.0x" in choice.advice
    timed, _ = known({"as they come": 1.0, "packed": 2.0, "bfloat16": 0.99})
    choice = choose_weights(folder, timed=timed)
    assert choice.way == "as they come" and not choice.advice and "2.00x packed" in str(choice)


def test_weights_of_4_bits_are_chosen_where_they_are_exact(folder, monkeypatch):
    from everytoken.core import choosing

    monkeypatch.setattr(choosing, "exact_in_4_bits", lambda model: True)
    timed, _ = known({"as they come": 3.0, "packed": 2.0, "int4": 1.0})
    assert choose_weights(folder, timed=timed).way == "int4"
    assert choose_weights(folder, compiled=False, timed=timed).way == "packed"
    assert choose_weights(folder, measure=False, timed=timed).way == "int4"


def test_a_way_that_is_named_is_taken_and_what_cannot_be_is_refused(folder):
    timed, asked = known({"packed": 2.0})
    choice = choose_weights(folder, "packed", timed=timed)
    assert (choice.way, choice.why, asked) == ("packed", "asked for", [["packed"]])
    for weights, dtype in (("int3", "auto"), ("int4", "bfloat16")):
        with pytest.raises(BadInputError):
            choose_weights(folder, weights, dtype, timed=timed)
    assert len(asked) == 1


def test_nothing_is_measured_where_that_is_switched_off(folder, monkeypatch):
    timed, asked = known({"packed": 2.0})
    assert choose_weights(folder, measure=False, timed=timed).way == "as they come"
    monkeypatch.setenv("EVERYTOKEN_CALIBRATE", "0")
    choice = choose_weights(folder, timed=timed)
    assert "nothing was measured" in str(choice) and choice.curve is None and not asked


def test_no_curve_is_handed_on_that_is_too_short_or_was_measured_on_a_busy_machine():
    for curve, trusted in (
        (Curve((1, 8), (1.0, 2.0), 0.1), True),
        (Curve((1, 8), (1.0, 2.0), 0.9), False),
        (Curve((1, 4), (1.0, 2.0)), False),
    ):
        choice = Choice("packed", "", Calibration({}, "", {"packed": curve}))
        assert choice.curve == (curve if trusted else None)


def test_a_model_carries_its_curve_and_the_next_load_measures_nothing(folder, tmp_path):
    tiny_tokenizer().save_pretrained(folder)
    model, choice = load_fastest(folder, "as they come")
    assert model.forward_cost == choice.curve and choice.calibration.ways["as they come"](1) > 0
    table = (tmp_path / "cache" / TABLE).read_text()
    later, _ = load_fastest(folder, "as they come", measure=False)
    assert (tmp_path / "cache" / TABLE).read_text() == table and later.forward_cost == choice.curve
