"""Every fault of a data file, for every kind of rows: named by file, line and reason, or dropped and counted."""

import codecs
import csv
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain, product
from pathlib import Path

import datasets
import fuzz_data
import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.arguments import DataArguments
from rlhf.data.choose_format import text_format
from rlhf.data.columns import find_format
from rlhf.data.encoding import load_tokenizer, preference_rows, prompt_rows, sft_rows
from rlhf.data.files import read_file
from rlhf.data.formats import MAX_CHARACTERS, examples
from rlhf.data.located import not_utf8
from rlhf.data.reading import load_rows, load_splits
from rlhf.data.template import DEFAULT_TEMPLATE
from rlhf.run import launch

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"sft": ("prompt", "answer"), "preference": ("prompt", "chosen", "rejected"), "prompt": ("prompt",)}
KINDS = tuple(FIELDS)
KINDS_AND_FIELDS = list(chain.from_iterable(product([kind], fields) for kind, fields in FIELDS.items()))


def good(kind, number):
    return {field: f"{field}的第{number}句" for field in FIELDS[kind]}


def dumped(row):
    return json.dumps(row, ensure_ascii=False)


def lines_of(kind, bad, last=False):
    """Five good rows, one a line, with the line `bad` as the fourth of six, or at the end and without a line's end."""
    lines = [dumped(good(kind, number)).encode() for number in range(5)]
    lines.insert(5 if last else 3, bad)
    return b"\n".join(lines) + (b"" if last else b"\n")


def load(path, kind, bad_rows="stop", **flags):
    """All rows in their order, the funnel, and what bad_rows.jsonl holds, through the scripts' own entry."""
    written = Path(path).parent / "run" / "bad_rows.jsonl"
    args = DataArguments(dataset_name=str(path), bad_rows=bad_rows, **{"eval_size": 2} | flags)
    train, evaluation, funnel = load_splits(args, kind, seed=0, bad_rows_file=written)
    rows = sorted(train + evaluation, key=lambda row: (int(row["where"].rpartition(":")[2]), row["prompt"]))
    assert funnel.read + funnel.expanded == len(rows) + funnel.dropped.total()
    assert flags or len(evaluation) == 2
    bad = [json.loads(line) for line in written.read_text("utf-8").splitlines()] if written.exists() else []
    return rows, funnel, bad


def refusal(path, kind, **flags):
    with pytest.raises((ValueError, OSError)) as caught:
        load(path, kind, **flags)
    message = str(caught.value)
    assert message.isprintable(), repr(message)
    assert len(message) < 2000
    return message


def texts(rows):
    return [{name: value for name, value in row.items() if name not in ("where", "opening")} for row in rows]


def check_malformed(path, kind, line, reason, content=None):
    """By default the run stops at file:line with the reason; --bad_rows skip puts the row aside, keeps the others."""
    message = refusal(path, kind)
    assert message.startswith(f"malformed rows: {path}:{line}: ")
    assert reason in message
    assert message.endswith("mend them, or leave them out with --bad_rows skip")
    assert not (path.parent / "run").exists()
    rows, funnel, bad = load(path, kind, "skip")
    assert texts(rows) == [good(kind, number) for number in range(5)]
    assert funnel.dropped == {"malformed": 1}
    assert [row["where"] for row in bad] == [f"{path}:{line}"]
    assert reason in bad[0]["reason"]
    assert content is None or bad[0]["row"] == content


def check_dropped(path, kind, line, reason):
    """The row is counted under its reason, with its place, whatever --bad_rows says; the others are kept."""
    for bad_rows in ("stop", "skip"):
        rows, funnel, bad = load(path, kind, bad_rows)
        assert texts(rows) == [good(kind, number) for number in range(5)]
        assert funnel.dropped == {reason: 1}
        assert funnel.places == {reason: [f"{path}:{line}"]}
        assert bad == []


# ---- one value of one row ----
NO_TEXT = "must be text or a list of messages, not"
MALFORMED_VALUES = {
    "null": ("null", f"{NO_TEXT} None"),
    "number": ("7", f"{NO_TEXT} a number"),
    "zero": ("0.0", f"{NO_TEXT} a number"),
    "truth": ("true", f"{NO_TEXT} true or false"),
    "NaN": ("NaN", f"{NO_TEXT} a number"),
    "Infinity": ("-Infinity", f"{NO_TEXT} a number"),
    "too large": ("1e999", f"{NO_TEXT} a number"),
    "list": ("[1]", "must hold messages (objects with role and content), not a number"),
    "list of lists": ('[["a"]]', "must hold messages (objects with role and content), not a list"),
    "object": ('{"a": 1}', "needs role and content, or from and value"),
    "no role": ('{"role": null, "content": "a"}', "has None for its role"),
    "unknown role": ('{"role": "cat", "content": "a"}', "has the unknown role 'cat'"),
    "no content": ('{"role": "assistant", "content": 1}', "must be text, not a number"),
    "lone surrogate": (r'"a\ud800"', "holds half a surrogate pair at character 2"),
    "name twice within": ('[{"role": "user", "role": "a"}]', "an object that names 'role' twice"),
}
UNSEEN_VALUES = {
    "empty": '""',
    "space": r'" \t\n\u3000\u2028"',
    "zero-width": r'"\u200b\u200c\u200d\u2060\ufeff"',
    "control": r'"\u0001\u001b\u007f"',
    "NUL": r'"\u0000"',
}


