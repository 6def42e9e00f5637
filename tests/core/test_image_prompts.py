"""Image tokens in prompts, with and without a chat template."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.core.vision import chat_prompt, with_image_token


class Processor:
    image_token = "<image>"


class Chat(Processor):
    chat_template = "a template"

    def apply_chat_template(self, said, add_generation_prompt):
        return said, add_generation_prompt


def test_the_token_stands_in_front_unless_it_is_there():
    assert with_image_token(Processor(), "what?") == "<image> what?"
    assert with_image_token(Processor(), "what? <image>") == "what? <image>"
    assert chat_prompt(Processor(), "what?", 2) == "<image> <image> what?"
    assert chat_prompt(Processor(), "what?", 0) == "what?"


def test_a_template_gets_images_and_text():
    ((turn,), prompted) = chat_prompt(Chat(), "what?", 2)
    assert prompted and turn["role"] == "user"
    assert [item["type"] for item in turn["content"]] == ["image", "image", "text"]


def test_what_does_not_fit():
    with pytest.raises(BadInputError, match="1 image tokens for 2"):
        with_image_token(Processor(), "<image> what?", 2)
    with pytest.raises(BadInputError, match="names no image token"):
        with_image_token(object(), "what?")
