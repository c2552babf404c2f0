#!/usr/bin/env python3
"""Draw the networks' diagrams from the built networks: sizes and channels are measured, not typed.

  python images/draw_networks.py        (writes images/UNet_diagram.png and images/SwinUNETR_diagram.png)
"""

import sys
from itertools import pairwise, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from monai.networks.blocks import Convolution, ResidualUnit

from models import build_model
from models.swinunetr.convolutions import Decoder, Encoder, OutputHead, UpConv
from models.swinunetr.network import PatchEmbedding, PatchMerging, SwinBlock
from models.swinunetr.window_attention import mask_groups, mask_of_group, partition, shift_masks

SIZE = 128  # voxels along a side of the input
DOWN, UP, SKIP = "#56B4E9", "#E69F00", "#777777"
WIDTH, HEIGHT = 13, 14.0  # inches, of Swin UNETR's diagram
JOIN = "#DDDDDD"  # the blocks on Swin UNETR's skip connections
# Colours [4, 3] of the tokens that the roll wraps around along no axis, along one or the other, and along both
REGIONS = torch.tensor([to_rgb(color) for color in (DOWN, UP, "#009E73", "#CC79A7")])


def draw_box(axes, place, text: str, color: str, fontsize: float):
    style = {"boxstyle": "round,pad=0.5", "fc": color}
    return axes.text(*place, text, ha="center", va="center", fontsize=fontsize, bbox=style)


def draw_arrow(axes, start, end, line: str):
    """From one box to another, a "solid" or "dashed" one; the figure has been drawn once, so that boxes have sizes."""
    properties = {"arrowstyle": "->", "ls": line, "lw": 1.6, "color": "black" if line == "solid" else SKIP}
    ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    axes.annotate("", end.get_position(), start.get_position(), arrowprops=properties | ends)


# ---- the U-Net -----------------------------------------------------------------------------------------------------


def unet_blocks() -> tuple[list[tuple[str, int, int]], int]:
    """(kind, channels, side) of every block in the order in which they run, from a pass without data."""
    with torch.device("meta"):
        model, image = build_model("unet"), torch.empty(1, 4, SIZE, SIZE, SIZE)
    blocks = []

    def record(module, inputs, output):
        kind = "up" if isinstance(module, Convolution) else "residual"
        blocks.append((kind, output.shape[1], output.shape[2]))

    for module in model.modules():
        if isinstance(module, ResidualUnit) or (isinstance(module, Convolution) and module.is_transposed):
            module.register_forward_hook(record)
    model(image)
    return blocks, sum(parameter.numel() for parameter in model.parameters())


def draw_unet(path: Path):
    blocks, parameters = unet_blocks()
    encoder = [block for block in blocks[: len(blocks) // 3 + 2] if block[0] == "residual"]
    decoder = blocks[len(encoder) :]  # an upsampling and a residual unit in turn
    figure = Figure(figsize=(13, 6.5))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.88))
    axes.set(xlim=(-2.5, 1.5 * len(decoder) / 2 + len(encoder) + 1.4), ylim=(-len(encoder) - 0.2, 1.0))
    axes.set_axis_off()

    boxes, arrows = {}, []  # arrows are drawn last, when the boxes' sizes are known

    def box(place, text, color):
        boxes[place] = draw_box(axes, place, text, color, 10.5)

    source = (-1.7, 0)
    box(source, f"T1, T1CE, T2, FLAIR\n4 × {SIZE}³", "white")
    for level, (_, channels, side) in enumerate(encoder):
        box((level, -level), f"residual unit\n{channels} × {side}³", DOWN)
        arrows.append((source, (level, -level), "solid"))
        source = (level, -level)
    last = len(encoder) - 1
    for step, ((_, up_channels, up_side), (_, channels, side)) in enumerate(
        zip(decoder[::2], decoder[1::2], strict=True), start=1
    ):
        place = (last + 1.5 * step + 0.4, step - last)
        box(place, f"upsample {up_channels} × {up_side}³\nresidual unit {channels} × {side}³", UP)
        arrows += [(source, place, "solid"), ((last - step, step - last), place, "dashed")]
        source = place
    box((source[0], 0.85), "softmax: background, NCR, ED, ET", "white")
    arrows.append((source, (source[0], 0.85), "solid"))
    FigureCanvasAgg(figure).draw()
    for start, end, line in arrows:
        draw_arrow(axes, boxes[start], boxes[end], line)
    title = f"3-D residual U-Net: {parameters / 1e6:.1f} million parameters; channels × voxels for an input of {SIZE}³"
    figure.text(0.5, 0.94, title, ha="center", fontsize=13)
    figure.text(0.02, 0.05, "solid: down by a stride of 2, or up by a transposed convolution\n"
                "dashed: skip connection, concatenated before the upsampling", fontsize=10)  # fmt: skip
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


