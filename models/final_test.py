"""After the last epoch: the best checkpoint is scored on the test cases, and the results are reported."""

from pathlib import Path

import torch
import torch.distributed as dist

from models import runs
from models.brats import TARGETS
from models.dataset import Cases
from models.device import rank, world_size
from models.files import write_csv
from models.losses import labels_from_logits
from models.metrics import confusion, dice_per_target, mean_label_dice
from models.plots import prediction_overlay
from models.tensors import load_case
from models.training import Settings, logits_of_cases, validate


def test(model, settings: Settings, split: dict[str, list[str]], folder: Path, device: torch.device) -> dict:
    """Score the best checkpoint on the test cases: test_results.csv (a row per case, then their mean) and
    test_prediction_overlay.png (the case of median Dice). Returns the mean Dice of each target; if the split has no
    test cases, returns an empty dict and writes nothing."""
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
