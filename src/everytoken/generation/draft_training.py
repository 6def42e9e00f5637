"""``everytoken train dyspec``: a feature draft for any causal language model, from nothing but the model.

1. The model answers prompts (``speculative.answers``); the texts are kept in the output folder.
2. A draft of one block learns its distribution at every position (``speculative.distillation``). Every
   ``evaluate_every`` steps the held-out agreement is measured, the best weights so far are saved, and a checkpoint with
   the optimizer's state is written: the same command goes on from it, also with more ``steps``.
3. The best draft goes into the user's cache, where ``DySpec`` finds it for this model, and decodes held-out prompts to
   say what it is worth.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..core.errors import BadInputError, CacheError, UnsupportedModelError
from ..core.files import write_text_whole, write_whole
from ..decoding.checks import check_decoder_only
from ..decoding.inputs import check_reads_text, is_offloaded
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.datasets.prompts import read_prompts
from .speculative import load_draft, trained_draft_folder
from .speculative.answers import collect_answers
from .speculative.distillation import Row, collate, distil, feature_layers, new_draft
from .speculative.modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap, decoder_parts


@dataclass
class DraftTraining:
    """Settings of ``everytoken train dyspec``; ``--model`` is the model to draft for, ``--data`` prompts like yours.

    Args:
        answers: how many prompts the model answers. More help more than more steps over few.
        max_new_tokens: length of an answer.
        gather: prompts answered at a time.
        steps: batches to learn from. Raise it and run the same command to go on.
        batch_size, length: texts a batch, and tokens of each.
        draft_vocab: the most frequent tokens, which alone are proposed.
        unroll: predictions in a row that are learned.
        lr, warmup: of AdamW; the rate falls along half a cosine to a twentieth.
        held_out: share of the texts that nothing is learned from.
        evaluate_every: steps between measurements and checkpoints.
        tried: held-out prompts that are decoded at the end.
        dtype: of the model.
        install: put the draft where DySpec finds it for this model.
    """

    answers: int = 2000
    max_new_tokens: int = 192
    gather: int = 32
    steps: int = 2000
    batch_size: int = 8
    length: int = 288
    draft_vocab: int = 16384
    unroll: int = 3
    lr: float = 6e-4
    warmup: int = 50
    held_out: float = 0.05
    evaluate_every: int = 200
    tried: int = 4
    dtype: str = "float32"
    install: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "gather", "steps", "batch_size", "draft_vocab", "unroll", "evaluate_every"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.answers < 2 or not 0 < self.held_out < 1:
            raise BadInputError("Training needs two answers at least, and held_out between 0 and 1.")
        if self.length < 8:
            raise BadInputError(f"Texts of {self.length} tokens are too short to learn from.", "Raise length.")


def check_target(target: PreTrainedModel) -> None:
    """Refuses a model that no feature draft can be trained for.

    Raises:
        UnsupportedModelError: an encoder, no tokens in and out, weights elsewhere, embeddings of another width than
            the states, or no list of blocks.
    """
    check_decoder_only("A feature draft", target.config)
    check_reads_text("A feature draft", target, recurrent=True)
    decoder_parts(target)
    text, head = target.config.get_text_config(decoder=True), target.get_output_embeddings()
    shape = (text.vocab_size, text.hidden_size)
    odd = head is None or tuple(head.weight.shape) != shape
    if odd or tuple(target.get_input_embeddings().weight.shape) != shape or is_offloaded(target):
        raise UnsupportedModelError(
            f"A feature draft computes with its target's embeddings and head as {shape[0]} rows of {shape[1]}; this "
            f"{type(target).__name__} has others, or keeps them elsewhere.",
            "DySpec drafts from the text alone for it: DySpec('text').",
        )


def run(config: DraftTraining, context: TrainingContext) -> TrainingResult:
    """The whole of it; what is in the output folder already is not made again."""
    from ..core.loading import load_model, load_tokenizer

    prompts = None if context.data is None else read_prompts(context.data)
    context.report("loading the model", 0, 0)
    tokenizer = load_tokenizer(context.model)
    target = load_model(context.model, dtype=config.dtype, packed=True)
    check_target(target)
    context.out.mkdir(parents=True, exist_ok=True)
    rows = collect_answers(
        target,
        tokenizer,
        prompts,
        config.answers,
        config.gather,
        config.max_new_tokens,
        config.seed,
        context.out / "answers.jsonl",
        _key(target, prompts, config.max_new_tokens, config.gather, config.seed),
        context.report,
    )
    kept = [row for row in rows if len(row.ids) > row.prompt + 1]
    if len(kept) < 2:
        raise BadInputError("The model ends its answers at once: there is nothing to learn.", "Use other prompts.")
    learner = Learner(config, context, target, kept)
    learner.learn()
    learner.tap.remove()
    draft_folder = context.out
    figures = learner.figures | measure(config, context, target, tokenizer, draft_folder, learner.held)
    notes = list(learner.notes)
    if config.install:
        place = install(draft_folder, trained_draft_folder(target))
        notes.append(f"DySpec() finds this draft for this model ({place}).")
    notes.append(f"By name: DySpec({str(draft_folder)!r})")
    return TrainingResult(figures, [draft_folder / name for name in FILES] + [context.out / "answers.jsonl"], notes)


FILES = ("model.safetensors", "config.json", "training.json")


def _key(target: PreTrainedModel, *settings: Any) -> str:
    """Of what the answers depend on."""
    text = json.dumps([trained_draft_folder(target).name, *settings])
    return hashlib.sha256(text.encode()).hexdigest()


class Learner:
    """Distils a draft, with checkpoints.

    Attributes:
        held: texts that nothing is learned from.
        figures: of the best weights.
    """

    def __init__(self, config: DraftTraining, context: TrainingContext, target: PreTrainedModel, rows: list[Row]):
        self.config, self.context, self.target = config, context, target
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        share = min(max(1, round(config.held_out * len(rows))), 64, len(rows) - 1)
        self.held, self.rows = [rows[place] for place in order[:share]], [rows[place] for place in order[share:]]
        counts = torch.zeros(target.config.get_text_config().vocab_size, dtype=torch.long)
        for row in self.rows:
            counts += torch.bincount(torch.tensor(row.ids[row.prompt :]), minlength=len(counts))
        frequent = counts.argsort(descending=True, stable=True)[: config.draft_vocab].sort().values
        self.coverage = float(counts[frequent].sum() / counts.sum())
        self.tokens = int(counts.sum())
        torch.manual_seed(config.seed)
        self.draft = new_draft(target, frequent.to(target.device))
        self.tap = FeatureTap(target, feature_layers(target.config))
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
        self.checkpoint = context.out / "checkpoint"
        self.step, self.best = 0, -1.0
        self.curve: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.notes: list[str] = []
        sizes = [config.batch_size, config.length, config.draft_vocab, config.unroll, config.held_out, config.lr]
        texts = hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()
        self.key = _key(target, *sizes, config.seed, texts)

    def learn(self) -> None:
        """All steps that are not done yet."""
        config = self.config
        self._resume()
        while self.step < config.steps:
            torch.manual_seed(config.seed * 1_000_003 + self.step)  # a step depends on its number alone
            progress = self.step / config.steps
            falling = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (self.step + 1) / max(config.warmup, 1)) * falling
            batch = collate(
                self._batch(self.step), self.target, self.tap, self.draft.draft_token_ids.long(), config.length
            )
            with self._fast():
                loss, _ = distil(self.draft, batch, config.unroll)
            if isinstance(loss, torch.Tensor) and bool(torch.isfinite(loss)):
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.step % config.evaluate_every == 0 or self.step == config.steps:
                self._evaluate()
                self._save_checkpoint()
            shown = f", agrees in {self.curve[-1]['agreement'][0]:.0%}" if self.curve else ""
            self.context.report(f"the draft learns{shown}", self.step, config.steps)

    def _batch(self, step: int) -> list[Row]:
        """The texts of a step: every epoch in another order, neighbours in length together."""
        size = min(self.config.batch_size, len(self.rows))
        count = len(self.rows) // size
        epoch, place = divmod(step, count)
        generator = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()[: count * size]
        by_length = sorted(order, key=lambda item: (len(self.rows[item].ids), item))
        chosen = int(torch.randperm(count, generator=generator)[place])
        return [self.rows[item] for item in by_length[chosen * size : (chosen + 1) * size]]

    @contextlib.contextmanager
    def _fast(self) -> Iterator[None]:
        """bfloat16 where the processor multiplies it faster."""
        kind = self.target.device.type
        quick = kind == "cuda" or (kind == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
        with torch.autocast(kind, torch.bfloat16, enabled=quick):
            yield

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Agreement on held-out texts by predictions in a row; the best weights so far are saved."""
        self.draft.eval()
        sums, weight = torch.zeros(self.config.unroll), 0
        for first in range(0, len(self.held), self.config.batch_size):
            rows = self.held[first : first + self.config.batch_size]
            batch = collate(rows, self.target, self.tap, self.draft.draft_token_ids.long(), self.config.length)
            with self._fast():
                _, shares = distil(self.draft, batch, self.config.unroll)
            sums += torch.stack(shares).cpu() * len(batch.teacher)
            weight += len(batch.teacher)
        self.draft.train()
        agreement = (sums / max(weight, 1)).tolist()
        self.curve.append({"step": self.step, "agreement": agreement})
        if sum(agreement) > self.best:
            self.best = sum(agreement)
            self.figures = {f"agreement, prediction {place}": share for place, share in enumerate(agreement, 1)}
            self._save(self.context.out)

    def _save(self, folder: Path) -> None:
        """Weights as float16, configuration, and a record of the training."""
        tensors = {name: value.half().contiguous() for name, value in self.draft.state_dict().items()}
        tensors["draft_token_ids"] = self.draft.draft_token_ids
        write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        self.draft.config.save_pretrained(folder)
        record = {
            "target": self.context.model or "embedded",
            "tokens": self.tokens,
            "rows": len(self.rows),
            "head_tokens": self.draft.config.draft_vocab_size,
            "head_coverage": self.coverage,
            "settings": asdict(self.config),
            "held_out_agreement": self.curve[-1]["agreement"],
            "curve": self.curve,
        }
        text = json.dumps(record, indent=1) + "\n"
        write_text_whole(folder / "training.json", text)

    # -- going on ------------------------------------------------------------------------------------------------------
    def _save_checkpoint(self) -> None:
        """Everything that the next step needs, in one file: it is whole or not there."""
        tensors = {f"draft.{name}": value.contiguous() for name, value in self.draft.state_dict().items()}
        for place, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": value.contiguous() for name, value in entry.items()}
        state = {"key": self.key, "step": self.step, "best": self.best, "curve": self.curve, "figures": self.figures}
        words = {"state": json.dumps(state)}
        write_whole(self.checkpoint / "checkpoint.safetensors", lambda path: save_file(tensors, path, metadata=words))

    def _resume(self) -> None:
        """From the checkpoint of the same texts and settings, where there is one."""
        from safetensors import safe_open

        path = self.checkpoint / "checkpoint.safetensors"
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                state = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise BadInputError(f"{path} cannot be read: {error}", "Delete it; training begins anew.") from error
        if state.get("key") != self.key:
            self.notes.append(f"{path} belongs to other settings; training began anew.")
            return
        draft = {name.removeprefix("draft."): value for name, value in tensors.items() if name.startswith("draft.")}
        self.draft.load_state_dict(draft)
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, place, field = name.split(".", 2)
                entries.setdefault(int(place), {})[field] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": entries})
        self.step, self.best, self.curve = state["step"], state["best"], state["curve"]
        self.figures = state["figures"]
        self.notes.append(f"Went on from step {self.step}.")


