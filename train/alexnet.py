"""COVID-19 or normal: AlexNet with attention and what its paper compares it with (Li, Ma, Yan 2021).

    python -m train.alexnet --data DATA --out runs/alexnet

trains what is missing below --out, goes on with what was interrupted, skips what is finished, and writes results.json
and tables.md there. Each network is trained on one source a class, as in the paper, and on several; some of them, as
controls, learn from one source a class with the lungs blacked out. A finished training is a folder
COMPOSITION/NETWORK/TRIAL of `train.classify`, which may also have been trained by hand. Shorter, for a CPU:

    python -m train.alexnet --data DATA --out runs/alexnet --trials 1 --epochs 4

`--report` trains nothing. What `--record` has put into a folder counts as well when it is named again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import torch
import torchvision
from safetensors.torch import load_file
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from manet_core import create_classifier
from manet_core.tasks import COVID
from manet_core.weights import sha256

from . import classify, imagenet, run_verb
from .data import LungPictures, lung_pictures, state
from .engine import device_of, start_from
from .measures.markdown import percent, table, write_results
from .measures.statistics import bootstrap_weights, mean, mean_over_trials, proportion
from .recipe import Recipe, Run, add_options, add_run_options, recipe_from, run_from
from .record import fingerprint

PAPERS = {  # network: (how people write it, the paper's accuracy, %)
    "forest": ("random forest", 78.0),
    "alexnet": ("AlexNet", 89.1),
    "resnet50_last": ("ResNet-50, last layer only", 77.6),
    "alexnet_attn1": ("AlexNet, attention after conv 4", 92.4),
    "alexnet_attn2": ("AlexNet, attention after conv 3 and 4", 96.8),
    "alexnet_attn3": ("AlexNet, attention after conv 2, 3 and 4", 94.4),
}
NETWORKS = {**PAPERS, "efficientnet_lite0_last": ("EfficientNet-Lite0, last layer only", None)}
ONE = "radiography_covid,rsna_normal"  # one source of each class
COMPOSITIONS = {
    "one": "one source a class",
    "several": "several sources a class",
    "outside": "one source a class, lungs blacked out",
}
CONTROLS = ("forest", "alexnet_attn2", "efficientnet_lite0_last")  # which also learn with the lungs blacked out
PLACES = {"one": "test, one source a class", "several": "test, several sources a class", "external": "external"}
Predictor = Callable[[LungPictures], np.ndarray]  # the probability of COVID-19 (N,) of a data set in its order


def trained(recipe: Recipe, run: Run) -> Predictor:
    """A network of `train.classify`; trains it unless it is finished."""
    if not (Path(run.out) / "result.json").exists():
        classify.train(recipe, run)
    net = create_classifier(recipe.model, num_classes=2)
    net.load_state_dict(load_file(Path(run.out) / "best.safetensors"))
    device = device_of(run)
    net.eval().to(device, memory_format=torch.channels_last)
    return lambda dataset: classify.predict(net, dataset, device, asked=COVID)[:, 1]


def _arrays(dataset: LungPictures, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """What is shown (N, S, S) float32 in [−1, 1] and the class numbers (N,) of a data set in its order."""
    shown = [image.numpy()[:, 0] for image, _, _ in tqdm(DataLoader(dataset, batch), "reading", unit="batch")]
    return np.concatenate(shown), dataset.labels


def forest(recipe: Recipe, run: Run) -> Predictor:
    """A random forest on flattened pixels: five trees on a first batch, two more on each that follows (warm start)."""
    images, labels = _arrays(lung_pictures(recipe, run, "train", task=COVID), recipe.batch)
    order = np.random.default_rng(recipe.seed).permutation(len(labels))
    trees = RandomForestClassifier(5, warm_start=True, random_state=recipe.seed)
    for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
        some = order[start : start + recipe.batch]
        if start:
            trees.n_estimators += 2
        trees.fit(images[some].reshape(recipe.batch, -1), labels[some])
    return lambda dataset: trees.predict_proba(_arrays(dataset, recipe.batch)[0].reshape(len(dataset), -1))[:, 1]


def last_layer(recipe: Recipe, run: Run, body: nn.Module, channels: int) -> Predictor:
    """A new last layer, a logistic regression, on the features (B, C) of a body with ImageNet weights."""
    device = device_of(run)
    body.eval().to(device)

    @torch.inference_mode()
    def features(dataset: LungPictures) -> np.ndarray:
        batches = tqdm(DataLoader(dataset, 32), "features", unit="batch of 32")
        return np.concatenate([body(x.expand(-1, channels, -1, -1).to(device)).cpu().numpy() for x, _, _ in batches])

    train_set = lung_pictures(recipe, run, "train", task=COVID)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    fitted.fit(features(train_set), train_set.labels)
    return lambda dataset: fitted.predict_proba(features(dataset))[:, 1]


def resnet50_last(recipe: Recipe, run: Run) -> Predictor:
    """ResNet-50 with ImageNet weights, which torchvision fetches.

    Raises:
        SystemExit: they can't be fetched.
    """
    try:
        net = torchvision.models.resnet50(weights="IMAGENET1K_V2")
    except (URLError, OSError) as error:
        raise SystemExit(
            f"ResNet-50's ImageNet weights cannot be fetched ({error}): leave resnet50_last out, or try where there is "
            "internet."
        ) from None
    net.fc = nn.Identity()
    mean_, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return last_layer(recipe, run, nn.Sequential(_Scaled(mean_, std), net), 3)


class _Scaled(nn.Module):
    """From [−1, 1] to the mean and the standard deviation that ImageNet's networks are used to."""

    def __init__(self, mean_: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean_)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) / 2 - self.mean) / self.std


