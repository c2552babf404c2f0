"""Small BraTS-like cases on disk, and a way to run the scripts as a user does."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests share the cores among themselves

import nibabel
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RUN = "models/unet/results/first"  # what the fixture `trained` makes
LPS = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], float)  # as BraTS 2018-2021 has it
NAMES = {
    "brats2021": "{case}/{case}_{role}.nii.gz",
    "brats2020": "{case}/{case}_{role}.nii",
    "brats2023": "{case}/{case}-{role}.nii.gz",
}
ROLES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}


def make_head(seed: int = 0, shape=(44, 48, 40)):
    """A noisy ellipsoid with a three-layered tumour that each modality shows in its own way: volumes int16 by modality
    and training labels uint8."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))  # [3, X, Y, Z]
    center = np.array(shape)[:, None, None, None] / 2
    brain = (((grid - center) / (0.42 * center * 2)) ** 2).sum(0) < 1
    tumour = center + rng.uniform(-4, 4, (3, 1, 1, 1))
    distance = np.sqrt(((grid - tumour) ** 2).sum(0))
    label = np.select([distance < 4, distance < 6, distance < 10], [1, 3, 2], 0).astype(np.uint8) * brain
    levels = {"t1": (500, 300, 400, 480), "t1ce": (600, 300, 500, 1500), "t2": (400, 900, 800, 600),
              "flair": (300, 500, 900, 600)}  # fmt: skip
    volumes = {}
    for modality, values in levels.items():
        volume = np.array(values)[label] + rng.normal(0, 20, shape)
        volumes[modality] = (volume * brain).astype(np.int16)
    return volumes, label


def write_raw_case(folder: Path, case="BraTS2021_00000", layout="brats2021", seed=0, affine=LPS, shape=(44, 48, 40)):
    """Write one case in the layout's names and labels; returns its folder, its volumes and its training labels."""
    volumes, label = make_head(seed, shape)
    raw_label = label if layout == "brats2023" else np.where(label == 3, 4, label).astype(np.uint8)
    for modality, voxels in {**volumes, "seg": raw_label}.items():
        role = ROLES_2023[modality] if layout == "brats2023" else modality
        path = folder / NAMES[layout].format(case=case, role=role)
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return folder / case, volumes, label


def make_score_rows(runs, cases, space="native", seed=0) -> list[dict]:
    """Rows as per_case.csv has them, of random scores; in the last case of several, truth and prediction have no ET."""
    rng = np.random.default_rng(seed)
    rows = []
    for run in runs:
        for case in cases:
            for target in ("WT", "TC", "ET", "NCR", "ED"):
                empty = "both" if target == "ET" and len(cases) > 1 and case == cases[-1] else ""
                dice, true_ml = (1.0, 0.0) if empty else (rng.uniform(0.5, 1), 10 ** rng.uniform(0, 2))
                lesions = target in ("WT", "TC", "ET")
                row = {"run": run, "case": case, "space": space, "target": target, "dice": dice, "sensitivity": dice,
                       "precision": dice, "hd95_mm": 0.0 if empty else 1 / dice, "nsd_1mm": dice,
                       "predicted_ml": true_ml, "true_ml": true_ml, "volume_error_ml": 0.0, "empty": empty}  # fmt: skip
                for standard in ("lesion2026", "lesion2023"):
                    row |= {f"{standard}_{kind}": dice if lesions else None for kind in ("dice", "hd95_mm")}
                    row |= {f"{standard}_{kind}": 1 if lesions else None for kind in ("tp", "fp", "fn")}
                rows.append(row | {"ceiling_dice": 0.97, "trained_on": False})
    return rows


def copy_of_the_code(folder: Path):
    """The scripts and models/, without its results, in `folder`: what they write below the repository stays there."""
    for source in (*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("models/**/*.pyc")):
        target = folder / source.relative_to(ROOT)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)  # with its time stamp, or Python would compile it again


def run_script(script: str, *arguments, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    """Run a script of a copy of the code in `cwd`, from there, and check its exit status; never a traceback."""
    copy_of_the_code(cwd)
    command = [sys.executable, script, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """Twelve labelled cases of BraTS 2021 names."""
    folder = tmp_path_factory.mktemp("raw")
    for index in range(12):
        write_raw_case(folder, f"BraTS2021_{index:05d}", seed=index)
    return folder


@pytest.fixture(scope="session")
def tensors(raw, tmp_path_factory) -> Path:
    """The twelve cases preprocessed to 32^3 by the script."""
    out = tmp_path_factory.mktemp("preprocessed") / "tensors"
    run_script("preprocess_brats.py", raw, out, "--size", 32, "--workers", 2, cwd=out.parent)
    return out


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> Path:
    """Twelve cases of three sizes, one smaller than 32 voxels along an axis, as they are after the crop."""
    folder = tmp_path_factory.mktemp("native")
    for index in range(12):
        write_raw_case(folder / "raw", f"BraTS2021_{index:05d}", seed=index, shape=(44 - 4 * (index % 3), 48, 46))
    run_script("preprocess_brats.py", "raw", "tensors", "--size", "native", "--workers", 2, cwd=folder)
    return folder / "tensors"


@pytest.fixture(scope="session")
def real_cases() -> Path:
    """A folder of real labelled cases, where the environment names one."""
    folder = os.environ.get("BRATS_REAL_CASES")
    if not folder:
        pytest.skip("BRATS_REAL_CASES names no folder of real cases")
    return Path(folder)


def read(table: Path) -> list[dict]:
    """The rows of a CSV file."""
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tensors, tmp_path_factory):
    """A folder in which train_unet.py has made the run RUN, in float32: an engine rounds in other
    places than the autocast of the training."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_script("train_unet.py", tensors, "--epochs", 2, "--run-name", "first", "--amp", "off", cwd=folder)
    assert "minutes" in result.stdout
    return folder
