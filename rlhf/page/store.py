"""Prompts, answers, pairs and votes in one SQLite file, votes.sqlite.

A vote is on the disk before it is confirmed: a process that is killed loses none. The standard library alone, so that
voting on prepared answers needs no torch.
"""

import json
import secrets
import sqlite3
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE = "votes.sqlite"

# What a person may say of a pair; "first" and "second" are the pair's own order, whichever side they were shown on.
CHOICES = ("first", "second", "tie", "bad", "skip")

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS prompts (
    id INTEGER PRIMARY KEY, turns TEXT NOT NULL UNIQUE, shared INTEGER NOT NULL, origin TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, version TEXT NOT NULL, adapter TEXT NOT NULL,
    sampling TEXT NOT NULL, seed INTEGER NOT NULL, text TEXT NOT NULL, score REAL,
    UNIQUE (prompt, version, adapter, sampling, seed)
);
CREATE TABLE IF NOT EXISTS pairs (
    id INTEGER PRIMARY KEY, first INTEGER NOT NULL REFERENCES answers, second INTEGER NOT NULL REFERENCES answers,
    UNIQUE (first, second)
);
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, pair INTEGER NOT NULL REFERENCES pairs, person TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie', 'bad', 'skip')), margin INTEGER, reason TEXT,
    edited TEXT, left_side TEXT NOT NULL, seconds REAL, time TEXT NOT NULL,
    UNIQUE (pair, person)
);
"""

# A vote with all that is known of it; `first_` and `second_` are the answers of the pair.
VOTES = """
SELECT votes.*, prompts.turns, prompts.shared,
    a.text AS first_text, a.version AS first_version, a.adapter AS first_adapter, a.score AS first_score,
    a.sampling AS first_sampling, a.seed AS first_seed,
    b.text AS second_text, b.version AS second_version, b.adapter AS second_adapter, b.score AS second_score,
    b.sampling AS second_sampling, b.seed AS second_seed
FROM votes JOIN pairs ON pairs.id = votes.pair JOIN answers a ON a.id = pairs.first
    JOIN answers b ON b.id = pairs.second JOIN prompts ON prompts.id = a.prompt
ORDER BY votes.id
"""


@dataclass(frozen=True)
class Version:
    """A model that answers: its name, and the fingerprint of its adapter ("" for the bare base, or if unknown)."""

    name: str
    adapter: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt as turns of (role, text); `shared` ones are shown to everybody."""

    id: int
    turns: tuple[tuple[str, str], ...]
    shared: bool
    origin: str


@dataclass(frozen=True)
class Written:
    """An answer in the store."""

    id: int
    prompt: int
    version: Version
    text: str
    score: float | None


class AlreadyVoted(ValueError):
    """This person has voted on this pair, from another tab."""


