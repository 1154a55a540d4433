"""Rows prepared once: kept under all that they depend on, whole or not at all, by one process of many."""

import errno
import json
import os
import signal
import sys
import time

import pytest

import reward_modeling
import rl_training
import sft_training
from rlhf.artefacts.files import DiskFull
from rlhf.data import cache
from rlhf.data.cache import DECIDING, Prepared, prepared
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.data.rows import Rows, RowWriter
from rlhf.rl import starting
from rlhf.trainer import training

STAGES = {"sft": sft_training, "reward": reward_modeling, "ppo": rl_training}


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"问题{n}", "chosen": f"好{n}。", "rejected": f"坏{n}", "answer": f"好{n}"} for n in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join([*lines[:20], '{"prompt": 7}', *lines[20:]]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def prompt_format(tiny_base):
    return text_format(load_tokenizer(tiny_base))


def arguments(stage: str, data, **flags):
    own = {"ppo": {"base_model_name": "x", "reward_model_lora_path": "y", "eval_freq": 2}}
    given = {"dataset_name": data, "bad_rows": "skip", "output_dir": data.parent / "run", "eval_size": 4}
    given |= {"data_cache": data.parent / "cache", **own.get(stage, {"model_name": "x"}), **flags}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    args = STAGES[stage].parse_args(words)
    args.prompt_template = "问：{prompt}\n\n答："
    return args


def prepare_of(stage: str):
    return starting.prepare if stage == "ppo" else STAGES[stage].prepare


def content(found: Prepared) -> tuple:
    return {name: list(rows) for name, rows in found.rows.items()}, vars(found.funnel), found.about


def entries(data) -> list[str]:
    return sorted(path.name for path in (data.parent / "cache").iterdir() if path.suffix != ".lock")


# ---- hits and misses ----
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_start_maps_what_the_first_one_prepared(stage, data, prompt_format, monkeypatch):
    bad_rows = data.parent / "bad_rows.jsonl"
    fresh = content(prepare_of(stage)(arguments(stage, data), prompt_format, bad_rows))
    written = bad_rows.read_text("utf-8")
    args = arguments(stage, data)
    assert content(prepared(args, prompt_format, prepare_of(stage), bad_rows)) == fresh
    bad_rows.unlink()

    monkeypatch.setattr("rlhf.data.reading.load_splits", None)
    monkeypatch.setattr("rlhf.data.reading.load_rows", None)
    found = prepared(args, prompt_format, prepare_of(stage), bad_rows)
    assert content(found) == fresh
    assert found.funnel.as_dict()["dropped"]["malformed"] == 1
    assert bad_rows.read_text("utf-8") == written
    # Flags of training change nothing of the data.
    again = arguments(stage, data, learning_rate=1e-3, output_dir=data.parent / "other")
    assert content(prepared(again, prompt_format, prepare_of(stage), None)) == fresh


def test_whatever_the_rows_depend_on_is_in_the_key(data, prompt_format, tiny_llama):
    def key(prompt_format=prompt_format, **flags):
        return cache._key(arguments("reward", data, **flags), prompt_format, reward_modeling.prepare)

    keys = [key(), key(seed=1), key(max_length=300), key(train_subset=3), key(split_half=1), key(degenerate_frac=0.5)]
    keys += [key(fold="1/3"), key(fold="2/3"), key(eval_size=3), key(chosen_field="answer")]
    keys.append(key(eval_dataset_name=data))
    keys.append(key(text_format(prompt_format.tokenizer, "{prompt}:")))
    keys.append(key(text_format(load_tokenizer(tiny_llama))))
    before = data.stat()
    data.write_text(data.read_text("utf-8").replace("问题3", "问题三"), encoding="utf-8")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


@pytest.mark.parametrize("stage", STAGES)
def test_no_flag_is_read_that_is_not_in_the_key(stage, data, prompt_format):
    args = arguments(stage, data, **({"degenerate_frac": 0.5} if stage == "reward" else {}))
    read = set()

    class Watched:
        def __getattr__(self, name):
            read.add(name)
            return getattr(args, name)

    prepare_of(stage)(Watched(), prompt_format, None)
    groups = {field.name: field.metadata["group"] for field in args.__dataclass_fields__.values()}
    decided = {name for name, group in groups.items() if group == "data"} | set(DECIDING)
    assert read - {"named_columns", "row_limit"} <= decided


@pytest.mark.parametrize("stage", STAGES)
def test_a_look_at_the_first_rows_reads_no_more_and_keeps_nothing(stage, data, prompt_format, monkeypatch):
    # What comes after the rows that are looked at may be of any kind.
    with data.open("ab") as out:
        out.write(b"\x00\xff\n" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_contents", None)
        look = arguments(stage, data, inspect_data=True, inspect_rows=10, bad_rows="stop")
        found = prepared(look, prompt_format, prepare_of(stage), None)
    assert sum(len(found.rows[name]) for name in ("train", "evaluation")) == found.funnel.read == 10
    assert f"of {data} the first 10 rows alone; --inspect_rows -1 reads all" in found.funnel.table()
    assert not (data.parent / "cache").exists()

    whole = prepared(
        arguments(stage, data, inspect_data=True, inspect_rows=-1), prompt_format, prepare_of(stage), None
    )
    assert whole.funnel.read == 141
    # The run itself looks at all rows, whatever an inspection would see.
    run = prepared(arguments(stage, data, inspect_rows=10), prompt_format, prepare_of(stage), None)
    assert content(run) == content(whole)


# ---- faults ----
def forked(work) -> int:
    """Run `work` in a forked child; return how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", range(20))
def test_a_process_killed_while_it_prepares_leaves_nothing_that_counts(moment, data, prompt_format, monkeypatch):
    args = arguments("reward", data)
    monkeypatch.setattr("rlhf.data.rows.BATCH_ROWS", 7)
    left = [moment]

    def killing(function):
        def call(*given, **named):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*given, **named)

        return call

    def work():
        # Batches of texts and of ids, files of the cache, the description, the renaming.
        RowWriter._write = killing(RowWriter._write)
        Rows.save = killing(Rows.save)
        json.dumps = killing(json.dumps)
        cache.Path.rename = killing(cache.Path.rename)
        prepared(args, prompt_format, reward_modeling.prepare, None)

    assert ended(forked(work)) in (-signal.SIGKILL, 0)
    found = prepared(args, prompt_format, reward_modeling.prepare, None)
    assert content(found) == content(reward_modeling.prepare(args, prompt_format, None))
    assert len(entries(data)) == 1


def test_of_processes_that_need_the_same_rows_one_prepares_them(data, prompt_format, tmp_path):
    args = arguments("sft", data)
    fresh = content(sft_training.prepare(args, prompt_format, None))
    log = tmp_path / "prepared"

    def counted(*given):
        with log.open("a") as out:
            out.write("x")
        return sft_training.prepare(*given)

    def work():
        assert content(prepared(args, prompt_format, counted, None)) == fresh

    children = [forked(work) for _ in range(4)]
    assert [ended(child) for child in children] == [0] * 4
    assert log.read_text() == "x"


def test_a_process_that_waits_for_another_says_so(data, prompt_format, monkeypatch, capsys):
    monkeypatch.setattr(cache, "QUIET", 0.01)
    args = arguments("sft", data)
    key = cache._key(args, prompt_format, sft_training.prepare)
    (data.parent / "cache").mkdir()
    held = data.parent / "held"

    def hold():
        with cache.FileLock(data.parent / "cache" / f"rlhf-{key}.lock"):
            held.touch()
            time.sleep(0.3)

    child = forked(hold)
    while not held.exists():
        time.sleep(0.01)
    found = prepared(args, prompt_format, sft_training.prepare, None)
    assert ended(child) == 0
    assert len(found.rows["train"]) == 36
    assert "waiting for another process that prepares the same rows" in capsys.readouterr().out


def test_a_damaged_cache_is_prepared_anew(data, prompt_format):
    args = arguments("sft", data)
    fresh = content(prepared(args, prompt_format, sft_training.prepare, None))
    folder = data.parent / "cache" / entries(data)[0]
    for name in ("train.arrow", "train.npy", "about.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])
        assert content(prepared(args, prompt_format, sft_training.prepare, None)) == fresh
    (folder / "evaluation.arrow").unlink()
    assert content(prepared(args, prompt_format, sft_training.prepare, None)) == fresh


def test_without_a_place_to_keep_them_rows_are_prepared_for_the_run_alone(data, prompt_format, capsys):
    fresh = content(sft_training.prepare(arguments("sft", data), prompt_format, None))
    # A directory below a file cannot be made, whoever the user is.
    args = arguments("sft", data, data_cache=data / "cache")
    assert content(prepared(args, prompt_format, sft_training.prepare, None)) == fresh
    assert f"{data}/cache cannot be written (Not a directory)" in capsys.readouterr().out
    args = arguments("sft", data, data_cache="none")
    assert content(prepared(args, prompt_format, sft_training.prepare, None)) == fresh
    assert not (data.parent / "cache").exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(data, prompt_format, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = arguments("sft", data)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "save", full)
        with pytest.raises(DiskFull, match="--data_cache another directory, or none"):
            prepared(args, prompt_format, sft_training.prepare, None)
    assert entries(data) == []
    assert len(prepared(args, prompt_format, sft_training.prepare, None).rows["train"]) == 36


def test_malformed_rows_stop_every_start(data, prompt_format):
    args = arguments("sft", data, bad_rows="stop")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{data}:21"):
            training.load_prepared(args, prompt_format, sft_training.prepare, "row")
    assert entries(data) == []
