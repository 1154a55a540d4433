"""Variables of launchers: believed together, refused alone, and never changing numbers unseen."""

import os
import subprocess
import sys

import pytest
from commands import run_here
from forked import ROOT
from short_runs import SCRIPTS, short_run

from rlhf.run.environment import LEFT_ASIDE, MPI_VARIABLES, Launch, leave_aside, read_launch
from rlhf.run.launch import _without_values

PEERS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable of a launcher, whatever runs the tests."""
    for name in (*PEERS, *LEFT_ASIDE, *(name for pair in MPI_VARIABLES for name in pair)):
        monkeypatch.delenv(name, raising=False)


def test_a_launcher_is_believed_and_nothing_means_one_process(monkeypatch):
    assert read_launch() == Launch()
    for name, value in PEERS.items():
        monkeypatch.setenv(name, value)
    # All of them on one machine, where the launcher does not say how many are.
    assert read_launch() == Launch(1, 2, 1, 2, launched=True)
    # A launcher of several processes wins over --nproc.
    assert read_launch(nproc=4).launched


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "8"}, "RANK=8 without WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is no whole number"),
        ({"RANK": "x"}, "RANK='x', which is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "without MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "not by an MPI launcher"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_sentence(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        read_launch()


def test_a_single_process_of_a_launcher_gives_way_to_nproc(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert read_launch().launched and not read_launch(nproc=2).launched
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert read_launch().launched and not read_launch(nproc=2).launched


def test_an_mpi_launcher_of_one_process_is_none(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setenv("PMI_RANK", "0")
    assert read_launch() == Launch()
    # accelerate would have taken it for a launcher.
    assert "PMI_RANK" not in os.environ


def test_settings_that_would_change_numbers_are_left_aside_and_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    (said,) = leave_aside()
    assert said.startswith("ACCELERATE_MIXED_PRECISION=fp16 in the environment is left aside")
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize(("name", "value"), [("RANK", "8"), ("RANK", "x"), ("WORLD_SIZE", "")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_would_keep_silent_says_so_and_fails(monkeypatch, short_inputs, tmp_path, script, name, value):
    monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    code, _, errors = run_here(script, *short_run(script, short_inputs), "--output_dir", str(out))
    assert code == 1
    assert errors.startswith(f"{script}.py: error: the environment has {name}=") and errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_word_is_repeated_without_what_would_steer_a_terminal_and_not_for_pages(short_inputs, script):
    code, _, errors = run_here(script, *short_run(script, short_inputs), "\u202e\x1b[31m" + "x" * 9000)
    assert code == 2 and "error: " in errors
    assert "\u202e" not in errors and "\x1b" not in errors and len(errors) < 2500


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_link_to_itself_as_the_output_directory_is_a_sentence(short_inputs, tmp_path, script):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = str(tmp_path / "loop")
    code, _, errors = run_here(script, *short_run(script, short_inputs), "--output_dir", out)
    assert code == 1 and f"{script}.py: error: " in errors and out in errors


# ---- Python's own variables ----
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_neither_at_a_warning_nor_at_a_character(zygote, short_inputs, tmp_path, script):
    job = {"environment": {"PYTHONWARNINGS": "error"}, "encoding": "ascii"}
    argv = [*short_run(script, short_inputs), "--output_dir", str(tmp_path / "out")]
    assert zygote.run_script(script, argv, tmp_path / "log", **job) == 0, zygote.said()[-3000:]
    assert zygote.said().isascii()
    # What goes into files is no matter of the terminal.
    said = "PYTHONWARNINGS=error is left aside: no run ends at a warning"
    assert said in zygote.said()
    texts = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".jsonl", ".md", ".html")]
    assert script in ("merge_lora", "reward_modeling") or any(not path.read_text("utf-8").isascii() for path in texts)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "gbk"])
def test_other_encodings_of_a_terminal_end_no_run(zygote, short_inputs, tmp_path, encoding):
    argv = [*short_run("compare", short_inputs), "--output_dir", str(tmp_path / "out")]
    log = tmp_path / "log"
    assert zygote.run_script("compare", argv, log, encoding=encoding) == 0
    assert ("小猫喜欢什么" in log.read_text(encoding)) == (encoding == "gbk")


def refusal(*options: str, words: tuple[str, ...] = (), **variables: str) -> str:
    """What `refuse_unusable` says in a Python of its own with these options, variables and words."""
    lines = ("from rlhf.run import environment as e", "try: e.refuse_unusable()", "except ValueError as x: print(x)")
    program = "\n".join(lines)
    command = [sys.executable, *options, "-c", program, *words]
    return subprocess.run(
        command, env={"PYTHONPATH": str(ROOT), **variables}, capture_output=True, text=True, check=True
    ).stdout


def test_a_python_without_docstrings_is_refused_before_a_library_fails():
    assert "unset PYTHONOPTIMIZE" in refusal(PYTHONOPTIMIZE="2")
    assert "unset PYTHONOPTIMIZE" in refusal("-OO")
    assert refusal() == refusal(PYTHONOPTIMIZE="1") == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_so_before_its_libraries_load(short_inputs, tmp_path, script):
    words = [*short_run(script, short_inputs), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-OO", str(ROOT / f"{script}.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.startswith(f"{script}.py: error: Python runs without docstrings")
    assert ended.stderr.count("\n") == 1


def test_a_locale_that_reads_other_letters_is_refused_where_there_are_some():
    bare = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = refusal(words=("小猫",), **bare)
    assert said.startswith("the environment has LC_ALL=POSIX, under which Python reads a command line as ascii")
    assert refusal(words=("cat",), **bare) == ""
    assert refusal(words=("小猫",), LC_ALL="POSIX") == refusal(words=("小猫",), LC_ALL="C.UTF-8") == ""


def test_the_command_that_goes_on_keeps_every_flag_but_those_that_say_how_to_start():
    words = ["a.py", "--overwrite_output_dir", "--steps", "100", "--resume_from_checkpoint", "x", "--seed", "3"]
    assert _without_values(words) == ["a.py", "--steps", "100", "--seed", "3"]
    words = ["a.py", "--overwrite-output-dir", "True", "--steps", "100", "--resume_from_checkpoint=x"]
    assert _without_values(words) == ["a.py", "--steps", "100"]
