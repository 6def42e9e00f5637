"""Bodies are checked field by field, and what is not honoured is refused by name."""

from __future__ import annotations

import pytest

from everytoken.serving.requests import Ask, RequestError, read_chat, read_completion

HI = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "clown", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": [], "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "hi", "mood": "good"}]}, "messages"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": []}}}, "tool_choice"),
        ({"temperature": 10**400}, "temperature"),
        ({"stop": "a" * 257}, "stop"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": "0.5"}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"grammar": 3}, "grammar"),
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "regex": "a"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"decoder": {"name": "dyspec", "settings": {"budget": [1]}}}, "decoder"),
        ({"beam_width": 4}, "beam_width"),
    ],
)
def test_a_wrong_field_is_named(change, param):
    with pytest.raises(RequestError) as caught:
        read_chat(HI | change)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [None, [], "hi", {"prompt": None}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]}])
def test_a_body_without_a_prompt_is_refused(body):
    with pytest.raises(RequestError):
        read_completion(body)


def test_null_is_left_out_and_what_changes_nothing_is_taken():
    assert read_chat(HI | {"user": "me", "metadata": {}, "temperature": None, "tools": None}) == read_chat(HI)


def test_prompts_are_texts_or_ids():
    assert read_completion({"prompt": "a"}).prompts == ("a",)
    assert read_completion({"prompt": [1, 2]}).prompts == ((1, 2),)
    assert read_completion({"prompt": ["a", [1]]}).prompts == ("a", (1,))


def test_tools_are_automatic_unless_something_else_is_said():
    assert read_chat(HI | {"tools": [TOOL]}).tool_choice == "auto"
    assert read_chat(HI | {"tools": [TOOL], "tool_choice": TOOL}).tool_choice == "=add"
    off = read_chat(HI | {"tools": [TOOL], "tool_choice": "none"})
    assert off.tools == {} and isinstance(off, Ask)


def test_an_answer_that_is_sent_back_is_read():
    message = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "function_call": None}
    assert read_chat({"messages": [message]}).messages == ({"role": "assistant", "content": "hi"},)


def test_parts_of_text_are_joined_and_developers_are_systems():
    message = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert read_chat({"messages": [message]}).messages == ({"role": "system", "content": "ab"},)
