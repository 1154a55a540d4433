"""The collapse guard: each sign of a collapse, what does not count as one, and what a run does about it."""

import json
import math

import pytest
import torch
from adapters import random_adapter
from safetensors.torch import load_file
from test_rl_training import PROMPTS, arguments

import rl_training
from rlhf.rl.guard import CollapseGuard
from rlhf.run.log import read_metrics
from rlhf.run.stopping import Collapse

HEALTHY = {
    "score/mean": 0.5, "kl/mean": 1.0, "entropy": 2.0, "loss/policy": 0.1, "loss/value": 0.1, "grad_norm": 1.0,
    "empty_frac": 0.0, "len/mean": 20.0,
}  # fmt: skip


def judged(*steps, healthy=10):
    """What the guard says of the last step, after some healthy ones."""
    guard = CollapseGuard()
    for _ in range(healthy):
        assert guard.check_step(HEALTHY) is None
    for step in steps[:-1]:
        guard.check_step(HEALTHY | step)
    return guard.check_step(HEALTHY | steps[-1])


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"len/mean": 5.9}, "len/mean fell to 5.90"),
        ({"empty_frac": 0.51}, "51% of the answers are empty"),
        ({"kl/mean": 3.1}, "KL jumped to 3.10"),
        ({"entropy": 0.39}, "entropy fell to 0.39"),
        ({"loss/policy": math.nan}, "loss/policy is nan"),
        ({"grad_norm": math.inf}, "grad_norm is inf"),
    ],
)
def test_each_sign_of_a_collapse_is_named(step, reason):
    assert reason in judged(step)


@pytest.mark.parametrize(
    "step", [{"len/mean": 6.1}, {"empty_frac": 0.5}, {"kl/mean": 2.9}, {"entropy": 0.41}, {"score/mean": -9.0}]
)
def test_what_is_only_near_a_collapse_is_none(step):
    assert judged(step) is None


def test_a_kl_far_over_a_tiny_median_but_under_a_nat_is_no_jump():
    guard = CollapseGuard()
    for _ in range(10):
        guard.check_step(HEALTHY | {"kl/mean": 0.01})
    assert guard.check_step(HEALTHY | {"kl/mean": 0.9}) is None
    assert "KL jumped" in guard.check_step(HEALTHY | {"kl/mean": 1.2})


def test_no_rise_of_the_kl_counts_within_its_budget():
    guard = CollapseGuard(kl_budget=6.0)
    for _ in range(10):
        guard.check_step(HEALTHY | {"kl/mean": 0.8})
    assert guard.check_step(HEALTHY | {"kl/mean": 5.9}) is None
    assert "KL jumped" in guard.check_step(HEALTHY | {"kl/mean": 6.1})


def test_a_collapsed_step_does_not_become_the_measure_of_the_next(capsys):
    assert judged({"kl/mean": 9.0}, {"kl/mean": 9.0}) is not None


def test_the_state_survives_a_restart_as_json():
    guard, again = CollapseGuard(), CollapseGuard()
    for _ in range(10):
        guard.check_step(HEALTHY)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for step in ({"len/mean": 5.0}, {"kl/mean": 3.5}, {"entropy": 0.1}):
        assert again.check_step(HEALTHY | step) == guard.check_step(HEALTHY | step) is not None


BEFORE = {"eval/score/mean": 0.0, "eval/judge/mean": 2.0, "eval/judge/error": 0.1}


@pytest.mark.parametrize(
    ("score", "judge", "gamed"),
    [(1.0, 1.5, True), (1.0, 1.65, False), (1.0, 2.5, False), (-0.1, 1.0, False)],
)
def test_a_score_that_rises_while_the_judges_falls_clearly_is_called_gaming(score, judge, gamed):
    now = {"eval/score/mean": score, "eval/judge/mean": judge, "eval/judge/error": 0.1}
    reason = CollapseGuard().check_evaluation(now, BEFORE)
    assert (reason is not None) == gamed
    if gamed:
        assert "rose from 0.00 to 1.00 while the judge's fell from 2.00 to 1.50" in reason


def test_without_a_judge_nobody_can_say_that_the_reward_model_is_gamed():
    assert CollapseGuard().check_evaluation({"eval/score/mean": 1.0}, BEFORE) is None


