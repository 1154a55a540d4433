"""Nothing is lost: kill -9 at each write and at random times, signals, a full disk, one writer: the same bytes."""

import fcntl
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from forked import INT, KILL, ROOT, STOP, TERM, TIMES, ends_the_same, group, result

import rl_training
from rlhf.artefacts.checkpoint import (
    MANIFEST,
    newest_complete,
    numbered,
    read_manifest,
    why_incomplete,
    write_manifest,
)
from rlhf.artefacts.files import write_json
from rlhf.data.encoding import load_tokenizer
from rlhf.rl.state import loop_weights, resume, save_checkpoint, snapshot

pytestmark = pytest.mark.slow


# ---- a step again ----
def test_a_step_repeated_from_its_checkpoint_changes_every_byte_alike(stages, tmp_path):
    args = rl_training.parse_args([*stages["ppo"].argv, "--output_dir", str(tmp_path), "--bf16", "False"])
    tokenizer, accelerator = load_tokenizer(args.base_model_name), Accelerator(cpu=True)
    run = rl_training.check_inputs(args, tokenizer)
    *prompts, _ = rl_training.load_prompts(args, tokenizer, None)
    loop = rl_training.make_loop(args, accelerator, tokenizer, tuple(prompts), None)
    rl_training.measure_start(loop, fresh=True)
    for step in (0, 1):
        metrics = rl_training.train_step(loop, step)[0]
    loop.last_good, loop.best = loop_weights(loop), {"step": 1, "value": 0.5, "gain": 0.25, "error": 0.125}
    save_checkpoint(loop, "step_2", run, metrics)
    moments = []
    for _ in range(2):
        found, samples = rl_training.train_step(loop, 2)
        numbers = {name: value for name, value in found.items() if not name.startswith(TIMES)}
        moments.append((snapshot(loop), numbers, samples, loop.last_good))
        start = newest_complete(tmp_path)
        loop = rl_training.make_loop(args, accelerator, tokenizer, tuple(prompts), start)
        assert resume(loop, start) == 2
    (one, *rest), (two, *others) = moments
    torch.testing.assert_close(two.weights, one.weights, atol=0, rtol=0)
    assert two.state == one.state and others[:2] == rest[:2]
    torch.testing.assert_close(others[2], rest[2], atol=0, rtol=0)


