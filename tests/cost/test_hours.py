"""Hours of --plan against a measured log, flags that make a stage fit, and the commands of README and scripts."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from stages import words
from transformers import LlamaConfig, Qwen3Config

import reward_modeling
import rl_training
import sft_training
from rlhf.baichuan import BaichuanConfig
from rlhf.cost import fitting, hours
from rlhf.cost.hours import Lengths
from rlhf.cost.memory import CARDS_GB
from rlhf.cost.needs import memory_of
from rlhf.cost.skeleton import Base

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"sft_training": (sft_training, "sft"), "reward_modeling": (reward_modeling, "reward"),
          "rl_training": (rl_training, "ppo")}  # fmt: skip
H200 = hours.card_of(141)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories with nothing but the config.json of baichuan-7B, of Qwen3-8B and of Llama-3.3-70B."""
    folder = tmp_path_factory.mktemp("configs")
    sizes = {"hidden_size": 4096, "num_attention_heads": 32}
    BaichuanConfig(**sizes, intermediate_size=11008, num_hidden_layers=32).save_pretrained(folder / "baichuan")
    Qwen3Config(
        **sizes, intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8, head_dim=128, vocab_size=151936
    ).save_pretrained(folder / "qwen")
    LlamaConfig(
        hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, num_hidden_layers=80,
        vocab_size=128256,
    ).save_pretrained(folder / "llama")  # fmt: skip
    names = ("baichuan-inc/baichuan-7B", "models/baichuan-7B")
    known = dict.fromkeys(names, str(folder / "baichuan")) | {"Qwen/Qwen3-8B": str(folder / "qwen")}
    return known | {"meta-llama/Llama-3.3-70B-Instruct": str(folder / "llama")}


@pytest.fixture(scope="module")
def bases(folders):
    return {folder: Base.of(folder, "--model_name") for folder in folders.values()}


def arguments(script, folders, **flags):
    name = "base_model_name" if script is rl_training else "model_name"
    known = {name: folders["baichuan-inc/baichuan-7B"]}
    known |= {"sft_model_lora_path": "s", "reward_model_lora_path": "r"} if script is rl_training else {}
    return script.parse_args(words(known | flags))


# ---- hours ----
@pytest.mark.parametrize(
    ("stage", "flags", "lengths", "seconds"),
    [
        # Rows of benchmarks/results/gpu_7b.log: a step over its rows.
        ("sft_training", {"lora_target_models": "W_pack"}, Lengths(128, 384), 0.161 / 4),
        ("reward_modeling", {"lora_target_models": "W_pack"}, Lengths(100, 200), 0.481 / 10),
        ("rl_training", {"batch_size": 64, "ppo_epochs": 4}, Lengths(128, 256), 12 / 64),
        ("rl_training", {"batch_size": 8, "gradient_checkpointing": True}, Lengths(256, 256), 4.14 / 8),
    ],
)
def test_the_hours_are_those_that_were_measured(folders, bases, stage, flags, lengths, seconds):
    script, kind = STAGES[stage]
    args = arguments(script, folders, **flags)
    base = bases[folders["baichuan-inc/baichuan-7B"]]
    assert hours.row_seconds(args, base, kind, H200, lengths) == pytest.approx(seconds, rel=0.15)


def test_a_card_that_is_given_by_its_operations_counts_first(capsys, folders):
    flags = {"dataset_name": "nowhere", "plan": True, "max_steps": 1000}
    said = []
    for tflops in (50, 100):
        reward_modeling.main(arguments(reward_modeling, folders, device_flops=tflops, **flags))
        said.append(capsys.readouterr().out)
    rates = [re.search(r"--device_flops +[\d.]+ +([\d,]+) +([\d.]+)", text).groups() for text in said]
    pairs = [int(rate.replace(",", "")) for rate, _ in rates]
    assert pairs[1] == pytest.approx(2 * pairs[0], rel=0.01)
    assert float(rates[0][1]) == pytest.approx(4000 / pairs[0], abs=0.06)
    assert "disk: the base 13.0 GiB" in said[0] and "71.9 %" in said[0]
    with pytest.raises(SystemExit):
        arguments(reward_modeling, folders, device_flops=-1)


# ---- flags that fit ----
def test_every_size_of_card_has_a_card_whose_limits_are_known():
    assert tuple(hours.CARD_OF) == CARDS_GB
    for size in CARDS_GB:
        card = hours.card_of(size)
        assert card.flops and card.bandwidth