def with_value(kind, field, value):
    """A good row as JSON text, the value of `field` replaced by other JSON text."""
    return dumped(good(kind, 9) | {field: "@"}).replace('"@"', value)


@pytest.mark.parametrize("name", MALFORMED_VALUES)
@pytest.mark.parametrize(("kind", "field"), KINDS_AND_FIELDS)
def test_a_value_that_is_no_text_is_named(kind, field, name, tmp_path):
    value, reason = MALFORMED_VALUES[name]
    row = with_value(kind, field, value)
    content = None if "NaN" in row or "twice" in reason else json.loads(row)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, row.encode()))
    check_malformed(path, kind, 4, reason, content)
    assert f"field '{field}'" in load(path, kind, "skip")[1].bad_rows[0]
    # The same in an array: its rows are named by the lines on which they begin.
    array = tmp_path / "array" / "a.json"
    array.parent.mkdir()
    rows = [*(dumped(good(kind, number)) for number in range(3)), row, *(dumped(good(kind, n)) for n in (3, 4))]
    array.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    check_malformed(array, kind, 5, reason, content)


@pytest.mark.parametrize("name", UNSEEN_VALUES)
@pytest.mark.parametrize(("kind", "field"), KINDS_AND_FIELDS)
def test_a_text_with_nothing_to_see_is_dropped_as_empty(kind, field, name, tmp_path):
    row = with_value(kind, field, UNSEEN_VALUES[name])
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, row.encode()))
    check_dropped(path, kind, 4, f"empty {field}")
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    # Rows of a table begin after its line of names; "\u2028" and the like end no line.
    for write, line in ((write_csv, 5), (write_parquet, 4)):
        check_dropped(write(tmp_path, rows), kind, line, f"empty {field}")


def write_csv(folder, rows):
    path = folder / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(folder, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize(("kind", "field"), KINDS_AND_FIELDS)
def test_a_missing_field_is_named(kind, field, tmp_path):
    row = good(kind, 9)
    del row[field]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, dumped(row).encode()))
    reason = f"field '{field}' is missing" if row else "the row has no fields"
    check_malformed(path, kind, 4, reason, row)


@pytest.mark.parametrize(("kind", "field"), KINDS_AND_FIELDS)
def test_a_row_of_a_million_characters_is_dropped_at_once(kind, field, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, dumped(good(kind, 9) | {field: "长" * 1_000_000}).encode()))
    check_dropped(path, kind, 4, f"longer than {MAX_CHARACTERS} characters")


def test_the_turns_of_an_endless_dialogue_are_counted_without_filling_the_memory(tmp_path):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"{n:05}" * 40} for n in range(10_000)]
    fmt = find_format({"messages"}, "sft", {})
    made = examples({"messages": turns}, fmt, DEFAULT_TEMPLATE)
    assert len(made) == 5000
    # Growing on, they would be a million characters each on average, five thousand million together.
    assert max(len(example["prompt"]) for example in made) < MAX_CHARACTERS + 1000
    path = tmp_path / "a.jsonl"
    path.write_text(dumped({"messages": turns}) + "\n" + dumped({"messages": turns[:2]}) + "\n", encoding="utf-8")
    rows, funnel = load_rows(str(path), "sft")
    assert (funnel.read, funnel.expanded, funnel.kept) == (2, 4999, len(rows))
    assert funnel.dropped == {f"longer than {MAX_CHARACTERS} characters": 5000 - len(rows), "duplicate": 1}
    assert len(rows[-1]["prompt"]) + 200 <= MAX_CHARACTERS


def test_an_extra_that_is_no_text_is_named_and_one_that_is_empty_is_none(tmp_path):
    rows = [{"instruction": f"问{n}", "input": value, "output": "答"} for n, value in enumerate(("", None, "其", 0))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(dumped(row) + "\n" for row in rows), encoding="utf-8")
    assert f"{path}:4: field 'input' must be text, not a number" in refusal(path, "sft")
    assert [row["prompt"] for row in load(path, "sft", "skip", eval_size=0)[0]] == ["问0", "问1", "问2\n其"]


@pytest.mark.parametrize("kind", KINDS)
def test_control_characters_within_a_text_are_kept(kind, tmp_path):
    text = "一\0二\x1b[31m三\u200b四"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(dumped({f: f"{f}{text}{n}" for f in FIELDS[kind]}) + "\n" for n in range(3)), "utf-8")
    rows, funnel, _ = load(path, kind, eval_size=0)
    assert [row["prompt"] for row in rows] == [f"prompt{text}{number}" for number in range(3)]
    assert funnel.dropped == {}


