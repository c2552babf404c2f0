"""A case to network space and back again: pure functions, the forward and the inverse side by side.

Three grids, all with RAS axes but the first:
  native     the original file: its own axis order and spacing
  resampled  the same head at an isotropic spacing; a file that has that spacing already is not touched
  network    its foreground, cropped and resized to a cube (or not resized)

From one grid to the next, each axis is scaled about the voxel edges (the convention of
`torch.nn.functional.interpolate(align_corners=False)`), so the way back is one scaling per axis too.
"""

import math
import warnings

import numpy as np
import torch
from nibabel.orientations import aff2axcodes, io_orientation

from models.brats import MODALITIES, REGION_CHANNELS
from models.errors import InputError, InputWarning
from models.labels import occupied_box
from models.nifti import native_axes, spacing_of, to_ras

PERCENTILES = (0.5, 99.5)  # of a modality's non-zero voxels: the intensities that become 0 and 1 by default
LABELS_OF_REGIONS = {"WT": 2, "TC": 1, "ET": 3}  # what a voxel of a region is, each overriding those before it
SLAB, COLUMNS = 16, 1024  # planes and columns that are interpolated at a time: what a core's cache holds
COUNTED_AT_A_TIME = 2**22  # voxels


def to_network(
    image: np.ndarray,
    label: np.ndarray | None,
    affine: np.ndarray,
    size: int | None = 128,
    spacing_mm: float = 1.0,
    normalize: str = "percentile",
    crop: bool = True,
    label_name: str = "segmentation",
) -> dict:
    """A case of native space as the tensors and plain numbers of a preprocessed case.

    Args:
        image: [4, X, Y, Z], raw intensities of any type in the order of MODALITIES.
        label: training labels uint8 [X, Y, Z], or None.
        affine: [4, 4], voxel to mm.
        size: side of the network cube in voxels; None keeps what is cropped as it is.
        spacing_mm: isotropic spacing before the crop.
        normalize: of each modality: "percentile", to [0, 1] between the PERCENTILES of its non-zero voxels, clipped;
            or "zscore", minus their mean and divided by their standard deviation, not clipped.
        crop: to the foreground; else the whole grid is kept.
        label_name: what a warning calls the label map.

    Returns `image` float32 [4, D, H, W], its background 0; `label` int64 [1, D, H, W] where there is one; `geometry`
    (what `to_native` needs) and `normalization`. Raises InputError for a modality without contrast, and warns of
    labelled voxels outside the crop.
    """
    native_box = foreground_box(image) if crop else [(0, n) for n in image.shape[1:]]
    if label is not None:
        _warn_of_labels_outside(label, native_box, label_name)
    geometry = _make_geometry(image.shape[1:], affine, native_box, size, float(spacing_mm))
    steps, box = _resampling_steps(geometry), geometry["crop_box"]
    onto_resampled = [_positions(high, step)[low:] for (low, high), step in zip(box, steps, strict=True)]
    onto_network = [
        _positions(n, (high - low) / n) for n, (low, high) in zip(geometry["network_size"], box, strict=True)
    ]
    ras_box = _ras_box(native_box, geometry)
    in_native_box = [position - low for position, (low, _) in zip(onto_resampled, ras_box, strict=True)]
    cropped = to_ras(image[(slice(None), *(slice(low, high) for low, high in native_box))], affine)  # a view
    resized, normalization = _image_to_network(
        cropped, in_native_box if set(steps) != {1.0} else None, onto_network, clip=normalize == "percentile"
    )
    result = {"image": resized}
    if label is not None:
        result["label"] = _label_to_network(to_ras(label[None], affine), onto_resampled, onto_network)
    return result | {"geometry": geometry, "normalization": normalization}


def _warn_of_labels_outside(label: np.ndarray, box: list[tuple[int, int]], name: str):
    inside = np.count_nonzero(label[tuple(slice(low, high) for low, high in box)])
    if outside := np.count_nonzero(label) - inside:
        which = f"{name}, {outside} of {outside + inside} labelled voxels"
        warnings.warn(InputWarning(which, "labelled voxels outside the head are lost in the crop"), stacklevel=3)


