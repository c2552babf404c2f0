"""From what is asked for to the jobs of an evaluation. All is checked before the first case: files, grids, weights."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.brats import Case, find_cases, read_case, to_ras, to_training_labels
from models.dataset import load_case, read_manifest
from models.device import inference_dtype, synchronise
from models.errors import InputError
from models.evaluation.cases import (
    Item,
    find_predictions,
    prepared_item,
    raw_item,
    read_ahead,
    read_prediction,
    segmentations,
)
from models.evaluation.plan import Entry, Part, input_shape, plan, plan_raw, refuse_other_preprocessing, refuse_trained_on, trained_on
from models.evaluation.scoring import Job
from models.evaluation.statistics import reliability_counts
from models.files import ROOT
from models.inference.engines import choose_engine
from models.inference.predict import Member, member_of, predict_all, without_small_et
from models.losses import region_probabilities
from models.preprocessing import label_map, native_label_map, network_spacing_mm
from models.runs import Run, load_model, open_run


@dataclass(frozen=True)
class Options:
    """What evaluate.py was asked for; the flags of the same names say more of each."""

    runs: list[Path]
    split: str | None
    data: Path | None
    raw: Path | None
    cases: Path | None
    labels: str | None
    allow_trained_on: bool
    space: str
    ensemble: bool
    tta: bool
    overlap: float | None
    small_et: bool
    engine: str
    amp: str
    save_nifti: Path | None
    label_values: str | None


@dataclass(frozen=True)
class Work:
    """What is to be done: entries of the tables, their networks, and how a case of an entry is read."""

    entries: list[Entry]
    networks: dict[Path, torch.nn.Module]  # by their checkpoints
    read: Callable[[Part, str], Item]


# ---- runs ----------------------------------------------------------------------------------------------------------


def of_runs(options: Options, device: torch.device) -> Work:
    """What is to be done for some runs. Everything is checked: InputError for cases that are missing, files that the
    tensors were not made from, weights that are damaged, patients that a run was trained on."""
    runs = [open_run(path) for path in options.runs]
    raw = {case.name: case for case in find_cases(options.cases)} if options.cases else {}
    entries = (plan_raw(runs, list(raw), options.ensemble) if options.cases
               else plan(runs, options.data, options.split, options.ensemble))  # fmt: skip
    parts = [part for entry in entries for part in entry.parts]
    if not options.allow_trained_on:
        refuse_trained_on(entries)
    refuse_other_preprocessing(entries)
    if options.small_et and any(len(entry.parts) > 1 for entry in entries):
        raise InputError("--small-et: its volume comes from the validation cases, and those are what cross-validation "
                         "scores. Evaluate the folds with --split test.")  # fmt: skip
    sources = {}
    if not options.cases and options.space == "native":
        for data in {part.data for part in parts}:
            names = {case for part in parts if part.data == data for case in part.cases}
            found = {case.name: case for case in find_cases(options.raw or recorded_raw(data))}
            sources |= {(data, name): path for name, path in segmentations(data, sorted(names), found).items()}

    def read(part: Part, name: str) -> Item:
        if part.data:
            return prepared_item(part.data / f"{name}.pt", sources.get((part.data, name)))
        return raw_item(raw[name], part.runs[0].preprocessing, options.labels or raw[name].layout)

    # All networks before the first case: damaged weights must not cost an hour.
    networks = {run.checkpoint: load_model(run.checkpoint, device)[0] for run in runs}
    return Work(entries, networks, read)


def recorded_raw(data: Path) -> Path:
    """The folder of raw cases that a data set was made from."""
    raw = read_manifest(data).get("raw")
    if raw is None or not (ROOT / raw).is_dir():
        raise InputError(f"{data}: the raw cases that it was made from are not at {raw or 'a place that it names'}. Say "
                         "where with --raw, or give --space network.")  # fmt: skip
    return ROOT / raw


def jobs_of(work: Work, options: Options, device: torch.device, failures: dict[str, str]) -> Iterator[Job]:
    """Predict every case of the work. Raw cases that cannot be read (--cases) are left out and go into `failures`
    (name -> reason)."""
    members = {}  # an engine takes time to make: each when it is first needed
    for entry in work.entries:
        folder = options.save_nifti
        if folder and len(work.entries) > 1:
            folder = folder / entry.name
        for part in entry.parts:
            for run in part.runs:
                if run.checkpoint not in members:
                    members[run.checkpoint] = ready(run, work.networks[run.checkpoint], input_shape(part), options, device)
            together, seen = [members[run.checkpoint] for run in part.runs], trained_on(part)
            threshold_ml = small_et_ml(part, together, work, options, device) if options.small_et else 0.0
            read = partial(work.read, part)
            for item in read_ahead(part.cases, read, failures if options.cases else None):
                job = predicted(item, together, options, device, threshold_ml)
                yield replace(
                    job,
                    run=entry.name,
                    trained_on=item.name in seen,
                    nifti=folder and folder / f"{item.name}.nii.gz",
                    scheme=options.label_values or item.scheme,
                )


def ready(run: Run, network: torch.nn.Module, shape: tuple[int, ...], options: Options, device: torch.device) -> Member:
    """A run's network, or the engine made of it, as its record wants it to be used; the first pass is over."""
    dtype = inference_dtype(options.amp, run.amp, device)
    member = member_of(run, choose_engine(network, options.engine, dtype, shape[-1], device), dtype)
    predict_all([member], torch.zeros(shape[1:], device=device))  # slower than all others: not timed
    return member if options.overlap is None else replace(member, overlap=options.overlap)


