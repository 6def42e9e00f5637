"""Training a policy that keeps few tokens, ``everytoken train token-reduction``; the model itself does not learn.

Every step draws G sets of tokens an image from the policy and answers with each. Dropped tokens are hidden by the
attention mask, which equals the reduction in original positions. Without ``--data`` the shipped tiny model answers
questions about scenes; ``--model`` with ``--data`` trains a policy for a LLaVA of yours (see
``training.datasets.image_questions``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from ..core.rng import derive_seed
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.datasets.scenes import question_batch
from ..training.stepwise import Stage, fingerprint, fit
from ..training.vision import ask_all
from .base import ReductionContext
from .capture import encoder_rows
from .families import square
from .inputs import check_reducer, placeholders
from .policy_reducer import FEATURES, KeepPolicy, PolicyReducer, policy_loss, token_features
from .vision_training import (
    Questions,
    SceneQuestions,
    VisionSettings,
    keep_record,
    on_device,
    reduced_forward,
    share_right,
    start,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PolicyTraining(VisionSettings):
    """Settings of ``everytoken train token-reduction``.

    Args:
        steps: how many.
        lr: the level of the learning rate.
        beta: what keeping all tokens costs; a right answer is worth 1.
        samples: G, draws an image.
        entropy_weight: of the policy's entropy.

    Raises:
        BadInputError: a value out of range.
    """

    parts: int = 1
    steps: int = 200
    lr: float = 0.05
    beta: float = 0.5
    samples: int = 4
    entropy_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.samples < 2 or self.beta < 0 or self.entropy_weight < 0:
            raise BadInputError(
                "Training takes one step at least and two samples an image, beta and entropy_weight are not negative; "
                f"got {self.steps}, {self.samples}, {self.beta} and {self.entropy_weight}."
            )


class OneQuestion:
    """Scenes with one question each: what the policy keeps is for that question.

    Args:
        questions: where scenes come from.
    """

    def __init__(self, questions: SceneQuestions):
        self.questions = questions

    def batch(self, size: int, *names: object) -> dict[str, torch.Tensor]:
        seed, maker = self.questions.seed, self.questions.maker
        scenes = maker.draw(size, seed, *names)
        return question_batch(scenes, ask_all(scenes, seed, *names), self.questions.image_tokens)


def run(config: PolicyTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures the answers (of scenes), and writes the policy.

    Raises:
        UnsupportedModelError: a model whose encoder has no summary token, or one that does not know scenes without
            data.
    """
    model, questions, _ = start(context, config)
    asked = OneQuestion(questions) if isinstance(questions, SceneQuestions) else questions
    policy, curve = train_policy(model, asked, config, context.out, context.report)
    figures = {"reward": -curve[-1][1]}
    if context.data is None:
        kept: list[int] = []
        forward = reduced_forward(model, PolicyReducer(policy=policy), "original", lambda found: kept.append(found))
        figures["right answers"] = share_right(model, forward)
        figures["tokens an image"] = sum(kept) / 256
    folder = context.out / "policy"
    policy.save(folder)
    keep_record(folder, "token-reduction", figures, config, {"minus the mean reward": curve})
    note = f"Use it: with reduce_tokens(model, PolicyReducer(weights={str(folder)!r})): ..."
    return TrainingResult(figures, [folder], [note])


