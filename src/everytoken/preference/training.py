"""``everytoken train`` for this station: one way to train, whatever the loss.

Every method takes a typed configuration (``PreferenceTraining`` and what its loss adds), trains with checkpoints, evaluates on held-out
rows, and writes ``model/``, ``training.json`` and ``report.html`` (curves, texts before and after, credit token by token). Run it again
with the same folder and it goes on from the last checkpoint. Under ``accelerate launch`` the first process writes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError
from ..core.report import training_report
from ..core.scoring import prompt_ids
from ..core.training import Training, TrainingContext, TrainingResult
from ..core.trials import load_function
from .cdpo import CDPOLoss
from .dpo import DPOLoss
from .guides import GuideSettings, Progress, annotators_for
from .ift import IFTSettings, IFTTrainer
from .rto import RTOConfig, RTOSettings, RTOTrainer
from .t_reg import TREGLoss
from .tdpo import TDPOLoss
from .tgdpo import TGDPOLoss

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


# -- configurations ------------------------------------------------------------------------------------------------------
@dataclass
class Common:
    """What every training of this station is told.

    Args:
        steps: optimiser steps; 0 trains ``epochs`` instead.
        epochs: passes over the data.
        batch_size: rows (pairs, rollouts) a step and process; ``accumulation`` multiplies it.
        lr, warmup: peak learning rate (cosine decay), share of the steps that warm up.
        lora_r: rank of an adapter on all linear layers; 0 trains all weights.
        dtype: of the weights: float32 or bfloat16; ``bf16`` trains float32 weights under autocast.
        gradient_checkpointing: recompute activations in the backward pass.
        max_length: tokens of prompt and response; longer rows lose their end.
        eval_share: share of the rows that is held out (at least one).
        save_steps: a checkpoint every so many steps; 0 for none but the last.
        log_steps: a point of the curves every so many steps.
        samples, sample_tokens: texts before and after, and their length.
        seed: of everything.
        resume: go on from the last checkpoint in the folder.
    """

    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 5e-6
    warmup: float = 0.1
    lora_r: int = 0
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_length: int = 1024
    eval_share: float = 0.1
    save_steps: int = 0
    log_steps: int = 1
    samples: int = 3
    sample_tokens: int = 32
    seed: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_steps", "max_length"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("steps", "save_steps", "samples", "lora_r"):
            if getattr(self, name) < 0:
                raise BadInputError(f"{name} must not be negative; got {getattr(self, name)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise BadInputError(f"Unknown dtype {self.dtype!r}.", "Use float32 or bfloat16.")
        if not 0 < self.eval_share < 1:
            raise BadInputError(f"eval_share lies between 0 and 1; got {self.eval_share}.")

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Arguments of any transformers trainer."""
        return dict(
            output_dir=str(folder),
            report_to=[],
            logging_steps=self.log_steps,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 1,
            save_total_limit=2,
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            disable_tqdm=True,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            max_steps=self.steps or -1,
            num_train_epochs=self.epochs,
            learning_rate=self.lr,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,  # a share, where it is below 1
            seed=self.seed,
            data_seed=self.seed,
        )


@dataclass
class PreferenceTraining(Common):
    """Training on pairs.

    Args:
        beta: strength of the pull towards the reference.
        precompute_reference: score the reference once, before training, and do not hold it (not with losses that need its distributions).
        monitor_kl: log the KL to the reference on the pairs.
    """

    beta: float = 0.1
    precompute_reference: bool = False
    monitor_kl: bool = True
    loss_class: ClassVar[type] = DPOLoss

    def loss(self) -> Any:
        """The loss with the settings of its name."""
        names = {item.name for item in dataclasses.fields(self.loss_class)}
        return self.loss_class(**{name: value for name, value in vars(self).items() if name in names})

    def guide_settings(self) -> GuideSettings:
        names = {item.name for item in dataclasses.fields(GuideSettings)}
        values = {name: value for name, value in vars(self).items() if name in names - {"steps", "lr"}}
        extra = {"steps": getattr(self, "guide_steps", 50), "lr": getattr(self, "guide_lr", self.lr)}
        return GuideSettings(**values | extra)


