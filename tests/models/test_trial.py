"""The way of a product: tried once, kept for the machine, carried by a run; whichever it is, the same numbers."""

import json

import pytest
import torch
from torch import nn

from rlhf.models import trial

pytestmark = pytest.mark.skipif(not trial.ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    """A machine on which nothing was tried, and a weight of 8 x 6 is a large one."""
    monkeypatch.setattr(trial.constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "LARGE", 48)
    before = trial.in_use()
    trial.use({})
    yield tmp_path / "cache" / "rlhf_kernels.json"
    trial.use(before)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 2))


KEYS = {
    f"{kind} {shape}{side}" for kind in trial.USUAL for shape in ("8x6", "6x8") for side in ("", " transposed")
}  # fmt: skip


def other(key: str) -> str:
    """A way that is not the usual one."""
    return "onednn" if trial.USUAL[key.split()[0]] == "left" else "mkl"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("way", trial.WAYS)
def test_every_way_gives_the_same_numbers(way, rows, bias):
    x = torch.randn(rows, 6)
    weight = torch.randn(8, 6)
    added = torch.randn(8) if bias else None
    expected = torch.nn.functional.linear(x, weight, added)
    found = trial.WAYS[way](x, weight, added)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    torch.testing.assert_close(trial.WAYS[way](expected, weight.T), expected @ weight)


def test_what_is_faster_by_enough_is_taken_and_kept_for_the_machine(model, monkeypatch, own_file):
    asked = []
    monkeypatch.setattr(trial, "fastest", lambda key, weight: asked.append(key) or other(key))
    trial.settle(model)
    assert set(asked) == KEYS and len(asked) == len(KEYS)
    assert trial.in_use() == {key: other(key) for key in KEYS}
    x = torch.randn(9, 6)
    assert trial.way_of(x, model[0].weight) is trial.WAYS["mkl"]
    # The small layer has no way of its own.
    assert trial.way_of(x, model[2].weight) is trial.WAYS["onednn"]

    # The next start, and another model of these shapes, tries nothing.
    trial.use({})
    trial.settle(model)
    assert len(asked) == len(KEYS)
    assert trial.in_use() == {key: other(key) for key in KEYS}
    (machine,) = json.loads(own_file.read_text())
    assert torch.__version__ in machine and f"{torch.get_num_threads()} threads" in machine


@pytest.mark.parametrize("content", ["", "[]", "7", "{", '{"x": 1}'])
def test_a_damaged_file_is_tried_anew(model, monkeypatch, own_file, content):
    own_file.parent.mkdir()
    own_file.write_text(content)
    monkeypatch.setattr(trial, "fastest", lambda key, weight: other(key))
    trial.settle(model)
    assert set(trial.in_use()) == KEYS


def test_where_nothing_can_be_kept_nothing_is_tried(model, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(trial.constants, "HF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(trial, "fastest", None)
    trial.settle(model)
    assert trial.in_use() == {}


@pytest.mark.parametrize(("slow", "expected"), [("onednn", "mkl"), ("mkl", "onednn"), ("neither", "onednn")])
def test_only_a_way_that_saves_enough_replaces_the_usual_one(monkeypatch, slow, expected):
    now = [0.0]

    def taking(seconds):
        def way(x, weight):
            now[0] += seconds

        return way

    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    # A difference of 5 % may be noise.
    seconds = {"mkl": 0.95, "onednn": 1.0, "left": 0.1} | ({slow: 2.0} if slow != "neither" else {})
    monkeypatch.setattr(trial, "WAYS", {name: taking(took) for name, took in seconds.items()})
    assert trial.fastest("many 8x6", torch.randn(8, 6)) == expected


def test_a_model_without_large_weights_in_float32_is_left_alone(monkeypatch):
    monkeypatch.setattr(trial, "_known", None)
    trial.settle(nn.Sequential(nn.Linear(6, 7), nn.Linear(8, 8).to(torch.bfloat16)))
    assert trial.in_use() == {}
