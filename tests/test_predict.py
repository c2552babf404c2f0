"""Predictions: windows, mirror images, several networks, and how far these are apart."""

from itertools import product

import numpy as np
import pytest
import torch

from models.inference import predict as module
from models.inference.predict import Member, accumulators_gib, predict, predict_all
from models.losses import region_probabilities


def random_image(*sizes, seed=0):
    return torch.randn(4, *sizes, generator=torch.Generator().manual_seed(seed))


def network_of(channels: int, seed=0) -> torch.nn.Module:
    """One whose output depends on where a window ends (padding) and on everything in it (norm)."""
    torch.manual_seed(seed)
    layers = torch.nn.Conv3d(4, channels, 3, padding=1), torch.nn.InstanceNorm3d(channels)
    return torch.nn.Sequential(*layers).eval()


def voxelwise(channels: int, seed=0) -> torch.nn.Module:
    """One that treats every voxel alike, wherever it is."""
    torch.manual_seed(seed)
    return torch.nn.Conv3d(4, channels, 1).eval()


def constant(*probabilities):
    """One that knows the probabilities of its classes, or regions, in advance."""
    p = torch.tensor(probabilities)
    logits = p.log() if len(p) == 4 else p.logit()
    return lambda image: logits.view(1, -1, 1, 1, 1).expand(1, -1, *image.shape[2:])


def numpy_softmax(logits):
    e = np.exp(logits - logits.max(0))
    return e / e.sum(0)


# ---- windows -------------------------------------------------------------------------------------------------------


def mean_over_windows(network, image, window, overlap, weights):
    """Logits [C, D, H, W] of an image as an array, window by window, in float64."""
    sizes, image = image.shape[1:], image.numpy()
    before = [max(0, side - size) // 2 for side, size in zip(window, sizes, strict=True)]
    after = [max(0, side - size) - n for side, size, n in zip(window, sizes, before, strict=True)]
    padded = np.pad(image, [(0, 0), *zip(before, after, strict=True)])
    starts, weight = [], np.ones(())
    for size, side in zip(padded.shape[1:], window, strict=True):
        steps = range(0, size, int(side * (1 - overlap)))
        starts.append(sorted({min(step, size - side) for step in steps}))  # the last one ends with the axis
        offset = (np.arange(side) - (side - 1) / 2) / (side / 8)
        weight = weight[..., None] * (np.exp(-(offset**2) / 2) if weights == "gaussian" else np.ones(side))
    weight = np.maximum(weight, 1e-3)
    total, weights = 0, np.zeros(padded.shape[1:])
    for corner in product(*starts):
        box = tuple(slice(low, low + side) for low, side in zip(corner, window, strict=True))
        with torch.no_grad():
            logits = network(torch.from_numpy(padded[:, *box])[None])[0].double().numpy()
        whole = np.zeros((len(logits), *padded.shape[1:]))
        whole[:, *box] = logits * weight
        total, weights[box] = total + whole, weights[box] + weight
    inside = tuple(slice(n, n + size) for n, size in zip(before, sizes, strict=True))
    return (total / weights)[:, *inside]


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ((16, 16, 16), (8, 8, 8)),
        ((17, 14, 13), (8, 14, 10)),  # another side along each axis, one of them the whole; the last windows lie closer
        ((5, 17, 8), (8, 8, 8)),  # padded by 1 voxel on one side and 2 on the other
        ((5, 6, 7), (8, 8, 8)),
    ],
)
def test_windows_are_weighted_and_averaged_before_the_softmax(sizes, window, overlap, weights):
    image = random_image(*sizes)
    for channels, activation in ((4, numpy_softmax), (3, lambda logits: 1 / (1 + np.exp(-logits)))):
        network = network_of(channels)
        expected = activation(mean_over_windows(network, image, window, overlap, weights))
        actual, _ = predict_all([Member(network, None, window, overlap, weights)], image)
        assert np.allclose(actual, expected, rtol=0, atol=1e-5)


def test_an_image_of_the_windows_size_is_predicted_in_one_pass():
    image, network = random_image(8, 10, 12), network_of(4)
    assert torch.equal(predict(network, image, window=(8, 10, 12)), predict(network, image))


def test_a_network_takes_several_windows_at_once_and_an_engine_one(monkeypatch):
    monkeypatch.setitem(module.WINDOWS_AT_ONCE, "cpu", 3)
    image, network, batches = random_image(8, 16, 32), network_of(4), []
    network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    of_network = predict(network, image, window=(8, 8, 8), overlap=0)
    assert batches == [3, 3, 2]
    batches.clear()
    of_engine = predict(lambda windows: network(windows), image, window=(8, 8, 8), overlap=0)
    assert batches == [1] * 8
    torch.testing.assert_close(of_network, of_engine)


