"""``everytoken train token-shuffle``: digits that are asked for by a text, drawn by windows.

``--model`` goes on from a network of an earlier stage with another window: its backbone keeps its weights, the modules
around it begin anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.errors import BadInputError
from ...core.progress import Report, silent
from ...core.rng import derive_seed, seed_everything
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.stepwise import Stage, fingerprint, fit
from ..images.metrics import image_scores
from ..training import write_training
from .configuration_token_shuffle import TokenShuffleConfig
from .digits import (
    BOI,
    EOI,
    PAD,
    TEXT,
    ImageCodes,
    codes_of,
    held_rows,
    image_codes,
    learned_rows,
    text_ids,
    text_tokenizer,
    words_for,
)  # fmt: skip
from .method import TokenShuffleMethod
from .modeling_token_shuffle import TokenShuffleForConditionalGeneration

SHAPE = {"width": 64, "layers": 4, "heads": 4}
BACKBONES = ("llama", "qwen3", "gpt2")


@dataclass(frozen=True)
class TokenShuffleTraining:
    """Settings of ``everytoken train token-shuffle``.

    Args:
        steps, batch, lr: of the training.
        window: rows and columns that are fused into one position: 1 (nothing is fused), 2, 4 or 8.
        blocks: residual blocks on either side; None is 1, and 0 for a window of one token.
        backbone: ``llama``, ``qwen3`` or ``gpt2``; None is a Llama, or that of ``--model``.
        width, layers, heads: of the backbone; None is 64, 4 and 4, or those of ``--model``.
        codes: what an image token is: ``levels`` (a pixel's grey level), or a tokenizer with a codebook
            (``digits-vq``).
        empty: share of rows without a text, which guidance needs.
        z_loss: weight of the squared log-partition.
        seed: of everything.
        save_every: a checkpoint after so many steps, from which the same command goes on.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 900
    batch: int = 32
    lr: float = 4e-3
    window: int = 2
    blocks: int | None = None
    backbone: str | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    codes: str = "levels"
    empty: float = 0.1
    z_loss: float = 0.0
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.save_every) < 1:
            raise BadInputError("steps, batch and save_every are 1 or more.")
        if not 0 <= self.empty < 0.8:
            raise BadInputError(f"empty is a share from 0 to below 0.8; got {self.empty}.")
        if self.backbone is not None and self.backbone not in BACKBONES:
            raise BadInputError(f"backbone is {' or '.join(BACKBONES)}; got {self.backbone!r}.")
        self.stage()
        if self.codes == "levels":
            self.config(image_codes(self.codes))

    def stage(self, name: str = "token-shuffle") -> Stage:
        """Steps and rates."""
        return Stage(name, self.steps, self.lr, warmup=0.05, hold=0.5)

    def around(self, codes: ImageCodes) -> dict[str, Any]:
        """The settings of a ``TokenShuffleConfig`` but for its backbone."""
        single = self.window == 1
        return {
            "window": self.window,
            "num_blocks": (0 if single else 1) if self.blocks is None else self.blocks,
            "fuse_activation": "none" if single else "gelu",
            "grid": codes.grid,
            "num_image_tokens": codes.count,
            "image_token_start": len(TEXT),
            "boi_token_id": TEXT.index(BOI),
            "eoi_token_id": TEXT.index(EOI),
            "pad_token_id": TEXT.index(PAD),
            "image_codes": codes.name,
            "image_codes_identity": codes.identity,
            "z_loss": self.z_loss,
        }

    def config(self, codes: ImageCodes) -> TokenShuffleConfig:
        """A configuration from scratch; raises for settings that contradict each other."""
        sizes = {name: getattr(self, name) or default for name, default in SHAPE.items()}
        if min(sizes.values()) < 1 or sizes["width"] % (2 * sizes["heads"]):
            raise BadInputError(f"Heads share the width, each an even part; got {sizes}.")
        positions = 4 + codes.grid[0] * codes.grid[1]
        backbone = {
            "model_type": self.backbone or "llama",
            "vocab_size": len(TEXT) + codes.count,
            "hidden_size": sizes["width"],
            "intermediate_size": 2 * sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["heads"],
            "head_dim": sizes["width"] // sizes["heads"],
            "max_position_embeddings": positions,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.backbone == "gpt2":
            names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}  # fmt: skip
            kept = {names.get(key, key): value for key, value in backbone.items()}
            backbone = {key: value for key, value in kept.items() if key not in ("num_key_value_heads", "head_dim")}
            backbone |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return TokenShuffleConfig(backbone_config=backbone, **self.around(codes))

    def begin(self, codes: ImageCodes, model: str | None = None) -> TokenShuffleForConditionalGeneration:
        """The network before training.

        Args:
            model: a folder of an earlier stage, whose backbone goes on.

        Raises:
            BadInputError: a folder of something else, one of other codes, or a shape beside it.
        """
        if model is None:
            return TokenShuffleForConditionalGeneration(self.config(codes))
        given = [name for name in (*SHAPE, "backbone") if getattr(self, name) is not None]
        if given:
            raise BadInputError(f"{given[0]} is that of --model.", f"Leave {given[0]} out, or --model.")
        before = TokenShuffleMethod.load(model)
        assert isinstance(before, TokenShuffleForConditionalGeneration)
        if codes_of(before.config).identity != codes.identity:
            raise BadInputError(f"{model} draws {before.config.image_codes}, not {codes.name}.", "Set codes to these.")
        return TokenShuffleForConditionalGeneration.from_backbone(before.backbone, **self.around(codes))


