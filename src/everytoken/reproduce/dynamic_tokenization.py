"""Dynamic tokenization's claims: shorter prompts in many languages at little loss, and generation over a vocabulary of
any size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.charts import lines_svg
from .base import Arms, Claim, Context, Reproduction, mean
from .beds.texts import declarations
from .files import Result

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tokenization.embedding import Embedder

MEASURED = (
    "German",
    "French",
    "Spanish",
    "Italian",
    "Polish",
    "Finnish",
    "Turkish",
    "Russian",
    "Greek",
    "Hindi",
    "Indonesian",
    "Vietnamese",
)
"""Languages that are measured, on the second half of their declaration."""
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the possible reduction."""
PREFIX, REST = 192, 96
"""Tokens to merge, and tokens after them whose bits are counted."""
LARGE = 70_000
"""New tokens of the large vocabulary, beside the model's own 49,152."""
WHY = (
    "The hypernetwork was trained here in half an hour on two cores, for a 135M English model; the paper uses "
    "hypernetworks trained at scale for XLM-R and Mistral-7B, and reports task accuracy. Bits of the text after a "
    "merged prefix, in twelve languages."
)
WHY_SHORTER = (
    "The model's English tokenizer cuts other languages finely, so more can be merged. Held-out halves of a "
    "declaration."
)
WHY_MEAN = "The paper's baseline is also the mean of the pieces (FVT)."
WHY_TIME = (
    "Merging and embedding are counted. 512-token prompts merged to whole pre-tokens, one a language, the two by "
    "turns, on a machine that other runs shared."
)
WHY_RECALL = (
    "The paper uses ScaNN; here an HNSW graph, fitted to hidden states of other texts. Top-1 on held-out English prose."
)


