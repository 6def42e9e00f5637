"""Which attention layers of a model TokenSelect can serve, and how each rotates its queries and keys.

Nothing is known by a family's name. Each attention layer is asked: it reads a few random vectors, once with the model's
rotary embedding and once with one that stands still, and its queries and keys are looked at before they attend. A known
rotation must lead from one to the other; a layer where they are equal rotates nothing. Whatever else a layer does to
positions is refused. The layers alone run, not the model.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.errors import UnsupportedModelError
from .attention import IMPLEMENTATION, Asked, Rotation, angles_of, find_rotaries, rotate_halves, rotate_pairs

ALONE = frozenset({"sliding_attention", "chunked_attention"})
"""Kinds of layers that attend to a window: they are left alone."""
SELECTING = frozenset({"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"})
"""Kinds of layers that choose, or merge, the keys that they attend to."""
CACHES = ("past_key_values", "layer_past")
"""What attention layers call the cache."""
PLACED = re.compile(r"rotary|rope|pos_|position|wpe|alibi")
"""Names of modules that tell positions."""
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
    rotaries = rotaries_of(model)
    name = type(model).__name__
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModelError(
            f"The last layers of {name} borrow keys and are handed only the tokens whose logits are kept.",
            "TokenSelect follows models in which every layer keeps keys of its own (num_kv_shared_layers=0).",
        )
    kinds = getattr(text, "layer_types", None)
    only = "sliding_attention" if getattr(text, "sliding_window", None) is not None else "full_attention"
    if "hybrid" in (kinds or ()):
        raise UnsupportedModelError(
            f"TokenSelect selects keys; {name} keeps keys and a recurrent state together in one layer (hybrid).",
            "Decode it without TokenSelect.",
        )
    plans: list[Plan] = []
    full = last = 0
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not _attends(module, bool(rotaries)):
            continue
        kind, last = kinds[index] if kinds else only, max(last, index)
        if kind in ALONE:
            plans.append(Plan(module, True))
        elif kind == "full_attention":
            plans.append(_ask(name, module, rotaries, kind, text.hidden_size))
            full += 1
        elif kind in SELECTING:
            raise UnsupportedModelError(
                f"TokenSelect selects keys for layers that attend to all of them; {name} selects keys itself ({kind}).",
                "Decode it without TokenSelect.",
            )
    expected = sum(kind not in ALONE and "full_attention" in kind for kind in kinds or [only] * text.num_hidden_layers)
    if set(kinds or ()) == {"linear_attention"}:
        raise UnsupportedModelError(
            f"TokenSelect selects keys for attention layers; {name} has no attention layers.",
            "Decode it without TokenSelect.",
        )
    if full and last + 1 < expected:
        raise UnsupportedModelError(
            f"TokenSelect keeps the keys of each layer once; the layers of {name} run several times for each token.",
            "Decode it without TokenSelect.",
        )
    if not plans or full != expected:
        raise UnsupportedModelError(
            f"TokenSelect finds {full} of {expected} attention layers of {name} that are handed rotary embeddings.",
            "It works with models that rotate queries and keys in their layers, as Llama does.",
        )
    return plans


def rotaries_of(model: PreTrainedModel) -> list[nn.Module]:
    """The rotary embeddings of a model; none where its attention knows no positions at all.

    So it is in models whose recurrent layers tell the order of tokens, and that have no embedding of positions.

    Raises:
        UnsupportedModelError: positions come from elsewhere than a rotary embedding.
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    placed = any(PLACED.search(name.rpartition(".")[2]) for name, _ in model.named_modules())
    return [] if "linear_attention" in kinds and not placed else find_rotaries(model)


def _attends(module: nn.Module, rotates: bool = True) -> bool:
    """Whether a module is an attention layer that is handed a cache and, where the model has any, rotary embeddings."""
    given = inspect.signature(module.forward).parameters
    inside = any(hasattr(child, "layer_idx") for name, child in module.named_modules() if name)
    told = "position_embeddings" in given or not rotates
    return told and any(name in given for name in CACHES) and not inside


