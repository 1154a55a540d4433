"""Damaged and foreign checkpoints, two writers, a full disk, a tracker without a host: one sentence, nothing lost."""

import fcntl
import os
import pickle
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from forked import KILL, ROOT, STOP, ends_the_same, group, result

from rlhf.artefacts.checkpoint import (
    MANIFEST,
    newest_complete,
    numbered,
    read_manifest,
    why_incomplete,
    write_manifest,
)
from rlhf.artefacts.files import write_json

pytestmark = pytest.mark.slow


# ---- damage ----
# What may have happened to a file since it was written.
DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "gone": None,
}
# Blows after which two checkpoints are left.
TWO_CHECKPOINTS = {
    "sft": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 3},
    "reward": {"target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 3},
    "ppo": {"target": "rlhf.rl.update:policy_loss", "when": "before", "call": 14},
}
# Files of a checkpoint beside those of every adapter.
PARTS = {
    "sft": {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "best.safetensors"},
    "reward": {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "best.safetensors"},
    "ppo": {"optimizer.safetensors", "state.json", "good.safetensors", "value_head.safetensors"},
}


def another_hash(manifest: bytes) -> bytes:
    return manifest.replace(b'"sha256": "', b'"sha256": "0', 1)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_checkpoint_with_any_file_damaged_is_reported_and_passed_over(zygote, stages, whole, tmp_path, name, capsys):
    out = tmp_path / "out"
    prefix = stages[name].prefix
    assert zygote.run(stages[name], out, signum=KILL, **TWO_CHECKPOINTS[name]) == 128 + KILL
    older, newest = numbered(out, prefix)
    listed = read_manifest(newest)["files"]
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json"} | PARTS[name] <= set(listed)

    # Each file in each way; it is put back afterwards.
    for file, (kind, change) in product([*listed, MANIFEST], DAMAGE.items()):
        path = newest / file
        content = path.read_bytes()
        if file == MANIFEST and kind == "bit":
            # Its last byte is the end of a line: a bit of what it lists instead.
            change = another_hash
        path.unlink() if change is None else path.write_bytes(change(content))
        assert newest_complete(out, prefix) == older, (file, kind)
        assert f"ignoring checkpoint {newest}: " in capsys.readouterr().out
        path.write_bytes(content)

    # And the run goes on from the older one.
    assert newest_complete(out, prefix) == newest
    (newest / "adapter_model.safetensors").unlink()
    ends_the_same(zygote, stages, whole, name, out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_checkpoint_of_others_is_refused_in_one_sentence_and_none_of_its_code_runs(zygote, stages, tmp_path, name):
    out = tmp_path / "out"
    trace = tmp_path / "trace"
    assert zygote.run(stages[name], out, signum=KILL, **TWO_CHECKPOINTS[name]) == 128 + KILL
    newest = numbered(out, stages[name].prefix)[-1]
    about = {key: value for key, value in read_manifest(newest).items() if key not in ("files", "versions")}

    # Code in place of tensors, under a manifest that fits: nothing but the way of reading protects from it.
    for file in [*(file for file in PARTS[name] if not file.endswith("json")), "adapter_model.safetensors"]:
        content = (newest / file).read_bytes()
        (newest / file).write_bytes(pickle.dumps(Bomb(trace)))
        write_manifest(newest, about)
        assert why_incomplete(newest) is None
        assert zygote.run(stages[name], out) == 1, zygote.said()[-3000:]
        assert str(newest) in zygote.complaint()
        assert not trace.exists()
        (newest / file).write_bytes(content)

    # A manifest that names files elsewhere.
    for listed in ("../outside", str(tmp_path / "outside")):
        write_manifest(newest, about)
        manifest = read_manifest(newest)
        files = manifest["files"] | {listed: {"size": 0, "sha256": ""}}
        write_json(newest / MANIFEST, manifest | {"files": files})
        assert f"lists {listed!r}, which is not in the folder" in why_incomplete(newest)

    # A run of more processes: refused, unless the user says that exactness does not matter.
    write_manifest(newest, about | {"processes": 4})
    assert zygote.run(stages[name], out) == 1
    assert "the number of processes (was 4, is 1)" in zygote.complaint()
    assert zygote.run(stages[name], out, "--allow_changes", "True") == 0
    assert "going on from" in zygote.said()
    assert "so not exactly: the number of processes" in zygote.said()


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

    # A model that loads would kill the run.
    assert zygote.run(stages[name], out, signum=KILL, target="rlhf.models.loading:load_base", when="before") == 0
    assert "is finished: --overwrite_output_dir True trains it again" in zygote.said()
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before


# ---- two processes ----
@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_two_processes_one_of_them_killed_end_with_the_bytes_of_two_undisturbed_ones(zygote, stages, tmp_path, name):
    two = group(2)
    assert zygote.run(stages[name], tmp_path / "whole", **two) == 0, zygote.said()[-3000:]

    # The second process is killed in a step after the first checkpoint.
    step, call = ("rlhf.rl.update:policy_loss", 10) if name == "ppo" else ("torch.optim:AdamW.step", 4)
    out = tmp_path / "out"
    blow = {"signum": KILL, "rank": 1, "target": step, "when": "before", "call": call}
    assert zygote.run(stages[name], out, **two, **blow) == 128 + KILL, zygote.said()[-3000:]
    assert newest_complete(out, stages[name].prefix) is not None

    # One process alone cannot go on exactly; two can.
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

    # Of the launcher's children, the newest one that runs the stage.
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
    first = int((out / ".lock").read_text())
    before = sorted(out.rglob("*"))

    # The first run stands still, lock in hand; it is ended whatever the second one does.
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
    out = tmp_path / "out"
    # Nothing listens on port 9.
    environment = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "2",
        "WANDB_API_KEY": KEY,
        "HF_TOKEN": f"hf_{KEY}",
        "HOME": str(tmp_path),
    }
    assert zygote.run(stages["sft"], out, "--log_with", "wandb", environment=environment) == 0, zygote.said()[-3000:]
    assert "wandb is offline (Timed out" in zygote.said()
    assert f"later: wandb sync {out}/wandb/offline-run-*" in zygote.said()
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert result(out) == whole["sft"]

    # Neither what is printed nor a file of the run holds the key.
    files = [path for path in [zygote.log, *out.rglob("*")] if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


# ---- a writer that fails ----


@pytest.mark.parametrize(
    ("name", "target"),
    [("ppo", "rlhf.rl.state_file:save_file"), ("sft", "transformers:TrainerState.save_to_json")],
)
def test_a_full_disk_is_said_plainly_and_costs_no_earlier_checkpoint(zygote, stages, whole, tmp_path, name, target):
    out = tmp_path / "out"
    code = zygote.run(stages[name], out, target=target, when="full", call=5 if name == "ppo" else 2)
    assert code == 1
    assert "is full" in zygote.said()
    assert "Traceback" not in zygote.said()
    assert newest_complete(out, stages[name].prefix) is not None
    assert not (out / "adapter_model.safetensors").exists()
    ends_the_same(zygote, stages, whole, name, out)
