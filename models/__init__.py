"""The package that the scripts share, and the only place that knows which networks exist."""

from importlib import import_module

from models.errors import InputError

NETWORKS = ("unet", "swinunetr")  # each a subpackage with DEFAULTS, SIZE_MULTIPLE, smallest_side, build


def build_model(name: str, **config):
    """A network with fresh weights that maps [B, 4, D, H, W] to logits [B, 4, D, H, W] of labels or, with
    `out_channels=3`, of regions (see losses.py).

    `config` overrides the network's DEFAULTS. The result carries `network` (its name) and `config` (complete).
    """
    package = _subpackage(name)
    unknown = sorted(set(config) - set(package.DEFAULTS))
    if unknown:
        raise InputError(f"{name} has no setting {unknown[0]!r}. It has: {', '.join(package.DEFAULTS)}.")
    config = with_defaults(name, config)
    model = package.build(**config)
    model.network, model.config = name, config
    return model


def with_defaults(name: str, config: dict) -> dict:
    """The complete settings of a network; those of an older checkpoint lack what has been added since."""
    return _subpackage(name).DEFAULTS | config


def size_multiple(name: str) -> int:
    """Every side of a network's input must be a multiple of this."""
    return _subpackage(name).SIZE_MULTIPLE


def refuse_unfit_size(name: str, config: dict, size, data, patch: int | None = None):
    """InputError unless the network can be trained on volumes of this size [D, H, W] (voxels): the cases in the folder
    `data`, or patches of them."""
    package = _subpackage(name)
    multiple, voxels = package.SIZE_MULTIPLE, " x ".join(map(str, size))
    given = f"--patch {patch}: {name}" if patch else f"{data}: cases of {voxels} voxels, but {name}"
    remedy = "Choose --patch" if patch else "Preprocess with --size"
    if any(side % multiple for side in size):
        fitting = max(multiple, round(size[0] / multiple) * multiple)
        raise InputError(f"{given} needs sides that {multiple} divides. {remedy} {fitting}.")
    smallest, reason = package.smallest_side(with_defaults(name, config))
    if min(size) < smallest:
        raise InputError(f"{given} needs sides of {smallest} or more: {reason}. "
                         f"{remedy} {-(-smallest // multiple) * multiple} or more.")


def _subpackage(name: str):
    if name not in NETWORKS:
        raise InputError(f"no network is called {name!r}. There are: {', '.join(NETWORKS)}.")
    return import_module(f"models.{name}")
