"""Patches: the cubes that a training cuts from cases that are larger, or that differ in size.

Where a patch is cut follows from a seed alone, so a resumed epoch repeats it. No more of a case on disk is read.
"""

import random

import torch

TUMOUR_SHARE = 0.5  # of the patches is cut around a tumour voxel
MAX_TUMOUR_VOXELS = 1000  # of a case, to choose from: all would take 400 MB for the thousand cases of BraTS


def tumour_voxels(label: torch.Tensor) -> torch.Tensor:
    """Where tumour is in a label [1, D, H, W]: indices int16 [N, 3], thinned out evenly to MAX_TUMOUR_VOXELS."""
    found = label[0].nonzero()
    return found[:: max(1, -(-len(found) // MAX_TUMOUR_VOXELS))].short().cpu()


def random_box(shape: torch.Size, tumour: torch.Tensor, side: int, generator: random.Random) -> list[tuple[int, int]]:
    """[low, high) along each axis of a random cube in a case [D, H, W]. If the case has tumour voxels [N, 3], one of
    them is at the centre of a TUMOUR_SHARE of the cubes, or as near to it as the border allows. Along an axis on which
    the case is smaller than the cube, it lies in the middle of it."""
    middle = None
    if generator.random() < TUMOUR_SHARE and len(tumour):
        middle = tumour[generator.randrange(len(tumour))].tolist()
    box = []
    for axis, count in enumerate(shape):
        room = count - side
        if room < 0:
            low = -(-room // 2)
        elif middle is None:
            low = generator.randint(0, room)
        else:
            low = min(max(middle[axis] - side // 2, 0), room)
        box.append((low, low + side))
    return box


def cut_patches(order: list[int], outlines: list[tuple], side: int, seed: str) -> list[tuple[int, list]]:
    """A patch of each case of an epoch, as (index, box) in the order given; `outlines` as dataset.Cases has them."""
    generator = random.Random(seed)
    return [(index, random_box(*outlines[index], side, generator)) for index in order]


def crop(volume: torch.Tensor, box: list[tuple[int, int]]) -> torch.Tensor:
    """The voxels [low, high) along each axis of [C, D, H, W], and background where the box reaches outside. A view,
    where it does not."""
    inside = volume[(slice(None), *(slice(max(0, low), high) for low, high in box))]
    outside = [(max(0, -low), max(0, high - count)) for (low, high), count in zip(box, volume.shape[1:], strict=True)]
    if not any(map(any, outside)):
        return inside
    return torch.nn.functional.pad(inside, [count for pair in reversed(outside) for count in pair])
