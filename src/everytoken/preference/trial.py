"""Trials of preference methods: each trains a copy of the model for a few steps beside its baseline, on the same rows."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

from ..core.errors import BadInputError, require
from ..core.loading import quiet_training
from ..decoding.trial import Trial, TrialRequest, TrialResult

EXAMPLE = [
    {"prompt": "The hotel was", "chosen": " lovely, quiet and very clean.", "rejected": " awful, loud and very dirty."},
    {
        "prompt": "Our waiter",
        "chosen": " was kind and made us feel welcome.",
        "rejected": " was rude and ruined the evening.",
    },
    {
        "prompt": "The film is",
        "chosen": " a joy from the first scene on.",
        "rejected": " a bore from the first scene on.",
    },
    {"prompt": "In the end, the trip", "chosen": " was the best of my life.", "rejected": " was a waste of my money."},
]


def trial(request: TrialRequest) -> TrialResult:
    """What a few steps of every method do, beside its own baseline: DPO for losses on pairs, SFT for IFT, PPO (or GRPO) for RTO.

    All methods of one trial must share a baseline.
    """
    require("trl", "train", "Trying a preference method")
    from .data import load_pairs

    pairs = load_pairs(request.data).to_list() if request.data is not None else EXAMPLE
    from ..reinforcement.rto import RTOSettings
    from .ift import IFTSettings

    kinds = [
        IFTSettings if item.factory is IFTSettings else RTOSettings if item.factory is RTOSettings else None
        for item in request.trials
    ]
    if len(set(kinds)) > 1:
        names = ", ".join(item.name for item in request.trials)
        raise BadInputError(
            f"{names} have different baselines.", "Compare losses on pairs with each other, and ift and rto alone."
        )
    with quiet_training():
        work = _Work(request, pairs)
        return {IFTSettings: _demonstrations, RTOSettings: _rollouts, None: _pairs}[kinds[0]](work)


class _Work:
    """What all arms share."""

    def __init__(self, request: TrialRequest, pairs: list[dict]):
        from ..core.loading import load_model, load_tokenizer

        self.request, self.pairs, self.stage = request, pairs, ""
        self.steps, self.seed = int(request.options.get("steps", 6)), int(request.options.get("seed", 0))
        self.lr = float(request.options.get("lr", 1e-5))
        request.report("loading the model")
        self.tokenizer = load_tokenizer(request.model)
        self.load = lambda: load_model(
            request.model, dtype="float32"
        )  # anew for each arm, not a copy: trainers patch their models
        self.reference = self.load()

    def arms(self, baseline: str, factory: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Methods by name, the baseline first; settings are checked before any training."""
        items = [Trial(baseline, factory, settings), *self.request.trials]
        return {item.name: item.factory(**item.settings) for item in items}

    def report(self, stage: str, _done: int = 0, _total: int = 0) -> None:
        if stage != self.stage:  # a line a stage, not a line a step
            self.stage = stage
            self.request.report(stage)


def _pairs(work: _Work) -> TrialResult:
    """Margins, divergence and time after a few steps."""
    from ..core.rng import seed_everything
    from .dpo import DPOLoss
    from .guides import GuideSettings, Progress, annotators_for, train_quietly
    from .traces import pair_traces

    settings = GuideSettings(steps=work.steps, lr=work.lr, batch_size=min(4, len(work.pairs)), seed=work.seed)
    result = TrialResult({}, "reward margin", column="implicit_reward")

    def guides(columns: list[str]) -> Any:
        """What makes the columns of a loss, once its rows are tokenized."""
        return lambda rows: annotators_for(
            columns, work.load, work.reference, work.tokenizer, rows, settings, work.report
        )

    for name, loss in work.arms("DPO", DPOLoss, {}).items():
        work.request.report(f"{name}: {work.steps} steps on {len(work.pairs)} pairs")
        seed_everything(work.seed)
        trainer = train_quietly(
            work.load(), work.reference, loss, work.tokenizer, work.pairs, guides(sorted(loss.columns)), [Progress(work.report, name)],
            per_device_train_batch_size=settings.batch_size, max_steps=work.steps, learning_rate=work.lr, seed=work.seed,
        )  # fmt: skip
        policy, known = trainer.model, trainer.train_dataset
        margins, kls = [], {"chosen": 0.0, "rejected": 0.0}
        for index in range(min(8, len(known))):
            pair = pair_traces(policy, work.reference, work.tokenizer, known[index], loss)
            sums = [sum(trace.columns["implicit_reward"]) for trace in pair]  # type: ignore[arg-type]
            margins.append(sums[0] - sums[1])
            for side, trace in zip(kls, pair, strict=True):
                kls[side] += sum(trace.columns["forward_kl"])  # type: ignore[arg-type]
                trace.title = f"{name}, {trace.title}"
            if index < 2 and name != "DPO":
                result.traces += pair
        result.rows[name] = {
            "reward margin": sum(margins) / len(margins),
            "KL chosen": kls["chosen"] / len(margins),
            "KL rejected": kls["rejected"] / len(margins),
            "seconds": trainer.state.log_history[-1]["train_runtime"],
        }
    return result


