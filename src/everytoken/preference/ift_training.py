"""IFT from the command line: ``everytoken train ift`` on demonstrations, and ``everytoken try ift`` beside supervised
tuning.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError
from ..core.quiet import quiet_training
from ..core.scoring import base_model
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest, TrialResult
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.config import TrainConfig, derive_config
from ..training.datasets.make_dataset import pairs_or_example
from ..training.datasets.messages import plain_messages, prompts_as_messages
from ..training.datasets.pairs import check_value, read_rows
from ..training.quiet import quiet_arguments, without_printer
from ..training.session import TrainingSession
from ..training.trial import TrialWork
from .ift import IFTSettings, IFTTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

METRICS = {"loss": "loss", "nll": "nll", "entropy": ""}
IFTTraining = derive_config("IFTTraining", TrainConfig, IFTSettings)


KINDS = (("prompt", "completion"), ("messages",), ("text",))
RENDERED = ("tools", "chat_template_kwargs")
"""What the chat template renders besides the messages."""


def demonstrations(path: str | Path) -> Dataset:
    """Rows with ``prompt`` and ``completion``, ``messages`` or ``text``; pairs give their chosen side.

    Messages may be tool calls without content, or hold their text as parts; a text prompt may stand beside messages.
    The rows' ``tools`` and ``chat_template_kwargs`` are kept.

    Raises:
        BadInputError: nothing there, or a bad row, which it names.
    """
    from datasets import Dataset

    rows = read_rows(path)
    if "chosen" in rows[0] and "completion" not in rows[0]:
        rows = [row | {"completion": row.get("chosen")} for row in rows]
    kind = next((keys for keys in KINDS if set(keys) <= set(rows[0])), None)
    if kind is None:
        raise BadInputError(f"{path} needs prompt and completion, messages, or text; row 0 has {', '.join(rows[0])}.")
    made = [_demonstration(row, kind, f"{path}, row {index}") for index, row in enumerate(rows)]
    # arguments of tool calls differ in their keys: one table of all keys would add empty ones to each
    return prompts_as_messages(Dataset.from_list(made, on_mixed_types="use_json"), str(path))


def _demonstration(row: dict[str, Any], kind: tuple[str, ...], where: str) -> dict[str, Any]:
    """A checked row with its messages as plain text."""
    for key in kind:
        if not row.get(key):
            raise BadInputError(f"{where}: {key!r} is empty or missing.", "Remove or mend that row.")
        check_value(row[key], f"{where}: {key!r}")
    texts = [isinstance(row[key], str) for key in kind]
    if kind in (("messages",), ("text",)) and texts != [kind == ("text",)]:
        raise BadInputError(f"{where}: {kind[0]!r} must be {'text' if kind == ('text',) else 'a list of messages'}.")
    if texts == [False, True]:
        raise BadInputError(f"{where}: the completion is text and the prompt messages.", "Make a message of the text.")
    try:
        values = {key: row[key] if isinstance(row[key], str) else plain_messages(row[key]) for key in kind}
    except BadInputError as error:
        raise BadInputError(f"{where}: {error.message}", error.hint) from error
    return values | {name: row[name] for name in RENDERED if row.get(name)}


@quiet_training()
def train_ift(config: TrainConfig, context: TrainingContext) -> TrainingResult:
    from trl import SFTConfig

    if context.data is not None:
        rows = demonstrations(context.data)
    else:
        pairs = pairs_or_example(context)
        rows = pairs.map(
            lambda row: {"completion": row["chosen"]}, remove_columns=[n for n in pairs.column_names if n != "prompt"]
        )
    session = TrainingSession(config, context, "ift", METRICS)
    train, held = session.split(rows)
    answered = session.sampled(held)
    before = session.write_texts(session.policy, answered)
    args = SFTConfig(**config.arguments(session.checkpoints), max_length=config.max_length)
    trainer = IFTTrainer(
        session.policy, ift=config.part(IFTSettings), args=args, train_dataset=train, eval_dataset=held,
        processing_class=session.tokenizer, peft_config=session.adapter,
    )  # fmt: skip
    session.train(trainer)
    context.report("evaluating", 0, 0)
    measured = trainer.evaluate()
    figures = {key.removeprefix("eval_"): float(measured[key]) for key in ("eval_loss", "eval_nll") if key in measured}
    traces = []
    if session.reads:
        for index in range(min(config.samples, len(trainer.eval_dataset))):
            traces.append(
                demonstration_trace(trainer, session.tokenizer, trainer.eval_dataset[index], f"held-out row {index}")
            )
    return session.finish(trainer, figures, answered, before, traces, "weight")


@torch.no_grad()
def demonstration_trace(
    trainer: IFTTrainer, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], title: str
) -> TokenTrace:
    """IFT's view of a tokenized demonstration (``input_ids``, ``labels``): loss, relation weight and prediction of
    every target.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    base = base_model(model)
    ids = torch.tensor([list(row["input_ids"])], device=base.device)
    labels = torch.tensor([list(row["labels"])], device=base.device)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    found = trainer.token_losses(base, inputs)
    losses, weights, predicted, kept = found.losses, found.weights, found.predicted, found.mask[0]
    trace = TokenTrace(ids[0, 1:][kept].tolist(), title=title, station="preference")
    trace.add("weight", weights[0][kept]).add("loss", losses[0][kept])
    trace.add("prediction", tokenizer.batch_decode(predicted[0, 1:][kept][:, None]))
    return trace.with_text(tokenizer)


@quiet_training()
def trial(request: TrialRequest) -> TrialResult:
    """IFT and supervised tuning on the chosen sides: losses of the demonstrations afterwards, and of the model's own
    continuations of them.
    """
    from datasets import Dataset
    from trl import SFTConfig

    from ..core.rng import seed_everything

    work = TrialWork(request)
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in work.pairs])
    result = TrialResult({}, "loss on own predictions", column="weight")
    for name, settings in work.arms("SFT", IFTSettings, {"residual": 0.0, "gamma": 0.0}).items():
        work.report(f"{name}: {work.steps} steps on {len(rows)} demonstrations", 0, work.steps)
        seed_everything(work.seed)
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(**quiet_arguments(
                folder, per_device_train_batch_size=work.batch_size, max_steps=work.steps, learning_rate=work.lr,
                lr_scheduler_type="constant",
            ))  # fmt: skip
            trainer = IFTTrainer(
                work.load(), ift=settings, args=args, train_dataset=rows, processing_class=work.tokenizer
            )
            without_printer(trainer)
            began = time.perf_counter()
            trainer.train()
            found: dict[str, float] = {"seconds": time.perf_counter() - began}
            for label, residual in (("loss", 0.0), ("loss on own predictions", 0.2)):
                trainer.ift = IFTSettings(residual=residual, gamma=0.0, reduction="token")
                found[label] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
            trainer.ift = settings
            if name != "SFT":
                for index in range(min(2, len(rows))):
                    title = f"{name}: {work.pairs[index]['prompt']}"
                    result.traces.append(
                        demonstration_trace(trainer, work.tokenizer, trainer.train_dataset[index], title)
                    )
        result.rows[name] = {key: found[key] for key in ("loss on own predictions", "loss", "seconds")}
    return result


TRAINING = Training("ift", "a model on demonstrations with IFT", IFTTraining, train_ift, ("train", "trl"))
