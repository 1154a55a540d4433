"""A run to its exit code: optional packages, output of the first process alone, errors as one sentence."""

import json
import os
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path

import transformers

from rlhf.artefacts.damage import is_out_of_memory
from rlhf.artefacts.files import NO_ROOM, is_too_large, limit_of_files
from rlhf.artefacts.resume import finished_run
from rlhf.run import workers
from rlhf.run.environment import read_launch
from rlhf.run.sharing import processes_a_copy
from rlhf.run.startup import hand_signals_back, looks_only, prepare
from rlhf.run.stopping import Collapse, Interrupted, listen
from rlhf.run.terminal import printable, shortened

# Flag, and its value where only one needs it -> the package, in the version that was tried.
NEEDED = {
    ("load_in_4bit", None): ("bitsandbytes", "0.50.2"),
    ("deepspeed", None): ("deepspeed", "0.19.8"),
    ("log_with", "swanlab"): ("swanlab", "0.10.3"),
}

# What becomes a sentence, beside a lack of memory in whichever form it comes.
MENDABLE = (ValueError, OSError, FloatingPointError, MemoryError, Collapse)


def require_optional(args) -> None:
    """Refuse a flag without its package, a DeepSpeed configuration that cannot work, shards that do not add up.

    Raises: ValueError in one sentence, with the command that installs the package; those of `check_deepspeed` and of
        `processes_a_copy`.
    """
    for (flag, only), (package, version) in NEEDED.items():
        value = getattr(args, flag, None)
        # None stands for any value of the flag.
        if value and only in (None, value) and find_spec(package) is None:
            raise ValueError(
                f"--{flag} {value} needs the package {package}, which is not installed: "
                f"pip install {package}=={version}"
            )

    if getattr(args, "deepspeed", None):
        check_deepspeed(args.deepspeed)
    processes_a_copy(getattr(args, "shard_base", "0"))


def check_deepspeed(file: str) -> None:
    """Refuse a DeepSpeed configuration that cannot be read, or under which checkpoints would hold empty adapters.

    Raises: FileNotFoundError, ValueError.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"--deepspeed {file} does not exist: give a JSON file such as scripts/deepspeed/zero2.json"
        )

    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed {file} is not JSON: {error}") from error

    # Stage 3 splits the weights over the processes: each would save only its own part.
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) > 2 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"--deepspeed {file} asks for ZeRO stage 3, under which checkpoints would hold empty adapters: set "
            "stage3_gather_16bit_weights_on_model_save to true, as scripts/deepspeed/zero3.json does"
        )


# ---- processes ----
def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) as the launcher says, before any process group exists."""
    launch = read_launch()
    return launch.rank, launch.size


def say(*lines: str) -> None:
    """Print on the first process only."""
    if rank_and_size()[0] == 0:
        print(*lines, sep="\n", flush=True)


def already_finished(args, stage: str, run: dict | None = None) -> bool:
    """Return True, and say so, if --resume_from_checkpoint True asks for this very run again after its end.

    Asked twice: before anything is loaded, and again with `run` (what this command would write into run.json) where a
    path is spelled otherwise, so that only what it holds can tell.

    Raises: ValueError naming what differs where output_dir holds the finished run of another command.
    """
    inspects = args.inspect_data or getattr(args, "audit_only", False)
    # Looking at the data changes nothing, in a finished run's directory either.
    if inspects or not finished_run(args, stage, run):
        return False
    say(f"{args.output_dir} is finished: --overwrite_output_dir True trains it again")
    return True


def is_launched(nproc: int = 0) -> bool:
    """Return True if torchrun, accelerate or the like has started this process; --nproc wins over a single one."""
    return read_launch(nproc).launched


def silence_libraries() -> None:
    """Silence what libraries print when nothing is wrong: bars while loading, heads that are new on purpose."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\..*")
    # peft looks whether the vocabulary was enlarged, which nothing here does.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    # Everybody's warnings: a line of a library's source says nothing to whoever trains.
    warnings.showwarning = _one_sentence


def _one_sentence(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning for whoever trains, without the line of the source that raised it."""
    print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)


