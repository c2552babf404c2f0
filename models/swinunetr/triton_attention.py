"""Window attention as Triton kernels: softmax(q k^T / sqrt(d) + position bias + shift mask) v without its matrix.

Flash attention (Dao 2023, arXiv:2307.08691) for the windows of a Swin transformer. Nothing of size N x N is ever in
global memory: the row of the bias table and the region of the shift mask follow from the indices of two tokens. The
backward pass recomputes the probabilities from the saved logsumexp of every row.

One program of a kernel works on one block of tokens of one head of one window:
* forward: a block of queries meets all keys;
* query gradient: the same, and it leaves behind delta = sum(out * grad_out), which the other two need;
* key and value gradient: a block of keys meets all queries;
* table gradient: a block of queries and a block of keys meet in many windows, so that their sum over these windows
  stays in registers and only it goes to the table by atomic adds. They are few, but they come in any order: the last
  bits of this one gradient differ from run to run.

The kernels enter torch as `torch.library.custom_op`, which torch.compile and torch.export take as single operators in
every torch from 2.11 on. `triton_op`, which would let the compiler look inside, refuses Triton's interpreter, in which
the kernels are tested on machines without a GPU.

Letters in shape comments: G windows (batch slowest, then their place in the window grid), h heads, N tokens of a
window, d channels of a head, w side of a full window, T = (2w - 1)^3 rows of the bias table.
"""

import torch
from torch import Tensor

from models.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError("the fused attention needs the package triton: pip install triton, or choose another.") from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 128  # of a head: more would not fit the registers and the shared memory of a program
TABLE_PROGRAMS = 2048  # of the table gradient: enough to fill a large GPU, few enough to keep the atomic adds few

# Exponentials are powers of two, the base that GPUs compute; logits, bias and logsumexp are scaled to match.
LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-100.0 * 1.4426950408889634)  # as in models.swinunetr.window_attention


def window_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, window, counts, shift, window_size: int) -> Tensor:
    """q, k, v [G, h, N, d] and the bias table [T, h] -> [G, h, N, d], stored as [G, N, h, d].

    window: sides of a window in tokens, N = their product; smaller than window_size where the token grid is.
    counts: windows along each axis of the grid, G = batch * their product. shift: tokens that the grid was rolled by,
    0 for none. float32, bfloat16 or float16; sums are in float32. Views of one [G, N, 3, h, d] are read in place.
    """
    if q.dtype not in DTYPES or q.shape[-1] > MAX_CHANNELS:
        raise InputError(
            f"the fused attention takes float32, bfloat16 or float16 and at most {MAX_CHANNELS} channels per head, "
            f"not {q.dtype} with {q.shape[-1]}: choose another attention."
        )
    return _attention(q, k, v, table, [*window], [*counts], [*shift], window_size)[0]


