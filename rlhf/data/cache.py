"""Encoded rows kept on disk once a machine, under a key of all that they depend on; every later start maps them.

Of processes that need the same rows at once, one prepares them and the others wait. A folder of the cache appears
whole, by one renaming: what a killed run or a full disk leaves behind never counts as prepared.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from filelock import FileLock, Timeout
from huggingface_hub import constants

from rlhf.artefacts.files import TOKEN, DiskFull, is_full
from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows, keep_in
from rlhf.data.sources import files_under
from rlhf.run.launch import rank_and_size, say
from rlhf.run.progress import QUIET, Progress

NONE = "none"

# Seconds by which the first process of a run is ahead of the others.
HEAD_START = 0.2

# Flags beside those of the group "data" that decide which rows there are.
DECIDING = (
    "seed", "degenerate_frac", "degenerate_kinds", "max_prompt_length", "eval_freq", "eval_prompts",
    "reward_functions",
)  # fmt: skip

# What rows are made by.
CODE = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("reward/*.py")]
PACKAGES = ("tokenizers", "transformers", "pyarrow", "numpy", "datasets", "sentencepiece")

BAD_ROWS = "bad_rows.jsonl"
ABOUT = "about.json"


@dataclass
class Prepared:
    """Rows by name, and what became of all that were read. `about`: what else belongs to them, as JSON holds it."""

    rows: dict[str, Rows]
    funnel: Funnel
    about: dict


# (flags, prompt format, file for malformed rows) -> rows.
Prepare = Callable[[Any, PromptFormat, Path | None], Prepared]


def prepared(args, prompt_format: PromptFormat, prepare: Prepare, bad_rows_file: Path | None) -> Prepared:
    """Return what `prepare(args, prompt_format, bad_rows_file)` makes, from the cache where it is there.

    Args:
        args: the script's flags. bad_rows_file: where this process wants what --bad_rows skip leaves out.
    Raises: DiskFull; what `prepare` raises, after which nothing is kept.
    """
    root = _root(args)
    key = root and _key(args, prompt_format, prepare)
    if not key:
        return prepare(args, prompt_format, bad_rows_file)

    folder = root / f"rlhf-{key}"
    with _locked(folder):
        cached = _load(folder)
        if cached is None:
            _fill(folder, partial(prepare, args, prompt_format))
            # What cannot be read now is no damage: too little memory is left to map it, say.
            cached = _read(folder)
    if bad_rows_file:
        # Those of an earlier run are not this one's.
        Path(bad_rows_file).unlink(missing_ok=True)
        if (folder / BAD_ROWS).is_file():
            shutil.copyfile(folder / BAD_ROWS, bad_rows_file)
    return cached


def _root(args) -> Path | None:
    """The folder of the cache; None where there is to be none, or none can be written."""
    # A look at the first rows shall not wait for a hash of all.
    if args.data_cache == NONE or args.row_limit() is not None:
        return None
    # As datasets has it, without its import: that takes a second, and 100 MB of every process.
    usual = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    root = Path(os.path.expanduser(args.data_cache or usual))
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Asking for permissions is not enough: a whole file system may be read-only.
        probe = root / f".{TOKEN}{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        say(f"{root} cannot be written ({error.strerror}): the data is prepared for this run alone; --data_cache DIR")
        return None
    return root


@contextmanager
def _locked(folder: Path):
    """Let one process at a time do what is within; another says that it waits."""
    if rank_and_size()[0]:
        # The first process shows how far it has come, so it shall be the one at work: a head start, no more.
        time.sleep(HEAD_START)
    # The system takes a killed process's lock away.
    lock = FileLock(f"{folder}.lock", mode=0o666)
    try:
        lock.acquire(timeout=QUIET)
    except Timeout:
        say("waiting for another process that prepares the same rows")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fill(folder: Path, make: Callable[[Path | None], Prepared]) -> None:
    """Prepare the rows beside the folder, and rename them into place."""
    part = folder.with_name(f".{TOKEN}{folder.name}")
    # What a killed run left: the lock says that nobody is at work on it.
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        part.mkdir()
        # What is being prepared goes with the folder, should this process be killed.
        keep_in(part)
        made = make(part / BAD_ROWS)
        for name, rows in made.rows.items():
            rows.save(part / name)
        about = {"rows": list(made.rows), "funnel": vars(made.funnel), "about": made.about}
        (part / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        # One step: a reader finds all of the rows, or none.
        part.rename(folder)
    except OSError as error:
        if not is_full(error, folder.parent):
            raise
        raise DiskFull(
            f"the disk of {folder.parent} is full: it cannot hold the encoded rows; make room, or give --data_cache "
            "another directory, or none"
        ) from error
    finally:
        keep_in(None)
        shutil.rmtree(part, ignore_errors=True)


def _load(folder: Path) -> Prepared | None:
    """What a folder of the cache holds; None where there is none, or it is damaged."""
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError, pa.ArrowException):
        return None


def _read(folder: Path) -> Prepared:
    content = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    funnel = Funnel(**content["funnel"])
    # JSON knows no counters.
    funnel.made = Counter(funnel.made)
    funnel.dropped = Counter(funnel.dropped)
    return Prepared({name: Rows.load(folder / name) for name in content["rows"]}, funnel, content["about"])


# ---- the key ----
def _key(args, prompt_format: PromptFormat, prepare: Prepare) -> str | None:
    """A hash of everything that the rows depend on; None where the contents of a source are not at hand."""
    sources = [args.dataset_name, *filter(None, [args.eval_dataset_name])]
    if not all(Path(os.path.expanduser(source)).exists() for source in sources):
        return None

    flags = {field.name: getattr(args, field.name) for field in fields(args) if field.metadata["group"] == "data"}
    del flags["data_cache"], flags["inspect_rows"]
    flags |= {name: getattr(args, name) for name in DECIDING if hasattr(args, name)}
    tokenizer = prompt_format.tokenizer
    # A Python tokenizer keeps its pieces in a file: the vocabulary and the special ids have to do.
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = {
        "flags": flags,
        "contents": [_contents(Path(os.path.expanduser(source))) for source in sources],
        "format": prompt_format.record(),
        "tokenizer": [type(tokenizer).__name__, vocabulary, str(tokenizer.special_tokens_map)],
        "code": [_hash_of_file(file) for file in (*sorted(CODE), Path(prepare.__code__.co_filename))],
        "packages": [version(name) for name in PACKAGES],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()[
        :32
    ]


def _contents(source: Path) -> list[tuple[str, str]]:
    """(name, hash of its bytes) of a file, or of all files of a directory."""
    files = files_under(source) if source.is_dir() else [source]
    return [(str(file.relative_to(source)), _hash_of_file(file)) for file in files]


def _hash_of_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    progress = Progress(f"looking for changes in {file.name}", file.stat().st_size, "bytes")
    with file.open("rb") as content:
        while part := content.read(1 << 24):
            digest.update(part)
            progress.advance(len(part))
    progress.close()
    return digest.hexdigest()
