"""The rows of the inference benchmark, each measured in a process of its own: nothing that an engine compiled, cached
or leaked reaches the next row, and running out of memory ends that row alone.

A process gets its task as an argument and a JSON object on stdin, and answers with a JSON object in the last line of
stdout.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from types import MethodType

import torch
from monai.networks.nets import SwinUNETR, UNet

from models import build_model, with_defaults
from models.benchmark.profiling import copy_bandwidth_gb_s, matrix_peak_tflops, profile
from models.cases import find_cases, scheme_of
from models.device import choose_device, float32_multiplication, keep_freed_memory, peak_memory_gib, reset_peak_memory
from models.errors import InputError, one_line
from models.files import ROOT
from models.inference.engines import Engine, load_engine, with_attention
from models.inference.predict import Member, member_of, predict, segment_case
from models.inference.quantisation import as_input, calibration_images
from models.losses import labels_from_logits
from models.metrics import confusion, dice_per_target, mean_label_dice
from models.preprocessing import label_map
from models.runs import Run, load_model, open_run
from models.tensors import load_case
from models.timing import latencies_ms, stage_durations_ms, summary_of

MONAI = "monai-"  # before the name of a model: MONAI's own class with the same weights
IMAGES = 3  # inputs that the passes take in turn: more than a cache holds
CASE_REPEATS = 3  # timed, from the files of a case to a label map on disk, after one to warm up


@dataclass(frozen=True)
class Model:
    """A network with its weights, under its name in the table."""

    name: str
    network: str  # as build_model takes it, with `config`
    config: dict
    source: str | None = None  # a run or a .pt2 file; None: random weights
    engines: tuple[str, ...] = ()  # that can run it; empty: all
    dtypes: tuple[str, ...] = ()  # in which it can run; empty: all
    dice: float | None = None  # on the test cases of its run


@dataclass(frozen=True, kw_only=True)
class Job:
    """The task of the process that measures one row."""

    model: Model
    engine: str
    dtype: str
    layout: str  # or "auto"
    batch: int
    size: int  # side of the cube in voxels
    device: str
    parameters: int
    macs: int  # of a pass over one volume
    values: int  # that such a pass reads and writes at least
    repeats: int
    max_seconds: float
    cache: str  # folder of compiled engines
    case: str | None = None  # folder of a raw case
    labels: str | None = None  # the scheme of its label values, where its file names do not say
    not_run: str | None = None  # why it cannot run here
    profile: str | None = None  # path without suffix, for `measure_profile`


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a job; what was not measured is None."""

    status: str  # "ok", or "not run", "out of memory" or "failed" with the reason
    layout: str | None = None
    kernels: str | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    mean_ms: float | None = None
    sd_ms: float | None = None
    repeats: int | None = None
    peak_gib: float | None = None
    first_use_s: float | None = None
    max_logit_difference: float | None = None
    label_agreement: float | None = None
    dice: float | None = None  # of the labels, the mean over the test cases of the run
    load_ms: float | None = None
    preprocess_ms: float | None = None
    forward_ms: float | None = None
    postprocess_ms: float | None = None
    write_ms: float | None = None


@dataclass(frozen=True)
class DeviceSpeed:
    """The peak performance of a device."""

    peak_tflops: dict[str, float]  # by number type: 10^12 operations per second in matrix products
    bandwidth_gb_s: float  # 10^9 bytes per second read or written by copies


# ---- processes -----------------------------------------------------------------------------------------------------


def measure(job: Job) -> Result:
    """The result of a job that a new process measures, or the reason why it cannot run."""
    if job.not_run:
        return Result(status=f"not run: {job.not_run}")
    return Result(**in_own_process("row", asdict(job)))


def measure_profile(job: Job) -> dict[str, float]:
    """Milliseconds of a pass by category, as a new process finds them, which writes the profile to `job.profile` (see
    `profiling.profile`); empty where it fails."""
    return in_own_process("profile", asdict(job)).get("spent_ms", {})


