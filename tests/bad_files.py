"""Preprocessed cases, runs and tables that are broken, hostile or edited by hand: see bad_inputs.py."""

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import sys
import zipfile
from functools import cache
from pathlib import Path

import torch
from bad_inputs import BENCHMARK, EVALUATE, PREPROCESS, SWIN, UNET, VIEWER
from conftest import write_raw_case

NETWORK = ["--variant", "space-to-depth", "--channels", 4, 8, "--convolutions", 1, 1]
CASES = 6
DEEP = "[" * 10**5  # brackets in brackets: a parser that calls itself runs out of stack


class Payload:
    """What a pickle runs when it is loaded by Python's own unpickler: it makes a file."""

    def __reduce__(self):
        return os.system, ("touch PAYLOAD_RAN",)


# ---- what is whole -------------------------------------------------------------------------------------------------


@cache
def data() -> Path:
    """Six whole cases of 32 voxels, preprocessed from raw ones in the folder raw/."""
    from models import cohort
    from models.cases import find_cases
    from models.manifest import finish, open_manifest

    for index in range(CASES):
        write_raw_case(Path("raw"), f"BraTS2021_{index:05d}", seed=index)
    out, settings = Path("data"), {"version": 2, "size": 32, "spacing_mm": 1.0, "compact": True,
                                   "normalize": "percentile"}  # fmt: skip
    out.mkdir()
    manifest = open_manifest(out, {"settings": settings}, [], None)
    for case in find_cases("raw"):
        manifest["cases"][case.name] = cohort.process_case(case, out, settings)
    finish(out, manifest | {"raw": "raw"}, {}, seed=0, folds=2, test_share=0.2)
    return out


@cache
def run() -> Path:
    """A run of one epoch on them."""
    arguments = [UNET, data(), *NETWORK, "--epochs", 1, "--amp", "off", "--run-name", "base", "--device", "cpu"]
    argv, sys.argv = sys.argv, [str(argument) for argument in arguments]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(UNET, run_name="__main__")
    sys.argv = argv
    return Path("models/unet/results/base")


def data_with(box: Path, name: str, content) -> Path:
    """The data, one file of which holds these bytes, or is what a function of its path makes it."""
    folder = shutil.copytree(data(), box / "data")
    replace(folder / name, content)
    return folder


def run_with(box: Path, name: str, content) -> Path:
    """The run, called after the box, one file of which holds these bytes."""
    folder = shutil.copytree(run(), run().parent / f"kind{box.name}")
    replace(folder / name, content)
    return folder


def replace(path: Path, content):
    before = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if callable(content):
        content = content(path, before)
    if content is not None:
        path.write_bytes(content)


def edited(**changes):
    """JSON with other values; ... takes one out."""

    def edit(path, before):
        content = json.loads(before) | changes
        return json.dumps({key: value for key, value in content.items() if value is not ...}).encode()

    return edit


def stored(**changes):
    """A `.pt` file with other values; ... takes one out."""

    def edit(path, before):
        content = torch.load(io.BytesIO(before), weights_only=True)
        changed = content | {key: value(content) if callable(value) else value for key, value in changes.items()}
        return saved({key: value for key, value in changed.items() if value is not ...})

    return edit


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive(pickled: bytes, compression=zipfile.ZIP_STORED, storage: bytes = bytes(64)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        parts = {"data.pkl": pickled, "byteorder": b"little", "data/0": storage, "version": b"3\n"}
        for name, content in parts.items():
            file.writestr(f"x/{name}", content)
    return buffer.getvalue()


def flip_everywhere(path, before: bytes) -> bytes:
    """A changed bit in every kilobyte, headers included."""
    content = bytearray(before)
    for place in range(10, len(content), 1024):
        content[place] ^= 16
    return bytes(content)


def loop(path, before):
    path.symlink_to(path.name)


def folder(path, before):
    path.mkdir()


# ---- .pt files of any kind -----------------------------------------------------------------------------------------


def no_tensors() -> dict[str, object]:
    """What neither a case nor a checkpoint is."""
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": lambda path, before: before[: len(before) // 2],
        "a changed bit in every kilobyte": flip_everywhere,
        "a pickle that runs code": pickle.dumps(Payload()),
        "an archive whose pickle runs code": archive(pickle.dumps(Payload())),
        "an old archive whose pickle runs code": lambda path, before: legacy(Payload()),
        "a zip bomb": archive(pickle.dumps({}), zipfile.ZIP_DEFLATED, bytes(3 * 10**8)),
        "a list": saved([1, 2]),
        "a number": saved(5),
        "an empty dict": saved({}),
        "a loop of links": loop,
        "a folder": folder,
    }


