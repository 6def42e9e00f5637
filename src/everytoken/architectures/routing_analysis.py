"""What the routers of a mixture of experts have learned, for any such model of transformers, as it is.

Four questions are answered from counts alone, so that millions of tokens take little memory:

- *specialisation*: how much of the choice of an expert a token's id, its position or its domain explains,
  ``I(v; e) / H(e)``, beside the same for shuffled pairs;
- *early learning*: on how many token ids the favourite expert of a checkpoint is that of the last one;
- *drops*: which share of the choices a capacity limit left unserved, by position and by domain;
- *balance*: the balance loss and the share of tokens of every expert, by layer and over all layers together.

OpenMoE (arXiv 2402.01739) asked the first three. RMoE (arXiv 2408.06793) asked how much neighbouring layers know of
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.errors import BadInputError, UnknownNameError
from ..core.progress import Report, silent
from ..core.rng import numpy_generator
from .routing import RouterRecord, expert_shares, record_routing
from .routing_counts import PairCounts, entropy, mutual_information

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VARIABLES = ("token", "position", "domain")
TextLike = str | Sequence[int]


@dataclass
class LayerCounts:
    """What is counted of one router; ``E`` experts, ``P`` bins of positions.

    Attributes:
        name: of the router in the model.
        first, chosen: pairs (token id, expert), of the first choice and of all choices.
        position, domain: pairs with the first choice.
        asked, dropped: ``[P]``, choices and those without service.
        domain_asked, domain_dropped: the same by domain.
        picked, probability: ``[E]``, tokens that chose an expert, and summed probabilities.
        tokens: how many were counted.
        joint: ``[E of the router before, E]``, first choices of both; None for the first router.
    """

    name: str
    first: PairCounts
    chosen: PairCounts
    position: PairCounts
    domain: PairCounts
    asked: np.ndarray
    dropped: np.ndarray
    domain_asked: np.ndarray
    domain_dropped: np.ndarray
    picked: np.ndarray
    probability: np.ndarray
    tokens: float = 0.0
    joint: np.ndarray | None = None


@dataclass(frozen=True)
class Explained:
    """How much of a router's choice something explains.

    Attributes:
        layer: the router's name.
        share: ``I / H``, from 0 to 1.
        shuffled: the same for shuffled pairs; what small counts alone would show.
    """

    layer: str
    share: float
    shuffled: float

    @property
    def corrected(self) -> float:
        """The share above that of shuffled pairs, on a scale where those have 0."""
        return (self.share - self.shuffled) / (1 - self.shuffled) if self.shuffled < 1 else 0.0


class RoutingAnalysis:
    """Counts of the choices of all routers of a model over texts.

    Args:
        bins: of positions.
        length: positions that the bins divide; those behind count to the last bin.
        domains: names of the domains, if tokens have one.

    Raises:
        BadInputError: no bins, or fewer positions than bins.
    """

    def __init__(self, bins: int = 16, length: int = 512, domains: Sequence[str] = ()):
        if not 1 <= bins <= length:
            raise BadInputError(f"There are 1 to {length} bins of {length} positions; got {bins}.")
        self.bins, self.length, self.domains = bins, length, list(domains)
        self.layers: list[LayerCounts] = []

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        texts: Sequence[TextLike],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        domains: Sequence[str | Sequence[str]] | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        bins: int = 16,
        report: Report = silent,
    ) -> RoutingAnalysis:
        """Runs a model over texts and counts what its routers choose. The model is left as it was.

        Args:
            model: any mixture of experts of transformers whose class says where its routers are.
            texts: as text, or as token ids.
            tokenizer: needed for text.
            domains: a label for each text, or for each token of each text (the turn of a dialogue, for example).
            batch_size: rows a forward. It changes the result of models with a capacity limit, as in their training.
            max_length: what is behind it is cut off.
            bins: of positions up to ``max_length``.
            report: called with the number of texts done.

        Raises:
            BadInputError: no texts, an empty one, text without a tokenizer, or labels that do not fit.
            UnsupportedModelError: the model has no routers.
        """
        rows = _as_ids(texts, tokenizer, max_length)
        labels, names = _as_labels(domains, rows)
        if batch_size < 1:
            raise BadInputError(f"A batch has at least one row; got {batch_size}.")
        made = cls(min(bins, max_length), max_length, names)
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            with torch.no_grad(), record_routing(model) as records:
                for start in range(0, len(rows), batch_size):
                    part = rows[start : start + batch_size]
                    width = max(map(len, part))
                    ids = torch.zeros(len(part), width, dtype=torch.long)
                    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
                    for place, row in enumerate(part):
                        ids[place, : len(row)] = torch.tensor(row)
                        mask[place, : len(row)] = 1
                        if labels is not None:
                            kinds[place, : len(row)] = torch.tensor(labels[start + place])
                    records.clear()
                    # the backbone alone: logits of the vocabulary are not looked at
                    model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                    made.add(records, ids, mask, kinds if labels is not None else None)
                    report("texts", start + len(part), len(rows))
        finally:
            model.train(training)
        return made

    def add(
        self,
        records: Sequence[RouterRecord],
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        domains: torch.Tensor | None = None,
    ) -> None:
        """Counts one forward.

        Args:
            records: one a router, as ``record_routing`` gives them.
            ids: ``[B, S]`` token ids.
            mask: ``[B, S]``, 1 for tokens and 0 for padding on either side.
            domains: ``[B, S]``, places in ``self.domains``.

        Raises:
            BadInputError: records of another forward or of another model.
        """
        if not records:
            raise BadInputError("There are no records of this forward.", "Run the model inside record_routing.")
        if any(len(record.indices) != ids.numel() for record in records):
            raise BadInputError(
                f"The routers saw {len(records[0].indices)} tokens, and there are {ids.numel()} ids.",
                "Record one forward at a time, without a cache.",
            )
        if not self.layers:
            self.layers = [self._empty(record) for record in records]
            for above, layer in pairwise(self.layers):
                layer.joint = np.zeros((len(above.picked), len(layer.picked)), np.int64)
        if [layer.name for layer in self.layers] != [record.layer for record in records]:
            raise BadInputError("These records are of another model, or of several forwards.", "Analyse one at a time.")
        real = torch.ones_like(ids) if mask is None else mask
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        bins = (positions * self.bins // self.length).clamp(max=self.bins - 1)
        keep = real.reshape(-1).bool().cpu()
        tokens, places = _numpy(ids, keep), _numpy(bins, keep)
        kinds = None if domains is None else _numpy(domains, keep)
        before: np.ndarray | None = None
        for layer, record in zip(self.layers, records, strict=True):
            before = self._count(layer, record, keep, tokens, places, kinds, before)

    def _empty(self, record: RouterRecord) -> LayerCounts:
        experts, domains = record.num_experts, max(len(self.domains), 1)
        return LayerCounts(
            record.layer,
            first=PairCounts(experts),
            chosen=PairCounts(experts),
            position=PairCounts(experts),
            domain=PairCounts(experts),
            asked=np.zeros(self.bins, np.int64),
            dropped=np.zeros(self.bins, np.int64),
            domain_asked=np.zeros(domains, np.int64),
            domain_dropped=np.zeros(domains, np.int64),
            picked=np.zeros(experts),
            probability=np.zeros(experts),
        )

    def _count(
        self,
        layer: LayerCounts,
        record: RouterRecord,
        keep: torch.Tensor,
        tokens: np.ndarray,
        places: np.ndarray,
        kinds: np.ndarray | None,
        before: np.ndarray | None,
    ) -> np.ndarray:
        """Adds a record to a layer's counts; returns the first choices."""
        chosen = record.indices.detach().cpu()[keep].numpy()
        first = record.first().detach().cpu()[keep].numpy()
        lost = (~record.kept).detach().cpu()[keep].numpy()
        slots = chosen.shape[1]
        layer.first.add(tokens, first)
        layer.chosen.add(np.repeat(tokens, slots), chosen.ravel())
        layer.position.add(places, first)
        layer.asked += np.bincount(places, minlength=self.bins) * slots
        layer.dropped += np.bincount(places, lost.sum(1), self.bins).astype(np.int64)
        if kinds is not None:
            layer.domain.add(kinds, first)
            layer.domain_asked += np.bincount(kinds, minlength=len(self.domains)) * slots
            layer.domain_dropped += np.bincount(kinds, lost.sum(1), len(self.domains)).astype(np.int64)
        _, probabilities, count = expert_shares(record.logits.detach(), slots, keep.to(record.logits.device))
        layer.picked += np.bincount(chosen.ravel(), minlength=record.num_experts)
        layer.probability += probabilities.cpu().double().numpy()
        layer.tokens += float(count)
        if before is not None and layer.joint is not None:
            pairs = np.bincount(before * record.num_experts + first, minlength=layer.joint.size)
            layer.joint += pairs.reshape(layer.joint.shape)
        return first

    # -- questions -----------------------------------------------------------------------------------------------------
    def specialisation(self, by: str = "token", choice: str = "first", seed: int = 0) -> list[Explained]:
        """How much of each router's choice the token's id, position or domain explains.

        Args:
            by: ``"token"``, ``"position"`` (its bin) or ``"domain"``.
            choice: ``"first"``, or ``"all"`` choices of a token (only by token).
            seed: of the shuffle.

        Raises:
            UnknownNameError: another variable.
            BadInputError: there are no domains, nothing was counted, or another choice.
        """
        if by not in VARIABLES:
            raise UnknownNameError("variable", by, VARIABLES)
        if choice not in ("first", "all") or (choice == "all" and by != "token"):
            raise BadInputError(f"choice is first, or all where tokens are asked for; got {choice!r} by {by}.")
        if by == "domain" and not self.domains:
            raise BadInputError("The texts have no domains.", "Give from_model(domains=...).")
        found = []
        for layer in self._counted():
            pairs = {"token": layer.first, "position": layer.position, "domain": layer.domain}[by]
            pairs = layer.chosen if choice == "all" else pairs
            generator = numpy_generator(seed, "shuffle", by, layer.name)
            found.append(Explained(layer.name, pairs.explained(), pairs.shuffled(generator).explained()))
        return found

    def favourites(self, layer: int = 0, number: int = 2) -> dict[int, tuple[int, ...]]:
        """Token id -> the experts that it went to most often, best first, of all choices.

        Args:
            layer: which router.
            number: how many experts.
        """
        return self._counted()[layer].chosen.favourites(number)

    def experts(self, layer: int = 0, number: int = 8) -> list[list[int]]:
        """For every expert the token ids that chose it first most often.

        Args:
            layer: which router.
            number: how many ids.
        """
        values, table = self._counted()[layer].first.table()
        order = np.argsort(-table, axis=0, kind="stable")[:number]
        return [
            [int(values[place]) for place in order[:, expert] if table[place, expert]]
            for expert in range(table.shape[1])
        ]

    def drop_rate(self) -> np.ndarray:
        """``[layers, bins]``, the share of choices without service by position; NaN for positions that no text had."""
        rows = [(layer.dropped, layer.asked) for layer in self._counted()]
        return np.stack([np.where(asked > 0, dropped / np.maximum(asked, 1), np.nan) for dropped, asked in rows])

    def drop_rate_by_domain(self) -> dict[str, float]:
        """Domain -> share of choices without service, over all layers.

        Raises:
            BadInputError: there are no domains.
        """
        if not self.domains:
            raise BadInputError("The texts have no domains.", "Give from_model(domains=...).")
        asked = sum(layer.domain_asked for layer in self._counted())
        dropped = sum(layer.domain_dropped for layer in self.layers)
        return {name: float(dropped[i] / max(asked[i], 1)) for i, name in enumerate(self.domains)}  # type: ignore[index]

    def load(self) -> np.ndarray:
        """``[layers, E]``, the share of all choices that went to each expert.

        Raises:
            BadInputError: the layers have different numbers of experts.
        """
        widths = {len(layer.picked) for layer in self._counted()}
        if len(widths) > 1:
            raise BadInputError(f"The layers have different numbers of experts: {sorted(widths)}.")
        picked = np.stack([layer.picked for layer in self.layers])
        return picked / picked.sum(-1, keepdims=True)

    def balance(self, pooled: bool = False) -> np.ndarray:
        """The balance loss of each layer ``[layers]``, or of all layers pooled ``[1]``; ``k`` at balance.

        It counts what the routers chose, so it also holds where they do not choose by the largest logits.
        """
        self._counted()
        parts = [(layer.picked, layer.probability, layer.tokens) for layer in self.layers]
        if pooled:
            self.load()  # says so where the numbers of experts differ
            picked, probability = (sum(part[i] for part in parts) for i in (0, 1))
            parts = [(picked, probability, sum(part[2] for part in parts))]  # type: ignore[list-item]
        return np.array([len(p) * float((p * m).sum()) / count**2 for p, m, count in parts])

    def layer_information(self) -> np.ndarray:
        """``[layers - 1]``, nats that a router's first choice says about the next router's."""
        joint = [layer.joint for layer in self._counted()[1:]]
        return np.array([mutual_information(table) for table in joint if table is not None])

    def choice_entropy(self) -> np.ndarray:
        """``[layers]``, entropy in nats of the first choices; ``log E`` where all experts are used alike."""
        first = [layer.first for layer in self._counted()]
        return np.array([entropy(np.bincount(f.keys % f.width, f.counts, f.width)) for f in first])

    def figures(self) -> dict[str, float]:
        """The means over layers that a report shows, by name."""
        by_token, by_position = self.specialisation("token"), self.specialisation("position")
        asked = sum(int(layer.asked.sum()) for layer in self.layers)
        found = {
            "specialisation by token id": float(np.mean([item.share for item in by_token])),
            "the same, shuffled": float(np.mean([item.shuffled for item in by_token])),
            "specialisation by position": float(np.mean([item.share for item in by_position])),
            "balance loss a layer": float(self.balance().mean()),
            "share of dropped choices": sum(int(layer.dropped.sum()) for layer in self.layers) / asked,
        }
        if len(self.layers) > 1:
            found["nats between layers"] = float(self.layer_information().mean())
        return found

    def _counted(self) -> list[LayerCounts]:
        if not self.layers:
            raise BadInputError("Nothing was counted yet.", "Use RoutingAnalysis.from_model, or add records.")
        return self.layers


