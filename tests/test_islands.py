"""Islands of a prediction, by hand-made maps."""

import torch

from models.inference.islands import without_islands

NCR, ED, ET = 1, 2, 3


def head(*parts):
    """A label map [8, 8, 8] of boxes: corner, sides, label. A later one covers those before it."""
    label = torch.zeros(8, 8, 8, dtype=torch.uint8)
    for corner, sides, value in parts:
        label[tuple(slice(low, low + side) for low, side in zip(corner, sides, strict=True))] = value
    return label


OEDEMA = (0, 0, 0), (4, 4, 4), ED  # 64 voxels
CORE = (0, 0, 0), (2, 2, 2), NCR  # 8 of them


def test_parts_of_the_tumour_below_a_share_of_the_largest_become_background():
    far, near = ((6, 0, 6), (1, 1, 1), ET), ((6, 6, 0), (2, 2, 2), ED)  # 1 and 8 voxels
    label = head(OEDEMA, far, near)
    assert torch.equal(without_islands(label, 0.1), head(OEDEMA, near))
    assert torch.equal(without_islands(label, 0.13), head(OEDEMA))


def test_a_part_of_just_the_share_stays_and_a_share_of_0_changes_nothing():
    label = head(OEDEMA, ((6, 6, 0), (2, 2, 2), ED), ((7, 0, 7), (1, 1, 1), NCR))
    assert torch.equal(without_islands(label, 0.125), head(OEDEMA, ((6, 6, 0), (2, 2, 2), ED)))
    assert torch.equal(without_islands(label, 0), label)


def test_islands_of_the_core_become_oedema():
    label = head(OEDEMA, CORE, ((3, 3, 3), (1, 1, 1), ET), ((3, 0, 0), (1, 1, 2), NCR))  # 1 and 2 voxels, of 8
    assert torch.equal(without_islands(label, 0.2), head(OEDEMA, CORE, ((3, 0, 0), (1, 1, 2), NCR)))
    assert torch.equal(without_islands(label, 0.3), head(OEDEMA, CORE))


def test_islands_of_enhancing_tumour_within_the_core_become_ncr():
    whole = (0, 0, 0), (4, 4, 4), NCR
    label = head(whole, ((0, 0, 0), (1, 4, 1), ET), ((3, 3, 3), (1, 1, 1), ET))
    assert torch.equal(without_islands(label, 0.5), head(whole, ((0, 0, 0), (1, 4, 1), ET)))


def test_parts_that_touch_at_a_corner_are_one():
    label = head(OEDEMA, ((4, 4, 4), (1, 1, 1), ED))
    assert torch.equal(without_islands(label, 1.0), label)


def test_parts_of_the_same_size_are_all_the_largest():
    label = head(CORE, ((4, 4, 4), (2, 2, 2), NCR))
    assert torch.equal(without_islands(label, 1.0), label)


def test_a_head_without_a_tumour_stays_without_one():
    label = without_islands(head(), 0.5)
    assert label.dtype == torch.uint8 and not label.any()
