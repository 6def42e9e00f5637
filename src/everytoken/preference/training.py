"""``everytoken train`` for this station: one way to train, whatever the loss.

Every method takes a typed configuration (``PreferenceTraining`` and what its loss adds), trains with checkpoints, evaluates on held-out
rows, and writes ``model/``, ``training.json`` and ``report.html`` (curves, texts before and after, credit token by token). Run it again
with the same folder and it goes on from the last checkpoint. Under ``accelerate launch`` the first process writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError
from ..core.loading import quiet_training
from ..core.settings import load_function
from ..reinforcement.rto import RTOConfig, RTOSettings, RTOTrainer
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.distributed import load_unplaced, process_state
from ..training.session import Session
from .configs import (
    CDPOTraining,
    IFTTraining,
    PreferenceTraining,
    RTOTraining,
    TDPOTraining,
    TGDPOTraining,
    TREGTraining,
    part,
)
from .guides import GuideSettings, annotators_for
from .ift import IFTSettings, IFTTrainer


def _pairs(context: TrainingContext) -> Any:
    """The user's pairs, or sentiment pairs of the model's own."""
    from .data import load_pairs

    with process_state().main_process_first():  # what it makes or reads, the others find in the cache
        if context.data is not None:
            return load_pairs(context.data)
        from ..training.datasets.make_dataset import SentimentData, build

        built = build("sentiment", SentimentData(count=64), context.model, context.report)
        return load_pairs(built.folder / "train.jsonl")


def train_on_pairs(name: str) -> Callable[[PreferenceTraining, TrainingContext], TrainingResult]:
    @quiet_training()
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
        before = session.write_texts(session.policy, prompts)
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
        traces = _pair_traces(session, trainer, loss, trainer.eval_dataset)
        return session.finish(trainer, figures, prompts, before, traces, "implicit_reward")

    return run


def _pair_traces(session: Session, trainer: Any, loss: Any, rows: Any) -> list[Any]:
    """Credit of the first held-out pairs, chosen and rejected in turn."""
    if not session.reads:
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


@quiet_training()
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
    before = session.write_texts(session.policy, prompts)
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
    if session.reads:
        for index in range(min(config.samples, len(trainer.eval_dataset))):
            traces.append(
                demonstration_trace(trainer, session.tokenizer, trainer.eval_dataset[index], f"held-out row {index}")
            )
    return session.finish(trainer, figures, prompts, before, traces, "weight")


@quiet_training()
def train_rto(config: RTOTraining, context: TrainingContext) -> TrainingResult:
    from datasets import Dataset

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
    before = session.write_texts(session.policy, held_prompts)
    dpo = None
    if settings.dpo_reward_scale:
        if config.dpo is not None:
            dpo = load_unplaced(config.dpo)
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
    if session.reads:
        final = trainer.accelerator.unwrap_model(trainer.model).eval()
        for prompt, text in zip(held_prompts, session.write_texts(final, held_prompts), strict=False):
            if text:
                traces.append(rollout_trace(final, session.reference, dpo, session.tokenizer, prompt, text, settings))
    return session.finish(trainer, figures, held_prompts, before, traces, "token_reward")


def _sentiment_reward() -> Callable[..., list[float]]:
    from ..training.datasets.sentiment import positivity

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
