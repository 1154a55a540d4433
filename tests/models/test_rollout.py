"""The decode loop against `generate()`, and log-probabilities, values and scores against padding, batch and role."""

import dataclasses

import pytest
import torch
from adapters import random_adapter
from transformers import DynamicCache

from rlhf.artefacts.adapters import read_adapter
from rlhf.data.batches import collate_prompts
from rlhf.data.control_tokens import encode
from rlhf.data.encoding import load_tokenizer
from rlhf.models.decoding import GrowingDecoder, RoomyLayer, StaticDecoder, roomy_cache, supports_static_cache
from rlhf.models.forward import backbone_of, pack
from rlhf.models.generation import Rollout, Sampling, _choose, generate
from rlhf.models.kernels import BY_ROW
from rlhf.models.loading import load_base
from rlhf.models.rollouts import by_length, join
from rlhf.rl.roles import load_roles, response_logprobs, role_logprobs

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = ["我喜欢", "小猫今天看见了一本书，老师说", "问：1 + 1 = ", "The cat likes"]


@pytest.fixture(scope="module", params=["tiny_base", "tiny_llama"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def roles(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    sft, reward = random_adapter(base, folder / "sft"), random_adapter(base, folder / "reward", "reward", seed=1)
    roles = load_roles(base, sft, reward, dtype=torch.float32, device="cpu")
    torch.nn.init.normal_(roles.value_head.weight)
    with torch.no_grad():  # policy and reference differ, and distributions are peaked enough for answers to end
        roles.model.get_output_embeddings().weight *= 8
        for name, parameter in roles.trainable().items():
            if "lora_B" in name:
                parameter += 0.05
    roles.train(False)
    return roles


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def sampling(tokenizer, **changed):
    return Sampling(
        **{"stop_ids": (tokenizer.eos_token_id,), "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": 12}
        | changed
    )


def queries(tokenizer, prompts=PROMPTS):
    batch = collate_prompts([encode(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id)
    return batch["input_ids"], batch["attention_mask"]


def sample(roles, tokenizer, seed=0, prompts=PROMPTS, **changed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    settings = sampling(tokenizer, **changed)
    return generate(roles.model, roles.values, *queries(tokenizer, prompts), settings, generator), settings


def likely_eos(roles, tokenizer):
    """An EOS that this model really samples, as first token too: the commonest first token of some draws."""
    firsts = [sample(roles, tokenizer, seed=s, max_new_tokens=1)[0].response_ids for s in range(20)]
    return torch.cat(firsts).flatten().mode().values.item()


def test_greedy_tokens_equal_those_of_transformers_generate(roles, tokenizer):
    rollout, settings = sample(roles, tokenizer, seed=None, suppress_empty=False)
    ids, mask = queries(tokenizer)
    expected = roles.model.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.stop_ids), pad_token_id=settings.pad_token_id,
    )[:, ids.shape[1]:]  # fmt: skip
    width = rollout.response_ids.shape[1]
    assert (
        torch.where(rollout.mask, rollout.response_ids, -1).tolist()
        == torch.where(rollout.mask, expected[:, :width], -1).tolist()
    )


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"temperature": 0.7},
        {"suppress_empty": False},
        {"min_new_tokens": 5},
        {"temperature": 1.4, "min_new_tokens": 3},
    ],
)
def test_what_was_recorded_while_sampling_equals_what_is_scored_afterwards(roles, tokenizer, changed):
    eos = likely_eos(roles, tokenizer)
    rollout, settings = sample(roles, tokenizer, stop_ids=(eos,), **changed)
    logprobs, values = role_logprobs(roles, "policy", rollout, settings, rows_at_once=3)
    torch.testing.assert_close(logprobs, rollout.logprobs, **TOLERANCE)
    torch.testing.assert_close(values, rollout.values, **TOLERANCE)


def test_a_response_keeps_its_first_eos_then_pads(roles, tokenizer):
    eos = likely_eos(roles, tokenizer)
    rollout, settings = sample(roles, tokenizer, stop_ids=(eos,), max_new_tokens=40, seed=5, suppress_empty=False)
    assert rollout.ended((eos,)).any()
    for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True):
        n = int(mask.sum())
        assert mask[:n].all()
        assert (ids[: n - 1] != eos).all()
        assert n == 40 or ids[n - 1] == eos
        assert (ids[n:] == settings.pad_token_id).all()


