"""DySpec: losslessness, optimality of its tree, and its cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from everytoken.core.errors import BadInputError, TokenizerMismatchError, UnsupportedModelError
from everytoken.generation.dyspec import DySpec
from everytoken.generation.speculative.trees import TokenTree, grow_tree

from ..conftest import tiny_llama
from ..tiers import commit_tier
from .common import ToyMatcher, check_distribution

SHAPES = [
    dict(budget=1, threshold=None),
    dict(budget=5, threshold=None),
    dict(budget=12, threshold=None, max_children=3),
    dict(budget=6, threshold=None, max_depth=1),
    dict(budget=6, threshold=None, max_children=1),
    dict(budget=8, threshold=0.1),
    dict(budget=16, threshold=0.02),
]


def names(shape):
    return "-".join(f"{key}{value}" for key, value in shape.items())


COMMON = [(SHAPES[1], "random"), (SHAPES[5], "random"), (SHAPES[5], "contrary"), (SHAPES[2], "itself")]
"""Distributions that every commit tests; all shapes with all drafts are in the full tier."""


def shaped(shapes):
    """Each shape with each draft."""
    return [
        pytest.param(
            shape, which, marks=[] if (shape, which) in COMMON else pytest.mark.slow, id=f"{which}-{names(shape)}"
        )
        for shape in shapes
        for which in ("itself", "random", "contrary")
    ]


def sampled(shapes):
    """As ``shaped``, for thousands of draws: one draft belongs to the full tier, the others to ``make test-all``."""
    return [
        pytest.param(*each.values, marks=[] if each.values[1] == "random" else pytest.mark.exhaustive, id=each.id)
        for each in shaped(shapes)
    ]


def contrary(target):
    """A draft whose logits are the negative of the right ones: the worst of all."""
    draft = tiny_llama(target.config.vocab_size, seed=0)
    draft.load_state_dict(target.state_dict())
    with torch.no_grad():
        draft.lm_head.weight.neg_()
    return draft


def drafts(target):
    vocab = target.config.vocab_size
    return {"itself": target, "random": tiny_llama(vocab, seed=7), "contrary": contrary(target)}


# -- greedy ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("which", commit_tier(["itself", "random", "contrary"], ["random"]))
def test_greedy_output_is_the_targets_own(shape, which):
    target = tiny_llama(23, seed=1)
    prompt = torch.tensor([[3, 5, 8, 2]])
    expected = target.generate(prompt, max_new_tokens=40, do_sample=False)
    decoder = DySpec(drafts(target)[which], **shape)
    actual = target.generate(prompt, max_new_tokens=40, do_sample=False, custom_generate=decoder)
    assert actual.tolist() == expected.tolist()
    assert decoder.stats.new_tokens == 40
    assert decoder.stats.accepted + decoder.stats.rounds + 1 >= 40


@given(seed=st.integers(0, 50), length=st.integers(1, 12), budget=st.integers(0, 20), new=st.integers(1, 24))
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_greedy_property(seed, length, budget, new):
    target, draft = tiny_llama(13, seed=seed), tiny_llama(13, seed=seed + 1)
    prompt = torch.randint(0, 13, (1, length), generator=torch.Generator().manual_seed(seed))
    arguments = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    expected = target.generate(prompt, **arguments)
    actual = target.generate(prompt, **arguments, custom_generate=DySpec(draft, budget=budget))
    assert actual.tolist() == expected.tolist()


def test_perfect_draft_is_accepted_to_full_depth():
    target = tiny_llama(23, seed=1)
    decoder = DySpec(target, budget=6, threshold=None, max_children=1, max_depth=6)
    target.generate(torch.tensor([[1, 2]]), max_new_tokens=1 + 7 * 5, do_sample=False, custom_generate=decoder)
    assert decoder.stats.rounds == 5
    assert decoder.stats.accepted == 6 * 5


def test_budget_zero_is_plain_decoding():
    target = tiny_llama(23, seed=1)
    decoder = DySpec(tiny_llama(23, seed=2), budget=0)
    target.generate(torch.tensor([[1, 2]]), max_new_tokens=9, do_sample=False, custom_generate=decoder)
    assert decoder.stats.target_forwards == 9
    assert decoder.stats.draft_forwards == decoder.stats.proposed == 0


# -- sampling ----------------------------------------------------------------------------------------------------------
@pytest.mark.rotating
@pytest.mark.parametrize(("shape", "which"), sampled(SHAPES))
def test_sampled_distribution_is_the_targets(shape, which):
    target = tiny_llama(4, seed=3, scale=0.4)
    check_distribution(target, DySpec(drafts(target)[which], drawn=True, **shape), [1, 2], 500)


REPEATING = [1, 2, 3, 1, 2, 1, 1, 2]
"""A prompt in which text finds something to propose."""


@pytest.mark.parametrize("corpus", [None, [[1, 2, 3, 0], [2, 0, 0], [3, 3, 1]]], ids=["prompt", "corpus"])
@pytest.mark.rotating
def test_text_alone_keeps_the_targets_distribution(corpus):
    """No draft model: the adaptive rules decide every round what is checked."""
    target = tiny_llama(4, seed=3, scale=0.4)
    decoder = DySpec("text", corpus=corpus)
    check_distribution(target, decoder, REPEATING, 600)
    assert decoder.stats.proposed > 0
    assert decoder.stats.draft_forwards == 0


@pytest.mark.rotating
def test_text_and_draft_in_one_tree_keep_the_targets_distribution():
    target = tiny_llama(4, seed=3, scale=0.4)
    check_distribution(target, DySpec(tiny_llama(4, seed=7), threshold=0.02), REPEATING, 600)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.rotating
def test_ranked_nodes_keep_the_targets_distribution(temperature):
    target = tiny_llama(5, seed=5, scale=0.5)
    check_distribution(target, DySpec(tiny_llama(5, seed=8), budget=6), [1, 2], 600, temperature=temperature, top_k=3)


@pytest.mark.parametrize("decoder", [DySpec("text"), DySpec(tiny_llama(23, seed=7)), DySpec(tiny_llama(23, seed=1))])
def test_ranked_nodes_sample_plain_samplings_own_text(decoder):
    """A node is there or not, whatever the target draws: the draws are plain sampling's, one a token."""
    target = tiny_llama(23, seed=1, scale=0.3)
    prompt = torch.tensor([[3, 5, 8, 2, 3, 5, 8]])
    arguments = dict(max_new_tokens=40, do_sample=True, top_k=0)
    torch.manual_seed(3)
    expected = target.generate(prompt, **arguments)
    torch.manual_seed(3)
    assert target.generate(prompt, custom_generate=decoder, **arguments).tolist() == expected.tolist()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("which", ["itself", "random", "contrary"])
