"""A canvas as people read it: a line a step in a terminal, and a page on which the steps can be moved through."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

import torch

from ...core.colours import shade
from ...core.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .trajectory import Trajectory

GAP = "·"
"""What stands for an open position."""
LARGEST = 200_000
"""Positions of all steps together that a page may hold."""
STYLE = """<style>
.canvas { margin: .5rem 0 1.25rem; }
.canvas input { width: min(30rem, 90%); vertical-align: middle; }
.canvas output { color: var(--dim); font-variant-numeric: tabular-nums; margin-left: .6rem; }
.canvas p { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.canvas b { font-weight: normal; border-radius: 3px; padding: .1rem .12rem; color: #111; }
.canvas i { font-style: normal; color: var(--dim); }
</style>"""
SCRIPT = """<script>
(function () {
  for (const figure of document.querySelectorAll("figure.canvas:not([data-ready])")) {
    figure.dataset.ready = "1";
    const data = JSON.parse(figure.querySelector("script").textContent);
    const [slider, place, line] = ["input", "output", "p"].map((name) => figure.querySelector(name));
    const show = () => {
      const step = Number(slider.value);
      line.replaceChildren(...data.states[step].map((text, i) => {
        const node = document.createElement(data.colours[i] === null ? "span" : text === data.gap ? "i" : "b");
        node.textContent = text;
        if (node.tagName === "B") node.style.background = data.colours[i];
        return node;
      }));
      place.textContent = step + " of " + (data.states.length - 1) + " steps";
    };
    slider.addEventListener("input", show);
    show();
  }
})();
</script>"""


def pieces(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None, mask_id: int, gap: str = GAP) -> list[str]:
    """The text of every position ``[T]``; open ones are ``gap``."""
    values = ids.tolist()
    known = {
        item: f"<{item}>" if tokenizer is None else tokenizer.decode([item]) for item in set(values) if item != mask_id
    }
    return [gap if item == mask_id else known[item] for item in values]


def canvas_text(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None, mask_id: int, gap: str = GAP) -> str:
    """One canvas ``[T]`` as one line."""
    return "".join(pieces(ids, tokenizer, mask_id, gap)).replace("\n", "⏎")


def step_lines(found: Trajectory, row: int, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """A row after every step, a line each, as a terminal shows it; a text that grows has no marks of what is open."""
    width, gap = len(str(found.steps)), _gap(found)
    kept = found.attention[row]
    return [
        f"step {number:>{width}}  {canvas_text(state[0][kept], tokenizer, found.mask_id, gap)}"
        for number, state in enumerate(found.rows(slice(row, row + 1)).states())
    ]


def _gap(found: Trajectory) -> str:
    return "" if found.grows else GAP


def replay_html(found: Trajectory, row: int, tokenizer: PreTrainedTokenizerBase | None, title: str = "") -> str:
    """HTML of a row with a slider over its steps; each written position has the colour of the step that fixed it.

    A text that grows is as long at every step as it was.

    Raises:
        BadInputError: the steps are too many to put on a page.
    """
    if (found.steps + 1) * found.final_ids.shape[1] > LARGEST:
        raise BadInputError(f"{found.steps} steps of {found.final_ids.shape[1]} positions are too many for a page.")
    kept = found.attention[row]
    gap = _gap(found)
    states = [
        pieces(state[0][kept], tokenizer, found.mask_id, gap) for state in found.rows(slice(row, row + 1)).states()
    ]
    steps = found.fix_step[row][kept].tolist()
    colours = [None if step < 0 else shade(step, 0, max(found.steps - 1, 1)) for step in steps]
    data = json.dumps({"gap": gap, "states": states, "colours": colours}, ensure_ascii=False).replace("<", "\\u003c")
    heading = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return (
        f'{STYLE}<figure class="canvas">{heading}<input type="range" min="0" max="{found.steps}" '
        f'value="{found.steps}" aria-label="step"><output></output><p></p>'
        f'<script type="application/json">{data}</script></figure>{SCRIPT}'
    )
