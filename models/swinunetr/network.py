"""The Swin UNETR network (Hatamizadeh et al. 2022, arXiv:2201.01266), written for speed and to be read.

An image [B, 4, D, H, W] becomes tokens of 2x2x2 voxels. Four stages of two Swin blocks each halve the token grid and
double the channels; a convolutional decoder climbs back up, joined at every level by what the encoder saw there:

    image ---------------------------- encoder1 ----------------- decoder1 -> out    D      C
      patch_embed -------------------- encoder2 --------------- decoder2             D/2    C
        layers1 ---------------------- encoder3 ------------- decoder3               D/4   2C
          layers2 -------------------- encoder4 ----------- decoder4                 D/8   4C
            layers3 ---------------------------------- decoder5                      D/16  8C
              layers4 -- encoder10 -------------------'                              D/32 16C

Parameters have the names and shapes of MONAI's SwinUNETR, whose weights load as they are. Memory is laid out channels
last throughout: tokens [B, D, H, W, C] and feature maps [B, C, D, H, W] are then views of each other, and nothing is
copied on the way between attention and convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import InputError
from models.swinunetr.window_attention import ATTENTION, KERNELS, WindowAttention

CHECKPOINTING = ("none", "blocks", "full")
SIDE = 32  # voxels: the patch embedding and four mergings halve every side five times
SLOPE = 0.01  # of the leaky ReLU below zero
EPSILON = 1e-5  # added to every variance

# The eight neighbours that a merged token is made of, as (D, H, W) parities in the order of MONAI's PatchMerging. Up
# to MONAI 1.4 two of them were taken twice and two never; published weights of that time need the same mistake.
MERGING = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
LEGACY_MERGING = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class SwinUNETR(nn.Module):
    """Image [B, in_channels, D, H, W] -> logits [B, out_channels, D, H, W]; every side a multiple of 32.

    The settings are explained in `models.swinunetr.DEFAULTS`; impossible ones are refused with an InputError.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        feature_size: int = 48,
        window_size: int = 7,
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        attention: str = "auto",
        checkpointing: str = "none",
        legacy_merging: bool = False,
    ):
        super().__init__()
        _refuse_bad_settings(feature_size, window_size, depths, num_heads, attention, checkpointing)
        self.checkpointing = checkpointing
        c = feature_size
        swin = {"window_size": window_size, "attention": attention, "legacy_merging": legacy_merging}
        self.swinViT = SwinTransformer(in_channels, c, depths, num_heads, checkpointing != "none", **swin)
        self.encoder1 = Encoder(in_channels, c)
        self.encoder2 = Encoder(c, c)
        self.encoder3 = Encoder(2 * c, 2 * c)
        self.encoder4 = Encoder(4 * c, 4 * c)
        self.encoder10 = Encoder(16 * c, 16 * c)
        self.decoder5 = Decoder(16 * c, 8 * c)
        self.decoder4 = Decoder(8 * c, 4 * c)
        self.decoder3 = Decoder(4 * c, 2 * c)
        self.decoder2 = Decoder(2 * c, c)
        self.decoder1 = Decoder(c, c)
        self.out = OutputHead(c, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        refuse_bad_sides(image.shape[2:])
        image = image.contiguous(memory_format=torch.channels_last_3d)
        levels = self.swinViT(image)  # [B, C, D/2, ...], [B, 2C, D/4, ...], ... [B, 16C, D/32, ...]
        x = self._run(self.encoder10, levels[4])
        x = self._run(self.decoder5, x, levels[3])
        x = self._run(self.decoder4, x, self._run(self.encoder4, levels[2]))
        x = self._run(self.decoder3, x, self._run(self.encoder3, levels[1]))
        x = self._run(self.decoder2, x, self._run(self.encoder2, levels[0]))
        x = self._run(self.decoder1, x, self._run(self.encoder1, image))
        return self.out(x)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A convolutional block, recomputed in the backward pass if the checkpointing is "full"."""
        return run(block, *inputs, recompute=self.checkpointing == "full" and self.training)

    def set_attention(self, kind: str):
        """Compute the attention in another of the ways in ATTENTION; the results agree up to rounding."""
        _refuse_unknown("attention", kind, ATTENTION)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.attention = kind

    def set_kernels(self, kind: str):
        """Compute attention and norms with torch's kernels, or with this package's ("triton") on CUDA devices."""
        _refuse_unknown("kernels", kind, KERNELS)
        for module in self.modules():
            if isinstance(module, WindowAttention | ResidualBlock):
                module.set_kernels(kind)


def run(block: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """block(*inputs); with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# ---- what is refused -----------------------------------------------------------------------------------------------


def refuse_bad_sides(sides):
    """InputError unless every side of the volume (voxels) is a multiple of 32."""
    for side in sides:
        if side % SIDE:
            below, above = side // SIDE * SIDE, (side // SIDE + 1) * SIDE
            fitting = f"{below} or {above}" if below else f"{above}"
            shape = " x ".join(str(int(side)) for side in sides)
            raise InputError(
                f"a volume of {shape} voxels does not fit Swin UNETR: every side must be a multiple of {SIDE}. "
                f"In place of {int(side)}, {fitting} would do."
            )


def _refuse_bad_settings(feature_size, window_size, depths, num_heads, attention, checkpointing):
    if feature_size < 12 or feature_size % 12:
        raise InputError(f"feature_size {feature_size}: must be a multiple of 12, such as 12, 24, 36 or 48.")
    if window_size < 2:
        raise InputError(f"window_size {window_size}: must be at least 2; 7 is usual.")
    if len(depths) != 4 or len(num_heads) != 4:
        raise InputError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)}: there are four stages.")
    for stage, heads in enumerate(num_heads):
        if feature_size * 2**stage % heads:
            channels = feature_size * 2**stage
            raise InputError(f"num_heads {tuple(num_heads)}: {heads} heads cannot share {channels} channels.")
    _refuse_unknown("attention", attention, ATTENTION)
    _refuse_unknown("checkpointing", checkpointing, CHECKPOINTING)


