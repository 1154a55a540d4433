"""Rows in columns are the rows that were put in, wherever they lie and however they are chosen; files are streamed."""

import gzip
import json
import random
import tracemalloc

import pytest

from rlhf.data import rows as rows_module
from rlhf.data.arguments import DataArguments
from rlhf.data.files import read_file
from rlhf.data.funnel import Funnel, one_half, split_eval, subset, without_overlap
from rlhf.data.reading import load_splits
from rlhf.data.rows import Rows, RowWriter, column, written

MADE = [
    {
        "prompt": f"问题{n} \x00🙂",
        "where": f"a\udce4{n}.jsonl:{n}",
        "opening": f"问题{n % 7}",
        **({"turns": [("user", "a"), ("assistant", ""), ("user", f"{n}")]} if n % 3 else {}),
        **({"margin": n / 7} if n % 2 else {}),
        **({"query_ids": list(range(n % 5)), "chosen_ids": [2**31 - 1], "rejected_ids": []} if n % 4 else {}),
        **({"blank": True} if n == 30 else {}),
    }
    for n in range(40)
]


@pytest.fixture(params=[3, 40, 500])
def many(request, monkeypatch, tmp_path) -> Rows:
    """The rows, in memory or in a file of several batches."""
    monkeypatch.setattr(rows_module, "BATCH_ROWS", request.param)
    monkeypatch.setattr(rows_module, "scratch", lambda: str(tmp_path))
    made = written(MADE)
    # A file that is mapped has no name, so that no killed process leaves one behind.
    assert list(tmp_path.iterdir()) == []
    return made


def test_rows_in_columns_are_the_rows_that_were_put_in(many):
    assert list(many) == MADE
    assert [list(row) for row in many] == [[name for name in rows_module.SCHEMA.names if name in row] for row in MADE]
    assert [many[number] for number in range(len(MADE))] == MADE
    assert many[-1] == MADE[-1]
    assert many == MADE
    assert many != MADE[:-1]
    assert isinstance(many[1]["turns"][0], tuple)
    with pytest.raises(IndexError):
        many[40]
    assert not Rows([])
    assert list(Rows([])) == list(Rows([]).column("prompt")) == list(Rows([])[:3]) == []


def test_chosen_and_joined_rows_keep_their_order(many):
    assert many[3:30:4] == MADE[3:30:4]
    order = random.Random(0).sample(range(40), 40)
    chosen = many.select(order)
    assert chosen == [MADE[number] for number in order]
    assert chosen[5:9].select([3, 0]) == [MADE[order[8]], MADE[order[5]]]
    assert chosen + MADE[:2] + many[:1] == [*(MADE[number] for number in order), *MADE[:2], MADE[0]]
    assert Rows([]) + MADE == MADE
    assert list(chosen.column("where")) == [MADE[number]["where"] for number in order]
    assert chosen.lengths("query_ids").tolist() == [len(MADE[number].get("query_ids", [])) for number in order]
    dataset = (chosen + MADE[1:2]).dataset("query_ids", "prompt")
    assert dataset["query_ids"][:] == [MADE[number].get("query_ids") for number in [*order, 1]]
    assert dataset["prompt"][-1] == MADE[1]["prompt"]


def test_rows_that_nobody_asks_for_leave_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 3)
    monkeypatch.setattr(rows_module, "scratch", lambda: str(tmp_path))
    writer = RowWriter()
    for row in MADE:
        writer.append(row)
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_no_stage_has_is_refused():
    with pytest.raises(ValueError, match="no column extra"):
        RowWriter().append({"prompt": "a", "extra": 1})


@pytest.mark.parametrize("share", [0.2, 7])
def test_the_funnel_chooses_the_same_rows_from_columns_as_from_a_list(many, share):
    for choose in (
        lambda rows, funnel: split_eval(rows, share, seed=3)[0],
        lambda rows, funnel: split_eval(rows, share, seed=3)[1],
        lambda rows, funnel: subset(rows, 9, 3, funnel),
        lambda rows, funnel: one_half(rows, 1, funnel),
        lambda rows, funnel: without_overlap(rows, rows[4:9], funnel),
    ):
        funnels = (Funnel(read=40), Funnel(read=40))
        assert choose(many, funnels[0]) == choose(MADE, funnels[1])
        assert funnels[0] == funnels[1]
    assert list(column(MADE, "margin")) == list(many.column("margin"))


# ---- streams ----
def pairs_file(path, count: int) -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"{number} " + "问" * 300, "chosen": "好" * 400, "rejected": "坏" * 400}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_large_file_is_read_without_being_held(tmp_path, name):
    import datasets

    source = tmp_path / "a.jsonl"
    pairs_file(source, 3000)
    if name.endswith(".gz"):
        pairs_file(tmp_path / name, 3000)
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list([json.loads(line) for line in source.open(encoding="utf-8")]).to_parquet(
            str(tmp_path / name)
        )

    tracemalloc.start()
    args = DataArguments(dataset_name=str(tmp_path / name), prompt_template="{prompt}", eval_size=100)
    train, evaluation, funnel = load_splits(args, "preference", seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(train), len(evaluation), funnel.kept) == (2900, 100, 3000)
    # Its text has 9.9 million bytes; what is held is a batch of it, and hashes.
    assert peak < 5_000_000, peak


def test_a_line_ends_at_a_new_line_alone_and_blank_lines_count(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n \n{"a": "\xe2\x80\xa8"}\r\n\n{"a": "\xff"}\n{"a": 1')
    found = list(read_file(file))
    assert [where.rpartition(":")[2] for where, _ in found] == ["3", "5", "6"]
    assert found[0][1] == {"a": "\u2028"}
    assert "0xff" in str(found[1][1])
    assert str(found[2][1]) == "the last line is cut off"
