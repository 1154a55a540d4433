"""Linear layers, norms and attention over packed rows in fewer passes over memory; same numbers up to rounding.

A `forward` is replaced on an instance in four ways, all of them in this project and none anywhere else:

1. `fuse_linears`: LoRA and frozen linear layers of the roles (here).
2. `fuse`: RMS norms and feed-forward parts on a GPU (fusing.py).
3. `mlp_only_at`: the last layer's MLP, only within the block (forward.py).
4. `score_by_mask`: the reward model's own forward, so that DDP sees the pairwise score (reward/pairs.py).

Attention over packed rows is registered with transformers under a name of its own (`attend_by_row`).

    y = x W' + b + s (x A') B'        W [out, in] frozen, A [r, in] and B [out, r] trained, s = alpha / r

peft's forward makes each term a tensor of the layer's size and adds them; here the small product is added in place,
forward and backward. Float32 on a CPU uses oneDNN, which PyTorch contains but does not choose: its products took 10
to 30 % less time than MKL's on the AMD machine that benchmarks/ was measured on. For few rows, as in decoding, MKL
took half as long with the weight on the left. On a GPU attention over packed rows is one kernel for all rows.
Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Dao 2023, arXiv:2307.08691 (attention).
"""

import os
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.fusing import cache_kernels

# Name of `attend_by_row` among transformers' kinds of attention.
BY_ROW = "sdpa_by_row"
# Elements of a weight from which on the order of a product matters, and oneDNN's longer way into it pays.
LARGE = 1 << 17

# Rows of which the weight is better on the left.
FEW = 4


# PyTorch keeps this operator to itself: a version without that name takes the usual product.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b of x [N, in] and weight [out, in], in memory of its own; no gradients."""
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not (ONEDNN and plain and weight.numel() >= LARGE):
        return linear(x, weight, bias)
    if bias is None and 1 < len(x) <= FEW:
        # Row after row in memory again, as the other ways give it.
        return (weight @ x.T).T.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> tuple:
    """y of x [N, in] as above, and x A' [N, r]; no gradients."""
    down = linear(x, a.to(x.dtype))
    return product(x, weight, bias).addmm_(down, b.T.to(x.dtype), alpha=scaling), down


class _Frozen(torch.autograd.Function):
    """x [N, in] -> y [N, out]; a gradient of x, none of W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The weight alone: as it takes no gradient, backward needs no input.
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return product(grad, ctx.saved_tensors[0].T), None, None


class _Adapted(torch.autograd.Function):
    """x [N, in] -> y [N, out]; gradients of x, A and B, none of W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        y, down = adapted(x, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, weight, a, b, down)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, a, b, down = ctx.saved_tensors
        # In the order that MKL is fast at: eight columns took three times as long as eight rows.
        up = linear(grad, b.T.to(grad.dtype).contiguous()).mul_(ctx.scaling)
        grad_x = product(grad, weight.T).addmm_(up, a.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[3]:
            return grad_x, None, None, None, None, None
        grad_b = (down.T @ grad).mul_(ctx.scaling).T
        return grad_x, None, None, (up.T @ x).to(a.dtype), grad_b.to(b.dtype), None


class AdaptedForward:
    """Stands in for the `forward` of one of peft's layers, and hands on to it whatever is not the plain case."""

    def __init__(self, layer: LoraLinear):
        self.layer = layer
        self.usual = layer.forward
        # Within `cast_once`: adapter -> A and B in the precision of the layer's input.
        self.casts: dict[str, tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        """y [..., out] of x [..., in]."""
        layer = self.layer
        active = layer.active_adapters
        # Merged weights hold the update already, and of several active adapters each would add its own.
        if args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1:
            return self.usual(x, *args, **kwargs)

        name = active[0]
        base = layer.base_layer
        # Not every layer has this adapter, and a variant of LoRA (DoRA is one) computes something else.
        if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
            return self.usual(x)

        # Dropout changes the adapter's input only, and `_Adapted` has one input for both products.
        dropout = layer.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            return self.usual(x)

        flat = x.reshape(-1, x.shape[-1])
        a = layer.lora_A[name].weight
        b = layer.lora_B[name].weight
        if self.casts is not None and not torch.is_grad_enabled():
            if name not in self.casts:
                self.casts[name] = a.to(x.dtype), b.to(x.dtype)
            a, b = self.casts[name]
        given = flat, base.weight, base.bias, a, b, layer.scaling[name]
        # Without gradients autograd's way in would be a tenth of the time of a decoded token.
        y = _Adapted.apply(*given) if torch.is_grad_enabled() else adapted(*given)[0]
        return y.view(*x.shape[:-1], -1)


@contextmanager
def cast_once(model: nn.Module):
    """Within the block the adapters' weights, which must not change in it, are cast once, not once a token."""
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    adapted_layers = [forward for forward in forwards if isinstance(forward, AdaptedForward)]
    for forward in adapted_layers:
        forward.casts = {}
    try:
        yield
    finally:
        for forward in adapted_layers:
            forward.casts = None


class FrozenForward:
    """Stands in for the `forward` of a linear layer as long as its weight is frozen."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        self.usual = layer.forward

    def __call__(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        weight = self.layer.weight
        bias = self.layer.bias
        # Asked at each call: A and B of an adapter are frozen or not, depending on which adapter is active.
        if weight.requires_grad:
            return self.usual(x)
        flat = x.reshape(-1, x.shape[-1])
        y = _Frozen.apply(flat, weight, bias) if torch.is_grad_enabled() else product(flat, weight, bias)
        return y.view(*x.shape[:-1], -1)


def fuse_linears(model: nn.Module) -> None:
    """Let the linear layers of `model`, adapted or frozen, compute as above; quantised ones stay as they are."""
    for module in model.modules():
        # The exact type, because a subclass (4 bits, or the head of Baichuan2) computes something else.
        if isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear:
            module.forward = AdaptedForward(module)
        elif type(module) is nn.Linear and ONEDNN and module.weight.is_cpu:
            module.forward = FrozenForward(module)


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if there is a flash attention kernel for these queries [1, heads, N, dim], keys and values.

    Keys and values may have fewer heads. The kernel needs a GPU that has it and half precision, and is not used where
    torch.backends.cuda.enable_flash_sdp switched it off.
    """
    # PyTorch's own attention pads heads of another size for the kernel, which is called directly here.
    if not query.is_cuda or query.shape[-1] % 8:
        return False
    fewer = key.shape[1] != query.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, fewer))


