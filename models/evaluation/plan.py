"""What is scored on which cases: runs, cross-validated folds and ensembles; and which combinations are refused."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from models.brats import patient_of
from models.dataset import manifest_checksum, read_split
from models.device import rank, world_size
from models.errors import InputError
from models.runs import Run
from models.tensors import load_case

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Part:
    """Runs whose probabilities are averaged, and the cases that they are scored on together."""

    runs: tuple[Run, ...]
    cases: tuple[str, ...]
    data: Path | None  # folder of preprocessed cases; None for raw cases, which are preprocessed one by one

    @property
    def share(self) -> tuple[str, ...]:
        """Those of its cases that this process predicts, of several that torchrun started."""
        return self.cases[rank() :: world_size()]


@dataclass(frozen=True)
class Entry:
    """A row of the tables: one part, or the folds of a cross-validation, each on the cases that it has not seen."""

    name: str
    split: str  # of what its cases are, in words
    parts: tuple[Part, ...]

    @property
    def cases(self) -> list[str]:
        return [case for part in self.parts for case in part.cases]

    @property
    def runs(self) -> list[Run]:
        return list({run.checkpoint: run for part in self.parts for run in part.runs}.values())


# ---- names and folds -----------------------------------------------------------------------------------------------


def names_of(runs: list[Run], ensemble: bool) -> list[str]:
    """The name of each run in the tables: that of its folder, after that of the network if two are the same. InputError
    for a run given twice and for two of one name."""
    for index, run in enumerate(runs):
        if any(run.checkpoint.resolve() == other.checkpoint.resolve() for other in runs[:index]):
            raise InputError(f"{run.checkpoint}: given twice. Name each run once.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.network}-{run.name}" for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two runs are both called {name}. Rename the folder of one of them.")
        if ensemble and name == ENSEMBLE:
            raise InputError(f"--ensemble: a run is called {ENSEMBLE} as well. Rename its folder.")
    return names


def fold_groups(runs: list[Run]) -> list[list[Run]] | None:
    """The runs by network and settings of the training, if every run is one of several folds; else None. InputError
    for a fold given twice and for folds of different data."""
    if len(runs) < 2 or any(run.fold is None for run in runs):
        return None
    groups = {}
    for run in runs:
        groups.setdefault((run.network, json.dumps([run.config, run.settings], sort_keys=True)), []).append(run)
    if min(map(len, groups.values())) < 2:
        return None
    for group in groups.values():
        folds = {}
        for run in group:
            if run.fold in folds:
                raise InputError(f"{run.folder} and {folds[run.fold].folder} are both fold {run.fold}. Name one.")
            if run.data_sha256 != group[0].data_sha256:
                raise InputError(f"{run.folder} and {group[0].folder} are folds of different data.")
            folds[run.fold] = run
    return list(groups.values())


def name_of_folds(group: list[Run]) -> str:
    """What the names of the runs have in common at the beginning, or the name of the network."""
    first, *others = (run.name for run in group)
    length = next((i for i, letter in enumerate(first) if any(other[i : i + 1] != letter for other in others)), None)
    common = first[:length].removesuffix("fold").rstrip("-_. ").removesuffix("fold").rstrip("-_. ")
    return common or group[0].network


def names_of_groups(groups: list[list[Run]]) -> list[str]:
    """What each group of folds is called, with the network's name before it where two would be called the same.
    InputError where that does not help."""
    shared = [name_of_folds(group) for group in groups]
    names = [
        f"{group[0].network}-{name}" if shared.count(name) > 1 else name
        for name, group in zip(shared, groups, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"folds of different trainings are both called {name}: rename the folders of one of them.")
    return names


# ---- the plan ------------------------------------------------------------------------------------------------------


def plan(runs: list[Run], data: Path | None, split: str | None, ensemble: bool) -> list[Entry]:
    """What is scored on preprocessed cases. Folds of a cross-validation are one entry, each case scored by the run that
    has not seen it, unless `split` asks for one set of cases; other runs are an entry each, on `split` (the test
    cases). With `ensemble` the mean of all is one more entry, on the test cases for folds."""
    if ensemble and len(runs) < 2:
        raise InputError("--ensemble: name two runs or more.")
    names = names_of(runs, ensemble)
    groups = fold_groups(runs) if split is None else None
    if groups is None:
        folder, cases = choose_cases(runs, data, split or "test")
        split = f"{split or 'test'} cases"
        entries = [Entry(name, split, (Part((run,), cases, folder),)) for name, run in zip(names, runs, strict=True)]
        return entries + ([Entry(ENSEMBLE, split, (Part(tuple(runs), cases, folder),))] if ensemble else [])
    entries, names = [], names_of_groups(groups)
    for name, group in zip(names, groups, strict=True):
        parts = []
        for run in sorted(group, key=lambda run: run.fold):
            folder, cases = choose_cases([run], data, "validation")
            parts.append(Part((run,), cases, folder))
        if any(run.checkpoint.name == "best.pt" for run in group):
            print(f"Note: the best epoch of each fold of {name} was chosen on the cases that it is scored on. Name the "
                  "last.pt of the runs to score their last epochs.")  # fmt: skip
        entries.append(Entry(name, f"cases, cross-validated in {len(group)} folds", tuple(parts)))
        if ensemble:
            folder, cases = choose_cases(group, data, "test")
            entries.append(Entry(f"{name}-{ENSEMBLE}", "test cases", (Part(tuple(group), cases, folder),)))
    return entries


def plan_raw(runs: list[Run], cases: list[str], ensemble: bool) -> list[Entry]:
    """What is predicted for a folder of raw cases: by each run, and with `ensemble` by the mean of all."""
    if ensemble and len(runs) < 2:
        raise InputError("--ensemble: name two runs or more.")
    names, cases = names_of(runs, ensemble), tuple(cases)
    entries = [Entry(name, "raw cases", (Part((run,), cases, None),)) for name, run in zip(names, runs, strict=True)]
    return entries + ([Entry(ENSEMBLE, "raw cases", (Part(tuple(runs), cases, None),))] if ensemble else [])


def choose_cases(runs: list[Run], data: Path | None, split: str) -> tuple[Path, tuple[str, ...]]:
    """The data folder (`data`, if that is given) and the cases of the split, as each run recorded them. InputError for
    runs that differ in them."""
    chosen = []
    for run in runs:
        if not (data or run.data):
            raise InputError(f"{run.folder}: does not say which cases it was trained on. Name some with --data or "
                             "--cases.")  # fmt: skip
        folder = data or run.data
        if not (data or folder.is_dir()):
            raise InputError(f"{run.folder}: the cases that it was trained on are not at {folder}. Say where they are "
                             "with --data, or predict raw cases with --cases.")  # fmt: skip
        checksum = manifest_checksum(folder)
        if run.data_sha256 not in (checksum, None):
            print(f"Note: {folder} is not what {run.folder} was trained on (its manifest differs).")
        chosen.append((folder, checksum, run.split[split] if run.split else read_split(folder)[split]))
    first_folder, first_checksum, cases = chosen[0]
    for run, (folder, checksum, names) in zip(runs, chosen, strict=True):
        if names != cases:
            raise InputError(f"{run.folder} and {runs[0].folder} have different {split} cases, so their scores do not "
                             "compare.")  # fmt: skip
        if checksum != first_checksum:
            raise InputError(f"{run.folder} was trained on {folder} and {runs[0].folder} on {first_folder}: say which "
                             "with --data.")  # fmt: skip
    if not cases:
        raise InputError(f"{first_folder}: has no {split} cases (--test-share 0). Score the folds of a cross-"
                         "validation together, or say which cases with --split or --cases.")  # fmt: skip
    return first_folder, tuple(cases)


# ---- what must not be mixed ----------------------------------------------------------------------------------------


def trained_on(part: Part) -> set[str]:
    """Those of a part's cases whose patient one of its runs, or the weights that it began with, was trained on."""
    return {case for case in part.cases if any(patient_of(case) in (run.seen or ()) for run in part.runs)}


