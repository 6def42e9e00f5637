"""The scoreboard: one line a method that fits a screen, and behind each the claims with their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from ..core.results import MeasuredClaim, Verdict, formatted, formatted_interval
from .base import baseline_text
from .files import Result

HEAD = """# Scoreboard

Baseline and method are measured in one run on the same work, by `everytoken reproduce NAME`. A verdict comes from the
95% interval of the comparison (paired, over questions and seeds), and never from the sign of a median:

- **holds**: the interval lies on the claimed side of the bar (the paper's where it gives one, else no difference);
- **contradicted**: it lies on the other side, at this scale;
- *undecided*: it contains the bar, or too little was measured to say. Two or three seeds without values by question
  decide only what is large beside what the seeds differ by.

"Reproduced" is said of what *holds* only. Everything runs on small models and two processor cores; the reasons why
figures differ from the papers' are behind each line. `everytoken scoreboard` writes this page from `results/*.json`.
"""
SHOWN: dict[Verdict, str] = {
    "holds": "**holds**",
    "contradicted": "**contradicted**",
    "undecided": "undecided",
    "ran": "ran",
}


def scoreboard(results: Sequence[Result], beds: Sequence[Result] = ()) -> str:
    """``docs/scoreboard.md`` from result files, and from those of the test beds' positive controls."""
    totals = Counter(claim["verdict"] for result in results for claim in result["claims"])
    counted = ", ".join(
        f"{totals[verdict]} {_counted(verdict, totals[verdict])}" for verdict in SHOWN if totals[verdict]
    )
    lines = [
        HEAD,
        f"Of {sum(totals.values())} claims of {len(results)} methods: {counted}." if results else "No results yet.",
        "",
        "| method | first claim | measured | 95% interval | verdict | all claims |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        if not result["claims"]:
            continue
        claim = result["claims"][0]
        lines.append(
            f"| [{result['name']}](#{result['name']}) | {cell(claim['metric'])} | {formatted(claim)} | "
            f"{cell(formatted_interval(claim)) or 'none'} | {SHOWN[claim['verdict']]} | {tally(result)} |"
        )
    lines += ["", *bed_lines(beds), "## Every claim", ""]
    for result in results:
        lines += details(result)
    return "\n".join(lines)


def bed_lines(beds: Sequence[Result]) -> list[str]:
    """What the positive controls say of the beds that experiments stand on."""
    if not beds:
        return []
    from .beds.base import can_decide

    lines = [
        "## Test beds",
        "",
        "A bed must show that it can decide before a method is judged on it: something known to help must help there,",
        "and its start must lie between chance and the ceiling.",
        "",
        "| bed | start | after what is known to help | difference | 95% interval | can it decide? |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in beds:
        claim, (bed, _, _) = result["claims"][0], result["summary"].rpartition(":")
        lines.append(
            f"| {cell(result['name'].removeprefix('bed-'))}: {cell(bed)} "
            f"| {claim['metric']} {claim['baseline_value']:.3g} | {claim['method_value']:.3g} | {formatted(claim)} "
            f"| {cell(formatted_interval(claim)) or 'none'} | {'yes' if can_decide(result) else 'no'} |"
        )
    return [*lines, ""]


def tally(result: Result) -> str:
    """How many of a method's claims hold, are contradicted, are undecided."""
    found = Counter(claim["verdict"] for claim in result["claims"])
    return ", ".join(f"{found[verdict]} {_counted(verdict, found[verdict])}" for verdict in SHOWN if found[verdict])


def details(result: Result) -> list[str]:
    """One method's claims, folded."""
    host = result["machine"]
    shown = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    seeds = "1 seed" if len(result["seeds"]) == 1 else f"{len(result['seeds'])} seeds"
    notes = {claim["note"]: None for claim in result["claims"] if claim["note"]}
    marks = {note: str(index) for index, note in enumerate(notes, 1)}
    return [
        f'<details markdown="1" id="{result["name"]}">',
        f"<summary><b>{result['name']}</b>: {tally(result)}</summary>",
        "",
        f"{cell(result['summary'])}. See the [method's page](methods/{result['name']}.md).",
        "",
        "| metric | baseline | method | measured | 95% interval | paper | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[row(claim, marks) for claim in result["claims"]],
        "",
        *[f"- Note {mark}: {note}." for note, mark in marks.items()],
        *reasons(result["claims"]),
        f"- {seeds}, {result['seconds']:.0f} s, model: {result['model']}, scale: {result['scale']}, {result['date']}.",
        f"- {host['processor']}, {host['cores']} cores, {host['gpu'] or 'no GPU'}, Python {host['python']}; {shown}.",
        "",
        "</details>",
        "",
    ]


def reasons(claims: Sequence[MeasuredClaim]) -> list[str]:
    """Why figures differ from the paper's, every reason once with the claims that it belongs to."""
    found: dict[str, list[str]] = {}
    for claim in claims:
        if claim["why"]:
            label = f"*{cell(claim['metric'])}* ({claim['method']} against {claim['baseline'] or 'its bar'})"
            found.setdefault(claim["why"], []).append(label)
    return [f"- {'; '.join(labels)}: {why}" for why, labels in found.items()]


def row(claim: MeasuredClaim, marks: dict[str, str]) -> str:
    """One claim as a row of the table; a note is referred to by its number."""
    interval = cell(formatted_interval(claim)) or "none"
    if claim["note"]:
        interval += f" (note {marks[claim['note']]})"
    return (
        f"| {cell(claim['metric'])} | {cell(baseline_text(claim, ': '))} | {cell(claim['method'])}: "
        f"{claim['method_value']:.4g} | {formatted(claim)} | {interval} | {cell(claim['paper'])} | "
        f"{SHOWN[claim['verdict']]} |"
    )


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return escape(text, quote=False).replace("|", "&#124;")


def _counted(verdict: Verdict, count: int) -> str:
    return "hold" if verdict == "holds" and count != 1 else verdict
