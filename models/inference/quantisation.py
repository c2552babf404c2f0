"""The OpenVINO engine in int8: weights and activations rounded to 8 bits after the training, with nncf.

The ranges of the activations are found with a few training images, the calibration. The result is no longer quite the
network as it was trained: it runs only if it is asked for by name, and only if its labels are nearly the same.
"""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.errors import InputError
from models.inference.exports import openvino_core, openvino_session
from models.losses import labels_from_logits
from models.runs import Run
from models.tensors import load_case

CASES = 20  # of the calibration, at most
# Shares of equal labels below which int8 is refused. Most voxels are background, and a network that lost every tumour
# would still agree in 99 % of them.
AGREEMENT, TUMOUR_AGREEMENT = 0.99, 0.95


def calibration_images(run: Run) -> list[Tensor]:
    """Images [4, D, H, W] of training cases of a run, in their stored type and not read before they are used.
    InputError if the run does not say which they are, or if they are gone."""
    if run.data is None or not run.split:
        raise InputError(f"int8 cannot be calibrated: {run.folder / 'config.json'} names no training cases.")
    names = run.split["train"]
    try:
        chosen = names[:: -(-len(names) // CASES)]
        return [load_case(run.data / f"{name}.pt", as_stored=True)["image"] for name in chosen]
    except InputError as error:
        raise InputError(f"int8 cannot be calibrated with the training cases of {run.folder}: {error}") from None


def quantise(exported: Path, image: Tensor, calibration: Sequence[Tensor]) -> Path:
    """The network of an `.onnx` file in int8: an `.xml` file for OpenVINO, with its weights in a `.bin` file beside it.
    It is made unless it exists.

    Args:
        image: any, of the shape that the network takes [B, 4, D, H, W].
        calibration: images [4, D, H, W]; another size is cropped to its middle, or padded.

    Raises InputError without a calibration, and if the labels of its images change too much.
    """
    if not calibration:
        raise InputError("int8 cannot be calibrated: that takes a run, with the cases that it was trained on.")
    path = exported.with_name(f"{exported.stem}-int8-{_digest(calibration)}.xml")
    if path.is_file():
        return path
    count = len(calibration)
    print(f"Quantising to int8 with {count} training case{'s' * (count > 1)} ...", file=sys.stderr)
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        _write_int8(exported, temporary, calibration, image.shape)
        new, old = openvino_session(temporary, image, "int8"), openvino_session(exported, image, "float32")
        refuse_other_labels(new, old, (as_input(one, image.shape) for one in calibration))
        os.replace(temporary.with_suffix(".bin"), path.with_suffix(".bin"))  # first: where the .xml is, all is
        os.replace(temporary, path)
    finally:
        for suffix in (".xml", ".bin"):
            temporary.with_suffix(suffix).unlink(missing_ok=True)
    return path


def _write_int8(exported: Path, path: Path, calibration: Sequence[Tensor], shape):
    os.environ.setdefault("NNCF_CI", "1")  # nncf would tell Google Analytics that it is used
    with redirect_stdout(io.StringIO()):  # its log and progress bars
        import nncf  # an optional package
        import openvino  # an optional package
        from openvino.passes import ConstantFolding, Manager  # an optional package

        network = openvino_core().read_model(exported)
        folding = Manager()
        folding.register_pass(ConstantFolding())  # nncf fails on position biases that are looked up in their table
        folding.run_passes(network)
        images = nncf.Dataset(calibration, lambda one: as_input(one, shape).numpy())
        # Of this kind, only what convolutions and matrix products take is rounded, and not sums and norms. The U-Net,
        # too, is more exact and faster so.
        kind = nncf.ModelType.TRANSFORMER
        network = nncf.quantize(network, images, subset_size=len(calibration), model_type=kind)
    openvino.save_model(network, path, compress_to_fp16=False)


def as_input(image: Tensor, shape) -> Tensor:
    """The middle of an image [4, D, H, W] of any type, with background around it where it is too small, as float32 of
    the `shape` [B, 4, D, H, W]: B times the same."""
    margins = [wanted - there for wanted, there in zip(shape[2:], image.shape[1:], strict=True)]
    padding = [side for margin in reversed(margins) for side in (margin // 2, margin - margin // 2)]  # below 0: a crop
    return pad(image.float(), padding).expand(shape).contiguous()


def refuse_other_labels(new: Callable, old: Callable, images: Iterable[Tensor]):
    """InputError unless two networks label enough voxels of the images alike, and enough of those that either calls
    tumour."""
    counts = sum(label_counts(labels_from_logits(new(image)), labels_from_logits(old(image))) for image in images)
    same, voxels, same_in_tumour, in_tumour = counts.tolist()
    if same < AGREEMENT * voxels or same_in_tumour < TUMOUR_AGREEMENT * in_tumour:
        raise InputError(
            f"in int8 the network gives {same / voxels:.2%} of the voxels the label that it gives them in float32, and "
            f"{same_in_tumour / max(in_tumour, 1):.2%} of those in the tumour: int8 is refused below "
            f"{AGREEMENT:.0%} and {TUMOUR_AGREEMENT:.0%}."
        )


def label_counts(new: Tensor, old: Tensor) -> Tensor:
    """Numbers of voxels, int64 [4]: those that two label maps label alike, all; and both again, of those that either
    calls tumour."""
    same, tumour = new == old, (new > 0) | (old > 0)
    return torch.stack([same.sum(), torch.tensor(same.numel()), (same & tumour).sum(), tumour.sum()])


def _digest(images: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.shape).encode())
        digest.update(image.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
