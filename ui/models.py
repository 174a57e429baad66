"""HTML of the models tab: what each network is, how it was validated, all of it read from the repository's files."""

import json
from html import escape
from pathlib import Path

from manet_core import WeightsError, list_models
from manet_core.pipeline import SEGMENTER
from manet_core.tasks import Task, get_task, list_tasks
from manet_core.weights import SEGMENT, fingerprint, read_manifest

from .render import shown_name, titles

_CONTROLS = {
    "lungs": "the lungs",
    "whole": "the whole picture",
    "outside": "all but the lungs",
    "shape": "the lungs’ outline alone",
    "shuffled": "the lungs’ pixels in random places",
    "equalised": "the lungs with equalised grey levels",
}
_EXTERNAL = (
    "The internal test split comes from the hospitals of the training X-rays. The external X-rays come from other "
    "hospitals, and none was trained on: a network that is less accurate there may have learnt the hospital, the age "
    "or the scanner beside the disease, or the patients differ."
)
_REFITTED = (
    " Some last layers were refitted after external figures had been seen, so expect slightly lower figures on X-rays "
    "that nobody has looked at."
)
_PARTS = ("models", "controls", "ensemble", "measured_of")
_FEWEST = 10  # X-rays of an external group, below which its sensitivity says nothing
_VALIDITY = (
    "The controls were trained by one recipe and differ in what they were shown; the model card says what else does. "
    "Accuracy that a control reaches without lung tissue does not depend on lung tissue."
)
_HINT = "Accuracy (internal) and sensitivity (external), % (95 % CI over patients)."


def models_page(weights: str | Path, *results: str | Path) -> str:
    """Every shipped network, by task: its evidence in one table, then a card that opens.

    Args:
        weights: folder with manifest.json, or a manifest file.
        results: folders with evidence.json, one for each set; figures of other weights than these are not shown.
    """
    try:
        entries = read_manifest(weights)
    except WeightsError as error:
        return f'<section class="models"><p>{escape(str(error))}</p></section>'
    sets = [recorded(Path(folder) / "evidence.json") for folder in results]
    measured = {
        name: (evidence["models"][name], evidence)
        for evidence in sets
        for name, entry in entries.items()
        if evidence["models"].get(name, {}).get("sha256") == fingerprint(entry)
    }
    html = "" if measured else "<h2>External validation</h2><p>Nothing has been measured of these weights.</p>"
    used = {entry["task"] for entry in entries.values()}
    tasks = [get_task(name) for name in list_tasks() if name in used]
    order = {name: number for number, name in enumerate(list_models())}
    for task in tasks:
        names = [name for name, entry in entries.items() if entry["task"] == task.name]
        names.sort(key=lambda name: order.get(entries[name]["network"]["name"], len(order)))
        mine = {name: measured[name][0] for name in names if name in measured}
        title = f'<h2 class="task">{escape(task.title)} <span>{escape(task.paper)}</span></h2>'
        html += title if len(tasks) > 1 else ""
        html += _overview(task, mine, measured[next(iter(mine))][1], explained=_EXTERNAL in html) if mine else ""
        html += "" if len(tasks) > 1 else _segmenter(entries)
        html += "".join(_card(task, name, entries[name], mine.get(name)) for name in names)
    html += _segmenter(entries) if len(tasks) != 1 else ""
    return f'<section class="models">{html}</section>'


