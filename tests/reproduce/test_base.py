"""The harness: aggregation, resuming, result files, the scoreboard, the results that ship."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from everytoken.catalog import find_card
from everytoken.catalog.cards import load_catalog
from everytoken.core.errors import BadInputError, MissingExtraError
from everytoken.core.results import paired_interval
from everytoken.reproduce.base import Claim, Context, Reproduction, execute, table
from everytoken.reproduce.files import load_result, load_results, public_command, public_model, up_to_date, write
from everytoken.reproduce.scoreboard import scoreboard

QUIET = Console(quiet=True)
RESULTS = Path(__file__).resolve().parents[2] / "results"


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
    context.report("working", 0, 0)
    context.artifacts["curve"] = [context.seed]
    return {
        "ours": {"speed": 10.0 + 0.2 * context.seed, "loss": 1.0},
        "theirs": {"speed": 5.0, "loss": 1.5 - context.seed},
    }


def shown(result):
    console = Console(record=True, width=180, file=open("/dev/null", "w"))
    console.print(table(result))
    return console.export_text()


def test_verdicts_come_from_intervals():
    result = execute(toy(measure), console=QUIET)
    speed, loss = result["claims"]
    assert speed["by_seed"] == pytest.approx([2.0, 2.04, 2.08])
    assert speed["value"] == pytest.approx((2.0 * 2.04 * 2.08) ** (1 / 3))
    found = paired_interval([10.0, 10.2, 10.4], [5.0] * 3)
    assert speed["interval"] == [found.low, found.high]
    assert speed["verdict"] == "holds"
    assert loss["by_seed"] == [-0.5, 0.5, 1.5]
    assert (loss["value"], loss["verdict"]) == (0.5, "undecided")
    assert result["artifacts"]["2"] == {"curve": [2]}
    assert (result["seeds"], result["scale"]) == ([0, 1, 2], "cpu")
    assert {"python", "cores", "processor"} <= set(result["machine"])
    assert "torch" in result["versions"]
    text = shown(result)
    assert "2.04x" in text
    assert "1.94 to 2.14x" in text
    assert "holds" in text


def test_a_quick_run_that_cannot_tell_arms_apart_says_only_that_it_ran():
    equal = toy(lambda _: {"ours": {"speed": 1.23456, "loss": 0.5}, "theirs": {"speed": 1.23456, "loss": 0.5}})
    result = execute(equal, "quick", console=QUIET)
    assert {claim["verdict"] for claim in result["claims"]} == {"ran"}
    assert "ran" in shown(result)
    assert "holds" not in shown(result)

    def by_question(_):
        right = [1.0] * 20 + [0.0] * 10
        return {"ours": {"speed": [2.0] * 30, "loss": right}, "theirs": {"speed": [1.0, 1.5] * 15, "loss": right}}

    speed, loss = execute(toy(by_question), "quick", console=QUIET)["claims"]
    assert (speed["verdict"], loss["verdict"]) == ("holds", "ran")
    assert "one seed" in speed["note"]


# -- going on after an interruption ----------------------------------------------------------------------------------
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


def in_parts(log, stop=None):
    """An experiment of three drawn parts; ``stop`` interrupts it, once, inside the second part of the second seed."""

    def run(context):
        import numpy as np
        import torch

        def drawn(name):
            log.append((context.seed, name))
            if stop and (context.seed, name) == (1, "second"):
                stop.pop()
                raise KeyboardInterrupt
            context.artifacts[name] = round(torch.rand(1).item(), 6)
            return [torch.rand(1).item(), np.random.rand()]

        values = {name: context.part(name, lambda name=name: drawn(name)) for name in ("first", "second", "third")}
        between = torch.rand(1).item()
        return {
            "ours": {"speed": values["first"][0] + 1, "loss": values["second"][1]},
            "theirs": {"speed": values["third"][0] + 1, "loss": between},
        }

    return run


def test_parts_of_a_seed_are_kept_and_an_interruption_changes_nothing():
    whole = execute(toy(in_parts([])), console=QUIET, fresh=True)
    log, stop = [], [True]
    with pytest.raises(KeyboardInterrupt):
        execute(toy(in_parts(log, stop)), console=QUIET)
    assert log == [(0, "first"), (0, "second"), (0, "third"), (1, "first"), (1, "second")]
    log.clear()
    resumed = execute(toy(in_parts(log, stop)), console=QUIET)
    assert log == [(1, "second"), (1, "third"), (2, "first"), (2, "second"), (2, "third")]
    assert resumed["runs"] == whole["runs"]
    assert resumed["artifacts"] == whole["artifacts"]
    assert resumed["claims"] == whole["claims"]


def test_fresh_starts_anew():
    log, stop = [], [True]
    with pytest.raises(KeyboardInterrupt):
        execute(toy(in_parts(log, stop)), console=QUIET)
    log.clear()
    execute(toy(in_parts(log)), console=QUIET, fresh=True)
    assert log[:2] == [(0, "first"), (0, "second")]
    assert len(log) == 9


KILLED = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from everytoken.reproduce.base import Claim, Reproduction, execute

place = Path(sys.argv[1])

def run(context):
    import torch

    def part(name):
        with (place / "log").open("a") as log:
            log.write(f"{context.seed} {name};")
        if name == "slow" and context.seed == 1 and not (place / "again").exists():
            (place / "waiting").touch()
            time.sleep(600)
        return torch.rand(1).item()

    fast = context.part("fast", lambda: part("fast"))
    return {"ours": {"speed": fast + 1}, "theirs": {"speed": context.part("slow", lambda: part("slow")) + 1}}

claims = [Claim("speed", "ours", "theirs", "faster")]
print(execute(Reproduction("killed", "a run that is killed", run, claims, seeds=2),
console=Console(quiet=True))["runs"])
"""


