"""Swin UNETR against MONAI's, which shares its parameters."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from monai.networks.nets.swin_unetr import PatchMergingV2

from models import build_model, size_multiple
from models.errors import InputError
from models.swinunetr import DEFAULTS, blocked_attention
from models.swinunetr.convolutions import instance_norm
from models.swinunetr.network import SwinUNETR, drop_path
from models.swinunetr.window_attention import WindowAttention, mask_groups

TINY = {"feature_size": 12, "window_size": 4, "depths": (1, 2, 1, 1), "num_heads": (3, 3, 3, 3)}


def pair(feature_size=12, window_size=7, seed=0, **config):
    """MONAI's network and ours with the same weights; position biases large enough to matter."""
    torch.manual_seed(seed)
    shared = {"feature_size": feature_size, "window_size": window_size}
    theirs = MonaiSwinUNETR(in_channels=4, out_channels=config.get("out_channels", 4), **shared)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ours = SwinUNETR(**shared, **config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def merge_as_before_1_5(network):
    """MONAI's network with the patch merging of its earlier versions: two neighbours are taken twice, two never."""
    picked = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)]

    class Legacy(PatchMergingV2):
        def forward(self, x):
            return self.reduction(self.norm(torch.cat([x[:, d::2, h::2, w::2] for d, h, w in picked], -1)))

    for module in network.modules():
        if isinstance(module, PatchMergingV2):
            module.__class__ = Legacy


@pytest.mark.parametrize(
    ("feature_size", "window_size", "batch", "shape"),
    [
        (12, 7, 2, (32, 64, 64)),  # token grids of 16 x 32 x 32 (padded to 21 x 35 x 35) down to 2 x 4 x 4
        (12, 8, 1, (64, 32, 32)),  # 32 x 16 x 16 without padding, then windows that shrink along some axes or all
        (24, 7, 1, (32, 64, 32)),
    ],
)
def test_outputs_are_those_of_monai(feature_size, window_size, batch, shape):
    theirs, _ = pair(feature_size, window_size)
    image = torch.randn(batch, 4, *shape)
    with torch.inference_mode():
        expected = theirs(image)
        for attention in ("reference", "sdpa", "auto"):
            _, ours = pair(feature_size, window_size, attention=attention)
            assert (ours(image) - expected).abs().max() < 1e-4
            assert (ours(image) - expected).abs().max() < 1e-4  # from cached biases


@pytest.mark.parametrize(("checkpointing", "attention"), [("none", "sdpa"), ("blocks", "auto"), ("full", "reference")])
def test_gradients_are_those_of_monai(checkpointing, attention):
    models = pair(window_size=5, checkpointing=checkpointing, attention=attention)
    theirs, ours = (model.double().train() for model in models)
    image = torch.randn(1, 4, 64, 32, 32, dtype=torch.float64)
    weight = torch.randn(1, 4, 64, 32, 32, dtype=torch.float64)
    for model in (theirs, ours):
        (model(image) * weight).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("windows_at_once", [1, 2, 5])
def test_attention_part_by_part_has_the_values_and_gradients_of_the_formula(windows_at_once, monkeypatch):
    heads, tokens = 2, 6
    monkeypatch.setattr(blocked_attention, "LOGITS_AT_ONCE", windows_at_once * heads * tokens**2)
    q, k, v = torch.randn(3, 5, tokens, heads, 4, dtype=torch.float64).transpose(2, 3).unbind()  # strided, as in use
    bias = torch.randn(1, heads, tokens, tokens, dtype=torch.float64)
    expected = (q @ k.mT / 2 + bias).softmax(-1) @ v
    torch.testing.assert_close(blocked_attention.blocked_attention(q, k, v, bias), expected)
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    assert torch.autograd.gradcheck(blocked_attention.blocked_attention, inputs)
    torch.library.opcheck(blocked_attention.blocked_attention, inputs)  # what torch.compile is told of it is so


def test_attention_in_half_precision_rounds_only_its_result():
    q, k, v = torch.randn(3, 4, 2, 9, 8).bfloat16().unbind()
    bias = torch.randn(1, 2, 9, 9)
    expected = (q.double() @ k.double().mT * 8**-0.5 + bias).softmax(-1) @ v.double()
    actual = blocked_attention.blocked_attention(q, k, v, bias)
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=8e-3, atol=1e-5)  # one step of bf16


