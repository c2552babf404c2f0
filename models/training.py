"""fit(): the one training loop. Knows no network by name; the scripts hand it a model and their arguments.

A run folder holds config.json (written before the first step), train.csv, training_plots.png, last.pt, best.pt.
"""

import io
import json
import math
import os
import platform
import random
import sys
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from monai.losses import DiceCELoss
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models import CHECKPOINT_FORMAT, RUNTIME_SETTINGS, cost, load_checkpoint, load_weights, size_multiple
from models.augment import augment
from models.brats import LABELS, MODALITIES, TARGETS
from models.dataset import Cases, batches, epoch_order, load_case, manifest_checksum, spacing_of_cases
from models.device import (
    AMP_DTYPES,
    choose_device,
    device_name,
    native_dtypes,
    peak_memory_gib,
    rank,
    resolve_amp,
    synchronise,
    world_size,
)
from models.errors import InputError
from models.files import git_commit, write_atomically, write_csv
from models.inference.predict import predict
from models.metrics import confusion, dice_per_target, mean_label_dice
from models.plots import prediction_overlay, training_plots

AMP_TRIAL_SIDE = 64  # voxels; large enough to tell which number type is faster, small enough not to be waited for



# ---- the machine ---------------------------------------------------------------------------------------------------


def setup(args) -> torch.device:
    """Choose the device, join the other processes where torchrun started several, seed, and let cuDNN tune itself."""
    device = choose_device(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape: the search pays in the first epoch
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    return device


def choose_amp(model, args, size: list[int], device: torch.device) -> str:
    """--amp without "auto". On a CPU that multiplies bf16, where small layers can lose more by conversions than they
    gain, a few training steps in each type decide; a resumed run keeps what it began with."""
    record = run_folder(model, args) / "config.json"
    if args.amp == "auto" and args.resume and record.is_file():
        return json.loads(record.read_text())["arguments"]["amp"]
    if args.amp != "auto" or device.type == "cuda" or torch.bfloat16 not in native_dtypes(device):
        return resolve_amp(args.amp, device)
    decision = [None]
    if rank() == 0:
        seconds = step_seconds(model, args.batch_size, [min(side, AMP_TRIAL_SIDE) for side in size], device)
        decision = [min(seconds, key=seconds.get)]
        bf16_ms, float32_ms = 1e3 * seconds["bf16"], 1e3 * seconds["off"]
        print(f"--amp auto: a step takes {bf16_ms:.0f} ms in bf16 and {float32_ms:.0f} ms in float32: {decision[0]}.")
    if world_size() > 1:
        dist.broadcast_object_list(decision)
    return decision[0]


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


# ---- the run -------------------------------------------------------------------------------------------------------


def run_folder(model, args) -> Path:
    return Path("models", model.network, "results", args.run_name)


def open_run(model, args, split: dict[str, list[str]], size: list[int], device: torch.device) -> Path:
    """Refuse a run that is there already, tell what the training will cost, make the run folder and write its
    config.json. `size` is what `check_cases` returned."""
    run = run_folder(model, args)
    if args.resume and not (run / "last.pt").is_file():
        raise InputError(f"--resume: {run / 'last.pt'} does not exist. Start the run without --resume.")
    if not args.resume and (run / "last.pt").exists():
        raise InputError(f"{run} holds a run already. Choose another --run-name, or go on with --resume.")
    costs = cost.of_training(model, (args.batch_size, 4, *size), AMP_DTYPES[args.amp])
    config = {
        "network": model.network,
        "model": model.config,
        "size": size,
        "spacing_mm": spacing_of_cases(args.data),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "learning_rate": args.learning_rate,
        "processes": world_size(),
        "effective_batch_size": args.batch_size * args.accumulate * world_size(),
        "data_manifest_sha256": manifest_checksum(args.data),
        "split": split,
        **costs,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device_name(device),
    }
    if rank() == 0:
        print(f"{model.network}: {costs['parameters'] / 1e6:.1f} million parameters; {costs['gmac']:.1f} GMAC = "
              f"{2 * costs['gmac'] / 1e3:.3f} TFLOP per volume of {' x '.join(map(str, size))} voxels; expected peak "
              f"of a training step {costs['expected_peak_gib']:.2f} GiB of tensors (batch {args.batch_size}).")
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / "config.json", json.dumps(config, indent=1))
    return run


def check_cases(data: Path, split: dict[str, list[str]], network: str) -> list[int]:
    """Every case of the split is there, labelled and of a size that the network takes; returns that size."""
    names = [name for part in ("train", "validation", "test") for name in split[part]]
    sizes = {}
    for name in names:
        path = Path(data) / f"{name}.pt"
        case = load_case(path, as_stored=True)
        if "label" not in case:
            raise InputError(f"{path}: has no label, so it cannot be trained on. Preprocess {data} again.")
        sizes[tuple(case["image"].shape[1:])] = path
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise InputError(f"{first} is {a} and {second} is {b}. Preprocess all cases with one --size.")
    size = list(next(iter(sizes)))
    multiple = size_multiple(network)
    if any(side % multiple for side in size):
        fitting = max(multiple, round(size[0] / multiple) * multiple)
        raise InputError(
            f"{data}: cases of {size} voxels, but {network} needs sides that {multiple} divides. "
            f"Preprocess with --size {fitting}."
        )
    return size


