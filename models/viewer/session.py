"""Going through cases in the viewer: loading and segmenting happen in a thread, and the window stays responsive."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from models.errors import InputError, one_line
from models.viewer.scene import Scene

POLL_MS = 150  # between two checks of the thread


class Abandoned(Exception):
    """The user has moved on: the result of this work is no longer wanted."""


class Session:
    """Steps through cases in a viewer. Loading and segmenting happen in a thread, one case at a time, whose progress
    the window polls; only the latest request counts.

    Args:
        loaders: case name -> function that returns its Scene. The viewer shows one of them already.
        segment: segment(scene, report) returns the scene with a prediction, calling report(text) as it proceeds; or
            None.
    """

    def __init__(self, viewer, loaders: dict, segment: Callable | None = None):
        self.viewer, self.loaders, self.segment, self.names = viewer, loaders, segment, list(loaders)
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
        if self.segment:
            self.start(partial(self.segment, scene), self.viewer.show_maps, "segmenting")

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
