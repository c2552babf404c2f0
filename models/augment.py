"""Batched augmentation on the device that trains: flips, 90-degree rotations, Gaussian noise.

The decisions are drawn on the CPU, so nothing waits for the device. A flip and a rotation of one case together are one
permutation of the axes and one set of reversed axes, so they cost one copy of it.
"""

import torch


def augment(
    image: torch.Tensor,
    label: torch.Tensor,
    generator: torch.Generator,
    flip_probability: float = 0.5,
    rotate_probability: float = 0.5,
    noise_probability: float = 0.2,
    noise_sd: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image float32 [B, 4, D, H, W] and label int64 [B, 1, D, H, W], moved together; `generator` is a CPU generator.

    Each axis is flipped with `flip_probability`; with `rotate_probability` the case turns by 90, 180 or 270 degrees in
    a random plane (180 only, where the plane is not square); noise is added to the image alone.
    """
    images, labels = torch.empty_like(image), torch.empty_like(label)
    for index in range(len(image)):
        order, reversed_axes = _flips_and_rotation(image.shape[2:], generator, flip_probability, rotate_probability)
        for source, target in ((image, images), (label, labels)):
            moved = source[index].permute(0, *(axis + 1 for axis in order))
            target[index] = moved.flip([axis + 1 for axis in reversed_axes]) if reversed_axes else moved
        if _chance(noise_probability, generator):
            seed = int(torch.randint(2**31, (), generator=generator))
            noise = torch.Generator(image.device).manual_seed(seed)
            images[index] += noise_sd * torch.randn(image.shape[1:], generator=noise, device=image.device)
    return images, labels


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