def _make_geometry(native_shape, affine, native_box, size: int | None, spacing_mm: float) -> dict:
    """The three grids as plain numbers and lists; the resampled one and that of the network have RAS axes. `native_box`
    is the crop, [low, high) along the native axes."""
    geometry = {
        "native_shape": list(native_shape),
        "affine": np.asarray(affine, float).tolist(),
        "axis_codes": "".join(aff2axcodes(affine)),
        "spacing_mm": spacing_of(affine),
        "target_spacing_mm": spacing_mm,
    }
    steps, ras_shape = _resampling_steps(geometry), [native_shape[axis] for axis in native_axes(affine)]
    shape = [max(1, round(n / step)) for n, step in zip(ras_shape, steps, strict=True)]
    sides = zip(_ras_box(native_box, geometry), steps, shape, strict=True)
    box = [list(_resampled_side(side, step, n)) for side, step, n in sides]
    network_size = [high - low for low, high in box] if size is None else [size] * 3
    return geometry | {"resampled_shape": shape, "crop_box": box, "network_size": network_size}


def _label_to_network(label: np.ndarray, onto_resampled, onto_network) -> torch.Tensor:
    """A label map [1, X, Y, Z] with RAS axes, nearest voxels, as int64 [1, D, H, W]."""
    places = [
        _nearest(first, n)[_nearest(second, len(first))]
        for first, second, n in zip(onto_resampled, onto_network, label.shape[1:], strict=True)
    ]
    return torch.from_numpy(label[(slice(None), *np.ix_(*places))].astype(np.int64, order="C"))


def _image_to_network(image: np.ndarray, onto_resampled, onto_network, clip: bool) -> tuple[torch.Tensor, dict]:
    """The cropped modalities [4, D, H, W] as float32 in network space, and the window of each: the percentiles between
    which it is clipped, or its mean and one standard deviation above it. Both are those of the original voxels.
    `onto_resampled` is None if the spacing is right."""
    order = np.argsort([-abs(stride) for stride in image.strides[1:]], kind="stable")  # the slowest in memory first
    size = [len(onto_network[axis]) for axis in order]
    # numpy asks the system for large pages, which halves the time until all of them are there; torch does not.
    resized, normalization = torch.from_numpy(np.empty((len(image), *size[::-1]), np.float32)), {}
    for channel, modality in enumerate(MODALITIES):
        voxels = torch.from_numpy(np.ascontiguousarray(image[channel].transpose(order)))
        window = normalization[modality] = intensity_window(voxels) if clip else z_score_window(voxels)
        if not window[1] > window[0]:
            raise InputError(f"{modality} has the one intensity {window[0]:g} all over the head: not an MRI. Repair "
                             "or leave out this case.")  # fmt: skip
        if onto_resampled is not None:
            voxels = _resample(voxels, window, clip, [onto_resampled[axis] for axis in order])
            window = (0, 1)
        _resize(voxels, window, clip, [onto_network[axis] for axis in order], resized[channel])
    ras = np.argsort(order[::-1])
    return resized.permute(0, *(1 + ras).tolist()).contiguous(), normalization


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
    """Training labels uint8 [...] of probabilities [C, ...].

    Of four classes the most probable, the lowest where two are equal. Of the three regions TC, WT, ET those over 0.5:
    ED where only WT is, NCR where TC is, ET where ET is.
    """
    label = torch.zeros_like(probabilities[0], dtype=torch.uint8)
    if len(probabilities) == len(REGION_CHANNELS):
        for region, value in LABELS_OF_REGIONS.items():
            label.masked_fill_(probabilities[REGION_CHANNELS.index(region)] > 0.5, value)
        return label
    # A running maximum takes a CPU a seventh of the time of argmax over the slowest axis.
    best = probabilities[0].clone()
    for value, channel in enumerate(probabilities[1:], start=1):
        label.masked_fill_(channel > best, value)
        torch.maximum(best, channel, out=best)
    return label


