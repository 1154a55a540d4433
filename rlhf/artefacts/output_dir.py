"""Output directories: claimed by one run, swept after a crash, or filled under another name and then renamed."""

import fcntl
import glob
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from rlhf.artefacts.checkpoint import is_ours, sync_directory
from rlhf.artefacts.files import ADAPTER_FILE, TOKEN, follow_umask, readable_when_full

# Files that a run leaves at the top of its directory. --overwrite_output_dir removes these and no other files.
# bad_rows.jsonl is none of them: reading the data has written it anew, or removed it.
RUN_FILES = ("run.json", "metrics.jsonl", "samples.jsonl", "report.html", "value_head.safetensors", ADAPTER_FILE)

# Temporary names of our writers. A process that is killed cannot remove its own.
SCRATCH = re.compile(
    r"\.(finished|step_\d+|checkpoint-\d+|best|adapter|run\.json|adapter_config\.json|MANIFEST\.json|state\.json|bad_rows\.jsonl|chart\.png|report(_compared)?\.html|best_of_n\.jsonl?|length_calibration\.json)"
    rf"\.{TOKEN}\w+"
)

# Folders of a run. Others, such as those of earlier stages, are left alone.
RUN_FOLDERS = re.compile(r"(step_|checkpoint-)\d+|best")

# What a run, or a library for it, writes at the top of its directory.
WRITTEN = re.compile(r".*\.(jsonl|safetensors|json|model|jinja|md|png|html)|merges\.txt|vocab\.txt")

LOCK_FILE = ".lock"

# Open lock files: the system frees a lock when its file is closed, or its process ends.
_locks: dict[Path, object] = {}


# ---- output directory ----
def real(path: str | Path) -> Path:
    """The place of a path without links; of a link to itself the link, at which `Path.resolve` would raise."""
    return Path(os.path.realpath(path))


