"""Per-token log-probabilities, entropy and KL, and masked reductions.

A vocabulary makes ``[B, T, V]`` the largest tensor of any training step, so nothing here builds it twice.
``token_stats`` starts from hidden states and the output head and works through the tokens in chunks: the logits of one
chunk exist at a time, forward and backward, and the statistics of a reference model are taken in the same pass.
``logps_from_logits`` and its siblings do the same for logits that exist already. All sums run in float32, whatever the
inputs' type.

Conventions: natural logarithms; ``forward`` KL is ``KL(ref || policy)``, ``reverse`` is ``KL(policy || ref)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch.nn import functional as F

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's float32 logits on a CPU, where larger ones leave the caches, and the least on a GPU."""
GPU_CHUNK_BYTES = 512 * 2**20
"""The most on a GPU, where small chunks are many launches and add to the head's gradient as often."""
GPU_SHARE = 16
"""A GPU's chunk takes this part of its free memory at most: some five tensors of its size exist at a time."""

STATISTICS = ("entropy", "forward_kl", "reverse_kl")
"""What ``token_stats`` can compute besides log-probabilities, by the names of its arguments and results."""


class LogitRule(NamedTuple):
    """What a model makes of ``x = head(hidden)`` before the softmax: ``cap tanh(scale x / cap)``, or ``scale x`` where
    nothing is capped.

    Attributes:
        scale: a factor of every logit (Cohere, Granite, Falcon-H1).
        softcap: bound of the logits' absolute value (Gemma 2); None for no bound.
    """

    scale: float = 1.0
    softcap: float | None = None


PLAIN = LogitRule()
"""Logits are ``head(hidden)`` and nothing else."""


class OutputHead(NamedTuple):
    """An output head as plain tensors.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        rule: what follows the product.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rule: LogitRule = PLAIN

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[N, V]`` float32 logits of ``[N, D]`` last hidden states."""
        return _logits(hidden, self.weight, self.bias, self.weight.dtype, self.rule)

    def detached(self) -> OutputHead:
        """The same without gradient."""
        return OutputHead(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.rule)


