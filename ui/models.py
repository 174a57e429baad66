"""HTML of the models tab: what each network is and how far to trust it, all of it read from the repository's files."""

import json
from html import escape
from pathlib import Path

from manet_core import CLASSES, WeightsError, list_models
from manet_core.networks.registry import human_name
from manet_core.weights import fingerprint, read_manifest

_SHORT = {"Normal": "Normal", "COVID-19": "COVID-19", "Tuberculosis": "TB", "Bacterial pneumonia": "Bacterial",
          "Viral pneumonia": "Viral"}  # fmt: skip
_CONTROLS = {
    "lungs": "the lungs",
    "whole": "the whole picture",
    "outside": "all but the lungs",
    "shape": "the lungs’ outline alone",
    "shuffled": "the lungs’ pixels in random places",
}
_ELSEWHERE = (
    "Our test split comes from the hospitals that the networks learnt from. “Elsewhere” are X-rays of other hospitals, "
    "none of them trained on: where a network falls there, it had learnt the hospital, the age or the machine, too. "
    "Last layers were refitted after these figures had been seen, so expect a little less of X-rays that were not. "
    "Controls had a short training, the same for all: beside the one that is shown the lungs, what the others score is "
    "skill that needs none."
)
_HINT = "Measured by <code>python -m train.evidence</code>; share called right, % (95 % interval over patients)."


