"""Symbols without fixed vectors: tables that are drawn, ciphers, and the Bayes oracle that a lexinvariant model nears.

For any language model Q over V symbols, the mixture over all renamings::

    P(x) = (1 / V!) sum_pi Q(pi(x))

is lexinvariant, and its prediction is that of a reader who does not know the cipher. Its loss on a text exceeds Q's by
``ln(V! / (V - k)!)`` nats in all at most, k the number of different symbols in the text.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from ...core.errors import BadInputError

LARGEST_ORACLE = 8
"""Symbols of the oracle at most: it sums over all their orders."""


class LexinvariantEmbedding(nn.Module):
    """Draws a table of vectors for each sequence, embeds with it and gives logits by it. It has no weight.

    Args:
        num_symbols: V.
        hidden_size: d.
        std: of an entry; None is ``1 / sqrt(d)``, which makes rows of length about 1.
        orthogonal: orthonormal rows, times ``std sqrt(d)``.

    Raises:
        BadInputError: more orthogonal rows than dimensions.
    """

    def __init__(self, num_symbols: int, hidden_size: int, std: float | None = None, orthogonal: bool = False):
        super().__init__()
        if orthogonal and num_symbols > hidden_size:
            raise BadInputError(f"{num_symbols} rows cannot be orthogonal in {hidden_size} dimensions.")
        self.num_symbols, self.hidden_size, self.orthogonal = num_symbols, hidden_size, orthogonal
        self.std = hidden_size**-0.5 if std is None else std

    def sample(self, seeds: torch.Tensor) -> torch.Tensor:
        """``[B]`` seeds -> ``[B, V, d]``: a table a sequence, each by its own generator."""
        rows = []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed)
            if self.orthogonal:
                draw = torch.randn(self.hidden_size, self.num_symbols, generator=generator)
                basis, upper = torch.linalg.qr(draw)
                # with the signs of the diagonal every orthonormal set is equally likely
                rows.append((basis * upper.diagonal().sign()).T * self.std * self.hidden_size**0.5)
            else:
                rows.append(torch.randn(self.num_symbols, self.hidden_size, generator=generator) * self.std)
        return torch.stack(rows).to(seeds.device)

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``[B, V, d]`` and ``[B, L]`` -> ``[B, L, d]``, scaled so that entries have a mean square of about 1."""
        rows = table.gather(1, ids[..., None].expand(-1, -1, table.shape[-1]))
        return rows * (1.0 / self.std)

    def logits(self, table: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, V, d]`` and ``[B, L, d]`` -> ``[B, L, V]``."""
        return hidden @ table.transpose(1, 2)


def cipher(ids: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Every symbol by its name in the key: ``key[ids]``.

    Args:
        key: a permutation ``[V]``.

    Raises:
        BadInputError: a key that is no permutation, or ids that it does not name.
    """
    if not torch.equal(key.sort().values, torch.arange(len(key), device=key.device)):
        raise BadInputError("A key is a permutation of 0 to V - 1.")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(key)):
        raise BadInputError(f"The key names {len(key)} symbols; the text has another.")
    return key[ids]


def bayes_mixture(probabilities: torch.Tensor, sequence: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The reader who knows how often symbols occur, but not which is which; by all orders of the symbols.

    Args:
        probabilities: ``[V]`` of independent symbols.
        sequence: ``[L]`` ids.

    Returns:
        ``ln P(sequence)``, and the probabilities ``[V]`` of the next symbol.

    Raises:
        BadInputError: more symbols than ``LARGEST_ORACLE``, no probabilities, or ids out of range.
    """
    count = len(probabilities)
    if count > LARGEST_ORACLE:
        raise BadInputError(f"The oracle sums over all orders of {LARGEST_ORACLE} symbols at most; got {count}.")
    if bool((probabilities <= 0).any()) or not math.isclose(float(probabilities.sum()), 1.0, abs_tol=1e-6):
        raise BadInputError("Probabilities are above 0 and sum to 1.")
    if sequence.numel() and not 0 <= int(sequence.min()) <= int(sequence.max()) < count:
        raise BadInputError(f"Ids lie between 0 and {count - 1}.")
    keys = torch.tensor(list(itertools.permutations(range(count))))  # [V!, V]
    logs = probabilities.double().log()[keys]
    seen = torch.bincount(sequence, minlength=count).double()
    total = logs @ seen  # ln Q(pi(x)) of every key
    posterior = total.softmax(0)
    evidence = float(total.logsumexp(0)) - math.lgamma(count + 1)
    return evidence, posterior @ logs.exp()


def regret_bound(num_symbols: int, seen: int | None = None) -> float:
    """Nats that a lexinvariant model loses to the true one on a whole text, at most.

    Args:
        num_symbols: V.
        seen: k, different symbols in the text; None is all.
    """
    rest = 0 if seen is None else num_symbols - seen
    return math.lgamma(num_symbols + 1) - math.lgamma(rest + 1)