@dataclass
class TDPOTraining(PreferenceTraining):
    """TDPO on pairs; with alpha 0, DPO.

    Args:
        alpha, variant: see ``TDPOLoss``.
    """

    alpha: float = 0.5
    variant: str = "tdpo2"
    loss_class: ClassVar[type] = TDPOLoss


@dataclass
class TGDPOTraining(PreferenceTraining):
    """TGDPO on pairs.

    Args:
        alpha, clamp: see ``TGDPOLoss``.
        guide: hub id or folder of a DPO- or SimPO-trained copy; None trains one first, for ``guide_steps`` at ``guide_lr``.
    """

    alpha: float = 0.5
    clamp: float | None = None
    guide: str | None = None
    guide_steps: int = 50
    guide_lr: float = 5e-6
    loss_class: ClassVar[type] = TGDPOLoss


@dataclass
class TREGTraining(PreferenceTraining):
    """T-REG on pairs.

    Args:
        alpha, base, gamma, pair_weight, reduction: see ``TREGLoss``.
        better, worse: the two instructions; None for the module's own.
    """

    alpha: float = 0.25
    base: str = "dpo"
    gamma: float = 0.5
    pair_weight: str = "dpo"
    reduction: str = "sum"
    better: str | None = None
    worse: str | None = None
    loss_class: ClassVar[type] = TREGLoss


@dataclass
class CDPOTraining(PreferenceTraining):
    """cDPO on pairs of correct and incorrect traces.

    Args:
        weight_chosen, label_smoothing: see ``CDPOLoss``.
        positive, negative: hub ids or folders of p+ and p-; None tunes them on chosen and rejected responses, for ``guide_steps`` steps at
            ``tune_lr`` (LoRA of rank ``guide_lora_r``; 0 for all weights).
        contrast: a, how strongly p- is subtracted.
    """

    weight_chosen: bool = False
    label_smoothing: float = 0.0
    positive: str | None = None
    negative: str | None = None
    contrast: float = 1.0
    guide_steps: int = 50
    tune_lr: float = 3e-4
    guide_lora_r: int = 8
    loss_class: ClassVar[type] = CDPOLoss

    def guide_settings(self) -> GuideSettings:
        return dataclasses.replace(super().guide_settings(), lora_r=self.guide_lora_r)


@dataclass
class IFTTraining(Common, IFTSettings):
    """IFT on demonstrations (``prompt`` and ``completion``, ``messages``, or the chosen side of pairs); see ``IFTSettings``."""

    def __post_init__(self) -> None:
        Common.__post_init__(self)
        IFTSettings.__post_init__(self)


@dataclass
class RTOTraining(Common, RTOSettings):
    """RTO on prompts; see ``RTOSettings``.

    Args:
        reward: ``sentiment`` (VADER), or ``module:function`` of TRL's form ``(prompts, completions, **columns) -> list of numbers``.
        dpo: hub id or folder of the DPO-trained model; None trains one first on the data's pairs, for ``guide_steps`` at ``guide_lr``.
        num_generations: rollouts a prompt; ``batch_size`` counts rollouts.
        num_iterations: PPO's passes over a batch of rollouts.
    """

    batch_size: int = 16
    lr: float = 1e-5
    reward: str = "sentiment"
    dpo: str | None = None
    guide_steps: int = 50
    guide_lr: float = 5e-6
    num_generations: int = 8
    num_iterations: int = 1

    def __post_init__(self) -> None:
        Common.__post_init__(self)
        RTOSettings.__post_init__(self)
        if self.batch_size % self.num_generations:
            raise BadInputError(
                f"batch_size={self.batch_size} is no multiple of num_generations={self.num_generations}."
            )


def part(settings: Any, kind: type) -> Any:
    """The settings of ``kind`` that a configuration carries."""
    return kind(**{item.name: getattr(settings, item.name) for item in dataclasses.fields(kind)})


