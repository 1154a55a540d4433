"""Give the five scripts random command lines: each runs, or ends in one sentence, and never harms what it reads.

    python tests/long/fuzz_command_lines.py --lines 1000 --seed 0    a line for each failure, and a summary
    python tests/long/fuzz_command_lines.py --seed 0 --only 17       one command line again, with all that it printed

A command line depends on the seed and its number alone: the shortest one of a script with up to three mistakes in it.
"""

import dataclasses
import hashlib
import importlib
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Nothing here may reach the network; set before the libraries read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "long")]

from forked import TERM, Zygote  # noqa: E402
from fuzzing import fuzz_arguments  # noqa: E402
from short_runs import SCRIPTS, make_inputs, short_run  # noqa: E402
from soak import make_base  # noqa: E402

# A run that goes on for so many seconds is told to stop, as it may have been told to be long; then it has some more.
PATIENCE = 40
SECONDS = 100
BYTES = 8 << 30

# Values for any flag.
ODD = (
    "", " ", "--", "-", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e999", "1e-300", "1e30", str(10**9),
    str(10**20), "-" + str(10**20), "True", "False", "None", "maybe", "x", "0x10", "1_0", "１２", "小猫", "a\x1b[31mb",
    "\u202e\u2028", "\udcff", "{prompt}", "{", "%s", "a=b", "=", "*", "(a+)+$", "(", "x" * 5000, "chat", "auto",
    "all-linear", "/dev/null", "/dev/zero", "~", "owner/name", "a/b/c", "http://127.0.0.1:9/x", "s3://bucket/x",
)  # fmt: skip

# What may stand in place of a file or a directory, within the folder of the case.
PLACES = (
    "missing", "missing/deeper", "empty", "empty/.", "file", "file/inside", "pipe", "dangling", "loop", "unreadable",
    "inputs", "inputs/base", "inputs/sft", "inputs/reward", "inputs/answers.jsonl", "inputs/base/config.json", ".",
    "two words", "inputs/sft/adapter_model.safetensors", "inputs/./base/../sft", "out", "小猫", "new\nline",
)  # fmt: skip

# Kinds of mistakes; those that the parser does not find are the interesting ones.
MISTAKES = ("value add path " * 4 + "repeat drop swap typo bare none many").split()

# A write outside of the folder of a case would be a mess, and none of these is meant by anybody.
OUTPUT = "output_dir"


def make_places(at: Path) -> None:
    """Fill the folder of a case with what its command line may name."""
    for name in ("empty", "two words"):
        (at / name).mkdir()
    (at / "file").write_text("text\n")
    (at / "unreadable").mkdir(mode=0)
    os.mkfifo(at / "pipe")
    (at / "dangling").symlink_to(at / "nowhere")
    (at / "loop").symlink_to(at / "loop")


