"""The table of the inference benchmark: its rows, the CSV file to which every run appends, and what is printed."""

import csv
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args

import torch

from models.benchmark.profiling import floor_ms
from models.benchmark.worker import MONAI, DeviceSpeed, Job, Result
from models.device import DTYPES, device_name
from models.errors import InputError, one_line
from models.files import git_commit, write_csv


@dataclass(frozen=True, kw_only=True)
class Setting:
    """When, on what and with what a row was measured."""

    date: str
    commit: str | None
    device: str
    torch: str
    model: str
    network: str
    engine: str
    dtype: str
    batch: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Row(Result, Setting):  # dataclasses take the fields of the last base first
    """A row of the table. Its columns are the fields of Setting, of Result, and these; what is not known is None."""

    volumes_per_s: float | None = None
    times_faster_than_monai_eager: float | None = None
    parameters: int | None = None
    gmac_per_volume: float | None = None
    matrix_peak_tflops: float | None = None
    matrix_peak_share: float | None = None
    bandwidth_gb_s: float | None = None
    floor_ms: float | None = None
    command: str


COLUMNS = tuple(field.name for field in fields(Row))


# ---- rows ----------------------------------------------------------------------------------------------------------


def make_row(job: Job, result: Result, speed: DeviceSpeed, circumstances: dict) -> Row:
    """The row of a job, from its result, the device's peak performance, and `circumstances` (see `describe_run`)."""
    peak, bandwidth = speed.peak_tflops.get(job.dtype), speed.bandwidth_gb_s
    macs, values = job.macs * job.batch, job.values * job.batch
    row = Row(
        **circumstances,
        **asdict(result),
        model=job.model.name,
        network=job.model.network,
        engine=job.engine,
        dtype=job.dtype,
        batch=job.batch,
        size=job.size,
        parameters=job.parameters,
        gmac_per_volume=job.macs / 1e9,
        matrix_peak_tflops=peak,
        bandwidth_gb_s=bandwidth,
    )
    if peak is not None:  # a type in which no row runs is not measured
        row = replace(row, floor_ms=floor_ms(macs, values, DTYPES[job.dtype].itemsize, peak, bandwidth))
    if result.status == "ok":
        share = 2 * macs / (1e9 * result.p50_ms) / peak
        row = replace(row, volumes_per_s=1e3 * job.batch / result.p50_ms, matrix_peak_share=share)
    return row


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with how many times faster they are than MONAI's class of the same width, size and batch in this run."""

    def setting(row):
        return row.network, row.parameters, row.size, row.batch

    baselines = {}
    for row in rows:
        if row.status == "ok" and is_baseline(row):
            baselines.setdefault(setting(row), row.p50_ms)
    return [
        replace(row, times_faster_than_monai_eager=baselines[setting(row)] / row.p50_ms)
        if row.status == "ok" and setting(row) in baselines
        else row
        for row in rows
    ]


def is_baseline(row: Row) -> bool:
    """Whether this is MONAI's class as it comes: eager, in float32."""
    return row.model.startswith(MONAI) and (row.engine, row.dtype) == ("eager", "float32")


def row_name(row: Row) -> str:
    return f"{row.model}: {row.engine}, {row.dtype}"


def latest_of_each_setting(rows: list[Row]) -> list[Row]:
    """Of the rows that were measured, the last for each setting."""
    measured = (row for row in rows if row.status == "ok")
    latest = {(row.model, row.engine, row.dtype, row.batch, row.size, row.parameters): row for row in measured}
    return list(latest.values())


# ---- the file ------------------------------------------------------------------------------------------------------


def describe_run(device: torch.device) -> dict[str, str | None]:
    """The columns that are the same in all rows of this run."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": git_commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def table_path(folder: Path, circumstances: dict) -> Path:
    """The CSV of this device and torch."""
    name = f"{circumstances['device']}-torch{circumstances['torch']}"
    return folder / f"inference-{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.csv"


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV file, none if it does not exist; missing columns are None. InputError for a damaged file."""
    if not path.is_file():
        return []
    kinds = {field.name: next(iter(get_args(field.type)), field.type) for field in fields(Row)}  # float of float | None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Row(**{name: kind(row[name]) if row.get(name) else None for name, kind in kinds.items()})
                for row in csv.DictReader(file)
            ]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: damaged ({one_line(error, 80)}). Repair it, or name another --out.") from None


def write_table(path: Path, rows: list[Row]):
    write_csv(path, [asdict(row) for row in rows])


# ---- on the screen -------------------------------------------------------------------------------------------------


def print_table(rows: list[Row], speed: DeviceSpeed):
    peaks = ", ".join(f"{dtype} {peak:.3g}" for dtype, peak in speed.peak_tflops.items())
    print(f"\nMeasured here: matrix products {peaks} TFLOP/s, copies {speed.bandwidth_gb_s:.3g} GB/s.\n"
          "x MONAI: times faster than its class, eager in float32. first s: until the first result.")
    width = max(len(row.model) for row in rows)
    print(f"{'model':{width}} engine    type    batch size   p50 ms   p90 ms floor ms of peak   vol/s x MONAI    GiB "
          "first s max diff  labels layout, kernels")
    for row in rows:
        setting = f"{row.model:{width}} {row.engine:9} {row.dtype:7} {row.batch:5} {row.size:4} "
        if row.status != "ok":
            print(setting + row.status)
            continue
        compared = ((row.times_faster_than_monai_eager, ".2f"), (row.max_logit_difference, ".1e"),
                    (row.label_agreement, ".2%"))  # fmt: skip
        faster, difference, agreement = ("-" if value is None else format(value, form) for value, form in compared)
        print(f"{setting}{row.p50_ms:8.4g} {row.p90_ms:8.4g} {row.floor_ms:8.3g} {row.matrix_peak_share:7.1%} "
              f"{row.volumes_per_s:7.3g} {faster:>7} {row.peak_gib:6.2f} {row.first_use_s:7.1f} {difference:>8} "
              f"{agreement:>7} {row.layout}, {row.kernels}")


def summarise(rows: list[Row], speed: DeviceSpeed, path: Path) -> dict:
    """The last line on stdout: what was measured on, and the fastest row of every model."""
    keys = ("engine", "dtype", "layout", "batch", "size", "p50_ms", "floor_ms", "times_faster_than_monai_eager",
            "label_agreement")  # fmt: skip
    measured, fastest = [row for row in rows if row.status == "ok"], {}
    for row in sorted(measured, key=lambda row: -row.volumes_per_s):
        fastest.setdefault(row.model, {key: getattr(row, key) for key in keys})
    return {"csv": str(path), "rows": len(rows), "measured": len(measured), **asdict(speed), "fastest": fastest}
