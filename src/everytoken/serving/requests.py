"""What a client may ask: bodies of ``/v1/chat/completions`` and ``/v1/completions``, checked field by field.

A field that this server does not honour is refused by name, so that no setting is ignored without a word. Fields that
change no token (``user``, ``metadata``) are taken and left aside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import BadInputError

ASIDE = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})
SAMPLING = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.1, 10.0),
}
"""Numbers of a request and where they may lie."""
COMMON = frozenset(
    {*SAMPLING, "model", "max_tokens", "n", "stop", "seed", "stream", "stream_options", "logprobs", "logit_bias"}
    | {"top_k", "regex", "grammar", "response_format", "decoder"}
)
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
COMPLETION = COMMON | {"prompt", "echo", "suffix", "best_of"}
FIELDS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})
"""Fields of a message; others may be there where they are empty, as in an answer that a client sends back."""
ROLES = ("system", "user", "assistant", "tool")
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_TOOLS, LONGEST_STOP = 32, 16, 20, 128, 256
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RequestError(BadInputError):
    """A body that this server does not take; ``param`` is the field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Ask:
    """A checked request.

    Attributes:
        messages: of a chat; empty for a completion.
        prompts: of a completion: texts or lists of token ids; empty for a chat.
        max_tokens: None is as many as the server gives.
        stop: texts that end an answer and are not part of it.
        logprobs: how many of the likeliest tokens to tell at each place; None tells nothing.
        constraint: ``(kind, source)`` with kind ``schema``, ``regex`` or ``grammar``; None is free text.
        tools, tool_choice: functions by name, and ``none``, ``auto``, ``required``, or ``=name``.
        decoder: ``(name, settings)`` of one of this package's decoders for this request.
        one_call: whether the answer may call one tool at most.
    """

    chat: bool
    model: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    constraint: tuple[str, Any] | None = None
    tools: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    tool_choice: str = "none"
    decoder: tuple[str, dict[str, Any]] | None = None
    echo: bool = False
    one_call: bool = False


def read_chat(body: Any) -> Ask:
    """The request of ``/v1/chat/completions``.

    Raises:
        RequestError: a field that is unknown or wrong, named.
    """
    fields = _fields(body, CHAT)
    messages = fields.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is a list of at least one message.", "messages")
    tools = _tools(fields.pop("tools", None))
    choice = _tool_choice(fields.pop("tool_choice", None), tools)
    parallel = fields.pop("parallel_tool_calls", True)
    if parallel not in (True, False):
        raise RequestError("parallel_tool_calls is true or false.", "parallel_tool_calls")
    logprobs, top = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
    if logprobs not in (None, True, False):
        raise RequestError("logprobs of a chat is true or false.", "logprobs")
    if top is not None and not logprobs:
        raise RequestError("top_logprobs asks for logprobs: true.", "top_logprobs")
    if "max_completion_tokens" in fields:
        if fields.get("max_tokens") is not None:
            raise RequestError("Give max_completion_tokens or max_tokens, not both.", "max_tokens")
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    common = _common(fields)
    if common["constraint"] is not None and tools and choice != "none":
        raise RequestError("A grammar and tools cannot both say what is written.", "tools")
    return Ask(
        True,
        messages=tuple(_message(message, place) for place, message in enumerate(messages)),
        logprobs=_whole("top_logprobs", 0 if top is None else top, 0, MOST_LOGPROBS) if logprobs else None,
        tools=tools if choice != "none" else {},
        tool_choice=choice,
        one_call=not parallel,
        **common,
    )


def read_completion(body: Any) -> Ask:
    """The request of ``/v1/completions``.

    Raises:
        RequestError: a field that is unknown or wrong, named.
    """
    fields = _fields(body, COMPLETION)
    prompt = fields.pop("prompt", None)
    for name, neutral in (("suffix", None), ("best_of", None)):
        if fields.pop(name, neutral) != neutral:
            raise RequestError(f"This server has no {name}.", name)
    echo = fields.pop("echo", False)
    if echo not in (True, False):
        raise RequestError("echo is true or false.", "echo")
    logprobs = fields.pop("logprobs", None)
    if echo and logprobs is not None:
        raise RequestError("logprobs of an echoed prompt are not told.", "logprobs")
    return Ask(
        False,
        prompts=_prompts(prompt),
        logprobs=None if logprobs is None else _whole("logprobs", logprobs, 0, MOST_LOGPROBS),
        echo=echo,
        **_common(fields),
    )


