"""Quick runs of the experiments, from end to end; what each asserts could be otherwise."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from everytoken.catalog import find_card
from everytoken.core.results import mean
from everytoken.reproduce.base import execute

from ..selection import reproducible

QUIET = Console(quiet=True)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory, monkeypatch):
    """Beds are made once for all of these tests, in whichever process; kept parts do not outlive an experiment."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(shared / "quick-cache"))


def quick(name):
    """The result of a quick run, and its claims by ``(metric, method, baseline)``."""
    result = execute(find_card(name).load_reproduction(), "quick", console=QUIET)
    assert all(claim["verdict"] in ("ran", "holds", "contradicted") for claim in result["claims"])
    return result, {(c["metric"], c["method"], c["baseline"]): c for c in result["claims"]}


def distinct(result, *arms):
    """Whether every two of the arms measured something different."""
    runs = [result["runs"][0][arm] for arm in arms]
    return all(a != b for place, a in enumerate(runs) for b in runs[:place])


@pytest.mark.reproduction("dynamic-tokenization")
def test_dynamic_tokenization():
    from everytoken.reproduce.dynamic_tokenization import curve_svg

    result, claims = quick("dynamic-tokenization")
    arms = result["runs"][0]
    assert claims["positions", "hypernetwork", ""]["value"] < 0.8
    whole = [mean(arms[name]["bits a byte, 100% merged"]) for name in ("no merging", "hypernetwork", "mean of pieces")]
    assert whole == sorted(whole)
    svg = curve_svg(result)
    assert all(f">{text}</text>" in svg for text in ("hypernetwork", "mean of pieces", "positions saved in the prefix"))


@pytest.mark.reproduction("stochastok")
def test_stochastok():
    result, claims = quick("stochastok")
    assert len(claims) == 3
    assert distinct(result, "StochasTok", "fixed tokens")
    spelt = result["runs"][0]["StochasTok"]["letters of words never asked about"]
    assert len(spelt) == 360  # three letters of 120 words
    assert set(spelt) <= {0.0, 1.0}


@pytest.mark.reproduction("dyspec")
def test_dyspec():
    result, claims = quick("dyspec")
    same = result["artifacts"]["0"]["texts equal to plain greedy decoding"]
    assert same["DySpec"] == same["plain generate"] == 3
    assert claims["mean accepted length", "DySpec of 14", "chain of 14"]["value"] > 1


@pytest.mark.reproduction("xgrammar")
def test_xgrammar():
    result, claims = quick("xgrammar")
    # that both give the same masks is asserted inside
    assert claims["mask, any JSON, microseconds", "engine", "no split, no memory"]["value"] < 1
    for name in ("XGrammar", "XGrammar, jumps"):
        found = result["artifacts"]["0"][name]
        assert found["valid"] == found["finished"]


@pytest.mark.reproduction("awrs")
def test_awrs():
    masking = "masking with the same checker"
    _, claims = quick("awrs")
    assert claims["JSON: tests a token", "AWRS", masking]["method_value"] < 100
    assert claims["divergence from the posterior, nats", "AWRS", masking]["value"] < 0


@pytest.mark.reproduction("exact-bytes")
def test_exact_bytes():
    _, claims = quick("exact-bytes")
    bits = claims["bits a byte", "exact bytes", "own tokens"]
    assert bits["value"] < 0.6
    assert bits["verdict"] == "holds"  # eight prompts are enough for this one
    assert claims["next 4 bytes right", "exact bytes", "own tokens"]["value"] > 0


@pytest.mark.reproduction("tokenselect")
def test_tokenselect():
    arms = quick("tokenselect")[0]["runs"][0]
    assert arms["TokenSelect"]["pass keys found at 3k"] == [1.0]
    assert arms["TokenSelect"]["tokens per second behind 3k"] > 0


@pytest.mark.reproduction("skipdecode")
def test_skipdecode():
    result, claims = quick("skipdecode")
    assert distinct(result, "full depth", "SkipDecode 2x", "truncated 2x", "not tuned 2x")
    assert len(result["runs"][0]["full depth"]["ROUGE-L"]) == 32
    assert claims["ROUGE-L", "SkipDecode 2x", "full depth"]["method_value"] > 0