def _refuse_unknown(setting: str, value: str, known: tuple[str, ...]):
    if value not in known:
        raise InputError(f"{setting} {value!r}: must be one of {', '.join(known)}.")


# ---- the transformer encoder ---------------------------------------------------------------------------------------


class SwinTransformer(nn.Module):
    """Image [B, 4, D, H, W] -> five feature maps, [B, C, D/2, H/2, W/2] down to [B, 16C, D/32, H/32, W/32]."""

    def __init__(self, in_channels, dim, depths, num_heads, recompute, window_size, attention, legacy_merging):
        super().__init__()
        self.patch_embed = PatchEmbedding(in_channels, dim)
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            layer = SwinStage(dim * 2**stage, depth, heads, recompute, window_size, attention, legacy_merging)
            setattr(self, f"layers{stage + 1}", nn.ModuleList([layer]))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.patch_embed(image)  # tokens [B, D/2, H/2, W/2, C]
        levels = [_feature_map(x)]
        for (stage,) in (self.layers1, self.layers2, self.layers3, self.layers4):
            x = stage(x)  # half the sides, twice the channels
            levels.append(_feature_map(x))
        return levels


def _feature_map(tokens: Tensor) -> Tensor:
    """[B, D, H, W, C] -> [B, C, D, H, W], every token normalised over its channels (no learned scale)."""
    return F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 4, 1, 2, 3)


class PatchEmbedding(nn.Module):
    """Image [B, 4, D, H, W] -> a token for every 2x2x2 voxels, [B, D/2, H/2, W/2, C]."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 4, 1)


class SwinStage(nn.Module):
    """Swin blocks, plain and shifted in turn, then patch merging: [B, D, H, W, C] -> [B, D/2, H/2, W/2, 2C]."""

    def __init__(self, dim, depth, num_heads, recompute, window_size, attention, legacy_merging):
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, shifted=index % 2 == 1, attention=attention)
            for index in range(depth)
        )
        self.downsample = PatchMerging(dim, legacy_merging)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = run(block, x, recompute=self.recompute and self.training)
        return self.downsample(x)


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens [B, D, H, W, C] keep their shape."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shifted: bool, attention: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, shifted, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, token by token: [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class PatchMerging(nn.Module):
    """Every 2x2x2 tokens become one: [B, D, H, W, C] -> [B, D/2, H/2, W/2, 2C]."""

    def __init__(self, dim: int, legacy: bool):
        super().__init__()
        self.order = LEGACY_MERGING if legacy else MERGING
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        neighbours = [x[:, d::2, h::2, w::2] for d, h, w in self.order]  # the sides are even: 32 divides the image
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


# ---- the convolutional encoder and decoder -------------------------------------------------------------------------


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
        normed = [torch.batch_norm(sample, None, None, None, None, True, 0.0, EPSILON, True) for sample in x.split(1)]
        return normed[0] if len(normed) == 1 else torch.cat(normed)
    voxels = (2, 3, 4)
    if torch.is_grad_enabled() or not x.is_cpu or torch.compiler.is_compiling():  # a compiler fuses these steps
        variance, mean = torch.var_mean(x, voxels, correction=0, keepdim=True)  # each [B, C, 1, 1, 1]
        scale = (variance + EPSILON).rsqrt()
        return torch.addcmul(-mean * scale, x, scale)
    # Without gradients x, which is the fresh result of a convolution, can be overwritten.
    flat = x.sub_(_means(x)).flatten(2)  # [B, C, V]
    squares = torch.bmm(flat, flat.transpose(1, 2)).diagonal(dim1=1, dim2=2)  # [B, C]; the fastest sum on a CPU
    return x.mul_((squares / flat.shape[2] + EPSILON).rsqrt()[..., None, None, None])


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
