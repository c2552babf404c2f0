"""Strong augmentation against scipy: where voxels come from, and what happens to intensities."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from models import augment_strong
from models.augment import _flips_and_rotation, augment
from models.augment_strong import (
    Warp,
    blur_matrix,
    change_intensities,
    draw_intensities,
    draw_warp,
    draw_waves,
    resample,
    resolution_matrix,
    smooth_field,
)

SHAPE = (10, 10, 14)
OFF = {"flip_probability": 0, "rotate_probability": 0, "noise_probability": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_case(seed=0, shape=SHAPE):
    """An image of four smooth channels and a label of soft blobs, 0 along the border."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.random((4, *shape)), (0, 2, 2, 2))
    label = np.digitize(ndimage.gaussian_filter(rng.random((1, *shape)), (0, 2, 2, 2)), (0.47, 0.5, 0.53))
    return torch.from_numpy(image).float(), torch.from_numpy(label)


def resampled(image, label, warp, order=(0, 1, 2), backwards=()):
    image_out, label_out = torch.empty_like(image, dtype=torch.float32), torch.empty_like(label, dtype=torch.long)
    resample(image, label, warp, list(order), list(backwards), image_out, label_out)
    return image_out.numpy(), label_out.numpy()


def always(monkeypatch, *changes):
    """These changes happen to every case, and no others."""
    monkeypatch.setattr(augment_strong, "PROBABILITIES",
                        {name: float(name in changes) for name in augment_strong.PROBABILITIES})  # fmt: skip


# ---- geometry ------------------------------------------------------------------------------------------------------


TURNS = pytest.mark.parametrize(
    ("order", "backwards"), [((0, 1, 2), ()), ((0, 1, 2), (1, 2)), ((1, 0, 2), (0,)), ((1, 0, 2), (1, 2))]
)


def moved_by_scipy(volume, warp, order, backwards):
    """A volume float64 after flips and turns of numpy and an affine transformation of scipy, without deformation."""
    moved = np.flip(volume.transpose(order), backwards)
    matrix, center = warp.matrix.double().numpy(), (np.array(moved.shape) - 1) / 2
    return ndimage.affine_transform(moved, matrix, center - matrix @ center, order=1, mode="grid-constant", cval=0)


def shares_by_scipy(label, warp, order, backwards):
    """How much background and each label weighs in each voxel, [4, D, H, W], and where one clearly weighs most."""
    parts = [moved_by_scipy((label == value).astype(float), warp, order, backwards) for value in (1, 2, 3)]
    shares = np.stack([1 - sum(parts), *parts])
    second, first = np.sort(shares, axis=0)[-2:]
    return shares, first - second > 1e-3


@TURNS
def test_scales_and_rotations_are_those_of_scipy_after_flips_and_turns_of_numpy(order, backwards, monkeypatch):
    always(monkeypatch, "scale", "rotation")
    (image, label), warp = smooth_case(), draw_warp(generator())
    image_out, label_out = resampled(image, label, warp, order, backwards)
    for channel, out in zip(image.double().numpy(), image_out, strict=True):
        assert np.abs(moved_by_scipy(channel, warp, order, backwards) - out).max() < 1e-4
    shares, clear = shares_by_scipy(label[0].numpy(), warp, order, backwards)
    assert clear.mean() > 0.9 and np.array_equal(shares.argmax(0)[clear], label_out[0][clear])


@TURNS
def test_a_small_tumour_is_where_scipy_has_it_wherever_it_was(order, backwards, monkeypatch):
    always(monkeypatch, "scale", "rotation")
    for seed in range(20):
        label, warp = np.zeros(SHAPE, int), draw_warp(generator(seed))
        corner = np.random.default_rng(seed).integers(0, np.array(SHAPE) - 3)
        label[tuple(slice(low, low + 3) for low in corner)] = 1 + seed % 3
        _, label_out = resampled(torch.zeros(4, *SHAPE), torch.from_numpy(label)[None], warp, order, backwards)
        shares, clear = shares_by_scipy(label, warp, order, backwards)
        assert np.array_equal(shares.argmax(0)[clear], label_out[0][clear])


def test_no_tumour_and_one_that_leaves_the_volume_become_background():
    image, label = torch.zeros(4, *SHAPE), torch.zeros(1, *SHAPE, dtype=torch.long)
    assert not resampled(image, label, Warp(torch.eye(3), None))[1].any()
    label[0, 0, 0, 0] = 3
    assert not resampled(image, label, Warp(torch.eye(3) / 2, None))[1].any()  # magnified: the corners are outside


