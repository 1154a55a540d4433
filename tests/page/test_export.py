"""Votes become data: what reward_modeling.py, sft_training.py and the audit read, every vote accounted for."""

import json

import pytest
from pages import answer_rows, filled, give, prompts, write_rows
from stages import words, write_pairs
from test_results import vote as bare_vote

import playground
import reward_modeling
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer, preference_rows
from rlhf.data.funnel import Funnel
from rlhf.data.reading import load_rows
from rlhf.page import export
from rlhf.reward.audit import make_attacks
from rlhf.reward.bad_answers import read, with_bad_answers


def vote(pair: int, person: str, choice: str, **more) -> dict:
    texts = [(version, f"{version} {pair}", 0.0) for version in ("sft", "ppo")]
    return bare_vote(pair, person, choice, *texts) | {"edited": None, "margin": None} | more


def test_every_vote_is_accounted_for():
    votes = [
        vote(1, "a", "first", margin=3), vote(1, "b", "first"), vote(1, "c", "second", margin=3),
        vote(2, "a", "second"), vote(3, "a", "tie"), vote(4, "a", "bad"), vote(5, "a", "skip"),
        vote(6, "a", "first"), vote(6, "b", "second"), vote(7, "a", "second", first_text=" "),
        vote(8, "a", "first", edited="更好的回答"),
    ]  # fmt: skip
    made = export.collect(votes)
    assert made.pairs == [
        {"prompt": "1", "chosen": "sft 1", "rejected": "ppo 1", "margin": 1.5},
        {"prompt": "2", "chosen": "ppo 2", "rejected": "sft 2", "margin": 0.0},
        {"prompt": "8", "chosen": "sft 8", "rejected": "ppo 8", "margin": 0.0},
    ]
    assert made.sft == [{"prompt": "8", "answer": "更好的回答"}]
    assert made.bad == [{"prompt": "4", "answer": "sft 4"}, {"prompt": "4", "answer": "ppo 4"}]
    assert made.funnel == {
        "votes": 11, "skips": 1, "repeated": 3, "contradicted": 2, "ties": 1, "bad": 1, "undecided": 1, "empty": 1,
        "pairs": 3, "edited": 1, "bad_answers": 2,
    }  # fmt: skip
    count = made.funnel
    fates = ("ties", "bad", "undecided", "empty", "pairs")
    assert count["votes"] == count["skips"] + count["repeated"] + sum(count[name] for name in fates)


def test_too_few_pairs_are_refused_and_nothing_is_written(tmp_path):
    file = tmp_path / "out" / "pairs.jsonl"
    with pytest.raises(ValueError, match="make 1 pairs, and --min_pairs asks for 3: vote on at least 2 more"):
        export.write([vote(1, "a", "first")], file, 3)
    assert not file.parent.exists()


def test_files_of_an_export_before_do_not_stay_beside_a_new_one(tmp_path):
    file = tmp_path / "pairs.jsonl"
    export.write([vote(1, "a", "first", edited="x"), vote(2, "a", "bad")], file, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_answers.jsonl", "pairs.jsonl", "sft.jsonl"]
    export.write([vote(1, "a", "first")], file, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_the_stages_read_what_is_exported(tmp_path):
    votes = [vote(number, "a", ("first", "second")[number % 2]) for number in range(10)]
    votes += [vote(20, "a", "bad"), vote(21, "a", "first", edited="改过", margin=2)]
    file = tmp_path / "pairs.jsonl"
    made = export.write(votes, file, 1)
    args = reward_modeling.parse_args(["--dataset_name", str(file), "--margin_field", "margin"])
    rows, funnel = load_rows(str(file), "preference", args=args)
    assert (funnel.read, len(rows)) == (11, 11) and not funnel.dropped
    assert [row["margin"] for row in rows] == [0.0] * 10 + [2.0]
    assert (rows[1]["chosen"], rows[1]["rejected"]) == ("ppo 1", "sft 1")
    sft, _ = load_rows(str(tmp_path / "sft.jsonl"), "sft")
    assert (sft[0]["prompt"], sft[0]["answer"]) == ("21", "改过")
    # The command that is shown parses, and names what was written.
    command = export.training_command(made, file, "base")
    parsed = reward_modeling.parse_args(command.split()[2:])
    assert parsed.bad_answers == str(tmp_path / "bad_answers.jsonl") and parsed.margin_field == "margin"


def test_conversations_are_exported_as_messages_that_teach_the_last_answer_alone(tmp_path):
    turns = json.dumps([["user", "你好"], ["assistant", "好"], ["user", "再见"]], ensure_ascii=False)
    votes = [
        vote(1, "a", "first"),
        vote(2, "a", "second", turns=turns, edited="再见啦"),
        vote(3, "a", "bad", turns=turns),
    ]
    file = tmp_path / "pairs.jsonl"
    export.write(votes, file, 1)
    rows, _ = load_rows(str(file), "preference")
    assert [len(row.get("turns") or [1]) for row in rows] == [1, 3]
    sft, _ = load_rows(str(tmp_path / "sft.jsonl"), "sft")
    assert [row["answer"] for row in sft] == ["再见啦"]
    assert len(read(str(tmp_path / "bad_answers.jsonl"))) == 1


def test_bad_answers_are_one_more_kind_of_attack(tiny_base, tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", 12)
    rows, _ = load_rows(source, "preference")
    prompt_format = text_format(load_tokenizer(tiny_base))
    pairs = list(preference_rows(prompt_format, rows, 128, Funnel()))
    own = pairs[0]["prompt"]
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": own, "answer": "一"}, {"prompt": "别的", "answer": "二"}])
    attacks = make_attacks(with_bad_answers(pairs, read(bad)), prompt_format, 0, 128, 12)
    texts = {}
    for kind, number, row in attacks:
        if kind == "bad_answer":
            texts[number] = prompt_format.decode(row[len(pairs[number]["query_ids"]) :])
    # To its own prompt there is one; the others get any of both.
    assert len(texts) == 12 and texts[0] == "一" and set(texts.values()) == {"一", "二"}
    # The other attacks are the same bytes with and without.
    without = make_attacks(pairs, prompt_format, 0, 128, 12)
    assert [attack for attack in attacks if attack[0] != "bad_answer"] == without


def test_the_command_line_exports_and_says_what_became_of_the_votes(tmp_path, capsys):
    page = filled(tmp_path / "page", answer_rows(prompts(3)))
    for shown in page.plan.next("me", "tab", 3):
        give(page.plan, "me", "left", shown.pair)
    page.store.note("base", "some/base")
    page.store.close()
    flags = {"output_dir": tmp_path / "page", "export_pairs": tmp_path / "out" / "pairs.jsonl", "min_pairs": 3}
    playground.main(playground.parse_args(words(flags)))
    said = capsys.readouterr().out
    assert "3 votes" in said and "3 pairs in pairs.jsonl" in said
    assert "next: python reward_modeling.py --model_name some/base" in said and "--dataset_name" in said
    assert len((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="make 3 pairs"):
        playground.main(playground.parse_args(words(flags | {"min_pairs": 4})))
    with pytest.raises(FileNotFoundError, match=r"holds no votes\.sqlite"):
        playground.main(playground.parse_args(words(flags | {"output_dir": tmp_path / "nowhere"})))
