"""Instance norm, shortcut and leaky ReLU of a residual block as Triton kernels: two passes over the data each way.

Forward, one pass takes the mean and the variance of every channel of every sample, the next writes the result.
Backward, one pass sums the gradient and its products with the normalised inputs, the next writes the gradients. Only
the inputs and their statistics are kept; the result before the ReLU is computed again.

Variances never come from E[x^2] - E[x]^2, which loses its digits where a mean is large beside its spread. Every lane
of a program follows its voxels with Welford's recurrence; lanes, then programs, are merged with the formula of Chan,
Golub and LeVeque (1983, The American Statistician 37:242), all in float32. No atomic adds: results repeat exactly.

Feature maps [B, C, D, H, W] lie channels last in memory, [B, V, C] with V voxels. See models.swinunetr.triton_attention
for why the kernels are a `torch.library.custom_op`.
"""

import torch
from torch import Tensor

from models.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError("the fused instance norm needs the package triton: pip install triton.") from error

SLOPE = tl.constexpr(0.01)  # of the leaky ReLU below zero, as in models.swinunetr.convolutions
EPSILON = tl.constexpr(1e-5)  # added to every variance

TILE = 2048  # elements of [voxels, channels] that a program handles at a time
PROGRAMS = 1024  # of a pass that gathers sums: enough to fill a large GPU
MAX_CHUNKS = 512  # parts of a sample that are summed apart; one program merges them


def instance_norm_leaky_relu(x: Tensor, shortcut: Tensor | None = None, normalize_shortcut: bool = False) -> Tensor:
    """leaky_relu(instance_norm(x) + shortcut), of which the shortcut may be absent or to be normalised as well.

    x and shortcut [B, C, D, H, W], float32, bfloat16 or float16, not necessarily alike -> the same of x's type,
    channels last. Inputs that are not channels last are copied.
    """
    return _norm(x, shortcut, normalize_shortcut)[0]


# ---- what the kernels share ----------------------------------------------------------------------------------------


