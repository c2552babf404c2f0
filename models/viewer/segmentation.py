"""Predictions in the viewer: a trained network adds label map, Dice and times to a scene."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.brats import REGIONS, patient_of
from models.device import choose_device, inference_dtype
from models.errors import InputError
from models.inference.engines import choose_engine
from models.inference.predict import member_of, refuse_unknown_preprocessing, segment
from models.metrics import confusion, dice_per_target
from models.runs import Run, load_model, open_run
from models.timing import stage_durations_ms
from models.viewer.scene import Scene

STAGES = {"preprocess": "preprocessing", "forward": "network", "postprocess": "back to the grid of the file"}


@dataclass(frozen=True)
class Segmenter:
    """A run, and the network or engine that predicts with it."""

    run: Run
    network: Callable[[torch.Tensor], torch.Tensor]  # in evaluation mode; or an engine
    device: torch.device
    amp_dtype: torch.dtype | None


def load_segmenter(path: Path, device: str, amp: str) -> Segmenter:
    """The run in a folder, or of a checkpoint; `device` and `amp` as the flags have them."""
    run = open_run(path)
    refuse_unknown_preprocessing(run)
    device = choose_device(device)
    return Segmenter(run, load_model(path, device)[0], device, inference_dtype(amp, run.amp, device))


def with_engine(segmenter: Segmenter, engine: str, cases: int) -> Segmenter:
    """With an engine in place of the network for so many cases, as --engine says; making one can take a minute."""
    network, dtype, device, run = segmenter.network, segmenter.amp_dtype, segmenter.device, segmenter.run
    chosen = choose_engine(network, engine, dtype, run.size[0], device, cases, run=run)
    return replace(segmenter, network=chosen)


def refuse_unfit_tensor(scene: Scene, run: Run):
    """InputError for a preprocessed case of another size than those that the run was trained on."""
    if scene.affine is not None:
        return
    if not run.preprocessing.get("crop", True):
        raise InputError(f"{scene.name}: a tensor is cropped, but {run.name} predicts whole files. Name the raw case.")
    size = run.preprocessing["size"]
    if size is not None and list(scene.image.shape[1:]) != [size] * 3:
        sides = "x".join(map(str, scene.image.shape[1:]))
        raise InputError(
            f"{scene.name}: a tensor of {sides} voxels, but {run.name} was trained on cubes of {size}. "
            f"Preprocess with --size {size}, or name the raw case."
        )


def segment_scene(segmenter: Segmenter, scene: Scene, report: Callable[[str], None] = lambda text: None) -> Scene:
    """The scene with the network's prediction on its own grid, its Dice, and the milliseconds it took.

    `report` is called with the name of each stage as it begins, and before every layer of the network; an exception
    that it raises ends the work.
    """
    run, network = segmenter.run, segmenter.network
    refuse_unfit_tensor(scene, run)

    def work(on_stage):
        def begin(stage):
            report(f"segmenting: {STAGES[stage]}")
            on_stage(stage)

        # A scene has RAS axes: with their affine, the prediction comes back to these.
        affine = None if scene.affine is None else scene.ras_affine
        member = member_of(run, network, segmenter.amp_dtype)
        return segment(scene.image, affine, member, run.preprocessing, segmenter.device, begin)

    layers = network.modules() if isinstance(network, torch.nn.Module) else ()  # an engine is a single step
    before_layer = partial(report, f"segmenting: {STAGES['forward']}")
    hooks = [module.register_forward_pre_hook(lambda *_: before_layer()) for module in layers]
    try:
        label, spent_ms = stage_durations_ms(work)
    finally:
        for hook in hooks:
            hook.remove()
    if scene.affine is None:  # neither of the others has anything to do
        parts = f"network {spent_ms['forward']:.0f}"
    else:
        parts = ", ".join(f"{STAGES[stage]} {ms:.0f}" for stage, ms in spent_ms.items())
    report("segmenting: Dice")
    seen = patient_of(scene.name) in (run.seen or ())
    by = f"{run.name}, which was trained on this patient," if seen else run.name
    timing = f"segmented by {by} in {sum(spent_ms.values()):.0f} ms ({parts})"
    return with_prediction(scene, label, timing)


def with_prediction(scene: Scene, label: np.ndarray, timing: str = "") -> Scene:
    """The scene with a predicted label map [D, H, W], and its Dice where there is a truth."""
    maps = scene.maps | {"prediction": label}
    return replace(scene, maps=maps, scores=describe_dice(maps) if "truth" in maps else "", timing=timing)


def describe_dice(maps: dict) -> str:
    """The Dice of each region, prediction against truth."""
    prediction, truth = (torch.from_numpy(np.ascontiguousarray(maps[name])) for name in ("prediction", "truth"))
    dice = dice_per_target(confusion(prediction, truth))
    return "Dice " + ", ".join(f"{region} {dice[region]:.3f}" for region in REGIONS)