def test_sampled_distribution_is_the_targets_long(which):
    target = tiny_llama(5, seed=4, scale=0.4)
    for shape in SHAPES:
        for drawn in (True, False):
            check_distribution(target, DySpec(drafts(target)[which], drawn=drawn, **shape), [1, 2], 1200)


@pytest.mark.rotating
def test_sampled_distribution_with_temperature_and_top_k():
    target = tiny_llama(5, seed=5, scale=0.5)
    decoder = DySpec(tiny_llama(5, seed=8), budget=6, drawn=True)
    check_distribution(target, decoder, [1, 2], 1000, temperature=0.6, top_k=3)


# -- with a matcher ----------------------------------------------------------------------------------------------------
@pytest.mark.rotating
@pytest.mark.parametrize(("shape", "which"), sampled([SHAPES[1], SHAPES[2], SHAPES[5]]))
def test_a_matcher_keeps_the_masked_distribution(shape, which):
    target, matcher = tiny_llama(5, seed=3, scale=0.4), ToyMatcher(5)
    decoder = DySpec(drafts(target)[which], matcher=matcher, drawn=True, **shape)
    check_distribution(target, decoder, [1, 2], 500, matcher=matcher)
    assert matcher.text == []


@pytest.mark.rotating
def test_text_nodes_obey_a_matcher():
    target, matcher = tiny_llama(5, seed=3, scale=0.4), ToyMatcher(5)
    decoder = DySpec("text", matcher=matcher, trace_enabled=True)
    check_distribution(target, decoder, REPEATING, 600, matcher=matcher)
    assert decoder.stats.proposed > 0
    assert matcher.text == []


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.3}])
def test_greedy_with_a_matcher_equals_plain_decoding_with_one(extra):
    from everytoken.decoding.loop import MatcherLogitsProcessor

    target, matcher = tiny_llama(13, seed=1), ToyMatcher(13)
    prompt = torch.tensor([[3, 5, 8, 2]])
    expected = target.generate(
        prompt, max_new_tokens=30, do_sample=False, logits_processor=[MatcherLogitsProcessor(matcher, 4)], **extra
    )
    decoder = DySpec(target, budget=8, threshold=0.05, matcher=matcher)
    actual = target.generate(prompt, max_new_tokens=30, do_sample=False, custom_generate=decoder, **extra)
    if not extra:  # processors of the user run on masked scores, in either order the same without penalties
        assert decoder.stats.accepted > 0
    assert actual.tolist() == expected.tolist()