@triton.jit
def _tile(sample, first, stop, voxels, channels, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
    """Voxels first..stop of a sample, the program's channels -> start of the tile, offsets in it, what is inside."""
    voxel = tl.arange(0, BLOCK_V)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    start = (sample.to(tl.int64) * voxels + first) * channels  # a batch can have more than 2^31 elements
    return start, voxel * channels + channel, (voxel < stop - first) & (channel < channels)


@triton.jit
def _merge(count, mean, squares):
    """Along axis 0: counts, means and sums of squared deviations of parts -> mean and sum for all of them."""
    merged = tl.sum(count * mean, 0) / tl.sum(count, 0)
    away = mean - merged[None, :]
    return merged, tl.sum(squares + count * away * away, 0)


@triton.jit
def _load_statistics(pointer, sample, channels, BLOCK_C: tl.constexpr):
    """Mean and 1 / standard deviation [1, channels] out of [2, B, C]."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean = tl.load(pointer + sample * channels + channel, mask=channel < channels, other=0.0)
    pointer += tl.num_programs(2) * channels
    return mean, tl.load(pointer + sample * channels + channel, mask=channel < channels, other=0.0)


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def _chunk_statistics_kernel(
    x_ptr, partial_ptr, voxels, channels, chunk_voxels, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr
):
    """x [B, V, C] -> means and sums of squared deviations of every chunk of voxels, [2, B, chunks, C]."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    stop = tl.minimum((chunk + 1) * chunk_voxels, voxels)
    count = tl.zeros([BLOCK_V, 1], tl.float32)
    mean = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    for first in range(chunk * chunk_voxels, stop, BLOCK_V):
        start, offset, inside = _tile(sample, first, stop, voxels, channels, BLOCK_V, BLOCK_C)
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        count += tl.where(first + tl.arange(0, BLOCK_V)[:, None] < stop, 1.0, 0.0)
        away = tl.where(inside, x - mean, 0.0)
        mean += away * (1.0 / tl.maximum(count, 1.0))
        squares += away * (x - mean)  # inside or zero
    mean, squares = _merge(count, mean, squares)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = sample * tl.num_programs(0) + chunk
    tl.store(partial_ptr + row * channels + channel, mean, mask=channel < channels)
    row += tl.num_programs(2) * tl.num_programs(0)
    tl.store(partial_ptr + row * channels + channel, squares, mask=channel < channels)


@triton.jit
def _merge_chunks_kernel(
    partial_ptr, statistics_ptr, voxels, channels, chunk_voxels, chunks, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr
):
    """[2, B, chunks, C] -> mean and 1 / standard deviation, [2, B, C]. BLOCK_V is the number of chunks, or more."""
    sample = tl.program_id(2)
    chunk = tl.arange(0, BLOCK_V)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (chunk < chunks) & (channel < channels)
    row = sample * chunks + chunk
    mean = tl.load(partial_ptr + row * channels + channel, mask=inside, other=0.0)
    row += tl.num_programs(2) * chunks
    squares = tl.load(partial_ptr + row * channels + channel, mask=inside, other=0.0)
    count = tl.minimum(tl.maximum(voxels - chunk * chunk_voxels, 0), chunk_voxels).to(tl.float32)
    mean, squares = _merge(count, mean, squares)
    deviation = tl.sqrt(squares / voxels + EPSILON)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(statistics_ptr + sample * channels + channel, mean, mask=channel < channels)
    statistics_ptr += tl.num_programs(2) * channels
    tl.store(statistics_ptr + sample * channels + channel, 1.0 / deviation, mask=channel < channels)


@triton.jit
def _apply_kernel(
    x_ptr, shortcut_ptr, x_statistics, shortcut_statistics, y_ptr, voxels, channels,
    SHORTCUT: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, sample = tl.program_id(0) * BLOCK_V, tl.program_id(2)
    start, offset, inside = _tile(sample, first, voxels, voxels, channels, BLOCK_V, BLOCK_C)
    mean, scale = _load_statistics(x_statistics, sample, channels, BLOCK_C)
    y = (tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32) - mean) * scale
    if SHORTCUT:
        shortcut = tl.load(shortcut_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            mean, scale = _load_statistics(shortcut_statistics, sample, channels, BLOCK_C)
            shortcut = (shortcut - mean) * scale
        y += shortcut
    y = tl.where(y > 0, y, y * SLOPE)
    tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


# ---- backward ------------------------------------------------------------------------------------------------------
# With g the gradient before the ReLU and x^ the normalised x, the gradient of x is
# (g - mean(g) - x^ mean(g x^)) / deviation(x), means over the voxels; likewise for a normalised shortcut.


@triton.jit
def _gradient_sums_kernel(
    x_ptr, shortcut_ptr, x_statistics, shortcut_statistics, grad_y_ptr, partial_ptr, voxels, channels, chunk_voxels,
    SHORTCUT: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """-> sums of g, g x^ and, for a normalised shortcut s, g s^ over every chunk of voxels, [3 or 2, B, chunks, C]."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    stop = tl.minimum((chunk + 1) * chunk_voxels, voxels)
    x_mean, x_scale = _load_statistics(x_statistics, sample, channels, BLOCK_C)
    if NORMALIZE:
        s_mean, s_scale = _load_statistics(shortcut_statistics, sample, channels, BLOCK_C)
    sum_g = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    sum_gs = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    for first in range(chunk * chunk_voxels, stop, BLOCK_V):
        start, offset, inside = _tile(sample, first, stop, voxels, channels, BLOCK_V, BLOCK_C)
        x = (tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32) - x_mean) * x_scale
        y = x
        if SHORTCUT:
            s = tl.load(shortcut_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
            if NORMALIZE:
                s = (s - s_mean) * s_scale
            y += s
        g = tl.load(grad_y_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)  # outside nothing is added
        g = tl.where(y > 0, g, g * SLOPE)
        sum_g += g
        sum_gx += g * x
        if NORMALIZE:
            sum_gs += g * s
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = sample * tl.num_programs(0) + chunk
    rows = tl.num_programs(2) * tl.num_programs(0)
    tl.store(partial_ptr + row * channels + channel, tl.sum(sum_g, 0), mask=channel < channels)
    tl.store(partial_ptr + (row + rows) * channels + channel, tl.sum(sum_gx, 0), mask=channel < channels)
    if NORMALIZE:
        tl.store(partial_ptr + (row + 2 * rows) * channels + channel, tl.sum(sum_gs, 0), mask=channel < channels)


@triton.jit
def _gradient_kernel(
    x_ptr, shortcut_ptr, x_statistics, shortcut_statistics, grad_y_ptr, sums_ptr, grad_x_ptr, grad_shortcut_ptr,
    voxels, channels,
    SHORTCUT: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, sample = tl.program_id(0) * BLOCK_V, tl.program_id(2)
    start, offset, inside = _tile(sample, first, voxels, voxels, channels, BLOCK_V, BLOCK_C)
    mean, x_scale = _load_statistics(x_statistics, sample, channels, BLOCK_C)
    x = (tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32) - mean) * x_scale
    y = x
    if SHORTCUT:
        s = tl.load(shortcut_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            mean, s_scale = _load_statistics(shortcut_statistics, sample, channels, BLOCK_C)
            s = (s - mean) * s_scale
        y += s
    g = tl.load(grad_y_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(y > 0, g, g * SLOPE)

    sum_g, sum_gx = _load_statistics(sums_ptr, sample, channels, BLOCK_C)
    centred = g - sum_g / voxels
    grad_x = (centred - x * (sum_gx / voxels)) * x_scale
    tl.store(grad_x_ptr + start + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if SHORTCUT:
        grad_shortcut = g
        if NORMALIZE:
            sums_ptr += tl.num_programs(2) * channels
            _, sum_gs = _load_statistics(sums_ptr, sample, channels, BLOCK_C)
            grad_shortcut = (centred - s * (sum_gs / voxels)) * s_scale
        grad_shortcut = grad_shortcut.to(grad_shortcut_ptr.dtype.element_ty)
        tl.store(grad_shortcut_ptr + start + offset, grad_shortcut, mask=inside)


# ---- the operators of torch ----------------------------------------------------------------------------------------


@torch.library.custom_op("swinunetr::instance_norm_leaky_relu", mutates_args=())
def _norm(x: Tensor, shortcut: Tensor | None, normalize_shortcut: bool) -> tuple[Tensor, Tensor]:
    """-> the result, and mean and 1 / standard deviation of what is normalised, float32 [1 or 2 inputs, 2, B, C]."""
    inputs = [_channels_last(t) for t in (x, shortcut) if t is not None]
    y = _empty_like(x)
    statistics = x.new_empty((1 + normalize_shortcut, 2, *x.shape[:2]), dtype=torch.float32)
    batch, channels, voxels = x.shape[0], x.shape[1], x[0, 0].numel()
    block, (chunks, chunk_voxels), channel_blocks = _tiling(x)
    partial = x.new_empty((2, batch, chunks, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for normalized, result in zip(inputs, statistics, strict=False):  # not for a shortcut added as it is
            grid = (chunks, channel_blocks, batch)
            _chunk_statistics_kernel[grid](normalized, partial, voxels, channels, chunk_voxels, **block)
            parts = {"BLOCK_V": triton.next_power_of_2(chunks), "BLOCK_C": 16}
            grid = (1, triton.cdiv(channels, 16), batch)
            _merge_chunks_kernel[grid](partial, result, voxels, channels, chunk_voxels, chunks, **parts)
        grid = (triton.cdiv(voxels, block["BLOCK_V"]), channel_blocks, batch)
        kinds = {"SHORTCUT": shortcut is not None, "NORMALIZE": normalize_shortcut}
        # Where there is no shortcut, x stands in for its address, which is not read.
        _apply_kernel[grid](inputs[0], inputs[-1], statistics[0], statistics[-1], y, voxels, channels, **kinds, **block)
    return y, statistics


@torch.library.custom_op("swinunetr::instance_norm_leaky_relu_gradients", mutates_args=())
def _gradients(
    grad_y: Tensor, x: Tensor, shortcut: Tensor | None, statistics: Tensor, normalize_shortcut: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and of the shortcut (empty without one)."""
    inputs, grad_y = [_channels_last(t) for t in (x, shortcut) if t is not None], _channels_last(grad_y)
    grad_x = _empty_like(x)
    grad_shortcut = x.new_empty(0) if shortcut is None else _empty_like(shortcut)
    batch, channels, voxels = x.shape[0], x.shape[1], x[0, 0].numel()
    block, (chunks, chunk_voxels), channel_blocks = _tiling(x)
    kinds = {"SHORTCUT": shortcut is not None, "NORMALIZE": normalize_shortcut}
    partial = x.new_empty((2 + normalize_shortcut, batch, chunks, channels), dtype=torch.float32)
    known = (inputs[0], inputs[-1], statistics[0], statistics[-1], grad_y)
    with torch.cuda.device_of(x):
        grid = (chunks, channel_blocks, batch)
        _gradient_sums_kernel[grid](*known, partial, voxels, channels, chunk_voxels, **kinds, **block)
        sums = partial.sum(2)
        grid = (triton.cdiv(voxels, block["BLOCK_V"]), channel_blocks, batch)
        _gradient_kernel[grid](*known, sums, grad_x, grad_shortcut, voxels, channels, **kinds, **block)
    return grad_x, grad_shortcut


@_norm.register_fake
def _(x, shortcut, normalize_shortcut):
    return _empty_like(x), x.new_empty((1 + normalize_shortcut, 2, *x.shape[:2]), dtype=torch.float32)


@_gradients.register_fake
def _(grad_y, x, shortcut, statistics, normalize_shortcut):
    return _empty_like(x), x.new_empty(0) if shortcut is None else _empty_like(shortcut)


def _save(ctx, inputs, output):
    x, shortcut, ctx.normalize_shortcut = inputs
    ctx.save_for_backward(x, shortcut, output[1])


def _backward(ctx, grad_y, _):
    x, shortcut, statistics = ctx.saved_tensors
    grad_x, grad_shortcut = _gradients(grad_y, x, shortcut, statistics, ctx.normalize_shortcut)
    return grad_x, None if shortcut is None else grad_shortcut, None


_norm.register_autograd(_backward, setup_context=_save)


# ---- memory layouts ------------------------------------------------------------------------------------------------


def _tiling(x: Tensor):
    """Sizes of a tile; how many chunks a sample's voxels are summed in and how long they are; blocks of channels."""
    batch, channels, voxels = x.shape[0], x.shape[1], x[0, 0].numel()
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_v = TILE // block_c
    channel_blocks = triton.cdiv(channels, block_c)
    chunks = min(MAX_CHUNKS, triton.cdiv(PROGRAMS, batch * channel_blocks))
    chunk_voxels = triton.cdiv(triton.cdiv(voxels, chunks), block_v) * block_v  # whole tiles
    return {"BLOCK_V": block_v, "BLOCK_C": block_c}, (triton.cdiv(voxels, chunk_voxels), chunk_voxels), channel_blocks


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last_3d)
