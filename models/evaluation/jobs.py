"""From the options of evaluate.py to the jobs of an evaluation; files, grids and weights are checked before the first
case."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.cases import Case, find_cases, scheme_of
from models.dataset import read_manifest, read_split
from models.device import collected, first_process_first, inference_dtype, synchronise
from models.errors import InputError
from models.evaluation.cases import (
    Item,
    find_predictions,
    item_on_its_grid,
    prepared_item,
    raw_item,
    read_ahead,
    read_prediction,
    segmented,
)
from models.evaluation.panels import case_panel
from models.evaluation.plan import (
    Entry,
    Part,
    input_shape,
    plan,
    plan_raw,
    refuse_other_preprocessing,
    refuse_small_et,
    refuse_trained_on,
    trained_on,
)
from models.evaluation.scoring import Job, Scored
from models.evaluation.statistics import reliability_counts
from models.files import ROOT
from models.inference.engines import choose_engine
from models.inference.islands import without_islands
from models.inference.predict import Member, accumulators_gib, member_of, predict_all
from models.inference.small_et import choose_small_et_ml, small_et_to_ncr
from models.losses import region_probabilities
from models.metrics import confusion, dice_per_target, volumes_per_target
from models.nifti import spacing_of, to_ras
from models.preprocessing import label_map, native_label_map, network_spacing_mm
from models.runs import Run, load_model, open_run

TYPICAL_WINDOWS = 8  # of a head: two of 128 voxels along each axis


@dataclass(frozen=True)
class Options:
    """The options of an evaluation; the flags of the same names are explained in evaluate.py."""

    runs: list[Path]
    predictions: list[Path]
    split: str | None
    data: Path | None
    raw: Path | None
    cases: Path | None
    labels: str | None
    same_voxels: bool
    allow_trained_on: bool
    space: str
    ensemble: bool
    tta: bool
    overlap: float | None
    small_et: bool
    islands: float
    engine: str
    amp: str
    save_nifti: Path | None
    label_values: str | None


@dataclass(frozen=True)
class Work:
    """An evaluation: the entries of the tables, how a case of one is read, and how it becomes a job."""

    entries: list[Entry]
    read: Callable[[Part, str], Item]
    predict: Callable[[Entry, Part, Item], Job]
    networks: dict[Path, torch.nn.Module] = field(default_factory=dict)  # by their checkpoints
    members: dict[Path, Member] = field(default_factory=dict)  # these, ready to run: see `make_ready`


def make_ready(work: Work, options: Options, device: torch.device):
    """Make the engines of all networks, before the first case."""
    parts = [part for entry in work.entries for part in entry.parts]
    for part in parts:
        for run in part.runs:
            if run.checkpoint not in work.members:
                network, its_run = work.networks[run.checkpoint], replace(run, data=part.data or run.data)
                cases = sum(len(one.cases) for one in parts if run in one.runs)
                with first_process_first():  # it measures which engine is fastest, and the others take that one, too
                    work.members[run.checkpoint] = ready(its_run, network, input_shape(part), cases, options, device)


def jobs_of(work: Work, failures: dict[str, str] | None) -> Iterator[Job]:
    """Yield this process's share of the cases of every entry, predicted. With `failures` (name -> reason) a case that
    cannot be read is left out and entered there."""
    for entry in work.entries:
        for part in entry.parts:
            for item in read_ahead(part.share, partial(work.read, part), failures):
                yield work.predict(entry, part, item)


def gathered(work: Work, share: list[Scored], failures: dict[str, str]) -> dict[str, list[Scored]]:
    """In the first process, what all processes have kept of their shares, by entry and in the order of its cases; their
    failures are added to `failures`. In the others, empty lists."""
    kept = {}
    for scored, failed in collected((share, failures)):
        kept |= {(one.run, one.case): one for one in scored}
        failures |= failed
    return {entry.name: [kept[entry.name, case] for case in entry.cases if (entry.name, case) in kept]
            for entry in work.entries}  # fmt: skip


def item_of(work: Work, entry: Entry, case: str) -> Item:
    return work.read(next(part for part in entry.parts if case in part.cases), case)


# ---- trained runs --------------------------------------------------------------------------------------------------


def of_runs(options: Options, device: torch.device) -> Work:
    """The evaluation of trained runs. InputError for cases that are missing, raw files that the tensors were not made
    from, weights that are damaged, and patients that a run was trained on."""
    runs = [open_run(path) for path in options.runs]
    raw = raw_cases(options.cases, options) if options.cases else {}
    entries = (plan_raw(runs, list(raw), options.ensemble) if options.cases
               else plan(runs, options.data, options.split, options.ensemble))  # fmt: skip
    if not options.allow_trained_on:
        refuse_trained_on(entries)
    refuse_other_preprocessing(entries)
    if options.small_et:
        refuse_small_et(entries)
    sources = _sources(entries, options) if options.space == "native" and not options.cases else {}

    def read(part: Part, name: str) -> Item:
        if part.data:
            return prepared_item(part.data / f"{name}.pt", sources.get((part.data, name)))
        return raw_item(raw[name], part.runs[0].preprocessing)

    def predict(entry: Entry, part: Part, item: Item) -> Job:
        for run in part.runs:
            if run.checkpoint not in introduced:
                print_windows(run, members[run.checkpoint], item)
                introduced.add(run.checkpoint)
        checkpoints = tuple(run.checkpoint for run in part.runs)
        together = [members[checkpoint] for checkpoint in checkpoints]
        if options.small_et and checkpoints not in thresholds_ml:
            thresholds_ml[checkpoints] = small_et_ml(part, together, options, device)
        job = predicted(item, together, options, device, thresholds_ml.get(checkpoints, 0.0))
        folder = nifti_folder(options, entries, entry)
        return replace(
            job,
            run=entry.name,
            trained_on=item.name in trained_on(part),
            nifti=folder and folder / f"{item.name}.nii.gz",
            scheme=options.label_values or item.scheme,
        )

    # All networks before the first case: damaged weights must not cost an hour.
    networks = {run.checkpoint: load_model(run.checkpoint, device)[0] for run in runs}
    members, introduced, thresholds_ml = {}, set(), {}
    return Work(entries, read, predict, networks, members)


def raw_cases(folder: Path, options: Options) -> dict[str, Case]:
    """Case name -> raw case. InputError where the label values of one have no known meaning."""
    cases = find_cases(folder, options.labels, options.same_voxels)
    for case in cases:
        scheme_of(case)
    return {case.name: case for case in cases}


def _sources(entries: list[Entry], options: Options) -> dict[tuple[Path, str], Case]:
    """(data, case) -> the raw case with its segmentation."""
    names = {}
    for part in (part for entry in entries for part in entry.parts):
        names.setdefault(part.data, set()).update(part.cases)
    sources = {}
    for data, cases in names.items():
        found = raw_cases(options.raw or recorded_raw(data), options)
        sources |= {(data, name): case for name, case in segmented(data, sorted(cases), found).items()}
    return sources


def recorded_raw(data: Path) -> Path:
    """The folder of raw cases that a data set was made from."""
    raw = read_manifest(data).get("raw")
    if raw is None or not (ROOT / raw).is_dir():
        where = f"not at {raw}" if raw else "not recorded"
        raise InputError(f"{data}: the raw cases that it was made from are {where}. Say where they are with --raw, or "
                         "give --space network.")  # fmt: skip
    return ROOT / raw


def nifti_folder(options: Options, entries: list[Entry], entry: Entry) -> Path | None:
    """The folder for the predictions of an entry, one of its own if there are several; None without --save-nifti."""
    return options.save_nifti and (options.save_nifti / entry.name if len(entries) > 1 else options.save_nifti)


def print_windows(run: Run, member: Member, item: Item):
    """Print how a run that predicts in windows does so, and the memory that their sums take."""
    shape = tuple(item.image.shape[1:])
    if member.window not in (None, shape):
        gib = accumulators_gib(shape, run.config.get("out_channels", 4))
        print(f"{run.name}: windows of {' x '.join(map(str, member.window))} voxels, overlap {member.overlap:g}; their "
              f"sums take {gib:.2f} GiB on the device for {' x '.join(map(str, shape))} voxels.")


def ready(run: Run, network: torch.nn.Module, shape: tuple[int, ...], cases: int, options: Options, device) -> Member:
    """A run's network, or the engine made of it for so many cases, as its record wants it to be used; the first pass is
    over."""
    dtype = inference_dtype(options.amp, run.amp, device)
    whole_case = run.preprocessing is None or run.preprocessing["size"] is not None
    passes = cases * (8 if options.tta else 1) * (1 if whole_case else TYPICAL_WINDOWS)
    network = choose_engine(network, options.engine, dtype, shape[-1], device, passes, run=run)
    member = member_of(run, network, dtype)
    predict_all([member], torch.zeros(shape[1:], device=device))  # slower than all that follow: it must not be timed
    return member if options.overlap is None else replace(member, overlap=options.overlap)


def small_et_ml(part: Part, members: list[Member], options: Options, device: torch.device) -> float:
    """The volume of --small-et for some runs: the one that is best on their validation cases."""
    cases = []
    for name in part.runs[0].split["validation"]:
        item = prepared_item((part.data or part.runs[0].data) / f"{name}.pt", None)
        label = label_map(predict_all(members, item.image.to(device), options.tta)[0]).cpu()
        label = without_islands(label, options.islands)
        dice, volumes = (measure(confusion(label, item.label)) for measure in (dice_per_target, volumes_per_target))
        _, predicted, true = volumes["ET"]
        cases.append((predicted * voxel_ml(network_spacing_mm(item.geometry)), dice["ET"], float(true == 0)))
    threshold_ml = choose_small_et_ml(cases)
    print(f"--small-et: an ET below {threshold_ml:.3g} ml becomes NCR, chosen on {len(cases)} validation cases.")
    return threshold_ml


def voxel_ml(spacing_mm: list[float]) -> float:
    return float(np.prod(spacing_mm)) / 1000


def predicted(item: Item, members: list[Member], options: Options, device: torch.device, small_et_ml: float) -> Job:
    """The job of one case, predicted by its networks: without islands, and an ET below `small_et_ml` becomes NCR."""

    def finished(label: Tensor, spacing_mm: list[float]) -> np.ndarray:
        return small_et_to_ncr(without_islands(label, options.islands), voxel_ml(spacing_mm), small_et_ml).cpu().numpy()

    start = time.perf_counter()
    probabilities, spread = predict_all(members, item.image.to(device), options.tta)
    synchronise(device)
    seconds = time.perf_counter() - start
    spacing_mm, label = network_spacing_mm(item.geometry), as_array(item.label)
    in_network = finished(label_map(probabilities), spacing_mm)
    job = Job(
        case=item.name,
        space="network",
        prediction=in_network,
        truth=label,
        spacing_mm=spacing_mm,
        panel=case_panel(item.image.numpy(), in_network, label, as_array(spread), spacing_mm),
        shown=in_network,
        geometry=item.geometry,
        seconds=seconds,
    )
    if item.label is not None:
        regions = region_probabilities(probabilities).cpu().numpy()
        job = replace(job, reliability=reliability_counts(regions, label))
    if options.space == "native" or options.save_nifti:
        affine_mm = np.linalg.norm(np.array(item.geometry["affine"])[:3, :3], axis=0).tolist()
        job = replace(job, native=finished(native_label_map(probabilities, item.geometry), affine_mm))
    if options.space == "native":
        job = replace(job, space="native", prediction=job.native, truth=item.truth, spacing_mm=affine_mm,
                      network_truth=label)  # fmt: skip
    return job


def as_array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.cpu().numpy()


# ---- label maps of another program ---------------------------------------------------------------------------------


def of_label_maps(options: Options) -> Work:
    """The evaluation of label maps: an entry for each folder, named after it, scored on the labelled cases of --raw or
    on those of --data and --split. InputError for missing and extra label maps."""
    raw = {name: case for name, case in raw_cases(options.raw, options).items() if case.labelled}
    names = read_split(options.data)[options.split or "test"] if options.data else sorted(raw)
    if missing := [name for name in names if name not in raw]:
        raise InputError(f"{options.raw}: has no labelled case {missing[0]}, which is to be scored.")
    folders = {folder.resolve().name: folder for folder in options.predictions}
    if len(folders) < len(options.predictions):
        raise InputError("--predictions: two folders have the same name, which is what the tables call them.")
    split = f"{options.split or 'test'} cases" if options.data else "raw cases"
    files = {name: find_predictions(folder, names) for name, folder in folders.items()}

    def read(part: Part, name: str) -> Item:
        return item_on_its_grid(raw[name])

    def predict(entry: Entry, part: Part, item: Item) -> Job:
        prediction = read_prediction(files[entry.name][item.name], item, options.label_values or item.scheme)
        affine = np.array(item.geometry["affine"])
        shown, spacing_mm = to_ras(prediction[None], affine)[0], spacing_of(affine)
        panel = case_panel(item.image.numpy(), shown, item.label.numpy(), None, spacing_mm)
        affine_mm = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        return Job(item.name, "native", prediction, item.truth, affine_mm, panel, shown, run=entry.name)

    entries = [Entry(name, split, (Part((), tuple(names), None),)) for name in folders]
    return Work(entries, read, predict)
