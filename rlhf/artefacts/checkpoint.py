"""Checkpoints: published complete with a manifest, verified before use, rotated, cleaned up after a crash."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from rlhf.artefacts.files import (
    ADAPTER_FILE,
    TOKEN,
    follow_umask,
    read_object,
    readable_when_full,
    size_of,
    write_json,
)

# The last file to be written: a folder without it is no checkpoint.
MANIFEST = "MANIFEST.json"


# What a run cannot go on from exactly without, by the first part of its checkpoints' names. (Under DeepSpeed optimizer
# and schedule have files of other names, so that only the Trainer's own state is required.)
REQUIRED = {
    "step": ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json", "run.json"),
    "checkpoint": ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "run.json"),
}
# Beside these, where no DeepSpeed folder is listed.
TRAINER_STATE = ("optimizer.pt", "scheduler.pt")


# Logs of a run, beside its checkpoints.
LOGS = ("metrics.jsonl", "samples.jsonl")


# ---- writing ----
def publish(
    output_dir: Path, name: str, write: Callable[[Path], None], about: dict | None = None, min_bytes: int = 0
) -> Path:
    """Let `write(folder)` fill a temporary folder, list its files with their hashes, and give it its name at once.

    A reader finds a complete folder of that name, or none, whenever the process dies.

    Args:
        about: what the manifest says beside the files (step, processes, base). min_bytes: bytes it will take at least.
    Raises: DiskFull in one sentence; what stood under the name before is still there.
    """
    target = output_dir / name
    # What a checkpoint of this run took before, this one will take as well.
    min_bytes = max(min_bytes, size_of_another(target))
    scratch = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{name}.{TOKEN}"))

    try:
        # Under a hidden name until all is there, which `sweep` removes if the process is killed.
        with readable_when_full(scratch, name, min_bytes):
            write(scratch)
            write_manifest(scratch, about)

        follow_umask(scratch)
        if target.exists():
            # The old one moves to a name that no reader looks at. After a crash in between, `sweep` moves it back.
            old = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{name}.{TOKEN}"))
            os.replace(target, old / name)
            os.replace(scratch, target)
            shutil.rmtree(old)
        else:
            os.replace(scratch, target)

        # A rename is only safe from a power failure once its directory is on the disk.
        _sync(output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def complete_or_gone(folder: Path, min_bytes: int = 0):
    """Fill a checkpoint's folder in place: a failure within removes it; on a full disk `DiskFull` says what it needs.

    Args:
        min_bytes: bytes that it will take at least, as far as known.
    """
    try:
        min_bytes = max(min_bytes, size_of_another(folder))
        with readable_when_full(folder, folder.name, min_bytes):
            yield
    except BaseException:
        # Interrupts among them: half a checkpoint must not be left for the next run.
        shutil.rmtree(folder, ignore_errors=True)
        raise


def size_of_another(folder: Path) -> int:
    """Bytes of the largest checkpoint beside `folder`; 0 without one."""
    complete = [manifest.parent for manifest in folder.parent.glob(f"*/{MANIFEST}")]
    sizes = [size_of(other) for other in complete if other != folder]
    return max(sizes, default=0)


def write_manifest(folder: Path, about: dict | None = None) -> None:
    """List the files of a finished checkpoint with size and sha256, after all of them have reached the disk."""
    # Both logs first: with the manifest the checkpoint counts, and its rows have to be there.
    for name in LOGS:
        if (folder.parent / name).is_file():
            _sync(folder.parent / name)

    paths = sorted(folder.rglob("*"))
    written = [path for path in paths if path.is_file() and path.name != MANIFEST]
    # Folders too: a file is on the disk once its folder's list of names is.
    for path in paths:
        _sync(path)

    files = {str(path.relative_to(folder)): _entry(path) for path in written}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    manifest = {**(about or {}), "versions": versions, "files": files}
    write_json(folder / MANIFEST, manifest)
    _sync(folder / MANIFEST)
    _sync(folder)


def sync_directory(folder: Path) -> None:
    """Wait until all files at the top of a finished run's directory, and their names, are on the disk."""
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(file: Path) -> dict:
    """The size and hash of a file, as a manifest lists them."""
    with file.open("rb") as content:
        # Read in pieces: a file may be larger than what memory is left beside a model.
        digest = hashlib.file_digest(content, "sha256")
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


# ---- rotation ----
def is_ours(folder: Path) -> bool:
    """Return True for a folder that a run of ours has written, whole or in part."""
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & {MANIFEST, "run.json", ADAPTER_FILE, "trainer_state.json", "state.json"})