def halves(text: str) -> tuple[str, str]:
    """A text cut in the middle, at the end of a line."""
    place = text.index("\n", len(text) // 2)
    return text[:place], text[place + 1 :]


def windows(ids: Sequence[int], size: int, count: int) -> list[list[int]]:
    """``count`` windows, evenly spread, as far apart as the text allows."""
    last = len(ids) - size
    places = [round(last * number / max(1, count - 1)) for number in range(count)] if last > 0 else [0]
    return [list(ids[place : place + size]) for place in places]


def rest_bits(
    model: PreTrainedModel, embeds: torch.Tensor | None, mask: torch.Tensor, rest: Sequence[Sequence[int]]
) -> list[float]:
    """Bits of each row's rest after its merged prefix (right-padded ``embeds``)."""
    import torch

    assert embeds is not None, "a tokenizer with an embedder makes embeddings"
    bits = []
    for row, tokens in enumerate(rest):
        head = embeds[row][mask[row].bool()]
        tail = torch.tensor(list(tokens))
        inputs = torch.cat([head, model.get_input_embeddings()(tail[:-1])])[None]
        logits = model(inputs_embeds=inputs, logits_to_keep=len(tail)).logits[0].float()
        bits.append(-float(logits.log_softmax(-1).gather(1, tail[:, None]).sum()) / math.log(2))
    return bits


def sources() -> list[str]:
    """The standard library's source files, for a large vocabulary."""
    import sysconfig

    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")]
    skipped = ("site-packages", "test", "tests", "idlelib", "encodings")
    kept = [path for path in sorted(paths) if not set(path.parts) & set(skipped)]
    return [text for path in kept if (text := path.read_text(encoding="utf-8", errors="ignore"))]


def run(context: Context) -> Arms:
    from ..core.loading import load_model, load_tokenizer
    from ..tokenization.hyper import HyperEmbedding, MeanEmbedding

    tokenizer, model = load_tokenizer(context.model), load_model(context.model, dtype="float32", packed=True)
    embedders: dict[str, Embedder] = {
        "mean of pieces": MeanEmbedding(model),
        "hypernetwork": HyperEmbedding.from_pretrained("smollm2-135m").attach(model),
    }
    arms: Arms = {name: {} for name in ("no merging", *embedders)}
    found = context.part("merged prefixes", lambda: merged_prefixes(context, model, tokenizer, embedders))
    seconds = context.part("prefill times", lambda: prefill_times(context, model, tokenizer, embedders["hypernetwork"]))
    for name in arms:
        arms[name] |= found[name] | seconds.get(name, {})
    if not context.quick:
        hyper = embedders["hypernetwork"]
        arms |= context.part("large vocabulary", lambda: large_vocabulary(context, model, tokenizer, hyper))
    return arms


def merged_prefixes(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embedders: dict[str, Embedder]
) -> Arms:
    """Bits a byte of what follows merged prefixes, one value a window; and the positions left, one value a language."""
    import torch

    from ..tokenization.dynamic_tokenization import DynamicTokenizer

    languages = MEASURED[:3] if context.quick else MEASURED
    shares = SHARES[2::2] if context.quick else SHARES
    bits: dict[tuple[str, float], list[float]] = {}
    kept: dict[float, list[float]] = {share: [] for share in shares}
    with torch.inference_mode():
        for language in languages:
            context.report(language, 0, 0)
            ids = tokenizer(halves(declarations()[language])[1], add_special_tokens=False)["input_ids"]
            rows = windows(ids, PREFIX + REST, 2)
            prefixes, rest = [row[:-REST] for row in rows], [row[-REST:] for row in rows]
            sizes = [len(tokenizer.decode(tokens).encode()) for tokens in rest]
            whole = DynamicTokenizer(tokenizer, merges=0, embedder=embedders["mean of pieces"])(prefixes)
            plain = rest_bits(model, whole.inputs_embeds, whole.attention_mask, rest)
            bits.setdefault(("no merging", 0.0), []).extend(b / size for b, size in zip(plain, sizes, strict=True))
            for share in shares:
                for name, embedder in embedders.items():
                    batch = DynamicTokenizer(tokenizer, reduction=share, embedder=embedder)(prefixes)
                    found = rest_bits(model, batch.inputs_embeds, batch.attention_mask, rest)
                    bits.setdefault((name, share), []).extend(b / size for b, size in zip(found, sizes, strict=True))
                kept[share].append(1 - batch.reduction)
                if share == 1.0:
                    context.artifacts[f"{language}: positions left"] = round(1 - batch.reduction, 3)
    whole_bits = bits["no merging", 0.0]
    arms: Arms = {name: {} for name in ("no merging", *embedders)}
    arms["no merging"] |= {"bits a byte": whole_bits}
    curve = [{"share": 0.0, "positions": 1.0} | dict.fromkeys(embedders, mean(whole_bits))]
    for share in shares:
        curve.append({"share": share, "positions": mean(kept[share])})
        for name in embedders:
            curve[-1][name] = mean(bits[name, share])
            arms[name][f"bits a byte, {share:.0%} merged"] = bits[name, share]
        arms["no merging"][f"bits a byte, {share:.0%} merged"] = whole_bits
    arms["hypernetwork"]["positions"] = kept[shares[-1]]
    context.artifacts["curve"] = curve
    return arms


def prefill_times(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embedder: Embedder
) -> Arms:
    """Seconds for one prompt a language, by turns: medians of three."""
    import torch

    from ..tokenization.dynamic_prefill import DynamicPrefill
    from ..tokenization.dynamic_tokenization import DynamicTokenizer

    prefill = DynamicPrefill(DynamicTokenizer(tokenizer, reduction=1.0, embedder=embedder))
    seconds: dict[str, list[float]] = {"no merging": [], "hypernetwork": []}
    for language in MEASURED[:3] if context.quick else MEASURED:
        context.report(f"prefill times, {language}", 0, 0)
        ids = torch.tensor([tokenizer(declarations()[language], add_special_tokens=False)["input_ids"][:512]])
        times: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(4):
            for name, spent in times.items():
                began = time.perf_counter()
                custom = {} if name == "no merging" else {"custom_generate": prefill}
                model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, **custom)
                spent.append(time.perf_counter() - began)
        for name, spent in times.items():
            seconds[name].append(statistics.median(spent[1:]))  # the first warms up
    return {name: {"prefill seconds": times} for name, times in seconds.items()}


