"""The peak performance of the device, the floor that follows for a network, and where the time of a pass goes.

The floor of a network is the time that the device's measured matrix peak needs for its multiply-accumulates plus the
time that its measured memory bandwidth needs for the traffic that no implementation avoids: every convolution and
linear layer reads its input once and writes its output once, and everything between them is free.
"""

import re
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.profiler
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from models.device import DTYPES, float32_multiplication, synchronise
from models.files import write_atomically
from models.timing import latencies_ms

PEAK_S = 3.0  # in which the peak of a number type has to be found, and the bandwidth
TRAFFIC_OPERATIONS = ("convolution", "mm", "addmm")
CATEGORIES = {  # what a profiled operator or kernel is counted as: the first pattern that its name matches
    "attention": r"attention|fmha|flash|softmax|\bbmm|baddbmm",
    "convolution": r"conv|fprop|wgrad|dgrad|implicit_gemm",
    "linear": r"mm\b|linear|gemm|matmul|cutlass|cublas|nvjet",
    "norm": r"norm|var_mean|welford|bn_fw",
    "layout copies": r"copy|cat\b|CatArray|clone|contiguous|memcpy|memset|roll|pad|transpose|permute|nchw|nhwc",
    "other": r"",
}


# ---- peak performance ----------------------------------------------------------------------------------------------


def matrix_peak_tflops(dtype: str, device: torch.device) -> float:
    """The most that products of two square matrices reach, in 10^12 operations per second (two per MAC).

    The side doubles while the next products, predicted from the last ones, fit into PEAK_S: in a type that the device
    only emulates, one large product can take a minute.
    """
    largest = 16384 if device.type == "cuda" else 2048
    best, side, began = 0.0, 256, None
    multiply = torch._int_mm if dtype == "int8" else torch.matmul  # which would add up in 8 bits
    while side <= largest:
        # Random numbers: a GPU that multiplies zeros draws less power and runs faster.
        a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
        with float32_multiplication(tf32=dtype == "tf32"):
            multiply(a, b).sum().item()  # libraries load at the first use
            began = began or time.perf_counter()
            counts = 4 * side >= largest  # the smaller ones only lead there
            timing = {"repeats": 30, "max_seconds": 0.5} if counts else {"repeats": 2, "warmup_s": 0}
            times = latencies_ms(lambda _, a=a, b=b: multiply(a, b), [a, b], min_repeats=1, **timing)
        best = max(best, 2 * side**3 / (1e9 * min(times)))
        next_s = 8 * min(times) / 1e3
        if time.perf_counter() - began + 3 * max(next_s, 0.3) > PEAK_S:  # loading, warming up, and one that counts
            break
        side *= 2
    return best


def copy_bandwidth_gb_s(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a copy, in 10^9.

    The tensors double, from what a cache may hold to what none does, while the next ones, predicted from the last, can
    be made and copied within PEAK_S: a machine that is short of memory hands it out slowly.
    """
    largest = 2**28 if device.type == "cuda" else 2**26
    torch.ones(1, device=device)  # the first use of a device takes seconds
    count, began = 2**22, time.perf_counter()
    while True:
        start = time.perf_counter()
        source, target = torch.ones(count, device=device), torch.empty(count, device=device)
        limits = {"repeats": 20, "max_seconds": 0.4, "min_repeats": 1, "warmup_s": 0}
        times = latencies_ms(lambda _, a=source, b=target: b.copy_(a), [source], **limits)
        end = time.perf_counter()
        if count == largest or end - began + 2 * (end - start) > PEAK_S:
            return 2 * source.nbytes / (1e6 * min(times))
        count *= 2


def unavoidable_values(model, shape) -> int:
    """How many numbers the convolutions and linear layers of one pass over `shape` read and write."""
    counter = Traffic()
    with torch.no_grad(), counter:
        deepcopy(model).to("meta").eval()(torch.empty(shape, device="meta"))
    return counter.values


class Traffic(TorchDispatchMode):
    """While active, adds up the elements of the tensors that the layers with weights take and return."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in TRAFFIC_OPERATIONS:
            self.values += result.numel() + sum(arg.numel() for arg in args if isinstance(arg, torch.Tensor))
        return result


def floor_ms(macs: int, values: int, bytes_per_value: int, peak_tflops: float, bandwidth_gb_s: float) -> float:
    return 2 * macs / (1e9 * peak_tflops) + values * bytes_per_value / (1e6 * bandwidth_gb_s)


# ---- where the time goes -------------------------------------------------------------------------------------------


def profile(run: Callable, image, path: Path) -> dict[str, float]:
    """Milliseconds of one run by category, from torch's profiler.

    Writes <path>.txt, the operators or kernels by time, and <path>-trace.json.gz, which ui.perfetto.dev opens.
    """
    cuda = image.device.type == "cuda"
    runs = 3
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    latencies_ms(run, [image], repeats=1)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(runs):
            run(image)
        synchronise(image.device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = profiler.key_averages()
    operators = events.table(sort_by=key, row_limit=40, max_name_column_width=80)
    write_atomically(path.with_name(f"{path.name}.txt"), operators)
    profiler.export_chrome_trace(f"{path}-trace.json.gz")
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for event in events:
        # On CUDA an operator's device time is that of its kernels, which are listed too: count the kernels.
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            spent[category_of(event.key)] += getattr(event, key) / 1e3 / runs
    return spent


def category_of(name: str) -> str:
    return next(category for category, pattern in CATEGORIES.items() if re.search(pattern, name, re.IGNORECASE))