@dataclass
class TokenStats:
    """Statistics of N scored tokens, each ``[N]`` float32 (None where not asked for).

    Attributes:
        logps: log-probability of each label under the policy.
        entropy: entropy of the policy's distribution, nats.
        ref_logps: log-probability of each label under the reference (no gradient).
        forward_kl: KL(ref || policy) over the full vocabulary.
        reverse_kl: KL(policy || ref) over the full vocabulary.
        aux_loss: a scalar of the whole forward, the load-balancing loss of a mixture of experts, where it was asked
            for.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    forward_kl: torch.Tensor | None = None
    reverse_kl: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def tokens_per_chunk(vocabulary: int, device: torch.device) -> int:
    """How many tokens' float32 logits make one chunk on a device."""
    size = CHUNK_BYTES
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        size = max(size, min(GPU_CHUNK_BYTES, (torch.cuda.mem_get_info(device)[0] + kept) // GPU_SHARE))
    return max(1, size // (4 * vocabulary))


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    rule: LogitRule = PLAIN,
    ref_rule: LogitRule = PLAIN,
    entropy: bool = False,
    forward_kl: bool = False,
    reverse_kl: bool = False,
    chunk_size: int | None = None,
) -> TokenStats:
    """Statistics of tokens from hidden states and heads, without their ``[N, V]`` logits.

    Args:
        hidden: ``[N, D]`` last hidden states, at the positions that *predict* the labels.
        weight: ``[V, D]`` output head.
        labels: ``[N]`` token ids.
        bias: ``[V]`` or None.
        ref_hidden, ref_weight, ref_bias: the same of a frozen reference model (its D may differ); no gradient flows
            there.
        rule, ref_rule: what policy and reference make of the head's product (``core.scoring.output_head`` knows).
        entropy, forward_kl, reverse_kl: what to compute besides ``logps`` (KLs need the reference).
        chunk_size: tokens per chunk; default ``tokens_per_chunk``.

    Raises:
        ValueError: a KL is asked for without a reference, or shapes disagree.
    """
    if (forward_kl or reverse_kl) and ref_hidden is None:
        raise ValueError("KL needs ref_hidden and ref_weight.")
    if ref_hidden is not None and (ref_weight is None or ref_weight.shape[0] != weight.shape[0]):
        raise ValueError("Reference and policy must share one vocabulary (ref_weight is missing or of another size).")
    if hidden.shape[0] != labels.shape[0] or (ref_hidden is not None and ref_hidden.shape[0] != labels.shape[0]):
        raise ValueError(f"{hidden.shape[0]} hidden states for {labels.shape[0]} labels.")
    if chunk_size is None:
        chunk_size = tokens_per_chunk(weight.shape[0], hidden.device)
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    flags = (entropy, forward_kl, reverse_kl)
    outputs = _TokenStats.apply(
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, flags, chunk_size, compute, rule, ref_rule
    )
    return TokenStats(*outputs)


def _can_wait(device: torch.device) -> bool:
    """Whether asking for a tensor's value is free: on a GPU the host would wait for all work before it."""
    return device.type == "cpu"


def _cast(head: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor | None:
    return None if head is None else head.to(compute)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, compute: torch.dtype, rule: LogitRule
) -> torch.Tensor:
    logits = F.linear(hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute)).float()
    if rule.scale != 1:
        logits *= rule.scale
    if rule.softcap is not None:
        logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
    return logits


class _TokenStats(torch.autograd.Function):
    """Chunked forward; the backward recomputes each chunk's logits and applies the closed-form gradients.

    With p the policy's and q the reference's distribution, l the label and H the entropy::

        d logp_l / d logits = onehot(l) - p          d KL(q||p) / d logits = p - q
        d H / d logits = -p (log p + H)              d KL(p||q) / d logits = p (log p - log q - KL(p||q))

    and, for a capped logit ``z = c tanh(s x / c)``, ``dz / dx = s (1 - (z / c)^2)``.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ref_hidden: torch.Tensor | None,
        ref_weight: torch.Tensor | None,
        ref_bias: torch.Tensor | None,
        flags: tuple[bool, bool, bool],
        chunk_size: int,
        compute: torch.dtype,
        rule: LogitRule,
        ref_rule: LogitRule,
    ) -> tuple[torch.Tensor | None, ...]:
        n = labels.shape[0]
        want_entropy, want_forward, want_reverse = flags
        float_like: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
        logps = torch.empty(n, **float_like)
        entropy = torch.empty(n, **float_like) if want_entropy else None
        ref_logps = torch.empty(n, **float_like) if ref_hidden is not None else None
        forward_kl = torch.empty(n, **float_like) if want_forward else None
        reverse_kl = torch.empty(n, **float_like) if want_reverse else None
        # cast once, not for every chunk
        head, ref_head = weight.to(compute), _cast(ref_weight, compute)
        for start in range(0, n, chunk_size):
            part = slice(start, start + chunk_size)
            picks = labels[part, None]
            log_p = _logits(hidden[part], head, bias, compute, rule)
            log_p -= log_p.logsumexp(-1, keepdim=True)
            logps[part] = log_p.gather(1, picks)[:, 0]
            p = log_p.exp() if want_entropy or want_reverse else None
            if entropy is not None and p is not None:
                entropy[part] = -_dot(p, log_p)
            if ref_hidden is not None and ref_logps is not None and ref_head is not None:
                log_q = _logits(ref_hidden[part], ref_head, ref_bias, compute, ref_rule)
                log_q -= log_q.logsumexp(-1, keepdim=True)
                ref_logps[part] = log_q.gather(1, picks)[:, 0]
                if forward_kl is None and reverse_kl is None:
                    continue
                gap = log_q - log_p  # finite: log-softmax of finite logits never gives -inf
                if forward_kl is not None:
                    forward_kl[part] = _dot(log_q.exp_(), gap)
                if reverse_kl is not None and p is not None:
                    reverse_kl[part] = -_dot(p, gap)
        ctx.save_for_backward(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, entropy, reverse_kl)
        ctx.chunk_size, ctx.compute, ctx.rules = chunk_size, compute, (rule, ref_rule)
        if ref_logps is not None:
            ctx.mark_non_differentiable(ref_logps)
        ctx.set_materialize_grads(False)
        return logps, entropy, ref_logps, forward_kl, reverse_kl

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        g_logps, g_entropy, _, g_forward, g_reverse = grads
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, entropy, reverse_kl = ctx.saved_tensors
        compute, (rule, ref_rule) = ctx.compute, ctx.rules
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        kls = [g for g in (g_forward, g_reverse) if g is not None]
        head, ref_head = weight.to(compute), _cast(ref_weight, compute) if kls else None
        waits = _can_wait(hidden.device)
        for start in range(0, labels.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            log_p = _logits(hidden[part], head, bias, compute, rule)
            slope = None if rule.softcap is None else 1 - (log_p / rule.softcap).square_()
            log_p -= log_p.logsumexp(-1, keepdim=True)
            need_q = [g is not None and (not waits or bool(g[part].any())) for g in (g_forward, g_reverse)]
            log_q: torch.Tensor | None = None
            rows: Any = slice(None)
            if any(need_q) and ref_head is not None:
                # a loss may stop the gradient of some tokens' KL (TDPO2: the chosen side); they need no reference
                # logits
                if waits:
                    rows = torch.stack([g[part] != 0 for g in kls]).any(0).nonzero()[:, 0]
                log_q = _logits(ref_hidden[part][rows], ref_head, ref_bias, compute, ref_rule)
                log_q -= log_q.logsumexp(-1, keepdim=True)
            extra = None
            if (g_entropy is not None) or need_q[1]:
                extra = torch.zeros_like(log_p)
                if g_entropy is not None and entropy is not None:
                    extra -= g_entropy[part, None] * (log_p + entropy[part, None])
                if need_q[1] and log_q is not None and g_reverse is not None:
                    gap = log_p[rows] - log_q - reverse_kl[part][rows, None]
                    extra[rows] += g_reverse[part][rows, None] * gap
            p = log_p.exp_()
            weight_p = torch.zeros_like(p[:, 0])
            if g_logps is not None:
                weight_p -= g_logps[part]
            if g_forward is not None:
                weight_p += g_forward[part]
            if extra is not None:
                extra += weight_p[:, None]
                grad = p.mul_(extra)
            else:
                grad = p.mul_(weight_p[:, None])
            if need_q[0] and log_q is not None and g_forward is not None:
                grad[rows] -= log_q.exp_().mul_(g_forward[part][rows, None])
            if g_logps is not None:
                grad.scatter_add_(1, labels[part, None], g_logps[part, None].to(grad.dtype))
            if slope is not None:
                grad *= slope
            if rule.scale != 1:
                grad *= rule.scale
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(compute)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ head).to(hidden.dtype)
            if grad_weight is not None:
                if compute == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[part].float())
                else:
                    grad_weight += grad.T @ hidden[part].to(compute)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *([None] * 9),
        )


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise inner product of two ``[n, V]`` tensors, without their ``[n, V]`` product; 0 * -inf counts as 0."""
    return torch.einsum("nv,nv->n", a, b)


# -- from logits that exist already -----------------------------------------------------------------------------------
def _by_rows(function: Any, *logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Applies a row function to ``[..., V]`` tensors chunk by chunk, recomputing in backward instead of storing."""
    shape, vocab = logits[0].shape[:-1], logits[0].shape[-1]
    flat = [item.reshape(-1, vocab) for item in logits]
    extras = [] if labels is None else [labels.reshape(-1)]
    size = tokens_per_chunk(vocab, logits[0].device)
    parts = []
    for start in range(0, flat[0].shape[0], size):
        chunk = [item[start : start + size] for item in (*flat, *extras)]
        if torch.is_grad_enabled() and any(item.requires_grad for item in logits):
            parts.append(torch.utils.checkpoint.checkpoint(function, *chunk, use_reentrant=False))
        else:
            parts.append(function(*chunk))
    if not parts:
        return logits[0].new_zeros(shape, dtype=torch.float32)
    return torch.cat(parts).reshape(shape)


def logps_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[...]`` of ``labels`` ``[...]`` under ``logits`` ``[..., V]`` (no shift)."""

    def row(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x.gather(-1, y[:, None])[:, 0] - x.logsumexp(-1)

    return _by_rows(row, logits, labels=labels)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Entropy ``[...]`` in nats of ``logits`` ``[..., V]``; masked (-inf) logits count as probability 0."""

    def row(x: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(x.float(), -1)
        return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)

    return _by_rows(row, logits)


def kl_from_logits(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) ``[...]`` in nats of two ``[..., V]`` tensors; where p is 0 the term is 0."""

    def row(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_p, log_q = torch.log_softmax(x.float(), -1), torch.log_softmax(y.float(), -1)
        gap = (log_p - log_q).masked_fill(log_p == -torch.inf, 0)
        return (log_p.exp() * gap).sum(-1)

    return _by_rows(row, p_logits, q_logits)


# -- masked reductions ------------------------------------------------------------------------------------------------
def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = -1) -> torch.Tensor:
    """Sum of ``values`` where ``mask``; masked entries may be NaN or infinite. ``dim=None`` sums everything."""
    kept = torch.where(mask.bool(), values.float(), torch.zeros((), device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = -1) -> torch.Tensor:
    """Mean over ``mask``: by sequence (``dim=-1``) or over all tokens (``dim=None``); 0 where the mask is empty."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)
