"""What the machine can do: number types, memory."""

import os

import pytest
import torch

from models.device import inference_dtype, native_dtypes, peak_memory_gib, reset_peak_memory, resolve_amp

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
    torch.ones(2**28)  # 1 GiB, given back
    assert peak_memory_gib(CPU) > 1
    reset_peak_memory(CPU)
    before = peak_memory_gib(CPU)
    torch.ones(2**27)
    assert 0.4 < peak_memory_gib(CPU) - before < 0.7
