"""Linear layers over a frozen base, with and without a LoRA adapter, in as few passes over memory as they need.

    y = x W' + b + s (x A') B'        W [out, in] frozen, A [r, in] and B [out, r] trained, s = alpha / r

peft's own forward makes each term a tensor of the layer's size and adds them up; here the small product is added in
place, forward and backward. Float32 on a CPU goes through oneDNN, which PyTorch has but does not choose: its products
took 10 to 30 % less time than MKL's on the AMD machine that benchmarks/ was measured on; of few rows, as in decoding,
MKL's took half as long with the weight on the left. The numbers are the same up to rounding.
Source: Hu et al. 2021, arXiv:2106.09685.
"""

import os

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

# Elements of a weight from which on the order of a product matters, and oneDNN's longer way into it pays.
LARGE = 1 << 17
# Rows of which the weight is better on the left.
FEW = 4
# PyTorch and oneDNN each keep what they prepared for the last 1024 shapes, buffers of the weights' size among it: with
# rows of ever new lengths, gigabytes. A micro-batch needs about twenty. Both are read at the first product.
for kept in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(kept, "32")
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b of x [N, in] and weight [out, in], in memory of its own; no gradients."""
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not (ONEDNN and plain and weight.numel() >= LARGE):
        return linear(x, weight, bias)
    if bias is None and 1 < len(x) <= FEW:
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
        self.layer, self.usual = layer, layer.forward

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        """y [..., out] of x [..., in]."""
        layer = self.layer
        active = layer.active_adapters
        if args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1:
            return self.usual(x, *args, **kwargs)
        name, base = active[0], layer.base_layer
        if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
            return self.usual(x)
        dropout = layer.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            return self.usual(x)
        flat = x.reshape(-1, x.shape[-1])
        given = flat, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        # Without gradients autograd's way in would be a tenth of the time of a decoded token.
        y = _Adapted.apply(*given) if torch.is_grad_enabled() else adapted(*given)[0]
        return y.view(*x.shape[:-1], -1)


class FrozenForward:
    """Stands in for the `forward` of a linear layer as long as its weight is frozen."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.usual = layer, layer.forward

    def __call__(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        weight, bias = self.layer.weight, self.layer.bias
        if weight.requires_grad:
            return self.usual(x)
        flat = x.reshape(-1, x.shape[-1])
        y = _Frozen.apply(flat, weight, bias) if torch.is_grad_enabled() else product(flat, weight, bias)
        return y.view(*x.shape[:-1], -1)


def fuse_linears(model: nn.Module) -> None:
    """Let the linear layers of `model`, adapted or frozen, compute as above; quantised ones stay as they are."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear:
            module.forward = AdaptedForward(module)
        elif type(module) is nn.Linear and ONEDNN and module.weight.is_cpu:
            module.forward = FrozenForward(module)