def legacy(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tensor_kinds():
    """Preprocessed cases and what lies beside them, in the trainings and in the viewer."""
    name = "BraTS2021_00000.pt"
    one = torch.ones(1)
    for kind, content in no_tensors().items():
        yield UNET, f"case: {kind}", lambda box, content=content: [data_with(box, name, content)], name
        yield VIEWER, f"case: {kind}", lambda box, content=content: [
            data_with(box, name, content) / name, "--save", box / "x.png"], name  # fmt: skip
    geometry = json.loads(json.dumps(torch.load(data() / name, weights_only=True)["geometry"]))
    cases = {
        "no geometry": stored(geometry=...),
        "no modalities": stored(modalities=...),
        "modalities in another order": stored(modalities=["flair", "t1", "t2", "t1ce"]),
        "modalities a number": stored(modalities=4),
        "image of three dimensions": stored(image=lambda case: case["image"][0]),
        "image of integers": stored(image=lambda case: case["image"].int()),
        "image of a hundred terabytes": stored(image=one.expand(4, 30000, 30000, 30000)),
        "image without content": stored(image=torch.empty(4, 32, 32, 32, device="meta")),
        "image sparse": stored(image=lambda case: case["image"].to_sparse()),
        "image a list": stored(image=[1, 2, 3]),
        "label of another shape": stored(label=lambda case: case["label"][:, 1:]),
        "label of fractions": stored(label=lambda case: case["label"].float()),
        "label 255": stored(label=lambda case: case["label"] * 0 + 255),
        "label scheme unknown": stored(label_scheme="../brats"),
        "label scheme a list": stored(label_scheme=[1]),
        "a name that leads out": stored(case="../../C0"),
        "geometry of another image": stored(geometry=geometry | {"network_size": [8, 8, 8]}),
        "geometry with a crop of nothing": stored(geometry=geometry | {"crop_box": [[5, 5]] * 3}),
        "geometry with NaN": stored(geometry=geometry | {"spacing_mm": [float("nan")] * 3}),
        "geometry of a huge file": stored(geometry=geometry | {"native_shape": [2**20] * 3}),
    }
    for index, (kind, content) in enumerate(cases.items()):
        script, more = ((UNET, ["--epochs", 1, "--run-name", "x", *NETWORK]), (SWIN, ["--epochs", 1]))[index % 2]
        if kind == "label 255":  # found when the label is read
            script, more = VIEWER, []
        make = lambda box, content=content, more=more: [data_with(box, name, content), *more]  # noqa: E731
        if script == VIEWER:
            make = lambda box, content=content: [data_with(box, name, content) / name, "--save", box / "x.png"]  # noqa: E731
        yield script, f"case: {kind}", make, name
    whole = json.loads((data() / "splits.json").read_text())
    tables = {
        ("splits.json", "cut in the middle"): lambda path, before: before[: len(before) // 2],
        ("splits.json", "not UTF-8"): b"\xff\xfe",
        ("splits.json", "100,000 brackets"): DEEP.encode(),
        ("splits.json", "a list"): b"[]",
        ("splits.json", "no validation"): edited(validation=...),
        ("splits.json", "numbers as names"): edited(train=[1, 2]),
        ("splits.json", "a name that leads out"): edited(train=["../../etc/passwd"]),
        ("splits.json", "nobody to train on"): edited(train=[]),
        ("splits.json", "cases that are not there"): edited(train=["nobody", *whole["train"]]),
        ("splits.json", "a folder"): folder,
        ("splits.json", "a loop of links"): loop,
        ("manifest.json", "no JSON"): b"{",
        ("manifest.json", "no settings"): edited(settings=...),
        ("manifest.json", "a size of a million"): edited(settings={"size": 10**6, "spacing_mm": 1}),
        ("manifest.json", "cases as a list"): edited(cases=[]),
        ("manifest.json", "a checksum that is a number"): edited(cases={"C0": {"crc32": 5}}),
    }
    for (file, kind), content in tables.items():
        words = {"cases that are not there": "nobody.pt", "a folder": "splits.json", "a loop of links": "splits.json"}
        yield UNET, f"{file}: {kind}", lambda box, file=file, content=content: [
            data_with(box, file, content), "--epochs", 1, *NETWORK], words.get(kind, file)  # fmt: skip
    yield UNET, "data: no such folder", lambda box: [box / "nowhere"], "nowhere"


def run_kinds():
    """Checkpoints, config.json and tables of a run, in everything that uses one."""

    def training(box, file, content):
        name = run_with(box, file, content).name
        return [data(), *NETWORK, "--epochs", 1, "--amp", "off", "--run-name", name, "--resume"]

    for kind, content in no_tensors().items():
        yield EVALUATE, f"best.pt: {kind}", lambda box, c=content: [run_with(box, "best.pt", c)], "best.pt"
        yield UNET, f"last.pt: {kind}", lambda box, c=content: training(box, "last.pt", c), "last.pt"
    huge = {"channels": [10**7, 10**7]}
    checkpoints = {
        "no modalities": stored(modalities=...),
        "modalities a number": stored(modalities=7),
        "no weights": stored(model=...),
        "a weight too many": stored(model=lambda all: all["model"] | {"more": torch.ones(3)}),
        "a weight too few": stored(model=lambda all: dict(list(all["model"].items())[1:])),
        "weights that are text": stored(model=lambda all: dict.fromkeys(all["model"], "x")),
        "another network": stored(network="../unet"),
        "another format": stored(format=99),
        "a setting that there is not": stored(config=lambda all: all["config"] | {"depth": 9}),
        "a setting of the wrong type": stored(config=lambda all: all["config"] | {"channels": "many"}),
        "a network of a petabyte": stored(config=lambda all: all["config"] | huge),
        "an epoch in words": stored(epoch="first"),
        "an unknown number type": stored(amp="fp4"),
    }
    for index, (kind, content) in enumerate(checkpoints.items()):
        script = (EVALUATE, VIEWER, BENCHMARK)[index % 3]
        before, after = {
            EVALUATE: ([], []),
            VIEWER: (["raw/BraTS2021_00000", "--save", "x.png", "--run"], []),
            BENCHMARK: (["--run"], ["--size", 32, "--engines", "eager", "--out", "out"]),
        }[script]
        yield script, f"checkpoint: {kind}", lambda box, c=content, before=before, after=after: [
            *before, run_with(box, "best.pt", c), *after], "best.pt"  # fmt: skip
    yield EVALUATE, "valid: a checkpoint with a key too many", lambda box: [
        run_with(box, "best.pt", stored(more=1)), "--engine", "eager", "--out", box / "out"], "Written to"  # fmt: skip
    records = {
        "no JSON": b"{",
        "100,000 brackets": DEEP.encode(),
        "a list": b"[1]",
        "size in words": edited(size="large"),
        "size below 0": edited(size=[-1, 2, 3]),
        "size of a million": edited(size=[10**6] * 3),
        "names that lead out": edited(split={"train": [], "validation": [], "test": ["../../../etc/passwd"]}),
        "split without test": edited(split={"train": [], "validation": []}),
        "preprocessing with a step that there is not": edited(
            preprocessing={"size": 32, "spacing_mm": 1, "normalize": "percentile", "blur": 3}),
        "preprocessing with voxels of 0 mm": edited(
            preprocessing={"size": 32, "spacing_mm": 0, "normalize": "percentile"}),
        "windows that overlap by 5": edited(inference={"overlap": 5}),
        "a folder of data that is a number": edited(arguments={"data": 5}),
        "a folder": folder,
    }  # fmt: skip
    for kind, content in records.items():
        yield EVALUATE, f"config.json: {kind}", lambda box, c=content: [run_with(box, "config.json", c)], "config.json"
    resumed = {
        ("config.json", "no processes"): edited(processes=...),
        ("config.json", "no arguments"): edited(arguments=...),
        ("config.json", "no split"): edited(split=...),
        ("config.json", "epochs in words"): edited(arguments={"epochs": "many"}),
        ("last.pt", "no optimizer"): stored(optimizer=...),
        ("last.pt", "an optimizer of another network"): stored(optimizer={"state": {}, "param_groups": []}),
        ("last.pt", "history in words"): stored(history="long"),
        (".lock", "not UTF-8"): b"\xff\xfe\xff",
    }
    for (file, kind), content in resumed.items():
        yield UNET, f"--resume, {file}: {kind}", lambda box, f=file, c=content: training(box, f, c), file
    yield UNET, "--init: a pickle that runs code", lambda box: [
        data(), "--init", run_with(box, "best.pt", pickle.dumps(Payload()))], "best.pt"  # fmt: skip
    yield UNET, "a run name that leads out", lambda box: [data(), "--run-name", "../../x"], "single folder"
    yield EVALUATE, "no such run", lambda box: [box / "nowhere"], "nowhere"
    yield EVALUATE, "data that have moved", lambda box: [
        run_with(box, "config.json", edited(arguments={"data": "nowhere"}))], "--data"  # fmt: skip
    yield EVALUATE, "raw cases that have moved", lambda box: [
        run(), "--data", data_with(box, "manifest.json", edited(raw="nowhere"))], "--raw"  # fmt: skip
    yield EVALUATE, "valid: train.csv cut in the middle", lambda box: [
        run_with(box, "train.csv", lambda path, before: before[: len(before) - 40]), "--engine", "eager",
        "--out", box / "out"], "minutes of training are not known"  # fmt: skip
    yield EVALUATE, "a file as --out", lambda box: [run(), "--out", (box / "x").write_text("") or box / "x"], "written"
    yield PREPROCESS, "valid: a manifest cut in the middle", lambda box: [
        "raw", data_with(box, "manifest.json", lambda path, before: before[:300]), "--size", 32, "--limit", 1,
        "--workers", 1], "preprocessed again"  # fmt: skip
