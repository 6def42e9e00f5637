"""A real server on loopback, asked by the openai client and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import pytest
import torch

openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from everytoken.core.errors import BadInputError
from everytoken.serving.app import Server, make_app
from everytoken.serving.decoders import make_decoder
from everytoken.serving.engine import Engine
from everytoken.serving.requests import RequestError, read_chat, read_completion
from everytoken.serving.text import Pieces, StopCutter
from everytoken.serving.tools import ChatFormat

from ..loopback import served
from ..tokenization.families import FAMILIES
from .models import BARE, HERMES, OTHER, PLAIN, tiny_chat

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
ASK = {"messages": HI}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("add", "sub")]
ONE = {"response_format": {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}}


@pytest.fixture(scope="module")
def engine():
    return Engine(*tiny_chat(), most_tokens=600, per_request=True)


@pytest.fixture(scope="module")
def url(engine):
    with served(make_app(Server(engine, "tiny"))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def chat(client, **settings):
    return client.chat.completions.create(model="tiny", messages=HI, **settings)


def post(url, body, path="chat/completions", **more):
    more = more or {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
    with httpx2.Client(timeout=120, trust_env=False) as web:
        return web.post(f"{url}/v1/{path}", **more)


# -- what is written ---------------------------------------------------------------------------------------------------
def test_greedy_text_is_that_of_generate(client, engine):
    found = chat(client, temperature=0, max_tokens=12, n=2)
    ids = engine.tokenizer("[user]hi\n[assistant]", add_special_tokens=False, return_tensors="pt")
    wanted = engine.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = engine.tokenizer.decode(wanted, skip_special_tokens=True)
    assert [choice.message.content for choice in found.choices] == [text, text]
    assert found.usage.prompt_tokens == ids["input_ids"].shape[1] and found.usage.completion_tokens == 2 * len(wanted)
    assert found.choices[1].index == 1 and found.model == "tiny"


def test_a_seed_repeats_and_samples_differ(client):
    first, again, other = (chat(client, max_tokens=20, n=2, seed=seed) for seed in (3, 3, 4))
    texts = [[choice.message.content for choice in found.choices] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]


def test_the_defaults_of_the_model_do_not_sample_for_the_client(client, engine, monkeypatch):
    plain = chat(client, temperature=0, max_tokens=10).choices[0].message.content
    monkeypatch.setattr(engine.model.generation_config, "repetition_penalty", 5.0)
    assert chat(client, temperature=0, max_tokens=10).choices[0].message.content == plain


def test_a_stream_is_the_whole_text(client):
    whole = chat(client, temperature=0, max_tokens=30)
    pieces = list(chat(client, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices
    assert sum(bool(p.choices and p.choices[0].delta.content) for p in pieces) > 2


def test_two_streamed_choices(client):
    texts = {0: "", 1: ""}
    for piece in chat(client, max_tokens=8, n=2, seed=1, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert all(texts.values()) and texts[0] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client, stream):
    whole = chat(client, temperature=0, max_tokens=30).choices[0].message.content
    stop = whole[9:12]
    found = chat(client, temperature=0, max_tokens=30, stop=["never there", stop], stream=stream)
    if stream:
        pieces = list(found)
        text, finish = "".join(p.choices[0].delta.content or "" for p in pieces), pieces[-1].choices[0].finish_reason
    else:
        text, finish = found.choices[0].message.content, found.choices[0].finish_reason
    assert (text, finish) == (whole[: whole.find(stop)], "stop")


def test_a_stop_text_is_found_across_pieces():
    said = []
    cutter = StopCutter(["<end>", "xy"], said.append)
    for piece in ("a<e", "n", "d", "b<en", "d>after"):
        cutter.add(piece)
    cutter.add("more", last=True)
    assert "".join(said) == "a<endb" and cutter.ended
    said.clear()
    StopCutter(["xy"], said.append).add("abx", last=True)
    assert said == ["abx"]


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_the_whole_text_for_every_family_of_tokenizers(family):
    tokenizer = FAMILIES[family]()
    text = "hello\n    world the\n  and\n é 漢字, done"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)
    said = [pieces.add([token]) for token in ids] + [pieces.add([], last=True)]
    assert "".join(said) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_text_is_looked_for_in_the_answer_alone():
    """Behind a prompt that ends in its beginning, and among special tokens."""
    model, tokenizer = tiny_chat()
    engine = Engine(model, tokenizer)
    letters = {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "bc"}

    def written(**settings):
        ask = read_completion({"prompt": "ab", "max_tokens": 4, "temperature": 0} | settings)
        return engine.run(engine.prepare(ask), threading.Event())[0]

    found = written(stop="bc", logit_bias={str(letters["c"]): 100})
    assert (found.text, found.finish) == ("cccc", "length")
    other = tokenizer.convert_tokens_to_ids("<|im_start|>")
    found = written(stop="<|im_start|>", logit_bias={str(other): 100})
    assert (found.text, found.finish, len(found.tokens)) == ("", "stop", 1)


def test_a_grammar_ends_with_the_models_own_end():
    model, tokenizer = tiny_chat()
    model.generation_config.eos_token_id = [5, tokenizer.eos_token_id]
    model.generation_config.update(no_repeat_ngram_size=1, temperature=0.1)
    engine = Engine(model, tokenizer)
    for seed in range(6):
        ask = read_chat({"messages": HI, "regex": "[0-9]{3}", "seed": seed, "max_tokens": 12})
        found = engine.run(engine.prepare(ask), threading.Event())[0]
        assert re.fullmatch("[0-9]{3}", found.text) and found.finish == "stop"
    repeats = read_chat({"messages": HI, "regex": "(aa){4}", "max_tokens": 20})
    assert (
        engine.run(engine.prepare(repeats), threading.Event())[0].text == "a" * 8
    )  # the model's defaults do not count


def test_a_seed_gives_the_same_choices_whole_and_as_a_stream(client):
    whole = chat(client, n=2, seed=1, max_tokens=12)
    texts = {0: "", 1: ""}
    for piece in chat(client, n=2, seed=1, max_tokens=12, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert [choice.message.content for choice in whole.choices] == list(texts.values())


def test_a_cancelled_stream_begins_no_further_choice(engine):
    ask = read_chat({"messages": HI, "n": 32, "max_tokens": 8, "stream": True, "seed": 3})
    cancelled, forwards = threading.Event(), []
    handle = engine.model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    try:
        engine.run(engine.prepare(ask), cancelled, lambda index, text: cancelled.set())
    finally:
        handle.remove()
    assert len(forwards) <= 4


def test_a_tiny_temperature_is_greedy(client):
    plain = chat(client, temperature=0, max_tokens=6).choices[0].message.content
    assert chat(client, temperature=1e-40, max_tokens=6).choices[0].message.content == plain


def test_logprobs_are_the_models_own(client, engine):
    found = chat(client, seed=1, max_tokens=6, logprobs=True, top_logprobs=3, temperature=1.5).choices[0]
    told = found.logprobs.content
    ids = engine.tokenizer("[user]hi\n[assistant]", add_special_tokens=False)["input_ids"]
    job = engine.prepare(read_chat({"messages": HI, "seed": 1, "max_tokens": 6, "logprobs": True, "temperature": 1.5}))
    tokens = engine.run(job, threading.Event())[0].tokens
    with torch.no_grad():
        logps = engine.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    wanted = logps[range(len(tokens)), tokens].tolist()
    assert [t.logprob for t in told] == pytest.approx(wanted, abs=1e-4) and len(told) == len(tokens)
    assert told[0].top_logprobs[0].logprob == pytest.approx(float(logps[0].max()), abs=1e-4)
    assert all(len(t.top_logprobs) == 3 for t in told)


def test_completions(client, engine):
    ids = engine.tokenizer("ab")["input_ids"]
    found = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=5, temperature=0, echo=True)
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0, logprobs=2)
    assert [choice.text[:2] for choice in found.choices] == ["ab", "cd"]
    assert found.choices[0].text == "ab" + same.choices[0].text
    told = same.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == 5 and all(len(top) == 2 for top in told.top_logprobs)
    pieces = client.completions.create(model="tiny", prompt="ab", max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == same.choices[0].text


def test_penalties_and_biases(client, engine):
    banned = engine.tokenizer("e", add_special_tokens=False)["input_ids"][0]
    text = chat(client, temperature=0, max_tokens=5, logit_bias={str(banned): 100}).choices[0].message.content
    assert text == "eeeee"
    text = chat(client, temperature=0, max_tokens=9, logit_bias={str(banned): 100}, frequency_penalty=2.0)
    assert text.choices[0].message.content == "e" * 9  # 100 - 2 * 8 is still the most
    varied = chat(client, temperature=0, max_tokens=60, presence_penalty=2.0).choices[0].message.content
    assert varied != chat(client, temperature=0, max_tokens=60).choices[0].message.content


# -- grammars and tools ------------------------------------------------------------------------------------------------
def test_json_schemas_regexes_and_grammars(client):
    found = chat(client, seed=2, n=8, max_tokens=600, **ONE)
    done = [choice.message.content for choice in found.choices if choice.finish_reason == "stop"]
    assert done and all(json.loads(text)["a"] in (1, 2) for text in done)
    text = chat(client, seed=2, extra_body={"regex": "[0-9]{3}-[xyz]"}).choices[0].message.content
    assert re.fullmatch("[0-9]{3}-[xyz]", text)
    text = chat(client, seed=2, extra_body={"grammar": 'root ::= "yes" | "no"'}).choices[0].message.content
    assert text in ("yes", "no")
    pieces = chat(client, seed=2, extra_body={"regex": "[0-9]{3}-[xyz]"}, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert re.fullmatch("[0-9]{3}-[xyz]", text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"add", "sub"}), ({"type": "function", "function": {"name": "sub"}}, {"sub"})]
)
def test_a_call_that_is_asked_for_is_written(client, choice, names, stream):
    found = chat(client, tools=TOOLS, tool_choice=choice, seed=5, max_tokens=600, stream=stream)
    if stream:
        last = list(found)[-1].choices[0]
        finish, calls = last.finish_reason, last.delta.tool_calls
    else:
        finish, calls = found.choices[0].finish_reason, found.choices[0].message.tool_calls
        assert found.choices[0].message.content is None
    assert finish == "tool_calls" and len(calls) == 1
    assert calls[0].function.name in names and json.loads(calls[0].function.arguments)["a"] in (1, 2)
    assert re.fullmatch("call_[0-9a-f]{24}", calls[0].id)


@pytest.mark.parametrize("template", [PLAIN, HERMES, BARE])
def test_formats_of_calls_are_read_from_the_template(template):
    tools = {tool["function"]["name"]: tool["function"] for tool in TOOLS}
    form = ChatFormat(tiny_chat(template)[1])
    written = form.tools.opening("add") + '{"a": 1}}' + form.tools.end
    assert form.tools.split(f"I say {written} and {written}", ["add"])[0].split() == ["I", "say", "and"]
    text, (call,) = form.tools.split(written, ["add"])
    assert (text, call["function"]) == ("", {"name": "add", "arguments": '{"a": 1}'})
    assert form.tools.split(written, ["sub"]) == (written, [])
    other = written.replace('", "', '","')  # was held to no schema
    assert form.tools.split(other, ["add"]) == (other, [])
    exact = form.tools.opening("add") + '{"a": 12345678901234567890.10, "b": "}</call>"}}' + form.tools.end
    assert form.tools.split(exact, ["add"])[1][0]["function"]["arguments"].startswith('{"a": 12345678901234567890.10,')
    single = form.tools.grammar(tools, "auto", one=True)
    grammar = form.tools.grammar(tools, "auto")
    from everytoken.constraints.engine.compiler import GrammarCompiler
    from everytoken.constraints.engine.matcher import GrammarMatcher
    from everytoken.constraints.engine.vocabulary import TokenizerInfo

    info = TokenizerInfo.from_huggingface(form.tokenizer)
    for text, right in ((f"free {written} text", True), ("free text", True), (written.replace("1", "3"), False)):
        matcher = GrammarMatcher(GrammarCompiler(info).compile_grammar(grammar))
        assert matcher.accept_string(text) == right
    matcher = GrammarMatcher(GrammarCompiler(info).compile_grammar(single))
    assert matcher.accept_string(f"free {written}") and not matcher.accept_string("x")
    asked = [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    ]
    prompt = form.prompt([*asked, {"role": "tool", "content": "2"}], tools)
    assert written in prompt and "sub" in prompt and "2" in prompt


def test_a_form_of_calls_that_is_not_known_is_refused():
    with pytest.raises(RequestError, match="a form that this server does not know"):
        _ = ChatFormat(tiny_chat(OTHER)[1]).tools


def test_grammars_of_tools_are_kept(engine):
    ask = read_chat({"messages": HI, "tools": TOOLS})
    assert engine.prepare(ask).compiled is engine.prepare(ask).compiled


def test_a_model_without_a_chat_template_completes_only():
    model, tokenizer = tiny_chat()
    tokenizer.chat_template = None
    engine = Engine(model, tokenizer)
    with pytest.raises(RequestError, match="use /v1/completions"):
        engine.prepare(read_chat({"messages": HI}))


# -- decoders ----------------------------------------------------------------------------------------------------------
def test_a_request_may_choose_a_decoder(client):
    plain = chat(client, temperature=0, max_tokens=24).choices[0].message.content
    decoder = {"name": "dyspec", "settings": {"draft_model": "text", "budget": 4}}
    for stream in (False, True):
        found = chat(client, temperature=0, max_tokens=24, extra_body={"decoder": decoder}, stream=stream)
        text = (
            "".join(piece.choices[0].delta.content or "" for piece in found)
            if stream
            else found.choices[0].message.content
        )
        assert text == plain
    found = chat(client, n=3, seed=1, extra_body={"decoder": decoder, "regex": "[0-9]{4}"})
    assert all(re.fullmatch("[0-9]{4}", choice.message.content) for choice in found.choices)
    assert [choice.index for choice in found.choices] == [0, 1, 2]


def test_a_server_may_keep_its_decoder_and_names_are_checked():
    fixed = Engine(*tiny_chat(), make_decoder("dyspec", {"draft_model": "text"}))
    with pytest.raises(RequestError, match="lets no request choose"):
        fixed.prepare(read_chat({"messages": HI, "decoder": "dyspec"}))
    with pytest.raises(BadInputError, match="is no decoder"):
        make_decoder("tdpo", {})


# -- limits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"messages": HI, "model": "other"}, 404, "has the model 'tiny'"),
        ({"messages": HI, "max_tokens": 601}, 400, "this server gives 600"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "the model reads 1024"),
        ({"messages": HI, "best_of": 3}, 400, "does not honour 'best_of'"),
        ({"messages": HI, "regex": "("}, 400, ""),
        ({"messages": HI, "grammar": "root ::= other"}, 400, "other"),
        ({"messages": HI, "stream": True, "logprobs": True}, 400, "ask without stream"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "must be JSON"),
        ({"messages": HI, "logit_bias": {"99999": 1}}, 400, "beyond the vocabulary"),
        ({"messages": HI, "decoder": "nothing-like-it"}, 400, "nothing-like-it"),
        ({"messages": HI, "decoder": {"name": "dyspec", "settings": {"budget": "many"}}}, 400, "budget"),
        ({**ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, 400, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(url, body, status, told):
    answer = post(url, body)
    assert answer.status_code == status and told in answer.json()["error"]["message"], answer.text


def test_malformed_and_long_bodies(url):
    assert post(url, None, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert post(url, None, content=b"[" * 100_000).status_code == 400
    assert post(url, None, content=b"x" * 4_100_000).status_code == 413
    assert post(url, {"prompt": [10**8]}, "completions").status_code == 400


def test_the_key(engine):
    with served(make_app(Server(engine, "tiny", key="secret"))) as url:
        body = {"messages": HI, "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert post(url, None, content=json.dumps(body), headers=headers).status_code == 401
        assert post(url, None, content=json.dumps(body), headers={"authorization": "Bearer secret"}).status_code == 200
        with httpx2.Client(trust_env=False) as web:
            assert web.get(f"{url}/v1/models").status_code == web.get(f"{url}/metrics").status_code == 401
            assert web.get(f"{url}/health").json()["status"] == "ok"
    for wrong in ({"key": " "}, {"waiting": 0}):
        with pytest.raises(BadInputError):
            Server(engine, "tiny", **wrong)


def test_models_and_metrics(url, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    chat(client, max_tokens=3, temperature=0)
    with httpx2.Client(trust_env=False) as web:
        text = web.get(f"{url}/metrics").text
    assert int(re.search(r'requests_total\{status="200"\} (\d+)', text)[1]) >= 1
    assert int(re.search(r'tokens_total\{kind="completion"\} (\d+)', text)[1]) >= 3
    assert re.search(r"^everytoken_requests_inside 0$", text, re.M)


class Gate(torch.nn.Module):
    """Holds a model's forward until it is opened."""

    def __init__(self):
        super().__init__()
        self.opened, self.reached = threading.Event(), threading.Event()

    def __call__(self, module, args):
        self.reached.set()
        self.opened.wait(30)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_and_a_full_line_says_so(stream):
    """One request holds the only place; the next gets 429; the first leaves, and a third is answered."""
    engine, gate = Engine(*tiny_chat()), Gate()
    handle = engine.model.model.layers[0].register_forward_pre_hook(gate)
    server = Server(engine, "tiny", waiting=1)
    with served(make_app(server)) as url, httpx2.Client(timeout=60, trust_env=False) as web:
        body = {"messages": HI, "max_tokens": 900, "temperature": 0, "stream": stream}
        if stream:
            with web.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                pieces = answer.iter_bytes()  # kept: a client that drops it has left
                next(pieces)
                gate.reached.wait(30)
                full = post(url, {"messages": HI, "max_tokens": 1})
        else:

            def leaves():
                with pytest.raises(httpx2.TimeoutException):
                    httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=3)

            first = threading.Thread(target=leaves)
            first.start()
            gate.reached.wait(30)
            full = post(url, {"messages": HI, "max_tokens": 1})
            first.join()
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        for _ in range(600):  # the place is free although the model still holds the first request
            if server.inside == 0:
                break
            time.sleep(0.01)
        assert server.inside == 0
        gate.opened.set()
        handle.remove()
        answer = post(url, {"messages": HI, "max_tokens": 2, "temperature": 0})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 2
        assert server.counts["requests", "429"] >= 1


def many(url, count, body):
    async def ask(web, index):
        answer = await web.post(f"{url}/v1/chat/completions", json=body | {"seed": index})
        return answer.status_code

    async def run():
        limits = httpx2.Limits(max_connections=count)
        async with httpx2.AsyncClient(timeout=300, trust_env=False, limits=limits) as web:
            return await asyncio.gather(*(ask(web, index) for index in range(count)))

    return asyncio.run(run())


@pytest.mark.slow
def test_two_hundred_clients_lose_no_request(url):
    assert many(url, 200, {"messages": HI, "max_tokens": 4}) == [200] * 200


@pytest.mark.exhaustive
@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_requests(url):
    """Counted in objects that the collector sees, and in this process's resident pages."""
    import gc
    from pathlib import Path

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def some(count):
        for index in range(count // 50):
            assert many(url, 50, {"messages": HI, "max_tokens": 2} | (ONE if index % 2 else {})) == [200] * 50

    some(500)
    before = resident()
    some(2000)
    assert resident() - before < 20e6
