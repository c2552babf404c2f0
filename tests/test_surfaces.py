"""Surfaces and their distances, against brute force, scipy's distance transform, MONAI and hand-computed cases."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, distance_transform_edt

from models.surfaces import border_voxels, hd95, larger_hd95, nearest_voxels, surface_dice, surfaces

UNEQUAL_MM = np.array([0.7, 1.1, 2.0])


def blobs(seed: int, shape=(20, 22, 18)) -> np.ndarray:
    """A ragged mask, bool, that leaves a margin of two voxels."""
    random = np.random.RandomState(seed)
    grid = np.indices(shape)
    mask = np.zeros(shape, bool)
    for _ in range(4):
        center = random.randint(6, np.array(shape) - 6)
        mask |= sum((line - middle) ** 2 for line, middle in zip(grid, center, strict=True)) < random.randint(5, 20)
    return mask & (random.random_sample(shape) > 0.1)


def test_the_border_is_what_an_erosion_takes_away_and_the_array_ends_there():
    mask = blobs(0)[4:, :12]
    assert mask[0].any() or mask[:, -1].any()
    assert np.array_equal(border_voxels(mask), np.argwhere(mask & ~binary_erosion(mask)))
    assert len(border_voxels(np.ones((3, 3, 3), bool))) == 26


def test_distances_are_those_of_brute_force():
    ours, theirs = surfaces(blobs(1), blobs(2), UNEQUAL_MM)
    offsets = (ours.voxels[:, None] - theirs.voxels) * UNEQUAL_MM  # [n, m, 3]
    distances = np.sqrt((offsets**2).sum(axis=2))
    assert np.allclose(ours.distance_mm, distances.min(axis=1), rtol=0, atol=1e-12)
    assert np.allclose(theirs.distance_mm, distances.min(axis=0), rtol=0, atol=1e-12)
    assert np.allclose(ours.distance_mm, distances[np.arange(len(distances)), ours.nearest], rtol=0, atol=1e-12)


def test_distances_are_those_of_a_distance_transform():
    predicted, true = blobs(3), blobs(4)
    border = np.zeros_like(true)
    border[tuple(border_voxels(true).T)] = True
    expected = distance_transform_edt(~border, sampling=UNEQUAL_MM)
    ours, _ = surfaces(predicted, true, UNEQUAL_MM)
    assert np.allclose(ours.distance_mm, expected[tuple(ours.voxels.T)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("radius", [1, 9])  # few voxels are looked for one by one, many all at once
def test_distances_to_what_is_far_are_those_of_brute_force(radius):
    grid = np.indices((80, 21, 21))
    balls = [(grid[0] - x) ** 2 + (grid[1] - 10) ** 2 + (grid[2] - 10) ** 2 <= radius**2 for x in (12, 65)]
    ours, theirs = surfaces(*balls, UNEQUAL_MM)
    offsets = (ours.voxels[:, None] - theirs.voxels) * UNEQUAL_MM  # [n, m, 3]
    distances = np.sqrt((offsets**2).sum(axis=2))
    assert np.allclose(ours.distance_mm, distances.min(axis=1), rtol=0, atol=1e-12)
    assert np.allclose(theirs.distance_mm, distances.min(axis=0), rtol=0, atol=1e-12)


def test_what_is_not_there_is_infinitely_far():
    ours, theirs = surfaces(blobs(0), np.zeros((20, 22, 18), bool), UNEQUAL_MM)
    assert np.isinf(ours.distance_mm).all() and not len(theirs.distance_mm)


def test_a_step_of_a_voxel_is_no_more_than_the_size_of_a_voxel():
    rows = [np.argwhere(np.ones((200, 1, 1))) + step for step in ((0, 0, 0), (0, 1, 0))]
    distance, _ = nearest_voxels(*rows, np.array([0.9, 0.9, 0.9]))
    assert set(distance) == {0.9}


def test_hand_computed_summaries():
    near, far = np.array([0.0, 0.0, 0.0, 2.0]), np.array([1.0, 4.0])
    assert surface_dice(near, far, 1.0) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert surface_dice(near, far, 0.0) == pytest.approx((3 / 4 + 0) / 2)
    assert hd95(near, far) == pytest.approx(2 + 0.75 * 2)  # of 0 0 0 1 2 4: three quarters of the way from 2 to 4
    assert larger_hd95(near, far) == pytest.approx(1 + 0.95 * 3)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), UNEQUAL_MM])
def test_the_larger_percentile_is_that_of_monai(spacing_mm):
    predicted, true = blobs(5), blobs(6)
    distances = [surface.distance_mm for surface in surfaces(predicted, true, np.array(spacing_mm))]
    theirs = compute_hausdorff_distance(*tensors(predicted, true), percentile=95, spacing=tuple(spacing_mm))
    assert larger_hd95(*distances) == pytest.approx(theirs.item(), abs=1e-5)


def test_surface_dice_is_that_of_monai_where_the_surfaces_are_equally_large():
    true = blobs(7)
    predicted = np.roll(true, 1, axis=2)
    distances = [surface.distance_mm for surface in surfaces(predicted, true, UNEQUAL_MM)]
    for tolerance_mm in (0.7, 1.1, 2.0):
        monai = compute_surface_dice(*tensors(predicted, true), [tolerance_mm + 1e-6], spacing=tuple(UNEQUAL_MM))
        assert surface_dice(*distances, tolerance_mm) == pytest.approx(monai.item(), abs=1e-6)


def test_monai_counts_the_border_voxels_of_both_surfaces_together():
    predicted, true = blobs(7), blobs(8)
    distances = [surface.distance_mm for surface in surfaces(predicted, true, UNEQUAL_MM)]
    monai = compute_surface_dice(*tensors(predicted, true), [1.5], spacing=tuple(UNEQUAL_MM))
    assert (np.concatenate(distances) <= 1.5).mean() == pytest.approx(monai.item(), abs=1e-6)


def tensors(*masks) -> list[torch.Tensor]:
    """One-hot [1, 2, X, Y, Z] of each mask."""
    return [torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32)) for mask in masks]
