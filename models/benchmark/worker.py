"""The rows of the inference benchmark, each measured in a process of its own: nothing that an engine compiled, cached
or leaked reaches the next row, and one that runs out of memory takes nobody with it.

The benchmark hands over a job (a dict) and gets a dict back: `status` is "ok", "out of memory" or "failed: <reason>".
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from models import build_model
from models.benchmark.profiling import copy_bandwidth_gb_s, floor_ms, matrix_peak_tflops, profile, unavoidable_values
from models.brats import LABELS, find_cases
from models.device import DTYPES, float32_multiplication, peak_memory_gib, reset_peak_memory
from models.errors import InputError, one_line
from models.inference.engines import Engine, load_engine, with_attention
from models.inference.predict import segment_case
from models.runs import load_model
from models.timing import latencies_ms, summary_of

MONAI = "monai-"  # before the name of a network: MONAI's own class with the same weights
IMAGES = 3  # inputs that the passes take in turn: more than a cache holds
CASE_REPEATS = 3  # of the way from the files of a case to a label map on disk, after one that does not count


def in_own_process(job: dict) -> dict:
    """What `perform` makes of a job, in a new process."""
    places = (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-W", "ignore", "-m", "models.benchmark.worker"]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, env=environment)
    return result_of(done.returncode, done.stdout)


def result_of(exit_status: int, stdout: str) -> dict:
    """What a process said in its last line; where it was killed before it could, what that means."""
    if exit_status == 0:
        return json.loads(stdout.splitlines()[-1])
    if exit_status == -9:  # Linux kills the largest process when the memory is gone
        return {"status": "out of memory: killed by the system"}
    return {"status": f"failed: the process ended with exit status {exit_status}"}


def perform(job: dict) -> dict:
    try:
        return {"status": "ok", **(measure_device(job) if job["task"] == "device" else measure_row(job))}
    except Exception as error:  # whatever a compiler or a driver raises is this row's result, not the benchmark's end
        return {"status": status_of(error)}


def status_of(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {one_line(error, 200)}"


def measure_device(job: dict) -> dict:
    """What the device can do: matrix products in each type (10^12 operations per second), and copies (10^9 bytes)."""
    device = torch.device(job["device"])
    peaks = {dtype: matrix_peak_tflops(dtype, device) for dtype in job["dtypes"]}
    return {"peak_tflops": peaks, "bandwidth_gb_s": copy_bandwidth_gb_s(device)}


def measure_row(job: dict) -> dict:
    device = torch.device(job["device"])
    torch.manual_seed(1)
    shape = (job["batch"], 4, *[job["size"]] * 3)
    images = [torch.rand(shape, device=device) for _ in range(IMAGES)]
    if job["profile"] and device.type == "cpu":
        torch._inductor.config.cpp.enable_kernel_profile = True  # or a compiled network is one block in the profile
    network = None if exported(job) else make_network(job)
    if job["model"].startswith(MONAI):
        network = monai_twin(network)
    setting = {"shape": shape, "device": device, "cache": Path(job["cache"]), "fallback": False}
    engine = load_engine(network or job["source"], job["engine"], job["dtype"], job["layout"], **setting)
    reset_peak_memory(device)
    row = summary_of(latencies_ms(engine, images, job["repeats"], job["max_seconds"]))
    row |= {"peak_gib": peak_memory_gib(device), "layout": engine.layout, "kernels": engine.kernels,
            "first_use_s": engine.first_use_s}
    if job["profile"]:
        return row | {"spent_ms": profile(engine, images[0], Path(job["out"]), job["profile"])}
    if job["case"] and job["batch"] == 1:
        row |= measure_case(job, engine, device)
    if network is not None:
        with torch.inference_mode(), float32_multiplication(tf32=False):
            reference = with_attention(network, "reference").to(device)(images[0])
        row |= parity(engine(images[0]), reference)
    return row


def exported(job: dict) -> bool:
    return (job.get("source") or "").endswith(".pt2")


def make_network(job: dict) -> torch.nn.Module:
    """The trained network of a run, or one with random weights, the same in every process."""
    if job.get("source") and not exported(job):
        return load_model(job["source"])[0]
    torch.manual_seed(0)
    return build_model(job["network"], **job["config"]).eval()


def monai_twin(model: torch.nn.Module) -> torch.nn.Module:
    """MONAI's own class, as it comes, with the weights of ours."""
    from monai.networks.nets import SwinUNETR, UNet

    keys = {"unet": model.config.keys(),
            "swinunetr": ("in_channels", "out_channels", "feature_size", "window_size", "depths", "num_heads")}
    config = {key: model.config[key] for key in keys[model.network]}
    twin = {"unet": UNet, "swinunetr": SwinUNETR}[model.network](spatial_dims=3, **config)
    twin.load_state_dict(model.state_dict(), strict=True)
    twin.network, twin.config = MONAI + model.network, config
    return twin.eval()


