"""The benchmarks measure what they say: arithmetic counted right, answers as long as stated, the same rows for all."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import data, ensemble_step, gpu_7b, gpu_peers, ppo_step, settings, sft_step
from benchmarks.gpu_measure import Meter, Row, Target, cells
from benchmarks.model import EOS, VOCABULARY, causal_model, config
from benchmarks.ppo_workload import SETTINGS, prompts, set_chance_of_eos
from rlhf.cost.flops import FlopCounts
from rlhf.cost.limits import Card, Cost, Rows, decoding_bytes
from rlhf.cost.memory import Precision
from rlhf.data.reading import load_rows


def test_counted_flops_are_two_for_each_weight_and_token():
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert ppo_step.flops(ppo_step.layer_shapes(432, 256)) == 2 * (432 * layers + 256 * head)


@pytest.mark.parametrize(("chance", "least", "most"), [(0.0, 0.0, 1e-12), (1 / 32, 0.02, 0.045)])
def test_eos_has_its_chance_at_every_token_of_every_text(chance, least, most):
    model = causal_model()
    set_chance_of_eos(model, chance)
    ids = torch.randint(3, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chances = model(ids).logits.softmax(-1)[..., EOS]
    assert chances.min() >= least
    assert chances.max() <= most


def test_prompts_are_as_described():
    lengths = [len(ids) for ids in prompts()]
    assert (len(lengths), min(lengths), max(lengths)) == (SETTINGS["batch_size"], 16, 96)
    assert 40 < sum(lengths) / len(lengths) < 46


def test_the_first_step_is_left_out_and_others_are_held_against_ours():
    def steps(total, tokens=1000):
        phases = {"rollout": 1.0, "score": 1.0, "update": total - 2.0, "total": total, "tokens": tokens}
        # A first step that would change every figure.
        return [phases | {"total": 99.0}, phases, phases]

    runs = {
        name: {"steps": steps(total), "peak_gb": peak, "versions": {"trl": name}, "moved": 1e-4}
        for name, total, peak in (("ours", 10.0, 1.0), ("trl07", 15.0, 2.0))
    }
    table = ppo_step.table(SETTINGS | {"prompts": prompts()}, runs, [1.0, 100.0, 100.0])

    # Three words are the name; 15 seconds against ours of 10 are 1.5 times the speed, 2 GB against 1 half the memory.
    classic = next(line for line in table.splitlines() if line.startswith("classic"))
    rollout, score, update, total, rate, tokens, peak, speed, _, memory, _ = classic.split()[3:]
    assert (total, rate, tokens, peak, speed, memory) == ("15.00", "1.07", "62.5", "2.00", "1.50", "0.50")
    assert (rollout, score, update) == ("1.00", "1.00", "13.00")


def test_several_reward_models_are_held_against_one_without_the_first_step():
    def run(total, peak):
        step = {"rollout": 1.0, "score": 1.0, "update": total - 2, "total": total}
        return {"steps": [step | {"total": 99.0}, step, step], "peak_gb": peak}

    several = ensemble_step.table({1: run(10.0, 2.0), 4: run(11.5, 2.1)}).splitlines()[-1].split()
    assert several == ["4", "1.00", "1.00", "9.50", "11.50", "2.100", "1.150", "x", "1.050", "x"]


def test_sft_rows_fit_and_carry_a_loss_on_the_answer_alone():
    rows = sft_step.draw_rows(50)
    assert json.dumps(rows) == json.dumps(sft_step.draw_rows(50))
    for row in rows:
        assert len(row["input_ids"]) == len(row["completion_mask"]) <= sft_step.MAX_LENGTH
        assert row["input_ids"][-1] == EOS
        assert row["completion_mask"] == sorted(row["completion_mask"])


# ---- gpu_peers ----
@pytest.mark.parametrize(("contender", "name"), [("sft-trl", "sft, TRL"), ("grpo-ours", "grpo, ours step")])
def test_a_contender_on_a_gpu_runs_at_a_tiny_shape(capsys, contender, name):
    words = ["--only", contender, "--shape", "tiny", "--device", "cpu", "--steps", "1"]
    gpu_peers.main(gpu_peers.parse(gpu_peers.Arguments, words, ""))
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.startswith(name)
    assert all(float(number.replace(",", "")) > 0 for number in row[32:].split())


# ---- gpu_7b ----
def on_a_tiny_shape(*words: str) -> gpu_7b.Arguments:
    """Its command line without a GPU."""
    return gpu_7b.parse(gpu_7b.Arguments, ["--shape", "tiny", "--device", "cpu", "--steps", "2", *words], "")


def test_the_gpu_benchmark_measures_every_row_at_a_tiny_shape_without_a_gpu(capsys):
    rows = gpu_7b.main(on_a_tiny_shape("--peak_tflops", "1000", "--bandwidth_tb", "3"))
    loops = ["PPO", "memory"]
    if find_spec("bitsandbytes") is not None:
        loops.append("memory, 4-bit")
    names = [row.name for row in rows]
    assert names == [
        "SFT 2 x 16",
        "SFT 2 x 16, checkpointing",
        "reward 2 x 2 x 12",
        "reward 2 x 2 x 12, shared prompt",
        *[f"{loop} {phase}" for loop, phase in product(loops, ("rollout", "score", "update", "step"))],
    ]

    # No figure is missing, and none beats the card that it is held against.
    card = Card("", 1000e12, 3e12)
    for row in rows:
        figures = (row.seconds, row.samples, row.tokens, row.peak_gb, row.cost.limit(card), row.cost.mfu(1.0, card))
        assert all(math.isfinite(value) and value > 0 for value in figures), row
        assert row.cost.limit(card) < row.seconds, "faster than a card of a petaflop"

    for name in ("PPO", "memory"):
        seconds = {row.name: row.seconds for row in rows}
        phases = [seconds[f"{name} {phase}"] for phase in ("rollout", "score", "update")]
        # Of two steps the median is the mean.
        assert sum(phases) <= seconds[f"{name} step"]

    # Three lines are the machine and the head of the table, the last one is the time.
    lines = capsys.readouterr().out.splitlines()[3:-1]
    assert [line[:36].strip() for line in lines if "not measured" not in line] == names


def test_the_gpu_benchmark_refuses_the_real_shape_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as end:
        on_a_tiny_shape("--shape", "7b")
    assert end.value.code == 2
    assert "--device cpu give --shape tiny" in capsys.readouterr().err


def test_a_part_too_large_for_the_card_is_named_and_the_others_go_on(capsys, monkeypatch):
    def too_large(bench):
        raise MemoryError("out of memory in the update")

    monkeypatch.setitem(gpu_7b.CASES, "sft", (too_large, gpu_7b.CASES["sft"][0]))
    assert [row.name for row in gpu_7b.main(on_a_tiny_shape("--only", "sft"))] == ["SFT 2 x 16"]
    assert "sft: not measured, out of memory in the update" in capsys.readouterr().out


def test_the_meter_leaves_the_first_step_out_and_tells_phases_apart():
    meter = Meter("cpu")
    # Three steps of three readings: 5, 1 and 2 seconds between the first two, then 1 second; 9 GB only at the start.
    meter.times = [0, 5, 6, 10, 11, 12, 20, 22, 23]
    meter.peaks = [9, 9, 9, 1, 3, 2, 1, 4, 2]
    assert meter.spans(0, 1, 3) == (1.5, 4)
    assert meter.spans(1, 2, 3) == (1, 2)
    assert meter.spans(0, 2, 3) == (2.5, 4)


def test_decoding_reads_weights_and_the_tokens_so_far_once_a_token():
    work = FlopCounts(body=1000, head=100, trained=0, attention=8)
    # Of four tokens prefill gives the first; the others look at 4, 5 and 6 tokens in each of two rows.
    cache = 2 * (4 + 5 + 6) * 2 * 8 * 2
    rows = Rows(2, 3, 4)
    assert decoding_bytes(work, Precision(2), rows) == 3 * 2 * 1100 + cache
    # Half a byte and a little more for each weight of the layers, two bytes for the output layer.
    weights = decoding_bytes(work, Precision(2, four_bit=True), rows) - cache
    assert 3 * (500 + 200) < weights < 3 * 720


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth"),
    [
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA H20", 148e12, 4.0e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA A800-SXM4-80GB", 312e12, 2.04e12),
        ("Some Card", None, None),
    ],
)
def test_a_card_is_known_by_its_name(name, flops, bandwidth):
    assert Card.of(name, None, None) == Card(name, flops, bandwidth)


def test_a_row_is_held_against_the_limit_and_its_target():
    cost = Cost(flops=2e12, computed=1e12, read=4e9)
    row = Row("reward", 0.5, 10, 6000, 41.0, cost, Target(rate=15))
    shown = cells(row, Card("", 10e12, 1e11))[1:]
    # 2 of 10 Tflop/s in half a second: 40 %; 0.1 s of arithmetic and 0.04 s of reading.
    assert shown == ("0.5", "20.00", "12,000", "41.00", "40.0%", "0.14", "28.0%", ">= 15 samples/s", "yes")
    assert cells(row, Card("", None, None))[5:8] == ("-", "-", "-")
    assert not Target(memory=40).met(row)


def test_the_settings_that_are_compared_differ_from_the_first_in_one_thing_each():
    args = settings.Arguments(model="base", learning_rates=[1e-3, 1e-4], ranks=[16, 4, 64], epochs=[1.0, 3.0])
    made = settings.settings(args)
    assert made[0] == (1e-3, 16, 1.0) and len(made) == len(set(made)) == 5
    for other in made[1:]:
        assert sum(a != b for a, b in zip(made[0], other, strict=True)) == 1


# ---- data ----
def test_the_workload_of_pairs_has_as_many_different_ones_as_asked_for(tmp_path):
    sides = {side: {"from": "gpt", "value": side} for side in ("chosen", "rejected")}
    rows = [{"conversations": [{"from": "human", "value": asked}], **sides} for asked in ("one?", "two?")]
    source = tmp_path / "source.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    data.write_workload(str(source), tmp_path / "pairs.jsonl", 5)
    read, funnel = load_rows(str(tmp_path / "pairs.jsonl"), "preference")
    assert [row["prompt"] for row in read] == ["0. one?", "1. two?", "2. one?", "3. two?", "4. one?"]
    assert {(row["chosen"], row["rejected"]) for row in read} == {("chosen", "rejected")}
    assert funnel.kept == 5


def test_memory_of_a_process_counts_those_it_started():
    alone = data.anonymous(os.getpid())
    work = "import time; kept = bytearray(b'x' * 60_000_000); print(len(kept), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 50 < data.anonymous(os.getpid()) - alone < 150
        child.kill()