def test_a_finished_matcher_ends_the_text():
    target = tiny_llama(13, seed=1)
    decoder = DySpec(target, budget=6, matcher=ToyMatcher(13, length=4, end=12))
    output = target.generate(torch.tensor([[3, 5]]), max_new_tokens=30, do_sample=False, custom_generate=decoder)
    assert output.shape[1] == 2 + 5
    assert output[0, -1] == 12


def test_a_real_grammar_on_the_embedded_model(embedded):
    from everytoken.constraints.engine.compiler import GrammarCompiler
    from everytoken.constraints.engine.matcher import GrammarMatcher
    from everytoken.constraints.engine.vocabulary import TokenizerInfo
    from everytoken.constraints.grammar import Grammar
    from everytoken.constraints.xgrammar import XGrammar
    from everytoken.generation.speculative import load_draft

    model, tokenizer = embedded
    compiled = GrammarCompiler(TokenizerInfo.from_huggingface(tokenizer, model.config.vocab_size)).compile_grammar(
        Grammar.from_json_schema(
            '{"type":"object","properties":{"name":{"type":"string","maxLength":12}},"required":["name"]}'
        )
    )
    ids = tokenizer("A person as JSON: ", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=24, do_sample=False, custom_generate=XGrammar(compiled))
    decoder = DySpec(load_draft(model), matcher=GrammarMatcher(compiled))
    actual = model.generate(**ids, max_new_tokens=24, do_sample=False, custom_generate=decoder)
    assert actual.tolist() == expected.tolist()


@pytest.mark.rotating
def test_a_wrong_acceptance_rule_would_be_caught(monkeypatch):
    """The chi-square above has teeth: accepting every child fails it."""
    from everytoken.generation import dyspec

    def always(self, tree, node, target):
        children = tree.children[node]
        return (children[0], tree.tokens[children[0]]) if children else (None, int(torch.multinomial(target, 1)))

    monkeypatch.setattr(dyspec._Speculation, "_accept", always)
    target = tiny_llama(4, seed=3, scale=0.4)
    with pytest.raises(AssertionError):
        check_distribution(target, DySpec(tiny_llama(4, seed=7), budget=5, drawn=True), [1, 2], 1500)


# -- what is checked ---------------------------------------------------------------------------------------------------
def test_text_alone_follows_a_repetition():
    """A greedy tiny model soon repeats itself; the text it repeats proposes it again."""
    target = tiny_llama(23, seed=1)
    decoder = DySpec()
    prompt = torch.tensor([[3, 5, 8, 2]])
    output = target.generate(prompt, max_new_tokens=60, do_sample=False, custom_generate=decoder)
    assert output.tolist() == target.generate(prompt, max_new_tokens=60, do_sample=False).tolist()
    assert decoder.stats.draft_forwards == 0
    assert decoder.stats.target_forwards < 20


