"""Writes the pages that are derived: a page a method and a station, the list of methods, the reference, the scoreboard.

They are made anew for every build of the site and (but for the scoreboard, which the README links to) not committed.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from everytoken.catalog.cards import Card, load_catalog
from everytoken.catalog.house import Place, load_house
from everytoken.catalog.page.render import write_site
from everytoken.catalog.search import can_search_by_meaning
from everytoken.cli.papers_site import site_entries
from everytoken.core.charts import lines_svg
from everytoken.core.results import formatted, formatted_interval
from everytoken.reproduce.base import baseline_text
from everytoken.reproduce.beds.frontier import frontier_svg
from everytoken.reproduce.curriculum_grpo import pareto_svg
from everytoken.reproduce.divprune import curve_svg as kept_curve
from everytoken.reproduce.divprune import kept_table
from everytoken.reproduce.dynamic_tokenization import curve_svg as dynamic_curve
from everytoken.reproduce.files import load_result, load_results, up_to_date
from everytoken.reproduce.r2r import curve_svg as r2r_curve
from everytoken.reproduce.rto import curve_svg as rto_curve
from everytoken.reproduce.scoreboard import scoreboard

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONTROL = re.compile(r"\((bed|positive control)\b")


def markdown(docstring: str) -> str:
    """A docstring's literal blocks and double backticks as Markdown."""
    docstring = re.sub(r"``([^`]+)``", lambda found: f"``{' '.join(found[1].split())}``", docstring)
    lines, output, inside = docstring.splitlines(), [], False
    pending = False
    for line in lines:
        indented = line.startswith("    ")
        if pending and indented:
            output.append("```text")
            inside, pending = True, False
        if inside and line.strip() and not indented:
            while output and not output[-1].strip():
                output.pop()
            output += ["```", ""]
            inside = False
        if line.rstrip().endswith("::") and not inside:
            output.append(line.rstrip()[:-1])
            pending = True
        else:
            output.append(line[4:] if inside and indented else line)
    if inside:
        output.append("```")
    return re.sub(r"``([^`\n]+)``", r"`\1`", "\n".join(output))