def test_the_attention_of_a_network_can_be_changed():
    theirs, ours = pair()
    image = torch.randn(1, 4, 32, 64, 32)
    with torch.inference_mode():
        expected = theirs(image)
        for kind in ("reference", "sdpa", "auto"):
            ours.set_attention(kind)
            assert {block.attention for block in ours.modules() if isinstance(block, WindowAttention)} == {kind}
            assert (ours(image) - expected).abs().max() < 1e-4


def test_every_block_takes_the_kernels_and_gives_them_back(monkeypatch):
    """Stand-ins for the Triton kernels, which count how often they are called."""
    called = []
    kernels = SimpleNamespace(window_attention=lambda q, *_: called.append("attention") or q,
                              instance_norm_leaky_relu=lambda x, *_: called.append("norm") or x)  # fmt: skip
    for name in ("triton_attention", "triton_norm"):
        monkeypatch.setitem(sys.modules, f"models.swinunetr.{name}", kernels)
    network, image = SwinUNETR(**TINY).eval(), torch.randn(1, 4, 32, 32, 64)
    network.set_kernels("triton")
    with torch.inference_mode():
        network(image)
        # 5 encoders and 5 decoders have a residual block each, which norms twice (the shortcut with the second)
        assert called.count("attention") == sum(TINY["depths"]) and called.count("norm") == 2 * (5 + 5)
        called.clear()
        network.set_kernels("torch")
        network(image)
    assert not called


def test_training_and_inference_agree():
    _, ours = pair()
    image = torch.randn(2, 4, 32, 64, 32)
    with torch.no_grad():
        expected = ours(image)
    assert (ours.train()(image) - expected).abs().max() < 1e-4


def test_the_cached_bias_follows_its_parameter():
    theirs, ours = pair()
    image = torch.randn(1, 4, 64, 32, 32)
    with torch.inference_mode():
        before = ours(image)
    with torch.no_grad():
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                if name.endswith("bias_table"):
                    parameter.mul_(-2)
        assert (ours(image) - before).abs().max() > 1e-3
        assert (ours(image) - theirs(image)).abs().max() < 1e-4
        assert (copy.deepcopy(ours)(image) - theirs(image)).abs().max() < 1e-4
        ours.train().eval()
        assert (ours.double()(image.double()) - theirs.double()(image.double())).abs().max() < 1e-9


def test_no_bias_is_larger_than_one_mask_and_rows_are_aligned():
    attention = WindowAttention(12, 3, window_size=7, shifted=True).eval()
    biases = attention._biases((7, 7, 7), (3, 3, 3), (9, 9, 9), torch.float32)
    assert len(biases) == len(mask_groups((9, 9, 9), (3, 3, 3))) == 8
    for bias in biases:
        assert bias.shape == (1, 3, 343, 343)
        assert bias.stride(2) % 16 == 0 and bias.stride(3) == 1


def test_legacy_merging_takes_two_neighbours_twice():
    theirs, ours = pair(legacy_merging=True)
    image = torch.randn(1, 4, 32, 32, 64)
    with torch.inference_mode():
        assert (ours(image) - theirs(image)).abs().max() > 1e-3
        merge_as_before_1_5(theirs)
        assert (ours(image) - theirs(image)).abs().max() < 1e-4


def v2_pair(drop_path=0.0, **config):
    """MONAI's V2 and ours with the same weights."""
    torch.manual_seed(0)
    theirs = MonaiSwinUNETR(4, 4, feature_size=12, use_v2=True, dropout_path_rate=drop_path)
    ours = SwinUNETR(feature_size=12, v2=True, drop_path=drop_path, **config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


def test_v2_is_that_of_monai():
    theirs, ours = (model.eval() for model in v2_pair())
    image = torch.randn(1, 4, 32, 64, 32)
    with torch.inference_mode():
        assert (ours(image) - theirs(image)).abs().max() < 1e-4


@pytest.mark.slow
def test_gradients_of_v2_with_dropped_branches_are_those_of_monai():
    """Both draw the branches that they leave out in the same order from the same generator; the rates are eighths,
    which float32, in which MONAI keeps them, has exactly. Computing activations again draws nothing anew."""
    theirs, ours = (model.double().train() for model in v2_pair(0.875, checkpointing="full"))
    image, weight = torch.randn(2, 2, 4, 32, 64, 32, dtype=torch.float64)
    for model in (theirs, ours):
        torch.manual_seed(5)
        (model(image) * weight).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-8, msg=name)