def test_a_trial_needs_no_draft_model(tmp_path):
    from everytoken.decoding.trial import Trial, TrialRequest, run_decoders
    from everytoken.testing.models import tiny_tokenizer

    tiny_llama(14, seed=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "corpus.txt").write_text("abcabc")
    trial = Trial("dyspec", DySpec, {"corpus": str(tmp_path / "corpus.txt")})
    result = run_decoders(TrialRequest([trial], model=str(tmp_path), options={"max_new_tokens": 30}), "abc")
    assert result.rows["dyspec"]["target forwards"] < 30
    assert result.texts["dyspec"] == result.texts["plain generate"]


def test_a_fixed_size_tree_of_text_alone():
    target, prompt = tiny_llama(23, seed=1), torch.tensor([[3, 5, 8, 2]])
    decoder = DySpec(threshold=None, budget=4)
    output = target.generate(prompt, max_new_tokens=40, do_sample=False, custom_generate=decoder)
    assert output.tolist() == target.generate(prompt, max_new_tokens=40, do_sample=False).tolist()
    assert decoder.stats.accepted > 0


def test_a_corpus_proposes_what_the_prompt_does_not_hold():
    target = tiny_llama(23, seed=1)
    prompt = torch.tensor([[3, 5, 8, 2]])
    text = target.generate(prompt, max_new_tokens=16, do_sample=False)
    forwards = []
    for corpus in (None, text.tolist()):
        decoder = DySpec("text", corpus=corpus)
        target.generate(prompt, max_new_tokens=16, do_sample=False, custom_generate=decoder)
        forwards.append(decoder.stats.target_forwards)
    assert forwards[1] < forwards[0]


def test_nodes_of_both_sources_share_one_tree():
    """Beside a draft that knows nothing, text brings what it would alone; a token proposed twice is one node."""
    target, prompt = tiny_llama(23, seed=1), torch.tensor([[3, 5, 8, 2]])
    trees = []

    class Watched(DySpec):
        def grow(self, *args):
            trees.append(super().grow(*args))
            return trees[-1]

    useless = tiny_llama(23, seed=7)
    accepted = {}
    for text_nodes in (False, True):
        decoder = Watched(useless, text_nodes=text_nodes)
        target.generate(prompt, max_new_tokens=60, do_sample=False, custom_generate=decoder)
        accepted[text_nodes] = decoder.stats.mean_accepted
    assert accepted[True] > accepted[False] + 1
    for tree in trees:
        assert all(len({tree.tokens[kid] for kid in kids}) == len(kids) for kids in tree.children)


def test_a_steep_cost_leaves_plain_decoding():
    target, prompt = tiny_llama(23, seed=1), torch.tensor([[3, 5, 8, 2]])
    decoder = DySpec(target, budget=8, cost=lambda tokens: float(tokens) ** 2)
    output = target.generate(prompt, max_new_tokens=20, do_sample=False, custom_generate=decoder)
    assert output.tolist() == target.generate(prompt, max_new_tokens=20, do_sample=False).tolist()
    assert decoder.stats.proposed == 0


@pytest.mark.parametrize("sampling", [False, True])
def test_a_flat_cost_fills_the_budget_and_never_exceeds_it(sampling):
    target, sizes = tiny_llama(23, seed=1, scale=0.2), []

    class Watched(DySpec):
        def decode_row(self, call, row):
            super().decode_row(call, row)
            sizes.append((call.stats.proposed, call.stats.rounds))

    decoder = Watched(target, budget=6, threshold=1e-6, cost=lambda tokens: 1.0)
    target.generate(torch.tensor([[3, 5]]), max_new_tokens=20, do_sample=sampling, custom_generate=decoder)
    ((proposed, rounds),) = sizes
    assert 5 * rounds <= proposed <= 6 * rounds


