"""On a GPU, one kernel where there would be several: steps of small batches wait for launches, not for arithmetic.

An RMS norm is six kernels in transformers and one in PyTorch; attention over rows side by side is one for each row,
and one for all of them where flash attention is told where they end. The numbers are the same up to rounding. Source
of the second: Dao 2023, arXiv:2307.08691.
"""

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import rms_norm

# Relative and absolute difference of two norms that may be rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}


class NormForward:
    """Stands in for the `forward` of an RMS norm, and hands on to it whatever is on no GPU."""

    def __init__(self, norm: nn.Module):
        self.norm, self.usual = norm, norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Normed states [..., H] of x [..., H]."""
        weight = self.norm.weight
        return self.fused(x) if x.is_cuda and x.dtype == weight.dtype else self.usual(x)

    def fused(self, x: Tensor) -> Tensor:
        """The same in one kernel."""
        # Autocast would have float32, in and out; the kernel reckons in float32 by itself.
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x, self.norm.weight.shape, self.norm.weight, self.norm.variance_epsilon)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> int:
    """Let RMS norms compute in one kernel on a GPU, those that are found to be what PyTorch calls so; how many are.

    Some are not: Gemma's weight counts from 1, others split their input.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        known = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        # Under ZeRO-3 a weight is elsewhere until its layer runs.
        if not known or weight is None or weight.is_meta or weight.dim() != 1 or weight.dtype not in TOLERANCE:
            continue
        if weight.numel() == 0:
            continue
        x = torch.linspace(-1, 2, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
        forward, bound = NormForward(module), TOLERANCE[weight.dtype]
        if torch.allclose(forward.fused(x), module(x), rtol=bound, atol=bound):
            module.forward = forward
            count += 1
    return count


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a flash attention kernel for queries [1, heads, N, dim] and keys and values of as many or fewer
    heads: on a GPU that has it, in half precision, and not switched off (torch.backends.cuda.enable_flash_sdp).
    """
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
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return found[0][None]
