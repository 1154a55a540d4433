"""Files of ours and of libraries that hold something else than they should: one sentence with file and field."""

import json
import shutil
import time

import pytest
import torch
from adapters import random_adapter
from peft import LoraConfig
from transformers import TrainerState

from rlhf.artefacts import foreign
from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.checkpoint import MANIFEST, listed_files, write_manifest
from rlhf.artefacts.damage import is_out_of_memory, refuse_types, refused
from rlhf.artefacts.files import DiskFull
from rlhf.artefacts.foreign import refuse_slow_patterns
from rlhf.artefacts.output_dir import SCRATCH, finished_together
from rlhf.artefacts.run_json import load_run
from rlhf.data.encoding import load_tokenizer
from rlhf.models import lora
from rlhf.models.loading import load_base
from rlhf.models.lora import lora_targets
from rlhf.rl.gate import stored_audit
from rlhf.rl.state_file import STATE_KINDS, read_state
from rlhf.run.launch import sentence
from rlhf.run.log import read_metrics
from rlhf.trainer.training import read_trainer_state


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    return random_adapter(tiny_base, tmp_path_factory.mktemp("damaged") / "sft")


def changed(source, target, name, **fields):
    """A copy of a folder in which a JSON file has other fields; None takes one out."""
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text()) | fields
    (target / name).write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))
    return target


# ---- fields of our own files ----
@pytest.mark.parametrize(
    "fields",
    [
        {"stage": "gone"}, {"stage": 3}, {"arguments": []}, {"base": "x"}, {"parents": {"sft": 1}},
        {"parents": {"sft": {"path": []}}}, {"prompt_format": []}, {"prompt_format": {}}, {"tokenizer": {}},
        {"prompt_format": {"prompt_template": "{prompt}", "text": "", "chat_template_kwargs": {}, "bos": False,
                           "system_prompt": None, "stop_ids": ["x"]}},
    ],
)  # fmt: skip
def test_a_run_json_of_other_types_is_refused_by_its_field(adapter, tmp_path, fields):
    folder = changed(adapter, tmp_path / "copy", "run.json", **fields)
    with pytest.raises(ValueError, match=r"run\.json"):
        load_run(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": "8"}, {"r": None}, {"lora_alpha": float("nan")}, {"target_modules": {"x": 1}}, {"peft_type": 3},
        {"target_modules": ["W_pack", []]}, {"rank_pattern": {"x": "y"}}, {"rank_pattern": [3]}, {"eva_config": 3},
        {"modules_to_save": "score"}, {"corda_config": "x"}, {"use_dora": "yes"}, {"bias": False},
    ],
)  # fmt: skip
def test_an_adapter_config_of_other_types_is_refused_by_its_field(adapter, tmp_path, fields):
    folder = changed(adapter, tmp_path / "copy", "adapter_config.json", **fields)
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{next(iter(fields))}"):
        read_adapter(folder)


STATE = {
    "step": 3, "rollbacks": 0, "left_out": 0, "kl_coef": 0.1, "reward_stats": {"mean": 0.5, "std": 1.0},
    "baseline": {"eval/score/mean": 1.0}, "best": {"step": 1, "value": 2.0, "gain": float("nan"), "error": 0.1},
    "guard": {"start": {"entropy": 1.0}, "recent_kl": [0.1, 0.2]},
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        *({name: "gone"} for name in STATE_KINDS), {"step": "3"}, {"step": True}, {"kl_coef": float("nan")},
        {"reward_stats": {"mean": 1.0}}, {"best": {"step": 1}}, {"guard": {"start": {}, "recent_kl": ["x"]}},
        {"guard": {"start": {"entropy": None}, "recent_kl": []}}, {"baseline": {"x": []}},
    ],
)  # fmt: skip
def test_the_state_of_a_ppo_run_is_read_as_it_was_written_and_refused_otherwise(tmp_path, fields):
    (tmp_path / "state.json").write_text(json.dumps(STATE))
    assert json.dumps(read_state(tmp_path)) == json.dumps(STATE)
    left = {key: value for key, value in (STATE | fields).items() if value != "gone"}
    (tmp_path / "state.json").write_text(json.dumps(left))
    with pytest.raises(ValueError, match=r"state\.json"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"global_step": "gone"}, {"global_step": [3]}, {"log_history": [1]}, {"log_history": [{"loss": 1}]},
        {"save_steps": {}}, {"train_batch_size": [4]}, {"epoch": "x"}, {"unknown": 3}, {"stateful_callbacks": []},
    ],
)  # fmt: skip
def test_the_trainers_state_is_read_as_it_was_written_and_refused_otherwise(tmp_path, fields):
    file = tmp_path / "trainer_state.json"
    TrainerState(global_step=2, max_steps=9).save_to_json(str(file))
    assert read_trainer_state(tmp_path).global_step == 2
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))
    with pytest.raises(ValueError, match=r"trainer_state\.json"):
        read_trainer_state(tmp_path)


