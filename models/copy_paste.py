"""The tumour of one patient pasted into the brain of another, as in CarveMix (Zhang et al., arXiv:2108.06883) and in
TumorCP (Yang et al. 2021), for few cases. The tumour is cut out by its mask and pasted as it is; nothing is blended."""

from collections.abc import Sequence

import torch
from torch import Tensor

INSIDE = 0.9  # least share of a tumour that has to lie in the brain; what does not is left out
TRIES = 10  # places


def paste_tumours(
    images: list[Tensor], labels: list[Tensor], cases: Sequence, probability: float, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Images [4, D, H, W] and labels [1, D, H, W]; with this probability each is a copy into which the tumour of a
    random one of `cases` (image and label by index) has been pasted."""
    pasted = []
    for image, label in zip(images, labels, strict=True):
        if torch.rand((), generator=generator) < probability:
            donor = cases[int(torch.randint(len(cases), (), generator=generator))]
            image, label = paste_tumour(image, label, *(part.to(image.device) for part in donor), generator)
        pasted.append((image, label))
    images, labels = zip(*pasted, strict=True)
    return list(images), list(labels)


def paste_tumour(
    image: Tensor, label: Tensor, donor_image: Tensor, donor_label: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A case with the tumour of a donor, mirrored at random: at the donor's place if that is within the brain, else at
    a random place that is. The case itself if the donor has no tumour or none of TRIES places is suitable."""
    box = _bounding_box(donor_label[0])
    if box is None or any(high - low > side for (low, high), side in zip(box, label.shape[1:], strict=True)):
        return image, label
    inside = (slice(None), *(slice(low, high) for low, high in box))
    mirrored = [axis for axis in (1, 2, 3) if torch.rand((), generator=generator) < 0.5]
    tumour_image, tumour_label = (part[inside].flip(mirrored) for part in (donor_image, donor_label))
    mask = tumour_label != 0  # [1, d, h, w]
    for attempt in range(TRIES):
        corner = [low for low, _ in box]
        if attempt or label.shape != donor_label.shape:
            corner = [int(torch.randint(side - length + 1, (), generator=generator))
                      for side, length in zip(label.shape[1:], mask.shape[1:], strict=True)]  # fmt: skip
        place = (slice(None), *(slice(low, low + length) for low, length in zip(corner, mask.shape[1:], strict=True)))
        in_brain = mask & (image[place] != 0).any(0)
        if in_brain.sum() >= INSIDE * mask.sum():  # on a GPU this waits for it
            image, label = image.clone(), label.clone()
            image[place] = torch.where(in_brain, tumour_image, image[place])
            label[place] = torch.where(in_brain, tumour_label, label[place])
            break
    return image, label


def _bounding_box(label: Tensor) -> list[tuple[int, int]] | None:
    """[low, high) along each axis of what is not 0 in [D, H, W]; None where all is."""
    box = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        occupied = (label != 0).sum(others).nonzero().flatten().tolist()
        if not occupied:
            return None
        box.append((occupied[0], occupied[-1] + 1))
    return box
