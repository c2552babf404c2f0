"""The drawing rules shared by all pictures and the viewer, and the figures of a training and of a case. Knows arrays,
not files.

Volumes come in RAS axes ([..., D, H, W]: index grows to the patient's right, to anterior, to superior) and are shown
in radiological convention: the patient's right is on the left of the picture, anterior (or superior) is up.
"""

import io
from functools import lru_cache
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure  # not pyplot: it keeps every figure, and may want a display
from matplotlib.font_manager import findfont
from matplotlib.patches import Patch
from PIL import ImageFont

from models.brats import LABEL_NAMES, LABELS, MODALITIES
from models.files import write_atomically
from models.labels import occupied_box

# Okabe & Ito's vermilion, sky blue and yellow, which colour-blind people can distinguish.
LABEL_COLORS = {1: (0.84, 0.37, 0.00), 2: (0.34, 0.71, 0.91), 3: (0.94, 0.89, 0.26)}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the array axis that a plane's slices run along
CONVENTION = "radiological convention: the patient's right is on the left"


def slice_view(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Slice `index` of a RAS volume [..., D, H, W] as a picture [..., rows, columns], row 0 at the top."""
    picture = volume[(..., index, *[slice(None)] * (2 - PLANES[plane]))]  # a view: np.take copies the whole volume
    picture = np.swapaxes(picture, -1, -2)[..., ::-1, :]  # up is anterior (axial) or superior
    # Axial and coronal columns then run to the patient's right: mirrored. Sagittal columns run to anterior.
    return picture if plane == "sagittal" else picture[..., ::-1]


def intensity_window(volume: np.ndarray, low: float = 1.0, high: float = 99.5) -> tuple[float, float]:
    """The percentiles of the non-zero voxels between which a modality is shown; (0, 1) for an empty volume. A large
    volume is sampled on a coarser grid of about half a million voxels."""
    step = max(1, round((volume.size / 500_000) ** (1 / 3)))
    sample = volume[::step, ::step, ::step]
    foreground = sample[sample != 0]
    if foreground.size == 0:
        return 0.0, 1.0
    bottom, top = np.percentile(foreground, (low, high))
    return float(bottom), float(max(top, bottom + 1e-6))


def label_overlay(label: np.ndarray, opacity: float) -> np.ndarray:
    """A label picture [rows, columns] of training labels as RGBA [rows, columns, 4] to lay over a slice."""
    table = np.zeros((len(LABEL_COLORS) + 1, 4), np.float32)
    for value, color in LABEL_COLORS.items():
        table[value] = (*color, opacity)
    return table[label]


def largest_tumour_slice(label: np.ndarray, plane: str = "axial") -> int:
    """Index of the slice with most tumour voxels along a plane; the middle slice when there is no tumour."""
    axis = PLANES[plane]
    box = occupied_box(label)  # counting along axes is slow, and nearly all of a head is no tumour
    tumour = label[tuple(slice(low, high) for low, high in box)]
    areas = np.count_nonzero(tumour, axis=tuple(other for other in range(3) if other != axis))
    return box[axis][0] + int(areas.argmax()) if areas.size else label.shape[axis] // 2


@lru_cache
def load_font(size: float, path: str = "") -> ImageFont.FreeTypeFont:
    """The font of a file, or matplotlib's own, for Pillow; `size` in pixels."""
    return ImageFont.truetype(path or findfont("DejaVu Sans"), size)


# ---- saved figures -------------------------------------------------------------------------------------------------


def training_plots(history: list[dict], best: dict, path, title: str):
    """Loss, and validation Dice per label, over the epochs: [loss | Dice], with the best one, `best`, marked."""
    figure = Figure(figsize=(12, 4.5))
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) < 30 else None
    for key, color, name in (("train_loss", "#555555", "training"), ("validation_loss", "#0072B2", "validation")):
        left.plot(epochs, [row[key] for row in history], color=color, marker=marker, ms=3, label=name)
    left.set(xlabel="epoch", ylabel="Dice + cross-entropy loss", title="Loss")
    right.plot(epochs, [row["dice_mean"] for row in history], color="black", lw=2, label="mean of the labels")
    for value, color in LABEL_COLORS.items():
        name = LABELS[value]
        right.plot(epochs, [row[f"dice_{name}"] for row in history], color=color, marker=marker, ms=3, label=name)
    right.axvline(best["epoch"], color="#999999", ls=":")
    right.set(xlabel="epoch", ylabel="validation Dice", ylim=(0, 1))
    right.set_title(f"Dice, best mean {best['dice_mean']:.3f} in epoch {best['epoch']}")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def prediction_overlay(image: np.ndarray, label: np.ndarray | None, maps: dict[str, np.ndarray], path, title: str):
    """The four modalities (columns) without overlay, with the truth and with each prediction (rows), on the axial
    slice with most tumour.

    Args:
        image: [4, D, H, W] with RAS axes.
        label: training labels [D, H, W], or None.
        maps: row name -> predicted training labels [D, H, W].
    """
    rows = {"no overlay": None} | ({"truth": label} if label is not None else {}) | maps
    shown = label if label is not None else next(iter(maps.values()))
    index = largest_tumour_slice(shown)
    height = 3 * len(rows) + 1  # inches
    figure = Figure(figsize=(12, height), facecolor="black")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for column, modality in enumerate(MODALITIES):
        low, high = intensity_window(image[column])
        for axes, (name, overlay) in zip(grid[:, column], rows.items(), strict=True):
            axes.imshow(slice_view(image[column], "axial", index), cmap="gray", vmin=low, vmax=high)
            if overlay is not None:
                axes.imshow(label_overlay(slice_view(overlay, "axial", index), 0.55), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
            if axes in grid[0]:
                axes.set_title(modality.upper(), color="white", fontsize=13)
            if column == 0:
                axes.set_ylabel(fill(name, 22), color="white", fontsize=13)  # as long as the picture is high
    legend = [Patch(color=LABEL_COLORS[value], label=f"{name}, {LABEL_NAMES[name]}") for value, name in LABELS.items()]
    figure.legend(handles=legend, loc="lower center", ncols=3, facecolor="black", labelcolor="white", frameon=False)
    title = "\n".join(fill(line, 130) for line in title.splitlines())  # as wide as the figure
    title += f"\naxial slice {index} of {image.shape[3]}; {CONVENTION}"
    figure.suptitle(title, color="white", fontsize=11)
    lines = title.count("\n") + 1
    save_figure(figure, path, rect=(0, 0.45 / height, 1, 1 - (0.1 + 0.2 * lines) / height))


def save_figure(figure, path, rect=(0, 0, 1, 1)):
    """Write a PNG, whole or not at all; `rect` (left, bottom, right, top, from 0 to 1) is what the axes may fill."""
    figure.tight_layout(rect=rect)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_atomically(path, picture.getvalue())