# -- what all trainings share --------------------------------------------------------------------------------------------
class Session:
    """Model, reference, held-out rows, texts before, and what is written at the end."""

    def __init__(self, config: Common, context: TrainingContext, name: str):
        from accelerate import PartialState
        from datasets import disable_progress_bars
        from transformers.utils import logging

        from ..core.loading import load_model, load_tokenizer
        from ..core.rng import seed_everything

        disable_progress_bars()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.config, self.context, self.name = config, context, name
        self.state = PartialState()
        self.main = self.state.is_main_process
        self.checkpoints = context.out / "checkpoints"
        context.report("loading the model", 0, 0)
        self.tokenizer = load_tokenizer(context.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        dtype = getattr(torch, config.dtype)
        self.load: Callable[[], Any] = lambda: load_model(context.model, dtype=dtype)
        self.policy = self.load()
        self.reference = None if config.lora_r else self.load().requires_grad_(False)
        self.notes: list[str] = []
        seed_everything(config.seed)

    @property
    def sharded(self) -> bool:
        """Whether parameters lie in shards (FSDP): models can be trained then, not sampled from one process."""
        return str(self.state.distributed_type).endswith("FSDP")

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
        """Greedy continuations; none under FSDP, whose parameters lie in shards."""
        if not self.config.samples or self.sharded:
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
        from transformers.trainer_callback import PrinterCallback
        from transformers.trainer_utils import get_last_checkpoint

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Watch(self.context.report, f"training {self.name}"))
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
        trainer.save_model(str(out / "model"))
        model = trainer.accelerator.unwrap_model(trainer.model)
        after = self.write_texts(model, prompts) if self.main else []
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


def _pairs(context: TrainingContext) -> Any:
    """The user's pairs, or sentiment pairs of the model's own."""
    from .data import load_pairs

    if context.data is not None:
        return load_pairs(context.data)
    from .build import SentimentData, build

    built = build("sentiment", SentimentData(count=64), context.model, context.report)
    return load_pairs(built.folder / "train.jsonl")