def module_docstring(path: str) -> str:
    spec = find_spec(path.split(":")[0])
    if spec is None or spec.origin is None:
        return ""
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def method_page(card: Card) -> str:
    lines = [f"# {card.slug}", "", f"*{card.title}*", "", card.summary, ""]
    facts = [
        ("paper", f"[arXiv {card.arxiv}]({card.url})" if card.arxiv else card.url),
        ("year, authors", f"{card.year}, {card.authors or 'number not recorded'}"),
        ("station", f"[{card.station}](../stations/{card.station}.md)"),
        ("official code", f"<{card.code}>" if card.code else "none known"),
        ("claim", f"{card.claim}: {card.figure}"),
        ("status here", card.status),
    ]
    lines += ["| | |", "| --- | --- |", *[f"| {name} | {value} |" for name, value in facts], ""]
    runnable = card.implementation and card.station != "catalog"
    if runnable:
        lines += ["## Try it", "", "```console", f"everytoken try {card.slug}"]
        lines += [f"everytoken train {card.slug}"] if card.trainable else []
        lines += [f"everytoken reproduce {card.slug} --quick"] if card.reproduction else []
        lines += ["```", ""]
    result = card.result()
    if result is not None:
        lines += [
            "## Measured",
            "",
            "| metric | baseline | method | measured | 95% interval | paper | verdict |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for claim in up_to_date(result)["claims"]:
            lines.append(
                f"| {claim['metric']} | {baseline_text(claim, ': ')} | {claim['method']}: {claim['method_value']:.4g} "
                f"| **{formatted(claim)}** | {formatted_interval(claim) or claim['note']} | {claim['paper']} | "
                f"{claim['verdict']} |"
            )
        lines += [
            "",
            f"{result['summary']}; {len(result['seeds'])} seed(s). See the [scoreboard](../scoreboard.md).",
            "",
        ]
    if runnable:
        lines += ["## How it works", "", markdown(module_docstring(card.implementation)), ""]
        lines += ["## Reference", "", f"::: {card.implementation.replace(':', '.')}", ""]
    return "\n".join(lines)


def modules_of(package: str) -> list[str]:
    """The modules of a package, at any depth, that say what they are; itself first."""
    root = ROOT / "src" / package.replace(".", "/")
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if not any(part.startswith("_") for part in parts[:-1]) and parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def place_page(place: Place, cards: list[Card]) -> str:
    """A floor's or a station's page: contract, methods, and the reference of modules that no method's page shows."""
    package = f"everytoken.{place.name}"
    lines = [f"# {place.name}", "", f"*{place.flow}*", ""]
    if not (ROOT / "src" / "everytoken" / place.name).is_dir():
        modules: list[str] = []
    else:
        modules = modules_of(package)
    if cards:
        lines += ["## Methods", "", *method_rows(cards), ""]
    shown = {card.implementation.partition(":")[0] for card in cards}
    rest = [name for name in modules if name not in shown and name != package]
    rest.sort(key=lambda name: name != f"{package}.base")  # the contract first
    if rest:
        lines += ["## Reference", ""]
        lines += [f"::: {name}" for name in rest]
    return "\n".join(lines) + "\n"


def method_rows(cards: list[Card]) -> list[str]:
    """A table of methods."""
    rows = ["| method | status | what it does |", "| --- | --- | --- |"]
    return rows + [f"| [{card.slug}](../methods/{card.slug}.md) | {card.status} | {card.summary} |" for card in cards]


def methods_page(places: list[Place], cards: list[Card]) -> str:
    """The list of all methods, station by station."""
    running = sum(card.status != "planned" for card in cards)
    lines = [
        "# Methods",
        "",
        "Every method has a page: facts from its card, what was measured, its equation, and its reference.",
        f"{running} of {len(cards)} run today; the others are planned.",
        "",
    ]
    for place in places:
        mine = [card for card in cards if card.station == place.name]
        lines += [f"## [{place.name}](../stations/{place.name}.md)", "", f"*{place.flow}*", "", *method_rows(mine), ""]
    return "\n".join(lines)


def selection_table() -> str:
    """TokenSelect's measurements by length, from its result file."""
    path = ROOT / "results" / "tokenselect.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    arms, artifacts = result["runs"][0], result["artifacts"]["0"]
    full, ours = arms["full attention"], arms["TokenSelect"]
    lines = [
        "| cached tokens | attention of a step, one layer, ms: full | TokenSelect | tokens a second: full | "
        "TokenSelect | pass keys: full | TokenSelect |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label in ("8k", "16k", "32k", "64k"):
        steps = [arm[f"attention step at {label}, ms"] for arm in (full, ours)]
        speeds = [arm[f"tokens per second behind {label}"] for arm in (full, ours)]
        found = artifacts["pass keys found"][label]
        keys = [found[name].replace("0 of 0", "not run") for name in ("full attention", "TokenSelect")]
        lines.append(
            f"| {label} | {steps[0]:.1f} | {steps[1]:.1f} ({steps[0] / steps[1]:.1f}x) | {speeds[0]:.2f} | "
            f"{speeds[1]:.2f} ({speeds[1] / speeds[0]:.1f}x) | {keys[0]} | {keys[1]} |"
        )
    return "\n".join(lines) + "\n"


def reducers_table() -> str:
    """What every reducer declares, from the cards and the exports of its station."""
    import importlib

    from everytoken.reduction.base import Reducer, comparison_table

    paths = [card.implementation for card in load_catalog().values() if card.station == "reduction"]
    paths += load_house()["reduction"].exports
    found: dict[str, type[Reducer]] = {}
    for path in filter(None, paths):
        module, _, name = path.partition(":")
        item = getattr(importlib.import_module(module), name)
        if hasattr(item, "declares"):
            found[name] = item
    return comparison_table(sorted(found.items()))


def draft_curve() -> str:
    """Held-out agreement of the shipped draft over its training, from the file beside its weights; stage 2 follows
    stage 1.
    """
    path = ROOT / "src" / "everytoken" / "weights" / "dyspec-smollm2-135m" / "training.json"
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    before = 0.0
    for stage in json.loads(path.read_text())["stages"]:
        for own in range(4):
            points = [(before + point["seconds"] / 60, point["agreement"][own]) for point in stage["curve"]]
            lines.setdefault(f"{own} own predictions before", []).append(points)
        before += stage["curve"][-1]["seconds"] / 60
    label = "share of held-out positions right"
    return lines_svg(lines, "minutes of training on 2 cores; stage 2 holds out other rows", label, markers=False)


def measured_table(cards: list[Card]) -> str:
    """Every claim that was measured of some methods, from the result files; of each first what its bed shows."""
    lines = ["| command | metric | baseline | method | measured | 95% interval | paper | verdict |", "|" + " --- |" * 8]
    for card in cards:
        result = card.result()
        if result is None:
            continue
        command = f"`everytoken reproduce {card.slug}`"
        # the words of a control stand in brackets where a paper's figure would
        claims = sorted(up_to_date(result)["claims"], key=lambda claim: not CONTROL.match(claim["paper"]))
        for claim in claims:
            lines.append(
                f"| {command} | {claim['metric']} | {baseline_text(claim, ': ')} | "
                f"{claim['method']}: {claim['method_value']:.4g} | {formatted(claim)} | "
                f"{formatted_interval(claim) or claim['note']} | {claim['paper']} | {claim['verdict']} |"
            )
            command = ""
    return "\n".join(lines) + "\n"


def bench_table(name: str) -> str:
    """A benchmark's rows as Markdown."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    heads = list(dict.fromkeys(head for row in result["rows"] for head in row))
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in result["rows"]:
        values = [row.get(head, "") for head in heads]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", result["note"], ""])


def main() -> None:
    catalog, house = load_catalog(), load_house()
    for name in ("methods", "stations", "floors"):
        shutil.rmtree(DOCS / name, ignore_errors=True)
        (DOCS / name).mkdir()
    for card in catalog.values():
        (DOCS / "methods" / f"{card.slug}.md").write_text(method_page(card), encoding="utf-8")
    for place in house.values():
        cards = [card for card in catalog.values() if card.station == place.name]
        (DOCS / f"{place.kind}s" / f"{place.name}.md").write_text(place_page(place, cards), encoding="utf-8")
    stations = [place for place in house.values() if place.kind == "station"]
    (DOCS / "methods" / "index.md").write_text(methods_page(stations, list(catalog.values())), encoding="utf-8")
    measured, beds = load_results(ROOT / "results"), load_results(ROOT / "results" / "beds")
    (DOCS / "scoreboard.md").write_text(scoreboard(measured, beds), encoding="utf-8")
    (DOCS / "assets" / "tokenselect.md").write_text(selection_table(), encoding="utf-8")
    (DOCS / "assets" / "reducers.md").write_text(reducers_table(), encoding="utf-8")
    (DOCS / "assets" / "bench-reduction.md").write_text(bench_table("reduction"), encoding="utf-8")
    (DOCS / "assets" / "bench-routing.md").write_text(bench_table("routing"), encoding="utf-8")
    (DOCS / "assets" / "bench-attention.md").write_text(bench_table("attention"), encoding="utf-8")
    (DOCS / "assets" / "bench-preference.md").write_text(bench_table("preference"), encoding="utf-8")
    (DOCS / "assets" / "bench-generation.md").write_text(bench_table("generation"), encoding="utf-8")
    (DOCS / "assets" / "bench-reinforcement.md").write_text(bench_table("reinforcement"), encoding="utf-8")
    ours = [card for card in catalog.values() if card.station == "reinforcement"]
    (DOCS / "assets" / "measured-reinforcement.md").write_text(measured_table(ours), encoding="utf-8")
    (DOCS / "assets" / "draft-curve.svg").write_text(draft_curve(), encoding="utf-8")
    frontier = [ROOT / "results" / f"{name}.json" for name in ("tdpo", "tgdpo", "t-reg")]
    if all(path.is_file() for path in frontier):
        picture = frontier_svg([load_result(path) for path in frontier])
        (DOCS / "assets" / "frontier.svg").write_text(picture, encoding="utf-8")
    kept = ROOT / "results" / "divprune.json"
    if not kept.is_file():
        kept = ROOT / "results" / "one-seed" / "divprune.json"  # until three seeds have run
    if kept.is_file():
        (DOCS / "assets" / "divprune-curve.svg").write_text(kept_curve(load_result(kept)), encoding="utf-8")
        (DOCS / "assets" / "reducers-accuracy.md").write_text(kept_table(load_result(kept)), encoding="utf-8")
    curves = {
        "dynamic-tokenization": dynamic_curve,
        "r2r": r2r_curve,
        "rto": rto_curve,
        "curriculum-grpo": pareto_svg,
        "divprune": kept_curve,
    }
    for name, draw in curves.items():
        path = ROOT / "results" / f"{name}.json"
        if path.is_file():
            picture = draw(load_result(path))
            (DOCS / "assets" / f"{name.removesuffix('-tokenization')}-curve.svg").write_text(picture, encoding="utf-8")
    # the search table of words by meaning costs a minute once and is kept in the cache folder
    write_site(DOCS / "catalogue", site_entries(DOCS / "traces"), meaning=can_search_by_meaning())
    print(f"{len(catalog)} method pages, {len(house)} pages of floors and stations, the scoreboard")


if __name__ == "__main__":
    main()
