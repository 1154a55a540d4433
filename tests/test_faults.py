"""Nothing is lost: kill -9 at each write and at random times, signals, a full disk, one writer: the same bytes."""

import json
import random
import signal

import pytest
from forked import INT, KILL, TERM, ends_the_same

from rlhf.checkpoint import MANIFEST, defect, newest_complete, numbered

pytestmark = pytest.mark.slow


# ---- kill -9 at each write ----
PPO_BLOWS = {
    "before the folder": {"target": "rlhf.state:publish", "when": "before", "call": 2},
    "after the adapter": {"target": "rlhf.state:save_adapter", "when": "after", "call": 2},
    "after the head": {"target": "rlhf.state:save_critic", "when": "after", "call": 2},
    "after run.json": {"target": "rlhf.state:write_run", "when": "after", "call": 2},
    "after the optimizer": {"target": "rlhf.checkpoint:save_file", "when": "after", "call": 3},
    "after the state": {"target": "rlhf.state:save_state", "when": "after", "call": 2},
    "after the last good weights": {"target": "rlhf.state:save_good", "when": "after", "call": 2},
    "before the manifest": {"target": "rlhf.checkpoint:write_manifest", "when": "before", "call": 3},
    "after the manifest": {"target": "rlhf.checkpoint:write_manifest", "when": "after", "call": 3},
    "after the rename": {"target": "rlhf.state:rotate", "when": "before", "call": 4},
    "during rotation": {"target": "shutil:rmtree", "when": "before", "caller": "rotate"},
    "in the update": {"target": "rlhf.update:policy_loss", "when": "before", "call": 9},
}
TRAINER_BLOWS = {
    "before the folder": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 2},
    "after the adapter": {"target": "rlhf.trainer:save_adapter", "when": "after", "call": 2},
    "after run.json": {"target": "rlhf.trainer:write_run", "when": "after", "call": 2},
    "before the optimizer": {
        "target": "transformers:Trainer._save_optimizer_and_scheduler", "when": "before", "call": 2},
    "after the optimizer": {
        "target": "transformers:Trainer._save_optimizer_and_scheduler", "when": "after", "call": 2},
    "after the random state": {"target": "transformers:Trainer._save_rng_state", "when": "after", "call": 2},
    "after the trainer's state": {"target": "transformers:TrainerState.save_to_json", "when": "after", "call": 2},
    "before the manifest": {"target": "rlhf.trainer:write_manifest", "when": "before", "call": 2},
    "after the manifest": {"target": "rlhf.trainer:write_manifest", "when": "after", "call": 2},
    "during rotation": {"target": "shutil:rmtree", "when": "before", "caller": "rotate"},
}  # fmt: skip
KILLS = [("ppo", point) for point in PPO_BLOWS] + [(s, point) for s in ("sft", "reward") for point in TRAINER_BLOWS]


@pytest.mark.parametrize(("name", "point"), KILLS, ids=lambda value: value)
def test_killed_at_a_write_and_given_again_a_run_ends_with_the_same_bytes(
    zygote, stages, whole, tmp_path, name, point
):
    blows, out = PPO_BLOWS if name == "ppo" else TRAINER_BLOWS, tmp_path / "out"
    assert zygote.run(stages[name], out, signum=KILL, **blows[point]) == 128 + KILL, zygote.said()[-3000:]
    for folder in numbered(out, stages[name].prefix):
        assert defect(folder) is None or folder != newest_complete(out, stages[name].prefix)
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_killed_at_random_times_again_and_again_a_run_still_ends_with_the_same_bytes(
    zygote, stages, whole, tmp_path, name
):
    out, rng = tmp_path / "out", random.Random(f"kills {name}")
    kills = sum(
        zygote.run(stages[name], out, signum=KILL, delay=rng.uniform(0.1, 2.5)) == 128 + KILL for _ in range(5)
    )
    assert kills or (out / "run.json").is_file()
    ends_the_same(zygote, stages, whole, name, out)


