"""Sources of rows: local files, a directory of them, a `save_to_disk` directory, the hub."""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from huggingface_hub import hf_hub_download

from rlhf.artefacts.files import nearest
from rlhf.data.files import SUFFIXES, kind_of, read_file
from rlhf.data.located import Located, first_sentence, row_or_bad

# Usual names of a split for evaluation, the likeliest first.
EVAL_SPLITS = ("test", "validation", "valid", "val", "eval", "dev")
SPLITS = ("train", *EVAL_SPLITS)

# Loading scripts on the hub, which datasets 4 and later refuse: their data files (one a config) are read instead.
SCRIPT_DATASETS = ("Hello-SimpleAI/HC3-Chinese", "Hello-SimpleAI/HC3")


class Again:
    """Rows that can be read any number of times: each time from the source, so that none has to be kept."""

    def __init__(self, read: Callable[..., Iterator[Located]], *args):
        self.read = read
        self.args = args

    def __iter__(self) -> Iterator[Located]:
        return self.read(*self.args)


def splits_of(source: str, config: str | None = None, flag: str = "--dataset_name") -> dict[str, Again]:
    """The splits of a local path or a hub id; a single file is one split named "train".

    Raises: FileNotFoundError, ValueError or ConnectionError, in one sentence, where the source cannot be read at all.
    """
    if not source.strip():
        raise ValueError(f"{flag} is empty: give a local file, a directory or a hub id")

    # Path.expanduser would raise for a user who does not exist; this leaves such a name as it is.
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return {"train": Again(read_file, path)}

    # Before other directories, for what save_to_disk writes holds files as well.
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_splits(path)

    if path.is_dir():
        return _directory_splits(path)

    # A mistyped path must not be looked up on the hub: that would end in a message about the network.
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".")
    if path.suffix.lower() in SUFFIXES or not is_hub_id:
        raise FileNotFoundError(
            f"{flag} {source} does not exist{nearest(source)}: give a local file, a directory or a hub id"
        )
    return _hub_splits(source, config, flag)


# ---- directories and the hub ----
def _saved_splits(path: Path) -> dict[str, Again]:
    # Imported where needed: datasets takes a second, and `--help` should not.
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    # A damaged description may hold a value of any type in any place.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no readable save_to_disk directory ({first_sentence(error)}): save it again"
        ) from None

    # A data set saved alone has no split names.
    named = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return {split: Again(_numbered, f"{path}[{split}]", rows) for split, rows in named.items()}


def _directory_splits(path: Path) -> dict[str, Again]:
    files: dict[str, list[Path]] = {}
    for file in files_under(path):
        inside = file.relative_to(path)
        # Hidden files are a system's or the hub's own, and dataset_info.json tells of rows without holding any.
        hidden = any(part.startswith(".") for part in inside.parts) or file.name.startswith("dataset_info")
        if kind_of(file) in SUFFIXES and not hidden:
            files.setdefault(_split_of(inside), []).append(file)

    if not files:
        raise ValueError(
            f"{path} holds neither a save_to_disk data set nor a {', '.join(SUFFIXES)} file: name another"
        )
    return {split: Again(_joined, paths) for split, paths in files.items()}


def _joined(paths: list[Path]) -> Iterator[Located]:
    return chain.from_iterable(map(read_file, paths))


def files_under(path: Path) -> list[Path]:
    """All files of a directory and of those in it, links followed. Raises: OSError where one may not be read."""
    # Path.rglob would silently leave out a directory that may not be read, or one that is a link.
    every_file = []
    walked: set[str] = set()
    for folder, inner, names in os.walk(path, onerror=_raise, followlinks=True):
        # A link to a directory above would be walked for ever.
        real = os.path.realpath(folder)
        if real in walked:
            inner.clear()
            continue
        walked.add(real)
        every_file += [Path(folder, name) for name in names]
    # Sorted, as the order of a file system differs from machine to machine and the rows' order would follow it.
    return sorted(every_file)


def _raise(error: OSError) -> None:
    raise error


def _split_of(file: Path) -> str:
    """The split a data file belongs to, by the first split name among the words of its path; else "train"."""
    # Files of the hub are called after their split and their number: train_prefs-00000-of-00001.parquet.
    numbered = re.fullmatch(r"(\w+?)-\d{5}-of-\d{5}(-\w+)?\..*", file.name)
    if numbered:
        return numbered[1]
    # Folders count as well as the name: test/part-1.jsonl says its split by the folder.
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((word for word in words if word in SPLITS), "train")


def _hub_splits(name: str, config: str | None, flag: str) -> dict[str, Again]:
    import datasets

    try:
        if name in SCRIPT_DATASETS:
            file = f"{config or 'all'}.jsonl"
            path = Path(hf_hub_download(name, file, repo_type="dataset"))
            return {"train": Again(read_file, path, f"{name}/{file}")}
        loaded = datasets.load_dataset(name, config)
    # datasets raises RuntimeError for any other loading script, and its own error where files differ in their form.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConnectionError(
            f"{flag} {name} is no local path and could not be loaded from the hub ({first_sentence(error)}): download "
            f"its data files where there is a network and pass {flag} the local file"
        ) from None
    return {split: Again(_numbered, f"{name}[{split}]", rows) for split, rows in loaded.items()}


def _numbered(label: str, rows) -> Iterator[Located]:
    for index in range(len(rows)):
        yield f"{label}:{index + 1}", row_or_bad(partial(rows.__getitem__, index))
