"""The command line, as a user calls it."""

import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from manet_core import Pipeline, commands, results
from manet_core.__main__ import main


def analyze(images, out, weights, *options) -> tuple[int, list[dict]]:
    """Exit status and results of `analyze` with one network."""
    arguments = [*map(str, images), "--out", str(out), "--weights", str(weights), "--models", "efficientnet_lite0_ma"]
    status = main(["analyze", *arguments, *options])
    return status, json.loads((out / "results.json").read_text(encoding="utf-8"))


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


def test_networks_of_many_tasks(picture, many_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("manet_core.pipeline.implausible", lambda *args: False)  # as the random segmenter's masks are
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_results_can_be_read_at_any_moment_and_what_is_finished_is_kept(
    picture, random_weights, tmp_path, monkeypatch, number
):
    seen, out = [], tmp_path / "o"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have had it ignored

    def look(*args, **kwargs):
        seen.append(len(json.loads((out / "results.json").read_text(encoding="utf-8"))))
        if len(seen) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(results, "_EVERY_S", 0)
    monkeypatch.setattr(results, "_SHARE", float("inf"))
    monkeypatch.setattr(commands, "save_report", look)
    try:
        status, found = analyze([picture] * 4, out, random_weights)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130 and seen == [0, 1, 2] and len(found) == 2


def test_a_full_disk_is_told_and_loses_nothing(picture, random_weights, tmp_path, monkeypatch, capsys):
    written = []

    def write(path, data, replace_file=results.replace_file):
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(path, data)

    monkeypatch.setattr(commands, "replace_file", write)
    status, found = analyze([picture] * 3, tmp_path / "o", random_weights)
    assert status == 2 and len(found) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "o").glob("*.part"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    results.replace_file(path, b"[]")
    with pytest.raises(TypeError):
        results.replace_file(path, "no bytes")
    assert path.read_bytes() == b"[]" and list(tmp_path.iterdir()) == [path]


def test_two_processes_of_one_folder_do_not_mix_up_their_files(tmp_path, monkeypatch):
    replace = Path.replace

    def meanwhile(part, path):
        monkeypatch.setattr(Path, "replace", replace)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            results.replace_file(tmp_path / "b", b"of the other")
        return replace(part, path)

    monkeypatch.setattr(Path, "replace", meanwhile)
    results.replace_file(tmp_path / "a", b"of this one")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"of this one", "b": b"of the other"}


def test_results_that_somebody_has_open_are_saved_next_time(tmp_path, monkeypatch):
    """On Windows, where such a file cannot be replaced."""
    replace, taken = results.replace_file, []

    def write(path, data):
        if taken:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(path, data)

    monkeypatch.setattr(results, "_EVERY_S", -1)
    monkeypatch.setattr(results, "_SHARE", float("inf"))
    monkeypatch.setattr(results, "replace_file", write)
    known = results.Results(tmp_path)
    for name, by in (("a", []), ("b", ["a reader"]), ("c", ["a reader"])):
        taken[:] = by
        known.refuse(name, "It is no film.")
    assert [entry["file"] for entry in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))] == ["a"]
    with pytest.raises(PermissionError):
        known.save()
    taken.clear()
    known.refuse("d", "It is no film.")
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == known.json() + "\n" and "d" in known.json()


