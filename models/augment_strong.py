"""Augmentation for few cases: scale, rotation and elastic deformation in one resampling, then changes of intensity.

Ranges and probabilities are about those of nnU-Net and of the winner of BraTS 2020 (Isensee et al., arXiv:2011.00848).
What is done to a case is drawn on the CPU, apart from doing it on the case's own device, so nothing waits for a GPU.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.65, 1.6)  # of each axis
ANGLE = math.radians(30)  # about each axis, either way
DISPLACEMENT = 0.05  # largest standard deviation of the elastic field, in half sides of the volume
WAVES = 4  # cosines along each axis that a smooth field is made of; the fastest has one and a half periods
BLUR_SD = (0.5, 1.0)  # voxels
RESOLUTION = (0.5, 1.0)  # of the coarser grid, times the resolution
BRIGHTNESS = (-0.5, 0.5)  # added, in standard deviations of the foreground
CONTRAST = (0.65, 1.5)  # times the distance from the mean of the foreground
BIAS = (0.0, 0.3)  # standard deviation of the logarithm of the bias field
GAMMA = (0.7, 1.5)
# Of a case. The modalities get their own numbers of an intensity change, and are blurred or coarse each second time.
PROBABILITIES = {"scale": 0.3, "rotation": 0.3, "elastic": 0.3, "bias": 0.2,
                 "blur": 0.2, "resolution": 0.2, "contrast": 0.3, "gamma": 0.3}  # fmt: skip


# ---- what is drawn -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warp:
    """Where the voxels of a warped volume come from: `matrix` times their place, plus a smooth field."""

    matrix: Tensor  # float32 [3, 3], of places in voxels from the centre
    waves: Tensor | None  # float32 [3, WAVES, WAVES, WAVES], of displacements in half sides; see smooth_field


def draw_warp(generator: torch.Generator) -> Warp | None:
    """A geometric change, or None."""
    scales, angles, waves = torch.ones(3), torch.zeros(3), None
    if is_scaled := _happens("scale", generator):
        low, high = map(math.log, SCALE)  # as often smaller as larger
        scales = torch.exp(_uniform(low, high, generator, 3))
    if is_rotated := _happens("rotation", generator):
        angles = _uniform(-ANGLE, ANGLE, generator, 3)
    if is_deformed := _happens("elastic", generator):
        waves = _uniform(0, DISPLACEMENT, generator, 1) * draw_waves(3, generator)
    if not (is_scaled or is_rotated or is_deformed):
        return None
    matrix = torch.diag(1 / scales)
    for axis, angle in enumerate(angles):
        matrix = _rotation(axis, angle) @ matrix
    return Warp(matrix, waves)


def draw_waves(channels: int, generator: torch.Generator) -> Tensor:
    """Coefficients [channels, WAVES, WAVES, WAVES] of a smooth field with a standard deviation of about one."""
    # The mean square of a cosine is 1/2, that of the constant 1.
    return torch.randn(channels, WAVES, WAVES, WAVES, generator=generator) / (1 + (WAVES - 1) / 2) ** 1.5


def draw_intensities(channels: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The changes of intensity of a case by name, those alone that happen to it; one number per channel each."""
    drawn = {}
    is_blurred, is_coarse = _happens("blur", generator), _happens("resolution", generator)
    if is_blurred or is_coarse:  # in every second channel
        blurred, coarse = is_blurred * _coins(channels, generator), is_coarse * _coins(channels, generator)
        drawn["blur_sd"] = torch.where(blurred, _uniform(*BLUR_SD, generator, channels), 0.0)
        drawn["resolution"] = torch.where(coarse, _uniform(*RESOLUTION, generator, channels), 1.0)
    if _happens("contrast", generator):
        drawn["brightness"] = _uniform(*BRIGHTNESS, generator, channels)
        drawn["contrast"] = _uniform(*CONTRAST, generator, channels)
    if _happens("bias", generator):
        drawn["bias_waves"] = draw_waves(1, generator)  # one coil for all modalities, felt more or less by each
        drawn["bias_sd"] = _uniform(*BIAS, generator, channels)
    if _happens("gamma", generator):
        drawn["gamma"] = _uniform(*GAMMA, generator, channels)
    return drawn


