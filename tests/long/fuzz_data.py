"""Damage small data files of every format at random and load them: rows in order, or one sentence on what is wrong.

    python tests/long/fuzz_data.py --files 1000 --seed 0      a line for each failure, and a summary
    python tests/long/fuzz_data.py --scripts             by the three scripts' command lines, with --inspect_data True
    python tests/long/fuzz_data.py --seed 0 --only 17         one file again, with its traceback

A file depends on the seed and its number alone.
"""

import argparse
import csv
import io
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Nothing here may reach the network; set before the libraries read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow
import pyarrow.parquet
from adapters import random_adapter
from commands import run_here
from soak import make_base

from rlhf.arguments import DataArguments
from rlhf.data.funnel import Funnel
from rlhf.data.reading import load_splits

FIELDS = {"sft": {"prompt", "answer"}, "preference": {"prompt", "chosen", "rejected"}, "prompt": {"prompt"}}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
MESSAGE_LIMIT = 2000


# ---- valid files ----
def _said(draw: random.Random) -> str:
    return "".join(draw.choice("今天晴雨猫喜欢红茶吗，。？！ab 1\n") for _ in range(draw.randint(1, 20))) + "呢"


def _sharegpt(draw: random.Random, count: int) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": _said(draw)} for n in range(count)]


def _openai(draw: random.Random, count: int) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": _said(draw)} for n in range(count)]


def _hh_pair(draw: random.Random) -> dict:
    asked = f"\n\nHuman: {_said(draw)}\n\nAssistant: "
    return {"chosen": asked + _said(draw), "rejected": asked + _said(draw)}


def _message_pair(draw: random.Random) -> dict:
    sides = {side: _sharegpt(draw, 2)[1] for side in ("chosen", "rejected")}
    return {"conversations": _sharegpt(draw, 3), **sides}


SHAPES: dict[str, Callable[[random.Random], dict]] = {
    "HC3": lambda draw: {"question": _said(draw), "chatgpt_answers": [_said(draw) for _ in range(draw.randint(1, 3))]},
    "alpaca": lambda draw: {"instruction": _said(draw), "input": draw.choice(["", "其一"]), "output": _said(draw)},
    "answers": lambda draw: {"prompt": _said(draw), "answer": _said(draw)},
    "ShareGPT": lambda draw: {"conversations": _sharegpt(draw, draw.randint(2, 6))},
    "OpenAI": lambda draw: {"messages": _openai(draw, draw.randint(2, 6))},
    "HH": _hh_pair,
    "pairs": lambda draw: {"prompt": _said(draw), "chosen": _said(draw), "rejected": _said(draw), "margin": 0.5},
    "message pairs": _message_pair,
    "prompts": lambda draw: {"prompt": _said(draw)},
}
# What a shape is made for; the others it is read as now and then.
KINDS = {name: "sft" for name in SHAPES} | dict.fromkeys(("HH", "pairs", "message pairs"), "preference")
KINDS["prompts"] = "prompt"


# ---- damage to rows ----
# Stand-ins for what json.dumps cannot write: brackets nested by the hundred, a number of thousands of digits.
NESTED, HUGE = '"@nested"', '"@huge"'
JUNK = (
    None, 7, -0.0, 1e308, float("nan"), float("inf"), True, [], {}, [1], {"a": 1}, [[]], [None], [{}], ["文"], "",
    " \n", "\ud800", "\udc80字", "\u200b\ufeff", "\0", "\x1b[31m", "\u2028", "{prompt}", "Human: ",
    "\n\nHuman: x\n\nAssistant:",
    [{"role": "user"}], [{"role": "\ud800", "content": "文"}], [{"from": [1], "value": None}], "@nested", "@huge",
)  # fmt: skip
NAMES = ("prompt", "answer", "chosen", "messages", "history", "system", "", " prompt", "\ud800", "名" * 5000, "a\nb")


