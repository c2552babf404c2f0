#!/usr/bin/env python3
"""Train a CNN, by default the baseline, a residual 3-D U-Net, on preprocessed BraTS cases, then test it.

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


def arguments(defaults: dict | None = None):
    parser = cli.parser(__doc__)
    cli.add_training_arguments(parser)
    network = parser.add_argument_group("network")
    network.add_argument("--variant", choices=("monai", "full-resolution", "space-to-depth"), default="monai",
                         help="MONAI's U-Net, whose first level has half the resolution; one that has a level at full "
                              "resolution; or the cheaper one that has it in the decoder only")
    network.add_argument("--channels", type=cli.positive_int, nargs="+", default=[16, 32, 64, 128, 256],
                         help="of each level, the finest first")
    network.add_argument("--convolutions", type=cli.positive_int, nargs="+", default=[1, 2, 2, 2, 2],
                         help="in each level's block; this and the following are not for monai")
    network.add_argument("--residual", action="store_true", help="a shortcut in each block")
    network.add_argument("--upsampling", choices=("transposed", "trilinear"), default="transposed",
                         help="transposed convolution, or interpolation after a 1x1x1 convolution")
    parser.set_defaults(**defaults or {})
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models import build_model, final_test, refuse_unfit_size, resuming, runs, training
    from models.dataset import input_size, read_split, refuse_leaks

    if args.init:
        args = arguments(runs.network_flags(args.init, vars(args)))
    split = read_split(args.data, args.fold)
    refuse_leaks(args.data, split)
    size = input_size(args.data, split, args.patch)
    config = {"out_channels": 3 if args.regions else 4, "variant": args.variant, "channels": args.channels,
              "convolutions": args.convolutions, "residual": args.residual, "upsampling": args.upsampling}
    refuse_unfit_size("unet", config, size, args.data, args.patch)
    device = training.setup(args.device, args.seed, args.deterministic)
    model = build_model("unet", **config)
    if args.init and not args.resume:
        runs.load_initial_weights(model, args.init, args.data, split)
    elif not args.resume:
        runs.suggest_heads(model, args.data, split)
    folder = runs.choose_folder(model.network, args.run_name)
    args.resume |= resuming.restarted(folder)
    with runs.locked(folder):
        earlier = resuming.record_to_resume(folder, model, vars(args), split)
        settings = cli.settings_of(args, training.Settings)
        settings = training.resolve(settings, model, size, split, device, earlier)
        resuming.write_record(folder, earlier, model, vars(args) | asdict(settings), split, size, device)
        minutes = training.fit(model, settings, split, folder, device, args.resume)
        dice = final_test.test(model, settings, split, folder, device)
    final_test.report(folder, split, dice, minutes)
    return 0


if __name__ == "__main__":
    cli.run(main)
