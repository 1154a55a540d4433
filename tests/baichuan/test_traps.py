"""The silent traps of peft and transformers: shown to be there, so that we see one go, and shown not to reach us."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from adapters import random_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import merge_lora
import rl_training
from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.files import ADAPTER_FILE
from rlhf.data.encoding import load_tokenizer
from rlhf.models.forward import backbone_of, forward, pack
from rlhf.models.generation import Rollout, Sampling, generate
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora, lora_targets
from rlhf.models.scoring import score
from rlhf.rl.check import MERGED_WARNS, check_run
from rlhf.rl.roles import (
    VALUE_HEAD_FILE,
    load_roles,
    response_hidden,
    response_logprobs,
    role_logprobs,
    scatter_by_mask,
)
from rlhf.rl.update import update

TOLERANCE = {"atol": 1e-5, "rtol": 0}
SAMPLING = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8, suppress_empty=False)


@pytest.fixture(scope="module", params=["tiny_base", "tiny_llama"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Directories by role; the policy has moved away from the SFT model and has a critic."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {"sft": random_adapter(base, folder / "sft"), "policy": random_adapter(base, folder / "policy", seed=3)}
    found |= {role: random_adapter(base, folder / role, "reward", n) for n, role in enumerate(("reward", "judge"), 1)}
    random_adapter(base, folder / "policy" / "value_adapter", "reward", seed=4)
    value_head = {"weight": torch.linspace(-1, 1.5, 32)[None], "bias": torch.tensor([0.3])}
    save_file(value_head, folder / "policy" / VALUE_HEAD_FILE)
    return found


def load(base, adapters, dtype=torch.float32, **changed):
    settings = {"policy_dir": adapters["policy"], "judge_dir": adapters["judge"]} | changed
    roles = load_roles(base, adapters["sft"], adapters["reward"], dtype=dtype, device="cpu", **settings)
    roles.train(False)
    return roles


def drawn(roles, rows=4):
    """A rollout of random tokens, its log-probabilities and values those of the policy."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(8) < torch.randint(2, 9, (rows,), generator=g)[:, None]
    query_mask = torch.arange(6).flip(0) < torch.randint(1, 7, (rows,), generator=g)[:, None]
    rollout = Rollout(
        query_ids=torch.randint(3, 500, (rows, 6), generator=g) * query_mask,
        query_mask=query_mask,
        response_ids=torch.randint(3, 500, (rows, 8), generator=g) * mask,
        mask=mask,
        logprobs=torch.zeros(rows, 8),
        values=torch.zeros(rows, 8),
        entropy=torch.zeros(rows, 8),
        advantages=torch.randn(rows, 8, generator=g) * mask,
        returns=torch.randn(rows, 8, generator=g) * mask,
    )
    rollout.logprobs, rollout.values = role_logprobs(roles, "policy", rollout, SAMPLING, rows)
    return rollout


def alone(base, adapter, head="causal"):
    """Base + one adapter as plain peft loads it, nothing shared with anything else."""
    return PeftModel.from_pretrained(load_base(base, torch.float32, head=head), adapter).eval()


def real_rows(rollout):
    return [ids[mask][None] for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)]


# ---- another adapter active at backward ----
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_gives_the_policy_no_gradient_where_another_adapter_is_active_at_backward(base, checkpointing):
    def gradients(switch):
        model = load_base(base, torch.float32)
        config = LoraConfig(r=4, target_modules=lora_targets(model, None))
        model = get_peft_model(model, config, adapter_name="policy")
        model.add_adapter("reference", config)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(input_ids=torch.arange(3, 15)[None]).logits.pow(2).mean()
        if switch:
            model.set_adapter("reference")
        loss.backward()
        return [p.grad for name, p in model.named_parameters() if ".policy." in name]

    assert all(gradient is not None for gradient in gradients(switch=False))
    assert all(gradient is None for gradient in gradients(switch=True))


