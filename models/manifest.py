"""The tables of a folder of preprocessed cases: manifest.json, splits.json, failures.csv and warnings.csv.

One process writes them, or several that share a cohort: each keeps a `manifest-shard-I-of-N.json` of its own, and the
last one to finish merges these. Nothing here imports torch: a run that finds everything done need not wait for it.
"""

import csv
import io
import json
import os
import random
import sys
from importlib.metadata import version
from pathlib import Path

from models.brats import patient_of
from models.errors import InputError
from models.files import remove_temporaries, write_atomically
from models.records import MANIFEST_ENTRY, read_json


def manifest_path(out: Path, shard: tuple[int, int] | None = None) -> Path:
    return out / ("manifest-shard-{}-of-{}.json".format(*shard) if shard else "manifest.json")


def open_manifest(out: Path, run: dict, names: list[str], shard: tuple[int, int] | None) -> dict:
    """What is known of the cases in `out` that were made with the settings of `run`: those of `names` for a shard.

    Args:
        run: everything that all shards have to agree on; its "settings" decide the content of the tensors.
        shard: (index, count), or None.

    Raises InputError where another shard was started with other flags. Changes nothing in `out`.
    """
    if shard:
        _refuse_other_flags(out, run, shard)
    whole = _read(manifest_path(out))
    if not whole or whole["settings"] != run["settings"]:
        whole = {"settings": run["settings"], "versions": _versions(), "cases": {}}
    cases = whole["cases"]
    for path in [manifest_path(out, shard)] if shard else _shard_paths(out):
        part = _read(path)
        if part and part["run"]["settings"] == run["settings"]:
            cases |= part["cases"]
    wanted = cases.keys() & set(names) if shard else cases.keys()
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(out) if entry.name.endswith(".pt")}
    cases = {name: cases[name] for name in wanted if sizes.get(f"{name}.pt") == cases[name]["bytes"]}
    return ({"run": run, "versions": whole["versions"]} if shard else whole) | {"cases": cases}


def claim(out: Path, run: dict, manifest: dict, shard: tuple[int, int] | None):
    """Before the first tensor is written: discard what was made with other settings, and register this shard.

    Without splits.json nobody can train on a mixture of old and new tensors, however this run ends.
    """
    if not shard:
        remove_temporaries(out)  # of shards, another one may be writing
    whole = _read(manifest_path(out))
    if not whole or whole["settings"] != run["settings"]:
        if whole:
            print(f"{out} was made with other settings ({_changes(whole['settings'], run['settings'], 'now')}): every "
                  "case is preprocessed again.")  # fmt: skip
        (out / "splits.json").unlink(missing_ok=True)
        manifest_path(out).unlink(missing_ok=True)
    for path in _shard_paths(out):
        part = _read(path)
        if not part or part["run"]["settings"] != run["settings"]:
            path.unlink(missing_ok=True)
    if shard:
        write_manifest(manifest_path(out, shard), manifest)
        try:
            _refuse_other_flags(out, run, shard)  # again: of two that started at once, one sees the other's file now
        except InputError:
            manifest_path(out, shard).unlink()
            raise


def _refuse_other_flags(out: Path, run: dict, shard: tuple[int, int]):
    for index in range(shard[1]):
        path = manifest_path(out, (index, shard[1]))
        other = _read(path) if index != shard[0] else None
        if other and other["run"] != run:
            theirs, ours = ({**each, **each["settings"], "settings": None} for each in (other["run"], run))
            raise InputError(f"{path}: that shard was started with other flags or other raw cases "
                             f"({_changes(theirs, ours, 'here')}). Give all shards the same, or remove the file.")


def _changes(old: dict, new: dict, when: str) -> str:
    old, new = ({**each, "size": each.get("size") or "native"} for each in (old, new))
    return "; ".join(f"{key} {old.get(key)}, {when} {new[key]}" for key in new if old.get(key) != new[key])


def write_manifest(path: Path, manifest: dict, durable: bool = True):
    manifest["cases"] = dict(sorted(manifest["cases"].items()))
    write_atomically(path, json.dumps(manifest, indent=1), durable)


def merge_shards(out: Path, run: dict, count: int) -> tuple[dict, dict[str, str]] | list[int]:
    """(manifest, failures) of the whole cohort, or the shards that have not finished.

    Several processes may do this at the same time: all of them get the same result from the same files.
    """
    parts = [_read(manifest_path(out, (index, count))) for index in range(count)]
    unfinished = [index for index, part in enumerate(parts) if not part or "failures" not in part]
    if unfinished:
        return unfinished
    whole = _read(manifest_path(out)) or {"cases": {}}
    cases, failures = whole["cases"], {}
    for part in parts:
        cases |= part["cases"]
        failures |= part["failures"]
    cases = {name: entry for name, entry in cases.items() if name not in failures}
    versions = whole.get("versions", parts[0]["versions"])
    return {"settings": run["settings"], "versions": versions, "cases": cases}, failures


