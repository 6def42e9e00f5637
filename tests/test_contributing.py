"""The worked examples of CONTRIBUTING, in a copy of the tree: written as printed, tried, trained, measured, tested and
checked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "tests", "pyproject.toml", "README.md", "CONTRIBUTING.md", "results", "docs/scoreboard.md")
FILE = re.compile(r"^\*\*\d\. The \w+\*\*, `([^`]+)`.*?^```\w+\n(.*?)^```$", re.M | re.S)


def printed_files():
    """The files that CONTRIBUTING shows: path -> text."""
    return dict(FILE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))


def test_a_method_is_four_files():
    names = sorted(printed_files())
    assert len(names) == 8
    for stem in ("margin_dpo", "sure_sampling"):
        mine = [name for name in names if stem in name.replace("-", "_")]
        assert [Path(name).parts[:2] for name in mine] == [
            ("src", "everytoken"), ("src", "everytoken"), ("src", "everytoken"), ("tests", Path(mine[3]).parts[1]),
        ]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with the printed files in it, and nothing else changed."""
    folder = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        source, target = ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    for name, text in printed_files().items():
        assert not (folder / name).exists()
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(tree, *arguments):
    """A command in the copy, with the copy's package."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_lint_and_types_pass_and_the_formatter_changes_nothing(tree):
    names = [name for name in printed_files() if name.endswith(".py")]
    run(tree, "-m", "ruff", "check", *names)
    run(tree, "-m", "ruff", "format", "--check", *names)
    run(tree, "-m", "mypy", *[name for name in names if name.startswith("src")])


@pytest.mark.slow
def test_their_tests_the_contracts_and_the_rules_of_the_house_pass(tree):
    names = [name for name in printed_files() if name.startswith("tests")]
    run(tree, "-m", "pytest", *names, "tests/test_imports.py", "tests/catalog/test_cards.py")
    # the batteries find both methods by their cards
    batteries = {"margin-dpo": "tests/preference/test_conformance.py", "SureSampling": "tests/testing/test_decoder.py"}
    for name, battery in batteries.items():
        assert name in run(tree, "-m", "pytest", "-o", "addopts=", "-v", battery, "-k", name)


@pytest.mark.rotating
def test_the_loss_is_tried_compared_and_trained(tree):
    from everytoken.reproduce.beds.small_models import character_tokenizer

    from .conftest import tiny_llama

    tokenizer = character_tokenizer("abcdefgh ")
    tiny_llama(len(tokenizer), seed=1, scale=0.5).save_pretrained(tree / "letters")
    tokenizer.save_pretrained(tree / "letters")
    (tree / "pairs.jsonl").write_text('{"prompt": "ab", "chosen": "cd", "rejected": "ef"}\n' * 4)
    common = ("--model", "letters", "--data", "pairs.jsonl")
    told = run(tree, "-m", "everytoken", "try", "margin-dpo", *common, "--steps", 2, "--set", "margin=1")
    assert "reward margin" in told
    told = run(tree, "-m", "everytoken", "compare", "tdpo", "margin-dpo", *common, "--steps", 2)
    assert "margin-dpo" in told
    settings = ("--set", "margin=1", "--set", "steps=2", "--out", "trained")
    told = run(tree, "-m", "everytoken", "train", "margin-dpo", *common, *settings)
    assert "written" in told
    assert (tree / "trained" / "model").is_dir()
    assert "margin" in run(tree, "-c", "import everytoken; print(everytoken.MarginDPOLoss())")


@pytest.mark.rotating
def test_the_decoder_is_tried_and_compared(tree):
    common = ("--max-new-tokens", 8, "--temperature", 1)
    told = run(tree, "-m", "everytoken", "try", "sure-sampling", "--set", "threshold=0.5", *common)
    assert "tokens per second" in told
    told = run(tree, "-m", "everytoken", "compare", "sure-sampling", "sure-sampling:threshold=1", *common)
    assert "sure-sampling:threshold=1" in told


@pytest.mark.rotating
@pytest.mark.parametrize("name", [pytest.param("margin-dpo", marks=pytest.mark.exhaustive), "sure-sampling"])
def test_their_experiments_run(tree, name):
    told = run(tree, "-m", "everytoken", "reproduce", name, "--quick", "--out", "results")
    assert name in told
    assert (tree / "results" / f"{name}.quick.json").is_file()
