"""The cases that are scored, preprocessed or raw, read one ahead; and label maps of other programs."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from models.cases import NIFTI, Case, scheme_of
from models.dataset import read_manifest
from models.errors import InputError
from models.labels import to_training_labels
from models.nifti import describe_affine, onto_grid, read_label, to_ras
from models.preprocessing import to_network
from models.tensors import load_case
from models.volumes import read_case, read_segmentation


@dataclass(frozen=True)
class Item:
    """A case in memory: in network space, and the truth in native space as well. Truths are training labels."""

    name: str
    image: torch.Tensor  # [4, D, H, W]
    label: torch.Tensor | None  # uint8 [D, H, W]
    geometry: dict
    scheme: str  # of the raw label values
    truth: np.ndarray | None  # uint8 [X, Y, Z]


def read_ahead(
    names: Iterable[str], read: Callable[[str], Item], failures: dict[str, str] | None = None
) -> Iterator[Item]:
    """Yield `read(name)` for each name. While one is in use, the next is being read: no more than two are in memory.

    An InputError is entered in `failures` (name -> reason), and the others go on; without `failures` it is raised.
    """
    with ThreadPoolExecutor(1) as reader:
        following = None
        for name, next_name in pairwise([None, *names, None]):
            current, following = following, next_name and reader.submit(read, next_name)
            if current is None:
                continue
            try:
                item = current.result()
            except InputError as error:
                if failures is None:
                    raise
                failures[name] = str(error)
            else:
                yield item


def prepared_item(path: Path, raw: Case | None) -> Item:
    """The preprocessed case in a `.pt` file; its truth in native space is that of the raw case, if that is given."""
    case = load_case(path)
    if "label" not in case:
        raise InputError(f"{path}: has no label, so it cannot be scored.")
    truth = None
    if raw:
        shape, affine = tuple(case["geometry"]["native_shape"]), np.array(case["geometry"]["affine"])
        label = read_segmentation(raw, path, shape, affine)
        truth = to_training_labels(label, case["label_scheme"], raw.files["seg"][0])
    label = case["label"][0].to(torch.uint8)
    return Item(case["case"], case["image"], label, case["geometry"], case["label_scheme"], truth)


def raw_item(case: Case, preprocessing: dict) -> Item:
    """A raw case, preprocessed for a run (see `Run.preprocessing`); with or without segmentation."""
    volumes, scheme = read_case(case), scheme_of(case)
    truth = to_training_labels(volumes.label, scheme, case.files["seg"][0]) if case.labelled else None
    result = to_network(volumes.image, truth, volumes.affine, label_name=f"{case.name}: segmentation", **preprocessing)
    label = result["label"][0].to(torch.uint8) if case.labelled else None
    return Item(case.name, result["image"], label, result["geometry"], scheme, truth)


def segmented(data: Path, names: Iterable[str], raw: dict[str, Case]) -> dict[str, Case]:
    """Case -> the raw case that its tensor in `data` was made from. InputError where it or its segmentation is missing,
    or any file of it has another size than when the tensor was made."""
    entries = read_manifest(data)["cases"]
    found = {}
    for name in names:
        if name not in raw:
            raise InputError(f"--raw has no case {name}. Give the raw cases that {data} was made from.")
        if not raw[name].labelled:
            raise InputError(f"{raw[name].source_files[0].parent}: case {name} has no segmentation, so it cannot be "
                             "scored on its own grid. Add it, or give --space network.")  # fmt: skip
        made_from = entries.get(name, {}).get("sources", {})
        for path in raw[name].source_files:
            if made_from.get(path.name, path.stat().st_size) != path.stat().st_size:
                raise InputError(f"{path}: not the file that {data / name}.pt was made from (its size differs). "
                                 "Preprocess the cases again.")  # fmt: skip
        found[name] = raw[name]
    return found


# ---- label maps that another program made --------------------------------------------------------------------------


def find_predictions(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Case -> its label map `<case>.nii.gz` (or .nii) in a folder. InputError for missing, extra and double ones."""
    if not folder.is_dir():
        raise InputError(f"--predictions {folder}: no such folder.")
    files, names = {}, set(names)
    for path in sorted(folder.iterdir()):
        match = NIFTI.fullmatch(path.name)
        if match and files.setdefault(match["stem"], path) is not path:
            both = f"{files[match['stem']].name} and {path.name}"
            raise InputError(f"{folder}: two label maps of {match['stem']}: {both}. Remove one of them.")
    missing, extra = sorted(names - files.keys()), sorted(files.keys() - names)
    for kind, found, advice in (
        ("no label map of", missing, "Give one for every labelled raw case, or say with --data which to score"),
        ("label maps of unknown cases:", extra, "Remove them, or give the raw cases that they belong to"),
    ):
        if found:
            shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            shown += f", but one of {extra[0]}" if found is missing and extra else ""
            raise InputError(f"{folder}: {kind} {shown}. {advice}.")
    return {name: files[name] for name in sorted(names)}


def item_on_its_grid(case: Case) -> Item:
    """A raw case as it is: its network space is the grid of the original files with RAS axes."""
    volumes, scheme = read_case(case), scheme_of(case)
    truth = to_training_labels(volumes.label, scheme, case.files["seg"][0])
    image, label = (np.ascontiguousarray(to_ras(volume, volumes.affine)) for volume in (volumes.image, truth[None]))
    geometry = {"affine": volumes.affine.tolist(), "native_shape": list(truth.shape)}
    return Item(case.name, torch.from_numpy(image), torch.from_numpy(label[0]), geometry, scheme, truth)


def read_prediction(path: Path, item: Item, scheme: str) -> np.ndarray:
    """Training labels [X, Y, Z] of a label map file with values of `scheme`. InputError unless it is on the grid of the
    raw files; its axes may be in another order."""
    label, affine = read_label(path)
    shape, raw_affine = tuple(item.geometry["native_shape"]), np.array(item.geometry["affine"])
    fitting = onto_grid(label, affine, shape, raw_affine)
    if fitting is None and label.shape != shape:
        raise InputError(f"{path}: shape {label.shape}, but {item.name} has {shape}. Save it on the raw grid.")
    if fitting is None:
        raise InputError(f"{path}: its affine {describe_affine(affine)} differs from that of the raw files of "
                         f"{item.name}, {describe_affine(raw_affine)}. Save it on the raw grid.")  # fmt: skip
    return to_training_labels(fitting, scheme, path, "--label-values")