@pytest.mark.reproduction("r2r")
def test_r2r():
    from everytoken.reproduce.r2r import curve_svg

    result, claims = quick("r2r")
    assert claims["parameters a token", "R2R", "large model"]["method_value"] > 0
    assert distinct(result, "small model", "large model", "R2R")
    assert "share of right answers" in curve_svg(result)


@pytest.mark.reproduction("r-to-q-star")
def test_r_to_q_star():
    arms = quick("r-to-q-star")[0]["runs"][0]
    assert set(arms["implicit reward"]["planted error among the lowest 3"]) <= {0.0, 1.0}
    assert (
        arms["implicit reward"] != arms["base log-probability"]
        or arms["DPO policy, 3 beams"] != arms["base model, 3 beams"]
    )
    assert len(arms["DPO policy, 3 beams"]["reward"]) == 4


@pytest.mark.reproduction("tokenadapt")
def test_tokenadapt():
    _, claims = quick("tokenadapt")
    assert claims["mistral: perplexity a byte", "TokenAdapt", "mean"]["value"] < 1
    assert claims["bytes a token", "supertokens", "BPE"]["value"] > 1


def untested():
    """Experiments that no test here looks at more closely."""
    marks = re.findall(r'mark\.reproduction\("([^"]+)"\)', Path(__file__).read_text(encoding="utf-8"))
    return [pytest.param(name, marks=pytest.mark.reproduction(name)) for name in sorted({*reproducible()} - {*marks})]


@pytest.mark.parametrize("name", untested())
def test_an_experiment_without_a_test_here(name):
    result, claims = quick(name)
    assert claims
    assert distinct(result, *result["runs"][0])


# -- trainings --------------------------------------------------------------------------------------------------------
@pytest.mark.reproduction("tdpo")
def test_tdpo():
    """Losses that differ train models that differ, in more than the fifth digit."""
    pytest.importorskip("trl")
    result, claims = quick("tdpo")
    curves = result["artifacts"]["0"]["curves"]
    assert set(curves) == {"DPO", "TDPO1", "TDPO2"}
    ends = [curve[-1][0] for curve in curves.values()]
    assert min(abs(a - b) for a in ends for b in ends if a is not b) > 1e-3
    assert claims["KL at the end", "TDPO2", "DPO"]["value"] < 1
    assert len(result["runs"][0]["DPO"]["reward at the end"]) == 72


@pytest.mark.reproduction("t-reg")
def test_t_reg():
    pytest.importorskip("trl")
    result, _ = quick("t-reg")
    assert distinct(result, "DPO", "T-REG")
    for arm in result["runs"][0].values():
        assert arm["KL at the end"] > 0
        assert arm["rank correlation with the lexicon"] != 0
    assert result["artifacts"]["0"]["lexicon words"] > 10


@pytest.mark.reproduction("tgdpo")
def test_tgdpo():
    pytest.importorskip("trl")
    result, _ = quick("tgdpo")
    assert set(result["runs"][0]) == {"DPO", "TGDPO", "TGDPO, clamped"}
    assert distinct(result, "DPO", "TGDPO")  # a guide of a few steps gives no weight that the clamp would reach


@pytest.mark.reproduction("rto")
def test_rto():
    pytest.importorskip("trl")
    from everytoken.reproduce.rto import ARMS, curve_svg

    result, _ = quick("rto")
    assert distinct(result, *ARMS)
    assert all(len(curve) == 4 for curve in result["artifacts"]["0"]["curves"].values())
    assert all(f">{name}</text>" in curve_svg(result) for name in ARMS)


@pytest.mark.reproduction("cdpo")
def test_cdpo():
    """Contrastive estimation finds critical tokens better than chance, even of a few wrong traces."""
    pytest.importorskip("trl")
    arms = quick("cdpo")[0]["runs"][0]
    assert arms["contrast"]["AUC for critical tokens"] > 0.6
    assert 0.1 < mean(arms["start"]["accuracy"]) < 0.95


@pytest.mark.reproduction("ift")
def test_ift():
    pytest.importorskip("trl")
    result, _ = quick("ift")
    assert set(result["runs"][0]) == {"SFT", "IFT"}
    assert distinct(result, "SFT", "IFT")


