"""Tool calls: what the model is told of tools, the grammar in which it calls them, and calls found in its text.

The format is read from the chat template: a made-up call is rendered, and what stands around its JSON is how this
model writes calls. A template that leaves tools out gets them in the system message, in the format of Hermes and Qwen.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..constraints.grammar import Grammar, StructuralTag
from .requests import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "probe_of_a_tool"
SYSTEM = (
    "You may call functions. Here they are, one JSON object a line:\n{tools}\n"
    'To call one, write\n<tool_call>\n{{"name": "its name", "arguments": {{...}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call: ``begin + {"name": ..., key: ...} + end``."""

    begin: str = "<tool_call>\n"
    end: str = "\n</tool_call>"
    key: str = "arguments"
    own: bool = False  # whether the template shows tools itself

    def opening(self, name: str) -> str:
        return f'{self.begin}{{"name": {json.dumps(name)}, "{self.key}": '

    def grammar(self, tools: Mapping[str, dict[str, Any]], choice: str, one: bool = False) -> Grammar:
        """What may be written: free text with calls in it (``auto``; with ``one`` it ends behind the first), or one
        call (``required``, ``=name``).
        """
        names = [choice[1:]] if choice.startswith("=") else list(tools)
        schemas = {name: tools[name].get("parameters") or {"type": "object"} for name in names}
        if choice == "auto":
            tags = [StructuralTag(self.opening(name), schema, "}" + self.end) for name, schema in schemas.items()]
            triggers = [self.begin.strip() or '{"name": ']
            return Grammar.from_structural_tag(tags, triggers, stop_after_first=one)
        return Grammar.union(
            *(
                Grammar.concat(
                    Grammar.from_choices([self.opening(name)]),
                    Grammar.from_json_schema(schema),
                    Grammar.from_choices(["}" + self.end]),
                )
                for name, schema in schemas.items()
            )
        )

    def split(self, text: str, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
        """The text without its calls, and the calls as a client reads them.

        A call is what the grammar writes, to the letter: another spelling was held to no schema and stays text.
        """
        calls: list[dict[str, Any]] = []
        rest, place = "", 0
        while True:
            begun = [(found, name) for name in names if (found := text.find(self.opening(name), place)) >= 0]
            if not begun:
                break
            found, name = min(begun)
            start = found + len(self.opening(name))
            try:
                arguments, end = json.JSONDecoder().raw_decode(text, start)
            except (ValueError, RecursionError):
                break
            if not isinstance(arguments, dict) or not text.startswith("}", end):
                break
            function = {"name": name, "arguments": text[start:end]}
            calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
            rest += text[place:found]
            place = end + 1 + (len(self.end) if text.startswith(self.end, end + 1) else 0)
        return (rest + text[place:]).strip() if calls else text, calls


class ChatFormat:
    """A tokenizer's chat template, with tools.

    Raises:
        RequestError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def _text(self, messages: Sequence[dict[str, Any]], begin: bool, **more: Any) -> str:
        if self.tokenizer.chat_template is None:
            raise RequestError("This model has no chat template; use /v1/completions.", "messages")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=begin, **more
            )
        except Exception as error:  # templates raise what they like: jinja2's errors, or a message of their author
            raise RequestError(
                f"The model's chat template refuses these messages: {str(error)[:200]}", "messages"
            ) from error
        return str(text)

    @cached_property
    def tools(self) -> ToolFormat:
        """How calls are written, read from the template."""
        user = {"role": "user", "content": "?"}
        function = {"name": PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
        call = {"id": "probe12345"[:9], "type": "function", "function": {"name": PROBE, "arguments": {}}}
        try:
            told = self._text([user], True, tools=[{"type": "function", "function": function}])
            written = self._text([user, {"role": "assistant", "content": "", "tool_calls": [call]}], False)
        except RequestError:
            if self.tokenizer.chat_template is None:
                raise
            return ToolFormat()
        if PROBE not in told or PROBE not in written:
            return ToolFormat()
        answer = written.removeprefix(self._text([user], True))
        begin = answer.rfind("{", 0, answer.find(PROBE))
        try:
            parsed, end = json.JSONDecoder().raw_decode(answer, begin)
        except ValueError:
            parsed, end = None, 0
        keys = list(parsed) if isinstance(parsed, dict) else []
        if len(keys) != 2 or keys[0] != "name" or keys[1] not in ("arguments", "parameters"):
            raise RequestError("This model writes tool calls in a form that this server does not know.", "tools")
        closing = answer[end:]
        for token in sorted(map(str, self.tokenizer.all_special_tokens), key=len, reverse=True):
            closing = closing.split(token)[0]
        return ToolFormat(answer[:begin], closing.rstrip("\n") if closing.strip() else "", keys[1], own=True)

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Mapping[str, dict[str, Any]]) -> str:
        """The text before the answer."""
        if (tools or any("tool_calls" in message for message in messages)) and not self.tools.own:
            return self._text(self._spelt(messages, tools), True)
        more = {"tools": [{"type": "function", "function": item} for item in tools.values()]} if tools else {}
        return self._text(messages, True, **more)

    def _spelt(self, messages: Sequence[dict[str, Any]], tools: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages for a template that knows no tools: calls, answers and tools as plain text."""
        spelt = []
        for message in messages:
            text = message["content"]
            for call in message.get("tool_calls", ()):
                function = call["function"]
                text += self.tools.opening(function["name"]) + json.dumps(function["arguments"]) + "}" + self.tools.end
            if message["role"] == "tool":
                spelt.append({"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"})
            else:
                spelt.append({"role": message["role"], "content": text})
        if tools:
            told = SYSTEM.format(tools="\n".join(map(json.dumps, tools.values())))
            if spelt[0]["role"] == "system":
                spelt[0] = {"role": "system", "content": f"{spelt[0]['content']}\n\n{told}"}
            else:
                spelt.insert(0, {"role": "system", "content": told})
        return spelt
