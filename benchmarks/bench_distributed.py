"""Steps under tensor parallelism in two processes: ours plain, fused and woven, beside torch's own SequenceParallel.

Torch's plan makes the same exchange (reduce-scatter, norm of own rows, all-gather), as hooks of DTensor around
transformers' own layers. The ranks share this machine's cores and have no link of their own. So nothing overlaps, and
the figures say only what the ways of running cost a rank in processor time. The least of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common import report
from everytoken.distributed.processes import launch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def llama() -> Any:
    """A random Llama of four layers, whose heads two ranks divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sequence_parallel(model: Any, mesh: DeviceMesh) -> Any:
    """Torch's plan for a Llama of transformers."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    plan = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(**gathered),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    outer = {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
        ),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, outer)
    return model


def times(mesh: DeviceMesh, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of processor time a forward of each way, and how far its logits are from one process's."""
    from everytoken.distributed.token_weave import TokenWeave, weave

    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}
    with torch.no_grad():
        wanted = llama()(input_ids=ids).logits

        def note(name: str, forward: Callable[[], Any]) -> None:
            logits = forward().logits
            found[f"{name}, difference"] = float((logits - wanted).abs().max() / wanted.abs().max())
            best = float("inf")
            for _ in range(repeats):
                began = time.process_time()
                forward()
                best = min(best, time.process_time() - began)
            found[f"{name}, ms"] = 1e3 * best

        woven = weave(llama(), mesh)
        for schedule in ("plain", "fused", "woven"):
            woven.settings = TokenWeave(schedule, first=tokens // 2 if schedule == "woven" else None)
            note(schedule, lambda: woven.model(input_ids=ids))
        try:
            peer = sequence_parallel(llama(), mesh)
            note("torch's SequenceParallel", lambda: peer(input_ids=ids))
        except Exception as error:  # transformers' layers do not fit the plan in every release
            if mesh.get_rank() == 0:
                found["torch's SequenceParallel failed"] = float("nan")
                print(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        function = f"{Path(__file__).stem}:times"
        found = launch(function, 2, {"tokens": tokens, "repeats": args.repeats}, 600)[0]
        rows.append({"tokens": tokens} | found)
    report("distributed", rows, f"Two processes over gloo, processor time of a rank, least of {args.repeats}.")


if __name__ == "__main__":
    main()