def _happens(change: str, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < PROBABILITIES[change]


def _uniform(low: float, high: float, generator: torch.Generator, count: int) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _coins(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


def _rotation(axis: int, angle: Tensor) -> Tensor:
    matrix = torch.eye(3)
    first, second = (other for other in range(3) if other != axis)
    matrix[first, first] = matrix[second, second] = angle.cos()
    matrix[first, second], matrix[second, first] = -angle.sin(), angle.sin()
    return matrix


# ---- geometry ------------------------------------------------------------------------------------------------------


def resample(image: Tensor, label: Tensor, warp: Warp, order, backwards, image_out: Tensor, label_out: Tensor):
    """Write an image [4, D, H, W] and its label [1, D, H, W], turned and flipped (their axes in a new `order`, then
    some of them `backwards`) and then warped, into other memory of that shape, with one interpolation of each: linear
    for the image, the label that weighs most for the labels. From outside comes background, 0."""
    shape = image.shape[1:]
    slabs = math.gcd(shape[0], torch.get_num_threads())  # on a CPU torch gives each thread a sample of the batch
    places = _places(warp, order, backwards, shape, image.device)
    images = _interpolate(image.float(), places, slabs)  # [slabs, 4, D / slabs, H, W]
    image_out.unflatten(1, (slabs, -1)).copy_(images.movedim(0, 1))
    label_out.zero_()
    box = _box_of_tumour(label[0], places, slabs) if image.device.type == "cpu" else (slice(None),) * 3
    if box is None:
        return
    values = torch.arange(1, 4, device=label.device).view(3, 1, 1, 1)
    shares = _interpolate((label == values).float(), places[box], slabs)  # [slabs, 3, d / slabs, h, w]
    largest, winner = shares.max(1)
    label_out[0][box] = torch.where(largest > 1 - shares.sum(1), winner + 1, 0).flatten(0, 1).to(label_out.dtype)


def _interpolate(volumes: Tensor, places: Tensor, slabs: int) -> Tensor:
    """Volumes [C, D, H, W] at `places` [d, h, w, 3]: [slabs, C, d / slabs, h, w]."""
    grid = places.unflatten(0, (slabs, -1))
    return F.grid_sample(volumes.expand(slabs, *volumes.shape), grid, align_corners=True)


def _box_of_tumour(label: Tensor, places: Tensor, slabs: int) -> tuple[slice, slice, slice] | None:
    """The box of those `places` [D, H, W, 3] that come from the tumour or right beside it, or None. All others are
    background: on a CPU that saves most of the label's interpolation; a GPU would have to be waited for."""
    tumour = label.nonzero()  # [voxels, 3]
    if not len(tumour):
        return None
    half = (torch.tensor(label.shape) - 1) / 2  # see _places
    low, high = ((end - half) / half for end in (tumour.amin(0) - 1, tumour.amax(0) + 1))
    taken = ((places > low.flip(0)) & (places < high.flip(0))).all(-1).nonzero()
    if not len(taken):
        return None
    (first, *starts), (last, *stops) = taken.amin(0).tolist(), (taken.amax(0) + 1).tolist()
    whole_slabs = slice(first // slabs * slabs, -(-last // slabs) * slabs)
    return whole_slabs, *map(slice, starts, stops)


def _places(warp: Warp, order, backwards, shape, device) -> Tensor:
    """Where each voxel comes from, [D, H, W, 3], as torch's grids say it: from -1 to 1, the last axis first."""
    turn = torch.zeros(3, 3)
    for axis, source in enumerate(order):
        turn[source, axis] = -1 if axis in backwards else 1
    half = torch.tensor([(side - 1) / 2 for side in shape])  # voxels from the centre to where a grid has 1
    matrix = (turn @ warp.matrix) * half / half[:, None]
    d, h, w = (torch.linspace(-1, 1, side, device=device) for side in shape)
    planes = [a * d[:, None, None] + b * h[:, None] + c * w for a, b, c in matrix.flip(0).tolist()]
    if warp.waves is not None:
        for plane, shift in zip(planes, smooth_field(warp.waves.to(device), shape), strict=True):
            plane += shift
    return torch.stack(planes).movedim(0, -1)


def smooth_field(waves: Tensor, shape) -> Tensor:
    """The sum of cosines with these coefficients: [C, k, k, k] -> [C, D, H, W]."""
    field = waves
    for side in shape:
        phase = math.pi / side * (torch.arange(side, device=waves.device) + 0.5)
        cosines = torch.cos(torch.outer(torch.arange(waves.shape[-1], device=waves.device), phase))  # [k, side]
        field = torch.tensordot(field, cosines, dims=([1], [0]))  # the next k goes, its axis comes last
    return field


# ---- intensities ---------------------------------------------------------------------------------------------------


def change_intensities(image: Tensor, drawn: dict[str, Tensor]):
    """Change an image [C, D, H, W] in place, as `draw_intensities` has drawn it. Each channel keeps within its own
    range; the background, 0, has to be restored afterwards."""
    if not drawn:
        return
    # Numbers per channel as [C, 1, 1, 1]; those that decide what is computed stay on the CPU.
    per_channel = {name: values.to(image.device)[:, None, None, None] for name, values in drawn.items()
                   if values.dim() == 1}  # fmt: skip
    low, high = (bound[:, None, None, None] for bound in image.flatten(1).aminmax(dim=1))
    if "blur_sd" in drawn:
        for channel, blur_sd, resolution in zip(image, drawn["blur_sd"], drawn["resolution"], strict=True):
            if blur_sd > 0 or resolution < 1:
                channel.copy_(_smoothed(channel, float(blur_sd), float(resolution)))
    if "contrast" in drawn:
        mean, sd = _mean_and_sd(image)
        image.sub_(mean).mul_(per_channel["contrast"]).add_(mean + per_channel["brightness"] * sd)
    if "bias_sd" in drawn:
        field = smooth_field(drawn["bias_waves"].to(image.device), image.shape[1:])  # [1, D, H, W]
        image.sub_(low).mul_(torch.exp(per_channel["bias_sd"] * field)).add_(low)
    image.clamp_(low, high)
    if "gamma" in drawn:
        extent = (high - low).clamp(min=1e-6)
        image.sub_(low).div_(extent).pow_(per_channel["gamma"]).mul_(extent).add_(low)


def _mean_and_sd(image: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel's foreground, [C, 1, 1, 1]."""
    sums = [values.sum((1, 2, 3), keepdim=True) for values in (image != 0, image, image.square())]
    mean, square = (total / sums[0].clamp(min=1) for total in sums[1:])
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def _smoothed(volume: Tensor, blur_sd: float, resolution: float) -> Tensor:
    """[D, H, W] blurred with a Gaussian, then as if it had been scanned at a lower resolution: both are a matrix for
    each axis."""
    for side in volume.shape:
        matrix = blur_matrix(side, blur_sd) @ resolution_matrix(side, resolution)
        volume = torch.tensordot(volume, matrix.to(volume.device), dims=([0], [0]))  # the first axis goes, and is last
    return volume


def blur_matrix(side: int, sd: float) -> Tensor:
    """[side, side]: column j has the weights of all voxels in the blurred voxel j; they sum to 1 at the border, too."""
    if sd == 0:
        return torch.eye(side)
    place = torch.arange(side)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / sd) ** 2)
    return weights / weights.sum(0)


def resolution_matrix(side: int, resolution: float) -> Tensor:
    """[side, side]: the nearest voxels of a grid with `resolution` times as many, interpolated linearly."""
    coarse = max(1, round(side * resolution))
    sampled = F.interpolate(torch.eye(side)[None], coarse, mode="nearest-exact")  # [1, side, coarse]
    return F.interpolate(sampled, side, mode="linear")[0]