def learn(
    model: TokenShuffleForConditionalGeneration,
    codes: ImageCodes,
    config: TokenShuffleTraining,
    folder: Path | None = None,
    report: Report = silent,
    name: str = "token-shuffle",
) -> list[tuple[int, float]]:
    """The steps alone: trains the network in place and returns its curve of losses.

    Args:
        folder: where the checkpoint lies; None keeps none.
        name: of the stage, in what is reported.
    """

    def loss(step: int) -> torch.Tensor:
        rows = learned_rows(codes, config.batch, config.seed, step, empty=config.empty)
        found: torch.Tensor = model(**{key: value.to(model.device) for key, value in rows.items()}).loss
        return found

    identity = fingerprint(config, model.config.to_dict(), learned_rows(codes, config.batch, config.seed, 0))
    return fit(model, loss, config.stage(name), folder, report, save_every=config.save_every, identity=identity)


@torch.no_grad()
def image_nats(model: TokenShuffleForConditionalGeneration, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """What each image of rows costs, ``[B]`` in nats a token, given its text."""
    found = []
    for ids, mask in zip(rows["input_ids"].split(100), rows["attention_mask"].split(100), strict=True):
        ids = ids.to(model.device)
        logps = model(ids, mask.to(model.device)).logits[:, :-1].float().log_softmax(-1)
        chosen = logps.gather(-1, ids[:, 1:, None])[..., 0]
        image = model.is_image(ids[:, 1:])
        found.append(-(chosen * image).sum(1) / image.sum(1))
    return torch.cat(found).cpu()


def draw(
    model: TokenShuffleForConditionalGeneration,
    labels: torch.Tensor,
    seed: int,
    report: Report = silent,
    **settings: Any,
) -> torch.Tensor:
    """Images ``[B, 1, side, side]`` of digits ``[B]``, one drawn for each; ``settings`` of ``Sampling``.

    Raises:
        BadInputError: labels that are no digits, or settings out of range.
    """
    codes = codes_of(model.config)
    ids, mask = text_ids(text_tokenizer(), words_for(labels))
    seeds = [derive_seed(seed, "image", number) for number in range(len(labels))]
    found = [
        codes.decode(model.generate(a, b, seeds=part, report=report, **settings).codes.cpu())
        for a, b, part in zip(
            ids.split(250), mask.split(250), [seeds[at : at + 250] for at in range(0, len(seeds), 250)], strict=True
        )
    ]
    return torch.cat(found)


def measure(
    model: TokenShuffleForConditionalGeneration, codes: ImageCodes, seed: int, count: int = 200
) -> dict[str, float]:
    """Figures of a trained network: held-out nats, and what a classifier says of drawn digits."""
    labels = torch.arange(count) % 10
    scores = image_scores(draw(model, labels, seed), labels)
    return {
        "nats per token": float(image_nats(model, held_rows(codes)).mean()),
        "class accuracy": scores.accuracy,
        "Frechet distance": scores.frechet,
        "Frechet distance of real digits": scores.floor,
    }


def run(config: TokenShuffleTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures on held-out digits, and writes model, record and report.

    Raises:
        BadInputError: data of one's own, or what ``TokenShuffleTraining.begin`` refuses; before any step.
    """
    if context.data is not None:
        raise BadInputError("token-shuffle learns the digits that ship here.", "Leave --data out.")
    seed_everything(config.seed)
    codes = image_codes(config.codes)
    model = config.begin(codes, context.model).to("cuda" if torch.cuda.is_available() else "cpu")
    curve = learn(model, codes, config, context.out, context.report)
    figures = measure(model, codes, config.seed)
    with torch.no_grad():
        shown = TokenShuffleMethod(count=1).observe(model, text_tokenizer(), "seven, thick")
    return write_training(
        "token-shuffle",
        context,
        model,
        config,
        figures,
        {"loss": [(float(step), value) for step, value in curve]},
        tokenizer=text_tokenizer(),
        title=f"digits by windows of {config.window} x {config.window}",
        traces=shown.traces,
        column=TokenShuffleMethod.trace_columns[0],
        pictures={"seven, thick": "".join(shown.pictures)},
        hint="everytoken try token-shuffle --model {folder} --set label=7",
    )


TRAINING = Training(
    name="token-shuffle",
    summary="a language model that draws digits by windows of image tokens, from scratch or from a stage before",
    config=TokenShuffleTraining,
    run=run,
)
