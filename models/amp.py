"""The number type that a training computes in: --amp without "auto", measured where nothing else can tell."""

import time
from copy import deepcopy
from statistics import median

import torch

from models.brats import LABELS
from models.device import AMP_DTYPES, decided_once, native_dtypes, resolve_amp, synchronise
from models.losses import make_loss

TRIAL_SIDE = 64  # voxels; large enough to tell which number type is faster, small enough not to be waited for


def choose_amp(amp: str, model, batch_size: int, size: list[int], device: torch.device) -> str:
    """--amp without "auto". On a CPU that multiplies bf16, where small layers can lose more by conversions than they
    gain, a few training steps in each type decide."""
    if amp != "auto" or device.type == "cuda" or torch.bfloat16 not in native_dtypes(device):
        return resolve_amp(amp, device)

    def decide():
        seconds = step_seconds(model, batch_size, [min(side, TRIAL_SIDE) for side in size], device)
        faster = min(seconds, key=seconds.get)
        bf16_ms, float32_ms = 1e3 * seconds["bf16"], 1e3 * seconds["off"]
        print(f"--amp auto: a step takes {bf16_ms:.0f} ms in bf16 and {float32_ms:.0f} ms in float32: {faster}.")
        return faster

    return decided_once(decide)


def step_seconds(model, batch_size: int, size: list[int], device: torch.device, choices=("off", "bf16")) -> dict:
    """Median seconds of a forward and backward pass for each of these --amp, taken in turns after one of each that does
    not count."""
    model, criterion, seconds = deepcopy(model).to(device), make_loss(), {choice: [] for choice in choices}
    image = torch.rand(batch_size, 4, *size, device=device)
    label = torch.randint(len(LABELS) + 1, (batch_size, 1, *size), device=device)
    for _ in range(4):
        for choice, times in seconds.items():
            start = time.perf_counter()
            with torch.autocast(device.type, AMP_DTYPES[choice], enabled=choice != "off"):
                logits = model(image)
            criterion(logits.float(), label).backward()
            synchronise(device)
            times.append(time.perf_counter() - start)
    return {choice: median(times[1:]) for choice, times in seconds.items()}
