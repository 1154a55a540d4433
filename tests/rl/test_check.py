"""Every defect that the start-up checks look for, planted one at a time; each must be named."""

import dataclasses

import pytest
import torch
from adapters import random_adapter

from rlhf.data.batches import collate_prompts
from rlhf.data.control_tokens import encode
from rlhf.data.encoding import load_tokenizer
from rlhf.models.generation import Sampling, generate
from rlhf.models.loading import load_base
from rlhf.rl import check
from rlhf.rl.check import check_run
from rlhf.rl.roles import load_roles, role_logprobs

PROMPTS = ["我喜欢", "小猫今天看见了一本书，老师说", "问：1 + 1 = "]


@pytest.fixture
def run(tiny_base, tmp_path):
    """Roles, tokenizer, rollout and sampling of a run that is in order."""
    sft, reward = random_adapter(tiny_base, tmp_path / "sft"), random_adapter(tiny_base, tmp_path / "rm", "reward", 1)
    roles = load_roles(tiny_base, sft, reward, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(tiny_base)
    roles.train(False)
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8, temperature=0.8)
    return {
        "roles": roles,
        "tokenizer": tokenizer,
        "rollout": sample(roles, tokenizer, sampling),
        "sampling": sampling,
    }


def sample(roles, tokenizer, sampling):
    batch = collate_prompts([encode(tokenizer, prompt) for prompt in PROMPTS], 0)
    generator = torch.Generator().manual_seed(0)
    return generate(roles.model, roles.values, batch["input_ids"], batch["attention_mask"], sampling, generator)


def refused(run, message, fresh=True):
    with pytest.raises(ValueError, match=message):
        check_run(**run, fresh=fresh)


def test_a_run_in_order_passes_without_a_warning(run):
    assert check_run(**run, fresh=True) == []


def test_a_stop_token_outside_the_vocabulary_is_named(run):
    refused(run | {"sampling": dataclasses.replace(run["sampling"], stop_ids=(2, 64000))}, "stop token 64000")


def test_a_tokenizer_larger_than_the_model_is_named(run):
    class Larger:
        def __len__(self):
            return 10**6

    refused(run | {"tokenizer": Larger()}, "tokenizer has 1000000 tokens")


def test_non_finite_logits_are_named(run):
    run["rollout"].logprobs[1, 2] = torch.nan
    refused(run, "logprobs of the first sampled batch are not finite")


def test_scoring_under_another_temperature_than_sampling_is_named(run):
    refused(run | {"sampling": dataclasses.replace(run["sampling"], temperature=1.0)}, "ratio would not start at 1")


def test_dropout_left_on_is_named(run):
    for module in run["roles"].model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["policy"] = torch.nn.Dropout(0.5).train()
    refused(run, "ratio would not start at 1")


def test_a_score_that_depends_on_padding_is_named(run, monkeypatch):
    score = check.Roles.scores
    monkeypatch.setattr(
        check.Roles, "scores", lambda self, ids, mask, *role: score(self, ids, torch.ones_like(mask), *role)
    )
    refused(run, "score of an answer depends on its padding")


def test_a_policy_that_is_not_the_reference_is_named_at_the_start_but_not_after_a_restart(run):
    with torch.no_grad():
        for name, parameter in run["roles"].trainable().items():
            if "lora_B" in name:
                parameter += 0.05
    moved = run | {"rollout": sample(run["roles"], run["tokenizer"], run["sampling"])}
    refused(moved, "policy and reference differ")
    assert check_run(**moved, fresh=False) == []


def test_a_merged_reference_of_another_adapter_is_refused_and_a_rounded_one_is_not(run, tiny_base):
    reference = load_base(tiny_base, torch.float32).eval()
    run["roles"].separate_reference = reference
    with torch.no_grad():
        reference.get_output_embeddings().weight *= 3
    refused(run, "--merged_sft_model_path differs")
    with torch.no_grad():  # the policy itself, a little rounded
        reference.load_state_dict(load_base(tiny_base, torch.float32).state_dict())
        run["roles"].peft_model.base_model.merge_adapter(["policy"])
        merged = {n.replace("base_layer.", ""): p.clone() for n, p in run["roles"].model.state_dict().items()}
        run["roles"].peft_model.base_model.unmerge_adapter()
        reference.load_state_dict({n: p for n, p in merged.items() if "lora_" not in n})
        reference.get_output_embeddings().weight += 0.003 * torch.randn_like(reference.get_output_embeddings().weight)
    warnings = check_run(**run, fresh=True)
    assert len(warnings) == 1
    assert "rounding of the merge" in warnings[0]


def test_the_bare_base_as_merged_reference_is_refused_however_little_sft_changed(run, tiny_base):
    run["roles"].separate_reference = load_base(tiny_base, torch.float32).eval()
    for name, parameter in run["roles"].peft_model.named_parameters():
        if ".lora_B.policy." in name:
            parameter.data *= 1e-2
    with torch.no_grad():
        logprobs, _ = role_logprobs(run["roles"], "policy", run["rollout"], run["sampling"], rows_at_once=8)
    run["rollout"].logprobs = logprobs
    refused(run, "weights of the bare base")
