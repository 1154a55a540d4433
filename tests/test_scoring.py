"""What is computed at fewer places, or in parts, against the same computed whole."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from rlhf.decoding import GrowingDecoder, last
from rlhf.roles import backbone_of, forward
from rlhf.scoring import feed_forward_at, parts_by_length, states_at

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
BASES = ("tiny_base", "tiny_llama")


def model_and_rows(request, base: str):
    """A model with weights that take gradients, and 16 rows [16, 12] of 3 to 12 tokens with their mask."""
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 400, (16, 12), generator=generator)
    lengths = torch.randint(3, 13, (16,), generator=generator)
    return model, ids, torch.arange(12) < lengths[:, None]


def down(model) -> nn.Module:
    """The last matrix of the last layer: all of its feed-forward part's gradients pass through it."""
    return backbone_of(model).layers[-1].mlp.down_proj


@pytest.mark.parametrize("base", BASES)
def test_the_places_asked_for_have_the_states_and_gradients_of_the_whole(request, base):
    model, ids, real = model_and_rows(request, base)
    pick = real.nonzero(as_tuple=True)
    found = []
    for states in (
        lambda: backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state[pick],
        lambda: states_at(backbone_of(model), ids, pick),
    ):
        model.zero_grad()
        hidden = states()
        hidden.square().sum().backward()
        found.append(
            (hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[1][0], found[0][0], **TOLERANCE)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_the_last_feed_forward_part_sees_only_the_places_asked_for(request, base):
    model, ids, real = model_and_rows(request, base)
    seen = []
    down(model).register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    pick = (torch.arange(16), real.sum(1) - 1)
    with torch.no_grad():
        forward(model, pick, ids, use_cache=False)
        forward(model, (slice(None), -1), ids, use_cache=False)
        model(input_ids=ids)
    assert seen == [16, 16, 16 * 12]


def test_recomputed_layers_compute_everywhere(request):
    model, ids, real = model_and_rows(request, "tiny_base")
    pick = (torch.arange(16), real.sum(1) - 1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        states_at(backbone_of(model), ids, pick).square().sum().backward()
        gradients.append(down(model).weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_the_usual_forward_is_back_after_the_block_also_after_an_error(request):
    model, *_ = model_and_rows(request, "tiny_base")
    part = backbone_of(model).layers[-1].mlp
    with pytest.raises(ZeroDivisionError), feed_forward_at(backbone_of(model), (slice(None), -1)):
        assert "forward" in vars(part)
        raise ZeroDivisionError
    assert "forward" not in vars(part)
    part.forward = kept = part.forward
    with feed_forward_at(backbone_of(model), (slice(None), -1)):
        assert part.forward is not kept
    assert part.forward is kept


@torch.no_grad()
def test_other_architectures_are_computed_whole():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)).eval()
    ids = torch.randint(3, 50, (4, 8))
    expected = model.transformer(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(states_at(model.transformer, ids, (slice(None), -1)), expected)


def test_parts_hold_every_row_once_the_shorter_ones_first():
    lengths = torch.tensor([9, 1, 5, 5, 2, 8, 7, 3, 3, 9])
    parts = parts_by_length(lengths)
    assert torch.cat(parts).sort().values.tolist() == list(range(10))
    assert len(parts) == 2
    assert lengths[parts[0]].max() <= lengths[parts[1]].min()
    assert len(parts_by_length(lengths[:3])) == 1


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
def test_queries_in_parts_give_what_they_give_in_one_batch_and_decoding_goes_on_from_there(request, base):
    model, ids, real = model_and_rows(request, base)
    model.eval()
    # Padded on the left, as queries are.
    ids, mask = ids.flip(1), real.flip(1)
    whole = DynamicCache(config=model.config)
    expected = [last(model, ids, mask, whole)]
    tokens = torch.arange(3, 19)
    longer = torch.cat([mask, mask.new_ones(16, 1)], 1)
    expected.append(last(model, tokens[:, None], longer, whole))
    decoder = GrowingDecoder(model, ids, mask, 4)
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = [decoder.prefill(), decoder.next(tokens)]
    assert len(widths) == 5 and widths[0] < widths[3] == real.sum(1).max()
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, **TOLERANCE)
    for layer, usual in zip(decoder.cache.layers, whole.layers, strict=True):
        seen = longer[:, None, :, None].expand_as(usual.keys)
        torch.testing.assert_close(layer.keys[seen], usual.keys[seen], **TOLERANCE)
        torch.testing.assert_close(layer.values[seen], usual.values[seen], **TOLERANCE)
