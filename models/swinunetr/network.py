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
from models.swinunetr.convolutions import Decoder, Encoder, OutputHead, ResidualBlock
from models.swinunetr.window_attention import ATTENTION, KERNELS, WindowAttention

CHECKPOINTING = ("none", "blocks", "full")
SIDE = 32  # voxels: the patch embedding and four mergings halve every side five times

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
        v2: bool = False,
        drop_path: float = 0.0,
        use_attention: bool = True,
    ):
        super().__init__()
        _refuse_bad_settings(feature_size, window_size, depths, num_heads, attention, checkpointing, drop_path)
        self.checkpointing = checkpointing
        c = feature_size
        block = {"window_size": window_size, "attention": attention, "use_attention": use_attention}
        stage = {"recompute": checkpointing != "none", "legacy_merging": legacy_merging, **block}
        self.swinViT = SwinTransformer(in_channels, c, depths, num_heads, v2, drop_path, **stage)
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


def _refuse_bad_settings(feature_size, window_size, depths, num_heads, attention, checkpointing, drop_path):
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
    if not 0 <= drop_path < 1:
        raise InputError(f"drop_path {drop_path}: must be at least 0 and below 1; 0.1 is usual.")
    _refuse_unknown("attention", attention, ATTENTION)
    _refuse_unknown("checkpointing", checkpointing, CHECKPOINTING)


def _refuse_unknown(setting: str, value: str, known: tuple[str, ...]):
    if value not in known:
        raise InputError(f"{setting} {value!r}: must be one of {', '.join(known)}.")


# ---- the transformer encoder ---------------------------------------------------------------------------------------


class SwinTransformer(nn.Module):
    """Image [B, 4, D, H, W] -> five feature maps, [B, C, D/2, H/2, W/2] down to [B, 16C, D/32, H/32, W/32].

    With `v2`, convolutions come before each stage (He et al. 2023, doi 10.1007/978-3-031-43901-8_40).
    """

    def __init__(self, in_channels, dim, depths, num_heads, v2, drop_path, recompute, **stage):
        super().__init__()
        self.v2, self.recompute = v2, recompute
        self.patch_embed = PatchEmbedding(in_channels, dim)
        rates = [drop_path * block / max(1, sum(depths) - 1) for block in range(sum(depths))]  # the deeper, the higher
        for index, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            own, rates = rates[:depth], rates[depth:]
            layer = SwinStage(dim * 2**index, heads, own, recompute, **stage)
            setattr(self, f"layers{index + 1}", nn.ModuleList([layer]))
        for index in range(len(depths) if v2 else 0):
            setattr(self, f"layers{index + 1}c", nn.ModuleList([Encoder(dim * 2**index, dim * 2**index)]))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.patch_embed(image)  # tokens [B, D/2, H/2, W/2, C]
        levels = [_feature_map(x)]
        for number in (1, 2, 3, 4):
            if self.v2:
                convolutions = getattr(self, f"layers{number}c")[0]
                x = run(convolutions, x.permute(0, 4, 1, 2, 3), recompute=self.recompute and self.training)
                x = x.permute(0, 2, 3, 4, 1)
            x = getattr(self, f"layers{number}")[0](x)  # half the sides, twice the channels
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

    def __init__(self, dim, num_heads, drop_rates, recompute, legacy_merging, **block):
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, shifted=index % 2 == 1, drop_rate=rate, **block)
            for index, rate in enumerate(drop_rates)
        )
        self.downsample = PatchMerging(dim, legacy_merging)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = run(block, x, recompute=self.recompute and self.training)
        return self.downsample(x)


class SwinBlock(nn.Module):
    """x + attention(norm(x)), or x alone without attention, then x + mlp(norm(x)); tokens [B, D, H, W, C] keep their
    shape. In training either sum is left out with the probability `drop_rate`."""

    def __init__(self, dim, num_heads, shifted, drop_rate, window_size, attention, use_attention):
        super().__init__()
        self.drop_rate = drop_rate
        if use_attention:
            self.norm1 = nn.LayerNorm(dim)
            self.attn = WindowAttention(dim, num_heads, window_size, shifted, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        drop_rate = self.drop_rate if self.training else 0.0
        if hasattr(self, "attn"):
            x = x + drop_path(self.attn(self.norm1(x)), drop_rate)
        return x + drop_path(self.mlp(self.norm2(x)), drop_rate)


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """A residual branch [B, ...], zero in a random share of the samples and scaled up in the others to the same mean
    (Huang et al. 2016, arXiv:1603.09382)."""
    if rate == 0:
        return branch
    kept = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(1 - rate)
    return branch * kept.div_(1 - rate)


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
