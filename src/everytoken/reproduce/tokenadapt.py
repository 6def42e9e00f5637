"""TokenAdapt's claim: after a change of tokenizer, perplexity is far lower than with other ways to make the new
embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tokenization.base import bits_a_byte
from .base import Arms, Claim, Context, Reproduction
from .stochastok import prose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Vectors = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
TARGETS = ("mistral", "tekken")
ARMS: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random"},
    "mean": {"strategy": "mean"},
    "ReTok": {"strategy": "retok"},
    "TokenAdapt, local only": {"global_weight": 0.0},
    "TokenAdapt": {},
}
WHY = (
    "A 135M model with tied embeddings, and a MiniLM sentence embedder in place of a larger one; the paper's models "
    "are up to 8B. "
    "Mistral's SentencePiece and Tekken tokenizers, English technical prose."
)
WHY_TUNED = (
    "The paper reports zero-shot figures. 24 steps of AdamW on the tied embeddings alone, 512 tokens each; at 1e-3 "
    "every arm had become "
    "worse than it was zero-shot, so the step here is 1e-4."
)
WHY_SUPER = (
    "The paper gives no figure to compare with, nor its distribution of chunk sizes (here 0.4, 0.3, 0.2 and 0.1 for "
    "one to four words). "
    "8,192 tokens each, trained on 2 MB of English technical prose, measured on held-out prose."
)


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, steps: int, length: int, seed: int
) -> None:
    """Trains the embeddings alone, on four random pieces of a text at a step."""
    import torch

    for weight in model.parameters():
        weight.requires_grad_(False)
    matrix = model.get_input_embeddings().weight.requires_grad_(True)
    optimiser = torch.optim.AdamW([matrix], lr=1e-4, weight_decay=0.0)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(ids) - length - 1, 4)
        rows = torch.stack([ids[s : s + length] for s in starts.tolist()])
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_([matrix], 1.0)
        optimiser.step()
        optimiser.zero_grad()
    matrix.requires_grad_(False)


def remembering() -> Callable[[Sequence[str]], Vectors]:
    """The packaged embedder, asked once for every text."""
    from ..core.embedding import embed

    known: dict[str, Vectors] = {}

    def embedder(texts: Sequence[str]) -> Vectors:
        fresh = [text for text in dict.fromkeys(texts) if text not in known]
        if fresh:
            known.update(zip(fresh, embed(fresh, "TokenAdapt"), strict=True))
        return np.stack([known[text] for text in texts])

    return embedder


def by_letters(texts: Sequence[str]) -> Vectors:
    """Counts of neighbouring letters, by hash, for quick runs: embedding a vocabulary takes minutes."""
    vectors = np.zeros((len(texts), 256), np.float32)
    for row, text in enumerate(texts):
        padded = f" {text} "
        for one, two in pairwise(padded):
            vectors[row, (ord(one) * 31 + ord(two)) % 256] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def run(context: Context) -> Arms:
    from ..core.loading import load_model, load_tokenizer
    from ..tokenization.foreign_tokenizers import load_any_tokenizer
    from ..tokenization.tokenadapt import TokenAdapt

    old, model = load_tokenizer(context.model), load_model(context.model, dtype="float32")
    text = re.sub(r"[ \t]+", " ", prose())
    held_out, training = text[-60_000:], text[:2_000_000]
    held_out = held_out[: 1_500 if context.quick else 12_000]
    compared = {name: ARMS[name] for name in ARMS if not (context.quick and name == "random")}  # no claim is about it
    arms: Arms = {name: {} for name in ("original", *compared)}
    context.report("the original", 0, 0)
    arms["original"]["bits a byte"] = bits_a_byte(model, old, held_out)
    embedder = by_letters if context.quick else remembering()
    for target in TARGETS[:1] if context.quick else TARGETS:
        tokenizer = load_any_tokenizer(target)
        for name, settings in compared.items():
            context.report(f"{target}: {name}", 0, 0)
            method = TokenAdapt(embedder=embedder, seed=context.seed, **settings)
            fresh = method.transplant(model, old, tokenizer)
            bits = bits_a_byte(fresh, tokenizer, held_out)
            arms[name][f"{target}: perplexity a byte"] = 2.0**bits
            if target == TARGETS[0] and name in ("mean", "ReTok", "TokenAdapt"):
                curve = []
                for _ in range(1 if context.quick else 3):
                    steps, length = (2, 32) if context.quick else (8, 128)
                    tune(
                        fresh, tokenizer, training[:100_000] if context.quick else training, steps, length, context.seed
                    )
                    curve.append(2.0 ** bits_a_byte(fresh, tokenizer, held_out))
                context.artifacts[f"{name}: perplexity a byte while tuning"] = curve
                arms[name][f"{target}, tuned: perplexity a byte"] = curve[-1]
    return arms | supertokens(context, training, held_out)


def supertokens(context: Context, training: str, held_out: str) -> Arms:
    """Bytes per token of a vocabulary that spans words, and of plain BPE."""
    from ..tokenization.supertokens import SupertokenTrainer
    from .stochastok import bpe

    context.report("supertokens", 0, 0)
    size = 2_048 if context.quick else 8_192
    supers = SupertokenTrainer(size, seed=context.seed).train(training.split("\n\n"))
    plain = bpe(training, size)
    counts = {"supertokens": len(supers(held_out)["input_ids"]), "BPE": len(plain.encode(held_out).ids)}
    return {name: {"bytes a token": len(held_out.encode()) / count} for name, count in counts.items()}


def _claim(metric: str, method: str, baseline: str, paper: str, why: str = WHY) -> Claim:
    return Claim(metric, method, baseline, paper, higher_is_better=False, why=why)


REPRODUCTION = Reproduction(
    name="tokenadapt",
    summary=(
        "the embedded model under Mistral's tokenizers: zero-shot perplexity per byte of held-out prose, then after a "
        "little "
        "tuning; and supertokens against BPE"
    ),
    run=run,
    claims=[
        _claim("mistral: perplexity a byte", "TokenAdapt", "ReTok", "lower; at least 2x better in aggregate"),
        _claim("tekken: perplexity a byte", "TokenAdapt", "ReTok", "lower; at least 2x better in aggregate"),
        _claim("mistral: perplexity a byte", "TokenAdapt", "TokenAdapt, local only", "lower"),
        _claim("mistral: perplexity a byte", "TokenAdapt", "mean", "lower"),
        _claim("mistral, tuned: perplexity a byte", "TokenAdapt", "ReTok", "not reported", WHY_TUNED),
        Claim("bytes a token", "supertokens", "BPE", "notably better compression", why=WHY_SUPER),
    ],
    seeds=1,
    extra=("tokenizers", "mistral_common"),
)