def test_min_new_tokens_and_suppressed_empties_hold(roles, tokenizer):
    eos = likely_eos(roles, tokenizer)
    free = [sample(roles, tokenizer, seed=s, stop_ids=(eos,), suppress_empty=False)[0].lengths() for s in range(20)]
    assert (torch.cat(free) == 1).any()  # the model does want to stop at once
    for s in range(20):
        assert (sample(roles, tokenizer, seed=s, stop_ids=(eos,))[0].lengths() > 1).all()
        assert (sample(roles, tokenizer, seed=s, stop_ids=(eos,), min_new_tokens=4)[0].lengths() > 4).all()


def test_logprobs_values_and_scores_do_not_depend_on_padding_or_batch(roles, tokenizer):
    rollout, settings = sample(roles, tokenizer, stop_ids=(likely_eos(roles, tokenizer),))
    wide = join([rollout], settings.pad_token_id)
    extra = torch.full((len(PROMPTS), 5), settings.pad_token_id)
    nothing = torch.zeros_like(extra, dtype=torch.bool)
    wide.query_ids, wide.query_mask = torch.cat([extra, wide.query_ids], 1), torch.cat([nothing, wide.query_mask], 1)
    together = response_logprobs(roles.model, wide, settings)
    hidden_of_rows = together[1].split(wide.lengths().tolist())
    scores = roles.scores(wide.input_ids, wide.attention_mask)
    for row in range(len(PROMPTS)):
        alone = rollout.rows(torch.tensor([row]))
        width = alone.mask.shape[1]
        logprobs, hidden = response_logprobs(roles.model, alone, settings)
        torch.testing.assert_close(logprobs[0], together[0][row, :width], **TOLERANCE)
        torch.testing.assert_close(hidden, hidden_of_rows[row], **TOLERANCE)
        assert roles.scores(alone.input_ids, alone.attention_mask).item() == pytest.approx(
            scores[row].item(), abs=1e-5
        )
        right = torch.cat(
            [alone.input_ids[:, alone.query_mask.shape[1] - int(alone.query_mask.sum()) :], extra[:1]], 1
        )
        right_mask = torch.arange(right.shape[1])[None] < right.shape[1] - 5
        assert roles.scores(right, right_mask).item() == pytest.approx(scores[row].item(), abs=1e-5)


def test_rows_cut_only_padding_that_none_of_them_needs(roles, tokenizer):
    rollout, _ = sample(roles, tokenizer, stop_ids=(likely_eos(roles, tokenizer),))
    for rows in by_length(rollout, 2):
        part = rollout.rows(rows)
        for i, row in enumerate(rows):
            assert (
                part.query_ids[i][part.query_mask[i]].tolist()
                == rollout.query_ids[row][rollout.query_mask[row]].tolist()
            )
            assert part.response_ids[i][part.mask[i]].tolist() == rollout.response_ids[row][rollout.mask[row]].tolist()
        assert part.query_mask[:, 0].any()
        assert part.mask[:, -1].any()


@pytest.mark.parametrize("attention", [BY_ROW, "sdpa"])
def test_laid_out_rows_hold_each_query_and_response_side_by_side_and_name_what_predicts_them(
    roles, tokenizer, monkeypatch, attention
):
    rollout, _ = sample(roles, tokenizer, stop_ids=(likely_eos(roles, tokenizer),))
    assert roles.model.config._attn_implementation == BY_ROW
    monkeypatch.setattr(roles.model.config, "_attn_implementation", attention)
    packed = pack(backbone_of(roles.model), rollout.input_ids, rollout.attention_mask)
    ids, (row, column) = packed.inputs["input_ids"], packed.index(*rollout.predictors())
    assert ids[row, column + 1].tolist() == rollout.response_ids[rollout.mask].tolist()
    lengths = rollout.attention_mask.sum(1).tolist()
    if attention == BY_ROW:
        assert packed.inputs["row_lengths"] == lengths
        assert ids[0].tolist() == rollout.input_ids[rollout.attention_mask].tolist()
        assert packed.inputs["position_ids"][0].tolist() == [place for n in lengths for place in range(n)]
    else:
        for number, real in enumerate(rollout.input_ids[rollout.attention_mask].split(lengths)):
            assert ids[number, : len(real)].tolist() == real.tolist()
        assert ids.shape[1] == max(lengths)