def finish(
    out: Path, manifest: dict, failures: dict[str, str], seed: int, folds: int, test_share: float
) -> dict | None:
    """Write manifest.json, failures.csv, warnings.csv and splits.json, in this order; returns the splits, None for too
    few cases."""
    warnings = join_patients(manifest["cases"])
    warnings += [(name, about, text) for name, entry in manifest["cases"].items()
                 for text, about in entry.get("warnings", {}).items()]  # fmt: skip
    write_manifest(manifest_path(out), manifest)
    write_warnings(out / "warnings.csv", warnings)
    failures_csv = out / "failures.csv"
    if failures:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("case", "reason"), *sorted(failures.items())])
        write_atomically(failures_csv, table.getvalue())
    else:
        failures_csv.unlink(missing_ok=True)
    patients = {name: entry["patient"] for name, entry in manifest["cases"].items() if entry["labelled"]}
    try:
        splits = make_splits(patients, seed, folds, test_share)
        write_atomically(out / "splits.json", json.dumps(splits, indent=1))
    except InputError as error:
        splits = None
        (out / "splits.json").unlink(missing_ok=True)
        print(f"No splits.json: {error}")
    for path in _shard_paths(out):
        path.unlink(missing_ok=True)
    remove_temporaries(out, "*.pt.*")  # no shard makes cases any more
    return splits


def join_patients(cases: dict[str, dict]) -> list[tuple[str, str, str]]:
    """Set the "patient" of every case from its name, and merge those whose cases have the same scans under two names.
    Returns (case, the other case, what that means) for each such pair."""
    first, same, rows = {}, {}, []  # fingerprint -> case; patient -> the same patient's other name
    for name, entry in sorted(cases.items()):
        entry["patient"] = _representative(same, patient_of(name))
        mark = entry.get("fingerprint")  # older manifests have none
        if mark and first.setdefault(mark, name) != name:
            patient, other = entry["patient"], _representative(same, cases[first[mark]]["patient"])
            same |= {patient: other} if patient != other else {}
            rows.append((name, f"as {first[mark]}", "the same scans under two names stay in one part of the split"))
    for entry in cases.values():
        entry["patient"] = _representative(same, entry["patient"])
    return rows


def _representative(same: dict[str, str], patient: str) -> str:
    while patient in same:
        patient = same[patient]
    return patient


def write_warnings(path: Path, rows: list[tuple[str, str, str]]):
    """Write warnings.csv, a row per case and warning, and print a line per kind of warning; no warning, no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("case", "about", "warning"), *sorted(rows)])
    write_atomically(path, table.getvalue())
    for kind in sorted({text for _, _, text in rows}):
        (name, about, _), *others = sorted(row for row in rows if row[2] == kind)
        more = f" and {len(others)} more cases" if others else ""
        print(f"warning: {name} ({about}){more}: {kind} (see {path})", file=sys.stderr)


def make_splits(patients: dict[str, str], seed: int, folds: int, test_share: float = 0.1) -> dict:
    """A share of the patients to test on (0: none), a tenth to validate on, the others to train on, and
    cross-validation folds over train + validation.

    Args:
        patients: case name -> patient; two visits of a patient never cross a split.

    Raises InputError where nobody is left to train on.
    """
    cases_of: dict[str, list[str]] = {}
    for case, patient in sorted(patients.items()):
        cases_of.setdefault(patient, []).append(case)
    order = sorted(cases_of)
    random.Random(seed).shuffle(order)
    tested = max(1, round(test_share * len(order))) if test_share else 0
    validated = max(1, round(0.1 * len(order)))
    if tested + validated >= len(order):
        raise InputError(f"too few cases to split: of {len(order)} labelled patients, {tested} for testing and "
                         f"{validated} for validation leave nobody to train on.")  # fmt: skip

    def cases(of_patients):
        return sorted(case for patient in of_patients for case in cases_of[patient])

    test, rest = order[:tested], order[tested:]
    validation, train = rest[:validated], rest[validated:]
    parts = [rest[k :: min(folds, len(rest))] for k in range(min(folds, len(rest)))]
    return {
        "seed": seed,
        "train": cases(train),
        "validation": cases(validation),
        "test": cases(test),
        "folds": [
            {"train": cases(p for p in rest if p not in part), "validation": cases(part)} for part in map(set, parts)
        ],
    }


def _shard_paths(out: Path) -> list[Path]:
    return sorted(out.glob("manifest-shard-*-of-*.json"))


def _read(path: Path) -> dict | None:
    """A manifest as it was written; None where there is none, or another shard has just removed it."""
    whose = {"run": {"settings": dict}} if "-shard-" in path.name else {"settings": dict}
    form = whose | {"versions": dict, "cases": {str: MANIFEST_ENTRY}, "failures?": {str: str}}
    try:
        manifest = read_json(path, form)
    except FileNotFoundError:
        return None
    except InputError:
        print(f"{path} cannot be read: its cases are preprocessed again.")
        return None
    settings = manifest.get("settings") or manifest["run"]["settings"]
    settings.setdefault("normalize", "percentile")  # the only choice there was before
    return manifest


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "numpy", "nibabel")}
