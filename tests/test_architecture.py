"""The floor plan: which module may import which, where imports stand, and that every flag is read."""

import ast
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from models.evaluation.jobs import Options
from models.training import Settings

SCRIPTS = ["view_interactive_4pane_brats", "preprocess_brats", "train_unet", "train_swinunetr", "evaluate",
           "benchmark_inference"]  # fmt: skip
# A module imports from its own floor and those above it in this list; "models" is models/__init__.py, build_model.
FLOORS = [
    {"errors", "files", "interruption", "cli", "memory", "records", "device", "timing"},
    {"brats", "labels", "nifti", "cases", "volumes", "manifest", "preprocessing", "cohort", "patches", "tensors",
     "dataset", "augment", "augment_strong", "copy_paste", "phantom"},
    {"unet", "swinunetr", "onednn"},
    {"models"},
    {"losses", "runs", "resuming", "checkpoints", "pretrained", "amp", "training", "final_test", "cost", "surfaces",
     "lesions", "metrics", "plots"},
    {"inference"},
    {"evaluation", "benchmark", "viewer"},
    {*SCRIPTS},
]
NETWORKS = FLOORS[2]
# Scripts in all but their place: nothing imports them.
COMMANDS = {"models.pretrained", "models.swinunetr.import_weights"}
MAX_DELAYED_IMPORTS = 5


def modules() -> dict[str, Path]:
    """Module name -> file, of models/ and the scripts."""
    files = [*ROOT.glob("models/**/*.py"), *(ROOT / f"{script}.py" for script in SCRIPTS)]
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {".".join(part for part in parts[file] if part != "__init__"): file for file in files}


def imports_of(file: Path, known) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= names & known or {node.module}
            imported |= {node.module} if names - known else set()
    return imported & known


def graph() -> dict[str, set[str]]:
    files = modules()
    edges = {name: imports_of(file, files.keys()) - {name} for name, file in files.items()}
    edges["models"] |= {name for name in files if name in ("models.unet", "models.swinunetr")}  # by import_module
    return edges


def room(module: str) -> str:
    """models.inference.predict is in the room "inference"; models/__init__.py in "models"."""
    return module.split(".")[min(1, module.count("."))]


def floor(module: str) -> int:
    if module in COMMANDS:
        return len(FLOORS) - 1
    (found,) = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    return found


def test_every_module_has_one_room():
    for module in modules():
        assert sum(room(module) in rooms for rooms in FLOORS) == 1, module


def test_no_import_goes_in_a_circle():
    assert list(TopologicalSorter(graph()).static_order())


def test_no_import_goes_up():
    for module, others in graph().items():
        assert not {other for other in others if floor(other) > floor(module)}, module


def test_networks_are_imported_by_the_package_alone():
    importers = {module for module, others in graph().items() if any(room(other) in NETWORKS for other in others)}
    assert {module for module in importers if room(module) not in NETWORKS} == {"models"}


def test_neighbours_on_the_floor_below_the_scripts_do_not_import_each_other():
    for module, others in graph().items():
        if floor(module) == len(FLOORS) - 2:
            assert {room(other) for other in others if floor(other) == floor(module)} <= {room(module)}, module


def test_imports_stand_at_the_top_of_a_module():
    """But for a few, and those that say why in a comment, such as an optional package."""
    delayed = []
    for name, file in modules().items():
        if name == "models" or name in SCRIPTS:
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        for function in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import | ast.ImportFrom) and "#" not in lines[node.lineno - 1]:
                        delayed.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert len(set(delayed)) <= MAX_DELAYED_IMPORTS, sorted(set(delayed))


def names_read(source: str, owner: str) -> set[str]:
    """Every `name` in `owner.name` of a program."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == owner}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *["RUN"] * (script == "evaluate")])
    flags = vars(import_module(script).arguments()).keys() - {"debug"}  # cli.run looks for that one
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    read = names_read(source, "args")
    for kind, call in ((Settings, "training.Settings"), (Options, "jobs.Options")):
        if f"settings_of(args, {call})" in source:
            read |= {field.name for field in fields(kind)}
    assert not flags - read


def test_every_setting_of_a_training_is_read():
    files = [ROOT / "models" / name for name in ("training.py", "checkpoints.py")]
    read = set().union(*(names_read(file.read_text(encoding="utf-8"), "settings") for file in files))
    assert {field.name for field in fields(Settings)} == read


def test_every_option_of_an_evaluation_is_read():
    files = (ROOT / "models/evaluation").glob("*.py")
    read = set().union(*(names_read(file.read_text(encoding="utf-8"), "options") for file in files))
    assert {field.name for field in fields(Options)} <= read
