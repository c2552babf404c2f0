"""Live segmentation: the case that the viewer shows goes through a trained network while the window stays responsive.

`segment` takes one case to network space and back; a `Session` steps through cases and does the work in a thread.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from models.errors import InputError, one_line
from models.viewer.scene import Scene, with_prediction

POLL_MS = 150  # between two checks of the thread


# ---- segmenting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A trained network in evaluation mode, or an engine, and its cases: cubes of `size` voxels, from a spacing of
    `spacing_mm`."""

    name: str
    model: object
    size: int
    spacing_mm: float
    device: object
    amp_dtype: object


def open_run(path: Path, device: str, amp: str) -> Run:
    """The network of a run (its folder, or a checkpoint in it), ready to segment."""
    from models.device import choose_device, inference_dtype
    from models.runs import load_model

    device = choose_device(device)
    model, checkpoint = load_model(path, device)
    folder = path if path.is_dir() else path.parent
    described = folder / "config.json"
    config = json.loads(described.read_text()) if described.is_file() else {}
    if missing := {"size", "spacing_mm"} - config.keys():
        raise InputError(f"{described}: lacks {' and '.join(sorted(missing))} of the cases it was trained on.")
    amp_dtype = inference_dtype(amp, checkpoint.get("amp", "off"), device)
    return Run(folder.name, model, config["size"][0], config["spacing_mm"], device, amp_dtype)


def with_engine(run: Run, engine: str) -> Run:
    """The run with an engine in place of its network, as --engine says; making one can take a minute."""
    from models.inference.engines import choose_engine

    return replace(run, model=choose_engine(run.model, engine, run.amp_dtype, run.size, run.device))


def refuse_other_size(scene: Scene, run: Run):
    if scene.affine is None and scene.image.shape[1:] != (run.size,) * 3:
        sides = "x".join(map(str, scene.image.shape[1:]))
        raise InputError(
            f"{scene.name}: a tensor of {sides} voxels, but {run.name} was trained on cubes of {run.size}. "
            f"Preprocess with --size {run.size}, or name the raw case."
        )


def segment(scene: Scene, run: Run, report=lambda stage: None) -> Scene:
    """The scene with the network's prediction on its own grid, its Dice, and the milliseconds it took.

    `report` is called with the name of each stage as it begins, and before every layer of the network; an exception
    that it raises ends the work.
    """
    import torch

    from models.inference.predict import predict
    from models.preprocessing import label_map, native_label_map, to_network

    refuse_other_size(scene, run)
    times = [time.perf_counter()]
    report("segmenting: preprocessing")
    if scene.affine is None:
        image, geometry = torch.from_numpy(scene.image), None
    else:  # the image has RAS axes already: with their affine, native_label_map brings the prediction back to these
        case = to_network(scene.image, None, scene.ras_affine, run.size, run.spacing_mm)
        image, geometry = case["image"], case["geometry"]
    image = image.to(run.device)
    times.append(time.perf_counter())
    in_network = partial(report, "segmenting: network")
    in_network()
    layers = run.model.modules() if isinstance(run.model, torch.nn.Module) else ()  # an engine is a single step
    hooks = [module.register_forward_pre_hook(lambda *_: in_network()) for module in layers]
    try:
        probabilities = predict(run.model, image, run.amp_dtype)  # [4, D, H, W]
    finally:
        for hook in hooks:
            hook.remove()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    times.append(time.perf_counter())
    report("segmenting: back to the grid of the file")
    label = native_label_map(probabilities, geometry) if geometry else label_map(probabilities)
    label = label.cpu().numpy()  # [D, H, W] of the scene
    times.append(time.perf_counter())
    before_ms, network_ms, after_ms = ((end - start) * 1e3 for start, end in pairwise(times))
    parts = f"network {network_ms:.0f}"
    if geometry:
        parts = f"preprocessing {before_ms:.0f}, {parts}, back to the grid of the file {after_ms:.0f}"
    timing = f"segmented by {run.name} in {before_ms + network_ms + after_ms:.0f} ms ({parts})"
    report("segmenting: Dice")
    return with_prediction(scene, label, timing)


