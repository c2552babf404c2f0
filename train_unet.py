#!/usr/bin/env python3
"""Train the CNN baseline, a residual 3-D U-Net, on preprocessed BraTS cases, then test it.

Writes models/unet/results/<run>/: config.json, train.csv, training_plots.png, best.pt (best validation Dice), last.pt,
test_results.csv and test_prediction_overlay.png.

  python train_unet.py data/preprocessed_tensors                        (one GPU; or the CPU, slowly)
  torchrun --nproc-per-node 4 train_unet.py data/preprocessed_tensors   (several GPUs)
  python train_unet.py DATA --patch 128 --regions                       (DATA preprocessed with --size native)
  python train_unet.py DATA --epochs 3 --run-name first                 (DATA preprocessed with --size 64 --limit 8:
                                                                         a minute on a CPU)
"""

from dataclasses import asdict

from models import cli


def arguments():
    parser = cli.parser(__doc__)
    cli.add_training_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models import build_model, refuse_unfit_size, runs, training
    from models.dataset import input_size, read_split

    split = read_split(args.data, args.fold)
    size = input_size(args.data, split, args.patch)
    refuse_unfit_size("unet", {}, size, args.data, args.patch)
    device = training.setup(args.device, args.seed)
    model = build_model("unet", out_channels=3 if args.regions else 4)
    folder = runs.choose_folder(model.network, args.run_name)
    with runs.locked(folder):
        earlier = runs.record_to_resume(folder, model, vars(args), split)
        settings = cli.settings_of(args, training.Settings)
        settings = training.resolve(settings, model, size, split, device, earlier)
        runs.write_record(folder, earlier, model, vars(args) | asdict(settings), split, size, device)
        minutes = training.fit(model, settings, split, folder, device, args.resume)
        dice = training.test(model, settings, split, folder, device)
    training.report(folder, split, dice, minutes)
    return 0


if __name__ == "__main__":
    cli.run(main)
