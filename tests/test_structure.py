"""The shape of the program: which way imports go, what is documented, how text is opened, and that it installs."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

PACKAGES = ("manet_core", "train", "ui")


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
IS_PACKAGE = {module_name(path) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
CORE = [name for name in TREES if name.startswith("manet_core.")]


def imports(name: str, nodes) -> set[str]:
    """The modules that `nodes` of the module `name` import, in full."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if name in IS_PACKAGE else name.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            inside = {f"{base}.{alias.name}" for alias in node.names} & TREES.keys()
            found |= inside or {base}
    return found


AT_START = {name: imports(name, tree.body) for name, tree in TREES.items()}
AT_ALL = {name: imports(name, ast.walk(tree)) for name, tree in TREES.items()}


def test_imports_go_one_way():
    """Within each package the modules can be put in an order in which each imports earlier ones only."""
    graph = {name: found & TREES.keys() - {name} for name, found in AT_START.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(TREES)  # a cycle raises


# What a room may import of manet_core beside itself, and never more than that.
ROOMS = {
    "files": {"preprocess"},
    "networks": {"preprocess", "tasks"},
    "explain": {"networks", "preprocess"},
    "tasks": set(),
    "preprocess": set(),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_data_has_passed_through_before(room):
    modules = [name for name in CORE if name.split(".")[1] == room]
    assert modules
    for name in modules:
        rooms = {(found.split(".") + [""])[1] for found in AT_ALL[name] if found.split(".")[0] == "manet_core"}
        assert rooms <= ROOMS[room] | {room}, name


@pytest.mark.parametrize("name", CORE)
def test_the_library_knows_neither_page_nor_training_nor_command_line(name):
    roots = {found.split(".")[0] for found in AT_ALL[name]}
    assert not roots & {"gradio", "train", "ui", "app", "accelerate", "albumentations", "sklearn"}
    assert "pandas" not in roots or name == "manet_core.table"
    assert "argparse" not in roots or name in ("manet_core.__main__", "manet_core.commands")


def test_training_does_not_know_the_page():
    for name in TREES:
        if name.split(".")[0] == "train":
            assert not {found.split(".")[0] for found in AT_ALL[name]} & {"gradio", "ui", "app"}, name


def test_a_task_is_no_matter_of_torch():
    assert {found.split(".")[0] for found in AT_ALL["manet_core.tasks"]} <= {"dataclasses", "numpy"}


def test_what_is_public_says_what_it_is():
    for name, tree in TREES.items():
        if name.split(".")[0] in ("manet_core", "train"):
            assert ast.get_docstring(tree), name
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{name}.{node.name}"


def handles_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = {part.value for part in call.args if isinstance(part, ast.Constant)}
    return (
        name in ("read_text", "write_text") or name == "open" and bool(modes & {"r", "w", "a", "x", "r+", "w+", "a+"})
    )


def test_text_files_have_an_encoding():
    """Without one, Windows writes and reads another than the rest of the world."""
    for path in [ROOT / "app.py", *(file for folder in PACKAGES for file in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and handles_text(node):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


LAZY = """
import sys
import manet_core
assert manet_core.XRay is manet_core.load_xray.__annotations__["return"]
from manet_core import CLASSES, list_tasks
assert len(CLASSES) == 5 and "manet" in list_tasks()
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
assert manet_core.Pipeline.__module__ == "manet_core.pipeline" and "torch" in sys.modules
from manet_core import *
assert {name for name in manet_core.__all__ if name not in globals()} == set()
"""


def test_reading_a_file_does_not_wait_for_pytorch():
    subprocess.run([sys.executable, "-c", LAZY], cwd=ROOT, check=True)


INSTALLED = """
import sys
from importlib.metadata import requires, version
import manet_core, train, ui
assert manet_core.__file__.startswith(sys.argv[1]) and version("manet") == manet_core.__version__
assert any(line.startswith("torch") for line in requires("manet"))
from manet_core import Pipeline, WeightsError, create_classifier
from ui.render import STYLE
assert STYLE.is_file()
try:
    Pipeline.load()
except WeightsError as error:
    print(error)
"""


def test_it_installs_as_a_package(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, source], check=True)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == set(PACKAGES)
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{INSTALLED}", site]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "no weights in" in run.stdout and run.stdout.count(".\n") == 1


def test_the_lock_pins_what_is_required():
    """requirements.lock has every requirement, in a version that it allows, with hashes; `make lock` renews it."""
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0]: line.split("==")[1].split()[0] for line in lines if re.match(r"[a-z0-9]", line)}
    assert len(pinned) > 100 and sum("--hash=sha256:" in line for line in lines) > len(pinned)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.partition("#")[0].strip():
            asked = Requirement(line.partition("#")[0])
            assert asked.specifier.contains(pinned[asked.name]), f"{asked} is not in requirements.lock; run make lock"
