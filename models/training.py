"""fit(): the one training loop, with what comes before and after it. Knows no network by name and no command line: the
scripts hand it a model and Settings. It writes train.csv, training_plots.png, last.pt and best.pt into the run's folder
after every epoch, and what `test` finds at the end.
"""

import math
import random
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from models import runs
from models.augment import augment
from models.brats import LABELS, TARGETS
from models.copy_paste import paste_tumours
from models.dataset import Cases, batches, choose_input, epoch_order, load_case
from models.device import (
    AMP_DTYPES,
    choose_device,
    decided_once,
    join_processes,
    native_dtypes,
    peak_memory_gib,
    rank,
    resolve_amp,
    synchronise,
    world_size,
)
from models.errors import InputError
from models.files import write_csv
from models.losses import labels_from_logits, logits_from_frequencies, make_loss
from models.metrics import confusion, dice_per_target, mean_label_dice
from models.patches import cut_patches
from models.plots import prediction_overlay, training_plots

AMP_TRIAL_SIDE = 64  # voxels; large enough to tell which number type is faster, small enough not to be waited for


@dataclass(frozen=True)
class Settings:
    """What a training is to do; the flags of the same names say more of each."""

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
    compile: bool


# ---- the machine ---------------------------------------------------------------------------------------------------


def setup(wanted_device: str, seed: int) -> torch.device:
    """Choose the device, join the other processes where torchrun started several, seed, and let cuDNN tune itself."""
    device = join_processes(choose_device(wanted_device))
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape: the search pays in the first epoch
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
    amp = choose_amp(amp, model, settings.batch_size, size, device)
    return replace(settings, cache=cache, workers=workers, amp=amp)


def choose_amp(amp: str, model, batch_size: int, size: list[int], device: torch.device) -> str:
    """--amp without "auto". On a CPU that multiplies bf16, where small layers can lose more by conversions than they
    gain, a few training steps in each type decide."""
    if amp != "auto" or device.type == "cuda" or torch.bfloat16 not in native_dtypes(device):
        return resolve_amp(amp, device)

    def decide():
        seconds = step_seconds(model, batch_size, [min(side, AMP_TRIAL_SIDE) for side in size], device)
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