def test_a_deformation_moves_voxels_by_the_sum_of_its_cosines():
    image, label = smooth_case()
    warp = Warp(torch.eye(3), 0.1 * draw_waves(3, generator()))
    x, y, z = (np.cos(np.pi * np.outer(np.arange(4), np.arange(side) + 0.5) / side) for side in SHAPE)
    displacement = np.einsum("cijk,id,jh,kw->cdhw", warp.waves.numpy(), x, y, z)
    half = (np.array(SHAPE) - 1) / 2
    # torch's grids have the last axis first
    places = np.indices(SHAPE) + displacement[::-1] * half[:, None, None, None]
    image_out, _ = resampled(image, label, warp)
    for channel, out in zip(image.numpy(), image_out, strict=True):
        expected = ndimage.map_coordinates(channel.astype(float), places, order=1, mode="grid-constant", cval=0)
        assert np.abs(expected - out).max() < 1e-4


def test_nothing_moves_with_the_identity():
    image, label = smooth_case()
    image_out, label_out = resampled(image, label, Warp(torch.eye(3), None))
    assert np.allclose(image_out, image, atol=1e-6) and np.array_equal(label_out, label)


def test_scales_and_angles_keep_to_their_ranges(monkeypatch):
    always(monkeypatch, "scale", "rotation")
    for seed in range(200):
        singular = torch.linalg.svdvals(draw_warp(generator(seed)).matrix)
        assert singular.min() >= 1 / 1.6 - 1e-5 and singular.max() <= 1 / 0.65 + 1e-5
    always(monkeypatch, "rotation")
    matrices = [draw_warp(generator(seed)).matrix for seed in range(200)]
    assert all(torch.allclose(m @ m.T, torch.eye(3), atol=1e-5) and torch.linalg.det(m) > 0 for m in matrices)


def test_a_deformation_folds_nothing(monkeypatch):
    """The Jacobian of places over places stays positive, so that what was whole stays whole."""
    always(monkeypatch, "elastic")
    for seed in range(30):
        field = smooth_field(draw_warp(generator(seed)).waves, (32, 32, 32)).flip(0) * 15.5  # voxels
        slopes = torch.stack([torch.stack(torch.gradient(part)) for part in field]).permute(2, 3, 4, 0, 1)
        assert torch.linalg.det(torch.eye(3) + slopes).min() > 0


# ---- intensities ---------------------------------------------------------------------------------------------------


def test_the_blur_is_a_gaussian_that_loses_nothing_at_the_border():
    image = np.random.default_rng(0).random(SHAPE)
    changed = torch.from_numpy(np.stack([image] * 2)).float()
    change_intensities(changed, {"blur_sd": torch.tensor([0.8, 0.0]), "resolution": torch.ones(2)})
    weights = ndimage.gaussian_filter(np.ones(SHAPE), 0.8, mode="constant", truncate=20)
    expected = ndimage.gaussian_filter(image, 0.8, mode="constant", truncate=20) / weights
    assert np.abs(changed[0].numpy() - expected).max() < 1e-5
    assert np.allclose(changed[1], image)


def test_a_lower_resolution_is_what_torch_makes_of_a_smaller_volume():
    image = torch.rand(1, 1, 8, 8, 8)
    changed = image[0].clone()
    change_intensities(changed, {"blur_sd": torch.zeros(1), "resolution": torch.tensor([0.5])})
    small = torch.nn.functional.interpolate(image, (4, 4, 4), mode="nearest-exact")
    assert torch.allclose(changed, torch.nn.functional.interpolate(small, (8, 8, 8), mode="trilinear")[0], atol=1e-5)
    assert torch.allclose(blur_matrix(9, 1.0).sum(0), torch.ones(9))
    assert torch.allclose(resolution_matrix(9, 0.6).sum(0), torch.ones(9))