# -- the tree ----------------------------------------------------------------------------------------------------------
def known_draft(vocab, seed):
    """A draft that is a fixed random table: path -> distribution."""

    def dist(path):
        generator = torch.Generator().manual_seed(hash((seed, path)) % (1 << 31))
        return torch.softmax(2 * torch.randn(vocab, generator=generator), 0)

    return dist


def best_tree_sum(dist, vocab, size):
    """Largest sum of node values over all trees of ``size`` nodes (by exhaustive growth of node sets)."""
    frontier = {frozenset()}
    for _ in range(size):
        following = set()
        for tree in frontier:
            for path in [(), *tree]:
                for token in range(vocab):
                    if (*path, token) not in tree:
                        following.add(tree | {(*path, token)})
        frontier = following

    def value(path):
        result = 1.0
        for i, token in enumerate(path):
            result *= float(dist(path[:i])[token])
        return result

    return max(sum(value(path) for path in tree) for tree in frontier)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_greedy_tree_has_the_largest_sum_of_values(seed, size):
    dist = known_draft(3, seed)
    tree = TokenTree()
    tree.add(0, -1, 1.0)

    def expand(nodes):
        ranked = [dist(tuple(tree.path(node))).sort(descending=True) for node in nodes]
        return [(r.indices.tolist(), r.values.tolist()) for r in ranked]

    grow_tree(tree, expand, size)
    assert len(tree) == size + 1
    assert sum(tree.values[1:]) == pytest.approx(best_tree_sum(dist, 3, size), abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_sampled_tree_fills_the_most_valuable_slots(seed):
    """With every draw fixed in advance, no other set of m slots has a larger total slot value."""
    vocab, size = 3, 4
    dist = known_draft(vocab, seed)
    orders = {}

    def order(path):
        if path not in orders:
            generator = torch.Generator().manual_seed(hash((seed, "draw", path)) % (1 << 31))
            orders[path] = torch.multinomial(dist(path), vocab, generator=generator).tolist()
        return orders[path]

    def slot(path):  # chance that verification comes to test the last token of `path`, if D is the acceptance rate
        value = 1.0
        for i, token in enumerate(path):
            rank = order(path[:i]).index(token)
            before = sum(float(dist(path[:i])[t]) for t in order(path[:i])[:rank])
            value *= (1 - before) if i == len(path) - 1 else float(dist(path[:i])[token])
        return value

    frontier = {frozenset()}
    for _ in range(size):
        following = set()
        for chosen in frontier:
            for path in [(), *chosen]:
                taken = sum(1 for p in chosen if p[:-1] == path)
                if taken < vocab:
                    following.add(chosen | {(*path, order(path)[taken])})
        frontier = following
    best = max(sum(slot(path) for path in chosen) for chosen in frontier)
    tree = TokenTree()
    tree.add(0, -1, 1.0)

    def expand(nodes):
        paths = [tuple(tree.path(node)) for node in nodes]
        return [(order(path), [float(dist(path)[t]) for t in order(path)]) for path in paths]

    grow_tree(tree, expand, size, sampling=True)
    total = sum(slot(tuple(tree.path(node))) for node in range(1, len(tree)))
    assert total == pytest.approx(best, abs=1e-6)


def test_threshold_tree_holds_exactly_the_slots_above_it():
    dist = known_draft(4, 0)
    tree = TokenTree()
    tree.add(0, -1, 1.0)
    calls = []

    def expand(nodes):
        calls.append(nodes)
        ranked = [dist(tuple(tree.path(node))).sort(descending=True) for node in nodes]
        return [(r.indices.tolist(), r.values.tolist()) for r in ranked]

    grow_tree(tree, expand, 1000, threshold=0.05)
    paths = {tuple(tree.path(node)) for node in range(1, len(tree))}
    stack, expected = [((), 1.0)], set()
    while stack:
        path, value = stack.pop()
        for token in range(4):
            child = value * float(dist(path)[token])
            if child > 0.05:
                expected.add((*path, token))
                stack.append(((*path, token), child))
    assert paths == expected
    assert len(calls) <= max(map(len, paths)) + 1  # one draft forward a layer


def test_ancestor_mask():
    tree = TokenTree()
    root = tree.add(9, -1, 1.0)
    left, right = tree.add(1, root, 0.5), tree.add(2, root, 0.3)
    leaf = tree.add(3, right, 0.2)
    assert tree.ancestor_mask().int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert tree.path(leaf) == [2, 3]
    assert tree.path(left) == [1]
    assert tree.values[leaf] == pytest.approx(0.06)


# -- cache -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("new", [1, 2, 7, 20])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_cache_equals_a_fresh_forward(new, attention):
    target = tiny_llama(23, seed=1)
    target.set_attn_implementation(attention)
    prompt = torch.tensor([[3, 5, 8, 2]])
    output = target.generate(
        prompt,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        custom_generate=DySpec(tiny_llama(23, seed=7), budget=9),
    )
    cache, text = output.past_key_values, output.sequences
    assert cache.get_seq_length() == text.shape[1] - 1
    with torch.no_grad():
        warm = target(text[:, -1:], past_key_values=cache).logits
        cold = target(text).logits[:, -1:]
    assert torch.allclose(warm, cold, atol=1e-4)


def test_cache_is_reused_across_calls():
    target, decoder = tiny_llama(23, seed=1), DySpec(tiny_llama(23, seed=7), budget=6)
    prompt = torch.tensor([[3, 5, 8, 2]])
    whole = target.generate(prompt, max_new_tokens=30, do_sample=False)
    cache = DynamicCache()
    text = prompt
    for _ in range(3):
        text = target.generate(text, past_key_values=cache, max_new_tokens=10, do_sample=False, custom_generate=decoder)
    assert text.tolist() == whole.tolist()


# -- what generate promises --------------------------------------------------------------------------------------------
def test_eos_inside_the_tree_stops_there():
    target = tiny_llama(9, seed=11)
    prompt = torch.tensor([[1, 2, 3]])
    free = target.generate(prompt, max_new_tokens=24, do_sample=False)[0, 3:].tolist()
    for eos in sorted(set(free)):
        expected = target.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=eos)
        decoder = DySpec(target, budget=7)
        actual = target.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=eos, custom_generate=decoder)
        assert actual.tolist() == expected.tolist()