@pytest.mark.parametrize("line", ["[]", "3", "{", '{"step": "1"}', '{"loss": 1}', '{"step": 1, "loss": {}}', "\\x00"])
def test_a_line_of_metrics_that_is_no_record_is_named_and_a_cut_last_one_left_out(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "loss": 0.5, "kl": "nan", "guard": "stopped"}'
    file.write_text(f"{good}\n{good[:20]}")
    assert len(read_metrics(tmp_path)) == 1
    file.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("verdict", [[], {}, {"winning": []}, {"winning": {"empty": "x"}}, {"winning": {"none": 1.0}}])
def test_an_audit_that_the_gate_cannot_decide_by_is_refused(adapter, tmp_path, verdict):
    from rlhf.artefacts.fingerprints import adapter_hash

    folder = tmp_path / "copy"
    shutil.copytree(adapter, folder)
    audit = {"adapter": adapter_hash(folder), "verdict": {"winning": {"empty": 0.9}}}
    (folder / "audit.json").write_text(json.dumps(audit))
    assert stored_audit(folder)["verdict"]["winning"] == {"empty": 0.9}
    (folder / "audit.json").write_text(json.dumps(audit | {"verdict": verdict}))
    with pytest.raises(ValueError, match=r"audit\.json"):
        stored_audit(folder)


# ---- what libraries make of damage ----
def test_whatever_a_library_raises_becomes_one_sentence_and_errors_of_the_system_pass():
    for error, words in (
        (KeyError("mode"), "KeyError 'mode'"), (ImportError("no flash_attn"), "no flash_attn"),
        (IndexError(), "Index"), (AttributeError("'int' object\nmore"), "'int' object"),
        (AssertionError(), "AssertionError"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^the base X cannot be used") as told, refused("the base X", "mend"):
            raise error
        assert words in str(told.value) and str(told.value).endswith(": mend") and "\n" not in str(told.value)

    for error in (OSError(5, "I/O"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), refused("the base X"):
            raise error
    # A sentence that names it already stays as it is.
    with pytest.raises(ValueError, match=r"^the base X is odd$"), refused("the base X"):
        raise ValueError("the base X is odd")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"model_max_length": {"x": 1}}), ("tokenizer_config.json", {"eos_token": [3]}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}), ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"added_tokens": 3}),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_sentence_when_it_is_loaded(tiny_chat, tmp_path, name, fields):
    load_tokenizer(tiny_chat)
    folder = changed(tiny_chat, tmp_path / "copy", name, **fields)
    with pytest.raises(ValueError, match=r"^the tokenizer of .* cannot be used \("):
        load_tokenizer(str(folder))


