"""Markdown of figures: how a number with its interval is written, a table, a block within a document, and its files."""

import json
import re
from pathlib import Path


def percent(figure: dict[str, float]) -> str:
    """An interval as "84.1 (81.2–86.9)", in percent; with "to" where a bound is negative."""
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if "-" in low + high else f"{value} ({low}–{high})"


def number(figure: dict[str, float], digits: int = 3) -> str:
    """An interval as "0.525 (0.492 to 0.557)"."""
    return "{value:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**figure, d=digits)


def table(head: list, rows: list[list]) -> list[str]:
    """The lines of a table, and an empty one after it."""
    lines = ["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def code(names) -> list[str]:
    """Names of networks as Markdown writes them."""
    return [f"`{name}`" for name in names]


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks <!-- name --> and <!-- /name --> in a Markdown file."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before = path.read_text(encoding="utf-8")
    path.write_text(re.sub(f"(?s){begin}.*?{end}", lambda _: begin + text + end, before), encoding="utf-8")


def write_among_papers(folder: Path, name: str, text: str) -> None:
    """The same in docs/papers.md, for results/NAME of a checkout; elsewhere there is no such page, and none is made."""
    page = folder.parent.with_name("docs") / "papers.md"
    if page.exists():
        write_between(page, name, text)


def write_results(results: dict, text: str, *folders: Path | None) -> None:
    """results.json and tables.md, the second with `text`, into each folder; None is passed over."""
    for folder in filter(None, folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "tables.md").write_text(text, encoding="utf-8")


def compared(what: str, runs: list[tuple[str, str, dict, dict]]) -> list[str]:
    """A table of (label, network, test figures, external figures); the mean is over the external groups shown."""
    groups = [group for group in ("COVID-19", "tuberculosis", "adult normals") if all(group in r[3] for r in runs)]
    rows = []
    for label, network, test, external in runs:
        figures = [external[group]["all"]["sensitivity"] for group in groups]
        mean = f"{100 * sum(f['value'] for f in figures) / len(figures):.1f}" if figures else ""
        rows.append([label, f"`{network}`", percent(test["accuracy"]), *map(percent, figures), mean])
    return table([what, "network", "test accuracy", *(f"external: {group}" for group in groups), "mean"], rows)
