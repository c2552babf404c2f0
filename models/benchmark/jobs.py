"""What the inference benchmark measures: its models, and a job for every row."""

import csv
import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from models import size_multiple
from models.benchmark.profiling import unavoidable_values
from models.benchmark.table import Row, is_baseline, row_name
from models.benchmark.worker import MONAI, Job, Model, has_monai_twin, make_network, measure_profile
from models.brats import LABELS
from models.cost import forward_macs, parameter_count
from models.device import DTYPES, native_dtypes
from models.errors import InputError, one_line
from models.files import write_csv
from models.inference.availability import ENGINES, why_not
from models.inference.exports import read_header
from models.inference.predict import refuse_unknown_preprocessing
from models.inference.quantisation import calibration_images
from models.runs import open_run

MONAI_ENGINES = ("eager", "fused", "compile")

# ---- models --------------------------------------------------------------------------------------------------------


def choose_models(
    names: list[str] | None,
    runs: list[Path],
    *,
    feature_size: int,
    engines: list[str] | None,
    sizes: list[int],
    batch_sizes: list[int],
    device: str,
) -> list[Model]:
    """The runs and the networks of these names, MONAI's beside ours with the same weights. The arguments are the flags
    of the script, without "auto"; None is what was not given."""
    settings = {"unet": {}, "swinunetr": {"feature_size": feature_size}}
    fresh = {name: Model(name, name, config) for name, config in settings.items()}
    twins = [MONAI + name for name in fresh]
    wanted = names or (twins if runs else [*fresh, *twins])
    chosen = [model_of(run, sizes, batch_sizes, device) for run in runs]
    chosen += [fresh[name] for name in fresh if name in wanted]
    monai_engines = tuple(engine for engine in MONAI_ENGINES if engine in (engines or MONAI_ENGINES))
    if not monai_engines and set(twins) & set(names or ()):
        raise InputError(f"--engines {' '.join(engines)}: MONAI's networks run in {', '.join(MONAI_ENGINES)}.")
    for name in fresh:
        if monai_engines and MONAI + name in wanted:
            ours = [model for model in chosen
                    if model.network == name and not model.engines and has_monai_twin(model)]  # fmt: skip
            ours = ours or [fresh[name]] * bool(names)
            alike = {json.dumps(model.config): model for model in ours}  # one of MONAI's for all that are as large
            chosen += [replace(model, name=MONAI + model.name, engines=monai_engines) for model in alike.values()]
    return chosen


def model_of(path: Path, sizes: list[int], batch_sizes: list[int], device: str) -> Model:
    """A trained run, or a .pt2 file, which is an engine already. InputError unless it was made for these sizes."""
    if path.suffix == ".pt2":
        header = read_header(path, device)
        batch, _, *sides = json.loads(header["shape"])
        _require_size(path, sides, sizes)
        if batch_sizes != [batch]:
            raise InputError(f"--batch-sizes {' '.join(map(str, batch_sizes))}: {path} was made for {batch}.")
        config = json.loads(header["config"])
        return Model(path.stem, header["network"], config, str(path), ("aot",), (header["dtype"],))
    run = open_run(path)
    refuse_unknown_preprocessing(run)
    _require_size(path, run.size, sizes)
    name = f"{run.network}-{run.name}"
    return Model(name, run.network, run.config, str(path), dice=mean_test_dice(run.folder))


def _require_size(path: Path, sides: list[int], sizes: list[int]):
    if sizes != [sides[0]] or len(set(sides)) > 1:
        raise InputError(f"--size {' '.join(map(str, sizes))}: {path} was made for {' x '.join(map(str, sides))} "
                         "voxels. Give this size, and only this one.")


def mean_test_dice(folder: Path) -> float | None:
    """The mean Dice of the three labels over a run's test cases, as its training script wrote it."""
    path = folder / "test_results.csv"
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        mean = next(row for row in csv.DictReader(file) if row["case"] == "mean")
    return sum(float(mean[f"dice_{label}"]) for label in LABELS.values()) / len(LABELS)


# ---- jobs ----------------------------------------------------------------------------------------------------------