def digest(folder: Path) -> dict[str, str]:
    """Name -> hash of the files in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- a command line ----
class Line:
    """A command line as a list of [flag, values ...], to be spoilt."""

    def __init__(self, script: str, words: list[str], draw: random.Random):
        self.flags: list[list[str]] = []
        for word in words:
            if word.startswith("--"):
                self.flags.append([word])
            else:
                self.flags[-1].append(word)
        fields = dataclasses.fields(importlib.import_module(script).ScriptArguments)
        self.known = {field.name: field for field in fields}
        self.draw = draw

    def value(self, name: str) -> str:
        """A value for a flag: one that fits its type, one for another, or a place."""
        field = self.known.get(name)
        if name == OUTPUT:
            return self.draw.choice(PLACES)
        kind = self.draw.random()
        choices = field.metadata.get("choices") if field else None
        if choices and kind < 0.8:
            return str(self.draw.choice(choices))
        if field and isinstance(field.default, bool) and kind < 0.8:
            return self.draw.choice(("True", "False"))
        if field and isinstance(field.default, int | float) and kind < 0.8:
            return str(self.draw.choice((0, 1, -1, 2, 3, 0.1, 1.0, field.default, 10**9, -(10**9), 1e-9)))
        return self.draw.choice(self.draw.choice((ODD, PLACES)))

    def spoil(self) -> None:
        """Make one mistake."""
        draw = self.draw
        at = draw.randrange(len(self.flags))
        flag = self.flags[at]
        name = flag[0][2:]
        mistake = draw.choice(MISTAKES)
        if mistake == "value":
            flag[1:] = [self.value(name)]
        elif mistake == "add":
            other = draw.choice(sorted(self.known))
            self.flags.append([f"--{other}", self.value(other)])
        elif mistake == "repeat":
            self.flags.append([flag[0], self.value(name)])
        elif mistake == "drop" and len(self.flags) > 1:
            del self.flags[at]
        elif mistake == "swap":
            other = draw.choice(self.flags)
            if OUTPUT not in (name, other[0][2:]):
                flag[1:], other[1:] = other[1:], flag[1:]
        elif mistake == "typo":
            spoilt = draw.randrange(len(flag))
            word = flag[spoilt]
            place = draw.randrange(len(word)) if word else 0
            flag[spoilt] = word[:place] + draw.choice(("", "x", "_", "-", "/")) + word[place + 1 :]
        elif mistake == "path" and name != OUTPUT:
            flag[1:] = [draw.choice(PLACES)]
        elif mistake == "bare":
            self.flags.insert(at, [draw.choice((*ODD, *PLACES))])
        elif mistake == "none":
            flag[1:] = []
        elif mistake == "many":
            flag[1:] += [draw.choice(ODD) for _ in range(draw.randint(1, 3))]

    def words(self) -> list[str]:
        """The command line, some values written as --flag=value."""
        line = []
        for flag in self.flags:
            if len(flag) == 2 and self.draw.random() < 0.2:
                line.append("=".join(flag))
            else:
                line += flag
        # A NUL cannot stand in a command line, and anything else can.
        return [word.replace("\0", "") for word in line]


# ---- one case ----
def check(zygote: Zygote, world: Path, seed: int, number: int, shown: bool = False) -> str:
    """Run one command line. Returns: "exit N", or what is wrong, with the command line."""
    draw = random.Random(f"{seed} {number}")
    at = Path(tempfile.mkdtemp(dir=world.parent)) / "case"
    shutil.copytree(world, at / "inputs")
    make_places(at)
    inputs = make_inputs_of(at / "inputs")
    script = draw.choice(SCRIPTS)
    line = Line(script, [*short_run(script, inputs), f"--{OUTPUT}", "out"], draw)
    for _ in range(draw.randint(1, 3)):
        line.spoil()
    words = outside_kept_out(line.words())

    before = digest(at / "inputs")
    log = at.parent / "log"
    job = {"seconds": SECONDS, "bytes": BYTES, "signum": TERM, "delay": PATIENCE, "cwd": str(at)}
    try:
        code = zygote.run_script(script, words, log, environment={"WANDB_MODE": "offline"}, **job)
        said = log.read_bytes().decode("utf-8", "replace") if log.stat().st_size < 1 << 20 else "over a megabyte"
        lost = [name for name, content in before.items() if digest(at / "inputs").get(name) != content]
    finally:
        if not shown:
            (at / "unreadable").chmod(0o700) if (at / "unreadable").exists() else None
            shutil.rmtree(at.parent)
    if shown:
        print(said, f"\nexit code {code}; files in {at}")

    where = f"{number} {script} {shlex.join(words)[:600]!r}"
    errors = [row for row in said.splitlines() if ": error: " in row]
    if "Traceback" in said:
        return f"TRACEBACK {where}: {said.strip().splitlines()[-1][:160]}"
    if lost and OUTPUT not in "".join(words):
        return f"LOST {where}: {lost}"
    if lost and not said.count("inputs"):
        return f"LOST {where}: {lost[:3]}"
    if "\x1b" in said or "\u202e" in said:
        return f"ESCAPES {where}"
    if code in (1, 2) and len(errors) == 1 and len(errors[0]) < 2500:
        return f"exit {code}"
    if code == 0 and not errors:
        return "exit 0"
    # Only a run that had begun its steps was meant to be long.
    if code == 128 + TERM and "step " in said:
        return f"exit {code}"
    return f"EXIT {code} {where}: {said.strip()[-300:]}"


def outside_kept_out(words: list[str]) -> list[str]:
    """The words without an output directory elsewhere, whichever mistake has made one."""
    kept = []
    for number, word in enumerate(words):
        previous = words[number - 1].replace("-", "_") if number else ""
        output = previous == f"__{OUTPUT}" or word.replace("-", "_").startswith(f"__{OUTPUT}=")
        value = word.partition("=")[2] if "=" in word else word
        leaves = value.startswith(("/", "~")) or ".." in value
        kept.append("out" if output and leaves and previous == f"__{OUTPUT}" else word)
        if output and leaves and previous != f"__{OUTPUT}":
            kept[-1] = f"--{OUTPUT}=out"
    return kept


def make_inputs_of(folder: Path):
    """The names of the inputs that `make_inputs` has written into a folder that was copied."""
    from short_runs import Inputs

    names = {"base": "base", "answers": "answers.jsonl", "pairs": "pairs.jsonl", "sft": "sft", "reward": "reward"}
    return Inputs(**{name: str(folder / file) for name, file in names.items()})


def main() -> None:
    """Run the command lines that are asked for."""
    args, numbers = fuzz_arguments(__doc__, "lines", 1000)

    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "inputs"
        world.mkdir()
        make_base(world / "base")
        make_inputs(str(world / "base"), world)
        zygote = Zygote()
        seen = Counter()
        for number in numbers:
            what = check(zygote, world, args.seed, number, args.only is not None)
            fine = what.startswith("exit ")
            seen[what if fine else what.split()[0]] += 1
            if not fine:
                print(what, flush=True)
            if number % 100 == 99:
                print(f"{number + 1}: {dict(seen)}", flush=True)
        zygote.close()
    print(f"seed {args.seed}: {dict(seen)}")
    sys.exit(0 if all(what.startswith("exit ") for what in seen) else 1)


if __name__ == "__main__":
    main()
