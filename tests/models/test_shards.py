"""A base in shards: read in parts, gathered to the numbers of a whole one, decoded where it lies, bytes counted."""

import pytest
from adapters import random_adapter
from aligned import align
from forked import group

import rl_training
from benchmarks.architectures import ARCHITECTURES, write_base
from rlhf.run.sharing import processes_a_copy

pytestmark = pytest.mark.slow

IN_PLACE = ("Baichuan", "Llama (GQA)", "Qwen3", "Mistral", "Gemma 2", "Phi-3", "GPT-NeoX")
GATHERED = ("Mixtral", "GPT-2", "BLOOM")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The directories of a base, of an adapter and of a reward adapter of an architecture."""

    def made(name: str, **more) -> list[str]:
        folder = tmp_path_factory.mktemp("base")
        kind, settings = ARCHITECTURES[name]
        base = align(write_base(kind, settings | more, folder / "base"))
        return [base, random_adapter(base, folder / "sft"), random_adapter(base, folder / "rm", "reward", seed=1)]

    return made


def test_two_processes_sample_on_shards_what_a_whole_base_does(zygote, base_of, tmp_path):
    argv = ["False"]
    for name in (*IN_PLACE, *GATHERED):
        argv += base_of(name)
    assert zygote.run_script("shard_worker", argv, tmp_path / "log", **group(2)) == 0, zygote.said()[-3000:]
    said = zygote.said().splitlines()
    for name in IN_PLACE:
        assert f"{ARCHITECTURES[name][0]} decodes in place" in said
    for name in GATHERED:
        assert any(line.startswith(f"{ARCHITECTURES[name][0]} decodes gathered: ") for line in said)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_bytes_that_processes_move_are_those_of_the_plan(zygote, base_of, tmp_path, processes):
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 96}
    argv = ["True", *base_of("Llama (GQA)", **sizes)]
    # One with gathered outputs.
    argv += base_of("Baichuan") if processes == 2 else []
    assert zygote.run_script("shard_worker", argv, tmp_path / "log", **group(processes)) == 0, zygote.said()[-3000:]


FLAGS = ["--base_model_name", "B", "--reward_model_lora_path", "R"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shard_base", "two"], "give the number of processes"),
        (["--shard_base", "-1"], "give the number of processes"),
        (["--shard_base", "2", "--load_in_4bit", "True"], "70B in 4 bits fits one card"),
    ],
)
def test_a_number_of_shards_that_cannot_be_is_refused(capsys, words, sentence):
    with pytest.raises(SystemExit) as end:
        rl_training.parse_args([*FLAGS, *words])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("given", "meant"), [("true", "True"), ("False", "0"), ("08", "8")])
def test_shards_may_be_spelt_as_a_number_or_a_switch(given, meant):
    assert rl_training.parse_args([*FLAGS, "--shard_base", given]).shard_base == meant


def test_shards_that_do_not_divide_the_processes_are_refused(monkeypatch):
    place = {"WORLD_SIZE": "6", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert [processes_a_copy(given) for given in ("0", "2", "True")] == [0, 2, 3]
    with pytest.raises(ValueError, match="do not divide the 6 of this run"):
        processes_a_copy("4")