def flash_by_row(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """[1, N, heads, dim]: causal attention within each row of queries [1, heads, N, dim], keys and values.

    bounds: [B + 1] int32, where each row begins, and N. longest: length of the longest row.
    """
    # The kernel takes tokens first, [N, heads, dim], the rows one after the other. The backward of an index would copy
    # each gradient into zeros; that of `squeeze` is a view.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    output = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return output[0][None]


# ---- packed rows ----
def attend_by_row(
    module, query, key, value, attention_mask, row_lengths=None, row_bounds=None, columns=None, **kwargs
):
    """Attention of transformers' interface: [1, heads, N, dim] row by row, or without `row_lengths` the usual one.

    row_lengths: list of B numbers. row_bounds: [B + 1] int32, where each row begins, and N. columns: in decoding on a
    GPU, the first column [B] of the cache that each row uses, and the last [1]; for one new token a row.

    Returns: [1, N, heads, dim], and None for the weights.
    Raises: ValueError where a model lost the lengths, or made a mask of its own: it would be computed wrongly.
    """
    # `pack` hands in a mask with a single entry, which says nothing; the row lengths count instead.
    placeholder = attention_mask is not None and attention_mask.numel() == 1
    if columns is not None:
        return cache_kernels().attend_to_cache(query, key, value, *columns, kwargs["scaling"]), None
    if row_lengths is None:
        if placeholder and key.shape[2] > 1:
            raise ValueError(f"{type(module).__name__} is not told where rows end")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if not placeholder:
        raise ValueError(f"{type(module).__name__} attends by a mask of its own")

    # One kernel for all rows where there is one, else one for each row.
    if not kwargs.get("dropout") and flash_takes(query, key, value):
        return flash_by_row(query, key, value, row_bounds, max(row_lengths), kwargs.get("scaling")), None
    kwargs["is_causal"] = True
    rows = zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None


def prepare_torch() -> None:
    """Set up torch and transformers for this process: small caches of shapes, attention over packed rows by its name.

    PyTorch and oneDNN each keep what they prepared for the last 1024 shapes, buffers of the weights' size among it:
    gigabytes, when rows have ever new lengths. A micro-batch needs about twenty. Both read the limit at their first
    product, and a value that the caller set stays.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")
    AttentionInterface.register(BY_ROW, attend_by_row)
    AttentionMaskInterface.register(BY_ROW, sdpa_mask)


# At import, so that every entry point (scripts, tests, benchmarks) has it before the first product.
prepare_torch()
