"""Exact byte probabilities' claim: prompts that end inside a token are completed as if they did not."""

from __future__ import annotations

import math
import re
import statistics

import numpy as np

from .base import Arms, Claim, Context, Reproduction
from .stochastok import prose

NEXT = 4
"""Bytes to complete."""
WHY = (
    "The paper completes code (with a prefix and a suffix) with models of 7B and more; here a 135M model completes English "
    "technical prose cut at random places inside tokens, from the prefix alone."
)
WHY_BITS = "The paper reports accuracy only. Bits of the true next bytes, given the text before the cut."


def cases(tokenizer: object, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Held-out texts cut inside a token: ``(prefix, the next bytes)``."""
    rng = np.random.default_rng(seed)
    text = re.sub(r"\s+", " ", prose()[-400_000:])
    found: list[tuple[str, bytes]] = []
    while len(found) < count:
        start = int(rng.integers(0, len(text) - 600))
        start = text.index(" ", start) + 1
        piece = text[start : start + 320]
        if not piece.isascii():
            continue
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)  # type: ignore[operator]
        inside = [
            a + 1 + int(rng.integers(0, b - a - 1))
            for a, b in encoded["offset_mapping"]
            if b - a >= 4 and 160 <= a < 290
        ]
        if inside:
            cut = inside[int(rng.integers(0, len(inside)))]
            found.append((piece[:cut], piece[cut : cut + NEXT].encode()))
    return found


def run(context: Context) -> Arms:
    import torch

    from ..core.loading import load_model, load_tokenizer
    from ..tokenization.exact_bytes import ByteLM, TokenHealing

    tokenizer, model = load_tokenizer(context.model), load_model(context.model, packed=True)
    healing = TokenHealing(tokenizer)
    hits: dict[str, list[bool]] = {"own tokens": [], "token healing": [], "exact bytes": []}
    bits: dict[str, list[float]] = {"own tokens": [], "exact bytes": []}
    work = cases(tokenizer, 8 if context.quick else 50, context.seed)
    lm = ByteLM(model, tokenizer)
    forwards = 0
    for number, (prefix, wanted) in enumerate(work, 1):
        context.progress(f"prompt {number} of {len(work)}")
        ids = [*lm.context, *tokenizer(prefix, add_special_tokens=False)["input_ids"]]
        naive = ByteLM(model, tokenizer, context=ids)
        hits["own tokens"].append(naive.generate("", NEXT) == wanted)
        bits["own tokens"].append(-naive.logprob(wanted) / math.log(2) / NEXT)
        healed = model.generate(
            torch.tensor([ids]), max_new_tokens=NEXT, do_sample=False, custom_generate=healing, pad_token_id=0
        )[0].tolist()
        text = healing.view.spell(healed[len(lm.context) :])
        hits["token healing"].append(text[len(prefix.encode()) :].startswith(wanted))
        before = lm.forwards
        new = lm.generate(prefix, NEXT, unit="byte")
        forwards += lm.forwards - before
        hits["exact bytes"].append(new == wanted)
        data = prefix.encode()
        bits["exact bytes"].append((lm.logprob(data) - lm.logprob(data + wanted)) / math.log(2) / NEXT)
    arms: Arms = {name: {f"next {NEXT} bytes right": statistics.mean(found)} for name, found in hits.items()}
    for name, values in bits.items():
        arms[name]["bits a byte"] = statistics.mean(values)
    arms["exact bytes"]["forwards a byte"] = forwards / (len(work) * NEXT)
    return arms


REPRODUCTION = Reproduction(
    name="exact-bytes",
    summary=f"the embedded model completes English cut inside a token: the next {NEXT} bytes, greedily, and their bits",
    run=run,
    claims=[
        Claim(f"next {NEXT} bytes right", "exact bytes", "own tokens", "+18% (FIM)", kind="difference", why=WHY),
        Claim(
            f"next {NEXT} bytes right",
            "exact bytes",
            "token healing",
            "above token healing",
            kind="difference",
            why=WHY,
        ),
        Claim("bits a byte", "exact bytes", "own tokens", "not reported", higher_is_better=False, why=WHY_BITS),
    ],
    seeds=2,
)