# ---- what the kernels share ----------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, token, stride, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[tokens, channels] of one head of one window; zero beyond the last token and the last channel."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (token[:, None] < TOKENS) & (channel < CHANNELS)
    return tl.load(pointer + token[:, None] * stride + channel, mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, token, stride, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (token[:, None] < TOKENS) & (channel < CHANNELS)
    tl.store(pointer + token[:, None] * stride + channel, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _place(token, TOKENS: tl.constexpr, SIDE: tl.constexpr):
    """Where a token lies in the bias table: the row of a pair is the difference of two places, plus a constant.

    Also in a window that shrank, a token counts as the one of its number in a full window, as in MONAI.
    """
    token = tl.minimum(token, TOKENS - 1)  # padding must not reach outside the table
    row = 2 * SIDE - 1
    return (token // (SIDE * SIDE) * row + token // SIDE % SIDE) * row + token % SIDE


@triton.jit
def _region(token, window, n_d, n_h, n_w, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """0 to 7: from which borders of the volume a token came. The last SHIFT places of a last window were rolled in."""
    height: tl.constexpr = WINDOW[1]
    width: tl.constexpr = WINDOW[2]
    d = (token // (height * width) >= WINDOW[0] - SHIFT[0]) & (window // (n_w * n_h) % n_d == n_d - 1)
    h = (token // width % height >= height - SHIFT[1]) & (window // n_w % n_h == n_h - 1)
    w = (token % width >= width - SHIFT[2]) & (window % n_w == n_w - 1)
    return d.to(tl.int32) * 4 + h.to(tl.int32) * 2 + w.to(tl.int32)


@triton.jit
def _bias(table, place_q, place_k, key, TOKENS: tl.constexpr, SIDE: tl.constexpr):
    """The position bias of every pair, -inf for keys beyond the last token. The tokens lie along two axes."""
    row = 2 * SIDE - 1
    return tl.load(table + place_q - place_k + row * row * row // 2, mask=key < TOKENS, other=float("-inf"))


# ---- the kernels ---------------------------------------------------------------------------------------------------
# Sizes are constants of the compiled code where they are the same in all stages of a network, arguments elsewhere.


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, stride_g, stride_h, stride_n, scale, heads, n_d, n_h, n_w,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(TOKENS, BLOCK)
    head = tl.program_id(0) // blocks % heads
    window = (tl.program_id(0) // blocks // heads).to(tl.int64)  # offsets between windows can exceed 2^31
    query = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    table = table_ptr + head * (2 * SIDE - 1) * (2 * SIDE - 1) * (2 * SIDE - 1)
    place_q = _place(query, TOKENS, SIDE)[:, None]
    region_q = _region(query, window, n_d, n_h, n_w, WINDOW, SHIFT)[:, None]

    start = window * stride_g + head * stride_h
    q = _load(q_ptr + start, query, stride_n, TOKENS, CHANNELS, BLOCK_C)
    top = tl.full([BLOCK], float("-inf"), tl.float32)  # the largest logit so far of every query
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, TOKENS, STEP):
        key = first + tl.arange(0, STEP)
        k = _load(k_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
        v = _load(v_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        logits += _bias(table, place_q, _place(key, TOKENS, SIDE)[None, :], key[None, :], TOKENS, SIDE)
        if SHIFTED:
            region_k = _region(key, window, n_d, n_h, n_w, WINDOW, SHIFT)[None, :]
            logits += tl.where(region_q == region_k, 0.0, MASKED)
        higher = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher

    out = out_ptr + (window * TOKENS * heads + head) * CHANNELS
    _store(out, mixed / total[:, None], query, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)
    tl.store(lse_ptr + (window * heads + head) * TOKENS + query, top + tl.log2(total), mask=query < TOKENS)


@triton.jit
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_q_ptr, delta_ptr,
    stride_g, stride_h, stride_n, scale, heads, n_d, n_h, n_w,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(TOKENS, BLOCK)
    head = tl.program_id(0) // blocks % heads
    window = (tl.program_id(0) // blocks // heads).to(tl.int64)
    query = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    table = table_ptr + head * (2 * SIDE - 1) * (2 * SIDE - 1) * (2 * SIDE - 1)
    place_q = _place(query, TOKENS, SIDE)[:, None]
    region_q = _region(query, window, n_d, n_h, n_w, WINDOW, SHIFT)[:, None]

    start = window * stride_g + head * stride_h
    result = (window * TOKENS * heads + head) * CHANNELS  # where results of this head start, [G, N, h, d]
    row = (window * heads + head) * TOKENS + query  # [G, h, N]
    q = _load(q_ptr + start, query, stride_n, TOKENS, CHANNELS, BLOCK_C)
    out = _load(out_ptr + result, query, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)
    grad_out = _load(grad_out_ptr + result, query, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=query < TOKENS)
    lse = tl.load(lse_ptr + row, mask=query < TOKENS, other=float("inf"))  # no probability beyond the last query
    grad_q = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, TOKENS, STEP):
        key = first + tl.arange(0, STEP)
        k = _load(k_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
        v = _load(v_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        logits += _bias(table, place_q, _place(key, TOKENS, SIDE)[None, :], key[None, :], TOKENS, SIDE)
        if SHIFTED:
            region_k = _region(key, window, n_d, n_h, n_w, WINDOW, SHIFT)[None, :]
            logits += tl.where(region_q == region_k, 0.0, MASKED)
        p = tl.exp2(logits - lse[:, None])
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        grad_logits = p * (grad_p - delta[:, None])
        grad_q += tl.dot(grad_logits.to(k.dtype), k, input_precision="ieee")
    _store(grad_q_ptr + result, grad_q * scale, query, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)


@triton.jit
def _key_value_gradient_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lse_ptr, delta_ptr, grad_out_ptr, grad_k_ptr, grad_v_ptr,
    stride_g, stride_h, stride_n, scale, heads, n_d, n_h, n_w,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(TOKENS, BLOCK)
    head = tl.program_id(0) // blocks % heads
    window = (tl.program_id(0) // blocks // heads).to(tl.int64)
    key = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    table = table_ptr + head * (2 * SIDE - 1) * (2 * SIDE - 1) * (2 * SIDE - 1)
    place_k = _place(key, TOKENS, SIDE)[:, None]
    region_k = _region(key, window, n_d, n_h, n_w, WINDOW, SHIFT)[:, None]

    start = window * stride_g + head * stride_h
    result = (window * TOKENS * heads + head) * CHANNELS
    row = (window * heads + head) * TOKENS
    k = _load(k_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
    v = _load(v_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
    grad_k = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, TOKENS, STEP):
        query = first + tl.arange(0, STEP)
        q = _load(q_ptr + start, query, stride_n, TOKENS, CHANNELS, BLOCK_C)
        grad_out = _load(grad_out_ptr + result, query, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)
        lse = tl.load(lse_ptr + row + query, mask=query < TOKENS, other=float("inf"))
        delta = tl.load(delta_ptr + row + query, mask=query < TOKENS, other=0.0)
        # Keys are rows here, queries are columns: no product below then needs its left factor turned.
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)
        logits += _bias(table, _place(query, TOKENS, SIDE)[None, :], place_k, key[:, None], TOKENS, SIDE)
        if SHIFTED:
            region_q = _region(query, window, n_d, n_h, n_w, WINDOW, SHIFT)[None, :]
            logits += tl.where(region_q == region_k, 0.0, MASKED)
        p = tl.exp2(logits - lse[None, :])
        grad_v += tl.dot(p.to(grad_out.dtype), grad_out, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        grad_logits = p * (grad_p - delta[None, :])
        grad_k += tl.dot(grad_logits.to(q.dtype), q, input_precision="ieee")
    _store(grad_k_ptr + result, grad_k * scale, key, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)
    _store(grad_v_ptr + result, grad_v, key, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)


@triton.jit
def _table_gradient_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lse_ptr, delta_ptr, grad_out_ptr, grad_table_ptr,
    stride_g, stride_h, stride_n, scale, heads, n_d, n_h, n_w, windows, windows_per_program,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks_q = tl.cdiv(TOKENS, BLOCK)
    blocks_k = tl.cdiv(TOKENS, STEP)
    query = tl.program_id(0) % blocks_q * BLOCK + tl.arange(0, BLOCK)
    key = tl.program_id(0) // blocks_q % blocks_k * STEP + tl.arange(0, STEP)
    head = tl.program_id(0) // (blocks_q * blocks_k) % heads
    first = tl.program_id(0) // (blocks_q * blocks_k) // heads * windows_per_program
    first_row = head * (2 * SIDE - 1) * (2 * SIDE - 1) * (2 * SIDE - 1)
    place_q = _place(query, TOKENS, SIDE)[:, None]
    place_k = _place(key, TOKENS, SIDE)[None, :]
    bias = _bias(table_ptr + first_row, place_q, place_k, key[None, :], TOKENS, SIDE)

    grad_bias = tl.zeros([BLOCK, STEP], tl.float32)
    for number in range(first, tl.minimum(first + windows_per_program, windows)):
        window = tl.cast(number, tl.int64)
        start = window * stride_g + head * stride_h
        result = (window * TOKENS * heads + head) * CHANNELS
        row = (window * heads + head) * TOKENS + query
        q = _load(q_ptr + start, query, stride_n, TOKENS, CHANNELS, BLOCK_C)
        k = _load(k_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
        v = _load(v_ptr + start, key, stride_n, TOKENS, CHANNELS, BLOCK_C)
        grad_out = _load(grad_out_ptr + result, query, heads * CHANNELS, TOKENS, CHANNELS, BLOCK_C)
        lse = tl.load(lse_ptr + row, mask=query < TOKENS, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=query < TOKENS, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) + bias
        if SHIFTED:
            region_q = _region(query, window, n_d, n_h, n_w, WINDOW, SHIFT)[:, None]
            region_k = _region(key, window, n_d, n_h, n_w, WINDOW, SHIFT)[None, :]
            logits += tl.where(region_q == region_k, 0.0, MASKED)
        p = tl.exp2(logits - lse[:, None])
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        grad_bias += p * (grad_p - delta[:, None])
    row = 2 * SIDE - 1
    pair = grad_table_ptr + first_row + place_q - place_k + row * row * row // 2
    inside = (query[:, None] < TOKENS) & (key[None, :] < TOKENS)
    tl.atomic_add(pair, grad_bias, mask=inside, sem="relaxed")


# ---- the operators of torch ----------------------------------------------------------------------------------------


@torch.library.custom_op("swinunetr::window_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor,
    window: list[int], counts: list[int], shift: list[int], window_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out [G, h, N, d] and the logsumexp of every row of logits, float32 [G, h, N], in base 2."""
    q, k, v = _alike(q, k, v)
    out, lse = _empty_like_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    sizes, constants = _sizes(q, window, counts, shift, window_size)
    grid = (triton.cdiv(q.shape[2], constants["BLOCK"]) * q.shape[1] * q.shape[0],)
    with torch.cuda.device_of(q):
        _forward_kernel[grid](q, k, v, _by_head(table), out, lse, *sizes, **constants)
    return out, lse


@torch.library.custom_op("swinunetr::window_attention_gradients", mutates_args=())
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    window: list[int], counts: list[int], shift: list[int], window_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, k and v [G, h, N, d], and delta = sum(out * grad_out, -1), float32 [G, h, N]."""
    q, k, v = _alike(q, k, v)
    grad_q, grad_k, grad_v, delta = *(_empty_like_out(q) for _ in range(3)), torch.empty_like(lse)
    table, out, grad_out = _by_head(table), _by_token(out), _by_token(grad_out)
    sizes, constants = _sizes(q, window, counts, shift, window_size)
    grid = (triton.cdiv(q.shape[2], constants["BLOCK"]) * q.shape[1] * q.shape[0],)
    with torch.cuda.device_of(q):
        _query_gradient_kernel[grid](q, k, v, table, out, lse, grad_out, grad_q, delta, *sizes, **constants)
        _key_value_gradient_kernel[grid](q, k, v, table, lse, delta, grad_out, grad_k, grad_v, *sizes, **constants)
    return grad_q, grad_k, grad_v, delta


@torch.library.custom_op("swinunetr::window_attention_table_gradient", mutates_args=())
def _table_gradient(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lse: Tensor, delta: Tensor, grad_out: Tensor,
    window: list[int], counts: list[int], shift: list[int], window_size: int,
) -> Tensor:  # fmt: skip
    """-> the gradient of the bias table, float32 [T, h]."""
    q, k, v = _alike(q, k, v)
    grad_table = torch.zeros_like(table.t(), dtype=torch.float32, memory_format=torch.contiguous_format)  # [h, T]
    sizes, constants = _sizes(q, window, counts, shift, window_size)
    tiles = triton.cdiv(q.shape[2], constants["BLOCK"]) * triton.cdiv(q.shape[2], constants["STEP"]) * q.shape[1]
    windows_per_program = triton.cdiv(q.shape[0], max(1, TABLE_PROGRAMS // tiles))
    grid = (tiles * triton.cdiv(q.shape[0], windows_per_program),)
    with torch.cuda.device_of(q):
        _table_gradient_kernel[grid](
            q, k, v, _by_head(table), lse, delta, _by_token(grad_out), grad_table,
            *sizes, q.shape[0], windows_per_program, **constants,
        )  # fmt: skip
    return grad_table.t()


@_attention.register_fake
def _(q, k, v, table, window, counts, shift, window_size):
    return _empty_like_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_gradients.register_fake
def _(q, k, v, table, out, lse, grad_out, window, counts, shift, window_size):
    return *(_empty_like_out(q) for _ in range(3)), torch.empty_like(lse)


@_table_gradient.register_fake
def _(q, k, v, table, lse, delta, grad_out, window, counts, shift, window_size):
    return torch.empty_like(table.t(), dtype=torch.float32, memory_format=torch.contiguous_format).t()


def _save(ctx, inputs, output):
    q, k, v, table, *ctx.geometry = inputs
    ctx.save_for_backward(q, k, v, table, *output)


def _backward(ctx, grad_out, _):
    q, k, v, table, out, lse = ctx.saved_tensors
    grad_q, grad_k, grad_v, delta = _gradients(q, k, v, table, out, lse, grad_out, *ctx.geometry)
    grad_table = None
    if ctx.needs_input_grad[3]:
        grad_table = _table_gradient(q, k, v, table, lse, delta, grad_out, *ctx.geometry).to(table.dtype)
    return grad_q, grad_k, grad_v, grad_table, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


# ---- memory layouts ------------------------------------------------------------------------------------------------


def _sizes(q: Tensor, window, counts, shift, window_size):
    """The arguments that end every kernel's list, and its compile-time constants."""
    _, heads, tokens, channels = q.shape
    padded, block_c = (max(16, triton.next_power_of_2(n)) for n in (tokens, channels))  # matrix units take 16 or more
    wide = block_c * q.element_size() > 128  # bytes of a row; then smaller tiles and more threads hold the registers
    constants = {
        "TOKENS": tokens, "CHANNELS": channels, "SIDE": window_size, "WINDOW": tuple(window), "SHIFT": tuple(shift),
        "SHIFTED": any(shift), "BLOCK": min(32 if wide else 64, padded), "STEP": min(32, padded), "BLOCK_C": block_c,
        "num_warps": 8 if wide else 4, "num_stages": 2,
    }  # fmt: skip
    return (*q.stride()[:3], channels**-0.5, heads, *counts), constants


def _alike(q: Tensor, k: Tensor, v: Tensor):
    """q, k, v [G, h, N, d] with the same strides and the channels of a head side by side; copies only if need be."""
    if q.stride() == k.stride() == v.stride() and q.stride(3) == 1:
        return q, k, v
    return _by_token(q), _by_token(k), _by_token(v)


def _by_token(x: Tensor) -> Tensor:
    """[G, h, N, d] in the memory of a [G, N, h, d], as the layer after the attention reads it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like_out(q: Tensor) -> Tensor:
    groups, heads, tokens, channels = q.shape
    return q.new_empty(groups, tokens, heads, channels).transpose(1, 2)


def _by_head(table: Tensor) -> Tensor:
    """The bias table [T, h] -> float32 [h, T] in units of log 2: what one program looks up lies close together."""
    return table.t().float().contiguous() * LOG2_E.value
