"""The harness: aggregation, resuming, result files, the scoreboard."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from everytoken.core.errors import BadInputError, MissingExtraError
from everytoken.reproduce import base
from everytoken.reproduce.base import Claim, Reproduction, execute, load_results, scoreboard, table, write

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))


def toy(run, **changes):
    claims = [
        Claim("speed", "ours", "theirs", "3x", why="smaller machine"),
        Claim("loss", "ours", "theirs", "lower", kind="difference", higher_is_better=False),
    ]
    return Reproduction(**{"name": "toy", "summary": "a toy", "run": run, "claims": claims, "seeds": 3} | changes)


def measure(context):
    context.progress("working")
    context.artifacts["curve"] = [context.seed]
    return {
        "ours": {"speed": 10.0 + 2 * context.seed, "loss": 1.0},
        "theirs": {"speed": 5.0, "loss": 1.5 - context.seed},
    }


def test_medians_over_seeds_and_honest_verdicts():
    result = execute(toy(measure), console=QUIET)
    speed, loss = result["claims"]
    assert speed["by_seed"] == [2.0, 2.4, 2.8]
    assert (speed["value"], speed["holds"], speed["every_seed"]) == (2.4, True, True)
    assert loss["by_seed"] == [-0.5, 0.5, 1.5]
    assert (loss["value"], loss["holds"], loss["every_seed"]) == (0.5, False, False)
    assert result["artifacts"]["2"] == {"curve": [2]}
    assert result["seeds"] == [0, 1, 2]
    assert {"python", "cores", "processor"} <= set(result["machine"])
    assert "torch" in result["versions"]
    console = Console(record=True, width=140, file=open("/dev/null", "w"))
    console.print(table(result))
    text = console.export_text()
    assert "2.40x" in text
    assert "every seed" in text


def test_an_interrupted_run_goes_on_where_it_stopped():
    seen = []

    def flaky(context):
        seen.append(context.seed)
        if context.seed == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        return measure(context)

    with pytest.raises(KeyboardInterrupt):
        execute(toy(flaky), console=QUIET)
    result = execute(toy(flaky), console=QUIET)
    assert seen == [0, 1, 1, 2]
    assert len(result["runs"]) == 3
    execute(toy(flaky), console=QUIET)
    assert seen == [0, 1, 1, 2, 0, 1, 2]  # a finished run leaves nothing to go on from


def test_results_are_files_and_make_the_scoreboard(tmp_path):
    result = execute(toy(measure), seeds=1, console=QUIET)
    path = write(result, tmp_path / "results")
    assert json.loads(path.read_text())["name"] == "toy"
    write(result | {"quick": True}, tmp_path / "results")
    found = load_results(tmp_path / "results")
    assert len(found) == 1  # quick runs do not count
    page = scoreboard(found)
    assert "| [toy](methods/toy.md) | speed | theirs: 5 | ours: 10 | **2.00x** | 3x | every seed |" in page
    assert "smaller machine" in page
    (tmp_path / "results" / "bad.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"bad\.json"):
        load_results(tmp_path / "results")


def test_bad_requests_come_before_the_work():
    def never(context):
        pytest.fail("ran")

    with pytest.raises(BadInputError, match="at least one seed"):
        execute(toy(never), seeds=0, console=QUIET)
    with pytest.raises(MissingExtraError, match="no_such_library"):
        execute(toy(never, extra=("train", "no_such_library")), console=QUIET)


def test_the_seed_makes_a_run_repeatable():
    import torch

    def draw(context):
        value = torch.rand(1).item()
        return {"ours": {"speed": value, "loss": 0}, "theirs": {"speed": 1, "loss": 0}}

    first, second = (execute(toy(draw), seeds=2, console=QUIET)["claims"][0]["by_seed"] for _ in range(2))
    assert first == second
    assert first[0] != first[1]


NOTHING_DRAWN = ("tokenadapt", "dynamic-tokenization", "tokenselect")  # one seed is all there is


GENERATION = ("skipdecode", "r2r", "r-to-q-star")
PREFERENCE = ("tdpo", "tgdpo", "t-reg", "cdpo", "ift", "rto")


@pytest.mark.parametrize(
    "name", ["stochastok", "dyspec", "xgrammar", "awrs", "exact-bytes", *GENERATION, *PREFERENCE, *NOTHING_DRAWN]
)
def test_shipped_results_are_sound(name):
    """Full results, several seeds, versions and machine recorded; every claim of the experiment is in the file."""
    from everytoken.catalog import find_card

    card = find_card(name)
    result, experiment = card.result(), card.load_reproduction()
    assert not result["quick"]
    assert len(result["seeds"]) >= (1 if name in NOTHING_DRAWN else 2)
    assert [(c["metric"], c["method"], c["baseline"]) for c in result["claims"]] == [
        (c.metric, c.method, c.baseline) for c in experiment.claims
    ]
    assert result["command"].startswith(f"everytoken reproduce {name}")
    for claim in result["claims"]:
        assert len(claim["by_seed"]) == len(result["seeds"])
    assert base.scoreboard([result])


@pytest.mark.slow
def test_quick_dynamic_tokenization_runs_end_to_end():
    from everytoken.reproduce.dynamic_tokenization import REPRODUCTION, curve_svg

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    arms = result["runs"][0]
    assert arms["hypernetwork"]["positions"] < 0.8
    whole = "bits a byte, 100% merged"
    assert arms["no merging"][whole] < arms["hypernetwork"][whole] < arms["mean of pieces"][whole]
    assert curve_svg(result).count("<polyline") == 2


@pytest.mark.slow
def test_quick_stochastok_runs_end_to_end():
    from everytoken.reproduce.stochastok import REPRODUCTION

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    for claim in result["claims"]:
        assert 0 <= claim["method_value"] <= 1


@pytest.mark.slow
def test_quick_dyspec_runs_end_to_end():
    from everytoken.reproduce.dyspec import REPRODUCTION

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    same = result["artifacts"]["0"]["texts equal to plain greedy decoding"]
    assert same["DySpec"] == same["plain generate"] == 3


@pytest.mark.slow
def test_quick_xgrammar_runs_end_to_end():
    from everytoken.reproduce.xgrammar import REPRODUCTION

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    by_metric = {(claim["metric"], claim["method"]): claim for claim in result["claims"]}
    assert by_metric["mask, any JSON, microseconds", "engine"]["value"] < 1  # that both agree is asserted inside
    assert by_metric["valid of the finished", "XGrammar"]["method_value"] in (0, 1)


@pytest.mark.slow
def test_quick_awrs_runs_end_to_end():
    from everytoken.reproduce.awrs import REPRODUCTION

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    by_metric = {(claim["metric"], claim["method"]): claim for claim in result["claims"]}
    assert by_metric["JSON: tests a token", "AWRS"]["method_value"] < 100
    assert by_metric["divergence from the posterior, nats", "AWRS"]["value"] < 0


@pytest.mark.slow
def test_quick_exact_bytes_runs_end_to_end():
    from everytoken.reproduce.exact_bytes import REPRODUCTION

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    by_metric = {(claim["metric"], claim["baseline"]): claim for claim in result["claims"]}
    assert by_metric["bits a byte", "own tokens"]["value"] < 0.6
    assert by_metric["next 4 bytes right", "own tokens"]["value"] > 0


@pytest.mark.slow
def test_quick_tokenselect_runs_end_to_end():
    from everytoken.reproduce.tokenselect import REPRODUCTION

    result = execute(REPRODUCTION, quick=True, console=QUIET)
    arms = result["runs"][0]
    assert arms["TokenSelect"]["pass keys found at 3k"] == 1.0
    assert arms["TokenSelect"]["tokens per second behind 3k"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skipdecode", "r2r"])
def test_quick_experiments_with_models_of_their_own_run_end_to_end(name):
    from everytoken.catalog import find_card

    result = execute(find_card(name).load_reproduction(), quick=True, console=QUIET)
    assert len(result["claims"]) >= 5
    assert all(claim["method_value"] >= 0 for claim in result["claims"] if claim["kind"] == "ratio")


@pytest.mark.slow
def test_quick_r_to_q_star_runs_end_to_end():
    from everytoken.reproduce.r_to_q_star import REPRODUCTION

    arms = execute(REPRODUCTION, quick=True, console=QUIET)["runs"][0]
    assert 0 <= arms["implicit reward"]["planted error among the lowest 3"] <= 1
    assert "reward" in arms["DPO policy, 3 beams"]