class Store:
    """The file, opened once; every method may be called from any thread."""

    def __init__(self, output_dir: str | Path):
        """Open the file, or make it. Raises: ValueError where there is a file that is no store of ours."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE
        self.lock = threading.Lock()
        try:
            # One connection and one lock: SQLite allows one writer anyway, and Python's module one thread at a time.
            self.connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False, timeout=10)
            # By name, so that a column that is added later moves no other.
            self.connection.row_factory = sqlite3.Row
            # Readers do not wait for a writer, and a commit is on the disk when it returns.
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            self.connection.execute("PRAGMA foreign_keys=ON")
            self.connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            # A full disk and a read-only one are no damage.
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"{self.file}: {error}") from None
            raise ValueError(f"{self.file} is no store of this page ({error}): move it away") from None
        # Decides which answer a person sees on the left, so that a restart swaps none.
        self.secret = self._secret()

    def close(self) -> None:
        """Close the file; what lies in the write-ahead log goes into it."""
        with self.lock:
            self.connection.close()

    @contextmanager
    def _writing(self):
        """One transaction: all of it, or nothing where an error comes."""
        with self.lock:
            # Immediate: the lock for writing is taken now and not in the middle, where another process could be in the
            # way.
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself where the disk is full.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, values: tuple = ()) -> list[sqlite3.Row]:
        with self.lock:
            return self.connection.execute(sql, values).fetchall()

    def _secret(self) -> str:
        with self._writing() as connection:
            made = ("secret", secrets.token_hex(16))
            connection.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", made)
            return connection.execute("SELECT value FROM meta WHERE name = 'secret'").fetchone()[0]

    def note(self, name: str, value: str) -> None:
        """Keep a text about the whole store, such as the base that its answers come from."""
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def noted(self, name: str) -> str | None:
        """The text that was kept under this name."""
        stored = self._rows("SELECT value FROM meta WHERE name = ?", (name,))
        return stored[0][0] if stored else None

    # ---- prompts and answers ----
    def add_prompts(self, prompts: list[list[tuple[str, str]]], overlap: float, origin: str = "file") -> list[int]:
        """Add prompts (those that are there already stay) and return their ids.

        Of every stretch of prompts the share `overlap`, evenly spread, is shown to everybody.
        """
        ids = []
        with self._writing() as connection:
            count = connection.execute("SELECT count(*) FROM prompts").fetchone()[0]
            for turns in prompts:
                text = json.dumps([list(turn) for turn in turns], ensure_ascii=False)
                # Evenly spread and without a draw: every prefix of the list holds its share, and a restart changes
                # none.
                shared = int((count + 1) * overlap) > int(count * overlap)
                row = connection.execute(
                    "INSERT OR IGNORE INTO prompts (turns, shared, origin) VALUES (?, ?, ?)", (text, shared, origin)
                )
                count += row.rowcount
                existing = connection.execute("SELECT id FROM prompts WHERE turns = ?", (text,)).fetchone()
                ids.append(existing[0])
        return ids

    def prompts(self) -> list[Prompt]:
        """All prompts, in the order in which they came."""
        rows = self._rows("SELECT * FROM prompts ORDER BY id")
        return [
            Prompt(row["id"], tuple(map(tuple, json.loads(row["turns"]))), bool(row["shared"]), row["origin"])
            for row in rows
        ]

    def add_answers(self, rows: list[dict]) -> list[Written]:
        """Add answers {"prompt" (id), "version", "sampling", "seed", "text", "score"}; one that is there stays."""
        added = []
        with self._writing() as connection:
            for row in rows:
                version = row["version"]
                # Sorted, because the text is part of what makes an answer the same.
                sampling = json.dumps(row["sampling"], sort_keys=True)
                identity = (row["prompt"], version.name, version.adapter, sampling, row["seed"])
                connection.execute(
                    "INSERT OR IGNORE INTO answers (prompt, version, adapter, sampling, seed, text, score) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*identity, row["text"], row["score"]),
                )
                stored = connection.execute(
                    "SELECT * FROM answers WHERE (prompt, version, adapter, sampling, seed) = (?, ?, ?, ?, ?)",
                    identity,
                ).fetchone()
                added.append(_written(stored))
        return added

    def answers(self) -> list[Written]:
        """All answers, in the order in which they came."""
        return [_written(row) for row in self._rows("SELECT * FROM answers ORDER BY id")]

    def pair(self, first: int, second: int) -> int:
        """Id of the pair of two answers, made if it is new."""
        existing = self._rows("SELECT id FROM pairs WHERE (first, second) = (?, ?)", (first, second))
        if existing:
            return existing[0][0]
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO pairs (first, second) VALUES (?, ?)", (first, second))
            return connection.execute(
                "SELECT id FROM pairs WHERE (first, second) = (?, ?)", (first, second)
            ).fetchone()[0]

    # ---- votes ----
    def add_vote(self, vote: dict) -> int:
        """Store a vote {"key", "pair", "person", "choice", "margin", "reason", "edited", "left_side", "seconds"}.

        A vote of the same key is the same vote, sent again because its confirmation was lost.

        Returns: its id. Raises: AlreadyVoted; sqlite3.OperationalError where the disk is full.
        """
        values = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **vote}
        names = ("key", "pair", "person", "choice", "margin", "reason", "edited", "left_side", "seconds", "time")
        with self._writing() as connection:
            # Asked within the transaction: two tries of one vote cannot both find nothing.
            known = connection.execute("SELECT id FROM votes WHERE key = ?", (vote["key"],)).fetchone()
            if known:
                return known[0]
            places = ", ".join(f":{name}" for name in names)
            try:
                # Names from a list of this file, values as parameters: nothing from a request is part of the SQL.
                row = connection.execute(f"INSERT INTO votes ({', '.join(names)}) VALUES ({places})", values)
            except sqlite3.IntegrityError as error:
                if "UNIQUE" in str(error):
                    raise AlreadyVoted("this pair has a vote of yours already, from another tab") from None
                raise ValueError("there is no such pair") from None
            return row.lastrowid

    def remove_vote(self, number: int, person: str) -> int | None:
        """Take a vote of this person back; the id of its pair, None where there is no such vote."""
        with self._writing() as connection:
            # By person too, so that nobody takes back another's vote by its number.
            removed = connection.execute(
                "SELECT pair FROM votes WHERE (id, person) = (?, ?)", (number, person)
            ).fetchone()
            connection.execute("DELETE FROM votes WHERE (id, person) = (?, ?)", (number, person))
            return removed[0] if removed else None

    def pairs(self) -> list[tuple[int, int, int]]:
        """(id, first answer, second answer) of all pairs."""
        return [tuple(row) for row in self._rows("SELECT id, first, second FROM pairs")]

    def votes(self) -> list[sqlite3.Row]:
        """All votes with their prompt and both answers, in the order in which they came."""
        return self._rows(VOTES)


def _written(row: sqlite3.Row) -> Written:
    version = Version(row["version"], row["adapter"])
    return Written(row["id"], row["prompt"], version, row["text"], row["score"])
