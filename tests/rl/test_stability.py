"""The tools that keep PPO stable: critic-free advantages, an own critic, warm-ups, schedules, clips, charts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from adapters import random_adapter
from safetensors.torch import load_file
from test_rl_training import PROMPTS, arguments, run, stored_rollout

import rl_training
from rlhf.artefacts.run_json import load_run
from rlhf.models.generation import Sampling
from rlhf.ppo import FixedKLController, gae, group_advantages, token_rewards, whiten
from rlhf.rl.charts import draw_run, events_of, fit_overoptimization, overoptimization, panels_of
from rlhf.rl.experience import set_advantages
from rlhf.rl.roles import critic_values, load_roles
from rlhf.rl.update import update
from rlhf.run.log import MetricsLog, read_lines, read_metrics
from rlhf.run.stopping import Collapse


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    return {
        "base_model_name": tiny_base,
        "sft_model_lora_path": random_adapter(tiny_base, folder / "sft"),
        "reward_model_lora_path": random_adapter(tiny_base, folder / "reward", "reward", seed=1),
        "dataset_name": str(prompts),
    }


def parts(folder, name="adapter_model.safetensors"):
    return load_file(Path(folder) / name)


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- critic-free advantages ----
@pytest.fixture(scope="module", params=["rloo", "grpo"])
def critic_free(request, world, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    return run(world, out, advantage=request.param, save_freq=1, sample_freq=1, init_kl_coef=0.2)


def test_without_a_critic_there_is_no_value_loss_and_no_value_file(critic_free):
    assert not list(critic_free.rglob("value_*"))
    for row in read_metrics(critic_free):
        assert not [name for name in row if "value" in name or name == "var_explained"]
        assert {"loss/policy", "policykl", "kl/mean", "entropy", "grad_norm", "len/mean"} <= set(row)


def test_the_answers_to_a_prompt_stand_side_by_side_and_divide_the_batch(critic_free):
    queries = [row["query"] for row in read_lines(critic_free / "samples.jsonl") if row["step"] == 1]
    assert len(queries) == 8
    assert queries[:4] == [queries[0]] * 4
    assert queries[4:] == [queries[4]] * 4
    assert queries[0] != queries[4]


def test_a_critic_free_run_moves_the_policy_and_restarts_with_the_same_bytes(critic_free, world, tmp_path):
    assert not same(parts(critic_free), parts(world["sft_model_lora_path"]))
    kind = load_run(critic_free)["arguments"]["advantage"]
    again = tmp_path / "again"
    run(world, again, advantage=kind, save_freq=1, steps=8, init_kl_coef=0.2)
    run(world, again, advantage=kind, save_freq=1, init_kl_coef=0.2, resume_from_checkpoint=True)
    assert same(parts(again), parts(critic_free))


def a_loop(world, **changed):
    """The few things of a loop that advantages are made with."""
    return rl_training.PPOLoop(
        args=arguments(world, "unused", **changed), accelerator=Accelerator(), prompt_format=None, roles=None,
        prompts=[], eval_prompts=[], sampling=None, optimizer=None, kl_controller=FixedKLController(0.3), guard=None,
    )  # fmt: skip


def a_scored_rollout():
    rollout = stored_rollout(None)
    rollout.returns = None
    rollout.ref_logprobs = rollout.logprobs - 0.1 * rollout.mask * torch.rand(8, 8, generator=torch.manual_seed(1))
    return rollout, torch.randn(8, generator=torch.manual_seed(2))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_price_of_kl_is_in_what_a_group_is_compared_by(world, kind):
    rollout, scores = a_scored_rollout()
    set_advantages(a_loop(world, advantage=kind, group_size=4), rollout, scores)
    worth = scores - 0.3 * ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    expected = group_advantages(worth, 4, kind)[:, None] * rollout.mask
    torch.testing.assert_close(rollout.advantages, expected)
    assert rollout.returns is None


@pytest.mark.parametrize("whitened", [True, False])
def test_gae_advantages_are_whitened_only_on_demand(world, whitened):
    rollout, scores = a_scored_rollout()
    set_advantages(a_loop(world, whiten_advantages=whitened), rollout, scores)
    rewards, _ = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.3)
    plain, returns = gae(rewards, rollout.values, rollout.mask, 1.0, 0.95)
    torch.testing.assert_close(rollout.advantages, whiten(plain, rollout.mask) if whitened else plain)
    torch.testing.assert_close(rollout.returns, returns)


def test_whitened_rewards_have_unit_variance_and_keep_their_mean(world):
    rollout, scores = a_scored_rollout()
    set_advantages(a_loop(world, whiten_rewards=True, gamma=0.0, lam=0.0, whiten_advantages=False), rollout, scores)
    rewards, _ = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.3)
    # Without discount and trace the return of a token is its own reward.
    found = rollout.returns[rollout.mask]
    assert found.std().item() == pytest.approx(1, abs=1e-5)
    assert found.mean().item() == pytest.approx(rewards[rollout.mask].mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"advantage": "rloo", "group_size": 1}, "--group_size 1 is too few for --advantage rloo"),
        ({"advantage": "grpo", "group_size": 3}, "--batch_size 8 must be a multiple of --group_size 3"),
        ({"advantage": "rloo", "value_lora": True}, "--advantage rloo has no critic"),
        ({"advantage": "rloo", "critic_warmup_steps": 2}, "--advantage rloo has no critic"),
        ({"score_clip": -1}, "--score_clip -1.0 must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused_with_code_2(world, flags, complaint, capsys):
    with pytest.raises(SystemExit) as code:
        arguments(world, "unused", **flags)
    assert code.value.code == 2
    assert complaint in capsys.readouterr().err


def test_groups_default_to_one_answer_with_a_critic_and_four_without(world):
    assert arguments(world, "unused").group_size == 1
    assert arguments(world, "unused", advantage="rloo").group_size == 4


# ---- the critic ----
def test_in_the_warm_up_only_the_value_head_learns(world, tmp_path):
    out = run(world, tmp_path / "out", critic_warmup_steps=2, save_freq=1)
    sft = parts(world["sft_model_lora_path"])
    assert same(parts(out / "step_2"), sft)
    assert not same(parts(out / "step_3"), sft)
    heads = [parts(out / f"step_{n}", "value_head.safetensors")["weight"] for n in (1, 2)]
    assert heads[0].abs().sum() > 0
    assert not torch.equal(*heads)
    assert [row["policykl"] for row in read_metrics(out)][:2] == pytest.approx([0, 0], abs=1e-6)


@pytest.fixture(scope="module")
def own_critic(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("critic") / "out", value_lora=True, save_freq=1, critic_warmup_steps=1)


def test_a_critic_of_its_own_starts_as_the_reward_adapter_and_learns_apart(own_critic, world):
    critic = [parts(own_critic / f"step_{n}" / "value_adapter") for n in (1, 3)]
    reward = {n: t for n, t in parts(world["reward_model_lora_path"]).items() if "lora_" in n}
    assert {name: t.shape for name, t in critic[0].items()} == {name: t.shape for name, t in reward.items()}
    assert not same(*critic)
    assert same(parts(own_critic / "step_1"), parts(world["sft_model_lora_path"]))
    assert not same(parts(own_critic), parts(world["sft_model_lora_path"]))


def test_a_critic_of_its_own_restarts_with_the_same_bytes(own_critic, world, tmp_path):
    again = tmp_path / "again"
    flags = {"value_lora": True, "save_freq": 1, "critic_warmup_steps": 1}
    run(world, again, steps=16, **flags)
    run(world, again, resume_from_checkpoint=True, **flags)
    for name in ("adapter_model.safetensors", "value_head.safetensors", "value_adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (own_critic / name).read_bytes(), name


def own_critic_after_an_update(world, rollout, checkpointing):
    args = arguments(world, "unused", learning_rate=1e-2, mini_batch_size=8, gradient_accumulation_steps=1)
    roles = load_roles(
        args.base_model_name, args.sft_model_lora_path, args.reward_model_lora_path, dtype=torch.float32, device="cpu",
        critic="adapter",
    )  # fmt: skip
    torch.nn.init.ones_(roles.value_head.weight)
    if checkpointing:
        roles.enable_checkpointing()
    before = {name: p.detach().clone() for name, p in roles.peft_model.named_parameters()}
    optimizer = torch.optim.Adam(roles.trainable().values(), lr=1e-2, eps=1e-5)
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8, suppress_empty=False)
    update(roles, optimizer, rollout, sampling, args, Accelerator(), torch.Generator().manual_seed(0))
    after = {name: p.detach().clone() for name, p in roles.peft_model.named_parameters()}
    return before, after, roles


def test_an_update_with_an_own_critic_moves_policy_and_critic_and_nothing_else(world):
    rollout = stored_rollout(None)
    before, after, roles = own_critic_after_an_update(world, rollout, checkpointing=False)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    # A LoRA matrix B that meets an A moves at once, and both adapters have moved somewhere.
    assert moved <= set(roles.adapter("policy")) | set(roles.adapter("value"))
    assert moved & set(roles.adapter("policy"))
    assert moved & set(roles.adapter("value"))
    _, recomputed, _ = own_critic_after_an_update(world, rollout, checkpointing=True)
    for name, parameter in after.items():
        torch.testing.assert_close(recomputed[name], parameter, atol=1e-5, rtol=0)


def test_an_own_critics_values_are_those_of_its_adapter_alone(world):
    roles = load_roles(
        world["base_model_name"], world["sft_model_lora_path"], world["reward_model_lora_path"],
        dtype=torch.float32, device="cpu", critic="adapter",
    )  # fmt: skip
    torch.nn.init.ones_(roles.value_head.weight)
    rollout = stored_rollout(None)
    values = critic_values(roles, rollout, rows_at_once=3)
    with roles.use("reward") as model, torch.no_grad():
        # At the start the critic's adapter is a copy of the reward adapter: its hidden states are the reward model's.
        found = model.model(input_ids=rollout.input_ids[:1, 5 - int(rollout.query_mask[0].sum()) :]).last_hidden_state
    first = int(rollout.query_mask[0].sum()) - 1
    torch.testing.assert_close(values[0, 0], found[0, first].sum(), atol=1e-4, rtol=0)
    assert (values[~rollout.mask] == 0).all()


# ---- schedule, clip ----
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"lr_scheduler_type": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "cosine"}, [1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
        ({"lr_warmup_steps": 3}, [0.25, 0.5, 0.75, 1]),
        ({"lr_warmup_steps": 2, "lr_scheduler_type": "linear"}, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule(world, flags, expected):
    loop = a_loop(world, steps=32, learning_rate=0.01, **flags)
    loop.optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    found = []
    for step in range(4):
        loop.set_learning_rate(step)
        found.append(loop.optimizer.param_groups[0]["lr"] / 0.01)
    assert found == pytest.approx(expected)


def test_the_schedule_is_what_a_run_goes_by(world, tmp_path):
    out = run(world, tmp_path / "out", lr_scheduler_type="linear", learning_rate=3e-3)
    assert [row["lr"] for row in read_metrics(out)] == pytest.approx([3e-3, 2e-3, 1e-3])


def test_scores_stay_within_their_clip(world, tmp_path):
    out = run(world, tmp_path / "out", score_clip=0.01, sample_freq=1, check=False)
    rows = read_lines(out / "samples.jsonl")
    assert max(abs(row["raw_score"]) for row in rows) > 0.05
    assert max(abs(row["score"]) for row in rows) <= 0.01 + 1e-6


# ---- evaluation, chart, trackers ----
def test_the_sft_model_is_evaluated_before_the_first_step_and_the_chart_shows_both_scores(world, tmp_path, tiny_base):
    judge = random_adapter(tiny_base, tmp_path / "judge", "reward", seed=5)
    out = run(world, tmp_path / "out", eval_freq=1, eval_size=4, judge_lora_path=judge, steps=40)
    rows = read_metrics(out)
    assert rows[0]["eval_start/kl/mean"] == pytest.approx(0, abs=1e-5)
    assert "eval_start/judge/mean" in rows[0]
    assert not [name for name in rows[1] if name.startswith("eval_start/")]
    curves = overoptimization(rows)
    assert set(curves) == {"proxy", "judge"}
    assert curves["judge"][1][2] == pytest.approx(rows[2]["eval/judge/mean"] - rows[0]["eval_start/judge/mean"])
    assert (out / "chart.png").stat().st_size > 10_000
    assert (out / "score_against_kl.png").stat().st_size > 10_000
    assert "The run is finished, 5 steps are logged" in (out / "report.html").read_text(encoding="utf-8")

    # Six panels; what was evaluated begins with the SFT model, and the step in best/ is marked.
    panels = {panel.title.split()[0]: panel for panel in panels_of(rows)}
    assert set(panels) == {"Score:", "Score", "KL:", "Judge:", "Length", "Entropy:"}
    assert panels["Judge:"].steps == [0, 1, 2, 3, 4, 5]
    assert panels["Judge:"].values[0] == rows[0]["eval_start/judge/mean"]
    best = json.loads((out / "best" / "state.json").read_text())["best"]["step"]
    assert [event.steps for event in events_of(out, [*rows, {"step": 6, "guard": "why"}])] == [[best], [6]]
    answers = [row for row in read_lines(out / "samples.jsonl") if "evaluation" in row]
    assert {row["step"] for row in answers} == {1, 2, 3, 4, 5}
    assert all("judge" in row for row in answers)


def test_a_chart_needs_a_step_and_nothing_else(tmp_path):
    assert draw_run(tmp_path) is None


def test_the_law_of_over_optimisation_is_found_again():
    d = np.linspace(0.1, 4, 12)
    assert fit_overoptimization(d, d * (1.5 - 0.7 * np.log(d))) == pytest.approx((1.5, 0.7))


def test_the_tracker_is_closed_when_the_guard_stops_a_run(world, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(MetricsLog, "close", lambda self: closed.append(True))
    monkeypatch.setattr(rl_training.metrics, "describe", lambda *a, **k: dict.fromkeys(COLLAPSED, 1.0))
    with pytest.raises(Collapse):
        run(world, tmp_path / "out")
    assert closed == [True]
    assert (tmp_path / "out" / "chart.png").is_file()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The guard stepped in at step 1: 100% of the answers are empty" in page


COLLAPSED = ("score/mean", "kl/mean", "empty_frac", "len/mean", "len/min", "entropy")


def test_tensorboard_gets_samples_in_words(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(world, tmp_path / "out", log_with="tensorboard", sample_freq=1)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert "samples/text_summary" in events.Tags()["tensors"]


def test_fewer_held_out_prompts_than_processes_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 9)
    with pytest.raises(ValueError, match="4 held-out prompts for 9 processes"):
        run(world, tmp_path / "out", eval_freq=1, eval_size=4)
