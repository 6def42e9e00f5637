"""The matrix decoder x family: what each decoder does on a tiny model of each family, against plain ``generate``.

``python -m tests.decoding.matrix`` runs the cells that the documentation's table does not have yet. Families and
decoders that are named run whether it has them or not (``all`` names every family). The table is written after each
family, so an interrupted run goes on where it stopped. ``test_matrix.py`` compares.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from everytoken.constraints.awrs import AWRS
from everytoken.constraints.engine.compiled import CompiledGrammar
from everytoken.constraints.logits_processor import letters
from everytoken.constraints.xgrammar import XGrammar
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
SAME, ABSENT, UNTRIED = "same", "no plain text", "not tried"
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
        r"does not know how|has another form|are handed rotary|cannot read the attention|is told",
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
    "f": (
        r"does not go through",
        "A selection takes the place of a layer's attention function; the family's layers have none to replace.",
    ),
    "h": (
        r"has no attention layers",
        "A selection is made for attention layers; the family has none.",
    ),
    "i": (
        r"run several times|in one layer",
        "A selection is made among the keys of one attention layer; the family's layers run several times, or keep a "
        "recurrent state together with their keys.",
    ),
    "g": (
        r"selects keys itself",
        "A selection is made among keys that a layer attends to in full; the family's layers select or merge keys "
        "themselves.",
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
        "XGrammar": [lambda: XGrammar(narrow())],
        "AWRS": [lambda: AWRS(narrow())],
    }


@functools.cache
def narrow() -> CompiledGrammar:
    """Forty letters from b to h: tokens 1 to 7."""
    return letters(VOCAB, "[b-h]{40}")


def masked(_row: int, _text: torch.Tensor) -> list[int]:
    """The same as a function of plain ``generate``'s."""
    return list(range(1, 8))


DECODERS = ("DySpec", "R2R", "SkipDecode", "TokenSelect", "QStarBeam", "XGrammar", "AWRS")
UNDER_MASK = ("XGrammar", "AWRS")
"""Decoders that are compared with masked plain text."""


def generate(model: PreTrainedModel, ids: torch.Tensor, new: int, decoder: Decoder | None = None, **given: Any) -> Any:
    """Greedily, with logits; token 0 is padding. What only samples takes the likeliest token that the mask allows."""
    if decoder is not None and decoder.samples_only:
        given |= {"do_sample": True, "top_k": 1, "prefix_allowed_tokens_fn": masked}
    return model.generate(
        ids, attention_mask=(ids != 0).long() if "mask" not in given else given.pop("mask"), max_new_tokens=new,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, custom_generate=decoder,
        **{"do_sample": False} | given,
    )  # fmt: skip


def close(ours: Any, theirs: Any, row: int | None = None) -> bool:
    """Whether two outputs have the same new tokens and logits; ``row`` of the one, if given, as the other's only row
    or its row of that number."""
    mine, other = torch.stack(ours.logits), torch.stack(theirs.logits)
    tokens, expected = (output.sequences[:, -len(output.logits) :] for output in (ours, theirs))
    if row is not None:
        place = row if other.shape[1] > 1 else 0
        mine, tokens, other, expected = mine[:, row], tokens[row], other[:, place], expected[place]
    elif ours.sequences.shape != theirs.sequences.shape:
        return False
    return torch.equal(tokens, expected) and torch.allclose(mine, other, atol=2e-3)


class Plain:
    """What plain ``generate`` writes: one row, a padded batch, and a padded row's cache continued.

    Args:
        given: further arguments of ``generate``.
    """

    def __init__(self, model: PreTrainedModel, **given: Any):
        self.greedy = generate(model, PROMPT, 6, **given)
        self.batch = generate(model, PADDED, 6, **given)
        self.alone = generate(model, PADDED[:1, 4:], 6, **given)
        self.first = generate(model, PADDED[:1], 3, **given)
        self.mask = torch.cat([(PADDED[:1] != 0).long(), torch.ones(1, 3, dtype=torch.long)], 1)
        self.continued = None
        try:
            cache = copy.deepcopy(self.first.past_key_values)
            if cache is not None:
                again = copy.deepcopy(cache)
                once = generate(model, self.first.sequences, 3, mask=self.mask, past_key_values=cache, **given)
                generate(model, PROMPT, 1)
                twice = generate(model, self.first.sequences, 3, mask=self.mask, past_key_values=again, **given)
                self.continued = once if close(once, twice) else None  # some keep a state beside the cache
        except (ValueError, AttributeError, KeyError):  # plain generate cannot go on from it
            pass


