"""Engines: the ways to run a trained network fast, all behind one function, `load_engine`.

An engine is made for one shape of input. It takes a float32 image [B, 4, D, H, W] on its device and returns logits
[B, 4 or 3, D, H, W] in its own type; `models.inference.predict` takes one wherever it takes a network. `choose_engine`
is --engine of the scripts that predict.

A network that can compute its attention in several ways has a method `set_attention`, and one that has kernels of its
own has `set_kernels`; see models.swinunetr.network.

Half precision converts the weights: autocast converts them again in every pass and is no more exact. The memory layout
and the kernels are chosen by measurement: with channels last, networks with instance norm can get slower. The choice is
kept in the cache folder, as are the files of the engines that compile ahead of time.
"""

import gc
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch._inductor  # where torch keeps what compiles ahead of time
from torch import Tensor, nn
from tqdm import tqdm

from models.device import DTYPES, float32_multiplication, native_dtypes
from models.errors import InputError, one_line
from models.files import write_atomically
from models.inference.exports import (
    FORMAT,
    compiled_ahead_of_time,
    exported_to_onnx,
    header_of,
    machine_of,
    read_header,
)
from models.inference.predict import predict
from models.runs import load_model
from models.timing import latencies_ms

ENGINES = {
    "eager": "the modules as they are, attention written out",
    "fused": "the modules with fused attention kernels",
    "compile": "fused attention and torch.compile for one shape",
    "cudagraph": "the compiled network recorded as one CUDA graph",
    "aot": "compiled ahead of time to a .pt2 file, which runs without the model code",
    "onnx": "exported to an .onnx file, run by onnxruntime",
    "openvino": "exported to an .onnx file, run by OpenVINO (CPU only)",
}
FALLBACK = {
    "cudagraph": "compile", "aot": "compile", "compile": "fused", "onnx": "fused", "openvino": "fused",
    "fused": "eager",
}  # fmt: skip
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last-3d": torch.channels_last_3d}
TURNS = 3  # in which OpenVINO and the modules are compared
CACHE = Path(".engines")  # compiled files and measured layouts; can be deleted at any time


@dataclass(frozen=True)
class Engine:
    """A network made ready to run: call it with an image, get logits."""

    run: Callable[[Tensor], Tensor]
    engine: str
    dtype: str
    layout: str
    kernels: str  # "torch", or "triton" for this project's own
    shape: tuple[int, ...]
    first_use_s: float = 0.0  # what it took to have it ready: conversion, compilation, export, the first run

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        if tuple(image.shape) != self.shape:
            raise InputError(f"this engine was made for images of {self.shape}, not {tuple(image.shape)}.")
        own_type = torch.autocast(image.device.type, enabled=False)
        with own_type, float32_multiplication(tf32=self.dtype == "tf32"):
            return self.run(image)


class Prepared(nn.Module):
    """A network behind the conversion of its input, so that the conversion is compiled and exported with it."""

    def __init__(self, network: nn.Module, dtype: str, layout: str):
        super().__init__()
        self.dtype, self.memory_format = DTYPES[dtype], LAYOUTS[layout]
        self.network = network.to(self.dtype).to(memory_format=self.memory_format)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image.to(self.dtype).contiguous(memory_format=self.memory_format))


def load_engine(
    source,
    engine: str = "compile",
    dtype: str = "float32",
    layout: str = "auto",
    shape=(1, 4, 128, 128, 128),
    device="cpu",
    cache: Path = CACHE,
    fallback: bool = True,
) -> Engine:
    """The one way from a trained run, an exported file or a network to an engine.

    Args:
        source: a run's folder, its checkpoint, a `.pt2` file that the "aot" engine made, or a network.
        layout: one of LAYOUTS, or "auto": the faster of them here.
        fallback: where the engine cannot run, say so on stderr and take the next slower one; else raise InputError.
    """
    device = torch.device(device)
    if str(source).endswith(".pt2") and not isinstance(source, nn.Module):
        return load_exported(source, device)
    model = source if isinstance(source, nn.Module) else load_model(source)[0]
    while True:
        fallback = fallback and engine in FALLBACK and why_not("eager", dtype, device, model) is None
        try:
            if reason := why_not(engine, dtype, device, model):
                raise InputError(f"the engine {engine} in {dtype} cannot run here: {reason}.")
            return _load(model, engine, dtype, layout, tuple(shape), device, Path(cache))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler has a thousand ways to fail, and each is a reason to do without it
            if not fallback:
                raise
            log(f"Warning: {one_line(error)} Taking {FALLBACK[engine]} in place of {engine}.")
            engine = FALLBACK[engine]


