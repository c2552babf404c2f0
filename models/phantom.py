"""Synthetic BraTS cases, so that everything runs with no download.

  python -m models.phantom demo/raw --cases 24 --seed 0 --layout brats2021
  python -m models.phantom phantoms --cases 64 --first 90000 --varied      (to train on where there is no patient)

A head is drawn in millimetres from smooth random fields: cortex folded along the zero surfaces of one field,
ventricles and deep grey matter as warped ellipsoids, gliomas with oedema that follows the white matter. The same seed
and index give the same case, whatever the number of cases.

Usually all heads have the tissue contrasts of SIGNAL. Varied ones have contrasts, tumours and an image quality from
wide ranges, so that a network that has learnt them takes a patient for one more: the idea of SynthSeg (Billot et al.
2023, arXiv:2107.09559), kept so close to MRI that each modality still shows what it is used for.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip
from scipy import ndimage
from tqdm import tqdm

from models.cli import usable_cpus
from models.files import write_atomically

SHAPE = (240, 240, 155)  # BraTS's grid
CENTER_MM = (120.0, 112.0, 70.0)  # where the middle of the brain is on it, along right, anterior, superior
HEAD_MM = ((-78, 78), (-94, 94), (-70, 74))  # what is computed around that: everything else is background
LAYOUTS = {  # layout -> case name, file name, raw value of each training label
    "brats2021": ("BraTS2021_{:05d}", "{case}/{case}_{role}.nii.gz", (0, 1, 2, 4)),
    "brats2020": ("BraTS20_Training_{:03d}", "{case}/{case}_{role}.nii", (0, 1, 2, 4)),
    "brats2023": ("BraTS-GLI-{:05d}-000", "{case}/{case}-{role}.nii.gz", (0, 1, 2, 3)),
    "msd": ("BRATS_{:03d}", "", (0, 2, 1, 3)),
}
ROLES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
MSD_CHANNELS = {"flair": "FLAIR", "t1": "T1w", "t1ce": "t1gd", "t2": "T2w"}

TUMOUR = ("oedema", "rim", "necrosis")  # from the outside in
# Signal of each tissue relative to white matter.
SIGNAL = {
    "t1": {"white": 1.0, "grey": 0.76, "csf": 0.34, "oedema": 0.68, "rim": 0.66, "necrosis": 0.46, "vessel": 0.9},
    "t1ce": {"white": 1.0, "grey": 0.80, "csf": 0.36, "oedema": 0.70, "rim": 1.75, "necrosis": 0.48, "vessel": 1.8},
    "t2": {"white": 0.72, "grey": 0.98, "csf": 1.75, "oedema": 1.30, "rim": 1.05, "necrosis": 1.55, "vessel": 0.6},
    "flair": {"white": 0.78, "grey": 1.0, "csf": 0.34, "oedema": 1.65, "rim": 1.35, "necrosis": 0.95, "vessel": 0.6},
}

LOOK = {"texture": 0.10, "bias": 0.10, "noise": (0.02, 0.035), "blur_mm": None}  # see draw_look

# center and half axes in mm (right, anterior, superior of the middle of the brain); "side" ones come left and right
DEEP_GREY = (((12, -14, 4), (9, 15, 9)), ((14, 20, 10), (5, 13, 8)), ((25, 6, 2), (6, 17, 10)))
VENTRICLES = (
    ((8, 26, 12), (5, 15, 8)),
    ((9, 0, 18), (6, 24, 6)),
    ((19, -36, 8), (7, 17, 9)),
    ((31, -14, -14), (4, 16, 5)),
)
MIDLINE_VENTRICLES = (((0, -6, 0), (2, 13, 9)), ((0, -40, -32), (5, 5, 8)))


def make_case(seed: int, index: int, spacing_mm: float = 1.0, varied: bool = False):
    """One case: {modality: int16 [X, Y, Z]}, training labels uint8 [X, Y, Z], and the LPS affine [4, 4] in mm.

    At 1 mm the grid is BraTS's 240x240x155; another `spacing_mm` shows the same head on a coarser or finer one. With
    `varied`, contrasts, tumours and image quality are drawn from wide ranges.
    """
    rng = np.random.default_rng([seed, index])
    shape = tuple(round(n / spacing_mm) for n in SHAPE)
    axes = [(np.arange(n, dtype=np.float32) + 0.5) * spacing_mm - c for n, c in zip(shape, CENTER_MM, strict=True)]
    box = tuple(slice(*np.searchsorted(axis, limits)) for axis, limits in zip(axes, HEAD_MM, strict=True))
    axes = [axis[side] for axis, side in zip(axes, box, strict=True)]
    tumours = draw_varied_tumours(rng) if varied else draw_tumours(rng, enhancing=index % 8 != 7)
    signals = draw_signals(rng) if varied else SIGNAL
    position = push_aside(np.meshgrid(*axes, indexing="ij", copy=False), tumours)  # three of [D, H, W]
    tissue = draw_anatomy(rng, axes, position)
    label, tumour = grow_tumours(rng, axes, tumours, tissue)
    volumes = {}
    grain = _grain(rng, label.shape)
    vessels = _ramp(_noise(rng, axes, 9) - 2.1, 0.15) * tissue["csf"] * tissue["brain"]
    for modality, signal in signals.items():
        look = draw_look(rng) if varied else LOOK
        scale = float(np.exp(rng.uniform(np.log(600), np.log(6000))))
        picture = render(rng, axes, signal, look, scale, tissue, tumour, vessels, grain)
        volume = np.zeros(shape, np.int16)
        volume[box] = picture
        volumes[modality] = np.ascontiguousarray(volume[::-1, ::-1])  # RAS -> LPS
    segmentation = np.zeros(shape, np.uint8)
    segmentation[box] = label
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing_mm
    return volumes, np.ascontiguousarray(segmentation[::-1, ::-1]), affine


# ---- anatomy -------------------------------------------------------------------------------------------------------


def draw_anatomy(rng, axes, position) -> dict[str, np.ndarray]:
    """Fractions float32 [D, H, W] of white and grey matter and CSF, and the brain mask (0 or 1)."""
    x, y, z = position
    wobble = _noise(rng, axes, 45)
    side = np.abs(x)
    narrowing = 1 - 0.10 * np.clip(y / 84, 0, 1) ** 2 + 0.02 * np.clip(-y / 84, 0, 1)  # the forehead is narrower
    cerebrum = _ellipsoid(side / narrowing, y, z, (0, 0, 8), (66, 83, 60), power=2.3)
    temporal = _ellipsoid(side, y, z, (41, 8, -30), (25, 42, 22))
    floor = -24 - z - 0.20 * np.abs(y - 10)  # below the frontal lobes there is no brain
    cerebrum = np.minimum(np.maximum(cerebrum, floor), temporal)
    cerebellum = _ellipsoid(side, y, z, (18, -52, -38), (32, 28, 22))
    stem = np.maximum(np.hypot(x / 1.1, y + 20 - 0.12 * (z + 40)) - 12, z + 8)
    outside = np.minimum(np.minimum(cerebrum, cerebellum), stem) + 1.2 * wobble  # mm, negative in the brain
    depth = np.maximum(-outside, 0)

    folds = _noise(rng, axes, 19) + 0.5 * _noise(rng, axes, 10)
    sulcus = np.abs(folds) * 4.0 + np.maximum(depth - 17 - 4 * wobble, 0) * 0.7  # mm from the middle of the next sulcus
    callosum = _ellipsoid(x, y, z, (0, 0, 14), (30, 36, 13))
    midline = 1.5 * np.abs(x + 0.8 * wobble) + np.maximum(0, 3 - callosum) * 2 + np.maximum(-4 - z, 0)
    cortex = np.minimum(np.minimum(depth + 0.8, sulcus), midline)  # mm from the nearest pial surface
    folia = np.abs(np.sin((z + 0.35 * y + 2 * folds) * (np.pi / 5))) * 2.4 + np.maximum(depth - 9, 0) * 0.6
    in_cerebellum = _ramp(cerebrum - cerebellum, 1.5)
    cortex += in_cerebellum * (np.minimum(depth, folia + 0.9) - cortex)
    in_stem = _ramp(np.minimum(cerebrum, cerebellum) - stem, 1.5)
    cortex += in_stem * (6 - cortex) * (depth > 1)

    width = 0.8 + 0.35 * wobble
    csf = 1 - _ramp(cortex - width, 0.6)
    white = _ramp(cortex - width - 3.1, 0.7)
    deep = np.minimum.reduce([_ellipsoid(side, y, z, *shape) for shape in DEEP_GREY]) + 1.0 * folds
    white *= _ramp(deep, 0.8)
    swelling = rng.uniform(-1.0, 2.0)
    ventricle = np.minimum.reduce(
        [_ellipsoid(side, y, z, *shape) for shape in VENTRICLES] + [_ellipsoid(x, y, z, *s) for s in MIDLINE_VENTRICLES]
    )
    inside = 1 - _ramp(ventricle - swelling + 0.7 * wobble, 0.6)
    csf = np.maximum(csf, inside)
    white = white * (1 - inside)
    brain = (outside < -0.3).astype(np.float32)
    return {"white": white, "grey": np.clip(1 - white - csf, 0, 1), "csf": csf, "brain": brain, "ventricle": inside}


def _ellipsoid(x, y, z, center, half_axes, power=2.0):
    """About the distance in mm from an ellipsoid's surface, negative inside."""
    total = sum((abs(c - mid) / half) ** power for c, mid, half in zip((x, y, z), center, half_axes, strict=True))
    return (total ** (1 / power) - 1) * float(min(half_axes))


