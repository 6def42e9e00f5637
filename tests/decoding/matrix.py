"""The matrix decoder x family: what each decoder does on a tiny model of each family, against plain ``generate``.

``python -m tests.decoding.matrix`` runs all of it, or the families named, and writes their rows of the documentation's
table; ``test_matrix.py`` compares.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.base import Decoder
from everytoken.generation.dyspec import DySpec
from everytoken.generation.qstar_beam import QStarBeam
from everytoken.generation.r2r import R2R
from everytoken.generation.skipdecode import LinearDepth, SkipDecode
from everytoken.generation.tokenselect import TokenSelect
from everytoken.testing.models import tiny_llama

from .families import EXCLUDED, VOCAB, all_families, build

TABLE = Path(__file__).parents[2] / "docs" / "assets" / "families.md"
PROMPT = torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
PADDED = torch.cat([torch.nn.functional.pad(PROMPT[:, :8], (4, 0)), PROMPT])
SAME, ABSENT = "same", "no plain text"
REASONS = {
    "a": (
        r"takes none|does not take .*past_key_values|state in its layers|cache_params|needs a cache that grows",
        "The method reads on from a cache of keys or states; the family keeps its state elsewhere, or none.",
    ),
    "b": (
        r"0 rotary embeddings",
        "A selection is given rotary positions of its own; the family has no rotary embedding, or none to ask.",
    ),
    "c": (
        r"does not know how|has another form|are handed rotary|cannot read the attention|does not go through|is told",
        "A selection is given rotary positions of its own; the family rotates, or attends, in a way that cannot be "
        "repeated at other positions.",
    ),
    "d": (
        r"does not keep its decoder layers|return more than hidden states",
        "Layers are skipped by handing hidden states past them; the family's layers exchange more than those.",
    ),
    "e": (
        r"starts from an empty cache|take the padding out|does not say how many",
        "Padding cannot be taken out of the family's cache, so a padded row's cache is not continued.",
    ),
}
"""Why a cell that plain ``generate`` serves may be refused: what the error says, and what in the method forbids it."""


class Turns:
    """A router that calls the large model for every third token."""

    threshold = 0.5

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.tensor([float(self.asked % 3 == 0)])


def nearly(model: PreTrainedModel) -> PreTrainedModel:
    """A draft of the model's own family that agrees with it for the most part."""
    draft = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * 0.02)
    return draft


def exact_decoders(model: PreTrainedModel) -> dict[str, list[Callable[[], Decoder]]]:
    """Decoders by name, in settings in which each has to write plain's text."""
    layers = model.config.get_text_config().num_hidden_layers
    selecting = functools.partial(TokenSelect, top_k=0, n_init=0, n_local=64)  # everything is selected
    return {
        "DySpec": [lambda: DySpec(tiny_llama(VOCAB, seed=9), budget=6), lambda: DySpec(nearly(model), budget=6)],
        "R2R": [lambda: R2R(copy.deepcopy(model), Turns())],
        "SkipDecode": [lambda: SkipDecode(LinearDepth(layers, layers, 1, 8))],
        "TokenSelect": [lambda: selecting(chunk_size=64), lambda: selecting(chunk_size=5)],
        "QStarBeam": [lambda: QStarBeam(1)],
    }


DECODERS = ("DySpec", "R2R", "SkipDecode", "TokenSelect", "QStarBeam")


def generate(model: PreTrainedModel, ids: torch.Tensor, new: int, decoder: Decoder | None = None, **given: Any) -> Any:
    """Greedily, with logits; token 0 is padding."""
    return model.generate(
        ids, attention_mask=(ids != 0).long() if "mask" not in given else given.pop("mask"), max_new_tokens=new,
        do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True, custom_generate=decoder,
        **given,
    )  # fmt: skip


def close(ours: Any, theirs: Any, row: int | slice = slice(None)) -> bool:
    """Whether two outputs have the same tokens and logits."""
    mine, other = torch.stack(ours.logits), torch.stack(theirs.logits)
    return (
        ours.sequences.shape == theirs.sequences.shape
        and ours.sequences[row].tolist() == theirs.sequences[row].tolist()
        and torch.allclose(mine[:, row], other[:, row], atol=2e-3)
    )


