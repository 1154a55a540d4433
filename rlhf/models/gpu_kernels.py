"""Kernels in Triton for a GPU: norms, rotary embedding and SwiGLU in one pass over memory each.

    rms_norm      x / sqrt(mean x^2 + eps) w       forward only, for sampling and scoring
    rotate        q cos + (-q2, q1) sin            one pass instead of ten, the same backward
    silu_times    silu(gate) up                    one pass instead of two, and nothing kept between them

All compute in float32 and round once. The module needs triton: import it by `fusing.gpu_kernels`, and only where
`fusing.kernels_available`.
Source: Zhang and Sennrich 2019, arXiv:1910.07467 (RMS norm); Su et al. 2021, arXiv:2104.09864 (rotary embedding);
Shazeer 2020, arXiv:2002.05202 (SwiGLU).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one program of an elementwise kernel.
ELEMENTS = 1024


# ---- norms ----
@triton.jit
def _norm_kernel(x, weight, out, eps, WIDTH: tl.constexpr, ROOM: tl.constexpr):
    # Places in 64 bits: rows times width of a long batch pass 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    # A range has to be a power of two long, so ROOM may be more than WIDTH: the zeros loaded beyond add nothing to the
    # sum, and the mean divides by WIDTH.
    d = tl.arange(0, ROOM)
    x_row = tl.load(x + row * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    y = x_row * tl.rsqrt(tl.sum(x_row * x_row, 0) / WIDTH + eps) * w
    tl.store(out + row * WIDTH + d, y.to(out.dtype.element_ty), mask=d < WIDTH)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] of root mean square 1, times the weight [H]; no gradients."""
    # The kernel takes row n to begin at n * WIDTH.
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm_kernel[(x.numel() // width,)](
        x, weight, out, eps, WIDTH=width, ROOM=triton.next_power_of_2(width), num_warps=8 if width > 1024 else 4
    )
    return out


# ---- rotary embedding ----
@triton.jit
def _rotate_kernel(
    x, out, cos, sin, stride_b, stride_h, stride_l, cos_b, length, heads,
    HALF: tl.constexpr, HALF_ROOM: tl.constexpr, HEADS_ROOM: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One token of x [B, heads, L, 2 HALF] into out [B, L, heads, 2 HALF]; cos and sin [B or 1, L, 2 HALF]."""
    token = tl.program_id(0)
    b = token // length
    place = token % length
    # A program has several heads of one token: all of them turn by the same angles, which are then loaded once.
    h = tl.program_id(1) * HEADS_ROOM + tl.arange(0, HEADS_ROOM)[:, None]
    d = tl.arange(0, HALF_ROOM)[None, :]
    real = (h < heads) & (d < HALF)

    angles = b * cos_b + place * 2 * HALF + d
    # Both halves of the angles are read, though Llama's tables repeat the first one: the kernel computes the formula
    # for any table, as the trial of fusing.py asks.
    cos1 = tl.load(cos + angles, mask=d < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angles + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angles, mask=d < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angles + HALF, mask=d < HALF, other=0.0).to(tl.float32)

    # By strides, as x may be a view; in 64 bits, for the same reason as above.
    source = x + b.to(tl.int64) * stride_b + place.to(tl.int64) * stride_l + h * stride_h + d
    x1 = tl.load(source, mask=real, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    # The transpose of the rotation, which for equal halves is the turn by the opposite angle.
    if BACKWARD:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2

    # Heads of a token lie together here, as packed attention reads them; in x they are a whole length apart.
    target = out + (token.to(tl.int64) * heads + h) * 2 * HALF + d
    tl.store(target, y1.to(out.dtype.element_ty), mask=real)
    tl.store(target + HALF, y2.to(out.dtype.element_ty), mask=real)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """[B, heads, L, dim] in memory [B, L, heads, dim], the order in which attention over packed rows reads it."""
    rows, heads, length, dim = x.shape
    # Queries come as a transposed view of the projection's output. Any strides will do but the last: copying them here
    # would cost the pass over memory that this kernel is there to save.
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty(rows, length, heads, dim)
    room = min(triton.next_power_of_2(heads), 8)
    # Where all rows have the same angles they are held once: a stride of 0 reads them again for each row.
    _rotate_kernel[(rows * length, triton.cdiv(heads, room))](
        x, out, cos, sin, x.stride(0), x.stride(1), x.stride(2), cos.stride(0) if len(cos) > 1 else 0, length, heads,
        HALF=dim // 2, HALF_ROOM=triton.next_power_of_2(dim // 2), HEADS_ROOM=room, BACKWARD=backward,
    )  # fmt: skip
    return out.transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """q, k [B, heads, L, dim] -> both rotated; gradients of q and k, none of the angles."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos = cos.contiguous()
        sin = sin.contiguous()
        # Rotating is linear in q and k, so backward needs neither of them.
        ctx.save_for_backward(cos, sin)
        return _rotated(q, cos, sin, backward=False), _rotated(k, cos, sin, backward=False)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_q, cos, sin, backward=True), _rotated(grad_k, cos, sin, backward=True), None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, heads, L, dim] and keys of fewer or as many heads, rotated by the angles [B or 1, L, dim]."""
    return _Rotate.apply(q, k, cos, sin)


# ---- SwiGLU ----
@triton.jit
def _silu_times_kernel(gate, up, out, count, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    # Rounded once, at the end: PyTorch's two operations round the activation in between.
    tl.store(out + i, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _silu_times_backward_kernel(gate, up, grad, grad_gate, grad_up, count, SIZE: tl.constexpr):
    """d silu(g) / dg = s + g s (1 - s), s the sigmoid of g."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    dy = tl.load(grad + i, mask=i < count, other=0.0).to(tl.float32)
    # Computed again from what was kept: the activation is cheap, and reading it would be one more pass.
    s = tl.sigmoid(g)
    tl.store(grad_gate + i, (dy * u * s * (1 + g * (1 - s))).to(grad_gate.dtype.element_ty), mask=i < count)
    tl.store(grad_up + i, (dy * g * s).to(grad_up.dtype.element_ty), mask=i < count)


class _SiluTimes(torch.autograd.Function):
    """gate, up [...] -> silu(gate) up, with both gradients."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.contiguous()
        up = up.contiguous()
        # The activation itself is not kept: backward computes it again from these two, which are there anyway.
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        count = gate.numel()
        _silu_times_kernel[(triton.cdiv(count, ELEMENTS),)](gate, up, out, count, SIZE=ELEMENTS)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        count = gate.numel()
        # The kernel reads the gradient in order of memory, and autograd may hand in an expanded or transposed one.
        _silu_times_backward_kernel[(triton.cdiv(count, ELEMENTS),)](
            gate, up, grad.contiguous(), *grads, count, SIZE=ELEMENTS
        )
        return grads


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up [..., N], elementwise, of two tensors of one shape and dtype."""
    return _SiluTimes.apply(gate, up)
