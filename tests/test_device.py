"""What the machine can do: number types, memory."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from models.device import (
    inference_dtype,
    native_dtypes,
    resolve_amp,
    why_not_compile,
)
from models.memory import free_ram_bytes

CPU = torch.device("cpu")


def test_a_processor_held_to_avx2_multiplies_float32_only(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert native_dtypes(CPU) == {torch.float32}


def test_a_processor_with_bf16_instructions_multiplies_it_unless_torch_may_not_use_them(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert native_dtypes(CPU) == {torch.float32, torch.bfloat16}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native_dtypes(CPU) == {torch.float32}


def test_a_type_that_is_only_emulated_is_taken_with_a_warning_that_tells_its_cost(monkeypatch, capsys):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert resolve_amp("bf16", CPU) == "bf16"
    assert "only emulates bf16" in capsys.readouterr().err
    assert resolve_amp("off", CPU) == "off" and not capsys.readouterr().err


def test_a_network_predicts_in_the_type_that_it_was_trained_in_where_that_is_native(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert inference_dtype("auto", "bf16", CPU) is None
    monkeypatch.setattr("models.device.native_dtypes", lambda device: {torch.float32, torch.bfloat16})
    assert inference_dtype("auto", "bf16", CPU) is torch.bfloat16
    assert inference_dtype("auto", "off", CPU) is None and inference_dtype("off", "bf16", CPU) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux forgets a peak")
def test_the_peak_memory_is_that_since_the_reset():
    """In a process of its own: others may keep the memory that they free."""
    program = """
import torch
from models.device import peak_memory_gib, reset_peak_memory
device = torch.device("cpu")
torch.ones(2**28)  # 1 GiB, given back
assert peak_memory_gib(device) > 1
reset_peak_memory(device)
before = peak_memory_gib(device)
torch.ones(2**27)
assert 0.4 < peak_memory_gib(device) - before < 0.7
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ---- free memory: a machine with 8000 kB available ----


@pytest.fixture
def system(tmp_path):
    """Writes the files of /proc and /sys that tell what memory is free; returns their root."""

    def write(files):
        for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def version_2(folder, limit, usage, cache=0):
    return {f"sys/fs/cgroup/{folder}memory.max": f"{limit}\n", f"sys/fs/cgroup/{folder}memory.current": f"{usage}\n",
            f"sys/fs/cgroup/{folder}memory.stat": f"anon 5\ninactive_file {cache}\n"}  # fmt: skip


def version_1(folder, limit, usage, cache=0):
    folder = f"sys/fs/cgroup/memory/{folder}"
    return {f"{folder}memory.limit_in_bytes": f"{limit}\n", f"{folder}memory.usage_in_bytes": f"{usage}\n",
            f"{folder}memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n"}  # fmt: skip


V1_UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8_192_000),
        ({"proc/self/cgroup": "0::/job\n", **version_2("job/", "max", 10)}, 8_192_000),
        ({"proc/self/cgroup": "0::/job\n", **version_2("job/", 5000, 3000, cache=1000)}, 3000),
        ({"proc/self/cgroup": "0::/\n", **version_2("", 5000, 3000)}, 2000),  # a container that sees itself as the root
        ({"proc/self/cgroup": "0::/a/b\n", **version_2("a/", 5000, 4000), **version_2("a/b/", 9000, 10)}, 1000),
        ({"proc/self/cgroup": "0::/a\n", **version_2("a/", 5000, 6000)}, 0),
        ({"proc/self/cgroup": "3:cpu:/\n2:memory:/a\n", **version_1("a/", 5000, 3000, cache=1000)}, 3000),
        ({"proc/self/cgroup": "2:memory:/host/path\n", **version_1("", 5000, 3000)}, 2000),
        ({"proc/self/cgroup": "2:memory:/a\n0::/\n", **version_1("a/", V1_UNLIMITED, 3000)}, 8_192_000),
    ],
    ids=["no cgroup", "no limit", "limit", "root", "nested", "over", "v1", "v1 in a container", "v1 without limit"],
)
def test_free_memory_is_the_least_of_what_the_system_and_every_cgroup_leave(system, files, free):
    assert free_ram_bytes(system(files)) == free


def test_free_memory_is_unknown_where_the_system_does_not_tell(tmp_path):
    assert math.isnan(free_ram_bytes(tmp_path))


def test_torch_compile_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("models.device.shutil.which", lambda name: None)
    assert "g++" in why_not_compile(CPU)
    assert "triton" in why_not_compile(torch.device("cuda"))
    monkeypatch.setattr("models.device.shutil.which", lambda name: f"/usr/bin/{name}")
    assert why_not_compile(CPU) is None