# ---- tumours -------------------------------------------------------------------------------------------------------


def draw_tumours(rng, enhancing: bool) -> list[dict]:
    """Where one to three gliomas are, the second across the midline from the others, and how large: lengths in mm."""
    tumours = []
    side = rng.choice([-1, 1])
    for number in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        core = rng.uniform(11, 21) if number == 0 else rng.uniform(5, 9)
        center = np.array([side * (-1) ** number * rng.uniform(22, 38), rng.uniform(-48, 40), rng.uniform(-8, 36)])
        tumours.append({"center": center, "core": core, "oedema": core + rng.uniform(5, 13),
                        "rim": rng.uniform(2.5, 5.0) if enhancing else 0.0, "thinnest": 0.9,
                        "roughness": 1.6})  # fmt: skip
    return tumours


def draw_varied_tumours(rng) -> list[dict]:
    """The same places, but any size, with or without oedema around, and cores that do not enhance, do all through, or
    in a rim of any thickness, which may have gaps."""
    enhancing = rng.random() > 0.15
    tumours = draw_tumours(rng, enhancing)
    for number, tumour in enumerate(tumours):
        core = rng.uniform(8, 27) if number == 0 else rng.uniform(4, 10)
        share = 1.5 if rng.random() < 0.1 else rng.uniform(0.05, 0.5)
        tumour |= {"core": core, "oedema": core + rng.uniform(1, 16), "rim": share * core if enhancing else 0.0,
                   "thinnest": 0.0, "roughness": rng.uniform(0.5, 3.0)}  # fmt: skip
    return tumours


