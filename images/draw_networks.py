#!/usr/bin/env python3
"""Draw the networks' diagrams from the built networks: sizes and channels are measured, not typed.

  python images/draw_networks.py        (writes images/UNet_diagram.png)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.networks.blocks import Convolution, ResidualUnit

from models import build_model

SIZE = 128
DOWN, UP, SKIP = "#56B4E9", "#E69F00", "#777777"


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
        style = {"boxstyle": "round,pad=0.5", "fc": color}
        boxes[place] = axes.text(*place, text, ha="center", va="center", fontsize=10.5, bbox=style)

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
        properties = {"arrowstyle": "->", "ls": line, "lw": 1.6, "color": "black" if line == "solid" else SKIP}
        ends = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
        axes.annotate("", end, start, arrowprops=properties | ends)
    title = f"3-D residual U-Net: {parameters / 1e6:.1f} million parameters; channels × voxels for an input of {SIZE}³"
    figure.text(0.5, 0.94, title, ha="center", fontsize=13)
    figure.text(0.02, 0.05, "solid: down by a stride of 2, or up by a transposed convolution\n"
                "dashed: skip connection, concatenated before the upsampling", fontsize=10)  # fmt: skip
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


if __name__ == "__main__":
    draw_unet(Path(__file__).parent / "UNet_diagram.png")