# -- the trainings -------------------------------------------------------------------------------------------------------
def train_on_pairs(name: str) -> Callable[[PreferenceTraining, TrainingContext], TrainingResult]:
    def run(config: PreferenceTraining, context: TrainingContext) -> TrainingResult:
        from trl import DPOConfig

        from .trainer import PreferenceTrainer

        loss = config.loss()
        if config.precompute_reference and (loss.needs or config.monitor_kl):
            if loss.needs:
                raise BadInputError(f"{name} needs the reference's distributions: precompute_reference cannot be used.")
            config = dataclasses.replace(config, monitor_kl=False)
        rows = _pairs(context)
        session = Session(config, context, name)
        train, held = session.split(rows)
        prompts = list(held["prompt"]) if "prompt" in held.column_names else []
        before = session.write_texts(session.policy, prompts) if session.main else []
        args = DPOConfig(
            **config.arguments(session.checkpoints),
            max_length=config.max_length,
            precompute_ref_log_probs=config.precompute_reference,
        )
        columns = tuple(sorted(loss.columns))

        def annotators(tokenized: Any) -> list[Any]:
            return annotators_for(
                columns,
                session.load,
                session.reference,
                session.tokenizer,
                tokenized,
                config.guide_settings(),
                context.report,
            )

        trainer = PreferenceTrainer(
            session.policy, ref_model=session.reference, loss=loss, annotators=annotators, args=args, train_dataset=train,
            eval_dataset=held, processing_class=session.tokenizer, peft_config=session.adapter, monitor_kl=config.monitor_kl,
            report=context.report,
        )  # fmt: skip
        session.train(trainer)
        context.report("evaluating", 0, 0)
        measured = trainer.evaluate()
        kept = {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_kl/chosen", "eval_kl/rejected"}
        figures = {key.removeprefix("eval_"): float(value) for key, value in measured.items() if key in kept}
        traces = _pair_traces(session, trainer, loss, trainer.eval_dataset) if session.main else []
        return session.finish(trainer, figures, prompts, before, traces, "implicit_reward")

    return run


def _pair_traces(session: Session, trainer: Any, loss: Any, rows: Any) -> list[Any]:
    """Credit of the first held-out pairs, chosen and rejected in turn; none under FSDP."""
    if session.sharded:
        return []
    from .traces import pair_traces

    policy = trainer.accelerator.unwrap_model(trainer.model).eval()
    return [
        trace
        for index in range(min(session.config.samples, len(rows)))
        for trace in pair_traces(policy, session.reference, session.tokenizer, rows[index], loss)
    ]


def demonstrations(path: str | Path) -> Any:
    """Rows with ``prompt`` and ``completion``, ``messages`` or ``text``; pairs give their chosen side.

    Raises:
        BadInputError: nothing there, or a row without them, which it names.
    """
    from datasets import Dataset

    from .data import read_rows

    rows = read_rows(path)
    if "chosen" in rows[0] and "completion" not in rows[0]:
        rows = [{"prompt": row.get("prompt"), "completion": row.get("chosen")} for row in rows]
    kinds = [set(keys) for keys in (("prompt", "completion"), ("messages",), ("text",)) if set(keys) <= set(rows[0])]
    if not kinds:
        raise BadInputError(f"{path} needs prompt and completion, messages, or text; row 0 has {', '.join(rows[0])}.")
    for index, row in enumerate(rows):
        for key in kinds[0]:
            if not row.get(key):
                raise BadInputError(f"{path}, row {index}: {key!r} is empty or missing.", "Remove or mend that row.")
    return Dataset.from_list([{key: row[key] for key in kinds[0]} for row in rows])


def train_ift(config: IFTTraining, context: TrainingContext) -> TrainingResult:
    from trl import SFTConfig

    from .traces import demonstration_trace

    if context.data is not None:
        rows = demonstrations(context.data)
    else:
        pairs = _pairs(context)
        rows = pairs.map(
            lambda row: {"completion": row["chosen"]}, remove_columns=[n for n in pairs.column_names if n != "prompt"]
        )
    session = Session(config, context, "ift")
    train, held = session.split(rows)
    prompts = list(held["prompt"]) if "prompt" in held.column_names else []
    before = session.write_texts(session.policy, prompts) if session.main else []
    args = SFTConfig(**config.arguments(session.checkpoints), max_length=config.max_length)
    trainer = IFTTrainer(
        session.policy, ift=part(config, IFTSettings), args=args, train_dataset=train, eval_dataset=held, processing_class=session.tokenizer,
        peft_config=session.adapter,
    )  # fmt: skip
    session.train(trainer)
    context.report("evaluating", 0, 0)
    measured = trainer.evaluate()
    figures = {key.removeprefix("eval_"): float(measured[key]) for key in ("eval_loss", "eval_nll") if key in measured}
    traces = []
    if session.main and not session.sharded:
        for index in range(min(config.samples, len(trainer.eval_dataset))):
            traces.append(
                demonstration_trace(trainer, session.tokenizer, trainer.eval_dataset[index], f"held-out row {index}")
            )
    return session.finish(trainer, figures, prompts, before, traces, "weight")


def train_rto(config: RTOTraining, context: TrainingContext) -> TrainingResult:
    from datasets import Dataset

    from ..core.loading import load_model
    from .data import read_rows
    from .guides import dpo_guide
    from .traces import rollout_trace

    settings = part(config, RTOSettings)
    reward = (
        _sentiment_reward()
        if config.reward == "sentiment"
        else load_function(config.reward, "A reward", "rewards:score")
    )
    pairs = None
    if context.data is None:
        pairs = _pairs(context)
        prompts = list(dict.fromkeys(pairs["prompt"]))
    else:
        found = read_rows(context.data)
        if not all(row.get("prompt") for row in found):
            index = next(index for index, row in enumerate(found) if not row.get("prompt"))
            raise BadInputError(
                f"{context.data}, row {index}: 'prompt' is empty or missing.",
                "RTO writes its own responses to prompts.",
            )
        if "chosen" in found[0]:
            pairs = _pairs(context)
        texts = [row["prompt"] for row in found]
        prompts = list(dict.fromkeys(texts)) if isinstance(texts[0], str) else texts
    if settings.dpo_reward_scale and config.dpo is None and pairs is None:
        raise BadInputError(
            "RTO needs a DPO-trained model.",
            "Give --set dpo=..., data with chosen and rejected (one is trained on them), or --set dpo_reward_scale=0.",
        )
    session = Session(config, context, "rto")
    train, held = session.split(Dataset.from_list([{"prompt": prompt} for prompt in prompts]))
    held_prompts = list(held["prompt"])
    before = session.write_texts(session.policy, held_prompts) if session.main else []
    dpo = None
    if settings.dpo_reward_scale:
        if config.dpo is not None:
            dpo = load_model(config.dpo)
        else:
            guide = GuideSettings(steps=config.guide_steps, lr=config.guide_lr, seed=config.seed, bf16=config.bf16)
            start = session.reference if session.reference is not None else session.load()
            dpo = dpo_guide(session.load, start, session.tokenizer, pairs, guide, context.report)
    args = RTOConfig(
        **config.arguments(session.checkpoints), **dataclasses.asdict(settings), num_generations=config.num_generations,
        num_iterations=config.num_iterations, max_completion_length=config.sample_tokens,
    )  # fmt: skip
    policy = session.load()
    trainer = RTOTrainer(
        policy, reward_funcs=reward, dpo_model=dpo, ref_model=session.reference, args=args, train_dataset=train,
        processing_class=session.tokenizer, peft_config=session.adapter,
    )  # fmt: skip
    session.train(trainer)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    quarter = max(1, len(rewards) // 4)
    figures = {
        "reward, first quarter": sum(rewards[:quarter]) / quarter,
        "reward, last quarter": sum(rewards[-quarter:]) / quarter,
        "KL a response": next(
            (e["rto/kl"] for e in reversed(trainer.state.log_history) if "rto/kl" in e), float("nan")
        ),
        "rollouts": float(
            trainer.state.global_step
            * config.batch_size
            * config.accumulation
            * session.state.num_processes
            / config.num_iterations
        ),
    }
    traces = []
    if session.main:
        final = trainer.accelerator.unwrap_model(trainer.model).eval()
        for prompt, text in zip(held_prompts, session.write_texts(final, held_prompts), strict=False):
            if text:
                traces.append(rollout_trace(final, session.reference, dpo, session.tokenizer, prompt, text, settings))
    return session.finish(trainer, figures, held_prompts, before, traces, "token_reward")


def _sentiment_reward() -> Callable[..., list[float]]:
    from .sentiment import positivity

    def sentiment(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return positivity([(p if isinstance(p, str) else "") + t for p, t in zip(prompts, texts, strict=True)])

    return sentiment


def _training(name: str, summary: str, config: type, run: Any) -> Training:
    return Training(name=name, summary=summary, config=config, run=run, extra=("train", "trl"))


TDPO = _training("tdpo", "a model on preference pairs with TDPO", TDPOTraining, train_on_pairs("tdpo"))
TGDPO = _training(
    "tgdpo", "a model on preference pairs with TGDPO, after its guide", TGDPOTraining, train_on_pairs("tgdpo")
)
TREG = _training("t-reg", "a model on preference pairs with T-REG", TREGTraining, train_on_pairs("t-reg"))
CDPO = _training(
    "cdpo", "a model on correct and incorrect traces with cDPO, after p+ and p-", CDPOTraining, train_on_pairs("cdpo")
)
IFT = _training("ift", "a model on demonstrations with IFT", IFTTraining, train_ift)
RTO = _training("rto", "a model on its own rollouts with token rewards of a DPO model", RTOTraining, train_rto)
