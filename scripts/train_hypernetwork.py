"""Trains the hypernetwork that gives merged tokens their embeddings, for the embedded model or any other.

    python scripts/train_hypernetwork.py --out src/everytoken/weights/dynamic-smollm2-135m --minutes 2 15 14 10

Four stages, each with its minutes; nothing of the language model is trained.

1. *pieces*: tokens of the vocabulary, written as two or more shorter tokens, get their own embeddings back.
2. *states*: text with merged tokens leads to the same hidden states, at the last pieces, as the text without merges.
   They are compared after ``--depth`` layers: that is cheap, and the words of a text are already put together there.
3. *predictions*: the same for the whole model's next-token distributions (Kullback-Leibler divergence). The output
   embeddings learn from the likelihood of the next merged token among all tokens of the batch.
4. *outputs*: the output half of the last layer alone, on states kept from merged text. It learns from the likelihood of
   the next merged token among the vocabulary and a large sample of new tokens, so that tokens that are not in a batch
   become unlikely.

Texts: the standard library's English prose, the packaged declarations, and the text files of ``--texts``, if given. Of
the languages that experiments measure only the first half is read. The best weights on held-out text so far are always
on disk.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from everytoken.core.loading import load_model, load_tokenizer
from everytoken.reproduce.beds.texts import declarations
from everytoken.reproduce.dynamic_tokenization import MEASURED, halves
from everytoken.reproduce.stochastok import prose
from everytoken.tokenization.base import token_bytes
from everytoken.tokenization.dynamic_tokenization import DynamicBatch, DynamicTokenizer
from everytoken.tokenization.hyper import HyperConfig, HyperEmbedding, MeanEmbedding
from everytoken.tokenization.stochastok import split_table


class Texts:
    """Random batches of rows of base tokens, one language a batch in part, mixed otherwise (as in use)."""

    def __init__(self, tokenizer, folder, rng):
        languages = {name: halves(text)[0] if name in MEASURED else text for name, text in declarations().items()}
        self.held = {name: halves(declarations()[name])[1] for name in MEASURED}
        english = re.sub(r"[ \t]+", " ", prose())[:-60_000]
        self.rng, self.streams = rng, {}
        for name, text in languages.items():
            self.streams[name] = tokenizer(text, add_special_tokens=False)["input_ids"]
        for path in sorted(folder.glob("*.txt")) if folder else []:
            self.streams[path.stem] = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        self.packaged = list(languages)
        self.english = tokenizer(english, add_special_tokens=False)["input_ids"]

    def batch(self, rows, length):
        found = []
        for _ in range(rows):
            draw = self.rng.random()
            names = self.packaged if draw < 0.45 else list(self.streams)
            stream = self.english if draw > 0.75 else self.streams[names[self.rng.integers(len(names))]]
            start = int(self.rng.integers(0, max(1, len(stream) - length)))
            found.append(stream[start : start + length])
        return found


def splits(table, index, count, rng, more=0.35):
    """``count`` tokens of the vocabulary written as several."""
    chosen = index[rng.integers(len(index), size=count)]
    pieces = []
    for token in chosen.tolist():
        parts = list(table.pairs(token)[rng.integers(table.offsets[token + 1] - table.offsets[token])])
        while rng.random() < more and len(parts) < 6:
            place = int(rng.integers(len(parts)))
            size = table.offsets[parts[place] + 1] - table.offsets[parts[place]]
            if size:
                parts[place : place + 1] = table.pairs(parts[place])[rng.integers(size)]
        pieces.append(tuple(parts))
    return torch.from_numpy(chosen), pieces


def student_inputs(batch: DynamicBatch, made, weight):
    """Inputs ``[B, T, d]`` with gradients into the new tokens' vectors, and each place's last base token (or -1)."""
    embeds = batch.place(weight.__getitem__, made)
    mask = batch.attention_mask.bool()
    last = torch.full(mask.shape, -1)
    last[mask] = torch.tensor([end - 1 for row in batch.spans for _, end in row])
    return embeds, last


class Shallow:
    """The base model with its first layers only, while the block lasts."""

    def __init__(self, base, depth):
        self.base, self.depth = base, depth

    def __enter__(self):
        self.layers, self.count = self.base.layers, self.base.config.num_hidden_layers
        self.base.layers, self.base.config.num_hidden_layers = self.layers[: self.depth], self.depth
        return self.base

    def __exit__(self, *_):
        self.base.layers, self.base.config.num_hidden_layers = self.layers, self.count


def hidden_states(base, batch, made, weight):
    """Teacher's and student's states where the student has a token, ``[N, d]`` each."""
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch.base_ids], batch_first=True)
    with torch.no_grad():
        teacher = base(input_ids=rows, use_cache=False).last_hidden_state
    embeds, last = student_inputs(batch, made, weight)
    student = base(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
    there = last >= 0
    there[:, 0] = False  # nothing before it: often an outlier
    wanted = teacher.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, teacher.shape[-1]))
    return wanted[there], student[there], there


def divergence(teacher, student, weight):
    student_logps, teacher_logps = (F.log_softmax(states @ weight.T, -1) for states in (student, teacher))
    return F.kl_div(student_logps, teacher_logps, log_target=True, reduction="batchmean")


@torch.no_grad()
def held_out(model, dynamic, texts, tokenizer, embedder, length=128):
    """Mean divergence at the last pieces over the measured languages' held-out halves."""
    weight = model.get_input_embeddings().weight
    total, count = 0.0, 0
    for text in texts.held.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for reduction in (0.4, 1.0):
            dynamic.reduction = reduction
            batch = dynamic([ids[:length]])
            if batch.pieces:
                wanted, got, _ = hidden_states(model.base_model, batch, embedder.embed(batch.pieces)[0], weight)
                total += float(divergence(wanted, got, weight)) * len(wanted)
                count += len(wanted)
    return total / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--texts", type=Path, default=None, help="folder of further .txt files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs=4, default=(2.0, 15.0, 14.0, 10.0))
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype="float32")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    if args.resume:
        hyper = HyperEmbedding.from_pretrained(args.out).attach(model).train()
    else:
        config = HyperConfig(weight.shape[1], vocab_size=len(weight), scale=float(weight.std()))
        hyper = HyperEmbedding(config).attach(model).train()
    texts = Texts(tokenizer, args.texts, rng)
    dynamic = DynamicTokenizer(tokenizer, reduction=0.5, padding_side="right")
    table = split_table(token_bytes(tokenizer))
    index = np.flatnonzero(np.diff(table.offsets) > 0)
    log = {"mean of pieces": held_out(model, dynamic, texts, tokenizer, MeanEmbedding(model)), "steps": []}
    print(f"held-out divergence, nats a token: mean of pieces {log['mean of pieces']:.4f}", flush=True)
    best, start = float("inf"), time.time()

    def measure(stage, step):
        nonlocal best
        value = held_out(model, dynamic, texts, tokenizer, hyper.eval())
        hyper.train()
        log["steps"].append({"stage": stage, "step": step, "seconds": round(time.time() - start), "divergence": value})
        print(f"{time.time() - start:6.0f} s  {stage} {step}: {value:.4f}", flush=True)
        if value < best:
            best = value
            hyper.save_pretrained(args.out)
        log["arguments"] = {key: str(item) for key, item in vars(args).items() if key not in ("out", "texts", "model")}
        (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")

    def rebuild(count):
        tokens, pieces = splits(table, index, count, rng)
        first, second = hyper.apply_to(pieces)
        scale = weight.var()
        return ((first - weight[tokens]) ** 2).mean() / scale + ((second - head[tokens]) ** 2).mean() / scale

    for stage, minutes, lr in zip(
        ("pieces", "states", "predictions"), args.minutes[:3], (args.lr, args.lr, args.lr / 2), strict=True
    ):
        optimiser = torch.optim.AdamW(hyper.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        began, step, last = time.time(), 0, time.time()
        while (spent := (time.time() - began) / 60) < minutes:
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * spent / minutes)))
            if stage == "pieces":
                loss = rebuild(1024)
            else:
                dynamic.reduction = float(rng.choice([0.2, 0.4, 0.7, 1.0, 1.0]))
                batch = dynamic(texts.batch(args.rows, args.length))
                if not batch.pieces:
                    continue
                made, out = hyper.apply_to(batch.pieces)
                if stage == "states":
                    with Shallow(model.base_model, args.depth) as base:
                        wanted, got, _ = hidden_states(base, batch, made, weight)
                    loss = ((got - wanted) ** 2).sum(-1).div((wanted**2).sum(-1)).mean()
                else:
                    wanted, got, there = hidden_states(model.base_model, batch, made, weight)
                    some = torch.randperm(len(wanted))[:160]
                    loss = divergence(wanted[some], got[some], head)
                    # the next merged token, among the vocabulary and the batch's new tokens
                    following = torch.full(there.shape, -(10**9))
                    for row, tokens in enumerate(batch.tokens):
                        following[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
                    target = following[there][some]
                    logits = got[some].detach() @ torch.cat([head, out]).T
                    target = torch.where(target < 0, len(head) - 1 - target, target)
                    known = target < logits.shape[1]
                    loss = loss + 0.2 * F.cross_entropy(logits[known], target[known])
                loss = loss + 0.1 * rebuild(128)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hyper.parameters(), 1.0)
            optimiser.step()
            step += 1
            if time.time() - last > 150:
                measure(stage, step)
                last = time.time()
        if minutes:
            measure(stage, step)
    if args.minutes[3]:
        losses = train_outputs(hyper, model, dynamic, texts, tokenizer, args.minutes[3], args.lr / 2, rng)
        best = float("inf")  # the output side does not show in the divergence: keep what this stage made
        log["outputs"] = losses
        measure("outputs", len(losses))