def models_page(weights: str | Path, results: str | Path) -> str:
    """Every shipped network: its evidence in one table, then a card that opens.

    Args:
        weights: folder with manifest.json.
        results: folder with evidence.json; figures of other weights than these are not shown.
    """
    try:
        entries = read_manifest(weights)
    except WeightsError as error:
        return f'<section class="models"><p>{escape(str(error))}</p></section>'
    try:
        evidence = json.loads((Path(results) / "evidence.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        evidence = {"models": {}, "controls": {}}
    names = [name for name in list_models() if name in entries]
    measured = {
        name: evidence["models"][name]
        for name in names
        if evidence["models"].get(name, {}).get("sha256") == fingerprint(entries[name])
    }
    cards = "".join(_card(name, entries[name], measured.get(name)) for name in names)
    return f'<section class="models">{_overview(measured, evidence["controls"])}{_segmenter(entries)}{cards}</section>'


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


def _overview(measured: dict[str, dict], controls: dict) -> str:
    if not measured:
        return "<h2>How far to trust them</h2><p>Nothing has been measured of these weights.</p>"
    groups = list(next(iter(measured.values()))["external"])
    rows = []
    for name, found in measured.items():
        cells = [_percent(found["external"][group]["all"]["right"]) for group in groups]
        rows.append([" ".join(human_name(name)), _percent(found["test"]["accuracy"]), *cells])
    for sees, found in controls.items():
        elsewhere = (_percent(found["external"][group]["all"]["right"]) for group in groups)
        rows.append([f"control, shown {_CONTROLS[sees]}", _percent(found["accuracy"]), *elsewhere])
    n = next(iter(measured.values()))
    head = ["", f"our test split<br><small>n = {n['test']['n']}</small>"]
    head += [f"{group}, elsewhere<br><small>n = {n['external'][group]['all']['n']}</small>" for group in groups]
    return f"<h2>How far to trust them</h2><p>{_ELSEWHERE}</p>{_table(head, rows, _HINT)}"


def _segmenter(entries: dict[str, dict]) -> str:
    found = entries["resunet"].get("figures", {}).get("test", {})
    rows = [[group, _percent(f["iou"]), _percent(f["dice"]), str(f["n"])] for group, f in found.items()]
    table = _table(["lungs of", "IoU, %", "Dice, %", "n"], rows, "Lung masks on the test split (95 % interval).")
    return (
        f"<details><summary><b>ResUNet</b> lung segmentation</summary>{table}{_training(entries['resunet'])}</details>"
    )


def _training(entry: dict) -> str:
    training = entry.get("training", {})
    facts = [f"file <code>{escape(entry['file'])}</code>, SHA-256 <code>{entry['sha256'][:16]}…</code>"]
    if training:
        pictures = ", ".join(f"{escape(source)} {n}" for source, n in training["pictures"].items())
        facts.append(f"learnt from {pictures} X-rays of {training['patients']} patients")
        changed = ", ".join(
            f"{escape(option)} {escape(str(d['here']))} (paper {escape(str(d['paper']))})"
            for option, d in training["departures_from_paper"].items()
        )
        facts.append(f"departures from the paper: {changed or 'none'}")
    if layer := entry.get("last_layer"):
        how = "fitted again with each class of each source weighing the same" if layer["kind"] == "refitted" else "kept"
        margins = ", ".join(f"{escape(name)} {margin:.1f}" for name, margin in layer["margins"].items() if margin)
        facts.append(
            f"after training, last layer {how}, logits lowered by {margins or 'nothing'}: file "
            f"<code>{escape(layer['file'])}</code>, SHA-256 <code>{layer['sha256'][:16]}…</code>"
        )
    return "<ul>" + "".join(f"<li>{fact}</li>" for fact in facts) + "</ul>"


def _card(name: str, entry: dict, found: dict | None) -> str:
    backbone, attention = human_name(name)
    title = f"<summary><b>{escape(backbone)}</b> {escape(attention)}"
    if found is None:
        return f"<details>{title}, not measured</summary>{_training(entry)}</details>"
    test, calibration = found["test"], found["calibration"]
    rows = [
        [c, str(f["n"]), f"{100 * f['sensitivity']:.0f}", f"{100 * f['specificity']:.0f}", f"{f['auroc']:.3f}"]
        for c, f in test["per_class"].items()
    ]
    classes = _table(["", "n", "sensitivity, %", "specificity, %", "AUROC"], rows, "Test split, one class against all.")
    after = calibration["test"]["after"]
    said = (
        f"Reliability: when it says 80%, is it right in 80%? Calibration error {after['ece']:.3f}, "
        f"temperature {calibration['temperature']:.2f}."
    )
    return (
        f"<details>{title}, {100 * test['accuracy']['value']:.0f}% on our test split</summary>"
        f'<div class="figures">{classes}{_confusion(test["confusion"])}'
        f"<figure>{reliability_svg(after['reliability'])}<figcaption>{said}</figcaption>"
        f"</figure></div>{_training(entry)}</details>"
    )


def _confusion(matrix: list[list[int]]) -> str:
    rows = []
    for truth, row in zip(CLASSES, matrix):
        shares = [n / max(1, sum(row)) for n in row]
        rows.append(
            f'<tr><th scope="row">{truth}</th>'
            + "".join(f'<td style="background:rgba(108,197,217,{0.4 * s:.2f})">{n}</td>' for n, s in zip(row, shares))
            + "</tr>"
        )
    top = "<th></th>" + "".join(f'<th scope="col">{_SHORT[name]}</th>' for name in CLASSES)
    return (
        '<div class="scroll"><table class="confusion"><caption>Called (columns) of each truth (rows), test split.'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def reliability_svg(bins: list[dict], side: int = 180) -> str:
    """A reliability diagram: the share right over the probability given, a dot a bin, its area the number of cases."""
    most = max(b["n"] for b in bins)
    dots = "".join(
        f'<circle cx="{side * b["confidence"]:.1f}" cy="{side * (1 - b["accuracy"]):.1f}" '
        f'r="{2 + 6 * (b["n"] / most) ** 0.5:.1f}"><title>said {b["confidence"]:.0%}, right {b["accuracy"]:.0%}, '
        f"n = {b['n']}</title></circle>"
        for b in bins
    )
    said = ", ".join(f"{b['confidence']:.0%} → {b['accuracy']:.0%}" for b in bins)
    return (
        f'<svg viewBox="-8 -8 {side + 16} {side + 16}" width="{side}" role="img" aria-label="Said and right: {said}">'
        f'<rect width="{side}" height="{side}"/><path d="M0 {side}L{side} 0"/>{dots}</svg>'
    )
