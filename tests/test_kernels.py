"""The Triton kernels against float64 formulas: on a GPU where there is one, in Triton's interpreter elsewhere."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from models.errors import InputError
from models.swinunetr.convolutions import Decoder, ResidualBlock
from models.swinunetr.network import SwinStage
from models.swinunetr.window_attention import (
    WindowAttention,
    mask_groups,
    mask_of_group,
    relative_position_index,
    shift_masks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 256  # elements before and after an output that no kernel may write to

with pytest.MonkeyPatch.context() as environment:  # which other tests must not see
    if DEVICE == "cpu":
        environment.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined, triton's own included
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime import interpreter

    if DEVICE == "cpu" and not isinstance(tl.zeros, interpreter.InterpretedFunction):
        pytest.skip("triton was imported before, for a GPU", allow_module_level=True)
    from models.swinunetr import triton_attention, triton_norm
    from models.swinunetr.triton_attention import window_attention
    from models.swinunetr.triton_norm import instance_norm_leaky_relu


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Where there is no GPU, the interpreter, mended: that of triton 3.7 multiplies bfloat16 as if it were uint16."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def guarded(monkeypatch):
    """Fresh outputs are NaN, and in the end the memory on both sides of them must still be."""
    buffers = []

    def guard(allocate):
        def allocate_guarded(*args, **kwargs):
            empty = allocate(*args, **kwargs)
            if not empty.numel():
                return empty
            buffer = torch.full((empty.numel() + 2 * GUARD,), float("nan"), dtype=empty.dtype, device=empty.device)
            buffers.append(buffer)
            return buffer.as_strided(empty.shape, empty.stride(), GUARD)

        return allocate_guarded

    monkeypatch.setattr(torch.Tensor, "new_empty", guard(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", guard(torch.empty_like))
    yield
    assert buffers
    for buffer in buffers:
        assert torch.isnan(buffer[:GUARD]).all() and torch.isnan(buffer[-GUARD:]).all()


def results(function, inputs, grad, *settings):
    """function(*inputs, *settings) and the gradients of all inputs, the output's gradient being `grad`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *settings)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def compare(actual, expected, tolerance):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


# ---- window attention ----------------------------------------------------------------------------------------------


def attention_formula(q, k, v, table, window, counts, shift, window_size):
    tokens = q.shape[2]
    index = relative_position_index(window_size)[:tokens, :tokens].to(q.device)
    bias = table[index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)  # [h, N, N]
    masks = shift_masks(window, shift, q.device)
    mask = q.new_zeros(*counts, 1, tokens, tokens)
    for group in mask_groups(counts, shift):
        mask[group] = masks[mask_of_group(group, counts, shift)][:, :tokens].to(q.dtype)
    logits = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).unflatten(0, (-1, *counts)) + mask
    return logits.flatten(0, 3).softmax(-1) @ v


def attention_case(window, counts, window_size, batch, heads, channels, dtype=torch.float32):
    """q, k, v as views of one tensor, as a linear layer leaves them, the bias table, and a gradient of the output."""
    torch.manual_seed(0)
    windows, tokens = batch * counts[0] * counts[1] * counts[2], window[0] * window[1] * window[2]
    qkv = torch.randn(windows, tokens, 3, heads, channels, device=DEVICE).to(dtype)
    table = torch.randn((2 * window_size - 1) ** 3, heads, device=DEVICE)
    grad = torch.randn(windows, heads, tokens, channels, device=DEVICE).to(dtype)
    return [*qkv.permute(2, 0, 3, 1, 4).unbind(), table], grad


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    ("window", "counts", "shift", "window_size", "batch", "heads", "channels"),
    [
        ((7, 7, 7), (2, 1, 1), (3, 0, 0), 7, 1, 1, 16),
        ((2, 3, 4), (1, 1, 3), (0, 0, 2), 4, 2, 3, 4),  # a window that shrank along two axes
        ((3, 3, 3), (2, 3, 2), (1, 1, 1), 3, 1, 2, 20),
        ((5, 5, 5), (1, 1, 1), (0, 0, 0), 5, 2, 1, 36),  # channels for which the tiles are smaller
        ((2, 2, 2), (3, 2, 1), (0, 0, 0), 2, 2, 2, 8),
    ],
)
def test_attention_is_that_of_the_formula(window, counts, shift, window_size, batch, heads, channels):
    inputs, grad = attention_case(window, counts, window_size, batch, heads, channels)
    geometry = (window, counts, shift, window_size)
    expected = results(attention_formula, [x.double() for x in inputs], grad, *geometry)
    compare(results(window_attention, inputs, grad, *geometry), expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype):
    inputs, grad = attention_case((4, 3, 4), (2, 1, 2), 4, 1, 2, 16, dtype)
    geometry = ((4, 3, 4), (2, 1, 2), (2, 0, 2), 4)
    expected = results(attention_formula, [x.double() for x in inputs], grad, *geometry)
    actual = results(window_attention, inputs, grad, *geometry)
    assert [x.dtype for x in actual] == [dtype] * 4 + [torch.float32]
    compare(actual, expected, 16 * torch.finfo(dtype).eps)


