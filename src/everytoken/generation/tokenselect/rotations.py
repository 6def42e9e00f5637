"""Which attention layers of a model TokenSelect can serve, and how each rotates its queries and keys.

Nothing is known by a family's name. Each attention layer is asked: it reads a few random vectors, once with the model's
rotary embedding and once with one that stands still, and its queries and keys are looked at before they attend. A known
rotation must lead from one to the other; a layer where they are equal rotates nothing. Whatever else a layer does to
positions is refused. The layers alone run, not the model.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.errors import UnsupportedModelError
from .attention import IMPLEMENTATION, Asked, Rotation, find_rotaries, rotate_halves

ALONE = frozenset({"sliding_attention", "chunked_attention"})
"""Kinds of layers that attend to a window: they are left alone."""
CACHES = ("past_key_values", "layer_past")
"""What attention layers call the cache."""
HONOURED = frozenset({
    "dropout", "scaling", "softcap", "s_aux", "sliding_window", "position_ids", "use_cache", "output_attentions",
    "is_causal",
})  # fmt: skip
"""What a layer may tell its attention function."""
Apply = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Plan:
    """How one attention layer is served.

    Attributes:
        module: the layer's attention.
        alone: whether it is left alone.
        apply: how it rotates, or None where it does not.
        last, halved: what ``Rotation`` is told of it.
    """

    module: nn.Module
    alone: bool
    apply: Apply | None = None
    last: bool = False
    halved: bool = False


def plan_layers(model: PreTrainedModel) -> list[Plan]:
    """A plan for every attention layer.

    Raises:
        UnsupportedModelError: a layer that rotates in an unknown way, or attends in one that selection cannot.
    """
    rotaries = find_rotaries(model)
    name = type(model).__name__
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    only = "sliding_attention" if getattr(text, "sliding_window", None) is not None else "full_attention"
    plans, full = [], 0
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not _attends(module):
            continue
        kind = kinds[index] if kinds else only
        if kind in ALONE:
            plans.append(Plan(module, True))
        elif kind == "full_attention":
            plans.append(_ask(name, module, rotaries, kind, text.hidden_size))
            full += 1
    expected = sum(kind not in ALONE and "full_attention" in kind for kind in kinds or [only] * text.num_hidden_layers)
    if not plans or full != expected:
        raise UnsupportedModelError(
            f"TokenSelect finds {full} of {expected} attention layers of {name} that are handed rotary embeddings.",
            "It works with models that rotate queries and keys in their layers, as Llama does.",
        )
    return plans


def _attends(module: nn.Module) -> bool:
    """Whether a module is an attention layer that is handed rotary embeddings and a cache."""
    given = inspect.signature(module.forward).parameters
    inside = any(hasattr(child, "layer_idx") for name, child in module.named_modules() if name)
    return "position_embeddings" in given and any(name in given for name in CACHES) and not inside


def real_and_still(rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor, kind: str) -> tuple[object, object]:
    """A rotary embedding's output, and one that rotates nothing."""
    extra = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    real = rotary(x, positions, **extra)
    return real, at_rest(real)


def at_rest(real: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the angle 0, in the shape of ``real``.

    Raises:
        UnsupportedModelError: ``real`` is no pair of them.
    """
    if not (isinstance(real, tuple) and len(real) == 2 and all(part.dim() == 3 for part in real)):
        raise UnsupportedModelError(
            "TokenSelect reads a rotary embedding as cosines and sines [B, T, d]; this model has another form.",
            "It works with models that rotate as Llama does.",
        )
    return torch.ones_like(real[0]), torch.zeros_like(real[1])


def _ask(name: str, module: nn.Module, rotaries: list[nn.Module], kind: str, size: int) -> Plan:
    """How one layer rotates."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, generator=generator).to(weight)
    start = 3
    positions = torch.arange(start, start + 4, device=x.device)[None]
    rotary = rotaries[0]
    for asked in (kind, *sorted(ALONE)):  # an embedding for windows alone has no angles for this kind
        try:
            real, rest = real_and_still(rotary, x, positions, asked)
            kind = asked
            break
        except (KeyError, AttributeError):
            continue
    else:
        raise UnsupportedModelError(f"TokenSelect does not know how {name} computes its rotary embedding.")
    turned, plain = (_see(name, module, x, given, positions) for given in (real, rest))
    if unknown := sorted(turned.told - HONOURED):
        raise UnsupportedModelError(
            f"Attention of {name} is told {', '.join(unknown)}, which TokenSelect does not know.",
            "It works with models that attend as Llama does.",
        )
    if torch.equal(turned.query, plain.query) and torch.equal(turned.key, plain.key):
        return Plan(module, False)
    own = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    extra = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}

    def compute(states: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair: tuple[torch.Tensor, torch.Tensor] = rotary(states, places, **extra)
        return pair

    tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
    forms = itertools.product((own, rotate_halves), (False, True), (False, True))
    for apply, last, halved in forms:
        if apply is None:
            continue
        try:
            rotation = Rotation(rotary, apply, compute, last, halved)
            if all(
                torch.allclose(rotation(before, start), after, atol=tolerance, rtol=tolerance)
                for before, after in ((plain.query, turned.query), (plain.key, turned.key))
            ):
                return Plan(module, False, apply, last, halved)
        except (RuntimeError, TypeError, ValueError, IndexError):  # a function of another form: it does not fit
            continue
    raise UnsupportedModelError(
        f"TokenSelect does not know how {name} rotates its queries and keys.",
        "It works with models that rotate vectors, or parts of them, and do nothing else by position.",
    )


def _see(name: str, module: nn.Module, x: torch.Tensor, given: object, positions: torch.Tensor) -> Asked:
    """A layer's queries and keys, as they reach its attention function."""
    offered = {"hidden_states": x, "position_embeddings": given, "attention_mask": None}
    offered |= dict.fromkeys(CACHES)
    offered |= {"position_ids": positions}
    known = inspect.signature(module.forward).parameters
    asked = Asked()
    module._token_select = asked  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module.forward(**{key: value for key, value in offered.items() if key in known})
    except Asked:
        return asked
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(f"TokenSelect cannot read the attention layers of {name}: {error}") from error
    finally:
        module.__dict__.pop("_token_select", None)
    raise UnsupportedModelError(
        f"Attention of {name} does not go through transformers' attention functions.",
        f"TokenSelect is one of them ({IMPLEMENTATION!r}).",
    )
