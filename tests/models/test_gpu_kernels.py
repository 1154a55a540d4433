"""Kernels in Triton against their definitions: on a GPU, or by triton's interpreter (TRITON_INTERPRET=1) on a CPU."""

import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or interpreted):
    pytest.skip("no GPU here", allow_module_level=True)
gpu_kernels = pytest.importorskip("rlhf.models.gpu_kernels", exc_type=ImportError)
cache_kernels = pytest.importorskip("rlhf.models.cache_kernels", exc_type=ImportError)
rotate = gpu_kernels.rotate
silu_times = gpu_kernels.silu_times

DEVICE = "cpu" if interpreted else "cuda"
# Each kernel rounds once, the definition after each of its operations.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def on_the_device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def same(ours, theirs, dtype: torch.dtype) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(2, 6, 2, 16), (1, 3, 3, 24), (3, 33, 1, 64)])
def test_rotary_embedding_and_its_gradient(dtype, rows, heads, kv_heads, dim):
    # Angles of one row for all, too, and memory in either order.
    for angle_rows in {1, rows}:
        q = torch.randn(rows, 5, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_()
        k = torch.randn(rows, kv_heads, 5, dim, dtype=dtype).requires_grad_()
        angles = torch.randn(angle_rows, 5, dim)
        given = q, k, angles.cos().to(dtype), (1.1 * angles).sin().to(dtype)
        results = []
        for function in (rotate, apply_rotary_pos_emb):
            rotated = function(*given)
            weights = [torch.randn(x.shape, dtype=dtype, generator=seeded()) for x in rotated]
            gradients = torch.autograd.grad(sum((x * w).sum() for x, w in zip(rotated, weights, strict=True)), (q, k))
            results.append([x.detach() for x in rotated] + list(gradients))
        same(*results, dtype)


def seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [8, 576, 4096])
def test_rms_norm(dtype, width):
    x, weight = 3 * torch.randn(7, 2, width, dtype=dtype) + 1, torch.randn(width, dtype=dtype)
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.float()).to(dtype)
    same([gpu_kernels.rms_norm(x, weight, 1e-3)], [expected], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_and_its_gradient(dtype):
    gate, up = (torch.randn(3, 1700, dtype=dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(3, 1700, dtype=dtype)
    results = []
    for function in (silu_times, lambda g, u: silu(g) * u):
        y = function(gate, up)
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), (gate, up))])
    same(*results, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("programs", [1, 10**9], ids=["whole", "split"])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(3, 6, 2, 8), (2, 4, 4, 24), (1, 32, 8, 128)])
def test_attention_reads_the_columns_of_its_row_alone(monkeypatch, dtype, programs, rows, heads, kv_heads, dim):
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    monkeypatch.setattr(cache_kernels, "PROGRAMS", programs)
    room = 256
    # What no row may read is NaN: nothing of it may come through.
    keys, values = (torch.full((rows, kv_heads, room, dim), torch.nan, dtype=dtype) for _ in range(2))
    first = torch.tensor([0, 5, 3][:rows], dtype=torch.int32)
    for b, start in enumerate(first.tolist()):
        keys[b, :, start:] = torch.randn(kv_heads, room - start, dim, dtype=dtype)
        values[b, :, start:] = torch.randn(kv_heads, room - start, dim, dtype=dtype)

    for last in (room - 1, 70, 5):
        keys[:, :, last + 1 :], values[:, :, last + 1 :] = torch.nan, torch.nan
        q, k, v = (torch.randn(rows, 1, n, dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
        column = torch.tensor([last], dtype=torch.int32)
        cache_kernels.write_cache(k, v, keys, values, column)
        assert torch.equal(keys[:, :, last], k[:, :, 0])
        assert torch.equal(values[:, :, last], v[:, :, 0])
        ours = cache_kernels.attend_to_cache(q, keys, values, first, column, 0.3)
        for b, start in enumerate(first.tolist()):
            used = (x[b : b + 1, :, start : last + 1].repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
            theirs = scaled_dot_product_attention(q[b : b + 1], *used, scale=0.3)
            same([ours[b : b + 1]], [theirs.transpose(1, 2)], dtype)