def test_contrast_is_about_the_mean_of_the_foreground_and_brightness_in_its_deviations():
    image = torch.rand(2, *SHAPE) * (torch.rand(2, *SHAPE) > 0.4)
    changed = image.clone()
    change_intensities(changed, {"contrast": torch.tensor([0.7, 1.3]), "brightness": torch.tensor([0.2, -0.1])})
    for channel, contrast, brightness, out in zip(image.numpy(), (0.7, 1.3), (0.2, -0.1), changed.numpy(), strict=True):
        inside = channel[channel != 0]
        expected = (inside - inside.mean()) * contrast + inside.mean() + brightness * inside.std()
        assert np.allclose(out[channel != 0], expected.clip(channel.min(), channel.max()), atol=1e-5)


def test_gamma_keeps_the_ends_of_the_range_also_of_a_z_score():
    image = torch.randn(2, *SHAPE)
    changed = image.clone()
    change_intensities(changed, {"gamma": torch.tensor([0.7, 1.5])})
    for channel, gamma, out in zip(image.numpy(), (0.7, 1.5), changed.numpy(), strict=True):
        low, high = channel.min(), channel.max()
        assert np.allclose(out, ((channel - low) / (high - low)) ** gamma * (high - low) + low, atol=1e-4)


def test_a_bias_field_is_smooth_and_the_same_for_all_modalities_but_for_its_strength():
    waves = draw_waves(1, generator())
    image = torch.full((2, *SHAPE), 0.25)
    image[:, 0, 0, 0], image[:, 0, 0, 1] = 0, 1  # the range
    changed = image.clone()
    change_intensities(changed, {"bias_waves": waves, "bias_sd": torch.tensor([0.1, 0.2])})
    first, second = (changed[:, 1:] / image[:, 1:]).log()
    assert torch.allclose(2 * first, second, atol=1e-4) and first.std() > 0.02
    assert torch.allclose(first, 0.1 * smooth_field(waves, SHAPE)[0, 1:], atol=1e-4)


@pytest.mark.parametrize("normalized", [lambda x: x.clamp(0, 1), lambda x: (x - 0.5) * 4])
def test_background_stays_0_and_values_keep_within_the_range_of_their_case(normalized):
    foreground = torch.zeros(SHAPE, dtype=torch.bool)
    foreground[2:8, 2:8, 2:12] = True
    image = normalized(torch.rand(4, *SHAPE)) * foreground
    label = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    for seed in range(60):
        out, _ = augment([image], [label], generator(seed), **OFF, strong=True)
        assert image.min() - 1e-5 <= out.min() and out.max() <= image.max() + 1e-5
        if draw_warp(skipped(generator(seed))) is None:
            assert not out[0][:, ~foreground].any()


def skipped(drawn_from):
    """The generator after the draws of flips and turns."""
    _flips_and_rotation(SHAPE, drawn_from, 0, 0)
    return drawn_from


# ---- together ------------------------------------------------------------------------------------------------------


def test_image_and_label_stay_together():
    """The label follows the first channel, which shows it."""
    _, label = smooth_case(shape=(16, 16, 16))
    image = (label == 2).float().repeat(4, 1, 1, 1)
    for seed in range(20):
        warp = draw_warp(generator(seed))
        if warp:
            image_out, label_out = resampled(image, label, warp)
            clear = np.abs(image_out[0] - 0.5) > 0.2
            assert np.array_equal(image_out[0][clear] > 0.5, label_out[0][clear] == 2)


def test_the_same_generator_state_gives_the_same_batch_and_another_does_not():
    image, label = smooth_case()
    batches = [augment([image] * 3, [label] * 3, generator(seed), strong=True) for seed in (1, 1, 2)]
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], batches[2][0])


def test_compact_cases_are_augmented_like_whole_ones():
    image, label = smooth_case()
    compact = image.half()
    for seed in range(10):
        one = augment([compact], [label.to(torch.uint8)], generator(seed), strong=True)
        other = augment([compact.float()], [label], generator(seed), strong=True)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_changes_happen_as_often_as_they_should():
    counts = dict.fromkeys(("warp", "contrast", "gamma", "bias_sd", "blur_sd"), 0)
    drawn_from = generator()
    for _ in range(3000):
        counts["warp"] += draw_warp(drawn_from) is not None
        for name in draw_intensities(4, drawn_from).keys() & counts.keys():
            counts[name] += 1
    expected = {"warp": 1 - 0.7**3, "contrast": 0.3, "gamma": 0.3, "bias_sd": 0.2, "blur_sd": 1 - 0.8**2}
    assert all(abs(counts[name] / 3000 - share) < 0.03 for name, share in expected.items()), counts