def parity(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    return {
        "max_logit_difference": (logits.float() - reference).abs().max().item(),
        "label_agreement": (logits.argmax(1) == reference.argmax(1)).double().mean().item(),
    }


def measure_case(job: dict, engine: Engine, device: torch.device) -> dict[str, float]:
    """Milliseconds of each stage from the files of a case to a label map on disk: those of the median run."""
    case = find_cases(job["case"])[0]
    with tempfile.TemporaryDirectory() as folder:
        runs = [segment_case(case, engine, job["size"], device, Path(folder, "prediction.nii.gz"))
                for _ in range(CASE_REPEATS + 1)]  # fmt: skip
    median = sorted(runs[1:], key=lambda stages: sum(stages.values()))[CASE_REPEATS // 2]
    return {f"{stage}_ms": duration for stage, duration in median.items()}


# ---- rows ----------------------------------------------------------------------------------------------------------


def cost_of(network, size: int) -> dict:
    """What a pass over one volume asks for, whatever the engine: MAC, and numbers read and written."""
    from models.cost import forward_macs, parameter_count  # imports monai, which most rows can do without

    shape = (1, 4, size, size, size)
    try:
        macs, values = forward_macs(network, shape), unavoidable_values(network, shape)
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"--size {size}: {network.network} cannot run on it ({reason}).") from None
    return {"parameters": parameter_count(network), "macs": macs, "values": values}


def mean_test_dice(folder: Path) -> float | None:
    """The mean Dice of the three labels over a run's test cases, as its training script wrote it."""
    path = folder / "test_results.csv"
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        mean = next(row for row in csv.DictReader(file) if row["case"] == "mean")
    return sum(float(mean[f"dice_{label}"]) for label in LABELS.values()) / len(LABELS)


def make_row(job: dict, result: dict, ability: dict, columns) -> dict:
    """A row of the table from a job, what came of it, and what the device can do."""
    known = {key: value for key, value in (job | result).items() if key in columns}
    row = dict.fromkeys(columns) | known | {key: result.get(key) for key in ("repeats", "layout")}  # the job has wishes
    peak, bandwidth = ability["peak_tflops"].get(job["dtype"]), ability["bandwidth_gb_s"]
    macs, values = job["macs"] * job["batch"], job["values"] * job["batch"]
    row |= {"gmac_per_volume": job["macs"] / 1e9, "matrix_peak_tflops": peak, "bandwidth_gb_s": bandwidth}
    if peak is not None:  # a type in which no row runs is not measured
        row["floor_ms"] = floor_ms(macs, values, DTYPES[job["dtype"]].itemsize, peak, bandwidth)
    if row["status"] == "ok":
        row["volumes_per_s"] = 1e3 * job["batch"] / row["p50_ms"]
        row["matrix_peak_share"] = 2 * macs / (1e9 * row["p50_ms"]) / peak
    return row


def add_ratios(rows: list[dict]):
    """How many times faster than MONAI's class of the same width, at the same size and batch in the same run."""
    alike = ("network", "parameters", "size", "batch")
    baselines = {}
    for row in rows:
        if row["status"] == "ok" and is_baseline(row):
            baselines.setdefault(tuple(row[key] for key in alike), row["p50_ms"])
    for row in rows:
        baseline = baselines.get(tuple(row[key] for key in alike))
        if baseline and row["status"] == "ok":
            row["times_faster_than_monai_eager"] = baseline / row["p50_ms"]


def is_baseline(row: dict) -> bool:
    """Whether this is MONAI's class as it comes: eager, in float32."""
    return row["model"].startswith(MONAI) and (row["engine"], row["dtype"]) == ("eager", "float32")


def latest_rows(table: Path) -> list[dict]:
    """The last row of the table for each setting, with numbers where there are some."""
    latest = {}
    for row in csv.DictReader(table.open(newline="")):
        if row["status"] == "ok":
            row |= {key: int(row[key]) for key in ("batch", "size", "parameters")}
            row |= {key: float(row[key]) for key in ("volumes_per_s", "peak_gib")}
            latest[tuple(row[key] for key in ("model", "engine", "dtype", "batch", "size", "parameters"))] = row
    return list(latest.values())


if __name__ == "__main__":
    print(json.dumps(perform(json.load(sys.stdin))))