def recorded(path: Path) -> dict[str, dict]:
    """The `_PARTS` of an evidence.json, {} each where nothing was measured or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: {k: v for k, v in found.get(key, {}).items() if isinstance(v, dict)} for key in _PARTS}
    except (OSError, ValueError, AttributeError):
        return {key: {} for key in _PARTS}


def _percent(figure: dict) -> str:
    return f"{100 * figure['value']:.0f} <small>({100 * figure['low']:.0f}–{100 * figure['high']:.0f})</small>"


def _table(head: list[str], rows: list[list[str]], caption: str) -> str:
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _overview(task: Task, measured: dict[str, dict], evidence: dict, explained: bool) -> str:
    """The figures of one task's networks; `explained`: the page has said already what external X-rays are."""
    if not task.exclusive:
        return _findings(measured)
    controls = {
        shown: found
        for shown, found in evidence["controls"].items()
        if shown in _CONTROLS and "accuracy" in found and found.get("settings", {}).get("task", "manet") == task.name
    }
    rated = {name: found for name, found in measured.items() if "test" in found}
    if not rated:
        return ""
    groups = {group: of for found in rated.values() for group, of in found.get("external", {}).items()}
    groups = {group: of for group, of in groups.items() if of["all"]["n"] >= _FEWEST}
    rows = [
        [" ".join(titles(name)[:2]), _percent(found["test"]["accuracy"]), *_external(found, groups)]
        for name, found in rated.items()
    ]
    mean, of = evidence["ensemble"].get(task.name, {}), evidence["measured_of"].get("ensemble", {})
    if mean.get("models") == list(rated) and all(of.get(name) == m["sha256"] for name, m in rated.items()):
        rows.append([f"mean of these {len(rated)}", _percent(mean["test"]["accuracy"]), *_external(mean, groups)])
    for shown, found in controls.items():
        if shown == "lungs" and found["accuracy"] in [network["test"]["accuracy"] for network in rated.values()]:
            continue  # it is one of the networks above
        rows.append([f"control, shown {_CONTROLS[shown]}", _percent(found["accuracy"]), *_external(found, groups)])
    n = next(iter(rated.values()))["test"]["n"]
    head = ["", f"internal test<br><small>n = {n}</small>"]
    head += [f"{escape(name)}, external<br><small>n = {of['all']['n']}</small>" for name, of in groups.items()]
    checks = f"<p><b>Validity checks.</b> {_VALIDITY}</p>" if controls else ""
    known = "" if explained else _EXTERNAL
    known += _REFITTED if any(found.get("last_layer") for found in rated.values()) else ""
    told = f"<h2>External validation</h2><p>{known}</p>" if known else ""
    return f"{told}{checks}{_table(head, rows, _HINT)}"


def _external(found: dict, groups: dict) -> list[str]:
    """A cell for each group of external X-rays, empty where the network was not measured on it."""
    parts = [found.get("external", {}).get(group, {}).get("all") for group in groups]
    return ["" if part is None else _percent(part["sensitivity"]) for part in parts]


def _findings(measured: dict[str, dict]) -> str:
    """The AUROC of every finding, a column a network."""
    found = {name: m["findings"]["findings"] for name, m in measured.items() if "findings" in m}
    counts = {finding: figure["n"] for of in found.values() for finding, figure in of.items()}
    rows = [
        [
            escape(shown_name(finding)),
            str(n),
            *(f"{of[finding]['value']:.2f}" if finding in of else "" for of in found.values()),
        ]
        for finding, n in counts.items()
    ]
    head = ["", "n", *(escape(" ".join(titles(name)[:2])) for name in found)]
    return _table(head, rows, "AUROC on the internal test split; n: X-rays with the finding.") if rows else ""


def _segmenter(entries: dict[str, dict]) -> str:
    entry = entries.get(SEGMENTER)
    if entry is None or entry["task"] != SEGMENT:
        return ""
    found = entry.get("figures", {}).get("test", {})
    rows = [[group, _percent(f["iou"]), _percent(f["dice"]), str(f["n"])] for group, f in found.items()]
    table = _table(["lungs of", "IoU, %", "Dice, %", "n"], rows, "Lung masks on the internal test split (95 % CI).")
    return f"<details><summary><b>ResUNet</b> lung segmentation</summary>{table}{_training(entry)}</details>"


def _training(entry: dict) -> str:
    training = entry.get("training", {})
    facts = [f"file <code>{escape(entry['file'])}</code>, SHA-256 <code>{entry['sha256'][:16]}…</code>"]
    if training:
        pictures = ", ".join(f"{escape(source)} {n}" for source, n in training["pictures"].items())
        facts.append(f"trained on {pictures} X-rays of {training['patients']} patients")
        changed = ", ".join(
            f"{escape(option)} {escape(str(d['here']))} (paper {escape(str(d['paper']))})"
            for option, d in training["departures_from_paper"].items()
        )
        facts.append(f"departures from the paper: {changed or 'none'}")
    if layer := entry.get("last_layer"):
        how = "refitted with each class of each source weighing the same" if layer["kind"] == "refitted" else "kept"
        margins = ", ".join(f"{escape(name)} {margin:.1f}" for name, margin in layer["margins"].items() if margin)
        facts.append(
            f"after training, last layer {how}, logits lowered by {margins or 'nothing'}: file "
            f"<code>{escape(layer['file'])}</code>, SHA-256 <code>{layer['sha256'][:16]}…</code>"
        )
    return "<ul>" + "".join(f"<li>{fact}</li>" for fact in facts) + "</ul>"