class _Pooled(nn.Module):
    """The features of one of our classifiers, averaged over all places."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(x).mean((2, 3))


def efficientnet_lite0_last(recipe: Recipe, run: Run) -> Predictor:
    """EfficientNet-Lite0, whose ImageNet weights come as a package: for where ResNet-50's cannot be fetched."""
    net = create_classifier("efficientnet_lite0")
    start_from(net, {k: v for k, v in imagenet.efficientnet_lite0().items() if not k.startswith("classifier.")})
    return last_layer(recipe, run, _Pooled(net), 1)


def train_and_answer(recipe: Recipe, run: Run, network: str, rows: dict[str, pd.DataFrame], one: str) -> dict:
    """One training, and the probability of COVID-19, in thousandths, of the X-rays of each place in `rows`.

    Both are kept in its folder: {"weights", "epochs", "places": {place: (N,)}}.
    """
    makers = {"forest": forest, "resnet50_last": resnet50_last, "efficientnet_lite0_last": efficientnet_lite0_last}
    result, kept = Path(run.out) / "result.json", Path(run.out) / "answers.json"
    known = sha256(Path(run.out) / "best.safetensors")[:12] if result.exists() else ""
    if kept.exists():
        answers = json.loads(kept.read_text(encoding="utf-8"))
        if (answers["weights"], answers.pop("state", "")) == (known, state(run)):
            return answers
    Path(run.out).mkdir(parents=True, exist_ok=True)
    predict = makers[network](recipe, run) if network in makers else trained(recipe, run)
    answers: dict = {"weights": "", "epochs": None, "places": {}}
    if result.exists():
        answers["weights"] = sha256(Path(run.out) / "best.safetensors")[:12]
        answers["epochs"] = len(pd.read_csv(Path(run.out) / "log.csv"))
    for place in ["one"] if recipe.sees == "outside" else rows:
        p = predict(dataset_of(place, recipe, run, one))
        answers["places"][place] = np.rint(1000 * p).astype(int).tolist()
    kept.write_text(json.dumps(answers | {"state": state(run)}) + "\n", encoding="utf-8")
    return answers


