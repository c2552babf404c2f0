"""U-Nets with a level at full resolution: against MONAI's DynUNet, which is one of them."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from monai.networks.nets import DynUNet

from models import build_model, refuse_unfit_size
from models.cost import forward_macs, parameter_count
from models.errors import InputError
from models.unet.network import SpaceToDepth, _upsampling

SMALL = {"channels": (4, 6, 8), "convolutions": (1, 2, 2)}
VARIANTS = [
    {"variant": "full-resolution"},
    {"variant": "full-resolution", "residual": True, "upsampling": "trilinear"},
    {"variant": "space-to-depth", "residual": True},
]
IMAGE = (1, 4, 16, 16, 32)


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model("unet", **(SMALL | settings))


NAMES_IN_MONAI = [  # of four levels
    ("input_block", "encoder.0"), ("downsamples.0", "encoder.1"), ("downsamples.1", "encoder.2"),
    ("bottleneck", "encoder.3"), *((f"upsamples.{i}.conv_block", f"decoder.{i}") for i in range(3)),
    *((f"upsamples.{i}.transp_conv.conv", f"up.{i}") for i in range(3)), ("output_block.conv.conv", "head"),
    *((f".conv{i + 1}.conv", f".convolutions.{i}") for i in range(2)),
    *((f".norm{i + 1}", f".norms.{i}") for i in range(2)),
]  # fmt: skip


def monai_twin(channels):
    """DynUNet of four levels, which has two plain convolutions in every block, and ours with its weights."""
    torch.manual_seed(0)
    instance_norm = ("INSTANCE", {"affine": True})
    theirs = DynUNet(3, 4, 4, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=channels, norm_name=instance_norm)
    for name, parameter in theirs.named_parameters():
        if "norm" in name:  # as trained: neither ones nor zeros
            torch.nn.init.normal_(parameter, 1, 0.5)
    ours, state = build_model("unet", variant="full-resolution", channels=channels, convolutions=[2] * 4), {}
    for name, value in theirs.state_dict().items():
        if "skip_layers" not in name:  # the same weights under other names
            for old, new in NAMES_IN_MONAI:
                name = name.replace(old, new)
            state[name] = value
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def test_values_and_gradients_are_those_of_monais_dynunet():
    theirs, ours = (model.double() for model in monai_twin([4, 6, 8, 10]))
    image, weight = torch.randn(2, *IMAGE[1:], dtype=torch.float64), torch.randn(2, *IMAGE[1:], dtype=torch.float64)
    gradients = []
    for model in (theirs, ours):
        x = image.clone().requires_grad_()
        result = model(x)
        (result * weight).sum().backward()
        gradients.append((result, x.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_residual_block_adds_its_input_before_the_last_relu():
    block = small(variant="full-resolution", residual=True).double().encoder[1]
    x = torch.randn(1, 4, 8, 8, 8, dtype=torch.float64)
    first, second = block.convolutions
    y = F.leaky_relu(F.instance_norm(F.conv3d(x, first.weight, stride=2, padding=1)), 0.01)
    y = F.instance_norm(F.conv3d(y, second.weight, padding=1))
    shortcut = F.instance_norm(F.conv3d(F.avg_pool3d(x, 2), block.shortcut[1].weight))
    torch.testing.assert_close(block(x), F.leaky_relu(y + shortcut, 0.01))


def test_space_to_depth_keeps_every_voxel():
    x = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(SpaceToDepth()(x), rearrange(x, "b c (d p) (h q) (w r) -> b (p q r c) d h w", p=2, q=2, r=2))


def test_trilinear_upsampling_is_that_of_the_convolved_large_volume():
    x, up = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64), _upsampling("trilinear", 4, 2).double()
    large = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    torch.testing.assert_close(up(x), F.conv3d(large, up[0].weight))


def test_the_image_itself_joins_the_decoder_at_full_resolution_after_space_to_depth():
    model, image, seen = small(variant="space-to-depth"), torch.randn(IMAGE), []
    for block in (model.encoder[1][1], model.decoder[-1]):
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(image)
    assert torch.equal(seen[0], SpaceToDepth()(image)) and torch.equal(seen[1][:, SMALL["channels"][0] :], image)


@pytest.mark.parametrize("settings", VARIANTS)
def test_it_compiles_into_one_graph_and_can_be_exported(settings):
    torch._dynamo.reset()
    model, image = small(**settings).eval(), torch.randn(IMAGE)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(image)
        torch.testing.assert_close(compiled, expected)
        program = torch.export.export(model, (image,))
        torch.testing.assert_close(program.module()(image), expected, rtol=1e-4, atol=1e-5)
    assert not [node for node in program.graph.nodes if "brats" in str(node.target)]


@pytest.mark.parametrize("settings", VARIANTS)
def test_it_trains_in_bfloat16(settings):
    model = small(**settings)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(IMAGE))
    logits.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_parameters_and_macs_are_those_counted_by_hand():
    model = build_model("unet", variant="space-to-depth", channels=(2, 3), convolutions=(1, 2))
    voxels, half = 16 * 16 * 32, 16 * 16 * 32 // 8
    weights = {"encoder": 27 * (32 * 3 + 3 * 3), "up": 8 * 3 * 2, "decoder": 27 * (2 + 4) * 2, "head": 2 * 4}
    biases_and_norms = 4 + 2 * (3 + 3 + 2)
    assert parameter_count(model) == sum(weights.values()) + biases_and_norms
    macs = half * weights["encoder"] + half * weights["up"] + voxels * (weights["decoder"] + weights["head"])
    assert forward_macs(model, IMAGE) == macs


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"variant": "half-resolution"}, "variant 'half-resolution': must be one of"),
        ({"variant": "full-resolution", "channels": (4,)}, "2 to 5 levels"),
        ({"variant": "full-resolution", "channels": (4, 8)}, "one number for each of the 2 levels"),
        ({"variant": "full-resolution", "upsampling": "nearest"}, "upsampling 'nearest'"),
        ({"variant": "full-resolution", "num_res_units": 1}, "num_res_units 1: the variant 'full-resolution'"),
        ({"residual": True}, "residual True: the variant 'monai'"),
        ({"channels": (4, 8)}, "this U-Net has 5 levels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        build_model("unet", **settings)


def test_a_volume_of_one_voxel_at_the_coarsest_level_is_refused():
    settings = {"variant": "full-resolution", "channels": [4, 8, 8, 8], "convolutions": [1, 1, 1, 1]}
    refuse_unfit_size("unet", settings, [16] * 3, "DATA")
    with pytest.raises(InputError, match="coarsest level"):
        refuse_unfit_size("unet", settings | {"channels": [4] * 5}, [16] * 3, "DATA")


def test_settings_of_a_checkpoint_from_before_the_variants_still_build_the_baseline():
    old = {"in_channels": 4, "out_channels": 4, "channels": [4, 8, 8, 8, 8], "strides": [2, 2, 2, 2]}
    assert type(build_model("unet", **old, num_res_units=2)).__module__.startswith("monai")