@pytest.mark.reproduction("cdpo")
def test_the_sums_bed_can_decide():
    """Its positive control: more of what the start learnt from."""
    pytest.importorskip("trl")
    from everytoken.reproduce.beds.base import CONTROL, START, can_decide, control, find_bed

    result = execute(control(find_bed("sums")), "quick", seeds=1, console=QUIET)
    helped, above, below = result["claims"]
    assert (helped["method"], helped["baseline"], above["method"]) == (CONTROL, START, START)
    assert helped["verdict"] == above["verdict"] == below["verdict"] == "holds"
    assert can_decide(result)


@pytest.mark.reproduction("ulorl")
def test_ulorl():
    """Passes and times by segments, and three masks that train three policies."""
    pytest.importorskip("trl")
    from everytoken.reproduce.ulorl import ACCURACY, ARMS, MASKED, PASSES, SECONDS

    result, claims = quick("ulorl")
    arms = result["runs"][0]
    assert set(arms) == {"start", *ARMS, *MASKED}
    assert claims[f"{PASSES}, heavy tail", "4 segments", "whole responses"]["value"] < 0.8
    assert claims[f"{PASSES}, equal lengths", "4 segments", "whole responses"]["value"] > 0.8
    assert all(arms[arm][f"{SECONDS}, heavy tail"] > 0 for arm in ARMS)
    # six updates train the masks alike (no token is as sure as they ask): that they ran is all
    assert claims[ACCURACY, "no mask", "start"]["method_value"] > 0 and all(ACCURACY in arms[arm] for arm in MASKED)
    assert result["artifacts"]["0"]["target of the thermostat, nats"] > 0


@pytest.mark.reproduction("tempo")
def test_tempo():
    """Advantages on trees, and a network that learns by either."""
    pytest.importorskip("trl")
    from everytoken.reproduce.tempo import REACHED, SHARED, SIZES

    result, claims = quick("tempo")
    assert claims[SHARED, "TEMPO", "GRPO"]["value"] > 0
    assert distinct(result, "start", "GRPO", "TEMPO")
    assert claims[REACHED, "TEMPO", "GRPO"]["baseline_value"] <= SIZES["quick"].updates


@pytest.mark.reproduction("openmoe")
def test_openmoe():
    result, claims = quick("openmoe")
    explained = "share of the choice explained"
    assert claims[explained, "token id", "position"]["value"] > 0
    assert claims["late minus early drop rate, prose", "OpenMoE", ""]["value"] > 0
    assert distinct(result, "OpenMoE", "code in the warm-up", "random order")
    steps = [step for step, *_ in result["artifacts"]["0"]["agreement by step"]]
    assert steps == sorted(set(steps)) or steps[:-1] == sorted(set(steps))


@pytest.mark.reproduction("rmoe")
def test_rmoe():
    result, claims = quick("rmoe")
    sizes = [result["artifacts"]["0"][name]["parameters"] for name in ("RMoE", "linear routers")]
    assert sizes[0] <= sizes[1] < 1.1 * sizes[0]
    assert distinct(result, "RMoE", "linear routers", "RMoE, gradient cut")
    assert len(result["runs"][0]["RMoE"]["bits per byte"]) == 8
    assert claims["nats between neighbouring routers", "RMoE", "linear routers"]["method_value"] > 0


@pytest.mark.reproduction("duo-llm")
def test_duo_llm():
    result, _ = quick("duo-llm")
    runs = {name: mean(values["nats of the next byte"]) for name, values in result["runs"][0].items()}
    assert runs["oracle of 1"] < runs["all small"]
    assert runs["oracle of 1"] < runs["oracle of 1 for a wrong byte"]
    curve = result["artifacts"]["0"]["oracle's loss by budget"]["at_most"]
    assert curve == sorted(curve, reverse=True)


@pytest.mark.reproduction("d3s")
def test_d3s():
    """It trains on a part of what GRPO trains on, all of it with an advantage, and both learn from one start."""
    pytest.importorskip("trl")
    result, claims = quick("d3s")
    assert claims["tokens back-propagated", "D3S", "GRPO"]["value"] < 0.25
    assert claims["trained rollouts with an advantage", "D3S", "GRPO"]["value"] >= 0
    assert distinct(result, "start", "GRPO", "D3S")
    assert len(result["runs"][0]["D3S"]["accuracy"]) == 256


