"""The machine that computes: its device, the number types that it multiplies fast, its processes, its memory."""

import ctypes
import math
import os
import platform
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from models.errors import InputError
from models.memory import free_ram_bytes

DTYPES = {
    "float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
}  # fmt: skip
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
# How long a process waits for another that hangs (if one ends, torchrun ends the others at once). One can be minutes
# slower where it reads its cases from a slower disk, or compiles.
PATIENCE = timedelta(minutes=10)
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Instruction sets that multiply bfloat16, in the names of ONEDNN_MAX_CPU_ISA, which can forbid the newer ones.
BF16_INSTRUCTIONS = ("BF16", "FP16", "AMX", "AVX10", "DEFAULT")


def choose_device(wanted: str) -> torch.device:
    """The device for --device auto, cpu or cuda; InputError for cuda where there is none."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this computer has no CUDA device, or this torch was built without CUDA.")
    if wanted == "cpu":
        keep_freed_memory()
    return torch.device(wanted)


def keep_freed_memory(keep: bool = True):
    """Have the C library keep the memory of freed tensors for the next ones, or not (glibc; elsewhere nothing happens).

    By default it returns every large block to the system at once, and each page of the next one has to be mapped and
    cleared again: a fifth of the time of a forward pass of Swin UNETR on a CPU.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc
        return
    # Without mapped blocks, never trimmed, growing by 256 MiB at a time; or glibc's defaults.
    for parameter, kept, default in ((M_MMAP_MAX, 0, 65536), (M_TRIM_THRESHOLD, -1, 2**17), (M_TOP_PAD, 2**28, 2**17)):
        library.mallopt(parameter, kept if keep else default)


def why_not_compile(device: torch.device, ahead_of_time: bool = False) -> str | None:
    """Why torch.compile cannot be used on this machine, or None if it can."""
    cuda = device.type == "cuda"
    if cuda and find_spec("triton") is None:
        return "torch.compile on CUDA needs the package triton"
    if cuda and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "no C compiler was found, which triton needs: install gcc or clang, or name one in CC"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if (ahead_of_time or not cuda) and not any(map(shutil.which, compilers)):
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    return None


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with its instruction set and how many threads torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", described.read_text()) if described.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name} ({instruction_set()}), {torch.get_num_threads()} threads"


# ---- number types --------------------------------------------------------------------------------------------------


def instruction_set() -> str:
    """The widest vector instructions that torch uses on this processor, such as "AVX2" or "AVX512 with bf16"."""
    return torch.backends.cpu.get_cpu_capability() + " with bf16" * _cpu_multiplies_bf16()


