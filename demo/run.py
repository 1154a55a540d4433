"""All stages of the demo, or of one of its two other stories, in one warm process.

In:  a story, a seed. Out: <output_dir>; beside the results seconds.txt, a line a command: name, seconds, CPU-seconds.

The libraries are imported once. Each command line is printed as one would type it, and then parsed and run by its
script's own parse_args and main in a forked child: a stage sees neither another stage's random state nor its memory.

    python -m demo.run --story demo --output_dir runs/demo --seed 0
"""

import gc
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# The models are far too small for a GPU, and nothing is fetched from a hub; set before the libraries read it. One
# thread a command: the models gain little by a second, and on a busy machine two threads wait for each other.
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from demo.commands import STORIES, Command, Stage, page_command
from rlhf.flags import flag, parse

ROOT = Path(__file__).resolve().parents[1]
# What the stages import, lazily in part: imported once, every child has it.
WARM = (
    "torch", "torch._dynamo", "transformers", "peft", "trl", "datasets", "accelerate", "matplotlib.pyplot",
    "sft_training", "reward_modeling", "rl_training", "merge_lora", "compare", "rlhf.run.launch",
    "demo.build", "demo.show", "demo.evaluate", "demo.report", "demo.story", "demo.pairs",
)  # fmt: skip
# A process that has used threads or Apple's frameworks must not be forked there: each command starts cold.
FORKS = sys.platform == "linux"


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/run.py, and of the three scripts that call it."""

    story: str = flag("demo", help="which of the three to run", choices=list(STORIES))
    output_dir: str = flag("", help="where it goes; by default runs/<story>")
    demo_dir: str = flag(
        "runs/demo", help="a finished demo to start from, run first if missing; for the other stories"
    )
    seed: int = flag(0, help="everything random starts here")
    smoke: bool = flag(False, help="a run of seconds a stage, to see that everything works")
    language: str = flag("en", help="of the words in the demo's picture ppo.png", choices=["en", "zh"])
    page: bool = flag(False, help="at the end open the page of playground.py, to vote between SFT and PPO")
    build_base: bool = flag(
        False, help="pretrain the base (6 minutes of a core) in place of the shipped one, which is for seed 0 only"
    )

    def __post_init__(self):
        names = {"demo": "runs/demo", "collapse": "runs/demo_collapse", "long": "runs/demo_long"}
        self.output_dir = self.output_dir or names[self.story]


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


# ---- one command ----
def typed(command: Command) -> str:
    """The command as one would type it."""
    words = shlex.join(["python", *command.argv])
    return words + (f" > {command.log}" if command.log else "")


def start(command: Command) -> int:
    """Start a command in a process of its own, forked from this one where that is safe; its process id."""
    sys.stdout.flush()
    if not FORKS:
        return _start_cold(command)
    pid = os.fork()
    if pid == 0:
        _child(command)
    return pid


def _start_cold(command: Command) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = open(command.log, "w") if command.log else None  # noqa: SIM115 (the child's until it ends)
    process = subprocess.Popen(
        [sys.executable, *command.argv], stdout=out, stderr=out, env=environment, start_new_session=True
    )
    return process.pid


def _child(command: Command) -> None:
    """Run a command line in this forked process; does not return."""
    # A Ctrl-C reaches it through the parent alone, once, as it does under the shell scripts.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command.log:
        file = os.open(command.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)

    code = 1
    try:
        from rlhf.run import forks, launch

        forks.own_pool()
        module = importlib.import_module(command.module)
        words = list(command.argv)
        sys.argv = words[1:] if words[0] == "-m" else words
        launch.run_script(module.main, module.parse_args)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # Without the exit handlers of the process that this one is a copy of.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Processes:
    """The commands that run now; a signal to this process goes on to them."""

    def __init__(self):
        self.running: dict[int, Command] = {}
        self.signum = 0
        self.here = os.getpid()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._forward)

    def _forward(self, signum: int, frame) -> None:
        # Between the fork and its own handlers a child still has this one.
        if os.getpid() != self.here:
            os._exit(128 + signum)
        self.signum = signum
        self.tell(signum)

    def tell(self, signum: int) -> None:
        for pid in list(self.running):
            os.kill(pid, signum)

    def run(self, commands: tuple[Command, ...], times: Path) -> None:
        """Run commands side by side and note their times.

        Raises: SystemExit with the code of the first that failed, or 128 + the number of a signal.
        """
        begin = time.monotonic()
        for command in commands:
            # A signal may have come between two commands.
            if self.signum:
                break
            self.running[start(command)] = command
        # One that came before a child was known here has not reached it.
        if self.signum:
            self.tell(self.signum)

        first = 0
        while self.running:
            pid, status, usage = os.wait4(-1, 0)
            command = self.running.pop(pid, None)
            if command is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code
            note(times, command.name, time.monotonic() - begin, usage.ru_utime + usage.ru_stime)
            # The others would wait for what a failed one was to write.
            if code not in command.fine and not first:
                first = code
                _point_to_log(command)
                self.tell(signal.SIGTERM)

        if first or self.signum:
            sys.exit(128 + self.signum if self.signum else first)


def _point_to_log(command: Command) -> None:
    if command.log:
        print(f"{command.name} failed: the end of {command.log}", file=sys.stderr)
        print("\n".join(Path(command.log).read_text(errors="replace").splitlines()[-5:]), file=sys.stderr)


def note(times: Path, name: str, seconds: float, cpu: float) -> None:
    """Add a line to seconds.txt."""
    with times.open("a", encoding="utf-8") as out:
        out.write(f"{name} {seconds:.1f} {cpu:.1f}\n")


# ---- all of them ----
def warm_up(times: Path) -> None:
    """Import what the stages need, once."""
    if not FORKS:
        return
    print("importing torch, transformers, peft, once for all stages", flush=True)
    begin = time.monotonic()
    # What this process has used so far, all of it imports.
    for name in WARM:
        importlib.import_module(name)
    # Stages collect garbage often: what is imported stays out of it.
    gc.collect()
    gc.freeze()
    note(times, "imports", time.monotonic() - begin, sum(os.times()[:2]))


def heading(number: int, stages: list[Stage]) -> str:
    """As in `[3/7] reward model, about 0:40`."""
    stage = stages[number]
    minutes, seconds = divmod(stage.seconds, 60)
    return f"\n[{number + 1}/{len(stages)}] {stage.title}, about {minutes}:{seconds:02d}"


def main(args: Arguments) -> None:
    """Run the stages of a story one after the other."""
    processes = Processes()
    if args.story != "demo" and not (Path(args.demo_dir) / "summary.json").is_file():
        print(f"{args.demo_dir} holds no finished demo: running it first", flush=True)
        tell(processes, Arguments(output_dir=args.demo_dir, seed=args.seed, smoke=args.smoke, language=args.language))
    tell(processes, args)
    if args.page and args.story == "demo":
        # The page takes this process's place, and ends with Ctrl-C.
        os.execv(sys.executable, [sys.executable, *page_command(args.output_dir)])


def tell(processes: Processes, args: Arguments) -> None:
    """One story from its first stage to its last."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    times = output_dir / "seconds.txt"
    # merge_lora.py refuses a directory in use, and the times of an earlier run would be added to this one's.
    times.unlink(missing_ok=True)
    if args.story == "demo":
        for name in ("merged", "ppo"):
            shutil.rmtree(output_dir / name, ignore_errors=True)

    begin = time.monotonic()
    warm_up(times)
    stages = STORIES[args.story](args)
    for number, stage in enumerate(stages):
        # Commands run side by side, so their seconds do not add up; the last stage reports this.
        if number == len(stages) - 1:
            note(times, "all", time.monotonic() - begin, sum(os.times()[:4]))
        print(heading(number, stages), flush=True)
        for commands in stage.turns:
            for command in commands:
                print(f"$ {typed(command)}", flush=True)
            processes.run(commands, times)


if __name__ == "__main__":
    main(parse_args())