@dataclass(frozen=True)
class Agreement:
    """How far a checkpoint's routing is that of the last one.

    Attributes:
        favourite: share of (layer, token id) whose favourite expert is the last checkpoint's.
        overlap: mean share of their two most frequent experts that both have.
        ids: pairs (layer, token id) that were compared.
    """

    favourite: float
    overlap: float
    ids: int


def early_learning(checkpoints: Sequence[RoutingAnalysis], minimum: int = 1, weighted: bool = False) -> list[Agreement]:
    """How early the experts of token ids are fixed: every checkpoint against the last, on the same texts.

    Args:
        checkpoints: analyses in the order of training; the last is compared with itself.
        minimum: token ids that occurred less often are left out; their favourites are chance.
        weighted: weigh token ids by how often they occurred, not all alike.

    Raises:
        BadInputError: no analyses, analyses of different models or texts, or no token id occurs often enough.
    """
    if not checkpoints:
        raise BadInputError("There are no checkpoints to compare.")
    last = checkpoints[-1]._counted()
    found = []
    for analysis in checkpoints:
        layers = analysis._counted()
        if [(x.name, x.chosen.width) for x in layers] != [(x.name, x.chosen.width) for x in last]:
            raise BadInputError("The checkpoints have different routers.", "Compare checkpoints of one training.")
        same, shared, weights = [], [], []
        for here, there in zip(layers, last, strict=True):
            counts = there.first.occurrences()
            if here.first.occurrences() != counts:
                raise BadInputError("The checkpoints were analysed on different texts.", "Give all the same texts.")
            first, last_first = here.first.favourites(), there.first.favourites()
            two, last_two = here.chosen.favourites(2), there.chosen.favourites(2)
            for token, count in counts.items():
                if count >= minimum:
                    same.append(first[token] == last_first[token])
                    shared.append(len({*two[token]} & {*last_two[token]}) / len(last_two[token]))
                    weights.append(count if weighted else 1)
        if not same:
            raise BadInputError(f"No token id occurs {minimum} times.", "Give more text, or a smaller minimum.")
        found.append(
            Agreement(float(np.average(same, weights=weights)), float(np.average(shared, weights=weights)), len(same))
        )
    return found


