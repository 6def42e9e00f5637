"""How a feature draft learns: the target's distribution at every position, from true states and from its own.

In a drafted tree the draft soon stands where the target has not been, on its own output. So every position is predicted
once from the target's states and then ``steps - 1`` times more from the draft's own outputs, as inside a chain (the
training of EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .configuration_feature_draft import FeatureDraftConfig
from .modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap, decoder_parts


@dataclass
class Row:
    """One text: its tokens, and how many of them are the prompt."""

    ids: list[int]
    prompt: int


@dataclass
class Batch:
    """Texts as the draft sees them, padded on the right.

    Attributes:
        ids: ``[B, T]``.
        features: ``[B, T, F]`` the target's states one position earlier.
        mask: ``[B, T]`` positions whose next token the target wrote itself.
        teacher: ``[N, draft vocabulary]`` the target's distribution at the N positions of ``mask``.
    """

    ids: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor
    teacher: torch.Tensor


def feature_layers(config: PreTrainedConfig) -> list[int]:
    """A low, a middle and the last state: a third, two thirds, and the whole of the depth."""
    depth = config.get_text_config(decoder=True).num_hidden_layers
    return sorted({max(round(depth / 3), 1), max(round(2 * depth / 3), 1), depth})


def draft_config(config: PreTrainedConfig, draft_vocab: int) -> FeatureDraftConfig:
    """One Llama block of the target's width; head sizes and rotation are the target's where it has such."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or max(text.hidden_size // 64, 1)
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None:
        head_dim = 2 * max(text.hidden_size // heads // 2, 1)  # rotation turns pairs
    groups = getattr(text, "num_key_value_heads", None) or heads
    intermediate = getattr(text, "intermediate_size", None)
    rope = getattr(text, "rope_parameters", None)
    plain = rope if isinstance(rope, dict) and rope.get("rope_type") == "default" else {}
    return FeatureDraftConfig(
        hidden_size=text.hidden_size,
        intermediate_size=intermediate if isinstance(intermediate, int) else 4 * text.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups if isinstance(groups, int) and heads % groups == 0 else heads,
        head_dim=head_dim,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2048,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": plain.get("rope_theta", 10000.0)},
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        vocab_size=text.vocab_size,
        target_vocab_size=text.vocab_size,
        draft_vocab_size=draft_vocab,
        feature_layers=feature_layers(config),
        tie_word_embeddings=False,
        architectures=["FeatureDraftForCausalLM"],
    )


def new_draft(target: PreTrainedModel, token_ids: torch.Tensor) -> FeatureDraftForCausalLM:
    """An untrained draft in training mode, attached to ``target``, with a head for ``token_ids``.

    Where the target's last block is a Llama block of the same shape, the draft's starts as a copy: it already speaks to
    this head.
    """
    draft = FeatureDraftForCausalLM(draft_config(target.config, len(token_ids)))
    draft.draft_token_ids = token_ids.to(torch.int32)
    blocks, last = decoder_parts(target)
    for own, theirs in ((draft.block, blocks[-1]), (draft.norm, last)):
        state = theirs.state_dict()
        if {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in own.state_dict().items()
        }:
            own.load_state_dict(state)
    draft.train()
    return draft.attach(target).float()


def collate(rows: list[Row], target: PreTrainedModel, tap: FeatureTap, token_ids: torch.Tensor, length: int) -> Batch:
    """Reads texts with the target (no gradient); of longer texts than ``length`` the beginning is left out."""
    device = target.device
    size = min(max(len(row.ids) for row in rows), length)
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    held, mask = torch.zeros(len(rows), size, dtype=torch.long), torch.zeros(len(rows), size, dtype=torch.bool)
    for place, row in enumerate(rows):
        shown = row.ids[-size:]
        ids[place, : len(shown)] = torch.tensor(shown)
        held[place, : len(shown)] = 1
        first = max(row.prompt - 1 - (len(row.ids) - len(shown)), 0)
        mask[place, first : len(shown) - 1] = True  # behind the last token the target wrote nothing
    ids, held, mask = ids.to(device), held.to(device), mask.to(device)
    with torch.no_grad():
        logits = target(input_ids=ids, attention_mask=held).logits
        teacher = torch.softmax(logits[mask][:, token_ids].float(), -1)
    states = tap.last.float()
    features = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    return Batch(ids, features, mask, teacher)


def unrolled(
    draft: FeatureDraftForCausalLM, ids: torch.Tensor, features: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """States of the draft after 1, 2, ... ``steps`` own predictions: ``[B, T, D]`` each.

    At step s the query at position i sees the first pass up to i - s and, of each later pass j, only the entry on its
    own chain (position i - (s - j)). That is exactly what it would see inside a drafted chain that left the verified
    text at i - s.
    """
    batch, length = ids.shape
    embedding = draft.get_input_embeddings()
    assert embedding is not None
    embeds = embedding(ids).detach().float()
    positions = torch.arange(length, device=ids.device)[None].expand(batch, -1)
    cache = DynamicCache()
    rows, columns = positions[0, :, None], positions[:1]
    outputs: list[torch.Tensor] = []
    hidden = None
    for step in range(steps):
        seen = [columns <= rows - step, *(columns == rows - (step - later) for later in range(1, step + 1))]
        inputs = draft.mix_inputs(embeds, features if step == 0 else None, hidden)
        output = draft.run_block(inputs, positions, torch.cat(seen, 1)[None, None], cache)
        outputs.append(output)
        hidden = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], 1)
    return outputs


def distil(
    draft: FeatureDraftForCausalLM, batch: Batch, steps: int, decay: float = 0.8
) -> tuple[Any, list[torch.Tensor]]:
    """The loss, and the share of positions at every step where draft and target have the same likeliest token.

    Args:
        steps: predictions in a row.
        decay: each later one weighs this much less.
    """
    slot = torch.full(batch.mask.shape, -1, device=batch.mask.device)
    slot[batch.mask] = torch.arange(len(batch.teacher), device=batch.mask.device)
    head = draft._head_layer[0]
    total: Any = 0.0
    shares = []
    for step, output in enumerate(unrolled(draft, batch.ids, batch.features, steps)):
        use = batch.mask.clone()
        if step:  # the chain must have left the text where the target's own words had begun; half of them suffice
            use[:, step:] &= batch.mask[:, :-step]
            use[:, :step] = False
            if draft.training:
                use &= torch.rand(use.shape).to(use.device) < 0.5
        goal = batch.teacher[slot[use]]
        logits = F.linear(output[use].to(head.weight.dtype), head.weight, head.bias).float()
        if len(goal):
            total = total - decay**step * (goal * torch.log_softmax(logits, -1)).sum(-1).mean()
        shares.append((logits.argmax(-1) == goal.argmax(-1)).float().mean().detach() if len(goal) else torch.zeros(()))
    return total, shares