@pytest.mark.parametrize("size", CARDS_GB)
@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("reward_modeling", {"per_device_train_batch_size": 10, "max_length": 1000}),
        ("rl_training", {"merged_sft_model_path": "m", "batch_size": 32, "mini_batch_size": 8}),
    ],
)
def test_the_flags_that_make_a_stage_fit_do_and_none_of_them_is_needless(folders, bases, stage, flags, size):
    script, kind = STAGES[stage]
    args = arguments(script, folders, **flags)
    base = bases[folders["baichuan-inc/baichuan-7B"]]
    changes = fitting.fitting_flags(args, base, kind, size * 1e9)
    assert memory_of(replace(args, **changes), base, kind).peak() <= size * 1e9

    rows = [name for name in changes if name in ("per_device_train_batch_size", "mini_batch_size")]
    for name in changes:
        fewer = {other: value for other, value in changes.items() if other != name}
        if name in rows or name == "gradient_accumulation_steps":
            continue
        assert memory_of(replace(args, **fewer), base, kind).peak() > size * 1e9
    # The optimizer step keeps its rows.
    for name in rows:
        before = getattr(args, name) * args.gradient_accumulation_steps
        assert changes[name] * changes["gradient_accumulation_steps"] == before


def test_what_no_flag_makes_fit_is_said(folders, bases):
    args = arguments(sft_training, folders, max_length=100_000)
    base = bases[folders["baichuan-inc/baichuan-7B"]]
    assert fitting.fitting_flags(args, base, "sft", 16e9) is None


@pytest.mark.parametrize(
    ("batch", "accumulation", "limit", "rows"), [(8, 16, 1e15, 8), (32, 4, 1e15, 4), (6, 4, 1e15, 2), (8, 16, 1, 1)]
)
def test_a_mini_batch_that_fits_divides_the_batch_and_the_optimizer_step(
    folders, bases, batch, accumulation, limit, rows
):
    args = arguments(rl_training, folders, batch_size=batch, gradient_accumulation_steps=accumulation)
    assert fitting.rows_that_fit(args, bases[folders["baichuan-inc/baichuan-7B"]], limit) == rows


# ---- the commands ----
# Commands that train nothing.
LOOKS = {"--plan", "--inspect_data", "--audit_only"}


def page_commands(page: str) -> list[tuple[int, str, list[str]]]:
    """(GB of the card that the comment at the head of a block names, script, flags) of a page's training commands."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        size = re.match(r"# (\d+) GB$", block, re.MULTILINE)
        for line in block.replace("\\\n", " ").splitlines():
            found = shlex.split(line, comments=True)
            # The interpreter and variables may stand before the script.
            place = next((place for place, word in enumerate(found) if word.removesuffix(".py") in STAGES), None)
            if place is not None and not LOOKS & set(found):
                named.append((size and int(size[1]), found[place].removesuffix(".py"), found[place + 1 :]))
    return named


def script_commands(tmp_path) -> list[tuple[int, str, list[str]]]:
    """The same of scripts/train_*.sh, whose first lines name the card; the interpreter only notes its arguments."""
    notes = tmp_path / "notes"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> {notes}\nprintf '\\n' >> {notes}\n", encoding="utf-8")
    python.chmod(0o755)
    named = []
    for file in sorted((ROOT / "scripts").glob("train_*.sh")):
        notes.write_text("", encoding="utf-8")
        size = int(re.search(r"(?:one card|eight cards) of (\d+)\s+(?:# )?GB", file.read_text(encoding="utf-8"))[1])
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "DATA": "pairs.jsonl", "RUNS": str(tmp_path)}
        if file.name == "train_all.sh":
            environment.pop("DATA")
        subprocess.run(["bash", str(file)], env=environment, check=True, capture_output=True)
        for line in notes.read_text(encoding="utf-8").split("\0\n")[:-1]:
            script, *flags = line.split("\0")
            named.append((size, Path(script).stem, flags))
    return named


def fits(size: int, stage: str, flags: list[str], folders, bases) -> bool:
    script, kind = STAGES[stage]
    known = [folders.get(word, word) for word in flags]
    args = script.parse_args(known)
    # The base of the Trainer stages has a default, too.
    name = args.base_model_name if kind == "ppo" else args.model_name
    base = bases[folders.get(name, name)]
    return memory_of(args, base, kind).peak() <= size * 1e9


def test_every_command_of_the_readme_fits_the_card_it_names(folders, bases):
    commands = page_commands("README.md")
    assert {stage for _, stage, _ in commands} == set(STAGES)
    for size, stage, flags in commands:
        assert size and fits(size, stage, flags, folders, bases), (size, stage, flags)


@pytest.mark.parametrize("page", ["start", "stages", "models", "data", "reward", "ppo", "running"])
def test_every_command_of_the_pages_fits_the_card_it_names_or_24_gb(page, folders, bases):
    commands = page_commands(f"docs/{page}.md")
    assert commands
    for size, stage, flags in commands:
        assert fits(size or 24, stage, flags, folders, bases), (size, stage, flags)


def test_every_command_of_the_scripts_fits_the_card_it_names(folders, bases, tmp_path):
    commands = script_commands(tmp_path)
    assert [stage for _, stage, _ in commands].count("rl_training") == 4
    assert "merge_lora" not in {stage for _, stage, _ in commands}
    for size, stage, flags in commands:
        assert fits(size, stage, flags, folders, bases), (size, stage, flags)
        if stage == "rl_training":
            assert flags[flags.index("--reward_transform") + 1] == "standardize"
