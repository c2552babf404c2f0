"""last.pt, from which a training is resumed after an epoch or in the middle of one; and when a training has to stop.

On a CPU a training that was stopped anywhere and resumed is equal to one that was not, to the last bit. All randomness
is drawn from two generators, torch's and that of the augmentation, whose states are kept; the order of the cases and
their patches follow from the seed and the number of the epoch. Python's and NumPy's generators are not used.
"""

import math
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import runs
from models.dataset import Cases, epoch_order
from models.device import rank, world_size
from models.errors import InputError, Interrupted, one_line
from models.files import write_csv
from models.interruption import SIGNALS
from models.patches import cut_patches
from models.plots import training_plots


@dataclass(frozen=True)
class Learner:
    """What a training changes: the network, and all that an update takes."""

    model: nn.Module
    average: nn.Module | None  # of the weights, or None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp: str  # as --amp, without "auto"

    @property
    def judged(self) -> nn.Module:
        """The network that is validated, tested and kept."""
        return self.model if self.average is None else self.average


@dataclass
class Progress:
    """How far this process has come in an epoch."""

    epoch: int  # counted from 0
    cases: list[list[str]]  # names, of each step
    step: int  # how many are done
    losses: Tensor  # [steps], on the device; 0 where a step is not done
    norms: Tensor  # [updates], of the gradients before they were clipped
    accumulate: int  # steps of an update
    generator: torch.Generator  # of the augmentation
    waited_s: float  # for data
    start: float  # time.perf_counter() less the seconds that the epoch has taken before a resumption
    saved: float  # time.perf_counter() when last.pt was written, or the epoch began


def write_last(folder: Path, history: list[dict], learner: Learner, within: dict | None = None):
    """Write last.pt: the state after the epochs of `history` and, with `within` (see `state_of`), after a part of the
    next one; all processes have to call it together then."""
    state = {"optimizer": learner.optimizer.state_dict(), "scaler": learner.scaler.state_dict(), "history": history}
    if within:
        state["progress"] = [within]  # of each process
        if world_size() > 1:
            state["progress"] = [None] * world_size()
            dist.all_gather_object(state["progress"], within)
    if learner.average is not None:
        state["trained_model"] = learner.model.state_dict()
    if rank() == 0:
        score = history[-1]["dice_mean"] if history else None
        runs.save(folder / "last.pt", runs.checkpoint_of(learner.judged, learner.amp, len(history), score) | state)


def write_epoch(folder: Path, history: list[dict], best: dict, learner: Learner):
    """Write what a whole epoch leaves behind, except best.pt, which is written first: an interruption between the two
    repeats an epoch rather than losing the best one."""
    write_last(folder, history, learner)
    write_history(folder, history, best, learner.model.network)


def write_history(folder: Path, history: list[dict], best: dict, network: str):
    write_csv(folder / "train.csv", history)
    training_plots(history, best, folder / "training_plots.png", f"{network}, {folder.name}")


def restore(path: Path, learner: Learner) -> tuple[list[dict], dict | None]:
    """Bring a learner to where last.pt stands; returns the history and what this process has done within the next
    epoch. InputError where the file does not hold what this learner needs."""
    checkpoint = runs.load_checkpoint(path)
    runs.load_weights(learner.judged, checkpoint, path)
    if learner.average is not None:
        runs.load_weights(learner.model, {"model": checkpoint.get("trained_model")}, path)
    try:
        learner.optimizer.load_state_dict(checkpoint["optimizer"])
        learner.scaler.load_state_dict(checkpoint["scaler"])
        history, within = checkpoint["history"], checkpoint.get("progress")
    except Exception as error:  # torch can raise anything for a state that is not its own
        reason = f"{type(error).__name__}: {one_line(error, 80)}"
        raise InputError(f"{path}: cannot be resumed from ({reason}).") from None
    if within and len(within) != world_size():
        raise InputError(f"{path} was saved within an epoch of {len(within)} processes: resume with as many.")
    return history, within and within[rank()]


def begin_epoch(
    model, cases: Cases, epoch: int, settings, device: torch.device, within: dict | None
) -> tuple[list, Progress]:
    """The keys of the cases that this process still has to train on, in order, and its progress in the epoch: none yet,
    or that of `within`, the state in last.pt."""
    order = epoch_order(len(cases), settings.seed, epoch, rank(), world_size())
    # All randomness of an epoch follows from the seed and its number: a resumed run repeats it exactly.
    if settings.patch:
        order = cut_patches(order, cases.outlines, settings.patch, f"{settings.seed}-{epoch}-{rank()}-patches")
    generator = torch.Generator().manual_seed(random.Random(f"{settings.seed}-{epoch}-{rank()}").getrandbits(60))
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    names = [cases.paths[key[0] if settings.patch else key].stem for key in order]
    steps = [names[first : first + settings.batch_size] for first in range(0, len(names), settings.batch_size)]
    updates, now = math.ceil(len(steps) / settings.accumulate), time.perf_counter()
    losses, norms = (torch.zeros(count, device=device) for count in (len(steps), updates))
    progress = Progress(epoch, steps, 0, losses, norms, settings.accumulate, generator, 0.0, now, now)
    if within:
        go_on(progress, within, model)
    return order[progress.step * settings.batch_size :], progress


