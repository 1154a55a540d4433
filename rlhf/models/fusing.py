"""On a GPU fewer passes over memory: RMS norms, rotary embedding and SwiGLU of any model that has them as Llama does.

Whether a part of a model is what a kernel computes is found by a trial on the part itself, never by its name: what
differs stays as it is.
"""

import importlib
import inspect
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import rms_norm, silu

# Relative and absolute difference of two results that may be rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}


def fuse(model: nn.Module) -> None:
    """Let norms, rotary embedding and feed-forward parts of `model` compute in one kernel each, where there is one."""
    # PyTorch has a norm in one kernel of its own, so norms gain without triton too.
    fuse_norms(model)
    if kernels_available():
        fuse_rotary(model)
        fuse_mlps(model)


@lru_cache(maxsize=1)
def kernels_available() -> bool:
    """Return True if the kernels of gpu_kernels.py and cache_kernels.py can run here: on a GPU, with triton."""
    return torch.cuda.is_available() and find_spec("triton") is not None


@lru_cache(maxsize=1)
def gpu_kernels():
    """The module of that name, which needs triton at import."""
    return importlib.import_module("rlhf.models.gpu_kernels")


@lru_cache(maxsize=1)
def cache_kernels():
    """The module of that name, which needs triton at import."""
    return importlib.import_module("rlhf.models.cache_kernels")


# ---- norms ----
class NormForward:
    """Stands in for the `forward` of an RMS norm, and hands on to it whatever is on no GPU."""

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self.usual = norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Normed states [..., H] of x [..., H]."""
        weight = self.norm.weight
        return self.fused(x) if x.is_cuda and x.dtype == weight.dtype else self.usual(x)

    def fused(self, x: Tensor) -> Tensor:
        """Normed states in one kernel."""
        norm = self.norm
        # PyTorch's kernel has a backward, and of few rows takes twice as long.
        if x.is_cuda and not torch.is_grad_enabled() and kernels_available():
            return gpu_kernels().rms_norm(x, norm.weight, norm.variance_epsilon)
        if not torch.is_autocast_enabled(x.device.type):
            return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
        # Autocast would cast to float32, in and out; the kernel computes in float32 by itself.
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> int:
    """Let RMS norms compute in one kernel on a GPU, those that are found to be what PyTorch calls so; how many are.

    Some are not: Gemma's weight counts from 1, others split their input.
    """
    count = 0

    for module in model.modules():
        weight = getattr(module, "weight", None)
        # The name only says what is worth a trial; the trial decides.
        known = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        # Under ZeRO-3 a weight is elsewhere until its layer runs.
        if not known or weight is None or weight.is_meta or weight.dim() != 1 or weight.dtype not in TOLERANCE:
            continue
        if weight.numel() == 0:
            continue
        # A trial on two rows whose mean is not 0, so that a norm which subtracts the mean gives itself away.
        x = torch.linspace(-1, 2, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
        forward = NormForward(module)
        bound = TOLERANCE[weight.dtype]
        if torch.allclose(forward.fused(x), module(x), rtol=bound, atol=bound):
            module.forward = forward
            count += 1
    return count


# ---- rotary embedding ----
class Rotary:
    """Stands in for a modelling file's `apply_rotary_pos_emb`, and hands on to it whatever is not the plain case."""

    def __init__(self, usual):
        self.usual = usual

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, heads, L, dim], rotated by the angles [B or 1, L, dim]."""
        plain = q.is_cuda and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and q.dtype == k.dtype == cos.dtype
        if not plain or args or kwargs:
            return self.usual(q, k, cos, sin, *args, **kwargs)
        return gpu_kernels().rotate(q, k, cos, sin)


@torch.no_grad()
def fuse_rotary(model: nn.Module) -> int:
    """Let the files that this model's classes come from rotate in one kernel; how many do.

    The function is one of the file, not of an instance: another model of the same class in this process takes the
    kernel too, where it is on a GPU.
    """
    sources = {inspect.getmodule(type(module)) for module in model.modules()}
    count = 0
    for source in sources - {None}:
        usual = getattr(source, "apply_rotary_pos_emb", None)
        # Put there for an earlier model of this process: once is enough.
        if isinstance(usual, Rotary):
            count += 1
        elif usual is not None and _rotates_as_llama(usual):
            source.apply_rotary_pos_emb = Rotary(usual)
            count += 1
    return count


def _rotates_as_llama(usual) -> bool:
    """Return True if a function rotates a trial as the kernel does; there are kinds that interleave the halves."""
    # A generator of its own, so that the trial moves no random number of the run. Its angles are no cosines on
    # purpose: tables whose halves repeat would let a kernel pass that mixes the halves up.
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 16), (2, 1, 5, 16), (2, 5, 16), (2, 5, 16))
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    try:
        rotated = usual(q, k, cos, sin)
    except (TypeError, ValueError, IndexError, RuntimeError):
        # Takes other arguments: there are as many ways as architectures.
        return False
    for x, y in zip((q, k), rotated, strict=True):
        turned = torch.cat((-x[..., 8:], x[..., :8]), -1)
        if x.shape != y.shape or not torch.allclose(x * cos[:, None] + turned * sin[:, None], y, atol=1e-5):
            return False
    return True


# ---- SwiGLU ----
class MLPForward:
    """Stands in for the `forward` of a feed-forward part `down(silu(gate x) up x)` on a GPU."""

    def __init__(self, part: nn.Module):
        self.part = part
        self.usual = part.forward

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] of x [..., H]."""
        if not x.is_cuda:
            return self.usual(x)
        # Through the projections' own forwards, so that adapters and 4-bit weights inside them go on counting.
        part = self.part
        return part.down_proj(gpu_kernels().silu_times(part.gate_proj(x), part.up_proj(x)))


def _is_here(weight: Tensor) -> bool:
    """Return True if this process holds the whole weight."""
    return not weight.is_meta and weight.numel() > 0 and not isinstance(weight, DTensor)


@torch.no_grad()
def fuse_mlps(model: nn.Module) -> int:
    """Let feed-forward parts with SwiGLU activate in one kernel, those that a trial finds to be that; how many are."""
    count = 0
    for part in model.modules():
        # Before adapters are put on: peft's wrappers are no nn.Linear, and their parts would be passed over.
        linears = [getattr(part, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        # Under ZeRO-3, and in shards, a weight is elsewhere until its layer runs.
        if not all(isinstance(one, nn.Linear) and _is_here(one.weight) for one in linears):
            continue
        gate, up, down = linears
        # A weight of four bits is held as whole numbers, and computes in half precision.
        dtype = gate.weight.dtype if gate.weight.is_floating_point() else torch.bfloat16
        x = torch.linspace(-1, 1, 2 * gate.in_features, dtype=dtype, device=gate.weight.device).view(2, -1)
        # Its largest output sets the bound; of zeros alone, or in a dtype without tolerance, a trial proves nothing.
        usual = part(x)
        bound = TOLERANCE.get(dtype, 0.0) * usual.abs().max()
        if bound > 0 and bool(((down(silu(gate(x)) * up(x)) - usual).abs() <= bound).all()):
            part.forward = MLPForward(part)
            count += 1
    return count