def make_jobs(
    models: list[Model],
    *,
    engines: list[str] | None,
    dtypes: list[str] | None,
    sizes: list[int],
    batch_sizes: list[int],
    device: str,
    **shared,
) -> list[Job]:
    """A job per row; if it cannot run here, `not_run` says why. InputError if nothing that was asked for by name can
    run with any model. `shared` are fields with the same value in all jobs."""
    place, jobs, reasons = torch.device(device), [], {}  # reasons: flags -> why not, or None, of each model
    for model in models:
        network = make_network(model)
        possible = [dtype for dtype in DTYPES if why_not("eager", dtype, place, network) is None]
        native = [dtype for dtype in possible if DTYPES[dtype] in native_dtypes(place)]
        job_of = partial(Job, model=model, device=device, **shared)
        costs = {size: cost_of(network, size) for size in sizes}
        asked = model.dtypes or dtypes
        for size, batch, engine in product(sizes, batch_sizes, model.engines or engines or ENGINES):
            for dtype in asked or native:
                reason = why_not(engine, dtype, place, network)
                if dtype == "int8":
                    reason = reason or why_not_calibrated(model)
                named = [f"--engines {engine}"] * bool(engines) + [f"--dtypes {dtype}"] * bool(dtypes)
                reasons.setdefault(" ".join(named), []).append(reason)
                setting = {"engine": engine, "dtype": dtype, "batch": batch, "size": size}
                jobs.append(job_of(**setting, **costs[size], not_run=reason))
        setting = {"engine": "all", "batch": batch_sizes[0], "size": sizes[0], **costs[sizes[0]]}
        jobs += [job_of(**setting, dtype=dtype, not_run="emulated on this processor")
                 for dtype in possible if dtype not in native and not asked]  # fmt: skip
    if engines or dtypes:
        for flags, given in reasons.items():
            if all(given):
                raise InputError(f"{flags}: cannot run here: {given[0]}.")
    return jobs


def why_not_calibrated(model: Model) -> str | None:
    """Why a network cannot be calibrated for int8, or None if it can."""
    if model.source is None:
        return "its weights are random: int8 is calibrated with the training cases of a run"
    try:
        calibration_images(open_run(model.source))
    except InputError as error:
        return str(error).rstrip(".")
    return None


def cost_of(network: torch.nn.Module, size: int) -> dict[str, int]:
    """The cost of a pass over one volume, whatever the engine: parameters, MAC, and numbers read and written."""
    multiple = size_multiple(network.network)
    if size % multiple:
        raise InputError(f"--size {size}: {network.network} needs a multiple of {multiple}.")
    shape = (1, 4, size, size, size)
    try:
        macs, values = forward_macs(network, shape), unavoidable_values(network, shape)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--size {size}: {network.network} cannot run on it ({one_line(error)}).") from None
    return {"parameters": parameter_count(network), "macs": macs, "values": values}


# ---- profiles ------------------------------------------------------------------------------------------------------


def profile_networks(jobs: list[Job], rows: list[Row], path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """network -> row -> category -> ms of one pass, of MONAI's class, eager in float32, and of the fastest engine of
    ours. Writes them to `path`, a CSV, and beside it <stem>-<network>-before and -after (see `profiling.profile`)."""
    stem, spent_ms = path.with_suffix(""), {}
    measured = [(row, job) for row, job in zip(rows, jobs, strict=True) if row.status == "ok"]
    for network in dict.fromkeys(row.network for row, _ in measured):
        alike = [pair for pair in measured if pair[0].network == network and pair[0].size == jobs[0].size]
        before = [pair for pair in alike if is_baseline(pair[0])]
        after = [pair for pair in alike if not pair[0].model.startswith(MONAI)]
        for when, candidates in (("before", before), ("after", after)):
            if candidates:
                row, job = min(candidates, key=lambda pair: pair[0].p50_ms)
                if spent := measure_profile(replace(job, profile=f"{stem}-{network}-{when}")):
                    spent_ms.setdefault(network, {})[row_name(row)] = spent
    if spent_ms:
        write_csv(path, [{"network": network, "row": name} | parts
                         for network, bars in spent_ms.items() for name, parts in bars.items()])  # fmt: skip
    return spent_ms
