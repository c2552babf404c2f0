"""Augmentation moves image and label together."""

import numpy as np
import pytest
import torch
from scipy import stats

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


@pytest.mark.parametrize(("image_type", "label_type"), [(torch.float16, torch.uint8), (torch.float32, torch.int64)])
def test_stored_cases_become_a_batch_that_moved_as_numpy_moves_it(image_type, label_type):
    """For every drawn motion, numpy's flips and rot90 of the case as float32 and int64."""
    seen = set()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        images = [torch.rand(4, 6, 6, 6).to(image_type) for _ in range(2)]
        labels = [torch.randint(4, (1, 6, 6, 6)).to(label_type) for _ in range(2)]
        motions = torch.Generator().manual_seed(seed)
        got_image, got_label = augment(images, labels, generator, noise_probability=0)
        assert got_image.dtype == torch.float32 and got_label.dtype == torch.int64
        order, backwards = _flips_and_rotation((6, 6, 6), motions, 0.5, 0.5)
        seen.add((*order, *backwards))
        for got, given in ((got_image[0], images[0].float()), (got_label[0], labels[0].long())):
            expected = np.flip(given.numpy().transpose(0, *(1 + axis for axis in order)), [1 + a for a in backwards])
            assert np.array_equal(got.numpy(), expected)
    assert len(seen) > 24


def test_a_batch_can_be_written_over_an_earlier_one_and_a_shorter_into_its_beginning():
    image, label = batch()
    fresh = augment(image[:1], label[:1], torch.Generator().manual_seed(3), noise_probability=1)
    earlier = augment(image, label, torch.Generator().manual_seed(2))
    again = augment(image[:1], label[:1], torch.Generator().manual_seed(3), noise_probability=1, out=earlier)
    assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])
    assert again[0].data_ptr() == earlier[0].data_ptr()


def test_the_noise_is_gaussian_and_differs_from_channel_to_channel():
    image, label = torch.zeros(1, 4, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32, dtype=torch.long)
    noise = augment(image, label, torch.Generator().manual_seed(0), 0, 0, noise_probability=1, noise_sd=0.1)[0][0]
    channels = noise.reshape(4, -1).double().numpy()
    assert all(stats.kstest(channel, "norm", (0, 0.1)).pvalue > 0.001 for channel in channels)
    assert np.abs(np.corrcoef(channels) - np.eye(4)).max() < 0.03