def state_of(progress: Progress, model) -> dict:
    """What `go_on` needs, as plain tensors and numbers."""
    device = progress.losses.device
    return {
        "step": progress.step,
        "losses": progress.losses.cpu(),
        "norms": progress.norms.cpu(),
        "augmentation_random": progress.generator.get_state(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "gradients": [parameter.grad for parameter in model.parameters()],  # None, unless steps are accumulated
        "waited_s": progress.waited_s,
        "seconds": time.perf_counter() - progress.start,
    }


def go_on(progress: Progress, state: dict, model):
    """Restore the state that `state_of` returned to an epoch that is about to begin."""
    progress.step = state["step"]
    progress.losses.copy_(state["losses"])
    progress.norms.copy_(state["norms"])
    progress.generator.set_state(state["augmentation_random"])
    progress.waited_s = state["waited_s"]
    progress.start -= state["seconds"]
    for parameter, gradient in zip(model.parameters(), state["gradients"], strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    torch.set_rng_state(state["torch_random"])
    if state["cuda_random"] is not None and progress.losses.is_cuda:
        torch.cuda.set_rng_state(state["cuda_random"], progress.losses.device)


# ---- saving and stopping within an epoch ---------------------------------------------------------------------------


def save_where_due(
    signals: list[int], minutes: float, folder: Path, history: list[dict], learner: Learner, progress: Progress
):
    """Write last.pt if it is older than so many minutes or a signal has been received, which then ends the training."""
    due = time.perf_counter() - progress.saved > 60 * minutes
    wanted = agreed(signals[0] if signals else int(due))
    if not wanted:
        return
    refuse_not_finite(progress, learner.scaler)
    write_last(folder, history, learner, state_of(progress, learner.model))
    progress.saved = time.perf_counter()
    if wanted in SIGNALS:
        stop(wanted, folder, f"epoch {progress.epoch + 1} up to step {progress.step} of {len(progress.cases)}")


def agreed(wanted: int) -> int:
    """The largest number that any process passes: all have to save, and to stop, after the same step. Does not wait for
    the device."""
    if world_size() == 1:
        return wanted
    number = torch.tensor(wanted)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def stop(number: int, folder: Path, place: str):
    text = (f"Interrupted by {signal.Signals(number).name}; {folder / 'last.pt'} holds {place}. To go on, add "
            f"--run-name {folder.name} --resume to the same command.")  # fmt: skip
    raise Interrupted(number, text if rank() == 0 else "")


def refuse_not_finite(progress: Progress, scaler):
    """InputError with the cases of the first update whose loss or gradient is not finite. Waits for the device.

    A scaler leaves out updates whose gradient is not finite and halves its scale, which is usual at the start of a
    training; when that falls from 65536 to below 1, the scale is not the reason, and the updates left out are named.
    """
    losses, norms = progress.losses.cpu(), progress.norms.cpu()
    bad_steps = (~losses.isfinite()).nonzero().flatten().tolist()
    bad_updates = {step // progress.accumulate for step in bad_steps}
    if not scaler.is_enabled() or scaler.get_scale() < 1:
        bad_updates |= set((~norms.isfinite()).nonzero().flatten().tolist())
    if not bad_updates:
        return
    # Without a scaler, the first has spoiled the weights, and with them all that came later.
    steps = []
    for update in sorted(bad_updates) if scaler.is_enabled() else [min(bad_updates)]:
        window = range(len(progress.cases))[update * progress.accumulate : (update + 1) * progress.accumulate]
        steps += [step for step in window if step in bad_steps] or window
    names = list(dict.fromkeys(name for step in steps for name in progress.cases[step]))
    more = f" and {len(names) - 5} more cases" if len(names) > 5 else ""
    what = "loss" if steps[0] in bad_steps else "gradient"
    raise InputError(f"the {what} of {', '.join(names[:5])}{more} is not finite (epoch {progress.epoch + 1}, step "
                     f"{steps[0] + 1}). If it is always the same case, inspect it; otherwise lower --learning-rate or "
                     "use --amp off.")  # fmt: skip