def refuse_trained_on(entries: list[Entry]):
    """InputError where a run would be scored on a patient that it was trained on."""
    for entry in entries:
        for part in entry.parts:
            if seen := sorted(trained_on(part)):
                raise InputError(
                    f"{part.runs[0].folder}: trained on {len(seen)} of the cases to be scored ({seen[0]}), so the "
                    "scores would mean nothing. --allow-trained-on scores them nevertheless and marks them."
                )
            for run in part.runs:
                if run.seen is None:
                    print(f"Note: {run.folder} does not say which cases it was trained on.")


def refuse_other_preprocessing(entries: list[Entry]):
    """InputError for an ensemble of runs whose cases are preprocessed differently."""
    for entry in entries:
        for part in entry.parts:
            first, *others = part.runs
            for run in others:
                if (run.preprocessing, run.size) != (first.preprocessing, first.size):
                    raise InputError(f"--ensemble: {run.folder} and {first.folder} were trained on cases "
                                     "preprocessed differently, so their predictions cannot be averaged.")  # fmt: skip


def refuse_small_et(entries: list[Entry]):
    """InputError where --small-et could not choose its volume without looking at cases that are scored."""
    for entry in entries:
        if len(entry.parts) > 1 or entry.split.startswith("validation"):
            raise InputError("--small-et: its volume is chosen on the validation cases, so these cannot be scored with "
                             "it. Score the test cases (--split test), or others.")  # fmt: skip
        first, *others = entry.runs
        if not (first.data and first.split and first.split["validation"]):
            raise InputError(f"--small-et: {first.folder} has no validation cases to choose its volume on.")
        if any(run.split is None or run.split["validation"] != first.split["validation"] for run in others):
            raise InputError("--small-et: the runs of the ensemble have different validation cases.")


# ---- what a run cost -----------------------------------------------------------------------------------------------


def input_shape(part: Part) -> tuple[int, ...]:
    """[1, 4, D, H, W] of one pass of a part's networks."""
    if size := part.runs[0].size:
        return (1, 4, *size)
    if part.data is None:
        raise InputError(f"{part.runs[0].folder / 'config.json'}: does not say for which size the network was trained.")
    return (1, *load_case(part.data / f"{part.cases[0]}.pt", as_stored=True)["image"].shape)


def training_minutes(runs: list[Run]) -> float | None:
    """Of all runs together, from their train.csv; None if one is missing or damaged."""
    minutes = 0.0
    for run in runs:
        log = run.folder / "train.csv"
        if not log.is_file():
            return None
        try:
            with log.open(newline="", encoding="utf-8") as file:
                minutes += sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60
        except (ValueError, KeyError, TypeError, csv.Error):
            print(f"Note: {log} is damaged, so the minutes of training are not known.")
            return None
    return minutes