def save(path: Path, content: dict):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


# ---- the loop ------------------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine: above zero in every one of the steps 0 to total_steps - 1."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def make_loss():
    """Dice of the three labels plus cross-entropy over all four classes: background has most voxels, so its Dice
    would hide the others."""
    return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)


def start_at_class_frequencies(model, cases: Cases):
    """Set the output layer's bias to the logarithm of each label's share of the voxels, in 32 training cases at most.

    A network that starts so need not first learn that nearly every voxel is background (Lin et al. 2017,
    arXiv:1708.02002, section 4.1): small labels are found several times sooner.
    """
    counts = torch.ones(len(LABELS) + 1)  # a label that none of these cases has keeps a finite logarithm
    for index in range(min(len(cases), 32)):
        counts += torch.bincount(cases[index][1].flatten(), minlength=len(counts)).cpu()  # the cache can be a GPU
    frequencies = counts / counts.sum()
    output = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)][-1]
    with torch.no_grad():
        output.bias.copy_(frequencies.log())


def fit(model, args, split: dict[str, list[str]], run: Path, device: torch.device) -> float:
    """Train, validating after each epoch; best.pt is the epoch with the best mean label Dice. Returns total minutes."""
    dtype = AMP_DTYPES[args.amp]
    train_cases = Cases(args.data, split["train"], args.cache, device)
    validation_cases = Cases(args.data, split["validation"], args.cache, device)
    if not args.resume:
        start_at_class_frequencies(model, train_cases)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    history: list[dict] = []
    if args.resume:
        history = restore(run / "last.pt", model, optimizer, scaler)
        tqdm.write(f"Resuming {run} after epoch {len(history)}.", file=sys.stderr)
    if args.compile:
        model.compile()
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    for epoch in range(len(history), args.epochs):
        start = time.perf_counter()
        row = {"epoch": epoch + 1, **train_epoch(trained, train_cases, epoch, args, optimizer, scaler, device, dtype)}
        losses, counts = validate(model, validation_cases, args.workers, device, dtype)
        scores = [dice_per_target(matrix) for matrix in counts]
        row["validation_loss"] = float(losses.mean())
        row["dice_mean"] = sum(map(mean_label_dice, scores)) / len(scores)
        row |= {f"dice_{target}": sum(score[target] for score in scores) / len(scores) for target in TARGETS}
        row["seconds"] = time.perf_counter() - start
        if not math.isfinite(row["train_loss"]):
            raise InputError(f"the loss became {row['train_loss']} in epoch {epoch + 1}: lower --learning-rate or use "
                             f"--amp off. {run} keeps the epochs before it.")
        history.append(row)
        if rank() == 0:
            write_epoch(run, history, model, optimizer, scaler, args)
    if world_size() > 1:
        dist.barrier()  # best.pt must be there before any process loads it
    return sum(row["seconds"] for row in history) / 60


