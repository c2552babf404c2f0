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


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("case", nargs="?", type=Path, metavar="CASE", default=Path("data/BraTS2021_Training_Data"),
                        help="a case folder, a folder of cases, a preprocessed .pt file, or a folder of them")
    parser.add_argument("--name", help="which case of a folder to start at (default: the first)")
    predicted = parser.add_mutually_exclusive_group()
    predicted.add_argument("--prediction", type=Path, metavar="NIFTI",
                           help="a predicted label map on the grid of the case to start at")
    predicted.add_argument("--run", type=Path, help="folder of a trained run, or its checkpoint: segment with it")
    parser.add_argument("--labels", choices=("brats2021", "brats2023", "brats2024", "msd"),
                        help="what the raw label values mean, if the file names do not say")
    parser.add_argument("--plane", choices=("axial", "coronal", "sagittal"), default="axial", help="plane to start in")
    parser.add_argument("--slice", type=cli.natural, help="slice to start at, counted from the patient's inferior, "
                        "posterior or left end (default: the one with the most tumour)")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write this picture and open no window")
    cli.add_device_arguments(parser)
    cli.add_engine_argument(parser)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models.errors import InputError
    from models.viewer.scene import with_prediction
    from models.viewer.session import Session, open_run, refuse_other_size, segment, with_engine
    from models.viewer.window import Viewer, new_figure

    if args.save and (args.save.suffix.lower() != ".png" or not args.save.parent.is_dir()):
        raise InputError(f"--save {args.save}: name a .png file in a folder that exists.")
    loaders = find_scenes(args.case, args.labels)
    name = choose(loaders, args)
    run = open_run(args.run, args.device, args.amp) if args.run else None
    scene = loaders[name]()
    if args.prediction:
        scene = with_prediction(scene, read_prediction(args.prediction, scene))
    if run:
        refuse_other_size(scene, run)
        run = with_engine(run, args.engine)
    figure = new_figure(with_window=not args.save)
    if run and args.save:
        scene = segment(scene, run)
        print(f"{name}: {'; '.join(filter(None, (scene.scores, scene.timing)))}")
    viewer = Viewer(figure, scene, args.plane, with_help=not args.save)
    if args.slice is not None:
        if args.slice >= viewer.slice_count:
            raise InputError(f"--slice {args.slice}: the {args.plane} slices run from 0 to {viewer.slice_count - 1}.")
        viewer.go_to(args.slice)
    if args.save:
        viewer.save(args.save)
    else:
        from matplotlib import pyplot

        Session(viewer, loaders, run)
        pyplot.show()
    return 0


# ---- loading -------------------------------------------------------------------------------------------------------


def find_scenes(path: Path, labels: str | None) -> dict:
    """Case name -> function that loads it, in order: of a .pt file, a folder of them, or a folder of raw cases."""
    from models.brats import find_cases

    tensors = [path] if path.suffix == ".pt" else sorted(path.glob("*.pt"))
    if tensors:
        return {tensor.stem: partial(load_tensor, tensor) for tensor in tensors}
    return {case.name: partial(load_raw, case, labels) for case in find_cases(path)}


def choose(loaders: dict, args) -> str:
    """The name of the case to open with."""
    from models.errors import InputError

    name = args.name or next(iter(loaders))
    if name not in loaders:
        raise InputError(f"{args.case}: has no case {name}. It holds {len(loaders)}, from {min(loaders)} to "
                         f"{max(loaders)}.")
    if len(loaders) > 1:
        others = "another: --name" if args.save else "another: n, b, or --name"
        print(f"{args.case} holds {len(loaders)} cases; this is {name} ({others}).")
    return name


def load_raw(case, labels: str | None):
    """The scene of a raw case."""
    from models.brats import read_case, spacing_of, to_ras, to_training_labels
    from models.viewer.scene import Scene

    scheme = labels or case.layout
    volumes = read_case(case)
    maps = {}
    if volumes.label is not None:
        label = to_training_labels(volumes.label, scheme, case.files["seg"][0])
        maps["truth"] = to_ras(label[None], volumes.affine)[0]
    image, voxel_mm = to_ras(volumes.image, volumes.affine), spacing_of(volumes.affine)
    return Scene(case.name, image, maps, voxel_mm, volumes.affine, volumes.image.shape[1:], scheme)


def load_tensor(path: Path):
    """The scene of a preprocessed case; it is called as its file is."""
    from models.dataset import load_case
    from models.preprocessing import network_spacing_mm
    from models.viewer.scene import Scene

    case = load_case(path)
    maps = {"truth": case["label"][0].numpy()} if "label" in case else {}
    return Scene(path.stem, case["image"].numpy(), maps, network_spacing_mm(case["geometry"]))


def read_prediction(path: Path, scene):
    """A label map on the scene's own grid, as training labels with RAS axes."""
    import numpy as np

    from models.brats import read_label, to_ras, to_training_labels
    from models.errors import InputError

    label, affine = read_label(path)
    if scene.affine is None:
        raise InputError("--prediction: a label map is on the original grid; give the raw case, not a .pt file.")
    if label.shape != scene.native_shape or not np.allclose(affine, scene.affine, atol=1e-2):
        raise InputError(f"{path}: shape {label.shape} or affine differs from {scene.name} {scene.native_shape}. "
                         "Give a label map on the grid of the case.")
    return to_ras(to_training_labels(label, scene.scheme, path)[None], affine)[0]


if __name__ == "__main__":
    cli.run(main)
