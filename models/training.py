"""fit(): the one training loop, and what comes before it. Knows no network by name and no command line: the scripts
pass it a model and Settings. It writes train.csv, training_plots.png, last.pt and best.pt into the run's folder after
every epoch, and last.pt within epochs as well.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from models import checkpoints, runs
from models.amp import choose_amp
from models.augment import augment
from models.brats import LABELS
from models.checkpoints import Learner, Progress, begin_epoch, refuse_not_finite, write_epoch
from models.copy_paste import paste_tumours
from models.dataset import Cases, batches, choose_input
from models.device import (
    AMP_DTYPES,
    choose_device,
    join_processes,
    peak_memory_gib,
    rank,
    resolve_amp,
    why_not_compile,
    world_size,
)
from models.errors import InputError
from models.interruption import noted_signals, raise_on_signals
from models.losses import labels_from_logits, logits_from_frequencies, make_loss
from models.metrics import confusion, pooled_dice

CHECK_EVERY = 100  # updates: looking for a loss that is not a number waits for the device


@dataclass(frozen=True)
class Settings:
    """The settings of a training; the flags of the same names are explained in models/cli.py."""

    data: Path  # folder of preprocessed cases
    epochs: int
    batch_size: int  # cases per step and process
    accumulate: int  # steps per update
    learning_rate: float  # peak
    warmup: float  # share of the updates before the peak
    weight_decay: float
    clip: float  # largest gradient norm
    ema: float  # decay of the average of the weights that is validated and tested in their place; 0: none
    seed: int
    init: str | None  # the run whose weights the network was given before the training
    flip_probability: float
    rotate_probability: float
    noise_probability: float
    noise_sd: float
    augmentation: str  # "basic", or "strong", which warps cases and changes their intensities as well
    copy_paste: float  # probability that a case gets the tumour of another one as well
    patch: int | None  # side in voxels of what is cut from the cases; None: whole cases
    amp: str  # a key of AMP_DTYPES, or "auto" until `resolve`
    cache: str  # "device", "ram" or "disk", or "auto" until `resolve`
    workers: int
    deterministic: bool
    compile: bool
    save_minutes: float  # between two writings of last.pt within an epoch


# ---- the machine ---------------------------------------------------------------------------------------------------


def setup(wanted_device: str, seed: int, deterministic: bool = False) -> torch.device:
    """Choose the device, join the other processes where torchrun started several, seed, and let cuDNN tune itself.

    With `deterministic`, two runs on one machine are equal to the last bit. On a CPU they are anyway, except with --amp
    auto, which measures. On CUDA the following vary otherwise: which convolutions cuDNN finds fastest, and the order of
    summation in the gradients of convolutions, of torch's fused attention and of trilinear upsampling, in
    cross-entropy, and in cuBLAS.
    """
    raise_on_signals()
    # Before CUDA starts, when cuBLAS reads the variable.
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    device = join_processes(choose_device(wanted_device))
    torch.manual_seed(seed)
    # Every batch has the same shape: the search pays in the first epoch.
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    return device


def resolve(
    settings: Settings, model, size: list[int], split: dict[str, list[str]], device, earlier: dict | None = None
) -> Settings:
    """The settings without "auto". A run that is resumed keeps the number type that its record `earlier` names."""
    names = split["train"] + split["validation"]
    cache, workers = choose_input(settings.data, names, settings.cache, settings.workers, settings.batch_size,
                                  settings.patch, device)  # fmt: skip
    amp = earlier["arguments"]["amp"] if earlier and settings.amp == "auto" else settings.amp
    measured = not settings.deterministic
    amp = choose_amp(amp, model, settings.batch_size, size, device) if measured else resolve_amp(amp, device)
    compiled = settings.compile and can_compile(device)
    return replace(settings, cache=cache, workers=workers, amp=amp, compile=compiled)


def can_compile(device: torch.device) -> bool:
    """Whether --compile can be used here; if not, a warning says why."""
    reason = why_not_compile(device)
    if reason and rank() == 0:
        print(f"Warning: --compile: {reason}. Training without it.", file=sys.stderr)
    return not reason


# ---- the loop ------------------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine: above zero in every one of the steps 0 to total_steps - 1."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def start_at_class_frequencies(model, cases: Cases):
    """Set the output layer's bias so that each label, or region, is predicted with the share of the voxels that it has
    in (at most 32 of) the training cases as its probability.

    A network that starts so need not first learn that nearly every voxel is background (Lin et al. 2017,
    arXiv:1708.02002, section 4.1): small labels are found several times sooner.
    """
    counts = torch.ones(len(LABELS) + 1)  # a label that none of these cases has keeps a finite logarithm
    for index in range(min(len(cases), 32)):
        counts += torch.bincount(cases.label(index).flatten(), minlength=len(counts)).cpu()  # the cache can be a GPU
    frequencies = counts / counts.sum()
    output = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)][-1]
    with torch.no_grad():
        output.bias.copy_(logits_from_frequencies(frequencies, output.out_channels))


def read_cases(settings: Settings, split: dict[str, list[str]], device: torch.device) -> tuple[Cases, Cases]:
    """The cases to train and to validate on, where `settings.cache` keeps them. InputError where no validation case has
    a tumour."""
    # A patch is copied out of its case, so it is the batch, not the case, that has to be pinned.
    train, validation = (
        Cases(settings.data, split[part], settings.cache, device, pin=settings.patch is None)
        for part in ("train", "validation")
    )
    if not any(validation.label(index).any() for index in range(len(validation))):
        raise InputError(f"{settings.data}: the validation cases have no tumour, so nothing says which epoch is the "
                         "best. Choose another --fold, or preprocess with another --seed.")  # fmt: skip
    return train, validation


def make_learner(model, settings: Settings, device: torch.device) -> Learner:
    """A network on its device with a new optimiser and, as the settings want them, a scaler and an average."""
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    return Learner(model, deepcopy(model) if settings.ema else None, optimizer, scaler, settings.amp)


def fit(
    model, settings: Settings, split: dict[str, list[str]], folder: Path, device: torch.device, resume: bool
) -> float:
    """Train, validating after each epoch; best.pt is the epoch with the best Dice (see metrics.pooled_dice) on the
    validation cases. Returns the total minutes.

    With `settings.ema`, the average of the weights is validated and stored, not those of the last step. With `resume`
    the training goes on from last.pt. After a signal it writes last.pt when the step ends, and raises Interrupted.
    """
    train_cases, validation_cases = read_cases(settings, split, device)
    if not resume and not settings.init:
        start_at_class_frequencies(model, train_cases)
    learner = make_learner(model.to(device), settings, device)
    history, within, best = [], None, None
    if resume:
        history, within = checkpoints.restore(folder / "last.pt", learner)
        best = best_so_far(folder / "best.pt", learner.judged, validation_cases, settings, device)
        if history and best and rank() == 0:  # the last epoch may have been interrupted before it wrote them
            checkpoints.write_history(folder, history, best, model.network)
    if settings.compile:
        model.compile()
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    with noted_signals() as signals:
        save = partial(checkpoints.save_where_due, signals, settings.save_minutes, folder, history, learner)
        for epoch in range(len(history), settings.epochs):
            start = time.perf_counter() - (within["seconds"] if within else 0)
            row, progress = train_epoch(trained, train_cases, epoch, settings, learner, device, within, save)
            within = None
            may_stop = partial(save, progress) if world_size() == 1 else lambda: None  # all of them, or none
            losses, counts = validate(learner.judged, validation_cases, settings, device, may_stop)
            row |= validation_figures(losses, counts, split["validation"])
            row["seconds"] = time.perf_counter() - start
            history.append(row)
            if best is None or row["dice_mean"] > best["dice_mean"]:  # of equal epochs the first is the best
                best = {key: row[key] for key in ("epoch", "dice_mean")}
                if rank() == 0:
                    runs.save(folder / "best.pt", runs.checkpoint_of(learner.judged, settings.amp, **best))
            if rank() == 0:
                write_epoch(folder, history, best, learner)
            if number := checkpoints.agreed(signals[0] if signals else 0):
                checkpoints.stop(number, folder, f"{len(history)} epochs")
    if world_size() > 1:
        dist.barrier()  # best.pt must be there before any process loads it
    return sum(row["seconds"] for row in history) / 60


def best_so_far(path: Path, model, validation_cases: Cases, settings: Settings, device) -> dict | None:
    """Epoch and score of best.pt, or None if there is none; it can be ahead of last.pt, if the training was interrupted
    between the two. A checkpoint from before scores were pooled is scored again with a copy of `model`."""
    if not path.is_file():
        return None
    checkpoint = runs.load_checkpoint(path)
    if checkpoint["format"] < runs.CHECKPOINT_FORMAT:
        former = deepcopy(model)
        runs.load_weights(former, checkpoint, path)
        _, counts = validate(former, validation_cases, settings, device)
        checkpoint["dice_mean"] = pooled_dice(counts)["mean"]
        print(f"{path}: Dice {checkpoint['dice_mean']:.4f} of the pooled voxels of the validation cases, which chooses "
              "the best epoch now; the rows of train.csv so far have means over cases.")  # fmt: skip
    return {key: checkpoint[key] for key in ("epoch", "dice_mean")}


def validation_figures(losses: torch.Tensor, counts: torch.Tensor, names: list[str]) -> dict[str, float]:
    """The columns of train.csv from the loss [N] and the confusion matrix [N, 4, 4] of each case. InputError with the
    cases whose loss is not finite."""
    if broken := [name for name, loss in zip(names, losses, strict=True) if not loss.isfinite()]:
        raise InputError(f"the validation loss of {', '.join(broken[:5])} is not finite. Inspect these cases, lower "
                         "--learning-rate or use --amp off.")  # fmt: skip
    dice = {f"dice_{target}": value for target, value in pooled_dice(counts).items()}
    return {"validation_loss": float(losses.mean()), **dice}


def train_epoch(
    model, cases: Cases, epoch: int, settings: Settings, learner: Learner, device,
    within: dict | None = None, after_step: Callable = lambda progress: None,
) -> tuple[dict, Progress]:  # fmt: skip
    """One pass over the training cases, or the rest of one that was interrupted; nothing but `after_step` and a check
    now and then waits for the device. Returns the columns of train.csv that the steps give, and the final progress.

    Args:
        model: the network of the learner, or DistributedDataParallel around it.
        epoch: counted from 0.
        within: what was done of the epoch before the interruption, as last.pt has it.
        after_step: called with the progress after each step.
    """
    model.train()
    criterion, dtype = make_loss(), AMP_DTYPES[settings.amp]
    order, progress = begin_epoch(model, cases, epoch, settings, device, within)
    steps = len(progress.losses)
    augmentation = (settings.flip_probability, settings.rotate_probability, settings.noise_probability,
                    settings.noise_sd, settings.augmentation == "strong")
    batch = None
    with tqdm(total=steps, initial=progress.step, desc=f"epoch {epoch + 1}/{settings.epochs}", unit="step",
              disable=rank() != 0) as bar:  # fmt: skip
        for images, labels, wait_s in batches(cases, order, settings.batch_size, device, settings.workers):
            progress.waited_s += wait_s
            if settings.copy_paste:
                images, labels = paste_tumours(images, labels, cases, settings.copy_paste, progress.generator)
            # Into the memory of the last batch: its backward pass is over.
            batch = image, label = augment(images, labels, progress.generator, *augmentation, out=batch)
            # The last window can be shorter: divide by the steps that it really has.
            update, place = divmod(progress.step, settings.accumulate)
            window = min(settings.accumulate, steps - update * settings.accumulate)
            is_update = place == window - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = is_update
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(image)  # [B, 4 or 3, D, H, W]
            loss = criterion(logits.float(), label)
            learner.scaler.scale(loss / window).backward()
            progress.losses[progress.step] = loss.detach()
            if is_update:
                take_update(learner, settings, progress, update)
            progress.step += 1
            bar.update()
            if is_update and (update + 1) % CHECK_EVERY == 0:
                refuse_not_finite(progress, learner.scaler)
            if is_update or world_size() == 1:  # between updates, processes have gradients of their own
                after_step(progress)
        refuse_not_finite(progress, learner.scaler)
        row = training_figures(progress, learner.optimizer, device)
        bar.set_postfix_str(in_words(row))
    return row, progress


def take_update(learner: Learner, settings: Settings, progress: Progress, update: int):
    """Change the weights by their gradients, at the learning rate of this update of the epoch (counted from 0)."""
    optimizer, scaler = learner.optimizer, learner.scaler
    updates = len(progress.norms)
    step, total_steps = progress.epoch * updates + update, settings.epochs * updates
    rate = learning_rate(step, total_steps, round(settings.warmup * total_steps), settings.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.unscale_(optimizer)
    progress.norms[update] = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), settings.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if learner.average is not None:
        follow(learner.average, learner.model, settings.ema, step)


def training_figures(progress: Progress, optimizer, device) -> dict[str, float]:
    """The columns of train.csv that an epoch's steps give."""
    loss, steps = progress.losses.mean(), len(progress.losses)
    if world_size() > 1:
        dist.all_reduce(loss)
        loss /= world_size()
    row = {"epoch": progress.epoch + 1, "train_loss": loss.item()}  # .item() waits for the device
    row["learning_rate"] = optimizer.param_groups[0]["lr"]
    seconds = time.perf_counter() - progress.start
    row["step_ms"] = 1e3 * seconds / steps
    row["data_wait_ms"] = 1e3 * progress.waited_s / steps
    row["volumes_per_s"] = sum(map(len, progress.cases)) * world_size() / seconds
    row["peak_gib"] = peak_memory_gib(device)
    return row


