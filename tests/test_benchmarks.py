"""The benchmarks measure what they say: arithmetic counted right, answers as long as stated, the same rows for all."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import ppo_step, sft_step
from benchmarks.model import EOS, VOCABULARY, causal_model, config
from benchmarks.ppo_workload import SETTINGS, prompts, set_chance_of_eos


def test_counted_flops_are_two_for_each_weight_and_token():
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert ppo_step.flops(ppo_step.layer_shapes(432, 256)) == 2 * (432 * layers + 256 * head)


@pytest.mark.parametrize(("chance", "least", "most"), [(0.0, 0.0, 1e-12), (1 / 32, 0.02, 0.045)])
def test_eos_has_its_chance_at_every_token_of_every_text(chance, least, most):
    model = causal_model()
    set_chance_of_eos(model, chance)
    ids = torch.randint(3, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids).logits.softmax(-1)[..., EOS]
    assert found.min() >= least
    assert found.max() <= most


def test_prompts_are_as_described():
    lengths = [len(ids) for ids in prompts()]
    assert (len(lengths), min(lengths), max(lengths)) == (SETTINGS["batch_size"], 16, 96)
    assert 40 < sum(lengths) / len(lengths) < 46


def test_the_first_step_is_left_out_and_others_are_held_against_ours():
    def steps(total, tokens=1000):
        phases = {"rollout": 1.0, "score": 1.0, "update": total - 2.0, "total": total, "tokens": tokens}
        return [phases | {"total": 99.0}, phases, phases]

    runs = {
        name: [{"steps": steps(total), "peak_gb": peak, "versions": {"trl": name}, "moved": 1e-4}]
        for name, total, peak in (("ours", 10.0, 1.0), ("trl07", 15.0, 2.0))
    }
    table = ppo_step.table(SETTINGS | {"prompts": prompts()}, runs, 100.0)
    classic = next(line for line in table.splitlines() if line.startswith("classic"))
    rollout, score, update, total, rate, tokens, peak, speed, _, memory, _ = classic.split()[3:]
    assert (total, rate, tokens, peak, speed, memory) == ("15.00", "1.07", "62.5", "2.00", "1.50", "0.50")
    assert (rollout, score, update) == ("1.00", "1.00", "13.00")


def test_sft_rows_fit_and_carry_a_loss_on_the_answer_alone():
    rows = sft_step.draw_rows(50)
    assert json.dumps(rows) == json.dumps(sft_step.draw_rows(50))
    for row in rows:
        assert len(row["input_ids"]) == len(row["completion_mask"]) <= sft_step.MAX_LENGTH
        assert row["input_ids"][-1] == EOS
        assert row["completion_mask"] == sorted(row["completion_mask"])
