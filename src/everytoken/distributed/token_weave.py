"""TokenWeave: one part of a step's tokens computes while the other communicates (arXiv 2505.11329).

Under tensor parallelism every layer has two all-reduces. TokenWeave cuts a step's tokens once into two parts, and
makes reduce-scatter, residual, norm of own rows and all-gather one operation ``f`` (``fused_norm``). A layer has four
stages::

    compute         attention 1    attention 2    MLP 1          MLP 2
    communication   f of MLP 2     f of attn 1    f of attn 2    f of MLP 1
                    (layer before)

The lanes meet after every stage, so a layer takes ``max(a1, f2) + max(a2, f1) + max(m1, f2) + max(m2, f1)``. The first
layer's norm needs no exchange, and the last exchange hides behind nothing. Attention 2 reads the keys of part 1, which
the order of the compute lane guarantees. Steps with few tokens run whole, with ``f`` alone.

On CUDA the lanes are two streams; elsewhere the same calls run one after the other, with the same result. It is for
inference: nothing is kept for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError, UnsupportedModelError, check_choices
from .fused_norm import all_reduce_add_norm, own_rows, ranks, reduce_add_norm
from .lanes import Lanes
from .sharding import check_llama_like, check_mesh, divides_heads, shard, tolerance
from .splits import ALIGN, MINIMUM, Cost, Split, check_table, plan_split
from .texts import BatchTexts, RequestTexts, check_cache

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

SCHEDULES = ("woven", "fused", "plain")
DERIVED = ("cache_position", "logits_to_keep", "return_dict")
"""Arguments of a forward that say nothing that the others do not."""


@dataclass
class TokenWeave:
    """How steps are run.

    Args:
        schedule: ``"woven"``; ``"fused"`` never cuts a step; ``"plain"`` is the baseline: all-reduce, residual and
            norm of all rows on every rank.
        minimum: steps of fewer tokens are not cut.
        align: the padding; cuts are multiples of its half.
        table: the published offsets of a model (``splits.PUBLISHED``) by name; None cuts at the aligned half.
        first: cut every step of more tokens exactly here; None plans.
        offsets: a table of one's own, see ``splits.offset_table``.
        cost: a step's tokens -> the cost of its cuts; the cheapest is taken.

    Raises:
        BadInputError: an unknown schedule or table, numbers out of range, or two ways of cutting at once.
    """

    schedule: str = "woven"
    minimum: int = MINIMUM
    align: int = ALIGN
    table: str | None = None
    first: int | None = None
    offsets: dict[int, int] | None = None
    cost: Callable[[int], Cost] | None = None

    def __post_init__(self) -> None:
        check_choices(self, schedule=SCHEDULES)
        if self.minimum < 2 or self.align < 2 or self.align % 2 or (self.first is not None and self.first < 1):
            raise BadInputError(
                "A minimum is 2 or more, a padding is even, and a cut comes after one token or more; got "
                f"{self.minimum}, {self.align}, {self.first}."
            )
        if sum(item is not None for item in (self.table, self.first, self.offsets, self.cost)) > 1:
            raise BadInputError("A cut comes from one of table, first, offsets and cost.")
        if self.first is None and self.cost is None:
            check_table(self.offsets if self.offsets is not None else self.table, self.minimum, self.align)

    def plan(self, tokens: int, world: int = 1) -> Split:
        """The cut of a step. ``first`` that the step does not reach leaves it whole."""
        if self.schedule != "woven" or (self.first is not None and self.first >= tokens):
            return plan_split(tokens, minimum=tokens + 2, align=self.align, world=world)
        cost = None if self.cost is None else self.cost(tokens)
        table = self.offsets if self.offsets is not None else self.table
        return plan_split(tokens, table, cost, first=self.first, minimum=self.minimum, align=self.align, world=world)

    def weave(self, model: PreTrainedModel, mesh: DeviceMesh | None = None) -> Woven:
        """Puts a model under tensor parallelism and runs its steps so.

        The model's own ``forward`` and ``generate`` work as before. Every rank calls them with the same arguments. The
        weights stay cut when the weaving is taken off.

        Args:
            model: a Llama-like causal model of transformers, whole, on this rank's device, in evaluation.
            mesh: a ``DeviceMesh`` of one dimension; None is one rank without a process group.

        Raises:
            UnsupportedModelError: a model that is not Llama-like, quantised or adapted weights, hooks.
            BadInputError: ranks that do not divide the model, or a mesh that does not fit it.
        """
        check_llama_like(model)
        if "forward" in vars(model.model):
            raise BadInputError("This model is woven already.", "Take it off first: woven.remove()")
        if mesh is not None:
            check_mesh(model, mesh)
        return Woven(model, mesh, self)


def weave(model: PreTrainedModel, mesh: DeviceMesh | None = None, **settings: Any) -> Woven:
    """``TokenWeave(**settings).weave(model, mesh)``."""
    return TokenWeave(**settings).weave(model, mesh)


@dataclass
class Request:
    """New tokens of one request.

    Attributes:
        ids: ``[n]``, one or more.
        cache: what was read before, a ``DynamicCache`` of its own; it gets the new keys.
    """

    ids: torch.Tensor
    cache: Any


@dataclass
class Steps:
    """Counters: forwards, how many of them were cut, and tokens."""

    forwards: int = 0
    woven: int = 0
    tokens: int = 0
    splits: list[Split] = field(default_factory=list)


class Woven:
    """A model that runs woven, until ``remove``; made by ``TokenWeave.weave``.

    Attributes:
        model: the model.
        settings: how steps are run; may be changed between steps.
        steps: counters.
        log: set it to a list, and it gets ``(lane, what)`` in the order of issue.
    """

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh | None, settings: TokenWeave):
        self.model, self.settings, self.steps = model, settings, Steps()
        self.group: Any = None
        self.reduce, self.world = True, 1
        self.heads = int(model.config.num_key_value_heads)
        self._lanes = Lanes(model.device)
        self._check_formula()
        if mesh is not None:
            self.group, self.world = mesh.get_group(), mesh.size()
            self.reduce = divides_heads(model.config, self.world)
            self.heads //= self.world if self.reduce else 1
            shard(model, mesh)
        model.model.forward = self._forward
        assert ranks(self.group) == self.world

    @property
    def log(self) -> list[tuple[str, str]] | None:
        return self._lanes.log

    @log.setter
    def log(self, value: list[tuple[str, str]] | None) -> None:
        self._lanes.log = value

    def remove(self) -> None:
        """Takes the weaving off. A model that was cut over ranks stays cut and cannot run alone."""
        vars(self.model.model).pop("forward", None)

    @torch.no_grad()
    def _check_formula(self) -> None:
        """Runs a few tokens both ways before anything is changed: a model that computes anything else is refused."""
        base = self.model.model
        ids = torch.arange(5, device=self.model.device)[None] % self.model.config.vocab_size
        theirs = base(input_ids=ids, use_cache=False).last_hidden_state
        ours = self._read(base.embed_tokens(ids), None, BatchTexts(1, 5, None, None, ids.device), Split(5, 2, (2, 3)))
        far = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        if not far <= tolerance(theirs.dtype):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has a Llama's parts but computes something else: its states differ by "
                f"{float(far):.2g} of the largest.",
                "It may scale embeddings or residuals, or leave positions out in some layers.",
            )
        head, logits = self.model.get_output_embeddings(), self.model(input_ids=ids, use_cache=False).logits
        far = (head(theirs) - logits).abs().max() / logits.abs().max().clamp(min=1e-6)
        if not far <= tolerance(theirs.dtype):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} changes its logits behind the head.", "It may scale or cap them."
            )

    def _forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """What stands in the place of the base model's forward."""
        from transformers import DynamicCache
        from transformers.modeling_outputs import BaseModelOutputWithPast

        config, base = self.model.config, self.model.model
        asked = [name for name, value in others.items() if value is not None and value is not False]
        asked = [name for name in asked if name not in DERIVED]
        asked += [name for name in ("output_attentions", "output_hidden_states") if getattr(config, name, False)]
        if asked:
            raise BadInputError(f"A woven model takes no {asked[0]}.", "Between layers a rank holds its own rows only.")
        if self.model.training:
            raise BadInputError("A woven model is for inference.", "Call model.eval() first.")
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInputError("A forward takes one of input_ids and inputs_embeds.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise BadInputError(f"A woven model takes an attention mask [B, keys]; got {attention_mask.dim()} axes.")
        if past_key_values is not None:
            check_cache(past_key_values, self.heads)
        elif config.use_cache if use_cache is None else use_cache:
            past_key_values = DynamicCache(config=config)
        with torch.no_grad():
            hidden = base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            texts = BatchTexts(hidden.shape[0], hidden.shape[1], past_key_values, attention_mask, hidden.device)
            if position_ids is None:
                position_ids = torch.arange(texts.past, texts.past + texts.width, device=hidden.device)[None]
            states = self._read(hidden, position_ids, texts, self._plan(texts.rows * texts.width))
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)

    @torch.no_grad()
    def step(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        """One step over requests of different lengths: long prompts and single tokens together.

        Returns:
            The logits ``[n, vocabulary]`` of each request's new tokens.

        Raises:
            BadInputError: no requests, one without tokens, or one cache for two.
            UnsupportedModelError: a cache of another kind.
        """
        if not requests or any(item.ids.dim() != 1 or not len(item.ids) for item in requests):
            raise BadInputError("A step has requests of one token or more each, ids [n].")
        if len({id(item.cache) for item in requests}) < len(requests):
            raise BadInputError("Two requests share a cache.", "Give each its own DynamicCache().")
        for item in requests:
            check_cache(item.cache, self.heads)
        counts = [len(item.ids) for item in requests]
        hidden = self.model.model.embed_tokens(torch.cat([item.ids for item in requests]))
        begins = [item.cache.get_seq_length() for item in requests]
        positions = [torch.arange(b, b + n, device=hidden.device) for b, n in zip(begins, counts, strict=True)]
        texts = RequestTexts(counts, [item.cache for item in requests], hidden.device)
        states = self._read(hidden[None], torch.cat(positions)[None], texts, self._plan(sum(counts)))
        return list(self.model.get_output_embeddings()(states[0]).split(counts))

    def _plan(self, tokens: int) -> Split:
        split = self.settings.plan(tokens, self.world)
        self.steps.forwards, self.steps.tokens = self.steps.forwards + 1, self.steps.tokens + tokens
        self.steps.woven += split.woven
        self.steps.splits = [*self.steps.splits[-99:], split]
        return split

    def _read(
        self, hidden: torch.Tensor, positions: torch.Tensor | None, texts: BatchTexts | RequestTexts, split: Split
    ) -> torch.Tensor:
        """Embedded tokens ``[B, n, h]`` -> the final norm's states ``[B, n, h]``."""
        base, shape = self.model.model, hidden.shape
        if positions is None:
            positions = torch.arange(shape[1], device=hidden.device)[None]
        cos, sin = base.rotary_emb(hidden, position_ids=positions)
        rows = hidden.reshape(-1, shape[-1])
        turns = [item.expand(shape[0], *item.shape[1:]).reshape(len(rows), -1) for item in (cos, sin)]
        step = _Step(self, texts, turns[0], turns[1])
        if split.woven:
            states = step.woven(rows, split.first)
        else:
            states = step.whole(rows, self.settings.schedule == "plain")
        return states.reshape(shape)


@dataclass
class _Step:
    """One step: the model's pieces, and the order in which they run."""

    owner: Woven
    texts: BatchTexts | RequestTexts
    cos: torch.Tensor
    sin: torch.Tensor

    def attention(self, layer: Any, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Attention of a stretch of tokens, up to the sum over ranks: ``[m, h] -> [m, h]``."""
        from transformers.models.llama.modeling_llama import (
            ALL_ATTENTION_FUNCTIONS,
            apply_rotary_pos_emb,
            eager_attention_forward,
        )

        module = layer.self_attn
        q, k, v = (
            getattr(module, name)(rows).view(len(rows), -1, module.head_dim) for name in ("q_proj", "k_proj", "v_proj")
        )
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        cos, sin = self.cos[first : first + len(rows)], self.sin[first : first + len(rows)]
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        name = self.owner.model.config._attn_implementation
        run = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
            if name == "eager":  # it adds a mask, and knows no causality of its own
                if allowed is None and q.shape[2] > 1:
                    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
                if allowed is not None:
                    allowed = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)
            found: torch.Tensor = run(module, q, k, v, allowed, dropout=0.0, scaling=module.scaling)[0]
            return found

        found = self.texts.attend(module.layer_idx, q, k, v, first, attend)
        output: torch.Tensor = module.o_proj(found.reshape(len(rows), -1))
        return output

    def woven(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Both parts through all layers, stage by stage."""
        owner, layers = self.owner, self.owner.model.model.layers
        group, run = owner.group, owner._lanes.stage
        part_1, part_2 = rows[:first], rows[first:]
        held_1, held_2 = own_rows(part_1, group), own_rows(part_2, group)
        norms = [*(layer.input_layernorm for layer in layers[1:]), owner.model.model.norm]
        norm = layers[0].input_layernorm  # every rank has the embeddings: nothing to exchange
        part_1, part_2 = norm(part_1), norm(part_2)
        end_2: Any = None

        def exchange(result: torch.Tensor, held: torch.Tensor, norm: Any, reduce: bool = True) -> Any:
            return reduce_add_norm(result, held, norm, group, reduce)

        for number, layer in enumerate(layers):
            after, cut = layer.post_attention_layernorm, owner.reduce
            told = [f"{what} {number}.{part}" for what in ("attention", "mlp") for part in (1, 2)]
            behind = None if end_2 is None else partial(exchange, end_2, held_2, norms[number - 1])
            lanes = (told[0], f"exchange of mlp {number - 1}.2")
            mid_1, sent = run(partial(self.attention, layer, part_1, 0), behind, lanes)
            if sent is not None:
                part_2, held_2 = sent
            carry = partial(exchange, mid_1, held_1, after, cut)
            lanes = (told[1], f"exchange of {told[0]}")
            mid_2, (part_1, held_1) = run(partial(self.attention, layer, part_2, first), carry, lanes)
            carry = partial(exchange, mid_2, held_2, after, cut)
            end_1, (part_2, held_2) = run(partial(layer.mlp, part_1), carry, (told[2], f"exchange of {told[1]}"))
            carry = partial(exchange, end_1, held_1, norms[number])
            end_2, (part_1, held_1) = run(partial(layer.mlp, part_2), carry, (told[3], f"exchange of {told[2]}"))
        carry = partial(exchange, end_2, held_2, norms[-1])
        _, sent = run(None, carry, ("", f"exchange of mlp {len(layers) - 1}.2"))
        return torch.cat([part_1, sent[0]])

    def whole(self, rows: torch.Tensor, plain: bool) -> torch.Tensor:
        """All tokens through all layers, with the one operation or with all-reduces."""
        owner, layers = self.owner, self.owner.model.model.layers
        run = all_reduce_add_norm if plain else reduce_add_norm
        held = rows if plain else own_rows(rows, owner.group)
        rows = layers[0].input_layernorm(rows)
        norms = [*(layer.input_layernorm for layer in layers[1:]), owner.model.model.norm]
        for layer, norm in zip(layers, norms, strict=True):
            result = self.attention(layer, rows, 0)
            rows, held = run(result, held, layer.post_attention_layernorm, owner.group, owner.reduce)
            rows, held = run(layer.mlp(rows), held, norm, owner.group)
        return rows
