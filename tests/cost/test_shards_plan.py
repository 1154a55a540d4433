"""--plan with a base in shards: what a process holds, how many a base needs, and what a step moves."""

import re

import pytest
from transformers import LlamaConfig

import rl_training
from benchmarks import scale
from rlhf.cost.cuts import Cuts
from rlhf.cost.hours import Lengths
from rlhf.cost.needs import memory_of
from rlhf.cost.shards import step_bytes
from rlhf.cost.skeleton import Base


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A directory with nothing but the config.json of Llama-3.3-70B."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, num_hidden_layers=80,
        vocab_size=128256,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def planned(base: str, *more: str):
    flags = ["--base_model_name", base, "--reward_model_lora_path", "R", "--batch_size", "8", "--mini_batch_size", "8"]
    return rl_training.parse_args([*flags, "--gradient_checkpointing", "True", *more])


def test_a_process_holds_its_part_of_the_layers_three_whole_ones_and_the_rest(llama):
    base = Base.of(llama, "--base_model_name")
    whole = memory_of(planned(llama), base, "ppo")
    parts = memory_of(planned(llama, "--shard_base", "8"), base, "ppo")
    # By hand: q and o of 8192 x 8192, k and v of 8192 x 1024, three of 8192 x 28672; two embeddings, the norms.
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    rest = 2 * 128256 * 8192 + (2 * 80 + 1) * 8192
    assert whole.roles["base"] == 2 * (80 * layer + rest)
    assert parts.roles["base"] == 2 * (80 * layer / 8 + rest)
    assert parts.roles["gathered layers"] == 2 * 3 * layer
    assert parts.peak() < 80e9 < whole.peak()


def test_decoding_in_place_moves_two_sums_a_layer_and_gathered_decoding_the_base(llama):
    base = Base.of(llama, "--base_model_name")
    cuts = Cuts.of(base.model, 8)
    lengths = Lengths(100, 50)
    in_place = step_bytes(planned(llama), base, "ppo", cuts, 8, lengths)
    gathered = step_bytes(planned(llama, "--decode", "gathered"), base, "ppo", cuts, 8, lengths)
    # All queries but their last token skip the sum of the last feed-forward part.
    sums = 8 * 8 * (149 * 2 * 80 - 99) * 8192
    assert in_place["rollout"] == 7 / 8 * 2 * 2 * sums
    assert gathered["rollout"] == (2 + 49) * 7 / 8 * 2 * cuts.matrices
    assert gathered["rollout"] > 50 * in_place["rollout"]


def test_each_reward_model_gathers_the_layers_once_more_for_a_batch_of_answers(llama):
    base = Base.of(llama, "--base_model_name")
    cuts = Cuts.of(base.model, 8)
    several = ["--reward_model_lora_path", "R", "S", "T", "--old_logprobs", "sampled"]
    moved = step_bytes(planned(llama, *several), base, "ppo", cuts, 8, Lengths(100, 50))
    batches = -(-8 // planned(llama).forward_batch_size)
    # The reference, and three reward models.
    assert moved["score"] == 4 * batches * cuts.layers_once(2)


def test_nine_heads_are_not_divided_by_eight_processes_and_decode_gathered(tmp_path):
    LlamaConfig(hidden_size=72, num_attention_heads=9, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    base = Base.of(str(tmp_path), "--base_model_name")
    assert Cuts.of(base.model, 8).exchanged is None
    assert Cuts.of(base.model, 3).exchanged is not None


def test_the_plan_says_how_many_have_to_share_and_what_they_move(llama, capsys):
    rl_training.main(planned(llama, "--plan", "True", "--shard_base", "8", "--nproc", "8", "--link_gbps", "3600"))
    said = capsys.readouterr().out
    assert "24 GB none" in said and re.search(r"--shard_base\), by card: .*48 GB 6, 80 GB 3, 141 GB 2", said), said
    assert re.search(r"receives in a step, GiB: rollout [\d.]+, score [\d.]+, update [\d.]+", said)
    assert "on the shards where they lie" in said


def test_the_table_of_the_documents_is_that_of_the_benchmark():
    assert scale.table() in (scale.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