def native_dtypes(device: torch.device) -> set[torch.dtype]:
    """The types that the device multiplies in hardware. Others are emulated: on a processor with AVX2 alone a product
    in bf16 takes hundreds of times as long as in float32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        return {torch.float32, torch.float16} | ({torch.bfloat16} if has_bf16 else set())
    return {torch.float32} | ({torch.bfloat16} if _cpu_multiplies_bf16() else set())


def _cpu_multiplies_bf16() -> bool:
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not any(name in allowed for name in BF16_INSTRUCTIONS):
        return False
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"):
        return False  # ATEN_CPU_CAPABILITY can forbid instructions, too
    if torch.cpu._is_avx512_supported():
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # ARM


def resolve_amp(choice: str, device: torch.device) -> str:
    """--amp without "auto": on CUDA bf16 if the GPU multiplies it, else fp16; on a CPU off.

    A type that the device only emulates is used if it is asked for by name, with a warning of how slow it is.
    """
    if choice == "auto":
        if device.type != "cuda":
            return "off"
        return "bf16" if torch.bfloat16 in native_dtypes(device) else "fp16"
    if choice == "fp16" and device.type != "cuda":
        raise InputError("--amp fp16 needs a CUDA device; on a CPU use --amp bf16 or off.")
    dtype = AMP_DTYPES[choice]
    if dtype is not None and dtype not in native_dtypes(device) and rank() == 0:
        print(f"Warning: this device only emulates {choice}: a matrix product takes "
              f"{emulation_factor(dtype, device):.0f} times as long as in float32. Use --amp off.", file=sys.stderr)
    return choice


def inference_dtype(choice: str, trained_in: str, device: torch.device) -> torch.dtype | None:
    """The type of autocast in which a trained network predicts. `auto` on a CPU: the one that it was trained in
    (`trained_in`, as --amp) where the processor multiplies it, else float32."""
    if choice == "auto" and device.type != "cuda":
        trained = AMP_DTYPES[trained_in]
        return trained if trained in native_dtypes(device) else None
    return AMP_DTYPES[resolve_amp(choice, device)]


def emulation_factor(dtype: torch.dtype, device: torch.device) -> float:
    """How many times longer a small matrix product takes in this type than in float32, measured in a few ms."""
    seconds = {}
    for kind in (torch.float32, dtype):
        matrix = torch.ones(128, 128, device=device, dtype=kind)
        matrix @ matrix  # libraries load at the first use
        synchronise(device)
        start = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        synchronise(device)
        seconds[kind] = time.perf_counter() - start
    return seconds[dtype] / seconds[torch.float32]


@contextmanager
def float32_multiplication(tf32: bool):
    """Whether convolutions and matrix products of float32 may round their inputs to TF32, on GPUs that have it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- processes -----------------------------------------------------------------------------------------------------


def join_processes(device: torch.device, backend: str | None = None, patience: timedelta = PATIENCE) -> torch.device:
    """Join the other processes if torchrun started several, each with its own GPU; returns the device of this one. From
    then on only the first process prints to stdout. InputError if there are too few GPUs.

    Args:
        backend: what carries messages: by default NCCL between GPUs, and gloo for CPU tensors, which then need not wait
            for a GPU.
        patience: how long to wait for a message before its absence is an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        if processes_here() > (gpus := torch.cuda.device_count()):
            raise InputError(f"--nproc-per-node {processes_here()}: each process takes a GPU, and this machine has "
                             f"{gpus}.")  # fmt: skip
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, own_rank, processes = next(dist.rendezvous("env://", timeout=patience))
    # Processes that torchrun starts again get the store of those that have ended, and would find their addresses in it.
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, timeout=patience, store=store, rank=own_rank, world_size=processes)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def decided_once(decide: Callable):
    """The result of `decide()` in the first process, in all processes: each has its own clock and free memory, on which
    a common decision must not depend. An InputError is raised in all of them, or the others would wait for the
    first."""
    decision = [None]
    if rank() == 0:
        try:
            decision = [decide()]
        except InputError as error:
            decision = [error]
    if world_size() > 1:
        dist.broadcast_object_list(decision)
    if isinstance(decision[0], InputError):
        raise decision[0]
    return decision[0]


@contextmanager
def first_process_first():
    """The first process goes ahead, so that the others find what it leaves in files, such as a measurement."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def collected(item) -> list:
    """In the first process, the items that all processes pass, by rank; in the others an empty list."""
    if world_size() == 1:
        return [item]
    collection = [None] * world_size() if rank() == 0 else None
    dist.gather_object(item, collection)
    return collection or []


def torchrun_id() -> str | None:
    """An identity that all processes started by one call of torchrun share, also those that it starts again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    identity = f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()} {platform.node()}"
    return f"{zlib.crc32(identity.encode()):08x}"


def processes_here() -> int:
    """How many of the processes run on this machine, according to torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# ---- waiting and memory --------------------------------------------------------------------------------------------


def synchronise(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device):
    """Forget the peak so far, such as that of a compiler; on a CPU possible on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at once since the start or the reset: allocated by tensors on CUDA, resident in this process on
    a CPU (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_memory_bytes(device: torch.device) -> float:
    """What can still be allocated on a GPU, or in the memory of this machine (see `free_ram_bytes`)."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram_bytes()