def rotate(output_dir: str | Path, prefix: str, limit: int | None) -> None:
    """Remove the oldest checkpoints over `limit`, once the newest is known to be complete."""
    folders = numbered(output_dir, prefix)
    if limit is None or len(folders) <= limit:
        return
    # With a damaged newest one, an older one is what the run goes on from.
    if why_incomplete(folders[-1]) is not None:
        return

    for folder in folders[:-limit]:
        # Of a link the link alone goes; a folder without a manifest is none that a run of ours has finished.
        if folder.is_symlink():
            folder.unlink()
            continue
        if not is_ours(folder):
            continue
        # Under a hidden name first: if the process is killed half way, `sweep` removes what is left.
        doomed = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{folder.name}.{TOKEN}"))
        os.replace(folder, doomed / "removed")
        shutil.rmtree(doomed)


def numbered(output_dir: str | Path, prefix: str) -> list[Path]:
    """Folders called `prefix` and a number, in the order of the numbers."""

    def number(path: Path) -> str:
        return path.name.removeprefix(prefix)

    folders = [path for path in Path(output_dir).glob(f"{prefix}*") if number(path).isdigit()]
    # As numbers: step_10 comes after step_9.
    return sorted(folders, key=lambda path: int(number(path)))


# ---- reading ----
def read_manifest(folder: Path) -> dict:
    """Contents of MANIFEST.json: files, step, processes, versions. Raises: ValueError where it is not readable."""
    return read_object(folder / MANIFEST)


def why_incomplete(folder: Path) -> str | None:
    """The reason why a checkpoint folder cannot be used, or None when every file is as its manifest says."""
    try:
        # Whatever is wrong with it, an older checkpoint will be taken.
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable ({type(error).__name__})"
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        return f"{MANIFEST} lists no files"

    # A folder that is called step_3 holds step 3, and all that a run needs to go on exactly.
    prefix, _, number = folder.name.rpartition("_" if "_" in folder.name else "-")
    if number.isdigit() and manifest.get("step") != int(number):
        return f"{MANIFEST} is of step {manifest.get('step')!r:.20}"
    required = REQUIRED.get(prefix, ())
    if prefix == "checkpoint" and not any("global_step" in name for name in listed):
        required += TRAINER_STATE
    missing = [name for name in required if name not in listed]
    if missing:
        return f"{MANIFEST} does not list {missing[0]}"

    for name, entry in listed.items():
        # A manifest may come from elsewhere: it must not have us read files outside its folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} lists {name!r}, which is not in the folder"
        if not (folder / name).is_file():
            return f"{name} is missing"
        # Size and hash, so that a cut or exchanged file shows before anything is loaded.
        if _entry(folder / name) != entry:
            return f"{name} is not what the manifest lists"
    return None


def newest_complete(output_dir: str | Path, prefix: str = "step_") -> Path | None:
    """The complete checkpoint with the highest number, or None; incomplete ones are reported and passed over."""
    for folder in reversed(numbered(output_dir, prefix)):
        reason = why_incomplete(folder)
        if reason is None:
            return folder
        print(f"ignoring checkpoint {folder}: {reason}", flush=True)
    return None


@contextmanager
def listed_files(folder: Path | None):
    """A checkpoint's folder without what its manifest does not list: as it is, or as links elsewhere; None for None.

    A library that is given a folder reads every file whose name it knows, whoever has put it there.
    """
    if folder is None:
        yield None
        return
    listed = read_manifest(folder)["files"]
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # Nearly always there is nothing else, and the folder itself will do.
    if present <= {*listed, MANIFEST}:
        yield folder
        return

    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.") as name:
        for file in listed:
            link = Path(name) / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / file).resolve())
        yield Path(name)


def to_resume(asked: str | None, output_dir: str | Path, prefix: str = "step_") -> Path | None:
    """The checkpoint of `--resume_from_checkpoint`: newest complete one for "True" (None if there is none), or a path.

    Raises: ValueError naming what is wrong with a checkpoint that was asked for by its path.
    """
    if asked is None:
        return None
    if asked == "True":
        return newest_complete(output_dir, prefix)

    # No other checkpoint takes the place of one that was asked for by its path.
    reason = why_incomplete(Path(asked))
    if reason:
        raise ValueError(f"--resume_from_checkpoint {asked} cannot be used: {reason}")
    return Path(asked)
