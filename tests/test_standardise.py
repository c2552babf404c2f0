"""The first step of a network: against numpy, and in every network the same."""

import numpy as np
import pytest
import torch
from conftest import run_script

from models import build_model
from models.manifest import manifest_path, write_manifest
from models.runs import checkpoint_of, open_run, standardizes
from models.standardise import standardise

NETWORKS = [
    ("unet", {"channels": (4, 4, 8, 8, 8)}),
    ("unet", {"variant": "full-resolution", "channels": (4, 6, 8), "convolutions": (1, 2, 2)}),
    ("swinunetr", {"feature_size": 12, "depths": (1, 1, 1, 1)}),
]


def head_image(seed=0, cases=2) -> torch.Tensor:
    """[B, 4, 32, 32, 32], 0 outside of a box, and in the box where a modality is black."""
    image = torch.rand(cases, 4, 32, 32, 32, generator=torch.Generator().manual_seed(seed))
    image[:, 1] = (image[:, 1] - 0.5).clamp(min=0)
    mask = torch.zeros(32, 32, 32)
    mask[4:20, 6:30, 3:25] = 1
    return image * mask


def test_every_modality_has_mean_0_and_deviation_1_over_the_head_and_0_around_it():
    image = head_image()
    result = standardise(image).numpy()
    for case, standardised in zip(image.numpy().astype(np.float64), result, strict=True):
        head = (case > 0).any(0)  # black voxels of one modality belong to it
        for modality, found in zip(case, standardised, strict=True):
            expected = (modality - modality[head].mean()) / modality[head].std()
            np.testing.assert_allclose(found[head], expected[head], atol=1e-5)
            assert not found[~head].any()


def test_the_contrast_of_a_scanner_makes_no_difference():
    image = head_image()
    head = (image > 0).any(1, keepdim=True)
    factors, offsets = torch.tensor([0.5, 0.8, 1.0, 0.3]), torch.tensor([0.2, 0.1, 0.0, 0.4])
    other = (image * factors.view(4, 1, 1, 1) + offsets.view(4, 1, 1, 1)) * head
    torch.testing.assert_close(standardise(other), standardise(image), atol=1e-4, rtol=1e-4)


def test_a_batch_is_standardised_case_by_case():
    image = head_image(cases=3)
    torch.testing.assert_close(standardise(image)[1:2], standardise(image[1:2]))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_an_image_of_one_value_stays_finite(value):
    assert torch.equal(standardise(torch.full((1, 4, 8, 8, 8), value)), torch.zeros(1, 4, 8, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_do_not_overflow(dtype):
    image = torch.rand(1, 4, 64, 64, 64).to(dtype)  # the sum of 262,144 voxels is above the largest float16
    result = standardise(image)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), standardise(image.float()), atol=0.02, rtol=0.01)


@pytest.mark.parametrize(("network", "config"), NETWORKS)
def test_a_network_standardises_its_input_and_has_the_same_weights(network, config):
    plain, standardising = (build_model(network, **config, standardize=value).eval() for value in (False, True))
    standardising.load_state_dict(plain.state_dict(), strict=True)
    image = head_image(cases=1)
    with torch.no_grad():
        torch.testing.assert_close(standardising(image), plain(standardise(image)))
        assert (standardising(image) - plain(image)).abs().max() > 1e-3


@pytest.mark.parametrize(("network", "config"), NETWORKS)
def test_it_compiles_into_one_graph_and_can_be_exported(network, config):
    torch._dynamo.reset()
    model, image = build_model(network, **config, standardize=True).eval(), head_image(cases=1)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), expected)
        exported = torch.export.export(model, (image,)).module()(image)
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("normalize", "patch", "begins_with", "expected"), [
    ("percentile", None, None, True),
    ("percentile", 64, None, False),  # the mean of a patch is not that of the head
    ("zscore", None, None, False),
    ("percentile", None, False, False),
    ("zscore", None, True, True),
])  # fmt: skip
def test_whole_cases_of_0_to_1_are_standardised_unless_the_first_weights_were_trained_otherwise(
    normalize, patch, begins_with, expected, tmp_path
):
    settings = {"size": 32, "spacing_mm": 1.0, "normalize": normalize}
    write_manifest(manifest_path(tmp_path), {"settings": settings, "cases": {}})
    if begins_with is not None:
        weights = build_model("unet", channels=(4, 4, 8, 8, 8), standardize=begins_with)
        torch.save(checkpoint_of(weights, "off", 1, None), tmp_path / "best.pt")
    assert standardizes(tmp_path, patch, begins_with is not None and str(tmp_path)) is expected


def test_weights_that_want_standardised_input_do_not_get_any_other(tensors, tmp_path):
    run_script("train_unet.py", tensors, "--epochs", 1, "--amp", "off", "--run-name", "a", cwd=tmp_path)
    assert open_run(tmp_path / "models/unet/results/a").config["standardize"]
    refused = run_script("train_unet.py", tensors, "--init", "models/unet/results/a", "--no-standardize", cwd=tmp_path,
                         status=2)  # fmt: skip
    assert "not what these flags ask for" in refused.stderr
