"""What a network costs, counted on the meta device, where tensors have shapes and no data: arithmetic and memory.

Nothing is computed and no GPU is needed, so a training script can say what it will need before it begins.
"""

import weakref
from collections.abc import Callable
from copy import deepcopy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from models.losses import make_loss

GIB = 2**30
# What autocast casts on CUDA, of the functions that our networks and MONAI's call; the others keep their types.
LOWERED = {"linear", "conv3d", "conv_transpose3d", "matmul", "__matmul__", "bmm", "prelu",
           "scaled_dot_product_attention"}
RAISED = {"layer_norm", "softmax"}


def of_training(model, shape, amp_dtype: torch.dtype | None) -> dict:
    """What a training prints and records before it begins: parameters, GMAC per volume, peak GiB of a training step."""
    return {
        "parameters": parameter_count(model),
        "gmac": forward_macs(model, (1, *shape[1:])) / 1e9,
        "expected_peak_gib": training_peak_gib(model, shape, amp_dtype),
    }


def parameter_count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_macs(model, shape) -> int:
    """Multiply-accumulates of one pass over an input of `shape` [B, 4, D, H, W]; a MAC is two FLOP.

    Convolutions, linear layers and attention products are counted; normalisation and activations are not.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        _on_meta(model).eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


def training_peak_gib(model, shape, amp_dtype: torch.dtype | None) -> float:
    """Most memory that tensors hold at once in a training step with AdamW and our loss, on a batch of `shape`.

    Runs two steps without data (the second one has the optimiser's moments from the beginning) and follows every
    tensor from the operation that makes it until it is freed, those that only the backward pass makes included. What
    kernels use inside and never hand out, such as the workspaces of cuDNN, is not seen.
    """
    model = _on_meta(model).train()
    live = LiveMemory()
    for parameter in model.parameters():
        live.follow(parameter)
    for step in _steps_on_meta(model, shape, amp_dtype):
        with live:
            step()
    return live.peak / GIB


def training_work(model, shape, amp_dtype: torch.dtype | None) -> list[tuple[int, int]]:
    """(FLOP, bytes) of every operation of a training step with AdamW and our loss, on a batch of `shape`: what it
    computes, and what it reads and writes where each reads its inputs from memory and writes its result there."""
    work = Work()
    first, second = _steps_on_meta(_on_meta(model).train(), shape, amp_dtype)
    first()  # it makes the optimiser's moments
    with work:
        second()
    return work.operations


def _steps_on_meta(model, shape, amp_dtype: torch.dtype | None) -> list[Callable[[], None]]:
    """Two training steps, to be called in turn, of a network on the meta device."""
    _run_as_on_cuda(model, amp_dtype or torch.float32)
    optimizer, loss = torch.optim.AdamW(model.parameters()), make_loss()

    def step():
        image = torch.empty(shape, device="meta")
        label = torch.zeros((shape[0], 1, *shape[2:]), dtype=torch.long, device="meta")
        loss(model(image).float(), label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return [step, step]


def _on_meta(model):
    """A copy of a network without its numbers."""
    return deepcopy(model).to("meta")


class LiveMemory(TorchDispatchMode):
    """While active, follows the storages that operations make: `now` and `peak` in bytes."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = {}  # address -> weak reference with a callback when the storage is freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        self.peak = max(self.peak, self.now)
        return result

    def follow(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages:
            return  # a view, or an operation in place

        def freed(_):
            self.now -= size
            del self.storages[address]

        self.now += size
        self.storages[address] = weakref.ref(storage, freed)


class Work(TorchDispatchMode):
    """While active, lists the (FLOP, bytes) of each operation; one whose result is a view does nothing."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=result) if count else 0
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.operations.append((flop, sum(tensor.nbytes for tensor in tensors)))
        return result


class MetaAutocast(TorchFunctionMode):
    """For tensors on the meta device, what CUDA does: the types of autocast to `dtype` (float32: none), and the fused
    attention kernel."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.active, self.weights = dtype, False, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if name in LOWERED or name in RAISED:
            dtype = self.dtype if name in LOWERED else torch.float32
            args = [self.cast(value, dtype) for value in args]
            kwargs = {key: self.cast(value, dtype) for key, value in kwargs.items()}
        if name == "scaled_dot_product_attention":  # the kernel that CUDA takes where there is a mask
            query, key, value = args
            mask = kwargs["attn_mask"].expand(*query.shape[:2], -1, -1)
            fused = torch.ops.aten._scaled_dot_product_efficient_attention
            return fused(query, key, value, mask, compute_log_sumexp=True, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)

    def cast(self, value, dtype):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if value not in self.weights:  # like autocast, cast a weight once in a pass
            self.weights[value] = value.to(dtype)
        return self.weights[value]


def _run_as_on_cuda(model, dtype: torch.dtype):
    """Make every module run under MetaAutocast, also when checkpointing calls it again in the backward pass."""
    autocast = MetaAutocast(dtype)

    def under_autocast(forward):
        def run(*args, **kwargs):
            if autocast.active:
                return forward(*args, **kwargs)
            autocast.active = True
            try:
                with autocast:
                    return forward(*args, **kwargs)
            finally:
                autocast.active, autocast.weights = False, {}

        return run

    for module in model.modules():
        module.forward = under_autocast(module.forward)
