"""Duo-LLM for the command line: the routers' route of every token beside the oracle's, and how hard each token is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...core.rng import derive_seed
from ...core.trace import TokenTrace
from ..base import Architecture, Network, Observation
from ..byte_text import VOCABULARY, ByteRecipe, as_ids, bits_per_byte, byte_tokenizer, text_ids, written
from .configuration_duo_llm import BIG, POLICIES, SKIP, SMALL, DuoLlmConfig
from .modeling_duo_llm import DuoLlmForCausalLM
from .oracle import all_routes, budget_curve, oracle_routes, route_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..training import Curves, StepFigures

LETTERS = {SKIP: "-", SMALL: "s", BIG: "B"}
EXHAUSTIVE = 8
"""Layers up to which ``observe`` tries every route."""


@dataclass(frozen=True)
class DuoLlmRecipe(ByteRecipe):
    """Duo-LLM on bytes of text: random routes first, then routers of the frozen network.

    Args:
        small: width of the small blocks; ``intermediate`` is that of the large ones.
        skip: the share of skips in random routes; small and large blocks share the rest equally.
        router_share: the share of the steps, at the end, in which the routers learn and nothing else does.
        target: mean cost a layer that the routers aim at, in large blocks.
        cost_weight: weight of the squared distance to it.
    """

    steps: int = 300
    intermediate: int = 384
    small: int = 48
    skip: float = 0.0
    router_share: float = 0.25
    target: float = 0.5
    cost_weight: float = 10.0
    summary: ClassVar[str] = "a choice of blocks for every byte: random routes first, then routers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.router_share < 1 or not 0 <= self.skip <= 1:
            raise BadInputError(
                f"router_share lies between 0 and below 1, and skip between 0 and 1; got {self.router_share} and "
                f"{self.skip}."
            )
        self.config()

    def config(self) -> DuoLlmConfig:
        """The network's configuration; raises for settings that contradict each other."""
        rest = (1 - self.skip) / 2
        return DuoLlmConfig(
            **self.shape(),
            small_intermediate_size=self.small,
            allow_skip=self.skip > 0,
            route_probabilities=(self.skip, rest, rest),
            cost_weight=self.cost_weight,
            cost_target=self.target,
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        self.from_scratch(model, "Duo-LLM")
        return DuoLlmForCausalLM(self.config())

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        ids = as_ids(windows)
        torch.manual_seed(derive_seed(self.seed, "routes", step))
        if step < self.steps * (1 - self.router_share):
            return learner(input_ids=ids, labels=ids, use_cache=False, route="random").loss, {}
        # routers alone learn: the rest is read without a gradient
        weights = {n: w if n.endswith("router.weight") else w.detach() for n, w in learner.named_parameters()}
        output = functional_call(learner, weights, (ids,), {"labels": ids, "use_cache": False, "route": "router"})
        return output.loss, {"routers' cost": output.cost}

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        found = {}
        policies = ["small", "random", "big"] + (["router"] if self.router_share else [])
        for policy in policies:
            model.config.route = policy
            torch.manual_seed(self.seed)
            bits = bits_per_byte(model, windows)
            found[f"bits per byte, {policy}"] = sum(bits) / len(bits)
        if self.router_share:
            with torch.no_grad():
                found["routers' cost"] = float(model(input_ids=as_ids(windows), use_cache=False).cost)
        model.config.route = policies[-1]
        return found

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        """The oracle's loss against its budget, and where the routers spend."""
        from ...core.charts import bars_svg, inline_image, lines_svg

        found = {}
        layers = model.config.num_hidden_layers
        if layers <= EXHAUSTIVE:
            routes = all_routes(layers, model.config.allow_skip)
            losses = torch.cat([route_losses(model, row, routes) for row in as_ids(windows[:4])])
            lines = {
                f"oracle, {mode.replace('_', ' ')} so many": [
                    [(float(b), float(v)) for b, v in enumerate(budget_curve(losses, routes, mode).tolist())]
                ]
                for mode in ("at_most", "exactly")
            }
            chart = lines_svg(lines, "large blocks a token", "nats of the next byte")
            found["The oracle's loss by budget"] = inline_image(chart, "loss of the oracle against its budget")
        if self.router_share:
            with torch.no_grad():
                taken = model(input_ids=as_ids(windows), use_cache=False, route="router").routes
            shares = {f"layer {i + 1}": 100 * float(v) for i, v in enumerate((taken == BIG).float().mean((0, 1)))}
            chart = bars_svg(shares, "% of tokens that take the large block")
            found["Where the routers spend"] = inline_image(chart, "large blocks by layer")
        return found


@dataclass
class DuoLlm(Architecture):
    """A choice of feed-forward blocks for every token and layer.

    Args:
        route: the policy, ``"router"``, ``"big"``, ``"small"``, ``"random"`` or ``"skip"``; None takes the network's.
        budget: large blocks that the oracle may spend on a token, at most.
        tries: routes that the oracle draws where there are too many layers for all of them.

    Raises:
        BadInputError: an unknown policy, or a setting out of range.
    """

    route: str | None = None
    budget: int = 1
    tries: int = 100
    declares: ClassVar[Network] = Network(
        DuoLlmConfig, DuoLlmForCausalLM, ("large blocks", "route", "cost", "nats", "oracle", "difficulty")
    )
    weights: ClassVar[str] = "duo-llm-prose"
    headline: ClassVar[str] = "nats per token"
    example: ClassVar[str] = "The value of the expression is the object that the name is bound to."
    recipe: ClassVar[type | None] = DuoLlmRecipe

    def __post_init__(self) -> None:
        if self.route is not None and self.route not in POLICIES:
            raise BadInputError(f"route is {', '.join(POLICIES)}; got {self.route!r}.")
        if self.budget < 0 or self.tries < 1:
            raise BadInputError(f"budget is 0 or more, and tries 1 or more; got {self.budget} and {self.tries}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        return DuoLlmForCausalLM(
            DuoLlmConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                small_intermediate_size=8,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=128,
                pad_token_id=0,
                eos_token_id=None,
                route="router",
                train_route="router",
                router_training="expectation",
                cost_weight=0.1,
            )
        ).eval()

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return byte_tokenizer()

    def arms(self) -> dict[str, Architecture]:
        return {"all large": DuoLlm("big", self.budget), "all small": DuoLlm("small", self.budget)}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        tokenizer = tokenizer or byte_tokenizer()
        layers = model.config.num_hidden_layers
        if self.budget > layers:
            raise BadInputError(f"The budget is at most the {layers} layers; got {self.budget}.")
        ids = text_ids(model, tokenizer, text)
        output = model(input_ids=ids, use_cache=False, route=self.route)
        routes, tokens = output.routes[0], ids[0].tolist()
        losses = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:], reduction="none").tolist()
        table = output.routes.new_tensor(model.config.costs, dtype=torch.float32)
        search = "exhaustive" if layers <= EXHAUSTIVE else "random"
        found = oracle_routes(model, ids, self.budget, search=search, context_policy=output.routes, tries=self.tries)
        best = ["".join(LETTERS[c] for c in row) for row in found.routes.tolist()]
        figures = {
            "mean cost of a layer": float(output.cost),
            self.headline: sum(losses) / len(losses),
            f"nats, oracle of {self.budget}": float(found.losses.mean()),
        }
        blocks = f"{self.budget} large block{'s' * (self.budget != 1)}"
        note = (
            "The oracle knows the next token, so part of its gain is selection. A token's difficulty is what up to "
            f"{blocks} gain over small ones ({search} search)."
        )
        trace = TokenTrace(tokens, title="routes", station="architectures")
        trace.add("large blocks", (routes == BIG).sum(-1))
        trace.add("route", ["".join(LETTERS[c] for c in row) for row in routes.tolist()])
        trace.add("cost", table[routes].mean(-1))
        trace.add("nats", [*losses, None])  # of the next token, as the oracle's
        trace.add("oracle", [*best, None])
        trace.add("difficulty", [*found.difficulty.tolist(), None])
        behind = written(model, tokenizer, ids, new_tokens, route=self.route)
        return Observation([trace.with_text(tokenizer)], figures, behind, notes=[note] if self.route is None else [])