def test_peft_makes_an_adapter_trainable_by_activating_it_and_a_role_in_use_takes_no_gradients(base, adapters):
    model = PeftModel.from_pretrained(load_base(base, torch.float32), adapters["sft"], "policy", is_trainable=True)
    model.load_adapter(adapters["sft"], "reference", is_trainable=False)
    model.set_adapter("reference")
    assert any(p.requires_grad for name, p in model.named_parameters() if ".reference." in name)
    roles = load(base, adapters)
    for role in ("reference", "reward", "judge"):
        with roles.use(role):
            assert not any(p.requires_grad for p in roles.peft_model.parameters())
        assert all(p.requires_grad == (".policy." in name) for name, p in roles.peft_model.named_parameters())


def judgements(roles, rollout):
    """What every role but the policy makes of a rollout."""
    found = {role: roles.scores(rollout.input_ids, rollout.attention_mask, role) for role in ("reward", "judge")}
    return found | {"reference": role_logprobs(roles, "reference", rollout, SAMPLING, 2)[0]}


def test_scoring_by_other_roles_between_forward_and_backward_changes_no_gradient_under_checkpointing(base, adapters):
    def gradients(checkpointing):
        roles = load(base, adapters)
        rollout = drawn(roles)
        expected = judgements(roles, rollout)
        if checkpointing:
            roles.enable_checkpointing()
        roles.train(True)
        logprobs, hidden = response_logprobs(roles.model, rollout, SAMPLING)
        if checkpointing:
            torch.testing.assert_close(judgements(roles, rollout), expected, **TOLERANCE)
        ((logprobs + scatter_by_mask(roles.values(hidden), rollout.mask)) * rollout.mask).mean().backward()
        return {name: p.grad for name, p in roles.trainable().items()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=0)


