"""Self-attention inside windows of a 3-D token grid, plain and shifted (Liu et al. 2021, arXiv:2103.14030).

Every second Swin block rolls the grid by half a window, so that its windows straddle those of the block before. The
roll brings tokens from opposite borders of the volume into the last window along each axis; a mask keeps them apart.
A window is last or not along each of three axes, so there are at most 2^3 = 8 different masks however large the grid
is. Windows of one mask are attended together with one bias [1, heads, N, N] (N tokens in a window).

Letters in shape comments: B batch, D H W token grid, C channels, G windows, N tokens per window, h heads.
"""

from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.swinunetr.blocked_attention import blocked_attention

ATTENTION = ("reference", "sdpa", "auto")
KERNELS = ("torch", "triton")
MASKED = -100.0  # added to the logit of a pair of tokens that are not neighbours; exp(-100) is nothing in float32
ALIGNMENT = 16  # elements: fused GPU kernels read a bias in place only if its rows start at a multiple of this
CPU_CHANNELS = 16  # channels per head below which the fused CPU kernel is slower than with zeros appended


class WindowAttention(nn.Module):
    """Multi-head attention within windows of `window_size`^3 tokens, with a learned bias per relative position.

    attention: "sdpa" uses torch's fused kernels, "reference" writes the formula out, and "auto" takes "sdpa" except on
    a CPU, where going through the windows part by part is several times faster than either.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shifted: bool, attention: str = "auto"):
        super().__init__()
        self.num_heads, self.attention = num_heads, attention
        self.window_size, self.shift_size = window_size, window_size // 2 if shifted else 0
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 3, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self._cached = (None, None)  # (key, biases) of the last evaluation
        self._kernel = None  # a fused kernel in place of all that follows partition(); see set_kernels

    def set_kernels(self, kind: str):
        """One of KERNELS; "triton" is this package's own, for CUDA devices. InputError without triton."""
        self._kernel = None
        if kind == "triton":
            from models.swinunetr.triton_attention import window_attention  # triton is an optional package

            self._kernel = window_attention

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D, H, W, C] -> [B, D, H, W, C], each token a mixture of the tokens of its window."""
        grid = x.shape[1:4]
        # Along an axis that is no longer than a window, the window shrinks to the axis and nothing is shifted.
        window = tuple(min(side, self.window_size) for side in grid)
        shift = tuple(self.shift_size if side > self.window_size else 0 for side in grid)
        padding = tuple(-side % length for side, length in zip(grid, window, strict=True))
        if any(padding):
            x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))  # zeros, attended like any token
        padded = x.shape[1:4]
        counts = tuple(side // length for side, length in zip(padded, window, strict=True))
        if any(shift):
            x = x.roll([-s for s in shift], dims=(1, 2, 3))
        x = partition(x, window, counts)  # [B, nD, nH, nW, N, C]
        attend = self._attend_by_group if self._kernel is None else self._attend_by_kernel
        x = attend(x, window, shift, counts)
        x = merge(x, window, counts)  # [B, D', H', W', C]
        if any(shift):
            x = x.roll(shift, dims=(1, 2, 3))
        return x[:, : grid[0], : grid[1], : grid[2]]

    def _attend_by_group(self, x: Tensor, window, shift, counts) -> Tensor:
        """x [B, nD, nH, nW, N, C] -> the same, the windows of one mask at a time."""
        groups = mask_groups(counts, shift)
        pieces = [x[(slice(None), *group)] for group in groups]  # each [B, gD, gH, gW, N, C]
        windows = pieces[0].flatten(0, 3) if len(pieces) == 1 else torch.cat([p.flatten(0, 3) for p in pieces])
        q, k, v = self._heads(self.qkv(windows))  # three times [G, h, N, C/h]
        dtype = torch.promote_types(q.dtype, torch.float32) if self._is_blocked(q) else q.dtype
        biases = self._biases(window, shift, counts, dtype)  # one [1, h, N, N] per group
        sizes = [piece.shape[:4].numel() for piece in pieces]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), biases, strict=True)
        mixed = [self._attend(*part).transpose(1, 2).flatten(2) for part in parts]  # each [g, N, C]
        mixed = self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))  # [G, N, C]
        if len(groups) == 1:
            return mixed.view(x.shape)
        out = torch.empty_like(x, dtype=mixed.dtype)
        for group, piece, part in zip(groups, pieces, mixed.split(sizes), strict=True):
            out[(slice(None), *group)] = part.view(piece.shape)
        return out

    def _attend_by_kernel(self, x: Tensor, window, shift, counts) -> Tensor:
        """x [B, nD, nH, nW, N, C] -> the same, all windows at once: the kernel finds bias and mask by itself."""
        q, k, v = self._heads(self.qkv(x.flatten(0, 3)))
        mixed = self._kernel(q, k, v, self.relative_position_bias_table, window, counts, shift, self.window_size)
        return self.proj(mixed.transpose(1, 2).flatten(2)).view(x.shape)

    def _heads(self, qkv: Tensor):
        """[G, N, 3C] -> q, k, v, each [G, h, N, C/h]."""
        return qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _is_blocked(self, q: Tensor) -> bool:
        """Whether the windows are attended part by part."""
        return self.attention == "auto" and q.is_cpu

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(C/h) + bias) v for q, k, v [G, h, N, C/h] and bias [1, h, N, N]."""
        if self._is_blocked(q):
            return blocked_attention(q, k, v, bias)
        if self.attention == "reference":
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias  # [G, h, N, N]
            return logits.softmax(-1).to(v.dtype) @ v
        channels = q.shape[-1]
        if not q.is_cpu or channels >= CPU_CHANNELS:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        q, k, v = (F.pad(x, (0, CPU_CHANNELS - channels)) for x in (q, k, v))  # zeros change nothing
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=channels**-0.5)[..., :channels]

    def _biases(self, window, shift, counts, dtype) -> list[Tensor]:
        """The position bias plus the mask, [1, h, N, N] for every group: fresh wherever a gradient may be asked for,
        else kept until the parameter, its place or its type changes."""
        table = self.relative_position_bias_table
        wants_gradient = torch.is_grad_enabled() and table.requires_grad
        if torch.compiler.is_compiling() or self.training or wants_gradient or table.is_inference():
            return self._gather_biases(window, shift, counts, dtype)
        kind = (table._version, table.data_ptr(), table.device, dtype, torch.is_inference_mode_enabled())
        key = (*kind, window, shift, tuple(n > 1 for n in counts))
        if self._cached[0] != key:
            self._cached = (key, self._gather_biases(window, shift, counts, dtype))
        return self._cached[1]

    def _gather_biases(self, window, shift, counts, dtype) -> list[Tensor]:
        tokens = window[0] * window[1] * window[2]
        # In a window that shrank, MONAI reads the corner of the full window's table; so do we.
        index = self.relative_position_index[:tokens, :tokens]
        # Rows end in a few unused columns, so that each starts aligned: [N, N+, h] -> [1, h, N, N+]
        index = F.pad(index, (0, -tokens % ALIGNMENT))
        # index_select: its gradient costs half of that of table[index]
        bias = self.relative_position_bias_table.index_select(0, index.flatten()).to(dtype).view(*index.shape, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if not any(shift):
            return [bias[..., :tokens]]
        masks = shift_masks(window, shift, bias.device)
        lasts = [mask_of_group(group, counts, shift) for group in mask_groups(counts, shift)]
        return [(bias + masks[last].to(dtype) if any(last) else bias)[..., :tokens] for last in lasts]

    def train(self, mode: bool = True):
        self._cached = (None, None)  # also for those who change weights behind autograd's back, through .data
        return super().train(mode)

    def __getstate__(self):
        return self.__dict__ | {"_cached": (None, None)}


def relative_position_index(window_size: int) -> Tensor:
    """int64 [N, N]: the row of the bias table for the offset between every two tokens of a window."""
    side = torch.arange(window_size)
    place = torch.stack(torch.meshgrid(side, side, side, indexing="ij")).flatten(1)  # [3, N]
    offset = place[:, :, None] - place[:, None, :] + window_size - 1  # [3, N, N], from 0 to 2 * window_size - 2
    row = 2 * window_size - 1
    return (offset[0] * row + offset[1]) * row + offset[2]


def partition(x: Tensor, window, counts) -> Tensor:
    """[B, D, H, W, C] -> [B, nD, nH, nW, N, C]: the grid cut into windows of N tokens."""
    (d, h, w), (n_d, n_h, n_w) = window, counts
    x = x.reshape(x.shape[0], n_d, d, n_h, h, n_w, w, x.shape[-1])
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(x.shape[0], n_d, n_h, n_w, d * h * w, x.shape[-1])


def merge(x: Tensor, window, counts) -> Tensor:
    """[B, nD, nH, nW, N, C] -> [B, D, H, W, C], the inverse of `partition`."""
    (d, h, w), (n_d, n_h, n_w) = window, counts
    x = x.reshape(x.shape[0], n_d, n_h, n_w, d, h, w, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], n_d * d, n_h * h, n_w * w, x.shape[-1])