# ---- from the command line to the exit code ----
def run_script(main, parse_args) -> None:
    """Run a script whose libraries are loaded: `run_main` with what `startup.prepare` makes of the command line."""
    run_main(main, prepare(parse_args))


def run_main(main, args) -> None:
    """Run `main(args)` to its exit code.

    Exit codes: 0 done, 1 an error (a sentence; RLHF_TRACEBACK=1 adds the traceback), 2 usage, 3 stopped by the guard,
    130 and 143 stopped by SIGINT and SIGTERM.
    """
    silence_libraries()
    hand_signals_back()
    if not looks_only(args):
        workers.meet()
    # Only a run that can be resumed stops in order; any other ends at the signal.
    if hasattr(args, "resume_from_checkpoint"):
        listen()

    try:
        # An error that a user can mend becomes one sentence and an exit code.
        main(args)
    except Interrupted as stop:
        _say_how_to_go_on(stop)
        sys.exit(128 + stop.signum)
    # Merging and comparing do not listen for signals: there is nothing of theirs to resume.
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if workers.lost_another(error):
            script = os.path.basename(sys.argv[0])
            print(f"{script}: error: another process of this run has ended, and this one with it", file=sys.stderr)
            sys.exit(1)
        # Errors that a user can mend. Any other is a bug, and keeps its traceback.
        if not isinstance(error, MENDABLE) and not is_out_of_memory(error):
            raise
        if os.environ.get("RLHF_TRACEBACK"):
            traceback.print_exc()
        print(f"{os.path.basename(sys.argv[0])}: error: {sentence(error, args)}", file=sys.stderr)
        # A collapse has a code of its own, for a script to tell it from a mistake in the command.
        sys.exit(3 if isinstance(error, Collapse) else 1)


def sentence(error: Exception, args) -> str:
    """An error in one line; a full disk always in the same words, whichever file met it."""
    # Where a step ran out of memory the sentence names the batch (rlhf/run/stopping.py).
    if is_out_of_memory(error) and not (isinstance(error, MemoryError) and str(error)):
        why = (str(error).strip() or "MemoryError").partition("\n")[0][:120]
        return (
            f"this machine's memory is used up ({why}): end other programs, or lower --max_length and the batch sizes"
        )
    if is_too_large(error):
        return f"{getattr(error, 'filename', None) or 'a file'}: {limit_of_files()}"
    if getattr(error, "errno", None) not in NO_ROOM:
        # It may name files and hold contents that are not ours, of any length.
        return shortened(printable(" ".join(str(error).split("\n"))))

    # The directory may not be there yet.
    folder = getattr(args, "output_dir", ".")
    existing = folder if os.path.isdir(folder) else "."
    free = shutil.disk_usage(existing).free
    resume = " with --resume_from_checkpoint True" if hasattr(args, "resume_from_checkpoint") else ""
    return (
        f"the disk of {error.filename or folder} is full: {free:,} bytes are free in --output_dir {folder}. "
        f"Make room, and give the same command again{resume}"
    )


def _say_how_to_go_on(stop: Interrupted) -> None:
    """Say where the run was saved, and the command that goes on from there."""
    rank, _ = rank_and_size()
    if rank:
        return

    # The short name, for the same environment is active when the command is given again.
    python = os.path.basename(sys.executable)
    # Other flags stay as they were typed: a resume refuses most that differ.
    words = [python, *_without_values(sys.argv), "--resume_from_checkpoint", "True"]
    command = shlex.join(words)

    script = os.path.basename(sys.argv[0])
    where = f"saved in {stop.saved}" if stop.saved else "nothing to save yet"
    print(
        f"{script}: {stop}; {where}; no final adapter was written. Go on with:\n  {command}",
        file=sys.stderr,
    )


def _without_values(words: list[str]) -> list[str]:
    """A command line without the flags that say how to start, and their values."""
    kept = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        # "--output-dir", "--output_dir" and "--output_dir=x" all name one flag.
        flag = word.replace("-", "_").lstrip("_")
        name, equals, _ = flag.partition("=")
        if name not in ("overwrite_output_dir", "resume_from_checkpoint"):
            kept.append(word)
        elif not equals and rest and not rest[0].startswith("--"):
            # Its value is the next word; a switch may stand without one.
            rest.pop(0)
    return kept
