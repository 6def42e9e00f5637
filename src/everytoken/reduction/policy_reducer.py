"""A reducer that learns by trial and reward which tokens to keep (a proposal of arXiv 2505.18227).

The position paper states every reducer as a criterion and a strategy, ``X' = P(X, E(X))``, and asks for budgets that a
policy learns. It gives no method for that; the design is this project's. A token with the features ``f_i`` stays with
the probability ::

    pi(keep_i = 1) = sigmoid(w . f_i + b)
    R = 1[the answer is right] - beta M / N                         M of N tokens were kept

and ``w`` and ``b`` learn by REINFORCE, with G draws an image, each compared with the mean reward of the others::

    gradient = mean over g of (R_g - mean of R_h, h != g) grad log pi(draw_g) + entropy_weight grad H(pi)

So the policy decides for every image and question how many tokens are worth their cost. At inference a token stays if
its probability is above one half, or the best share stays where a budget is given. ``f`` looks at a token's norm, at
the attention of the encoder's summary token, at the likeness to the nearest other token and to the nearest word of the
text, and at its place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError
from ..core.files import write_text_whole
from ..core.weights import SAFETENSORS, read_weights, weights_folder
from .arithmetic import cosines, top_indices
from .base import Declaration, Reduction, ReductionContext, check_features, check_share, count_kept, selection
from .capture import attention_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEATURES = ("norm", "summary attention", "nearest token", "nearest word", "row", "column")
"""What the policy looks at, in the order of its weights."""
SHIPPED = "scenes-vlm-token-reduction"


def token_features(features: torch.Tensor, context: ReductionContext) -> torch.Tensor:
    """``features [N, d]`` -> ``[N, 6]`` float32, what the policy looks at, by ``FEATURES``.

    The norm is standardised over the image. The summary token's attention is ``log(N a_i)``, 0 where it is even. The
    likenesses are cosines: to the nearest other token, and to the nearest word; 0 where there is none. Row and column
    run from -1 to 1; without a grid the row is the place in the sequence and the column 0.

    Args:
        context: with ``cls_queries`` and ``keys``, of which the last layer counts; ``text`` and ``grid`` where known.

    Raises:
        BadInputError: the context lacks the summary token's query and the patches' keys, or they are of another number
            of patches.
    """
    check_features(features)
    points, total = features.detach().float(), len(features)
    if not context.cls_queries or not context.keys:
        raise BadInputError("PolicyReducer needs the summary token's query and the keys of an encoder layer.")
    query, keys = context.cls_queries[-1], context.keys[-1]
    if keys.shape[1] != total:
        raise BadInputError(f"There are {total} features, but keys of {keys.shape[1]} patches.")
    norms = points.norm(dim=-1)
    spread = norms.std(correction=0)
    norm = (norms - norms.mean()) / spread if spread > 0 else torch.zeros_like(norms)
    valid = torch.ones(1, total, dtype=torch.bool, device=points.device)
    summary = attention_row(query[None], keys[None], query.shape[-1] ** -0.5, valid)[0]
    alike = cosines(points, points)
    alike.fill_diagonal_(-1.0)
    nearest = alike.amax(-1) if total > 1 else torch.zeros_like(norms)
    word = torch.zeros_like(norms)
    if context.text is not None:
        word = cosines(points, context.text.detach().to(points.device).float()).amax(-1)
    rows, columns = context.grid or (total, 1)
    place = torch.arange(total, device=points.device)
    row, column = 2 * (place // columns + 0.5) / rows - 1, 2 * (place % columns + 0.5) / columns - 1
    attention = (total * summary).clamp(min=1e-6).log()
    return torch.stack([norm, attention, nearest, word, row, column], -1)


@dataclass(frozen=True)
class KeepPolicy:
    """Weights of the probability to stay.

    Attributes:
        weight: ``[6]``, by ``FEATURES``.
        bias: a number as a tensor without dimensions.
        width: of the features of the model that it was trained for.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    width: int

    def logits(self, table: torch.Tensor) -> torch.Tensor:
        """``[..., N, 6]`` -> ``[..., N]``, the logit of staying."""
        return table @ self.weight.to(table.device) + self.bias.to(table.device)

    def save(self, folder: Path) -> None:
        """Writes ``model.safetensors`` and ``config.json``."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {"weight": self.weight.detach().contiguous(), "bias": self.bias.detach().reshape(1)}
        save_file(weights, folder / SAFETENSORS)
        write_text_whole(folder / "config.json", json.dumps({"width": self.width, "features": FEATURES}) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> KeepPolicy:
        """What ``save`` wrote.

        Raises:
            BadInputError: no policy lies there, or one of other features.
        """
        found = read_weights(folder)
        file = Path(folder).expanduser() / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            width, names = int(config["width"]), tuple(config["features"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{file} does not describe a policy: {error!r}.") from error
        if names != FEATURES or set(found) != {"weight", "bias"} or found["weight"].shape != (len(FEATURES),):
            raise BadInputError(f"{folder} holds no policy of {', '.join(FEATURES)}.", "Train one with this version.")
        return cls(found["weight"].float(), found["bias"].float()[0], width)


@dataclass
class PolicyReducer:
    """Keeps the tokens that a trained policy finds worth their cost for this image and this text.

    Args:
        keep: the share to keep, those of the highest probability; None keeps what is likelier to stay than not, as
            many as that are.
        weights: folder of a trained policy (``everytoken train token-reduction``); None takes the one that ships, for
            the tiny model of scenes.
        policy: the policy itself, instead of a folder.

    Raises:
        BadInputError: a share outside (0, 1], or a folder without a policy.
    """

    keep: float | None = None
    weights: str | None = None
    policy: KeepPolicy | None = None
    declares: ClassVar[Declaration] = Declaration(
        where=("model input",),
        criterion="probability of a policy that was rewarded for right answers and few tokens",
        strategy="select",
        budget="learned, per image and text",
        needs=("text", "cls", "keys", "training"),
        positions="original",
    )

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_share("keep", self.keep)
        if self.policy is None:
            self.policy = KeepPolicy.load(self.weights or weights_folder(SHIPPED))

    def encoder_layers(self, depth: int) -> tuple[int]:
        """The encoder layer whose summary query and keys are read: the last."""
        return (depth - 1,)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises BadInputError for a model of another width than that which the policy was trained for."""
        assert self.policy is not None
        width = model.config.get_text_config().hidden_size
        if width != self.policy.width:
            raise BadInputError(
                f"This policy was trained for a model of width {self.policy.width}; this one has {width}.",
                "Train one for it: everytoken train token-reduction --model ... --data ... --out policy",
            )

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """``features [N, d]`` with the text, the summary query and the keys of the context -> those that stay; one at
        least.

        Raises:
            BadInputError: the context lacks what the policy looks at.
        """
        table = token_features(features, context)
        assert self.policy is not None
        chances = self.policy.logits(table).sigmoid()
        count = int((chances > 0.5).sum()) if self.keep is None else count_kept(len(features), self.keep)
        return selection(features, top_indices(chances, max(1, count)), chances)


