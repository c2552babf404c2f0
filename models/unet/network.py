"""A U-Net with a level at full resolution, which MONAI's, the baseline, lacks: that one halves the volume before its
first skip connection and ends in a transposed convolution, so thin rims are lost and labels have a checkerboard.

Every level has half the side of the one before. Drawn with three of the five, of c0, c1 and c2 channels:

    image --- encoder[0] ------------------------ decoder[-1] --- head     D      c0
                  encoder[1] ------------ decoder[-2]                      D/2    c1
                      encoder[2] -------- up                               D/4    c2

The first level has eight times the voxels of the second: it can do with few channels and one convolution in a block.
The variant "space-to-depth" has none at all in its encoder: 2x2x2 voxels become 32 channels of the second level, and
what joins the decoder at full resolution is the image itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import InputError

VARIANTS = ("full-resolution", "space-to-depth")
UPSAMPLING = ("transposed", "trilinear")
MAX_LEVELS = 5  # so that 16 divides every side, whatever the settings
SLOPE = 0.01  # of the leaky ReLU below zero


class UNet(nn.Module):
    """Image [B, in_channels, D, H, W] -> logits [B, out_channels, D, H, W]; every side a multiple of 2^(levels - 1).

    Args:
        variant: one of VARIANTS.
        channels: of each level, the full resolution first.
        convolutions: 3x3x3, in each level's block of the encoder, and again in that of the decoder.
        residual: whether the blocks have a shortcut.
        upsampling: one of UPSAMPLING.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        variant: str,
        channels,
        convolutions,
        residual: bool,
        upsampling: str,
    ):
        super().__init__()
        _refuse_bad_settings(variant, channels, convolutions, upsampling)
        if variant == "space-to-depth":
            folded = Block(8 * in_channels, channels[1], convolutions[1], residual)
            first, joining = [nn.Identity(), nn.Sequential(SpaceToDepth(), folded)], (in_channels, *channels[1:])
        else:
            first, joining = [Block(in_channels, channels[0], convolutions[0], residual)], channels
        deeper = [
            Block(channels[level - 1], channels[level], convolutions[level], residual, stride=2)
            for level in range(len(first), len(channels))
        ]
        self.encoder = nn.ModuleList(first + deeper)
        upwards = range(len(channels) - 2, -1, -1)
        self.up = nn.ModuleList(_upsampling(upsampling, channels[level + 1], channels[level]) for level in upwards)
        self.decoder = nn.ModuleList(
            Block(channels[level] + joining[level], channels[level], convolutions[level], residual) for level in upwards
        )
        self.head = nn.Conv3d(channels[0], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        levels, x = [], image
        for block in self.encoder:
            x = block(x)  # [B, c0, D, H, W], [B, c1, D/2, H/2, W/2], ...
            levels.append(x)
        levels.pop()  # the coarsest level is where the way back up begins
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat((up(x), levels.pop()), 1))
        return self.head(x)


def _refuse_bad_settings(variant, channels, convolutions, upsampling):
    if not 2 <= len(channels) <= MAX_LEVELS:
        raise InputError(f"channels {tuple(channels)}: a U-Net has 2 to {MAX_LEVELS} levels.")
    if len(convolutions) != len(channels):
        raise InputError(f"convolutions {tuple(convolutions)}: needs one number for each of the {len(channels)} levels "
                         f"of channels {tuple(channels)}.")  # fmt: skip
    if min(*channels, *convolutions) < 1:
        raise InputError(f"channels {tuple(channels)}, convolutions {tuple(convolutions)}: must all be above 0.")
    for setting, value, known in (("variant", variant, VARIANTS), ("upsampling", upsampling, UPSAMPLING)):
        if value not in known:
            raise InputError(f"{setting} {value!r}: must be one of {', '.join(known)}.")


class Block(nn.Module):
    """3x3x3 convolutions, each with instance norm and leaky ReLU: [B, I, D, H, W] -> [B, O, D, H, W], the sides divided
    by the stride of the first. With `residual` the input is added before the last leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, count: int, residual: bool, stride: int = 1):
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for index in range(count):
            shape = (in_channels, out_channels, 3, stride) if index == 0 else (out_channels, out_channels, 3, 1)
            self.convolutions.append(nn.Conv3d(*shape, padding=1, bias=False))  # the norm would subtract a bias
            self.norms.append(nn.InstanceNorm3d(out_channels, affine=True))
        self.shortcut = None
        if residual:
            is_alike = stride == 1 and in_channels == out_channels
            self.shortcut = nn.Identity() if is_alike else _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(convolution(y))
            if self.shortcut is not None and norm is self.norms[-1]:
                y = y + self.shortcut(x)
            y = F.leaky_relu_(y, SLOPE)
        return y


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A shortcut where the shape changes: the means of stride^3 voxels, then a 1x1x1 convolution."""
    convolution = nn.Conv3d(in_channels, out_channels, 1, bias=False)
    norm = nn.InstanceNorm3d(out_channels, affine=True)
    return nn.Sequential(nn.AvgPool3d(stride) if stride > 1 else nn.Identity(), convolution, norm)


class SpaceToDepth(nn.Module):
    """[B, C, D, H, W] -> [B, 8C, D/2, H/2, W/2]: 2x2x2 neighbours become channels, and nothing is lost."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, d::2, h::2, w::2] for d in (0, 1) for h in (0, 1) for w in (0, 1)], 1)


def _upsampling(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """[B, I, D, H, W] -> [B, O, 2D, 2H, 2W]."""
    if kind == "transposed":
        return nn.ConvTranspose3d(in_channels, out_channels, 2, 2, bias=False)
    # The convolution first, where there are an eighth of the voxels; in exact arithmetic the order does not matter.
    pointwise = nn.Conv3d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(pointwise, nn.Upsample(scale_factor=2, mode="trilinear"))