# ---- what a run does ----
@pytest.fixture
def world(tiny_base, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    return {
        "base_model_name": tiny_base,
        "sft_model_lora_path": random_adapter(tiny_base, tmp_path / "sft"),
        "reward_model_lora_path": random_adapter(tiny_base, tmp_path / "reward", "reward", seed=1),
        "dataset_name": str(prompts),
    }


@pytest.fixture
def collapse_at_3(monkeypatch):
    """From the third step on nothing but empty answers, or so the metrics say."""
    describe = rl_training.metrics.describe
    steps = []

    def collapsed(*args):
        steps.append(1)
        return describe(*args) | ({"empty_frac": 1.0} if len(steps) >= 3 else {})

    monkeypatch.setattr(rl_training.metrics, "describe", collapsed)


def test_stopping_leaves_no_final_adapter_and_writes_the_reason(world, tmp_path, collapse_at_3):
    out = tmp_path / "out"
    with pytest.raises(Collapse, match="100% of the answers are empty"):
        rl_training.main(arguments(world, out, steps=40, save_freq=1))
    assert not (out / "adapter_model.safetensors").exists()
    assert (out / "step_2").is_dir()
    assert not (out / "step_3").exists()
    assert read_metrics(out)[-1]["guard"] == "100% of the answers are empty"


def test_rolling_back_doubles_the_price_and_gives_up_after_its_limit(world, tmp_path, collapse_at_3):
    out = tmp_path / "out"
    with pytest.raises(Collapse):
        rl_training.main(arguments(world, out, steps=80, on_collapse="rollback", max_rollbacks=2))
    rows = read_metrics(out)
    assert [row["kl_coef"] for row in rows] == [0.5, 0.5, 0.5, 1.0, 2.0]
    # The third step left from weights that were moved twice; the ones after it from weights moved once.
    assert [bool(row.get("guard")) for row in rows] == [False, False, True, True, True]


def test_a_rollback_brings_back_the_weights_the_last_good_answers_came_from(
    world, tmp_path, collapse_at_3, monkeypatch
):
    sums, step = [], rl_training.train_step

    def watched(loop, number):
        sums.append(sum(p.double().sum().item() for p in loop.roles.trainable().values()))
        return step(loop, number)

    monkeypatch.setattr(rl_training, "train_step", watched)
    with pytest.raises(Collapse):
        rl_training.main(arguments(world, tmp_path / "out", steps=80, on_collapse="rollback", max_rollbacks=1))
    assert sums[3] == sums[1]
    assert sums[2] != sums[1]


def test_the_guard_can_be_left_out(world, tmp_path, collapse_at_3):
    rl_training.main(arguments(world, tmp_path / "out", steps=32, on_collapse="off"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_evaluation_keeps_the_best_by_the_held_out_judge(world, tmp_path, tiny_base):
    judge = random_adapter(tiny_base, tmp_path / "judge", "reward", seed=5)
    out = tmp_path / "out"
    rl_training.main(arguments(world, out, steps=40, eval_freq=1, eval_size=4, judge_lora_path=judge))
    rows = read_metrics(out)
    best = max(rows, key=lambda row: row["eval/judge/mean"])
    kept = json.loads((out / "best" / "run.json").read_text())
    assert kept["metrics"]["step"] == best["step"]
    assert {"eval/score/mean", "eval/kl/mean", "eval/len/mean", "eval/empty_frac"} <= set(rows[0])
    assert abs(rows[0]["eval/kl/mean"]) >= 0


def test_without_a_judge_the_best_stays_within_the_kl_budget(world, tmp_path):
    out = tmp_path / "out"
    rl_training.main(arguments(world, out, steps=24, eval_freq=1, eval_size=4, best_kl_budget=-1e9))
    assert not (out / "best").exists()


@pytest.fixture
def judge_turns(monkeypatch):
    """From the third evaluation on the judge turns away while the score rises, or so the metrics say."""
    evaluate, count = rl_training.evaluation.evaluate, []

    def turned(loop):
        metrics, answers = evaluate(loop)
        count.append(1)
        fall = -100.0 if len(count) >= 4 else float(len(count))
        return metrics | {"eval/judge/mean": fall, "eval/judge/error": 0.1, "eval/score/mean": len(count)}, answers

    monkeypatch.setattr(rl_training.evaluation, "evaluate", turned)


def test_a_gamed_reward_model_stops_the_run_and_best_is_what_the_judge_liked(world, tmp_path, tiny_base, judge_turns):
    judge, out = random_adapter(tiny_base, tmp_path / "judge", "reward", seed=5), tmp_path / "out"
    with pytest.raises(Collapse, match="being gamed"):
        rl_training.main(arguments(world, out, steps=80, eval_freq=1, eval_size=4, judge_lora_path=judge, save_freq=1))
    state = json.loads((out / "best" / "state.json").read_text())
    # The first evaluation is the SFT model's; the fourth is the one that the guard stopped at.
    assert state["best"] == pytest.approx({"step": 2, "value": 3.0, "gain": 2.0, "error": math.hypot(0.1, 0.1)})
    assert not (out / "step_3").exists()


def test_with_a_judge_a_rollback_goes_back_to_what_it_approved(world, tmp_path, tiny_base, judge_turns):
    judge, out = random_adapter(tiny_base, tmp_path / "judge", "reward", seed=5), tmp_path / "out"
    flags = {"eval_freq": 2, "eval_size": 4, "judge_lora_path": judge, "save_freq": 1, "on_collapse": "rollback"}
    # Evaluations: SFT, steps 2, 4 and 6; the one at 6 is bad, and step 7 begins from the weights of step 4.
    rl_training.main(arguments(world, out, steps=56, **flags))
    rows = read_metrics(out)
    assert [row["step"] for row in rows if "guard" in row] == [6]
    assert rows[6]["kl_coef"] == 2 * rows[5]["kl_coef"]
    good = load_file(out / "step_5" / "good.safetensors")
    approved = list(load_file(out / "step_4" / "adapter_model.safetensors").values())
    assert all(any(torch.equal(tensor, other) for other in good.values()) for tensor in approved)


def test_a_rollback_after_a_restart_is_the_rollback_of_an_uninterrupted_run(world, tmp_path, monkeypatch):
    def main(out, collapse_at, **flags):
        describe = rl_training.metrics.describe
        seen = []

        def described(*args):
            seen.append(1)
            return describe(*args) | ({"empty_frac": 1.0} if len(seen) == collapse_at else {})

        with monkeypatch.context() as patch:
            patch.setattr(rl_training.metrics, "describe", described)
            rl_training.main(arguments(world, out, save_freq=1, on_collapse="rollback", **flags))

    main(tmp_path / "whole", 3, steps=40)
    main(tmp_path / "parts", 9, steps=16)
    main(tmp_path / "parts", 1, steps=40, resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_without_a_price_of_kl_gets_one_at_its_first_rollback(world, tmp_path, collapse_at_3):
    with pytest.raises(Collapse):
        rl_training.main(
            arguments(world, tmp_path / "out", steps=80, on_collapse="rollback", init_kl_coef=0, max_rollbacks=2)
        )
    assert [row["kl_coef"] for row in read_metrics(tmp_path / "out")] == pytest.approx([0, 0, 0, 0.1, 0.2])
