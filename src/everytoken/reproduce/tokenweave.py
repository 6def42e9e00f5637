"""TokenWeave's claims: shorter steps under tensor parallelism, with the same logits.

The machine has no fast link and shared cores, so no overlap is measured. Compute times of one rank's layer (a third of
a layer of the model) are measured, and the link is *simulated*: its bandwidth is set so that communication takes a
given share of the plain step, 20% as in the paper, and other shares around it. Every count of tokens is a question.
Logits come from real processes over gloo and are compared with those of one process.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..distributed.simulation import Setting

PLAIN, FUSED, HALVES, PLANNED, FREE = "plain", "fused only", "woven halves", "woven, planned", "no communication"
SHARES = {"5%": 0.05, "20%": 0.2, "50%": 0.5, "80%": 0.8}
LONG = {
    "quick": (256, 320, 384, 448, 512, 576, 640, 768),
    "cpu": (1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 4096),
}
SHORT = (16, 24, 32, 48, 64, 96, 128, 192)
"""Counts of tokens, long and short steps."""
PROCESSES = {"quick": (), "cpu": (2, 3, 4)}
"""Numbers of real processes; each start imports everything anew, which a quick run leaves to the tests."""
WORLD, LATENCY = 3, 20e-6
WHY = "simulated link and measured compute times of a small layer on a CPU; the paper has eight H100 with NVLink"
WHY_SHORT = "cut without the minimum of 1,024 tokens, to see what it is for; " + WHY
WHY_EXACT = "float32 over gloo; the paper gives no number"


def metric(share: str) -> str:
    """A simulated step's time."""
    return f"ms a step, link takes {share} (simulated)"


BRIEF = "ms a short step, link takes 20% (simulated)"
EXACT = "difference of logits"


def run(context: Context) -> Arms:
    arms: Arms = {name: {} for name in (PLAIN, FUSED, HALVES, PLANNED, FREE)}
    for name, found in context.part("steps", lambda: steps(context)).items():
        arms[name].update(found)
    for world in PROCESSES[context.scale]:
        arms[HALVES].setdefault(EXACT, [])
        differing = context.part(f"{world} processes", partial(launched, world, context))
        values = arms[HALVES][EXACT]
        assert isinstance(values, list)
        values += differing
    return arms


def steps(context: Context) -> dict[str, dict[str, Any]]:
    """Simulated steps by arm, one value a count of tokens."""
    import torch

    from ..core.loading import load_config
    from ..distributed.base import Link
    from ..distributed.measurement import measure_layer
    from ..distributed.simulation import Setting, pays_from
    from ..distributed.splits import plan_split

    config, counts = load_config(context.model).get_text_config(), LONG[context.scale]
    points = sorted({8, *SHORT, *counts, *(count // 2 for count in counts)} if not context.quick else
                    {8, 32, 128, 256, 512, 768})  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = measure_layer(config, WORLD, points, 2 if context.quick else 5, report=context.report)
    finally:
        torch.set_num_threads(before)

    def setting(bandwidth: float, latency: float = LATENCY) -> Setting:
        return Setting(times, Link(latency, bandwidth), WORLD, config.hidden_size, 4, config.num_hidden_layers)

    arms: dict[str, dict[str, Any]] = {name: {} for name in (PLAIN, FUSED, HALVES, PLANNED, FREE)}
    middle = counts[len(counts) // 2]
    pays = {}

    def note(name: str, tokens: int, own: Setting, align: int) -> None:
        best = plan_split(tokens, cost=own.cost(tokens), minimum=2, align=align).first
        found = {
            PLAIN: own.plain(tokens),
            FUSED: own.fused(tokens),
            HALVES: own.woven(tokens, tokens // 2),
            PLANNED: own.woven(tokens, best),
            FREE: own.free(tokens),
        }
        for arm, timeline in found.items():
            arms[arm].setdefault(name, []).append(1e3 * timeline.seconds)

    for share, part in SHARES.items():
        own = setting(bandwidth_for(setting(float("inf")), middle, part))
        for tokens in counts:
            note(metric(share), tokens, own, 64 if context.quick else 256)
        pays[share] = pays_from(own, [*SHORT, *counts])
        if share == "20%":
            for tokens in SHORT:
                note(BRIEF, tokens, own, 8)
    context.artifacts["weaving pays from so many tokens"] = pays
    context.artifacts["measured times"] = {name: getattr(times, name) for name in vars(times)}
    return arms


def bandwidth_for(free: Setting, tokens: int, share: float) -> float:
    """Bytes a second with which communication takes a share of the plain step, latency included.

    Args:
        free: a setting with the link's latency and no limit to its bandwidth.
    """
    alone = free.free(tokens).seconds / free.layers
    size = (free.world - 1) / free.world * tokens * free.hidden * free.itemsize
    wanted = alone * share / (1 - share) / 4 - free.link.latency  # two all-reduces a layer, two collectives each
    return size / max(wanted, 1e-9)


def launched(world: int, context: Context) -> list[float]:
    """Differences of logits in real processes, one a case."""
    from ..distributed.processes import launch

    context.report(f"{world} processes", 0, 0)
    function = "everytoken.reproduce.tokenweave:differences"
    found: list[float] = launch(function, world, {"seed": context.seed}, 900)[0]
    return found


def differences(mesh: DeviceMesh, seed: int) -> list[float]:
    """What every rank runs: a random Llama of SmolLM2's shapes alone, and woven over the ranks, at several cuts.

    Three ranks divide its heads; two and four replicate attention.

    Returns:
        The largest difference of logits of each case, as a share of the largest logit.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..core.rng import derive_seed
    from ..distributed.token_weave import TokenWeave, weave

    torch.manual_seed(derive_seed(seed, "weights"))
    config = LlamaConfig(
        vocab_size=256, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, initializer_range=0.05, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    texts = [torch.randint(0, 256, (1, count)) for count in (65, 257)]
    found = []
    with torch.no_grad():
        wanted = [model(input_ids=ids).logits for ids in texts]
        woven = weave(model, mesh)
        for ids, logits in zip(texts, wanted, strict=True):
            count = ids.shape[1]
            for first in (1, count // 3, count // 2, count - 1):
                woven.settings = TokenWeave(first=first)
                ours = woven.model(input_ids=ids).logits
                found.append(float((ours - logits).abs().max() / logits.abs().max()))
    return found


def _claim(name: str, method: str, baseline: str, paper: str, why: str = WHY) -> Claim:
    return Claim(name, method, baseline, paper, higher_is_better=False, why=why)


REPRODUCTION = Reproduction(
    name="tokenweave",
    summary="simulated steps from measured compute times, and logits of real processes",
    run=run,
    claims=[
        _claim(metric("20%"), HALVES, PLAIN, "up to 1.28x faster"),
        _claim(metric("20%"), FUSED, PLAIN, "faster"),
        _claim(metric("20%"), HALVES, FUSED, "faster"),
        _claim(metric("20%"), HALVES, FREE, "sometimes faster"),
        _claim(metric("20%"), PLANNED, HALVES, "tuned by a profile"),
        _claim(metric("5%"), HALVES, PLAIN, "not given"),
        _claim(metric("50%"), HALVES, PLAIN, "not given"),
        _claim(metric("80%"), HALVES, PLAIN, "not given"),
        _claim(BRIEF, HALVES, FUSED, "pays from about 1,024 tokens", WHY_SHORT),
        Claim(EXACT, HALVES, "", "the same", kind="value", higher_is_better=False, threshold=1e-5, why=WHY_EXACT),
    ],
    scales=("quick", "cpu"),
)