def test_a_regular_expression_that_takes_for_ever_is_refused_within_its_time(tiny_base, monkeypatch):
    # A fifth of the usual time: five fields and a flag have to be refused.
    for module in (foreign, lora):
        monkeypatch.setattr(module, "PATTERN_SECONDS", 0.3)
    model = load_base(tiny_base, torch.float32)
    weights = {f"base_model.model.{'a' * 40}.lora_A.weight": torch.zeros(2, 2)}
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"):
        slow = r".*?(a+)+$"
        value = {slow: 2} if field.endswith("k_pattern") or field == "alpha_pattern" else slow
        fields = {"target_modules": ["W_pack"], field: value}
        # peft takes a pattern of layers only beside the layers' numbers, and those only beside a list of modules.
        if field == "layers_pattern":
            fields["layers_to_transform"] = [0]
        config = LoraConfig(**fields)
        begin = time.monotonic()
        with pytest.raises(ValueError, match=rf"{field}.* takes for ever"):
            refuse_slow_patterns(config, weights, "adapter X")
        assert time.monotonic() - begin < 10
        broken = LoraConfig(**fields)
        setattr(broken, field, {"(": 2} if isinstance(value, dict) else "(")
        with pytest.raises(ValueError, match=rf"{field}.* no regular expression"):
            refuse_slow_patterns(broken, weights, "adapter X")
    with pytest.raises(ValueError, match="takes for ever"):
        lora_targets(model, r"(.*.*.*.*.*.*.*.*.*.*.*)+!")
    refuse_slow_patterns(LoraConfig(target_modules=r".*\.W_pack"), weights, "adapter X")


# ---- the system ----
def test_a_lack_of_memory_is_one_sentence_in_every_form():
    for error in (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("can't start new thread"), OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("x"),
        MemoryError(), ImportError("_path.so: failed to map segment from shared object"),
    ):  # fmt: skip
        assert is_out_of_memory(error)
        assert sentence(error, object()).startswith("this machine's memory is used up (")
    assert "ulimit -f" in sentence(ValueError("x.json: File too large (os error 27)"), object())
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError(2, "missing"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "is full"),
        (Exception("No space left on device (os error 28)"), "is full"),
        (OSError(27, "File too large"), "ulimit -f"),
        (Exception("I/O error: File too large (os error 27)"), "ulimit -f"),
    ],
)
def test_a_result_that_finds_no_room_leaves_none_of_its_files(tmp_path, error, words):
    (tmp_path / "metrics.jsonl").write_text("kept")
    with pytest.raises(DiskFull, match=words), finished_together(tmp_path) as folder:
        (folder / "adapter_model.safetensors").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_result_comes_whole_and_replaces_files_and_folders_and_its_scratch_is_swept(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "run.json").write_text("old")
    with finished_together(tmp_path) as folder:
        assert SCRATCH.fullmatch(folder.name)
        (folder / "templates").mkdir()
        (folder / "templates" / "a.jinja").write_text("x")
        (folder / "run.json").write_text("new")
    assert (tmp_path / "run.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "templates"]

    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="was removed while"), finished_together(tmp_path):
        pass


def test_only_listed_files_of_a_checkpoint_are_handed_to_a_library(tmp_path):
    folder = tmp_path / "checkpoint-2"
    (folder / "inner").mkdir(parents=True)
    for name in ("optimizer.pt", "inner/state"):
        (folder / name).write_text(name)
    write_manifest(folder)
    with listed_files(folder) as given:
        assert given == folder
    (folder / "scaler.pt").write_text("planted")
    with listed_files(folder) as given:
        names = {str(path.relative_to(given)) for path in given.rglob("*") if path.is_file()}
        assert names == {"optimizer.pt", "inner/state"} and MANIFEST not in names
        assert (given / "inner/state").read_text() == "inner/state"
    with listed_files(None) as given:
        assert given is None


def test_a_field_is_refused_by_name_and_true_is_no_number(tmp_path):
    assert refuse_types({"a": 1}, tmp_path, {"a": float, "b": int}) == {"a": 1}
    for content, kinds in (({"a": True}, {"a": int}), ({"a": float("inf")}, {"a": float}), ({"a": None}, {"a": str})):
        with pytest.raises(ValueError, match="'a' cannot be"):
            refuse_types(content, tmp_path, kinds)
    with pytest.raises(ValueError, match="no field 'b'"):
        refuse_types({}, tmp_path, {}, required=("b",))
