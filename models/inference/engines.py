"""Engines: the ways to run a trained network fast, all behind one function, `load_engine`.

An engine is made for one shape of input. It takes a float32 image [B, 4, D, H, W] on its device and returns logits
[B, 4 or 3, D, H, W] in its own type; `models.inference.predict` takes one wherever it takes a network. `choose_engine`
implements --engine of the scripts that predict.

A network that can compute its attention in several ways has a method `set_attention`, and one that has kernels of its
own has `set_kernels`; see models.swinunetr.network.

For half precision the weights are converted: autocast would convert them again in every pass and is no more exact. The
memory layout and the kernels are chosen by measurement: with channels last, networks with instance norm can get slower.
The choice is kept in the cache folder, as are the files of the engines that compile ahead of time.
"""

import gc
import hashlib
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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

from models.device import DTYPES, float32_multiplication, rank
from models.errors import InputError, one_line
from models.files import write_atomically
from models.inference.availability import why_not
from models.inference.exports import (
    FORMAT,
    SESSIONS,
    compiled_ahead_of_time,
    export_to_onnx,
    header_of,
    machine_of,
    read_header,
)
from models.inference.predict import predict
from models.inference.quantisation import calibration_images, quantise
from models.runs import Run, load_model
from models.timing import latencies_ms

FALLBACK = {
    "cudagraph": "compile", "aot": "compile", "compile": "fused", "onnx": "fused", "openvino": "fused",
    "fused": "eager",
}  # fmt: skip
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last-3d": torch.channels_last_3d}
TURNS = 3  # in which OpenVINO and the modules are compared
WORTH_S = 60  # of predicting with the modules: for less it is not worth half a minute to make an engine
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
    first_use_s: float = 0.0  # until it was ready: conversion, compilation, export, the first run

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
    calibration: Sequence[Tensor] = (),
) -> Engine:
    """An engine for a trained run, an exported file or a network.

    Args:
        source: a run's folder, its checkpoint, a `.pt2` file that the "aot" engine made, or a network.
        layout: one of LAYOUTS, or "auto": the faster of them here.
        fallback: if the engine cannot run, warn on stderr and take the next slower one; else raise InputError.
        calibration: for int8: images [4, D, H, W] in network space, see `quantisation.calibration_images`.
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
            return _load(model, engine, dtype, layout, tuple(shape), device, Path(cache), calibration)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways, and each is a reason to do without them
            if not fallback:
                raise
            log(f"Warning: {one_line(error)} Taking {FALLBACK[engine]} in place of {engine}.")
            engine = FALLBACK[engine]


def choose_engine(
    model, engine: str, amp_dtype, size: int, device: torch.device, passes: int, cache: Path = CACHE,
    run: Run | None = None,
):  # fmt: skip
    """What is to predict about `passes` cubes of `size` voxels: the engine of that name, or with "auto" OpenVINO where
    it can run, is faster than the network's own modules and these would take a while, else the network. Measured once;
    the times are kept in `cache`.

    "openvino-int8" is calibrated with the training cases of `run`. "auto" never takes it: unless something else is
    asked for, a score is that of the network as it was trained.
    """
    dtype = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype]
    shape = (1, 4, size, size, size)
    if engine == "openvino-int8":
        images = calibration_images(run) if run else ()
        return load_engine(model, "openvino", "int8", shape=shape, device=device, cache=cache, calibration=images)
    if engine != "auto":
        return load_engine(model, engine, dtype, shape=shape, device=device, cache=cache)
    if why_not("openvino", dtype, device, model):
        return model
    image = torch.rand(shape)
    path = cache / f"{_stem(model, 'auto', dtype, image, weights=False)}.json"
    if path.is_file():
        median_ms = json.loads(path.read_text())
    else:
        median_ms = _in_turns({"modules": model}, image, amp_dtype, turns=1)
        _keep(path, median_ms)
    if passes * median_ms["modules"] < 1e3 * WORTH_S:
        return model
    made = None
    if median_ms.get("openvino", 0) < median_ms["modules"]:
        try:
            made = load_engine(model, "openvino", dtype, shape=shape, cache=cache, fallback=False)
        except Exception as error:
            log(f"Warning: OpenVINO cannot run it ({one_line(error)}).")
            return model
    if "openvino" not in median_ms:
        median_ms = _in_turns({"openvino": made, "modules": model}, image, amp_dtype)
        _keep(path, median_ms)
    fastest = min(median_ms, key=median_ms.get)
    measured = ", ".join(f"{name} {ms:.0f} ms" for name, ms in median_ms.items())
    log(f"{model.network} in {dtype}, {size}^3 voxels: {measured} (see {path}): taking {fastest}.")
    return made if fastest == "openvino" else model


def _keep(path: Path, median_ms: dict[str, float]):
    """Write the times for the next time; where nothing can be written, they are measured again then."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(median_ms))


def engine_name(network) -> str:
    """What runs a network: its engine, as --engine names it, or "modules"."""
    if not isinstance(network, Engine):
        return "modules"
    return f"{network.engine}-int8" if network.dtype == "int8" else network.engine


def _in_turns(networks: dict[str, Callable], image: Tensor, amp_dtype, turns: int = TURNS) -> dict[str, float]:
    """The median milliseconds in which each network predicts; they take turns, so that other work on the machine
    disturbs all of them."""
    times = {name: [] for name in networks}
    for _ in range(turns + 1):
        for name, network in networks.items():
            times[name] += latencies_ms(lambda one, by=network: predict(by, one[0], amp_dtype), [image], 1, warmup_s=0)
    return {name: median(ms[1:]) for name, ms in times.items()}  # the first turn warms up


# ---- making an engine ----------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What is free to choose for an engine; the fastest variant is found by measurement."""

    layout: str  # a key of LAYOUTS
    kernels: str = "torch"  # or "triton": this project's own, for CUDA
    compiled: bool = False


def _load(
    model, engine: str, dtype: str, layout: str, shape, device: torch.device, cache: Path, calibration
) -> Engine:
    start = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    # A folder for each instruction set: torch finds what it compiled for another one, and that computes nonsense here.
    compiled = cache / "inductor" / re.sub(r"\W+", "-", machine_of(device))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled.resolve())
    torch.backends.cudnn.benchmark = True  # one shape: the search for the fastest convolution pays at once
    image = torch.rand(shape, device=device)
    variant = _fastest(model, engine, dtype, layout, image, cache)
    made = _make(model, engine, dtype, variant, image, cache, calibration)
    made(image)
    seconds = time.perf_counter() - start
    chosen = f"{variant.layout}, {variant.kernels} kernels{', compiled' * variant.compiled}"
    log(f"{model.network}: engine {engine}, {dtype}, {chosen}: ready after {seconds:.1f} s.")
    return replace(made, first_use_s=seconds)


def _make(model, engine: str, dtype: str, variant: Variant, image: Tensor, cache: Path, calibration=()) -> Engine:
    # A file that has to run elsewhere cannot contain our own kernels, and ONNX has no fused attention.
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
        exported_in = "float32" if dtype == "int8" else dtype
        path = cache / f"{_stem(model, engine, exported_in, image, weights=True)}.onnx"
        export_to_onnx(prepared, image, path, engine, exported_in)
        if dtype == "int8":
            path = quantise(path, image, calibration)
        return replace(made, run=SESSIONS[engine](path, image, dtype))
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
    """A file name that changes with everything that the content depends on: settings, code, torch, machine and, with
    `weights`, the weights, so that what was made of other weights is never found."""
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
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)
