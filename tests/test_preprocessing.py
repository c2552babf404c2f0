"""The way to network space and back."""

import nibabel
import numpy as np
import pytest
import torch
from conftest import LPS, make_head
from monai.transforms import NormalizeIntensity

from models.brats import MODALITIES, TARGETS
from models.cases import find_cases
from models.errors import InputError, InputWarning
from models.labels import to_training_labels
from models.nifti import spacing_of, to_ras
from models.phantom import make_case
from models.preprocessing import (
    foreground_box,
    intensity_window,
    label_map,
    native_label_map,
    network_spacing_mm,
    to_native,
    to_network,
)
from models.volumes import read_case

ORIENTATIONS = ["RAS", "LPS", "PIR", "SAL", "ILA"]


def head(seed=0):
    volumes, label = make_head(seed)
    return np.stack([volumes[m] for m in ("t1", "t1ce", "t2", "flair")]).astype(np.float32), label


def affine_of(codes: str, spacing=(1, 1, 1)) -> np.ndarray:
    """An affine whose axes run as `codes` say, spacing in the order of the array axes."""
    orientation = nibabel.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, (ras, sign) in enumerate(orientation):
        affine[int(ras), axis] = sign * spacing[axis]
    affine[:, 3] = (11, -7, 5, 1)
    return affine


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_reorientation_is_what_nibabel_does(codes):
    image, _ = head()
    affine = affine_of(codes, (1, 2, 3))
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(image[0], affine))
    assert np.array_equal(to_ras(image, affine)[0], canonical.get_fdata(dtype=np.float32))
    assert spacing_of(affine) == pytest.approx(canonical.header.get_zooms())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_with_the_crop_alone_a_label_map_comes_back_exactly(codes):
    image, label = head()
    result = to_network(image, label, affine_of(codes), size=None)
    back = to_native(result["label"][0], result["geometry"])
    assert np.array_equal(back.numpy(), label)


