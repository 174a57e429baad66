"""The command line, as a user calls it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from manet_core.__main__ import main


def test_analyze_writes_a_panel_and_results_in_order(picture, random_weights, tmp_path, capsys):
    bad, out = tmp_path / "bad.png", tmp_path / "out"
    bad.write_bytes(b"not a picture")
    other = tmp_path / "other" / "chest.png"
    other.parent.mkdir()
    other.write_bytes(picture.read_bytes())
    status = main(["analyze", str(picture), str(bad), str(other), "--out", str(out), "--weights", str(random_weights)])
    assert status == 1
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [r["file"] for r in results] == [str(picture), str(bad), str(other)]
    assert results[1].keys() == {"file", "error"} and results[1]["error"].endswith(".")
    assert len(results[0]["readings"]) == 3 and results[0]["readings"] == results[2]["readings"]
    assert sorted(p.name for p in out.iterdir()) == ["chest.png-2.png", "chest.png.png", "results.json"]
    panel = np.asarray(Image.open(out / "chest.png.png").convert("L"))
    assert panel.shape[0] > 500 and panel.std() > 10
    captured = capsys.readouterr()
    assert "bad.png" in captured.err and "efficientnet_lite0_ma" in captured.out


def test_analyze_json_and_chosen_models(picture, random_weights, tmp_path, capsys):
    arguments = ["analyze", str(picture), "--out", str(tmp_path / "o"), "--weights", str(random_weights), "--json"]
    assert main([*arguments, "--models", "efficientnet_lite0_ma"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert list(result["readings"]) == ["efficientnet_lite0_ma"]


def test_networks_of_many_tasks(picture, many_tasks, tmp_path, capsys):
    out = tmp_path / "o"
    assert main(["analyze", str(picture), "--out", str(out), "--weights", str(many_tasks)]) == 0
    (result,) = json.loads((out / "results.json").read_text(encoding="utf-8"))
    readings, table = result["readings"], capsys.readouterr().out
    assert [len(r["probabilities"]) for r in readings.values()] == [5, 3, 14, 5]
    findings = readings["efficientnet_lite0_cbam"]["probabilities"]
    for name, p in findings.items():
        assert (f"{name} {p:.1%}" in table) == (p >= 0.5)
    assert main(["models", "--weights", str(many_tasks)]) == 0
    assert "nih14     weights" in capsys.readouterr().out


def test_results_can_be_read_at_any_moment(picture, random_weights, tmp_path, monkeypatch):
    from manet_core import commands

    seen, out = [], tmp_path / "o"

    def look(*args, **kwargs):
        seen.append(len(json.loads((out / "results.json").read_text(encoding="utf-8"))))
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_SAVE_S", 0)
    monkeypatch.setattr(commands, "save_report", look)
    arguments = [*[str(picture)] * 4, "--out", str(out), "--weights", str(random_weights), "--models", ""]
    assert main(["analyze", *arguments]) == 130
    assert seen == [0, 1, 2] and len(json.loads((out / "results.json").read_text(encoding="utf-8"))) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal of POSIX")
def test_ctrl_c_while_torch_is_loaded_is_no_traceback(tmp_path):
    """The signal comes as soon as torch's import has begun, which takes seconds."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may have had it ignored
        "class Finder:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import runpy; sys.argv = ['manet_core', 'models']; runpy.run_module('manet_core', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_models_are_listed(random_weights, tmp_path, capsys):
    assert main(["models", "--weights", str(random_weights)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = {line.split()[0]: line for line in lines}
    assert row["efficientnet_lite0_ma"].endswith("  weights") and "3.38 M" in row["efficientnet_lite0_ma"]
    assert row["resnet50_cbam"].endswith("no weights")
    assert main(["models", "--weights", str(tmp_path)]) == 0
    assert "manifest.json is missing" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(random_weights):
    command = [sys.executable, "-u", "-m", "manet_core", "models", "--weights", random_weights]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_usage_and_missing_weights_end_with_two(picture, random_weights, tmp_path, capsys):
    for arguments in ([], ["analyze"], ["analyze", str(picture)], ["nonsense"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    out = ["--out", str(tmp_path / "o")]
    assert main(["analyze", str(picture), *out, "--weights", str(tmp_path)]) == 2
    assert main(["analyze", str(picture), *out, "--weights", str(random_weights), "--models", "resnet99"]) == 2
    assert "resnet99" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be", encoding="utf-8")
    assert main(["analyze", str(picture), "--out", str(taken), "--weights", str(random_weights)]) == 2
    assert "choose another --out" in capsys.readouterr().err
