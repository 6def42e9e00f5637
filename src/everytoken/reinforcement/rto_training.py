"""RTO from the command line: ``everytoken train rto`` on prompts, and ``everytoken try rto`` beside PPO or GRPO.

RTO needs a model trained with DPO. Where the user brings none, one is trained first on the data's pairs by
``DPO_TRAINING``: a function that is named here and looked up when it is needed, since no station imports another.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError, require
from ..core.implicit_reward import ImplicitReward
from ..core.quiet import quiet_training
from ..core.scoring import prompt_ids, response_logps
from ..core.settings import load_function
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest, TrialResult
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.column_makers import ColumnSources
from ..training.config import TrainConfig
from ..training.datasets.make_dataset import pairs_or_example
from ..training.datasets.messages import completion_text, message_text, plain_messages
from ..training.datasets.pairs import dataset_of, read_rows
from ..training.distributed import load_unplaced
from ..training.quiet import quiet_arguments, without_printer
from ..training.session import Prompt, TrainingSession
from ..training.trial import TrialWork
from .rto import RTOConfig, RTOSettings, RTOTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = {"loss": "loss", "reward": "reward", "rto/kl": "KL", "rto/dpo_reward": "", "entropy": ""}
DPO_TRAINING = "everytoken.preference.short_training:train_guide"
"""``(sources, steps, lr) -> frozen model``: trains a copy of the initial model with DPO on ``sources.rows``."""


@dataclass
class RTOTraining(TrainConfig, RTOSettings):
    """RTO on prompts; see ``RTOSettings``.

    Args:
        reward: ``sentiment`` (VADER), or ``module:function`` of TRL's form
            ``(prompts, completions, **columns) -> list of numbers``; it is given every further column of the data.
        dpo: hub id or folder of the DPO-trained model; None trains one first on the data's pairs, for ``guide_steps``
            at ``guide_lr``.
        num_generations: rollouts a prompt; ``batch_size`` counts rollouts.
        num_iterations: PPO's passes over a batch of rollouts.

    Raises:
        BadInputError: a value out of range.
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
        TrainConfig.__post_init__(self)
        RTOSettings.__post_init__(self)
        if self.batch_size % self.num_generations:
            raise BadInputError(
                f"batch_size={self.batch_size} is no multiple of num_generations={self.num_generations}."
            )


def train_dpo_model(sources: ColumnSources, steps: int, lr: float) -> Any:
    """A frozen copy of the initial model, trained with DPO on the pairs."""
    return load_function(DPO_TRAINING)(sources, steps, lr)


def prompts_and_pairs(config: RTOTraining, context: TrainingContext) -> tuple[list[dict[str, Any]], Dataset | None]:
    """Rows with a prompt to answer and whatever else the reward may read, and the pairs that a DPO model could be
    trained on. A row that is there twice is answered once.

    Raises:
        BadInputError: a row without a prompt, or no way to a DPO model.
    """
    pairs = None
    if context.data is None:
        pairs = pairs_or_example(context)
        prompts: list[dict[str, Any]] = [{"prompt": text} for text in dict.fromkeys(pairs["prompt"])]
    else:
        found = read_rows(context.data)
        if not all(row.get("prompt") for row in found):
            index = next(index for index, row in enumerate(found) if not row.get("prompt"))
            raise BadInputError(
                f"{context.data}, row {index}: 'prompt' is empty or missing.",
                "RTO writes its own responses to prompts.",
            )
        if "chosen" in found[0]:
            pairs = pairs_or_example(context)
        bringing = [number for number, row in enumerate(found) if row.get("tools")]
        if bringing:
            raise BadInputError(
                f"{context.data}, row {bringing[0]}: RTO's rollouts call no tools, and this row brings some.",
                "Leave them out; in Python RTOTrainer(tools=...) takes functions that it can call.",
            )
        pictured = [number for number, row in enumerate(found) if row.get("image") or row.get("images")]
        if pictured:
            raise BadInputError(f"{context.data}, row {pictured[0]}: RTO scores text only, and this prompt has images.")
        other = [number for number, row in enumerate(found) if type(row["prompt"]) is not type(found[0]["prompt"])]
        if other:
            raise BadInputError(
                f"{context.data}, row {other[0]}: its prompt is no {type(found[0]['prompt']).__name__}, as row 0's is.",
                "Write all prompts as text, or all as lists of messages.",
            )
        kept = {json.dumps(row, sort_keys=True, default=str): row for row in map(_answerable, found)}
        prompts = list(kept.values())
    if config.dpo_reward_scale and config.dpo is None and pairs is None:
        raise BadInputError(
            "RTO needs a DPO-trained model.",
            "Give --set dpo=..., data with chosen and rejected (one is trained on them), or --set dpo_reward_scale=0.",
        )
    return prompts, pairs


