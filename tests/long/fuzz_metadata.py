"""Damage files beside the weights at random and run the scripts on them: they run, or end in one sentence.

    python tests/long/fuzz_metadata.py --files 2000 --seed 0       a line for each failure, and a summary
    python tests/long/fuzz_metadata.py --seed 0 --only 17          one case again, with all that it printed

A case depends on the seed and its number alone. Half of the files of a checkpoint are damaged under a manifest that
fits, so that nothing but the way of reading protects from what they say. The others must be found by their manifest:
where the run goes on, its weights have to be those of an undisturbed one.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Nothing here may reach the network; set before the libraries read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

import conftest  # noqa: E402
from chat_tokenizers import make  # noqa: E402
from forked import FILES, KILL, Zygote, make_stages  # noqa: E402
from fuzzing import fuzz_arguments  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from rlhf.artefacts.checkpoint import MANIFEST, read_manifest, write_manifest  # noqa: E402

# Seconds and bytes after which a case counts as a hang or a bomb.
SECONDS = 90
BYTES = 8 << 30

# What may stand where something else is expected.
VALUES = (
    None, True, False, 0, 1, -1, 3, 1.5, -0.0, 1e30, 10**9, 10**20, float("nan"), float("inf"), "", "x", "1", "true",
    "cuda", "../../etc/passwd", "(a+)+$", "\u202e\u2028\x1b[31m", "é" * 3000, [], [None], ["x"], [0], [[]], {},
    {"x": 1}, {"": None}, [1, 2, 3], {"0": {"content": 3}},
)  # fmt: skip
PIECES = (b"", b"\xff", b"\x00", b"{", b"}", b"[", b'"', b",", b"\n", b"null", b"NaN", b"\\ud800", b"\xef\xbb\xbf")


@dataclass
class Target:
    """A file to damage and the command lines that read it; `folder` holds it, below the case's own copy."""

    folder: str
    pattern: str
    commands: tuple[str, ...]


TARGETS = (
    Target("base", "*.json", ("sft", "reward", "ppo", "merge", "compare")),
    Target("chat", "*.json*", ("chat_sft", "chat_ppo", "chat_compare")),
    Target("sft", "*.json", ("ppo", "merge", "compare", "sft_again")),
    Target("reward", "*.json", ("ppo", "compare", "audit", "reward_merge")),
    Target("sft_stopped", "*.json*", ("sft_resume",)),
    Target("sft_stopped/checkpoint-*", "*", ("sft_resume",)),
    Target("reward_stopped", "*.json*", ("reward_resume",)),
    Target("reward_stopped/checkpoint-*", "*", ("reward_resume",)),
    Target("ppo_stopped", "*.json*", ("ppo_resume",)),
    Target("ppo_stopped/step_*", "*", ("ppo_resume",)),
    Target("ppo_done", "*.json*", ("ppo_done",)),
)


# ---- what is damaged ----
def make_world(folder: Path, zygote: Zygote) -> None:
    """Write a base, a chat model, adapters, stopped runs of each stage and a finished one."""
    conftest_base(folder / "base")
    chat_model(folder / "chat")
    stages = make_stages(str(folder / "base"), folder)

    blow = {"signum": KILL, "target": "transformers:Trainer._save_checkpoint", "when": "before", "call": 2}
    for name in ("sft", "reward"):
        assert zygote.run(stages[name], folder / f"{name}_stopped", **blow) == 128 + KILL, zygote.said()
    # After the first of its checkpoints.
    blow = {"signum": KILL, "target": "rlhf.rl.update:policy_loss", "when": "before", "call": 10}
    assert zygote.run(stages["ppo"], folder / "ppo_stopped", **blow) == 128 + KILL, zygote.said()
    for name, stage in stages.items():
        assert zygote.run(stage, folder / f"{name}_done") == 0, zygote.said()


def conftest_base(folder: Path) -> None:
    from soak import make_base

    make_base(folder)


def chat_model(folder: Path) -> None:
    """Write a tiny chat model with a template, two stop tokens and a generation_config.json."""
    folder.mkdir()
    tokenizer = make("llama3", folder)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **conftest.TINY)
    conftest.save_random_model(LlamaForCausalLM, config, folder)
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    GenerationConfig(eos_token_id=stops).save_pretrained(folder)


