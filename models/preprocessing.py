"""A case to network space and back again: pure functions, the forward and the inverse side by side.

Three grids, all with RAS axes but the first:
  native     the original file: its own axis order and spacing
  resampled  the same head at an isotropic spacing; a file that has that spacing already is not touched
  network    the foreground of it, cropped and resized to a cube

From one grid to the next, each axis is scaled about the voxel edges (the convention of
`torch.nn.functional.interpolate(align_corners=False)`), so the way back is one scaling per axis too.
"""

import numpy as np
import torch
from nibabel.orientations import aff2axcodes, io_orientation

from models.brats import MODALITIES, InputError, native_axes, spacing_of, to_ras

PERCENTILES = (0.5, 99.5)  # of a modality's non-zero voxels: the intensities that become 0 and 1


def to_network(
    image: np.ndarray, label: np.ndarray | None, affine: np.ndarray, size: int | None = 128, spacing_mm: float = 1.0
) -> dict:
    """A case of native space as the tensors and plain numbers of a preprocessed case.

    Args:
        image: [4, X, Y, Z], raw intensities of any type in the order of MODALITIES.
        label: training labels uint8 [X, Y, Z], or None.
        affine: [4, 4], voxel to mm.
        size: side of the network cube in voxels; None keeps the crop as it is.
        spacing_mm: isotropic spacing before the crop.

    Returns `image` float32 [4, D, H, W] in [0, 1], `label` int64 [1, D, H, W] where there is one, `geometry` (what
    `to_native` needs) and `normalization`. Raises InputError for a modality without contrast.
    """
    geometry = {
        "native_shape": list(image.shape[1:]),
        "affine": np.asarray(affine, float).tolist(),
        "axis_codes": "".join(aff2axcodes(affine)),
    }
    image = to_ras(image, affine)  # [4, D, H, W], a view
    geometry["spacing_mm"] = spacing_of(affine)
    geometry["target_spacing_mm"] = float(spacing_mm)
    steps = _resampling_steps(geometry)
    resampled_shape = [max(1, round(n / step)) for n, step in zip(image.shape[1:], steps, strict=True)]
    geometry["resampled_shape"] = resampled_shape
    onto_resampled = [_positions(n, step) for n, step in zip(resampled_shape, steps, strict=True)]
    image = np.asarray(_sample(image, onto_resampled, "linear"))

    box = foreground_box(image)
    geometry["crop_box"] = [list(side) for side in box]
    inside = (slice(None), *(slice(low, high) for low, high in box))
    # Outside the box every modality is zero, so normalising after the crop gives the same numbers, sooner.
    image, normalization = normalise(image[inside])

    lengths = [high - low for low, high in box]
    geometry["network_size"] = lengths if size is None else [size] * 3
    onto_network = [_positions(n, m / n) for n, m in zip(geometry["network_size"], lengths, strict=True)]
    result = {"image": _tensor(_sample(image, onto_network, "linear"))}
    if label is not None:
        label = _sample(to_ras(label[None], affine), onto_resampled, "nearest")[inside]  # [1, D, H, W]
        result["label"] = _tensor(_sample(label, onto_network, "nearest")).long()
    return result | {"geometry": geometry, "normalization": normalization}


def to_native(volume: torch.Tensor, geometry: dict) -> torch.Tensor:
    """A label map [D, H, W] (nearest) or probabilities [C, D, H, W] (linear) of network space on the grid and in the
    axis order of the original file: [X, Y, Z] or [C, X, Y, Z]. What lies outside the crop becomes 0."""
    if list(volume.shape[-3:]) != list(geometry["network_size"]):
        raise InputError(f"a volume of {tuple(volume.shape)} does not fit the network size {geometry['network_size']}.")
    mode = "nearest" if volume.ndim == 3 else "linear"
    positions, inside = [], [slice(None)]
    ras_shape = [geometry["native_shape"][axis] for axis in native_axes(geometry["affine"])]
    for native, step, (low, high), network in zip(
        ras_shape, _resampling_steps(geometry), geometry["crop_box"], geometry["network_size"], strict=True
    ):
        in_crop = (np.arange(native) + 0.5) / step - 0.5 - low  # where each native voxel lies on the crop
        kept = np.flatnonzero((in_crop >= -0.5) & (in_crop < high - low - 0.5))
        inside.append(slice(int(kept[0]), int(kept[-1]) + 1))
        positions.append((in_crop[kept] + 0.5) * (network / (high - low)) - 0.5)
    channels = volume.reshape(-1, *volume.shape[-3:])  # [C, D, H, W]
    result = channels.new_zeros(len(channels), *ras_shape)
    result[tuple(inside)] = _sample(channels, positions, mode)
    result = _from_ras(result, geometry["affine"])
    return result[0] if volume.ndim == 3 else result


def label_map(probabilities: torch.Tensor) -> torch.Tensor:
    """The most probable class uint8 [D, H, W] of [C, D, H, W], the lowest where two are equal.

    A running maximum takes a CPU a seventh of the time of argmax over the slowest axis.
    """
    best = probabilities[0].clone()
    label = torch.zeros_like(best, dtype=torch.uint8)
    for value, channel in enumerate(probabilities[1:], start=1):
        label.masked_fill_(channel > best, value)
        torch.maximum(best, channel, out=best)
    return label


