"""Decoding under a grammar: processor and decoder agree, rows and batches, sampling, caches, streams, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats

from everytoken.constraints.awrs import AWRS
from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.constraints.logits_processor import parse_source, read_source
from everytoken.constraints.xgrammar import GrammarLogitsProcessor, XGrammar
from everytoken.core.errors import BadInputError

from ..conftest import tiny_llama
from .common import compile_

VOCAB = [None, b"a", b"b", b"c", b"ab", b"bc", b"(", b")", None]
EOS = 8
INFO = TokenizerInfo(VOCAB, [EOS])
NEST = 'root ::= "(" root ")" | "a" tail\ntail ::= "" | "bc"? tail2\ntail2 ::= "c" | "b"'


@pytest.fixture(scope="module")
def model():
    return tiny_llama(9, seed=5, eos=EOS, scale=0.4)


@pytest.fixture(scope="module")
def nest():
    return compile_(NEST, INFO)


def spelled(tokens):
    return b"".join(VOCAB[token] or b"" for token in tokens)


def complete(compiled, tokens):
    matcher = GrammarMatcher(compiled)
    return matcher.accept_string(spelled(tokens)) and matcher.can_end()


@pytest.mark.parametrize("prompt", [[1], [2, 6, 6], [3, 1, 4, 2]])
def test_the_decoder_gives_what_generate_with_the_processor_gives(model, nest, prompt):
    ids = torch.tensor([prompt])
    common = {"max_new_tokens": 24, "do_sample": False}
    one = model.generate(ids, logits_processor=[GrammarLogitsProcessor(nest)], **common)
    two = model.generate(ids, custom_generate=XGrammar(nest), **common)
    assert torch.equal(one, two)
    sampled = {"max_new_tokens": 24, "do_sample": True, "temperature": 1.3, "top_k": 3}
    torch.manual_seed(1)
    one = model.generate(ids, logits_processor=[GrammarLogitsProcessor(nest)], **sampled)
    torch.manual_seed(1)
    two = model.generate(ids, custom_generate=XGrammar(nest), **sampled)
    assert torch.equal(one, two)


def test_batches_of_different_grammars_with_padding(model, nest):
    ids = torch.tensor([[0, 0, 1], [2, 3, 1], [0, 6, 6]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    grammars = [
        nest,
        compile_(Grammar.from_regex("(bc){2,5}"), INFO),
        compile_(Grammar.from_choices(["abab", "c"]), INFO),
    ]
    common = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": True, "top_k": 0}
    for how in ({"logits_processor": [GrammarLogitsProcessor(grammars)]}, {"custom_generate": XGrammar(grammars)}):
        torch.manual_seed(0)
        output = model.generate(ids, **common, **how)
        for row, compiled in zip(output[:, 3:].tolist(), grammars, strict=True):
            tokens = row[: row.index(EOS)] if EOS in row else row
            assert (EOS in row and complete(compiled, tokens)) or len(row) == 30
    with pytest.raises(BadInputError, match="2 grammars"):
        model.generate(ids, custom_generate=XGrammar(grammars[:2]), **common)
    with pytest.raises(BadInputError, match="2 grammars"):
        model.generate(ids, logits_processor=[GrammarLogitsProcessor(grammars[:2])], **common)


def test_beam_search_reorders_rows(model, nest):
    processor = GrammarLogitsProcessor(nest)
    output = model.generate(
        torch.tensor([[1, 2]]), num_beams=4, max_new_tokens=12, do_sample=False, logits_processor=[processor]
    )
    for text in (output[0, 2:].tolist(),):
        assert GrammarMatcher(nest).longest_prefix(spelled(text)) == len(spelled(text)) > 0
        assert EOS not in text or complete(nest, text[: text.index(EOS)])
    again = model.generate(
        torch.tensor([[3]]), num_beams=2, max_new_tokens=12, do_sample=False, logits_processor=[processor]
    )
    assert GrammarMatcher(nest).longest_prefix(spelled(again[0, 1:].tolist())) == len(spelled(again[0, 1:].tolist()))


@pytest.mark.slow
def test_sampling_follows_the_masked_model(model, nest):
    """The first token's distribution is the model's, renormalised over the allowed tokens (chi-square)."""
    ids = torch.tensor([[2, 3]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    allowed = GrammarMatcher(nest).allowed_tokens().tolist()
    wanted = torch.softmax(logits[allowed].double(), -1).numpy()
    torch.manual_seed(0)
    output = model.generate(
        ids.expand(1500, -1), custom_generate=XGrammar(nest), max_new_tokens=1, do_sample=True, top_k=0
    )
    counts = [int((output[:, 2] == token).sum()) for token in allowed]
    assert sum(counts) == 1500 and stats.chisquare(counts, wanted * 1500).pvalue > 1e-4


def test_cache_reuse_stopping_streams_and_traces(model, nest):
    class Sink:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    ids = torch.tensor([[1, 2, 3]])
    decoder, sink = XGrammar(nest, trace_enabled=True), Sink()
    output = decoder.generate(
        model, ids, streamer=sink, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    new = output.sequences[0, 3:].tolist()
    assert sink.tokens[-len(new) - 1 : -1] == new and sink.tokens[-1] == "end" and output.stats.new_tokens == len(new)
    trace = output.trace[0]
    matcher = GrammarMatcher(nest)
    for token, allowed, mass in zip(trace.ids, trace.columns["allowed"], trace.columns["allowed_mass"], strict=True):
        assert allowed == len(matcher.allowed_tokens()) and 0 < mass <= 1.0001
        matcher.accept_token(token)
    assert decoder.figures()["complete texts"] == float(new[-1] == EOS)
    cache = output.past_key_values
    longer = torch.cat([output.sequences, torch.tensor([[1, 2]])], 1)
    cached = model.generate(
        longer, past_key_values=cache, custom_generate=XGrammar(nest), max_new_tokens=10, do_sample=False
    )
    assert torch.equal(
        cached, model.generate(longer, custom_generate=XGrammar(nest), max_new_tokens=10, do_sample=False)
    )
    short = model.generate(
        ids, custom_generate=XGrammar(compile_("root ::= [abc]*", INFO)), max_new_tokens=3, do_sample=False
    )
    assert short.shape[1] <= 6


def test_repetition_penalty_and_other_processors_apply_inside_the_grammar(model, nest):
    output = model.generate(
        torch.tensor([[1, 2]]),
        custom_generate=XGrammar(nest),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=3.0,
    )
    assert GrammarMatcher(nest).longest_prefix(spelled(output[0, 2:].tolist())) == len(spelled(output[0, 2:].tolist()))


@pytest.mark.slow
def test_the_embedded_model_writes_valid_json_and_jumps(embedded):
    import jsonschema

    model, tokenizer = embedded
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "born": {"type": "integer", "minimum": 1000, "maximum": 2100}, "jobs": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 3}},
        "required": ["name", "born", "jobs"], "additionalProperties": False,
    }  # fmt: skip
    inputs = tokenizer("Marie Curie as JSON:\n", return_tensors="pt")
    texts = {}
    for jump in (False, True):
        decoder = XGrammar(schema=json.dumps(schema), any_whitespace=False, jump_forward=jump).prepare(
            tokenizer, model.config.vocab_size
        )
        output = model.generate(**inputs, custom_generate=decoder, max_new_tokens=90, do_sample=False)
        texts[jump] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        jsonschema.validate(json.loads(texts[jump]), schema)
        texts[jump] = (texts[jump], decoder.stats.target_forwards)
    assert texts[True][1] < texts[False][1]


def test_refusals(model, nest):
    ids = torch.tensor([[1, 2]])
    for decoder, extra, message in (
        (XGrammar(schema="{}"), {}, "not compiled"),
        (XGrammar(nest, jump_forward=True), {}, "tokenizer"),
        (
            XGrammar(nest, jump_forward=True, tokenizer=object()),
            {"return_dict_in_generate": True, "output_scores": True},
            "output_scores",
        ),
        (XGrammar(nest), {"num_beams": 2}, "num_beams"),
        (XGrammar(nest), {"use_cache": False}, "use_cache"),
        (XGrammar(nest), {"attention_mask": torch.tensor([[1, 0]])}, "left"),
    ):
        with pytest.raises(BadInputError, match=message):
            model.generate(ids, custom_generate=decoder, max_new_tokens=3, do_sample=False, **extra)
    wide = compile_(NEST, TokenizerInfo([*VOCAB, *([b"x"] * 90)], [EOS]))
    with pytest.raises(BadInputError, match="compiled for 99 tokens"):
        model.generate(ids, logits_processor=[GrammarLogitsProcessor(wide)], max_new_tokens=3, do_sample=False)
    with pytest.raises(BadInputError, match="compiled for 99 tokens"):
        model.generate(ids, custom_generate=XGrammar(wide), max_new_tokens=3, do_sample=False)
    with pytest.raises(BadInputError, match="no grammar"):
        GrammarLogitsProcessor([])


def test_sources(tmp_path):
    path = tmp_path / "person.json"
    path.write_text('{"type": "null"}', encoding="utf-8")
    assert read_source(str(path)) == '{"type": "null"}' and read_source('{"a": 1}') == '{"a": 1}'
    for text in ('{"const": "%s"}' % ("long" * 1000), "[a-z]{1,3}" * 30, "~nobody{2}", "null\0character"):
        assert read_source(text) == text
    assert (
        parse_source(str(path), None, None).rules
        and parse_source(None, "a+", None).rules
        and parse_source(None, None, 'root ::= "x"').rules
    )
    with pytest.raises(BadInputError, match="no file"):
        read_source("nowhere.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_source(str(tmp_path / "bad.json"))
    with pytest.raises(BadInputError, match="one of"):
        XGrammar(schema="{}", regex="a")
    with pytest.raises(GrammarError, match="line 1"):
        XGrammar(grammar='root ::= "a')


def test_padding_rows_of_the_model_are_never_allowed(embedded_tokenizer):
    info = TokenizerInfo.from_huggingface(embedded_tokenizer, 49_300)
    matcher = GrammarMatcher(GrammarCompiler(info, warm_seconds=0).compile_regex("[^]*"))
    assert matcher.allowed_tokens().max() < 49_152


@pytest.mark.parametrize("decoder", [XGrammar, AWRS])
def test_options_of_schemas_reach_them_and_are_refused_without(decoder):
    """Properties in another order than the schema's, and an option that a regular expression could only ignore."""
    info = TokenizerInfo([*(bytes([n]) for n in range(256)), None], [256])
    schema = '{"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "type": "object"}'
    for order, accepted in (("schema", False), ("flexible", True)):
        made = decoder(schema=schema, property_order=order)
        matcher = GrammarMatcher(GrammarCompiler(info).compile_grammar(made._grammar))
        assert matcher.accept_string('{"b": 1, "a": 2}') is accepted
    with pytest.raises(GrammarError, match="property_order is one of"):
        decoder(schema=schema, property_order="random")
    with pytest.raises(BadInputError, match="property_order says how JSON is written"):
        decoder(regex="a+", property_order="flexible")


def test_white_space_and_strictness_are_no_matter_of_expressions():
    with pytest.raises(BadInputError, match="any_whitespace, strict_mode says"):
        XGrammar(grammar='root ::= "a"', any_whitespace=False, strict_mode=False)