def command(name: str, at: Path) -> tuple[str, list[str]]:
    """(script, arguments) of a command line over the files in `at`."""
    base = ["--model_name", at / "base"]
    short = ["--max_steps", 1, "--per_device_train_batch_size", 4, "--save_steps", 0, "--eval_steps", 0]
    ppo = [
        "--base_model_name", at / "base", "--sft_model_lora_path", at / "sft",
        "--reward_model_lora_path", at / "reward", "--reward_transform", "standardize", "--reward_gate", "warn",
    ]  # fmt: skip
    steps = ["--steps", 8, "--batch_size", 8, "--mini_batch_size", 8, "--ppo_epochs", 1, "--output_max_length", 6]
    sft = ["--dataset_name", at / "answers.jsonl", "--sample_max_new_tokens", 0, *short]
    reward = ["--dataset_name", at / "pairs.jsonl", *short]
    prompts = ["--dataset_name", at / "prompts.jsonl"]
    out = ["--output_dir", at / "out"]
    answers = ["--prompts", "问题", "--max_new_tokens", 4, *out]
    chat = at / "chat"

    lines = {
        "sft": ("sft_training", [*base, *sft, *out]),
        "sft_again": ("sft_training", [*base, *sft, "--previous_lora_weights", at / "sft", *out]),
        "reward": ("reward_modeling", [*base, *reward, "--audit", False, *out]),
        "audit": ("reward_modeling", [
            *base, *reward, "--audit_only", True, "--audit_prompts", 4,
            "--reward_model_lora_path", at / "reward", *out,
        ]),
        "ppo": ("rl_training", [*ppo, *prompts, *steps, *out]),
        "merge": ("merge_lora", ["--base_model_name", at / "base", "--lora_path", at / "sft", *out]),
        "reward_merge": ("merge_lora", ["--base_model_name", at / "base", "--lora_path", at / "reward", *out]),
        "compare": ("compare", [
            "--base_model_name", at / "base", "--adapters", f"sft={at / 'sft'}",
            "--reward_model_lora_path", at / "reward", *answers,
        ]),
        "chat_sft": ("sft_training", ["--model_name", chat, *sft, *out]),
        "chat_ppo": ("rl_training", [
            "--base_model_name", chat, "--reward_model_lora_path", at / "reward", *prompts, *steps, *out,
        ]),
        "chat_compare": ("compare", ["--base_model_name", chat, *answers]),
    }  # fmt: skip
    return lines[name]


# ---- damage ----
def places(value, path=()) -> list[tuple]:
    """Paths of all values within JSON content, itself first."""
    paths = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        paths += places(child, (*path, key))
    return paths


def change_value(content, draw: random.Random):
    """JSON content with one value replaced, removed, doubled in depth or moved to another name."""
    # Values deep in a vocabulary are many and alike: the upper ones as often as the lower ones.
    paths = places(content)
    depth = draw.randint(0, max(len(path) for path in paths))
    path = draw.choice([path for path in paths if len(path) <= depth])
    if not path:
        return draw.choice(VALUES)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    kind = draw.choice(("replace", "replace", "replace", "remove", "wrap", "rename"))
    if kind == "remove":
        del owner[key]
    elif kind == "wrap":
        owner[key] = draw.choice(([owner[key]], {"x": owner[key]}))
    elif kind == "rename" and isinstance(owner, dict):
        owner[f"{key}_"] = owner.pop(key)
    else:
        owner[key] = draw.choice(VALUES)
    return content


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes cut short, flipped, or with a piece put in."""
    kind = draw.choice(("cut", "flip", "piece", "empty"))
    if kind == "empty" or not data:
        return b""
    at = draw.randrange(len(data))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    return data[:at] + draw.choice(PIECES) * draw.choice((1, 50)) + data[at:]


def damage(file: Path, draw: random.Random) -> None:
    """Damage one file in one way; JSON mostly by its values, so that it still parses."""
    data = file.read_bytes()
    changed = None
    if file.suffix == ".json" and draw.random() < 0.85:
        changed = json.dumps(change_value(json.loads(data), draw)).encode()
    if file.suffix == ".jsonl" and data and draw.random() < 0.7:
        lines = data.decode().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(change_value(json.loads(lines[number]), draw))
        changed = "\n".join(lines).encode()
    # Files of a world are linked, not copied: the old one must stay as it is.
    file.unlink()
    file.write_bytes(damage_bytes(data, draw) if changed is None else changed)


def prepare(world: Path, at: Path, draw: random.Random) -> tuple[str, str, bool]:
    """A copy of the world in `at` with one file damaged.

    Returns: the file's name there, the command that reads it, whether a manifest has to find the damage.
    """
    shutil.copytree(world, at, copy_function=os.link, symlinks=True)
    # Weighted by the draw of the target, for the kinds of files matter and not how many each has.
    target = draw.choice(TARGETS)
    folder = sorted(at.glob(target.folder))[-1]
    names = sorted(path.name for path in folder.glob(target.pattern) if path.is_file() and path.name != ".lock")
    name = draw.choice(names)
    about = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    damage(folder / name, draw)
    honest = about is not None and name != MANIFEST and draw.random() < 0.5
    if about and name != MANIFEST and not honest:
        write_manifest(folder, {key: value for key, value in about.items() if key not in ("files", "versions")})
    return f"{folder.relative_to(at)}/{name}", draw.choice(target.commands), honest


def weights_of(folder: Path) -> dict[str, bytes]:
    """Bytes of the adapter and heads that a finished run has left."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


