"""Chat messages as users have them, in the form that chat templates read.

A message may be a tool call without content, or hold its text as parts; preference data may keep a text prompt beside
lists that hold the whole conversation (UltraFeedback).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError
from ...core.scoring import prompt_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def completion_text(completion: Any) -> str:
    """A completion's text, as reward functions get completions from TRL: texts, or conversations that end with the
    answer.
    """
    return completion if isinstance(completion, str) else message_text(completion[-1])


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, its text parts joined, or nothing.

    Raises:
        BadInputError: a part that is no text, which a text model cannot read.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadInputError(f"A message holds a part of type {kind!r}.", "Models here read text parts only.")
        texts.append(part["text"])
    return "".join(texts)


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has text, other parts or tool calls."""
    if message.get("tool_calls"):
        return True
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return bool((content or "").strip())
    return any(not isinstance(part, Mapping) or part.get("type") != "text" or part.get("text") for part in content)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with their content as text, absent content as empty text, and without the empty keys that a table adds.

    Raises:
        BadInputError: as ``message_text``.
    """
    return [
        {name: value for name, value in message.items() if value is not None} | {"content": message_text(message)}
        for message in messages
    ]


def template_options(tools: Any, chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a row has the chat template render besides its messages, as arguments of the template.

    Args:
        tools: the row's tools, as a list or as JSON text, or None.
        chat_template_kwargs: further arguments; the empty ones, which a table adds, are left out.
    """
    further = {name: value for name, value in (chat_template_kwargs or {}).items() if value is not None}
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **further}


def row_prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    """Ids of a row's ``prompt``, as the trainers read it: a text as it is, messages by the chat template with
    ``template_options``, up to where the answer begins.

    Raises:
        BadInputError: as ``message_text``.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt)
    options = template_options(row.get("tools"), row.get("chat_template_kwargs"))
    return prompt_ids(tokenizer, plain_messages(prompt), **options)


MARK = "\u241f mark \u241f"
"""Stands for a system message where it is looked for in rendered text."""


def instructed(messages: list[Message], instruction: str, render: Callable[[list[Message]], str]) -> list[Message]:
    """Messages with an instruction in front of their system message.

    Where they have none, the one that the chat template writes by itself stays behind the instruction. Where the
    template has no system messages, the instruction stands in front of the first message.

    Args:
        messages: as ``plain_messages`` makes them.
        render: the chat template: messages to text.
    """
    from jinja2 import TemplateError

    first, rest = messages[0], messages[1:]
    if first["role"] in ("system", "developer"):
        return [first | {"content": f"{instruction}\n\n{first['content']}"}, *rest]
    try:
        before, mark, behind = render([{"role": "system", "content": MARK}, *messages]).partition(MARK)
    except TemplateError:
        mark = ""
    if not mark:
        return [first | {"content": f"{instruction}\n\n{first['content']}"}, *rest]
    shown = render(messages)
    own = ""
    if len(shown) >= len(before) + len(behind) and shown.startswith(before) and shown.endswith(behind):
        own = shown[len(before) : len(shown) - len(behind)].strip()
    return [{"role": "system", "content": f"{instruction}\n\n{own}" if own else instruction}, *messages]


class MessageTokenizer:
    """A tokenizer whose chat template is given ``plain_messages``; all else is the tokenizer's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **kwargs: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.apply_chat_template(plain_messages(conversation), **kwargs)


def with_prompt_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """``prompt``, ``chosen`` and ``rejected`` as messages, for a row with a text prompt beside lists of messages.

    Lists that begin with the assistant answer the prompt. Others hold the conversation themselves: what both begin
    with is the prompt, and a text that says something else is warned of.

    Raises:
        BadInputError: the two lists have no common beginning.
    """
    prompt, chosen, rejected = row["prompt"], list(row["chosen"]), list(row["rejected"])
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadInputError(
            "chosen and rejected are conversations that begin with different messages.",
            "They must begin with the same prompt, or hold the assistant's answers alone.",
        )
    asked = [message_text(message) for message in chosen[:shared]]
    if prompt.strip() not in (text.strip() for text in asked):
        warnings.warn(
            f"The prompt {prompt[:40]!r} is not what the messages of its row begin with ({asked[-1][:40]!r}): "
            "the messages are read.",
            stacklevel=2,
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def with_asked_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """``prompt`` and ``completion`` as messages, for a demonstration with a text prompt beside a list of messages.

    It is read as the chosen side of ``with_prompt_messages`` is. A list that holds the conversation itself ends with
    the answer.
    """
    found = with_prompt_messages({**row, "chosen": row["completion"], "rejected": row["completion"]})
    return {"prompt": found["prompt"], "completion": found["chosen"]}


READERS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    ("prompt", "chosen", "rejected"): with_prompt_messages,
    ("prompt", "completion"): with_asked_messages,
}
"""What makes messages of a text prompt, by the columns of the rows."""


def prompts_as_messages(dataset: Dataset, label: str = "The data") -> Dataset:
    """A dataset of pairs or demonstrations whose text prompts stand beside lists of messages, with its prompts as
    messages; one of another form as it is.

    Raises:
        BadInputError: as ``with_prompt_messages``; it names the row.
    """
    names = set(dataset.column_names or ())
    read, answer = next(
        ((reader, columns[1]) for columns, reader in READERS.items() if set(columns) <= names), (None, "")
    )
    first: Mapping[str, Any] = next(iter(dataset), {}) if read is not None else {}
    if read is None or not (isinstance(first.get("prompt"), str) and isinstance(first.get(answer), list)):
        return dataset

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return read(row)
        except BadInputError as error:
            raise BadInputError(f"{label}, row {index}: {error.message}", error.hint) from error

    return dataset.map(convert, with_indices=True, remove_columns=["prompt"], desc="Prompts as messages")