def _card(task: Task, name: str, entry: dict, found: dict | None) -> str:
    backbone, attention, _ = titles(name)
    title = f"<summary><b>{escape(backbone)}</b> {escape(attention)}"
    if found is None:
        return f"<details>{title}, not measured</summary>{_training(entry)}</details>"
    if "test" not in found:
        mean = found.get("findings", {}).get("mean_auroc")
        summary = f", mean AUROC {mean:.2f} on the internal test split" if mean else ""
        return f"<details>{title}{summary}</summary>{_training(entry)}</details>"
    test, calibration = found["test"], found["calibration"]
    rows = [
        [c, str(f["n"]), f"{100 * f['sensitivity']:.0f}", f"{100 * f['specificity']:.0f}", f"{f['auroc']:.3f}"]
        for c, f in test["per_class"].items()
    ]
    head = ["", "n", "sensitivity, %", "specificity, %", "AUROC"]
    classes = _table(head, rows, "Internal test split, each class against the others.")
    after = calibration["test"]["after"]
    caption = (
        f"Calibration: of the predictions with a probability of 80%, are 80% right? Expected calibration error "
        f"{after['ece']:.3f}, temperature {calibration['temperature']:.2f}."
    )
    if "operating_point" in calibration:
        caption += f" A claim needs a probability of {calibration['operating_point']:.0%}."
    return (
        f"<details>{title}, accuracy {100 * test['accuracy']['value']:.0f}% on the internal test split</summary>"
        f'<div class="figures">{classes}{_confusion(task.classes, test["confusion"])}'
        f"<figure>{reliability_svg(after['reliability'])}<figcaption>{caption}</figcaption>"
        f"</figure></div>{_training(entry)}</details>"
    )


def _confusion(classes: tuple[str, ...], matrix: list[list[int]]) -> str:
    rows = []
    for truth, row in zip(classes, matrix):
        shares = [n / max(1, sum(row)) for n in row]
        rows.append(
            f'<tr><th scope="row">{escape(truth)}</th>'
            + "".join(f'<td style="background:rgba(108,197,217,{0.4 * s:.2f})">{n}</td>' for n, s in zip(row, shares))
            + "</tr>"
        )
    top = "<th></th>" + "".join(f'<th scope="col">{escape(_short(name))}</th>' for name in classes)
    return (
        '<div class="scroll"><table class="confusion"><caption>Confusion matrix, internal test split: truth in rows, '
        f"prediction in columns.</caption><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _short(name: str) -> str:
    """A class for the head of a narrow column."""
    return "TB" if name == "Tuberculosis" else name.removesuffix(" pneumonia")


def reliability_svg(bins: list[dict], side: int = 180) -> str:
    """A reliability diagram: accuracy over predicted probability, a dot a bin, its area the number of cases."""
    most = max(b["n"] for b in bins)
    dots = "".join(
        f'<circle cx="{side * b["confidence"]:.1f}" cy="{side * (1 - b["accuracy"]):.1f}" '
        f'r="{2 + 6 * (b["n"] / most) ** 0.5:.1f}"><title>predicted {b["confidence"]:.0%}, correct '
        f"{b['accuracy']:.0%}, n = {b['n']}</title></circle>"
        for b in bins
    )
    values = ", ".join(f"{b['confidence']:.0%} → {b['accuracy']:.0%}" for b in bins)
    return (
        f'<svg viewBox="-8 -8 {side + 16} {side + 16}" width="{side}" role="img" '
        f'aria-label="Predicted and correct: {values}">'
        f'<rect width="{side}" height="{side}"/><path d="M0 {side}L{side} 0"/>{dots}</svg>'
    )
