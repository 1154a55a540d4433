"""--best_of in the audit: answers, scores and curve by their definitions, the same bytes after a kill, SFT rows."""

import json
from pathlib import Path

import pytest
import torch
from adapters import random_adapter, that_ends
from forked import KILL, TERM, Stage
from stages import words, write_lines, write_pairs

import reward_modeling
import sft_training
from rlhf.artefacts.fingerprints import adapter_hash
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora, score_head_of
from rlhf.models.scoring import score
from rlhf.reward import best_of, best_of_report
from rlhf.reward.best_of_n import best_of_n
from rlhf.reward.best_of_report import sentence

FILES = ("best_of_n.jsonl", "best_of_n.json", "audit.json", "audit.md")


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory) -> str:
    return that_ends(tiny_base, tmp_path_factory.mktemp("ends") / "base")


@pytest.fixture
def command(base, tmp_path) -> dict:
    """Flags of an audit with best of 5, whose reward adapter is in a directory of its own."""
    return {
        "model_name": base, "dataset_name": write_pairs(tmp_path / "pairs.jsonl", 24), "eval_size": 8,
        "audit_only": True, "audit_prompts": 4, "per_device_eval_batch_size": 8, "best_of": 5, "best_of_prompts": 4,
        "output_max_length": 6, "reward_model_lora_path": random_adapter(base, tmp_path / "reward", "reward", 1),
        "sft_model_lora_path": random_adapter(base, tmp_path / "sft", scale=0.3),
        "judge_lora_path": random_adapter(base, tmp_path / "judge", "reward", 2),
    }  # fmt: skip


def run(command: dict, **changed) -> Path:
    flags = {name: value for name, value in (command | changed).items() if value is not None}
    reward_modeling.main(reward_modeling.parse_args(words(flags)))
    return Path(flags["reward_model_lora_path"])


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "best_of_n.jsonl").read_text(encoding="utf-8").splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def plain_scores(base: str, adapter: str, row: dict) -> list[float]:
    """The scores of one prompt's answers, each alone on a base with this adapter only."""
    model, rest = add_lora(load_base(base, torch.float32), adapter, "reward", trainable=False)
    prompt_format = text_format(load_tokenizer(base))
    scores = []
    for answer in row["answers"]:
        query, ids = prompt_format.encode_answer([("user", row["prompt"])], answer)
        ids = torch.tensor([query + ids])
        with torch.no_grad():
            head = score_head_of(rest, adapter)
            scores.append(score(model.eval().get_base_model().model, head, ids, torch.ones_like(ids)).item())
    return scores


def test_the_audit_follows_the_best_of_n_and_says_what_it_means(command, base, capsys):
    folder = run(command, output_max_length=40)
    rows = lines_of(folder)
    assert len({row["prompt"] for row in rows}) == 4
    assert {len(row["answers"]) for row in rows} == {len(row["scores"]) for row in rows} == {5}
    # An answer that ended by itself has the ids that its text is encoded to, where those are unique: most are.
    for flag, name in (("reward_model_lora_path", "scores"), ("judge_lora_path", "judged")):
        plain = plain_scores(base, command[flag], rows[0])
        close = [abs(one - two) < 1e-4 for one, two in zip(plain, rows[0][name], strict=True)]
        assert any(close), (plain, rows[0][name])

    found = json.loads((folder / "best_of_n.json").read_text(encoding="utf-8"))
    scores = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
    judged = torch.tensor([row["judged"] for row in rows], dtype=torch.float64)
    assert [row["n"] for row in found["curve"]] == [1, 2, 4, 5]
    assert found["adapter"] == adapter_hash(folder)
    for row in found["curve"]:
        assert row["score"] == pytest.approx(best_of_n(scores, scores, row["n"]).mean().item())
        assert row["judged"] == pytest.approx(best_of_n(scores, judged, row["n"]).mean().item())
    report = (folder / "audit.md").read_text(encoding="utf-8")
    assert f"- note: {sentence(found)}" in report
    assert "## Best of n, over 4 prompts" in report and "![best_of_n.png](best_of_n.png)" in report
    assert (folder / "best_of_n.png").stat().st_size > 10_000
    assert "best of n: " in capsys.readouterr().out


def test_answers_are_the_sft_models_and_depend_on_no_other_prompt(command):
    four = lines_of(run(command))
    two = lines_of(run(command, best_of_prompts=2))
    assert [row["answers"] for row in two] == [row["answers"] for row in four[:2]]
    # Scores differ by rounding, because other rows share their batch.
    assert two[0]["scores"] == pytest.approx(four[0]["scores"], abs=1e-4)
    other_seed = lines_of(run(command, seed=1, best_of_prompts=2))
    assert {tuple(row["answers"]) for row in other_seed}.isdisjoint(tuple(row["answers"]) for row in four)
    base = lines_of(run(command, sft_model_lora_path=None, judge_lora_path=None, best_of_prompts=2))
    assert [row["prompt"] for row in base] == [row["prompt"] for row in four[:2]]
    assert [row["answers"] for row in base] != [row["answers"] for row in four[:2]]
    assert "judged" not in base[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "target"),
    [
        (KILL, "rlhf.reward.best_of:_sample"),
        (TERM, "rlhf.models.generation:_choose"),
        (KILL, "rlhf.reward.best_of:_write"),
    ],
)
def test_a_killed_audit_given_again_writes_the_same_bytes(zygote, command, signum, target):
    flags = {name: value for name, value in command.items() if name != "audit_only"}
    stage = Stage("reward_modeling", flags | {"audit_only": True}, "checkpoint-")
    out = Path(command["reward_model_lora_path"])
    call = 1 if "_write" in target else 3
    struck = zygote.run(stage, out / "unused", signum=signum, target=target, when="before", call=call)
    assert struck == 128 + signum, zygote.said()[-3000:]
    assert not (out / "best_of_n.json").exists()
    assert zygote.run(stage, out / "unused") == 0, zygote.said()[-3000:]
    again = bytes_of(out)
    for name in FILES:
        (out / name).unlink()
    run(command)
    assert bytes_of(out) == again


