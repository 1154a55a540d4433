"""Checkpoints: published complete with a manifest, verified before use, rotated, cleaned up after a crash."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from rlhf.artefacts.files import readable_when_full, size_of, write_json

MANIFEST = "MANIFEST.json"


def publish(
    output_dir: Path, name: str, write: Callable[[Path], None], about: dict | None = None, min_bytes: int = 0
) -> Path:
    """Let `write(folder)` fill a temporary folder, list its files with their hashes, and give it its name at once.

    A reader finds a complete folder of that name, or none, whenever the process dies.

    Args:
        about: what the manifest says beside the files (step, processes, base). min_bytes: bytes it will take at least.
    Raises: DiskFull in one sentence; what stood under the name before is still there.
    """
    min_bytes = max(min_bytes, size_of_another(output_dir / name))
    scratch = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{name}."))

    try:
        with readable_when_full(scratch, name, min_bytes):
            write(scratch)
            write_manifest(scratch, about)
        scratch.chmod(0o755)
        target = output_dir / name
        if target.exists():
            # A name for the old one that no reader looks at: the new one takes its place in one move.
            old = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{name}."))
            os.replace(target, old / name)
            os.replace(scratch, target)
            shutil.rmtree(old)
        else:
            os.replace(scratch, target)
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
        with readable_when_full(folder, folder.name, max(min_bytes, size_of_another(folder))):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def size_of_another(folder: Path) -> int:
    """Bytes of the largest checkpoint beside `folder`; 0 without one."""
    others = [manifest.parent for manifest in folder.parent.glob(f"*/{MANIFEST}") if manifest.parent != folder]
    return max(map(size_of, others), default=0)


def write_manifest(folder: Path, about: dict | None = None) -> None:
    """List the files of a finished checkpoint with size and sha256, all on disk by then."""
    written = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    for path in written:
        _sync(path)
    files = {str(path.relative_to(folder)): _entry(path) for path in written}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    write_json(folder / MANIFEST, {**(about or {}), "versions": versions, "files": files})
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(file: Path) -> dict:
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def rotate(output_dir: str | Path, prefix: str, limit: int | None) -> None:
    """Remove the oldest checkpoints over `limit`, once the newest is known to be complete."""
    folders = numbered(output_dir, prefix)
    if limit is None or len(folders) <= limit or why_incomplete(folders[-1]) is not None:
        return
    for folder in folders[:-limit]:
        # Without its manifest first: killed half way through, the rest is no checkpoint any more.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def numbered(output_dir: str | Path, prefix: str) -> list[Path]:
    """Folders called `prefix` and a number, in the order of the numbers."""
    folders = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(prefix)))


def read_manifest(folder: Path) -> dict:
    """Contents of MANIFEST.json: files, step, processes, versions."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def why_incomplete(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None when every file is as its manifest says."""
    try:
        listed = dict(read_manifest(folder)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is missing or unreadable ({type(error).__name__})"
    for name, entry in listed.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} lists {name!r}, which is not in the folder"
        if not (folder / name).is_file():
            return f"{name} is missing"
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


def to_resume(asked: str | None, output_dir: str | Path, prefix: str = "step_") -> Path | None:
    """The checkpoint of `--resume_from_checkpoint`: newest complete one for "True" (None if there is none), or a path.

    Raises: ValueError naming what is wrong with a checkpoint that was asked for by its path.
    """
    if asked in (None, "True"):
        return newest_complete(output_dir, prefix) if asked else None
    reason = why_incomplete(Path(asked))
    if reason:
        raise ValueError(f"--resume_from_checkpoint {asked} cannot be used: {reason}")
    return Path(asked)