def test_ragged_batch_with_left_padding():
    target, draft = tiny_llama(23, seed=1), tiny_llama(23, seed=7)
    ids = torch.tensor([[0, 0, 4, 5], [6, 7, 8, 9], [0, 3, 2, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    arguments = dict(attention_mask=mask, max_new_tokens=15, do_sample=False, eos_token_id=17, pad_token_id=0)
    expected = target.generate(ids, **arguments)
    actual = target.generate(ids, **arguments, custom_generate=DySpec(draft, budget=6))
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("extra", [dict(repetition_penalty=1.7), dict(no_repeat_ngram_size=2), dict(min_new_tokens=9)])
def test_processors_that_look_at_the_path(extra):
    target, draft = tiny_llama(23, seed=1), tiny_llama(23, seed=7)
    prompt = torch.tensor([[3, 5, 8, 2]])
    arguments = dict(max_new_tokens=25, do_sample=False, eos_token_id=11) | extra
    expected = target.generate(prompt, **arguments)
    actual = target.generate(prompt, **arguments, custom_generate=DySpec(draft, budget=8))
    assert actual.tolist() == expected.tolist()


def test_scores_and_logits_are_those_of_generate():
    target, draft = tiny_llama(23, seed=1), tiny_llama(23, seed=7)
    prompt = torch.tensor([[3, 5, 8, 2]])
    arguments = dict(
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.3,
    )
    expected = target.generate(prompt, **arguments)
    actual = target.generate(prompt, **arguments, custom_generate=DySpec(draft, budget=8))
    assert len(actual.scores) == len(actual.logits) == 12
    assert torch.allclose(torch.stack(actual.scores), torch.stack(expected.scores), atol=1e-4)
    assert torch.allclose(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-4)
    assert actual.stats.new_tokens == 12


class Recorder:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_streamer_sees_every_token_in_order_and_once():
    target, recorder = tiny_llama(23, seed=1), Recorder()
    prompt = torch.tensor([[3, 5, 8, 2]])
    decoder = DySpec(tiny_llama(23, seed=7), budget=8)
    output = decoder.generate(target, prompt, max_new_tokens=20, do_sample=False, streamer=recorder)
    assert recorder.tokens == output[0].tolist()
    assert recorder.ended == 1


def test_num_return_sequences_and_seed():
    target, draft = tiny_llama(23, seed=1, scale=0.3), tiny_llama(23, seed=7)
    arguments = dict(max_new_tokens=12, do_sample=True, num_return_sequences=3, custom_generate=DySpec(draft, budget=8))
    prompt = torch.tensor([[3, 5, 8, 2]])
    torch.manual_seed(5)
    first = target.generate(prompt, **arguments)
    torch.manual_seed(5)
    second = target.generate(prompt, **arguments)
    assert first.shape == (3, 16)
    assert first.tolist() == second.tolist()
    assert len(set(map(tuple, first.tolist()))) > 1


def test_interrupting_leaves_no_hooks_behind(embedded):
    model, tokenizer = embedded
    decoder = DySpec(budget=4)
    before = sum(len(module._forward_hooks) for module in model.modules())

    def interrupt(ids, scores, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(
            **tokenizer("Hello", return_tensors="pt"),
            max_new_tokens=9,
            custom_generate=decoder,
            stopping_criteria=[interrupt],
        )
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


def test_trace_columns_are_aligned():
    target = tiny_llama(23, seed=1)
    decoder = DySpec(target, budget=5, trace_enabled=True)
    output = target.generate(torch.tensor([[3, 5]]), max_new_tokens=14, do_sample=False, custom_generate=decoder)
    (trace,) = decoder.trace
    assert trace.ids == output[0, 2:].tolist()
    assert set(trace.columns) == {"round", "depth", "draft_prob", "source", "value"}
    assert trace.columns["source"].count("draft") == decoder.stats.accepted
    assert trace.columns["round"] == sorted(trace.columns["round"])


# -- the embedded pair -------------------------------------------------------------------------------------------------
def test_embedded_draft_is_lossless_and_useful(embedded):
    model, tokenizer = embedded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three primary colours."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    decoder = DySpec(budget=12)
    actual = model.generate(**inputs, max_new_tokens=32, do_sample=False, custom_generate=decoder)
    assert actual.tolist() == expected.tolist()
    assert decoder.stats.mean_accepted > 0.4


def test_embedded_draft_in_assisted_generation(embedded):
    from everytoken.generation.speculative import load_draft

    model, tokenizer = embedded
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    draft = load_draft(model)
    draft.attach(model, follow=True)
    try:
        actual = model.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=draft)
    finally:
        draft.detach_target()
    assert actual.tolist() == expected.tolist()


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_settings_out_of_range():
    for bad in (dict(budget=-1), dict(max_depth=0), dict(max_children=0), dict(threshold=1.5), dict(threshold=0.0)):
        with pytest.raises(BadInputError):
            DySpec(tiny_llama(), **bad)


def test_different_vocabularies_are_refused_before_any_forward():
    target = tiny_llama(1200, seed=1)
    target.forward = None  # a forward would raise TypeError
    with pytest.raises(TokenizerMismatchError, match="tokenizer"):
        DySpec(tiny_llama(23))(target, torch.tensor([[1]]), generation_config=target.generation_config)


def test_different_eos_is_refused():
    with pytest.raises(TokenizerMismatchError, match="end a text"):
        target = tiny_llama(23, eos=3)
        target.generate(torch.tensor([[1]]), max_new_tokens=3, custom_generate=DySpec(tiny_llama(23, eos=4)))


@pytest.mark.parametrize(
    "arguments",
    [dict(num_beams=2), dict(use_cache=False), dict(output_hidden_states=True, return_dict_in_generate=True)],
)
def test_modes_that_a_tree_cannot_honour(arguments):
    target = tiny_llama(23)
    with pytest.raises(BadInputError, match="DySpec does not support"):
        target.generate(torch.tensor([[1]]), max_new_tokens=3, custom_generate=DySpec(target), **arguments)


def test_empty_and_too_long_prompts():
    target = tiny_llama(23)
    config = target.generation_config
    with pytest.raises(BadInputError, match="empty"):
        DySpec(target)(target, torch.zeros(1, 0, dtype=torch.long), generation_config=config)
    with pytest.raises(BadInputError, match="context"):
        DySpec(target)(target, torch.ones(1, 300, dtype=torch.long), generation_config=config)


def test_nothing_to_propose_is_refused(tmp_path):
    target, ids = tiny_llama(23), torch.tensor([[1]])
    with pytest.raises(UnsupportedModelError, match="No draft model ships"):
        target.generate(ids, max_new_tokens=3, custom_generate=DySpec(text_nodes=False))
    with pytest.raises(BadInputError, match="nothing that proposes"):
        DySpec("text", text_nodes=False)
    with pytest.raises(BadInputError, match="no folder or file"):
        DySpec(str(tmp_path / "absent"))
    with pytest.raises(BadInputError, match="drawn=True draws from a draft"):
        target.generate(ids, max_new_tokens=3, do_sample=True, custom_generate=DySpec(drawn=True))


def test_a_corpus_that_cannot_be_searched_is_refused(tmp_path):
    target, ids = tiny_llama(23), torch.tensor([[1]])
    with pytest.raises(BadInputError, match="There is no file"):
        DySpec(corpus=str(tmp_path / "absent.txt"))
    with pytest.raises(BadInputError, match="searched for text nodes"):
        DySpec(target, corpus=[[1, 2]], text_nodes=False)
    for alone in (dict(threshold=None), dict(drawn=True)):
        with pytest.raises(BadInputError, match="draft model's tree alone"):
            target.generate(
                ids, max_new_tokens=3, do_sample=True, custom_generate=DySpec(target, corpus=[[1, 2]], **alone)
            )
    with pytest.raises(BadInputError, match="prepare"):
        target.generate(ids, max_new_tokens=3, custom_generate=DySpec(corpus=["some text"]))


def test_a_draft_is_loaded_by_its_folder(tmp_path):
    target, ids = tiny_llama(23, seed=1), torch.tensor([[3, 5]])
    target.save_pretrained(tmp_path)
    decoder = DySpec(str(tmp_path), budget=6, threshold=None, max_children=1, text_nodes=False)
    target.generate(ids, max_new_tokens=15, do_sample=False, custom_generate=decoder)
    assert decoder.stats.mean_accepted > 5


def test_static_cache_is_refused():
    target = tiny_llama(23)
    with pytest.raises(UnsupportedModelError, match="cache"):
        target.generate(
            torch.tensor([[1]]), max_new_tokens=3, cache_implementation="static", custom_generate=DySpec(target)
        )


def test_stop_strings_through_generate(embedded):
    model, tokenizer = embedded
    inputs = tokenizer("One, two, three, four,", return_tensors="pt")
    arguments = dict(max_new_tokens=24, do_sample=False, stop_strings=["seven", "eight"])
    expected = model.generate(**inputs, tokenizer=tokenizer, **arguments)
    actual = DySpec(budget=4).generate(model, **inputs, tokenizer=tokenizer, **arguments)
    assert actual.tolist() == expected.tolist()
