"""Messages as users have them: tool calls without content, content as parts, a text prompt beside conversations."""

from __future__ import annotations

import copy
import json

import pytest

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from everytoken.core.errors import BadInputError
from everytoken.preference.ift import IFTTrainer
from everytoken.preference.ift_training import demonstrations
from everytoken.preference.trainer import PreferenceTrainer
from everytoken.testing.models import tiny_llama
from everytoken.training.datasets.messages import message_text, plain_messages, row_prompt_ids, with_prompt_messages
from everytoken.training.datasets.pairs import load_pairs

from ...tiers import commit_tier
from ...trainer_settings import trainer_settings

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS_TEMPLATE = "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}{{ mood }}" + TEMPLATE


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
    args = trl.DPOConfig(**trainer_settings("unused", max_length=None))
    trainer = PreferenceTrainer(
        tiny_llama(49152), ref_model=tiny_llama(49152), args=args, train_dataset=rows, processing_class=tokenizer
    )
    data = trainer.train_dataset
    return [[tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in data]


@pytest.mark.parametrize("name", commit_tier(FORMS, ["a tool call without content", "content as parts"]))
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


def tuned_texts(tokenizer, rows, template=TEMPLATE):
    """What IFT reads of every row, and what it learns of it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    trainer = IFTTrainer(
        tiny_llama(49152), args=trl.SFTConfig(**trainer_settings("unused", max_length=None)), train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    return [
        [tokenizer.decode(row["input_ids"]), tokenizer.decode([label for label in row["labels"] if label != -100])]
        for row in trainer.train_dataset
    ]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("pairs", commit_tier([False, True], [True]), ids=["demonstrations", "pairs"])
def test_what_a_demonstration_says(tmp_path, embedded_tokenizer, name, pairs):
    """IFT reads the same messages as the preference trainer, also as the chosen side of pairs."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in FORMS[name]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (FORMS[name] if pairs else rows)))
    found = tuned_texts(embedded_tokenizer, demonstrations(file))
    assert len(found) == len(rows)
    for (whole, learned), row in zip(found, rows, strict=True):
        asked = row["prompt"] if isinstance(row["prompt"], str) else message_text(row["prompt"][0])
        answer = row["completion"][-1]
        calls = json.dumps(answer["tool_calls"]) if answer.get("tool_calls") else ""
        assert learned.removesuffix("<|im_end|>") == f"{message_text(answer)}{calls}</assistant>"
        assert whole == f"<user>{asked}</user><assistant>{learned}"
    if "call" not in name:
        assert tuned_texts(embedded_tokenizer, datasets.Dataset.from_list(rows[:1])) == found[:1]


def test_a_demonstration_of_messages_keeps_its_tools(tmp_path, embedded_tokenizer):
    rows = [
        {"messages": [user("a"), *says("b")], "tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "calm"}},
        {"messages": [user([{"type": "text", "text": "c"}]), {"role": "assistant", "tool_calls": call(city="A")}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = demonstrations(file)
    assert made[0]["tools"] == rows[0]["tools"] and made[0]["chat_template_kwargs"] == {"mood": "calm"}
    found = tuned_texts(embedded_tokenizer, made.select([0]), TOOLS_TEMPLATE)
    assert found[0][0] == 'TOOLS[{"name": "look"}]calm<user>a</user><assistant>b</assistant>'
    assert made[1]["messages"] == [user("c"), {"role": "assistant", "content": "", "tool_calls": call(city="A")}]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": [user("a")], "completion": [{"role": "assistant", "content": ""}]}, "last message is empty"),
        ({"prompt": [user("a")], "completion": [{"content": "x"}]}, "needs a role"),
        ({"prompt": [user("a")], "completion": "x"}, "completion is text"),
        ({"messages": "x"}, "must be a list of messages"),
        ({"text": [user("a")]}, "must be text"),
        ({"prompt": "a", "completion": says([{"type": "image"}])}, "'image'"),
    ],
)
def test_bad_demonstrations_are_named(tmp_path, row, why):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInputError, match=f"row 0.*{why}"):
        demonstrations(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("tools", [[{"name": "look"}], '[{"name": "look"}]', None], ids=["list", "JSON", "none"])
@pytest.mark.parametrize("settings", [{"mood": "calm"}, None], ids=str)
def test_a_rows_prompt_is_what_the_trainer_reads(embedded_tokenizer, tools, settings):
    """Texts for the report answer this prompt."""
    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = TOOLS_TEMPLATE
    row = {"prompt": [user([{"type": "text", "text": "Hello"}])], "chosen": says("Hi"), "rejected": says("Go")}
    row |= {name: value for name, value in (("tools", tools), ("chat_template_kwargs", settings)) if value}
    trainer = PreferenceTrainer(
        tiny_llama(49152), ref_model=tiny_llama(49152), args=trl.DPOConfig(**trainer_settings("unused")),
        train_dataset=datasets.Dataset.from_list([row]), processing_class=tokenizer,
    )  # fmt: skip
    assert row_prompt_ids(tokenizer, row) == trainer.train_dataset[0]["prompt_ids"]
    shown = tokenizer.decode(row_prompt_ids(tokenizer, row))
    assert ("look" in shown) == bool(tools) and ("calm" in shown) == bool(settings)


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
