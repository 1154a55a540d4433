"""Files of others: adapters and bases that do not belong here, damage, and pickles that would run code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from commands import run_here
from conftest import INITIALIZER_RANGE, TINY, save_random_model
from forked import PROMPTS
from safetensors.torch import load_file, save_file

from rlhf.artefacts.adapters import check_adapter, read_adapter
from rlhf.baichuan import BaichuanConfig, BaichuanForCausalLM

pytestmark = pytest.mark.slow


def other_base(tiny_base: str, folder: Path, **changes) -> str:
    """The tiny base with another shape, or (without changes) other weights of the same."""
    shutil.copytree(tiny_base, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = {**TINY, "vocab_size": vocabulary, "initializer_range": INITIALIZER_RANGE * 1.5, **changes}
    save_random_model(BaichuanForCausalLM, BaichuanConfig(max_position_embeddings=512, **shape), folder)
    return str(folder)


def other_tokenizer(tiny_base: str, folder: Path) -> str:
    """The tiny base, its last pieces in another order."""
    from sentencepiece import sentencepiece_model_pb2

    shutil.copytree(tiny_base, folder)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    first, last = model.pieces[-1], model.pieces[-2]
    first.piece, last.piece = last.piece, first.piece
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return str(folder)


class Bomb:
    """A pickle of this fails the test when it is read by anything that runs code."""

    def __reduce__(self):
        return (pytest.exit, ("code in a file was run",))


@pytest.fixture(scope="module")
def others(tiny_base, tmp_path_factory):
    """Bases that are not the tiny one, each with an SFT and a reward adapter: name -> (words of refusal, folders)."""
    folder = tmp_path_factory.mktemp("others")
    bases = {
        "base num_hidden_layers": other_base(tiny_base, folder / "layers", num_hidden_layers=3),
        "base hidden_size": other_base(tiny_base, folder / "hidden", hidden_size=64),
        "base weights": other_base(tiny_base, folder / "weights"),
        "tokenizer": other_tokenizer(tiny_base, folder / "tokenizer"),
    }
    made = {}
    for name, base in bases.items():
        kinds = {kind: random_adapter(base, f"{base}_{kind}", kind) for kind in ("sft", "reward")}
        made[name] = kinds
    return made


@pytest.fixture(scope="module")
def good(tiny_base, tmp_path_factory):
    """What belongs together: base, data, adapters."""
    folder = tmp_path_factory.mktemp("good")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "answer": "好"}) + "\n" for p in PROMPTS), encoding="utf-8")
    return {
        "base": tiny_base,
        "data": str(prompts),
        "sft": random_adapter(tiny_base, folder / "sft"),
        "reward": random_adapter(tiny_base, folder / "reward", "reward", seed=1),
    }


def use(good, role: str, adapter: str, output: Path) -> list[str]:
    """A command line that uses `adapter` in a role, all else being right."""
    ppo = {"sft_model_lora_path": good["sft"], "reward_model_lora_path": good["reward"]}
    roles = {
        "--sft_model_lora_path": ("rl_training", ppo | {"sft_model_lora_path": adapter}),
        "--reward_model_lora_path": ("rl_training", ppo | {"reward_model_lora_path": adapter}),
        "--judge_lora_path": ("rl_training", ppo | {"judge_lora_path": adapter}),
        "--previous_lora_weights": ("sft_training", {"previous_lora_weights": adapter}),
        "--lora_path": ("merge_lora", {"lora_path": adapter}),
        "--adapters x:": ("compare", {"adapters": f"x={adapter}"}),
    }
    script, flags = roles[role]
    flags |= {"output_dir": output, "model_name" if script == "sft_training" else "base_model_name": good["base"]}
    if script.endswith("training"):
        flags |= {"dataset_name": good["data"], "bf16": False}
    return [script, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


SFT_ROLES = ("--sft_model_lora_path", "--previous_lora_weights", "--lora_path", "--adapters x:")
REWARD_ROLES = ("--reward_model_lora_path", "--judge_lora_path")
ROLES = SFT_ROLES + REWARD_ROLES


def one_sentence(found: tuple[int, str, str]) -> str:
    """The sentence of a refused command. Raises: AssertionError for another exit code, or more than a sentence."""
    code, _, said = found
    lines = [line for line in said.splitlines() if ": error: " in line]
    assert code == 1 and len(lines) == 1 and "Traceback" not in said, (code, said)
    return lines[0]


# ---- layouts of other tools ----
def test_where_an_adapter_lies_in_the_layout_of_another_tool_is_said(good, tmp_path):
    swift = tmp_path / "output"
    for name in ("v0-20260101-120000/checkpoint-100", "v1-20260102-080000/checkpoint-20", "v1-20260102-080000/images"):
        (swift / name).mkdir(parents=True)
        if "checkpoint" in name:
            shutil.copy(Path(good["sft"], "adapter_config.json"), swift / name)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-q4_k_m.gguf").write_bytes(b"GGUF")

    newest = swift / "v1-20260102-080000" / "checkpoint-20"
    for place, words in (
        (swift, f"give the adapter in it, {newest}$"),
        (swift / "v1-20260102-080000", f"give the adapter in it, {newest}$"),
        (merged, "it holds a whole model .* give that as the base$"),
        (tmp_path / "gguf", "GGUF files are for inference alone"),
        (Path(good["sft"]) / "adapter_model.safetensors", "give the directory that the file lies in$"),
        (swift / "v1-20260102-080000" / "images", r"it has no adapter_config\.json$"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            check_adapter(place, stage="sft", base={})
        with pytest.raises(FileNotFoundError, match=words):
            read_adapter(place)


def test_a_head_that_llama_factory_keeps_beside_the_adapter_is_named(good, tmp_path):
    folder = tmp_path / "reward"
    shutil.copytree(good["sft"], folder)
    (folder / "run.json").unlink()
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    save_file(head, folder / "value_head.safetensors")
    said = one_sentence(run_here(*use(good, "--reward_model_lora_path", str(folder), tmp_path / "out")))
    assert "keeps its head in value_head.safetensors, as LLaMA-Factory does: copy v_head.summary.weight" in said

    # The way out that the sentence names.
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.score.weight"] = head["v_head.summary.weight"]
    save_file(weights, folder / "adapter_model.safetensors")
    assert config["modules_to_save"] is None
    code, _, said = run_here(*use(good, "--reward_model_lora_path", str(folder), tmp_path / "out"), "--steps", "8",
                             "--batch_size", "8", "--mini_batch_size", "8", "--output_max_length", "4",
                             "--reward_gate", "warn")  # fmt: skip
    assert code == 0, said


# ---- adapters know their base ----
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("difference", ["base num_hidden_layers", "base hidden_size", "base weights", "tokenizer"])
def test_an_adapter_of_another_base_is_refused_by_name(good, others, tmp_path, role, difference):
    if (role, difference) == ("--lora_path", "tokenizer"):
        pytest.skip("merging writes the base's own tokenizer, whatever the adapter's was")
    adapter = others[difference]["reward" if role in REWARD_ROLES else "sft"]
    said = one_sentence(run_here(*use(good, role, adapter, tmp_path / "out")))
    assert f"{role} {adapter} was trained with another {difference}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("difference", ["base num_hidden_layers", "base hidden_size"])
def test_without_its_run_json_the_shapes_of_an_adapter_still_tell(good, others, tmp_path, role, difference):
    adapter = tmp_path / "adapter"
    shutil.copytree(others[difference]["reward" if role in REWARD_ROLES else "sft"], adapter)
    (adapter / "run.json").unlink()
    found = run_here(*use(good, role, str(adapter), tmp_path / "out"))
    assert f"{adapter} has no run.json" in "".join(found[1:])
    assert str(adapter) in one_sentence(found)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("role", ROLES)
def test_an_adapter_of_another_stage_is_refused(good, tmp_path, role):
    if role == "--lora_path":
        pytest.skip("an adapter of any stage can be merged")
    adapter = good["sft" if role in REWARD_ROLES else "reward"]
    assert "is of stage" in one_sentence(run_here(*use(good, role, adapter, tmp_path / "out")))


@pytest.mark.parametrize("role", REWARD_ROLES)
def test_a_reward_adapter_without_its_head_is_refused(good, tmp_path, role):
    from safetensors.torch import load_file, save_file

    adapter = shutil.copytree(good["reward"], tmp_path / "reward")
    file = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "score" not in name}, file)
    assert "score head" in one_sentence(run_here(*use(good, role, str(adapter), tmp_path / "out")))


# ---- damaged and hostile files ----
def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


ADAPTER_DAMAGE = {
    "missing": shutil.rmtree,
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "weights cut": lambda folder: cut(folder / "adapter_model.safetensors"),
    "weights empty": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "config cut": lambda folder: cut(folder / "adapter_config.json"),
    "config of another kind": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "run.json cut": lambda folder: cut(folder / "run.json"),
    "run.json of another kind": lambda folder: (folder / "run.json").write_text("[1]"),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("damage", ADAPTER_DAMAGE)
def test_a_damaged_adapter_is_named_in_one_sentence(good, tmp_path, role, damage):
    adapter = shutil.copytree(good["reward" if role in REWARD_ROLES else "sft"], tmp_path / "adapter")
    ADAPTER_DAMAGE[damage](adapter)
    said = one_sentence(run_here(*use(good, role, str(adapter), tmp_path / "out")))
    assert str(adapter) in said
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_as_an_adapter_is_refused_and_not_run(good, tmp_path, role, name):
    adapter = shutil.copytree(good["reward" if role in REWARD_ROLES else "sft"], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / name)
    said = one_sentence(run_here(*use(good, role, str(adapter), tmp_path / "out")))
    assert f"{adapter / name} " in said
    assert name.endswith("safetensors") or "no code of it was run" in said


BASE_DAMAGE = {
    "config.json cut": lambda folder: cut(folder / "config.json"),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: cut(folder / "model.safetensors"),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "tokenizer cut": lambda folder: (folder / "tokenizer.model").write_bytes(
        (folder / "tokenizer.model").read_bytes()[:5000]
    ),
    "a pickle as weights": lambda folder: (
        (folder / "model.safetensors").unlink(),
        torch.save(Bomb(), folder / "pytorch_model.bin"),
    ),
}


@pytest.mark.parametrize("role", ["--sft_model_lora_path", "--previous_lora_weights", "--lora_path", "--adapters x:"])
@pytest.mark.parametrize("damage", BASE_DAMAGE)
def test_a_damaged_base_is_named_in_one_sentence(good, tmp_path, role, damage):
    base = shutil.copytree(good["base"], tmp_path / "base")
    BASE_DAMAGE[damage](base)
    said = one_sentence(run_here(*use(good | {"base": str(base)}, role, good["sft"], tmp_path / "out")))
    assert str(base) in said
    assert not (tmp_path / "out").exists()
