"""Where patches are cut, against MONAI's crops and by hand."""

import random

import numpy as np
import pytest
import torch
from monai.transforms import SpatialCrop, SpatialPad
from monai.transforms.utils import correct_crop_centers

from models import patches
from models.patches import crop, cut_patches, random_box, tumour_voxels

SHAPE = (40, 50, 45)
NOWHERE = torch.empty(0, 3, dtype=torch.int16)


def boxes(tumour, side=16, count=2000, shape=SHAPE):
    generator = random.Random(0)
    return [random_box(shape, tumour, side, generator) for _ in range(count)]


def label_with(*voxels):
    label = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    for voxel in voxels:
        label[(0, *voxel)] = 2
    return label


def test_one_patch_in_two_lies_around_a_tumour_voxel():
    voxels = [(20, 25, 30), (12, 12, 12), (30, 40, 20)]
    middles = [tuple(low + 8 for low, _ in box) for box in boxes(tumour_voxels(label_with(*voxels)))]
    found = [middles.count(voxel) / len(middles) for voxel in voxels]
    assert sum(found) == pytest.approx(0.5, abs=0.03)
    assert found == pytest.approx([1 / 6] * 3, abs=0.03)


def test_without_tumour_a_patch_lies_anywhere_in_the_case():
    drawn = boxes(NOWHERE)
    for axis, count in enumerate(SHAPE):
        lows = [box[axis][0] for box in drawn]
        assert set(lows) == set(range(count - 16 + 1))
        assert np.mean(lows) == pytest.approx((count - 16) / 2, rel=0.05)
    assert {high - low for box in drawn for low, high in box} == {16}


@pytest.mark.parametrize("voxel", [(0, 0, 0), (39, 3, 44), (20, 49, 7), (8, 25, 37)])
def test_around_a_voxel_a_patch_is_the_one_that_monai_cuts_at_the_border_too(monkeypatch, voxel):
    monkeypatch.setattr(patches, "TUMOUR_SHARE", 1)
    image = torch.rand(4, *SHAPE)
    (box,) = boxes(torch.tensor([voxel], dtype=torch.int16), count=1)
    centre = correct_crop_centers(list(voxel), (16,) * 3, SHAPE)
    expected = SpatialCrop(roi_center=centre, roi_size=(16,) * 3)(image).as_tensor()
    assert torch.equal(crop(image, box), expected)


@pytest.mark.parametrize("side", [42, 48, 64])
def test_a_case_that_is_smaller_lies_in_the_middle_of_background_as_monai_pads_it(side):
    image = torch.rand(4, *SHAPE)
    (box,) = boxes(NOWHERE, side, 1)
    padded = SpatialPad((side,) * 3)(image)
    for axis, count in enumerate(SHAPE, start=1):
        if count > side:
            padded = padded.narrow(axis, box[axis - 1][0], side)
    assert torch.equal(crop(image, box), padded.as_tensor())


def test_a_label_keeps_its_type_where_it_is_padded():
    part = crop(label_with((0, 0, 0)), [(-1, 3), (0, 4), (-2, 2)])
    assert part.dtype == torch.uint8 and part.shape == (1, 4, 4, 4)
    assert part.nonzero().tolist() == [[0, 1, 0, 2]]


def test_of_a_large_tumour_voxels_all_over_it_are_kept():
    label = torch.zeros(1, *SHAPE, dtype=torch.long)
    label[:, 5:35, 10:40, 5:40] = 3
    voxels = tumour_voxels(label).long()
    assert 900 <= len(voxels) <= 1000
    assert (label[0][tuple(voxels.T)] == 3).all()
    middle, extent = voxels.double().mean(0), voxels.amax(0) - voxels.amin(0)
    assert torch.allclose(middle, torch.tensor([19.5, 24.5, 22.0]).double(), atol=1)
    assert (extent >= torch.tensor([29, 29, 30])).all()


def test_an_epoch_repeats_its_patches_and_another_has_others():
    outlines = [(torch.Size(SHAPE), tumour_voxels(label_with((9, 9, 9)))), (torch.Size(SHAPE), NOWHERE)] * 5
    order = [3, 1, 4, 0, 2]
    cut = cut_patches(order, outlines, 16, "0-7")
    assert [index for index, _ in cut] == order
    assert cut == cut_patches(order, outlines, 16, "0-7") != cut_patches(order, outlines, 16, "0-8")
