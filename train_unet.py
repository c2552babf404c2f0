#!/usr/bin/env python3
"""Train the CNN baseline, a residual 3-D U-Net, on preprocessed BraTS cases, then test it.

Writes models/unet/results/<run>/: config.json, train.csv, training_plots.png, best.pt (best validation Dice), last.pt,
test_results.csv and test_prediction_overlay.png.

  python train_unet.py data/preprocessed_tensors                        (one GPU; or the CPU, slowly)
  torchrun --nproc-per-node 4 train_unet.py data/preprocessed_tensors   (several GPUs)
  python train_unet.py DATA --epochs 3 --run-name first                 (DATA preprocessed with --size 64 --limit 8:
                                                                         a minute on a CPU)
"""

from models import cli


def arguments():
    parser = cli.parser(__doc__)
    cli.add_training_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models import build_model, training
    from models.dataset import read_split

    split = read_split(args.data, args.fold)
    size = training.check_cases(args.data, split, "unet")
    device = training.setup(args)
    model = build_model("unet")
    args.amp = training.choose_amp(model, args, size, device)
    run = training.open_run(model, args, split, size, device)
    minutes = training.fit(model, args, split, run, device)
    dice = training.test(model, args, split, run, device)
    training.report(run, split, dice, minutes)
    return 0


if __name__ == "__main__":
    cli.run(main)
