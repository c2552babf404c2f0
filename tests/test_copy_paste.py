"""The tumour of one case in another: what numpy would put where."""

import numpy as np
import pytest
import torch

from models.copy_paste import paste_tumour, paste_tumours

SHAPE = (12, 10, 8)
TUMOUR = (slice(3, 6), slice(2, 4), slice(5, 6))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(seed=0, brain=(slice(None),) * 3, tumour=None):
    """An image with no other 0 than outside the brain, and labels of 1 to 3 in the tumour."""
    rng = np.random.default_rng(seed)
    image, label = np.zeros((4, *SHAPE)), np.zeros((1, *SHAPE), np.uint8)
    image[(slice(None), *brain)] = rng.uniform(0.1, 1, image[(slice(None), *brain)].shape)
    if tumour:
        label[(0, *tumour)] = rng.integers(1, 4, label[(0, *tumour)].shape)
    return torch.from_numpy(image).half(), torch.from_numpy(label)


def voxels(image, label):
    """The tumour's voxels as a sorted list of (label, four intensities)."""
    inside = label[0] > 0
    return sorted(zip(label[0][inside].tolist(), *(channel[inside].tolist() for channel in image), strict=True))


def mirrored(volume, box, axes):
    """What stands in the box, in a copy of the volume, backwards along these of its three axes."""
    result, inside = volume.numpy().copy(), (slice(None), *box)
    result[inside] = np.flip(result[inside], [1 + axis for axis in axes])
    return result


@pytest.mark.parametrize("seed", range(8))
def test_the_tumour_comes_to_its_own_place_mirrored_at_random(seed):
    (image, label), (donor_image, donor_label) = case(1), case(2, tumour=TUMOUR)
    pasted_image, pasted_label = paste_tumour(image, label, donor_image, donor_label, generator(seed))
    draws = generator(seed)
    axes = [axis for axis in range(3) if torch.rand((), generator=draws) < 0.5]
    expected_label = mirrored(donor_label, TUMOUR, axes)
    assert np.array_equal(pasted_label, expected_label)
    assert np.array_equal(pasted_image, np.where(expected_label, mirrored(donor_image, TUMOUR, axes), image))


def test_a_tumour_outside_of_the_brain_goes_to_another_place_whole():
    brain = (slice(0, 12), slice(5, 10), slice(0, 5))
    (image, label), donor = case(1, brain), case(2, tumour=TUMOUR)
    places = set()
    for seed in range(20):
        pasted_image, pasted_label = paste_tumour(image, label, *donor, generator(seed))
        assert voxels(pasted_image, pasted_label) in ([], voxels(*donor))
        assert not pasted_label[0][(image == 0).all(0)].any()
        places.add(tuple(map(tuple, pasted_label[0].nonzero().tolist())))
    assert len(places) > 5


def test_without_room_or_a_tumour_the_case_stays_as_it_is():
    image, label = case(1, (slice(0, 1),) * 3)
    for donor in (case(2, tumour=TUMOUR), case(2)):
        assert paste_tumour(image, label, *donor, generator()) == (image, label)
    small = image[:, :2], label[:, :2]  # a patch that is smaller than the tumour
    assert paste_tumour(*small, *case(2, tumour=TUMOUR), generator()) == small


def test_a_tumour_of_its_own_stays_beside_the_new_one():
    own = (slice(8, 11), slice(6, 9), slice(0, 3))
    (image, label), donor = case(1, tumour=own), case(2, tumour=TUMOUR)
    pasted_image, pasted_label = paste_tumour(image, label, *donor, generator())
    assert voxels(pasted_image, pasted_label) == sorted(voxels(image, label) + voxels(*donor))


def test_a_batch_is_pasted_into_as_often_as_asked_and_its_cases_are_left_alone():
    image, label = case(1)
    before, cases = image.clone(), [case(seed, tumour=TUMOUR) for seed in (2, 3, 4)]
    images, labels = paste_tumours([image] * 400, [label] * 400, cases, 0.3, generator())
    share = sum(bool(one.any()) for one in labels) / 400
    assert abs(share - 0.3) < 0.07
    assert torch.equal(image, before) and not label.any()
    donors = {tuple(voxels(*pair)) for pair in zip(images, labels, strict=True)} - {()}
    assert donors == {tuple(voxels(*one)) for one in cases}
    again = paste_tumours([image] * 400, [label] * 400, cases, 0.3, generator())[0]
    assert all(torch.equal(one, other) for one, other in zip(images, again, strict=True))