def push_aside(position, tumours: list[dict]) -> list[np.ndarray]:
    """Mass effect: where each voxel [D, H, W] was in mm before the tumours grew."""
    position = [np.array(p, np.float32) for p in position]
    for tumour in tumours:
        offset = [p - np.float32(c) for p, c in zip(position, tumour["center"], strict=True)]
        distance2 = sum(np.square(o) for o in offset)
        pushed = 0.35 * np.exp(distance2 * np.float32(-1 / (1.5 * tumour["core"]) ** 2))
        position = [p - o * pushed for p, o in zip(position, offset, strict=True)]
    return position


def grow_tumours(rng, axes, tumours: list[dict], tissue) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Training labels uint8 [D, H, W] and soft fractions of oedema, rim and necrosis."""
    soft = {name: np.zeros_like(tissue["white"]) for name in TUMOUR}
    coarse, fine = _noise(rng, axes, 34), _noise(rng, axes, 13)
    room = tissue["brain"] * (1 - tissue["ventricle"])
    for tumour in tumours:
        x, y, z = (axis - np.float32(c) for axis, c in zip(axes, tumour["center"], strict=True))
        distance = np.sqrt(np.square(x)[:, None, None] + np.square(y)[:, None] + np.square(z))
        distance *= 1 + 0.16 * coarse
        core = distance + 0.9 * fine - tumour["core"]
        # oedema runs along the white matter and stops at the cortex
        swollen = distance + 4.0 * coarse + 1.5 * fine - tumour["oedema"] + 9 * (0.75 - tissue["white"])
        rim = np.maximum(tumour["rim"] + tumour["roughness"] * fine, tumour["thinnest"]) if tumour["rim"] else 0
        whole = 1 - _ramp(np.minimum(swollen, core), 0.9)
        there = room * _around_largest_part(whole * room > 0.5)
        soft["oedema"] = np.maximum(soft["oedema"], whole * there)
        soft["rim"] = np.maximum(soft["rim"], (1 - _ramp(core, 0.8)) * there)
        soft["necrosis"] = np.maximum(soft["necrosis"], (1 - _ramp(core + rim, 0.8)) * there)
    masks = [soft[name] > 0.5 for name in ("necrosis", "rim", "oedema")]
    return np.select(masks, (1, 3, 2)).astype(np.uint8), soft


def _around_largest_part(mask):
    """The largest connected part of a mask [D, H, W] and its soft border: along white matter, oedema makes islands."""
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    largest = np.bincount(parts.ravel(), mask.ravel()).argmax()  # the outside, 0, weighs nothing
    return ndimage.binary_dilation(mask & (parts == largest), np.ones((3, 3, 3)))


# ---- intensities ---------------------------------------------------------------------------------------------------


def draw_signals(rng) -> dict[str, dict[str, float]]:
    """SIGNAL as another scanner and another tumour would have it: every tissue is brighter or darker, the tumour stands
    out more or less, and what does not enhance in its core is anything from necrosis to nearly oedema."""
    signals, solid = {}, rng.uniform(0, 0.8)
    for modality, usual in SIGNAL.items():
        signal = {name: value * float(np.exp(rng.normal(0, 0.12))) for name, value in usual.items()}
        strength = rng.uniform(0.5, 1.3)
        for name in TUMOUR:
            signal[name] = signal["white"] + strength * (signal[name] - signal["white"])
        signal["necrosis"] += solid * (signal["oedema"] - signal["necrosis"])
        signals[modality] = signal
    return signals


def draw_look(rng) -> dict:
    """The quality of one modality: how much the tumour's texture and the coil vary the signal, the range of the noise's
    standard deviation, relative to the signal of 1, and the standard deviation in mm of a blur along each axis, of
    which one is that of thick slices."""
    blur_mm = rng.uniform(0, 0.8, 3)
    blur_mm[rng.integers(3)] *= 2.5
    return {"texture": rng.uniform(0.05, 0.25), "bias": rng.uniform(0.03, 0.2), "noise": (0.01, 0.06),
            "blur_mm": blur_mm}  # fmt: skip


def render(rng, axes, signal, look, scale, tissue, tumour, vessels, grain) -> np.ndarray:
    """One modality as int16 [D, H, W]: the `signal` of each tissue with the bias field, blur and Rician noise of its
    `look`; 0 outside the brain."""
    picture = sum(signal[name] * tissue[name] for name in ("white", "grey", "csf"))
    picture += vessels * (signal["vessel"] - picture)
    texture = 1 + look["texture"] * _noise(rng, axes, 7)
    for name in TUMOUR:
        picture += tumour[name] * (signal[name] * texture - picture)
    picture *= np.exp(look["bias"] * _noise(rng, axes, 90))
    if look["blur_mm"] is not None:
        picture = ndimage.gaussian_filter(picture, look["blur_mm"] / (axes[0][1] - axes[0][0]), truncate=3)
    sd = rng.uniform(*look["noise"])
    real, imaginary = (np.roll(grain, int(shift), axis=0) for shift in rng.integers(10, 90, 2))
    picture = np.hypot(picture + sd * real, sd * imaginary) * tissue["brain"] * np.float32(scale)
    picture = np.clip(np.rint(picture), -32768, 32767).astype(np.int16)
    # Interpolation after stripping undershoots here and there along the border.
    edge = np.flatnonzero((tissue["brain"] == 0) & (np.roll(tissue["brain"], 1, axis=2) == 1))
    picture.ravel()[rng.choice(edge, 40, replace=False)] = -rng.integers(1, max(2, scale // 40), 40)
    return picture


def _grain(rng, shape) -> np.ndarray:
    """Unit noise [D, H, W] that is a little smooth, as every resampled scan's is."""
    grain = rng.standard_normal(shape, dtype=np.float32)
    for axis in range(3):
        grain = 0.8 * grain + 0.6 * np.roll(grain, 1, axis)
    return grain