def mask_groups(counts, shift) -> list[tuple[slice, slice, slice]]:
    """Where in the window grid [nD, nH, nW] each group of windows of one mask lies; together they cover the grid."""
    axes = []
    for count, step in zip(counts, shift, strict=True):
        whole, others, last = slice(0, count), slice(0, count - 1), slice(count - 1, count)
        axes.append([others, last] if step else [whole])  # a shifted axis has at least two windows
    return list(product(*axes))


def mask_of_group(group, counts, shift) -> tuple[bool, bool, bool]:
    """Along which axes the windows of a group hold tokens from both borders of the volume."""
    axes = zip(group, counts, shift, strict=True)
    return tuple(bool(step) and part.stop == count for part, count, step in axes)


def shift_masks(window, shift, device) -> dict[tuple[bool, bool, bool], Tensor]:
    """For each kind of window (see `mask_of_group`) a float32 mask [N, N+]: 0 between neighbours, MASKED otherwise."""
    if torch.compiler.is_compiling():
        return _shift_masks(window, shift, device)  # constants of the compiled graph
    return _cached_shift_masks(window, shift, device)


def _shift_masks(window, shift, device) -> dict[tuple[bool, bool, bool], Tensor]:
    masks = {}
    for last in product(*([False, True] if step else [False] for step in shift)):
        # The last `step` places of a last window come from the other border of the volume: another region.
        sides = [
            (torch.arange(length, device=device) >= length - step) & crossing
            for length, step, crossing in zip(window, shift, last, strict=True)
        ]
        d, h, w = sides
        region = (d[:, None, None] * 4 + h[:, None] * 2 + w).flatten()  # [N], 0 to 7
        mask = torch.where(region[:, None] == region, 0.0, MASKED)  # [N, N]
        masks[last] = F.pad(mask, (0, -len(region) % ALIGNMENT))
    return masks


@lru_cache(maxsize=32)
def _cached_shift_masks(window, shift, device):
    with torch.inference_mode(False), torch.no_grad():  # so that they serve training as well
        return _shift_masks(window, shift, device)