# ---- signals ----
SIGNALS = {
    "ppo, in the rollout": ("ppo", {"target": "rlhf.rollout:_choose", "when": "before", "call": 170}),
    "ppo, in the update": ("ppo", {"target": "rlhf.update:policy_loss", "when": "before", "call": 9}),
    "ppo, in the evaluation": ("ppo", {"target": "rlhf.evaluation:describe_samples", "when": "before", "call": 2}),
    "ppo, in the saving": ("ppo", {"target": "rlhf.state:save_critic", "when": "before", "call": 2}),
    "sft, in a step": ("sft", {"target": "torch.optim:AdamW.step", "when": "after", "call": 3}),
    "sft, in the evaluation": ("sft", {"target": "sft_training:token_mean", "when": "before", "call": 2}),
    "reward, in a step": ("reward", {"target": "reward_modeling:pairwise_loss", "when": "after", "call": 3}),
    "reward, in the evaluation": ("reward", {"target": "reward_modeling:pairwise_loss", "when": "after", "call": 6}),
    "reward, in the saving": ("reward", {"target": "rlhf.trainer:save_adapter", "when": "before", "call": 2}),
}


@pytest.mark.parametrize("case", SIGNALS)
@pytest.mark.parametrize("signum", [TERM, INT], ids=["SIGTERM", "SIGINT"])
def test_on_a_signal_a_run_saves_itself_says_how_to_go_on_and_writes_no_final_adapter(
    zygote, stages, whole, tmp_path, case, signum
):
    if signum == INT and "rollout" not in case and "step" not in case:
        pytest.skip("one signal each is enough here")
    (name, blow), out = SIGNALS[case], tmp_path / "out"
    assert zygote.run(stages[name], out, signum=signum, **blow) == 128 + signum, zygote.said()[-3000:]
    assert f"stopped by {signal.Signals(signum).name}" in zygote.said()
    assert "--resume_from_checkpoint True" in zygote.said()
    assert not (out / "adapter_model.safetensors").exists()
    assert newest_complete(out, stages[name].prefix) is not None
    ends_the_same(zygote, stages, whole, name, out)


# ---- damage ----
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "bit"])
def test_a_checkpoint_with_any_file_damaged_is_reported_and_passed_over(zygote, stages, tmp_path, damage, capsys):
    out = tmp_path / "out"
    assert zygote.run(stages["ppo"], out, signum=KILL, target="rlhf.update:policy_loss", when="before", call=14) == 137
    newest = numbered(out, "step_")[-1]
    listed = json.loads((newest / MANIFEST).read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.safetensors", "state.json", "good.safetensors"} <= set(listed)
    for name in [*listed, MANIFEST]:
        file, content = newest / name, (newest / name).read_bytes()
        if damage == "gone":
            file.unlink()
        elif damage == "bit":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
        expected = (
            newest if name == MANIFEST and damage == "bit" and defect(newest) is None else numbered(out, "step_")[0]
        )
        assert newest_complete(out, "step_") == expected, name
        assert expected == newest or "ignoring checkpoint" in capsys.readouterr().out
        file.write_bytes(content)
    assert newest_complete(out, "step_") == newest


# ---- one writer, a full disk, a directory that cannot be written ----
def test_two_runs_in_one_directory_the_second_is_refused_before_a_model_loads(zygote, stages, tmp_path):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for stage in stages.values():
            assert zygote.run(stage, out) == 1
            assert "another run is writing into" in zygote.said()
    assert [path.name for path in out.iterdir()] == [".lock"]


FULL = "[Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("name", "target"),
    [("ppo", "rlhf.checkpoint:save_file"), ("sft", "transformers:TrainerState.save_to_json")],
)
def test_a_full_disk_is_said_plainly_and_costs_no_earlier_checkpoint(zygote, stages, whole, tmp_path, name, target):
    out = tmp_path / "out"
    code = zygote.run(stages[name], out, target=target, when="full", call=5 if name == "ppo" else 2)
    assert code == 1
    assert "is full" in zygote.said() and "Traceback" not in zygote.said()
    assert newest_complete(out, stages[name].prefix) is not None
    assert not (out / "adapter_model.safetensors").exists()
    ends_the_same(zygote, stages, whole, name, out)


def test_a_read_only_directory_is_refused_in_one_sentence(zygote, stages, tmp_path):
    out = tmp_path / "file"
    out.write_text("no directory")
    for stage in stages.values():
        assert zygote.run(stage, out) == 1
        assert "--output_dir" in zygote.said() and "Traceback" not in zygote.said()
