"""Kills at each write and at random times, and signals: the same command, given again, ends with the same bytes."""

import random
import signal
import time
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from forked import INT, KILL, TERM, TIMES, ends_the_same

import rl_training
from rlhf.artefacts.checkpoint import newest_complete, numbered, why_incomplete
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.rl.state import loop_weights, resume, save_checkpoint, snapshot

pytestmark = pytest.mark.slow


# ---- a step again ----
def test_a_step_repeated_from_its_checkpoint_changes_every_byte_alike(stages, tmp_path):
    args = rl_training.parse_args([*stages["ppo"].argv, "--output_dir", str(tmp_path), "--bf16", "False"])
    prompt_format = text_format(load_tokenizer(args.base_model_name))
    accelerator = Accelerator(cpu=True)
    run = rl_training.starting.check_inputs(args, prompt_format)
    *prompts, _ = rl_training.load_prompts(args, prompt_format, None)

    # A checkpoint after two steps, with everything in it that a run may have by then.
    loop = rl_training.make_loop(args, accelerator, prompt_format, tuple(prompts), None)
    rl_training.starting.measure_start(loop, fresh=True)
    for step in (0, 1):
        metrics = rl_training.train_step(loop, step)[0]
    loop.last_good = loop_weights(loop)
    loop.best = {"step": 1, "value": 0.5, "gain": 0.25, "error": 0.125}
    save_checkpoint(loop, "step_2", run, metrics)

    # The third step in the loop that wrote it, then in one that was read from it.
    moments = []
    for _ in range(2):
        metrics, samples = rl_training.train_step(loop, 2)
        numbers = {name: value for name, value in metrics.items() if not name.startswith(TIMES)}
        moments.append((snapshot(loop), numbers, samples, loop.last_good))
        start = newest_complete(tmp_path)
        loop = rl_training.make_loop(args, accelerator, prompt_format, tuple(prompts), start)
        assert resume(loop, start) == 2

    (one, *rest), (two, *others) = moments
    torch.testing.assert_close(two.weights, one.weights, atol=0, rtol=0)
    assert two.state == one.state
    assert others[:2] == rest[:2]
    torch.testing.assert_close(others[2], rest[2], atol=0, rtol=0)


# ---- kill -9 at each write ----
# Calls are counted from the start of a run, and each of these falls while the second checkpoint or a later one is
# written: there is something to lose.
PPO_BLOWS = {
    "before the folder": {"target": "rlhf.rl.state:publish", "when": "before", "call": 2},
    "after the adapter": {"target": "rlhf.rl.state:save_adapter", "when": "after", "call": 2},
    "after the head": {"target": "rlhf.rl.state:save_critic", "when": "after", "call": 2},
    "after run.json": {"target": "rlhf.rl.state:write_run", "when": "after", "call": 2},
    "after the optimizer": {"target": "rlhf.rl.state_file:save_file", "when": "after", "call": 3},
    "after the state": {"target": "rlhf.rl.state:save_state", "when": "after", "call": 2},
    "after the last good weights": {"target": "rlhf.rl.state:save_last_good", "when": "after", "call": 2},
    "before the manifest": {"target": "rlhf.artefacts.checkpoint:write_manifest", "when": "before", "call": 3},
    "after the manifest": {"target": "rlhf.artefacts.checkpoint:write_manifest", "when": "after", "call": 3},
    "after the rename": {"target": "rlhf.rl.state:rotate", "when": "before", "call": 4},
    "during rotation": {"target": "shutil:rmtree", "when": "before", "caller": "rotate"},
    "before the last rotation": {"target": "rlhf.rl.state:rotate", "when": "before", "call": 6},
    "in the update": {"target": "rlhf.rl.update:policy_loss", "when": "before", "call": 9},
}
TRAINER_BLOWS = {
    "before the folder": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 2},
    "after the adapter": {"target": "rlhf.trainer.stage_trainer:save_adapter", "when": "after", "call": 2},
    "after run.json": {"target": "rlhf.trainer.stage_trainer:write_run", "when": "after", "call": 2},
    "before the optimizer": {
        "target": "transformers:Trainer._save_optimizer_and_scheduler", "when": "before", "call": 2},
    "after the optimizer": {
        "target": "transformers:Trainer._save_optimizer_and_scheduler", "when": "after", "call": 2},
    "after the random state": {"target": "transformers:Trainer._save_rng_state", "when": "after", "call": 2},
    "after the trainer's state": {"target": "transformers:TrainerState.save_to_json", "when": "after", "call": 2},
    "before the manifest": {"target": "rlhf.trainer.log:write_manifest", "when": "before", "call": 2},
    "after the manifest": {"target": "rlhf.trainer.log:write_manifest", "when": "after", "call": 2},
    "during rotation": {"target": "shutil:rmtree", "when": "before", "caller": "rotate"},
    "before the last rotation": {"target": "rlhf.trainer.log:rotate", "when": "before", "call": 5},
}  # fmt: skip
KILLS = [*product(("ppo",), PPO_BLOWS), *product(("sft", "reward"), TRAINER_BLOWS)]


