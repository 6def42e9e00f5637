"""Token dynamics for the command line: how every token of a text grows from layer to layer of a Mamba."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.charts import inline_image, lines_svg
from ...core.errors import BadInputError
from ...core.quiet import quiet_transformers
from ...core.trace import TokenTrace
from ..base import Architecture, Network, Observation
from ..byte_text import VOCABULARY, as_ids, bits_per_byte, byte_tokenizer, written
from ..training import Recipe
from .analysis import analyze_dynamics
from .configuration_mamba_dynamics import MambaDynamicsConfig
from .modeling_mamba_dynamics import MambaDynamicsForCausalLM
from .theory import phase_diagram

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..training import Curves, StepFigures

COLUMNS = ("growth", "importance", "rank", "fastest layer")
LONGEST = 4096
"""Tokens of a text that are shown."""


@dataclass(frozen=True)
class MambaDynamicsRecipe(Recipe):
    """A Mamba on the bytes of a text.

    Args:
        dynamics: which way tokens may go: positive, mixed, negative or free.
        layers, width, states: of the network.
    """

    dynamics: str = "positive"
    layers: int = 4
    width: int = 96
    states: int = 8
    steps: int = 500
    batch: int = 12
    length: int = 96
    lr: float = 3e-3
    warmup: float = 0.1
    summary: ClassVar[str] = "a Mamba whose token dynamics are constrained, from scratch on the bytes of a text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, self.width, self.states) < 1:
            raise BadInputError("layers, width and states are 1 or more.")
        self.config()

    def config(self) -> MambaDynamicsConfig:
        """The network's configuration; raises for settings that contradict each other."""
        return MambaDynamicsConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            state_size=self.states,
            dynamics=self.dynamics,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        if model is None:
            return MambaDynamicsForCausalLM(self.config())
        return MambaDynamics.load(model)

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        ids = as_ids(windows)
        return learner(input_ids=ids, labels=ids, use_cache=False).loss, {}

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        bits = bits_per_byte(model, windows)
        layers = analyze_dynamics(model)
        return {
            "bits per byte": sum(bits) / len(bits),
            "% of positive eigenvalues": 100 * sum(item.positive for item in layers) / len(layers),
        }

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return byte_tokenizer()

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        return {
            "Eigenvalues of every layer": eigenvalue_picture(model),
            "Mean size of tokens by layer": growth_picture(model, as_ids(windows[:8])),
            "What one-dimensional systems do": phase_picture(),
        }


