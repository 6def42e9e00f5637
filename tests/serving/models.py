"""A tiny random chat model with a vocabulary of bytes and a few words."""

from __future__ import annotations

from everytoken.testing.models import tiny_llama

from ..tokenization.families import smollm2

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A template that leaves tools out, and calls too."""
HERMES = (
    "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    '{% for c in m.tool_calls or [] %}<call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}</call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BARE = HERMES.replace("<call>", "").replace("</call>", "").replace('"arguments"', '"parameters"')
"""Calls are JSON and nothing around it, with the key ``parameters``."""
OTHER = HERMES.replace('"name"', '"function"')
"""A form that is not known."""


def tiny_chat(template=PLAIN, context=1024, seed=0):
    tokenizer = smollm2()
    tokenizer.chat_template = template
    model = tiny_llama(len(tokenizer), seed=seed, scale=0.6)
    model.config.max_position_embeddings = context
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
