"""Signals that end a script early: Ctrl-C, SIGTERM (Slurm, torchrun, a computer that shuts down) and SIGUSR1, with
which Slurm warns of the end of a job if it is asked to (`sbatch --signal=USR1@60`)."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import Interrupted

# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
PATIENCE_S = 10.0  # after the first signal, Ctrl-C ends a process that has not stopped by then


def raise_on_signals(once: bool = False):
    """Let all of them raise Interrupted; with `once` only the first, so that no other interrupts the cleaning up."""

    def interrupt(number, frame):
        if once:
            ignore_signals()
        raise Interrupted(number, f"Interrupted by {signal.Signals(number).name}.")

    for number in SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, signals raise nothing but are added to a list, which is to be looked at after each step.

    A second signal changes nothing: torchrun passes on a Ctrl-C that its processes have already received.
    """
    received, first = [], None

    def note(number, frame):
        nonlocal first
        first = first or time.monotonic()
        received.append(number)
        if number == signal.SIGINT and time.monotonic() - first > PATIENCE_S:
            raise Interrupted(number, "Interrupted.")

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