@pytest.mark.reproduction("hapo")
def test_hapo():
    """All parts alone are there, and none of them trains what another trains."""
    pytest.importorskip("trl")
    from everytoken.reproduce.hapo import ARMS

    result, claims = quick("hapo")
    assert distinct(result, "start", *ARMS)
    assert claims["entropy of a response, nats", "DAPO", "start"]["value"] < 0
    assert set(ARMS) == {claim["method"] for claim in result["claims"]}


@pytest.mark.reproduction("rmt")
def test_rmt():
    """Six updates are enough for the budget to show."""
    pytest.importorskip("trl")
    result, claims = quick("rmt")
    assert distinct(result, "start", "RMT", "reinforcement alone", "without next-token loss")
    assert claims["tokens of a thought", "RMT", "reinforcement alone"]["value"] < 1


@pytest.mark.reproduction("curriculum-grpo")
def test_curriculum_grpo():
    pytest.importorskip("trl")
    from everytoken.reproduce.curriculum_grpo import CURRICULUM, FIXED, FREE, pareto_svg

    result, claims = quick("curriculum-grpo")
    assert distinct(result, "start", FREE, FIXED, CURRICULUM)
    assert claims["tokens of a response", CURRICULUM, FREE]["method_value"] > 5
    assert all(f">{name}</text>" in pareto_svg(result) for name in ("start", FREE, FIXED, CURRICULUM))


@pytest.mark.reproduction("tw-grpo")
def test_tw_grpo():
    pytest.importorskip("trl")
    result, claims = quick("tw-grpo")
    assert distinct(result, "exact sets", "partial credit", "TW-GRPO")
    assert claims["groups with equal rewards", "partial credit", "exact sets"]["value"] < 0
    assert claims["mean weight of a position", "answer", "preamble"]["method_value"] >= 1


@pytest.mark.reproduction("divprune")
def test_divprune():
    from everytoken.reproduce.divprune import ALL, DIVERSE, FASTV, RANDOM, curve_svg, kept_table, ways

    result, claims = quick("divprune")
    arms, costs = result["runs"][0], result["artifacts"]["0"]["cost"]
    assert set(arms) == {ALL, *ways()}
    assert claims["cluttered scenes: right answers, 8 tokens", DIVERSE, RANDOM]["verdict"] == "holds"
    assert costs[f"{DIVERSE}, 16 tokens"]["visual tokens at the end"] == 16
    assert costs[f"{DIVERSE}, 16 tokens"]["cache bytes"] < costs[f"{FASTV}, 16 tokens"]["cache bytes"]
    assert costs[f"{FASTV}, 16 tokens"]["cache bytes"] < costs[ALL]["cache bytes"]
    rows = kept_table(result).splitlines()
    assert len(rows) == 2 + len(arms) and len({row.count("|") for row in rows}) == 1
    assert ">DivPrune</text>" in curve_svg(result)


@pytest.mark.reproduction("catp")
def test_catp():
    from everytoken.reproduce.catp import ALL, CATP_ARM, DIVERSE

    result, claims = quick("catp")
    assert len(claims) == 6
    seen = result["artifacts"]["0"]["image tokens attended, all layers"]
    assert seen[ALL] == 3 * 5 * 64 and seen[f"{DIVERSE}, 50% removed"] == seen[ALL] / 2
    assert seen[f"{CATP_ARM}, 90% removed"] < seen[f"{CATP_ARM}, 50% removed"] < seen[ALL]


@pytest.mark.reproduction("token-reduction")
def test_token_reduction():
    from everytoken.reproduce.token_reduction import ALL, DIVERSE, POLICY, RANDOM, SPREAD

    result, claims = quick("token-reduction")
    arms, kept = result["runs"][0], result["artifacts"]["0"]
    assert len(claims) == 7 and distinct(result, POLICY, RANDOM)
    assert arms[ALL][SPREAD] > 0 and arms[DIVERSE][SPREAD] != arms[ALL][SPREAD]
    assert 1 <= kept["cost"][POLICY]["visual tokens at the end"] < 40
    rows = kept["share of kept tokens by row, from the top"]
    assert all(sum(shares) == pytest.approx(1) for shares in rows.values())


