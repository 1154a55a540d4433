"""PPO with several reward models: how they are combined and logged, one as before, stopped and resumed, refusals."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from stages import words
from test_gate import plant_audit
from test_guard import HEALTHY
from test_rl_training import PROMPTS, tensors, timeless

import rl_training
from rlhf.artefacts.fingerprints import adapter_hash
from rlhf.artefacts.run_json import load_run
from rlhf.reward.ensemble import COMBINATIONS
from rlhf.rl.ensemble_flags import EnsembleFlags
from rlhf.rl.guard import CollapseGuard, disagreement
from rlhf.run.log import read_metrics


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensembles")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    members = [random_adapter(tiny_base, folder / f"reward_{n}", "reward", seed=n) for n in (1, 2, 3, 4)]
    return {
        "base_model_name": tiny_base, "sft_model_lora_path": random_adapter(tiny_base, folder / "sft"),
        "dataset_name": prompts, "steps": 24, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2,
        "gradient_accumulation_steps": 2, "output_max_length": 8, "learning_rate": 1e-3, "check": False,
        "save_freq": 1, "reward_transform": "standardize", "init_kl_coef": 0.2,
    }, members  # fmt: skip


def arguments(flags, members, output_dir, **changed):
    given = words(flags | {"output_dir": output_dir} | changed)
    return rl_training.parse_args([*given, "--reward_model_lora_path", *map(str, members)])


def run(flags, members, output_dir, **changed) -> Path:
    rl_training.main(arguments(flags, members, output_dir, **changed))
    return Path(output_dir)


# ---- the command line ----
def test_one_path_is_a_text_as_before_and_several_are_roles_in_their_order(world):
    flags, members = world
    one = arguments(flags, members[:1], "o")
    assert one.reward_model_lora_path == members[0]
    assert one.reward_roles == {"reward": members[0]}
    assert arguments(flags, members, "o").reward_roles == dict(
        zip(("reward", "reward_2", "reward_3", "reward_4"), members, strict=True)
    )
    choices = EnsembleFlags.__dataclass_fields__["reward_ensemble"].metadata["choices"]
    assert tuple(choices) == COMBINATIONS


@pytest.mark.parametrize(
    ("paths", "flags", "complaint"),
    [
        (["a"], ["--reward_ensemble", "min"], "give two or more after --reward_model_lora_path"),
        (["a", "b"], ["--ensemble_penalty", "2"], "is for --reward_ensemble mean_minus_std"),
        (["a", "b", "a"], [], "has a twice"),
        (["a", "b"], ["--ensemble_spread_limit", "-1"], "--ensemble_spread_limit -1.0 must be at least 0"),
        (["a", "b"], ["--reward_weights", "1", "1"], "has 2 numbers for 1 parts"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(capsys, paths, flags, complaint):
    with pytest.raises(SystemExit):
        rl_training.parse_args(["--base_model_name", "b", "--reward_model_lora_path", *paths, *flags])
    assert complaint in capsys.readouterr().err


def test_the_plan_counts_every_member(world, capsys):
    flags, members = world
    run(flags, members, "unused", plan=True)
    said = capsys.readouterr().out
    assert all(f"{role} adapter" in said for role in ("reward", "reward_2", "reward_3", "reward_4"))


# ---- a run ----
@pytest.fixture(scope="module")
def four(world, tmp_path_factory):
    flags, members = world
    out = tmp_path_factory.mktemp("four") / "out"
    return run(flags, members, out, reward_ensemble="mean_minus_std", ensemble_penalty=0.5, sample_freq=1)


def test_members_are_standardized_one_by_one_then_combined_and_all_is_logged(four):
    stats = json.loads((four / "step_1" / "state.json").read_text())["reward_stats"]
    names = ["reward_model", "reward_model_2", "reward_model_3", "reward_model_4"]
    rows = [json.loads(line) for line in (four / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in read_metrics(four):
        spreads = []
        for row in (row for row in rows if row["step"] == record["step"]):
            units = []
            for name, key in zip(names, ["", *(f"{name}/" for name in names[1:])], strict=True):
                units.append((row[f"reward/{name}"] - stats[f"{key}mean"]) / stats[f"{key}std"])
            mean = sum(units) / 4
            std = math.sqrt(sum((unit - mean) ** 2 for unit in units) / 3)
            spreads.append(std)
            assert row["raw_score"] == pytest.approx(mean - 0.5 * std, abs=1e-4)
            assert row["score"] == pytest.approx(min(5, max(-5, mean - 0.5 * std)), abs=1e-4)
        assert record["score/spread"] == pytest.approx(sum(spreads) / 8, abs=1e-4)
        for name in names:
            own = [row[f"reward/{name}"] for row in rows if row["step"] == record["step"]]
            assert record[f"reward/{name}/mean"] == pytest.approx(sum(own) / 8, abs=1e-4)


def test_run_json_keeps_the_fingerprint_of_each_member(four, world):
    parents = load_run(four)["parents"]
    for role, folder in zip(("reward", "reward_2", "reward_3", "reward_4"), world[1], strict=True):
        assert parents[role]["path"] == folder
        assert parents[role]["adapter"] == adapter_hash(folder)


@pytest.fixture(scope="module")
def one_and_copies(world, tmp_path_factory):
    """A run of one reward model, and four copies of that reward model."""
    flags, members = world
    folder = tmp_path_factory.mktemp("equal")
    copies = [shutil.copytree(members[0], folder / f"copy_{number}") for number in range(4)]
    for copy in copies:
        plant_audit(copy, {})
    return run(flags, copies[:1], folder / "one", steps=16, save_freq=9), copies


@pytest.mark.parametrize("how", COMBINATIONS)
def test_equal_members_give_the_run_of_one(world, one_and_copies, tmp_path, how):
    one, copies = one_and_copies
    several = run(world[0], copies, tmp_path / "several", steps=16, save_freq=9, reward_ensemble=how)
    assert all(torch.equal(tensors(one)[name], tensor) for name, tensor in tensors(several).items())
    before = timeless(read_metrics(one))
    after = timeless(read_metrics(several))
    # The raw score of one is in units of its own; all the rest is the same.
    shared = before[0].keys() - {"score/raw_mean"}
    for row, other in zip(before, after, strict=True):
        assert {name: other[name] for name in shared} == {name: row[name] for name in shared}
        assert other["score/spread"] < 1e-6
    assert not {"score/spread", "reward/reward_model/mean"} & before[0].keys()


def test_a_broken_off_run_goes_on_to_the_same_bytes(world, four, tmp_path, monkeypatch):
    flags, members = world
    changed = {"reward_ensemble": "mean_minus_std", "ensemble_penalty": 0.5, "sample_freq": 1}
    loss, calls = rl_training.update.policy_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("the power is gone")
        return loss(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power is gone"):
        patch.setattr(rl_training.update, "policy_loss", broken)
        run(flags, members, tmp_path / "out", **changed)
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [1, 2]
    out = run(flags, members, tmp_path / "out", **changed, resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (out / name).read_bytes() == (four / name).read_bytes()
    assert timeless(read_metrics(out)) == timeless(read_metrics(four))
    assert (out / "samples.jsonl").read_bytes() == (four / "samples.jsonl").read_bytes()


def test_other_members_or_another_combination_are_refused_at_resume(world, four, tmp_path):
    flags, members = world
    changed = {"reward_ensemble": "mean_minus_std", "ensemble_penalty": 0.5, "resume_from_checkpoint": four / "step_2"}
    for paths, flag, complaint in (
        (members[:3], {}, "the reward_4 adapter"),
        ([*members[:2], members[3], members[2]], {}, "the reward_3 adapter, the reward_4 adapter"),
        (
            members,
            {"reward_ensemble": "min", "ensemble_penalty": 1},
            r"--reward_ensemble \(was mean_minus_std, is min\)",
        ),
    ):
        with pytest.raises(ValueError, match=complaint):
            run(flags, paths, tmp_path / "out", **changed | flag)


# ---- refusals and the gate ----
def test_a_member_of_another_base_and_one_that_is_no_reward_model_are_named(world, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_training.roles, "load_roles", lambda *a, **k: pytest.fail("a model was loaded"))
    flags, members = world
    other = random_adapter(tiny_llama, tmp_path / "other", "reward")
    for wrong, complaint in (
        (other, "--reward_model_lora_path .*other.* another base model_type"),
        (flags["sft_model_lora_path"], "--reward_model_lora_path .*sft.* stage 'sft', but reward is wanted here"),
    ):
        with pytest.raises(ValueError, match=complaint):
            run(flags, [members[0], wrong], tmp_path / "out")


def test_the_gate_names_the_one_bad_member_and_tries_the_one_without_an_audit(world, tmp_path, capsys):
    flags, members = world
    copies = [shutil.copytree(member, tmp_path / f"member_{n}") for n, member in enumerate(members[:3])]
    plant_audit(copies[0], {})
    plant_audit(copies[1], {"empty": 0.63})
    with pytest.raises(ValueError, match=r"the reward model \S+member_1 prefers degenerate .* empty wins on 63%"):
        run(flags, copies, tmp_path / "out", reward_gate="refuse")
    plant_audit(copies[1], {})
    run(flags, copies, tmp_path / "out", steps=8)
    said = capsys.readouterr().out
    assert f"quick audit of the reward model {copies[2]}" in said or "could not be tried on any" in said
    assert said.count("quick audit of") <= 1


# ---- the guard ----
def test_disagreement_that_passes_its_limit_while_the_score_rises_is_named():
    start = {"score/spread": 0.4, "score/mean": 0.0}
    now = {"score/spread": 0.9, "score/mean": 1.5}
    assert "their spread rose from 0.40 to 0.90 while their combined score rose from 0.00 to 1.50" in disagreement(
        now, start, 2.0
    )
    for quiet in ({"score/spread": 0.8}, {"score/mean": -0.1}):
        assert disagreement(now | quiet, start, 2.0) is None
    assert disagreement(now, start, 0.0) is None
    # Of nothing a multiple is nothing.
    assert disagreement(now | {"score/spread": 0.01}, start | {"score/spread": 0.0}, 2.0) is None
    assert disagreement({"score/mean": 1.0}, {}, 2.0) is None


def test_the_guard_measures_the_spread_from_the_first_step_on_also_after_a_restart():
    guard, again = CollapseGuard(spread_limit=2.0), CollapseGuard(spread_limit=2.0)
    assert guard.check_step(HEALTHY | {"score/spread": 0.4, "score/mean": 0.0}) is None
    assert guard.check_step(HEALTHY | {"score/spread": 0.6, "score/mean": 1.0}) is None
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for each in (guard, again):
        assert "the reward models disagree" in each.check_step(HEALTHY | {"score/spread": 0.9, "score/mean": 1.0})
    # One reward model leaves nothing behind that a checkpoint would not have had before.
    alone = CollapseGuard(spread_limit=2.0)
    alone.check_step(HEALTHY)
    assert alone.state_dict()["start"].keys() == {"len/mean", "entropy"}