def _noise(rng, axes, wavelength_mm: float) -> np.ndarray:
    """A smooth random field of about unit variance on the grid of three axes in mm: [D, H, W] from cubic B-splines.

    Drawn on knots that are fixed in the head, so that a head is the same at every spacing.
    """
    knot_mm, reach_mm = wavelength_mm / 2, 100.0
    count = int(np.ceil(2 * reach_mm / knot_mm)) + 4
    field = rng.standard_normal((count, count, count), dtype=np.float32)
    for axis in axes[::-1]:
        t = (axis + reach_mm) / knot_mm
        first = np.floor(t).astype(int)
        u = t - first
        weights = np.zeros((len(axis), count), np.float32)
        basis = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
        for offset, weight in enumerate(basis):
            weights[np.arange(len(axis)), first + offset] = weight / 6
        # the last axis becomes the first: after three turns the order is D, H, W again
        field = np.tensordot(weights, field, axes=(1, field.ndim - 1))
    return field * np.float32(3.0)  # the spline's weights shrink the variance of three axes by 9


def _ramp(value, half_width):
    """0 below -half_width, 1 above, linear between."""
    return np.clip(value * np.float32(0.5 / half_width) + np.float32(0.5), 0, 1)


# ---- files ---------------------------------------------------------------------------------------------------------


