"""Trains the feature draft of the embedded model: sample from the target, distil into one block, measure, save.

    python scripts/train_draft.py generate --out work/draft --minutes 26 --seed 1
    python scripts/train_draft.py train --data work/draft --out src/everytoken/weights/dyspec-smollm2-135m --minutes 30

``generate`` lets the target answer the prompts of ``draft_prompts.py`` at several temperatures and keeps its tokens and
hidden states; run it with several seeds in parallel. ``train`` distils: every position is predicted once from the
target's features and then ``--unroll`` times more from the draft's own outputs, as happens inside a drafted tree
(EAGLE-3's training, arXiv 2503.01840). A fifth epoch costs what the first did: stop whenever the held-out acceptance no
longer moves; the best weights so far are always on disk. Both work with any Llama-like model through ``--model``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from draft_prompts import draft_prompts
from everytoken.core.loading import load_model, load_tokenizer
from everytoken.generation.speculative.configuration_feature_draft import FeatureDraftConfig
from everytoken.generation.speculative.modeling_feature_draft import FeatureDraftForCausalLM

FAST_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
TEMPERATURES = (0.0, 0.0, 0.5, 0.8, 1.0)


def feature_layers(config) -> list[int]:
    """A low, a middle and the last state: a third, two thirds, and the whole of the depth."""
    depth = config.num_hidden_layers
    return [round(depth / 3), round(2 * depth / 3), depth]


# -- sampling from the target ------------------------------------------------------------------------------------------
@torch.inference_mode()
def answer(model, tokenizer, batch, layers, max_new_tokens, generator):
    """Continues a batch of ``(text, chat)``; returns one dict(ids, h, prompt) a row, ``h`` one shorter than ``ids``."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        if chat
        else text
        for text, chat in batch
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    rows = len(batch)
    temperature = torch.tensor(TEMPERATURES)[torch.arange(rows) % len(TEMPERATURES)]
    tokens = [ids[row][mask[row].bool()].tolist() for row in range(rows)]
    prompts = [len(row) for row in tokens]
    states: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    alive, cache, current = torch.arange(rows), DynamicCache(), ids
    positions, current_mask = (mask.cumsum(1) - 1).clamp(min=0), mask
    for step in range(max_new_tokens):
        output = model.base_model(
            input_ids=current,
            attention_mask=current_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        hidden = torch.stack([output.hidden_states[layer] for layer in layers], 2).half()
        for index, row in enumerate(alive.tolist()):
            states[row].append(hidden[index][mask[row].bool()] if step == 0 else hidden[index])
        logits = model.get_output_embeddings()(output.last_hidden_state[:, -1]).float()
        heat = temperature[alive]
        sampled = torch.multinomial(torch.softmax(logits / heat.clamp(min=0.1)[:, None], -1), 1, generator=generator)
        chosen = torch.where(heat == 0, logits.argmax(-1), sampled[:, 0])
        keep = (chosen != tokenizer.eos_token_id) & (chosen != 0)
        for index, row in enumerate(alive.tolist()):
            tokens[row].append(int(chosen[index]))
            tail = tokens[row][prompts[row] :]
            if len(tail) >= 64 and len(set(tail[-48:])) < 10:  # a loop teaches nothing new
                keep[index] = False
        if not keep.any():
            break
        positions, current = positions[:, -1:] + 1, chosen[:, None]
        current_mask = torch.cat([current_mask, current_mask.new_ones(len(current_mask), 1)], 1)
        if not keep.all():
            left = keep.nonzero()[:, 0]
            alive, current, positions, current_mask = alive[left], current[left], positions[left], current_mask[left]
            cache.batch_select_indices(left)
    return [
        {"ids": torch.tensor(row, dtype=torch.int32), "h": torch.cat(parts), "prompt": prompt}
        for row, parts, prompt in zip(tokens, states, prompts, strict=True)
    ]


@torch.inference_mode()
def invented_prompts(model, tokenizer, count, seed):
    """Requests that the model itself makes up when it is handed an open user turn (Magpie, arXiv 2406.08464)."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "\x00"}], tokenize=False).split("\x00")[0]
    ids = tokenizer([text] * count, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(seed)
    output = model.generate(**ids, max_new_tokens=48, do_sample=True, temperature=1.0, top_k=0, top_p=0.95)
    turns = tokenizer.batch_decode(output[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(turn.strip(), True) for turn in dict.fromkeys(turns) if len(turn.strip()) > 8]


def generate(args):
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype="bfloat16" if FAST_BF16 else "float32", packed=True)
    layers = feature_layers(model.config)
    generator = torch.Generator().manual_seed(args.seed)
    prompts = draft_prompts(6000, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    start, total = time.time(), 0
    for shard, first in enumerate(range(0, len(prompts), args.batch)):
        if time.time() - start > args.minutes * 60:
            break
        if args.prompts == "invented":
            batch = invented_prompts(model, tokenizer, args.batch, 1000 * args.seed + shard)
        else:
            batch = prompts[first : first + args.batch]
        rows = answer(model, tokenizer, batch, layers, args.max_new_tokens, generator)
        torch.save({"layers": layers, "rows": rows}, args.out / f"seed{args.seed}-{shard:04d}.pt")
        total += sum(len(row["ids"]) - row["prompt"] for row in rows)
        print(f"shard {shard}: {total} tokens, {total / (time.time() - start):.0f} tokens/s", flush=True)


# -- distillation ------------------------------------------------------------------------------------------------------
def load_rows(folder: Path, layers: list[int]):
    rows = []
    for path in sorted(folder.glob("*.pt")):
        shard = torch.load(path, weights_only=True)
        pick = [shard["layers"].index(layer) for layer in layers]
        for row in shard["rows"]:
            if len(row["ids"]) - row["prompt"] >= 8:
                h = row["h"] if pick == list(range(row["h"].shape[1])) else row["h"][:, pick]
                rows.append({"ids": row["ids"], "h": h.flatten(1).contiguous(), "prompt": row["prompt"]})
    if not rows:
        raise SystemExit(f"No samples in {folder}: run `train_draft.py generate --out {folder}` first.")
    return rows


def collate(rows, length):
    """Right-padded batch: ids ``[B, T]``, features one position earlier, the target's own last state, loss mask."""
    size = min(max(len(row["h"]) for row in rows), length)
    width = rows[0]["h"].shape[1]
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    states = torch.zeros(len(rows), size, width)
    mask = torch.zeros(len(rows), size, dtype=torch.bool)
    for index, row in enumerate(rows):
        n = min(len(row["h"]), size)
        ids[index, :n] = row["ids"][:n].long()
        states[index, :n] = row["h"][:n].float()
        mask[index, max(row["prompt"] - 1, 0) : n] = True
    features = torch.cat([torch.zeros(len(rows), 1, width), states[:, :-1]], 1)
    return ids, features, states, mask


def unrolled(draft, ids, features, steps):
    """States of the draft after 1, 2, ... ``steps`` own predictions: a list of ``[B, T, D]``.

    At step s the query at position i sees the first pass up to i - s and, of each later pass j, only the entry on its
    own chain (position i - (s - j)). That is exactly what it would see inside a drafted chain that left the verified
    text at i - s.
    """
    batch, length = ids.shape
    embeds = draft.get_input_embeddings()(ids)
    positions = torch.arange(length)[None].expand(batch, -1)
    cache = DynamicCache()
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
    outputs, hidden = [], None
    for step in range(steps):
        blocks = [columns <= rows - step]
        blocks += [columns == rows - (step - later) for later in range(1, step + 1)]
        mask = torch.cat(blocks, 1)[None, None]
        inputs = draft.mix_inputs(embeds, features if step == 0 else None, hidden)
        output = draft.run_block(inputs, positions, mask, cache)
        outputs.append(output)
        hidden = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], 1)
    return outputs