def test_attention_reads_any_layout():
    inputs, _ = attention_case((2, 3, 2), (2, 1, 1), 3, 1, 2, 6)
    grad = torch.ones((), device=DEVICE).expand(2, 2, 12, 6)  # of a sum: every stride is 0
    geometry = ((2, 3, 2), (2, 1, 1), (1, 0, 0), 3)
    expected = results(attention_formula, [x.double() for x in inputs], grad, *geometry)
    q, k, v, table = inputs
    apart = [q.contiguous(), k.transpose(2, 3).contiguous().transpose(2, 3), v, table.t().contiguous().t()]
    compare(results(window_attention, apart, grad, *geometry), expected, 2e-5)


def test_table_gradient_sums_over_many_windows_per_program(monkeypatch):
    monkeypatch.setattr(triton_attention, "TABLE_PROGRAMS", 6)  # for 2 tiles: 3 programs of 5, 5 and 3 windows
    inputs, grad = attention_case((2, 2, 2), (13, 1, 1), 2, 1, 2, 4)
    geometry = ((2, 2, 2), (13, 1, 1), (1, 0, 0), 2)
    expected = results(attention_formula, [x.double() for x in inputs], grad, *geometry)
    compare(results(window_attention, inputs, grad, *geometry), expected, 2e-5)


def test_attention_refuses_what_it_cannot_do():
    for channels, dtype in ((8, torch.float64), (129, torch.float32)):
        q = torch.zeros(1, 1, 8, channels, dtype=dtype, device=DEVICE)
        with pytest.raises(InputError, match="attention"):
            window_attention(q, q, q, torch.zeros(27, 1, device=DEVICE), (2, 2, 2), (1, 1, 1), (0, 0, 0), 2)


# ---- instance norm -------------------------------------------------------------------------------------------------


def norm_formula(x, shortcut=None, normalize_shortcut=False):
    y = F.instance_norm(x, eps=1e-5)
    if shortcut is not None:
        y = y + (F.instance_norm(shortcut, eps=1e-5) if normalize_shortcut else shortcut)
    return F.leaky_relu(y, 0.01)


USES = {"alone": 1, "shortcut": 2, "normalised shortcut": 2}  # number of inputs