def why_not(engine: str, dtype: str, device: torch.device, model: nn.Module) -> str | None:
    """Why this machine cannot run the network so, or None if it can. InputError for an unknown engine or type."""
    for flag, name, known in (("--engines", engine, ENGINES), ("--dtypes", dtype, DTYPES)):
        if name not in known:
            raise InputError(f"{flag}: there is no {name!r}. There are: {', '.join(known)}.")
    cuda = device.type == "cuda"
    if not cuda and dtype in ("tf32", "fp16"):
        return f"{dtype} is offered on CUDA only; a CPU has float32 and bf16"
    if cuda and dtype in ("tf32", "bf16") and torch.cuda.get_device_capability(device)[0] < 8:
        return f"{dtype} needs a GPU of compute capability 8.0 or later"
    if engine == "fused" and not hasattr(model, "set_attention"):
        return "the network has no attention"
    if engine == "cudagraph" and not cuda:
        return "CUDA graphs need a CUDA device"
    if engine in ("compile", "cudagraph", "aot"):
        return _why_not_compile(cuda, ahead_of_time=engine == "aot")
    if engine == "openvino":
        return _why_not_openvino(dtype, device)
    return _why_not_onnx(dtype, cuda) if engine == "onnx" else None


def _why_not_compile(cuda: bool, ahead_of_time: bool) -> str | None:
    if cuda and find_spec("triton") is None:
        return "torch.compile on CUDA needs the package triton"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if (ahead_of_time or not cuda) and not any(map(shutil.which, compilers)):
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    return None


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
    if missing := _missing("onnx", "onnxscript", "openvino"):
        return missing
    if DTYPES[dtype] not in native_dtypes(device):
        return f"OpenVINO computes in {dtype} only where the processor multiplies it"
    return None


def _missing(*packages: str) -> str | None:
    missing = [name for name in packages if find_spec(name) is None]
    return f"pip install {' '.join(missing)}" if missing else None


def choose_engine(model, engine: str, amp_dtype, size: int, device: torch.device, cache: Path = CACHE):
    """What is to predict cubes of `size` voxels: the engine of that name, or with "auto" OpenVINO where it can run and
    is faster than the network's own modules, else the network. Measured once; the decision is kept in `cache`."""
    dtype = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype]
    shape = (1, 4, size, size, size)
    if engine != "auto":
        return load_engine(model, engine, dtype, shape=shape, device=device, cache=cache)
    if why_not("openvino", dtype, device, model):
        return model
    image = torch.rand(shape)
    path = cache / f"{_stem(model, 'auto', dtype, image, weights=False)}.json"
    median_ms = json.loads(path.read_text()) if path.is_file() else None
    made = None
    if median_ms is None or median_ms["openvino"] < median_ms["modules"]:
        try:
            made = load_engine(model, "openvino", dtype, shape=shape, cache=cache, fallback=False)
        except Exception as error:
            log(f"Warning: OpenVINO cannot run it ({one_line(error)}).")
            return model
    if median_ms is None:
        median_ms = _in_turns({"openvino": made, "modules": model}, image, amp_dtype)
        write_atomically(path, json.dumps(median_ms))
    fastest = min(median_ms, key=median_ms.get)
    measured = ", ".join(f"{name} {ms:.0f} ms" for name, ms in median_ms.items())
    log(f"{model.network} in {dtype}, {size}^3 voxels: {measured} (see {path}): taking {fastest}.")
    return made if fastest == "openvino" else model