@pytest.mark.slow
def test_a_killed_process_loses_the_part_that_it_was_in_and_no_other(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = os.environ | {"EVERYTOKEN_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment)
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "again").touch()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "log").read_text() == "0 fast;0 slow;1 fast;1 slow;1 slow;"
    unbroken = subprocess.run(
        command,
        env=environment | {"EVERYTOKEN_CACHE": str(tmp_path / "other")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == unbroken.stdout


def test_models_are_kept_with_their_part(tmp_path):
    import torch

    from everytoken.reproduce.beds.small_models import small_model

    trained = []

    def train():
        trained.append(1)
        return small_model(11, hidden=16, layers=1), [1.5]

    first, second = (Context(0, folder=tmp_path).model_part("guide", train) for _ in range(2))
    assert trained == [1]
    assert first[1] == second[1] == [1.5]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(first[0](ids).logits, second[0](ids).logits)
    assert Context(0).model_part("guide", train)[1] == [1.5]  # without a folder it runs
    assert trained == [1, 1]


def test_parts_that_cannot_be_kept_are_refused(tmp_path):
    context = Context(0, folder=tmp_path)
    with pytest.raises(BadInputError, match="cannot be kept"):
        context.part("odd", lambda: {1, 2})
    context.part("twice", lambda: 1)
    with pytest.raises(BadInputError, match="two parts called 'twice'"):
        context.part("twice", lambda: 2)
    assert Context(0).part("a/b", lambda: (1, 2)) == [1, 2]


# -- files -----------------------------------------------------------------------------------------------------------
def test_results_are_files_and_make_the_scoreboard(tmp_path):
    result = execute(toy(measure), console=QUIET)
    path = write(result, tmp_path / "results")
    assert load_result(path) == result
    for scale in ("quick", "gpu"):
        assert write(result | {"quick": scale == "quick", "scale": scale}, tmp_path / scale).name == f"toy.{scale}.json"
    write(result | {"quick": True, "scale": "quick"}, tmp_path / "results")
    found = load_results(tmp_path / "results")
    assert len(found) == 1  # quick runs do not count
    page = scoreboard(found)
    assert "| [toy](#toy) | speed | 2.04x | 1.94 to 2.14x | **holds** | 1 holds, 1 undecided |" in page
    assert "| speed | theirs: 5 | ours: 10.2 | 2.04x | 1.94 to 2.14x | 3x | **holds** |" in page
    assert page.count("<details") == page.count("</details>") == 1
    assert "smaller machine" in page
    (tmp_path / "results" / "bad.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"bad\.json"):
        load_results(tmp_path / "results")


def test_lists_of_numbers_take_one_line(tmp_path):
    result = execute(
        toy(lambda _: {arm: {"speed": [1.5, 2e-7, 3.0] * 4, "loss": 1.0} for arm in ("ours", "theirs")}), console=QUIET
    )
    text = write(result, tmp_path).read_text()
    assert json.loads(text)["runs"] == result["runs"]
    assert any(line.count(",") > 11 for line in text.splitlines())


def test_files_of_0_1_are_read():
    """Their claims have neither interval nor verdict, and their direction only in what they call *holds*."""
    old = {
        "name": "toy",
        "summary": "a toy",
        "quick": False,
        "model": "embedded",
        "date": "2026-11-24",
        "seeds": [0, 1],
        "command": "everytoken reproduce toy --fresh --out /somewhere/results",
        "seconds": 3.0,
        "versions": {},
        "machine": {"processor": "p", "cores": 2, "threads": 1, "gpu": None, "system": "s", "python": "3.11"},
        "claims": [
            {
                "metric": m,
                "method": "ours",
                "baseline": "theirs",
                "kind": k,
                "method_value": 1.0,
                "baseline_value": 1.0,
                "value": v,
                "by_seed": [v, v],
                "paper": "p",
                "why": "",
                "holds": h,
                "every_seed": h,
            }
            for m, k, v, h in (
                ("speed", "ratio", 2.0, True),
                ("loss", "difference", -0.5, True),
                ("speed", "ratio", 2.0, False),
            )
        ],
        "runs": [
            {"ours": {"speed": 2.0, "loss": 0.5}, "theirs": {"speed": 1.0, "loss": 1.0}},
            {"ours": {"speed": 2.1, "loss": 0.48}, "theirs": {"speed": 1.0, "loss": 1.0}},
        ],
        "artifacts": {},
    }
    result = up_to_date(old)
    assert [claim["higher_is_better"] for claim in result["claims"]] == [True, False, False]
    assert [claim["verdict"] for claim in result["claims"]] == ["holds", "holds", "contradicted"]
    found = paired_interval([2.0, 2.1], [1.0, 1.0])
    assert result["claims"][0]["interval"] == [found.low, found.high]
    assert result["scale"] == "cpu"
    assert result["command"] == "everytoken reproduce toy"
    assert scoreboard([result])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("tdpo --fresh --out /somewhere/results", "tdpo"),
        ("tdpo --out=/somewhere --seeds 2 --json", "tdpo --seeds 2"),
        ("tdpo --model /home/me/models/small --quick", "tdpo --model small --quick"),
        ("tdpo --model=~/small.gguf", "tdpo --model=small.gguf"),
        ("tdpo --model C:\\models\\small", "tdpo --model small"),
        ("tdpo --model org/small --scale cpu", "tdpo --model org/small --scale cpu"),
    ],
)
def test_commands_are_recorded_without_places(given, kept):
    assert public_command(["/bin/everytoken", "reproduce", *given.split()]) == f"everytoken reproduce {kept}"
    assert public_command(["pytest", "-q"]) == ""


def test_models_are_recorded_without_places(tmp_path):
    assert public_model(None) == "embedded"
    assert public_model("org/small") == "org/small"
    assert public_model(str(tmp_path / "mine")) == "mine"
    assert public_model("folder/model.gguf") == "model.gguf"


PLACES = re.compile(r"(?<![\w.:/])(/(home|root|tmp|work|usr|opt|mnt|var|Users|data)/|~/|[A-Za-z]:\\)|(--out|--cache)")


def strings(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def test_no_shipped_result_holds_a_place_of_a_machine():
    files = [path for path in RESULTS.rglob("*.json") if ".quick" not in path.name]
    assert len(files) >= 17
    for path in files:
        places = [text for text in strings(json.loads(path.read_text())) if PLACES.search(text)]
        assert not places, (path.name, places)
    for place in ("everytoken --out /x", "see /home/me/x", "--model ~/x", "C:\\x"):
        assert PLACES.search(place)


NOTHING_DRAWN = ("tokenadapt", "dynamic-tokenization", "tokenselect")  # one seed is all there is
MEASURED = [slug for slug, card in load_catalog().items() if card.reproduction and card.status == "measured"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_shipped_results_are_sound(name):
    """Full results, several seeds, versions and machine recorded; claims are those of the experiment over the file's
    runs.
    """
    from everytoken.reproduce.base import measured_claims

    result, experiment = load_result(RESULTS / f"{name}.json"), find_card(name).load_reproduction()
    assert not result["quick"]
    assert len(result["seeds"]) == len(result["runs"]) >= (1 if name in NOTHING_DRAWN else 2)
    assert json.loads(json.dumps(measured_claims(experiment, result["runs"]))) == result["claims"], (
        "run `everytoken scoreboard --remeasure`"
    )
    assert result["command"].startswith(f"everytoken reproduce {name}")
    assert {"torch", "transformers"} <= set(result["versions"])


def test_no_claim_has_a_baseline_that_is_one_by_definition():
    """A share of itself is no comparison: such claims have a bar."""
    for name in MEASURED:
        result = load_result(RESULTS / f"{name}.json")
        for claim in result["claims"]:
            if claim["kind"] == "ratio":
                values = {
                    value for run in result["runs"] for value in [run[claim["baseline"]][claim["metric"]]] if value == 1
                }
                assert not values, (name, claim["metric"])


def test_the_hnsw_claim_has_its_bar():
    claims = {claim.metric: claim for claim in find_card("dynamic-tokenization").load_reproduction().claims}
    assert (claims["top-1 found"].kind, claims["top-1 found"].threshold) == ("value", 0.95)
    assert "own tokens a step" not in claims


# -- requests --------------------------------------------------------------------------------------------------------
def test_bad_requests_come_before_the_work():
    def never(context):
        pytest.fail("ran")

    with pytest.raises(BadInputError, match="at least one seed"):
        execute(toy(never), seeds=0, console=QUIET)
    with pytest.raises(BadInputError, match="no version for the scale 'gpu'"):
        execute(toy(never), "gpu", console=QUIET)
    with pytest.raises(MissingExtraError, match="no_such_library"):
        execute(toy(never, extra=("train", "no_such_library")), console=QUIET)


def test_a_claim_on_what_no_arm_measured_is_named_and_nothing_is_lost():
    ran = []

    def run(context):
        ran.append(context.seed)
        return {"ours": {"speed": 1.0}, "theirs": {"speed": 1.0, "loss": 1.0}}

    with pytest.raises(BadInputError, match="'loss', but 'ours' did not measure it"):
        execute(toy(run), console=QUIET)
    experiment = toy(run)
    experiment.claims = experiment.claims[:1]
    execute(experiment, console=QUIET)  # another set of claims over the same seeds
    assert ran == [0, 1, 2]
    quick = execute(toy(run), "quick", console=QUIET)
    assert [claim["metric"] for claim in quick["claims"]] == ["speed"]  # it may leave out what takes long


def test_the_seed_makes_a_run_repeatable():
    import torch

    def draw(context):
        value = torch.rand(1).item()
        return {"ours": {"speed": value, "loss": 0}, "theirs": {"speed": 1, "loss": 0}}

    first, second = (execute(toy(draw), seeds=2, console=QUIET)["claims"][0]["by_seed"] for _ in range(2))
    assert first == second
    assert first[0] != first[1]
