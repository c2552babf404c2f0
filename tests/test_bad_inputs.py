"""Broken and hostile inputs: see bad_inputs.py, which prints what each of them gets."""

import ast
import os
import pickle

import pytest
import torch
from bad_inputs import in_sandbox
from conftest import ROOT
from fuzz_readers import CORPUS, reader_of

from models.errors import InputError
from models.records import misfit
from models.runs import load_checkpoint
from models.tensors import load_case


class Payload:
    """What Python's own unpickler runs."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.slow
def test_every_broken_or_hostile_input_gets_one_line_and_does_no_harm(tmp_path):
    outcome = in_sandbox(tmp_path, [])
    assert len(outcome["rows"]) >= 60
    assert outcome["wrong"] == []


def calls_of_torch_load(tree: ast.AST) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [call for call in calls if ast.unparse(call.func) in ("torch.load", "torch.serialization.load")]


def test_no_file_is_loaded_with_the_code_that_may_be_in_it():
    found = 0
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or path.name == "test_bad_inputs.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in calls_of_torch_load(tree):
            found += 1
            weights_only = [word.value.value for word in call.keywords if word.arg == "weights_only"]
            assert weights_only == [True], f"{path}:{call.lineno}"
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        loads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("load", "loads")]
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & imported or not [
            node for node in loads if ast.unparse(node).startswith(("pickle.", "dill.", "joblib.", "cloudpickle."))
        ], path
    assert found > 2


@pytest.mark.parametrize("read", [load_case, load_checkpoint])
@pytest.mark.parametrize("write", [lambda content, path: path.write_bytes(pickle.dumps(content)), torch.save])
def test_the_code_in_a_file_does_not_run(tmp_path, read, write):
    write({"model": Payload(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="damaged"):
        read(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
    with (tmp_path / "x.pt").open("wb") as file:
        pickle.dump(Payload(tmp_path / "ran"), file)
    pickle.loads((tmp_path / "x.pt").read_bytes())  # it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("value", "form", "wrong"), [
    ({"a": 1, "more": 2}, {"a": int, "b?": str}, None),
    ({}, {"a": int}, "its content has no 'a'"),
    ({"a": "x"}, {"a": int}, "a is x"),
    ({"b": 1}, {"b?": str}, "b is 1"),
    ([], {"a": int}, "its content is not a JSON object"),
    ({"a": [1, "x"]}, {"a": [int]}, "a[1] is x"),
    ({"a": {"c": 1, "d": None}}, {"a": {str: int}}, "a.d is None"),
    ({"a": -1}, {"a": lambda value: value > 0}, "a is -1"),
])  # fmt: skip
def test_what_does_not_have_its_form_is_named(value, form, wrong):
    assert misfit(value, form) == wrong


@pytest.mark.filterwarnings("ignore::models.errors.InputWarning")
@pytest.mark.parametrize("seed", sorted(CORPUS.glob("*/*")), ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_a_seed_of_the_fuzzer_is_read_or_refused(seed):
    reader_of(seed.parent.name)(seed.read_bytes())  # anything but InputError goes through
