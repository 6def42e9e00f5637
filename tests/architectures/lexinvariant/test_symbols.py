"""Tables, ciphers and the Bayes oracle, by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from everytoken.architectures.lexinvariant.symbols import (
    LexinvariantEmbedding,
    bayes_mixture,
    cipher,
    regret_bound,
)
from everytoken.core.errors import BadInputError

P = torch.tensor([0.7, 0.2, 0.1])


def test_the_oracle_by_hand():
    def probability(*ids):
        return math.exp(bayes_mixture(P, torch.tensor(ids))[0])

    assert probability(0) == pytest.approx(1 / 3)
    assert probability(0, 0) == pytest.approx(0.18)
    assert probability(0, 1) == pytest.approx(0.0766667, abs=1e-7)
    assert probability(0, 0, 1) == pytest.approx(0.0313333, abs=1e-7)
    following = bayes_mixture(P, torch.tensor([0, 0, 0]))[1]
    assert following.tolist() == pytest.approx([0.686932, 0.156534, 0.156534], abs=1e-6)
    assert float(following.sum()) == pytest.approx(1)


def test_the_oracle_is_lexinvariant_and_chains():
    ids = torch.tensor([0, 2, 2, 1, 2])
    whole, _ = bayes_mixture(P, ids)
    for key in itertools.permutations(range(3)):
        assert bayes_mixture(P, torch.tensor(key)[ids])[0] == pytest.approx(whole)
    steps = [math.log(float(bayes_mixture(P, ids[:end])[1][ids[end]])) for end in range(len(ids))]
    assert sum(steps) == pytest.approx(whole)


def test_the_regret_stays_below_its_bound():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.multinomial(P, 200, replacement=True, generator=generator)
        regret = float(P.double().log()[ids].sum()) - bayes_mixture(P, ids)[0]
        assert 0 < regret <= math.log(6) + 1e-9
    for symbols, bits in ((26, 0.173), (27, 0.182), (96, 0.973), (128, 1.399), (256, 3.289)):
        assert regret_bound(symbols) / math.log(2) / 512 == pytest.approx(bits, abs=5e-4)
    assert regret_bound(5, seen=2) == pytest.approx(math.log(20))


def test_tables_have_rows_of_length_one_and_no_weight():
    embedding = LexinvariantEmbedding(64, 256)
    assert not list(embedding.parameters()) and not embedding.state_dict()
    table = embedding.sample(torch.arange(3))
    assert table.shape == (3, 64, 256)
    lengths = table.norm(dim=-1)
    assert float(lengths.mean()) == pytest.approx(1, abs=0.02)
    cosines = torch.nn.functional.normalize(table[0], dim=-1)
    off = (cosines @ cosines.T)[~torch.eye(64, dtype=torch.bool)]
    assert float(off.std()) == pytest.approx(0.0625, abs=0.004)
    assert torch.equal(embedding.sample(torch.tensor([2]))[0], table[2])
    assert not torch.equal(table[0], table[1])
    rows = LexinvariantEmbedding(12, 16, orthogonal=True).sample(torch.tensor([5]))[0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(12), rtol=0, atol=1e-5)


def test_a_cipher_is_undone_by_its_inverse():
    key, ids = torch.tensor([2, 0, 3, 1]), torch.tensor([[0, 1, 3], [3, 3, 2]])
    assert cipher(ids, key).tolist() == [[2, 0, 1], [1, 1, 3]]
    assert torch.equal(cipher(cipher(ids, key), key.argsort()), ids)


def test_bad_input_is_refused():
    with pytest.raises(BadInputError, match="8 symbols at most"):
        bayes_mixture(torch.full((9,), 1 / 9), torch.tensor([0]))
    with pytest.raises(BadInputError, match="sum to 1"):
        bayes_mixture(torch.tensor([0.5, 0.6]), torch.tensor([0]))
    with pytest.raises(BadInputError, match="between 0 and 2"):
        bayes_mixture(P, torch.tensor([3]))
    with pytest.raises(BadInputError, match="permutation"):
        cipher(torch.tensor([0]), torch.tensor([1, 1]))
    with pytest.raises(BadInputError, match="names 2 symbols"):
        cipher(torch.tensor([2]), torch.tensor([1, 0]))
    with pytest.raises(BadInputError, match="orthogonal"):
        LexinvariantEmbedding(17, 16, orthogonal=True)