def log_chance(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The logarithm of the probability of draws: ``logits [..., N], kept [..., N]`` (0 or 1) -> ``[...]``."""
    return -F.binary_cross_entropy_with_logits(logits.expand_as(kept), kept, reduction="none").sum(-1)


def left_out(rewards: torch.Tensor) -> torch.Tensor:
    """``[..., G]`` rewards, each minus the mean of the others.

    Raises:
        BadInputError: fewer than two draws, which have no others.
    """
    draws = rewards.shape[-1]
    if draws < 2:
        raise BadInputError("A draw is compared with the others of its image: two are needed at least.")
    return (rewards - rewards.mean(-1, keepdim=True)) * draws / (draws - 1)


def policy_loss(
    logits: torch.Tensor, kept: torch.Tensor, rewards: torch.Tensor, entropy_weight: float = 0.01
) -> torch.Tensor:
    """What falls along REINFORCE's estimate of the gradient of the mean reward.

    Args:
        logits: ``[B, N]`` of staying.
        kept: ``[B, G, N]``, 1 for what stays in a draw.
        rewards: ``[B, G]`` of the draws.
        entropy_weight: of the policy's entropy, mean over tokens, which keeps it drawing.
    """
    gained = (left_out(rewards).detach() * log_chance(logits[:, None], kept)).mean()
    chance = logits.sigmoid()
    entropy = -(chance * F.logsigmoid(logits) + (1 - chance) * F.logsigmoid(-logits)).mean()
    return -gained - entropy_weight * entropy
