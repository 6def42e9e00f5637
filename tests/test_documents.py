"""README and CONTRIBUTING do what they say: their code runs."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from . import run_page

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


@pytest.mark.slow
def test_the_first_example_of_the_readme(capsys):
    exec(blocks("README.md", "python")[0], {})
    assert "primary colours" in capsys.readouterr().out


@pytest.mark.parametrize("name", run_page.pages())
def test_every_block_is_one_that_runs(name):
    """Nothing that looks like code escapes the page's run: every fence has a language, and Python compiles."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = run_page.blocks_of(text)
    fences = re.findall(r"^ *```(\w*)", text, re.M)
    assert len(fences) % 2 == 0
    assert not set(fences[::2]) - {"python", "console", "text"}
    assert len(found) == sum(kind != "text" for kind in fences[::2])
    for block in found:
        if block.kind == "python":
            compile(block.code, name, "exec")


LONG = {
    "README.md": "every verb of the command line, a start of Python each, and a training of most kinds",
    "docs/architectures.md": "small networks of several kinds trained",
    "docs/constraints.md": "the grammar engine's kernels are compiled where it runs first",
    "docs/decoders.md": "labels from two models and a router trained on them",
    "docs/draft.md": "a draft trained in both stages, from answers of the embedded model",
    "docs/dynamic.md": "a hypernetwork trained in all its stages",
    "docs/orders.md": "models that fill in tokens in any order trained, and both networks compared",
    "docs/preference.md": "data of the embedded model, trainings of it alone and in two processes",
    "docs/reinforcement.md": "two trainings of the embedded model on its own rollouts, and a third in Python",
    "docs/reduction.md": "a vision model read with and without reduction",
    "docs/routing.md": "networks of experts trained",
    "docs/tokenizers.md": "the texts of the embedded model's whole vocabulary are embedded once",
    "docs/vision.md": "networks of images trained",
}
"""Pages of more than about forty seconds, and why: in the full tier run those that changed and one more in turn
(``make test-all`` runs them all). Every other page is in the full tier, also one that is written tomorrow."""


def test_long_pages_are_pages():
    assert set(LONG) <= set(run_page.pages())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long_page(name) if name in LONG else ()) for name in run_page.pages()],
)
def test_a_page_runs_as_printed(name):
    """Every Python and console block, in order, with the files that it names, in a process of its own."""
    done = subprocess.run(
        [sys.executable, run_page.__file__, name],
        capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=3600,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = re.findall(rf"^{re.escape(name)}:\d+: (?:python|console) ran", done.stdout, re.M)
    left_out = re.findall(rf"^{re.escape(name)}:\d+: left out", done.stdout, re.M)
    assert ran and len(ran) + len(left_out) == len(run_page.blocks_of((ROOT / name).read_text(encoding="utf-8")))


def test_a_page_that_does_not_run_is_named_by_line(tmp_path):
    """The blocks share a namespace, and the first that fails says where it stands."""
    page = "# A page\n\n```python\na = 1\n```\n\n```console\ntest -d examples && false\n```\n"
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, run_page.__file__, str(tmp_path / "page.md")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "page.md:4: python ran" in done.stdout and "page.md:8: this console block failed" in done.stderr


def test_commands_that_the_command_line_prints_as_examples_exist():
    """Every ``everytoken ...`` of an epilogue parses: its verb and its options are there."""
    from typer.main import get_command

    from everytoken.cli.app import app

    root, seen = get_command(app), 0
    with root.make_context("everytoken", [], resilient_parsing=True) as context:
        for verb in root.list_commands(context):
            command = root.get_command(context, verb)
            for line in re.findall(r"everytoken [^·\n|]+", command.epilog or ""):
                name, *arguments = shlex.split(line)[1:]
                found = root.get_command(context, name)
                assert found is not None, line
                known = {option for item in found.params for option in item.opts}
                inner = getattr(found, "commands", {})
                known |= {option for sub in inner.values() for item in sub.params for option in item.opts}
                assert {word for word in arguments if word.startswith("--")} <= known, line
                seen += 1
    assert seen > 10


def test_paths_that_pages_name_exist():
    """A page that names a file of the repository names one that is there."""
    path = re.compile(r"`((?:src|tests|benchmarks|scripts|configs|examples)/[\w./-]+)`")
    for name in ["README.md", "CONTRIBUTING.md", *run_page.pages()]:
        made = set(re.findall(r"^\*\*\d\. The \w+\*\*, `([^`]+)`", (ROOT / name).read_text(encoding="utf-8"), re.M))
        for found in path.findall((ROOT / name).read_text(encoding="utf-8")):
            assert found in made or (ROOT / found).exists() or "NAME" in found, f"{name}: {found}"


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