# ---- Swin UNETR ----------------------------------------------------------------------------------------------------


def swinunetr_blocks():
    """The network, and (channels, side) of what every block gives, by the block's name, from a pass without data."""
    with torch.device("meta"):
        model, image = build_model("swinunetr", v2=True), torch.empty(1, 4, SIZE, SIZE, SIZE)
    sizes = {}

    def record(name, output):
        sizes[name] = (output.shape[1], output.shape[2])

    for name, module in model.named_modules():
        if isinstance(module, (PatchEmbedding, SwinBlock, PatchMerging)):  # tokens [B, D, H, W, C]
            module.register_forward_hook(lambda _, __, tokens, name=name: record(name, tokens.movedim(-1, 1)))
        if isinstance(module, (Encoder, UpConv, Decoder, OutputHead)):  # a feature map [B, C, D, H, W]
            module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
    with torch.no_grad():
        model(image)
    return model, sizes


def draw_swinunetr(path: Path):
    model, sizes = swinunetr_blocks()
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.set_axis_off()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    title = f"Swin UNETR V2: {parameters / 1e6:.1f} million parameters; channels × voxels (blue: × tokens)"
    axes.text(WIDTH / 2, 13.75, f"{title} for an input of {SIZE}³", ha="center", va="center", fontsize=14)
    draw_encoder_and_decoder(figure, axes, model, sizes)
    draw_windows(figure, axes, model.swinViT.layers1[0].blocks[1].attn, sizes["swinViT.patch_embed"][1])
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


