"""TokenSelect's claims: attention over a long cache many times faster, and retrieval beyond the trained length."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from ..decoding.base import Decoder
    from ..generation.tokenselect import TokenSelect
    from ..generation.tokenselect.attention import LayerState, Turn

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
HEAD = "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it. "
WHY_ATTENTION = (
    "The paper measures Llama-3-8B on an A100 at up to 128k tokens against SDPA. Here a step of full attention is what "
    "transformers does "
    "on a CPU: append to the dynamic cache, which copies it, and read all keys and values; TokenSelect appends in "
    "place, reads "
    "a bfloat16 copy of the keys once, and attends to 2,688 tokens. Both alone on the same random cache."
)
WHY_KERNEL = (
    "The same without the caches' own work: torch's grouped-query SDPA against scoring, voting, gathering and "
    "attending."
)
WHY_END = (
    "A step of a 135M model is mostly linear layers and Python at 8k tokens and mostly attention at 64k; the paper's "
    "2.28x is a whole "
    "request, prefill included, on a GPU."
)
WHY_NEEDLE = (
    "The paper reports InfiniteBench, RULER and LongBench; here a five-digit pass key at three depths of a repetitive "
    "text, the answer begun "
    "for the model, which was trained on 8,192 tokens."
)


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: int) -> torch.Tensor:
    """A prompt of about ``length`` tokens with a pass key at a share ``depth`` of its noise: ``[1, T]``."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = ids("<|im_start|>user\n" + HEAD)
    needle = ids(f"The pass key is {key}. Remember it. {key} is the pass key. ")
    after = ids("What is the pass key? <|im_end|>\n<|im_start|>assistant\nThe pass key is ")
    noise = ids(NOISE)
    times = (length - len(before) - len(after) - len(needle)) // len(noise)
    first = int(times * depth)
    return torch.tensor([before + noise * first + needle + noise * (times - first) + after])


def finds(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, decoder: Decoder | None, prompt: torch.Tensor, key: int
) -> bool:
    """Whether a model answers with the pass key."""
    arguments = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(prompt))
    output = model.generate(prompt, custom_generate=decoder, **arguments)
    return tokenizer.decode(output[0, prompt.shape[1] :]).strip().startswith(str(key))


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run by turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def rotation_of(decoder: TokenSelect, model: PreTrainedModel) -> Turn:
    """How the first layer rotates queries and keys, as it is told while ``decoder`` has the model's attention."""
    with decoder.attention(model):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=decoder.new_cache(model), use_cache=True)
        state: LayerState = model.base_model.layers[0].self_attn._token_select
        return state.rotation