# ---- the loop ------------------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine: above zero in every one of the steps 0 to total_steps - 1."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def start_at_class_frequencies(model, cases: Cases):
    """Set the output layer's bias to what gives each label, or region, its share of the voxels as its probability, in
    32 training cases at most.

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


def fit(
    model, settings: Settings, split: dict[str, list[str]], folder: Path, device: torch.device, resume: bool = False
) -> float:
    """Train, validating after each epoch; best.pt is the epoch with the best mean label Dice. Returns total minutes.

    With `settings.ema`, what is validated and stored is the average of the weights, not those of the last step.
    `resume` goes on after the last epoch that `folder` holds.
    """
    # A patch is copied out of its case, so it is the batch, not the case, that has to be pinned.
    train_cases, validation_cases = (
        Cases(settings.data, split[part], settings.cache, device, pin=settings.patch is None)
        for part in ("train", "validation")
    )
    if not resume and not settings.init:
        start_at_class_frequencies(model, train_cases)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    average = deepcopy(model) if settings.ema else None
    history = runs.restore(folder / "last.pt", model, average, optimizer, scaler) if resume else []
    judged = average if settings.ema else model
    if settings.compile:
        model.compile()
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    for epoch in range(len(history), settings.epochs):
        start = time.perf_counter()
        trained_epoch = train_epoch(trained, train_cases, epoch, settings, optimizer, scaler, device, average)
        row = {"epoch": epoch + 1, **trained_epoch}
        losses, counts = validate(judged, validation_cases, settings, device)
        scores = [dice_per_target(matrix) for matrix in counts]
        row["validation_loss"] = float(losses.mean())
        row["dice_mean"] = sum(map(mean_label_dice, scores)) / len(scores)
        row |= {f"dice_{target}": sum(score[target] for score in scores) / len(scores) for target in TARGETS}
        row["seconds"] = time.perf_counter() - start
        if not math.isfinite(row["train_loss"]):
            raise InputError(f"the loss became {row['train_loss']} in epoch {epoch + 1}: lower --learning-rate or use "
                             f"--amp off. {folder} keeps the epochs before it.")
        history.append(row)
        if rank() == 0:
            write_epoch(folder, history, model, average, optimizer, scaler, settings.amp)
    if world_size() > 1:
        dist.barrier()  # best.pt must be there before any process loads it
    return sum(row["seconds"] for row in history) / 60


def train_epoch(model, cases: Cases, epoch: int, settings: Settings, optimizer, scaler, device, average=None) -> dict:
    """One pass over the training cases; `average`, if there is one, follows the weights. Nothing in it waits for the
    device before the last step is queued."""
    model.train()
    criterion, dtype = make_loss(), AMP_DTYPES[settings.amp]
    order = epoch_order(len(cases), settings.seed, epoch, rank(), world_size())
    micro_steps = math.ceil(len(order) / settings.batch_size)
    steps_per_epoch = math.ceil(micro_steps / settings.accumulate)
    total_steps = settings.epochs * steps_per_epoch
    warmup_steps = round(settings.warmup * total_steps)
    # All randomness of an epoch follows from the seed and its number: a resumed run repeats it exactly.
    if settings.patch:
        order = cut_patches(order, cases.outlines, settings.patch, f"{settings.seed}-{epoch}-{rank()}-patches")
    generator = torch.Generator().manual_seed(random.Random(f"{settings.seed}-{epoch}-{rank()}").getrandbits(60))
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    augmentation = (settings.flip_probability, settings.rotate_probability, settings.noise_probability,
                    settings.noise_sd, settings.augmentation == "strong")
    loss_sum, waited_s, start = torch.zeros((), device=device), 0.0, time.perf_counter()
    bar = tqdm(total=micro_steps, desc=f"epoch {epoch + 1}/{settings.epochs}", unit="step", disable=rank() != 0)
    loader = batches(cases, order, settings.batch_size, device, settings.workers)
    batch = None
    for micro_step, (images, labels, wait_s) in enumerate(loader):
        waited_s += wait_s
        if settings.copy_paste:
            images, labels = paste_tumours(images, labels, cases, settings.copy_paste, generator)
        # Into the memory of the last batch: its backward pass is over.
        batch = image, label = augment(images, labels, generator, *augmentation, out=batch)
        # The last window can be shorter: divide by the steps that it really has.
        window_start = micro_step - micro_step % settings.accumulate
        window = min(settings.accumulate, micro_steps - window_start)
        is_update = micro_step == window_start + window - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = is_update
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(image)  # [B, 4 or 3, D, H, W]
        loss = criterion(logits.float(), label)
        scaler.scale(loss / window).backward()
        loss_sum += loss.detach()
        if is_update:
            step = epoch * steps_per_epoch + micro_step // settings.accumulate
            rate = learning_rate(step, total_steps, warmup_steps, settings.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                follow(average, model, settings.ema, step)
        bar.update()
    loss_sum /= micro_steps
    if world_size() > 1:
        dist.all_reduce(loss_sum)
        loss_sum /= world_size()
    row = {"train_loss": loss_sum.item(), "learning_rate": rate}  # .item() waits until the device is done
    seconds = time.perf_counter() - start
    row["step_ms"] = 1e3 * seconds / micro_steps
    row["data_wait_ms"] = 1e3 * waited_s / micro_steps
    row["volumes_per_s"] = len(order) * world_size() / seconds
    row["peak_gib"] = peak_memory_gib(device)
    bar.set_postfix_str(
        f"loss {row['train_loss']:.4f}, lr {rate:.1e}, {row['step_ms']:.0f} ms/step, "
        f"{row['data_wait_ms']:.1f} ms data, {row['volumes_per_s']:.2f} vol/s, {row['peak_gib']:.2f} GiB"
    )
    bar.close()
    return row


def follow(average, model, decay: float, step: int):
    """Move an average of the weights towards those after update number `step`, counted from 0. The early ones are
    forgotten sooner, or a short training would never get away from where it began."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)([*average.parameters()], [*model.parameters()], None)


