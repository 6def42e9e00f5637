"""The texts that a draft is distilled on: the target's own answers.

A draft should know what its target writes, so the target answers prompts at several temperatures. Prompts are the
user's, templates filled with topics, or requests that a chat model makes up itself when it is handed an open user turn
(Magpie, arXiv 2406.08464). Answers are written to a file as they come; a run that was cut off goes on behind the last
whole line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.progress import Report
from ...core.scoring import end_tokens, prompt_ids, turn_ids
from .distillation import Row
from .prompts import draft_prompts

TEMPERATURES = (0.0, 0.5, 0.8, 1.0, 0.0)
OPEN = "\x00"


def invented(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Requests that a chat model makes up itself; fewer than ``count`` where it repeats itself."""
    turn = tokenizer.apply_chat_template([{"role": "user", "content": OPEN}], tokenize=False)
    assert isinstance(turn, str)
    ids = tokenizer(turn.split(OPEN)[0], add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    output = model.generate(
        ids.expand(count, -1),
        attention_mask=torch.ones_like(ids).expand(count, -1),
        max_new_tokens=48,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=0.95,
        pad_token_id=padding(model, tokenizer),
    )
    turns = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [turn.strip() for turn in dict.fromkeys(turns) if len(turn.strip()) > 8]


def padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for the places before shorter prompts, where no mask lets anyone look."""
    ends = model.generation_config.eos_token_id
    for token in (tokenizer.pad_token_id, ends[0] if isinstance(ends, list) else ends):
        if token is not None:
            return int(token)
    return 0


@torch.no_grad()
def answer(
    model: PreTrainedModel, prompts: list[list[int]], temperature: float, max_new_tokens: int, pad: int
) -> list[Row]:
    """The model's answers to a batch of prompts, end tokens included."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **(drawn if temperature > 0 else {"do_sample": False}),
    )
    stops = end_tokens(model)
    rows = []
    for prompt, text in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(text) if token in stops), len(text))
        rows.append(Row([*prompt, *text[: before_loop(text[:end])]], len(prompt)))
    return rows


def before_loop(tokens: list[int], window: int = 48) -> int:
    """How many tokens there are before a text goes round in circles: a loop teaches nothing new."""
    for end in range(64, len(tokens) + 1, 16):
        if len(set(tokens[end - window : end])) < 10:
            return end
    return len(tokens)


def collect_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | None,
    count: int,
    batch: int,
    max_new_tokens: int,
    seed: int,
    file: Path,
    key: str,
    report: Report,
) -> list[Row]:
    """``count`` answers, from ``file`` where they are there already.

    Args:
        prompts: the user's, used again and again; None for templates and, with a chat model, invented ones.
        key: of the settings; answers of other settings are made anew.
    """
    rows = list(kept_answers(file, key))
    if len(rows) < count:
        rows = rows[: len(rows) // batch * batch]  # a batch that was cut off is made anew
        lines = [{"key": key}, *({"ids": row.ids, "prompt": row.prompt} for row in rows)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    pad, room = padding(model, tokenizer), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = (room - max_new_tokens if room else 1 << 30) or 1
    templates = [] if prompts else draft_prompts(count, seed)
    while len(rows) < count:
        # every batch depends on its place alone: a run that goes on makes what an uninterrupted one makes
        first = len(rows)
        turn = first // batch
        torch.manual_seed(seed * 1_000_003 + turn)
        size = min(batch, count - first)
        if prompts:
            asked = [(prompts[place % len(prompts)], True) for place in range(first, first + size)]
        elif tokenizer.chat_template and turn % 2:
            asked = [(text, True) for text in invented(model, tokenizer, size)]
            asked += [templates[(first + place) % count] for place in range(size - len(asked))]
        else:
            asked = templates[first : first + size]
        encoded = [(turn_ids if chat else prompt_ids)(tokenizer, text)[-longest:] for text, chat in asked]
        answers = answer(model, encoded, TEMPERATURES[turn % len(TEMPERATURES)], max_new_tokens, pad)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"ids": row.ids, "prompt": row.prompt}) + "\n" for row in answers)
        rows += answers
        report("the model answers", len(rows), count)
    return rows[:count]


def kept_answers(file: Path, key: str) -> Iterator[Row]:
    """Answers of a file up to the first line that was cut off; none where they belong to other settings."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if number == 0:
            if entry != {"key": key}:
                return
        else:
            yield Row(entry["ids"], entry["prompt"])
