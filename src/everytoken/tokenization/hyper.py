"""Embeddings of tokens that a model does not have, from their pieces: a hypernetwork, and the mean as the baseline.

A token t with pieces p_1..p_n gets

    e(t) = sum_i a_i E[p_i] + W c,    a = softmax of scores,  c = what a small transformer reads out of the pieces

once for the input and once for the output matrix. Scores and W start at zero, so an untrained ``HyperEmbedding`` is the
plain mean of the pieces. The hypernetworks of arXiv 2405.07883 read the pieces in the same way and are larger.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..core.errors import BadInputError, UnknownNameError
from ..core.weights import read_weights, weights_folder
from .embedding import matrices, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MeanEmbedding:
    """The baseline: a token is the mean of its pieces.

    Args:
        model: whose tokens the pieces are.
    """

    def __init__(self, model: PreTrainedModel):
        self._source, self._weight, self._head = matrices(model)

    def base(self, ids: torch.Tensor) -> torch.Tensor:
        return self._source(ids.to(self._weight.device))

    @torch.no_grad()
    def embed(self, pieces: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = padded(pieces, self._head.device)
        share = (mask / mask.sum(1, keepdim=True).clamp(min=1)).to(self._head.dtype)[..., None]
        return (self._source(ids) * share).sum(1), (self._head[ids] * share).sum(1)


@dataclass
class HyperConfig:
    """The size of a ``HyperEmbedding``.

    Attributes:
        size: width of the model's embeddings.
        hidden, layers, heads: of the transformer over the pieces.
        max_pieces: places for pieces; what is beyond counts at the last.
        vocab_size: of the model, to refuse another.
        scale: what embeddings are divided by before they are read.
    """

    size: int
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    max_pieces: int = 8
    vocab_size: int = 0
    scale: float = 1.0


class HyperEmbedding(nn.Module):
    """The hypernetwork.

    ::

        hyper = HyperEmbedding.from_pretrained("smollm2-135m").attach(model)
        inputs, outputs = hyper.embed([(12, 407), (9, 9, 31)])          # [2, d] each

    Args:
        config: see ``HyperConfig``.
    """

    def __init__(self, config: HyperConfig):
        super().__init__()
        self.config = config
        self.read = nn.Linear(config.size, config.hidden)
        self.place = nn.Parameter(torch.zeros(config.max_pieces, config.hidden))
        self.from_end = nn.Parameter(torch.zeros(config.max_pieces, config.hidden))
        block = nn.TransformerEncoderLayer(
            config.hidden,
            config.heads,
            2 * config.hidden,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.hidden)
        self.score = nn.Linear(config.hidden, 2)
        self.write = nn.Linear(2 * config.hidden, 2 * config.size)
        for layer in (self.score, self.write):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for table in (self.place, self.from_end):
            nn.init.normal_(table, std=0.02)
        self._attached: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, P, d]`` input and output embeddings of the pieces and ``[N, P]`` which are there -> two ``[N, d]``."""
        count = mask.sum(1, keepdim=True)
        order = torch.arange(mask.shape[1], device=mask.device)[None]
        last = self.config.max_pieces - 1
        back = (count - 1 - order).clamp(0, last)
        x = self.read(inputs / self.config.scale) + self.place[order.clamp(max=last)] + self.from_end[back]
        x = self.norm(self.blocks(x, src_key_padding_mask=~mask))
        share = self.score(x).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        mean = (x * mask[..., None]).sum(1) / count
        ends = x.gather(1, (count - 1)[..., None].expand(-1, 1, x.shape[-1]))[:, 0]
        change = self.write(torch.cat([mean, ends], -1)) * self.config.scale
        first, second = change.chunk(2, -1)
        return (share[..., :1] * inputs).sum(1) + first, (share[..., 1:] * outputs).sum(1) + second

    # -- with a model --------------------------------------------------------------------------------------------------
    def attach(self, model: PreTrainedModel) -> HyperEmbedding:
        """Reads pieces from this model's matrices from now on; returns itself.

        Raises:
            BadInputError: another width or vocabulary than it was trained for.
        """
        source, weight, head = matrices(model)
        if weight.shape[1] != self.config.size or self.config.vocab_size not in (0, len(weight)):
            raise BadInputError(
                f"This hypernetwork is for {self.config.vocab_size:,} embeddings of width {self.config.size}; the "
                f"model has {len(weight):,} of width {weight.shape[1]}.",
                "Train one with scripts/train_hypernetwork.py, or use MeanEmbedding(model).",
            )
        self._attached = (source, weight, head)
        self.to(weight.device)
        return self

    def _model(self) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        if self._attached is None:
            raise BadInputError("The hypernetwork is attached to no model.", "Call attach(model) first.")
        return self._attached

    def base(self, ids: torch.Tensor) -> torch.Tensor:
        source, weight, _ = self._model()
        return source(ids.to(weight.device))

    def apply_to(self, pieces: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``embed``, with gradients."""
        source, _, head = self._model()
        ids, mask = padded(pieces, head.device)
        inputs, outputs = source(ids).float(), head[ids].float()
        first, second = self(inputs, outputs, mask)
        return first.to(head.dtype), second.to(head.dtype)

    @torch.no_grad()
    def embed(self, pieces: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.apply_to(pieces)

    # -- on disk -------------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | Path) -> None:
        """``config.json`` and half-precision ``model.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")
        save_file(
            {name: value.detach().cpu().half().contiguous() for name, value in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, name: str | Path) -> HyperEmbedding:
        """From a folder, or the one that ships for a model (``smollm2-135m``; see ``core.weights``).

        Raises:
            BadInputError: there is none, or its files are damaged.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            try:
                folder = weights_folder(str(name), "hypernetwork")
            except UnknownNameError as error:
                raise BadInputError(f"There is no hypernetwork {name}.", f"Give a folder. {error.hint}") from error
        if not (folder / "config.json").is_file():
            raise BadInputError(f"{folder} holds no hypernetwork (no config.json).", "Save one with save_pretrained().")
        weights = read_weights(folder)
        try:
            hyper = cls(HyperConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))))
            hyper.load_state_dict({key: value.float() for key, value in weights.items()})
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise BadInputError(f"{folder} holds no readable hypernetwork: {error}", "Save it anew.") from error
        return hyper.eval()