def large_vocabulary(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embedder: Embedder
) -> Arms:
    """Recall of the index over more than 100,000 tokens, and how many of the model's own tokens a step gives."""
    import torch

    from ..tokenization.dynamic_tokenization import DynamicTokenizer
    from ..tokenization.large_vocabulary import LargeVocabulary
    from .stochastok import prose

    context.report("a large vocabulary", 0, 0)
    corpus = [*sources(), prose(), *(halves(text)[0] for text in declarations().values())]
    tokens = DynamicTokenizer(tokenizer).vocabulary(corpus, LARGE)
    text = prose()
    sample = windows(tokenizer(text[:600_000], add_special_tokens=False)["input_ids"], 256, 8)
    context.report(f"an index over {len(tokens):,} new tokens", 0, 0)
    began = time.perf_counter()
    decoder = LargeVocabulary(tokens, embedder).build(model, sample)
    context.artifacts["tokens in the index"] = len(decoder)
    context.artifacts["seconds to build the index"] = round(time.perf_counter() - began, 1)
    held = windows(tokenizer(text[-60_000:], add_special_tokens=False)["input_ids"], 256, 4)
    with torch.inference_mode():
        hidden = torch.cat([model.base_model(torch.tensor([row])).last_hidden_state[0] for row in held])
    best, candidates = decoder.nearest(hidden, True)[0][:, :1], decoder.nearest(hidden)[0]
    hits = (best == candidates).any(-1).float()  # one a hidden state, as decoder.recall counts
    arms: Arms = {"exact search": {}, "HNSW": {"top-1 found": hits.tolist()}}
    for name, exact in (("exact search", True), ("HNSW", False)):
        began = time.perf_counter()
        for row in hidden[:200]:
            decoder.nearest(row[None], exact)
        arms[name]["milliseconds a lookup"] = (time.perf_counter() - began) / 200 * 1e3
    context.report("generating over it", 0, 0)
    steps, new, texts = 0, 0, []
    for row in held:
        out = model.generate(
            torch.tensor([row[:96]]), max_new_tokens=48, do_sample=False, pad_token_id=0, custom_generate=decoder
        )
        steps, new = steps + decoder.steps, new + out.shape[1] - 96
        texts.append(tokenizer.decode(out[0, 96:]))
    context.artifacts["generated over the large vocabulary"] = texts
    context.artifacts["own tokens a step"] = new / steps
    return arms


def curve_svg(result: Result) -> str:
    """Positions against bits a byte, an SVG of its own."""
    curve = result["artifacts"]["0"]["curve"]
    lines = {
        name: [[(1 - row["positions"], row[name]) for row in curve]] for name in ("mean of pieces", "hypernetwork")
    }
    return lines_svg(lines, "positions saved in the prefix", "bits a byte of the text after it", percent=True)


REPRODUCTION = Reproduction(
    name="dynamic-tokenization",
    summary=(
        "the embedded model reads prefixes in twelve languages with merged tokens; bits per byte of what follows, "
        "prefill time, and generation over more than 100,000 tokens"
    ),
    run=run,
    claims=[
        Claim(
            "positions",
            "hypernetwork",
            "",
            "over 20% fewer",
            kind="value",
            higher_is_better=False,
            threshold=0.8,
            why=WHY_SHORTER,
        ),
        *(
            Claim(
                f"bits a byte, {share} merged",
                "hypernetwork",
                "no merging",
                "under 2% loss",
                higher_is_better=False,
                threshold=1.02,
                why=WHY,
            )
            for share in ("50%", "100%")
        ),
        Claim(
            "bits a byte, 100% merged", "hypernetwork", "mean of pieces", "lower", higher_is_better=False, why=WHY_MEAN
        ),
        Claim(
            "prefill seconds", "hypernetwork", "no merging", "up to 40% shorter", higher_is_better=False, why=WHY_TIME
        ),
        Claim("top-1 found", "HNSW", "", "0.95 and more", kind="value", threshold=0.95, why=WHY_RECALL),
        Claim("milliseconds a lookup", "HNSW", "exact search", "faster", higher_is_better=False, why=WHY_RECALL),
    ],
    seeds=1,
    extra=("tokenizers", "usearch"),
)
