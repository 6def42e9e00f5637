"""Exact byte probabilities' claims: prompts cut inside a token are completed as if they were not, and models of two
vocabularies add up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .base import Arms, Claim, Context, Reproduction
from .stochastok import prose

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tokenization.byte_lm import ByteLM

NEXT = 4
"""Bytes to complete."""
WHY = (
    "The paper completes code (with a prefix and a suffix) with models of 7B and more; here a 135M model completes "
    "English technical prose cut at random places inside tokens, from the prefix alone."
)
WHY_ENSEMBLE = (
    "The paper ensembles models of 7B and more on tasks. Here the second model is a small one with a vocabulary of "
    "4,096 tokens of its own, trained on other parts of the same prose for a minute; weights 0.8 and 0.2; bits of "
    "held-out prose."
)
WHY_BITS = "The paper reports accuracy only. Bits of the true next bytes, given the text before the cut."


def cases(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[tuple[str, bytes]]:
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
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        inside = [
            a + 1 + int(rng.integers(0, b - a - 1))
            for a, b in encoded["offset_mapping"]
            if b - a >= 4 and 160 <= a < 290
        ]
        if inside:
            cut = inside[int(rng.integers(0, len(inside)))]
            found.append((piece[:cut], piece[cut : cut + NEXT].encode()))
    return found


def second_model(context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small model of the same prose with a vocabulary of its own."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from .beds.small_models import fit, small_model
    from .stochastok import bpe

    text = re.sub(r"\s+", " ", prose()[:-400_000])
    backend = bpe(text[:1_000_000].replace(". ", ".\n\n"), 1_024 if context.quick else 4_096)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    torch.manual_seed(context.seed)
    model = small_model(len(tokenizer), 128 if context.quick else 256)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rng = np.random.default_rng(context.seed)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            rows = torch.stack([ids[start : start + 127] for start in rng.integers(0, len(ids) - 127, 16).tolist()])
            rows = torch.cat([torch.full((16, 1), tokenizer.bos_token_id), rows], 1)
            yield rows, rows

    fit(model, batches(), 12 if context.quick else 160, 2e-3, context.report, "the second model")
    return model, tokenizer


def ensemble(context: Context, lm: ByteLM) -> Arms:
    """Bits a byte of held-out texts, one value a text: each model alone, and both."""
    from ..tokenization.byte_lm import ByteLM
    from ..tokenization.ensemble import ByteEnsemble

    other = ByteLM(*second_model(context))
    both = ByteEnsemble([lm, other], [0.8, 0.2])
    rng = np.random.default_rng(context.seed + 100)
    text = re.sub(r"\s+", " ", prose()[-400_000:])
    bits: dict[str, list[float]] = {"embedded model": [], "second model": [], "ensemble": []}
    count, size = (1, 40) if context.quick else (8, 100)
    for number in range(count):
        context.report("ensembles: texts", number + 1, count)
        data = text[(start := int(rng.integers(0, len(text) - 400))) : start + 60 + size].encode()
        for name, model in (("embedded model", lm), ("second model", other), ("ensemble", both)):
            bits[name].append((model.logprob(data[:60]) - model.logprob(data)) / math.log(2) / size)
    return {name: {"bits a byte of prose": values} for name, values in bits.items()}


def run(context: Context) -> Arms:
    import torch

    from ..core.loading import load_model, load_tokenizer
    from ..tokenization.byte_lm import ByteLM
    from ..tokenization.token_healing import TokenHealing

    tokenizer, model = load_tokenizer(context.model), load_model(context.model, packed=True)
    healing = TokenHealing(tokenizer)
    hits: dict[str, list[bool]] = {"own tokens": [], "token healing": [], "exact bytes": []}
    bits: dict[str, list[float]] = {"own tokens": [], "exact bytes": []}
    work = cases(tokenizer, 8 if context.quick else 30, context.seed)
    lm = ByteLM(model, tokenizer)
    forwards = 0
    for number, (prefix, wanted) in enumerate(work, 1):
        context.report("prompts", number, len(work))
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
    arms: Arms = {name: {f"next {NEXT} bytes right": [float(hit) for hit in found]} for name, found in hits.items()}
    for name, values in bits.items():
        arms[name]["bits a byte"] = values
    arms["exact bytes"]["forwards a byte"] = forwards / (len(work) * NEXT)
    return arms | context.part("ensemble", lambda: ensemble(context, lm))


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
        Claim(
            "bits a byte of prose",
            "ensemble",
            "embedded model",
            "better than each of its models",
            higher_is_better=False,
            why=WHY_ENSEMBLE,
        ),
        Claim(
            "bits a byte of prose",
            "ensemble",
            "second model",
            "better than each of its models",
            higher_is_better=False,
            why=WHY_ENSEMBLE,
        ),
    ],
    seeds=3,
)
