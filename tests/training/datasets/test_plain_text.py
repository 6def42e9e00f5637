"""Windows of plain text: repeatable, the held-out part apart, and too little text refused."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.training.datasets.plain_text import TextWindows, example_text


def test_windows_follow_from_their_names_and_stay_in_their_part():
    text = TextWindows("".join(chr(97 + i % 26) for i in range(900)) + "#" * 100, held_share=0.1, seed=3)
    windows = text.batch(50, 20, "step", 4)
    assert torch.equal(windows, text.batch(50, 20, "step", 4))
    assert not torch.equal(windows, text.batch(50, 20, "step", 5))
    assert windows.shape == (50, 20)
    assert not (windows == ord("#")).any()
    held = text.held(4, 20)
    assert held.shape == (4, 20)
    assert (held == ord("#")).all()


def test_the_example_and_a_file(tmp_path):
    assert len(example_text()) > 300_000
    (tmp_path / "text.txt").write_text("für " * 100, encoding="utf-8")
    text = TextWindows.of(str(tmp_path / "text.txt"))
    assert text.batch(1, 9, 0)[0].max() > 127


def test_bad_input():
    with pytest.raises(BadInputError, match="There is no file"):
        TextWindows.of("nowhere.txt")
    with pytest.raises(BadInputError, match="between 0 and 1"):
        TextWindows("text", held_share=1.0)
    with pytest.raises(BadInputError, match="longer text"):
        TextWindows("short", 0.2).check(20)