def test_a_name_beyond_the_code_page_is_printed_all_the_same(picture, random_weights, tmp_path, monkeypatch):
    """As on Windows, where the output goes into a file."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", printed)
    film = picture.rename(tmp_path / "胸ß.png")
    status, (found,) = analyze([film], tmp_path / "o", random_weights, "--no-panels")
    printed.flush()
    assert status == 0 and found["file"].endswith("胸ß.png")
    assert "\\u80f8ß.png" in printed.buffer.getvalue().decode("cp1252")


def test_file_names_are_only_names(picture, random_weights, tmp_path, monkeypatch, capfd):
    """What mathematics, a spreadsheet, a terminal, a file system or a font make of them."""
    names = ["=1\x1b[2J$\\frac$.png", f"{'c' * 251}.png", f"{'c' * 248}胸.png"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(picture.read_bytes())
    status, found = analyze(names, tmp_path / "o", random_weights, "--csv")
    printed, errors = capfd.readouterr()
    assert status == 0 and [entry["file"] for entry in found] == names and all("readings" in entry for entry in found)
    assert len(list((tmp_path / "o").glob("*.png"))) == len(names)
    assert "Warning" not in errors and "\x1b" not in printed and "胸.png" in printed
    with (tmp_path / "o" / "results.csv").open(encoding="utf-8", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [f"'{names[0]}", *names[1:]]


def test_a_folder_is_read_by_name_and_what_is_no_picture_is_left_out(picture, random_weights, tmp_path):
    folder, data = tmp_path / "films", picture.read_bytes()
    out = folder / "out"
    for name in ("b.png", "A.PNG", ".hidden.png", "notes.txt", "within/c.png", "within/deeper/d.png", "out/e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "IM0001").write_bytes(bytes(128) + b"DICM")  # cut short, yet DICOM
    status, found = analyze([folder], out, random_weights, "--no-panels")
    assert status == 1 and [entry["file"] for entry in found] == [str(folder / n) for n in ("A.PNG", "IM0001", "b.png")]
    assert ["error" in entry for entry in found] == [False, True, False]
    (folder / "IM0001").unlink()
    status, found = analyze([picture, folder], out, random_weights, "--no-panels", "--recursive")
    inside = [str(folder / name) for name in ("A.PNG", "b.png", "within/c.png", "within/deeper/d.png")]
    assert status == 0 and [entry["file"] for entry in found] == [str(picture), *inside]
    assert sorted(path.name for path in out.iterdir()) == ["e.png", "results.json"]


def test_without_panels_heatmaps_are_made_only_on_request(picture, random_weights, tmp_path):
    for options, classes in (([], 0), (["--explainer", "gradcam"], 5)):
        _, (found,) = analyze([picture], tmp_path / "o", random_weights, "--no-panels", *options)
        assert len(found["readings"]["efficientnet_lite0_ma"]["in_lung"]) == classes
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["results.json"]


def test_no_class_is_named_where_it_is_withheld(random_weights, tmp_path, capsys):
    black = tmp_path / "black.png"
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(black)
    _, (found,) = analyze([black], tmp_path / "o", random_weights, "--csv")
    reading = found["readings"]["efficientnet_lite0_ma"]
    assert found["reliable"] is False and "one grey level" in found["withheld"][0]
    assert reading["predicted"] in reading["probabilities"], "who wants to look finds it here"
    printed = capsys.readouterr().out
    assert "no reliable reading" in printed and not any(name in printed for name in reading["probabilities"])
    with (tmp_path / "o" / "results.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["predicted"] == "no reliable reading" and row["reliable"] == "False"
    assert row["withheld"] == " ".join(found["withheld"])
    assert float(row["Tuberculosis"]) == pytest.approx(reading["probabilities"]["Tuberculosis"], abs=1e-4)


def test_a_film_that_breaks_the_analysis_costs_no_other_its_result(picture, random_weights, tmp_path, monkeypatch):
    small = tmp_path / "small.png"
    Image.open(picture).resize((70, 80)).save(small)
    analyze_one = Pipeline._analyze

    def fail(self, xrays, *options):
        if any(x.pixels.shape == (80, 70) for x in xrays):
            raise RuntimeError("not for everybody's eyes")
        return analyze_one(self, xrays, *options)

    monkeypatch.setattr(Pipeline, "_analyze", fail)
    status, found = analyze([picture, small, picture], tmp_path / "o", random_weights, "--no-panels")
    assert status == 1 and ["error" in entry for entry in found] == [False, True, False]
    assert "RuntimeError" in found[1]["error"] and "everybody" not in found[1]["error"]


def test_a_panel_that_cannot_be_drawn_costs_no_reading(picture, random_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "save_report", lambda *args, **options: 1 / 0)
    status, (found,) = analyze([picture], tmp_path / "o", random_weights)
    assert status == 1 and "panel" in found["fault"] and found["readings"]
    assert found["fault"] in capsys.readouterr().err


def test_help_comes_without_the_library(tmp_path):
    """PyTorch takes seconds to import, and NumPy a fifth of one."""
    code = (
        "import sys, manet_core; from manet_core.__main__ import main\n"
        "try: main(['analyze', '--help'])\n"
        "finally: print(*({'torch', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == ""
    assert "examples:" in done.stdout and "--recursive" in done.stdout


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


def test_arguments_are_checked_before_the_weights_are_loaded(picture, random_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "load", lambda *args: pytest.fail("the weights were loaded"))
    empty, out = tmp_path / "empty", tmp_path / "o"
    (empty / "within").mkdir(parents=True)
    wrong = {
        (picture, "--explainer", "tarot"): "tarot",
        (picture, "--models", "resnet99"): "resnet99.*efficientnet_lite0_ma",
        (empty,): "no picture.*--recursive",
        (empty, "--recursive"): "no picture",
        (empty, "--out", empty): "choose another --out",
    }
    for arguments, said in wrong.items():
        options = ["--out", str(out), "--weights", str(random_weights), *map(str, arguments)]
        assert main(["analyze", *options]) == 2
        assert re.search(said, capsys.readouterr().err)
    status, (found,) = analyze([tmp_path / "nowhere.png"], out, random_weights)
    assert status == 1 and "no such file" in found["error"]
    assert capsys.readouterr().err.count("nowhere.png") == 1
