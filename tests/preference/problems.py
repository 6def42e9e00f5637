"""Small random pairs for tests of losses: logits over a tiny vocabulary, plain formulas."""

from __future__ import annotations

import torch

from everytoken.preference.base import PairScores

VOCAB = 5


def pairs(batch=3, length=6, seed=0, same=False):
    """Logits of policy (with gradient) and reference over a tiny vocabulary, labels, masks: chosen, then rejected."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(2, batch, length, VOCAB, generator=generator, dtype=torch.float64)
    reference = policy.clone() if same else torch.randn(policy.shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (2, batch, length), generator=generator)
    mask = torch.rand(2, batch, length, generator=generator) < 0.7
    return policy.requires_grad_(True), reference, labels, mask


def scores(logits, other, labels, mask, columns=None):
    """PairScores by the plain formulas (KL by explicit sums over the vocabulary); ``columns`` are ``[2, B, T]``, masked
    here.
    """
    logp = torch.log_softmax(logits, -1)
    ref = torch.log_softmax(other, -1)
    picked = logp.gather(-1, labels[..., None])[..., 0] * mask
    kl = (ref.exp() * (ref - logp)).sum(-1) * mask
    extra = {"forward_kl": kl} | {name: value * mask for name, value in (columns or {}).items()}
    chosen, rejected = ({name: value[side] for name, value in extra.items()} for side in range(2))
    return PairScores(picked[0], picked[1], mask[0], mask[1], chosen, rejected)


def evaluate(loss, policy, reference, labels, mask, columns=None):
    """The loss's output, and the gradient of its mean in the policy's logits."""
    output = loss(scores(policy, reference, labels, mask, columns), scores(reference, reference, labels, mask))
    (grad,) = torch.autograd.grad(output.losses.mean(), policy)
    return output, grad


def guide_logps(labels, mask, seed=7):
    """Log-probabilities ``[2, B, T]`` of the labels under a random guide."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*labels.shape, VOCAB, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0] * mask


def log_ratio(policy, reference, labels, mask):
    """``u_t``, ``[2, B, T]``, with gradient."""
    gap = torch.log_softmax(policy, -1) - torch.log_softmax(reference, -1)
    return gap.gather(-1, labels[..., None])[..., 0] * mask