def norm_case(shape, use, dtype=torch.float32):
    torch.manual_seed(0)
    inputs = [3 + torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape, device=DEVICE)][: USES[use]]
    inputs = [x.contiguous(memory_format=torch.channels_last_3d) for x in inputs]
    settings = (use == "normalised shortcut",) if len(inputs) == 2 else ()
    return inputs, torch.randn(shape, device=DEVICE), settings


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(2, 48, 3, 7, 5), (1, 130, 3, 2, 5), (2, 5, 9, 8, 7), (2, 3, 1, 1, 2)])
def test_norm_is_that_of_the_formula(shape, use, monkeypatch):
    monkeypatch.setattr(triton_norm, "PROGRAMS", 6)  # so that a program meets several tiles, the last cut short
    inputs, grad, settings = norm_case(shape, use)
    expected = results(norm_formula, [x.double() for x in inputs], grad, *settings)
    compare(results(instance_norm_leaky_relu, inputs, grad, *settings), expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use", USES)
def test_norm_in_half_precision(use, dtype):
    inputs, grad, settings = norm_case((2, 12, 4, 5, 6), use, dtype)  # as under autocast, the shortcut is float32
    grad = grad.to(dtype)
    expected = results(norm_formula, [x.double() for x in inputs], grad, *settings)
    actual = results(instance_norm_leaky_relu, inputs, grad, *settings)
    assert [x.dtype for x in actual] == [dtype] * 2 + [torch.float32] * (len(actual) - 2)
    compare(actual, expected, 4 * torch.finfo(dtype).eps)


def test_norm_is_exact_where_the_mean_is_large():
    x = (torch.randn(2, 3, 8, 8, 8, device=DEVICE) + 1000).contiguous(memory_format=torch.channels_last_3d)
    # x itself is rounded to 6e-5 near 1000
    torch.testing.assert_close(instance_norm_leaky_relu(x).double(), norm_formula(x.double()), rtol=2e-4, atol=2e-4)


def test_a_single_voxel_is_its_own_mean():
    x = torch.randn(2, 3, 1, 1, 1, device=DEVICE)
    out, grad = results(instance_norm_leaky_relu, [x], torch.ones_like(x))
    assert (out == 0).all() and (grad == 0).all()


def test_norm_of_other_layouts_and_its_repetition():
    inputs, grad, settings = norm_case((2, 6, 4, 3, 5), "normalised shortcut")
    expected = results(instance_norm_leaky_relu, inputs, grad, *settings)
    actual = results(instance_norm_leaky_relu, [x.contiguous() for x in inputs], grad, *settings)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


# ---- as operators of torch -----------------------------------------------------------------------------------------


def test_the_operators_are_registered_as_they_behave():
    inputs, grad = attention_case((2, 2, 3), (2, 1, 1), 3, 1, 2, 4)
    geometry = ([2, 2, 3], [2, 1, 1], [1, 0, 0], 3)
    torch.library.opcheck(triton_attention._attention, (*(x.requires_grad_() for x in inputs), *geometry))
    q, k, v, table = (x.detach() for x in inputs)
    out, lse = triton_attention._attention(q, k, v, table, *geometry)
    first_order = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (triton_attention._gradients, (q, k, v, table, out, lse, grad, *geometry)),
        (triton_attention._table_gradient, (q, k, v, table, lse, lse, grad, *geometry)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=first_order)

    (x, shortcut), grad, _ = norm_case((2, 3, 2, 4, 3), "normalised shortcut")
    torch.library.opcheck(triton_norm._norm, (x.requires_grad_(), shortcut.requires_grad_(), True))
    for other, normalize in ((None, False), (shortcut.detach(), False), (shortcut.detach(), True)):
        arguments = (x.detach(), other, normalize)
        torch.library.opcheck(triton_norm._norm, arguments, test_utils=first_order)
        arguments = (grad, x.detach(), other, triton_norm._norm(*arguments)[1], normalize)
        torch.library.opcheck(triton_norm._gradients, arguments, test_utils=first_order)


def test_they_compile_into_one_graph():
    torch._dynamo.reset()
    inputs, grad = attention_case((2, 2, 3), (2, 1, 1), 3, 1, 2, 4)

    def step(q, k, v, table):
        mixed = window_attention(q, k, v, table, (2, 2, 3), (2, 1, 1), (1, 0, 0), 3)
        maps = mixed.permute(0, 1, 3, 2).unflatten(3, (3, 4)).unsqueeze(2).flatten(0, 1)[None]  # [1, 4, 1, 4, 3, 4]
        return instance_norm_leaky_relu(maps.flatten(1, 2), maps.flatten(1, 2) + 1, True).view_as(mixed)

    expected = results(step, inputs, grad)
    compare(results(torch.compile(step, backend="aot_eager", fullgraph=True), inputs, grad),
            [x.double() for x in expected], 1e-5)  # fmt: skip


@pytest.mark.parametrize("part", ["stage", "decoder"])
def test_the_parts_of_the_network_are_the_same_on_these_kernels(part):
    torch.manual_seed(0)
    if part == "stage":  # a plain and a shifted block; a token grid that needs padding and is a window thick at the end
        plain = SwinStage(12, 3, (0, 0), False, False, window_size=3, attention="auto", use_attention=True)
        inputs = [torch.randn(1, 4, 4, 2, 12)]
    else:
        plain, inputs = Decoder(12, 8), [torch.randn(1, 12, 2, 2, 3), torch.randn(1, 8, 4, 4, 6)]
    plain, inputs = plain.to(DEVICE), [x.to(DEVICE) for x in inputs]
    fused = copy.deepcopy(plain)
    for module in fused.modules():
        if isinstance(module, WindowAttention | ResidualBlock):
            module.set_kernels("triton")
    outputs = [model(*inputs) for model in (plain, fused)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_without_triton_one_line_says_so():
    code = """
import sys
from importlib import import_module
from models.errors import InputError
sys.modules["triton"] = None
for name in ("triton_attention", "triton_norm"):
    try:
        import_module("models.swinunetr." + name)
    except InputError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("pip install triton" in line for line in lines)


# ---- for a GPU that is not here ------------------------------------------------------------------------------------

COMPILE_FOR_HOPPER = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from models.swinunetr.triton_attention import window_attention
from models.swinunetr.triton_norm import instance_norm_leaky_relu


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def compile_only(kernel, grid):
    def run(*args, **kwargs):
        compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        assert compiled.asm["cubin"]
        print(kernel.fn.__name__)

    return run


triton.runtime.driver.set_active(Driver())
JITFunction.__getitem__ = compile_only
for dtype in (torch.bfloat16, torch.float32):
    qkv = torch.zeros(1, 343, 3, 3, 16, dtype=dtype)
    inputs = [x.requires_grad_() for x in (*qkv.permute(2, 0, 3, 1, 4).unbind(), torch.zeros(13**3, 3))]
    window_attention(*inputs, (7, 7, 7), (2, 1, 2), (3, 0, 3), 7).sum().backward()
    for side in (1, 4):  # sizes of 1 are compiled as constants
        x, y = (torch.zeros(1, 48, side, side, side, dtype=dtype, requires_grad=True) for _ in range(2))
        instance_norm_leaky_relu(x, y, True).sum().backward()
"""


def test_all_kernels_compile_for_hopper(tmp_path):
    """The code that launches them runs on the CPU, but every launch ends when ptxas has made machine code."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE_FOR_HOPPER]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = {name for module in (triton_attention, triton_norm) for name in vars(module) if name.endswith("_kernel")}
    assert set(run.stdout.split()) == kernels and len(kernels) == 9
