"""What the viewer shows of a case: its image, its label maps, and what is written about them."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from models.brats import LABELS, REGIONS
from models.plots import intensity_window


@dataclass
class Scene:
    """What there is to see, with RAS axes: image [4, D, H, W], label maps [D, H, W] by name (truth, prediction)."""

    name: str
    image: np.ndarray
    maps: dict
    voxel_mm: list[float]
    affine: object = None  # of the original file; None in network space
    native_shape: tuple = ()
    scheme: str = ""
    scores: str = ""  # the Dice of each region, where there are truth and prediction
    timing: str = ""  # what the prediction took, where it was made here
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


def with_prediction(scene: Scene, label: np.ndarray, timing: str = "") -> Scene:
    """The scene with a predicted label map [D, H, W], and its Dice where there is a truth."""
    maps = scene.maps | {"prediction": label}
    return replace(scene, maps=maps, scores=describe_dice(maps) if "truth" in maps else "", timing=timing)


def describe_dice(maps: dict) -> str:
    """The Dice of each region, prediction against truth."""
    import torch  # seconds to import: only for those who compare

    from models.metrics import confusion, dice_per_target

    prediction, truth = (torch.from_numpy(np.ascontiguousarray(maps[name])) for name in ("prediction", "truth"))
    dice = dice_per_target(confusion(prediction, truth))
    return "Dice " + ", ".join(f"{region} {dice[region]:.3f}" for region in REGIONS)