def _swap_a_value(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and row:
        row[draw.choice(list(row))] = draw.choice(JUNK)


def _change_a_message(rows: list, draw: random.Random) -> None:
    lists = [value for row in rows if isinstance(row, dict) for value in row.values() if isinstance(value, list)]
    messages = [item for value in lists for item in value if isinstance(item, dict) and item]
    if messages:
        message = draw.choice(messages)
        message[draw.choice(list(message))] = draw.choice(JUNK)


def _delete_a_key(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and row:
        del row[draw.choice(list(row))]


def _rename_a_key(rows: list, draw: random.Random) -> None:
    new, everywhere = draw.choice(NAMES), draw.random() < 0.3
    first = draw.choice(rows)
    old = draw.choice(list(first)) if isinstance(first, dict) and first else None
    for row in rows if everywhere else [first]:
        if isinstance(row, dict) and old in row:
            row[new] = row.pop(old)


def _replace_a_row(rows: list, draw: random.Random) -> None:
    rows[draw.randrange(len(rows))] = draw.choice(JUNK)


def _repeat_a_row(rows: list, draw: random.Random) -> None:
    rows.append(json.loads(json.dumps(draw.choice(rows))))


def _turn_a_pair_round(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and "chosen" in row and "rejected" in row:
        rows.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})


def _make_a_row_long(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and row:
        row[draw.choice(list(row))] = "长" * draw.choice((1000, 199_999, 1_000_000))


ROW_DAMAGE = (
    _swap_a_value, _change_a_message, _delete_a_key, _rename_a_key, _replace_a_row, _repeat_a_row, _turn_a_pair_round,
    _make_a_row_long,
)  # fmt: skip


# ---- writing ----
def _cell(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _named(rows: list) -> list[dict]:
    """Rows as a table must have them; a row that is no object becomes one of a single cell."""
    return [row if isinstance(row, dict) else {"prompt": _cell(row)} for row in rows]


def _as_json(rows: list, suffix: str, draw: random.Random) -> bytes:
    ascii_only = draw.random() < 0.5
    if suffix == ".json" and draw.random() < 0.6:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=draw.choice((None, 1)))
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    if draw.random() < 0.1:
        at = draw.choice([found.end() for found in re.finditer(r"\{", text)] or [0])
        text = text[:at] + '"prompt": "twice", ' * draw.randint(1, 2) + text[at:]
    depth = draw.choice((2, 500, draw.randint(900, 1000), 5000))
    text = text.replace(NESTED, "[" * depth + "]" * depth).replace(HUGE, "9" * draw.choice((400, 5000)))
    return text.encode("utf-8", "surrogatepass")


def _as_csv(rows: list, draw: random.Random) -> bytes:
    rows, out = _named(rows), io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(out)
    writer.writerow(names + draw.choice([[]] * 9 + [names[:1]]))
    for row in rows:
        extra = draw.choice([[]] * 9 + [["more"]])
        writer.writerow([_cell(row.get(name, "")) for name in names] + extra)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(rows: list, draw: random.Random) -> bytes:
    try:
        return _table_bytes(pyarrow.Table.from_pylist(_named(rows)), draw)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError):
        # One type a column: what no type holds is written as bytes, odd characters and all.
        cells = [{str(n): _cell(value) for n, value in enumerate(row.values())} for row in _named(rows)]
        damaged = [{name: cell.encode("utf-8", "surrogatepass") for name, cell in row.items()} for row in cells]
        return _table_bytes(pyarrow.Table.from_pylist(damaged), draw)


def _table_bytes(table: pyarrow.Table, draw: random.Random) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(_with_odd_types(table, draw), out)
    return out.getvalue()


def _with_odd_types(table: pyarrow.Table, draw: random.Random) -> pyarrow.Table:
    """Now and then a time no calendar has, bytes that are no text under a type that says they are, a name twice."""
    if draw.random() < 0.1:
        table = table.append_column("when", pyarrow.array([2**62] * len(table), pyarrow.timestamp("us", "Moon/Mare")))
    if draw.random() < 0.1:
        raw = pyarrow.array(["问题".encode(draw.choice(("gb18030", "utf-8")))] * len(table), pyarrow.binary())
        table = table.append_column("text", pyarrow.Array.from_buffers(pyarrow.utf8(), len(raw), raw.buffers()))
    if draw.random() < 0.05 and table.num_columns:
        table = table.append_column(table.column_names[0], table.column(0))
    return table


# ---- damage to bytes ----
PIECES = (
    b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\n\n", b"\xff", b"\xe4\xbd", b"\x00",
    b"null", b"\\ud800", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"\xef\xbb\xbf", "\u200b".encode(),
    "\u2028".encode(), b'"a":1,',
)  # fmt: skip
ENCODINGS = ("gb18030", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "big5", "latin-1", "utf-7")


def _flip_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _insert_a_piece(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice(PIECES) * draw.choice((1, 1, 1, 50)) + data[at + draw.randint(0, 3) :]


def _copy_a_part(data: bytes, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[first:last] + data[at:]


def _encode_otherwise(data: bytes, draw: random.Random) -> bytes:
    return data.decode("utf-8", "replace").encode(draw.choice(ENCODINGS), "replace")


def _drop_the_first_line(data: bytes, draw: random.Random) -> bytes:
    return data.partition(b"\n")[2]


def _wrap_in_an_object(data: bytes, draw: random.Random) -> bytes:
    return b'{"data": ' + draw.choice((b"", b"\n")) + data + b"}"


def _shuffle_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    draw.shuffle(lines)
    return b"\n".join(lines)


def _join_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    return b"\n".join(lines[:at]) + draw.choice((b"", b" ", b"\r")) + b"\n".join(lines[at:])


def _end_lines_otherwise(data: bytes, draw: random.Random) -> bytes:
    return data.replace(b"\n", draw.choice((b"\r\n", b"\r", b"\n\n", b"\x0b")))


def _add_an_end(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((b"garbage", b"[]", b"{}", b"\x00" * 100, data, b"\n" * 9, b'{"prompt": "cut', b"\xe4"))


BYTE_DAMAGE = (
    _flip_bytes, _truncate, _insert_a_piece, _copy_a_part, _encode_otherwise, _shuffle_lines, _join_lines,
    _end_lines_otherwise, _add_an_end, _drop_the_first_line, _wrap_in_an_object,
)  # fmt: skip


# ---- one file ----
def write_file(path: Path, shape: str, draw: random.Random) -> int | None:
    """Write rows of `shape` in the format of the path's suffix (now and then of another), damaged a little.

    Returns: how many rows there are to read; None where damage to the bytes may have changed that.
    """
    suffix = path.suffix if draw.random() < 0.95 else draw.choice(SUFFIXES)
    rows: list = [SHAPES[shape](draw) for _ in range(draw.randint(1, 12))]
    for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
        draw.choice(ROW_DAMAGE)(rows, draw)
    if suffix == ".csv":
        data = _as_csv(rows, draw)
    elif suffix == ".parquet":
        data = _as_parquet(rows, draw)
    else:
        data = _as_json(rows, suffix, draw)
    # Almost any damage to the bytes of a Parquet file makes all of it unreadable.
    times = draw.choice((0, 0, 0, 1, 1, 2) if suffix != ".parquet" else (0, 0, 0, 1))
    for _ in range(times):
        data = draw.choice(BYTE_DAMAGE)(data, draw) if data else data
    path.write_bytes(data)
    return None if times or suffix != path.suffix else len(rows)


def write_case(folder: Path, draw: random.Random) -> tuple[DataArguments, str, int | None]:
    """A damaged file, a pair of them or a directory of them: flags that name it, the kind to read, how many rows."""
    shape, suffix = draw.choice(list(SHAPES)), draw.choice(SUFFIXES)
    names = draw.choice([["a"], ["a"], ["a"], ["a", "held_out"], ["data/train", "data/test"]])
    paths = [folder / f"{name}{suffix}" for name in names]
    counts = []
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        counts.append(write_file(path, shape, draw))
    flags = {"eval_size": draw.choice((0, 0.2, 2)), "bad_rows": draw.choice(("stop", "skip"))}
    if "held_out" in names:
        flags["eval_dataset_name"] = str(draw.choice((paths[1], paths[1], paths[0])))
        counts = counts if flags["eval_dataset_name"] == str(paths[1]) else counts[:1] * 2
    if draw.random() < 0.05:
        flags["prompt_field"] = draw.choice(("prompt", "instruction", "missing"))
    source = paths[0] if len(names) == 1 or "held_out" in names else folder / "data"
    kind = KINDS[shape] if draw.random() < 0.6 else draw.choice(list(FIELDS))
    return DataArguments(dataset_name=str(source), **flags), kind, None if None in counts else sum(counts)


def check(seed: int, number: int, bases: dict[str, list[str]] | None = None) -> str:
    """Write, load and judge one case. Returns: "rows", or the kind of refusal. Raises: whatever is wrong.

    Args:
        bases: flags of each script that name a base and what else has to be there: the case then goes through the
            command line of the script that reads its kind. None: through the loader alone.
    """
    draw = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory() as name:
        args, kind, count = write_case(Path(name), draw)
        return _by_script(args, kind, name, bases) if bases else _by_loader(args, kind, name, count)


def _by_loader(args: DataArguments, kind: str, folder: str, count: int | None) -> str:
    bad_rows = Path(folder) / "run" / "bad_rows.jsonl"
    try:
        train, evaluation, funnel = load_splits(args, kind, seed=0, bad_rows_file=bad_rows)
    except (ValueError, OSError) as error:
        return _kind_of_refusal(str(error), folder)
    _check_rows(train, evaluation, kind, folder)
    _check_funnel(funnel, len(train) + len(evaluation), args.bad_rows, bad_rows)
    # The rest of an array after brackets beyond reason is given up, and its one row says so.
    if count is not None and "nothing after it can be read" not in " ".join(funnel.bad_rows):
        assert funnel.read == count, f"{funnel.read} rows read, {count} written"
    return "rows"


SCRIPTS = {"sft": "sft_training", "preference": "reward_modeling", "prompt": "rl_training"}


def _by_script(args: DataArguments, kind: str, folder: str, bases: dict[str, list[str]]) -> str:
    script, output = SCRIPTS[kind], Path(folder) / "run"
    named = ("dataset_name", "eval_dataset_name", "eval_size", "bad_rows", "prompt_field")
    flags = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    flags |= {"inspect_data": True, "output_dir": output, "bf16": False}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    code, printed, said = run_here(script, *bases[script], *words)
    assert not output.exists(), "a look at the data made an output directory"
    assert "\x1b" not in printed, "what is printed steers the terminal"
    if code == 0:
        assert re.search(r"^kept +[1-9]", printed, re.MULTILINE) and not said, f"{printed[-300:]!r} {said!r}"
        return "rows"
    assert code == 1 and said.startswith(f"{script}.py: error: ") and said.endswith("\n"), (
        f"exit code {code}: {said!r}"
    )
    return _kind_of_refusal(said.removeprefix(f"{script}.py: error: ").removesuffix("\n"), folder)


def make_bases(base: str, folder: Path) -> dict[str, list[str]]:
    """Flags of each script that name `base`, and for PPO adapters of it, which are written into `folder`."""
    ppo = ["--sft_model_lora_path", random_adapter(base, folder / "sft"), "--reward_model_lora_path"]
    ppo.append(random_adapter(base, folder / "reward", "reward", seed=1))
    flags = {script: ["--model_name", base] for script in SCRIPTS.values()}
    return flags | {"rl_training": ["--base_model_name", base, *ppo]}


def _check_rows(train: list[dict], evaluation: list[dict], kind: str, folder: str) -> None:
    assert train, "no training row, and no word of it"
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}, "a prompt on both sides"
    for row in train + evaluation:
        assert set(row) == FIELDS[kind] | {"where", "opening"}, f"fields {set(row)}"
        assert re.match(re.escape(folder) + r"/.+:\d+$", row["where"]), f"where is {row['where']!r}"
        for name in FIELDS[kind]:
            row[name].encode("utf-8")
            assert row[name].strip("\0\u200b\ufeff \n"), f"nothing to see in {name}"
        assert kind != "preference" or row["chosen"] != row["rejected"], "no preference"


def _check_funnel(funnel: Funnel, kept: int, bad_rows: str, file: Path) -> None:
    counts = funnel.as_dict()
    assert counts["kept"] == kept, f"{kept} rows but {counts}"
    assert min(counts["read"], counts["expanded"], *counts["dropped"].values(), 1) >= 0, f"negative: {counts}"
    assert len(funnel.bad_rows) == counts["dropped"].get("malformed", 0), f"{funnel.bad_rows} but {counts}"
    assert bad_rows == "skip" or not funnel.bad_rows, f"not stopped at {funnel.bad_rows}"
    written = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    assert [f"{row['where']}: {row['reason']}" for row in written] == funnel.bad_rows, "bad_rows.jsonl has other rows"
    funnel.table().encode("utf-8")


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
    return next((name for name, pattern in REFUSALS.items() if re.search(pattern, message)), f"other: {message}")


# ---- many files ----
def run(seed: int, numbers: range, bases: dict[str, list[str]] | None = None) -> tuple[Counter, list[str]]:
    """Check many cases (see `check`). Returns: how often each outcome came, and a line for each failure."""
    outcomes, failures = Counter(), []
    for number in numbers:
        try:
            outcomes[check(seed, number, bases)] += 1
        # Whatever it is, it is what this looks for; a killed run must still stop.
        except Exception as error:
            failures.append(f"--seed {seed} --only {number}: {type(error).__name__}: {str(error)[:300]!r}")
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--scripts", action="store_true", help="by the scripts' command lines, not the loader alone")
    parser.add_argument("--only", type=int, help="the number of one file, to see its traceback")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bases = make_bases(make_base(Path(name) / "base"), Path(name)) if args.scripts else None
        if args.only is not None:
            try:
                print(check(args.seed, args.only, bases))
            except Exception:
                traceback.print_exc()
                return 1
            return 0
        start = time.perf_counter()
        outcomes, failures = run(args.seed, range(args.files), bases)
    print(*failures, sep="\n", end="\n" if failures else "")
    counted = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(
        f"{args.files} files, seed {args.seed}: {counted}; {len(failures)} failed; {time.perf_counter() - start:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
