"""How much of it is true? What a critic would ask of the shipped weights, answered with numbers.

    python -m train.evidence --data DATA
    python -m train.evidence --data DATA --only groups localisation   # these anew, the rest as it was

writes evidence.json, evidence.md and reliability.png into results (for
weights/NAME.json into results/NAME): external validation, sensitivity by class
and source, what networks score without lung tissue, whether their features know
the source, how calibrated they are, where their heatmaps lie and whether those
places matter, how explainers compare, what disturbs them, whether they notice what
they do not know and a film that lies wrongly, and whether a patient or a picture is in two splits. Intervals are
95 % bootstrap over patients, and exact binomial where all or none are right.

What is measured is kept section by section. What cannot be measured, as there are
no such X-rays or trainings, is told and left as it was.

Controls and other recipes are trainings of their own, found in the folders
`--controls` and `--recipes`. Controls follow one recipe, differ in what they see,
and are averaged over seeds:

    for seed in 0 1 2; do for sees in lungs outside shape whole; do
      python -m train.classify --recipe broad --init runs/nih14/best.safetensors --model efficientnet_lite0 \\
          --sees $sees --seed $seed --out runs/controls/$sees-$seed
    done; done
"""

import json
import time
from collections.abc import Callable
from operator import or_
from pathlib import Path
from types import ModuleType

from manet_core.explain import DEFAULT, list_explainers
from manet_core.weights import fingerprint, read_manifest, write_manifest

from . import run_verb
from .measures import (
    agreement,
    calibration,
    classification,
    controls,
    duplicates,
    ensemble,
    explainers,
    external,
    findings,
    groups,
    heatmaps,
    last_layer,
    localisation,
    ood,
    other_findings,
    pose,
    recipes,
    robustness,
    source_probe,
)
from .measures.markdown import percent, table, write_between
from .measures.study import NotMeasured, Study, documents, options, results_folder

# in the order of the page; of each network on its own, then of all together or of the data
OF_EACH: dict[str, ModuleType] = {
    "classification": classification,
    "external": external,
    "groups": groups,
    "findings": findings,
    "last_layer": last_layer,
    "source_probe": source_probe,
    "calibration": calibration,
}
OF_ALL: dict[str, ModuleType] = {
    "controls": controls,
    "recipes": recipes,
    "localisation": localisation,
    "explainers": explainers,
    "other_findings": other_findings,
    "ensemble": ensemble,
    "agreement": agreement,
    "heatmaps": heatmaps,
    "robustness": robustness,
    "pose": pose,
    "ood": ood,
    "splits": duplicates,
}
SECTIONS = OF_EACH | OF_ALL
# of OF_ALL, what is said of the shipped networks: it grows old with their weights
OF_NETWORKS = ("localisation", "explainers", "other_findings", "ensemble", "agreement", "heatmaps", "robustness")

INTRODUCTION = """\
Written by `python -m train.evidence`. Intervals are 95 % bootstrap over patients; where all or none are right, which
resampling cannot doubt, exact binomial."""
HEADLINE = "Accuracy, then sensitivities, % (95 % CI). Pneumonia of adults is found where any pneumonia is named."


def measure(study: Study, evidence: dict, section: str, keep: Callable[[], None]) -> None:
    """Measure one section into `evidence`, calling `keep` whenever there is something new."""
    whole = section in OF_ALL
    for name in [None] if whole else study.entries:
        try:
            if whole:
                merged = getattr(OF_ALL[section], "merged", or_)
                evidence[section] = merged(evidence.get(section, {}), OF_ALL[section].measure(study))
                if section in OF_NETWORKS:
                    of = {model: figures["sha256"] for model, figures in evidence["models"].items()}
                    evidence.setdefault("measured_of", {})[section] = of
            else:
                evidence["models"][name] |= OF_EACH[section].measure(study, name)
            keep()
        except NotMeasured as reason:
            print(f"{section}: not measured, {reason}.", flush=True)


def begin(path: Path, study: Study) -> dict:
    """What was measured before; of networks that are gone or have other weights now, nothing."""
    evidence = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = evidence.get("models", {})
    evidence["models"] = {}
    for name, entry in study.entries.items():
        identity = {"sha256": fingerprint(entry), "task": entry["task"]}
        same = before.get(name, {}).get("sha256") == identity["sha256"]
        evidence["models"][name] = (before[name] if same else {}) | identity
    return evidence


def markdown(evidence: dict) -> str:
    """The evidence as one page of tables; the last section says what was not measured."""
    out, missing = ["# Validity checks", "", INTRODUCTION, ""], []
    for section, module in SECTIONS.items():
        there = evidence.get(section) if section in OF_ALL else evidence["models"]
        text = module.lines(evidence) if there else []
        if any(line.startswith(("|", "*", "**")) for line in text):
            out += [f"## {module.TITLE}", "", *_outdated(evidence, section), *text]
        else:
            missing.append(module.TITLE)
    if missing:
        out += ["## Not measured", "", *(f"* {title}" for title in missing), ""]
    return "\n".join(out[:-1]) + "\n"


def _outdated(evidence: dict, section: str) -> list[str]:
    """A paragraph that says which networks have other weights since a section was measured."""
    of = evidence.get("measured_of", {}).get(section, {})
    models = evidence["models"]
    changed = [f"`{name}`" for name, weights in of.items() if name in models and models[name]["sha256"] != weights]
    if not changed:
        return []
    return [f"**Measured of earlier weights of {', '.join(changed)}**; `--only {section}` measures these.", ""]


