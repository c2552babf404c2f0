"""3-D convolutions on a CPU, where torch is slow or wrong.

Slow: torch sends a float32 convolution of one volume with channels x depth x height up to 20,480 to a fallback that is
up to forty times slower (`aten::slow_conv3d`), so a U-Net takes as long at 64^3 as at 96^3. A tensor in oneDNN's own
format is always convolved by oneDNN, and the conversions cost little. The results are the same within float32 rounding.
An exported network contains torch's own operators, because other programs have to run it.

Slow with AVX2 alone: for the weights of a float32 convolution that pads the depth, oneDNN's only gradient unfolds the
volume into columns and takes up to three times as long as the one it has for volumes without such padding: half of the
time of a training step of the U-Net. So slices of zeros are added before it is asked.

Wrong: in bfloat16 the gradient for the weights of a 3x3x3 convolution on a volume of depth 2 is read from memory that
nothing has written (torch 2.13.0). A U-Net at 32^3 and Swin UNETR at 64^3 have such a level; it is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 20_480  # channels x depth x height up to which torch takes its fallback
WRONG_DEPTH = 2  # at which the weight gradient in bfloat16 is wrong
HAS_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked once: torch.compile cannot look into this function


def use_onednn(model: nn.Module) -> nn.Module:
    """The same network, its weights untouched, with our Conv3d and ConvTranspose3d in place of torch's."""
    for module in model.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = Conv3d
        elif type(module) is nn.ConvTranspose3d:
            module.__class__ = ConvTranspose3d
    return model


class Conv3d(nn.Conv3d):
    """nn.Conv3d, through the operator below where torch's own is slow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-3] == WRONG_DEPTH and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(x.float())
        if not (_is_slow_in_torch(x, self) or _has_slow_gradient(x, self)):
            return super().forward(x)
        return convolution(x, self.weight, self.bias, self.stride, self.padding, False, self.output_padding)


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d, with small volumes through oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_slow_in_torch(x, self):
            return super().forward(x)
        return convolution(x, self.weight, self.bias, self.stride, self.padding, True, self.output_padding)


def _is_slow_in_torch(x: Tensor, module) -> bool:
    return _is_small(x) and _can_go_to_onednn(x, module)


def _is_small(x: Tensor) -> bool:
    return x.ndim == 5 and x.shape[0] == 1 and x.shape[:4].numel() <= SMALL


def _has_slow_gradient(x: Tensor, module) -> bool:
    """Not with channels last: there, columns are made so fast that nothing is gained."""
    return (
        HAS_AVX2_ALONE
        and torch.is_grad_enabled()
        and module.weight.requires_grad
        and module.padding[0] != 0
        and x.is_contiguous()
        and _can_go_to_onednn(x, module)
    )


def _can_go_to_onednn(x: Tensor, module) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == module.weight.dtype == torch.float32
        and x.ndim == 5
        and module.groups == 1
        and module.dilation == (1, 1, 1)
        and not isinstance(module.padding, str)
        and HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


@torch.library.custom_op("brats::convolution", mutates_args=())
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    transposed: bool,
    output_padding: list[int],
) -> Tensor:
    """A 3-D convolution of x [B, I, D, H, W], or a transposed one, by oneDNN: [B, O, D', H', W'] in the layout of x."""
    result = torch.ops.aten.convolution(
        _to_onednn(x), weight, bias, stride, padding, [1, 1, 1], transposed, output_padding, 1
    )
    return _dense(result).contiguous(memory_format=_layout(x))


@torch.library.custom_op("brats::convolution_gradients", mutates_args=())
def _gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    transposed: bool,
    output_padding: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, weight and bias; empty tensors where they are not `wanted`."""
    channels = weight.shape[1 if transposed else 0]

    def backward(x, padding, wanted):
        rest = (stride, padding, [1, 1, 1], transposed, output_padding, 1, wanted)
        return torch.ops.aten.convolution_backward(gradient, _to_onednn(x), weight, [channels], *rest)

    if HAS_AVX2_ALONE and padding[0] and wanted[1] and not transposed:
        for_x = backward(x, padding, [wanted[0], False, False])[0]
        padded = F.pad(x.contiguous(), (0, 0, 0, 0, padding[0], padding[0]))
        _, for_weight, for_bias = backward(padded, [0, *padding[1:]], [False, *wanted[1:]])
    else:
        for_x, for_weight, for_bias = backward(x, padding, wanted)
    for_x, for_weight, for_bias = (
        weight.new_empty(0) if one is None else _dense(one) for one in (for_x, for_weight, for_bias)
    )
    return for_x.contiguous(memory_format=_layout(x)) if wanted[0] else for_x, for_weight.contiguous(), for_bias


def _to_onednn(x: Tensor) -> Tensor:
    """x in oneDNN's own format where torch would not take oneDNN otherwise."""
    return x.to_mkldnn() if _is_small(x) else x


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_mkldnn else x


@convolution.register_fake
def _(x, weight, bias, stride, padding, transposed, output_padding):
    result = torch.ops.aten.convolution(x, weight, bias, stride, padding, [1, 1, 1], transposed, output_padding, 1)
    return result.contiguous(memory_format=_layout(x))


@_gradients.register_fake
def _(gradient, x, weight, stride, padding, transposed, output_padding, wanted):
    channels = weight.shape[1 if transposed else 0]
    for_x = torch.empty_like(x, memory_format=_layout(x)) if wanted[0] else weight.new_empty(0)
    for_weight = weight.new_empty(weight.shape if wanted[1] else 0)
    return for_x, for_weight, weight.new_empty(channels if wanted[2] else 0)


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.settings = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient):
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    gradients = _gradients(gradient, *ctx.saved_tensors, *ctx.settings, wanted)
    return *(one if want else None for one, want in zip(gradients, wanted, strict=True)), None, None, None, None


convolution.register_autograd(_backward, setup_context=_setup_context)


def _layout(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if is_channels_last else torch.contiguous_format
