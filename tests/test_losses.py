"""What a network's outputs mean: four channels of labels, or three of regions."""

import numpy as np
import pytest
import torch
from conftest import LPS
from monai.losses import DiceLoss

from models.losses import (
    labels_from_logits,
    make_loss,
    probabilities_from_logits,
    region_masks,
    region_probabilities,
    with_labels,
)
from models.preprocessing import label_map, native_label_map, to_native, to_network

# Voxels of each training label in turn, and in which of TC, WT, ET they are.
LABELS = torch.tensor([0, 1, 2, 3])
REGIONS = torch.tensor([[0.0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]])  # [TC, WT, ET]


def random_logits(channels, seed=0):
    return 3 * torch.randn(2, channels, 5, 6, 7, generator=torch.Generator().manual_seed(seed))


def random_labels(seed=1):
    return torch.randint(4, (2, 1, 5, 6, 7), generator=torch.Generator().manual_seed(seed))


def test_the_regions_of_each_label():
    assert torch.equal(region_masks(LABELS[None, None])[0], REGIONS)


def test_labels_and_their_regions_are_turned_into_each_other():
    assert torch.equal(label_map(REGIONS), LABELS.to(torch.uint8))


@pytest.mark.parametrize(
    ("tc", "wt", "et", "label"),
    [
        (0.5, 0.5, 0.5, 0),  # more than half is needed
        (0.1, 0.6, 0.2, 2),
        (0.6, 0.9, 0.4, 1),
        (0.6, 0.9, 0.51, 3),
        (0.2, 0.9, 0.8, 3),  # ET overrides, though it is not in a core
        (0.7, 0.1, 0.1, 1),  # nor is every core in a tumour
    ],
)
def test_regions_are_decided_from_the_outside_to_the_inside(tc, wt, et, label):
    assert label_map(torch.tensor([tc, wt, et])).item() == label


def test_of_four_channels_the_largest_decides_and_of_three_every_positive_one():
    logits = random_logits(4)
    assert torch.equal(labels_from_logits(logits).long(), logits.argmax(1))
    tc, wt, et = (random_logits(3) > 0).numpy().swapaxes(0, 1)
    expected = np.where(et, 3, np.where(tc, 1, np.where(wt, 2, 0)))
    assert np.array_equal(labels_from_logits(random_logits(3)).numpy(), expected)


def test_probabilities_of_labels_sum_to_1_and_those_of_regions_need_not():
    half = random_logits(4).bfloat16()
    assert probabilities_from_logits(half).dtype == torch.float32
    assert torch.allclose(probabilities_from_logits(half).sum(1), torch.ones(2, 5, 6, 7))
    logits = random_logits(3)
    assert torch.allclose(probabilities_from_logits(logits), 1 / (1 + torch.exp(-logits)))


def test_the_probability_of_a_region_is_the_sum_of_its_labels():
    classes = torch.tensor([0.1, 0.2, 0.3, 0.4])  # background, NCR, ED, ET
    assert torch.allclose(region_probabilities(classes), torch.tensor([0.6, 0.9, 0.4]))
    regions = torch.tensor([0.7, 0.2, 0.6])
    assert torch.equal(region_probabilities(regions), regions)


def test_the_loss_of_regions_is_dice_of_regions_and_labels_plus_binary_cross_entropy():
    logits, label = random_logits(3), random_labels()
    voxels = label[:, 0].numpy()
    parts = ((1, 3), (1, 2, 3), (3,), (1,), (2,))  # TC, WT, ET, NCR, ED
    masks = np.stack([np.isin(voxels, values) for values in parts], 1)  # [B, 5, D, H, W]
    p = 1 / (1 + np.exp(-logits.numpy().astype(float)))
    cross_entropy = -np.mean(np.where(masks[:, :3], np.log(p), np.log(1 - p)))
    tc, wt, et = p.swapaxes(0, 1)
    predicted = np.stack((tc, wt, et, tc * (1 - et), wt * (1 - tc)), 1)
    dice = DiceLoss()(torch.from_numpy(predicted), torch.from_numpy(masks).double()).item()
    assert make_loss()(logits, label).item() == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_a_core_that_is_all_enhancing_costs_more_where_it_hides_necrosis():
    """Of regions alone, ET over the whole core would cost the network the Dice of ET and nothing else."""
    label = torch.zeros(1, 1, 8, 8, 8, dtype=torch.long)
    label[..., 2:6, 2:6, 2:6] = 3
    label[..., 3:5, 3:5, 3:5] = 1  # a ring of ET around NCR
    truth = region_masks(label)
    filled = truth.clone()
    filled[:, 2] = truth[:, 0]  # ET = TC
    of_regions = [DiceLoss()(masks, truth).item() for masks in (truth, filled)]
    with_ncr = [DiceLoss()(with_labels(masks), with_labels(truth)).item() for masks in (truth, filled)]
    assert with_ncr[0] == pytest.approx(0, abs=1e-4)
    assert with_ncr[1] > 4 * (of_regions[1] - of_regions[0])


def test_the_loss_of_labels_is_dice_of_the_tumour_plus_cross_entropy():
    logits, label = random_logits(4), random_labels()
    onehot = torch.nn.functional.one_hot(label[:, 0], 4).movedim(-1, 1).float()
    dice = DiceLoss(include_background=False, softmax=True)(logits, onehot)
    cross_entropy = torch.nn.functional.cross_entropy(logits, label[:, 0])
    assert make_loss()(logits, label).item() == pytest.approx((dice + cross_entropy).item(), rel=1e-5)


def test_regions_come_back_to_the_original_grid_as_probabilities_and_are_decided_there():
    image = np.random.default_rng(0).uniform(1, 2, (4, 30, 28, 26)).astype(np.float32)
    geometry = to_network(image, None, LPS, 16)["geometry"]
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 16),) * 3, indexing="ij"))
    distance = np.sqrt((grid**2).sum(0))
    probabilities = torch.from_numpy(np.stack([1 - distance, 1.2 - distance, 0.8 - distance]).clip(0, 1)).float()
    tc, wt, et = to_native(probabilities, geometry).numpy() > 0.5
    expected = np.where(et, 3, np.where(tc, 1, np.where(wt, 2, 0)))
    assert len(np.unique(expected)) == 4
    assert np.array_equal(native_label_map(probabilities, geometry).numpy(), expected)