@torch.inference_mode()
def attention_times(model: PreTrainedModel, length: int, repeats: int) -> dict[str, float]:
    """Seconds of one layer's attention in a decoding step over ``length`` cached tokens, by arm."""
    from torch.nn import functional as F
    from transformers.cache_utils import DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from ..generation.tokenselect import TokenSelect, TokenSelectLayer, TokenSelectStats, token_select_attention
    from ..generation.tokenselect.attention import LayerState

    module = model.base_model.layers[0].self_attn
    config = model.config.get_text_config()
    heads, groups = config.num_key_value_heads, config.num_attention_heads
    cached = [torch.randn(1, heads, length, module.head_dim, dtype=model.dtype) for _ in range(2)]
    step = [torch.randn(1, heads, 1, module.head_dim, dtype=model.dtype) for _ in range(2)]
    query = torch.randn(1, groups, 1, module.head_dim, dtype=model.dtype)
    decoders = {"TokenSelect": TokenSelect(), "float32 scores": TokenSelect(), "reused": TokenSelect(tau=-1.1)}
    layers: dict[str, Any] = {name: TokenSelectLayer(torch.bfloat16) for name in decoders}
    layers |= {"full": DynamicLayer(), "float32 scores": TokenSelectLayer(None)}
    for layer in layers.values():
        layer.update(*cached)

    def full() -> None:
        keys, values = layers["full"].update(*step)
        sdpa_attention_forward(module, query, keys, values, None, scaling=module.scaling)
        layers["full"].crop(-1)

    def selected(name: str) -> Callable[[], None]:
        def run() -> None:
            layer = layers[name]
            keys, values = layer.update(*step)
            module._token_select = LayerState(decoders[name], TokenSelectStats(), rotation, layer, False)
            token_select_attention(module, query, keys, values, None, scaling=module.scaling)
            DynamicLayer.crop(layer, -1)  # without forgetting the selection

        return run

    rotation = rotation_of(decoders["TokenSelect"], model)
    with decoders["TokenSelect"].attention(model):
        return alternate(
            {
                "full": full,
                "kernel": lambda: F.scaled_dot_product_attention(query, cached[0], cached[1], enable_gqa=True),
                **{name: selected(name) for name in decoders},
            },
            repeats,
        )


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, prompt: torch.Tensor, steps: int) -> dict[str, float]:
    """Tokens a second behind ``prompt``, by arm; the caches are filled by one chunked prefill of TokenSelect."""
    from transformers import DynamicCache

    from ..generation.tokenselect import TokenSelect

    decoder = TokenSelect()
    cache = decoder.new_cache(model)
    decoder.generate(model, prompt, past_key_values=cache, max_new_tokens=1, do_sample=False)
    full = DynamicCache()
    rotation = rotation_of(decoder, model)
    for index, layer in enumerate(cache.layers):
        full.update(rotation(layer.keys, 0), layer.values.clone(), index)

    def run(past: Cache) -> float:
        token = prompt[:, -1:]
        began = time.perf_counter()
        for _ in range(steps):
            token = model(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return steps / (time.perf_counter() - began)

    speeds: dict[str, list[float]] = {"full attention": [], "TokenSelect": [], "TokenSelect, tau 0.9": []}
    reuse = TokenSelect(tau=0.9)
    for _ in range(3):
        speeds["full attention"].append(run(full))
        for name, mine in (("TokenSelect", decoder), ("TokenSelect, tau 0.9", reuse)):
            for layer in cache.layers:
                layer.forget()
            with mine.attention(model):
                speeds[name].append(run(cache))
    return {name: statistics.median(values) for name, values in speeds.items()} | {
        "selections reused": reuse.stats.accepted / max(reuse.stats.proposed, 1)
    }


def run(context: Context) -> Arms:
    from ..core.loading import load_tokenizer
    from ..generation.tokenselect import TokenSelect

    tokenizer = load_tokenizer(context.model)
    model = context.load_model()
    lengths = [3000] if context.quick else [8000, 16000, 32000, 64000]
    arms: Arms = {"full attention": {}, "TokenSelect": {}, "TokenSelect, tau 0.9": {}}
    exact: dict[str, dict[str, float]] = {}
    for length in lengths:
        label = f"{length // 1000}k"
        context.report(f"attention over {label} cached tokens", 0, 0)
        spent = attention_times(model, length, 5 if context.quick else 9)
        arms["full attention"] |= {
            f"attention step at {label}, ms": 1e3 * spent["full"],
            f"attention kernel at {label}, ms": 1e3 * spent["kernel"],
        }
        arms["TokenSelect"] |= {
            f"attention step at {label}, ms": 1e3 * spent["TokenSelect"],
            f"attention kernel at {label}, ms": 1e3 * spent["TokenSelect"],
        }
        exact[label] = {name: 1e3 * spent[name] for name in ("float32 scores", "reused")}
    context.artifacts["other attention steps, ms"] = exact
    chance = random.Random(context.seed)
    reused, found = {}, {}
    for length in lengths:
        label = f"{length // 1000}k"
        depths = (0.5,) if context.quick else (0.15, 0.5, 0.85) if length <= 16000 else (0.3, 0.7)
        hits: dict[str, list[bool]] = {"full attention": [], "TokenSelect": []}
        for depth in depths:
            key = chance.randint(10000, 99999)
            prompt = passkey_prompt(tokenizer, length, depth, key)
            context.report(f"pass key at {depth:.0%} of {label}", 0, 0)
            hits["TokenSelect"].append(finds(tokenizer, model, TokenSelect(), prompt, key))
            if length <= 16000:  # full attention reads 32k tokens in a quarter of an hour
                hits["full attention"].append(finds(tokenizer, model, None, prompt, key))
        for name, values in hits.items():
            if values:
                arms[name][f"pass keys found at {label}"] = [float(value) for value in values]
        found[label] = {name: f"{sum(values)} of {len(values)}" for name, values in hits.items()}
        context.report(f"decoding behind {label} tokens", 0, 0)
        speeds = decode_speed(model, prompt, 6 if context.quick else 12)
        reused[label] = speeds.pop("selections reused")
        for name, value in speeds.items():
            arms[name][f"tokens per second behind {label}"] = value
    context.artifacts |= {"selections reused with tau 0.9": reused, "pass keys found": found}
    return arms


LABELS = ("8k", "16k", "32k", "64k")
REPRODUCTION = Reproduction(
    name="tokenselect",
    takes_weights=True,
    summary=(
        "attention of a decoding step, decoding speed and a pass key at 8k to 64k tokens, full attention against "
        "TokenSelect"
    ),
    run=run,
    claims=[
        Claim(
            "attention step at 64k, ms",
            "TokenSelect",
            "full attention",
            "1/23.84 at most",
            higher_is_better=False,
            why=WHY_ATTENTION,
        ),
        Claim(
            "attention kernel at 64k, ms",
            "TokenSelect",
            "full attention",
            "1/23.84 at most",
            higher_is_better=False,
            why=WHY_KERNEL,
        ),
        *(
            Claim(
                f"attention step at {label}, ms", "TokenSelect", "full attention", "none given", higher_is_better=False
            )
            for label in LABELS[:3]
        ),
        *(
            Claim(
                f"tokens per second behind {label}",
                "TokenSelect",
                "full attention",
                "2.28x at most, end to end",
                why=WHY_END if label == "8k" else "",
            )
            for label in LABELS
        ),
        Claim(
            "tokens per second behind 64k",
            "TokenSelect, tau 0.9",
            "full attention",
            "none given",
            why="Selections reused while queries stay alike.",
        ),
        Claim("pass keys found at 8k", "TokenSelect", "full attention", "as good", kind="difference", why=WHY_NEEDLE),
        Claim(
            "pass keys found at 16k",
            "TokenSelect",
            "full attention",
            "better",
            kind="difference",
            why="Twice the trained length: full attention has never seen such positions.",
        ),
    ],
    seeds=1,
)