# ---- kill -9 at each write ----
PPO_BLOWS = {
    "before the folder": {"target": "rlhf.rl.state:publish", "when": "before", "call": 2},
    "after the adapter": {"target": "rlhf.rl.state:save_adapter", "when": "after", "call": 2},
    "after the head": {"target": "rlhf.rl.state:save_critic", "when": "after", "call": 2},
    "after run.json": {"target": "rlhf.rl.state:write_run", "when": "after", "call": 2},
    "after the optimizer": {"target": "rlhf.rl.state:save_file", "when": "after", "call": 3},
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
KILLS = [("ppo", point) for point in PPO_BLOWS] + [(s, point) for s in ("sft", "reward") for point in TRAINER_BLOWS]


@pytest.mark.parametrize(("name", "point"), KILLS, ids=lambda value: value)
def test_killed_at_a_write_and_given_again_a_run_ends_with_the_same_bytes(
    zygote, stages, whole, tmp_path, name, point
):
    blows, out = PPO_BLOWS if name == "ppo" else TRAINER_BLOWS, tmp_path / "out"
    assert zygote.run(stages[name], out, signum=KILL, **blows[point]) == 128 + KILL, zygote.said()[-3000:]
    for folder in numbered(out, stages[name].prefix):
        assert why_incomplete(folder) is None or folder != newest_complete(out, stages[name].prefix)
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_killed_at_random_times_again_and_again_a_run_still_ends_with_the_same_bytes(
    zygote, stages, whole, tmp_path, name
):
    out, rng = tmp_path / "out", random.Random(f"kills {name}")
    training = {"target": f"{stages[name].script}:train", "when": "later"}
    # A quarter somewhere in the start, the others somewhere in the training, saving included.
    blows = [
        {"delay": rng.uniform(0, 1)} if n % 4 == 0 else training | {"delay": rng.uniform(0, 0.8)} for n in range(20)
    ]
    assert sum(zygote.run(stages[name], out, signum=KILL, **blow) == 128 + KILL for blow in blows)
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
    (name, blow), out, begin = SIGNALS[case], tmp_path / "out", time.monotonic()
    assert zygote.run(stages[name], out, signum=signum, **blow) == 128 + signum, zygote.said()[-3000:]
    assert time.monotonic() - begin < 30
    assert f"stopped by {signal.Signals(signum).name}" in zygote.said()
    assert "--resume_from_checkpoint True" in zygote.said()
    assert not (out / "adapter_model.safetensors").exists()
    assert newest_complete(out, stages[name].prefix) is not None
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_second_signal_ends_a_run_at_once_and_costs_no_checkpoint(zygote, stages, whole, tmp_path, name):
    out, step = tmp_path / "out", "rlhf.rl.update:policy_loss" if name == "ppo" else "torch.optim:AdamW.step"
    call = 14 if name == "ppo" else 4
    assert zygote.run(stages[name], out, signum=TERM, target=step, when="twice", call=call) == 128 + TERM
    assert "once more stops at once" in zygote.said()
    assert "stopped by" not in zygote.said()
    ends_the_same(zygote, stages, whole, name, out)


# ---- damage ----
DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "gone": None,
}
TWO_CHECKPOINTS = {
    "sft": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 3},
    "reward": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 3},
    "ppo": {"target": "rlhf.rl.update:policy_loss", "when": "before", "call": 14},
}
PARTS = {
    "sft": {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"},
    "reward": {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"},
    "ppo": {"optimizer.safetensors", "state.json", "good.safetensors", "value_head.safetensors"},
}


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_checkpoint_with_any_file_damaged_is_reported_and_passed_over(zygote, stages, whole, tmp_path, name, capsys):
    out, prefix = tmp_path / "out", stages[name].prefix
    assert zygote.run(stages[name], out, signum=KILL, **TWO_CHECKPOINTS[name]) == 128 + KILL
    older, newest = numbered(out, prefix)
    listed = read_manifest(newest)["files"]
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json"} | PARTS[name] <= set(listed)
    for file, (kind, change) in product([*listed, MANIFEST], DAMAGE.items()):
        content = (newest / file).read_bytes()
        if file == MANIFEST and kind == "bit":
            # Its last byte is the end of a line: a bit of what it lists instead.
            content, change = content, lambda content: content.replace(b'"sha256": "', b'"sha256": "0', 1)
        (newest / file).unlink() if change is None else (newest / file).write_bytes(change(content))
        assert newest_complete(out, prefix) == older, (file, kind)
        assert f"ignoring checkpoint {newest}: " in capsys.readouterr().out
        (newest / file).write_bytes(content)
    assert newest_complete(out, prefix) == newest
    (newest / "adapter_model.safetensors").unlink()
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_checkpoint_of_others_is_refused_in_one_sentence_and_none_of_its_code_runs(zygote, stages, tmp_path, name):
    out, prefix = tmp_path / "out", stages[name].prefix
    assert zygote.run(stages[name], out, signum=KILL, **TWO_CHECKPOINTS[name]) == 128 + KILL
    newest, trace = numbered(out, prefix)[-1], tmp_path / "trace"
    about = {key: value for key, value in read_manifest(newest).items() if key not in ("files", "versions")}
    bombs = ("optimizer.safetensors", "good.safetensors", "value_head.safetensors") if name == "ppo" else PARTS[name]
    for file in [*(file for file in bombs if not file.endswith("json")), "adapter_model.safetensors"]:
        content = (newest / file).read_bytes()
        (newest / file).write_bytes(pickle.dumps(Bomb(trace)))
        write_manifest(newest, about)
        assert why_incomplete(newest) is None
        assert zygote.run(stages[name], out) == 1, zygote.said()[-3000:]
        assert str(newest) in zygote.complaint()
        assert not trace.exists()
        (newest / file).write_bytes(content)
    for listed in ("../outside", str(tmp_path / "outside")):
        write_manifest(newest, about)
        manifest = read_manifest(newest)
        write_json(newest / MANIFEST, manifest | {"files": manifest["files"] | {listed: {"size": 0, "sha256": ""}}})
        assert f"lists {listed!r}, which is not in the folder" in why_incomplete(newest)
    write_manifest(newest, about | {"processes": 4})
    assert zygote.run(stages[name], out) == 1
    assert "the number of processes (was 4, is 1)" in zygote.complaint()
    assert zygote.run(stages[name], out, "--allow_changes", "True") == 0
    assert "going on from" in zygote.said() and "so not exactly: the number of processes" in zygote.said()


class Bomb:
    """A pickle that makes a file when it is read by anything that runs code."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_finished_run_given_again_touches_no_file_and_loads_no_model(zygote, stages, tmp_path, name):
    out = tmp_path / "out"
    assert zygote.run(stages[name], out) == 0
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    assert zygote.run(stages[name], out, signum=KILL, target="rlhf.models.loading:load_base", when="before") == 0
    assert "is finished: --overwrite_output_dir True trains it again" in zygote.said()
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before


# ---- two processes ----
@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_two_processes_one_of_them_killed_end_with_the_bytes_of_two_undisturbed_ones(zygote, stages, tmp_path, name):
    two = group(2)
    assert zygote.run(stages[name], tmp_path / "whole", **two) == 0, zygote.said()[-3000:]
    step, call = ("rlhf.rl.update:policy_loss", 10) if name == "ppo" else ("torch.optim:AdamW.step", 4)
    out, blow = tmp_path / "out", {"signum": KILL, "rank": 1, "target": step, "when": "before", "call": call}
    assert zygote.run(stages[name], out, **two, **blow) == 128 + KILL, zygote.said()[-3000:]
    assert newest_complete(out, stages[name].prefix) is not None
    assert zygote.run(stages[name], out) == 1
    assert "the number of processes (was 2, is 1)" in zygote.complaint()
    assert zygote.run(stages[name], out, **two) == 0, zygote.said()[-3000:]
    assert result(out) == result(tmp_path / "whole")


def test_the_launcher_of_a_worker_that_was_killed_says_so_and_hands_on_its_exit_code(stages, tmp_path):
    command = [sys.executable, "rl_training.py", *stages["ppo"].argv, "--steps", "80000", "--nproc", "2"]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"rl_training.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(max(workers), KILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + KILL, said[-3000:]
    assert "exitcode: -9" in said
    assert newest_complete(tmp_path / "out") is not None
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


# ---- one writer ----
@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_of_two_runs_in_one_directory_the_second_is_refused_before_a_model_loads(
    zygote, stages, whole, tmp_path, name
):
    out = tmp_path / "out"
    assert zygote.run(stages[name], out, signum=STOP, **TWO_CHECKPOINTS[name]) == 128 + STOP
    first, before = int((out / ".lock").read_text()), sorted(out.rglob("*"))
    try:
        second = {"signum": KILL, "target": "rlhf.models.loading:load_base", "when": "before"}
        assert zygote.run(stages[name], out, **second) == 1
        assert f"another run (process {first}) is writing into {out}" in zygote.complaint()
        assert sorted(out.rglob("*")) == before
    finally:
        os.kill(first, KILL)
    with (out / ".lock").open() as lock:
        # A killed process takes a moment to let go.
        fcntl.flock(lock, fcntl.LOCK_EX)
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_directory_in_use_needs_a_word_on_what_to_do_with_it(zygote, stages, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    argv = [*stages[name].argv, "--output_dir", str(out)]
    assert zygote.run_script(stages[name].script, argv, tmp_path / "log") == 1
    assert "is not empty (notes.txt, ...): give --resume_from_checkpoint True" in zygote.complaint()
    out = tmp_path / "file"
    out.write_text("no directory")
    assert zygote.run(stages[name], out) == 1
    assert zygote.complaint() == f"--output_dir {out} is a file: give a directory"


# ---- a tracker that does not answer ----
KEY = "0123456789abcdef0123456789abcdef01234567"


def test_a_tracker_without_a_host_costs_seconds_and_no_secret_is_written_anywhere(zygote, stages, whole, tmp_path):
    out, environment = tmp_path / "out", {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    environment |= {"WANDB_API_KEY": KEY, "HF_TOKEN": f"hf_{KEY}", "HOME": str(tmp_path)}
    assert zygote.run(stages["sft"], out, "--log_with", "wandb", environment=environment) == 0, zygote.said()[-3000:]
    assert "wandb is offline (Timed out" in zygote.said()
    assert f"later: wandb sync {out}/wandb/offline-run-*" in zygote.said()
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert result(out) == whole["sft"]
    written = [path for path in [zygote.log, *out.rglob("*")] if path.is_file() and KEY.encode() in path.read_bytes()]
    assert written == []


# ---- a writer that fails ----
FULL = "[Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("name", "target"),
    [("ppo", "rlhf.rl.state:save_file"), ("sft", "transformers:TrainerState.save_to_json")],
)
def test_a_full_disk_is_said_plainly_and_costs_no_earlier_checkpoint(zygote, stages, whole, tmp_path, name, target):
    out = tmp_path / "out"
    code = zygote.run(stages[name], out, target=target, when="full", call=5 if name == "ppo" else 2)
    assert code == 1
    assert "is full" in zygote.said() and "Traceback" not in zygote.said()
    assert newest_complete(out, stages[name].prefix) is not None
    assert not (out / "adapter_model.safetensors").exists()
    ends_the_same(zygote, stages, whole, name, out)
