"""Damage small data files of every format at random and load them: rows in order, or one sentence on what is wrong.

    python tests/long/fuzz_data.py --files 1000 --seed 0      a line for each failure, and a summary
    python tests/long/fuzz_data.py --scripts             by the three scripts' command lines, with --inspect_data True
    python tests/long/fuzz_data.py --seed 0 --only 17         one file again, with its traceback

A file depends on the seed and its number alone.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

# Nothing here may reach the network; set before the libraries read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Started as a script, Python looks for modules beside this one alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from adapters import random_adapter
from commands import run_here
from fuzz_files import SUFFIXES, write_file
from fuzz_rows import KINDS, SHAPES
from soak import make_base
from stages import words

from rlhf.data.arguments import DataArguments
from rlhf.data.funnel import Funnel
from rlhf.data.reading import load_splits

# Fields of a row of each kind, and the script that reads it.
FIELDS = {"sft": {"prompt", "answer"}, "preference": {"prompt", "chosen", "rejected"}, "prompt": {"prompt"}}
SCRIPTS = {"sft": "sft_training", "preference": "reward_modeling", "prompt": "rl_training"}
# Characters of a message at most: a damaged row must not be printed whole.
MESSAGE_LIMIT = 2000


# ---- one case ----
def write_case(folder: Path, draw: random.Random) -> tuple[DataArguments, str, int | None]:
    """A damaged file, a pair of them or a directory of them: flags that name it, the kind to read, how many rows."""
    shape = draw.choice(list(SHAPES))
    suffix = draw.choice(SUFFIXES)
    names = draw.choice([["a"], ["a"], ["a"], ["a", "held_out"], ["data/train", "data/test"]])
    paths = [folder / f"{name}{suffix}" for name in names]
    counts = []
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        counts.append(write_file(path, shape, draw))

    flags = {"eval_size": draw.choice((0, 0.2, 2)), "bad_rows": draw.choice(("stop", "skip"))}
    if "held_out" in names:
        # One time of three the file is its own evaluation set, and its rows are read twice.
        evaluation = draw.choice((paths[1], paths[1], paths[0]))
        flags["eval_dataset_name"] = str(evaluation)
        counts = counts if evaluation == paths[1] else counts[:1] * 2
    if draw.random() < 0.05:
        flags["prompt_field"] = draw.choice(("prompt", "instruction", "missing"))

    # The split of a directory is told by the names of its files.
    source = folder / "data" if "data/train" in names else paths[0]
    kind = KINDS[shape] if draw.random() < 0.6 else draw.choice(list(FIELDS))
    rows = None if None in counts else sum(counts)
    return DataArguments(dataset_name=str(source), **flags), kind, rows


def check(seed: int, number: int, bases: dict[str, list[str]] | None = None) -> str:
    """Write, load and check one case. Returns: "rows", or the kind of refusal. Raises: whatever is wrong.

    Args:
        bases: flags of each script that name a base and what else has to be there: the case then goes through the
            command line of the script that reads its kind. None: through the loader alone.
    """
    draw = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory() as name:
        args, kind, count = write_case(Path(name), draw)
        if bases:
            return _by_script(args, kind, name, bases)
        return _by_loader(args, kind, name, count)


def _by_loader(args: DataArguments, kind: str, folder: str, count: int | None) -> str:
    bad_rows = Path(folder) / "run" / "bad_rows.jsonl"
    try:
        train, evaluation, funnel = load_splits(args, kind, seed=0, bad_rows_file=bad_rows)
    except (ValueError, OSError) as error:
        return _kind_of_refusal(str(error), folder)

    _check_rows(train, evaluation, kind, folder)
    _check_funnel(funnel, len(train) + len(evaluation), args.bad_rows, bad_rows)
    # An array is given up where its brackets nest too deeply, and its one bad row says so.
    if count is not None and "nothing after it can be read" not in " ".join(funnel.bad_rows):
        assert funnel.read == count, f"{funnel.read} rows read, {count} written"
    return "rows"


def _by_script(args: DataArguments, kind: str, folder: str, bases: dict[str, list[str]]) -> str:
    script = SCRIPTS[kind]
    output = Path(folder) / "run"
    named = ("dataset_name", "eval_dataset_name", "eval_size", "bad_rows", "prompt_field")
    flags = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    flags |= {"inspect_data": True, "output_dir": output, "bf16": False}
    code, printed, said = run_here(script, *bases[script], *words(flags))

    assert not output.exists(), "a look at the data made an output directory"
    assert "\x1b" not in printed, "what is printed steers the terminal"
    if code == 0:
        kept = re.search(r"^kept +[1-9]", printed, re.MULTILINE)
        assert kept and not said, f"{printed[-300:]!r} {said!r}"
        return "rows"

    # Anything else than one line of this form is a crash.
    start = f"{script}.py: error: "
    assert code == 1 and said.startswith(start) and said.endswith("\n"), f"exit code {code}: {said!r}"
    return _kind_of_refusal(said.removeprefix(start).removesuffix("\n"), folder)


def make_bases(base: str, folder: Path) -> dict[str, list[str]]:
    """Flags of each script that name `base`, and for PPO adapters of it, which are written into `folder`."""
    ppo = {
        "base_model_name": base,
        "sft_model_lora_path": random_adapter(base, folder / "sft"),
        "reward_model_lora_path": random_adapter(base, folder / "reward", "reward", seed=1),
    }
    flags = {script: ["--model_name", base] for script in SCRIPTS.values()}
    return flags | {"rl_training": words(ppo)}


# ---- what has to hold ----
def _check_rows(train: list[dict], evaluation: list[dict], kind: str, folder: str) -> None:
    assert train, "no training row, and no word of it"
    both = {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    assert not both, "a prompt on both sides"

    for row in train + evaluation:
        assert set(row) - {"turns"} == FIELDS[kind] | {"where", "opening"}, f"fields {set(row)}"
        assert re.match(re.escape(folder) + r"/.+:\d+$", row["where"]), f"where is {row['where']!r}"
        for name in FIELDS[kind]:
            # Half of a surrogate pair would fail here, as it would in any file that is written.
            row[name].encode("utf-8")
            assert row[name].strip("\0\u200b\ufeff \n"), f"nothing to see in {name}"
        assert kind != "preference" or row["chosen"] != row["rejected"], "no preference"


def _check_funnel(funnel: Funnel, kept: int, bad_rows: str, file: Path) -> None:
    counts = funnel.as_dict()
    assert counts["kept"] == kept, f"{kept} rows but {counts}"
    every = (counts["read"], counts["expanded"], *counts["dropped"].values())
    assert min(every) >= 0, f"negative: {counts}"

    # Bad rows are counted, listed and written, and all three agree.
    assert len(funnel.bad_rows) == counts["dropped"].get("malformed", 0), f"{funnel.bad_rows} but {counts}"
    assert bad_rows == "skip" or not funnel.bad_rows, f"not stopped at {funnel.bad_rows}"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    written = [json.loads(line) for line in lines]
    listed = [f"{row['where']}: {row['reason']}" for row in written]
    assert listed == funnel.bad_rows, "bad_rows.jsonl has other rows"
    funnel.table().encode("utf-8")


# Messages that a refusal may have; any other is counted as "other".
REFUSALS = {
    "malformed rows": r"^malformed rows: \S+:\d+: ",
    "no usable row": r"has no usable row",
    "no fitting columns": r"no \w+ format fits the columns|is not among the columns",
    "empty file": r"is empty",
    "UTF-16": r"is UTF-16 text",
    "one indented object": r"one indented JSON object",
    "Parquet": r"no readable Parquet file",
    "column names": r"csv:\d+: (not CSV|byte 0x)|column name .* stands twice",
    "too few to split": r"cannot give \d+ evaluation rows",
    "all too long": r"fits into --max_prompt_length|leaves no (row|pair) to train on",
    "all overlap": r"every training prompt is in the evaluation rows",
}


def _kind_of_refusal(message: str, folder: str) -> str:
    assert len(message) < MESSAGE_LIMIT, f"a message of {len(message)} characters: {message[:200]}"
    assert len(message.splitlines()) == 1 and message.isprintable(), f"not one line: {message!r}"
    assert folder in message or re.search(r"--[a-z_]{5}", message), f"neither file nor flag in: {message}"

    for name, pattern in REFUSALS.items():
        if re.search(pattern, message):
            return name
    return f"other: {message}"


# ---- many files ----
def run(seed: int, numbers: range, bases: dict[str, list[str]] | None = None) -> tuple[Counter, list[str]]:
    """Check many cases (see `check`). Returns: how often each outcome came, and a line for each failure."""
    outcomes = Counter()
    failures = []
    for number in numbers:
        try:
            outcomes[check(seed, number, bases)] += 1
        # Any exception is what this looks for. A Ctrl-C is no Exception, and still ends the run.
        except Exception as error:
            failures.append(f"--seed {seed} --only {number}: {type(error).__name__}: {str(error)[:300]!r}")
    return outcomes, failures


def look_at(seed: int, number: int, bases: dict[str, list[str]] | None) -> int:
    """Print the outcome of one case, or its traceback. Returns: the exit code."""
    try:
        print(check(seed, number, bases))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    """Check the files that the command line asks for; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--scripts", action="store_true", help="by the scripts' command lines, not the loader alone")
    parser.add_argument("--only", type=int, help="the number of one file, to see its traceback")
    args = parser.parse_args()

    # The scripts load a base, the loader alone needs none.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = make_bases(make_base(folder / "base"), folder) if args.scripts else None
        if args.only is not None:
            return look_at(args.seed, args.only, bases)
        start = time.perf_counter()
        outcomes, failures = run(args.seed, range(args.files), bases)

    seconds = time.perf_counter() - start
    for failure in failures:
        print(failure)
    counted = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"{args.files} files, seed {args.seed}: {counted}; {len(failures)} failed; {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
