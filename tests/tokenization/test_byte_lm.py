"""A model of bytes: against enumeration of token sequences, and against a byte-level chain known exactly."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.tokenization.byte_lm import EOS, ByteLM, _Node
from everytoken.tokenization.byte_view import fillings, split_character

from ..conftest import tiny_llama
from ..tiers import commit_tier
from .common import KINDS, build_lm, byte_level, check_steps
from .families import family


def can_begin(view, tokens):
    """By trying every pair of characters after the text, and every way to finish a character."""
    data = b"".join(view.bytes[t] for t in tokens)
    parts = split_character(data)
    if parts is None:
        return False
    if parts[1]:
        tails = list(fillings(parts[1]))
    else:
        letters = ["", "a", "t", "s", " ", "\n", "1", ".", "'", "é"]
        tails = [(first + second).encode() for first in letters for second in letters]
    found = (view.encode(data + tail) for tail in tails)
    return any(ids is not None and ids[: len(tokens)] == list(tokens) for ids in found)


def enumerate_covers(lm, text, beyond=0):
    """Every token sequence whose last token reaches ``beyond`` bytes behind a spelled text, or further.

    Found one token at a time: ``{tokens: (log-probability, bytes)}``.
    """
    covers, pending = {}, [((), 0.0, b"")]
    while pending:
        tokens, logp, data = pending.pop()
        with torch.inference_mode():
            logits = lm.model(torch.tensor([[*lm.context, *tokens]])).logits[0, -1, : lm.vocab]
        logps = torch.log_softmax(logits.double(), -1).tolist()
        for token, piece in enumerate(lm.view.bytes[: lm.vocab]):
            if not piece:
                continue
            longer = data + piece
            if longer.startswith(text) and len(longer) >= len(text) + beyond:
                covers[*tokens, token] = logp + logps[token], longer
            elif text.startswith(longer):
                pending.append(((*tokens, token), logp + logps[token], longer))
    return covers


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["h", "hel", "it'", "1", "he \n", "wé"])
def test_covers_equal_enumeration(kind, text, exact):
    lm = build_lm(kind, exact=exact, tolerance=0.0)
    spelled = lm.view.spelled(text)
    wanted = enumerate_covers(lm, spelled)
    # without the check of the whole only the left part must be an encoding
    checked = {t: p for t, (p, _) in wanted.items() if can_begin(lm.view, t if exact else t[:-1])}
    found = {(*lm._base[len(lm.context) :], *cover.tokens): cover.logp for cover in lm.covers(text)}
    assert found.keys() == checked.keys()
    for tokens, logp in checked.items():
        assert found[tokens] == pytest.approx(logp, abs=1e-4)
    assert lm.logprob(text) == pytest.approx(np.logaddexp.reduce(list(checked.values())), abs=1e-4)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "byte-level" else pytest.mark.slow) for k in KINDS])
def test_next_bytes_equal_enumeration(kind):
    lm = build_lm(kind, tolerance=0.0)
    for text in (b"", b"hel", b"a he") if kind == "byte-level" else (b"hel",):
        spelled = lm.view.spelled(text)
        wanted = np.zeros(256)
        for tokens, (logp, data) in enumerate_covers(lm, spelled, beyond=1).items():
            if can_begin(lm.view, tokens):
                wanted[data[len(spelled)]] += math.exp(logp)
        found = np.exp(lm.next_byte_logprobs(text))
        assert found.sum() == pytest.approx(1)
        assert np.allclose(found[:256] / found[:256].sum(), wanted / wanted.sum(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_incremental_steps_equal_fresh_ones(kind):
    """Byte after byte on one cache, jumping back, and settled words leaving the window: nothing depends on the way."""
    lm = build_lm(kind)
    text = "hello world the café 😀 it's  12".encode()
    steps = [lm.next_byte_logprobs(text[:size]) for size in range(len(text))]
    assert lm.forwards <= 2 * len(text)
    for size in (3, 20, 11, len(text) - 1):
        fresh = build_lm(kind).next_byte_logprobs(text[:size])
        assert np.allclose(np.exp(steps[size]), np.exp(fresh), atol=1e-5)
        assert np.allclose(np.exp(lm.next_byte_logprobs(text[:size])), np.exp(fresh), atol=1e-5)
    assert lm.logprob(text) == pytest.approx(build_lm(kind).logprob(text), abs=1e-3)


# -- a world known exactly ---------------------------------------------------------------------------------------------
class Chain(ByteLM):
    """A model of tokens that is a Markov chain over the bytes "h", "e", "l" by construction: texts of seven bytes."""

    LETTERS, SIZE = b"hel", 7

    def __init__(self, **options):
        tokenizer = byte_level()
        super().__init__(tiny_llama(len(tokenizer), eos=tokenizer.eos_token_id), tokenizer, tolerance=0.0, **options)
        rng = np.random.default_rng(0)
        self.first = rng.dirichlet(np.ones(3))
        self.next = rng.dirichlet(np.ones(3), 3)
        self.texts = {}
        for number in range(3**self.SIZE):
            digits = [number // 3**k % 3 for k in range(self.SIZE)]
            prob = self.first[digits[0]] * math.prod(self.next[a, b] for a, b in itertools.pairwise(digits))
            text = bytes(self.LETTERS[d] for d in digits)
            self.texts[text] = (prob, (*self.view.encode(text), *self.eos))
        self.table = {}
        for prob, tokens in self.texts.values():
            for size in range(len(tokens)):
                here = self.table.setdefault(tokens[:size], {})
                here[tokens[size]] = here.get(tokens[size], 0.0) + prob

    def logps_after(self, tokens):
        logps = np.full(self.vocab, -np.inf)
        here = self.table.get(tuple(tokens), {})
        for token, prob in here.items():
            logps[token] = math.log(prob / sum(here.values()))
        return logps

    def _commit(self, chain):
        self._base += chain
        self._nodes = {(): _Node(-1, 0.0, self.logps_after(self._base[len(self.context) :]))}

    def _grow(self, paths):
        for path in paths:
            above = self._nodes[path[:-1]]
            before = self._base[len(self.context) :]
            self._nodes[path] = _Node(-1, above.logp + above.logps[path[-1]], self.logps_after((*before, *path)))

    def chance(self, prefix):
        return sum(prob for text, (prob, _) in self.texts.items() if text.startswith(prefix))


def test_a_markov_chain_comes_back_exactly():
    lm = Chain()
    biased = 0
    for prefix in (b"", b"h", b"he", b"hel", b"helh", b"lle", b"elel", b"hhelhe"):
        found = np.exp(lm.next_byte_logprobs(prefix))
        row = lm.first if not prefix else lm.next[lm.LETTERS.index(prefix[-1:])]
        assert np.allclose([found[byte] for byte in lm.LETTERS], row, atol=1e-9), prefix
        assert found.sum() == pytest.approx(1, abs=1e-12)
        # the naive way: the prefix's own tokens, then the first byte of the next token
        naive = np.zeros(257)
        for token, logp in enumerate(lm.logps_after(lm.view.encode(prefix))):
            naive[EOS if token in lm.eos else (lm.view.bytes[token] or b"\0")[0]] += math.exp(logp)
        biased += not np.allclose([naive[byte] for byte in lm.LETTERS], row, atol=0.05)
    assert biased >= 3
    full = b"helhelh"
    assert np.exp(lm.next_byte_logprobs(full))[EOS] == pytest.approx(1)


def test_the_chain_rule_and_the_sum_over_covers():
    lm = Chain()
    for text in (b"hel", b"lleh", b"ehlehle"):
        steps = sum(lm.next_byte_logprobs(text[:k])[text[k]] for k in range(len(text)))
        assert steps == pytest.approx(math.log(lm.chance(text)), abs=1e-9)
        assert lm.logprob(text) == pytest.approx(math.log(lm.chance(text)), abs=1e-9)
    assert lm.logprob(b"ehlehle", ended=True) == pytest.approx(lm.logprob(b"ehlehle"), abs=1e-9)
    assert lm.logprob(b"ehl", ended=True) == -math.inf


@pytest.mark.parametrize("unit", ["byte", "token"])
@pytest.mark.slow
def test_sampled_texts_follow_the_model(unit):
    lm = Chain()

    def plain(tokens, new, size, do_sample, temperature, rng):
        tokens = tokens[len(lm.context) :]
        while len(new) < size:
            logps = lm.logps_after(tokens)
            token = int(rng.choice(lm.vocab, p=np.exp(logps)))
            if token in lm.eos:
                break
            tokens, new = [*tokens, token], new + lm.view.bytes[token]
        return new[:size]

    lm._plain = plain
    draws = 1200
    seen = Counter(lm.generate(b"he", 3, do_sample=True, seed=seed, unit=unit) for seed in range(draws))
    expected = Counter()
    for text, (prob, _) in lm.texts.items():
        if text.startswith(b"he"):
            expected[text[2:5]] += draws * prob / lm.chance(b"he")
    assert seen.keys() <= expected.keys()
    common = [key for key, count in expected.items() if count >= 5]
    rest = draws - sum(seen[k] for k in common), draws - sum(expected[k] for k in common)
    observed = [seen[k] for k in common] + ([rest[0]] if rest[1] > 1 else [])
    wanted = [expected[k] for k in common] + ([rest[1]] if rest[1] > 1 else [])
    wanted = np.array(wanted) * sum(observed) / sum(wanted)
    assert chisquare(observed, wanted).pvalue > 1e-4


# -- a real model ------------------------------------------------------------------------------------------------------
def test_at_a_safe_boundary_bytes_are_the_tokens_first_bytes(embedded):
    """Digits are tokens by themselves here: nothing sticks out, so the next byte is the first of the next token."""
    model, tokenizer = embedded
    lm = ByteLM(model, tokenizer)
    text = "Rome, the year 199"
    assert all((lm.view.starting_with(text[place:].encode())[1] < 0).all() for place in range(len(text)))
    found = np.exp(lm.next_byte_logprobs(text))
    with torch.inference_mode():
        ids = torch.tensor([[*lm.context, *tokenizer(text)["input_ids"]]])
        probs = torch.softmax(model(ids).logits[0, -1].float(), -1).numpy()
    naive = np.zeros(257)
    for token, piece in enumerate(lm.view.bytes):
        if token in lm.eos:
            naive[EOS] += probs[token]
        elif piece:
            naive[piece[0]] += probs[token]
    assert np.abs(found - naive / naive.sum()).max() < 1e-3


def test_words_cut_in_the_middle(embedded):
    model, tokenizer = embedded
    lm = ByteLM(model, tokenizer)
    assert lm.generate("The capital of France is Par", 2) == b"is"
    before = lm.forwards
    new = lm.generate("Once upon a time there was a beauti", 12, unit="byte")
    assert new.startswith(b"ful") and lm.forwards - before <= 3 * len(new)
    trace = lm.trace("The capital of France is Par")
    assert trace.columns["beyond"][0] == "is" and sum(trace.columns["probability"]) <= 1 + 1e-6


def test_bad_input():
    lm = build_lm("byte-level")
    for call, message in (
        (lambda: lm.next_byte_logprobs(b"\xff\xfe"), "no UTF-8"),
        (lambda: lm.logprob(b"a\xc3b"), "no UTF-8"),
        (lambda: lm.generate("a", unit="word"), "unit"),
        (lambda: lm.generate("a", do_sample=True, temperature=0.0), "temperature"),
        (lambda: ByteLM(lm.model, lm.tokenizer, context=[]), "context is empty"),
        (lambda: lm.next_byte_logprobs("hel the " * 200), "longer than the model's context"),
    ):
        with pytest.raises(BadInputError, match=message):
            call()


# -- tokenizers that put spaces elsewhere ------------------------------------------------------------------------------
@pytest.mark.parametrize("exact", [True, False])
def test_tokens_that_end_in_a_space(exact):
    """A token "e " crosses the place before a space: nothing is settled there."""
    tokenizer = supertokens_with_spaces()
    lm = ByteLM(tiny_llama(len(tokenizer), eos=tokenizer.eos_token_id, scale=0.3), tokenizer, exact=exact, tolerance=0)
    assert b"e " in lm.view.bytes and lm.view.settled(b"he saw") == 0
    text = b"he saw"
    check_steps(lm, text)
    spelled = lm.view.spelled(text)
    wanted = enumerate_covers(lm, spelled)
    total = [p for t, (p, _) in wanted.items() if can_begin(lm.view, t if exact else t[:-1])]
    assert lm.logprob(text) == pytest.approx(np.logaddexp.reduce(total), abs=1e-3)


def supertokens_with_spaces():
    """Byte-level BPE over whole lines, with a token that ends in a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "Ġ"), ("s", "a"), ("h", "eĠ"), ("sa", "w")]
    names = ["</s>", *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("name", commit_tier(["Llama 2", "Mistral", "unigram"], ["Llama 2"]))
def test_prompts_that_begin_with_a_space(name):
    """Where tokenizers put a space in front, one more is one more."""
    tokenizer = family(name)
    lm = ByteLM(tiny_llama(len(tokenizer), eos=tokenizer.eos_token_id, scale=0.3), tokenizer, tolerance=0)
    assert lm.view.lead == b" "
    assert np.exp(lm.next_byte_logprobs(" hello")).sum() == pytest.approx(1)
    check_steps(lm, b" he  w")
    assert lm.covers(" he")[0].logp < 0


@pytest.mark.parametrize("char", ["\U0001d7d8", "\u3000", "漢", "é", "٣"])
def test_characters_whose_kind_decides_the_cut(char):
    """With digits cut one by one, two spaces before a digit stay together; before a letter they do not.

    Byte by byte through the character, the mass of its whole encoding is never lost.
    """
    tokenizer = family("SmolLM2")
    lm = ByteLM(tiny_llama(len(tokenizer), eos=tokenizer.eos_token_id, scale=0.3), tokenizer, tolerance=0)
    text = f"  {char}".encode()
    own = lm.view.encode(text)
    for size in range(1, len(text)):
        spelt, kept = b"", []
        for token in own:
            if len(spelt) >= size:
                break
            kept.append(token)
            spelt += lm.view.bytes[token]
        assert tuple(kept) in {cover.tokens for cover in lm.covers(text[:size])}, size
    check_steps(lm, text)


def windows(family, tokenizer, **options):
    """A tiny Gemma with windows shorter than the texts, as a model of bytes."""
    import transformers

    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(1)
    return ByteLM(getattr(transformers, f"{family}ForCausalLM")(config).eval(), tokenizer, **options)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_sliding_windows(family):
    """A window passes settled text, and the nodes of the tree push nothing out of it: as one forward for each path."""
    lm, text = windows(family, byte_level()), b"hello world the hel"
    for size in range(len(text) + 1):
        step = lm.next_byte_logprobs(text[:size])
        for path, node in lm._nodes.items() if size > 12 else ():
            with torch.inference_mode():
                logits = lm.model(torch.tensor([[*lm._base, *path]])).logits[0, -1, : lm.vocab]
            assert np.allclose(node.logps, torch.log_softmax(logits, -1), atol=1e-4)
    assert len(lm._base) > 4 and len(lm._nodes) > 4 and lm.forwards <= 2 * (len(text) + 1)
    fresh = windows(family, byte_level())
    assert np.allclose(np.exp(step), np.exp(fresh.next_byte_logprobs(text)), atol=1e-5)
    ids = torch.tensor([[*lm._base, *lm.covers(text)[0].tokens]])
    plain = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert lm.generate(text, 6) == spelt(lm, plain[0], len(text))[:6]


def spelt(lm, ids, start):
    """The bytes of tokens behind BOS and the text's first ``start``."""
    return b"".join(lm.view.bytes[token] or b"" for token in ids[1:].tolist())[start:]


def test_a_recurrent_model_is_refused_before_any_forward(monkeypatch):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    tokenizer = byte_level()
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config)
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("a forward pass before the refusal"))
    with pytest.raises(UnsupportedModelError, match="one forward, and Qwen3NextForCausalLM cannot"):
        ByteLM(model, tokenizer)
