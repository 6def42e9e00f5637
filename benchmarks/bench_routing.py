"""What a capacity limit and a recurrent router cost: a training step with them against one with the plain router.

*Capacity*: OpenMoE with a factor of 1.25 against the same network without a limit. *Recurrence*: RMoE with its cell
against the same network whose routers are linear (Mixtral's). *Ranking*: who is served, against a loop over tokens.
Forward and backward, on one thread, in processor time, so that other work on the machine does not count. The two sides
of a pair run in turn, and the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from common import report
from everytoken.architectures.openmoe.capacity import expert_capacity, serve
from everytoken.architectures.openmoe.configuration_openmoe import OpenMoeConfig
from everytoken.architectures.openmoe.modeling_openmoe import OpenMoeForCausalLM
from everytoken.architectures.rmoe.configuration_rmoe import RMoeConfig
from everytoken.architectures.rmoe.modeling_rmoe import RMoeForCausalLM

BOUND = 1.1
"""Asked for: within a tenth of the plain router's step."""


def in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of processor time of both, which run one after the other; the first run does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for place, function in enumerate((first, second)):
            began = time.process_time()
            function()
            times[place].append(1e3 * (time.process_time() - began))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def step(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of one batch."""
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss.backward()

    return run


def looped(indices: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """Who is served, by the rule as a loop."""
    asked, served = [0] * experts, torch.zeros_like(indices, dtype=torch.bool)
    for choice in range(indices.shape[1]):
        for token, expert in enumerate(indices[:, choice].tolist()):
            served[token, choice] = asked[expert] < capacity
            asked[expert] += 1
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs=2, default=[8, 256], help="rows and length of a batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(3, 259, tuple(args.tokens))
    rows: list[dict[str, object]] = []
    for width, inner, experts, state in ((192, 256, 8, 48), (384, 768, 16, 64)):
        shape = {
            "vocab_size": 259, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": experts,
            "pad_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip
        free, limited = (
            OpenMoeForCausalLM(OpenMoeConfig(**shape, moe_every=1, capacity_factor_train=factor))
            for factor in (None, 1.25)
        )
        limited.load_state_dict(free.state_dict())
        plain, ours = in_turn(step(free, ids), step(limited, ids), args.repeats)
        name = f"width {width}, {experts} experts of {inner} in 4 layers"
        rows.append({"what": f"capacity limit, {name}", "plain, ms": plain, "ours, ms": ours})
        linear = MixtralForCausalLM(MixtralConfig(**shape))
        recurrent = RMoeForCausalLM(RMoeConfig(**shape, router_size=state))
        plain, ours = in_turn(step(linear, ids), step(recurrent, ids), args.repeats)
        rows.append({"what": f"recurrent router, {name}", "plain, ms": plain, "ours, ms": ours})
    indices = torch.rand(1, ids.numel(), 16).topk(2, -1).indices
    capacity = expert_capacity(torch.tensor([ids.numel()]), 16, 2, 1.25)
    assert torch.equal(serve(indices, 16, capacity)[0], looped(indices[0], 16, int(capacity)))
    plain, ours = in_turn(
        lambda: looped(indices[0], 16, int(capacity)), lambda: serve(indices, 16, capacity), args.repeats
    )
    rows.append({"what": f"ranking {ids.numel()} tokens, a loop against ours", "plain, ms": plain, "ours, ms": ours})
    for row in rows:
        row["ours / plain"] = row["ours, ms"] / row["plain, ms"]  # type: ignore[operator]
    note = (
        f"Medians of {args.repeats}, one thread, processor time; {args.tokens[0]} x {args.tokens[1]} tokens a batch. "
        f"Asked for: steps of at most {BOUND} times the plain router's."
    )
    report("routing", rows, note)


if __name__ == "__main__":
    main()
