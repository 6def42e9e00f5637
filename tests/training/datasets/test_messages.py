"""Messages as users have them: tool calls without content, content as parts, a text prompt beside conversations."""

from __future__ import annotations

import copy
import json

import pytest

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from everytoken.core.errors import BadInputError
from everytoken.preference.trainer import PreferenceTrainer
from everytoken.testing.models import tiny_llama
from everytoken.training.datasets.messages import message_text, plain_messages, with_prompt_messages
from everytoken.training.datasets.pairs import load_pairs

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def call(**arguments):
    return [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return [{"role": "assistant", "content": text}]


FORMS = {
    "tool calls with empty content": [
        {
            "prompt": [user("weather?")],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": call(city="A")}],
            "rejected": [{"role": "assistant", "content": "", "tool_calls": call(place="B")}],
        }
    ],
    "a tool call without content": [
        {
            "prompt": [user("weather?")],
            "chosen": [{"role": "assistant", "tool_calls": call(city="A")}],
            "rejected": says("no"),
        },
        {
            "prompt": [user("weather!")],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": call(town="C")}],
            "rejected": [{"role": "assistant", "tool_calls": call(city="D")}],
        },
    ],
    "content as parts": [
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
            "chosen": says([{"type": "text", "text": "Hi"}]),
            "rejected": says([{"type": "text", "text": "Go"}]),
        },
        {"prompt": [user("Hello")], "chosen": says("Hi"), "rejected": says("Go")},
    ],
    "a text prompt beside conversations": [
        {"prompt": "Hello", "chosen": [user("Hello"), *says("Hi")], "rejected": [user("Hello"), *says("Go")]}
    ],
    "a text prompt beside answers": [{"prompt": "Hello", "chosen": says("Hi"), "rejected": says("Go")}],
}


def texts(tokenizer, rows):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    args = trl.DPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], max_length=None)
    trainer = PreferenceTrainer(
        tiny_llama(49152), ref_model=tiny_llama(49152), args=args, train_dataset=rows, processing_class=tokenizer
    )
    data = trainer.train_dataset
    return [[tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in data]


@pytest.mark.parametrize("name", FORMS)
def test_what_the_tokens_say(tmp_path, embedded_tokenizer, name):
    """From a file, and (where its rows fit into one table) from a dataset in memory."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FORMS[name]))
    found = texts(embedded_tokenizer, load_pairs(file))
    assert len(found) == len(FORMS[name])
    for (prompt, chosen, rejected), row in zip(found, FORMS[name], strict=True):
        asked = row["prompt"] if isinstance(row["prompt"], str) else message_text(row["prompt"][0])
        assert prompt == f"<user>{asked}</user><assistant>"
        for text, side in ((chosen, "chosen"), (rejected, "rejected")):
            answer = row[side][-1]
            calls = json.dumps(answer["tool_calls"]) if answer.get("tool_calls") else ""
            assert text == f"{message_text(answer)}{calls}</assistant>"
    if "call" not in name:
        assert texts(embedded_tokenizer, datasets.Dataset.from_list(FORMS[name][:1])) == found[:1]


def test_a_prompt_that_says_something_else_is_warned_of():
    row = {"prompt": "Hello", "chosen": [user("q"), *says("Hi")], "rejected": [user("q"), *says("Go")]}
    with pytest.warns(UserWarning, match="the messages are read"):
        found = with_prompt_messages(row)
    assert found == {"prompt": [user("q")], "chosen": says("Hi"), "rejected": says("Go")}
    with pytest.raises(BadInputError, match="begin with different messages"):
        with_prompt_messages(row | {"rejected": [user("other"), *says("Go")]})


def test_parts_that_are_no_text_are_refused():
    with pytest.raises(BadInputError, match="'image'"):
        plain_messages([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"role": "assistant", "content": ""}, "last message is empty"),
        ({"role": "assistant", "content": [{"type": "text", "text": ""}]}, "last message is empty"),
        ({"role": "assistant"}, "a content, or tool calls"),
        ({"content": "x"}, "needs a role"),
        ({"role": "assistant", "content": 3}, "must be text"),
    ],
)
def test_bad_messages_are_named(tmp_path, answer, why):
    row = {"prompt": [user("a")], "chosen": says("b"), "rejected": [answer]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(FORMS["content as parts"][1]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(BadInputError, match=f"line 2.*{why}"):
        load_pairs(tmp_path / "pairs.jsonl")