@dataclass
class MambaDynamics(Architecture):
    """A Mamba whose layers rule out that tokens converge.

    Args:
        layer: whose step sizes give the importance of tokens, from 0.

    Raises:
        BadInputError: a negative layer.
    """

    layer: int = 0
    declares: ClassVar[Network] = Network(
        MambaDynamicsConfig, MambaDynamicsForCausalLM, COLUMNS, lacks={"sdpa": "it has no attention"}
    )
    weights: ClassVar[str] = "mamba-dynamics-prose"
    headline: ClassVar[str] = "bits per byte"
    example: ClassVar[str] = "The value of the expression is the object that the name is bound to."
    recipe: ClassVar[type | None] = MambaDynamicsRecipe

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise BadInputError(f"layer is 0 or more; got {self.layer}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        config = MambaDynamicsRecipe(layers=2, width=16, states=4).config()
        config.eos_token_id = None
        return MambaDynamicsForCausalLM(config).eval()

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return byte_tokenizer()

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        count = model.config.num_hidden_layers
        if self.layer >= count:
            raise BadInputError(f"The network has layers 0 to {count - 1}; got {self.layer}.")
        tokenizer = tokenizer or byte_tokenizer()
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        if not 0 < ids.shape[1] <= LONGEST:
            raise BadInputError(f"The text has {ids.shape[1]:,} tokens; a trial shows 1 to {LONGEST:,}.")
        with quiet_transformers():  # it says that kernels are missing whose work is done here
            sizes, importance, loss = token_sizes(model, ids, self.layer)
            behind = written(model, tokenizer, ids, new_tokens)
        steps = (sizes[1:] / sizes[:-1]).log()  # [layers, L]
        trace = TokenTrace(ids[0].tolist(), title=f"growth: {text}", station="architectures").with_text(tokenizer)
        trace.add("growth", steps.sum(0))
        trace.add("importance", importance)
        trace.add("rank", importance.argsort(dim=-1, stable=True).argsort(dim=-1))
        trace.add("fastest layer", steps.argmax(0))
        layers = analyze_dynamics(model)
        figures = {
            "mean growth": float(steps.sum(0).mean()),
            "spread of growth": float(steps.sum(0).std(unbiased=False)),
            "% of positive eigenvalues": 100 * sum(item.positive for item in layers) / len(layers),
        }
        if loss is not None:
            figures["bits per byte"] = loss / math.log(2)
        words = ", ".join(f"{number} {item.regime}" for number, item in enumerate(layers))
        notes = [
            f"By the signs of their eigenvalues, tokens in layers are: {words}.",
            "growth is the logarithm of a token's size behind the last layer over its size before the first.",
        ]
        return Observation([trace], figures, behind, [growth_picture(model, ids)], notes)


@torch.no_grad()
def token_sizes(
    model: PreTrainedModel, ids: torch.Tensor, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """How large tokens are before the first layer and behind each, and how important one layer finds them.

    Args:
        model: a Mamba of transformers or of this method.
        ids: ``[1, L]``.
        layer: whose steps count.

    Returns:
        Sizes ``[layers + 1, L]`` (root mean square), the mean step size of every token ``[L]``, and the mean loss
        (None for one token).
    """
    seen: list[torch.Tensor] = []
    steps: list[torch.Tensor] = []
    blocks = model.backbone.layers
    mixer = blocks[layer].mixer

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not seen:
            seen.append(inputs[0])
        seen.append(output)

    def keep_steps(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        rows = output[..., : mixer.time_step_rank].float()
        scores = rows @ mixer.dt_proj.weight.float().T + mixer.dt_proj.bias.float()
        steps.append(nn.functional.softplus(scores).mean(-1))

    hooks = [block.register_forward_hook(keep) for block in blocks]
    hooks.append(mixer.x_proj.register_forward_hook(keep_steps))
    try:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        for hook in hooks:
            hook.remove()
    sizes = torch.stack([item[0].float().square().mean(-1).sqrt() for item in seen])
    return sizes, steps[0][0], float(loss) if ids.shape[1] > 1 else None


def growth_picture(model: PreTrainedModel, ids: torch.Tensor) -> str:
    """Sizes of tokens over the layers: least, mean and largest."""
    found = torch.cat([token_sizes(model, row[None])[0] for row in ids], 1)
    lines = {
        name: [[(float(number), float(value)) for number, value in enumerate(values)]]
        for name, values in (("largest", found.amax(1)), ("mean", found.mean(1)), ("smallest", found.amin(1)))
    }
    svg = lines_svg(lines, "layers passed", "size of a token (root mean square)")
    return inline_image(svg, "How the tokens of the text grow from layer to layer.")


def eigenvalue_picture(model: PreTrainedModel) -> str:
    """The eigenvalues of every layer, by rank."""
    lines = {
        f"layer {number}": [[(float(place), float(value)) for place, value in enumerate(item.eigenvalues)]]
        for number, item in enumerate(analyze_dynamics(model))
    }
    svg = lines_svg(lines, "rank", "eigenvalue of the symmetric part", markers=False)
    return inline_image(svg, "Positive eigenvalues let tokens diverge.")


def phase_picture(points: int = 8) -> str:
    """What small systems did over mu and the first token, as a table with one letter a system."""
    found = phase_diagram(points, time=1e3)
    colours = {"convergent": "#0072b2", "slow divergence": "#d55e00", "fast divergence": "#aa4499"}
    rows = []
    for mu, words in zip(found.mu[::-1], found.found[::-1], strict=True):
        cells = "".join(f'<td style="background:{colours.get(str(word), "#ffffff")}">&nbsp;</td>' for word in words)
        rows.append(f"<tr><th>&mu; = {mu:.2f}</th>{cells}</tr>")
    heads = "".join(f"<th>{first:.2f}</th>" for first in found.first)
    key = ", ".join(f'<span style="color:{colour}">&#9632;</span> {word}' for word, colour in colours.items())
    return (
        f"<p>{key}. The sign rule is right for {100 * found.agreement:.0f}% of the systems.</p>"
        f"<table><tr><th>first token</th>{heads}</tr>{''.join(rows)}</table>"
    )
