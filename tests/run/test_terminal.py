"""What a person at the terminal sees: short lines, text as text, warnings in one sentence, the next command."""

import importlib
import shlex
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf import endings
from rlhf.arguments import TRACKERS
from rlhf.compare.answers import Answer
from rlhf.compare.tables import wins_in_words
from rlhf.reward import closing
from rlhf.rl.metrics import step_line
from rlhf.run import launch, startup
from rlhf.run.log import STEPS_BEFORE_ETA, Eta, MetricsLog, show_answer
from rlhf.run.trackers import OPENERS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare")
SLOW = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy")


# ---- before the libraries ----
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--help"], ["--datset_name", "x"]])
def test_help_and_a_wrong_flag_load_no_library(script, words):
    command = [sys.executable, "-X", "importtime", f"{script}.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if words == ["--help"] else 2)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "rlhf" in imported and not imported & set(SLOW)


def test_ctrl_c_while_libraries_load_is_one_line_and_130():
    flags = ["--base_model_name", "b", "--reward_model_lora_path", "r"]
    # Said by Python itself, so that the signal comes neither before the handler nor after the import.
    command = [sys.executable, "-v", "rl_training.py", *flags]
    # A run of tests in the background ignores SIGINT, and its children would inherit that.
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("import 'torch.") or "torch/__init__" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert rest.splitlines()[-1].endswith("rl_training.py: stopped by SIGINT") and "Traceback" not in rest


def test_a_python_without_the_packages_names_the_environment(capsys, monkeypatch):
    monkeypatch.setattr(startup, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(SystemExit) as end:
        startup.prepare(lambda: SimpleNamespace(nproc=1))
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "has no peft: run `source .venv/bin/activate`" in said and said.count("\n") == 1


# ---- lines ----
def test_a_line_of_ppo_has_at_most_120_columns():
    record = {
        "step": 20000, "score/mean": -123.456, "kl/mean": 123.456, "len/mean": 1024.0, "len/min": 1024.0,
        "empty_frac": 1.0, "entropy": 10.55, "time/step": 1234.56, "tokens/s": 123456.7,
    }  # fmt: skip
    line = step_line(record, 20000, " | ETA 100:00:00")
    assert len(line) <= 120 and len(step_line(record | {"mfu": 0.4567}, 20000, " | ETA 100:00:00")) <= 120
    assert "score -123.46" in line and "empty 100%" in line


def test_no_time_left_is_told_before_twenty_steps_of_this_process(monkeypatch):
    eta = Eta(total=200, done=100)
    assert eta.left(100 + STEPS_BEFORE_ETA - 1) == ""
    monkeypatch.setattr("rlhf.run.log.time", SimpleNamespace(monotonic=lambda: eta.start + 40))
    assert eta.left(120) == " | ETA 0:02:40"
    assert eta.left(200) == " | ETA 0:00:00"


def test_samples_are_text_with_a_rule_beside_them_and_no_control_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    row = {"step": 1, "query": "问：你好\n\n答：", "response": "第一行\n\x1b[31m第二行", "score": 1.234, "length": 7}
    MetricsLog(tmp_path).write_samples([row])
    said = capsys.readouterr().out
    assert "第一行\n" in said and "\\n" not in said and "\x1b" not in said
    assert "│ (score +1.23, 7 tokens)" in said
    show_answer("问" * 100, "答", "step 0")
    assert max(2 * len(line) for line in capsys.readouterr().out.splitlines() if "问问" in line) <= 2 * 60


def test_a_warning_is_one_sentence_without_the_line_that_raised_it(capsys):
    with warnings.catch_warnings():
        launch.silence_libraries()
        warnings.simplefilter("always")
        warnings.warn("first\nsecond \x1b[31m", UserWarning, stacklevel=1)
    said = capsys.readouterr().err
    assert said == "warning: first second \ufffd[31m\n" and __file__ not in said


# ---- trackers ----
def test_every_tracker_that_the_flag_takes_can_be_opened():
    assert tuple(OPENERS) == TRACKERS


def test_tensorboard_is_opened_by_the_command_that_the_run_prints(tmp_path, capsys):
    log = MetricsLog(tmp_path, "tensorboard")
    log.write({"step": 1, "loss": 0.5})
    log.close()
    folder = Path(capsys.readouterr().out.rpartition("tensorboard --logdir ")[2].strip())
    assert list(folder.glob("events.*"))


def test_swanlab_is_refused_by_the_package_it_needs_or_writes_offline(tmp_path, capsys, monkeypatch):
    if find_spec("swanlab") is None:
        with pytest.raises(ValueError, match=r"--log_with swanlab needs the package swanlab.*pip install swanlab=="):
            launch.require_optional(SimpleNamespace(log_with="swanlab"))
        launch.require_optional(SimpleNamespace(log_with="wandb"))
        return
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    log = MetricsLog(tmp_path, "swanlab", {"rate": 1.0})
    log.write({"step": 1, "loss": 0.5})
    log.write_samples([{"step": 1, "query": "q", "response": "a"}], shown=0)
    log.close()
    assert "swanlab sync" in capsys.readouterr().out
    assert list(tmp_path.glob("swanlab/run-*/*.swanlab")) and list(tmp_path.glob("swanlab/run-*/media/text/*"))


# ---- the next command ----
def test_every_next_command_is_one_that_the_next_script_takes(tmp_path, capsys):
    """SFT names reward training, which names PPO: each command parses, and has what the stage before was given."""
    given = ["--prompt_template", "问 {prompt} 答", "--model_name", "a base", "--lora_target_models", "q_proj|v_proj"]
    sft = importlib.import_module("sft_training").parse_args(given)
    endings.say_end("made", "good", sft, "reward_modeling.py", model_name=sft.model_name, dataset_name="pairs.jsonl")
    words = shlex.split(capsys.readouterr().out.partition("next: ")[2])
    assert words[:2] == ["python", "reward_modeling.py"]
    reward = importlib.import_module("reward_modeling").parse_args(words[2:])
    assert reward.prompt_template == "问 {prompt} 答" and reward.model_name == "a base"

    closing.say_finished(reward, {"eval_accuracy": 0.945}, 1234)
    said = capsys.readouterr().out
    assert said.startswith("reward adapter in runs/reward: right on 94.5% of 1,234 held-out pairs\n")
    ppo = importlib.import_module("rl_training").parse_args(shlex.split(said.partition("next: ")[2])[2:])
    assert (ppo.base_model_name, ppo.reward_model_lora_path) == ("a base", "runs/reward")
    assert ppo.lora_target_models == "q_proj|v_proj"


def test_a_comparison_says_how_often_the_last_version_wins():
    def cells(*scores):
        return [Answer("text", 3, True, score) for score in scores]

    columns = {"base": cells(0.0, 1.0, 2.0, 3.0), "sft": cells(0, 0, 0, 0), "ppo": cells(1.0, 1.0, 3.0, 0.0)}
    assert wins_in_words(columns) == "ppo scores above base on 62% of 4 prompts"
    assert wins_in_words({"base": cells(None), "ppo": cells(None)}) is None
    assert wins_in_words({"base": cells(1.0)}) is None
