"""Which engines and number types this machine can run a network in, and why not the others."""

from importlib.util import find_spec

import torch
from torch import nn

from models.device import DTYPES, native_dtypes, why_not_compile
from models.errors import InputError

ENGINES = {
    "eager": "the modules as they are, attention written out",
    "fused": "the modules with fused attention kernels",
    "compile": "fused attention and torch.compile for one shape",
    "cudagraph": "the compiled network recorded as one CUDA graph",
    "aot": "compiled ahead of time to a .pt2 file, which runs without the model code",
    "onnx": "exported to an .onnx file, run by onnxruntime",
    "openvino": "exported to an .onnx file, run by OpenVINO (CPU only)",
}


def why_not(engine: str, dtype: str, device: torch.device, model: nn.Module) -> str | None:
    """Why this machine cannot run the network so, or None if it can. InputError for an unknown engine or type."""
    for flag, name, known in (("--engines", engine, ENGINES), ("--dtypes", dtype, DTYPES)):
        if name not in known:
            raise InputError(f"{flag}: there is no {name!r}. There are: {', '.join(known)}.")
    cuda = device.type == "cuda"
    if dtype == "int8" and engine != "openvino":
        return "int8 is offered by the engine openvino only"
    if not cuda and dtype in ("tf32", "fp16"):
        return f"{dtype} is offered on CUDA only; a CPU has float32 and bf16"
    if cuda and dtype in ("tf32", "bf16") and torch.cuda.get_device_capability(device)[0] < 8:
        return f"{dtype} needs a GPU of compute capability 8.0 or later"
    if engine == "fused" and not hasattr(model, "set_attention"):
        return "the network has no attention"
    if engine == "cudagraph" and not cuda:
        return "CUDA graphs need a CUDA device"
    if engine in ("compile", "cudagraph", "aot"):
        return why_not_compile(device, ahead_of_time=engine == "aot")
    if engine == "openvino":
        return _why_not_openvino(dtype, device)
    return _why_not_onnx(dtype, cuda) if engine == "onnx" else None


def _why_not_onnx(dtype: str, cuda: bool) -> str | None:
    if missing := _missing("onnx", "onnxscript", "onnxruntime"):
        return missing
    if dtype == "bf16":
        return "onnxruntime has no convolution in bf16"
    if cuda:
        import onnxruntime  # an optional package

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "pip install onnxruntime-gpu"
    return None


def _why_not_openvino(dtype: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "OpenVINO runs on a CPU here"
    if missing := _missing("onnx", "onnxscript", "openvino", *["nncf"] * (dtype == "int8")):
        return missing
    if dtype != "int8" and DTYPES[dtype] not in native_dtypes(device):
        return f"OpenVINO computes in {dtype} only where the processor multiplies it"
    return None


def _missing(*packages: str) -> str | None:
    missing = [name for name in packages if find_spec(name) is None]
    return f"pip install {' '.join(missing)}" if missing else None
