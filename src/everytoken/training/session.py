"""What all trainings of this station share: models, held-out rows, progress, checkpoints, and what is written at the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInputError
from ..core.scoring import prompt_ids
from ..preference.configs import Common
from ..preference.guides import Progress, without_printer
from .base import TrainingContext, TrainingResult
from .distributed import in_shards, load_unplaced, process_state, save_whole
from .report import training_report

KEPT_METRICS = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "kl/chosen",
    "nll",
    "reward",
    "rto/kl",
    "rto/dpo_reward",
    "entropy",
)


class Session:
    """Model, reference, held-out rows, texts before, and what is written at the end."""

    def __init__(self, config: Common, context: TrainingContext, name: str):
        from ..core.loading import load_tokenizer
        from ..core.rng import seed_everything

        self.config, self.context, self.name = config, context, name
        self.state = process_state()
        self.main = self.state.is_main_process
        # whether this process runs the model for the report: all do where it lies in shards
        self.reads = self.main or in_shards()
        self.checkpoints = context.out / "checkpoints"
        context.report("loading the model", 0, 0)
        self.tokenizer = load_tokenizer(context.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        dtype = getattr(torch, config.dtype)
        self.load: Callable[[], Any] = lambda: load_unplaced(context.model, dtype=dtype)
        self.policy = self.load()
        self.reference = None if config.lora_r else self.load().requires_grad_(False)
        self.notes: list[str] = []
        seed_everything(config.seed)

    @property
    def adapter(self) -> Any:
        if not self.config.lora_r:
            return None
        from peft import LoraConfig

        return LoraConfig(r=self.config.lora_r, lora_alpha=2 * self.config.lora_r, target_modules="all-linear")

    def split(self, rows: Any) -> tuple[Any, Any]:
        """Training and held-out rows."""
        if len(rows) < 2:
            raise BadInputError(
                f"The data holds {len(rows)} row; training needs two at least.", "One of them is held out."
            )
        held = min(max(1, round(len(rows) * self.config.eval_share)), len(rows) - 1)
        parts = rows.train_test_split(test_size=held, seed=self.config.seed)
        return parts["train"], parts["test"]

    def write_texts(self, model: Any, prompts: list[Any]) -> list[str]:
        """Greedy continuations, by the processes that read."""
        if not self.reads:
            return []
        texts = []
        model.eval()
        for prompt in prompts[: self.config.samples]:
            ids = prompt_ids(self.tokenizer, prompt)
            with torch.no_grad():
                output = model.generate(
                    torch.tensor([ids], device=model.device), attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
                    max_new_tokens=self.config.sample_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
                )  # fmt: skip
            texts.append(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        return texts

    def train(self, trainer: Any) -> None:
        """Trains with progress, from the last checkpoint where there is one; an interruption leaves a checkpoint behind."""
        from transformers.trainer_utils import get_last_checkpoint

        without_printer(trainer).add_callback(Watch(self.context.report, f"training {self.name}"))
        last = get_last_checkpoint(str(self.checkpoints)) if self.config.resume and self.checkpoints.is_dir() else None
        if last is not None:
            self.notes.append(f"Went on from {last}.")
        try:
            trainer.train(resume_from_checkpoint=last)
        except KeyboardInterrupt:
            if trainer.state.global_step and self.config.save_steps:
                trainer._save_checkpoint(trainer.model, None)
            raise

    def finish(
        self,
        trainer: Any,
        figures: dict[str, float],
        prompts: list[Any],
        before: list[str],
        traces: list[Any],
        column: str | None,
    ) -> TrainingResult:
        """Saves the model, writes ``training.json`` and ``report.html``."""
        out = self.context.out
        save_whole(trainer, out / "model")
        after = self.write_texts(trainer.accelerator.unwrap_model(trainer.model), prompts)
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
                for name in KEPT_METRICS
            }
            curves = {name: points for name, points in curves.items() if points}
            settings = dataclasses.asdict(self.config)
            samples = [(_shown(prompt), a, b) for prompt, a, b in zip(prompts, before, after, strict=False)]
            report = training_report(
                out / "report.html",
                f"{self.name}: {self.context.model or 'embedded model'}",
                figures,
                curves,
                samples,
                traces,
                column,
                settings,
            )
            record = out / "training.json"
            record.write_text(
                json.dumps({"method": self.name, "figures": figures, "curves": curves, "settings": settings}, indent=1)
                + "\n"
            )
            files = [out / "model", record, report]
            if not self.config.save_steps and self.checkpoints.is_dir():
                shutil.rmtree(self.checkpoints)
        self.state.wait_for_everyone()
        return TrainingResult(figures, files, [*self.notes, f"Look at {out / 'report.html'}."])


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


class Watch(Progress):
    """Step, loss, margin and KL on the progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = [
            f"{label} {logs[key]:.3g}"
            for label, key in (
                ("loss", "loss"), ("margin", "rewards/margins"), ("reward", "reward"), ("KL", "kl/chosen"), ("KL", "rto/kl"), ("nll", "nll"),
            )
            if isinstance((logs or {}).get(key), (int, float))
        ]  # fmt: skip
        if shown:
            self.stage = ", ".join([self.stage.split(",")[0], *shown])
            self.report(self.stage, state.global_step, state.max_steps)