@torch.no_grad()
def kept_states(hyper, model, dynamic, texts, minutes, rng):
    """States before each token of merged text, and that token: an id, or its pieces."""
    weight, states, targets, began = model.get_input_embeddings().weight, [], [], time.time()
    while time.time() - began < minutes * 60:
        dynamic.reduction = float(rng.choice([0.4, 1.0]))
        batch = dynamic(texts.batch(4, 192))
        if not batch.pieces:
            continue
        embeds, _last = student_inputs(batch, hyper.embed(batch.pieces)[0], weight)
        hidden = model.base_model(
            inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        for row, tokens in enumerate(batch.tokens):
            states.append(hidden[row, : len(tokens) - 1].half())
            targets += [item if item >= 0 else batch.pieces[-1 - item][:8] for item in tokens[1:]]
    return torch.cat(states), targets


def train_outputs(hyper, model, dynamic, texts, tokenizer, minutes, lr, rng, size=160, others=8000):
    """Stage 4: only the output half of the last layer learns. Returns the losses, averaged over 25 steps each."""
    head, d = model.get_output_embeddings().weight, hyper.config.size
    tokens = dynamic.vocabulary([*texts.streams.values(), texts.english], 80_000)
    states, targets = kept_states(hyper.eval(), model, dynamic, texts, minutes * 0.3, rng)
    known = set(tokens)
    tokens += list(dict.fromkeys(item for item in targets if not isinstance(item, int) and item not in known))
    places = {item: place for place, item in enumerate(tokens)}
    features = []
    handle = hyper.write.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
    start = torch.cat([hyper.embed(tokens[begin : begin + 2048])[1] for begin in range(0, len(tokens), 2048)])
    handle.remove()
    features = torch.cat(features)
    with torch.no_grad():  # the output without what the last layer adds
        fixed = start - (features @ hyper.write.weight[d:].T + hyper.write.bias[d:]) * hyper.config.scale
    weight = hyper.write.weight[d:].detach().clone().requires_grad_()
    bias = hyper.write.bias[d:].detach().clone().requires_grad_()
    print(f"{len(states):,} states, {len(tokens):,} new tokens", flush=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    began, losses, recent, step = time.time(), [], [], 0
    while (spent := (time.time() - began) / 60) < minutes * 0.7:
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30) * (0.1 + 0.45 * (1 + np.cos(np.pi * spent / (minutes * 0.7))))
        chosen = rng.integers(len(states), size=size)
        wanted = [targets[index] for index in chosen.tolist()]
        own = list(dict.fromkeys(places[item] for item in wanted if not isinstance(item, int)))
        rest = np.setdiff1d(rng.integers(len(tokens), size=others), own)
        index = torch.tensor([*own, *rest.tolist()])
        made = fixed[index] + (features[index] @ weight.T + bias) * hyper.config.scale
        hidden = states[chosen].float()
        with torch.no_grad():
            base = hidden @ head.T
        logits = torch.cat([base, hidden @ made.T], 1)
        # each of the sample stands for the many that were not drawn
        more = torch.zeros(logits.shape[1])
        more[len(head) + len(own) :] = float(np.log((len(tokens) - len(own)) / max(1, len(rest))))
        order = {place: len(head) + number for number, place in enumerate(own)}
        target = torch.tensor([item if isinstance(item, int) else order[places[item]] for item in wanted])
        loss = F.cross_entropy(logits + more, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        recent.append(float(loss.detach()))
        step += 1
        if step % 25 == 0:
            losses.append(round(float(np.mean(recent)), 4))
            print(f"outputs {step}: {losses[-1]}", flush=True)
            recent = []
    with torch.no_grad():
        hyper.write.weight[d:], hyper.write.bias[d:] = weight, bias
    return losses


if __name__ == "__main__":
    main()