def train_epoch(model, cases: Cases, epoch: int, args, optimizer, scaler, device, dtype) -> dict:
    """One pass over the training cases. Nothing in it waits for the device before the last step is queued."""
    model.train()
    criterion = make_loss()
    order = epoch_order(len(cases), args.seed, epoch, rank(), world_size())
    micro_steps = math.ceil(len(order) / args.batch_size)
    steps_per_epoch = math.ceil(micro_steps / args.accumulate)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup * args.epochs * steps_per_epoch)
    # All randomness of an epoch follows from the seed and its number: a resumed run repeats it exactly.
    generator = torch.Generator().manual_seed(random.Random(f"{args.seed}-{epoch}-{rank()}").getrandbits(60))
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    augmentation = args.flip_probability, args.rotate_probability, args.noise_probability, args.noise_sd
    loss_sum, waited_s, start = torch.zeros((), device=device), 0.0, time.perf_counter()
    bar = tqdm(total=micro_steps, desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", disable=rank() != 0)
    loader = batches(cases, order, args.batch_size, device, args.workers)
    batch = None
    for micro_step, (images, labels, wait_s) in enumerate(loader):
        waited_s += wait_s
        # Into the memory of the last batch: its backward pass is over.
        batch = image, label = augment(images, labels, generator, *augmentation, out=batch)
        # The last window can be shorter: divide by the steps that it really has.
        window_start = micro_step - micro_step % args.accumulate
        window = min(args.accumulate, micro_steps - window_start)
        is_update = micro_step == window_start + window - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = is_update
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(image)  # [B, 4, D, H, W]
        loss = criterion(logits.float(), label)
        scaler.scale(loss / window).backward()
        loss_sum += loss.detach()
        if is_update:
            step = epoch * steps_per_epoch + micro_step // args.accumulate
            rate = learning_rate(step, total_steps, warmup_steps, args.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
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


@torch.inference_mode()
def validate(model, cases: Cases, workers: int, device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [N] and confusion matrix [N, 4, 4] of each case, computed by all processes together."""
    model.eval()
    criterion = make_loss()
    losses = torch.zeros(len(cases), device=device)
    counts = torch.zeros(len(cases), len(LABELS) + 1, len(LABELS) + 1, dtype=torch.long, device=device)
    mine = list(range(rank(), len(cases), world_size()))
    for index, (images, labels, _) in zip(mine, batches(cases, mine, 1, device, workers), strict=True):
        image, label = torch.stack(images).float(), torch.stack(labels).long()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(image)
        losses[index] = criterion(logits.float(), label)
        counts[index] = confusion(logits.argmax(1), label)
    if world_size() > 1:
        dist.all_reduce(losses)
        dist.all_reduce(counts)
    return losses.cpu(), counts.cpu()


def test(model, args, split: dict[str, list[str]], run: Path, device: torch.device) -> dict[str, float]:
    """Score the best checkpoint on the test cases: test_results.csv (a row per case, then their mean) and
    test_prediction_overlay.png (the case of median Dice). Returns the mean Dice of each target."""
    checkpoint = load_checkpoint(run / "best.pt")
    load_weights(model, checkpoint, run / "best.pt")
    cases = Cases(args.data, split["test"], "disk", device)
    losses, counts = validate(model, cases, args.workers, device, AMP_DTYPES[args.amp])
    scores = [dice_per_target(matrix) for matrix in counts]
    rows = [
        {"case": name, "loss": float(loss), **{f"dice_{target}": score[target] for target in TARGETS}}
        for name, loss, score in zip(split["test"], losses, scores, strict=True)
    ]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "case"}
    if rank() == 0:
        write_csv(run / "test_results.csv", [*rows, {"case": "mean", **mean}])
        median = sorted(range(len(rows)), key=lambda index: mean_label_dice(scores[index]))[len(rows) // 2]
        case = load_case(Path(args.data) / f"{split['test'][median]}.pt")
        predicted = predict(model, case["image"].to(device), AMP_DTYPES[args.amp]).argmax(0).cpu()
        dice = ", ".join(f"{target} {scores[median][target]:.3f}" for target in TARGETS)
        title = f"{run.name} ({model.network}, epoch {checkpoint['epoch']}), test case {case['case']} (median): {dice}"
        prediction_overlay(
            case["image"].numpy(), case["label"][0].numpy(), {"prediction": predicted.numpy()},
            run / "test_prediction_overlay.png", title,
        )
    return {target: mean[f"dice_{target}"] for target in TARGETS}


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def write_epoch(run: Path, history: list[dict], model, optimizer, scaler, args):
    """best.pt before last.pt, so that an interruption between them repeats an epoch rather than losing the best."""
    weights = {
        "format": CHECKPOINT_FORMAT,
        "network": model.network,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()},
        "modalities": list(MODALITIES),
        "amp": args.amp,
        "epoch": len(history),
        "dice_mean": history[-1]["dice_mean"],
        "model": model.state_dict(),
    }
    if max(history, key=lambda row: row["dice_mean"]) is history[-1]:  # of equal epochs the first, as in the plot
        save(run / "best.pt", weights)
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "history": history}
    save(run / "last.pt", weights | state)
    write_csv(run / "train.csv", history)
    training_plots(history, run / "training_plots.png", f"{model.network}, {run.name}")


def restore(path: Path, model, optimizer, scaler) -> list[dict]:
    """Load the state after the last whole epoch; returns the history."""
    checkpoint = load_checkpoint(path)
    trained, asked = (
        {key: value for key, value in config.items() if key not in RUNTIME_SETTINGS}
        for config in (checkpoint["config"], json.loads(json.dumps(model.config)))
    )
    if checkpoint["network"] != model.network or trained != asked:
        raise InputError(f"{path}: a {checkpoint['network']} of {checkpoint['config']}, not what these flags ask for.")
    load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["history"]


def report(run: Path, split: dict[str, list[str]], dice: dict[str, float], minutes: float):
    """The closing lines of a training script."""
    if rank() == 0:
        print(f"Trained in {minutes:.1f} minutes ({len(split['train'])} cases; tested on {len(split['test'])}).")
        print("Test Dice: " + ", ".join(f"{target} {value:.4f}" for target, value in dice.items())
              + f"; mean of the labels {mean_label_dice(dice):.4f}")
        print(f"Written to {run}: config.json, train.csv, training_plots.png, best.pt, last.pt, test_results.csv, "
              "test_prediction_overlay.png")
    if world_size() > 1:
        dist.destroy_process_group()