def updated(roles, optimizer, rollout, **changed):
    """Two epochs, or what `changed` says, of two mini-batches."""
    flags = {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1, "ppo_epochs": 2,
             "cliprange_value": 100} | changed  # fmt: skip
    flags |= dict.fromkeys(("base_model_name", "sft_model_lora_path", "reward_model_lora_path"), "unused")
    args = rl_training.parse_args([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    update(roles, optimizer, rollout, SAMPLING, args, Accelerator(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changed", [{}, {"critic": "adapter"}], ids=["critic is a head", "critic with an adapter"])
def test_an_update_takes_the_same_step_with_and_without_checkpointing(base, adapters, changed):
    def step(checkpointing):
        roles = load(base, adapters, **changed)
        before = {name: p.detach().clone() for name, p in roles.trainable().items()}
        if checkpointing:
            roles.enable_checkpointing()
        optimizer = torch.optim.SGD(roles.trainable().values(), lr=1.0)
        updated(roles, optimizer, drawn(roles), gradient_accumulation_steps=2, ppo_epochs=1)
        return {name: p.detach() - before[name] for name, p in roles.trainable().items()}

    plain, checkpointed = step(False), step(True)
    assert any(".value." in name for name in plain) == bool(changed)
    for name, moved in plain.items():
        assert moved.abs().max() > 1e-5
        torch.testing.assert_close(checkpointed[name], moved, atol=1e-6, rtol=0)


# ---- generating in train mode under checkpointing ----
def greedy(roles, ours=True):
    """[B, T]: greedy tokens after three queries of one length, by our loop or by transformers."""
    ids = torch.randint(3, 500, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if ours:
        return generate(roles.model, roles.values, ids, mask, SAMPLING).response_ids
    return roles.model.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0
    )[:, 6:]


def test_transformers_generate_writes_other_tokens_in_train_mode_under_checkpointing(base, adapters):
    roles = load(base, adapters)
    expected = greedy(roles, ours=False)
    roles.enable_checkpointing()
    roles.train(True)
    assert not torch.equal(greedy(roles, ours=False), expected)


def test_our_generate_writes_the_right_tokens_between_updates_under_checkpointing(base, adapters):
    roles = load(base, adapters)
    expected = greedy(roles, ours=False)
    roles.enable_checkpointing()
    roles.train(True)
    roles.train(False)
    assert torch.equal(greedy(roles), expected)


def test_our_generate_refuses_a_model_in_train_mode(base, adapters):
    roles = load(base, adapters)
    roles.train(True)
    with pytest.raises(ValueError, match="eval mode"):
        greedy(roles)


# ---- loading adapters ----
def test_peft_drops_the_score_head_of_a_reward_adapter_on_a_language_model_without_a_word(base, adapters):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = alone(base, adapters["reward"])
    assert not any("score" in str(w.message) or "unexpected" in str(w.message) for w in caught)
    assert any("score" in name for name in read_adapter(adapters["reward"])[1])
    assert not any("score" in name for name in model.state_dict())


def test_add_lora_gives_back_the_score_head_that_the_scores_are_made_with(base, adapters):
    _, rest = add_lora(load_base(base, torch.float32), adapters["reward"], "reward", trainable=False)
    (head,) = [tensor for name, tensor in read_adapter(adapters["reward"])[1].items() if "score" in name]
    assert [tensor.tolist() for tensor in rest.values()] == [head.tolist()]
    assert torch.equal(load(base, adapters).score_heads["reward"].weight, head)


@pytest.mark.parametrize("role", ["reward", "judge"])
def test_a_reward_adapter_that_lost_its_score_head_is_refused(base, adapters, role, tmp_path):
    config, weights = read_adapter(adapters[role])
    save_file({name: tensor for name, tensor in weights.items() if "lora_" in name}, tmp_path / ADAPTER_FILE)
    config.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no score head"):
        load(base, adapters | {role: str(tmp_path)})


def test_peft_loads_nothing_of_a_language_models_adapter_onto_a_bare_backbone_and_we_refuse(base, adapters, tmp_path):
    config, weights = read_adapter(adapters["sft"])
    # For CAUSAL_LM peft would not even wrap a backbone.
    config.task_type = None
    config.save_pretrained(str(tmp_path))
    save_file(weights, tmp_path / ADAPTER_FILE)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(backbone_of(load_base(base, torch.float32)), tmp_path)
    assert not any(tensor.any() for name, tensor in model.state_dict().items() if "lora_B" in name)
    for folder in (adapters["sft"], tmp_path):
        with pytest.raises(ValueError, match="does not fit this base"):
            add_lora(backbone_of(load_base(base, torch.float32)), folder, "policy", trainable=True)


# ---- base weights and the other roles stay as they are ----
def test_merging_and_unmerging_in_bfloat16_changes_weights(base, adapters):
    model = PeftModel.from_pretrained(load_base(base, torch.bfloat16), adapters["sft"])
    before = {name: p.clone() for name, p in model.state_dict().items() if "base_layer" in name}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all((model.state_dict()[name] != p).float().mean() > 0.02 for name, p in before.items())


def parameters_of(roles):
    """Name -> parameter of everything in memory: base, adapters, value head, score heads, a separate reference."""
    parts = {"": roles.peft_model, "value_head": roles.value_head, "separate reference": roles.separate_reference}
    parts |= {f"score_head {role}": head for role, head in roles.score_heads.items()}
    return {f"{part} {name}": p for part, module in parts.items() if module for name, p in module.named_parameters()}


def is_trained(name):
    return ".policy." in name or ".value." in name or name.startswith("value_head")


@pytest.mark.parametrize(
    "changed",
    [{}, {"dtype": torch.bfloat16}, {"critic": "adapter"}, {"separate": True}],
    ids=["float32", "bfloat16", "critic with an adapter", "separate reference"],
)
def test_an_update_reaches_policy_and_critic_and_no_byte_of_any_other_role(base, adapters, changed):
    if changed.get("separate"):
        changed = {"merged_sft_dir": base}
    roles = load(base, adapters, **changed)
    rollout, everything = drawn(roles), parameters_of(roles)
    expected, before = judgements(roles, rollout), {name: p.detach().clone() for name, p in everything.items()}
    optimizer, reached = torch.optim.Adam(roles.trainable().values(), lr=1e-4, eps=1e-5), []
    optimizer.register_step_pre_hook(
        lambda *_: reached.append({name: p.grad.any().item() for name, p in everything.items() if p.grad is not None})
    )
    updated(roles, optimizer, rollout)

    trained = {name for name in everything if is_trained(name)}
    assert reached == [dict.fromkeys(trained, True)] * 4
    assert all(p.grad is None for p in everything.values())
    assert {name for name, p in parameters_of(roles).items() if not torch.equal(p, before[name])} == trained
    roles.train(False)
    for role, found in judgements(roles, rollout).items():
        assert torch.equal(found, expected[role])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_role_ever_merges_its_adapter_into_the_base(base, adapters, dtype):
    roles = load(base, adapters, dtype)
    layers = [module for module in roles.model.modules() if isinstance(module, BaseTunerLayer)]
    before = {name: tensor.clone() for name, tensor in roles.peft_model.state_dict().items()}
    merged_inside = []
    layers[0].register_forward_hook(lambda *_: merged_inside.append(any(layer.merged for layer in layers)))
    judgements(roles, drawn(roles))
    greedy(roles)
    assert len(merged_inside) > 4
    assert not any(merged_inside)
    assert all(torch.equal(tensor, before[name]) for name, tensor in roles.peft_model.state_dict().items())


# ---- where a score is read ----
def test_transformers_scores_before_a_last_token_that_equals_pad_and_on_padding_that_does_not(tiny_llama):
    model = load_base(tiny_llama, torch.float32, head="score").eval()
    ids, mask = torch.tensor([[7, 9, 11, 0]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        at_each = model.score(backbone_of(model)(input_ids=ids).last_hidden_state)[0, :, 0]
        theirs = model(input_ids=ids, attention_mask=mask).logits.item()
        assert theirs == pytest.approx(at_each[2].item(), abs=1e-6)
        assert theirs != pytest.approx(at_each[3].item(), abs=1e-3)
        assert score(backbone_of(model), model.score, ids, mask).item() == pytest.approx(at_each[3].item(), abs=1e-6)
        padded, real = torch.tensor([[7, 9, 11, 2, 2]]), torch.tensor([[1, 1, 1, 0, 0]])
        assert model(input_ids=padded, attention_mask=real).logits.item() != pytest.approx(at_each[2].item(), abs=1e-3)
        found = score(backbone_of(model), model.score, padded, real).item()
        assert found == pytest.approx(at_each[2].item(), abs=1e-6)


@pytest.mark.parametrize("role", ["reward", "judge"])
def test_our_score_is_read_at_the_last_real_token_whatever_its_id(base, adapters, role):
    roles = load(base, adapters)
    row = torch.tensor([7, 9, 11, 13])
    for last in (0, 1, 2, 17):
        row[-1] = last
        with torch.no_grad(), roles.use(role) as model:
            hidden = backbone_of(model)(input_ids=row[None]).last_hidden_state[0, -1]
            expected = (roles.score_heads[role].weight @ hidden).item()
        for padding in (0, 2):
            extra = torch.full((3,), padding)
            ids = torch.stack([torch.cat([extra, row]), torch.cat([row, extra])])
            mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()
            assert roles.scores(ids, mask, role).tolist() == pytest.approx([expected] * 2, abs=1e-5)


# ---- a merged model as reference ----
def merged(base, adapter, target, *flags):
    argv = ["--base_model_name", base, "--lora_path", adapter, "--output_dir", str(target), *flags]
    merge_lora.main(merge_lora.parse_args(argv))
    return str(target)


def reference_difference(base, adapters, merged_dir, dtype=torch.float32):
    """Per real token: |log-probability under the reference adapter - the same under the separate model|."""
    shared, separate = load(base, adapters, dtype), load(base, adapters, dtype, merged_sft_dir=merged_dir)
    rollout = drawn(shared)
    one, other = (role_logprobs(roles, "reference", rollout, SAMPLING, 4)[0] for roles in (shared, separate))
    return (one - other)[rollout.mask].abs()


@pytest.mark.parametrize("flags", [[], ["--format", "llama"]], ids=["own format", "llama format"])
def test_a_merged_float32_reference_equals_the_adapter_reference(base, adapters, tmp_path, flags):
    found = merged(base, adapters["sft"], tmp_path / "merged", "--dtype", "float32", *flags)
    assert reference_difference(base, adapters, found).max() <= 1e-4
    assert reference_difference(base, adapters, base).max() > 1e-2
    roles = load(base, adapters, policy_dir=None, merged_sft_dir=found)
    assert check_run(roles, load_tokenizer(base), drawn(roles), SAMPLING, fresh=True) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_bfloat16_reference_stays_under_the_limit_that_warns(base, adapters, tmp_path, dtype):
    found = merged(base, adapters["sft"], tmp_path / "merged", "--dtype", "bfloat16")
    difference = reference_difference(base, adapters, found, dtype).mean().item()
    assert 0 < difference < MERGED_WARNS, f"the merged reference is {difference:.2g} nats a token off"
    roles = load(base, adapters, dtype, policy_dir=None, merged_sft_dir=found)
    assert check_run(roles, load_tokenizer(base), drawn(roles), SAMPLING, fresh=True) == []


# ---- every role is its own model ----
@torch.no_grad()
def test_logits_logprobs_and_values_equal_those_of_the_separately_loaded_policy_and_reference(base, adapters):
    roles = load(base, adapters)
    rollout = drawn(roles)
    head = load_file(f"{adapters['policy']}/{VALUE_HEAD_FILE}")
    plain = {"policy": alone(base, adapters["policy"]), "reference": alone(base, adapters["sft"])}
    differ = []
    for role in ("policy", "reference", "policy"):
        logprobs, values = role_logprobs(roles, role, rollout, SAMPLING, 3)
        with roles.use(role) as model:
            packed = pack(backbone_of(model), rollout.input_ids, rollout.attention_mask)
            logits = forward(model, packed.index(*rollout.predictors()), **packed.inputs)[0]
            logits = logits.split(rollout.lengths().tolist())
        for row, ids in enumerate(real_rows(rollout)):
            n = int(rollout.mask[row].sum())
            out = plain[role](input_ids=ids, output_hidden_states=True)
            expected = out.logits[0, -n - 1 : -1]
            torch.testing.assert_close(logits[row], expected, **TOLERANCE)
            expected = expected.log_softmax(-1).gather(-1, ids[0, -n:, None])[:, 0]
            torch.testing.assert_close(logprobs[row, :n], expected, **TOLERANCE)
            if role == "policy":
                expected = (out.hidden_states[-1][0, -n - 1 : -1] @ head["weight"].T + head["bias"])[:, 0]
                torch.testing.assert_close(values[row, :n], expected, **TOLERANCE)
        differ.append(logprobs)
    assert torch.equal(differ[0], differ[2])
    assert (differ[0] - differ[1])[rollout.mask].abs().max() > 1e-2


@torch.no_grad()
def test_values_of_a_critic_with_an_adapter_equal_those_of_the_separately_loaded_one(base, adapters):
    roles = load(base, adapters, critic="adapter")
    rollout = drawn(roles)
    with roles.use("value") as model:
        values = scatter_by_mask(roles.values(response_hidden(model, rollout)), rollout.mask)
    plain = alone(base, f"{adapters['policy']}/value_adapter")
    head = load_file(f"{adapters['policy']}/{VALUE_HEAD_FILE}")
    for row, ids in enumerate(real_rows(rollout)):
        n = int(rollout.mask[row].sum())
        hidden = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -n - 1 : -1]
        torch.testing.assert_close(values[row, :n], (hidden @ head["weight"].T + head["bias"])[:, 0], **TOLERANCE)


@torch.no_grad()
def test_scores_equal_those_of_the_separately_loaded_reward_model_and_judge(base, adapters):
    roles = load(base, adapters)
    rollout = drawn(roles)
    found = []
    for role in ("reward", "judge", "reward"):
        found.append(roles.scores(rollout.input_ids, rollout.attention_mask, role))
        plain = alone(base, adapters[role], head="score")
        expected = torch.cat([plain(input_ids=ids).logits[:, 0] for ids in real_rows(rollout)])
        torch.testing.assert_close(found[-1], expected, **TOLERANCE)
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().min() > 1e-2