# ---- one line of a file ----
def line_faults(kind):
    row = dumped(good(kind, 9))
    return {
        "GB18030": (row.encode("gb18030"), "is not UTF-8 but reads as GB18030: convert the file with iconv"),
        "damaged": (row.encode().replace("句".encode(), b"\xe5\xff", 1), "is not UTF-8: the text is damaged"),
        "quotes": (row.replace('"', "'").encode(), "not JSON (Expecting property name"),
        "raw control": (row.replace("的", "\0").encode(), "not JSON (Invalid control character"),
        "two rows joined": (row.encode() * 2, "not JSON (Extra data)"),
        "cut": (row[:-4].encode(), "not JSON (Unterminated string"),
        "digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON (nested or long beyond reason)"),
        "brackets": (b'{"prompt": ' + b"[" * 99_999, "not JSON (nested or long beyond reason)"),
        "list": (b'["a", "b"]', "a row must be an object with named fields, not a list"),
        "text": (b'"a"', "a row must be an object with named fields, not text"),
        "null": (b"null", "a row must be an object with named fields, not None"),
        "no fields": (b"{}", "the row has no fields"),
        "mark": (b"\xef\xbb\xbf" + row.encode(), "not JSON (Unexpected UTF-8 BOM"),
    }


@pytest.mark.parametrize("name", line_faults("sft"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_line_that_is_no_row_is_named_and_kept_as_it_stands(kind, name, tmp_path):
    line, reason = line_faults(kind)[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, line))
    check_malformed(path, kind, 4, reason)
    row = load(path, kind, "skip")[2][0]["row"]
    if name in ("list", "text", "null", "no fields"):
        assert row == json.loads(line)
    else:
        assert row.encode("utf-8", "surrogateescape") == line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["prompt", "source"])
def test_a_name_twice_in_one_row_is_named_because_one_value_would_be_lost(kind, field, tmp_path):
    line = dumped(good(kind, 9))[:-1] + f', "{field}": "甲", "{field}": "乙"}}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, line.encode()))
    check_malformed(path, kind, 4, f"an object that names '{field}' twice")
    assert load(path, kind, "skip")[2][0]["row"][-2:] == [[field, "甲"], [field, "乙"]]


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_last_line_cut_off_anywhere_is_called_so(kind, missing, tmp_path):
    # A cut within a character leaves bytes that are no UTF-8; that is not what is wrong with the file.
    line = dumped(good(kind, 9)).encode()[:-missing]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, line, last=True))
    check_malformed(path, kind, 6, "the last line is cut off")


def test_a_last_line_of_something_else_is_not_called_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in (b"end of file", b"{'prompt': 1}"):
        path.write_bytes(lines_of("sft", line, last=True))
        assert ":6: not JSON (" in refusal(path, "sft")


def test_a_hint_at_gb18030_is_given_where_it_helps_and_not_for_damaged_utf8():
    said = "今天天气很好，我们去公园散步吧。"
    assert "reads as GB18030" in not_utf8(said.encode("gb18030").decode("utf-8", "surrogateescape"))
    # An excerpt may end within a character.
    assert "reads as GB18030" in not_utf8(said.encode("gb18030")[:-1].decode("utf-8", "surrogateescape"))

    whole = said.encode()
    hinted = 0
    for at in range(12, len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]
        hinted += "GB18030" in (not_utf8(flipped.decode("utf-8", "surrogateescape")) or "")
    assert hinted == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_nested_to_the_last_level_python_reads_are_written_down_all_the_same(kind, tmp_path):
    path = tmp_path / "a.jsonl"
    for depth in range(930, 1001):
        nested = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
        as_role = b'{"prompt": [{"content": "a", "role": ' + b"[" * depth + b"]" * depth + b"}]}"
        path.write_bytes(lines_of(kind, nested + b"\n" + as_role))
        rows, funnel, bad = load(path, kind, "skip")
        assert (len(rows), funnel.dropped, len(bad)) == (5, {"malformed": 2}, 2)


