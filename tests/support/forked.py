"""Stages run in forked children of one warm process, and what they leave: support for the tests of faults."""

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from adapters import random_adapter
from stages import words, write_answers, write_pairs

from rlhf.artefacts.checkpoint import numbered
from rlhf.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
KILL = signal.SIGKILL
TERM = signal.SIGTERM
INT = signal.SIGINT
STOP = signal.SIGSTOP
# Weights that a run leaves; the reward model's head is in its adapter.
FILES = ("adapter_model.safetensors", "value_head.safetensors")
PROMPTS = [
    f"{who}{verb}什么？" for who, verb in product(("我", "小猫", "老师", "医生"), ("喜欢", "想要", "今天看见了"))
]
# Metrics that a clock or the machine decides.
TIMES = ("time/", "tokens/s", "samples/s", "mfu", "mem/")


class Zygote:
    """Runs stages in forked children of one warm process."""

    def __init__(self):
        path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        # Importing takes seconds; a job sent before would count them as its own.
        assert self.process.stdout.readline().strip() == "ready"

    def run(self, stage: "Stage", output_dir: Path, *more: str, **job) -> int:
        """Exit status of the stage's command, resumed if there is anything to resume; `job` as zygote.py has it."""
        argv = [*stage.argv, "--output_dir", str(output_dir), "--resume_from_checkpoint", "True", *more]
        # Beside the run's directory, whose files are compared.
        log = job.pop("log", output_dir.parent / f"{output_dir.name}.log")
        return self.run_script(stage.script, argv, log, **job)

    def run_script(self, script: str, argv: list[str], log: Path, **job) -> int:
        """Exit status of any script's command line; what it prints is added to `log`."""
        # What earlier runs printed into the same log is not this one's.
        self.log = log
        self.begun = log.stat().st_size if log.exists() else 0
        line = json.dumps({"script": script, "argv": argv, "log": str(log), **job})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def said(self) -> str:
        """Output of the last run, stdout and stderr."""
        return self.log.read_bytes()[self.begun :].decode("utf-8")

    def complaint(self) -> str:
        """The last run's one sentence of error. Raises: AssertionError where there is none, or more than that."""
        lines = [line for line in self.said().splitlines() if ": error: " in line]
        assert len(lines) == 1 and "Traceback" not in self.said(), self.said()[-3000:]
        return lines[0].split(": error: ", 1)[1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Stage:
    """A stage's command without its output directory, and its checkpoints' prefix."""

    def __init__(self, script: str, flags: dict, prefix: str):
        self.script = script
        self.argv = words(flags)
        self.prefix = prefix


@pytest.fixture(scope="session")
def zygote():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="session")
def stages(tiny_base, tmp_path_factory):
    return make_stages(tiny_base, tmp_path_factory.mktemp("stages"))


def make_stages(tiny_base: str, folder: Path, rows: int = 48, responses: int = 40) -> dict[str, Stage]:
    """SFT and reward model with dropout, shuffling and length grouping into a second epoch; PPO with adaptive KL."""
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    prompts.write_text("".join(lines), encoding="utf-8")

    # Everything that draws or keeps state is on, because all of it has to survive a kill.
    trainer = {
        "model_name": tiny_base, "num_train_epochs": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 8,
        "save_steps": 2, "eval_steps": 4, "lora_dropout": 0.1, "save_total_limit": 2, "eval_size": 8,
    }  # fmt: skip
    ppo = {
        "base_model_name": tiny_base, "dataset_name": prompts, "steps": responses, "batch_size": 8,
        "mini_batch_size": 4, "ppo_epochs": 2, "gradient_accumulation_steps": 2, "output_max_length": 8,
        "learning_rate": 1e-3, "save_freq": 1, "init_kl_coef": 0.5,
        "reward_transform": "standardize", "adap_kl_ctrl": True, "save_total_limit": 2, "eval_freq": 2, "eval_size": 4,
        "on_collapse": "rollback",
        "sft_model_lora_path": random_adapter(tiny_base, folder / "sft"),
        "reward_model_lora_path": random_adapter(tiny_base, folder / "reward", "reward", seed=1),
    }  # fmt: skip

    # Neither sampled answers nor an audit decide about the weights, and both take time.
    sft = trainer | {"dataset_name": write_answers(folder / "answers.jsonl", rows), "sample_max_new_tokens": 0}
    reward = trainer | {"dataset_name": write_pairs(folder / "pairs.jsonl", rows), "audit": False}
    return {
        "sft": Stage("sft_training", sft, "checkpoint-"),
        "reward": Stage("reward_modeling", reward, "checkpoint-"),
        "ppo": Stage("rl_training", ppo, "step_"),
    }


@pytest.fixture(scope="session")
def whole(zygote, stages, tmp_path_factory):
    """The result of each stage when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    results = {}
    for name, stage in stages.items():
        assert zygote.run(stage, folder / name) == 0, zygote.said()[-3000:]
        assert (folder / name / "report.html").is_file()
        results[name] = result(folder / name)
    return results


def result(folder: Path) -> dict:
    """Bytes of adapter and heads, and the metrics without timings."""
    rows = []
    for row in read_metrics(folder):
        rows.append({name: value for name, value in row.items() if not name.startswith(TIMES)})
    # Only PPO leaves a value head.
    weights = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return weights | {"metrics": rows}


def ends_the_same(zygote, stages, whole, name, out):
    """Assert that the same command, given again, gives the result of an uninterrupted run and leaves no scratch."""
    code = zygote.run(stages[name], out)
    assert code == 0, zygote.said()[-3000:]

    # Metrics first: of two lists pytest shows where they differ.
    output = result(out)
    assert output["metrics"] == whole[name]["metrics"]
    assert all(output[file] == content for file, content in whole[name].items()), "other bytes"

    # No half-written folder is left over, and no more checkpoints than the flags allow.
    scratch = [path for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert not scratch
    assert len(numbered(out, stages[name].prefix)) <= 2


def free_port() -> int:
    """A port that no process listens on now."""
    # Port 0 lets the system choose.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def group(processes: int) -> dict:
    """The keys of a job that `Zygote.run` needs to start that many processes of one run."""
    return {"ranks": processes, "port": free_port()}