@torch.no_grad()
def test_a_roomy_cache_holds_what_a_growing_one_does_also_after_rows_have_left(roles, tokenizer):
    ids, mask = queries(tokenizer)
    caches = [roomy_cache(roles.model, ids.shape[1] + 3), DynamicCache(config=roles.model.config)]
    assert any(isinstance(layer, RoomyLayer) for layer in caches[0].layers)
    for cache in caches:
        roles.model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([1, 3]))
        longer = torch.cat([mask[[1, 3]], mask.new_ones(2, 1)], 1).long()
        roles.model(input_ids=ids[[0, 2], -1:], attention_mask=longer, past_key_values=cache, use_cache=True)
    for roomy, growing in zip(*(cache.layers for cache in caches), strict=True):
        assert roomy.get_seq_length() == growing.get_seq_length() == ids.shape[1] + 1
        torch.testing.assert_close(roomy.keys, growing.keys, **TOLERANCE)
        torch.testing.assert_close(roomy.values, growing.values, **TOLERANCE)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_static_shapes_sample_what_growing_ones_do(roles, tokenizer, monkeypatch, seed):
    assert supports_static_cache(roles.model)
    eos, kept = likely_eos(roles, tokenizer), []
    # Draws are by place in the batch: rows that ended stay in both, so that the others draw the same.
    for kind in (GrowingDecoder, StaticDecoder):
        decoder = type("Slow", (kind,), {"every": 3, "shrink": 0.0})
        monkeypatch.setattr("rlhf.models.generation.decoder_of", lambda *args, made=decoder, **kwargs: made(*args))
        kept.append(sample(roles, tokenizer, seed=seed, stop_ids=(eos,), max_new_tokens=20)[0])
    growing, static = kept
    assert static.response_ids.tolist() == growing.response_ids.tolist()
    for name in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(static, name), getattr(growing, name), **TOLERANCE)


def test_rows_that_go_on_after_others_have_ended_write_what_they_would_have_written(roles, tokenizer, monkeypatch):
    free = sample(roles, tokenizer, seed=None, max_new_tokens=12)[0]
    eos, shrunk = free.response_ids[0, 3].item(), []

    class Eager(StaticDecoder):
        every, shrink = 1, 1.0

        def keep(self, rows):
            shrunk.append(len(rows))
            super().keep(rows)

    expected = sample(roles, tokenizer, seed=None, stop_ids=(eos,), max_new_tokens=30)[0]
    monkeypatch.setattr("rlhf.models.generation.decoder_of", lambda *args, **kwargs: Eager(*args))
    found = sample(roles, tokenizer, seed=None, stop_ids=(eos,), max_new_tokens=30)[0]
    assert shrunk and expected.lengths().unique().numel() > 1
    assert found.response_ids.tolist() == expected.response_ids.tolist()
    torch.testing.assert_close(found.logprobs, expected.logprobs, **TOLERANCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: only CUDA records and replays a step")
def test_a_recorded_step_samples_on_a_gpu_what_one_without_recording_does(tiny_base, tokenizer, tmp_path):
    sft, reward = (random_adapter(tiny_base, tmp_path / stage, stage) for stage in ("sft", "reward"))
    roles = load_roles(tiny_base, sft, reward, dtype=torch.float32, device="cuda")
    roles.train(False)
    ids, mask = (tensor.cuda() for tensor in queries(load_tokenizer(tiny_base)))
    settings = sampling(load_tokenizer(tiny_base), max_new_tokens=40)
    found = [
        generate(roles.model, roles.values, ids, mask, dataclasses.replace(settings, cuda_graphs=graphs))
        for graphs in (True, False)
    ]
    assert found[0].response_ids.tolist() == found[1].response_ids.tolist()
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, atol=1e-4, rtol=0)


