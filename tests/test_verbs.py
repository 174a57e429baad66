"""What all verbs of train/ have in common."""

import signal
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from manet_core import CLASSES


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
@pytest.mark.parametrize(
    ("verb", "options", "rows", "moment"),
    [
        ("segment", ["--size", "64", "--out", "{tmp}/out"], 3000, "decoding:"),
        ("refit", ["--weights", "{weights}"], 300, "segmenting:"),
    ],
)
def test_ctrl_c_ends_a_verb_with_a_sentence(phantoms, random_weights, tmp_path, verb, options, rows, moment):
    """A real SIGINT, as soon as the progress bar is there."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index["image"], index["mask"] = (str(phantoms) + "/" + index[column] for column in ("image", "mask"))
    many = pd.concat([index] * (rows // len(index)), ignore_index=True)
    many["label"] = [CLASSES[i % 5] for i in range(len(many))]
    many.to_csv(tmp_path / "index.csv", index=False)
    options = [option.format(tmp=tmp_path, weights=random_weights) for option in options]
    process = subprocess.Popen(
        [sys.executable, "-m", f"train.{verb}", "--data", tmp_path, "--cache", tmp_path / "cache", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    said = ""
    while moment not in said and (character := process.stderr.read(1)):
        said += character
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=120)[1]
    assert "Interrupted; give the same command again" in said and "Traceback" not in said, said
    assert process.returncode == 130


def test_every_verb_ends_so():
    verbs = [path for path in ROOT.glob("train/*.py") if "__name__ ==" in path.read_text(encoding="utf-8")]
    assert len(verbs) >= 9
    for path in verbs:
        text = path.read_text(encoding="utf-8")
        assert text.endswith('\n\nif __name__ == "__main__":\n    run_verb(main)\n'), path
