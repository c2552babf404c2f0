"""A case as one small picture, and sheets of them: drawn with Pillow, because an evaluation has hundreds of cases and a
matplotlib figure takes ten times as long. Knows arrays, not files; `models/plots.py` has the drawing rules."""

import io
from collections.abc import Iterator

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from models.brats import LABELS, MODALITIES
from models.labels import occupied_box
from models.plots import LABEL_COLORS, intensity_window, label_overlay, largest_tumour_slice, load_font, slice_view

TILE = (168, 196)  # pixels, width and height of a slice
GAP = 2
PANEL_HEIGHT = TILE[1] + 16
JPEG_QUALITY = 75
MAX_SPREAD = 0.5  # no standard deviation of probabilities is larger
SHEET_COLUMNS = 4
SHEET_ROWS = 15
SHEET_SCALE = 0.52  # of the panels on a sheet: there one compares cases, the report shows each of them

LABEL_RGBA = (label_overlay(np.arange(len(LABELS) + 1), 0.55) * 255).astype(np.uint8)  # [4, 4]
SPREAD_RGBA = (colormaps["plasma"](np.arange(256)) * 255).astype(np.uint8)  # [256, 4]
SPREAD_RGBA[:, 3] = np.minimum(np.arange(256) * 5, 220)  # where all agree the image shows through


# ---- one case ------------------------------------------------------------------------------------------------------


