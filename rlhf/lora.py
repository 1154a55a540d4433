"""The forward and backward of a linear layer with one LoRA adapter, with no more passes over memory than needed.

    y = x W' + b + s (x A') B'        W [out, in] frozen, A [r, in] and B [out, r] trained, s = alpha / r

peft's own forward makes each term a tensor of the layer's size and adds them up; here the small product is added in
place, forward and backward. The numbers are the same up to rounding. Source: Hu et al. 2021, arXiv:2106.09685.
"""

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear


class _Fused(torch.autograd.Function):
    """x [N, in] -> y [N, out]; gradients of x, A and B, never of W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        down = x @ a.T.to(x.dtype)
        ctx.save_for_backward(x, weight, a, b, down)
        ctx.scaling = scaling
        return linear(x, weight, bias).addmm_(down, b.T.to(x.dtype), alpha=scaling)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, a, b, down = ctx.saved_tensors
        up = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(up, a.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[3]:
            return grad_x, None, None, None, None, None
        grad_b = (grad.T @ down).mul_(ctx.scaling)
        return grad_x, None, None, (up.T @ x).to(a.dtype), grad_b.to(b.dtype), None


class FusedForward:
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
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        return _Fused.apply(flat, base.weight, base.bias, a, b, layer.scaling[name]).view(*x.shape[:-1], -1)


def fuse_lora(model: nn.Module) -> None:
    """Let the LoRA layers of `model` over plain linear layers compute as above; quantised ones stay as they are."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear:
            module.forward = FusedForward(module)