def measure_speed(device: str, dtypes: list[str]) -> DeviceSpeed:
    """The peak performance of the device in these number types. InputError if the device cannot be used."""
    answer = in_own_process("device", {"device": device, "dtypes": dtypes})
    status = answer.pop("status")
    if status != "ok":
        raise InputError(f"--device {device}: {status}")
    return DeviceSpeed(**answer)


def in_own_process(task: str, request: dict) -> dict:
    """What `answer_to` returns in a new process."""
    places = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-W", "ignore", "-m", "models.benchmark.worker", task]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, env=environment)
    return answer_of(done.returncode, done.stdout)


def answer_of(exit_status: int, stdout: str) -> dict:
    """The answer in the last line of a process; if it was killed before it could write one, what that means."""
    if exit_status == 0:
        return json.loads(stdout.splitlines()[-1])
    if exit_status == -9:  # Linux kills the largest process when the memory is gone
        return {"status": "out of memory: killed by the system"}
    return {"status": f"failed: the process ended with exit status {exit_status}"}


def answer_to(task: str, request: dict) -> dict:
    try:
        if task == "device":
            return {"status": "ok", **asdict(device_speed(torch.device(request["device"]), request["dtypes"]))}
        job = Job(**request | {"model": Model(**request["model"])})
        return {"spent_ms": profile_row(job)} if task == "profile" else asdict(measure_row(job))
    except Exception as error:  # whatever a compiler or a driver raises is this row's result, not the benchmark's end
        return {"status": status_of(error)}


