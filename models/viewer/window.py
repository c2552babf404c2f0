"""The four-pane window of the viewer: its state, its drawing, and how it responds to wheel, keys and cursor."""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox, TransformedBbox

from models.brats import LABEL_NAMES, LABELS, MODALITIES
from models.errors import InputError, OutputError
from models.files import write_atomically
from models.plots import CONVENTION, LABEL_COLORS, PLANES, label_overlay, largest_tumour_slice, slice_view
from models.viewer.drawing import Line, SlicePicture, add_outline, box_in_picture, crop
from models.viewer.scene import Scene

KEY_HELP = ("wheel, arrows: slice   1 2 3: plane   m: most tumour   o [ ]: overlay   t: truth/prediction   "
            "c: outline   n b: case   s: save   q: quit")  # fmt: skip
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "PASI"}  # what is on the left, right, top and bottom
SIDE_INCHES = 11  # of the window, at 100 dots per inch
MARGIN = 0.05  # around the head for the letters, as a share of its longer side


def new_figure(with_window: bool):
    """A dark figure, in a window or for a file alone. Without a display a window is refused."""
    if not with_window:
        figure = Figure(figsize=(SIDE_INCHES, SIDE_INCHES), facecolor="black")
        FigureCanvasAgg(figure)
        return figure
    for keymap in [name for name in pyplot.rcParams if name.startswith("keymap.")]:
        pyplot.rcParams[keymap] = []  # the toolbar's own s, o, p and arrows would act as well
    try:
        figure = pyplot.figure(figsize=(SIDE_INCHES, SIDE_INCHES), facecolor="black")
    except ImportError:  # MPLBACKEND names a backend that cannot run here
        figure = None
    if figure is None or figure.canvas.required_interactive_framework is None:
        raise InputError("no window can be opened here (no display, or neither Tk nor Qt). Use --save PNG.")
    return figure


# ---- the window ----------------------------------------------------------------------------------------------------


class Viewer:
    """Four linked panes. Keeps what is shown, and responds to wheel, keys and cursor.

    What a turn of the wheel changes is drawn over a stored picture of the rest: redrawing everything is far slower.
    """

    def __init__(self, figure, scene: Scene, plane: str = "axial", with_help: bool = True):
        self.figure, self.plane, self.place = figure, plane, ""
        self.opacity, self.overlay_on, self.outline_on = 0.5, True, True
        self.help = KEY_HELP if with_help else ""
        self.add_artists()
        canvas = figure.canvas
        self.backgrounds, self.stale = {}, set()
        # Without an event loop nothing would ever call back: there it is drawn at once.
        self.soon = canvas.new_timer(interval=1) if canvas.required_interactive_framework else None
        if self.soon:
            self.soon.single_shot = True
            self.soon.add_callback(self.draw_stale)
        for event, answer in (("scroll_event", self.on_scroll), ("key_press_event", self.on_key),
                              ("motion_notify_event", self.on_move), ("draw_event", self.on_draw),
                              ("resize_event", self.on_resize), ("close_event", self.on_close)):
            canvas.mpl_connect(event, answer)
        figure.viewer = self  # matplotlib holds handlers weakly: without this the window goes deaf
        self.show(scene)

    def add_artists(self):
        figure, self.panes, self.overlays, self.letters = self.figure, [], [], []
        grid = figure.add_gridspec(2, 2, left=0.01, right=0.99, top=0.92, bottom=0.125, wspace=0.02, hspace=0.08)
        for channel, modality in enumerate(MODALITIES):
            axes = figure.add_subplot(grid[channel // 2, channel % 2], facecolor="black")
            axes.set_axis_off()
            axes.set(xticks=[], yticks=[], aspect="equal")  # matplotlib asks every tick whether the wheel turned on it
            axes.set_title(modality.upper(), color="white", fontsize=13)
            self.panes.append(axes.add_artist(SlicePicture(axes)))
            self.overlays.append(axes.add_artist(SlicePicture(axes)))
            places = ((0, 0.5, "left", "center"), (1, 0.5, "right", "center"),
                      (0.5, 1, "center", "top"), (0.5, 0, "center", "bottom"))  # fmt: skip
            self.letters.append([axes.text(x, y, "", ha=ha, va=va, color="#cccccc", transform=axes.transAxes)
                                 for x, y, ha, va in places])
        sheet = figure.add_axes((0, 0, 1, 1), zorder=-1)  # the words belong to axes, or a saved file would lack them
        sheet.set_axis_off()
        # Two lines that meet at one height: they stay apart in a window of any size.
        self.title, self.convention, self.legend_text, self.note, self.status = (
            sheet.add_artist(Line(0.5, y, "", ha="center", va=va, color=color, fontsize=size))
            for y, va, color, size in (
                (0.97, "bottom", "white", 12), (0.967, "top", "white", 12), (0.053, "bottom", "white", 10),
                (0.05, "top", "white", 10), (0.01, "bottom", "#aaaaaa", 9),
            )
        )
        self.font_scale = 1.0
        self.font_sizes = {text: text.get_fontsize() for text in figure.findobj(Text)}
        self.layers = {"slices": [*self.panes, *self.overlays], "title": [self.title],
                       "words": [self.legend_text, self.note], "status": [self.status]}  # fmt: skip
        heights = {"slices": (0.125, 0.92), "title": (0.968, 1), "words": (0.028, 0.073), "status": (0, 0.028)}
        areas = {name: Bbox([[0, bottom], [1, top]]) for name, (bottom, top) in heights.items()}
        self.areas = {name: TransformedBbox(area, figure.transFigure) for name, area in areas.items()}
        for artists in self.layers.values():
            for artist in artists:
                artist.set_animated(figure.canvas.supports_blit)

    @property
    def slice_count(self) -> int:
        return self.scene.image.shape[1 + PLANES[self.plane]]

    @property
    def index(self) -> int:
        return self.indices.get(self.plane, self.opening[self.plane])

    @property
    def label(self):
        return self.scene.maps.get(self.shown)

    @property
    def outlined(self) -> str | None:
        """The label map that is drawn as an outline over the one that is filled: the other one."""
        others = [name for name in self.scene.maps if name != self.shown]
        return others[0] if others and self.outline_on else None

    def most_tumour(self, plane: str, label) -> int:
        if label is None:
            return self.scene.image.shape[1 + PLANES[plane]] // 2
        return largest_tumour_slice(label, plane)

    def pixel_mm(self) -> tuple[float, float]:
        """Height and width of a pixel in the plane shown."""
        right, anterior, superior = self.scene.voxel_mm
        return {"axial": (anterior, right), "coronal": (superior, right), "sagittal": (superior, anterior)}[self.plane]

    # ---- showing

    def show(self, scene: Scene):
        """Show another case, on the slice with the most tumour."""
        self.scene, self.indices = scene, {}  # indices: of the planes in which the user chose a slice
        self.status.set_text(self.help)
        for pane, window in zip(self.panes, scene.windows, strict=True):
            pane.set_clim(*window)
        self.show_maps(scene)

    def show_maps(self, scene: Scene):
        """Show the same case with other label maps, on the slices where the user is."""
        self.scene = scene
        self.shown = "prediction" if "prediction" in scene.maps else next(iter(scene.maps), None)  # the one filled
        reference = scene.maps.get("truth", self.label)
        self.volumes_ml = scene.volumes_ml()
        self.opening = {plane: self.most_tumour(plane, reference) for plane in EDGES}
        self.note.set_text(scene.timing)
        self.note.set_color("white")
        self.show_plane()

    def show_plane(self):
        """Fit the panes to the head in this plane, in mm so that thick slices keep their proportions."""
        self.head_box = box_in_picture(self.scene.image[0] != 0, self.plane)
        # Overlays need no more than the part where there is tumour in any slice: drawing them costs by the area.
        tumour = np.zeros(self.scene.image.shape[1:], bool)
        for label in self.scene.maps.values():
            tumour |= label > 0
        self.tumour_box = box_in_picture(tumour, self.plane)
        left, right, bottom, top = extent = self.extent_mm(self.head_box)
        margin = MARGIN * max(right - left, top - bottom)
        for pane, overlay, letters in zip(self.panes, self.overlays, self.letters, strict=True):
            pane.set_extent(extent)
            overlay.set_extent(self.extent_mm(self.tumour_box))
            pane.axes.set_xlim(left - margin, right + margin)
            pane.axes.set_ylim(bottom - margin, top + margin)
            for text, letter in zip(letters, EDGES[self.plane], strict=True):
                text.set_text(letter)
        sagittal = "seen from the patient's right: anterior is on the right"
        self.convention.set_text(sagittal if self.plane == "sagittal" else CONVENTION)
        self.show_slice()
        self.show_legend()

    def extent_mm(self, box) -> tuple[float, float, float, float]:
        """Left, right, bottom and top in mm, counted from the corner of the whole picture, of a box in it."""
        (top, bottom, left, right), (height_mm, width_mm) = box, self.pixel_mm()
        rows = slice_view(self.scene.image[0], self.plane, 0).shape[0]
        return left * width_mm, right * width_mm, (rows - bottom) * height_mm, (rows - top) * height_mm

    def show_slice(self):
        pictures = slice_view(self.scene.image, self.plane, self.index)  # [4, rows, columns]
        overlay = self.overlay_picture()
        for pane, layer, picture in zip(self.panes, self.overlays, pictures, strict=True):
            pane.set_data(crop(picture, self.head_box))
            layer.set_visible(overlay is not None)
            if overlay is not None:
                layer.set_data(overlay)
        place = f" ({self.place})" if self.place else ""
        self.title.set_text(f"{self.scene.name}{place}   {self.plane} slice {self.index} of {self.slice_count}")
        self.redraw("title")
        self.redraw("slices")

    def overlay_picture(self) -> np.ndarray | None:
        """The overlay of this slice in the tumour box, RGBA uint8 [rows, columns, 4]; None where there is nothing."""
        if self.label is None or not self.overlay_on:
            return None
        names = [self.shown, self.outlined] if self.outlined else [self.shown]
        labels = [crop(slice_view(self.scene.maps[name], self.plane, self.index), self.tumour_box) for name in names]
        if not any(label.any() for label in labels):
            return None
        picture = label_overlay(labels[0], self.opacity)
        picture = add_outline(picture, labels[1]) if self.outlined else picture
        return np.rint(picture * 255).astype(np.uint8)

    def show_legend(self):
        for legend in list(self.figure.legends):
            legend.remove()
        self.legend_text.set_text("no segmentation")
        if self.label is not None:
            volumes = self.volumes_ml[self.shown]
            handles = [
                Patch(color=LABEL_COLORS[value], label=f"{name}, {LABEL_NAMES[name]}: {volumes[value]:.1f} ml")
                for value, name in LABELS.items()
            ]
            self.figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.073), ncols=3,
                               frameon=False, labelcolor="white", fontsize=10 * self.font_scale)
            parts = [f"{'filled' if self.outlined else 'segmentation'}: {self.shown}, whole tumour "
                     f"{sum(volumes.values()):.1f} ml"]
            if self.outlined:
                parts.append(f"outline: {self.outlined}, {sum(self.volumes_ml[self.outlined].values()):.1f} ml")
            self.legend_text.set_text("     ".join([*parts, self.scene.scores]))
        self.redraw_all()

    def say(self, text: str, color: str = "white"):
        """A line of news below the legend."""
        self.note.set_text(text)
        self.note.set_color(color)
        self.redraw("words")

    # ---- drawing

    def redraw_all(self):
        self.backgrounds = {}
        self.figure.canvas.draw_idle()

    def redraw(self, layer: str):
        """Draw one layer anew, once for all the events that have queued up: the picture must not lag behind a
        fast wheel."""
        self.stale.add(layer)
        if self.soon:
            self.soon.start()
        else:
            self.draw_stale()

    def draw_stale(self):
        canvas = self.figure.canvas
        stale, self.stale = self.stale, set()
        if not self.backgrounds or not canvas.supports_blit:  # a window that is closing has lost its canvas already
            canvas.draw_idle()
            return
        for layer in stale:
            canvas.restore_region(self.backgrounds[layer])
            for artist in self.layers[layer]:
                self.figure.draw_artist(artist)
        # Handing over the whole window takes less time than handing over parts of it one by one.
        canvas.blit(self.areas[stale.pop()] if len(stale) == 1 else None)

    def on_draw(self, event):
        """All but the layers has been drawn: keep it, and draw the layers over it."""
        if not event.canvas.supports_blit or event.canvas.is_saving():
            return
        self.backgrounds = {layer: event.canvas.copy_from_bbox(area) for layer, area in self.areas.items()}
        for artists in self.layers.values():
            for artist in artists:
                self.figure.draw_artist(artist)

    def on_resize(self, event):
        """Let the words grow and shrink with the window."""
        scale = min(max(min(self.figure.get_size_inches()) / SIDE_INCHES, 0.5), 1.5)
        if scale == self.font_scale:  # a window that opens reports its size more than once
            return
        self.font_scale = scale
        for text, size in self.font_sizes.items():
            text.set_fontsize(size * self.font_scale)
        self.show_legend()

    def on_close(self, event):
        if self.soon:
            self.soon.stop()

    # ---- responses

    def go_to(self, index: int):
        self.indices[self.plane] = min(max(index, 0), self.slice_count - 1)
        self.show_slice()

    def on_scroll(self, event):
        self.go_to(self.index + (1 if event.button == "up" else -1))
        self.on_move(event)  # another slice is under the cursor now

    def on_key(self, event):
        steps = {"up": 1, "down": -1, "right": 1, "left": -1, "pageup": 10, "pagedown": -10, "home": -(10**6),
                 "end": 10**6}  # fmt: skip
        if event.key in steps:
            self.go_to(self.index + steps[event.key])
            self.on_move(event)
        elif event.key in ("1", "2", "3"):
            self.plane = list(EDGES)[int(event.key) - 1]
            self.show_plane()
        elif event.key == "m":
            self.go_to(self.most_tumour(self.plane, self.label))
        elif event.key == "o":
            self.overlay_on = not self.overlay_on
            self.show_slice()
        elif event.key in ("[", "]"):
            self.opacity = min(max(self.opacity + (0.1 if event.key == "]" else -0.1), 0.1), 1.0)
            self.show_slice()
        elif event.key in ("t", "c") and self.scene.maps:
            names = list(self.scene.maps)
            if event.key == "t":
                self.shown = names[(names.index(self.shown) + 1) % len(names)]
            else:
                self.outline_on = not self.outline_on
            self.show_legend()
            self.show_slice()
        elif event.key == "s":
            try:
                self.save(Path(f"{self.scene.name}_{self.plane}_{self.index}.png"))
            except OutputError as error:
                print(error, file=sys.stderr)
        elif event.key == "q":
            pyplot.close(self.figure)

    def on_move(self, event):
        axes = [pane.axes for pane in self.panes]
        self.status.set_text(self.describe(event.xdata, event.ydata) if event.inaxes in axes else self.help)
        self.redraw("status")

    def describe(self, x_mm: float, y_mm: float) -> str:
        """Voxel of the file, place in mm, and intensities at a point of a pane."""
        height_mm, width_mm = self.pixel_mm()
        shape = self.scene.image.shape[1:]
        column, up = int(x_mm / width_mm), int(y_mm / height_mm)
        mirrored = shape[0] - 1 - column
        voxel = {"axial": (mirrored, up, self.index), "coronal": (mirrored, self.index, up),
                 "sagittal": (self.index, column, up)}[self.plane]  # fmt: skip
        if not all(0 <= v < n for v, n in zip(voxel, shape, strict=True)):
            return self.help
        where = f"voxel {voxel} in network space"
        if self.scene.affine is not None:
            native = self.scene.ras_to_native @ (*voxel, 1)
            mm = self.scene.ras_affine @ (*voxel, 1)
            where = "voxel ({:.0f}, {:.0f}, {:.0f})   RAS ({:.1f}, {:.1f}, {:.1f}) mm".format(*native[:3], *mm[:3])
        values = (f"{m.upper()} {self.scene.image[(c, *voxel)]:.4g}" for c, m in enumerate(MODALITIES))
        label = "" if self.label is None else "   " + {0: "background", **LABELS}[int(np.asarray(self.label)[voxel])]
        return f"{where}   {'  '.join(values)}{label}"

    def save(self, path: Path):
        picture = io.BytesIO()
        self.figure.savefig(picture, dpi=100, facecolor="black", format="png")
        write_atomically(path, picture.getvalue())
        print(f"Wrote {path}")
