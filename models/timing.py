"""Latencies and their statistics."""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

from models.device import synchronise

MIN_REPEATS = 5
WARMUP_S = 0.3


def latencies_ms(
    run: Callable,
    images: list,
    repeats: int = 30,
    max_seconds: float = math.inf,
    min_repeats: int = MIN_REPEATS,
    warmup_s: float = WARMUP_S,
) -> list[float]:
    """Milliseconds of each of `repeats` runs that take the images in turn, the device idle before and after each.

    Untimed runs come first, for `warmup_s`: caches fill, and a GPU raises its clock. After `max_seconds` of timed runs
    no further one begins, unless there are fewer than `min_repeats`.
    """
    device = images[0].device
    began = time.perf_counter()
    while time.perf_counter() - began < warmup_s:
        run(images[-1])
        synchronise(device)
    times, began = [], time.perf_counter()
    for repeat in range(repeats):
        if repeat >= min_repeats and time.perf_counter() - began > max_seconds:
            break
        start = time.perf_counter()
        run(images[repeat % len(images)])
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def stage_durations_ms(run: Callable[[Callable[[str], None]], object]) -> tuple[object, dict[str, float]]:
    """The result of `run(on_stage)`, and the milliseconds of each of its stages: it calls on_stage(name) as each
    begins, when the device is idle."""
    began = []
    result = run(lambda stage: began.append((stage, time.perf_counter())))
    began.append(("end", time.perf_counter()))
    return result, {stage: 1e3 * (end_s - start_s) for (stage, start_s), (_, end_s) in pairwise(began)}


def summary_of(times_ms: list[float]) -> dict[str, float]:
    """Median, percentiles, mean and standard deviation in ms, and their number."""
    ordered = sorted(times_ms)

    def percentile(share):  # the smallest time that at least this share of the runs kept within
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return {
        "p50_ms": statistics.median(ordered),
        "p90_ms": percentile(0.90),
        "p99_ms": percentile(0.99),
        "mean_ms": statistics.fmean(ordered),
        "sd_ms": statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        "repeats": len(ordered),
    }
