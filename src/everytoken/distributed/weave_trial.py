"""What ``everytoken try`` and ``compare`` run for steps on several devices: woven and plain timelines of one rank.

Compute times are measured on this machine, with a layer of the model's shapes cut over ranks. The link is simulated.
Beside that, every method runs a forward of a small random model, and its logits are compared with the model's own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError
from ..decoding.trial import TrialRequest, TrialResult
from .base import Link, Timeline
from .measurement import measure_layer
from .sharding import divides_heads
from .simulation import Setting
from .timeline_picture import timeline_picture, timeline_trace
from .token_weave import TokenWeave

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOKENS, SHOWN, CHECKED = 1536, 2, 65
"""Tokens of the step, layers that are drawn, tokens of the checked forward."""
LATENCY = 50e-6
LINKS = {"1 Gbit/s": 0.125e9, "0.1 Gbit/s": 0.0125e9, "10 Gbit/s": 1.25e9}
"""Simulated links, bytes a second; the first is the headline's."""
PLAIN = "plain"


def trace_columns(_trial: Any) -> tuple[str, ...]:
    """The columns of the traces."""
    return ("what", "layer", "ms")


def metric(link: str) -> str:
    """A simulated step's column."""
    return f"ms a step, {link} (simulated)"


def ranks_for(config: PreTrainedConfig) -> int:
    """The least number of ranks from 2 to 8 that divides heads and MLP, or else the MLP alone.

    Raises:
        BadInputError: none does.
    """
    able = [world for world in range(2, 9) if config.intermediate_size % world == 0]
    if not able:
        raise BadInputError(f"2 to 8 ranks do not divide an MLP of {config.intermediate_size}.")
    return next((world for world in able if divides_heads(config, world)), able[0])


def trial(request: TrialRequest) -> TrialResult:
    """Simulates a step of 1,536 tokens plainly and as each method runs it; see ``decoding.trial``.

    Raises:
        BadInputError: a prompt or data, which are not read, or settings that do not fit the step.
    """
    if request.prompt is not None or request.data is not None:
        raise BadInputError("Timelines read no --prompt and no --data.", "Give a model's shapes: --model")
    import torch

    from ..core.loading import load_config

    config = load_config(request.model).get_text_config()
    world, seed = ranks_for(config), int(request.options.get("seed", 0))
    items: list[tuple[str, TokenWeave]] = [(PLAIN, TokenWeave("plain")), ("fused", TokenWeave("fused"))]
    items += [(item.name, item.factory(**item.settings)) for item in request.trials]
    splits = {name: settings.plan(TOKENS, world) for name, settings in items}
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a rank has its processor to itself
    try:
        counts = sorted({TOKENS // 8, TOKENS // 4, TOKENS // 2, TOKENS})
        times = measure_layer(config, world, counts, report=request.report)
    finally:
        torch.set_num_threads(before)
    result = TrialResult({name: {} for name, _ in items}, metric(next(iter(LINKS))), column="what")
    drawn: dict[str, Timeline] = {}
    for link, bandwidth in LINKS.items():
        whole = _setting(times, bandwidth, world, config, config.num_hidden_layers)
        shown = _setting(times, bandwidth, world, config, SHOWN)
        for name, settings in items:
            first = splits[name].first
            result.rows[name][metric(link)] = 1e3 * _run(whole, settings, first).seconds
            if not drawn or link == next(iter(LINKS)):
                drawn[name] = _run(shown, settings, first)
    for name, settings in items:
        request.report(f"a forward of {name}", 0, 0)
        result.rows[name]["tokens of part 1"] = float(splits[name].first)
        result.rows[name]["difference of logits"] = _difference(config, settings, seed)
    longest = max(timeline.seconds for timeline in drawn.values())
    what = f"{SHOWN} layers of {TOKENS} tokens, one rank of {world}, {next(iter(LINKS))}"
    for name, timeline in drawn.items():
        title = f"{name}: {1e3 * timeline.seconds:.0f} ms for {what}, simulated link"
        result.traces.append(timeline_trace(title, timeline, longest))
    result.pictures.append(timeline_picture(drawn, f"{what}, simulated link"))
    result.notes.append("Compute times are measured on this machine; links are simulated, and nothing was sent.")
    result.notes.append("Logits are those of one process, as a share of the largest.")
    return result


def _setting(times: Any, bandwidth: float, world: int, config: PreTrainedConfig, layers: int) -> Setting:
    cut = divides_heads(config, world)
    return Setting(times, Link(LATENCY, bandwidth), world, config.hidden_size, 4, layers, cut)


def _run(setting: Setting, settings: TokenWeave, first: int) -> Timeline:
    if settings.schedule == "plain":
        return setting.plain(TOKENS)
    return setting.woven(TOKENS, first) if first < TOKENS else setting.fused(TOKENS)


def random_model(config: PreTrainedConfig, layers: int, vocabulary: int, seed: int) -> PreTrainedModel:
    """A random model of a configuration's shapes with fewer layers and tokens."""
    from transformers import AutoModelForCausalLM

    from ..core.rng import seed_everything

    seed_everything(seed)
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = layers, vocabulary, None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small).float().eval()
    return model


def _difference(config: PreTrainedConfig, settings: TokenWeave, seed: int) -> float:
    """Largest difference of logits between a forward of the model's own and one that is run so, cut at a third."""
    import torch

    model = random_model(config, 2, 512, seed)
    ids = torch.randint(0, 512, (1, CHECKED), generator=torch.Generator().manual_seed(seed))
    first = CHECKED // 3 if settings.schedule == "woven" else None
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        woven = TokenWeave(settings.schedule, first=first).weave(model)
        found = woven.model(input_ids=ids).logits
    return float((found - wanted).abs().max() / wanted.abs().max())
