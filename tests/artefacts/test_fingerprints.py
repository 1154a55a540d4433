"""Fingerprints see whatever changes the computation, and nothing else; older ones are compared as far as they go."""

import json
import os
import shutil
from pathlib import Path

import pytest
from adapters import random_adapter
from safetensors.torch import load_file, save_file

from rlhf.artefacts.adapters import check_adapter
from rlhf.artefacts.fingerprints import base_fingerprint, parent_entry, same_base, same_parent
from rlhf.artefacts.resume import _other_versions
from rlhf.artefacts.run_json import load_run
from rlhf.rl.gate import stored_audit


@pytest.fixture
def base(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"attention_bias": True},
    ],
)
def test_a_base_that_computes_otherwise_is_another_one(base, fields):
    before = base_fingerprint(str(base))
    change(base / "config.json", **fields)
    assert set(same_base(before, base_fingerprint(str(base)))) == {"config"}


def test_what_changes_no_computation_changes_no_fingerprint(base):
    before = base_fingerprint(str(base))
    change(
        base / "config.json", transformers_version="9.9", use_cache=False, _name_or_path="elsewhere", dtype="float16"
    )
    assert same_base(before, base_fingerprint(str(base))) == {}


@pytest.mark.parametrize("row", [0, 8, -1])
def test_weights_are_sampled_from_all_parts_of_a_tensor(base, row):
    before = base_fingerprint(str(base))
    file = base / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    # The sampled rows of 64 are the first, the last and two between them.
    place = {0: 0, 8: 21, -1: 63}[row]
    weights[name][place] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert "rows" in same_base(before, base_fingerprint(str(base)))


def test_a_fingerprint_of_an_older_version_is_compared_as_far_as_it_goes(base, tmp_path):
    now = base_fingerprint(str(base))
    older = {name: value for name, value in now.items() if name not in ("rows", "config")}
    assert same_base(older, now) == {}
    assert same_base(older | {"hidden_size": 1}, now) == {"hidden_size": (1, now["hidden_size"])}

    adapter = Path(random_adapter(str(base), tmp_path / "sft"))
    run = load_run(adapter) | {"base": older}
    (adapter / "run.json").write_text(json.dumps(run))
    assert check_adapter(adapter, stage="sft", base=now)["stage"] == "sft"
    change(base / "config.json", rms_norm_eps=1e-3)
    assert check_adapter(adapter, stage="sft", base=base_fingerprint(str(base)))["stage"] == "sft"
    (adapter / "run.json").write_text(json.dumps(run | {"base": now}))
    with pytest.raises(ValueError, match="another base config"):
        check_adapter(adapter, stage="sft", base=base_fingerprint(str(base)))


def test_a_doubled_alpha_is_another_adapter_for_every_role(tiny_llama, tmp_path):
    adapter = Path(random_adapter(tiny_llama, tmp_path / "reward", "reward", 1))
    entry = parent_entry(adapter)
    content = {"verdict": {"winning": {}}, "adapter": entry["adapter"], "config": entry["config"]}
    (adapter / "audit.json").write_text(json.dumps(content))
    assert same_parent(entry, adapter) and stored_audit(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    # Another order of the same modules is the same adapter.
    change(adapter / "adapter_config.json", target_modules=config["target_modules"][::-1])
    assert same_parent(entry, adapter)

    change(adapter / "adapter_config.json", lora_alpha=16)
    assert not same_parent(entry, adapter) and stored_audit(adapter) is None
    # An entry of an older version knows the weights alone.
    assert same_parent({"adapter": entry["adapter"]}, adapter)


def test_a_merged_model_has_a_fingerprint_as_a_parent_too(base):
    entry = parent_entry(base)
    assert entry["adapter"] and entry["config"] is None
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert not same_parent(entry, base)


def test_other_library_versions_are_said():
    said = _other_versions({"versions": {"torch": "1.0"}})
    assert len(said) == 1 and said[0].startswith("torch (was 1.0, is ")
    assert _other_versions({}) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_what_is_written_follows_the_umask(tiny_llama, tmp_path, monkeypatch, umask):
    monkeypatch.setattr("rlhf.artefacts.files.UMASK", umask)
    before = os.umask(umask)
    try:
        adapter = Path(random_adapter(tiny_llama, tmp_path / "sft"))
    finally:
        os.umask(before)
    for file in adapter.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name