def test_without_the_crop_the_whole_head_is_kept():
    image, label = head()
    result = to_network(image, label, affine_of("LPS"), size=None, crop=False, normalize="zscore")
    foreground = image[:, ::-1, ::-1]  # the RAS axes of an LPS file
    expected = NormalizeIntensity(nonzero=True, channel_wise=True)(foreground.astype(np.float32).copy())
    torch.testing.assert_close(result["image"], torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
    assert np.array_equal(to_native(result["label"][0], result["geometry"]).numpy(), label)


def scaled(volume: np.ndarray) -> np.ndarray:
    """One modality to 0-1 between the percentiles of its non-zero voxels, as the README says it."""
    low, high = np.percentile(volume[volume != 0], (0.5, 99.5))
    return np.clip((volume - low) / (high - low), 0, 1) * (volume != 0)


def test_the_right_spacing_is_not_resampled():
    image, label = head()
    result = to_network(image, label, np.eye(4), size=None)
    occupied = np.argwhere((image != 0).any(0))
    box = tuple(slice(low, high + 1) for low, high in zip(occupied.min(0), occupied.max(0), strict=True))
    assert torch.equal(result["label"][0], torch.from_numpy(label[box]).long())
    expected = np.stack([scaled(volume)[box] for volume in image])
    assert np.allclose(result["image"].numpy(), expected, atol=1e-6)


def test_resizing_is_torch_interpolate_about_voxel_edges():
    image, label = head()
    result = to_network(image, label, np.eye(4), size=32)
    crop = to_network(image, label, np.eye(4), size=None)
    linear = torch.nn.functional.interpolate(crop["image"][None], size=(32, 32, 32), mode="trilinear")[0]
    nearest = torch.nn.functional.interpolate(crop["label"][None].float(), size=(32, 32, 32), mode="nearest-exact")[0]
    assert torch.allclose(result["image"], linear, atol=1e-6)
    assert torch.equal(result["label"], nearest.long())


def test_resampling_to_1_mm_keeps_every_point_where_it_is():
    """A linear ramp stays the same ramp in mm: an error of half a voxel would show as an offset."""
    x, y, z = np.meshgrid(np.arange(30), np.arange(20), np.arange(12), indexing="ij")
    ramp = (100 + 1.0 * x * 0.8 + 2.0 * y * 1.0 + 3.0 * z * 2.5).astype(np.float32)
    affine = np.diag([0.8, 1.0, 2.5, 1.0])
    result = to_network(np.stack([ramp] * 4), None, affine, size=None)
    assert result["geometry"]["resampled_shape"] == [24, 20, 30]
    low, high = result["normalization"]["t1"]
    inner = result["image"][0, 4:-4, 4:-4, 4:-4].numpy() * (high - low) + low
    # centre of voxel j on the 1 mm grid: (j + 0.5) mm from the edge of the first voxel
    px, py, pz = (np.arange(n)[4:-4] for n in (24, 20, 30))
    expected = 100 + 1.0 * (px[:, None, None] + 0.1) + 2.0 * py[None, :, None] + 3.0 * (pz[None, None] - 0.75)
    clipped = expected.clip(low, high)
    assert np.abs(inner - clipped).max() < 0.05


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.9, 0.9, 3.0), (1.0, 1.0, 2.0)])
def test_a_thick_sliced_case_comes_back_where_it_was(spacing):
    image, label = head()
    result = to_network(image, label, affine_of("LPS", spacing), size=96)
    back = to_native(result["label"][0], result["geometry"]).numpy()
    assert dice(back > 0, label > 0) > 0.97


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 0.9, 3.0), (1.5, 1.0, 2.0)])
def test_every_point_comes_back_to_within_a_twentieth_of_a_voxel(codes, spacing):
    """The four modalities hold the three native coordinates: what comes back says where each voxel was taken from."""
    place = np.stack(np.meshgrid(*(np.arange(1.0, n + 1) for n in (44, 48, 40)), indexing="ij"))  # from 1: 0 is outside
    image = np.concatenate([place, place[:1]]).astype(np.float32)
    result = to_network(image, None, affine_of(codes, spacing), size=96)
    back = to_native(result["image"], result["geometry"]).numpy()
    inner = (slice(None), slice(4, -4), slice(4, -4), slice(4, -4))  # the percentiles clip the ends
    for axis, modality in enumerate(("t1", "t1ce", "t2")):
        low, high = result["normalization"][modality]
        found = back[axis] * (high - low) + low
        assert np.abs(found[inner[1:]] - place[axis][inner[1:]]).max() < 0.05


def test_probabilities_come_back_linearly_and_zero_outside_the_crop():
    image, label = head()
    result = to_network(image, label, LPS, size=48)
    onehot = torch.nn.functional.one_hot(result["label"][0], 4).permute(3, 0, 1, 2).float()  # [4, D, H, W]
    native = to_native(onehot, result["geometry"])
    assert native.shape == (4, *label.shape)
    brain = (image != 0).any(0)
    box = np.zeros_like(brain)
    box[tuple(slice(*(np.flatnonzero(brain.any(axis=o))[[0, -1]] + [0, 1])) for o in ((1, 2), (0, 2), (0, 1)))] = True
    assert np.allclose(native.sum(0).numpy()[box], 1, atol=1e-5) and not native.numpy()[:, ~box].any()
    assert dice(native.argmax(0).numpy() > 0, label > 0) > 0.97


def raw_intensities():
    image, _ = head()
    image[1, 20, 20, 20] = 15000  # a vessel
    image[2, 3, 3, 3] = -7  # after skull stripping
    return image


def test_intensities_go_to_0_1_between_the_percentiles_of_the_foreground():
    image = raw_intensities()
    result = to_network(image, None, np.eye(4), size=None)
    (x0, x1), (y0, y1), (z0, z1) = result["geometry"]["crop_box"]
    for channel, volume in enumerate(image):
        assert np.allclose(result["image"][channel], scaled(volume)[x0:x1, y0:y1, z0:z1], atol=1e-5)