def test_a_dropped_branch_keeps_its_mean():
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 1, 1, 1, 1), 0.3).flatten()
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean() == pytest.approx(1, abs=0.03)


def test_without_attention_no_token_sees_another_in_a_block():
    stage = SwinUNETR(**TINY, use_attention=False).swinViT.layers1[0]
    tokens = torch.randn(1, 4, 4, 4, 12)
    changed = tokens.clone()
    changed[0, 1, 2, 3] += 1
    block = stage.blocks[0]
    moved = (block(changed) != block(tokens)).any(-1)[0].nonzero()
    assert moved.tolist() == [[1, 2, 3]]
    assert not [name for name in block.state_dict() if "attn" in name or "norm1" in name]


def test_impossible_settings_and_sides_are_refused():
    with pytest.raises(InputError, match=r"In place of 100, 96 or 128 would do"):
        SwinUNETR(**TINY)(torch.zeros(1, 4, 96, 100, 96))
    with pytest.raises(InputError, match=r"In place of 20, 32 would do"):
        SwinUNETR(**TINY)(torch.zeros(1, 4, 20, 32, 32))
    with pytest.raises(InputError, match="attention 'flash': must be one of reference, sdpa, auto"):
        SwinUNETR(**TINY).set_attention("flash")
    with pytest.raises(InputError, match="kernels 'cuda': must be one of torch, triton"):
        SwinUNETR(**TINY).set_kernels("cuda")
    for bad in ({"feature_size": 20}, {"attention": "flash"}, {"checkpointing": "all"}, {"depths": (2, 2)},
                {"num_heads": (5, 6, 12, 24)}, {"window_size": 1}, {"drop_path": 1.0}):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(bad))):
            SwinUNETR(**(TINY | bad))


def test_it_is_built_by_name_with_the_defaults():
    model = build_model("swinunetr", **TINY)
    assert model.config == DEFAULTS | TINY and size_multiple("swinunetr") == 32
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model("swinunetr").parameters())
    assert parameters == 62_191_990


@pytest.mark.parametrize("checkpointing", ["none", "full"])  # full includes blocks
@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_into_one_graph(checkpointing, training):
    torch._dynamo.reset()
    model = SwinUNETR(**TINY, checkpointing=checkpointing).train(training)
    image = torch.randn(1, 4, 32, 32, 64)
    with torch.set_grad_enabled(training):
        expected = model(image)
        actual = torch.compile(model, backend="aot_eager", fullgraph=True)(image)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if training:
            actual.sum().backward()


def test_it_can_be_exported():
    model, image = SwinUNETR(**TINY).eval(), torch.randn(1, 4, 32, 32, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (image,)).module()
        torch.testing.assert_close(exported(image), model(image), rtol=1e-4, atol=1e-4)


def test_half_precision_and_a_bottleneck_of_one_voxel():
    model, image = SwinUNETR(**TINY), torch.randn(1, 4, 32, 32, 32)
    for training in (True, False):
        model.train(training)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            assert torch.isfinite(model(image)).all()
        assert torch.isfinite(model(image)).all()


def test_instance_norm_is_exact_where_the_mean_is_large():
    x = (torch.randn(2, 3, 8, 8, 8) + 1000).contiguous(memory_format=torch.channels_last_3d)
    expected = torch.nn.functional.instance_norm(x.double(), eps=1e-5).float()
    torch.testing.assert_close(instance_norm(x), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(instance_norm(x.clone()), expected, rtol=1e-3, atol=1e-3)


def test_the_norm_of_a_training_and_its_gradient_are_those_of_float64_where_the_mean_is_large():
    torch.manual_seed(0)
    x = (torch.randn(2, 12, 8, 8, 8) + 300).contiguous(memory_format=torch.channels_last_3d)
    gradient = torch.randn_like(x)
    found, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
    result, exact = instance_norm(found), torch.nn.functional.instance_norm(wanted, eps=1e-5)
    result.backward(gradient)
    exact.backward(gradient.double())
    for one, other in ((result, exact), (found.grad, wanted.grad)):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


def test_monai_is_not_needed():
    code = "import sys; sys.modules['monai'] = None; from models import build_model; build_model('swinunetr')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