def engine_name(network) -> str:
    """What runs a network: the name of its engine, or "modules"."""
    return network.engine if isinstance(network, Engine) else "modules"


def _in_turns(networks: dict[str, Callable], image: Tensor, amp_dtype) -> dict[str, float]:
    """The median milliseconds in which each network predicts; they take turns, so that other work on the machine
    disturbs all of them."""
    times = {name: [] for name in networks}
    for _ in range(TURNS + 1):
        for name, network in networks.items():
            times[name] += latencies_ms(lambda one, by=network: predict(by, one[0], amp_dtype), [image], 1, warmup_s=0)
    return {name: median(ms[1:]) for name, ms in times.items()}  # the first turn warms up


# ---- making an engine ----------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What an engine is free to choose; the fastest is measured."""

    layout: str  # a key of LAYOUTS
    kernels: str = "torch"  # or "triton": this project's own, for CUDA
    compiled: bool = False


def _load(model, engine: str, dtype: str, layout: str, shape, device: torch.device, cache: Path) -> Engine:
    start = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    # A folder for each instruction set: torch finds what it compiled for another one, and that computes nonsense here.
    compiled = cache / "inductor" / re.sub(r"\W+", "-", machine_of(device))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled.resolve())
    torch.backends.cudnn.benchmark = True  # one shape: the search for the fastest convolution pays at once
    image = torch.rand(shape, device=device)
    variant = _fastest(model, engine, dtype, layout, image, cache)
    made = _make(model, engine, dtype, variant, image, cache)
    made(image)
    seconds = time.perf_counter() - start
    chosen = f"{variant.layout}, {variant.kernels} kernels{', compiled' * variant.compiled}"
    log(f"{model.network}: engine {engine}, {dtype}, {chosen}: ready after {seconds:.1f} s.")
    return replace(made, first_use_s=seconds)


def _make(model, engine: str, dtype: str, variant: Variant, image: Tensor, cache: Path) -> Engine:
    # A file that has to run elsewhere cannot hold kernels of our own, and ONNX has no fused attention.
    attention = {"eager": "reference", "onnx": "reference", "openvino": "reference", "aot": "sdpa"}.get(engine, "auto")
    network = with_attention(model, attention).requires_grad_(False).to(image.device)
    if hasattr(network, "set_kernels"):
        network.set_kernels(variant.kernels)
    # OpenVINO takes float32 weights and rounds by itself.
    prepared = Prepared(network, "float32" if engine == "openvino" else dtype, variant.layout).eval()
    made = Engine(prepared, engine, dtype, variant.layout, variant.kernels, tuple(image.shape))
    if engine == "aot":
        path = cache / f"{_stem(model, engine, dtype, image, weights=True)}-{variant.layout}.pt2"
        header = header_of(model, dtype, variant.layout, image)
        return replace(made, run=compiled_ahead_of_time(prepared, image, path, header))
    if engine in ("onnx", "openvino"):
        path = cache / f"{_stem(model, engine, dtype, image, weights=True)}.onnx"
        return replace(made, run=exported_to_onnx(prepared, image, path, engine, dtype))
    if variant.compiled:
        made = replace(made, run=_compiled(prepared))
    return replace(made, run=_recorded(made, image)) if engine == "cudagraph" else made


def _variants(model, engine: str, dtype: str, layout: str, image: Tensor, cache: Path) -> list[Variant]:
    if engine in ("onnx", "openvino"):
        return [Variant("contiguous")]  # an ONNX tensor has no other
    if engine == "aot":
        return [_fastest(model, "compile", dtype, layout, image, cache)._replace(kernels="torch")]
    modules = "fused" if hasattr(model, "set_attention") else "eager"
    if engine == "cudagraph":
        return [_fastest(model, base, dtype, layout, image, cache) for base in (modules, "compile")]
    layouts = LAYOUTS if layout == "auto" else [layout]
    variants = [Variant(one, "torch", engine == "compile") for one in layouts]
    own = hasattr(model, "set_kernels")
    if own and engine != "eager" and image.is_cuda and find_spec("triton") and "channels-last-3d" in layouts:
        variants.append(Variant("channels-last-3d", "triton", engine == "compile"))
    return variants