def test_the_best_answers_become_sft_rows_that_the_sft_stage_reads(command, base, tmp_path):
    file = tmp_path / "best.jsonl"
    folder = run(command, write_best=file, output_max_length=40, best_of=8)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    by_prompt = {row["prompt"]: row for row in lines_of(folder)}
    assert rows
    for row in rows:
        assert row["answer"] in by_prompt[row["prompt"]]["answers"]
    args = sft_training.parse_args(words({"model_name": base, "dataset_name": file, "eval_size": 0}))
    read = sft_training.load_data(args, text_format(load_tokenizer(base)))[0]
    assert len(read) == len(rows)


def test_of_the_answers_that_ended_the_best_is_taken_and_dialogues_stay_dialogues():
    prompts = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "c", "turns": [("user", "x"), ("assistant", "y"), ("user", "z")]},
    ]
    texts = [["one", "two", "cut"], ["", "cut", "cut"], ["three", "four", "five"]]
    scores = torch.tensor([[1.0, 2.0, 9.0], [5.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
    ended = [[True, True, False], [True, False, False], [True, True, True]]
    plain = best_of.best_rows(prompts, texts, scores, ended, is_chat=False)
    assert plain == [{"prompt": "a", "answer": "two"}, {"prompt": "c", "answer": "three"}]
    chat = best_of.best_rows(prompts, texts, scores, ended, is_chat=True)
    assert [turn["content"] for turn in chat[1]["messages"]] == ["x", "y", "z", "three"]
    assert [turn.get("weight") for turn in chat[1]["messages"]] == [0, 0, 0, None]
    # Of the whole dialogue the new answer alone is learnt.
    from rlhf.data.columns import find_format
    from rlhf.data.formats import examples

    fmt = find_format({"messages"}, "sft", {})
    assert [row["answer"] for row in examples(chat[1], fmt, "chat")] == ["three"]


def curves(judged_of) -> dict:
    torch.manual_seed(0)
    scores = torch.randn(200, 16, dtype=torch.float64)
    return best_of.summary(scores, None if judged_of is None else judged_of(scores))


@pytest.mark.parametrize(
    ("judged_of", "said"),
    [
        (None, "only a judge can say"),
        (lambda scores: scores + 0.1 * torch.randn_like(scores), "up to n = 16 (1.8 nats) at least"),
        (lambda scores: torch.where(scores > 1.5, -3.0, scores), "trust this reward model up to n = "),
        (lambda scores: -scores, "cannot be trusted at all"),
        (lambda scores: torch.randn_like(scores), "neither gain nor loss"),
    ],
)
def test_one_sentence_says_how_far_the_reward_model_can_be_trusted(judged_of, said, tmp_path):
    found = curves(judged_of)
    assert said in sentence(found)
    json.dumps(found, allow_nan=False)
    best_of_report.draw(found, tmp_path / "chart.png")


def test_sizes_are_powers_of_two_and_the_number_itself():
    assert best_of.sizes(64) == (1, 2, 4, 8, 16, 32, 64)
    assert best_of.sizes(5) == (1, 2, 4, 5)
    assert best_of.sizes(2) == (1, 2)


@pytest.mark.parametrize(
    ("changed", "words_of_it"),
    [
        ({"audit_only": None, "reward_model_lora_path": None}, "--best_of asks a trained reward model"),
        ({"best_of": 1}, "--best_of 1 must be at least 2"),
        ({"best_of": None}, "is for the answers of --best_of"),
        ({"best_of_prompts": 0}, "--best_of_prompts 0"),
        ({"write_best": "rows.txt"}, "must be the name of a .jsonl file"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(command, capsys, changed, words_of_it):
    flags = {name: value for name, value in (command | changed).items() if value is not None}
    with pytest.raises(SystemExit):
        reward_modeling.parse_args(words(flags))
    assert words_of_it in capsys.readouterr().err


def test_a_judge_that_is_the_reward_model_and_data_that_would_be_replaced_are_refused(command, capsys):
    with pytest.raises(ValueError, match="the reward model itself"):
        run(command, judge_lora_path=command["reward_model_lora_path"])
    with pytest.raises(ValueError, match="is of stage 'sft', but reward is wanted"):
        run(command, judge_lora_path=command["sft_model_lora_path"])
    with pytest.raises(SystemExit):
        run(command, write_best=command["dataset_name"])
    assert "would replace the data" in capsys.readouterr().err


def test_prompts_are_asked_once_each_and_drawn_by_the_seed(tmp_path):
    rows = [{"prompt": f"p{number % 6}"} for number in range(30)]
    drawn = best_of.draw_prompts(rows, 4, seed=0)
    assert len({row["prompt"] for row in drawn}) == len(drawn) == 4
    assert best_of.draw_prompts(rows, 4, seed=0) == drawn
    assert best_of.draw_prompts(rows, 4, seed=1) != drawn
    assert len(best_of.draw_prompts(rows, -1, seed=0)) == 6
    assert write_lines(tmp_path / "x.jsonl", rows)