def _answerable(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its prompt in the form that chat templates read, and without a column of tools, which is empty."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else plain_messages(row["prompt"])
    return {name: value for name, value in row.items() if name != "tools"} | {"prompt": prompt}


@quiet_training()
def train_rto(config: RTOTraining, context: TrainingContext) -> TrainingResult:
    settings = config.part(RTOSettings)
    reward = sentiment if config.reward == "sentiment" else load_function(config.reward, "A reward", "rewards:score")
    if config.reward == "sentiment":
        require("vaderSentiment", "train", "Rewarding sentiment")
    prompts, pairs = prompts_and_pairs(config, context)
    session = TrainingSession(config, context, "rto", METRICS)
    train, held = session.split(dataset_of(prompts))
    answered = session.sampled(held)
    before = session.write_texts(session.policy, answered)
    dpo = None
    if settings.dpo_reward_scale and config.dpo is not None:
        dpo = load_unplaced(config.dpo)
    elif settings.dpo_reward_scale:
        assert pairs is not None
        sources = ColumnSources(
            session.load,
            session.reference,
            session.tokenizer,
            pairs,
            seed=config.seed,
            bf16=config.bf16,
            report=context.report,
        )
        dpo = train_dpo_model(sources, config.guide_steps, config.guide_lr)
    args = RTOConfig(
        **config.arguments(session.checkpoints),
        **dataclasses.asdict(settings),
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        max_completion_length=config.sample_tokens,
    )
    trainer = RTOTrainer(
        session.load(),
        reward_funcs=reward,
        dpo_model=dpo,
        ref_model=session.reference,
        args=args,
        train_dataset=train,
        processing_class=session.tokenizer,
        peft_config=session.adapter,
    )
    session.train(trainer)
    logs = trainer.state.log_history
    rewards = [entry["reward"] for entry in logs if "reward" in entry]
    quarter = max(1, len(rewards) // 4)
    rollouts = trainer.state.global_step * config.batch_size * config.accumulation * session.state.num_processes
    figures = {
        "reward, first quarter": sum(rewards[:quarter]) / quarter,
        "reward, last quarter": sum(rewards[-quarter:]) / quarter,
        "KL a response": next((entry["rto/kl"] for entry in reversed(logs) if "rto/kl" in entry), float("nan")),
        "rollouts": float(rollouts / config.num_iterations),
    }
    traces = []
    if session.reads:
        final = trainer.accelerator.unwrap_model(trainer.model).eval()
        for row, text in zip(answered, session.write_texts(final, answered), strict=False):
            if text:
                traces.append(
                    rollout_trace(final, session.reference, dpo, session.tokenizer, row["prompt"], text, settings)
                )
    return session.finish(trainer, figures, answered, before, traces, "token_reward")


def sentiment(prompts: list[Prompt], completions: list[Prompt], **_: Any) -> list[float]:
    """A reward: VADER's score of prompt and response, from -1 to 1 (of the response alone where the prompt is a
    conversation).
    """
    from ..training.datasets.sentiment import positivity

    texts = [completion_text(completion) for completion in completions]
    heads = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
    return positivity([head + text for head, text in zip(heads, texts, strict=True)])


@torch.no_grad()
def rollout_trace(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    dpo_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    settings: RTOSettings,
) -> TokenTrace:
    """RTO's token rewards of a response (without the sequence's own): the DPO reward, the KL charge, and their sum."""
    before = prompt_ids(tokenizer, prompt)
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*before, *after]], device=policy.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(before) :] = True
    stats = ImplicitReward(policy, reference, 1.0).statistics(ids, mask)
    logps, ref_logps = (stats[name][0, len(before) :].cpu() for name in ("logps", "ref_logps"))
    charge = -settings.init_kl_coef * (logps - ref_logps)
    asked = prompt if isinstance(prompt, str) else message_text(prompt[-1])
    trace = TokenTrace(after, title=f"after training: {asked}", station="reinforcement")
    shaped = torch.zeros_like(charge)
    if dpo_model is not None:
        shaped = settings.dpo_reward_scale * (response_logps(dpo_model, ids, mask)[0, len(before) :].cpu() - ref_logps)
        if settings.dpo_reward_clip is not None:
            shaped = shaped.clamp(-settings.dpo_reward_clip, settings.dpo_reward_clip)
    trace.add("token_reward", shaped + charge).add("dpo_reward", shaped).add("kl_charge", charge)
    return trace.add("logp", logps).add("ref_logp", ref_logps).with_text(tokenizer)


@quiet_training()
def trial(request: TrialRequest) -> TrialResult:
    """RTO against PPO (or GRPO) on a few batches of rollouts, rewarded by a sentiment lexicon; the DPO model is trained
    first.
    """
    from datasets import Dataset

    from ..core.rng import seed_everything

    require("vaderSentiment", "train", "Rewarding sentiment")
    work = TrialWork(request)
    wanted = [item.settings.get("estimator", "gae") for item in request.trials]
    baseline, estimator = ("PPO", "gae") if "gae" in wanted else ("GRPO", "group")
    arms = work.arms(baseline, RTOSettings, {"dpo_reward_scale": 0.0, "estimator": estimator})
    sources = ColumnSources(
        work.load,
        work.reference,
        work.tokenizer,
        Dataset.from_list(work.pairs),
        work.batch_size,
        work.seed,
        report=work.report,
    )
    dpo = train_dpo_model(sources, work.steps, work.lr)
    prompts = list(dict.fromkeys(row["prompt"] for row in work.pairs))
    result = TrialResult({}, "mean reward", column="token_reward")
    for name, chosen in arms.items():
        work.report(f"{name}: {work.steps} batches of rollouts", 0, work.steps)
        seed_everything(work.seed)
        with tempfile.TemporaryDirectory() as folder:
            args = RTOConfig(
                **quiet_arguments(
                    folder,
                    logging_strategy="steps",
                    logging_steps=1,
                    per_device_train_batch_size=8,
                    num_generations=4,
                    max_completion_length=16,
                    max_steps=work.steps,
                    learning_rate=work.lr,
                    lr_scheduler_type="constant",
                    **dataclasses.asdict(chosen),
                )
            )
            policy = work.load()
            trainer = RTOTrainer(
                policy,
                reward_funcs=sentiment,
                dpo_model=dpo if chosen.dpo_reward_scale else None,
                ref_model=work.reference,
                args=args,
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
                processing_class=work.tokenizer,
            )
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


TRAINING = Training(
    "rto", "a model on its own rollouts with token rewards of a DPO model", RTOTraining, train_rto, ("train", "trl")
)
