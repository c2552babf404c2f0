#!/usr/bin/env python3
"""Look at a BraTS case: T1, T1CE, T2 and FLAIR side by side with the segmentation laid over them.

  python view_interactive_4pane_brats.py data/BraTS2021_Training_Data/BraTS2021_00000
  python view_interactive_4pane_brats.py data/preprocessed_tensors/BraTS2021_00000.pt --plane coronal
  python view_interactive_4pane_brats.py CASE --save picture.png        (no window, no display needed)

Keys: wheel, up, down: one slice; page up, page down: ten; home, end: first and last; 1 2 3: axial, coronal, sagittal;
m: slice with most tumour; o: overlay on or off; [ ]: its opacity; t: truth or prediction; s: save a PNG; q: quit.
The line at the bottom tells voxel, position in mm and the four intensities under the cursor.
"""

from dataclasses import dataclass
from pathlib import Path

from models import cli

KEY_HELP = "wheel, arrows: slice   1 2 3: plane   m: most tumour   o [ ]: overlay   t: truth, prediction   s: save   q"
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "PASI"}  # what is at the left, right, top and bottom


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("case", nargs="?", type=Path, metavar="CASE", default=Path("data/BraTS2021_Training_Data"),
                        help="a case folder, a folder of cases, or a preprocessed .pt file")
    parser.add_argument("--name", help="which case of a folder of cases (default: the first)")
    parser.add_argument("--prediction", type=Path, metavar="NIFTI", help="a predicted label map on the case's own grid")
    parser.add_argument("--labels", choices=("brats2021", "brats2023", "brats2024", "msd"),
                        help="what the raw label values mean, where the file names do not tell")
    parser.add_argument("--plane", choices=tuple(EDGES), default="axial", help="plane to start in")
    parser.add_argument("--slice", type=cli.natural, help="slice to start at, counted from the patient's inferior, "
                        "posterior or left end (default: the one with most tumour)")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write this picture and open no window")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from models.brats import InputError

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


@dataclass
class Scene:
    """What there is to see, with RAS axes: image [4, D, H, W], label maps [D, H, W] by name."""

    name: str
    image: object
    maps: dict
    voxel_mm: list[float]
    affine: object = None  # of the original file; None in network space
    native_shape: tuple = ()
    scheme: str = ""


def load_raw(folder: Path, name: str | None, labels: str | None) -> Scene:
    import numpy as np

    from models.brats import InputError, find_cases, read_case, to_training_labels

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
        maps["truth"] = reorient(label, volumes.affine)
    image = np.stack([reorient(modality, volumes.affine) for modality in volumes.image])
    spacing = np.linalg.norm(volumes.affine[:3, :3], axis=0)
    voxel_mm = [float(spacing[axis]) for axis in np.argsort(orientation_of(volumes.affine)[:, 0])]
    return Scene(name, image, maps, voxel_mm, volumes.affine, volumes.image.shape[1:], scheme)


def load_tensor(path: Path) -> Scene:
    from models.dataset import load_case
    from models.preprocessing import network_spacing_mm

    case = load_case(path)
    maps = {"truth": case["label"][0].numpy()} if "label" in case else {}
    return Scene(case["case"], case["image"].numpy(), maps, network_spacing_mm(case["geometry"]))


def read_prediction(path: Path, scene: Scene):
    import numpy as np

    from models.brats import InputError, read_nifti, to_training_labels

    voxels, affine = read_nifti(path)
    if scene.affine is None:
        raise InputError("--prediction: a label map is on the original grid; name the raw case, not a .pt file.")
    if voxels.shape != scene.native_shape or not np.allclose(affine, scene.affine, atol=1e-2):
        raise InputError(f"{path}: its grid {voxels.shape} is not that of {scene.name} {scene.native_shape}.")
    return reorient(to_training_labels(voxels.astype(np.int16), scene.scheme, path), affine)


def orientation_of(affine):
    from nibabel.orientations import io_orientation

    return io_orientation(affine)


def reorient(volume, affine):
    from nibabel.orientations import apply_orientation

    return apply_orientation(volume, orientation_of(affine))


# ---- the window ----------------------------------------------------------------------------------------------------


def new_figure(with_window: bool):
    """A dark figure, in a window or for a file alone. Without a display a window is refused."""
    import matplotlib

    if not with_window:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 11), facecolor="black")
        FigureCanvasAgg(figure)
        return figure
    from matplotlib import pyplot

    from models.brats import InputError

    pyplot.figure  # noqa: B018  (resolves the backend)
    pyplot.switch_backend(matplotlib.get_backend())
    if matplotlib.get_backend().lower() == "agg":
        raise InputError("no window can be opened here (no display, or neither Tk nor Qt). Use --save PNG.")
    for keymap in [name for name in matplotlib.rcParams if name.startswith("keymap.")]:
        matplotlib.rcParams[keymap] = []  # the toolbar's own s, o, p and arrows would act as well
    return pyplot.figure(figsize=(11, 11), facecolor="black")


