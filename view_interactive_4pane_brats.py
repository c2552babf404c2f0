#!/usr/bin/env python3
"""Look at a BraTS case: T1, T1CE, T2 and FLAIR side by side with the segmentation laid over them.

  python view_interactive_4pane_brats.py data/BraTS2021_Training_Data/BraTS2021_00000
  python view_interactive_4pane_brats.py data/preprocessed_tensors/BraTS2021_00000.pt --plane coronal
  python view_interactive_4pane_brats.py CASE --save picture.png        (no window, no display needed)

Keys: wheel, up, down: one slice; page up, page down: ten; home, end: first and last; 1 2 3: axial, coronal, sagittal;
m: slice with most tumour; o: overlay on or off; [ ]: its opacity; t: truth or prediction; s: save a PNG; q: quit.
The line at the bottom tells voxel, position in mm and the four intensities under the cursor.
"""

from pathlib import Path

from models import cli


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("case", nargs="?", type=Path, metavar="CASE", default=Path("data/BraTS2021_Training_Data"),
                        help="a case folder, a folder of cases, or a preprocessed .pt file")
    parser.add_argument("--name", help="which case of a folder of cases (default: the first)")
    parser.add_argument("--prediction", type=Path, metavar="NIFTI", help="a predicted label map on the case's own grid")
    parser.add_argument("--labels", choices=("brats2021", "brats2023", "brats2024", "msd"),
                        help="what the raw label values mean, where the file names do not tell")
    parser.add_argument("--plane", choices=("axial", "coronal", "sagittal"), default="axial", help="plane to start in")
    parser.add_argument("--slice", type=cli.natural, help="slice to start at, counted from the patient's inferior, "
                        "posterior or left end (default: the one with most tumour)")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write this picture and open no window")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models.brats import InputError
    from models.viewer import Viewer, new_figure

    if args.save and (args.save.suffix.lower() != ".png" or not args.save.parent.is_dir()):
        raise InputError(f"--save {args.save}: name a .png file in a folder that exists.")
    scene = load_tensor(args.case) if args.case.suffix == ".pt" else load_raw(args.case, args.name, args.labels)
    if args.prediction:
        scene.maps["prediction"] = read_prediction(args.prediction, scene)
    viewer = Viewer(new_figure(with_window=not args.save), scene, args.plane, with_help=not args.save)
    if args.slice is not None:
        if args.slice >= viewer.slice_count:
            raise InputError(f"--slice {args.slice}: the {args.plane} slices run from 0 to {viewer.slice_count - 1}.")
        viewer.go_to(args.slice)
    if args.save:
        viewer.save(args.save)
    else:
        from matplotlib import pyplot

        pyplot.show()
    return 0


# ---- loading -------------------------------------------------------------------------------------------------------


def load_raw(folder: Path, name: str | None, labels: str | None):
    """The scene of a raw case; `name` chooses among several."""
    from models.brats import InputError, find_cases, read_case, spacing_of, to_ras, to_training_labels
    from models.viewer import Scene

    cases = {case.name: case for case in find_cases(folder)}
    name = name or next(iter(cases))
    if name not in cases:
        raise InputError(f"{folder}: has no case {name}. It holds {len(cases)}, from {min(cases)} to {max(cases)}.")
    if len(cases) > 1:
        print(f"{folder} holds {len(cases)} cases; this is {name} (another: --name).")
    case, scheme = cases[name], labels or cases[name].layout
    volumes = read_case(case)
    maps = {}
    if volumes.label is not None:
        label = to_training_labels(volumes.label, scheme, case.files["seg"][0])
        maps["truth"] = to_ras(label[None], volumes.affine)[0]
    image, voxel_mm = to_ras(volumes.image, volumes.affine), spacing_of(volumes.affine)
    return Scene(name, image, maps, voxel_mm, volumes.affine, volumes.image.shape[1:], scheme)


def load_tensor(path: Path):
    """The scene of a preprocessed case."""
    from models.dataset import load_case
    from models.preprocessing import network_spacing_mm
    from models.viewer import Scene

    case = load_case(path)
    maps = {"truth": case["label"][0].numpy()} if "label" in case else {}
    return Scene(case["case"], case["image"].numpy(), maps, network_spacing_mm(case["geometry"]))


def read_prediction(path: Path, scene):
    """A label map on the scene's own grid, as training labels with RAS axes."""
    import numpy as np

    from models.brats import InputError, read_nifti, to_ras, to_training_labels

    voxels, affine = read_nifti(path)
    if scene.affine is None:
        raise InputError("--prediction: a label map is on the original grid; name the raw case, not a .pt file.")
    if voxels.shape != scene.native_shape or not np.allclose(affine, scene.affine, atol=1e-2):
        raise InputError(f"{path}: its grid {voxels.shape} is not that of {scene.name} {scene.native_shape}.")
    return to_ras(to_training_labels(voxels.astype(np.int16), scene.scheme, path)[None], affine)[0]


if __name__ == "__main__":
    cli.run(main)