def install(folder: Path, place: Path) -> Path:
    """Copies a draft to where DySpec looks; the weights come last, because they are what is looked for.

    Raises:
        CacheError: the cache cannot be written.
    """
    try:
        for name in reversed(FILES):
            write_whole(place / name, functools.partial(shutil.copyfile, folder / name))
    except OSError as error:
        raise CacheError(
            f"The draft cannot be put into {place}: {error.strerror or error}.",
            f"Set EVERYTOKEN_CACHE to a folder that can be written; the draft itself is whole in {folder}.",
        ) from error
    return place


def measure(
    config: DraftTraining,
    context: TrainingContext,
    target: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    held: list[Row],
) -> dict[str, float]:
    """What the draft is worth on held-out prompts, greedily: counted, not timed."""
    from .dyspec import DySpec

    draft: FeatureDraftForCausalLM = load_draft(target, folder)
    figures: dict[str, float] = {}
    for name, decoder in {
        "draft": DySpec(draft, text_nodes=False),
        "draft and text": DySpec(draft),
        "text alone": DySpec("text"),
    }.items():
        tokens = forwards = accepted = proposed = 0
        for place, row in enumerate(held[: config.tried]):
            context.report(f"trying {name}", place + 1, min(config.tried, len(held)))
            ids = torch.tensor([row.ids[: row.prompt]], device=target.device)
            target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(config.max_new_tokens, 64),
                do_sample=False,
                custom_generate=decoder,
            )
            tokens, forwards = tokens + decoder.stats.new_tokens, forwards + decoder.stats.target_forwards
            accepted, proposed = accepted + decoder.stats.accepted, proposed + decoder.stats.proposed
        figures[f"tokens a forward, {name}"] = tokens / max(forwards, 1)
        figures[f"share accepted, {name}"] = accepted / max(proposed, 1)
    return figures


TRAINING = Training(
    name="dyspec",
    summary="a feature draft learns what the model itself would write, and is kept where DySpec finds it",
    config=DraftTraining,
    run=run,
)
