#!/usr/bin/env python3
"""How long `make demo` will take on this machine, from a few of the training steps that it spends most of its time in.

  python tests/benchmarks/demo_minutes.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from models import build_model
from models.amp import step_seconds
from models.device import choose_device, device_name, native_dtypes, resolve_amp

# The whole demo, imports, phantoms and evaluation included, takes as long as this many steps of the U-Net: measured
# once on 2 cores.
STEPS = 1200

device = choose_device("auto")
choice = resolve_amp("auto", device)
choices = ("off", "bf16") if device.type == "cpu" and torch.bfloat16 in native_dtypes(device) else (choice,)
step_s = min(step_seconds(build_model("unet"), 1, [64, 64, 64], device, choices).values())
print(f"This demo takes about {max(1, round(STEPS * step_s / 60))} minutes here ({device_name(device)}).")
