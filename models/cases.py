"""Finding raw cases in folders, whatever their files are called.

* a folder per case, or several cases in one: `<case>_t1.nii.gz`, `<case>-t1n.nii.gz`, `<case>_T1GD.nii`, or bare names
  (`<case>/t1.nii.gz`); a scan may also be a folder `<case>_t1.nii/` with one file in it, as Kaggle makes them
* a data set with a `dataset.json`: MSD Task01 (4-D files) and nnU-Net's raw format (`<case>_0000.nii.gz`)
"""

import json
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from models.brats import COHORTS, LABEL_SCHEMES, MODALITIES, cohort_of, cohort_scheme, list_schemes, patient_of
from models.errors import InputError, InputWarning

LAYOUTS = {
    "brats2021": "BraTS 2017-2021 names (t1, t1ce, t2, flair)",
    "brats2023": "BraTS 2023 names (t1n, t1c, t2w, t2f)",
    "msd": "MSD Task01 (4-D files)",
    "nnunet": "nnU-Net raw format (dataset.json, _0000 to _0003)",
}
# What a scan is called -> its role. A name that is not here is not a guess of ours: T1 after contrast and T1 before it
# look alike to a program.
ROLES = {
    **dict.fromkeys(("t1", "t1n", "t1w", "t1pre", "t1_pre", "t1-pre"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd", "t1_gd", "t1-gd", "t1post", "t1_post", "t1-post"), "t1ce"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
    **dict.fromkeys(("flair", "t2f", "t2flair", "t2_flair", "t2-flair"), "flair"),
    **dict.fromkeys(("seg", "segm", "segmentation", "tumor_segmentation"), "seg"),
}
NAMES_OF_2023 = {"t1n", "t2w", "t2f"}
SCAN = re.compile(rf"(?:(?P<case>.+?)[-_.])??(?P<word>{'|'.join(ROLES)})\.nii(\.gz)?", re.IGNORECASE)
NIFTI = re.compile(r"(?P<stem>[^.].*)\.nii(\.gz)?", re.IGNORECASE)  # macOS leaves ._ files in archives


@dataclass(frozen=True)
class Case:
    """One patient visit as found on disk. `files` may be incomplete: `read_case` is where that is refused."""

    name: str
    layout: str  # a key of LAYOUTS
    files: dict[str, tuple[Path, ...]]  # modality or "seg" -> files; MSD: "4d" in place of the modalities
    channels: tuple[str, ...] = ()  # MSD: what the 4-D file's channels are
    labels: str = ""  # the label scheme, where the user or a dataset.json says it
    same_voxels: bool = False  # the user says that the files share one grid, whatever their affines are

    @property
    def patient(self) -> str:
        return patient_of(self.name)

    @property
    def labelled(self) -> bool:
        return "seg" in self.files

    @property
    def source_files(self) -> list[Path]:
        return sorted(path for paths in self.files.values() for path in paths)


def scheme_of(case: Case) -> str:
    """What its raw label values mean, a key of LABEL_SCHEMES: what the user or a dataset.json says, or the cohort in
    its name. Raises InputError where none of them does, unless there is no segmentation that could be misread."""
    if case.labels:
        return case.labels
    cohort, described = cohort_of(case.name), case.layout in ("msd", "nnunet")
    if cohort == "MEN-RT":
        raise InputError(f"{case.name}: BraTS-MEN-RT has one modality (t1c) and one label (the gross tumour volume), "
                         "but four modalities and the labels NCR, ED and ET are needed. Leave its cases out.")
    scheme = "" if described else cohort_scheme(case.name, case.source_files[0])
    if not scheme and not cohort and case.layout == "brats2021":
        scheme = "brats2021"  # names of that time have one meaning; those of 2023 have several
    if scheme or not case.labelled:
        return scheme or "brats2023"
    why = f"the cohort {cohort} is not one of {', '.join(COHORTS)}" if cohort else "its name has no cohort"
    why = "the labels in its dataset.json are not those of a known data set" if described else why
    raise InputError(f"{case.name}: {why}, so what its label values mean is not known. Say it with --labels: "
                     f"{list_schemes()}.")  # fmt: skip


def find_cases(root: str | Path, labels: str | None = None, same_voxels: bool = False) -> list[Case]:
    """Every case below `root` (or `root` itself), sorted by name. Raises InputError when there is none.

    Args:
        labels: the label scheme of all of them; None where names and dataset.json say it.
        same_voxels: the files of a case share one grid, even where their affines disagree.
    """
    root = Path(root)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise InputError(f"{root}: {what}. Give the folder that holds the BraTS case folders.")
    cases, scans, others, doubts = [], {}, [], []
    for folder, subfolders, names in _walk(root):
        if "dataset.json" in names:
            try:
                cases += _find_described(folder)
                subfolders[:] = [name for name in subfolders if not re.fullmatch("(images|labels)T[rs]", name)]
            except InputError as error:
                doubts.append(error)
        _collect_scans(folder, subfolders, names, scans, others)
    cases += _join_scans(scans)
    if not cases:
        raise InputError(_nothing_found(root, scans, others, doubts))
    if doubts:
        more = f" (and {len(doubts) - 1} more)" if len(doubts) > 1 else ""
        warnings.warn(InputWarning(f"not used{more}", str(doubts[0])), stacklevel=2)
    cases.sort(key=lambda case: case.name)
    for case in cases:
        if not case.name.isprintable():  # a second line, or bytes that are no text
            name, folder = ascii(case.name), ascii(str(case.source_files[0].parent))
            raise InputError(f"{folder}: the case name {name} has characters that cannot be shown. Rename its files.")
    for case, following in pairwise(cases):
        if case.name == following.name:
            folders = f"{case.source_files[0].parent} and {following.source_files[0].parent}"
            raise InputError(f"case {case.name} is there twice, in {folders}. If it is one case, keep one of them; if "
                             "not, rename the files to <case>_t1.nii.gz and so on.")  # fmt: skip
    return [replace(case, labels=labels or case.labels, same_voxels=same_voxels) for case in cases]


def _walk(root: Path):
    """Like os.walk, through links too, but no folder twice: a link may lead back. Hidden folders, such as .Trash-1000
    and .snapshot, are left out; so are those that may not be opened, which is told."""

    def tell(error: OSError):
        warnings.warn(InputWarning(error.filename, f"left out: {error.strerror}"), stacklevel=4)

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=tell, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield Path(folder), subfolders, sorted(names)


# ---- a file per scan -----------------------------------------------------------------------------------------------


def _collect_scans(folder: Path, subfolders: list, names: list, scans: dict, others: list):
    """Add the scans of one folder to `scans`, (case, folder) -> word of the name -> files, and other NIfTI to
    `others`. Folders that are scans themselves are taken out of `subfolders`."""
    found = [(name, [folder / name]) for name in names]
    for name in [name for name in subfolders if SCAN.fullmatch(name)]:
        subfolders.remove(name)
        found.append((name, sorted(path for path in (folder / name).iterdir() if NIFTI.fullmatch(path.name))))
    for name, paths in found:
        match = SCAN.fullmatch(name)
        if match and paths and not name.startswith("."):
            case = match["case"] or folder.absolute().name
            scans.setdefault((case, folder), {}).setdefault(match["word"].lower(), []).extend(paths)
        elif NIFTI.fullmatch(name):
            others += paths


def _join_scans(scans: dict) -> list[Case]:
    """The cases of `_collect_scans`. A segmentation may lie in another folder under the name of its case; those that
    belong to no images, such as our own predictions, are no case."""
    cases, lonely, far = [], {}, []
    for (name, folder), words in scans.items():
        files = {}
        for word, paths in words.items():
            files[ROLES[word]] = (*files.get(ROLES[word], ()), *paths)
        if set(files) == {"seg"}:
            lonely.setdefault(name, []).extend(files["seg"])
            # In BraTS 2020 the segmentation of case 355 is called W39_1998.09.19_Segm.nii.
            lonely.setdefault(folder, []).extend(files["seg"] if set(words) == {"segm"} else [])
        else:
            layout = "brats2023" if NAMES_OF_2023 & set(words) else "brats2021"
            cases.append((folder, Case(name, layout, files)))
    alone = Counter(folder for folder, _ in cases)
    for folder, case in cases:
        if not case.labelled and alone[folder] == 1 and lonely.get(folder):
            case.files["seg"] = tuple(lonely[folder])
        elif not case.labelled and case.name in lonely:
            case.files["seg"] = tuple(lonely[case.name])
            far += lonely[case.name]
    if far:
        text = f"{len(far)} segmentations lie in another folder than the images of that name, and are used as truth"
        warnings.warn(InputWarning(str(far[0].parent), text), stacklevel=3)
    return [case for _, case in cases]


def _nothing_found(root: Path, scans: dict, others: list, doubts: list) -> str:
    """Why there is no case, with what is there instead."""
    if doubts:
        return str(doubts[0])
    if scans:
        name, folder = next(iter(scans))
        there = f"there are only segmentations, such as that of {name} in {folder}"
    elif others:
        there = f"there are {len(others)} NIfTI files, but names like {others[0].name} do not say which scan it is"
    else:
        files = (path.name for path in root.rglob("[!.]*") if path.is_file())
        there = "there is no .nii or .nii.gz file" + (f", but {name}" if (name := next(files, "")) else "")
    return (f"{root}: no BraTS case found: {there}. Expected <case>/<case>_t1.nii.gz, _t1ce, _t2, _flair (BraTS "
            "2017-2021), <case>/<case>-t1n.nii.gz, -t1c, -t2w, -t2f (2023 on), or dataset.json with imagesTr/ (MSD "
            "Task01, nnU-Net).")  # fmt: skip


# ---- a data set with a dataset.json --------------------------------------------------------------------------------


def _find_described(root: Path) -> list[Case]:
    """The cases of a folder with dataset.json, imagesTr/ and labelsTr/ (or Ts): 4-D files as in the MSD, or a file per
    channel as in nnU-Net. Raises InputError where dataset.json is something else."""
    path = root / "dataset.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows puts a mark before it
        named = described.get("channel_names") or described["modality"]
        words = [re.sub("[^a-z0-9]", "", named[str(i)].lower()) for i in range(len(named))]
        channels = tuple(ROLES.get(word, word) for word in words)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not the dataset.json of MSD Task01_BrainTumour or of an nnU-Net data set of BraTS "
                         f"({type(error).__name__}: {error}).") from None  # fmt: skip
    if sorted(channels) != sorted(MODALITIES):
        raise InputError(f"{path}: channels {', '.join(words)}; expected T1, T1 with contrast, T2 and FLAIR. If they "
                         "are that, call them T1, T1CE, T2 and FLAIR there.")  # fmt: skip
    files, layout = _described_files(root, channels)
    labels = _declared_scheme(described["labels"]) if "labels" in described else "msd" if layout == "msd" else ""
    return [Case(name, layout, roles, channels if layout == "msd" else (), labels) for name, roles in files.items()]


def _described_files(root: Path, channels) -> tuple[dict, str]:
    """Case name -> role -> files, and the layout."""
    images = [path for folder in ("imagesTr", "imagesTs") for path in sorted(root.glob(f"{folder}/*"))
              if NIFTI.fullmatch(path.name)]  # fmt: skip
    stems = [NIFTI.fullmatch(path.name)["stem"] for path in images]
    endings = {f"_{number:04d}": role for number, role in enumerate(channels)}
    strays = [path for path, stem in zip(images, stems, strict=True) if stem[-5:] not in endings]
    split = len(strays) < len(images) / 2
    if split and strays:
        text = f"{len(strays)} files that do not end in {', '.join(endings)} are left out"
        warnings.warn(InputWarning(str(strays[0]), text), stacklevel=4)
    files = {}
    for path, stem in zip(images, stems, strict=True):
        if split and path in strays:
            continue
        name, role = (stem[:-5], endings[stem[-5:]]) if split else (stem, "4d")
        roles = files.setdefault(name, {})
        roles[role] = (*roles.get(role, ()), path)
        labels = root / path.parent.name.replace("images", "labels")
        if truth := tuple(labels / f"{name}{ending}" for ending in (".nii", ".nii.gz")
                          if (labels / f"{name}{ending}").is_file()):  # fmt: skip
            roles["seg"] = truth
    return files, "nnunet" if split else "msd"


def _declared_scheme(labels) -> str:
    """The label scheme that the "labels" of a dataset.json spell out, as labels or as regions; "" where they do not."""
    values = {}
    try:
        for key, value in labels.items():  # nnU-Net: name -> value or values; MSD and nnU-Net 1: value -> name
            name, numbers = (value, [int(key)]) if key.isdecimal() else (key, value)
            values.setdefault(_target(name), set()).update(numbers if type(numbers) is list else [numbers])
    except (AttributeError, TypeError):
        return ""
    enhancing = values.get("ET", set())
    core = values.get("NCR", values.get("TC", set()) - enhancing)
    oedema = values.get("ED", values.get("WT", set()) - values.get("TC", set()))
    meaning = {0: 0} | dict.fromkeys(values.get("background", set()), 0)
    meaning |= dict.fromkeys(core, 1) | dict.fromkeys(oedema, 2) | dict.fromkeys(enhancing, 3)
    return next((scheme for scheme, mapping in LABEL_SCHEMES.items() if mapping == meaning), "")


def _target(name: str) -> str:
    """The label or region that a name in a dataset.json stands for; "" for an unknown one."""
    patterns = {
        "background": r"background|cavity|^rc$",
        "NCR": r"necro|non.?enh|cyst|ncr|\bnet|^cc$",
        "WT": r"whole|^wt$",
        "TC": r"core|^tc$",
        "ET": r"enhanc|^et$",
        "ED": r"o?edema|^ed$|^snfh$",
    }
    return next((target for target, pattern in patterns.items() if re.search(pattern, name.lower())), "")