def _fastest(model, engine: str, dtype: str, layout: str, image: Tensor, cache: Path) -> Variant:
    """The variant in which this engine is fastest, measured once for a network, a shape, a type and a machine."""
    variants = _variants(model, engine, dtype, layout, image, cache)
    if len(variants) == 1:
        return variants[0]
    path = cache / f"{_stem(model, engine, dtype, image, weights=False)}-{layout}.json"
    if path.is_file():
        return Variant(*json.loads(path.read_text())["fastest"])
    median_ms = {}
    for variant in variants:
        try:
            made = _make(model, engine, dtype, variant, image, cache)
            median_ms[variant] = median(latencies_ms(made, [image], repeats=10, max_seconds=3, min_repeats=2))
        except Exception as error:
            if variant == variants[-1] and not median_ms:
                raise
            log(f"Warning: {variant} of {engine} in {dtype} cannot run ({one_line(error)}).")
        made = None  # or the next one is measured in what memory this one leaves
        gc.collect()
    fastest = min(median_ms, key=median_ms.get)
    measured = [{**variant._asdict(), "median_ms": ms} for variant, ms in median_ms.items()]
    write_atomically(path, json.dumps({"fastest": fastest, "measured": measured}))
    return fastest


def _compiled(prepared: nn.Module) -> Callable:
    mode = "max-autotune-no-cudagraphs" if next(prepared.parameters()).is_cuda else "default"
    # Each engine compiles the same forward() anew: the limit is there for accidental recompilation.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(prepared, dynamic=False, mode=mode)  # MONAI's network breaks into several graphs


def _recorded(engine: Engine, image: Tensor) -> Callable:
    """The kernels of one run recorded as a CUDA graph, which the device repeats with a single launch."""
    engine(image)  # compiles
    static = image.clone()
    side = torch.cuda.Stream()  # recording wants the lazy work of the first runs done, on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            engine(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = engine(static)

    def replay(image: Tensor) -> Tensor:
        static.copy_(image)
        graph.replay()
        return logits.clone()  # the next run overwrites them

    return replay


def load_exported(path: str | Path, device="cpu") -> Engine:
    """The engine in a `.pt2` file. Needs neither the code nor the checkpoint of the network."""
    start = time.perf_counter()
    header = read_header(path, device)
    run = torch._inductor.aoti_load_package(str(path))
    shape = tuple(json.loads(header["shape"]))
    with torch.inference_mode():
        run(torch.rand(shape, device=device))
    return Engine(run, "aot", header["dtype"], header["layout"], "torch", shape, time.perf_counter() - start)


# ---- helpers -------------------------------------------------------------------------------------------------------


def with_attention(model: nn.Module, attention: str) -> nn.Module:
    """A copy of a network; its attention, if it has any, is "reference" (written out), "sdpa" or "auto" (fused)."""
    model = deepcopy(model)
    if hasattr(model, "set_attention"):
        model.set_attention(attention)
    return model


def _stem(model, engine: str, dtype: str, image: Tensor, weights: bool) -> str:
    """A file name that changes with everything that the file depends on: settings, code, torch, machine, and, where
    `weights` says so, the weights: what was made of other weights is never found."""
    digest = hashlib.sha256()
    settings = (FORMAT, model.config, tuple(image.shape), torch.__version__, torch.get_num_threads())
    digest.update(repr((settings, machine_of(image.device))).encode())
    for source in sorted(Path(inspect.getfile(type(model))).parent.glob("*.py")):
        digest.update(source.read_bytes())
    if weights:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    size = "x".join(str(side) for side in image.shape[2:])
    return f"{model.network}-{engine}-{dtype}-{image.shape[0]}x{size}-{image.device.type}-{digest.hexdigest()[:16]}"


def log(text: str):
    tqdm.write(text, file=sys.stderr)