# ---- one case ----
def check(zygote: Zygote, world: Path, stages: dict, seed: int, number: int, shown: bool = False) -> str:
    """Run one case. Returns: "runs", "refused", or what is wrong, with the file and the command."""
    draw = random.Random(f"{seed} {number}")
    at = Path(tempfile.mkdtemp(dir=world.parent)) / "world"
    try:
        name, line, honest = prepare(world, at, draw)
        if line.endswith(("_resume", "_done")):
            stage = stages[line.split("_")[0]]
            out = "ppo_done" if line == "ppo_done" else f"{stage.script_name}_stopped"
            argv = [word.replace(str(world), str(at)) for word in stage.argv]
            script = stage.script
            argv += ["--output_dir", str(at / out), "--resume_from_checkpoint", "True"]
        else:
            script, words = command(line, at)
            argv = [str(word) for word in words]
        log = at.parent / "log"
        code = zygote.run_script(script, argv, log, seconds=SECONDS, bytes=BYTES)
        said = zygote.said() if log.stat().st_size < 1 << 20 else "more than a megabyte"
        same = not honest or weights_of(at / out) == weights_of(world / out.replace("stopped", "done"))
    finally:
        if not shown:
            shutil.rmtree(at.parent)
    if shown:
        print(said, f"\nexit code {code}; files in {at}")

    where = f"{number} {name} {line}"
    errors = [row for row in said.splitlines() if ": error: " in row]
    if "Traceback" in said:
        return f"TRACEBACK {where}: {said.strip().splitlines()[-1][:160]}"
    if "\x1b" in said or "\u202e" in said:
        return f"ESCAPES {where}"
    if code == 0 and not same:
        return f"DIFFERS {where}"
    if code == 0:
        return "runs" if not errors else f"ERROR AND EXIT 0 {where}"
    if code == 1 and len(errors) == 1 and len(errors[0]) < 2000:
        return "refused"
    return f"EXIT {code} {where}: {said.strip()[-200:]}"


def main() -> None:
    """Run the cases that the command line asks for."""
    args, numbers = fuzz_arguments(__doc__, "files", 2000)

    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "whole"
        world.mkdir()
        zygote = Zygote()
        make_world(world, zygote)
        stages = make_stages_again(world)
        seen = Counter()
        for number in numbers:
            what = check(zygote, world, stages, args.seed, number, args.only is not None)
            seen[what.split()[0]] += 1
            if what not in ("runs", "refused"):
                print(what, flush=True)
            if number % 100 == 99:
                print(f"{number + 1}: {dict(seen)}", flush=True)
        zygote.close()
    print(f"seed {args.seed}: {dict(seen)}")
    sys.exit(0 if set(seen) <= {"runs", "refused"} else 1)


def make_stages_again(world: Path) -> dict:
    """The command lines of the stages of `make_world`, whose files are there already."""
    copied = Path(tempfile.mkdtemp(dir=world.parent))
    stages = make_stages(str(world / "base"), copied)
    for name, stage in stages.items():
        stage.argv = [word.replace(str(copied), str(world)) for word in stage.argv]
        stage.script_name = name
    return stages


if __name__ == "__main__":
    main()