def logits_of_cases(model, image: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Logits float32 [B, 4 or 3, D, H, W] of whole cases [B, 4, D, H, W]. After a training on patches those of
    overlapping windows of that size, weighted by a Gaussian around the middle of each."""
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
def validate(model, cases: Cases, settings: Settings, device) -> tuple[torch.Tensor, torch.Tensor]:
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
    if world_size() > 1:
        dist.all_reduce(losses)
        dist.all_reduce(counts)
    return losses.cpu(), counts.cpu()


def test(model, settings: Settings, split: dict[str, list[str]], folder: Path, device: torch.device) -> dict:
    """Score the best checkpoint on the test cases: test_results.csv (a row per case, then their mean) and
    test_prediction_overlay.png (the case of median Dice). Returns the mean Dice of each target; nothing, and writes
    nothing, where the split has no test cases."""
    if not split["test"]:
        return {}
    checkpoint = runs.load_checkpoint(folder / "best.pt")
    runs.load_weights(model, checkpoint, folder / "best.pt")
    cases = Cases(settings.data, split["test"], "disk", device)
    losses, counts = validate(model, cases, settings, device)
    scores = [dice_per_target(matrix) for matrix in counts]
    rows = [
        {"case": name, "loss": float(loss), **{f"dice_{target}": score[target] for target in TARGETS}}
        for name, loss, score in zip(split["test"], losses, scores, strict=True)
    ]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "case"}
    if rank() == 0:
        write_csv(folder / "test_results.csv", [*rows, {"case": "mean", **mean}])
        middle = sorted(range(len(rows)), key=lambda index: mean_label_dice(scores[index]))[len(rows) // 2]
        draw_prediction(model, settings, split["test"][middle], checkpoint["epoch"], folder, device)
    return {target: mean[f"dice_{target}"] for target in TARGETS}


@torch.inference_mode()
def draw_prediction(model, settings: Settings, name: str, epoch: int, folder: Path, device: torch.device):
    """test_prediction_overlay.png of one case."""
    case = load_case(settings.data / f"{name}.pt")
    logits = logits_of_cases(model, case["image"][None].to(device), settings)
    prediction, truth = labels_from_logits(logits)[0].cpu(), case["label"][0]
    scores = dice_per_target(confusion(prediction, truth))
    dice = ", ".join(f"{target} {scores[target]:.3f}" for target in TARGETS)
    title = f"{folder.name} ({model.network}, epoch {epoch}), test case {name} (median): {dice}"
    prediction_overlay(
        case["image"].numpy(), truth.numpy(), {"prediction": prediction.numpy()},
        folder / "test_prediction_overlay.png", title,
    )  # fmt: skip


def write_epoch(folder: Path, history: list[dict], model, average, optimizer, scaler, amp: str):
    """best.pt before last.pt, so that an interruption between them repeats an epoch rather than losing the best."""
    network = model if average is None else average
    checkpoint = runs.checkpoint_of(network, amp, len(history), history[-1]["dice_mean"])
    if max(history, key=lambda row: row["dice_mean"]) is history[-1]:  # of equal epochs the first, as in the plot
        runs.save(folder / "best.pt", checkpoint)
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "history": history}
    if average is not None:
        state["trained_model"] = model.state_dict()
    runs.save(folder / "last.pt", checkpoint | state)
    write_csv(folder / "train.csv", history)
    training_plots(history, folder / "training_plots.png", f"{model.network}, {folder.name}")


def report(folder: Path, split: dict[str, list[str]], dice: dict[str, float], minutes: float):
    """The closing lines of a training script."""
    if rank() == 0:
        print(f"Trained in {minutes:.1f} minutes ({len(split['train'])} cases; tested on {len(split['test'])}).")
        written = ["config.json", "train.csv", "training_plots.png", "best.pt", "last.pt"]
        if dice:
            print("Test Dice: " + ", ".join(f"{target} {value:.4f}" for target, value in dice.items())
                  + f"; mean of the labels {mean_label_dice(dice):.4f}")
            written += ["test_results.csv", "test_prediction_overlay.png"]
        else:
            print("Nothing was tested: the data have no test cases (--test-share 0).")
        print(f"Written to {folder}: {', '.join(written)}")
    if world_size() > 1:
        dist.destroy_process_group()