def draw_encoder_and_decoder(figure, axes, model, sizes):
    boxes, rows = {}, [12.05 - 1.37 * level for level in range(6)]  # a row for each halving of the sides

    def box(name, place, text, color):
        boxes[name] = draw_box(axes, place, text, color, 12)

    def size(name):
        return "{} × {}³".format(*sizes[name])

    box("image", (1.4, rows[0]), f"T1, T1CE, T2, FLAIR\n4 × {SIZE}³", "white")
    text = f"patch_embed: a token\nfor every 2³ voxels\n{size('swinViT.patch_embed')}"
    box("patch_embed", (1.4, rows[1]), text, DOWN)
    for level, layer in enumerate(("layers1", "layers2", "layers3", "layers4"), start=2):
        window = model.get_submodule(f"swinViT.{layer}.0.blocks.0.attn").window_size
        windows = -(-sizes[f"swinViT.{layer}.0.blocks.0"][1] // window)  # along an axis, after padding
        text = f"{layer}: {windows}³ windows of {window}³"
        text += f"\nresidual block {size(f'swinViT.{layer}c.0')}"
        for what, part in ("window attention", "blocks.0"), ("shifted windows", "blocks.1"), ("merging", "downsample"):
            text += f"\n{what} {size(f'swinViT.{layer}.0.{part}')}"
        box(layer, (0.75 + 0.45 * level, rows[level]), text, DOWN)
    for name, level in ("encoder1", 0), ("encoder2", 1), ("encoder3", 2), ("encoder4", 3), ("encoder10", 5):
        box(name, (5.9, rows[level]), f"{name}\nresidual block\n{size(name)}", JOIN)
    for level, name in enumerate(("decoder1", "decoder2", "decoder3", "decoder4", "decoder5")):
        text = f"{name}\nupsample {size(name + '.transp_conv')}\nresidual block {size(name)}"
        box(name, (11.2 - 0.7 * level, rows[level]), text, UP)
    box("out", (11.2, rows[0] + 1.05), f"out: {size('out')} logits\nbackground, NCR, ED, ET", "white")

    FigureCanvasAgg(figure).draw()
    down = ("image", "patch_embed", "layers1", "layers2", "layers3", "layers4")
    up = ("encoder10", "decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "out")
    for start, end in pairwise(down + up):
        draw_arrow(axes, boxes[start], boxes[end], "solid")
    for level, start in enumerate(down[:4], start=1):
        draw_arrow(axes, boxes[start], boxes[f"encoder{level}"], "dashed")
        draw_arrow(axes, boxes[f"encoder{level}"], boxes[f"decoder{level}"], "dashed")
    draw_arrow(axes, boxes["layers3"], boxes["decoder5"], "dashed")
    text = (
        "solid: down by merging 2³ tokens, up by a transposed convolution\n"
        "dashed: skip connection, concatenated after the upsampling\n"
        "window attention, shifted windows: a Swin block each, with an MLP"
    )
    axes.text(7.05, rows[5], text, va="center", fontsize=12)


def draw_windows(figure, axes, attention, side_3d: int):
    """How tokens are padded, cut into windows, rolled and masked: in 2-D, with the network's own functions."""
    side, length, step, count = 11, 4, 2, 3  # tokens, tokens of a window, of the shift; windows after padding
    place = torch.arange(count * length)
    region = 2 * (place[:, None] < step) + (place < step)  # [12, 12], an index of REGIONS
    tokens = REGIONS[region]  # [12, 12, 3]
    padding = (place[:, None] >= side) | (place >= side)
    tokens[padding] = 0.3 * tokens[padding] + 0.7
    plain = draw_squares(figure, 0.5, 2.6, tokens, length)
    shifted = draw_squares(figure, 4.4, 2.6, tokens.roll((-step, -step), (0, 1)), length)
    draw_masks(figure, shifted, region.roll((-step, -step), (0, 1)), length, step, count)

    plain.set_title("plain block: cut into windows", fontsize=12)
    shifted.set_title("shifted block: rolled by half a window", fontsize=12)
    axes.annotate("", (4.3, 2.3), (3.2, 2.3), arrowprops={"arrowstyle": "->", "lw": 1.6})
    axes.text(3.75, 2.4, "roll", ha="center", fontsize=12)
    text = "Window attention, drawn in 2-D: a token attends to the tokens of its window"
    axes.text(WIDTH / 2, 4.25, text, ha="center", fontsize=14)
    text = "Masks: a row for each token of a window,\ncoloured where it attends."
    axes.text(7.75, 3.4, text, va="center", fontsize=12)
    length_3d = attention.window_size
    padded_3d = -(-side_3d // length_3d) * length_3d
    captions = {
        0.5: f"{side}² tokens are padded with zeros (pale)\nto {len(place)}² and cut into windows of {length}².\n"
        f"In layers1: {side_3d}³ to {padded_3d}³, windows of {length_3d}³.",
        4.4: "Windows straddle those of the plain\nblock; the last ones mix opposite\n"
        "borders. Then all is rolled back.",
        7.75: "A window is last or not along each of two axes:\n2² = 4 masks. In 3-D there are 2³ = 8 at most,\n"
        "however large the volume.",
    }
    for left, text in captions.items():
        axes.text(left, 0.8, text, va="top", fontsize=12)


def draw_masks(figure, shifted, region, length: int, step: int, count: int):
    """The mask of each kind of window, and its letter on the windows in `shifted`, which shows region [12, 12]."""
    window, shift, counts = (1, length, length), (0, step, step), (1, count, count)  # one token deep, so 2-D
    regions = partition(region[None, None, ..., None], window, counts)[0, 0, ..., 0]  # [3, 3, N]
    masks = shift_masks(window, shift, "cpu")
    for index, (letter, group) in enumerate(zip("ABCD", mask_groups(counts, shift), strict=True)):
        windows = list(product(range(count)[group[1]], range(count)[group[2]]))
        for row, column in windows:
            style = {"boxstyle": "round,pad=0.15", "fc": "white"}
            at = (length * (column + 0.5) - 0.5, length * (row + 0.5) - 0.5)
            shifted.text(*at, letter, ha="center", va="center", fontsize=13, weight="bold", bbox=style)
        colors = REGIONS[regions[windows[0]]]  # [N, 3]
        neighbours = masks[mask_of_group(group, counts, shift)][:, : len(colors)] == 0  # [N, N]
        pairs = colors[:, None].where(neighbours[..., None], torch.ones(3))  # [N, N, 3]
        panel = draw_squares(figure, 7.75 + 1.25 * index, 1.1, pairs, len(pairs))
        panel.set_title(f"{letter}: {len(windows)} window{'s' * (len(windows) > 1)}", fontsize=12)


def draw_squares(figure, left: float, width: float, colors, line_every: int):
    """Axes with a square for each of colors [n, n, 3], thick lines between windows; left and width in inches."""
    shape = (left / WIDTH, (2.3 - width / 2) / HEIGHT, width / WIDTH, width / HEIGHT)
    axes = figure.add_axes(shape, xticks=[], yticks=[])
    axes.imshow(colors)
    for place in range(len(colors) + 1):
        thick = place % line_every == 0
        style = {"color": "black", "lw": 2.5, "zorder": 2.5} if thick else {"color": "white", "lw": 0.8}
        axes.axhline(place - 0.5, **style)
        axes.axvline(place - 0.5, **style)
    return axes


if __name__ == "__main__":
    draw_unet(Path(__file__).parent / "UNet_diagram.png")
    draw_swinunetr(Path(__file__).parent / "SwinUNETR_diagram.png")