def real_and_still(rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor, kind: str) -> tuple[object, object]:
    """A rotary embedding's output, and one that rotates nothing."""
    extra = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    real = rotary(x, positions, **extra)
    return real, at_rest(real)


def at_rest(real: object, shape: Sequence[int] | None = None) -> object:
    """The angle 0 in the form and, unless told another, the shape of ``real``.

    Raises:
        UnsupportedModelError: ``real`` is nothing that ``angles_of`` reads.
    """
    first, *others = angles_of(real)
    shape = first.shape if shape is None else (*shape, first.shape[-1])
    if not others:  # 1 as a complex number
        return first.new_ones(shape)
    return first.new_ones(shape), others[0].new_zeros(shape)


def same(rest: object, given: object) -> bool:
    """Whether a layer was handed ``rest`` itself; a tuple may have been packed anew."""
    if isinstance(rest, tuple):
        return isinstance(given, tuple) and len(given) == 2 and given[0] is rest[0]
    return given is rest


def _ask(name: str, module: nn.Module, rotaries: list[nn.Module], kind: str, size: int) -> Plan:
    """How one layer rotates."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, generator=generator).to(weight)
    start = 3
    positions = torch.arange(start, start + 4, device=x.device)[None]
    if not rotaries:
        _check_told(name, _see(name, module, x, None, positions))
        return Plan(module, False)
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
    _check_told(name, turned)
    if torch.equal(turned.query, plain.query) and torch.equal(turned.key, plain.key):
        return Plan(module, False)
    states = [(plain.query, turned.query), (plain.key, turned.key)]
    own = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    extra = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}

    def compute(states: torch.Tensor, places: torch.Tensor) -> object:
        return rotary(states, places, **extra)

    tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
    forms = itertools.product((own, rotate_halves, rotate_pairs), (False, True), (False, True))
    for apply, last, halved in forms:
        if apply is None:
            continue
        try:
            rotation = Rotation(rotary, apply, compute, last, halved)
            if all(
                torch.allclose(rotation(still, start), after, atol=tolerance, rtol=tolerance) for still, after in states
            ):
                return Plan(module, False, apply, last, halved)
        except (RuntimeError, TypeError, ValueError, IndexError):  # a function of another form: it does not fit
            continue
    raise UnsupportedModelError(
        f"TokenSelect does not know how {name} rotates its queries and keys.",
        "It works with models that rotate vectors, or parts of them, and do nothing else by position.",
    )


def _check_told(name: str, asked: Asked) -> None:
    """Raises UnsupportedModelError where a layer tells its attention function what a selection would not honour."""
    if unknown := sorted(asked.told - HONOURED):
        raise UnsupportedModelError(
            f"Attention of {name} is told {', '.join(unknown)}, which TokenSelect does not know.",
            "It works with models that attend as Llama does.",
        )


def _see(name: str, module: nn.Module, x: torch.Tensor, given: object, positions: torch.Tensor) -> Asked:
    """A layer's queries and keys, as they reach its attention function."""
    offered = {"hidden_states": x, "position_embeddings": given, "attention_mask": None}
    offered |= dict.fromkeys(CACHES)
    offered |= {"position_ids": positions, "shared_kv_states": {}}
    known = inspect.signature(module.forward).parameters
    asked = Asked()
    module._token_select = asked  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module.forward(**{key: value for key, value in offered.items() if key in known})
    except Asked:
        return asked
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedModelError(f"TokenSelect cannot read the attention layers of {name}: {error}") from error
    finally:
        module.__dict__.pop("_token_select", None)
    raise UnsupportedModelError(
        f"Attention of {name} does not go through transformers' attention functions.",
        f"TokenSelect is one of them ({IMPLEMENTATION!r}).",
    )