def test_a_draw_is_that_of_multinomial():
    logits, settings = torch.randn(6, 50), Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=1)
    for seed in range(20):
        expected = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        assert _choose(logits, settings, torch.Generator().manual_seed(seed)).tolist() == expected.tolist()


def test_joined_parts_hold_the_same_rows(roles, tokenizer):
    parts = [sample(roles, tokenizer, seed=i, prompts=[p])[0] for i, p in enumerate(PROMPTS)]
    whole = join(parts, tokenizer.pad_token_id)
    assert isinstance(whole, Rollout)
    for i, part in enumerate(parts):
        assert whole.response_ids[i][whole.mask[i]].tolist() == part.response_ids[0][part.mask[0]].tolist()
        assert whole.query_ids[i][whole.query_mask[i]].tolist() == part.query_ids[0][part.query_mask[0]].tolist()


def test_a_non_finite_policy_is_named_rather_than_sampled(roles, tokenizer):
    weight = roles.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[5] = torch.nan
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            sample(roles, tokenizer)
    finally:
        weight.data.copy_(kept)


# ---- roles ----
def test_every_role_equals_the_separately_loaded_model(base, tmp_path):
    from peft import PeftModel

    sft, reward = random_adapter(base, tmp_path / "sft"), random_adapter(base, tmp_path / "reward", "reward", seed=1)
    roles = load_roles(base, sft, reward, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(base)
    ids, mask = queries(tokenizer)
    alone = PeftModel.from_pretrained(load_base(base, torch.float32), sft).eval()
    judge = PeftModel.from_pretrained(load_base(base, torch.float32, head="score"), reward).eval()
    roles.train(False)
    with torch.no_grad():
        for role in ("policy", "reference", "policy"):
            with roles.use(role) as model:
                found = model(input_ids=ids, attention_mask=mask.long()).logits
            expected = alone(input_ids=ids, attention_mask=mask.long()).logits
            torch.testing.assert_close(found[mask], expected[mask], **TOLERANCE)
        for row in range(len(PROMPTS)):
            real = ids[row][mask[row]][None]
            expected = judge(input_ids=real, attention_mask=torch.ones_like(real)).logits.item()
            assert roles.scores(ids, mask)[row].item() == pytest.approx(expected, abs=1e-5)


def test_the_policy_is_active_and_alone_trainable_after_every_switch_even_an_error(roles):
    trainable = set(roles.trainable())
    assert trainable
    assert all("policy" in name or name.startswith("value_head") for name in trainable)
    for role in ("reference", "reward", "policy"):
        with pytest.raises(KeyError), roles.use(role):
            raise KeyError
        assert set(roles.trainable()) == trainable
        assert roles.peft_model.base_model.active_adapter == "policy"


def test_an_sft_adapter_given_as_reward_model_is_refused(base, tmp_path):
    sft = random_adapter(base, tmp_path / "sft")
    with pytest.raises(ValueError, match="no score head"):
        load_roles(base, sft, sft, dtype=torch.float32, device="cpu")


def test_an_adapter_of_another_shape_is_refused(tiny_base, tiny_llama, tmp_path):
    sft = random_adapter(tiny_llama, tmp_path / "sft")
    with pytest.raises(ValueError, match="does not fit this base"):
        load_roles(tiny_base, sft, sft, dtype=torch.float32, device="cpu")


def test_an_old_bin_adapter_loads_and_a_pickle_bomb_does_not(tiny_base, tmp_path):
    import pickle

    folder = tmp_path / "sft"
    random_adapter(tiny_base, folder)
    _, weights = read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    _, again = read_adapter(folder)
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code in an adapter was run",))

    with (folder / "adapter_model.bin").open("wb") as out:
        pickle.dump(Bomb(), out)
    with pytest.raises(ValueError, match="no code of it was run"):
        read_adapter(folder)