def in_words(row: dict[str, float]) -> str:
    """The figures of an epoch, for the end of its progress bar."""
    return (f"loss {row['train_loss']:.4f}, lr {row['learning_rate']:.1e}, {row['step_ms']:.0f} ms/step, "
            f"{row['data_wait_ms']:.1f} ms data, {row['volumes_per_s']:.2f} vol/s, {row['peak_gib']:.2f} GiB")


def follow(average, model, decay: float, step: int):
    """Move an average of the weights towards those after update number `step`, counted from 0. Early weights are
    forgotten sooner, or the average of a short training would stay close to where it began."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)([*average.parameters()], [*model.parameters()], None)


def logits_of_cases(model, image: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Logits float32 [B, 4 or 3, D, H, W] of whole cases [B, 4, D, H, W]; with `settings.patch`, from overlapping
    windows of that size, each weighted by a Gaussian around its centre."""
    dtype = AMP_DTYPES[settings.amp]

    def logits_of(volumes):
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            return model(volumes).float()

    if settings.patch is None:
        return logits_of(image)
    return sliding_window_inference(
        image, (settings.patch,) * 3, settings.batch_size, logits_of, overlap=0.5, mode="gaussian"
    )


@torch.inference_mode()
def validate(
    model, cases: Cases, settings: Settings, device, after_case: Callable = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [N] and confusion matrix [N, 4, 4] of each case, computed by all processes together."""
    model.eval()
    criterion = make_loss()
    losses = torch.zeros(len(cases), device=device)
    counts = torch.zeros(len(cases), len(LABELS) + 1, len(LABELS) + 1, dtype=torch.long, device=device)
    mine = list(range(rank(), len(cases), world_size()))
    for index, (images, labels, _) in zip(mine, batches(cases, mine, 1, device, settings.workers), strict=True):
        image, label = torch.stack(images).float(), torch.stack(labels).long()
        logits = logits_of_cases(model, image, settings)
        losses[index] = criterion(logits, label)
        counts[index] = confusion(labels_from_logits(logits), label)
        after_case()
    if world_size() > 1:
        dist.all_reduce(losses)
        dist.all_reduce(counts)
    return losses.cpu(), counts.cpu()