# ---- going through cases -------------------------------------------------------------------------------------------


class Abandoned(Exception):
    """The user has gone on: nobody waits for this work any more."""


class Session:
    """Steps through cases in a viewer. Loading and segmenting happen in a thread, one case at a time, and the window
    checks regularly how far it has got; only the latest request counts.

    Args:
        loaders: case name -> function that returns its Scene. The viewer shows one of them already.
        run: what to segment each case with, or None.
    """

    def __init__(self, viewer, loaders: dict, run: Run | None = None):
        self.viewer, self.loaders, self.run, self.names = viewer, loaders, run, list(loaders)
        self.position = self.names.index(viewer.scene.name)
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.wanted, self.future, self.then, self.stage, self.began_s = 0, None, None, "", 0.0
        canvas = viewer.figure.canvas
        self.timer = canvas.new_timer(interval=POLL_MS)
        self.timer.add_callback(self.poll)
        self.timer.start()
        canvas.mpl_connect("key_press_event", self.on_key)
        canvas.mpl_connect("close_event", self.on_close)
        viewer.figure.session = self  # matplotlib holds handlers weakly
        self.announce(viewer.scene)

    def announce(self, scene: Scene):
        """Name the case in the window's title, and have it segmented."""
        many = len(self.names) > 1
        self.viewer.place = f"case {self.position + 1} of {len(self.names)}" if many else ""
        manager = self.viewer.figure.canvas.manager
        if manager is not None:
            manager.set_window_title(f"{self.viewer.place}: {scene.name}" if many else scene.name)
        self.viewer.show_slice()
        if self.run:
            self.start(partial(segment, scene, self.run), self.viewer.show_maps, "segmenting")

    def show_loaded(self, scene: Scene):
        self.viewer.show(scene)
        self.announce(scene)

    def step(self, by: int):
        position = self.position + by
        if not 0 <= position < len(self.names):
            self.viewer.say(f"this is the {'last' if by > 0 else 'first'} of {len(self.names)} cases", "#ffcc66")
            return
        self.position = position
        name = self.names[position]
        load = self.loaders[name]
        self.start(lambda report: load(), self.show_loaded, f"loading {name}, case {position + 1} of {len(self.names)}")

    # ---- the thread

    def start(self, work, then, stage: str):
        """Do `work(report)` in the thread and pass its result to `then`; work under way is abandoned."""
        if self.future:
            self.future.cancel()
        self.wanted += 1
        self.then, self.stage, self.began_s = then, stage, time.perf_counter()
        self.future = self.pool.submit(work, partial(self.report, self.wanted))
        self.poll()

    def report(self, number: int, stage: str):
        """Called by the thread: which stage work `number` has reached. Ends it if it is no longer wanted."""
        if number != self.wanted:
            raise Abandoned
        self.stage = stage

    def poll(self):
        """Called by the window: show what the thread is doing, or take its result."""
        if self.future is None:
            return
        if not self.future.done():
            self.viewer.say(f"{self.stage} ... {time.perf_counter() - self.began_s:.1f} s", "#ffcc66")
            return
        future, self.future = self.future, None
        if error := future.exception():
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            text = f"{self.names[self.position]}: {kind}{one_line(error)}"
            print(text, file=sys.stderr)
            self.viewer.say(text if len(text) <= 150 else f"{text[:149]}…", "#ff7766")
        else:
            self.then(future.result())

    # ---- responses

    def on_key(self, event):
        if event.key in ("n", "b"):
            self.step(1 if event.key == "n" else -1)

    def on_close(self, event):
        self.timer.stop()
        self.wanted, self.future = self.wanted + 1, None
        self.pool.shutdown(wait=False, cancel_futures=True)
