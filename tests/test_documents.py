"""README and CONTRIBUTING do what they say: their code runs."""

from __future__ import annotations

import importlib
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def test_the_worked_example_of_contributing():
    """The method, the card and the entry point are sound, and the method keeps the station's contract."""
    import everytoken.preference.base as base
    from everytoken.catalog.cards import parse_card
    from everytoken.core.settings import parse_settings, settable
    from everytoken.preference.dpo import DPOLoss

    module = types.ModuleType("everytoken.preference.margin_dpo")
    module.__package__ = "everytoken.preference"
    sys.modules[module.__name__] = module
    try:
        exec(compile(blocks("CONTRIBUTING.md", "python")[0], "CONTRIBUTING.md", "exec"), module.__dict__)
        loss = module.MarginDPOLoss(margin=0.0)
        assert isinstance(loss, base.PreferenceLoss)
        assert set(settable(module.MarginDPOLoss)) == {"beta", "margin"}
        assert parse_settings("margin-dpo", module.MarginDPOLoss, ["margin=1"]) == {"margin": 1.0}
        torch.manual_seed(0)
        mask = torch.ones(2, 3, dtype=torch.bool)
        policy, reference = (base.PairScores(torch.randn(2, 3), torch.randn(2, 3), mask, mask) for _ in range(2))
        assert torch.allclose(loss(policy, reference).losses, DPOLoss()(policy, reference).losses)
    finally:
        del sys.modules[module.__name__]
    card = parse_card(blocks("CONTRIBUTING.md", "toml")[0], "margin-dpo.toml")
    assert card.implementation.endswith("margin_dpo:MarginDPOLoss")


def test_the_first_example_of_the_readme(capsys):
    exec(blocks("README.md", "python")[0], {})
    assert "primary colours" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "docs/concepts.md", "docs/index.md"])
def test_every_python_block_compiles(name):
    for block in blocks(name, "python"):
        compile(block, name, "exec")


def test_commands_in_the_readme_exist():
    from typer.main import get_command

    from everytoken.cli.app import app

    known = set(get_command(app).commands)
    used = set(re.findall(r"^everytoken (\w+)", "\n".join(blocks("README.md", "console")), re.M))
    assert used <= known


def moved():
    """The rows of "moving from 0.1": what stands in the first column and in the second."""
    text = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    return [row.strip("|").split("|") for row in text.splitlines() if row.startswith("| `")]


def importable(path):
    """Whether a dotted path below the package is a module, or a name in one."""
    name = f"everytoken.{path}"
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


def test_what_has_moved_is_where_the_page_says():
    dotted = re.compile(r"`([a-z_0-9]+(?:\.\w+)+)`")
    assert len(moved()) > 30
    for _, now in moved():
        for path in dotted.findall(now):
            assert importable(path), path
