"""The forms of the project's own files, and JSON files read and checked against them: somebody may have edited one.

A form is a type or a tuple of types; a function that says whether a value is right; a list [form of each element]; a
dict of key -> form, in which a key that ends in "?" is optional and further keys are allowed; or {str: form of each}.
"""

import json
import math
from pathlib import Path
from types import NoneType

from models.errors import InputError, one_line

NUMBER = (int, float)
CHECKPOINT_FORMAT = 2  # in 1, dice_mean was the mean over cases, not that of their pooled voxels

# ---- values --------------------------------------------------------------------------------------------------------


def is_name(value) -> bool:
    """Whether this names a single file or folder: on no system a path of several parts, or upwards."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\:\0")


def is_array(value, *shape: int) -> bool:
    """Whether these are finite numbers in lists of lists of this shape; without a shape, whether it is one."""
    if not shape:
        return isinstance(value, NUMBER) and math.isfinite(value)
    return isinstance(value, list) and len(value) == shape[0] and all(is_array(each, *shape[1:]) for each in value)


def is_size(value) -> bool:
    """Whether these are the sides [D, H, W] in voxels of a volume that could fit into memory."""
    return is_array(value, 3) and all(type(side) is int and side > 0 for side in value) and math.prod(value) <= 2**32


def is_cube_side(value) -> bool:
    """Whether this is a --size of the preprocessing: voxels, or None for "native"."""
    return value is None or is_size([value] * 3)


def is_preprocessing(value) -> bool:
    """Whether these are the arguments of preprocessing.to_network."""
    return not misfit(value, PREPROCESSING) and value.keys() <= {"size", "spacing_mm", "normalize", "crop"}


def is_inference(value) -> bool:
    """Whether these are settings of a prediction, as inference.predict.member_of takes them."""
    return not misfit(value, INFERENCE) and value.keys() <= {"overlap", "weights", "axes"}


# ---- files ---------------------------------------------------------------------------------------------------------

PREPROCESSING = {
    "size": is_cube_side,
    "spacing_mm": lambda side: is_array(side) and side > 0,
    "normalize": ("percentile", "zscore").__contains__,
    "crop?": bool,
}
INFERENCE = {
    "overlap?": lambda share: is_array(share) and 0 <= share < 1,
    "weights?": ("constant", "gaussian").__contains__,
    "axes?": lambda axes: isinstance(axes, str) and len(axes) == 3,
}
SPLIT = {"train": [is_name], "validation": [is_name], "test": [is_name]}  # case names
SPLITS = SPLIT | {"folds": [{"train": [is_name], "validation": [is_name]}]}
MANIFEST = {
    "settings": {"size": is_cube_side, "spacing_mm": NUMBER, "normalize?": str},
    "cases": {str: {"crc32?": str, "sha256?": str, "sources?": {str: int}}},
    "raw?": str,
}
RECORD = {  # config.json of a run
    "size?": lambda size: size is None or is_size(size),
    "preprocessing?": lambda value: value is None or is_preprocessing(value),
    "inference?": is_inference,
    "data_manifest_sha256?": (str, NoneType),
    "split?": SPLIT,
    "arguments?": {"data?": str, "epochs?": int, "fold?": (int, str, NoneType)},
    "processes?": int,
    "initial_weights?": {"patients?": [is_name]},
    "resumptions?": [{"changed": dict}],
}
RESUMED = {"arguments": {"data": str, "epochs": int, "amp": str}, "processes": int, "split": SPLIT,
           "data_manifest_sha256": str}  # fmt: skip
LAST = {  # last.pt, besides CHECKPOINT
    "optimizer": {"state": dict, "param_groups": [{"params": [int]}]},
    "scaler": dict,
    "history": [{"seconds": NUMBER, "dice_mean": NUMBER}],
}
MANIFEST_ENTRY = {  # of a case, as its maker needs it
    "bytes": int,
    "patient": str,
    "labelled": bool,
    "label_scheme": str,
    "sources": {str: int},
    "fingerprint?": str,
    "warnings?": {str: str},
}
CHECKPOINT = {
    "format": lambda number: type(number) is int and 1 <= number <= CHECKPOINT_FORMAT,
    "network": str,
    "config": {str: object},
    "modalities": [str],
    "amp?": ("off", "bf16", "fp16").__contains__,
    "epoch": int,
    "model": dict,
}


def read_json(path: Path, form):
    """The content of a JSON file; InputError where it is damaged, or not of this form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or brackets in brackets without end
        raise InputError(f"{path}: damaged ({one_line(error, 80)}).") from None
    if wrong := misfit(content, form):
        raise InputError(f"{path}: damaged, or edited by hand: {wrong}.")
    return content


def misfit(value, form, place: str = "its content") -> str | None:
    """The first part of a value that does not have its form, in words; None where all of it does."""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is not a list"
        parts = [(f"{place}[{index}]", each, form[0]) for index, each in enumerate(value)]
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place} is not a JSON object"
        if str in form:
            parts = [(f"{place}.{key}", each, form[str]) for key, each in value.items()]
        else:
            keys = {key.removesuffix("?"): key for key in form}
            if missing := [key for key, spelt in keys.items() if key == spelt and key not in value]:
                return f"{place} has no {missing[0]!r}"
            parts = [(key, value[key], form[spelt]) for key, spelt in keys.items() if key in value]
    else:
        fits = isinstance(value, form) if isinstance(form, type | tuple) else form(value)
        return None if fits else f"{place} is {one_line(value, 60)}"
    return next(filter(None, (misfit(each, inner, where) for where, each, inner in parts)), None)
