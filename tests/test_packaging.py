"""What a wheel holds, and that an installed package stands without its checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import everytoken
from everytoken.core.weights import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
WHEEL = 100_000_000
"""Bytes that a wheel may have."""


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert project["version"] == everytoken.__version__ == cited[1]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_papers_settings_are_found_from_any_folder(tmp_path, monkeypatch):
    from everytoken.training.base import at_hand

    monkeypatch.chdir(tmp_path)
    assert at_hand(Path("configs/train/tdpo.yaml")).is_file()
    assert at_hand(Path("train/tdpo.yaml")) == Path("train/tdpo.yaml")
    own = Path("configs/train/tdpo.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("beta: 1")
    assert at_hand(own) == own  # what is here goes first


def wheel_in(folder):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("the build tools cannot be had here")
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_holds_what_it_should_and_stands_alone(tmp_path):
    """One test, as the wheel is built once."""
    wheel = wheel_in(tmp_path)
    a_wheel_is_small_and_has_weights_results_and_settings(wheel)
    an_installed_package_stands_alone(wheel, tmp_path)


def a_wheel_is_small_and_has_weights_results_and_settings(wheel):
    assert wheel.stat().st_size < WHEEL
    names = zipfile.ZipFile(wheel).namelist()
    files = {path.relative_to(ROOT / "src").as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}
    assert files and files <= set(names)
    assert "everytoken/core/trace.html" in names
    for folder in ("results", "configs"):
        inside = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and not path.name.endswith(".quick.json")
        ]
        assert {f"everytoken/{path.relative_to(ROOT).as_posix()}" for path in inside} <= set(names)
    assert all(name.startswith(("everytoken/", "everytoken-")) for name in names)
    (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "# everytoken" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(re.match("https?://|#|mailto:", link) for link in links)  # PyPI has no files beside it


def an_installed_package_stands_alone(wheel, tmp_path):
    """Unpacked elsewhere and run from an empty folder: results are shown, settings found, a method runs offline."""
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    zipfile.ZipFile(wheel).extractall(site)

    def run(*arguments):
        command = [sys.executable, "-m", "everytoken", *arguments]
        env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import everytoken; print(everytoken.__file__)"],
        cwd=here, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    assert re.search("holds|undecided|contradicted", run("papers", "show", "tdpo"))
    assert "strawberry" in run("try", "stochastok", "--prompt", "strawberry", "--set", "expand_prop=1")
