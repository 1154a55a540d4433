"""What one kernel computes on a GPU, on a CPU as far as it can be, against what it stands in for."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.models import kernels
from rlhf.models.forward import backbone_of, enable_packing, hidden_at, pack
from rlhf.models.fusing import TOLERANCE, NormForward, fuse_norms
from rlhf.models.kernels import BY_ROW


class FromOne(LlamaRMSNorm):
    """Gemma's way: the weight is what is added to 1."""

    def forward(self, x):
        return super().forward(x) + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_one_kernel_gives_the_same_states_and_gradients(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    found = []
    for compute in (norm.forward, NormForward(norm).fused):
        x = torch.linspace(-3, 3, 5 * 48).view(1, 5, 48).to(dtype).requires_grad_()
        norm.zero_grad()
        y = compute(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        found.append((y, x.grad, norm.weight.grad))
    bound = TOLERANCE[dtype]
    for usual, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, usual, rtol=bound, atol=bound * usual.abs().max().item())


def test_a_norm_in_one_kernel_keeps_its_dtype_under_autocast():
    norm = LlamaRMSNorm(8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert NormForward(norm).fused(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["tiny_base", "tiny_llama"])
def test_all_norms_of_a_decoder_are_fused_and_off_a_gpu_nothing_changes(request, base):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base)).eval()
    ids = torch.arange(3, 15)[None]
    usual, random = model(ids).logits, torch.get_rng_state()
    assert fuse_norms(model) == 2 * model.config.num_hidden_layers + 1
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(ids).logits, usual)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = module.forward.fused
    torch.testing.assert_close(model(ids).logits, usual, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_model_norms_with_its_own_weights():
    model = nn.Sequential(LlamaRMSNorm(8))
    fuse_norms(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(2)
    x = torch.ones(1, 8)
    torch.testing.assert_close(other(x), 2 * model(x))
    torch.testing.assert_close(other[0].forward.fused(x), 2 * model[0].forward.fused(x))


def test_a_norm_of_another_kind_is_left_as_it_is():
    elsewhere = LlamaRMSNorm(8)
    elsewhere.weight = nn.Parameter(torch.empty(0))
    model = nn.Sequential(FromOne(8), elsewhere, LlamaRMSNorm(8).to("meta"), nn.LayerNorm(8))
    assert fuse_norms(model) == 0
    assert not any("forward" in vars(module) for module in model)


def flash_attention(query, key, value, bounds, key_bounds, longest, key_longest, dropout, causal, debug, *, scale):
    """The operator that `flash_by_row` calls, from its definition: [N, heads, dim] and where rows begin."""
    assert bounds.dtype == key_bounds.dtype == torch.int32 and torch.equal(bounds, key_bounds)
    assert longest == key_longest == bounds.diff().max() and bounds[-1] == len(query) and causal and not dropout
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    found = []
    for start, end in bounds.unfold(0, 2, 1).tolist():
        weights = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        later = torch.ones(end - start, end - start).triu(1).bool()
        weights = weights.masked_fill(later, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
    return torch.cat(found), None, None, None, None


@pytest.mark.parametrize("base", ["tiny_base", "tiny_llama"])
def test_all_rows_in_one_kernel_give_the_states_and_gradients_of_each(request, monkeypatch, base):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base))
    backbone = backbone_of(model)
    torch.manual_seed(0)
    ids, real = torch.randint(3, 400, (5, 12)), torch.arange(12) < torch.tensor([12, 7, 1, 3, 9])[:, None]
    assert enable_packing(backbone)
    found, calls = [], []
    for flash in (False, True):
        if flash:
            monkeypatch.setattr(kernels, "flash_takes", lambda *given: True)
            monkeypatch.setattr(
                torch.ops.aten, "_flash_attention_forward",
                lambda *args, **kwargs: calls.append(1) or flash_attention(*args, **kwargs),
            )  # fmt: skip
        model.zero_grad()
        states = hidden_at(backbone, pack(backbone, ids, real), *real.nonzero(as_tuple=True))
        states.square().sum().backward()
        found.append([states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(calls) == model.config.num_hidden_layers and len(found[0]) > 10
    for usual, one in zip(*found, strict=True):
        torch.testing.assert_close(one, usual, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)


def test_a_kernel_that_computes_something_else_is_not_used(request, monkeypatch):
    backbone = backbone_of(AutoModelForCausalLM.from_pretrained(request.getfixturevalue("tiny_base")))
    monkeypatch.setattr(kernels, "flash_takes", lambda *given: True)
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda query, *args, **kwargs: (torch.zeros_like(query),)
    )
    assert not enable_packing(backbone)
    assert backbone.config._attn_implementation == "sdpa" != BY_ROW
