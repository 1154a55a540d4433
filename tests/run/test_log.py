"""The records of a run survive whatever an answer holds, and damaged files are named."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf.artefacts import fingerprints, run_json
from rlhf.artefacts.files import load_tensors
from rlhf.artefacts.resume import _other_inputs
from rlhf.rl.charts import overoptimization
from rlhf.rl.evaluation import is_best
from rlhf.run.log import MetricsLog, read_lines


def test_answers_with_separators_of_unicode_are_read_back_and_kept_on_resume(tmp_path):
    said = "one\u2028two\u2029three\u0085four\x0bfive"
    log = MetricsLog(tmp_path)
    rows = [{"step": 1, "query": "q", "response": said}, {"step": 1, "query": "q", "response": "plain"}]
    log.write_samples(rows, shown=0)
    assert read_lines(tmp_path / "samples.jsonl") == rows
    MetricsLog(tmp_path, done=1)
    assert read_lines(tmp_path / "samples.jsonl") == rows


@pytest.mark.parametrize("value", [1e-9, 1.25e-12, 0.1, 123456.789, 3.0e20, float(np.float32(1 / 3))])
def test_a_number_of_any_size_is_logged_with_its_digits(tmp_path, value):
    MetricsLog(tmp_path).write({"step": 1, "lr": value})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "lr": pytest.approx(value, rel=1e-8, abs=0)}]


def test_a_line_cut_by_a_crash_ends_the_records(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(tmp_path / "x.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "content", [b"abc", b"", b"\x80\x02", b"PK\x03\x04", b"}q\x00.", b"\x80\x02]q\x00.", b"cos\nsystem\n."]
)
def test_rubbish_in_place_of_tensors_is_named_in_one_sentence(tmp_path, content):
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        load_tensors(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="something else than tensors"):
        load_tensors(file)


@pytest.mark.parametrize("failure", [subprocess.TimeoutExpired("git", 10), FileNotFoundError()])
def test_a_git_that_hangs_or_is_missing_leaves_the_commit_unknown(monkeypatch, failure):
    def run(*given, **settings):
        raise failure

    monkeypatch.setattr(run_json.subprocess, "run", run)
    assert run_json._git_commit() is None
    monkeypatch.setattr(run_json.subprocess, "run", lambda *given, **settings: SimpleNamespace(stdout="rubbish\n"))
    assert run_json._git_commit() is None


def test_an_evaluation_that_is_no_number_is_never_the_best_and_spoils_no_picture():
    loop = SimpleNamespace(best={}, baseline={}, args=SimpleNamespace(judge_lora_path=None, best_kl_budget=10.0))
    measured = {"eval/kl/mean": 1.0, "eval/score/error": 0.1}
    assert not is_best(loop, measured | {"eval/score/mean": float("nan")}, 1)
    assert is_best(loop, measured | {"eval/score/mean": 0.5}, 2)
    assert not is_best(loop, measured | {"eval/score/mean": float("inf")}, 3)

    start = {"eval_start/kl/mean": 0.0, "eval_start/score/mean": 0.1, "step": 1}
    rows = [start, measured | {"step": 2, "eval/score/mean": "nan"}, measured | {"step": 3, "eval/score/mean": 0.4}]
    distance, gain = overoptimization(rows)["proxy"]
    np.testing.assert_allclose((distance, gain), ([1.0], [0.3]))


def test_a_judge_that_is_left_out_on_resume_is_a_change(tmp_path):
    for role in ("sft", "judge"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "adapter_model.safetensors").write_bytes(role.encode())
    hashes = {role: {"adapter": fingerprints.adapter_hash(tmp_path / role)} for role in ("sft", "judge")}
    before = {"data": {}, "base": {}, "parents": hashes}
    same = {"data": {}, "base": {}, "parents": {role: str(Path(tmp_path) / role) for role in ("sft", "judge")}}
    assert _other_inputs(before, same) == []
    without = same | {"parents": {"sft": str(tmp_path / "sft")}}
    assert _other_inputs(before, without) == ["the judge adapter"]
