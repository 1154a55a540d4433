"""A disk that is really full, and one that is really read-only: tmpfs of a given size, where mounting is allowed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from adapters import random_adapter
from forked import KILL, ends_the_same

from rlhf.artefacts.checkpoint import numbered, why_incomplete

pytestmark = pytest.mark.slow
NAMES = ("sft", "reward", "ppo")


def mount(folder: Path, options: str) -> None:
    """Mount a tmpfs, or change its options; skips where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is refused here: it takes root, and a container that lets it")


@pytest.fixture
def disk(tmp_path):
    """A folder to `mount` at, unmounted in the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def taken(folder: Path) -> int:
    """Bytes that a folder takes on a tmpfs: whole pages."""
    return sum(-(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()) + 4096


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.fixture(scope="module")
def first(zygote, stages, tmp_path_factory):
    """Bytes that each stage's directory takes with one checkpoint in it, and that checkpoint alone."""
    folder, found = tmp_path_factory.mktemp("first"), {}
    for name, stage in stages.items():
        writer = "rlhf.rl.state:publish" if name == "ppo" else "transformers:Trainer._save_checkpoint"
        assert zygote.run(stage, folder / name, signum=KILL, target=writer, when="before", call=2) == 128 + KILL
        found[name] = (taken(folder / name), taken(numbered(folder / name, stage.prefix)[0]))
    return found


@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_the_disk_has_no_room_for_costs_nothing_that_was_there(
    zygote, stages, whole, first, disk, tmp_path, name, share
):
    used, checkpoint = first[name]
    mount(disk, f"size={used + int(share * checkpoint)}")
    assert zygote.run(stages[name], disk / "out", log=tmp_path / "log") == 1, zygote.said()[-3000:]
    needed, free = re.search(r"needs at least ([\d,]+) bytes and ([\d,]+) are free", zygote.complaint()).groups()
    assert int(free.replace(",", "")) < int(needed.replace(",", ""))
    assert abs(int(needed.replace(",", "")) - checkpoint) < 0.2 * checkpoint
    assert f"the disk of {disk / 'out'} is full" in zygote.complaint()
    kept = numbered(disk / "out", stages[name].prefix)
    assert kept and not any(map(why_incomplete, kept))
    assert leftovers(disk) == []
    assert not (disk / "out" / "adapter_model.safetensors").exists()
    mount(disk, "remount,size=16m")
    ends_the_same(zygote, stages, whole, name, disk / "out")


@pytest.mark.parametrize("size", ["96k", "260k"])
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_too_small_for_the_result_leaves_none_that_looks_finished(zygote, stages, disk, tmp_path, name, size):
    never = ("--save_freq", "1000", "--eval_freq", "0") if name == "ppo" else ("--save_steps", "0")
    mount(disk, f"size={size}")
    assert zygote.run(stages[name], disk / "out", *never, log=tmp_path / "log") == 1, zygote.said()[-3000:]
    assert re.search(r"the disk of .* is full", zygote.complaint())
    assert re.search(r"[\d,]+ (bytes )?are free", zygote.complaint())
    assert not (disk / "out" / "run.json").exists()
    assert not (disk / "out" / "adapter_model.safetensors").exists()
    assert leftovers(disk) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk_is_refused_before_a_model_loads(zygote, stages, disk, tmp_path, name):
    mount(disk, "size=1m,ro")
    before_loading = {"target": "rlhf.models.loading:load_base", "when": "before", "signum": KILL}
    assert zygote.run(stages[name], disk / "out", log=tmp_path / "log", **before_loading) == 1
    assert zygote.complaint() == (
        f"--output_dir {disk / 'out'} cannot be written (Read-only file system): give another"
    )


def test_merging_and_comparing_on_a_full_disk_leave_nothing_half_done(zygote, tiny_base, tmp_path, disk):
    adapter = random_adapter(tiny_base, tmp_path / "sft")
    mount(disk, "size=120k")
    merge = ["--base_model_name", tiny_base, "--lora_path", adapter, "--output_dir", str(disk / "merged")]
    assert zygote.run_script("merge_lora", merge, tmp_path / "log") == 1
    assert re.search(r"the disk of .* is full.* are free", zygote.complaint())
    assert list(disk.iterdir()) == []
    (disk / "filler").write_bytes(os.urandom(118 << 10))
    compare = ["--base_model_name", tiny_base, "--adapters", f"sft={adapter}", "--max_new_tokens", "4", "--output_dir"]
    assert zygote.run_script("compare", [*compare, str(disk / "table")], tmp_path / "log") == 1
    assert re.search(r"the disk of .* is full.* are free", zygote.complaint())
