"""What is kept of a finished training when its folder is gone: runs.json, which the next report adds to.

Of every X-ray of the test split it holds the class that was given, one digit,
and nothing of the X-ray itself.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from manet_core import CLASSES

IDENTITY = ("split", "model", "trial")


def tested_rows(indices: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """{split: the rows of its index that are tested on}, in the order of every run's `called`."""
    return {name: rows[(rows.split == "test") & rows.label.isin(CLASSES)] for name, rows in indices.items()}


def fingerprint(tested: pd.DataFrame) -> str:
    """Tells one test split from another: a hash of its labels and patients in their order."""
    return hashlib.sha256("\n".join(tested.label + " of " + tested.patient).encode()).hexdigest()[:12]


def read_runs(path: Path, found: list[dict], tested: dict[str, pd.DataFrame]) -> list[dict]:
    """The recorded runs that are not among `found`; those that were tested on other X-rays are named and left out."""
    known, runs = {tuple(run[key] for key in IDENTITY) for run in found}, []
    for run in json.loads(path.read_text()) if path.exists() else []:
        if run.pop("test") != fingerprint(tested[run["split"]]):
            print(f"{path}: {run['model']}, trial {run['trial']}, was tested on other X-rays and is left out")
        elif tuple(run[key] for key in IDENTITY) not in known:
            runs.append(run | {"called": np.array(list(run["called"]), int)})
    return runs


def write_runs(path: Path, runs: list[dict], tested: dict[str, pd.DataFrame]) -> None:
    """Write what `read_runs` reads, a line a run."""
    lines = []
    for run in runs:
        row = {key: run[key] for key in (*IDENTITY, "recipe", "accuracy")}
        row |= {"called": "".join(map(str, run["called"])), "test": fingerprint(tested[run["split"]])}
        lines.append(json.dumps(row))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
