"""Data as people have them: each kind is read for what it is, or says what it is not."""

import gzip
import json
from pathlib import Path

import pytest

from rlhf.data.arguments import DataArguments
from rlhf.data.columns import find_format
from rlhf.data.dialogues import BadRow, Unusable
from rlhf.data.formats import examples
from rlhf.data.reading import load_rows
from rlhf.data.template import DEFAULT_TEMPLATE

GOOD = "把窗户打开，通风5分钟就行。"
BAD = "不知道，你自己想办法0。"
ASKED = "屋里有异味怎么办？第0问"


@pytest.fixture
def cases(shared_data) -> Path:
    return shared_data.parent / "cases" / "data"


def read(file: Path, kind: str, **flags) -> tuple[list[dict], object]:
    args = DataArguments(dataset_name=str(file), prompt_template=DEFAULT_TEMPLATE, **flags)
    return load_rows(str(file), kind, args=args)


def first(file: Path, kind: str, **flags) -> dict:
    row = read(file, kind, **flags)[0][0]
    return {name: row[name] for name in ("prompt", "answer", "chosen", "rejected", "margin") if name in row}


# ---- the shared cases ----
def test_a_context_is_part_of_the_prompt(cases):
    assert first(cases / "dolly.jsonl", "sft") == {"prompt": f"{ASKED}\n材料0：木炭吸味。", "answer": GOOD}


@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_a_system_column_stands_first_in_a_dialogue(cases, kind):
    assert first(cases / "sg_system.jsonl", kind)["prompt"] == f"你只用四个字回答。\n\n{ASKED}"


def test_pairs_and_ppo_ask_the_same_prompt(cases):
    pair = first(cases / "dpo_system.jsonl", "preference")
    assert pair == {"prompt": "你是医生\n\n牙疼", "chosen": "含冰块。", "rejected": "忍着。"}
    assert first(cases / "dpo_system.jsonl", "prompt")["prompt"] == pair["prompt"]


