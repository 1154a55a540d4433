"""Ready reward functions on small cases, and what is made of functions that do not keep their promise."""

import math

import pytest
import torch

from rlhf.reward.functions import exact_answer, overlong, pattern, repetition
from rlhf.rl.reward_functions import READY, call_function, load_functions

OWN = """
import time

def brevity(prompts, responses, rows):
    return [-len(response) for response in responses]

def suffix(prompts, responses, rows, text):
    return [response.endswith(text) for response in responses]

def sometimes(prompts, responses, rows):
    return [None if row.get("skip") else 1 for row in rows]

def raises(prompts, responses, rows):
    return [1 / row["zero"] for row in rows]

def too_few(prompts, responses, rows):
    return [1.0]

def a_text(prompts, responses, rows):
    return [0.5, "good"]

def not_a_number(prompts, responses, rows):
    return [0.5, float("nan")]

def a_number(prompts, responses, rows):
    return 1

def slow(prompts, responses, rows):
    time.sleep(60)
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(OWN)
    return file


def scored(spec: str, responses: list[str], rows: list[dict], **more) -> list[float]:
    (function,) = load_functions([spec])
    return call_function(function, ["?"] * len(responses), responses, rows, **more).tolist()


def test_ready_functions_score_small_cases():
    rows = [{"response_tokens": tokens, "max_tokens": 100} for tokens in (1, 80, 90, 100)]
    assert overlong([], [""] * 4, rows) == pytest.approx([0, 0, -0.5, -1])
    assert repetition([], ["a b c d", "a b c a b c", "好好好好好", "", "a b"], []) == pytest.approx(
        [0, -0.25, -2 / 3, 0, 0]
    )
    answers = [
        ("so 3 + 4 = 7.", "7", 1), ("17", "7", 0), (r"\boxed{1,234} of 5", "1234", 1), ("… #### 12\n", 12, 1),
        ("Paris.", "paris", 1), ("It is Paris", "Paris", 0), ("２５", "25", 1), ("", "7", 0), ("-3.50", "-3.5", 1),
    ]  # fmt: skip
    for response, answer, expected in answers:
        assert exact_answer(["?"], [response], [{"answer": answer}]) == [expected], response
    assert pattern([], ["ab1", "ab"], [{"pattern": r"\d"}] * 2) == [1, 0]
    assert pattern([], ["ab1", "ab"], [{}, {}], "^ab$") == [0, 1]
    with pytest.raises(ValueError, match="row 0 has no column `answer`"):
        exact_answer(["?"], ["x"], [{}])


def test_functions_of_a_file_are_called_with_the_batch_and_the_text_behind_the_equals_sign(own):
    assert scored(f"{own}:brevity", ["ab", ""], [{}, {}]) == [-2, 0]
    assert scored(f"{own}:suffix=!", ["ab!", "ab"], [{}, {}]) == [1, 0]
    first, second = scored(f"{own}:sometimes", ["a", "b"], [{"skip": True}, {}])
    assert math.isnan(first)
    assert second == 1
    assert scored("pattern=^a", ["ab", "b"], [{}, {}]) == [1, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "reward function raises failed: KeyError: 'zero' at rewards.py:"),
        ("too_few", "gave 1 scores for 2 responses"),
        ("a_text", "gave 'good' for row 1 ('two')"),
        ("not_a_number", "gave nan for row 1 ('two')"),
        ("a_number", "gave int for 2 responses"),
        ("slow", "took longer than --reward_timeout 0.2 seconds"),
    ],
)
def test_a_function_that_breaks_its_promise_is_named_with_row_and_value(own, name, words):
    with pytest.raises(ValueError) as told:
        scored(f"{own}:{name}", ["one", "two"], [{}, {}], timeout=0.2)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_what_cannot_be_found_or_run_is_one_sentence(own, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nraise RuntimeError('no')\n")
    for specs, words in (
        (["brevity"], f"write FILE:FUNCTION, or one of the ready ones: {', '.join(READY)}"),
        ([f"{own}:missing"], "has no function missing; it has brevity"),
        (["gone.py:x"], "there is no file gone.py"),
        ([f"{broken}:x"], "cannot be run (RuntimeError: no at broken.py:2)"),
        ([f"{own}:brevity", f"{own}:brevity"], "names brevity twice"),
    ):
        with pytest.raises(ValueError) as told:
            load_functions(specs)
        assert words in str(told.value)


def test_the_file_is_known_again_by_its_contents(own):
    (before,) = load_functions([f"{own}:brevity"])
    own.write_text(OWN + "\n# another comment\n")
    (after,) = load_functions([f"{own}:brevity"])
    assert before.sha256 != after.sha256
    assert before.name == after.name == "brevity"


def test_a_tensor_counts_as_a_list(own):
    own.write_text("import torch\n\ndef tensor(prompts, responses, rows):\n    return torch.ones(len(rows))\n")
    assert scored(f"{own}:tensor", ["a", "b"], [{}, {}]) == [1, 1]
    assert torch.is_tensor(call_function(load_functions(["repetition"])[0], ["?"], ["a"], [{}]))
