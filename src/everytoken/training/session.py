"""What all trainings share: models, held-out rows, progress, checkpoints, and what is written at the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core.errors import BadInputError
from ..core.progress import Report
from .base import TrainingContext, TrainingResult
from .checkpoints import newest_whole
from .config import TrainConfig
from .datasets.messages import message_text, row_prompt_ids
from .distributed import in_shards, load_unplaced, process_state, save_whole
from .quiet import ReportSteps, without_printer
from .report import training_report

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, Trainer

    from ..core.trace import TokenTrace

Prompt = str | list[dict[str, Any]]
"""As TRL has it: text, or a list of messages."""
Row = Mapping[str, Any]
"""A row with a ``prompt``, and ``tools`` and ``chat_template_kwargs`` where the data have them."""


class TrainingSession:
    """Model, reference, held-out rows, texts before, and what is written at the end.

    Args:
        config: the training's settings.
        context: model, data, folder, report.
        name: the method's, for the progress bar and the files.
        metrics: the logged metrics that become curves -> the label under which the progress bar shows them, or "" to
            leave them out there.
    """

    def __init__(self, config: TrainConfig, context: TrainingContext, name: str, metrics: Mapping[str, str]):
        from ..core.rng import seed_everything

        self.config, self.context, self.name, self.metrics = config, context, name, metrics
        self.state = process_state()
        self.main = self.state.is_main_process
        # whether this process runs the model for the report: all do where it lies in shards
        self.reads = self.main or in_shards()
        self.checkpoints = context.out / "checkpoints"
        context.report("loading the model", 0, 0)
        self.policy, self.tokenizer = self.read()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.reference = None if config.lora_r else self.load().requires_grad_(False)
        self.notes: list[str] = []
        seed_everything(config.seed)

    def load(self) -> Any:
        """The model anew."""
        return load_unplaced(self.context.model, dtype=getattr(torch, self.config.dtype))

    def read(self) -> tuple[Any, Any]:
        """The model, and its tokenizer."""
        from ..core.loading import load_tokenizer

        tokenizer = load_tokenizer(self.context.model)
        return self.load(), tokenizer

    @property
    def adapter(self) -> LoraConfig | None:
        """What ``lora_r`` asks for."""
        if not self.config.lora_r:
            return None
        from peft import LoraConfig

        return LoraConfig(r=self.config.lora_r, lora_alpha=2 * self.config.lora_r, target_modules="all-linear")

    def split(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        """Training and held-out rows."""
        if len(rows) < 2:
            raise BadInputError(
                f"The data holds {len(rows)} row; training needs two at least.", "One of them is held out."
            )
        held = min(max(1, round(len(rows) * self.config.eval_share)), len(rows) - 1)
        parts = rows.train_test_split(test_size=held, seed=self.config.seed)
        return parts["train"], parts["test"]

    def sampled(self, held: Dataset) -> list[Row]:
        """The held-out rows whose prompts are answered for the report; none where rows have no prompt."""
        if "prompt" not in held.column_names:
            return []
        return list(held.select(range(min(self.config.samples, len(held)))))

    def write_texts(self, model: PreTrainedModel, rows: Sequence[Row]) -> list[str]:
        """Greedy answers to the rows' prompts, with their tools, by the processes that read."""
        if not self.reads:
            return []
        texts = []
        model.eval()
        for row in rows:
            ids = row_prompt_ids(self.tokenizer, row)
            with torch.no_grad():
                output = model.generate(
                    torch.tensor([ids], device=model.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
                    max_new_tokens=self.config.sample_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            texts.append(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        return texts

    def train(self, trainer: Trainer) -> None:
        """Trains with progress, from the last whole checkpoint where there is one; an interruption leaves a checkpoint
        behind.
        """
        without_printer(trainer).add_callback(ShowMetrics(self.context.report, f"training {self.name}", self.metrics))
        last, skipped = newest_whole(self.checkpoints, trainer.checkpoint_files) if self.config.resume else (None, [])
        self.notes += skipped
        if last is not None:
            self.notes.append(f"Went on from {last}.")
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except KeyboardInterrupt:
            if trainer.state.global_step and self.config.save_steps:
                trainer._save_checkpoint(trainer.model, None)
            raise

    def finish(
        self,
        trainer: Trainer,
        figures: dict[str, float],
        rows: Sequence[Row],
        before: list[str],
        traces: Sequence[TokenTrace],
        column: str | None,
        pictures: Mapping[str, str] | None = None,
    ) -> TrainingResult:
        """Saves the model, writes ``training.json`` and ``report.html``.

        Args:
            trainer: after training.
            figures: the final evaluation.
            rows: whose prompts were answered before and are answered again.
            before: those answers.
            traces: credit of fixed examples.
            column: the score of the traces that the report shows first.
            pictures: title -> HTML, as for ``training_report``.
        """
        out = self.context.out
        save_whole(trainer, out / "model")
        if self.main:
            name_base(out / "model", self.context.model)
        after = self.write_texts(trainer.accelerator.unwrap_model(trainer.model), rows)
        files: list[Path] = []
        if self.main:
            self.tokenizer.save_pretrained(out / "model")
            history = trainer.state.log_history
            curves = {
                name: [
                    (entry["step"], entry[name])
                    for entry in history
                    if name in entry and isinstance(entry[name], (int, float))
                ]
                for name in self.metrics
            }
            curves = {name: points for name, points in curves.items() if points}
            settings = dataclasses.asdict(self.config)
            samples = [(shown(row["prompt"]), a, b) for row, a, b in zip(rows, before, after, strict=False)]
            report = training_report(
                out / "report.html",
                f"{self.name}: {self.context.model or 'embedded model'}",
                figures,
                curves,
                samples,
                traces,
                column,
                settings,
                pictures,
            )
            record = out / "training.json"
            record.write_text(
                json.dumps({"method": self.name, "figures": figures, "curves": curves, "settings": settings}, indent=1)
                + "\n",
                encoding="utf-8",
            )
            files = [out / "model", record, report]
            if not self.config.save_steps and self.checkpoints.is_dir():
                shutil.rmtree(self.checkpoints)
        self.state.wait_for_everyone()
        return TrainingResult(figures, files, [*self.notes, f"Look at {out / 'report.html'}."])


def name_base(folder: Path, model: str | None) -> None:
    """Has a saved adapter name its base model as the user did: where it lay on this machine says nothing elsewhere.

    Args:
        folder: of the adapter; whole models are left as they are.
        model: as for ``load_model``.
    """
    from ..core.converted import EMBEDDED

    file = folder / "adapter_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = model or EMBEDDED
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shown(prompt: Prompt) -> str:
    """A prompt as readers see it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {message_text(m)}" for m in prompt)


class ShowMetrics(ReportSteps):
    """The labelled metrics behind the stage on the progress bar."""

    def __init__(self, report: Report, stage: str, metrics: Mapping[str, str]):
        super().__init__(report, stage)
        self.metrics = metrics

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logged = logs or {}
        shown = [
            f"{label} {logged[key]:.3g}"
            for key, label in self.metrics.items()
            if label and isinstance(logged.get(key), (int, float))
        ]
        if shown:
            self.stage = ", ".join([self.stage.split(",")[0], *shown])
            self.report(self.stage, state.global_step, state.max_steps)
