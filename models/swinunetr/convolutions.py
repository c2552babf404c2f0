"""The convolutional half of Swin UNETR: residual blocks on the skip connections, in the decoder and, in V2, before each
stage of the encoder. Feature maps are [B, C, D, H, W] with channels last in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01  # of the leaky ReLU below zero
EPSILON = 1e-5  # added to every variance


class Conv(nn.Module):
    """A convolution without bias that keeps the size; a module of its own only so that it is named as in MONAI."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.conv) if self.conv.kernel_size == (1, 1, 1) else self.conv(x)


def pointwise(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A 1x1x1 convolution [B, I, D, H, W] -> [B, O, D, H, W]: with channels last, a linear layer on every voxel."""
    return F.linear(x.permute(0, 2, 3, 4, 1), conv.weight.flatten(1), conv.bias).permute(0, 4, 1, 2, 3)


def join(x: Tensor, y: Tensor) -> Tensor:
    """[B, I, D, H, W] and [B, J, D, H, W] -> [B, I + J, D, H, W]; two strided copies, faster than torch.cat here."""
    if torch.compiler.is_exporting():  # onnxruntime and OpenVINO would scatter numbers one by one
        return torch.cat((x, y), 1)
    joined = torch.empty((*x.permute(0, 2, 3, 4, 1).shape[:4], x.shape[1] + y.shape[1]), dtype=x.dtype, device=x.device)
    joined[..., : x.shape[1]] = x.permute(0, 2, 3, 4, 1)
    joined[..., x.shape[1] :] = y.permute(0, 2, 3, 4, 1)
    return joined.permute(0, 4, 1, 2, 3)


class UpConv(nn.Module):
    """A transposed convolution that doubles every side: [B, I, D, H, W] -> [B, O, 2D, 2H, 2W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with instance norm, and a shortcut: [B, I, D, H, W] -> [B, O, D, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, 3)
        self.conv2 = Conv(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.conv3 = Conv(in_channels, out_channels, 1)
        self._kernel = None  # fused norm, addition and ReLU; see set_kernels

    def set_kernels(self, kind: str):
        """As in WindowAttention."""
        self._kernel = None
        if kind == "triton":
            from models.swinunetr.triton_norm import instance_norm_leaky_relu  # triton is an optional package

            self._kernel = instance_norm_leaky_relu

    def forward(self, x: Tensor) -> Tensor:
        if self._kernel is not None:
            y = self.conv2(self._kernel(self.conv1(x)))
            has_conv3 = hasattr(self, "conv3")
            return self._kernel(y, self.conv3(x) if has_conv3 else x, has_conv3)
        y = F.leaky_relu_(instance_norm(self.conv1(x)), SLOPE)
        y = instance_norm(self.conv2(y))
        shortcut = instance_norm(self.conv3(x)) if hasattr(self, "conv3") else x
        return F.leaky_relu_(y.add_(shortcut), SLOPE)


def instance_norm(x: Tensor) -> Tensor:
    """[B, C, D, H, W] with mean 0 and variance 1 over the voxels of every channel of every sample (no learned scale).

    The mean is subtracted before anything is squared: E[x^2] - E[x]^2, which torch's own kernels use when channels are
    last, loses too many digits in channels whose mean is large beside their spread.
    """
    if x.dtype in (torch.bfloat16, torch.float16):  # kernels that count in float32 are exact enough for these
        return _batch_norms(x)
    if not x.is_cpu or torch.compiler.is_compiling():  # a compiler fuses these steps
        variance, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)  # each [B, C, 1, 1, 1]
        scale = (variance + EPSILON).rsqrt()
        return torch.addcmul(-mean * scale, x, scale)
    if torch.is_grad_enabled():
        # What is subtracted before a norm changes nothing in exact arithmetic, so the mean needs no gradient.
        return _batch_norms(x - _means(x.detach()))
    # Without gradients x, which is the fresh result of a convolution, can be overwritten.
    flat = x.sub_(_means(x)).flatten(2)  # [B, C, V]
    squares = torch.bmm(flat, flat.transpose(1, 2)).diagonal(dim1=1, dim2=2)  # [B, C]; the fastest sum on a CPU
    return x.mul_((squares / flat.shape[2] + EPSILON).rsqrt()[..., None, None, None])


def _batch_norms(x: Tensor) -> Tensor:
    """Each sample of [B, C, D, H, W] normalised as a batch of one, by kernels of torch that know channels last."""
    normed = [torch.batch_norm(sample, None, None, None, None, True, 0.0, EPSILON, True) for sample in x.split(1)]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def _means(x: Tensor) -> Tensor:
    """The mean over the voxels of [B, C, D, H, W], [B, C, 1, 1, 1]; eight neighbours at a time, because rows of C
    values are too short for torch to sum them fast."""
    group = 8 if x.shape[2:].numel() % 8 == 0 else 1
    rows = x.permute(0, 2, 3, 4, 1).reshape(len(x), -1, group * x.shape[1])  # [B, V / 8, 8 C]
    return rows.mean(1).view(len(x), group, -1).mean(1)[..., None, None, None]


class Encoder(nn.Module):
    """A residual block on a skip connection: [B, I, D, H, W] -> [B, O, D, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layer = ResidualBlock(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Decoder(nn.Module):
    """x [B, I, D, H, W] is enlarged and joined with skip [B, O, 2D, 2H, 2W]: -> [B, O, 2D, 2H, 2W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.transp_conv = UpConv(in_channels, out_channels)
        self.conv_block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv_block(join(self.transp_conv(x), skip))


class OutputHead(nn.Module):
    """A logit for every class and voxel: [B, C, D, H, W] -> [B, out_channels, D, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Module()  # only so that the parameters are named as in MONAI
        self.conv.conv = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.conv.conv)