def train_policy(
    model: PreTrainedModel,
    questions: Questions,
    config: PolicyTraining,
    folder: Path | None = None,
    report: Report = silent,
) -> tuple[KeepPolicy, list[tuple[int, float]]]:
    """The trained policy, and the curve of minus the mean reward.

    Args:
        questions: where batches come from.
        config: rates and steps.
        folder, report: as for ``training.stepwise.fit``.

    Raises:
        UnsupportedModelError: a model of a class that has not been tried, or whose encoder has no summary token.
    """
    width = model.config.get_text_config().hidden_size
    layer = nn.Linear(len(FEATURES), 1)
    nn.init.zeros_(layer.weight)
    nn.init.ones_(layer.bias)  # most tokens stay at first, so that answers can be right
    check_reducer(model, PolicyReducer(policy=policy_of(layer, width)), "original")

    def loss_of(part: int) -> Any:
        def loss(step: int) -> torch.Tensor:
            batch = on_device(questions.batch(config.batch // config.parts, "policy", step, part), model)
            tables, features = looked_at(model, batch)
            logits = layer(tables)[..., 0]
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "draws", step, part))
            shape = (len(logits), config.samples, logits.shape[-1])
            kept = (torch.rand(shape, generator=generator) < logits.detach().sigmoid()[:, None]).float()
            rewards = rewards_of(model, batch, features, kept, config.beta)
            surrogate = policy_loss(logits, kept, rewards, config.entropy_weight)
            # the curve shows the reward, the gradient is the policy's
            return surrogate - surrogate.detach() - rewards.mean()

        return loss

    stage = Stage("policy", config.steps, config.lr, warmup=0.02, hold=0.5)
    losses = [loss_of(part) for part in range(config.parts)]
    identity = fingerprint(config, questions.batch(config.batch // config.parts, "policy", 0, 0))
    curve = fit(layer, losses, stage, folder, report, save_every=config.save_every, identity=identity)
    return policy_of(layer, width), curve


def policy_of(layer: nn.Linear, width: int) -> KeepPolicy:
    """A linear layer's weights as a policy."""
    return KeepPolicy(layer.weight.detach()[0].clone(), layer.bias.detach()[0].clone(), width)


@torch.no_grad()
def looked_at(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """What the policy sees of a batch with one image a row, ``[B, N, 6]``, and the encoder's output.

    Raises:
        BadInputError: not one image a row, or images of unequal numbers of tokens.
    """
    visual = placeholders(model, batch)
    with encoder_rows(model, PolicyReducer(policy=KeepPolicy(torch.zeros(len(FEATURES)), torch.zeros(()), 0))) as rows:
        output = model.get_image_features(batch["pixel_values"], return_dict=True)
    pieces = list(output.pooler_output)
    if len(pieces) != len(visual) or len({len(piece) for piece in pieces}) != 1:
        raise BadInputError("The policy learns from one image a prompt, all of the same size.")
    words = ~visual & (batch["labels"] == -100) & batch["attention_mask"].bool()  # never the answer
    table = model.get_input_embeddings()
    found = []
    for number, piece in enumerate(pieces):
        queries, keys = rows.of(number)
        text = table(batch["input_ids"][number, words[number]])
        context = ReductionContext(square(len(piece)), text=text if len(text) else None, cls_queries=queries, keys=keys)
        found.append(token_features(piece, context))
    return torch.stack(found), output


@torch.no_grad()
def rewards_of(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], output: Any, kept: torch.Tensor, beta: float
) -> torch.Tensor:
    """``1[right] - beta M / N`` of every draw, ``[B, G]``; right is an answer all of whose tokens are the likeliest.

    Args:
        batch: with ``labels``, one image a row.
        output: of the encoder.
        kept: ``[B, G, N]``, 1 for what stays.
        beta: what keeping all tokens costs.
    """
    rows, draws, total = kept.shape
    visual = placeholders(model, batch).repeat_interleave(draws, 0)
    mask, ids, labels = (batch[name].repeat_interleave(draws, 0) for name in ("attention_mask", "input_ids", "labels"))
    mask = mask.clone()
    mask[visual] = kept.reshape(-1).to(mask)
    copied = copy.copy(output)
    copied.pooler_output = repeated(output.pooler_output, draws)
    # a hidden token keeps its number: this is the reduction in original positions
    places = (batch["attention_mask"].long().cumsum(-1) - 1).clamp(min=0).repeat_interleave(draws, 0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, mm_encoder_outputs={"image": copied}).logits
    asked = labels[:, 1:] != -100
    right = ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~asked).all(-1)
    share = kept.sum(-1) / total
    return right.view(rows, draws).float() - beta * share


def repeated(pieces: Any, draws: int) -> Any:
    """Features of images, each ``draws`` times in a row, in the container that they came in."""
    if isinstance(pieces, torch.Tensor):
        return pieces.repeat_interleave(draws, 0)
    copies: Sequence[torch.Tensor] = [piece for piece in pieces for _ in range(draws)]
    return type(pieces)(copies)


TRAINING = Training(
    name="token-reduction",
    summary="a policy that keeps the image tokens that are worth their cost, by reward",
    config=PolicyTraining,
    run=run,
    extra=("vision", "PIL"),
)
