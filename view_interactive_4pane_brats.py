#!/usr/bin/env python3
"""Look at a BraTS case: T1, T1CE, T2 and FLAIR side by side with the segmentation laid over them.

  python view_interactive_4pane_brats.py data/BraTS2021_Training_Data/BraTS2021_00000
  python view_interactive_4pane_brats.py data/preprocessed_tensors/BraTS2021_00000.pt --plane coronal
  python view_interactive_4pane_brats.py data/BraTS2021_Training_Data --run models/unet/results/RUN
  python view_interactive_4pane_brats.py CASE --save picture.png        (no window, no display needed)

With --run each case is segmented as it opens: the prediction is filled, the truth is an outline over it, and the Dice
of each region and the time in milliseconds are shown below.

Keys: wheel, up, down: one slice; page up, page down: ten; home, end: first and last; 1 2 3: axial, coronal, sagittal;
m: slice with the most tumour; o: overlay on or off; [ ]: its opacity; t: swap truth and prediction; c: outline on or
off; n, b: next and previous case of a folder; s: save a PNG; q: quit.
The line at the bottom shows the voxel, its position in mm and the four intensities under the cursor.
"""

from functools import partial
from pathlib import Path

from models import cli
from models.brats import LABEL_SCHEMES
from models.errors import InputError
from models.files import make_writable


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("case", nargs="?", type=Path, metavar="CASE", default=Path("data/BraTS2021_Training_Data"),
                        help="a case folder, a folder of cases, a preprocessed .pt file, or a folder of them")
    parser.add_argument("--name", help="which case of a folder to start at (default: the first)")
    predicted = parser.add_mutually_exclusive_group()
    predicted.add_argument("--prediction", type=Path, metavar="NIFTI",
                           help="a predicted label map on the grid of the case to start at")
    predicted.add_argument("--run", type=Path,
                           help="segment with a trained run (its folder or checkpoint), or with the weights that come "
                                "with the project: unet, swinunetr")
    parser.add_argument("--prediction-labels", choices=LABEL_SCHEMES,
                        help="what the label values of --prediction mean (default: the same as those of the case)")
    parser.add_argument("--labels", choices=LABEL_SCHEMES,
                        help="what the raw label values mean, if the names of the cases do not say")
    parser.add_argument("--same-voxels", action="store_true", help="the files of a case share one grid, even if their "
                        "affines disagree; that of T1 counts")
    parser.add_argument("--plane", choices=("axial", "coronal", "sagittal"), default="axial", help="plane to start in")
    parser.add_argument("--slice", type=cli.natural, help="slice to start at, counted from the patient's inferior, "
                        "posterior or left end (default: the one with the most tumour)")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write this picture and open no window")
    cli.add_device_arguments(parser)
    cli.add_engine_argument(parser)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from matplotlib import pyplot

    from models.viewer.scene import find_scenes, read_prediction
    from models.viewer.session import Session
    from models.viewer.window import Viewer, new_figure
    if args.run or args.prediction:
        from models.viewer import segmentation  # imports torch: seconds that looking at a raw case does not need

    if args.save and (args.save.suffix.lower() != ".png" or not args.save.parent.is_dir()):
        raise InputError(f"--save {args.save}: name a .png file in a folder that exists.")
    if args.save:
        make_writable(args.save.parent)
    loaders = find_scenes(args.case, args.labels, args.same_voxels)
    name = args.name or next(iter(loaders))
    if name not in loaders:
        raise InputError(f"{args.case}: has no case {name}. It holds {len(loaders)}, from {min(loaders)} to "
                         f"{max(loaders)}.")
    if len(loaders) > 1:
        others = "another: --name" if args.save else "another: n, b, or --name"
        print(f"{args.case} holds {len(loaders)} cases; this is {name} ({others}).")
    segmenter = segmentation.load_segmenter(args.run, args.device, args.amp) if args.run else None
    scene = loaders[name]()
    if args.prediction:
        prediction = read_prediction(args.prediction, scene, args.prediction_labels)
        scene = segmentation.with_prediction(scene, prediction)
    segment = None
    if args.run:
        segmentation.refuse_unfit_tensor(scene, segmenter.run)
        cases = 1 if args.save else len(loaders)
        segment = partial(segmentation.segment_scene, segmentation.with_engine(segmenter, args.engine, cases))
    figure = new_figure(with_window=not args.save)
    if segment and args.save:
        scene = segment(scene)
        print(f"{name}: {'; '.join(filter(None, (scene.scores, scene.timing)))}")
    viewer = Viewer(figure, scene, args.plane, with_help=not args.save)
    if args.slice is not None:
        if args.slice >= viewer.slice_count:
            raise InputError(f"--slice {args.slice}: the {args.plane} slices run from 0 to {viewer.slice_count - 1}.")
        viewer.go_to(args.slice)
    if args.save:
        viewer.save(args.save)
    else:
        Session(viewer, loaders, segment)
        pyplot.show()
    return 0


if __name__ == "__main__":
    cli.run(main)
