"""What choosing visual tokens costs, and what fewer of them save.

*Selection*: DivPrune's choice against the published loop (the minimum over everything chosen, anew at every step), and
facility location's (CATP) against the plain greedy loop, on random features that repeat with noise. *Merge*: ToMe's
matching and merging against its plain formulation, a loop over images and tokens. *Prefill*: one random decoder layer
of 7B shape, times 32, with all tokens and with those that are kept; what is saved must be far more than what choosing
costs. On one thread, in processor time, so that other work on the machine does not count; medians.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from common import report
from everytoken.reduction.arithmetic import cosines
from everytoken.reduction.catp import facility_location
from everytoken.reduction.divprune import max_min_diverse
from everytoken.reduction.tome import match, merge

LAYERS, TEXT = 32, 64
"""Layers of a 7B model, and text tokens of a prompt."""


def features(total: int, width: int) -> torch.Tensor:
    """Random features, each repeated about four times with noise, as patches of an image are alike."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(total // 4 + 1, width, generator=generator)
    return base.repeat_interleave(4, 0)[:total] + 0.3 * torch.randn(total, width, generator=generator)


def published_loop(points: torch.Tensor, count: int) -> torch.Tensor:
    """The published selection as the paper describes it."""
    unit = points / points.norm(dim=-1, keepdim=True)
    matrix = 1 - unit @ unit.T
    chosen = torch.empty(0, dtype=torch.long)
    for _ in range(count):
        if not len(chosen):
            scores = matrix.topk(2, 0, largest=False).values[1]
        else:
            scores = matrix.index_select(0, chosen).min(0).values
        chosen = torch.cat([chosen, scores.argmax()[None]])
    return chosen


def plain_greedy(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Facility location with every gain computed at every step."""
    covered = torch.zeros(len(similarity))
    chosen: list[int] = []
    for _ in range(count):
        gains = (similarity - covered).clamp(min=0).sum(-1)
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarity[chosen[-1]])
    return torch.tensor(chosen)


def plain_merge(metric: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """ToMe by its definition, for one image after another."""
    results = []
    for keys, tokens in zip(metric, values, strict=True):
        unit = keys / keys.norm(dim=-1, keepdim=True)
        scores = unit[::2] @ unit[1::2].T
        scores[0] = -torch.inf
        best, partner = scores.max(-1)
        sources = best.argsort(descending=True)[:count].tolist()
        sums, sizes = tokens[1::2].clone(), torch.ones(len(scores[0]))
        for source in sources:
            sums[partner[source]] += tokens[2 * source]
            sizes[partner[source]] += 1
        rest = torch.tensor([index for index in range(len(best)) if index not in sources])
        results.append(torch.cat([tokens[::2][rest], sums / sizes[:, None]]))
    return torch.stack(results)


class Layer:
    """One random decoder layer of 7B shape."""

    def __init__(self, width: int):
        config = LlamaConfig(
            hidden_size=width, intermediate_size=int(width * 2.6875), num_attention_heads=width // 128,
            num_key_value_heads=width // 128, attn_implementation="sdpa",
        )  # fmt: skip
        self.layer, self.tables = LlamaDecoderLayer(config, 0).eval(), LlamaRotaryEmbedding(config)

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        """Milliseconds for all layers."""
        hidden = torch.randn(1, tokens, self.layer.hidden_size)
        tables = self.tables(hidden, torch.arange(tokens)[None])
        return LAYERS * timed(lambda: self.layer(hidden, position_embeddings=tables), 1)


def timed(function: Callable[[], object], repeats: int) -> float:
    """Milliseconds of processor time; the first of several runs is not counted."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        began = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times[repeats > 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--cases", type=int, nargs="+", default=[576, 64, 2880, 288])
    args = parser.parse_args()
    torch.set_num_threads(1)
    layer = Layer(args.width)
    layer.prefill(16)  # the first call of a kernel
    rows = []
    for total, count in zip(args.cases[::2], args.cases[1::2], strict=True):
        points = features(total, args.width)
        assert torch.equal(max_min_diverse(points, count)[0], published_loop(points, count))
        ours = timed(lambda: max_min_diverse(points, count), args.repeats)
        theirs = timed(lambda: published_loop(points, count), args.repeats)
        product = timed(lambda: points @ points.T, args.repeats)
        full, fewer = layer.prefill(total + TEXT), layer.prefill(count + TEXT)
        rows.append(
            {
                "what": f"DivPrune, {count} of {total}",
                "ours, ms": ours,
                "plain, ms": theirs,
                "plain / ours": theirs / ours,
                "the matrix product alone, ms": product,
                "prefill, all, ms": full,
                "prefill, kept, ms": fewer,
                "cost / saved": ours / (full - fewer),
            }
        )
    points = features(576, args.width)
    similarity = (1 + cosines(points, points)) / 2
    assert torch.equal(facility_location(similarity, 352), plain_greedy(similarity, 352))
    ours = timed(lambda: facility_location(similarity, 352), args.repeats)
    theirs = timed(lambda: plain_greedy(similarity, 352), args.repeats)
    rows.append({"what": "CATP, 352 of 576", "ours, ms": ours, "plain, ms": theirs, "plain / ours": theirs / ours})
    keys, values = torch.randn(8, 577, 64), torch.randn(8, 577, 1024)
    ours = timed(lambda: merge(values, torch.ones(8, 577), match(keys, 23, protected=1)), args.repeats)
    theirs = timed(lambda: plain_merge(keys, values, 23), args.repeats)
    rows.append({"what": "ToMe, 8 x 577, r = 23", "ours, ms": ours, "plain, ms": theirs, "plain / ours": theirs / ours})
    heads = list(dict.fromkeys(head for row in rows for head in row))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    note = f"Medians of {args.repeats}, one thread, processor time; width {args.width}; peak {peak:.1f} GiB."
    report("reduction", [{head: row.get(head, "") for head in heads} for row in rows], note)


if __name__ == "__main__":
    main()
