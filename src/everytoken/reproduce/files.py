"""Result files: how they are written, what they hold, and how those of older versions are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from ..core.errors import BadInputError
from ..core.files import write_text_whole
from ..core.results import Arms, Claim, Kind, MeasuredClaim, measure, neutral

Scale = Literal["quick", "cpu", "gpu"]
SCALES: tuple[Scale, ...] = get_args(Scale)


class Machine(TypedDict):
    """What the figures were measured on."""

    processor: str
    cores: int | None
    threads: int
    gpu: str | None
    system: str
    python: str


class Result(TypedDict):
    """A result file. Files of 0.1 have no ``scale`` and older claims; ``load_results`` brings them up to date."""

    name: str
    summary: str
    quick: bool
    scale: Scale
    model: str
    date: str
    command: str
    seconds: float
    seeds: list[int]
    versions: dict[str, str]
    machine: Machine
    claims: list[MeasuredClaim]
    runs: list[Arms]
    artifacts: dict[str, dict[str, Any]]


def public_model(model: str | None) -> str:
    """A model's name as a result file may show it: a hub id as it is, of a local path the last part."""
    if not model:
        return "embedded"
    local = re.match(r"[/~.\\]|[A-Za-z]:[\\/]", model) or Path(model).exists() or model.endswith(".gguf")
    return re.split(r"[\\/]", model.rstrip("\\/"))[-1] if local else model


def public_command(argv: Sequence[str]) -> str:
    """The command that was run, without what says nothing about the measurement: where its output went, and where files
    lay.
    """
    if list(argv[1:2]) != ["reproduce"]:
        return ""
    words, skipped = ["everytoken"], False
    for word in argv[1:]:
        name, _, value = word.partition("=")
        if skipped or name in ("--out", "--json", "--resume", "--no-resume", "--fresh"):
            skipped = not skipped and word == "--out"
            continue
        words.append(f"{name}={public_model(value)}" if value else public_model(word))
    return " ".join(words)


def write(result: Result, folder: Path) -> Path:
    """``results/NAME.json`` (``NAME.quick.json`` or ``NAME.gpu.json`` for other scales), written atomically."""
    scale = result["scale"]
    path = folder / f"{result['name']}{'' if scale == 'cpu' else f'.{scale}'}.json"
    text = json.dumps(result, indent=1)
    # numbers of one list on one line: there may be one a question
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    write_text_whole(path, text.replace("[ ", "[").replace(" ]", "]") + "\n")
    return path


def load_results(folder: Path) -> list[Result]:
    """All full results of a folder, by name; claims of files from 0.1 get intervals and verdicts from their runs.

    Raises:
        BadInputError: a file that is not a result.
    """
    return [load_result(path) for path in sorted(folder.glob("*.json")) if not path.name.endswith(".quick.json")]


def load_result(path: Path) -> Result:
    """One result file; raises as ``load_results`` does."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return up_to_date(result)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{path} is not a result file: {error!r}", "Delete it, or run the experiment again."
        ) from error


def up_to_date(result: dict[str, Any]) -> Result:
    """A result as this version writes it, from one that 0.1 wrote."""
    claims = [
        claim if "verdict" in claim else _claim_of_0_1(claim, result["runs"], result["quick"])
        for claim in result["claims"]
    ]
    scale = result.get("scale", "quick" if result["quick"] else "cpu")
    command, model = public_command(result["command"].split()), public_model(result["model"])
    return result | {"claims": claims, "scale": scale, "command": command, "model": model}  # type: ignore[return-value]


def _claim_of_0_1(claim: dict[str, Any], runs: Sequence[Arms], quick: bool) -> MeasuredClaim:
    """Interval and verdict of a claim that has neither; its direction follows from what 0.1 called *holds*."""
    kind: Kind = claim["kind"]
    above = claim["value"] > neutral(kind)
    higher = bool(claim["holds"]) == above if claim["value"] != neutral(kind) else True
    wanted = Claim(
        claim["metric"], claim["method"], claim["baseline"], claim["paper"], kind, higher, None, claim.get("why", "")
    )
    measured = measure(wanted, runs)
    if quick and measured["verdict"] == "undecided":
        measured["verdict"] = "ran"
    return measured
