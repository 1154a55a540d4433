"""Linear layers, adapted by LoRA or frozen, in fewer passes over memory; the same numbers up to rounding.

    y = x W' + b + s (x A') B'        W [out, in] frozen, A [r, in] and B [out, r] trained, s = alpha / r

peft's forward makes each term a tensor of the layer's size and adds them; here the small product is added in place,
forward and backward. Float32 on a CPU takes the way that trial.py found to be fastest there.

A `forward` is replaced on an instance in five ways, all of them in this project and none anywhere else:

1. `fuse_linears` and `fuse_adapters`: LoRA and frozen linear layers (here).
2. `fuse`: RMS norms and feed-forward parts on a GPU (fusing.py).
3. `mlp_only_at`: the last layer's MLP, only within the block (forward.py).
4. `score_by_mask`: the reward model's own forward, so that DDP sees the pairwise score (reward/pairs.py).
5. `RowForward`: LoRA layers of a batch whose rows have adapters of their own (page/row_adapters.py).

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA).
"""

import os
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from rlhf.models import trial

# PyTorch and oneDNN each keep what they prepared for the last 1024 shapes, buffers of the weights' size among it:
# gigabytes, when rows have ever new lengths. A micro-batch needs about twenty. Both read the limit at their first
# product, so it is set at import; a value that the caller set stays.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "32")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b of x [N, in] and weight [out, in], in memory of its own; no gradients."""
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not (trial.ONEDNN and plain and weight.numel() >= trial.LARGE):
        return linear(x, weight, bias)
    return trial.way_of(x, weight)(x, weight, bias)


def adapted(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y of x [N, in] as above, and x A' [N, r]; no gradients. dropped: x after dropout, the adapter's own input."""
    down = linear(x if dropped is None else dropped, a.to(x.dtype))
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
        # A frozen weight asks for no gradient, which would be a second product of the same size.
        return product(grad, ctx.saved_tensors[0].T), None, None


class _Adapted(torch.autograd.Function):
    """x [N, in] -> y [N, out]; gradients of x (and of x after dropout), A and B, none of W."""

    @staticmethod
    def forward(ctx, x: Tensor, dropped: Tensor | None, weight: Tensor, bias, a: Tensor, b: Tensor, scaling: float):
        y, down = adapted(x, dropped, weight, bias, a, b, scaling)
        # x A' is kept for the gradient of B: it is only r wide.
        ctx.save_for_backward(x if dropped is None else dropped, weight, a, b, down)
        ctx.scaling = scaling
        ctx.has_dropout = dropped is not None
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, a, b, down = ctx.saved_tensors
        # In the order that MKL is fast at: eight columns took three times as long as eight rows.
        up = linear(grad, b.T.to(grad.dtype).contiguous()).mul_(ctx.scaling)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.T)
            if not ctx.has_dropout:
                grad_x.addmm_(up, a.to(grad.dtype))
        if ctx.needs_input_grad[1]:
            grad_dropped = up @ a.to(grad.dtype)
        # An adapter for inference, such as the reference's, hands a gradient on and takes none.
        if not ctx.needs_input_grad[4]:
            return grad_x, grad_dropped, None, None, None, None, None
        grad_b = (down.T @ grad).mul_(ctx.scaling).T
        return grad_x, grad_dropped, None, None, (up.T @ x).to(a.dtype), grad_b.to(b.dtype), None


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

        # Shapes of ZeRO-3, whose weights are elsewhere, and mixtures of precisions are peft's.
        if base.weight.numel() == 0 or x.dtype != base.weight.dtype:
            return self.usual(x)

        # A linear layer knows no rows and columns of a batch: one product over all tokens.
        flat = x.reshape(-1, x.shape[-1])
        dropped = None
        dropout = layer.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            # On a CPU peft's own order of operations stays, and with it every byte of a seed's run.
            if not x.is_cuda:
                return self.usual(x)
            dropped = dropout(flat)

        a = layer.lora_A[name].weight
        b = layer.lora_B[name].weight
        if self.casts is not None and not torch.is_grad_enabled():
            if name not in self.casts:
                self.casts[name] = a.to(x.dtype), b.to(x.dtype)
            a, b = self.casts[name]
        given = flat, dropped, base.weight, base.bias, a, b, layer.scaling[name]
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
    trial.settle(model)
    fuse_adapters(model)
    for module in model.modules():
        # The exact type, because a subclass (4 bits, or the head of Baichuan2) computes something else.
        if type(module) is nn.Linear and trial.ONEDNN and module.weight.is_cpu:
            module.forward = FrozenForward(module)


def fuse_adapters(model: nn.Module) -> None:
    """Let the adapted linear layers of `model` compute as above."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear:
            module.forward = AdaptedForward(module)