def lock(folder: Path) -> None:
    """Hold an output directory for this process until it ends, however it ends.

    Raises: FileExistsError where another process holds it, with its number.
    """
    # flock would refuse a second handle of our own as well.
    if real(folder) in _locks:
        return

    # Opened without being emptied: the number in it may be the holder's.
    # Not through a link, which would write into a file elsewhere.
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    handle = os.fdopen(descriptor, "a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        number = handle.read().strip() or "unknown"
        handle.close()
        raise FileExistsError(
            f"another run (process {number}) is writing into {folder}: wait for it, or give another --output_dir"
        ) from error

    # The lock is ours, and so is the number from now on.
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    _locks[real(folder)] = handle


def sweep(folder: Path) -> None:
    """Remove what a killed run of ours left half written: hidden names that only our writers use.

    A folder that was set aside for a new one under its name, which never came, gets its place back.
    """
    for path in folder.glob(".*"):
        if not SCRATCH.fullmatch(path.name):
            continue

        # ".step_3.abc" may hold the step_3 that a new one was about to replace.
        name = path.name.split(".")[1]
        set_aside = path / name
        if set_aside.is_dir() and not (folder / name).exists():
            os.replace(set_aside, folder / name)

        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    """Return True for a file other than the lock, or a folder of a run."""
    if path.is_file() and path.name != LOCK_FILE:
        return True
    return RUN_FOLDERS.fullmatch(path.name) is not None


def claim_output_dir(
    output_dir: str | Path, resume: bool, overwrite: bool, inputs: dict[str, str | None] | None = None
) -> list[Path]:
    """Claim `output_dir` for a run; a directory in use needs `resume` or `overwrite`, and says so.

    Subfolders that hold other runs (runs/sft, runs/reward under runs/) do not count as use.

    Args:
        inputs: flag -> path of everything that the run reads.
    Returns: what `clear` removes for `overwrite`, once every input has been read.
    Raises: ValueError where that is, or holds, an input.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output_dir {folder} is a file: give a directory")

    try:
        # Locked before it is swept: what looks left over may be what another run is writing.
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        sweep(folder)
        drop_links(folder)
    except OSError as error:
        # The refusal by `lock` is a sentence already. Errors of the system have a number.
        if error.errno is None:
            raise
        raise OSError(f"--output_dir {folder} cannot be written ({error.strerror}): give another") from error

    used = [path for path in folder.iterdir() if _in_use(path)]
    if used and not (resume or overwrite):
        raise FileExistsError(
            f"--output_dir {folder} is not empty ({used[0].name}, ...): give --resume_from_checkpoint True to go on, "
            "--overwrite_output_dir True to start over, or another directory"
        )

    if not overwrite:
        return []
    # A file that no run writes stays; a folder that only looks like one of a run is somebody's.
    old = [path for path in used if path.is_dir() or path.name in RUN_FILES]
    foreign = [path for path in old if path.is_dir() and not is_ours(path)]
    if foreign:
        raise FileExistsError(
            f"--output_dir {folder} holds {foreign[0].name}, which no run of this project has written: move it away, "
            "or give another directory"
        )
    for flag, given in (inputs or {}).items():
        _refuse_input(flag, given, folder, old)
    return old


def drop_links(folder: Path) -> None:
    """Remove links among the files at the top of a run's directory: what a run writes replaces them.

    Writing through a link would change a file elsewhere.
    """
    for path in folder.iterdir():
        if path.is_symlink() and WRITTEN.fullmatch(path.name):
            path.unlink()


def _refuse_input(flag: str, given: str | None, folder: Path, old: list[Path]) -> None:
    """Raises: ValueError where --overwrite_output_dir would remove an input of the same command."""
    if not given or not Path(given).exists() or not old:
        return
    place = real(given)
    # An adapter that lies in the directory itself is made of its files.
    # In Python & binds before |: the directory itself counts only where the input is that directory.
    doomed = {real(path) for path in old} | {real(folder)} & {place}
    if place in doomed or doomed & set(place.parents):
        raise ValueError(
            f"{flag} {given} lies in --output_dir {folder}, which --overwrite_output_dir True clears: give another "
            "--output_dir"
        )


def clear(old: list[Path]) -> None:
    """Remove what an earlier run left, as `claim_output_dir` found it."""
    for path in old:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---- checks before anything loads ----
def refuse_used(output_dir: str) -> Path:
    """`output_dir` as a path. Raises: FileExistsError where something is there already."""
    target = Path(output_dir)
    # Of a link its target is filled.
    if target.is_symlink():
        target = real(target)
    _refuse_unwritable(target)
    if not target.exists():
        return target
    # An empty directory is as good as none.
    if not target.is_dir() or any(target.iterdir()):
        raise FileExistsError(f"--output_dir {target} is not empty: give a new directory")
    return target


def _refuse_unwritable(target: Path) -> None:
    """Raises: OSError where no directory could be made at `target`, before any work is done for it."""
    parent = next(folder for folder in (target.parent, *target.parent.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--output_dir {target} cannot be written ({parent} does not allow it): give another")


def sweep_killed(target: Path) -> None:
    """Remove what a killed merge into `target` left beside it. Raises: FileExistsError where one is still at work."""
    for scratch in target.parent.glob(f".{glob.escape(target.name)}.*"):
        # A folder without a lock file is none of ours, or is being made at this moment.
        if (scratch / LOCK_FILE).is_file():
            lock(scratch)
            shutil.rmtree(scratch)


# ---- filling ----
# These last, in this order: with a config a folder counts as an adapter, with run.json as a finished run.
LAST = (ADAPTER_FILE, "adapter_config.json", "run.json")


@contextmanager
def finished_together(output_dir: str | Path):
    """A hidden folder to fill with what a finished run leaves; its files move to the top of the run's directory at the
    end of the block. Where one of them finds no room there is none of them."""
    target = Path(output_dir)
    if not target.is_dir():
        raise FileNotFoundError(f"--output_dir {target} was removed while the run was going on: nothing can be saved")

    scratch = Path(tempfile.mkdtemp(dir=target, prefix=f".finished.{TOKEN}"))
    try:
        with readable_when_full(scratch, "the result"):
            yield scratch
            follow_umask(scratch)
            sync_directory(scratch)

        # A rename takes no room.
        names = sorted(path.name for path in scratch.iterdir())
        for name in [name for name in names if name not in LAST] + [name for name in LAST if name in names]:
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            os.replace(scratch / name, target / name)
        sync_directory(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def staged(target: Path):
    """A folder beside `target` to fill, which takes its place once all is done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_killed(target)

    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch,
        readable_when_full(Path(scratch), target.name, mend="Make room, and give the same command again"),
    ):
        lock(Path(scratch))
        # One level deeper, so that neither the lock file nor mkdtemp's permissions go into the result.
        folder = Path(scratch) / "result"
        folder.mkdir()
        yield folder

        # An empty directory may stand there; anything else has been refused.
        if target.exists():
            target.rmdir()
        follow_umask(folder)
        os.replace(folder, target)