def followed(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe of a finished training in `folder`, which may have been another than `recipe`, without its paths."""
    settings = folder / "settings.json"
    if settings.exists():
        recipe = Recipe.of(json.loads(settings.read_text(encoding="utf-8")))
    return replace(recipe, init=recipe.init and Path(recipe.init).name)


def dataset_of(place: str, recipe: Recipe, run: Run, one: str) -> LungPictures:
    """The X-rays of one of `PLACES`, shown as the recipe has it; `one` names the sources of the first of them."""
    recipe = replace(recipe, sources=one if place == "one" else None)
    return lung_pictures(recipe, run, "external" if place == "external" else "test", task=COVID)


def places_of(recipe: Recipe, run: Run, one: str) -> dict[str, pd.DataFrame]:
    """{place: its rows of the index, in the order of all answers}, for those of `PLACES` that have both classes."""
    datasets = {place: dataset_of(place, replace(recipe, sees="whole"), run, one) for place in PLACES}
    rows = {place: dataset.pictures.index.iloc[dataset.rows] for place, dataset in datasets.items()}
    return {place: found for place, found in rows.items() if found.label.nunique() == 2}


def figures(answers: list[np.ndarray], rows: pd.DataFrame) -> dict:
    """Accuracy, sensitivity, specificity with 95 % intervals over patients, and AUROC: means over trials.

    Args:
        answers: the probability of COVID-19 (N,), in thousandths, of each trial.
        rows: of the index, (N,).
    """
    covid, patients = (rows.label == "COVID-19").to_numpy(), rows.patient.to_numpy()
    right = correct(answers, covid)

    def share(which: np.ndarray) -> dict:
        if len(answers) == 1:
            return proportion(right[which] == 1, patients[which])
        return mean(right[which], bootstrap_weights(patients[which]))

    return {
        "n": len(rows),
        "covid": int(covid.sum()),
        "accuracy": share(np.ones(len(rows), bool)),
        "sensitivity": share(covid),
        "specificity": share(~covid),
        "auroc": float(np.mean([roc_auc_score(covid, p) for p in answers])),
    }


def correct(answers: list[np.ndarray], covid: np.ndarray) -> np.ndarray:
    """The share of trials (N,) that are right, of answers (N,) in thousandths; `covid` (N,) bool is the truth."""
    return np.mean([(np.asarray(p) > 500) == covid for p in answers], 0)


def summarise(runs: list[dict], rows: dict[str, pd.DataFrame]) -> dict:
    """What the trainings come to: the figures of each network and composition, and attentions compared in pairs.

    Pairs are of networks that were trained for as many epochs, from the same kind of start.
    """
    out: dict = {"compositions": {}, "pairs": {}}
    for composition in dict.fromkeys(run["composition"] for run in runs):
        mine = [run for run in runs if run["composition"] == composition]
        found = out["compositions"][composition] = {}
        for network in (name for name in NETWORKS if any(run["network"] == name for run in mine)):
            trials = [run for run in mine if run["network"] == network]
            fine_tuned = any(run["recipe"]["init"] for run in trials)
            about = {"trials": len(trials), "epochs": [run["epochs"] for run in trials], "fine_tuned": fine_tuned}
            found[network] = about | {
                place: figures([run["places"][place] for run in trials], rows[place]) for place in trials[0]["places"]
            }
        length = {name: (set(figure["epochs"]), figure["fine_tuned"]) for name, figure in found.items()}
        attended = [name for name in found if name.startswith("alexnet_attn")]
        pairs = {
            f"{a} - {b}": difference(*([run for run in mine if run["network"] == name] for name in (a, b)), rows["one"])
            for a in attended
            for b in ("alexnet", *attended)
            if b in found and b < a and length[a] == length[b]
        }
        out["pairs"][composition] = {pair: figure for pair, figure in pairs.items() if figure}
    return out


def difference(a: list[dict], b: list[dict], rows: pd.DataFrame) -> dict | None:
    """Accuracy of a network minus that of another, by trials of the same seed; None without one.

    The interval resamples patients and, where there are several, trials.
    """
    covid = (rows.label == "COVID-19").to_numpy()
    right = [{run["trial"]: correct([run["places"]["one"]], covid) for run in runs} for runs in (a, b)]
    gaps = [right[0][trial] - right[1][trial] for trial in sorted(right[0].keys() & right[1].keys())]
    return mean_over_trials(np.array(gaps), rows.patient.to_numpy()) if gaps else None


def markdown(results: dict) -> str:
    """The tables."""
    lines = [
        "Accuracy, sensitivity for COVID-19 and specificity, % (95 % CI over patients), means over trials. *External*: "
        "hospitals that no network was trained on, nearly all of them COVID-19.",
        "",
    ]
    for composition, networks in results["compositions"].items():
        places = next(iter(networks.values())).keys() & PLACES.keys()
        for place in (p for p in PLACES if p in places):
            rows = []
            for name, found in networks.items():
                title, paper = NETWORKS[name]
                epochs = "/".join(map(str, sorted({e for e in found["epochs"] if e}))) or "–"
                epochs += ", from other weights" * found["fine_tuned"]
                f = found[place]
                cells = [percent(f["accuracy"]), percent(f["sensitivity"]), percent(f["specificity"])]
                said = "–" if paper is None or place != "one" or composition != "one" else f"{paper:.1f}"
                rows.append([title, found["trials"], epochs, said, *cells, f"{f['auroc']:.3f}"])
            first = next(iter(networks.values()))[place]
            lines += [
                f"**Trained on {COMPOSITIONS[composition]}; {PLACES[place]}**, "
                f"n = {first['n']}, {first['covid']} with COVID-19",
                "",
            ]
            head = ["network", "trials", "epochs", "paper, %", "accuracy", "sensitivity", "specificity", "AUROC"]
            lines += table(head, rows)
    for composition, pairs in results["pairs"].items():
        if pairs:
            lines += [
                f"Differences of accuracy, points, trained on {COMPOSITIONS[composition]}, in pairs of networks that "
                "were trained for as many epochs, from the same seeds (95 % CI over patients and trials):",
                "",
            ]
            lines += table(
                ["pair", "trials", "difference"], [[name, f["trials"], percent(f)] for name, f in pairs.items()]
            )
    return "\n".join(lines[:-1]) + "\n"


def recorded(path: Path, runs: list[dict], tested: dict[str, str]) -> list[dict]:
    """The runs of a runs.json that are not among `runs` and were tested on the same X-rays, `tested` by place."""
    known = {(run["composition"], run["network"], run["trial"]) for run in runs}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    other = [run for run in kept if any(tested.get(place) != run["tested"][place] for place in run["places"])]
    for run in other:
        print(f"{path}: {run['network']}, trial {run['trial']}, was tested on other X-rays and is left out")
    return [r for r in kept if r not in other and (r["composition"], r["network"], r["trial"]) not in known]


def main() -> None:
    """Train and report from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(PAPERS), metavar="NETWORK")
    p.add_argument("--compositions", nargs="+", choices=COMPOSITIONS, default=list(COMPOSITIONS), metavar="NAME")
    p.add_argument("--trials", type=int, default=3)
    p.add_argument("--one", default=ONE, metavar="A,B", help=f"the one source of each class (default: {ONE})")
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument("--record", type=Path, metavar="DIR", help="keep results and answers there: results/alexnet")
    add_run_options(p)
    add_options(p, "classify", leave_out=("task", "model", "seed", "sees", "sources", "split", "findings"))
    p.set_defaults(recipe="alexnet")
    args = p.parse_args()
    recipe, run = recipe_from(args, "classify"), run_from(args)
    rows = places_of(recipe, run, args.one)
    if "one" not in rows:
        raise SystemExit(f"The test split of {args.data} lacks COVID-19 or normal X-rays from {args.one}: name others.")
    tested = {place: fingerprint(found) for place, found in rows.items()}
    runs, missing = [], []
    wanted = [
        (composition, network, trial)
        for trial in range(args.trials)
        for composition in args.compositions
        for network in args.networks
        if composition != "outside" or network in CONTROLS
    ]
    for composition, network, trial in wanted:
        folder = Path(args.out) / composition / network / str(trial)
        mine = replace(recipe, seed=trial, sources=None if composition == "several" else args.one)
        if composition == "outside":
            mine = replace(mine, sees="outside")
        if network.startswith("alexnet"):
            mine = replace(mine, model=network)
        if args.report and not any((folder / name).exists() for name in ("result.json", "answers.json")):
            continue
        print(f"{network}, {COMPOSITIONS[composition]}, trial {trial}", flush=True)
        try:
            answers = train_and_answer(mine, replace(run, out=str(folder)), network, rows, args.one)
        except SystemExit as problem:
            if network != "resnet50_last":
                raise
            missing.append(str(problem))
            continue
        recipe_said = asdict(followed(folder, mine))
        identity = {"composition": composition, "network": network, "trial": trial, "recipe": recipe_said}
        runs.append(identity | answers | {"tested": {place: tested[place] for place in answers["places"]}})
    for sentence in dict.fromkeys(missing):
        print(sentence)
    if args.record:
        runs += recorded(args.record / "runs.json", runs, tested)
    if not runs:
        raise SystemExit(f"There is no finished training below {args.out}: leave --report away.")
    order = [*COMPOSITIONS, *NETWORKS]
    runs.sort(key=lambda r: (order.index(r["composition"]), order.index(r["network"]), r["trial"]))
    results = summarise(runs, rows)
    write_results(results, markdown(results), Path(args.out), args.record)
    if args.record:
        lines = ",\n".join(map(json.dumps, runs))
        (args.record / "runs.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    run_verb(main)
