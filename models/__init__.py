"""The package that the scripts share, and the only place that knows which networks exist."""

from importlib import import_module
from pathlib import Path

from models.errors import InputError, one_line

NETWORKS = ("unet", "swinunetr")  # each is a subpackage with DEFAULTS, SIZE_MULTIPLE and build(**config)
CHECKPOINT_FORMAT = 1
RUNTIME_SETTINGS = ("attention", "checkpointing")  # speed and memory; what the network computes is the same


def build_model(name: str, **config):
    """A network with fresh weights that maps [B, 4, D, H, W] to label logits [B, 4, D, H, W].

    `config` overrides the network's DEFAULTS. The result carries `network` (its name) and `config` (complete).
    """
    from models.onednn import use_onednn

    network = _subpackage(name)
    unknown = sorted(set(config) - set(network.DEFAULTS))
    if unknown:
        raise InputError(f"{name} has no setting {unknown[0]!r}. It has: {', '.join(network.DEFAULTS)}.")
    config = network.DEFAULTS | config
    model = use_onednn(network.build(**config))
    model.network, model.config = name, config
    return model


def size_multiple(name: str) -> int:
    """Every side of a network's input must be a multiple of this."""
    return _subpackage(name).SIZE_MULTIPLE


def _subpackage(name: str):
    if name not in NETWORKS:
        raise InputError(f"no network is called {name!r}. There are: {', '.join(NETWORKS)}.")
    return import_module(f"models.{name}")


def load_model(run: str | Path, device="cpu"):
    """The trained network of a run (its folder, or a checkpoint file) in evaluation mode, and its checkpoint.

    A missing, damaged or mismatched file is an InputError: weights are loaded strictly or not at all.
    """
    path = Path(run)
    path = path / "best.pt" if path.is_dir() else path
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint["network"], **checkpoint["config"])
    load_weights(model, checkpoint, path)
    return model.to(device).eval(), checkpoint


def load_checkpoint(path: Path) -> dict:
    """The dict in a checkpoint file of ours; anything else is an InputError."""
    import torch

    from models.brats import MODALITIES
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint. Train first, or name a run such as models/unet/results/<run>.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for a bad file
        raise InputError(f"{path}: damaged or no checkpoint ({one_line(error, 80)}).") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project's training scripts.")
    if tuple(checkpoint["modalities"]) != MODALITIES:
        raise InputError(f"{path}: trained on the channels {tuple(checkpoint['modalities'])}, not {MODALITIES}.")
    return checkpoint


def load_weights(model, checkpoint: dict, path: Path):
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except RuntimeError as error:
        reason = one_line(error, 160)
        raise InputError(f"{path}: its weights do not fit {model.network} {model.config}: {reason}") from None