def _demonstrations(work: _Work) -> TrialResult:
    """IFT and supervised tuning on the chosen sides; losses of the demonstrations afterwards, and of the model's own continuations of them."""
    from datasets import Dataset
    from trl import SFTConfig

    from ..core.rng import seed_everything
    from .guides import quiet_arguments, without_printer
    from .ift import IFTSettings, IFTTrainer
    from .traces import demonstration_trace

    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in work.pairs])
    result = TrialResult({}, "loss on own predictions", column="weight")
    for name, settings in work.arms("SFT", IFTSettings, {"residual": 0.0, "gamma": 0.0}).items():
        work.request.report(f"{name}: {work.steps} steps on {len(rows)} demonstrations")
        seed_everything(work.seed)
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(**quiet_arguments(
                folder, per_device_train_batch_size=min(4, len(rows)), max_steps=work.steps, learning_rate=work.lr,
                lr_scheduler_type="constant",
            ))  # fmt: skip
            trainer = IFTTrainer(
                work.load(), ift=settings, args=args, train_dataset=rows, processing_class=work.tokenizer
            )
            without_printer(trainer)
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            found: dict[str, float] = {"seconds": seconds}
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


def _rollouts(work: _Work) -> TrialResult:
    """RTO against PPO (or GRPO) on a few batches of rollouts, rewarded by a sentiment lexicon; the DPO model is trained first."""
    from datasets import Dataset

    from ..core.rng import seed_everything
    from ..reinforcement.rto import RTOConfig, RTOSettings, RTOTrainer
    from ..training.datasets.sentiment import positivity
    from .guides import GuideSettings, dpo_guide, quiet_arguments, without_printer
    from .traces import rollout_trace

    require("vaderSentiment", "train", "Rewarding sentiment")
    wanted = [item.settings.get("estimator", "gae") for item in work.request.trials]
    baseline = ("PPO", "gae") if "gae" in wanted else ("GRPO", "group")
    arms = work.arms(baseline[0], RTOSettings, {"dpo_reward_scale": 0.0, "estimator": baseline[1]})
    settings = GuideSettings(steps=work.steps, lr=work.lr, batch_size=min(4, len(work.pairs)), seed=work.seed)
    dpo = dpo_guide(work.load, work.reference, work.tokenizer, Dataset.from_list(work.pairs), settings, work.report)
    prompts = list(dict.fromkeys(row["prompt"] for row in work.pairs))
    result = TrialResult({}, "mean reward", column="token_reward")

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return positivity([p + c for p, c in zip(prompts, completions, strict=True)])

    for name, chosen in arms.items():
        work.request.report(f"{name}: {work.steps} batches of rollouts")
        seed_everything(work.seed)
        with tempfile.TemporaryDirectory() as folder:
            args = RTOConfig(**quiet_arguments(
                folder, logging_strategy="steps", logging_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=16,
                max_steps=work.steps, learning_rate=work.lr, lr_scheduler_type="constant", **dataclasses.asdict(chosen),
            ))  # fmt: skip
            policy = work.load()
            trainer = RTOTrainer(
                policy, reward_funcs=score, dpo_model=dpo if chosen.dpo_reward_scale else None, ref_model=work.reference, args=args,
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), processing_class=work.tokenizer,
            )  # fmt: skip
            without_printer(trainer)
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        result.rows[name] = {
            "mean reward": sum(entry["reward"] for entry in logs) / len(logs),
            "token rewards a response": sum(entry.get("rto/dpo_reward", 0.0) for entry in logs) / len(logs),
            "KL": logs[-1]["rto/kl"],
            "seconds": seconds,
        }
        if chosen.dpo_reward_scale:
            for row in work.pairs[:2]:
                trace = rollout_trace(
                    policy.eval(), work.reference, dpo, work.tokenizer, row["prompt"], row["chosen"], chosen
                )
                trace.title = f"{name}: {row['prompt']}"
                result.traces.append(trace)
    result.notes.append(
        f"{work.steps} batches of 8 rollouts show that it runs, not what it gains: see everytoken reproduce rto."
    )
    return result
