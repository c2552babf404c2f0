"""Augmentation moves image and label together."""

import pytest
import torch

from models.augment import _flips_and_rotation, augment


def batch(shape=(8, 8, 8), count=2):
    label = torch.arange(count * shape[0] * shape[1] * shape[2]).reshape(count, 1, *shape)
    return label.repeat(1, 4, 1, 1, 1).float(), label


def apply(volume, order, backwards):
    return volume.permute(order).flip(backwards)


def every_motion():
    """The 24 x 2 results of flips and rotations, from torch.rot90 and torch.flip."""
    cube = torch.arange(27).reshape(3, 3, 3)
    seen = set()
    for axes in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        for plane in ((0, 1), (0, 2), (1, 2)):
            for quarters in range(4):
                seen.add(tuple(torch.rot90(cube.flip(axes), quarters, plane).flatten().tolist()))
    return cube, seen


def test_every_drawn_motion_is_a_flip_followed_by_a_90_degree_rotation():
    cube, possible = every_motion()
    generator = torch.Generator().manual_seed(0)
    drawn = set()
    for _ in range(600):
        order, backwards = _flips_and_rotation(cube.shape, generator, 0.5, 0.5)
        drawn.add(tuple(apply(cube, order, backwards).flatten().tolist()))
    assert drawn == possible


def test_image_and_label_move_together():
    image, label = batch()
    moved, moved_label = augment(image, label, torch.Generator().manual_seed(1), noise_probability=0)
    assert torch.equal(moved[:, :1].long(), moved_label)
    assert not torch.equal(moved_label, label)


def test_flip_probability_is_per_axis():
    generator = torch.Generator().manual_seed(0)
    flips = torch.zeros(3)
    for _ in range(2000):
        for axis in _flips_and_rotation((8, 8, 8), generator, 0.5, 0)[1]:
            flips[axis] += 1
    assert torch.allclose(flips / 2000, torch.full((3,), 0.5), atol=0.05)


def test_noise_has_the_given_sd_and_leaves_the_label_alone():
    image, label = torch.zeros(1, 4, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32, dtype=torch.long)
    noisy, same = augment(image, label, torch.Generator().manual_seed(0), 0, 0, noise_probability=1, noise_sd=0.1)
    assert noisy.std() == pytest.approx(0.1, rel=0.02) and noisy.mean() == pytest.approx(0, abs=0.002)
    assert torch.equal(same, label)


def test_nothing_happens_at_probability_zero_and_the_input_is_left_alone():
    image, label = batch()
    before = image.clone()
    same, same_label = augment(image, label, torch.Generator().manual_seed(0), 0, 0, 0)
    assert torch.equal(same, image) and torch.equal(same_label, label)
    augment(image, label, torch.Generator().manual_seed(0), 1, 1, 1)
    assert torch.equal(image, before)


def test_the_same_generator_state_gives_the_same_batch():
    image, label = batch()
    first = augment(image, label, torch.Generator().manual_seed(5), noise_probability=1)
    second = augment(image, label, torch.Generator().manual_seed(5), noise_probability=1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_volume_that_is_no_cube_keeps_its_shape():
    image, label = batch((4, 6, 8))
    for seed in range(20):
        moved, _ = augment(image, label, torch.Generator().manual_seed(seed), 0.5, 1, 0)
        assert moved.shape == image.shape
