"""Small convolutions through oneDNN: the numbers of torch's own, forward and backward, in float64 as the oracle."""

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from models import build_model, onednn
from models.onednn import SMALL, convolution, use_onednn

CASES = [  # input shape, output channels, kernel, stride, transposed, bias
    ((1, 4, 16, 16, 16), 8, 3, 2, False, True),
    ((1, 16, 8, 10, 12), 16, 3, 1, False, False),
    ((1, 16, 8, 8, 8), 4, 1, 1, False, True),
    ((1, 8, 6, 6, 6), 4, 3, 2, True, True),
    ((1, 8, 6, 5, 4), 4, 2, 2, True, False),
]


def layer(channels, out, kernel, stride, transposed, bias):
    if transposed:
        return nn.ConvTranspose3d(channels, out, kernel, stride, kernel // 2, kernel % 2, bias=bias)
    return nn.Conv3d(channels, out, kernel, stride, kernel // 2, bias=bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("shape", "out", "kernel", "stride", "transposed", "bias"), CASES)
def test_values_and_gradients_are_those_of_torch_in_float64(shape, out, kernel, stride, transposed, bias, layout):
    check_against_float64(shape, out, kernel, stride, transposed, bias, layout)


@pytest.mark.parametrize(("shape", "stride"), [((1, 4, 80, 72, 6), 1), ((2, 8, 9, 8, 10), 1), ((2, 4, 8, 10, 12), 2)])
def test_large_volumes_and_batches_too_where_there_is_avx2_alone(monkeypatch, shape, stride):
    monkeypatch.setattr(onednn, "HAS_AVX2_ALONE", True)
    assert not onednn._is_small(torch.empty(shape))
    check_against_float64(shape, 8, 3, stride, False, True, torch.contiguous_format)


def check_against_float64(shape, out, kernel, stride, transposed, bias, layout):
    torch.manual_seed(0)
    module = use_onednn(layer(shape[1], out, kernel, stride, transposed, bias))
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    result = module(x)
    assert "brats" in result.grad_fn.name()  # it did take the other way
    assert result.is_contiguous(memory_format=layout)
    gradient = torch.randn_like(result)
    found = torch.autograd.grad(result, [x, *module.parameters()], gradient)
    exact = layer(shape[1], out, kernel, stride, transposed, bias).double()
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    x64 = x.detach().double().requires_grad_()
    result64 = exact(x64)
    wanted = torch.autograd.grad(result64, [x64, *exact.parameters()], gradient.double())
    for one, other in zip((result, *found), (result64, *wanted), strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


def test_the_operator_keeps_the_rules_that_a_compiler_relies_on():
    x, weight = torch.randn(1, 4, 6, 6, 6, requires_grad=True), torch.randn(8, 4, 3, 3, 3, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    torch.library.opcheck(convolution, (x, weight, bias, [1] * 3, [1] * 3, False, [0] * 3))


def test_the_weight_gradient_under_autocast_is_right_at_depth_2():
    torch.manual_seed(0)
    module = use_onednn(nn.Conv3d(32, 32, 3, padding=1))
    x, gradient = torch.randn(1, 32, 2, 2, 2), torch.randn(1, 32, 2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x)
    (found,) = torch.autograd.grad(result, module.weight, gradient.to(result.dtype))
    exact = torch.nn.grad.conv3d_weight(x.double(), module.weight.shape, gradient.double(), padding=1)
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_what_torch_does_fast_is_left_to_it(monkeypatch):
    monkeypatch.setattr(onednn, "HAS_AVX2_ALONE", False)
    module = use_onednn(nn.Conv3d(4, 4, 3, padding=1))
    large = torch.rand(1, 4, 96, 96, 8)
    assert large.shape[:4].numel() > SMALL
    for x in (large, torch.rand(2, 4, 8, 8, 8)):
        assert "brats" not in module(x).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.rand(1, 4, 8, 8, 8)).dtype is torch.bfloat16
    monkeypatch.setattr(onednn, "HAS_AVX2_ALONE", True)
    assert "brats" not in module(large.contiguous(memory_format=torch.channels_last_3d)).grad_fn.name()
    with torch.inference_mode():
        assert not onednn._has_slow_gradient(large, module)


def test_an_exported_network_holds_torchs_own_operators_only():
    program = torch.export.export(build_model("unet").eval(), (torch.rand(1, 4, 32, 32, 32),))
    assert not [node for node in program.graph.nodes if "brats" in str(node.target)]


def test_networks_are_built_with_it_and_keep_the_names_of_their_weights():
    model = build_model("unet")
    assert any(type(module).__module__ == "models.onednn" for module in model.modules())
    original = UNet(3, 4, 4, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)
    model.load_state_dict(original.state_dict(), strict=True)