# -- input -------------------------------------------------------------------------------------------------------------
def _numpy(values: torch.Tensor, keep: torch.Tensor) -> np.ndarray:
    return values.detach().reshape(-1).cpu()[keep].numpy()


def _as_ids(
    texts: Sequence[TextLike], tokenizer: PreTrainedTokenizerBase | None, max_length: int
) -> list[Sequence[int]]:
    if not texts or max_length < 1:
        raise BadInputError("Routing is analysed on texts of at least one token.", "Give texts, or a max_length.")
    rows: list[Sequence[int]] = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise BadInputError("The texts are no token ids.", "Give their tokenizer too.")
            row: Sequence[int] = tokenizer(text)["input_ids"]
        else:
            row = [int(item) for item in text]
        if not row:
            raise BadInputError(f"Text {number} is empty.", "Leave it out.")
        rows.append(row[:max_length])
    return rows


def _as_labels(
    domains: Sequence[str | Sequence[str]] | None, rows: list[Sequence[int]]
) -> tuple[list[list[int]] | None, list[str]]:
    """Labels a token, as places in the list of their names."""
    if domains is None:
        return None, []
    if len(domains) != len(rows):
        raise BadInputError(f"There are {len(domains)} domains for {len(rows)} texts.", "Give one for each.")
    spread = [
        [item] * len(row) if isinstance(item, str) else list(item) for item, row in zip(domains, rows, strict=True)
    ]
    for number, (labels, row) in enumerate(zip(spread, rows, strict=True)):
        if len(labels) < len(row):
            raise BadInputError(f"Text {number} has {len(labels)} labels for {len(row)} tokens.", "Give one a token.")
    names = sorted({label for labels in spread for label in labels})
    place = {name: index for index, name in enumerate(names)}
    return [[place[label] for label in labels[: len(row)]] for labels, row in zip(spread, rows, strict=True)], names
