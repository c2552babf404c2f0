"""Attention for the CPU: a few windows at a time, so that their logits never leave the processor's cache.

The logits of all windows of a block are hundreds of megabytes, written and read several times by the written-out
formula. Here each part of them is made, used and overwritten within a few megabytes; the backward pass makes it again.
Products with a narrow side (4 to 16 channels per head) are computed transposed, [d, N] in place of [N, d], which BLAS
does several times faster.

As custom operators they are single steps to torch.compile, which would unroll the loop over the parts.

Letters in shape comments: G windows, g windows of one part, h heads, N tokens per window, d channels per head.
"""

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**20  # two workspaces of 4 MiB in float32


@torch.library.custom_op("swinunetr::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q, k, v [G, h, N, d] and bias [1, h, N, N], with gradients for all four.

    Half-precision inputs are computed in float32: only the results are rounded.
    """
    mixed = _transposed_like(q, torch.promote_types(q.dtype, torch.float32))
    for part, q_part, k_part, v_part, workspace in _parts(q, k, v):
        weights = _weights(q_part, k_part, bias, workspace)
        torch.bmm(v_part.mT, weights.mT, out=mixed[part].flatten(0, 1))
    return mixed.mT.to(q.dtype)


@torch.library.custom_op("swinunetr::blocked_attention_gradients", mutates_args=())
def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (_transposed_like(q, dtype) for _ in range(3))
    grad_bias = torch.zeros_like(bias, dtype=dtype)
    for part, q_part, k_part, v_part, workspace in _parts(q, k, v):
        weights = _weights(q_part, k_part, bias, workspace)  # [g h, N, N]
        grad_out = gradient[part].flatten(0, 1).to(dtype)  # [g h, N, d]
        torch.bmm(grad_out.mT, weights, out=grad_v[part].flatten(0, 1))
        # The softmax's gradient: weights * (grad - the mean of grad under these weights), which is out . grad_out.
        mixed = torch.bmm(v_part.mT, weights.mT)  # [g h, d, N]
        mean = (mixed * grad_out.mT).sum(1)[..., None]  # [g h, N, 1]
        grad_logits = torch.bmm(grad_out, v_part.mT, out=workspace[0][: len(weights)]).sub_(mean).mul_(weights)
        grad_bias += grad_logits.view(-1, *bias.shape[1:]).sum(0)
        torch.bmm(k_part.mT, grad_logits.mT, out=grad_q[part].flatten(0, 1))
        torch.bmm(q_part.mT, grad_logits, out=grad_k[part].flatten(0, 1))
    grad_q *= q.shape[-1] ** -0.5  # q_part carries this factor, so grad_k has it already
    return grad_q.mT.to(q.dtype), grad_k.mT.to(k.dtype), grad_v.mT.to(v.dtype), grad_bias.to(bias.dtype)


@blocked_attention.register_fake
def _(q, k, v, bias):
    return _transposed_like(q, q.dtype).mT


@_gradients.register_fake
def _(gradient, q, k, v, bias):
    return *(_transposed_like(q, x.dtype).mT for x in (q, k, v)), torch.empty_like(bias)


blocked_attention.register_autograd(
    lambda ctx, gradient: _gradients(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _transposed_like(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Unfilled [G, h, d, N] for q [G, h, N, d]."""
    return q.new_empty((*q.shape[:2], q.shape[3], q.shape[2]), dtype=dtype)


def _parts(q: Tensor, k: Tensor, v: Tensor):
    """Yield (slice of the windows; q / sqrt(d), k and v of these windows [g h, N, d]; workspace [2, g h, N, N])."""
    count, heads, tokens, channels = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    step = min(count, max(1, LOGITS_AT_ONCE // (heads * tokens**2)))
    workspace = q.new_empty((2, step * heads, tokens, tokens), dtype=dtype)
    for start in range(0, count, step):
        part = slice(start, start + step)
        parts = (x[part].flatten(0, 1).to(dtype) for x in (q, k, v))
        q_part, k_part, v_part = parts
        yield part, q_part * channels**-0.5, k_part, v_part, workspace


def _weights(q: Tensor, k: Tensor, bias: Tensor, workspace: Tensor) -> Tensor:
    """The attention weights [g h, N, N], in the second half of the workspace."""
    logits, weights = workspace[:, : len(q)]
    torch.bmm(q, k.mT, out=logits)
    logits.view(-1, *bias.shape[1:]).add_(bias)
    return torch.softmax(logits, -1, out=weights)