def predicted(item: Item, members: list[Member], options: Options, device: torch.device, small_et_ml: float) -> Job:
    """One item through its networks. An enhancing tumour smaller than `small_et_ml` becomes NCR."""
    start = time.perf_counter()
    probabilities, spread = predict_all(members, item.image.to(device), options.tta)
    synchronise(device)
    seconds = time.perf_counter() - start
    grid_mm = network_spacing_mm(item.geometry)
    in_network = without_small_et(label_map(probabilities), grid_mm, small_et_ml).cpu().numpy()
    native = None
    if options.space == "native" or options.save_nifti:
        native_mm = np.linalg.norm(np.array(item.geometry["affine"])[:3, :3], axis=0).tolist()
        native = native_label_map(probabilities, item.geometry)
        native = without_small_et(native, native_mm, small_et_ml).cpu().numpy()
    counts = None
    if item.label is not None:
        counts = reliability_counts(region_probabilities(probabilities).cpu().numpy(), item.label.numpy())
    label = None if item.label is None else item.label.numpy()
    return Job(
        case=item.name,
        space=options.space,
        prediction=native if options.space == "native" else in_network,
        truth=item.truth if options.space == "native" else label,
        spacing_mm=native_mm if options.space == "native" else grid_mm,
        native=native,
        network_prediction=in_network,
        network_truth=label,
        geometry=item.geometry,
        panel=case_panel(item.image.numpy(), in_network, label, None if spread is None else spread.cpu().numpy(), grid_mm),
        seconds=seconds,
        reliability=counts,
    )


def small_et_ml(part: Part, members: dict, options: Options, device: torch.device) -> float:
    """The volume of --small-et: that which is best on the validation cases of the runs, in the space of the scores."""
    ...


# ---- label maps of another program ---------------------------------------------------------------------------------


def of_label_maps(folders: list[Path], options: Options) -> tuple[list[Entry], Iterator[Job]]:
    """The entries of the tables for folders of label maps, named after them, and their jobs. They are scored on the
    labelled cases of --raw, or on those of --data and --split."""
    raw = {case.name: case for case in find_cases(options.raw) if case.labelled}
    names = sorted(raw)
    if options.data:
        names = read_split(options.data)[options.split or "test"]
        if missing := [name for name in names if name not in raw]:
            raise InputError(f"{options.raw}: has no labelled case {missing[0]}, which is to be scored.")
    if len({folder.resolve().name for folder in folders}) < len(folders):
        raise InputError("--predictions: two folders have the same name, which is what the tables call them.")
    entries = [Entry(folder.resolve().name, f"{options.split or 'all'} cases", (Part((), tuple(names), None),))
               for folder in folders]  # fmt: skip
    files = {entry.name: find_predictions(folder, names) for entry, folder in zip(entries, folders, strict=True)}
    return entries, _foreign_jobs(entries, files, raw, options)


def _foreign_jobs(entries, files: dict[str, dict[str, Path]], raw: dict[str, Case], options: Options) -> Iterator[Job]:
    for entry in entries:
        for name in entry.cases:
            case = raw[name]
            volumes, scheme = read_case(case), options.labels or case.layout
            truth = to_training_labels(volumes.label, scheme, case.files["seg"][0])
            values = options.label_values or scheme
            prediction = read_prediction(files[entry.name][name], case, values, truth, volumes.affine)
            image, in_ras, truth_in_ras = (to_ras(volume, volumes.affine) for volume in
                                           (volumes.image, prediction[None], truth[None]))  # fmt: skip
            yield Job(
                run=entry.name,
                case=name,
                space="native",
                prediction=prediction,
                truth=truth,
                spacing_mm=np.linalg.norm(volumes.affine[:3, :3], axis=0).tolist(),
                panel=case_panel(image, in_ras[0], truth_in_ras[0], None, spacing_of(volumes.affine)),
            )
