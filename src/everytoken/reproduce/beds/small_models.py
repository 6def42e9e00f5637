"""Small models trained on the spot, for experiments that need their own."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ...core.progress import Report

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Endless ``(ids [B, T], labels [B, T])``."""


def small_model(
    vocab: int, hidden: int = 128, layers: int = 3, heads: int = 4, end: int | None = 0, context: int = 512
) -> LlamaForCausalLM:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def fit(
    model: PreTrainedModel,
    batches: Batches,
    steps: int,
    lr: float,
    report: Report,
    label: str,
    enough: Callable[[], bool] | None = None,
    every: int = 20,
) -> int:
    """AdamW with warm-up and cosine decay over ``batches`` of ``(ids [B, T], labels [B, T])``; returns the steps taken.

    Args:
        enough: called every ``every`` steps, and training ends where it returns True.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=max(0.1, 2 / steps))
    model.train()
    for step in range(steps):
        ids, labels = (part.to(model.device) for part in next(batches))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            report(f"{label}, loss {loss.item():.3f}", step, steps)
        if enough is not None and step and step % every == 0:
            model.eval()
            if enough():
                return step + 1
            model.train()
    model.eval()
    return steps


def character_tokenizer(
    characters: str, end: str = "\n", pad: str = "_", words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters; ``pad`` must be one that texts do not use.

    Args:
        words: strings of several characters that are one token each.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {item: index for index, item in enumerate(dict.fromkeys([*end, *pad, *words, *characters]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    longest = sorted(words, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest), "[\\s\\S]"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        unk_token=pad,
        eos_token=end,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def reverse(number: int) -> str:
    """A number from its last digit, as sums are carried."""
    return str(number)[::-1]


def worked_sum(
    rng: random.Random, terms: int = 4, separators: Sequence[str] = (";",), digits: int = 2
) -> tuple[str, str]:
    """A sum of numbers of ``digits`` digits and its worked answer, ``32+54+...=`` and ``32+54=86;86+...#...``, numbers
    reversed.

    Args:
        separators: any of them may stand between two steps.
    """
    numbers = [rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(terms)]
    total, text = numbers[0], ""
    for number in numbers[1:]:
        if text:
            text += rng.choice(separators) if len(separators) > 1 else separators[0]
        text += f"{reverse(total)}+{reverse(number)}={reverse(total + number)}"
        total += number
    return "+".join(map(reverse, numbers)) + "=", f"{text}#{reverse(total)}\n"


def answer_batches(
    rng: random.Random,
    example: Callable[[random.Random], tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
) -> Batches:
    """Endless ``(ids, labels)`` of ``example(rng) -> (prompt, answer)``; the loss is on the answer, padding on the
    right.
    """
    while True:
        pairs = [example(rng) for _ in range(size)]
        rows = [[tokenizer(text)["input_ids"] for text in pair] for pair in pairs]
        width = max(len(a) + len(b) for a, b in rows)
        ids = torch.full((size, width), tokenizer.pad_token_id)
        labels = torch.full((size, width), -100)
        for index, (prompt, answer) in enumerate(rows):
            text = torch.tensor(prompt + answer)
            ids[index, : len(text)] = text
            labels[index, len(prompt) : len(text)] = text[len(prompt) :]
        yield ids, labels


def pruned_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_count: int = 1
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A byte-level BPE tokenizer of only the tokens which ``texts`` use ``min_count`` times, and the old id of each new
    one.

    With ``min_count`` 1 the texts encode as before: a merge that never fired in them can be left out. Rarer words, and
    any other text, are spelt with shorter tokens. Special tokens stay.
    """
    import json
    from collections import Counter

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab: dict[str, int] = spec["model"]["vocab"]
    names = {index: name for name, index in vocab.items()}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in spec["model"]["merges"]]
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in pairs:
        parts.setdefault(left + right, []).append((left, right))
    counts = Counter(token for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in ids)
    used = [token for token, count in counts.items() if count >= min_count]
    kept = {name for name in vocab if len(name) == 1} | {entry["content"] for entry in spec["added_tokens"]}
    waiting = [names[token] for token in used if token in names]
    while waiting:  # a token, and the tokens that it is merged from
        name = waiting.pop()
        if name not in kept or name in parts:
            fresh = [side for pair in parts.get(name, []) for side in pair if side not in kept]
            kept.update([name, *fresh])
            waiting += fresh
    order = sorted(kept & set(vocab), key=vocab.__getitem__)
    spec["model"]["vocab"] = {name: index for index, name in enumerate(order)}
    spec["model"]["merges"] = [list(pair) for pair in pairs if {*pair, pair[0] + pair[1]} <= kept]
    for entry in spec["added_tokens"]:
        entry["id"] = spec["model"]["vocab"][entry["content"]]
    spec["post_processor"] = None
    small = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token or tokenizer.eos_token,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    return small, [vocab[name] for name in order]