@pytest.mark.reproduction("m3")
def test_m3():
    from everytoken.reproduce.m3 import M3, PLAIN, own

    result, claims = quick("m3")
    assert {"right answers, 16 tokens", "right answers, 4 tokens"} <= {metric for metric, *_ in claims}
    assert distinct(result, M3, PLAIN) and own(16) in result["runs"][0]
    assert 1 <= result["artifacts"]["0"][f"oracle of {M3}"]["mean tokens"] <= 64


@pytest.mark.reproduction("tokenpacker")
def test_tokenpacker():
    from everytoken.reproduce.tokenpacker import ALL, PACKER, POOL

    result, claims = quick("tokenpacker")
    assert len(claims) == 3 and distinct(result, PACKER, POOL, ALL)


@pytest.mark.reproduction("rcr")
def test_rcr():
    from everytoken.reproduce.rcr import OURS, PLAIN, RANDOM, metric

    result, claims = quick("rcr")
    assert distinct(result, OURS, PLAIN, RANDOM)
    assert claims[metric(10), PLAIN, RANDOM]["verdict"] == "holds"
    assert result["artifacts"]["0"]["tokens taken back a puzzle, 6 forwards"] > 0


@pytest.mark.reproduction("as-arm")
def test_as_arm():
    from everytoken.reproduce.as_arm import FORWARDS, PLAIN, arm

    result, claims = quick("as-arm")
    assert distinct(result, PLAIN, arm(2), arm(5))
    assert mean(result["runs"][0][PLAIN][FORWARDS]) == 1 and mean(result["runs"][0][arm(2)][FORWARDS]) == 1
    assert claims[FORWARDS, arm(5), PLAIN]["verdict"] == "holds"


@pytest.mark.reproduction("gdpo")
def test_gdpo():
    import torch

    from everytoken.reproduce.diffusion_gdpo import (
        COUNTS,
        DRAWN,
        HOLES,
        ONE,
        OURS,
        SEMI,
        bias,
        exact,
        repeated,
        variance,
    )

    result, claims = quick("gdpo")
    assert distinct(result, DRAWN, SEMI, OURS, COUNTS)
    assert claims[variance(2), SEMI, DRAWN]["verdict"] == "holds" and claims[bias(2), OURS, ONE]["verdict"] == "holds"
    # a network whose tokens are independent: every estimator that weighs by L/k gives the bound itself
    bits = (torch.arange(2**HOLES)[:, None] >> torch.arange(HOLES)) & 1
    table = -bits.sum(1, keepdim=True).float()
    assert exact(table).tolist() == pytest.approx([-HOLES])
    torch.testing.assert_close(repeated(table, 4, 0, rule="gauss-2"), torch.full((1, 4), -float(HOLES)))


@pytest.mark.reproduction("mdpo")
def test_mdpo():
    from everytoken.reproduce.mdpo import LAST, LOST, OURS, PLAIN, SOLVED

    result, claims = quick("mdpo")
    arms = result["runs"][0]
    assert distinct(result, PLAIN, OURS, LAST) and len(arms["start"][SOLVED]) == 128
    assert (SOLVED, OURS, PLAIN) in claims and set(arms[OURS][LOST]) <= {0.0, 1.0}


@pytest.mark.reproduction("cj-grpo")
def test_cj_grpo():
    import random

    from everytoken.reproduce.cj_grpo import (
        ASS,
        BLOCKS,
        BOTH,
        CONSISTENT,
        EOSER,
        FORWARDS,
        FULL,
        ONE,
        SOLVED,
        example,
        right,
    )

    result, _ = quick("cj-grpo")
    arms = result["runs"][0]
    assert distinct(result, BLOCKS, FULL, ASS) and arms[ONE][SOLVED] != [] and CONSISTENT in arms
    assert [arms[name][FORWARDS][0] for name in (BLOCKS, FULL, EOSER, ASS, BOTH)] == [16, 16, 16, 4, 4]
    for seed in range(50):
        prompt, answer = example(random.Random(seed))
        assert right(prompt, answer) == 1.0 and right(prompt, answer[:-1] or "+") == 0.0


@pytest.mark.reproduction("ilm")
def test_ilm():
    from everytoken.reproduce.beds.star_graphs import EDGES, FOUND, WAYS

    result, claims = quick("ilm")
    assert distinct(result, *WAYS)
    assert {metric for metric, *_ in claims} == {FOUND, EDGES}
    assert all(0 <= value <= 1 for arm in result["runs"][0].values() for value in arm[EDGES])
