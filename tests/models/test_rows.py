"""Rows side by side, at fewer places, or in parts, against the same rows computed whole and alone."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.models.decoding import GrowingDecoder, next_logits
from rlhf.models.forward import (
    backbone_of,
    enable_packing,
    forward,
    hidden_at,
    mlp_only_at,
    pack,
    parts_by_length,
)
from rlhf.models.kernels import BY_ROW

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


def places(real):
    """Row and place of every real token of rows padded on the right."""
    return real.nonzero(as_tuple=True)


def last_places(real):
    """Row and place of the last real token of each row."""
    return torch.arange(len(real)), real.sum(1) - 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", BY_ROW])
@pytest.mark.parametrize("base", BASES)
def test_states_and_gradients_are_those_of_each_row_alone(request, base, attention, training):
    model, ids, real = model_and_rows(request, base)
    backbone = backbone_of(model)
    if training:
        # Layers computed anew in backward have to find the rows where they were.
        model.train().activation_checkpointing_enable({"use_reentrant": False})
    alone = torch.cat(
        [backbone(input_ids=row[keep][None]).last_hidden_state[0] for row, keep in zip(ids, real, strict=True)]
    )
    if attention == BY_ROW:
        assert enable_packing(backbone_of(model))
    together = hidden_at(backbone, pack(backbone, ids, real), *places(real))
    found = []
    for states in (alone, together):
        model.zero_grad()
        states.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(together, alone, **TOLERANCE)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_padding_on_either_side_changes_no_state(request):
    model, ids, real = model_and_rows(request, "tiny_base")
    assert enable_packing(backbone_of(model))
    backbone = backbone_of(model)
    right = hidden_at(backbone, pack(backbone, ids, real), *last_places(real))
    left = hidden_at(backbone, pack(backbone, ids.flip(1), real.flip(1)), *last_places(real))
    expected = [
        backbone(input_ids=row[keep].flip(0)[None]).last_hidden_state[0, -1]
        for row, keep in zip(ids, real, strict=True)
    ]
    torch.testing.assert_close(left, torch.stack(expected), **TOLERANCE)
    assert (left - right).abs().max() > 0.1


def test_models_are_taken_at_their_word_only_after_a_trial(request):
    model, *_ = model_and_rows(request, "tiny_llama")
    backbone = backbone_of(model)
    usual = backbone.forward
    # One whose attention never hears where rows end.
    backbone.forward = lambda row_lengths=None, **inputs: usual(**inputs)
    assert not enable_packing(backbone_of(model))
    assert model.config._attn_implementation == "sdpa"
    backbone.forward = usual
    assert enable_packing(backbone_of(model))


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def falcon(**settings):
    """Attention over positions or distances, by a mask that it looks into."""
    return FalconForCausalLM(
        FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **settings)
    )


@pytest.mark.parametrize(
    ("build", "takes"),
    [
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=4)), True),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)), False),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)), True),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)), False),
        (lambda: falcon(alibi=True), False),
        (lambda: falcon(alibi=False), False),
        (
            lambda: GptOssForCausalLM(
                GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=4, num_local_experts=2, num_experts_per_tok=1)
            ),
            False,
        ),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)), True),
    ],
    ids=[
        "grouped queries",
        "sliding window",
        "no window",
        "no positions",
        "ALiBi",
        "Falcon",
        "router",
        "learnt positions",
    ],
)
@torch.no_grad()
def test_every_architecture_gives_the_states_of_each_row_alone_whether_it_takes_them_side_by_side_or_not(build, takes):
    torch.manual_seed(0)
    model = build().eval()
    assert enable_packing(backbone_of(model)) is takes
    backbone = backbone_of(model)
    for lengths in ([8, 3, 5, 1], [4, 7], [6]):
        ids, real = torch.randint(3, 50, (len(lengths), 8)), torch.arange(8) < torch.tensor(lengths)[:, None]
        alone = [row[keep][None] for row, keep in zip(ids, real, strict=True)]
        packed = pack(backbone, ids, real)
        expected = torch.cat([backbone(input_ids=row).last_hidden_state[0] for row in alone])
        torch.testing.assert_close(hidden_at(backbone, packed, *places(real)), expected, **TOLERANCE)
        expected = torch.cat([model(input_ids=row).logits[0] for row in alone])
        logits, _ = forward(model, packed.index(*places(real)), **packed.inputs, use_cache=False)
        torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_what_would_be_computed_wrongly_is_refused(request):
    model, ids, real = model_and_rows(request, "tiny_llama")
    assert enable_packing(backbone_of(model))
    backbone = backbone_of(model)
    real[3] = False
    with pytest.raises(ValueError, match="no token"):
        pack(backbone, ids, real)
    inputs = pack(backbone, ids[:3], real[:3]).inputs
    with pytest.raises(ValueError, match="where rows end"):
        backbone(**inputs | {"row_lengths": None})
    with pytest.raises(ValueError, match="mask of its own"):
        backbone(**inputs | {"attention_mask": None})


@pytest.mark.parametrize("base", BASES)
def test_the_last_feed_forward_part_sees_only_the_places_asked_for(request, base):
    model, ids, real = model_and_rows(request, base)
    seen = []
    down(model).register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        forward(model, last_places(real), ids, use_cache=False)
        forward(model, (slice(None), -1), ids, use_cache=False)
        model(input_ids=ids)
        assert seen == [16, 16, 16 * 12]
        assert enable_packing(backbone_of(model))
        seen.clear()
        hidden_at(backbone_of(model), pack(backbone_of(model), ids, real), *last_places(real))
    assert seen == [16]


def test_the_usual_forward_is_back_after_the_block_also_after_an_error(request):
    model, *_ = model_and_rows(request, "tiny_base")
    part = backbone_of(model).layers[-1].mlp
    with pytest.raises(ZeroDivisionError), mlp_only_at(backbone_of(model), (slice(None), -1)):
        assert "forward" in vars(part)
        raise ZeroDivisionError
    assert "forward" not in vars(part)
    part.forward = kept = part.forward
    with mlp_only_at(backbone_of(model), (slice(None), -1)):
        assert part.forward is not kept
    assert part.forward is kept


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
    expected = [next_logits(model, ids, mask, whole)]
    tokens = torch.arange(3, 19)
    longer = torch.cat([mask, mask.new_ones(16, 1)], 1)
    expected.append(next_logits(model, tokens[:, None], longer, whole))
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
