"""What embedders share: the cache, and models without embeddings."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.tokenization.embedding import EmbeddingCache
from everytoken.tokenization.hyper import MeanEmbedding

from .common import byte_level, model_for


def test_the_cache_drops_the_least_recently_used():
    model = model_for(byte_level())
    mean, cache = MeanEmbedding(model), EmbeddingCache(2)
    a, b, c = (3, 4), (4, 5), (5, 6)
    cache.rows([a, b], mean)
    cache.rows([a], mean)
    rows = cache.rows([c, a], mean)
    assert a in cache and c in cache and b not in cache and len(cache) == 2
    assert (cache.hits, cache.misses) == (2, 3)
    assert torch.equal(rows, mean.embed([c, a])[0])
    assert torch.equal(cache.rows([b, c, a], mean), mean.embed([b, c, a])[0]) and len(cache) == 2


def test_bad_input():
    bare = model_for(byte_level())
    bare.get_input_embeddings = lambda: None
    with pytest.raises(UnsupportedModelError, match="no token embeddings"):
        MeanEmbedding(bare)
    with pytest.raises(BadInputError, match="at least one"):
        EmbeddingCache(0)