class Viewer:
    """Four linked panes. Keeps what is shown, and answers wheel, keys and cursor."""

    def __init__(self, figure, scene: Scene, plane: str = "axial", with_help: bool = True):
        from models.brats import MODALITIES
        from models.plots import intensity_window

        self.figure, self.scene, self.plane = figure, scene, plane
        self.opacity, self.overlay_on = 0.5, True
        self.shown = next(iter(scene.maps), None)  # which label map
        self.panes, self.overlays, self.letters = [], [], []
        grid = figure.add_gridspec(2, 2, left=0.01, right=0.99, top=0.92, bottom=0.12, wspace=0.02, hspace=0.08)
        for channel, modality in enumerate(MODALITIES):
            axes = figure.add_subplot(grid[channel // 2, channel % 2], facecolor="black")
            axes.set_axis_off()
            axes.set_title(modality.upper(), color="white", fontsize=13)
            low, high = intensity_window(scene.image[channel])
            self.panes.append(axes.imshow([[0]], cmap="gray", vmin=low, vmax=high))
            self.overlays.append(axes.imshow([[[0, 0, 0, 0]]], interpolation="nearest"))
            places = ((0.01, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.01))
            self.letters.append([axes.text(*p, "", color="#cccccc", transform=axes.transAxes) for p in places])
        self.title = figure.text(0.5, 0.955, "", color="white", ha="center", fontsize=12)
        self.legend_text = figure.text(0.5, 0.035, "", color="white", ha="center", fontsize=10)
        self.status = figure.text(0.5, 0.012, KEY_HELP if with_help else "", color="#aaaaaa", ha="center", fontsize=9)
        self.indices = {name: self.most_tumour(name) for name in EDGES}
        for event, answer in (("scroll_event", self.on_scroll), ("key_press_event", self.on_key),
                              ("motion_notify_event", self.on_move)):
            figure.canvas.mpl_connect(event, answer)
        figure.viewer = self  # matplotlib holds handlers weakly: without this the window goes deaf
        self.show_plane()

    @property
    def slice_count(self) -> int:
        from models.plots import PLANES

        return self.scene.image.shape[1 + PLANES[self.plane]]

    @property
    def index(self) -> int:
        return self.indices[self.plane]

    @property
    def label(self):
        return self.scene.maps.get(self.shown)

    def most_tumour(self, plane: str) -> int:
        from models.plots import PLANES, largest_tumour_slice

        return self.scene.image.shape[1 + PLANES[plane]] // 2 if self.label is None else largest_tumour_slice(
            self.label, plane)

    def pixel_mm(self) -> tuple[float, float]:
        """Height and width of a pixel in the plane shown."""
        right, anterior, superior = self.scene.voxel_mm
        return {"axial": (anterior, right), "coronal": (superior, right), "sagittal": (superior, anterior)}[self.plane]

    def show_plane(self):
        """Fit the panes to the head in this plane, in mm so that thick slices keep their proportions."""
        import numpy as np

        from models.plots import PLANES, slice_view

        rows, columns = slice_view(self.scene.image[0], self.plane, self.index).shape
        height_mm, width_mm = self.pixel_mm()
        # All slices seen through at once: where there is anything is the part worth showing.
        head = (self.scene.image[0] != 0).any(axis=PLANES[self.plane], keepdims=True)
        shadow = slice_view(head, self.plane, 0)
        top, bottom = np.flatnonzero(shadow.any(1))[[0, -1]] + (-4, 5)
        left, right = np.flatnonzero(shadow.any(0))[[0, -1]] + (-4, 5)
        for pane, overlay, letters in zip(self.panes, self.overlays, self.letters, strict=True):
            for picture in (pane, overlay):
                picture.set_extent((0, columns * width_mm, 0, rows * height_mm))
            pane.axes.set_xlim(left * width_mm, right * width_mm)
            pane.axes.set_ylim((rows - bottom) * height_mm, (rows - top) * height_mm)
            for text, letter in zip(letters, EDGES[self.plane], strict=True):
                text.set_text(letter)
        self.show_legend()
        self.show_slice()

    def show_slice(self):
        from models.plots import CONVENTION, label_overlay, slice_view

        pictures = slice_view(self.scene.image, self.plane, self.index)  # [4, rows, columns]
        visible = self.label is not None and self.overlay_on
        overlay = label_overlay(slice_view(self.label, self.plane, self.index), self.opacity) if visible else None
        for pane, layer, picture in zip(self.panes, self.overlays, pictures, strict=True):
            pane.set_data(picture)
            layer.set_visible(visible)
            if visible:
                layer.set_data(overlay)
        convention = "patient's left side seen from the left" if self.plane == "sagittal" else CONVENTION
        self.title.set_text(f"{self.scene.name}   {self.plane} slice {self.index} of {self.slice_count}\n{convention}")
        self.figure.canvas.draw_idle()

    def show_legend(self):
        import numpy as np
        from matplotlib.patches import Patch

        from models.brats import LABEL_NAMES, LABELS, REGIONS
        from models.plots import LABEL_COLORS

        for legend in list(self.figure.legends):
            legend.remove()
        if self.label is None:
            self.legend_text.set_text("no segmentation")
            return
        voxel_ml = float(np.prod(self.scene.voxel_mm)) / 1e3
        volumes = {value: np.count_nonzero(self.label == value) * voxel_ml for value in LABELS}
        handles = [
            Patch(color=LABEL_COLORS[value], label=f"{name}, {LABEL_NAMES[name]}: {volumes[value]:.1f} ml")
            for value, name in LABELS.items()
        ]
        self.figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.055), ncols=3, frameon=False,
                           labelcolor="white", fontsize=10)
        line = f"segmentation: {self.shown}, whole tumour {sum(volumes.values()):.1f} ml"
        if len(self.scene.maps) == 2:
            scores = []
            for region, labels in REGIONS.items():
                truth, prediction = (np.isin(self.scene.maps[k], labels) for k in ("truth", "prediction"))
                total = truth.sum() + prediction.sum()
                scores.append(f"{region} {2 * (truth & prediction).sum() / total if total else 1.0:.3f}")
            line += "; Dice " + ", ".join(scores)
        self.legend_text.set_text(line)

    # ---- answers

    def go_to(self, index: int):
        self.indices[self.plane] = min(max(index, 0), self.slice_count - 1)
        self.show_slice()

    def on_scroll(self, event):
        self.go_to(self.index + (1 if event.button == "up" else -1))

    def on_key(self, event):
        steps = {"up": 1, "down": -1, "right": 1, "left": -1, "pageup": 10, "pagedown": -10, "home": -(10**6),
                 "end": 10**6}  # fmt: skip
        if event.key in steps:
            self.go_to(self.index + steps[event.key])
        elif event.key in ("1", "2", "3"):
            self.plane = list(EDGES)[int(event.key) - 1]
            self.show_plane()
        elif event.key == "m":
            self.go_to(self.most_tumour(self.plane))
        elif event.key == "o":
            self.overlay_on = not self.overlay_on
            self.show_slice()
        elif event.key in ("[", "]"):
            self.opacity = min(max(self.opacity + (0.1 if event.key == "]" else -0.1), 0.1), 1.0)
            self.show_slice()
        elif event.key == "t" and self.scene.maps:
            names = list(self.scene.maps)
            self.shown = names[(names.index(self.shown) + 1) % len(names)]
            self.show_legend()
            self.show_slice()
        elif event.key == "s":
            self.save(Path(f"{self.scene.name}_{self.plane}_{self.index}.png"))
        elif event.key == "q":
            from matplotlib import pyplot

            pyplot.close(self.figure)

    def on_move(self, event):
        axes = [pane.axes for pane in self.panes]
        self.status.set_text(self.describe(event.xdata, event.ydata) if event.inaxes in axes else KEY_HELP)
        self.figure.canvas.draw_idle()

    def describe(self, x_mm: float, y_mm: float) -> str:
        """Voxel of the file, place in mm, and intensities at a point of a pane."""
        import numpy as np
        from nibabel.orientations import inv_ornt_aff

        from models.brats import LABELS, MODALITIES

        height_mm, width_mm = self.pixel_mm()
        shape = self.scene.image.shape[1:]
        column, up = int(x_mm / width_mm), int(y_mm / height_mm)
        mirrored = shape[0] - 1 - column
        voxel = {"axial": (mirrored, up, self.index), "coronal": (mirrored, self.index, up),
                 "sagittal": (self.index, column, up)}[self.plane]  # fmt: skip
        if not all(0 <= v < n for v, n in zip(voxel, shape, strict=True)):
            return KEY_HELP
        where = f"voxel {voxel} of network space"
        if self.scene.affine is not None:
            native = inv_ornt_aff(orientation_of(self.scene.affine), self.scene.native_shape) @ (*voxel, 1)
            mm = self.scene.affine @ native
            where = "voxel ({:.0f}, {:.0f}, {:.0f})   RAS ({:.1f}, {:.1f}, {:.1f}) mm".format(*native[:3], *mm[:3])
        values = (f"{m.upper()} {self.scene.image[(c, *voxel)]:.4g}" for c, m in enumerate(MODALITIES))
        label = "" if self.label is None else "   " + {0: "background", **LABELS}[int(np.asarray(self.label)[voxel])]
        return f"{where}   {'  '.join(values)}{label}"

    def save(self, path: Path):
        self.figure.savefig(path, dpi=100, facecolor="black")
        print(f"Wrote {path}")


if __name__ == "__main__":
    cli.run(main)