def write_case(out: Path, layout: str, seed: int, index: int, spacing_mm: float = 1.0, varied: bool = False) -> str:
    """Write case `index` in a layout's names and label values; returns the case's name."""
    name, pattern, raw_labels = LAYOUTS[layout]
    case = name.format(index + (1 if layout in ("brats2020", "msd") else 0))
    volumes, segmentation, affine = make_case(seed, index, spacing_mm, varied)
    segmentation = np.array(raw_labels, np.uint8)[segmentation]
    if layout == "msd":
        _write(out / f"imagesTr/{case}.nii.gz", np.stack([volumes[m] for m in MSD_CHANNELS], axis=-1), affine)
        _write(out / f"labelsTr/{case}.nii.gz", segmentation, affine)
        return case
    for modality, voxels in {**volumes, "seg": segmentation}.items():
        role = ROLES_2023[modality] if layout == "brats2023" else modality
        _write(out / pattern.format(case=case, role=role), voxels, affine)
    return case


def _write(path: Path, voxels: np.ndarray, affine: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = nibabel.Nifti1Image(voxels, affine).to_bytes()
    # a fixed time stamp: the same seed gives the same bytes
    write_atomically(path, igzip.compress(data, compresslevel=2, mtime=0) if path.suffix == ".gz" else data)


def write_cases(out: Path, cases: range, seed: int, layout: str, varied: bool):
    """Write the cases with these indices in parallel, and for the MSD layout its dataset.json."""
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(len(cases), usable_cpus()), get_context("spawn")) as pool:
        futures = [pool.submit(write_case, out, layout, seed, index, varied=varied) for index in cases]
        names = [future.result() for future in tqdm(futures, unit="case")]
    if layout == "msd":
        description = {
            "name": "BRATS",
            "modality": {str(i): channel for i, channel in enumerate(MSD_CHANNELS.values())},
            "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
            "numTraining": len(cases),
            "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
            "test": [],
        }
        write_atomically(out / "dataset.json", json.dumps(description, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m models.phantom", description="Write synthetic BraTS cases.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--cases", type=int, default=24, help="how many (default: 24)")
    parser.add_argument("--first", type=int, default=0,
                        help="number of the first one: other numbers are other heads; 90000 and more are no patient's "
                             "(default: 0)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--layout", choices=LAYOUTS, default="brats2021", help="names and labels (default: brats2021)")
    parser.add_argument("--varied", action="store_true",
                        help="contrasts, tumours and image quality from wide ranges, for a network that is to label "
                             "patients without having seen one")  # fmt: skip
    args = parser.parse_args()
    if args.cases < 1 or args.seed < 0 or args.first < 0:
        parser.error("--cases must be 1 or more, --first and --seed 0 or more")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"{args.out} is a file: name a folder")
    write_cases(args.out, range(args.first, args.first + args.cases), args.seed, args.layout, args.varied)
    print(f"Wrote {args.cases} synthetic cases ({args.layout}) to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