def status_of(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {one_line(error, 200)}"


# ---- in the process ------------------------------------------------------------------------------------------------


def device_speed(device: torch.device, dtypes: list[str]) -> DeviceSpeed:
    peaks = {dtype: matrix_peak_tflops(dtype, device) for dtype in dtypes}
    return DeviceSpeed(peaks, copy_bandwidth_gb_s(device))


def measure_row(job: Job) -> Result:
    network, engine, images = prepare(job)
    device = images[0].device
    reset_peak_memory(device)
    measured = summary_of(latencies_ms(engine, images, job.repeats, job.max_seconds))
    measured |= {"peak_gib": peak_memory_gib(device), "layout": engine.layout, "kernels": engine.kernels,
                 "first_use_s": engine.first_use_s, "dice": job.model.dice}  # fmt: skip
    if job.case and job.batch == 1:
        measured |= {f"{stage}_ms": duration for stage, duration in measure_case(job, engine, device).items()}
    if network is not None:
        with torch.inference_mode(), float32_multiplication(tf32=False):
            reference = with_attention(network, "reference").to(device)(images[0])
        measured |= parity(engine(images[0]), reference)
    if job.dtype == "int8":  # no longer the network that the training script tested
        measured["dice"] = mean_dice_of_engine(engine, open_run(job.model.source)) if job.batch == 1 else None
    return Result(status="ok", **measured)


def profile_row(job: Job) -> dict[str, float]:
    if job.device == "cpu":
        torch._inductor.config.cpp.enable_kernel_profile = True  # or a compiled network is one block in the profile
    _, engine, images = prepare(job)
    return profile(engine, images[0], Path(job.profile))


def prepare(job: Job) -> tuple[torch.nn.Module | None, Engine, list[torch.Tensor]]:
    """The network, which is None where there is nothing but a .pt2 file of it, its engine, and IMAGES inputs: random
    ones, or for int8, which is right only within the range of its calibration, training cases."""
    device = choose_device(job.device)
    keep_freed_memory(not job.model.name.startswith(MONAI))  # MONAI's classes run as they come
    torch.manual_seed(1)
    shape = (job.batch, 4, *[job.size] * 3)
    calibration = calibration_images(open_run(job.model.source)) if job.dtype == "int8" else []
    images = [as_input(image, shape) for image in islice(cycle(calibration), IMAGES)]
    images = images or [torch.rand(shape, device=device) for _ in range(IMAGES)]
    network = None if is_exported(job.model) else make_network(job.model)
    if job.model.name.startswith(MONAI):
        network = monai_twin(network)
    source = job.model.source if network is None else network
    setting = {"shape": shape, "device": device, "cache": Path(job.cache), "fallback": False}
    engine = load_engine(source, job.engine, job.dtype, job.layout, **setting, calibration=calibration)
    return network, engine, images


def is_exported(model: Model) -> bool:
    return model.source is not None and model.source.endswith(".pt2")


def make_network(model: Model) -> torch.nn.Module:
    """The trained network of a run, or one with random weights, the same in every process."""
    if model.source and not is_exported(model):
        return load_model(model.source)[0]
    torch.manual_seed(0)
    return build_model(model.network, **model.config).eval()


def has_monai_twin(model: Model) -> bool:
    """Whether MONAI has a network of these settings."""
    config = with_defaults(model.network, model.config)
    return config["variant"] == "monai" if model.network == "unet" else config["use_attention"]


def monai_twin(model: torch.nn.Module) -> torch.nn.Module:
    """MONAI's own class, as it comes, with the weights of ours."""
    keys = {"unet": ("in_channels", "out_channels", "channels", "strides", "num_res_units"),
            "swinunetr": ("in_channels", "out_channels", "feature_size", "window_size", "depths", "num_heads")}
    config = {key: model.config[key] for key in keys[model.network]}
    if model.network == "swinunetr":
        config["use_v2"] = model.config["v2"]
    twin = {"unet": UNet, "swinunetr": SwinUNETR}[model.network](spatial_dims=3, **config)
    twin.load_state_dict(model.state_dict(), strict=True)
    twin.network, twin.config = MONAI + model.network, config
    if model.network == "swinunetr":
        twin.set_attention = MethodType(set_monai_attention, twin)
    return twin.eval()


def set_monai_attention(network: torch.nn.Module, kind: str):
    """As `set_attention` of our networks: MONAI's class has the written-out formula ("reference") and a fused one."""
    for module in network.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = kind != "reference"


def parity(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    return {
        "max_logit_difference": (logits.float() - reference).abs().max().item(),
        "label_agreement": (labels_from_logits(logits) == labels_from_logits(reference)).double().mean().item(),
    }


def mean_dice_of_engine(engine: Engine, run: Run) -> float | None:
    """The mean Dice of the three labels over the run's test cases, as the engine segments them; None where there are
    none."""
    dice = []
    for name in run.split["test"]:
        case = load_case(run.data / f"{name}.pt")
        prediction = label_map(predict(engine, case["image"]))
        dice.append(mean_label_dice(dice_per_target(confusion(prediction, case["label"][0]))))
    return fmean(dice) if dice else None


def measure_case(job: Job, engine: Engine, device: torch.device) -> dict[str, float]:
    """Milliseconds of each stage from the files of a case to a label map on disk: those of the median repetition."""
    case = find_cases(job.case, job.labels)[0]
    member, preprocessing = Member(engine), {"size": job.size, "spacing_mm": 1.0}  # a .pt2 file does not say its own
    if job.model.source and not is_exported(job.model):
        run = open_run(job.model.source)
        member, preprocessing = member_of(run, engine), run.preprocessing
    setting = {"preprocessing": preprocessing, "scheme": scheme_of(case), "device": device}
    with tempfile.TemporaryDirectory() as folder:
        segmented = partial(segment_case, case, member, Path(folder, "prediction.nii.gz"), **setting)
        repeats = [
            stage_durations_ms(lambda on_stage: segmented(on_stage=on_stage))[1] for _ in range(CASE_REPEATS + 1)
        ]
    return sorted(repeats[1:], key=lambda stages: sum(stages.values()))[CASE_REPEATS // 2]


if __name__ == "__main__":
    print(json.dumps(answer_to(sys.argv[1], json.load(sys.stdin))))