# ---- several rows ----
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_repeated_and_contradicting_rows_are_dropped_by_reason(kind, suffix, tmp_path):
    rows = [good(kind, number) for number in range(5)]
    extra = {"duplicate": good(kind, 0) | {"prompt": f" {good(kind, 0)['prompt']}\n"}}
    if kind == "preference":
        first = good(kind, 1)
        extra["contradicts an earlier pair"] = first | {"chosen": first["rejected"], "rejected": first["chosen"]}
        extra["chosen == rejected"] = first | {"rejected": f"{first['chosen']} "}

    every_row = [*rows, *extra.values()]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        write_csv(tmp_path, every_row)
    elif suffix == "parquet":
        write_parquet(tmp_path, every_row)
    else:
        text = dumped(every_row) if suffix == "json" else "\n".join(map(dumped, every_row))
        path.write_text(text, encoding="utf-8")

    kept, funnel, _ = load(path, kind)
    assert texts(kept) == rows
    assert funnel.dropped == dict.fromkeys(extra, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_longer_than_the_limit_are_dropped_with_their_place(kind, tiny_base, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(kind, dumped(good(kind, 9) | {"prompt": "长" * 200}).encode()))
    rows, funnel, _ = load(path, kind)
    encoder = {"sft": sft_rows, "preference": preference_rows, "prompt": prompt_rows}[kind]
    encoded = encoder(text_format(load_tokenizer(tiny_base)), rows, 150, funnel)
    assert len(encoded) == funnel.kept == 5
    assert funnel.places == {"prompt longer than 150 tokens": [f"{path}:4"]}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_the_evaluation_rows_are_not_trained_on(kind, tmp_path):
    train = tmp_path / "a.jsonl"
    held_out = tmp_path / "held_out.jsonl"
    train.write_bytes(lines_of(kind, dumped(good(kind, 9)).encode()))
    held_out.write_text(dumped(good(kind, 2) | {"prompt": f"{good(kind, 9)['prompt']} "}) + "\n", encoding="utf-8")
    args = DataArguments(dataset_name=str(train), eval_dataset_name=str(held_out))
    rows, evaluation, funnel = load_splits(args, kind, seed=0)
    assert texts(rows) == [good(kind, number) for number in range(5)]
    assert len(evaluation) == 1
    assert funnel.places == {"prompt is in the evaluation rows": [f"{train}:4"]}
    same = DataArguments(dataset_name=str(train), eval_dataset_name=str(train))
    with pytest.raises(ValueError, match="every training prompt is in the evaluation rows: name another --eval_split"):
        load_splits(same, kind, seed=0)


# ---- whole files ----
def csv_text(rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet_bytes(kind, names=None):
    table = pyarrow.Table.from_pylist([good(kind, number) for number in range(3)])
    if names:
        table = table.append_column("prompt", table.column(0))
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def file_faults(kind):
    """Name of the fault -> (file name, contents, what the message says after the path)."""
    rows = [good(kind, number) for number in range(3)]
    return blank_faults(rows) | json_faults(kind, rows) | table_faults(kind, csv_text(rows))


def blank_faults(rows):
    """Files without a row, and files in UTF-16."""
    table = csv_text(rows)
    return {
        "empty jsonl": ("a.jsonl", b"", " is empty: check how it was made or downloaded"),
        "empty json": ("a.json", b"", " is empty: check"),
        "empty csv": ("a.csv", b"", " is empty: check"),
        "empty parquet": ("a.parquet", b"", " is empty: check"),
        "blank jsonl": ("a.jsonl", b"\n \n\r\n", " has no usable row (0 read): check the file"),
        "blank json": ("a.json", b"\n\n", " has no usable row (0 read)"),
        "blank csv": ("a.csv", b"\n\n", " has no usable row (0 read)"),
        "header alone": ("a.csv", table.splitlines()[0].encode(), " has no usable row (0 read)"),
        "no row": ("a.json", b"[]", " has no usable row (0 read)"),
        "UTF-16": ("a.jsonl", dumped(rows[0]).encode("utf-16"), " is UTF-16 text: save it as UTF-8"),
        "UTF-16 array": ("a.json", dumped(rows).encode("utf-16-le"), " is UTF-16 text: save it as UTF-8"),
        "UTF-16 turned round": ("a.csv", table.encode("utf-16-be"), " is UTF-16 text: save it as UTF-8"),
    }


def json_faults(kind, rows):
    """JSON whose rows are not where they should be."""
    columns = {field: [row[field] for row in rows] for field in rows[0]}
    by_index = {field: dict(enumerate(values)) for field, values in columns.items()}
    return {
        "lists by index": ("a.json", dumped(by_index).encode(), ":1: a message of field 'prompt' needs role and"),
        "lists indented": ("a.json", json.dumps(columns, indent=1).encode(), " is one indented JSON object: give a"),
        "blank line first": ("a.json", b"\n{\n" + dumped(columns)[1:].encode(), " is one indented JSON object"),
        # Rows under a name of the outer object, of which no column says anything.
        "under data": (
            "a.json",
            dumped({"data": rows}).encode(),
            f": no {kind} format fits the columns data: name them with --prompt_field",
        ),
        "under data, hint": ("a.json", dumped({"data": rows}).encode(), "; a file of one object must be made a list"),
        "under data, indented": ("a.json", json.dumps({"data": rows}, indent=1).encode(), " is one indented JSON"),
        "no fields": ("a.json", b"[{}, {}]", ":1: the row has no fields"),
    }


def table_faults(kind, table):
    """Tables without usable column names, damaged Parquet, and names of files that say nothing."""
    return {
        "no header": (
            "a.csv",
            table.partition("\n")[2].encode(),
            f": no {kind} format fits the columns ",
        ),
        "no header, hint": (
            "a.csv",
            table.partition("\n")[2].encode(),
            "; the first line of a .csv must hold the column names",
        ),
        "name twice": ("a.csv", b"prompt," + table.encode(), ":1: column name 'prompt' stands twice: rename one"),
        "name twice, parquet": ("a.parquet", parquet_bytes(kind, True), ": column name 'prompt' stands twice"),
        "header in GB18030": ("a.csv", "问,答\n一,二\n".encode("gb18030"), ":1: byte 0xce is not UTF-8 but reads as"),
        "header no CSV": ("a.csv", b'"prompt"x,answer\n' + table.encode(), ":1: not CSV (',' expected after '\"')"),
        # Parquet keeps its description at the end, so a file that was cut has lost it.
        "cut parquet": ("a.parquet", parquet_bytes(kind)[:-20], " is no readable Parquet file (Parquet magic bytes"),
        "cut in the middle": ("a.parquet", parquet_bytes(kind)[:200], " is no readable Parquet file ("),
        "text as parquet": ("a.parquet", table.encode(), " is no readable Parquet file ("),
        "unknown extension": ("a.docx", table.encode(), " is none of .json, .jsonl, .csv, .parquet: convert it"),
        "no extension": ("a", table.encode(), " is none of .json, .jsonl, .csv, .parquet: convert it"),
    }


@pytest.mark.parametrize("name", file_faults("sft"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_data_says_what_is_wrong(kind, name, tmp_path):
    file, content, said = file_faults(kind)[name]
    path = tmp_path / file
    path.write_bytes(content)
    # Nothing is left to be kept, so --bad_rows skip stops too, and names the first reason.
    for bad_rows in ("stop", "skip"):
        message = refusal(path, kind, bad_rows=bad_rows)
        assert said in message
        assert str(path) in message if "hint" in name else f"{path}{said}" in message


def test_bad_rows_are_written_down_where_no_row_is_left_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": null, "answer": "a"}\n')
    message = refusal(path, "sft", bad_rows="skip")
    assert f"has no usable row (1 read, dropped: 1 malformed ({path}:1: field 'prompt' must be text" in message
    written = json.loads((tmp_path / "run" / "bad_rows.jsonl").read_text("utf-8"))
    assert written["row"] == {"prompt": None, "answer": "a"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_rows(kind, suffix, tmp_path):
    rows = [good(kind, number) for number in range(5)]
    text = {"jsonl": "\n".join(map(dumped, rows)), "json": dumped(rows), "csv": csv_text(rows)}[suffix]
    path = tmp_path / f"a.{suffix}"
    for mark in (codecs.BOM_UTF8, b""):
        path.write_bytes(mark + text.encode())
        rows, funnel = load_rows(str(path), kind)
        assert len(rows) == 5
        # Said, because another reader of the file might not leave it out.
        assert (f"the byte order mark of {path} is left out" in funnel.table()) == bool(mark)


@pytest.mark.parametrize("kind", KINDS)
def test_text_after_an_array_is_named_and_the_array_kept(kind, tmp_path):
    path = tmp_path / "a.json"
    rows = [good(kind, number) for number in range(5)]
    for rest in ("garbage", "[]", '\n{"prompt": "a"}', "]"):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + rest, encoding="utf-8")
        line = path.read_text("utf-8")[: -len(rest)].count("\n") + 1
        check_malformed(path, kind, line, "there is more text after the closed array", rest)
        (tmp_path / "run" / "bad_rows.jsonl").unlink()
        (tmp_path / "run").rmdir()


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_as_the_first_of_many_lines_is_one_bad_row_and_not_the_whole_file(kind, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2]\n" + "".join(dumped(good(kind, number)) + "\n" for number in range(5)), encoding="utf-8")
    check_malformed(path, kind, 1, "a row must be an object with named fields, not a list", [1, 2])
    # One array is read as one under any of the two names, on one line or on many.
    for indent in (None, 1):
        path.write_text(json.dumps([good(kind, number) for number in range(5)], indent=indent), encoding="utf-8")
        assert len(load(path, kind)[0]) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_csv_rows_of_another_length_are_named(kind, tmp_path):
    wide = [good(kind, number) | {"source": "x"} for number in range(5)]
    lines = csv_text(wide).splitlines(keepends=True)
    count = len(FIELDS[kind]) + 1
    path = tmp_path / "a.csv"
    for cells in (["一"] * (count - 1), ["一"] * (count + 1), [" "]):
        path.write_text("".join([*lines[:4], ",".join(cells) + "\n", *lines[4:]]), encoding="utf-8")
        check_malformed(path, kind, 5, f"{len(cells)} cells under {count} column names", cells)
        (tmp_path / "run" / "bad_rows.jsonl").unlink()
        (tmp_path / "run").rmdir()


def test_a_quote_never_closed_says_how_many_lines_are_lost_with_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n一,二\n三,"四\n五,六\n七,八\n', encoding="utf-8")
    reason = ":3: not CSV (unexpected end of data); nothing from here to line 5 can be read"
    assert reason in refusal(path, "sft")
    rows, _, bad = load(path, "sft", "skip", eval_size=0)
    assert [row["prompt"] for row in rows] == ["一"]
    assert bad[0]["row"] == '三,"四\n五,六\n七,八\n'


@pytest.mark.parametrize("row", [{"prompt": []}, {"prompt": ["一？"], "answer": ["一。"]}, {"messages": [[]]}])
def test_one_line_of_short_lists_is_a_row_and_no_table_of_columns(row, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert [found for _, found in read_file(path)] == [row]


def test_blank_lines_before_the_column_names_and_unnamed_columns_do_no_harm(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n\nprompt,answer,,\n一,二,,\n", encoding="utf-8")
    rows, _, _ = load(path, "sft", eval_size=0)
    assert [(row["where"], row["prompt"]) for row in rows] == [(f"{path}:4", "一")]


# ---- tables ----
def table_with_bad_text():
    """Three rows of which the second has an answer that is GB18030 under a type that promises UTF-8."""
    answers = pyarrow.array(["一".encode(), "问题".encode("gb18030"), "三".encode()], pyarrow.binary())
    damaged = pyarrow.Array.from_buffers(pyarrow.utf8(), 3, answers.buffers())
    return pyarrow.table({"prompt": ["甲", "乙", "丙"], "answer": damaged})


@pytest.mark.parametrize("saved", [False, True])
def test_table_rows_that_python_cannot_hold_are_named_alone(saved, tmp_path):
    dates = pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))
    tables = {
        "byte 0xce is not UTF-8 but reads as GB18030": table_with_bad_text(),
        "the row cannot be read (": pyarrow.table({"prompt": ["甲", "乙", "丙"], "answer": ["一"] * 3, "at": dates}),
    }

    for reason, table in tables.items():
        path = tmp_path / f"{len(reason)}.parquet"
        if saved:
            path = tmp_path / str(len(reason))
            datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(path))
        else:
            pyarrow.parquet.write_table(table, path)

        where = f"{path}[train]:2" if saved else f"{path}:2"
        assert f"malformed rows: {where}: {reason}" in refusal(path, "sft")
        rows, funnel, _ = load(path, "sft", "skip", eval_size=0)
        assert [row["prompt"] for row in rows] == ["甲", "丙"]
        assert funnel.dropped == {"malformed": 1}


def test_a_damaged_save_to_disk_directory_says_so(tmp_path):
    datasets.Dataset.from_list([good("sft", number) for number in range(3)]).save_to_disk(str(tmp_path / "one"))
    table = next((tmp_path / "one").glob("*.arrow"))
    whole = {path: path.read_bytes() for path in (table, *(tmp_path / "one").glob("*.json"))}

    # Each of its files in turn: cut, of another type, no text.
    for path, content in whole.items():
        for damaged in (content[: len(content) // 2], b"[]", b"3", b"\xff"):
            path.write_bytes(damaged)
            message = refusal(tmp_path / "one", "sft")
            assert f"{tmp_path}/one is no readable save_to_disk directory (" in message
        path.write_bytes(content)
    assert len(load(tmp_path / "one", "sft", eval_size=0)[0]) == 3

    (tmp_path / "two").mkdir()
    for content in ('{"splits": []}', '{"splits": 3}', "[]"):
        (tmp_path / "two" / "dataset_dict.json").write_text(content)
        assert str(tmp_path / "two") in refusal(tmp_path / "two", "sft")
        train = tmp_path / "a.jsonl"
        train.write_text(dumped(good("sft", 1)))
        assert str(tmp_path / "two") in refusal(train, "sft", eval_dataset_name=str(tmp_path / "two"))


# ---- names that lead nowhere ----
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "--dataset_name is empty: give a local file, a directory or a hub id"),
        (" ", "--dataset_name is empty"),
        ("missing.jsonl", "--dataset_name missing.jsonl does not exist: give a local file, a directory or a hub id"),
        ("no such file", "--dataset_name no such file does not exist"),
        ("alone", "--dataset_name alone does not exist"),
        ("too/many/parts", "--dataset_name too/many/parts does not exist"),
        ("owner/missing.JSONL", "--dataset_name owner/missing.JSONL does not exist"),
        ("~nobody-of-that-name/a.jsonl", "--dataset_name ~nobody-of-that-name/a.jsonl does not exist"),
        ("/dev/null", "--dataset_name /dev/null does not exist"),
        ("owner/name", "--dataset_name owner/name is no local path and could not be loaded from the hub ("),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_its_flag(kind, name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert refusal(name, kind).startswith(said)
    if name:
        (tmp_path / "a.jsonl").write_text(dumped(good(kind, 1)), encoding="utf-8")
        said = said.replace("--dataset_name", "--eval_dataset_name")
        assert refusal("a.jsonl", kind, eval_dataset_name=name).startswith(said)


def test_files_on_the_hub_that_are_of_no_one_form_are_refused_in_one_sentence(monkeypatch):
    def fail(name, config):
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"owner/name .* \(An error occurred while generating the dataset\): "):
        load_rows("owner/name", "sft")


def test_a_directory_is_read_whole_or_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert f"{folder} holds neither a save_to_disk data set nor a .json" in refusal(folder, "sft")
    (folder / "README.md").write_text("text")
    (folder / ".hidden.jsonl").write_text("text")
    assert f"{folder} holds neither" in refusal(folder, "sft")
    (folder / "b.JSONL").write_text(dumped(good("sft", 1)), encoding="utf-8")
    (folder / "c.jsonl").mkdir()
    assert [row["where"] for row in load(folder, "sft", eval_size=0)[0]] == [f"{folder}/b.JSONL:1"]
    (folder / "d.jsonl").write_bytes(b"")
    assert f"{folder}/d.jsonl is empty" in refusal(folder, "sft")
    (folder / "d.jsonl").unlink()
    (folder / "d.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert f"{folder}/d.jsonl cannot be read (No such file or directory)" in refusal(folder, "sft")


def test_what_may_not_be_read_is_named():
    """As root, who may read everything, the effective user is nobody for the while."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inner = folder / "inner"
        inner.mkdir()
        folder.chmod(0o755)
        for path in (folder / "a.jsonl", folder / "a.parquet", inner / "b.jsonl"):
            path.write_text(dumped(good("sft", 1)), encoding="utf-8")
            path.chmod(0)
        inner.chmod(0)
        lone = folder.parent / f"{folder.name}.parquet"
        (folder / "a.parquet").rename(lone)

        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            messages = [refusal(path, "sft") for path in (folder / "a.jsonl", folder, inner / "b.jsonl", inner, lone)]
        finally:
            os.seteuid(user)
            lone.unlink()
            inner.chmod(0o755)

    assert f"{folder}/a.jsonl cannot be read (Permission denied): check its permissions" in messages[0]
    assert all(f"{folder}" in message and "ermission denied" in message for message in messages), messages


def test_a_disk_that_fails_is_named_with_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(dumped(good("sft", 1)), encoding="utf-8")

    def fail(self, mode):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert f"{path} cannot be read (Input/output error)" in refusal(path, "sft")


@pytest.mark.parametrize("size", ["nan", "inf", "-1"])
def test_an_evaluation_size_that_is_none_is_refused_by_its_flag(size):
    with pytest.raises(ValueError, match=f"--eval_size {float(size)} is no size"):
        DataArguments(eval_size=float(size))


# ---- the scripts' own command lines ----
SCRIPTS = {"sft_training": "sft", "reward_modeling": "preference", "rl_training": "prompt"}
FOR_SCRIPTS = ("empty jsonl", "UTF-16", "under data", "lists by index", "no header", "name twice", "cut parquet")


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    """Flags of each script that name the tiny base and what else has to be there."""
    from adapters import random_adapter

    folder = tmp_path_factory.mktemp("adapters")
    ppo = ["--sft_model_lora_path", random_adapter(tiny_base, folder / "sft"), "--reward_model_lora_path"]
    ppo.append(random_adapter(tiny_base, folder / "reward", "reward", seed=1))
    flags = {script: ["--model_name", tiny_base, "--bf16", "False"] for script in SCRIPTS}
    return flags | {"rl_training": ["--base_model_name", tiny_base, "--bf16", "False", *ppo]}


@pytest.fixture
def command(bases, tmp_path, monkeypatch, capsys):
    """A script run in this process as its command line runs it: exit code, what it printed, what it said of errors."""
    monkeypatch.setattr(launch, "listen", lambda: None, raising=False)

    def run(script, *flags):
        module = importlib.import_module(script)
        code = 0
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *bases[script], "--inspect_data", "True", *flags])
        try:
            launch.run_script(module.main, module.parse_args)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_with_one_sentence_and_exit_code_1(script, command, tmp_path):
    kind = SCRIPTS[script]
    output = ("--output_dir", str(tmp_path / "run"))
    paths = {}
    for name in FOR_SCRIPTS:
        file, content, said = file_faults(kind)[name]
        path = tmp_path / name.replace(" ", "_") / file
        path.parent.mkdir()
        path.write_bytes(content)
        paths[path] = said

    malformed = tmp_path / "malformed.jsonl"
    malformed.write_bytes(lines_of(kind, b'{"prompt": null}'))
    paths[malformed] = ":4: field "
    paths[tmp_path / "missing.jsonl"] = " does not exist: give a local file, a directory or a hub id"

    for path, said in paths.items():
        code, printed, error = command(script, "--dataset_name", str(path), *output)
        assert (code, printed) == (1, "")
        assert error.startswith(f"{script}.py: error: ")
        assert error.count("\n") == 1
        assert f"{path}{said}" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_shows_what_it_dropped_and_steers_no_terminal(script, command, tmp_path):
    kind = SCRIPTS[script]
    path = tmp_path / "a.jsonl"
    rows = [{field: f"{field}\x1b[31m{number}" for field in FIELDS[kind]} for number in range(8)]
    lines = [*map(dumped, rows), dumped(rows[0]), '{"prompt": 7}']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ("--dataset_name", str(path), "--bad_rows", "skip", "--output_dir", str(tmp_path / "run"))

    code, printed, _ = command(script, *flags)
    assert code == 0
    funnel = [line.split() for line in printed.splitlines()]
    assert ["-", "malformed", "1", f"{path}:10"] in funnel
    assert ["-", "duplicate", "1", f"{path}:9"] in funnel
    assert ["kept", "8"] in funnel
    assert "\x1b" not in printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_are_put_aside_only_where_a_run_has_its_claim(script, command, tmp_path):
    path = tmp_path / "a.jsonl"
    out = tmp_path / "run"
    path.write_bytes(lines_of(SCRIPTS[script], b'{"prompt": null}'))
    flags = ("--dataset_name", str(path), "--bad_rows", "skip", "--output_dir", str(out))
    assert command(script, *flags)[0] == 0
    assert not out.exists()

    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, _, error = command(script, *flags, "--inspect_data", "False")
    assert code == 1
    assert f"--output_dir {out} is not empty (notes.txt, ...)" in error
    assert sorted(file.name for file in out.iterdir()) == [".lock", "notes.txt"]


@pytest.mark.slow
def test_a_real_command_ends_without_a_traceback(bases, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of("sft", '{"prompt": "问题"'.encode("gb18030")))
    flags = ["--dataset_name", str(path), "--inspect_data", "True", "--output_dir", str(tmp_path / "run")]
    finished = subprocess.run(
        [sys.executable, str(ROOT / "sft_training.py"), *bases["sft_training"], *flags],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert finished.returncode == 1
    assert finished.stderr.startswith(
        f"sft_training.py: error: malformed rows: {path}:4: byte 0xce is not UTF-8 but reads"
    )
    assert finished.stderr.count("\n") == 1


# ---- anything at all ----
def test_a_hundred_damaged_files_by_the_scripts_command_lines_end_in_rows_or_in_one_sentence(bases):
    outcomes, failures = fuzz_data.run(1, range(100), bases)
    assert failures == []
    assert outcomes["rows"] > 20
    assert len(outcomes) >= 5
    assert not [name for name in outcomes if name.startswith("other")]


def test_three_hundred_damaged_files_end_in_rows_or_in_one_sentence():
    outcomes, failures = fuzz_data.run(0, range(300))
    assert failures == []
    assert outcomes["rows"] > 50
    assert outcomes["malformed rows"] > 30
    assert len(outcomes) >= 8
    assert not [name for name in outcomes if name.startswith("other")]


def test_pairs_given_to_sft_name_the_flag_that_takes_their_better_answers(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"问{n}", "chosen": f"好{n}", "rejected": "坏"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="preference pairs: give --answer_field chosen") as error:
        load_rows(str(file), "sft")
    assert "--prompt_field" not in str(error.value)


def test_a_file_in_the_old_chinese_encoding_is_told_so_once(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"你好{n}", "chosen": "好的", "rejected": "不好"} for n in range(9)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_bytes("".join([*lines, "not a row\n"]).encode("gb18030"))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: byte") as error:
        load_rows(str(file), "preference")
    said = str(error.value)
    assert said.count("GB18030: convert") == 1
    assert "pairs.jsonl:10: " in said and "(and 8 more)" in said


def test_a_byte_order_mark_is_read_and_noted(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = json.dumps({"prompt": "问", "chosen": "好", "rejected": "坏"}) + "\n"
    file.write_bytes(b"\xef\xbb\xbf" + row.encode())
    rows, funnel = load_rows(str(file), "preference")
    assert rows[0]["prompt"] == "问"
    assert f"the byte order mark of {file} is left out" in funnel.table()


def test_a_tsv_file_is_read_by_its_tabs_in_a_directory_too(tmp_path):
    (tmp_path / "pairs.tsv").write_text("prompt\tchosen\trejected\n问，一\t好\t坏\n", encoding="utf-8")
    for source in (tmp_path / "pairs.tsv", tmp_path):
        rows, _ = load_rows(str(source), "preference")
        assert [(row["prompt"], row["chosen"]) for row in rows] == [("问，一", "好")]