def headline(evidence: dict) -> str:
    """The figures that belong beside every accuracy: test, external validation, and without lung tissue."""
    models = {name: m for name, m in evidence["models"].items() if "test" in m and "external" in m}
    sizes = {g: parts["all"]["n"] for m in models.values() for g, parts in m["external"].items()}
    columns = [group for group, n in sizes.items() if n >= 10]
    cohort_sizes = {c: f["n"] for m in models.values() for c, f in _cohorts(m).items()}
    tested = {m["test"]["n"] for m in models.values()}
    means = {} if _outdated(evidence, "ensemble") else evidence.get("ensemble", {})
    together = {f"mean of the {len(m['models'])} networks": m for m in means.values()}
    rows = []
    for name, m in ({f"`{name}`": m for name, m in models.items()} | together).items():
        cells = [_cell(m["external"].get(group, {}).get("all"), "sensitivity") for group in columns]
        cells += [_cell(_cohorts(m).get(cohort), "read_as") for cohort in cohort_sizes]
        rows.append([name, percent(m["test"]["accuracy"]), *cells])
    if blind := evidence.get("controls", {}).get("outside"):
        cells = [_cell(blind["external"].get(group, {}).get("all"), "sensitivity") for group in columns]
        rows.append(["control, lungs blacked out", percent(blind["accuracy"]), *cells, *([""] * len(cohort_sizes))])
    head = ["network", f"test: accuracy (n = {' or '.join(map(str, sorted(tested)))})"]
    head += [f"external: {group} (n = {sizes[group]})" for group in columns]
    head += [f"test: {cohort} (n = {n})" for cohort, n in cohort_sizes.items()]
    lines = [HEADLINE, "", *table(head, rows)]
    return "\n".join([*lines, controls.share_without_lungs(evidence.get("controls", {}))]) + "\n"


def _cohorts(model: dict) -> dict:
    """The adults of one network's test split."""
    found = model.get("groups", {}).get("test", {}).get("cohorts", {})
    return {cohort: figures for cohort, figures in found.items() if cohort.startswith("adult")}


def _cell(figures: dict | None, key: str) -> str:
    return percent(figures[key]) if figures else ""


def record(evidence: dict, weights: Path) -> None:
    """Put temperatures and operating points into the manifest, the headline into model card and README."""
    entries = read_manifest(weights)
    for name, figures in evidence["models"].items():
        found = figures.get("calibration", {})
        entries[name] |= {key: found[key] for key in ("temperature", "operating_point") if key in found}
    write_manifest(weights, entries)
    for path in documents(weights):
        write_between(path, "evidence", headline(evidence))


def main() -> None:
    """Measure all of it and write the page."""
    p = options(__doc__)
    p.add_argument("--controls", default="runs/controls", type=Path, help="folder with the controls' trainings")
    p.add_argument("--recipes", default="runs/recipes", type=Path, help="folder with trainings by other recipes")
    p.add_argument("--results", type=Path, help="folder; results, or results/NAME for weights/NAME.json, unless given")
    p.add_argument("--heatmaps", type=int, default=50, help="test X-rays whose heatmaps are studied")
    p.add_argument("--disturbed", type=int, default=200, help="test X-rays that are disturbed")
    p.add_argument(
        "--explainers",
        nargs="+",
        choices=list_explainers(),
        default=[DEFAULT],
        help="heatmaps that are laid on lesions",
    )
    p.add_argument("--explained", type=int, default=12, help="X-rays with lesions on which explainers are compared")
    p.add_argument(
        "--compare", nargs="+", choices=list_explainers(), default=(), help="the explainers that are compared; all"
    )
    p.add_argument(
        "--beside", nargs="+", type=Path, default=(), metavar="MANIFEST",
        help="other sets of weights, for kinds of networks that this one lacks, whose explainers are compared, too",
    )  # fmt: skip
    p.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these anew, keep the rest of evidence.json")
    p.add_argument("--record", action="store_true", help="write temperatures and headline into manifest, card, README")
    args = p.parse_args()
    study = Study(args.data, args.weights, args.cache, args.heatmaps, args.disturbed, tuple(args.explainers),
                  args.controls, args.recipes, args.explained, tuple(args.compare), tuple(args.beside))  # fmt: skip
    folder = results_folder(args.weights, args.results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evidence.json"
    evidence = begin(path, study)

    def keep() -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(evidence, indent=2) + "\n", encoding="utf-8")
        part.replace(path)  # what was measured stays, whatever interrupts the rest

    wanted = args.only or list(SECTIONS)
    for done, section in enumerate(wanted):
        start = time.perf_counter()
        try:
            measure(study, evidence, section, keep)
        except KeyboardInterrupt:
            rest = " ".join(wanted[done:])
            raise SystemExit(f"Interrupted; the same command with `--only {rest}` measures the rest.") from None
        print(f"{section}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    keep()
    (folder / "evidence.md").write_text(markdown(evidence), encoding="utf-8")
    measured = {name: m["calibration"] for name, m in evidence["models"].items() if "calibration" in m}
    if measured:
        calibration.draw(measured, folder / "reliability.png")
    print(markdown(evidence))
    if args.record:
        record(evidence, args.weights)


if __name__ == "__main__":
    run_verb(main)
