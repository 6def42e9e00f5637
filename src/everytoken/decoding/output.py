"""What a decoder returns: ``generate``'s own outputs, with the counters and the trace beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from ..core.trace import TokenTrace
from .call import DecodingCall, DecodingStats


@dataclass
class DecodingOutput(GenerateDecoderOnlyOutput):
    """``generate``'s usual output plus ``stats`` (DecodingStats) and ``trace`` (a TokenTrace per row, or None)."""

    stats: DecodingStats | None = None
    trace: list[TokenTrace] | None = None


@dataclass
class BeamDecodingOutput(GenerateBeamDecoderOnlyOutput):
    """``generate``'s output of beam search plus ``stats`` and ``trace``, as ``DecodingOutput`` has them."""

    stats: DecodingStats | None = None
    trace: list[TokenTrace] | None = None


def collect(call: DecodingCall[Any]) -> DecodingOutput | torch.Tensor:
    """What ``generate`` returns: rows padded to one tensor, wrapped with what was asked for. Counts the new tokens."""
    call.stats.new_tokens = sum(len(row.new) for row in call.rows)
    sequences = join_rows(call.input_ids, [row.new for row in call.rows], call.config)
    if not call.config.return_dict_in_generate:
        return sequences
    return DecodingOutput(
        sequences=sequences,
        scores=stacked([row.scores for row in call.rows]),
        logits=stacked([row.logits for row in call.rows]),
        past_key_values=call.rows[0].cache if len(call.rows) == 1 else None,
        stats=call.stats,
        trace=call.trace or None,
    )


def with_stats(output: Any, call: DecodingCall[Any]) -> Any:
    """An output of transformers' own loops with the call's counters and trace; a tensor of ids stays one."""
    kinds = {GenerateDecoderOnlyOutput: DecodingOutput, GenerateBeamDecoderOnlyOutput: BeamDecodingOutput}
    kind = kinds.get(type(output))
    return output if kind is None else kind(**output, stats=call.stats, trace=call.trace or None)


def join_rows(input_ids: torch.Tensor, new: list[list[int]], config: GenerationConfig) -> torch.Tensor:
    """The prompts with each row's new tokens behind them, padded on the right: ``[B, T + longest]``."""
    pad = getattr(config, "_pad_token_tensor", None)
    pad_id = int(pad) if pad is not None else (config.pad_token_id or 0)
    longest = max(map(len, new))
    block = torch.tensor(
        [tokens + [pad_id] * (longest - len(tokens)) for tokens in new],
        dtype=input_ids.dtype,
        device=input_ids.device,
    )
    return torch.cat([input_ids, block], dim=1)


def stacked(columns: list[list[torch.Tensor] | None]) -> tuple[torch.Tensor, ...] | None:
    """Rows' scores as ``generate`` returns them: one ``[B, V]`` a step; a finished row repeats its last."""
    if not columns or columns[0] is None:
        return None
    rows = [column for column in columns if column is not None]
    longest = range(max(map(len, rows)))
    return tuple(torch.stack([column[min(step, len(column) - 1)] for column in rows]) for step in longest)
