"""Islands of a prediction, by hand-made maps."""

import torch

from models.inference.islands import without_islands


def head(*parts):
    """A label map [6, 6, 6] with single voxels set: (position, label)."""
    label = torch.zeros(6, 6, 6, dtype=torch.uint8)
    for position, value in parts:
        label[position] = value
    return label


TUMOUR = [((0, 0, 0), 1), ((1, 1, 1), 2), ((1, 1, 2), 3), ((1, 2, 2), 2)]  # joined by a corner, labels mixed
PAIR = [((4, 4, 4), 2), ((4, 4, 5), 3)]
VOXEL = [((4, 0, 5), 3)]


def test_parts_below_a_share_of_the_largest_become_background():
    label = head(*TUMOUR, *PAIR, *VOXEL)
    assert torch.equal(without_islands(label, 0.3), head(*TUMOUR, *PAIR))  # 1 of 4 voxels
    assert torch.equal(without_islands(label, 0.51), head(*TUMOUR))
    assert torch.equal(without_islands(label, 1.0), head(*TUMOUR))


def test_a_part_of_just_the_share_stays():
    label = head(*TUMOUR, *PAIR, *VOXEL)
    assert torch.equal(without_islands(label, 0.25), label) and torch.equal(without_islands(label, 0), label)


def test_parts_of_the_same_size_are_all_the_largest():
    label = head(*PAIR, ((0, 0, 0), 1), ((0, 0, 1), 1))
    assert torch.equal(without_islands(label, 1.0), label)


def test_a_head_without_a_tumour_stays_without_one():
    label = without_islands(head(), 0.5)
    assert label.dtype == torch.uint8 and not label.any()
