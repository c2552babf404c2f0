"""Counted arithmetic and memory, against counts by hand and MONAI's network."""

import pytest
import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from torch import nn

from models import build_model, cost

BF16 = torch.bfloat16


def test_macs_of_a_convolution_are_those_counted_by_hand():
    network = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(6, 5, 1))
    assert cost.forward_macs(network, (2, 4, 8, 8, 8)) == 2 * 8**3 * (4 * 6 * 27 + 6 * 5)


def test_macs_are_those_of_monai():
    ours, theirs = build_model("swinunetr", feature_size=12), MonaiSwinUNETR(4, 4, feature_size=12)
    shape = (1, 4, 64, 64, 64)
    assert cost.forward_macs(ours, shape) == cost.forward_macs(theirs, shape)


def test_live_memory_follows_tensors_until_they_are_freed():
    with cost.LiveMemory() as live:
        a = torch.empty(1000, device="meta")
        b = a * 2  # 8000 bytes at once
        del a
        c = b.view(10, 100).add_(1)  # a view and an operation in place take nothing
        assert live.now == 4000
        del b, c
    assert live.now == 0 and live.peak == 8000


def test_a_step_holds_weights_gradients_and_two_moments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1_000_000))  # 4 MB beside an image of 64 kB

        def forward(self, image):
            return image * self.weight.mean()

    peak = cost.training_peak_gib(Scaled(), (1, 4, 16, 16, 16), None) * cost.GIB
    assert 4 * 4e6 < peak < 6.1 * 4e6  # the update itself makes two copies


def test_types_are_those_of_autocast_and_a_weight_is_cast_once():
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            y = self.linear(self.linear(x))
            seen.extend([y.dtype, self.norm(y).dtype, y.softmax(-1).dtype, (y @ y.transpose(-1, -2)).dtype])
            return y

    probe = Probe().to("meta")
    cost._run_as_on_cuda(probe, BF16)
    with cost.LiveMemory() as live:
        probe(torch.empty(1, 8, device="meta"))
    assert seen == [BF16, torch.float32, torch.float32, BF16]
    assert live.now == 0  # the casts go when the pass ends


@pytest.mark.parametrize(("checkpointing", "limit_gib"), [("none", 7.0), ("blocks", 4.5), ("full", 4.5)])
def test_the_network_of_the_paper_trains_on_a_small_gpu(checkpointing, limit_gib):
    """bf16 AMP, AdamW, batch 1, 128^3, feature size 48: MONAI's network needs more than 11 GiB."""
    model = build_model("swinunetr", checkpointing=checkpointing)
    assert 2 < cost.training_peak_gib(model, (1, 4, 128, 128, 128), BF16) < limit_gib


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_count_is_what_a_gpu_measures(checkpointing):
    from tests.benchmarks.swinunetr_memory import measured_peak_gib

    model = build_model("swinunetr", feature_size=24, checkpointing=checkpointing)
    counted = cost.training_peak_gib(model, (1, 4, 96, 96, 96), BF16)
    assert measured_peak_gib(model, 96, BF16) == pytest.approx(counted, rel=0.25)