class Family:
    """A tiny model, and what plain ``generate`` writes with it, freely and under a mask."""

    def __init__(self, name: str):
        self.model = build(name)
        self.model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)
        self.refusals: dict[str, str] = {}

    @functools.cached_property
    def free(self) -> Plain:
        return Plain(self.model)

    @functools.cached_property
    def masked(self) -> Plain:
        return Plain(self.model, prefix_allowed_tokens_fn=masked)

    def check(self, make: Callable[[], Decoder], plain: Plain) -> None:
        """Asserts that a decoder writes plain's text wherever plain writes one."""
        assert close(generate(self.model, PROMPT, 6, make()), plain.greedy), "one row"
        batch = generate(self.model, PADDED, 6, make())
        # some families write another text when padded, or in a batch: rows decoded one by one give the row's own
        own = close(batch, plain.alone, 0) and close(batch, plain.greedy, 1)
        same = close(batch, plain.batch) or (close(batch, plain.batch, 1) and close(batch, plain.alone, 0))
        assert same or own, "padded"
        decoder = make()
        if plain.continued is None or not decoder.continues:
            return
        if isinstance(decoder, TokenSelect):  # it continues caches of its own
            cache = decoder.new_cache(self.model)
            generate(self.model, PADDED[:1], 3, decoder, past_key_values=cache)
        else:
            cache = copy.deepcopy(plain.first.past_key_values)
        output = generate(self.model, plain.first.sequences, 3, decoder, mask=plain.mask, past_key_values=cache)
        # some families lose count of positions when plain generate goes on; the row's own text is right as well
        own = torch.stack(output.logits)[:, 0], torch.stack(plain.alone.logits)[3:, 0]
        assert close(output, plain.continued) or torch.allclose(*own, atol=2e-3), "a cache continued"

    def cell(self, decoder: str) -> str:
        """``SAME``, or the letter of the reason for which the decoder refuses the family before any forward."""
        for make in exact_decoders(self.model)[decoder]:
            ran: list[int] = []
            hook = self.model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            try:
                self.check(make, self.masked if decoder in UNDER_MASK else self.free)
            except (UnsupportedModelError, BadInputError) as error:
                reason = next((letter for letter, (words, _) in REASONS.items() if re.search(words, str(error))), None)
                assert reason is not None, f"refused without a reason in the method's structure: {error}"
                assert reason == "e" or not ran, f"refused after a forward: {error}"
                self.refusals[decoder] = str(error)
                return reason
            finally:
                hook.remove()
        return SAME


def rows(families: list[str], decoders: Sequence[str] = DECODERS) -> dict[str, dict[str, str]]:
    """Cells by family and decoder; a fault is shown as it is."""
    table: dict[str, dict[str, str]] = {}
    for name in families:
        try:
            family = Family(name)
            assert family.masked if set(decoders) <= set(UNDER_MASK) else family.free
        except Exception as error:  # plain generate itself fails
            table[name] = dict.fromkeys(decoders, f"{ABSENT}: {type(error).__name__}")
            print(name, error, file=sys.stderr, flush=True)
            continue
        table[name] = {}
        for decoder in decoders:
            try:
                table[name][decoder] = family.cell(decoder)
            except Exception as error:
                table[name][decoder] = f"FAULT {type(error).__name__}"
                print(name, decoder, type(error).__name__, str(error)[:200], file=sys.stderr, flush=True)
        print(name, table[name], *family.refusals.items(), flush=True)
    return table


def written(table: dict[str, dict[str, str]]) -> str:
    """The documentation's table."""
    lines = [f"| family | {' | '.join(DECODERS)} |", f"| --- |{' --- |' * len(DECODERS)}"]
    lines += [
        f"| {name} | {' | '.join(cells.get(item, UNTRIED) for item in DECODERS)} |"
        for name, cells in sorted(table.items())
    ]
    counted = {item: sum(len(cells.get(item, UNTRIED)) == 1 for cells in table.values()) for item in DECODERS}
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
    """The cells of the documentation's table; none where there is no table yet."""
    if not TABLE.exists():
        return {}
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    found, names = {}, [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(names) + 1:
            found[cells[0]] = dict(zip(names, cells[1:], strict=True))
    return {name: cells for name, cells in found.items() if not name.startswith("**")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    named = set(sys.argv[1:])
    decoders = [item for item in DECODERS if item in named] or list(DECODERS)
    families = all_families() if named <= {"all", *DECODERS} else sorted(named - {"all", *DECODERS})
    for item in families:  # written after each: an interruption loses nothing
        known = documented()
        cells = known.get(item, {})
        chosen = decoders if named else [name for name in decoders if cells.get(name, UNTRIED) == UNTRIED]
        if chosen:
            cells = cells | rows([item], chosen)[item]
            TABLE.write_text(written(documented() | {item: cells}), encoding="utf-8")