def test_ranked_answers_are_a_pair_and_the_best_is_learnt(cases):
    assert first(cases / "lf_ranked.json", "preference") == {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    rows, _ = read(cases / "lf_ranked.json", "sft")
    assert rows[0]["answer"] == GOOD
    assert len(rows) == len(read(cases / "lf_ranked.json", "preference")[0])


def test_messages_stored_as_text_are_messages(cases):
    pair = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    assert first(cases / "uf_str.csv", "preference") == pair
    assert first(cases / "uf_str.csv", "preference") == pair


def test_turns_on_lines_of_one_instruction_are_turns(cases):
    row = read(cases / "belle_multi.jsonl", "sft")[0][0]
    assert row["turns"] == [("user", ASKED), ("assistant", "多久了？"), ("user", "三天了")]
    assert row["answer"] == GOOD


def test_answers_of_weight_0_are_context_alone(cases):
    rows, _ = read(cases / "openai_weight.jsonl", "sft")
    assert rows[0]["answer"] == GOOD
    assert rows[0]["prompt"].startswith(f"{ASKED}\n\n答：不知道")
    assert not any(row["answer"].startswith("不知道") for row in rows)


def test_a_chosen_dialogue_has_its_own_context(cases):
    rows, _ = read(cases / "sft_chosen_multi.jsonl", "sft", answer_field="chosen")
    assert [(row["prompt"], row["answer"]) for row in rows[:2]] == [
        ("窗子漏风0", "是木窗还是铝窗？"),
        ("窗子漏风0\n\n答：是木窗还是铝窗？\n\n问：木窗", "用毛毡条封上。"),
    ]


def test_a_label_says_which_answer_is_better(cases):
    rows, _ = read(cases / "pku.jsonl", "preference")
    assert all(row["chosen"].startswith("把窗户打开") and row["rejected"].startswith("不知道") for row in rows)


def test_prompts_are_found_in_context_and_by_role(cases):
    asked = read(cases / "hh_cn.jsonl", "prompt")[0]
    assert asked[0]["turns"] == [("user", ASKED), ("assistant", "多久了？"), ("user", "三天。")]
    assert [row["prompt"] for row in asked] == [row["prompt"] for row in read(cases / "hh_cn.jsonl", "preference")[0]]
    prompts, funnel = read(cases / "oasst.jsonl", "prompt")
    assert all(row["prompt"].startswith("屋里有异味") for row in prompts)
    assert funnel.dropped == {"a message that is no prompt": len(prompts)}


def test_compressed_files_links_and_pointers(cases, tmp_path):
    assert len(read(cases / "hh_as_downloaded", "preference")[0]) == 8
    # Made here, because a copy of the cases may hold no link.
    (tmp_path / "part2").symlink_to(cases / "other_disk")
    (tmp_path / "train_1.jsonl").symlink_to(cases / "linked" / "train_1.jsonl")
    assert len(read(tmp_path, "sft")[0]) == 48
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the data: run git lfs pull"):
        read(cases / "lfs.jsonl", "sft")


def test_numbers_parts_tables_and_texts(cases):
    assert first(cases / "openai_parts.jsonl", "sft") == {"prompt": ASKED, "answer": GOOD}
    assert first(cases / "columns.json", "sft") == {"prompt": ASKED, "answer": GOOD}
    assert len(read(cases / "columns.json", "sft")[0]) == 8
    assert len(read(cases / "strings.json", "prompt")[0]) == 8
    assert first(cases / "excel_bom.csv", "sft") == {"prompt": ASKED, "answer": GOOD}
    assert first(cases / "spaces.csv", "sft") == {"prompt": ASKED, "answer": GOOD}
    assert len(read(cases / "two prompts.txt", "prompt")[0]) == 2


# ---- kinds ----
def made(row: dict, kind: str, **named):
    return examples(row, find_format(set(row), kind, named), DEFAULT_TEMPLATE)


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}, "b"),
        ({"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "a"),
        ({"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, "b"),
        ({"context": "p", "response1": "a", "response2": "b", "overall_preference": -2}, "a"),
        ({"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 3}, "b"),
    ],
)
def test_every_known_label_is_read(row, chosen):
    pair = made(row, "preference")[0]
    assert pair == {"prompt": "p", "chosen": chosen, "rejected": "ab".replace(chosen, "")}


def test_dialogues_of_an_arena_are_pairs_and_ties_are_counted():
    def dialogue(answer):
        return [{"role": "user", "content": "p"}, {"role": "assistant", "content": answer}]

    row = {"conversation_a": dialogue("a"), "conversation_b": dialogue("b"), "winner": "model_b"}
    assert made(row, "preference") == [{"prompt": "p", "chosen": "b", "rejected": "a"}]
    with pytest.raises(Unusable, match="neither answer is preferred"):
        made(row | {"winner": "tie"}, "preference")


def test_columns_that_nobody_reads_are_named_in_the_funnel(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "p", "answer": "a", "persona": "x", "id": 3}) + "\n", encoding="utf-8")
    _, funnel = read(file, "sft")
    assert "(not read: persona)" in funnel.table()


def test_tool_turns_and_pictures_are_counted_and_a_number_that_is_none_is_named():
    messages = [
        {"role": "user", "content": "p"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(Unusable, match="a turn of a tool"):
        made({"messages": messages}, "sft")
    pictured = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(Unusable, match="holds more than text"):
        made({"messages": pictured}, "sft")
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "m": "1.5"}
    assert made(pair, "preference", margin="m")[0]["margin"] == 1.5
    with pytest.raises(BadRow, match="must be a number, not 'much'"):
        made(pair | {"m": "much"}, "preference", margin="m")


def test_tags_inside_a_text_with_two_new_lines_stay_as_they_were():
    row = {"prompt": "\n\nHuman: a\nHuman: is a word\n\nAssistant:", "chosen": "x", "rejected": "y"}
    assert made(row, "preference")[0]["prompt"] == "a\nHuman: is a word"


@pytest.mark.parametrize("mark", [";", "\t"])
def test_tables_separated_otherwise_are_read(tmp_path, mark):
    file = tmp_path / "a.csv"
    file.write_text(f'prompt{mark}answer\n"一；二"{mark}三\n', encoding="utf-8")
    assert first(file, "sft") == {"prompt": "一；二", "answer": "三"}


def test_a_compressed_file_that_is_cut_or_none_is_named(tmp_path):
    whole = gzip.compress(b'{"prompt": "p", "answer": "a"}\n' * 100)
    for name, content in (("cut", whole[: len(whole) // 2]), ("none", b"not gzip")):
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no whole gzip file"):
            read(file, "sft")


def test_a_link_that_leads_back_is_walked_once(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "p", "answer": "a"}\n', encoding="utf-8")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(read(tmp_path, "sft")[0]) == 1


def test_splits_by_the_names_of_the_hub(tmp_path):
    for split in ("train_prefs", "test_prefs"):
        (tmp_path / f"{split}-00000-of-00001.jsonl").write_text('{"prompt": "p", "answer": "a"}\n', encoding="utf-8")
    assert len(read(tmp_path, "sft")[0]) == 1
    with pytest.raises(ValueError, match=r"has no split 'train': it has test_prefs, train_prefs, train_sft"):
        (tmp_path / "train_sft-00000-of-00001.jsonl").write_text('{"prompt": "p", "answer": "a"}\n', encoding="utf-8")
        read(tmp_path, "sft")
