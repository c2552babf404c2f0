"""What the viewer redraws with every slice, straight to the pixels of the screen: pictures of slices and labels, and
lines of text. matplotlib's own images and texts look the same and take five to ten times as long."""

from math import ceil, floor

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.font_manager import findfont
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image, ImageDraw

from models.plots import PLANES, label_overlay, load_font, slice_view

OUTLINE_SCALE = 2  # an outline is half a voxel wide
GREYS = np.repeat(np.arange(256, dtype=np.uint8), 4).reshape(256, 4)  # grey level -> RGBA
GREYS[:, 3] = 255


# ---- parts of a slice ----------------------------------------------------------------------------------------------


def box_in_picture(mask: np.ndarray, plane: str) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what the slices of a mask [D, H, W] along a plane cover together; those of the
    whole picture if they cover nothing."""
    shadow = slice_view(mask.any(axis=PLANES[plane], keepdims=True), plane, 0)
    if not shadow.any():
        return 0, shadow.shape[0], 0, shadow.shape[1]
    rows, columns = np.flatnonzero(shadow.any(1)), np.flatnonzero(shadow.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def crop(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    top, bottom, left, right = box
    return picture[top:bottom, left:right]


def add_outline(picture: np.ndarray, label: np.ndarray) -> np.ndarray:
    """RGBA [rows, columns, 4] with the outline of each label of [rows, columns] drawn over it, at OUTLINE_SCALE."""
    picture, label = (a.repeat(OUTLINE_SCALE, 0).repeat(OUTLINE_SCALE, 1) for a in (picture, label))
    around = np.pad(label, 1)
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    edge = (label > 0) & np.logical_or.reduce([label != neighbour for neighbour in neighbours])
    picture[edge] = label_overlay(label[edge], 1.0)
    return picture


# ---- artists -------------------------------------------------------------------------------------------------------


class SlicePicture(AxesImage):
    """An image in axes whose y runs up, for a canvas of pixels. Intensities [rows, columns] are interpolated; colours
    RGBA uint8 [rows, columns, 4] are not, because a label has edges."""

    def make_image(self, renderer, magnification=1.0, unsampled=False):
        """What `AxesImage.draw` draws: RGBA uint8, its first row at the bottom; its left and bottom in pixels."""
        left, right, bottom, top = self.get_extent()
        (x0, y0), (x1, y1) = self.axes.transData.transform([(left, bottom), (right, top)])
        frame = self.axes.bbox
        left, right = max(ceil(x0), round(frame.x0)), min(floor(x1), round(frame.x1))
        bottom, top = max(ceil(y0), round(frame.y0)), min(floor(y1), round(frame.y1))
        if left >= right or bottom >= top:  # zoomed to where there is nothing
            return None, 0, 0, None
        data = np.asarray(self.get_array())[::-1]
        across, up = data.shape[1] / (x1 - x0), data.shape[0] / (y1 - y0)  # voxels per pixel
        box = ((left - x0) * across, (bottom - y0) * up, (right - x0) * across, (top - y0) * up)
        if data.ndim == 3:
            picture = Image.fromarray(data)
            return np.array(picture.resize((right - left, top - bottom), Image.NEAREST, box)), left, bottom, None
        low, high = self.get_clim()
        grey = ((np.clip(data, low, high) - low) * np.float32(255 / (high - low))).astype(np.uint8)
        grey = np.asarray(Image.fromarray(grey).resize((right - left, top - bottom), Image.HAMMING, box))
        # As one number of 32 bits per pixel: looking up four bytes each takes several times as long.
        return GREYS.view(np.uint32)[:, 0].take(grey).view(np.uint8).reshape(*grey.shape, 4), left, bottom, None


class Line(Text):
    """A line of text that is centred on its position, and stands on it or (`va="top"`) hangs from it."""

    def draw(self, renderer):
        if not self.get_text():
            return
        size = renderer.points_to_pixels(self.get_fontsize())
        font = load_font(size, findfont(self.get_fontproperties()))
        x, y = self.get_transform().transform(self.get_unitless_position())
        image = Image.new("L", (ceil(font.getlength(self.get_text())), sum(font.getmetrics())))
        ImageDraw.Draw(image).text((0, 0), self.get_text(), fill=255, font=font)
        letters = np.empty((image.height, image.width, 4), np.uint8)
        letters[:] = np.array(to_rgba(self.get_color())) * 255
        letters[..., 3] = image
        bottom = y - image.height if self.get_va() == "top" else y
        renderer.draw_image(renderer.new_gc(), round(x - image.width / 2), round(bottom), letters[::-1])
