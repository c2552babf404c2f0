#!/usr/bin/env python3
"""Train the transformer, Swin UNETR, on preprocessed BraTS cases with the same loop as the U-Net, then test it.

Writes models/swinunetr/results/<run>/: config.json, train.csv, training_plots.png, best.pt (best validation Dice),
last.pt, test_results.csv and test_prediction_overlay.png. The default is Swin UNETR V2 with feature size 48, as in the
paper; its tensors take 5.8 GiB at 128x128x128 in bf16 (counted). evaluate.py compares the run with one of the U-Net.

  python train_swinunetr.py data/preprocessed_tensors                        (one GPU)
  python train_swinunetr.py data/preprocessed_tensors --checkpointing full   (3.2 GiB, slower)
  torchrun --nproc-per-node 4 train_swinunetr.py data/preprocessed_tensors   (several GPUs)
  python train_swinunetr.py DATA --patch 128 --regions --no-v2               (as in the paper of 2022; DATA
                                                  preprocessed with --size native --normalize zscore)
  python train_swinunetr.py DATA --feature-size 12 --epochs 2                (DATA preprocessed with --size 64 --limit
                                                                              8: a minute on a CPU)
"""

import argparse
from dataclasses import asdict

from models import cli


def arguments(defaults: dict | None = None):
    parser = cli.parser(__doc__)
    cli.add_training_arguments(parser)
    network = parser.add_argument_group("network")
    network.add_argument("--feature-size", type=cli.positive_int, default=48,
                         help="channels of the finest level, a multiple of 12: memory grows with it, arithmetic with "
                              "its square")
    network.add_argument("--window-size", type=cli.positive_int, default=7,
                         help="tokens (of 2 voxels) along a side of an attention window; 8 needs no padding at 128")
    network.add_argument("--checkpointing", choices=("none", "blocks", "full"), default="none",
                         help="compute activations again in the backward pass instead of keeping them: those of the "
                              "Swin blocks, or of the convolutions too; slower steps, less memory")
    network.add_argument("--attention", choices=("reference", "sdpa", "auto"), default="auto",
                         help="written-out formula, torch's fused kernels, or the faster of them on this device")
    network.add_argument("--v2", action=argparse.BooleanOptionalAction, default=True,
                         help="Swin UNETR V2: a residual block of convolutions before each stage; --no-v2: the network "
                              "of 2022, as the published weights and those that come with the project are")
    network.add_argument("--drop-path", type=cli.fraction, default=0.0,
                         help="how often the branches of the last Swin block are left out in a training step, below 1; "
                              "less often in the blocks before it, never in the first")
    network.add_argument("--no-attention", action="store_true",
                         help="leave attention out of the Swin blocks, to see what it is worth")
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
    config = {"out_channels": 3 if args.regions else 4, "feature_size": args.feature_size,
              "window_size": args.window_size, "attention": args.attention, "checkpointing": args.checkpointing,
              "v2": args.v2, "drop_path": args.drop_path, "use_attention": not args.no_attention}
    refuse_unfit_size("swinunetr", config, size, args.data, args.patch)
    device = training.setup(args.device, args.seed, args.deterministic)
    model = build_model("swinunetr", **config)
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