def native_label_map(probabilities: torch.Tensor, geometry: dict) -> torch.Tensor:
    """`label_map(to_native(probabilities, geometry))`, uint8 [X, Y, Z], without the work where there is no tumour.

    Where background is most probable in all eight voxels around a point, it is so in every mixture of them. Only the
    points whose neighbours reach the box around the other voxels have to be computed.
    """
    axes = native_axes(geometry["affine"])
    result = probabilities.new_zeros([geometry["native_shape"][axis] for axis in axes], dtype=torch.uint8)
    occupied = label_map(probabilities) > 0
    steps, positions, inside = _resampling_steps(geometry), [], []
    for axis, (low, high) in enumerate(geometry["crop_box"]):
        side, others = occupied.shape[axis], [other for other in range(3) if other != axis]
        planes = occupied.any(others[1]).any(others[0]).nonzero().flatten().tolist()
        first, last = (planes[0], planes[-1]) if planes else (side, -1)
        in_crop = (np.arange(result.shape[axis]) + 0.5) / steps[axis] - 0.5 - low  # as in to_native
        position = (in_crop + 0.5) * (side / (high - low)) - 0.5
        kept = np.flatnonzero((position >= max(-0.5, first - 1)) & (position < min(side - 0.5, last + 1)))
        positions.append(position[kept])
        inside.append(slice(kept[0], kept[-1] + 1) if len(kept) else slice(0, 0))
    if all(map(len, positions)):
        result[tuple(inside)] = label_map(_sample(probabilities, positions, "linear"))
    return _from_ras(result[None], geometry["affine"])[0]


def _from_ras(volume: torch.Tensor, affine) -> torch.Tensor:
    orientation = io_orientation(np.asarray(affine))  # per native axis: the RAS axis it is nearest to, and its sign
    flipped = [int(ras) + 1 for ras, sign in orientation if sign < 0]
    return volume.flip(flipped).permute(0, *(int(ras) + 1 for ras in orientation[:, 0])).contiguous()


def network_spacing_mm(geometry: dict) -> list[float]:
    """Voxel size in mm of the network grid along its RAS axes."""
    return [
        (high - low) * geometry["target_spacing_mm"] / n
        for (low, high), n in zip(geometry["crop_box"], geometry["network_size"], strict=True)
    ]


# ---- intensities and foreground ------------------------------------------------------------------------------------


def foreground_box(image: np.ndarray) -> list[tuple[int, int]]:
    """[low, high) along each axis of the voxels that are non-zero in any modality of [4, D, H, W]; raw BraTS has
    negative voxels too, so `> 0` would cut into the head."""
    mask = image[0] != 0
    for modality in image[1:]:
        mask |= modality != 0
    box = []
    for axis in range(3):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if occupied.size == 0:
            raise InputError("every voxel is zero.")
        box.append((int(occupied[0]), int(occupied[-1]) + 1))
    return box


def normalise(image: np.ndarray) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Each modality of [4, D, H, W] to [0, 1] between two percentiles of its non-zero voxels, clipped; zero stays 0.

    The percentiles, not minimum and maximum: a few vessels reach 15,000 in T1CE where the brain ends at 1,500.
    """
    result, normalization = np.empty(image.shape, np.float32), {}
    for channel, modality in enumerate(MODALITIES):
        foreground = image[channel] != 0
        low, high = (float(value) for value in np.percentile(image[channel][foreground], PERCENTILES))
        if not high > low:
            raise InputError(f"{modality} has the one intensity {low:g} all over: not an MRI.")
        result[channel] = image[channel]
        result[channel] -= low
        result[channel] *= 1 / (high - low)
        np.clip(result[channel], 0, 1, out=result[channel])
        result[channel] *= foreground
        normalization[modality] = [low, high]
    return result, normalization


# ---- sampling ------------------------------------------------------------------------------------------------------


def _resampling_steps(geometry: dict) -> list[float]:
    """Per RAS axis, how many native voxels one resampled voxel spans; exactly 1 where the spacing is right already."""
    target = geometry["target_spacing_mm"]
    return [1.0 if abs(s - target) < 1e-3 * target else target / s for s in geometry["spacing_mm"]]


def _positions(count: int, step: float) -> np.ndarray:
    """Where the voxels 0..count-1 of a new grid lie on the old one, each new voxel being `step` old ones wide."""
    return (np.arange(count) + 0.5) * step - 0.5


def _sample(volume, positions: list[np.ndarray], mode: str):
    """[C, D, H, W] (array or tensor) at the product grid of one position list per axis; beyond the border, the border
    voxel. An axis that stays as it is costs nothing."""
    for axis, position in enumerate(positions, start=1):
        count = volume.shape[axis]
        if len(position) == count and np.array_equal(position, np.arange(count)):
            continue
        volume = _tensor(volume)
        if mode == "nearest":
            nearest = torch.from_numpy(np.floor(position + 0.5).clip(0, count - 1).astype(np.int64))
            volume = volume.index_select(axis, nearest.to(volume.device))
            continue
        volume = volume if volume.is_floating_point() else volume.float()
        low = np.floor(position).clip(0, count - 1)
        weight = torch.from_numpy((position - low).clip(0, 1).astype(np.float32)).to(volume.device, volume.dtype)
        low = torch.from_numpy(low.astype(np.int64)).to(volume.device)
        above = volume.index_select(axis, (low + 1).clamp(max=count - 1))
        volume = volume.index_select(axis, low).lerp_(above, weight.view(-1, *[1] * (3 - axis)))
    return volume


def _tensor(volume) -> torch.Tensor:
    return volume if isinstance(volume, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(volume))
