"""What the viewer shows of a case: image, label maps and the text about them; and how it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from models.brats import LABELS
from models.cases import Case, find_cases, scheme_of
from models.errors import InputError
from models.labels import to_training_labels
from models.nifti import describe_affine, onto_grid, read_label, spacing_of, to_ras
from models.plots import intensity_window
from models.volumes import read_case


@dataclass
class Scene:
    """A case with RAS axes: image [4, D, H, W], label maps [D, H, W] by name (truth, prediction)."""

    name: str
    image: np.ndarray
    maps: dict
    voxel_mm: list[float]
    affine: object = None  # of the original file; None in network space
    native_shape: tuple = ()
    scheme: str = ""
    scores: str = ""  # the Dice of each region, if there are truth and prediction
    timing: str = ""  # milliseconds of the prediction, if it was made here
    windows: list = field(default_factory=list)  # per modality, the intensities shown as black and white

    def __post_init__(self):
        # Turned to RAS, a label map is a view with negative strides, in which counting takes several times as long.
        self.maps = {name: np.ascontiguousarray(label) for name, label in self.maps.items()}
        self.windows = self.windows or [intensity_window(volume) for volume in self.image]

    def volumes_ml(self) -> dict:
        """Map name -> label -> volume in ml."""
        voxel_ml = float(np.prod(self.voxel_mm)) / 1e3
        return {
            name: {value: np.count_nonzero(label == value) * voxel_ml for value in LABELS}
            for name, label in self.maps.items()
        }

    @cached_property
    def ras_to_native(self) -> np.ndarray:
        """From an index of `image` to a voxel of the file."""
        return inv_ornt_aff(io_orientation(self.affine), self.native_shape)

    @property
    def ras_affine(self) -> np.ndarray:
        """From an index of `image` to mm."""
        return self.affine @ self.ras_to_native


# ---- loading -------------------------------------------------------------------------------------------------------


def find_scenes(path: Path, labels: str | None, same_voxels: bool = False) -> dict[str, Callable[[], Scene]]:
    """Case name -> function that loads it, in order: of a .pt file, a folder of them, or a folder of raw cases.
    `labels` and `same_voxels` are those of `find_cases`."""
    tensors = [path] if path.suffix == ".pt" else sorted(path.glob("*.pt"))
    if tensors:
        return {tensor.stem: partial(load_tensor, tensor) for tensor in tensors}
    return {case.name: partial(load_raw, case) for case in find_cases(path, labels, same_voxels)}


def load_raw(case: Case) -> Scene:
    """The scene of a raw case."""
    scheme = scheme_of(case)
    volumes = read_case(case)
    maps = {}
    if volumes.label is not None:
        label = to_training_labels(volumes.label, scheme, case.files["seg"][0])
        maps["truth"] = to_ras(label[None], volumes.affine)[0]
    image, voxel_mm = to_ras(volumes.image, volumes.affine), spacing_of(volumes.affine)
    return Scene(case.name, image, maps, voxel_mm, volumes.affine, volumes.image.shape[1:], scheme)


def load_tensor(path: Path) -> Scene:
    """The scene of a preprocessed case, named after its file."""
    from models.preprocessing import network_spacing_mm  # imports torch: seconds that a raw case does not need
    from models.tensors import load_case  # imports torch

    case = load_case(path)
    maps = {"truth": case["label"][0].numpy()} if "label" in case else {}
    return Scene(path.stem, case["image"].numpy(), maps, network_spacing_mm(case["geometry"]))


def read_prediction(path: Path, scene: Scene, scheme: str | None = None) -> np.ndarray:
    """A label map of the scene's own voxels, as training labels [D, H, W] with RAS axes. `scheme` is what its values
    mean; None: the same as those of the case."""
    if scene.affine is None:
        raise InputError("--prediction: a label map is on the original grid; give the raw case, not a .pt file.")
    label, affine = read_label(path)
    fitting = onto_grid(label, affine, scene.native_shape, scene.affine)
    if fitting is None:
        raise InputError(f"{path}: shape {label.shape} and affine {describe_affine(affine)} differ from those of "
                         f"{scene.name}, {scene.native_shape} and {describe_affine(scene.affine)}. Give a label map "
                         "on the grid of the case.")
    label = to_training_labels(fitting, scheme or scene.scheme, path, "--prediction-labels")
    return to_ras(label[None], scene.affine)[0]