def step_loss(draft, teacher_head, ids, features, states, mask, steps, decay):
    """Cross-entropy to the target's distribution at every unrolled step, and each step's share of equal arg-maxes."""
    last = states[..., -draft.config.hidden_size :]
    outputs = unrolled(draft, ids, features, steps)
    total, agreement = 0.0, []
    with torch.no_grad():
        teacher = torch.softmax(F.linear(last[mask].to(teacher_head.dtype), teacher_head).float(), -1)
    slot = torch.full(mask.shape, -1)
    slot[mask] = torch.arange(int(mask.sum()))
    for step, output in enumerate(outputs):
        use = mask.clone()
        if step:  # the chain must have left the text where the model's own words had begun; half of them suffice
            use[:, step:] &= mask[:, :-step]
            use[:, :step] = False
            if draft.training:
                use &= torch.rand(use.shape) < 0.5
        goal = teacher[slot[use]]
        logits = F.linear(output[use].to(teacher_head.dtype), teacher_head).float()
        total = total - decay**step * (goal * torch.log_softmax(logits, -1)).sum(-1).mean()
        agreement.append((logits.argmax(-1) == goal.argmax(-1)).float().mean().item())
    return total, agreement


def train(args):
    torch.manual_seed(args.seed)
    target = load_model(args.model, dtype="float32")
    config = target.config
    layers = feature_layers(config)
    rows = load_rows(args.data, layers)
    counts = torch.zeros(config.vocab_size, dtype=torch.long)
    for row in rows:
        counts += torch.bincount(row["ids"][row["prompt"] :].long(), minlength=config.vocab_size)
    frequent = counts.argsort(descending=True, stable=True)[: args.draft_vocab].sort().values
    coverage = (counts[frequent].sum() / counts.sum()).item()
    draft_config = FeatureDraftConfig(
        **{
            key: getattr(config, key)
            for key in [
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "hidden_act",
                "max_position_embeddings",
                "rms_norm_eps",
                "rope_parameters",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            ]
        },
        num_hidden_layers=1,
        vocab_size=config.vocab_size,
        target_vocab_size=config.vocab_size,
        draft_vocab_size=len(frequent),
        feature_layers=layers,
        tie_word_embeddings=False,
    )
    draft = FeatureDraftForCausalLM(draft_config)
    draft.draft_token_ids = frequent.to(torch.int32)
    draft.block.load_state_dict(target.base_model.layers[-1].state_dict())  # the last block already speaks to this head
    draft.norm.load_state_dict(target.base_model.norm.state_dict())
    if args.resume is not None:
        draft.load_state_dict(
            {
                name: value.float()
                for name, value in load_file(args.resume / "model.safetensors").items()
                if name != "draft_token_ids"
            },
            strict=False,
        )
    draft.attach(target)
    draft.train()
    head = draft._head.bfloat16() if FAST_BF16 else draft._head.float()
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    share = min(48, max(1, len(rows) // 10))  # a few samples, too, leave something to learn from
    held, kept = [rows[i] for i in order[:share]], [rows[i] for i in order[share:]]
    if not kept:
        raise SystemExit("One sample is not enough: run `train_draft.py generate` for longer.")
    tokens = sum(len(row["h"]) - row["prompt"] for row in kept)
    print(f"{len(kept)} rows, {tokens} response tokens; head of {len(frequent)} tokens covers {coverage:.4f}")
    optimizer = torch.optim.AdamW(draft.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    start, step, curve, best = time.time(), 0, [], 0.0

    def evaluate():
        draft.eval()
        sums, weight = torch.zeros(4), 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
            for first in range(0, len(held), 8):
                batch = collate(held[first : first + 8], args.length)
                _, agreement = step_loss(draft, head, *batch, 4, 1.0)
                sums += torch.tensor(agreement) * batch[3].sum()
                weight += int(batch[3].sum())
        draft.train()
        return (sums / weight).tolist()

    def save(agreement):
        args.out.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.half().contiguous() for name, value in draft.state_dict().items()}
        tensors["draft_token_ids"] = draft.draft_token_ids
        save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
        draft_config.architectures = ["FeatureDraftForCausalLM"]
        draft_config.save_pretrained(args.out)
        record = {
            "target": args.model or "embedded",
            "tokens": tokens,
            "rows": len(kept),
            "head_tokens": len(frequent),
            "head_coverage": coverage,
            "seed": args.seed,
            "lr": args.lr,
            "unroll": args.unroll,
            "held_out_agreement": agreement,
            "curve": curve,
        }
        (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")

    budget = args.minutes * 60
    done = False
    while not done:
        shuffled = torch.randperm(len(kept), generator=generator).tolist()
        # neighbours in length share a batch: no time is spent on padding
        chunks = [
            sorted(shuffled[i : i + 64 * args.batch], key=lambda j: len(kept[j]["h"]))
            for i in range(0, len(shuffled), 64 * args.batch)
        ]
        batches = [chunk[i : i + args.batch] for chunk in chunks for i in range(0, len(chunk), args.batch)]
        for pick in torch.randperm(len(batches), generator=generator).tolist():
            progress = (time.time() - start) / budget
            if progress >= 1:
                done = True
                break
            warmup = min(1.0, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
            batch = collate([kept[j] for j in batches[pick]], args.length)
            with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
                loss, agreement = step_loss(draft, head, *batch, args.unroll, 0.8)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                shares = " ".join(f"{share:.3f}" for share in agreement)
                print(f"{progress:6.1%} step {step} loss {loss.item():.3f} agreement {shares}", flush=True)
            if step % args.eval_every == 0:
                held_out = evaluate()
                curve.append({"step": step, "seconds": round(time.time() - start), "agreement": held_out})
                print("  held out:", " ".join(f"{share:.3f}" for share in held_out), flush=True)
                if sum(held_out[:3]) > best:
                    best = sum(held_out[:3])
                    save(held_out)
    held_out = evaluate()
    curve.append({"step": step, "seconds": round(time.time() - start), "agreement": held_out})
    print("final, held out:", held_out)
    if sum(held_out[:3]) >= best:
        save(held_out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("generate", generate), ("train", train)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--model", default=None, help="hub id or folder; default: the embedded model")
        command.add_argument("--minutes", type=float, default=30)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--out", type=Path, required=True)
    commands.choices["generate"].add_argument("--batch", type=int, default=96)
    commands.choices["generate"].add_argument("--prompts", choices=["templates", "invented"], default="templates")
    commands.choices["generate"].add_argument("--max-new-tokens", type=int, default=192)
    trainer = commands.choices["train"]
    trainer.add_argument("--data", type=Path, required=True)
    trainer.add_argument("--resume", type=Path, help="folder of a draft to go on from")
    trainer.add_argument("--batch", type=int, default=8)
    trainer.add_argument("--length", type=int, default=288)
    trainer.add_argument("--draft-vocab", type=int, default=8192)
    trainer.add_argument("--unroll", type=int, default=3)
    trainer.add_argument("--lr", type=float, default=6e-4)
    trainer.add_argument("--eval-every", type=int, default=200)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