def test_half_precision_is_summed_in_float32():
    """Windows of bf16 that all say the same give just that, whatever their weights."""
    logits = torch.tensor([0.1, 3.3, -2.7, 0.9]).bfloat16()
    network = lambda windows: logits.view(1, 4, 1, 1, 1).expand(len(windows), 4, *windows.shape[2:])  # noqa: E731
    actual = predict(network, random_image(16, 12, 12), window=(8, 8, 8), overlap=0.7)
    expected = logits.float().softmax(0).view(4, 1, 1, 1).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_accumulators_of_a_whole_brats_file():
    """A float32 of 240 x 240 x 155 voxels for each channel, and one for the weights."""
    assert accumulators_gib((240, 240, 155), channels=4) == 5 * 240 * 240 * 155 * 4 / 2**30
    assert round(accumulators_gib((240, 240, 155), channels=3), 3) == 0.133


# ---- mirror images -------------------------------------------------------------------------------------------------


def test_mirror_images_change_nothing_for_a_network_that_treats_all_voxels_alike():
    image, network = random_image(6, 7, 8), voxelwise(4)
    torch.testing.assert_close(predict(network, image, flips=True), predict(network, image))
    windows = predict(network, image, flips=True, window=(4, 4, 4))
    torch.testing.assert_close(windows, predict(network, image))


def test_mirror_images_are_predicted_turned_back_and_averaged():
    image, network = random_image(6, 7, 8), network_of(4)
    whole_tumour, expected = [], 0
    for axes in [[a for a, flipped in zip((1, 2, 3), s, strict=True) if flipped] for s in product((0, 1), repeat=3)]:
        with torch.no_grad():
            logits = network(torch.from_numpy(np.flip(image.numpy(), axes).copy())[None])[0].numpy()
        probabilities = np.flip(numpy_softmax(logits), axes)
        whole_tumour.append(probabilities[1:].sum(0))
        expected = expected + probabilities / 8
    actual, spread = predict_all([Member(network)], image, flips=True)
    assert np.allclose(actual, expected, atol=1e-6)
    assert np.allclose(spread, np.std(whole_tumour, 0), atol=1e-6)


def test_a_network_that_saw_other_axes_sees_them_again():
    image, network = random_image(6, 7, 8), network_of(3)
    with torch.no_grad():
        expected = network(image.flip(1, 2)[None])[0].flip(1, 2).sigmoid()
    actual, spread = predict_all([Member(network, mirrored=(1, 2))], image)
    assert torch.equal(actual, expected) and spread is None
    all_eight, _ = predict_all([Member(network, mirrored=(1, 2))], image, flips=True)
    torch.testing.assert_close(all_eight, predict(network, image, flips=True))


# ---- several networks ----------------------------------------------------------------------------------------------


def test_the_mean_of_two_networks_and_their_spread():
    image = random_image(2, 3, 4)
    members = [Member(constant(0.7, 0.1, 0.1, 0.1)), Member(constant(0.1, 0.3, 0.2, 0.4))]  # WT: 0.3 and 0.9
    probabilities, spread = predict_all(members, image)
    expected = torch.tensor([0.4, 0.2, 0.15, 0.25]).view(4, 1, 1, 1).expand(4, 2, 3, 4)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(spread, torch.full((2, 3, 4), 0.3))


def test_a_single_prediction_has_no_spread():
    assert predict_all([Member(voxelwise(4))], random_image(2, 3, 4))[1] is None


def test_two_networks_of_regions_give_regions():
    members = [Member(constant(0.2, 0.9, 0.1)), Member(constant(0.4, 0.7, 0.3))]  # TC, WT, ET
    probabilities, spread = predict_all(members, random_image(2, 3, 4))
    torch.testing.assert_close(probabilities[:, 0, 0, 0], torch.tensor([0.3, 0.8, 0.2]))
    torch.testing.assert_close(spread, torch.full((2, 3, 4), 0.1))


def test_labels_and_regions_together_become_regions():
    of_labels, of_regions = constant(0.1, 0.3, 0.2, 0.4), constant(0.1, 0.3, 0.2)  # the first: TC 0.7, WT 0.9, ET 0.4
    members = [Member(of_labels), Member(of_regions), Member(of_labels)]
    probabilities, spread = predict_all(members, random_image(2, 3, 4))
    torch.testing.assert_close(probabilities[:, 1, 2, 3], torch.tensor([1.5 / 3, 2.1 / 3, 1.0 / 3]))
    torch.testing.assert_close(spread[1, 2, 3], torch.tensor(np.std([0.9, 0.3, 0.9]), dtype=torch.float32))


def test_members_have_windows_of_their_own():
    image, whole, windowed = random_image(12, 8, 8), network_of(4, seed=1), network_of(3, seed=2)
    members = [Member(whole), Member(windowed, window=(8, 8, 8), overlap=0.5)]
    probabilities, _ = predict_all(members, image)
    parts = region_probabilities(predict(whole, image)), predict(windowed, image, window=(8, 8, 8))
    torch.testing.assert_close(probabilities, (parts[0] + parts[1]) / 2)