def native_label_map(probabilities: torch.Tensor, geometry: dict) -> torch.Tensor:
    """`label_map(to_native(probabilities, geometry))`, uint8 [X, Y, Z], computed only near the tumour.

    Where background is most probable (or no region over 0.5) in all eight voxels around a point, it is so in every
    mixture of them. So only points with neighbours in the box around the other voxels are computed.
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
    """[C, D, H, W] with RAS axes in the axis order of the original file, [C, X, Y, Z]."""
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
    box = occupied_box(image)[1:]
    if box[0] == (0, 0):
        raise InputError("every voxel is zero.")
    return box


def intensity_window(voxels: torch.Tensor) -> list[float]:
    """The PERCENTILES of the non-zero voxels as `numpy.percentile` has them; equal where there is no contrast.

    Percentiles, not minimum and maximum: a few vessels reach 15,000 in T1CE where the brain ends at 1,500.
    """
    if voxels.dtype != torch.int16:
        foreground = voxels[voxels != 0].numpy()
        return np.percentile(foreground, PERCENTILES).tolist() if len(foreground) else [0.0, 0.0]
    # A histogram takes a third of the time of sorting.
    lowest, counts = _foreground_histogram(voxels)
    at_most = counts.cumsum()
    if not at_most[-1]:
        return [0.0, 0.0]
    ranks = np.array(PERCENTILES) / 100 * (at_most[-1] - 1)
    below, above = (np.searchsorted(at_most, whole, "right") + lowest for whole in (np.floor(ranks), np.ceil(ranks)))
    return (below + (above - below) * (ranks % 1)).tolist()


def z_score_window(voxels: torch.Tensor) -> list[float]:
    """The mean of the non-zero voxels, and the intensity one standard deviation above it."""
    if voxels.dtype != torch.int16:
        sd, mean = torch.std_mean(voxels[voxels != 0].double(), correction=0)
        return [float(mean), float(mean + sd)]
    lowest, counts = _foreground_histogram(voxels)
    values, count = np.arange(len(counts)) + lowest, max(1, counts.sum())
    mean = (counts * values).sum() / count
    return [float(mean), float(mean + np.sqrt((counts * (values - mean) ** 2).sum() / count))]


def _foreground_histogram(voxels: torch.Tensor) -> tuple[int, np.ndarray]:
    """The lowest value of int16 voxels (0 at most), and how many voxels have it and each value that follows; 0, the
    background, is not counted."""
    lowest = min(0, int(voxels.min()))
    count = max(0, int(voxels.max())) - lowest + 1
    # In parts, because torch makes a copy of 64 bits per voxel to count.
    parts = (part if lowest == 0 else part.int().sub_(lowest) for part in voxels.view(-1).split(COUNTED_AT_A_TIME))
    counts = sum(torch.bincount(part, minlength=count) for part in parts).numpy()
    counts[-lowest] = 0
    return lowest, counts


def normalise(voxels: torch.Tensor, window, clip: bool) -> torch.Tensor:
    """Voxels as float32, the two intensities of `window` mapped to 0 and 1, clipped to [0, 1] or not; 0 stays 0."""
    low, high = window
    unit = voxels.to(torch.float32, copy=True).sub_(low).mul_(1 / (high - low))
    unit = unit.clamp_(0, 1) if clip else unit
    return unit if clip and low >= 0 else unit.mul_(voxels != 0)  # from 0 on, the clipping takes background to 0


# ---- sampling ------------------------------------------------------------------------------------------------------


def _resampling_steps(geometry: dict) -> list[float]:
    """Per RAS axis, how many native voxels one resampled voxel spans; exactly 1 where the spacing is right already."""
    target = geometry["target_spacing_mm"]
    return [1.0 if abs(s - target) < 1e-3 * target else target / s for s in geometry["spacing_mm"]]


def _positions(count: int, step: float) -> np.ndarray:
    """Where the voxels 0..count-1 of a new grid lie on the old one, each new voxel being `step` old ones wide."""
    return (np.arange(count) + 0.5) * step - 0.5


def _resampled_side(side: tuple[int, int], step: float, count: int) -> tuple[int, int]:
    """[low, high) of the resampled voxels whose centres lie between two native voxel edges: one at least."""
    low, high = (math.ceil(edge / step - 0.5) for edge in side)
    low = min(low, count - 1)
    return low, min(max(high, low + 1), count)


def _ras_box(box: list[tuple[int, int]], geometry: dict) -> list[tuple[int, int]]:
    """A box of the native axes as [low, high) along the RAS axes."""
    result = []
    for axis in native_axes(geometry["affine"]):
        (low, high), count = box[axis], geometry["native_shape"][axis]
        flipped = geometry["axis_codes"][axis] in "LPI"
        result.append((count - high, count - low) if flipped else (low, high))
    return result


def _resample(voxels: torch.Tensor, window, clip: bool, positions: list[np.ndarray]) -> torch.Tensor:
    """[A, B, C] normalised and interpolated linearly at the product grid of `positions`, among foreground voxels alone,
    because between brain and background there is no tissue; background where the nearest voxel is background."""
    first, *others = positions
    result = torch.empty([len(position) for position in positions])
    for start in range(0, len(first), SLAB):  # at once, a large volume would take several times its own memory
        place = first[start : start + SLAB]
        # A head of less than a resampled voxel lies beside its centre.
        low, high = min(max(0, math.floor(place[0])), len(voxels) - 1), math.ceil(place[-1]) + 1
        slab, places = voxels[low:high], [place - low, *others]
        foreground = (slab != 0).float()[None]
        value = _sample(normalise(slab, window, clip)[None], places, "linear")
        share = _sample(foreground, places, "linear")  # at least 1/8 where the nearest voxel is foreground
        result[start : start + SLAB] = value.div_(share.clamp_(min=0.1)).mul_(_sample(foreground, places, "nearest"))[0]
    return result


def _resize(voxels: torch.Tensor, window, clip: bool, positions: list[np.ndarray], out: torch.Tensor):
    """[A, B, C] normalised and interpolated linearly at the product grid of `positions`, into `out` [C', B', A'].

    The axes come in the order of memory, the slowest first. Slabs that fit the cache pass through all steps, and rows
    are always copied whole: this takes half the time of matrix products and a third of that of one axis after another.
    """
    first, second, third = (_neighbours(p, n, "cpu") for p, n in zip(positions, voxels.shape, strict=True))
    planes = torch.empty(len(voxels), *out.shape[:2])  # [A, C', B']
    for start in range(0, len(voxels), SLAB):
        slab = normalise(voxels[start : start + SLAB], window, clip)  # [S, B, C]
        slab = _lerp(slab, 1, second).transpose(1, 2).contiguous()  # [S, C, B']
        planes[start : start + SLAB] = _lerp(slab, 1, third)
    columns, rows = planes.flatten(1), out.flatten(0, 1)  # [A, C' * B'] and [C' * B', A']
    for start in range(0, len(rows), COLUMNS):
        rows[start : start + COLUMNS] = _lerp(columns[:, start : start + COLUMNS], 0, first).t()


def _sample(volume: torch.Tensor, positions: list[np.ndarray], mode: str) -> torch.Tensor:
    """[C, D, H, W] at the product grid of one position list per axis; beyond the border, the border voxel. An axis that
    stays as it is costs nothing."""
    for axis, position in enumerate(positions, start=1):
        count = volume.shape[axis]
        if len(position) == count and np.array_equal(position, np.arange(count)):
            continue
        if mode == "nearest":
            volume = volume.index_select(axis, torch.from_numpy(_nearest(position, count)).to(volume.device))
        else:
            volume = volume if volume.is_floating_point() else volume.float()
            volume = _lerp(volume, axis, _neighbours(position, count, volume.device))
    return volume


def _nearest(position: np.ndarray, count: int) -> np.ndarray:
    """The index of the voxel nearest to each position."""
    return np.floor(position + 0.5).clip(0, count - 1).astype(np.int64)


def _neighbours(position: np.ndarray, count: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The voxel below each position, the one above, and the weight of the latter."""
    below = np.floor(position).clip(0, count - 1)
    weight = torch.from_numpy((position - below).clip(0, 1).astype(np.float32))
    below = torch.from_numpy(below.astype(np.int64))
    return below.to(device), (below + 1).clamp(max=count - 1).to(device), weight.to(device)


def _lerp(volume: torch.Tensor, axis: int, neighbours) -> torch.Tensor:
    """Linear interpolation along one axis between the `_neighbours` of each position."""
    below, above, weight = neighbours
    weight = weight.to(volume.dtype).view(-1, *[1] * (volume.ndim - 1 - axis))
    return volume.index_select(axis, below).lerp_(volume.index_select(axis, above), weight)
