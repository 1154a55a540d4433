"""Launchers: processes that a stage starts itself, signals and failures among them, several machines."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from forked import free_port, group
from launched import ENVIRONMENT, ROOT, launch, make_world
from test_rl_training import PROMPTS

from rlhf.artefacts.checkpoint import newest_complete
from rlhf.run.log import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    return make_world(tiny_base, PROMPTS, tmp_path_factory.mktemp("world"))


# ---- one machine ----
def test_nproc_starts_the_processes_itself_and_counts_their_responses_together(world, tmp_path):
    out = tmp_path / "out"
    flags = ["--output_dir", str(out), "--nproc", "2", "--steps", "16", "--batch_size", "4", "--mini_batch_size", "2"]
    said = launch("rl_training.py", *world, *flags, "--output_max_length", "6", "--save_freq", "1")
    assert "starting 2 processes" in said
    assert "2 steps of 8 responses" in said
    assert len(read_metrics(out)) == 2
    assert (out / "adapter_model.safetensors").is_file()


def test_both_processes_stop_together_on_a_signal_to_their_launcher_and_go_on_later(world, tmp_path):
    out = tmp_path / "out"
    flags = [*world, "--output_dir", str(out), "--nproc", "2", "--batch_size", "4", "--mini_batch_size", "2",
             "--output_max_length", "6", "--resume_from_checkpoint", "True"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "rl_training.py", *flags, "--steps", "80000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    # In the middle of training, which as it is would take hours.
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 128 + signal.SIGTERM, said

    # Both have to agree on the step after which they stop: one checkpoint, and no final adapter.
    saved = newest_complete(out)
    done = int(saved.name.removeprefix("step_"))
    assert done >= 2
    assert not (out / "adapter_model.safetensors").exists()

    launch("rl_training.py", *flags, "--steps", str(8 * (done + 1)))
    assert [row["step"] for row in read_metrics(out)] == list(range(1, done + 2))


def children_of(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children_of(int(child))]
    return found


def listens_at(pids: list[int]) -> set[str]:
    """Addresses, as the system writes them, at which these processes listen for connections."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            # A file may be closed between two looks.
            with suppress(FileNotFoundError):
                sockets.add(os.readlink(link))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENING and f"socket:[{rest[5]}]" in sockets:
                addresses.add(local.partition(":")[0])
    return addresses


# As /proc/net/tcp has it.
LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and workers follow their parent on Linux alone")
def test_processes_of_one_machine_listen_to_it_alone_and_end_with_a_launcher_that_is_killed(zygote, stages, tmp_path):
    out = tmp_path / "out"
    flags = [*stages["ppo"].argv, "--steps", "80000", "--output_dir", str(out), "--resume_from_checkpoint", "True"]
    process = subprocess.Popen(
        [sys.executable, "rl_training.py", *flags, "--nproc", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    workers = children_of(process.pid)
    assert sum(b"rl_training.py" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers) >= 2
    assert listens_at([process.pid, *workers]) <= set(LOOPBACK)

    # As a scheduler does that runs out of memory: nobody is asked.
    process.kill()
    process.stdout.read()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their launcher"
        time.sleep(0.1)

    # They have saved themselves, and two others go on from there.
    done = int(newest_complete(out).name.removeprefix("step_"))
    assert done >= 2
    blow = {"signum": signal.SIGTERM, "target": "rlhf.rl.update:policy_loss", "when": "before", "call": 5}
    assert zygote.run(stages["ppo"], out, "--steps", "80000", **group(2), **blow) == 128 + signal.SIGTERM, (
        zygote.said()
    )
    assert f"going on from {out}/step_{done}" in zygote.said()


def test_a_failing_worker_hands_on_its_exit_code_and_its_sentence(world, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--nproc", "2", "--prompt_template", "x{prompt}"]
    said = launch("rl_training.py", *world, *flags, code=1)
    assert "another prompt_template" in said


# ---- machines ----
def start_node(rank: int, port: int, *words: str) -> subprocess.Popen:
    """scripts/multi_node.sh as it is started on one of two machines, here both this one."""
    place = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NPROC": "1"}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "multi_node.sh"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=ENVIRONMENT | place, cwd="/",
    )  # fmt: skip


def test_two_launchers_find_each_other_and_train_one_policy_into_one_directory(world, tmp_path):
    out = tmp_path / "out"
    port = free_port()
    flags = ["--output_dir", str(out), "--steps", "8", "--batch_size", "4", "--mini_batch_size", "2",
             "--output_max_length", "6", "--save_freq", "1"]  # fmt: skip
    nodes = [start_node(rank, port, "rl_training.py", *world, *flags) for rank in (0, 1)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "1 steps of 8 responses" in said[0]

    # The first machine alone writes and prints.
    assert "step 1/1" in said[0] and "step 1/1" not in said[1]
    assert len(read_metrics(out)) == 1
    assert (out / "step_1" / "MANIFEST.json").is_file() and (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "place", "sentence"),
    [
        ([], {}, "give the stage"),
        (["nowhere.py"], {}, "no script nowhere.py"),
        (["rl_training.py"], {"NNODES": "2"}, "MASTER_ADDR"),
    ],
    ids=["no stage", "unknown stage", "no address"],
)
def test_a_machine_with_too_little_said_is_told_what_is_missing(words, place, sentence):
    command = ["bash", str(ROOT / "scripts" / "multi_node.sh"), *words]
    environment = ENVIRONMENT | place
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert finished.returncode == 2
    assert sentence in finished.stderr