def test_background_stays_0_where_the_window_reaches_below_it():
    image = np.random.default_rng(0).normal(0, 1, (4, 12, 12, 12)).astype(np.float32)
    image[:, 3:6, 3:6, 3:6] = 0
    result = to_network(image, None, np.eye(4), size=None)["image"].numpy()
    assert not result[:, 3:6, 3:6, 3:6].any()
    assert np.allclose(result, np.stack([scaled(volume) for volume in image]), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("at_a_time", [100, 2**22])
def test_the_window_of_intensities_is_that_of_numpy_percentile(monkeypatch, dtype, at_a_time):
    monkeypatch.setattr("models.preprocessing.COUNTED_AT_A_TIME", at_a_time)
    rng = np.random.default_rng(0)
    for volume in (*raw_intensities(), rng.integers(-32768, 32768, (9, 9, 9)), rng.integers(0, 2, (3, 3, 3))):
        voxels = volume.astype(dtype)
        expected = np.percentile(voxels[voxels != 0], (0.5, 99.5))
        assert intensity_window(torch.from_numpy(voxels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_z_scores_are_those_of_monai_over_the_foreground_of_each_modality(dtype):
    image = raw_intensities().astype(dtype)
    result = to_network(image, None, np.eye(4), size=None, normalize="zscore")
    (x0, x1), (y0, y1), (z0, z1) = result["geometry"]["crop_box"]
    expected = NormalizeIntensity(nonzero=True, channel_wise=True)(image.astype(np.float32))
    assert np.allclose(result["image"], expected[:, x0:x1, y0:y1, z0:z1], atol=1e-4)
    assert not result["image"].numpy()[image[:, x0:x1, y0:y1, z0:z1] == 0].any()


def test_the_intensities_that_became_0_and_1_are_the_mean_and_one_standard_deviation_above():
    image = raw_intensities()
    normalization = to_network(image, None, np.eye(4), size=24, normalize="zscore")["normalization"]
    for modality, volume in zip(("t1", "t1ce", "t2", "flair"), image, strict=True):
        foreground = volume[volume != 0].astype(float)
        expected = foreground.mean(), foreground.mean() + foreground.std()
        assert normalization[modality] == pytest.approx(expected, rel=1e-12)


def test_z_scores_are_resized_like_the_other_intensities():
    image, _ = head()
    crop = to_network(image, None, np.eye(4), size=None, normalize="zscore")["image"]
    linear = torch.nn.functional.interpolate(crop[None], size=(32, 32, 32), mode="trilinear")[0]
    result = to_network(image, None, np.eye(4), size=32, normalize="zscore")["image"]
    assert torch.allclose(result, linear, atol=1e-5) and result.min() < 0 and result.max() > 1


def test_z_scores_do_not_depend_on_the_spacing():
    image, _ = head()
    expected = to_network(image, None, np.eye(4), size=None, normalize="zscore")
    result = to_network(image, None, np.diag([1.3, 1.3, 2.0, 1.0]), size=None, normalize="zscore")
    assert result["normalization"] == expected["normalization"]
    inside, before = (r["image"][0][r["image"][0] != 0] for r in (result, expected))
    assert float(inside.mean()) == pytest.approx(float(before.mean()), abs=0.05)


def test_one_intensity_has_no_z_scores():
    for dtype in (np.int16, np.float32):
        with pytest.raises(InputError, match="one intensity"):
            to_network(np.full((4, 8, 8, 8), 7.3).astype(dtype), None, np.eye(4), normalize="zscore")


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_layout_in_memory_and_the_type_change_nothing(codes, order, dtype):
    image, label = head()
    expected = to_network(image, label, affine_of(codes), size=24)
    stored = np.stack([volume.T if order == "F" else volume for volume in image]).astype(dtype)
    stored = stored.transpose(0, 3, 2, 1) if order == "F" else stored
    result = to_network(stored, np.asarray(label, order=order), affine_of(codes), size=24)
    assert torch.allclose(result["image"], expected["image"], atol=1e-6)
    assert torch.equal(result["label"], expected["label"]) and result["image"].is_contiguous()


@pytest.mark.parametrize("spacing", [1.002, 0.9, 1.1, 2.0])
def test_another_spacing_in_the_header_leaves_the_intensities_of_the_brain(spacing):
    """Percentiles come from native voxels, and no voxel mixes brain with background."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (44, 48, 40)), indexing="ij"))  # [3, X, Y, Z]
    brain = (((grid - np.array([22, 24, 20])[:, None, None, None]) / 17) ** 2).sum(0) < 1
    image = ((400 + 30 * np.concatenate([grid, grid[:1]])) * brain).astype(np.int16)  # a gradient along each axis
    image[:, 20, 24, 20] = rng.integers(2000, 9000, 4)  # a vessel
    expected = to_network(image, None, np.eye(4), size=None)
    result = to_network(image, None, np.diag([spacing] * 3 + [1.0]), size=None)
    assert result["normalization"] == expected["normalization"]
    for modality in range(4):
        inside, before = (r["image"][modality][r["image"][modality] > 0] for r in (result, expected))
        for share in (0.1, 0.5, 0.9):
            assert float(inside.quantile(share)) == pytest.approx(float(before.quantile(share)), abs=0.04), share
        assert float(inside.mean()) == pytest.approx(float(before.mean()), rel=0.02)


def test_beside_the_background_only_foreground_is_interpolated():
    """A head of one intensity but for a gradient along z keeps its rim at full intensity at any spacing."""
    image = np.zeros((4, 30, 30, 30), np.int16)
    image[:, 8:22, 8:22, 4:26] = 1000 + 10 * np.arange(22)
    result = to_network(image, None, np.diag([1.3, 1.3, 1.0, 1.0]), size=None)["image"][0]  # [18, 18, 22]
    profile = scaled(image[0].astype(float))[15, 15, 4:26]
    assert np.allclose(result.numpy(), profile, atol=1e-5)


def test_the_foreground_holds_negative_voxels_too():
    image = np.zeros((4, 10, 10, 10), np.float32)
    image[0, 4:6, 4:6, 4:6] = 100
    image[3, 2, 5, 8] = -3
    assert foreground_box(image) == [(2, 6), (4, 6), (4, 9)]


def test_labelled_voxels_outside_the_head_are_counted_and_told():
    image, label = head()
    label = label.copy()
    label[0, 0, :5] = 2
    with pytest.warns(InputWarning, match=rf"segmentation, 5 of {(label > 0).sum()} labelled voxels"):
        to_network(image, label, LPS, size=32)


def test_the_size_of_a_network_voxel_in_mm():
    image, label = head()
    geometry = to_network(image, label, LPS, size=32)["geometry"]
    lengths = [high - low for low, high in geometry["crop_box"]]
    assert network_spacing_mm(geometry) == [length / 32 for length in lengths]


def test_a_modality_without_contrast_is_refused():
    with pytest.raises(InputError, match="one intensity"):
        to_network(np.ones((4, 8, 8, 8), np.float32), None, np.eye(4))


def test_a_map_of_another_size_is_refused():
    image, label = head()
    geometry = to_network(image, label, LPS, size=32)["geometry"]
    with pytest.raises(InputError, match="does not fit"):
        to_native(torch.zeros(16, 16, 16), geometry)


def test_a_synthetic_case_of_brats_comes_back_exactly_where_it_keeps_its_size():
    volumes, label, affine = make_case(0, 0, spacing_mm=2.0)
    image = np.stack([volumes[modality] for modality in MODALITIES])
    result = to_network(image, label, affine, size=None, spacing_mm=2.0, normalize="zscore")
    assert result["geometry"]["network_size"] < result["geometry"]["resampled_shape"] == [120, 120, 78]
    assert np.array_equal(to_native(result["label"][0], result["geometry"]).numpy(), label)
    labels = native_label_map(torch.nn.functional.one_hot(result["label"][0], 4).movedim(-1, 0), result["geometry"])
    assert np.array_equal(labels.numpy(), label)


def test_real_cases_come_back_exactly_where_they_keep_their_size(real_cases):
    for case in find_cases(real_cases)[:3]:
        volumes = read_case(case)
        label = to_training_labels(volumes.label, "brats2021")
        result = to_network(volumes.image, label, volumes.affine, size=None)
        assert np.array_equal(to_native(result["label"][0], result["geometry"]).numpy(), label), case.name
        assert network_spacing_mm(result["geometry"]) == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("error::models.errors.InputWarning")
def test_real_cases_keep_their_tumours_at_128(real_cases):
    for case in find_cases(real_cases):
        volumes = read_case(case)
        label = to_training_labels(volumes.label, "brats2021")
        result = to_network(volumes.image, label, volumes.affine, size=128)
        back = to_native(result["label"][0], result["geometry"]).numpy()
        assert dice(np.isin(back, TARGETS["WT"]), np.isin(label, TARGETS["WT"])) >= 0.96, case.name
        assert dice(back == 3, label == 3) >= 0.88, case.name
        assert result["image"].min() >= 0 and result["image"].max() <= 1


# ---- label maps ----------------------------------------------------------------------------------------------------


def blobs(size, classes=4, seed=0, centre=0.5):
    """Smooth probabilities [C, D, H, W] with background around a few blobs."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, size),) * 3, indexing="ij"))
    logits = [np.zeros((size,) * 3)]
    for _ in range(1, classes):
        middle = np.clip(centre + rng.uniform(-0.15, 0.15, 3), 0, 1)[:, None, None, None]
        logits.append(4 - 40 * np.sqrt(((grid - middle) ** 2).sum(0)) + rng.normal(0, 0.3, (size,) * 3))
    return torch.from_numpy(np.stack(logits)).float().softmax(0)


AFFINES = {
    "LPS": np.diag([-1.0, -1.0, 1.0, 1.0]),
    "turned axes": np.array([[0, 0, 1.0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]),
    "thick slices": np.diag([0.8, 0.9, 3.0, 1.0]),
    "coarser than the network": np.diag([2.5, 2.5, 2.5, 1.0]),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("centre", [0.5, 0.0, 1.0])  # in the middle, and cut off by the border
def test_native_labels_are_those_of_the_whole_volume_taken_back(affine, centre):
    volume = np.zeros((4, 40, 36, 30), np.float32)
    volume[:, 5:33, 4:30, 3:25] = np.random.default_rng(0).uniform(1, 2, (4, 28, 26, 22))
    geometry = to_network(volume, None, affine, 32)["geometry"]
    probabilities = blobs(32, centre=centre)
    whole = to_native(probabilities, geometry).argmax(0)
    assert (whole > 0).any(), "no tumour to compare"
    labels = native_label_map(probabilities, geometry)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), whole)


def test_no_tumour_gives_an_empty_native_map():
    geometry = to_network(np.ones((4, 20, 22, 24), np.float32) + np.arange(24), None, np.eye(4), 16)["geometry"]
    probabilities = torch.tensor([0.7, 0.1, 0.1, 0.1])[:, None, None, None].expand(4, 16, 16, 16)
    labels = native_label_map(probabilities, geometry)
    assert labels.shape == (20, 22, 24) and not labels.any()


def test_a_running_maximum_is_argmax_and_takes_the_first_of_equals():
    values = torch.randint(0, 3, (4, 9, 10, 11), generator=torch.Generator().manual_seed(0)).float()
    assert (values.amax(0) == values).sum() > values[0].numel(), "no ties"
    assert np.array_equal(label_map(values).numpy(), values.numpy().argmax(0))