def _fields(body: Any, known: frozenset[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RequestError("A request is a JSON object.")
    unknown = sorted(set(body) - known - ASIDE)
    if unknown:
        raise RequestError(f"This server does not honour {', '.join(map(repr, unknown))}.", unknown[0])
    return {name: value for name, value in body.items() if name not in ASIDE and value is not None}


def _common(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: _number(name, fields[name], *room) for name, room in SAMPLING.items() if name in fields
    }
    if "model" in fields and not isinstance(fields["model"], str):
        raise RequestError("model is a text.", "model")
    found["model"] = fields.get("model")
    for name, low, high in (("max_tokens", 1, 2**31), ("n", 1, MOST_CHOICES), ("seed", -(2**63), 2**63 - 1)):
        if name in fields:
            found[name] = _whole(name, fields[name], low, high)
    if "top_k" in fields:
        found["top_k"] = max(0, _whole("top_k", fields["top_k"], -1, 2**31))
    found["stop"] = _stops(fields.get("stop", []))
    found["stream"] = fields.get("stream", False)
    if found["stream"] not in (True, False):
        raise RequestError("stream is true or false.", "stream")
    options = fields.get("stream_options", {})
    if (
        not isinstance(options, dict)
        or set(options) - {"include_usage"}
        or ("stream_options" in fields and not found["stream"])
    ):
        raise RequestError("stream_options is {include_usage: true}, and only of a stream.", "stream_options")
    found["include_usage"] = bool(options.get("include_usage", False))
    found["logit_bias"] = _bias(fields.get("logit_bias", {}))
    found["constraint"] = _constraint(fields)
    if "decoder" in fields:
        found["decoder"] = _decoder(fields["decoder"])
    return found


def _number(name: str, value: Any, low: float, high: float) -> float:
    # a comparison first: it is false for what is not finite, and a huge whole number has no float
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} is a number in [{low:g}, {high:g}].", name)
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is a whole number in [{low}, {high}].", name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop is a text, or a list of up to {MOST_STOPS}.", "stop")
    if any(len(stop) > LONGEST_STOP for stop in stops):
        raise RequestError(f"A stop text has at most {LONGEST_STOP} characters.", "stop")
    return tuple(stops)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or not all(re.fullmatch(r"\d{1,9}", key) for key in value):
        raise RequestError("logit_bias maps token ids to numbers.", "logit_bias")
    return {int(key): _number("logit_bias", bias, -100.0, 100.0) for key, bias in value.items()}


def _constraint(fields: dict[str, Any]) -> tuple[str, Any] | None:
    wanted = fields.get("response_format", {"type": "text"})
    if not isinstance(wanted, dict) or wanted.get("type") not in ("text", "json_object", "json_schema"):
        raise RequestError("response_format has the type text, json_object or json_schema.", "response_format")
    found: list[tuple[str, Any]] = []
    if wanted["type"] == "json_object":
        found.append(("schema", {"type": "object"}))
    elif wanted["type"] == "json_schema":
        described = wanted.get("json_schema")
        if not isinstance(described, dict) or not isinstance(described.get("schema"), dict | bool):
            raise RequestError("response_format.json_schema has a name and a schema.", "response_format")
        found.append(("schema", described["schema"]))
    for kind in ("regex", "grammar"):
        if kind in fields:
            if not isinstance(fields[kind], str):
                raise RequestError(f"{kind} is a text.", kind)
            found.append((kind, fields[kind]))
    if len(found) > 1:
        raise RequestError("Give one of response_format, regex and grammar.", found[1][0])
    return found[0] if found else None


def _decoder(value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or set(value) - {"name", "settings"} or not isinstance(value.get("name"), str):
        raise RequestError("decoder is a name, or {name, settings}.", "decoder")
    settings = value.get("settings", {})
    plain = isinstance(settings, dict) and all(isinstance(item, str | int | float | bool) for item in settings.values())
    if not plain:
        raise RequestError("A decoder's settings are numbers, texts and truth values.", "decoder")
    return value["name"], settings


def _prompts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)

    if isinstance(prompt, str):
        return (prompt,)
    if ids(prompt):
        return (tuple(prompt),)
    if (
        isinstance(prompt, list)
        and 0 < len(prompt) <= MOST_CHOICES
        and all(isinstance(p, str) or ids(p) for p in prompt)
    ):
        return tuple(item if isinstance(item, str) else tuple(item) for item in prompt)
    raise RequestError(f"prompt is a text, token ids, or a list of up to {MOST_CHOICES} of them.", "prompt")


def _message(message: Any, place: int) -> dict[str, Any]:
    where = f"messages[{place}]"
    if not isinstance(message, dict):
        raise RequestError(f"{where} is an object with role and content.", "messages")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}: the role is one of {', '.join(ROLES)}.", "messages")
    unknown = sorted(name for name, value in message.items() if value and name not in FIELDS)
    if unknown:
        raise RequestError(f"{where}: this server does not honour {', '.join(map(repr, unknown))}.", "messages")
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise RequestError(f"{where}: this server reads text only.", "messages")
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls") or []
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RequestError(f"{where}: content is a text, or a list of text parts.", "messages")
    found: dict[str, Any] = {"role": role, "content": content}
    if calls:
        found["tool_calls"] = [_past_call(call, where) for call in calls]
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str):
            found[name] = message[name]
    return found


def _past_call(call: Any, where: str) -> dict[str, Any]:
    wrong = f"{where}: a tool call has a function with a name and arguments in JSON."
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        raise RequestError(wrong, "messages")
    name = function.get("name")
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError) as error:
        raise RequestError(wrong, "messages") from error
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        raise RequestError(wrong, "messages")
    return {"id": str(call.get("id", "")), "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(value: Any) -> dict[str, dict[str, Any]]:
    if value is None:
        return {}
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise RequestError(f"tools is a list of up to {MOST_TOOLS} functions.", "tools")
    found: dict[str, dict[str, Any]] = {}
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not NAME.fullmatch(name):
            raise RequestError("A tool is {type: function, function: {name, description, parameters}}.", "tools")
        if not isinstance(function.get("parameters", {}), dict) or name in found:
            raise RequestError(f"The tool {name} has no schema as its parameters, or is named twice.", "tools")
        found[name] = function
    return found


def _tool_choice(value: Any, tools: Mapping[str, Any]) -> str:
    if value is None:
        return "auto" if tools else "none"
    if isinstance(value, dict):
        name = value.get("function", {}).get("name") if isinstance(value.get("function"), dict) else None
        if not isinstance(name, str) or name not in tools:
            raise RequestError("tool_choice names a function that is not among the tools.", "tool_choice")
        return f"={name}"
    if value not in ("none", "auto", "required") or (value == "required" and not tools):
        raise RequestError("tool_choice is none, auto, required (with tools) or a function.", "tool_choice")
    return str(value) if tools else "none"
