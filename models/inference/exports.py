"""Networks as files that run without the code that made them: compiled ahead of time (.pt2), and ONNX.

Our `.pt2` files have a header, so that one that cannot run here is refused before any of it runs.
"""

import json
import logging
import os
import platform
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import torch._inductor  # where torch keeps what compiles ahead of time
from torch import Tensor, nn

from models.device import DTYPES, float32_multiplication
from models.errors import InputError
from models.losses import labels_from_logits

FORMAT = "1"  # of the header in a .pt2 file
# Share of equal labels below which an export is refused; in bf16 both sides round, each in its own places.
AGREEMENT = {"float32": 0.999, "tf32": 0.99, "bf16": 0.98, "fp16": 0.99}  # of int8: see quantisation.py


def header_of(model, dtype: str, layout: str, image: Tensor) -> dict[str, str]:
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "machine": machine_of(image.device),
        "network": model.network,
        "config": json.dumps(model.config),
        "shape": json.dumps(list(image.shape)),
        "dtype": dtype,
        "layout": layout,
    }


def read_header(path: str | Path, device) -> dict[str, str]:
    """The header of a `.pt2` file, read without running any of it. InputError for a file that is not one of ours, or
    was made with another torch, or for another kind of GPU or instruction set."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("wrapper_metadata.json"))
            header = json.loads(archive.read(name))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (zipfile.BadZipFile, StopIteration, ValueError):
        header = {}
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: damaged, or not a .pt2 file of this project's aot engine.")
    for key, here in (("torch", torch.__version__), ("machine", machine_of(torch.device(device)))):
        if header[key] != here:
            raise InputError(f"{path}: made for {key} {header[key]}, and this is {here}. Export it again from its run.")
    return header


def compiled_ahead_of_time(prepared: nn.Module, image: Tensor, path: Path, header: dict[str, str]) -> Callable:
    """What runs the network, from the `.pt2` file `path`, which is made if it is missing."""
    if not path.is_file():
        with torch.no_grad():
            program = torch.export.export(prepared, (image,))
        temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
        options = {"aot_inductor.metadata": header, "max_autotune": image.is_cuda}
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=options)
        check_export(torch._inductor.aoti_load_package(str(temporary)), prepared, image, header["dtype"], temporary)
        os.replace(temporary, path)
    return torch._inductor.aoti_load_package(str(path))


def export_to_onnx(prepared: nn.Module, image: Tensor, path: Path, engine: str, dtype: str):
    """Write the network to an `.onnx` file for one of the SESSIONS, unless the file exists."""
    if path.is_file():
        return
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    on_cpu = deepcopy(prepared).cpu()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecated parts
        torch.onnx.export(on_cpu, (image.cpu(),), str(temporary), dynamo=True, external_data=False, verbose=False)
    check_export(SESSIONS[engine](temporary, image, dtype), prepared, image, dtype, temporary)
    os.replace(temporary, path)


def _onnx_session(path: Path, image: Tensor, dtype: str) -> Callable:
    import onnxruntime  # an optional package

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    cuda = ("CUDAExecutionProvider", {"device_id": image.device.index or 0, "use_tf32": int(dtype == "tf32")})
    providers = [cuda, "CPUExecutionProvider"] if image.is_cuda else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    given, returned = session.get_inputs()[0], session.get_outputs()[0]
    if not image.is_cuda:
        return lambda image: torch.from_numpy(session.run(None, {given.name: image.contiguous().numpy()})[0])

    def run_on_gpu(image: Tensor) -> Tensor:
        image = image.contiguous()
        logits = torch.empty(returned.shape, dtype=DTYPES[dtype], device=image.device)
        binding = session.io_binding()  # the tensors stay where they are
        bound = (binding.bind_input, given.name, image), (binding.bind_output, returned.name, logits)
        for bind, name, tensor in bound:
            element = "float16" if tensor.dtype == torch.float16 else "float32"
            bind(name, "cuda", cuda[1]["device_id"], element, tuple(tensor.shape), tensor.data_ptr())
        torch.cuda.current_stream().synchronize()  # onnxruntime works on a stream of its own
        session.run_with_iobinding(binding)
        return logits

    return run_on_gpu


@cache
def openvino_core():
    """The only one of this process, and never freed: its CPU plugin gives the thread that makes it a stack for signal
    handlers. Had a second one its own, freeing them in another order would leave the thread with a freed stack, and the
    next signal, be it a Ctrl-C, would end the process."""
    import openvino  # an optional package

    return openvino.Core()


def openvino_session(path: Path, image: Tensor, dtype: str) -> Callable:
    """A function that runs the network of an `.onnx` or `.xml` file in this type on a CPU."""
    settings = {
        # Without this hint OpenVINO computes in bf16 wherever the processor has it; of int8, what is not quantised.
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bf16": "bf16", "int8": "f32"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino_core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda image: torch.from_numpy(request.infer([image.contiguous().numpy()], share_inputs=True)[0])


SESSIONS = {"onnx": _onnx_session, "openvino": openvino_session}  # engine -> what runs its .onnx file


def check_export(run: Callable, prepared: nn.Module, image: Tensor, dtype: str, path: Path):
    """Refuse and remove an exported file whose labels differ too much from those of the network it was made from."""
    with torch.inference_mode(), float32_multiplication(tf32=dtype == "tf32"):
        same = (labels_from_logits(run(image)) == labels_from_logits(prepared(image))).float().mean().item()
    if same < AGREEMENT[dtype]:
        path.unlink()
        raise InputError(f"the exported network agrees with its original in only {same:.2%} of the labels.")


def machine_of(device: torch.device) -> str:
    """The machine that compiled code is for: the GPU, or the processor's architecture and vector instructions."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
