"""The four-pane window of the viewer: state, drawing, and the answers to wheel, keys and cursor."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from models.brats import LABEL_NAMES, LABELS, MODALITIES, REGIONS, InputError
from models.plots import (
    CONVENTION,
    LABEL_COLORS,
    PLANES,
    intensity_window,
    label_overlay,
    largest_tumour_slice,
    slice_view,
)

KEY_HELP = "wheel, arrows: slice   1 2 3: plane   m: most tumour   o [ ]: overlay   t: truth, prediction   s: save   q"
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "PASI"}  # what is at the left, right, top and bottom


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


def new_figure(with_window: bool):
    """A dark figure, in a window or for a file alone. Without a display a window is refused."""
    if not with_window:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 11), facecolor="black")
        FigureCanvasAgg(figure)
        return figure
    from matplotlib import pyplot

    for keymap in [name for name in pyplot.rcParams if name.startswith("keymap.")]:
        pyplot.rcParams[keymap] = []  # the toolbar's own s, o, p and arrows would act as well
    try:
        figure = pyplot.figure(figsize=(11, 11), facecolor="black")
    except ImportError:  # MPLBACKEND names a backend that cannot run here
        figure = None
    if figure is None or figure.canvas.required_interactive_framework is None:
        raise InputError("no window can be opened here (no display, or neither Tk nor Qt). Use --save PNG.")
    return figure


def describe_dice(maps: dict) -> str:
    """The Dice of each region for the legend, where there are truth and prediction to compare."""
    if len(maps) < 2:
        return ""
    import torch  # seconds to import: only for those who compare

    from models.metrics import confusion, dice_per_target

    prediction, truth = (torch.from_numpy(np.ascontiguousarray(maps[name])) for name in ("prediction", "truth"))
    dice = dice_per_target(confusion(prediction, truth))
    return "; Dice " + ", ".join(f"{region} {dice[region]:.3f}" for region in REGIONS)


class Viewer:
    """Four linked panes. Keeps what is shown, and answers wheel, keys and cursor."""

    def __init__(self, figure, scene: Scene, plane: str = "axial", with_help: bool = True):
        self.figure, self.scene, self.plane = figure, scene, plane
        self.opacity, self.overlay_on = 0.5, True
        self.shown = next(iter(scene.maps), None)  # which label map
        self.scores = describe_dice(scene.maps)
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
        return self.scene.image.shape[1 + PLANES[self.plane]]

    @property
    def index(self) -> int:
        return self.indices[self.plane]

    @property
    def label(self):
        return self.scene.maps.get(self.shown)

    def most_tumour(self, plane: str) -> int:
        if self.label is None:
            return self.scene.image.shape[1 + PLANES[plane]] // 2
        return largest_tumour_slice(self.label, plane)

    def pixel_mm(self) -> tuple[float, float]:
        """Height and width of a pixel in the plane shown."""
        right, anterior, superior = self.scene.voxel_mm
        return {"axial": (anterior, right), "coronal": (superior, right), "sagittal": (superior, anterior)}[self.plane]

    def show_plane(self):
        """Fit the panes to the head in this plane, in mm so that thick slices keep their proportions."""
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
        pictures = slice_view(self.scene.image, self.plane, self.index)  # [4, rows, columns]
        visible = self.label is not None and self.overlay_on
        overlay = label_overlay(slice_view(self.label, self.plane, self.index), self.opacity) if visible else None
        for pane, layer, picture in zip(self.panes, self.overlays, pictures, strict=True):
            pane.set_data(picture)
            layer.set_visible(visible)
            if visible:
                layer.set_data(overlay)
        sagittal = "seen from the patient's right: anterior is on the right"
        convention = sagittal if self.plane == "sagittal" else CONVENTION
        self.title.set_text(f"{self.scene.name}   {self.plane} slice {self.index} of {self.slice_count}\n{convention}")
        self.figure.canvas.draw_idle()

    def show_legend(self):
        from matplotlib.patches import Patch

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
        whole_ml = sum(volumes.values())
        self.legend_text.set_text(f"segmentation: {self.shown}, whole tumour {whole_ml:.1f} ml{self.scores}")

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
            native = inv_ornt_aff(io_orientation(self.scene.affine), self.scene.native_shape) @ (*voxel, 1)
            mm = self.scene.affine @ native
            where = "voxel ({:.0f}, {:.0f}, {:.0f})   RAS ({:.1f}, {:.1f}, {:.1f}) mm".format(*native[:3], *mm[:3])
        values = (f"{m.upper()} {self.scene.image[(c, *voxel)]:.4g}" for c, m in enumerate(MODALITIES))
        label = "" if self.label is None else "   " + {0: "background", **LABELS}[int(np.asarray(self.label)[voxel])]
        return f"{where}   {'  '.join(values)}{label}"

    def save(self, path: Path):
        self.figure.savefig(path, dpi=100, facecolor="black")
        print(f"Wrote {path}")
