"""Batched augmentation on the training device: flips, 90-degree rotations, Gaussian noise; more if it is strong.

Decisions are drawn on the CPU, so nothing waits for the device. The flips and the rotation of a case together are one
permutation of the axes and one set of reversed axes: a case is read once, as it is stored, and written once, in the
types that the network and the loss take.
"""

from collections.abc import Sequence

import torch

from models.augment_strong import change_intensities, draw_intensities, draw_warp, resample


def augment(
    images: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    generator: torch.Generator,
    flip_probability: float = 0.5,
    rotate_probability: float = 0.5,
    noise_probability: float = 0.2,
    noise_sd: float = 0.1,
    strong: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B images [4, D, H, W] and labels [1, D, H, W] of any type, moved together, as float32 [B, 4, D, H, W] and int64
    [B, 1, D, H, W]; `generator` is a CPU generator.

    Each axis is flipped with `flip_probability`; with `rotate_probability` the case turns by 90, 180 or 270 degrees in
    a random plane (180 only, where the plane is not square); noise is added to the image alone. With `strong`,
    cases are also warped and their intensities changed, as models/augment_strong.py says, and the background stays 0.
    `out` is an earlier result that may be overwritten: on a CPU new memory for every batch costs more than flips do.
    """
    count, shape, device = len(images), images[0].shape[1:], images[0].device
    if out is None or len(out[0]) < count:
        out = (torch.empty(count, len(images[0]), *shape, device=device),
               torch.empty(count, 1, *shape, dtype=torch.long, device=device))  # fmt: skip
    image_batch, label_batch = (batch[:count] for batch in out)
    threads = torch.get_num_threads()
    # Many short operations: threads would wait for one another longer than they work.
    few = 1 if device.type == "cpu" else threads
    torch.set_num_threads(few)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        order, backwards = _flips_and_rotation(shape, generator, flip_probability, rotate_probability)
        warp = draw_warp(generator) if strong else None
        if warp:
            torch.set_num_threads(threads)  # a long operation
            resample(image, label, warp, order, backwards, image_batch[index], label_batch[index])
            torch.set_num_threads(few)
        else:
            # Volume by volume [D, H, W]: what lies between reading and writing stays small.
            for source, target in zip((*image, *label), (*image_batch[index], *label_batch[index]), strict=True):
                _copy_moved(source, target, order, backwards)
        if strong:
            foreground = image_batch[index] != 0
            change_intensities(image_batch[index], draw_intensities(len(image), generator))
        if _chance(noise_probability, generator):
            _add_noise(image_batch[index], noise_sd, generator)
        if strong:
            image_batch[index] *= foreground
    torch.set_num_threads(threads)
    return image_batch, label_batch


def _copy_moved(source, target, order, backwards):
    """Write `source` into `target`, [D, H, W] both: the axes in the new order, then some of them backwards."""
    # The processor's vector instructions reverse integers of 16 bits, but not halves.
    moved = source.view(torch.int16) if source.dtype is torch.half else source
    if backwards:
        moved = moved.flip([order[axis] for axis in backwards])
    if order == [2, 1, 0]:
        # By neighbours: to read the slowest axis as the fastest takes four times as long.
        moved = moved.transpose(0, 1).contiguous().transpose(1, 2).contiguous().transpose(0, 1)
    else:
        moved = moved.permute(order)
    target.copy_(moved.view(source.dtype))


def _add_noise(image, sd, generator):
    """Add Gaussian noise to an image [4, D, H, W] in place, on its own device and volume by volume."""
    seed = int(torch.randint(2**31, (), generator=generator))
    noise = torch.Generator(image.device).manual_seed(seed)
    for volume in image:
        volume += torch.empty_like(volume).normal_(0, sd, generator=noise)


def _flips_and_rotation(shape, generator, flip_probability, rotate_probability):
    """An axis order and the axes (of the result) that run backwards."""
    order = [0, 1, 2]
    backwards = [_chance(flip_probability, generator) for _ in range(3)]
    if _chance(rotate_probability, generator):
        fixed = int(torch.randint(3, (), generator=generator))
        first, second = (axis for axis in range(3) if axis != fixed)
        quarters = int(torch.randint(1, 4, (), generator=generator))
        if shape[first] != shape[second]:
            quarters = 2
        # A quarter turn is a transposition followed by one reversed axis; two of them reverse both.
        if quarters == 2:
            backwards[first], backwards[second] = not backwards[first], not backwards[second]
        else:
            order[first], order[second] = second, first
            backwards[first], backwards[second] = backwards[second], backwards[first]
            turned = first if quarters == 1 else second
            backwards[turned] = not backwards[turned]
    return order, [axis for axis in range(3) if backwards[axis]]


def _chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability
