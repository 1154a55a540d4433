"""Rows of a stage as columns in a file that is mapped into memory: texts, token ids, places.

A million pairs are gigabytes as Python objects, in every process. Here a row is made an object when somebody asks for
it, and processes share the pages of one file.
"""

import json
import operator
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rlhf.artefacts.files import TOKEN

# Rows that are written at once; fewer of them never touch the disk.
BATCH_ROWS = 500

# Where files of rows are made.
_folder: Path | None = None

_TEXT = pa.string()
_IDS = pa.list_(pa.int32())
# Every column that a row of any stage may have; a row has those that are not null.
SCHEMA = pa.schema(
    {
        "prompt": _TEXT,
        "turns": pa.list_(pa.list_(_TEXT)),
        "answer": _TEXT,
        "chosen": _TEXT,
        "rejected": _TEXT,
        "margin": pa.float64(),
        # The name of a file may be no UTF-8.
        "where": pa.binary(),
        "opening": _TEXT,
        "query_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "input_ids": _IDS,
        "completion_mask": _IDS,
        "blank": pa.bool_(),
        # What reward functions see of a row: columns of any kind, as JSON.
        "columns": _TEXT,
    }
)


class Rows(Sequence[dict]):
    """Rows in an order, each a dict of the columns that it has; what is chosen of them shares their memory."""

    def __init__(self, batches: list[pa.RecordBatch], numbers: np.ndarray | None = None):
        self.batches = batches
        self.ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
        # Choosing, sorting and splitting make new numbers, eight bytes a row, and leave the batches alone.
        self.numbers = np.arange(self.ends[-1] if batches else 0) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self.batches, self.numbers[index])
        # Integers of numpy and torch are indices as well; a float is refused.
        number = self.numbers[operator.index(index)]
        batch, place = self._place(number)
        return _dicts(self.batches[batch].slice(place, 1))[0]

    def __iter__(self) -> Iterator[dict]:
        for batch, places in self._runs():
            yield from _dicts(batch.take(places))

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    # Rows compare by content, which may be gigabytes.
    __hash__ = None

    def __add__(self, rows: Iterable[dict]) -> "Rows":
        """These rows, and others behind them."""
        more = rows if isinstance(rows, Rows) else written(rows)
        # Counted on from all rows of these batches, not from the chosen ones.
        behind = more.numbers + (self.ends[-1] if self.batches else 0)
        return Rows(self.batches + more.batches, np.concatenate([self.numbers, behind]))

    def select(self, indices: Iterable[int]) -> "Rows":
        """The rows at these indices, in their order."""
        return Rows(self.batches, self.numbers[np.fromiter(indices, dtype=np.int64)])

    def column(self, name: str) -> Iterator:
        """The values of one column; None where a row lacks it."""
        for batch, places in self._runs():
            values = _values(batch.column(name).take(places))
            yield from map(os.fsdecode, values) if name == "where" else values

    def lengths(self, name: str) -> np.ndarray:
        """[N] int64: entries of a list column in each row, without looking at them."""
        # Behind an empty array, as there may be no batch at all.
        counts = [batch.column(name).value_lengths().fill_null(0).to_numpy(False) for batch in self.batches]
        return np.concatenate([np.zeros(0, np.int64), *counts])[self.numbers]

    def dataset(self, *names: str):
        """A `datasets.Dataset` of some columns, in the order of these rows."""
        # Imported where needed: datasets takes a second, and `--help` should not.
        import datasets

        columns = [pa.RecordBatch.from_arrays([batch.column(name) for name in names], names) for batch in self.batches]
        # In memory by its class alone: the columns are still pages of the mapped file, which datasets would copy if it
        # were given dicts.
        table = datasets.table.InMemoryTable(pa.Table.from_batches(columns))
        return datasets.Dataset(table).select(self.numbers)

    def save(self, path: Path) -> None:
        """Write the rows as two files whose names begin with `path`: columns, and their order."""
        with pa.ipc.new_file(f"{path}.arrow", SCHEMA) as file:
            for batch in self.batches:
                file.write_batch(batch)
        np.save(f"{path}.npy", self.numbers)

    @classmethod
    def load(cls, path: Path) -> "Rows":
        """Map rows that `save` wrote. Raises: OSError, ValueError, pyarrow.ArrowException where they are damaged."""
        # A pickle among the numbers could run code.
        return cls(_mapped(f"{path}.arrow"), np.load(f"{path}.npy", allow_pickle=False))

    def _place(self, number: int) -> tuple[int, int]:
        """Number of the batch that holds a row, and the row's place in it."""
        batch = int(np.searchsorted(self.ends, number, side="right"))
        return batch, int(number) - int(self.ends[batch] - self.batches[batch].num_rows)

    def _runs(self) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
        """Each run of rows that lie in one batch, as that batch and their places in it."""
        # `ends` holds the first number behind each batch, so a row with exactly that number lies in the next:
        # side="right".
        holders = np.searchsorted(self.ends, self.numbers, side="right")
        # No batch has the number -1, so the first row begins a run too.
        starts = np.flatnonzero(np.diff(holders, prepend=-1))
        for start, end in zip(starts, np.append(starts, len(holders))[1:], strict=True):
            batch = self.batches[holders[start]]
            first = self.ends[holders[start]] - batch.num_rows
            yield batch, pa.array(self.numbers[start:end] - first)


class RowWriter:
    """Takes rows one by one, in memory until they are many, then in a file; `rows` ends the writing.

    The file has no name once it is mapped: it is gone with the last process that uses it, however that ends.
    """

    def __init__(self):
        self.waiting: list[dict] = []
        self.path: Path | None = None
        self.gone: weakref.finalize | None = None
        self.file = None

    def append(self, row: dict) -> None:
        # `_batch` asks for the columns of the schema and for no others: one more would be lost without a word.
        unknown = row.keys() - set(SCHEMA.names)
        if unknown:
            raise ValueError(f"a row has no column {', '.join(sorted(unknown))}")
        self.waiting.append(row)
        if len(self.waiting) == BATCH_ROWS:
            self._write()

    def rows(self) -> Rows:
        if self.file is None:
            return Rows([_batch(self.waiting)] if self.waiting else [])
        self._write()
        self.file.close()
        batches = _mapped(str(self.path))
        self.gone()
        return Rows(batches)

    def _write(self) -> None:
        if self.file is None:
            handle, name = tempfile.mkstemp(prefix=f".{TOKEN}", suffix=".arrow", dir=scratch())
            # pyarrow opens the file by its name once more.
            os.close(handle)
            self.path = Path(name)
            # Where reading stops at an error, nobody asks for the rows.
            self.gone = weakref.finalize(self, self.path.unlink, missing_ok=True)
            self.file = pa.ipc.new_file(name, SCHEMA)
        if self.waiting:
            self.file.write_batch(_batch(self.waiting))
        self.waiting = []


def _mapped(file: str) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(file))
    # Views of the mapping: no byte is read before somebody looks at it.
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def written(rows: Iterable[dict]) -> Rows:
    """Rows of dicts as columns."""
    writer = RowWriter()
    for row in rows:
        writer.append(row)
    return writer.rows()


def pick(rows: Sequence[dict], indices: Iterable[int]) -> Sequence[dict]:
    """The rows at these indices, in their order."""
    return rows.select(indices) if isinstance(rows, Rows) else [rows[index] for index in indices]


def column(rows: Sequence[dict], name: str) -> Iterator:
    """The values of one column; None where a row lacks it."""
    return rows.column(name) if isinstance(rows, Rows) else (row.get(name) for row in rows)


def keep_in(folder: Path | None) -> None:
    """Let files of rows be made in a folder from now on; None: in the usual temporary one."""
    global _folder
    _folder = folder


def scratch() -> str:
    return str(_folder or tempfile.gettempdir())


# ---- between dicts and columns ----
def _batch(rows: list[dict]) -> pa.RecordBatch:
    columns = {name: [row.get(name) for row in rows] for name in SCHEMA.names}
    columns["where"] = [where and os.fsencode(where) for where in columns["where"]]
    # A table holds dates and decimals, for which JSON has no form: a reward function sees them as text.
    columns["columns"] = [cells and json.dumps(cells, default=str) for cells in columns["columns"]]
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


def _dicts(batch: pa.RecordBatch) -> list[dict]:
    present = {name: batch.column(name) for name in batch.schema.names}
    columns = {name: _values(array) for name, array in present.items() if array.null_count < len(array)}
    if "where" in columns:
        columns["where"] = [where and os.fsdecode(where) for where in columns["where"]]
    if "columns" in columns:
        columns["columns"] = [cells and json.loads(cells) for cells in columns["columns"]]
    if "turns" in columns:
        columns["turns"] = [turns and [tuple(turn) for turn in turns] for turns in columns["turns"]]
    return [
        {name: value for name, value in zip(columns, values, strict=True) if value is not None}
        for values in zip(*columns.values(), strict=True)
    ]


def _values(array: pa.Array) -> list:
    """The values of a column as Python objects."""
    if array.type != _IDS:
        return array.to_pylist()
    # Lists of ids go through numpy: one by one they take ten times as long.
    # Not `array.values`, which gives the whole batch where this array is a slice of it.
    flat = array.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    lists = np.split(flat, ends[:-1])
    return [ids.tolist() if valid else None for ids, valid in zip(lists, array.is_valid().to_pylist(), strict=True)]
