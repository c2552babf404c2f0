"""Make the weights that come with the project, which every script finds by the name of their network (--run unet).

  python -m models.pretrained models/unet/results/RUN/last.pt
  python -m models.pretrained models/unet/results/RUN/last.pt --heads   (they have seen no patient; --init unet-heads)

writes them as float16, without what only a training needs, to models/<network>/results/pretrained/best.pt, or
pretrained-heads/best.pt, and the run's config.json beside it. MODEL_CARD.md there, which is written by hand, says what
they are good for and what not.
"""

from pathlib import Path

from models import cli
from models.errors import InputError
from models.files import portable, write_atomically
from models.runs import load_checkpoint, pretrained_checkpoint, save

KEPT = ("format", "network", "config", "modalities", "amp", "epoch", "dice_mean", "model")


def half_checkpoint(checkpoint: dict) -> dict:
    """What prediction needs of a checkpoint, its weights as float16. InputError for weights that do not fit."""
    small = {key: checkpoint[key] for key in KEPT if key in checkpoint}
    small["model"] = {
        name: value.half() if value.is_floating_point() else value for name, value in checkpoint["model"].items()
    }
    for name, value in small["model"].items():
        if not value.isfinite().all():
            raise InputError(f"{name}: a weight is too large for float16: {checkpoint['model'][name].abs().max():.3g}.")
    return small


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="last.pt, or best.pt, of a trained run")
    parser.add_argument("--heads", action="store_true", help="they were trained on synthetic heads alone")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint)
    record = args.checkpoint.parent / "config.json"
    if not record.is_file():
        raise InputError(f"{record}: missing. It says how cases are preprocessed for these weights.")
    out = pretrained_checkpoint(checkpoint["network"], args.heads)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, half_checkpoint(checkpoint))
    write_atomically(out.with_name("config.json"), record.read_text())
    print(f"{portable(out)}: {out.stat().st_size / 1e6:.1f} MB, the weights after epoch {checkpoint['epoch']}.")
    return 0


if __name__ == "__main__":
    cli.run(main)