class Family:
    """A tiny model, and plain ``generate`` on it: one row, a padded batch, and a padded row's cache continued."""

    def __init__(self, name: str):
        self.model = build(name)
        self.model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)
        self.greedy = generate(self.model, PROMPT, 6)
        self.batch = generate(self.model, PADDED, 6)
        self.alone = generate(self.model, PADDED[:1, 4:], 6)
        self.first = generate(self.model, PADDED[:1], 3)
        self.mask = torch.cat([(PADDED[:1] != 0).long(), torch.ones(1, 3, dtype=torch.long)], 1)
        self.continued = None
        try:
            cache = copy.deepcopy(self.first.past_key_values)
            if cache is not None:
                again = copy.deepcopy(cache)
                once = generate(self.model, self.first.sequences, 3, mask=self.mask, past_key_values=cache)
                generate(self.model, PROMPT, 1)
                twice = generate(self.model, self.first.sequences, 3, mask=self.mask, past_key_values=again)
                self.continued = once if close(once, twice) else None  # some keep a state beside the cache
        except (ValueError, AttributeError, KeyError):  # plain generate cannot go on from it
            pass

    def check(self, make: Callable[[], Decoder]) -> None:
        """Asserts that a decoder writes plain's text wherever plain writes one."""
        assert close(generate(self.model, PROMPT, 6, make()), self.greedy), "one row"
        batch = generate(self.model, PADDED, 6, make())
        # some families write another text when padded: rows decoded one by one give the row's own
        own = torch.stack(batch.logits)[:, 0], torch.stack(self.alone.logits)[:, 0]
        assert close(batch, self.batch) or (close(batch, self.batch, 1) and torch.allclose(*own, atol=2e-3)), "padded"
        if self.continued is None:
            return
        decoder = make()
        if isinstance(decoder, TokenSelect):  # it continues caches of its own
            cache = decoder.new_cache(self.model)
            generate(self.model, PADDED[:1], 3, decoder, past_key_values=cache)
        else:
            cache = copy.deepcopy(self.first.past_key_values)
        output = generate(self.model, self.first.sequences, 3, decoder, mask=self.mask, past_key_values=cache)
        # some families lose count of positions when plain generate goes on; the row's own text is right as well
        own = torch.stack(output.logits)[:, 0], torch.stack(self.alone.logits)[3:, 0]
        assert close(output, self.continued) or torch.allclose(*own, atol=2e-3), "a cache continued"

    def cell(self, decoder: str) -> str:
        """``SAME``, or the letter of the reason for which the decoder refuses the family before any forward."""
        for make in exact_decoders(self.model)[decoder]:
            ran: list[int] = []
            hook = self.model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            try:
                self.check(make)
            except (UnsupportedModelError, BadInputError) as error:
                reason = next((letter for letter, (words, _) in REASONS.items() if re.search(words, str(error))), None)
                assert reason is not None, f"refused without a reason in the method's structure: {error}"
                assert reason == "e" or not ran, f"refused after a forward: {error}"
                return reason
            finally:
                hook.remove()
        return SAME


def rows(families: list[str]) -> dict[str, dict[str, str]]:
    """Cells by family and decoder; a fault is shown as it is."""
    table: dict[str, dict[str, str]] = {}
    for name in families:
        try:
            family = Family(name)
        except Exception as error:  # plain generate itself fails
            table[name] = dict.fromkeys(DECODERS, f"{ABSENT}: {type(error).__name__}")
            print(name, error, file=sys.stderr, flush=True)
            continue
        table[name] = {}
        for decoder in DECODERS:
            try:
                table[name][decoder] = family.cell(decoder)
            except Exception as error:
                table[name][decoder] = f"FAULT {type(error).__name__}"
                print(name, decoder, type(error).__name__, str(error)[:200], file=sys.stderr, flush=True)
        print(name, table[name], flush=True)
    return table


def written(table: dict[str, dict[str, str]]) -> str:
    """The documentation's table."""
    lines = [f"| family | {' | '.join(DECODERS)} |", f"| --- |{' --- |' * len(DECODERS)}"]
    lines += [f"| {name} | {' | '.join(cells[item] for item in DECODERS)} |" for name, cells in sorted(table.items())]
    counted = {item: sum(len(cells[item]) == 1 for cells in table.values()) for item in DECODERS}
    lines += [f"| **refused of {len(table)}** | {' | '.join(str(counted[item]) for item in DECODERS)} |", ""]
    lines += [f"- *{letter}*: {text}" for letter, (_, text) in REASONS.items()]
    untried = sorted(set(all_families()) - set(table))
    if untried:
        lines += ["", f"Built small, and not tried yet: {', '.join(untried)}."]
    lines += ["", "Not built small, and so not tried:", ""]
    reasons: dict[str, list[str]] = {}
    for name, reason in EXCLUDED.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"- {', '.join(sorted(names))}: {reason}." for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


def documented() -> dict[str, dict[str, str]]:
    """The cells of the documentation's table."""
    found = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(DECODERS) + 1 and cells[0] not in ("family", "---"):
            found[cells[0]] = dict(zip(DECODERS, cells[1:], strict=True))
    return {name: cells for name, cells in found.items() if not name.startswith("**")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or all_families()
    outcome = rows(chosen)
    known = documented() if TABLE.exists() else {}
    TABLE.write_text(written(known | outcome), encoding="utf-8")
