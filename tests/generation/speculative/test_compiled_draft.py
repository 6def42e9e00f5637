"""A compiled draft against the same draft in torch, and what is written with it."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.grouped.linear import group_linears
from everytoken.core.grouped.weights import group_weight
from everytoken.core.packing import unpack_linears
from everytoken.decoding.lean import row_cache
from everytoken.decoding.plain import PlainDecoding
from everytoken.generation.dyspec import DySpec
from everytoken.generation.speculative.compiled_draft import CompiledSession, compiled_draft, lacks
from everytoken.generation.speculative.drafting import DraftSession
from everytoken.generation.speculative.sessions import draft_session
from everytoken.generation.speculative.trees import TokenTree

from ...core.grouped.conftest import small_llama
from ..common import check_distribution
from .test_drafts import tiny_draft

TEXT = [3, 7, 1, 12, 5]


def pair(vocab=24, draft_vocab=16):
    """A compiled target, and a draft whose weights lie on the steps of 4 bits already."""
    target = small_llama(vocab)
    group_linears(target)
    draft = tiny_draft(target, draft_vocab)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
                weight.copy_(group_weight(weight, 4, searched=False).dequantised())
    unpack_linears(draft)
    unpack_linears(draft._head_layer[0])
    return target, draft


def sessions(target, draft, text):
    """The session in torch and the compiled one, after the target has read a text."""
    cache = row_cache(target)
    vocab = target.config.vocab_size
    both = DraftSession(draft, target, vocab, cache), draft_session(draft, target, vocab, cache)
    assert isinstance(both[1], CompiledSession)
    cache.read(text)
    for session in both:
        session.commit(text, 0)
    return cache, both


def rooted(token):
    tree = TokenTree()
    tree.add(token, -1, 1.0)
    return tree


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [5, 150])
@torch.no_grad()
def test_logits_are_the_torch_drafts(threads, length):
    target, draft = pair()
    text = torch.randint(0, 24, (length,)).tolist()
    cache, both = sessions(target, draft, text)
    tree = rooted(text[-1])
    ours, theirs = both[1].forward(tree, [0], True), both[0].forward(tree, [0], True)
    assert ours.shape == (1, 16)
    assert torch.allclose(ours, theirs, atol=1e-2)
    for token in (4, 9):
        tree.add(token, 0, 0.3)
    tree.add(2, 1, 0.5)
    for nodes in ([1, 2], [3]):
        ours, theirs = both[1].forward(tree, nodes, False), both[0].forward(tree, nodes, False)
        assert ours.shape == theirs.shape == (len(nodes), 24)
        assert torch.allclose(ours, theirs, atol=1e-2)
    # the node of token 4 was accepted, and 6 came after it
    cache.mark()
    allowed = torch.ones(4, length + 4, dtype=torch.bool)
    allowed[:, length:] = tree.ancestor_mask()
    cache.read_tree(tree.tokens, tree.depths, allowed)
    cache.keep([0, 1])
    for session in both:
        session.commit([4, 6], length, [0, 1])
    tree = rooted(6)
    assert torch.allclose(both[1].forward(tree, [0], True), both[0].forward(tree, [0], True), atol=1e-2)


@pytest.mark.parametrize(
    "settings", [{}, {"cost": lambda tokens: 1 + 0.001 * tokens}, {"threshold": None, "adaptive": False}]
)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}])
def test_text_and_logits_are_plain_decodings(settings, sampling):
    target, draft = pair()
    arguments = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True} | sampling
    outputs = []
    for decoder in (PlainDecoding(), DySpec(draft, text_nodes=False, **settings), DySpec(draft, **settings)):
        torch.manual_seed(0)
        outputs.append(target.generate(torch.tensor([TEXT]), custom_generate=decoder, **arguments))
    assert decoder.stats.draft_forwards > 0
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        assert all(torch.equal(a, b) for a, b in zip(output.logits, outputs[0].logits, strict=True))


@pytest.mark.rotating
@pytest.mark.parametrize("measured", [True, False])
def test_adaptive_rules_keep_the_targets_distribution(measured):
    target, draft = pair(8, 8)
    cost = None if measured else lambda tokens: 1 + 0.01 * tokens
    decoder = DySpec(draft, budget=6, cost=cost)
    with torch.no_grad():
        check_distribution(target, decoder, [1, 2], 1500, temperature=0.7)
    assert decoder.stats.proposed > 0


def test_a_draft_of_other_sizes_runs_in_torch():
    target, _ = pair()
    draft = tiny_draft(target, 9)
    assert "multiples" in lacks(draft)
    session = draft_session(draft, target, 24, row_cache(target))
    assert type(session) is DraftSession
    session.close()


def test_changed_weights_are_noticed():
    _, draft = pair()
    first = compiled_draft(draft)
    assert compiled_draft(draft) is first
    with torch.no_grad():
        draft.embed_proj.weight.mul_(2.0)
    second = compiled_draft(draft)
    assert second is not first
    assert not second.stands_for(pair()[1])