def case_panel(
    image: np.ndarray,
    prediction: np.ndarray,
    truth: np.ndarray | None = None,
    spread: np.ndarray | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> bytes:
    """A case as a JPEG: FLAIR, T1CE with the truth, T1CE with the prediction, and FLAIR with the spread, side by side,
    on the axial slice with most tumour (of the truth; if that has none, of the prediction). What is not given is left
    out.

    Args:
        image: [4, D, H, W] with RAS axes.
        prediction: training labels [D, H, W].
        truth: training labels [D, H, W].
        spread: standard deviation of the probability of tumour [D, H, W].
        spacing_mm: voxel size along D, H, W.
    """
    index = largest_tumour_slice(truth if truth is not None and truth.any() else prediction)
    flair, t1ce = (slice_view(image[MODALITIES.index(name)], "axial", index) for name in ("flair", "t1ce"))
    labels = {"T1CE, truth": truth, "T1CE, prediction": prediction}
    labels = {name: slice_view(label, "axial", index) for name, label in labels.items() if label is not None}
    # The air around the head is cut off, but no label.
    rows, columns = occupied_box(np.logical_or.reduce([flair != 0, *(label != 0 for label in labels.values())]))
    head = (slice(*rows), slice(*columns)) if rows[1] else (slice(None), slice(None))
    flair, t1ce = flair[head], t1ce[head]

    aspect = spacing_mm[1] / spacing_mm[0]
    tiles = {f"FLAIR, slice {index} of {image.shape[3]}": _tile(flair, aspect)}
    for name, label in labels.items():
        tiles[name] = _tile(t1ce, aspect, label[head], LABEL_RGBA)
    if spread is not None:
        levels = np.clip(slice_view(spread, "axial", index)[head] * (255 / MAX_SPREAD), 0, 255)
        tiles["FLAIR, spread"] = _tile(flair, aspect, levels, SPREAD_RGBA)
        _add_color_bar(tiles["FLAIR, spread"])
    return _jpeg(_side_by_side(tiles))


def _tile(picture: np.ndarray, aspect: float, values: np.ndarray | None = None, colors=None) -> Image.Image:
    """A slice [rows, columns] in the middle of a black tile, in the grey levels that suit it; over it the colours RGBA
    [n, 4] of `values` [rows, columns]. `aspect` is the height of a voxel by its width."""
    low, high = intensity_window(picture[None])
    grey = Image.fromarray(((np.clip(picture, low, high) - low) * (255 / (high - low))).astype(np.uint8))
    scale = min(TILE[0] / grey.width, TILE[1] / (grey.height * aspect))
    size = max(1, round(grey.width * scale)), max(1, round(grey.height * aspect * scale))
    drawn = grey.resize(size, Image.BICUBIC).convert("RGB")
    if values is not None:
        values = Image.fromarray(np.ascontiguousarray(values, np.uint8)).resize(size, Image.NEAREST)
        over = Image.fromarray(colors[np.asarray(values)])
        drawn.paste(over, (0, 0), over)
    tile = Image.new("RGB", TILE)
    tile.paste(drawn, ((TILE[0] - size[0]) // 2, (TILE[1] - size[1]) // 2))
    return tile


def _add_color_bar(tile: Image.Image):
    """The scale of the spread, at the right edge."""
    height = TILE[1] // 3
    left, top = TILE[0] - 9, TILE[1] - height - 7
    levels = np.linspace(255, 0, height).astype(np.uint8)[:, None].repeat(6, 1)
    tile.paste(Image.fromarray(SPREAD_RGBA[levels][..., :3]), (left, top))
    draw = ImageDraw.Draw(tile)
    for y, text in ((top, f"{MAX_SPREAD:g}"), (top + height, "0")):
        draw.text((left - 3, y), text, font=load_font(10), fill="white", anchor="rm")


def _side_by_side(tiles: dict[str, Image.Image]) -> Image.Image:
    """Tiles below their names, with a mark on the patient's right."""
    panel = Image.new("RGB", (len(tiles) * (TILE[0] + GAP) - GAP, PANEL_HEIGHT))
    draw = ImageDraw.Draw(panel)
    for place, (name, tile) in enumerate(tiles.items()):
        left = place * (TILE[0] + GAP)
        panel.paste(tile, (left, PANEL_HEIGHT - TILE[1]))
        draw.text((left + TILE[0] // 2, 1), name, font=load_font(11), fill="white", anchor="ma")
        draw.text((left + 3, PANEL_HEIGHT - TILE[1] // 2), "R", font=load_font(11), fill="#BBBBBB", anchor="lm")
    return panel


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


# ---- all cases -----------------------------------------------------------------------------------------------------


def contact_sheets(panels: dict[str, bytes], dice: dict[str, float], title: str) -> Iterator[bytes]:
    """Yield JPEGs of up to SHEET_COLUMNS x SHEET_ROWS cases, the lowest Dice first and those without one last.

    Args:
        panels: case -> JPEG of `case_panel`.
        dice: case -> mean Dice of the regions.
        title: what is shown, such as the run; which cases they are is added.
    """
    order = sorted(panels, key=lambda case: (dice.get(case, 2), case))
    ranked = ", the lowest mean Dice of WT, TC and ET first" if dice else ""
    per_sheet = SHEET_COLUMNS * SHEET_ROWS
    for start in range(0, len(order), per_sheet):
        cases = order[start : start + per_sheet]
        captions = {case: f"{dice[case]:.3f}  {case}" if case in dice else case for case in cases}
        heading = f"{title}: cases {start + 1} to {start + len(cases)} of {len(order)}{ranked}"
        yield _jpeg(_sheet({captions[case]: panels[case] for case in cases}, heading))


def _sheet(panels: dict[str, bytes], title: str) -> Image.Image:
    """The panels in rows, each below its caption; above all the title and what the colours mean."""
    columns = min(SHEET_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    font, header = load_font(12), 44
    pictures = {caption: Image.open(io.BytesIO(jpeg)) for caption, jpeg in panels.items()}  # not decoded yet
    size = [round(SHEET_SCALE * max(sides)) for sides in zip(*(p.size for p in pictures.values()), strict=True)]
    cell = size[0] + 10, size[1] + 22
    width = max(columns * cell[0], round(font.getlength(title)) + 12)
    sheet = Image.new("RGB", (width, header + rows * cell[1]))
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 4), title, font=font, fill="white")
    left = 6
    for value, name in LABELS.items():
        color = tuple(round(255 * level) for level in LABEL_COLORS[value])
        draw.rectangle((left, 25, left + 10, 35), fill=color)
        draw.text((left + 16, 30), name, font=font, fill="white", anchor="lm")
        left += 70
    for place, (caption, picture) in enumerate(pictures.items()):
        left, top = place % columns * cell[0], header + place // columns * cell[1]
        draw.text((left + 6, top), _shortened(caption, font, cell[0] - 12), font=font, fill="white")
        picture.draft("RGB", size)  # a JPEG decodes faster to half its size
        picture.thumbnail(size)
        sheet.paste(picture, (left + 5, top + 16))
    return sheet


def _shortened(text: str, font, width: int) -> str:
    """As much of a text as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