@pytest.mark.parametrize(("name", "point"), KILLS, ids=lambda value: value)
def test_killed_at_a_write_and_given_again_a_run_ends_with_the_same_bytes(
    zygote, stages, whole, tmp_path, name, point
):
    blows = PPO_BLOWS if name == "ppo" else TRAINER_BLOWS
    out = tmp_path / "out"
    prefix = stages[name].prefix
    assert zygote.run(stages[name], out, signum=KILL, **blows[point]) == 128 + KILL, zygote.said()[-3000:]
    for folder in numbered(out, prefix):
        assert why_incomplete(folder) is None or folder != newest_complete(out, prefix)
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_killed_at_random_times_again_and_again_a_run_still_ends_with_the_same_bytes(
    zygote, stages, whole, tmp_path, name
):
    out = tmp_path / "out"
    rng = random.Random(f"kills {name}")
    training = {"target": f"{stages[name].script}:train", "when": "later"}

    # A quarter somewhere in the start, the others somewhere in the training, saving included.
    blows = []
    for number in range(20):
        early = number % 4 == 0
        blows.append({"delay": rng.uniform(0, 1)} if early else training | {"delay": rng.uniform(0, 0.8)})

    # A run may end before its blow; without a single kill the test would show nothing.
    codes = [zygote.run(stages[name], out, signum=KILL, **blow) for blow in blows]
    assert 128 + KILL in codes
    ends_the_same(zygote, stages, whole, name, out)


# ---- signals ----
SIGNALS = {
    "ppo, in the rollout": ("ppo", {"target": "rlhf.models.generation:_choose", "when": "before", "call": 170}),
    "ppo, in the update": ("ppo", {"target": "rlhf.rl.update:policy_loss", "when": "before", "call": 9}),
    "ppo, in the evaluation": ("ppo", {"target": "rlhf.rl.evaluation:describe_samples", "when": "before", "call": 2}),
    "ppo, in the saving": ("ppo", {"target": "rlhf.rl.state:save_critic", "when": "before", "call": 2}),
    "sft, in a step": ("sft", {"target": "torch.optim:AdamW.step", "when": "after", "call": 3}),
    "sft, in the evaluation": ("sft", {"target": "sft_training:token_mean", "when": "before", "call": 2}),
    "sft, in the saving": ("sft", {"target": "rlhf.trainer.stage_trainer:save_adapter", "when": "before", "call": 2}),
    "reward, in a step": ("reward", {"target": "reward_modeling:pairwise_loss", "when": "after", "call": 3}),
    "reward, in the evaluation": ("reward", {"target": "reward_modeling:pairwise_loss", "when": "after", "call": 6}),
    "reward, in the saving": (
        "reward",
        {"target": "rlhf.trainer.stage_trainer:save_adapter", "when": "before", "call": 2},
    ),
}


@pytest.mark.parametrize("case", SIGNALS)
@pytest.mark.parametrize("signum", [TERM, INT], ids=["SIGTERM", "SIGINT"])
def test_on_a_signal_a_run_saves_itself_says_how_to_go_on_and_writes_no_final_adapter(
    zygote, stages, whole, tmp_path, case, signum
):
    if signum == INT and "rollout" not in case and "step" not in case:
        pytest.skip("one signal each is enough here")
    name, blow = SIGNALS[case]
    out = tmp_path / "out"
    begin = time.monotonic()
    assert zygote.run(stages[name], out, signum=signum, **blow) == 128 + signum, zygote.said()[-3000:]
    # A machine that is going down gives its processes half a minute.
    assert time.monotonic() - begin < 30

    assert f"stopped by {signal.Signals(signum).name}" in zygote.said()
    assert "--resume_from_checkpoint True" in zygote.said()
    assert not (out / "adapter_model.safetensors").exists()
    assert newest_complete(out, stages[name].prefix) is not None
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_second_signal_ends_a_run_at_once_and_costs_no_checkpoint(zygote, stages, whole, tmp_path, name):
    out = tmp_path / "out"
    # Within a step that comes after the first checkpoint.
    step = "rlhf.rl.update:policy_loss" if name == "ppo" else "torch.optim:AdamW.step"
    call = 14 if name == "ppo" else 4
    assert zygote.run(stages[name], out, signum=TERM, target=step, when="twice", call=call) == 128 + TERM
    assert "once more stops at once" in zygote.said()
    assert "stopped by" not in zygote.said()
    ends_the_same(zygote, stages, whole, name, out)
