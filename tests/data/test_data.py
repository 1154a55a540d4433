"""Sources, faults, counts, splits, token ids and batches: nothing is lost uncounted, nothing bad gets through."""

import csv
import json
import random
import shutil

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from rlhf.artefacts.fingerprints import padding_id
from rlhf.data import sources
from rlhf.data.arguments import SFT_DATASET, DataArguments
from rlhf.data.batches import LengthGroupedSampler, collate_prompts
from rlhf.data.choose_format import text_format
from rlhf.data.control_tokens import continuation, encode
from rlhf.data.encoding import load_tokenizer, preference_rows, prompt_rows, sft_rows
from rlhf.data.funnel import Funnel, split_eval, subset
from rlhf.data.inspection import inspect_rows
from rlhf.data.reading import data_fingerprint, load_rows, load_splits
from rlhf.data.template import DEFAULT_TEMPLATE, render
from rlhf.reward.pairs import PairCollator

SFT = [{"prompt": f"问题{n}", "answer": f"回答{n}"} for n in range(6)]
PAIRS = [{"prompt": f"问题{n}", "chosen": f"好{n}", "rejected": f"坏{n}"} for n in range(6)]
SKIP = DataArguments(bad_rows="skip")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(rows):
    return [{key: value for key, value in row.items() if key not in ("where", "opening")} for row in rows]


def places(rows, source):
    return [row["where"].removeprefix(f"{source}:") for row in rows]


# ---- sources ----
def write_json(path):
    path.write_text(json.dumps(SFT, ensure_ascii=False, indent=2), encoding="utf-8")


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(SFT)


def write_parquet(path):
    datasets.Dataset.from_list(SFT).to_parquet(str(path))


@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [
        ("a.jsonl", lambda path: write_lines(path, SFT), "1 2 3 4 5 6"),
        ("lines.json", lambda path: write_lines(path, SFT), "1 2 3 4 5 6"),
        ("a.json", write_json, "2 6 10 14 18 22"),
        ("a.csv", write_csv, "2 3 4 5 6 7"),
        ("a.parquet", write_parquet, "1 2 3 4 5 6"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_with_their_lines(tmp_path, name, write, lines):
    path = tmp_path / name
    write(path)
    rows, funnel = load_rows(str(path), "sft")
    assert texts(rows) == SFT
    assert places(rows, path) == lines.split()
    assert funnel.as_dict() == {"read": 6, "expanded": 0, "kept": 6, "dropped": {}}


def test_csv_cells_may_hold_lines_and_long_answers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,answer\n"一\n二",三\n四,{"长" * 150_000}\n', encoding="utf-8")
    rows, _ = load_rows(str(path), "sft")
    assert places(rows, path) == ["2", "4"]
    assert rows[0]["prompt"] == "一\n二"


def test_save_to_disk_directories_are_read_with_their_splits(tmp_path):
    table = datasets.Dataset.from_list(SFT)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "two"))
    assert texts(load_rows(str(tmp_path / "one"), "sft")[0]) == SFT
    rows, _ = load_rows(str(tmp_path / "two"), "sft", "test")
    assert places(rows, tmp_path) == [f"{tmp_path}/two[test]:1"]
    with pytest.raises(ValueError, match="has no split 'dev': it has test, train"):
        load_rows(str(tmp_path / "two"), "sft", "dev")


def test_a_directory_of_data_files_has_the_splits_of_its_names(tmp_path):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train-00000-of-00002.jsonl", SFT[:2])
    write_lines(tmp_path / "data" / "train-00001-of-00002.jsonl", SFT[2:4])
    write_lines(tmp_path / "data" / "test-00000-of-00001.jsonl", SFT[4:])
    train, evaluation, funnel = load_splits(DataArguments(dataset_name=str(tmp_path)), "sft", seed=0)
    assert texts(train) == SFT[:4]
    assert texts(evaluation) == SFT[4:]
    assert funnel.kept == 6


def test_hc3_chinese_is_read_from_its_data_file_not_by_its_script(tmp_path, monkeypatch):
    asked = []
    local = write_lines(tmp_path / "all.jsonl", [{"question": "问", "chatgpt_answers": ["甲", "乙"]}])

    def download(*args, **kwargs):
        asked.append((*args, kwargs["repo_type"]))
        return local

    monkeypatch.setattr(sources, "hf_hub_download", download)
    rows, funnel = load_rows(SFT_DATASET, "sft")
    assert [row["answer"] for row in rows] == ["甲", "乙"]
    assert rows[0]["where"] == f"{SFT_DATASET}/all.jsonl:1"
    assert (funnel.read, funnel.expanded, funnel.kept) == (1, 1, 2)
    load_rows(SFT_DATASET, "sft", args=DataArguments(dataset_config_name="baike"))
    assert asked == [(SFT_DATASET, "all.jsonl", "dataset"), (SFT_DATASET, "baike.jsonl", "dataset")]


def test_hub_data_sets_are_read_with_their_splits(monkeypatch):
    table = datasets.Dataset.from_list(PAIRS)
    on_hub = datasets.DatasetDict(train=table.select(range(4)), test=table.select([4, 5]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: on_hub)
    train, evaluation, _ = load_splits(DataArguments(), "preference", seed=0)
    assert (len(train), len(evaluation)) == (4, 2)
    assert evaluation[1]["where"] == f"{DataArguments().dataset_name}[test]:2"


@pytest.mark.parametrize("name", [SFT_DATASET, "beyond/rlhf-reward-single-round-trans_chinese"])
def test_without_a_network_one_sentence_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as caught:
        load_rows(name, "sft")
    message = str(caught.value)
    assert message.startswith(f"--dataset_name {name} is no local path and could not be loaded from the hub (")
    assert message.endswith("download its data files where there is a network and pass --dataset_name the local file")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["missing.jsonl", "runs/missing/data", "./missing", "no such file"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name):
    with pytest.raises(FileNotFoundError, match=r"does not exist: give a local file, a directory or a hub id"):
        load_rows(name, "sft")


# ---- faults ----
GOOD = json.dumps({"prompt": "好", "answer": "答"}, ensure_ascii=False).encode()
FAULTS = {
    "None": (b'{"prompt": "q", "answer": null}', "field 'answer' must be text or a list of messages, not None"),
    "missing": (b'{"prompt": "q"}', "field 'answer' is missing"),
    "number": (b'{"prompt": 7, "answer": "a"}', "field 'prompt' must be text or a list of messages, not a number"),
    "surrogate": (rb'{"prompt": "\ud800", "answer": "a"}', "field 'prompt' holds half a surrogate pair"),
    "GB18030": ('{"prompt": "问题", "answer": "答"}'.encode("gb18030"), "not UTF-8 but reads as GB18030"),
    "damaged": (b'{"prompt": "\xe4\xbd\xff\xff", "answer": "a"}', "byte 0xe4 is not UTF-8: the text is damaged"),
    "not JSON": (b"{'prompt': 'q'}", "not JSON"),
    "nested": (b"[" * 100_000, "not JSON"),
    "no object": (b'["q", "a"]', "a row must be an object with named fields, not a list"),
}


@pytest.mark.parametrize(("line", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_malformed_row_stops_the_run_by_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(ValueError) as caught:
        load_rows(str(path), "sft")
    assert f"malformed rows: {path}:2: " in str(caught.value)
    assert reason in str(caught.value)
    assert "--bad_rows skip" in str(caught.value)


def test_bad_rows_skip_writes_them_down_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    bad_rows = tmp_path / "run" / "bad_rows.jsonl"
    lines = [GOOD, *(line for line, _ in FAULTS.values()), b'{"prompt": "p", "answer": "a"}', b'{"prompt": "cut']
    path.write_bytes(b"\n".join(lines))
    rows, funnel = load_rows(str(path), "sft", args=SKIP, bad_rows_file=bad_rows)
    assert places(rows, path) == ["1", str(len(FAULTS) + 2)]
    assert funnel.as_dict()["dropped"] == {"malformed": len(FAULTS) + 1}
    assert funnel.bad_rows[-1] == f"{path}:{len(FAULTS) + 3}: the last line is cut off"
    written = [json.loads(line) for line in bad_rows.read_text(encoding="utf-8").splitlines()]
    assert [f"{row['where']}: {row['reason']}" for row in written] == funnel.bad_rows
    assert written[0]["row"] == {"prompt": "q", "answer": None}
    assert written[-1]["row"] == '{"prompt": "cut'


def test_many_malformed_rows_are_one_short_sentence(tmp_path):
    source = write_lines(
        tmp_path / "a.jsonl", [*SFT, *[{"prompt": "q", "answer": None}] * 5, {"prompt": 1, "answer": 2}]
    )
    with pytest.raises(ValueError, match=r":11: .* \(and 1 more\): mend them") as caught:
        load_rows(source, "sft")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_data_at_all_say_so(tmp_path):
    cases = {
        "empty.jsonl": (b"", "is empty: check how it was made"),
        "blank.jsonl": (b"\n\n", "has no usable row \\(0 read\\)"),
        "list.json": (b"[]", "has no usable row \\(0 read\\)"),
        "utf16.json": ("[]".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        "object.json": (b'{\n "data": []\n}', "one indented JSON object: give a list of rows"),
        "a.parquet": (b"PAR1....PAR1", "no readable Parquet file"),
        "a.docx": (b"text", "is none of .json, .jsonl, .csv, .parquet"),
        "a.txt": (b"text", "a text file holds prompts, a line each: SFT and pairs need"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            load_rows(str(tmp_path / name), "sft")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffprompt,answer\n一,二\n".encode())
    assert texts(load_rows(str(path), "sft")[0]) == [{"prompt": "一", "answer": "二"}]


def test_a_cut_or_broken_array_keeps_what_came_before(tmp_path):
    whole = json.dumps(SFT, ensure_ascii=False, indent=2)
    for content, reason in (
        (whole[: whole.index("回答4")], ":18: not JSON"),
        (whole[: whole.index("问题4")], ":18: not JSON"),
        (whole[:-1], ":26: the file is cut off"),
        (whole + "[]", ":26: there is more text after"),
    ):
        path = tmp_path / "a.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=reason):
            load_rows(str(path), "sft")
        assert texts(load_rows(str(path), "sft", args=SKIP)[0])[:4] == SFT[:4]


def test_array_elements_that_are_not_utf8_are_named_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[\n{"prompt": "q", "answer": "a"},\n' + '{"prompt": "问题", "answer": "a"}'.encode("gb18030") + b"\n]"
    )
    rows, funnel = load_rows(str(path), "sft", args=SKIP)
    assert len(rows) == 1
    assert f"{path}:3: byte 0xce is not UTF-8 but reads as GB18030" in funnel.bad_rows[0]


def test_csv_rows_of_another_length_are_malformed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n一,二\n三\n四,五,六\n七,"八', encoding="utf-8")
    rows, funnel = load_rows(str(path), "sft", args=SKIP)
    assert places(rows, path) == ["2"]
    assert [line.split(":", 1)[1] for line in funnel.bad_rows] == [
        "3: 1 cells under 2 column names",
        "4: 3 cells under 2 column names",
        "5: not CSV (unexpected end of data)",
    ]


def test_well_formed_rows_that_make_no_example_are_counted_by_reason(tmp_path):
    rows = [
        *PAIRS,
        PAIRS[0],
        {"prompt": "问题1", "chosen": "坏1", "rejected": "好1"},
        {"prompt": "p", "chosen": "一", "rejected": "一 "},
        {"prompt": " ", "chosen": "一", "rejected": "二"},
        {"prompt": "p", "chosen": "", "rejected": "二"},
        {"prompt": "p", "chosen": "长" * 1_000_000, "rejected": "二"},
    ]

    kept, funnel = load_rows(write_lines(tmp_path / "a.jsonl", rows), "preference")
    assert texts(kept) == PAIRS
    assert funnel.dropped == {
        "duplicate": 1,
        "contradicts an earlier pair": 1,
        "chosen == rejected": 1,
        "empty prompt": 1,
        "empty chosen": 1,
        "longer than 200000 characters": 1,
    }
    assert funnel.read + funnel.expanded == funnel.kept + funnel.dropped.total()
    assert f"{tmp_path}/a.jsonl:7" in funnel.table()


def test_one_stray_column_does_not_decide_how_all_rows_are_read(tmp_path):
    rows = [{"question": row["prompt"], "answer": row["answer"]} for row in SFT]
    rows[3] = {**rows[3], "prompt": "stray"}
    kept, _ = load_rows(write_lines(tmp_path / "a.jsonl", rows), "sft")
    assert texts(kept) == SFT


def test_mutated_files_end_in_rows_or_in_one_sentence(tmp_path):
    shuffler = random.Random(0)
    whole = [
        json.dumps(PAIRS, ensure_ascii=False, indent=1).encode(),
        b"\n".join(json.dumps(p).encode() for p in PAIRS),
    ]

    for number in range(200):
        # Replace up to four short stretches with what breaks JSON, text or UTF-8.
        content = bytearray(whole[number % 2])
        for _ in range(shuffler.randint(1, 4)):
            at = shuffler.randrange(len(content))
            content[at : at + shuffler.randint(0, 3)] = shuffler.choice(
                [b"", b'"', b"\\", b"{", b"]", b"\xff", b"null", b"\\ud800", b"\x00", bytes(content[:at])]
            )
        path = tmp_path / "a.json"
        path.write_bytes(bytes(content))

        # One sentence that names the file, or rows that are all accounted for.
        args = DataArguments(bad_rows=("stop", "skip")[number % 3 > 0])
        try:
            rows, funnel = load_rows(str(path), "preference", args=args, bad_rows_file=tmp_path / "bad_rows.jsonl")
        except ValueError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            assert len(rows) == funnel.kept
            for row in rows:
                assert all(value.strip() for value in row.values())


# ---- splits ----
def test_no_prompt_and_no_dialogue_is_on_both_sides(tmp_path):
    def turns(*said):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]

    dialogues = [{"messages": turns(f"甲{n % 20}", f"乙{n}", "丙", f"丁{n}")} for n in range(60)]
    rows, _ = load_rows(write_lines(tmp_path / "a.jsonl", dialogues), "sft")
    train, evaluation = split_eval(rows, 0.2, seed=0)
    assert len(train) + len(evaluation) == 120
    assert 24 <= len(evaluation) <= 30
    for key in ("prompt", "opening"):
        assert not {row[key] for row in train} & {row[key] for row in evaluation}
    assert split_eval(rows, 0.2, seed=0) == (train, evaluation)
    assert split_eval(rows, 0.2, seed=1) != (train, evaluation)
    assert len(split_eval(rows, 6, seed=0)[1]) == 6


def test_a_split_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="1 different prompts cannot give"):
        split_eval([{"prompt": "同"}] * 5, 0.2, seed=0)
    with pytest.raises(ValueError, match="cannot give 9 evaluation rows"):
        split_eval(SFT, 9, seed=0)


def test_training_rows_whose_prompt_is_evaluated_are_dropped(tmp_path):
    train_file = write_lines(tmp_path / "train.jsonl", PAIRS)
    eval_file = write_lines(tmp_path / "held_out.jsonl", PAIRS[4:])
    args = DataArguments(dataset_name=train_file, eval_dataset_name=eval_file)
    train, evaluation, funnel = load_splits(args, "preference", seed=0)
    assert texts(train) == PAIRS[:4]
    assert texts(evaluation) == PAIRS[4:]
    assert funnel.dropped == {"prompt is in the evaluation rows": 2}
    with pytest.raises(ValueError, match="every training prompt is in the evaluation rows"):
        load_splits(DataArguments(dataset_name=train_file, eval_dataset_name=train_file), "preference", seed=0)


def test_a_split_is_made_only_where_none_is_given(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", PAIRS)
    made = load_splits(DataArguments(dataset_name=source, eval_size=2), "preference", seed=0)
    assert (len(made[0]), len(made[1])) == (4, 2)
    none = load_splits(DataArguments(dataset_name=source, eval_size=0), "preference", seed=0)
    assert (len(none[0]), len(none[1])) == (6, 0)
    with pytest.raises(ValueError, match="--eval_split train is the split to train on"):
        DataArguments(dataset_name=source, eval_split="train")


def test_a_subset_is_drawn_by_the_seed_and_counted():
    rows = [{"prompt": str(n), "where": f"f:{n}"} for n in range(10)]
    funnel = Funnel(read=10)
    drawn = subset(rows, 4, 0, funnel)
    assert drawn == subset(rows, 4, 0, Funnel())
    assert drawn == sorted(drawn, key=lambda row: int(row["prompt"]))
    assert funnel.kept == len(drawn) == 4
    assert subset(rows, -1, 0, funnel) == rows


def test_the_fingerprint_follows_contents_not_places(tmp_path):
    first = load_rows(write_lines(tmp_path / "a.jsonl", SFT), "sft")[0]
    second = load_rows(write_lines(tmp_path / "b.jsonl", SFT), "sft")[0]
    assert data_fingerprint(first) == data_fingerprint(second)
    assert data_fingerprint(first) != data_fingerprint(first[::-1])


# ---- flags ----
def test_a_template_must_hold_the_prompt_once():
    assert DataArguments(prompt_template="Q: {prompt}\\nA:").prompt_template == "Q: {prompt}\nA:"
    for template in ("no place", "{prompt}{prompt}"):
        with pytest.raises(ValueError, match="exactly once"):
            DataArguments(prompt_template=template)
    assert render("{x} {prompt}!", "a {prompt} b") == "{x} a {prompt} b!"


# ---- tokenizer and ids ----
@pytest.fixture(params=["tiny_base", "tiny_llama"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def tokenizer_64k(shared_data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer_64k")
    shutil.copy(shared_data / "baichuan_64k.model", directory / "tokenizer.model")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BaiChuanTokenizer"}')
    return load_tokenizer(str(directory))


def test_padding_is_not_eos_and_control_tokens_in_text_stay_text(tokenizer):
    assert padding_id(tokenizer) != tokenizer.eos_token_id
    for text in ("</s>", "我</s>你", "<s>我"):
        ids = encode(tokenizer, text)
        assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)
        assert tokenizer.decode(ids) == text


def test_batches_pad_with_an_unused_token_where_the_pad_token_is_eos_and_the_tokenizer_stays_as_it_is(
    tiny_llama, tmp_path
):
    changed = AutoTokenizer.from_pretrained(tiny_llama)
    changed.pad_token = changed.eos_token
    changed.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "</s>"
    assert loaded.convert_ids_to_tokens(padding_id(loaded)) == "<pad>"
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("<pad>", "<hello>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert padding_id(load_tokenizer(str(tmp_path))) == 0
    with pytest.raises(FileNotFoundError, match=r"--tokenizer_name .*missing does not exist: give a directory"):
        load_tokenizer(str(tmp_path / "missing"))


def test_an_answer_ends_with_the_eos_id_and_continues_its_query(tokenizer):
    query = render(DEFAULT_TEMPLATE, "我喜欢什么？")
    query_ids, answer_ids = text_format(tokenizer).encode_answer([("user", "我喜欢什么？")], "红茶</s>")
    assert query_ids == encode(tokenizer, query)
    assert answer_ids[-1] == tokenizer.eos_token_id
    assert answer_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(query_ids + answer_ids[:-1]) == query + "红茶</s>"


def test_a_row_whose_answer_would_melt_into_its_query_is_the_ids_of_both(tokenizer):
    merged = next(text for text in ("喜欢", "什么", "likes") if len(continuation(tokenizer, text)) == 1)
    row = {"prompt": merged[0], "answer": merged[1:], "where": "f:1"}
    query_ids = encode(tokenizer, merged[0])
    assert encode(tokenizer, merged)[: len(query_ids)] != query_ids
    # Without the space that SentencePiece puts in front of a text: sampling goes on without one.
    expected = query_ids + continuation(tokenizer, merged[1:]) + [tokenizer.eos_token_id]
    assert sft_rows(text_format(tokenizer, "{prompt}"), [row], 100, Funnel(read=1))[0]["input_ids"] == expected
    assert tokenizer.decode(expected[:-1]) == merged


def test_the_mask_marks_the_answer_and_its_eos(tokenizer):
    row = {"prompt": "我想要什么？", "answer": "一本书。", "where": "f:1"}
    made = sft_rows(text_format(tokenizer), [row], 100, Funnel(read=1))[0]
    answer = [token for token, wanted in zip(made["input_ids"], made["completion_mask"], strict=True) if wanted]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == "一本书。"
    assert set(made) == {"input_ids", "completion_mask"}


def test_rows_too_long_are_dropped_and_counted_at_the_exact_token(tokenizer):
    row = {"prompt": "我喜欢什么？", "chosen": "红茶。", "rejected": "红茶，红茶，红茶。", "where": "f:1"}
    made = preference_rows(text_format(tokenizer), [row], 1000, Funnel())[0]
    query = len(made["query_ids"])
    longest = query + len(made["rejected_ids"])

    for limit, reason in (
        (longest, None),
        (longest - 1, f"longer than {longest - 1} tokens"),
        (query, f"prompt longer than {query} tokens"),
    ):
        funnel = Funnel(read=1)
        kept = preference_rows(text_format(tokenizer), [row], limit, funnel)
        assert funnel.kept == len(kept) == (reason is None)
        assert set(funnel.dropped) == ({reason} if reason else set())

    funnel = Funnel(read=2)
    assert len(prompt_rows(text_format(tokenizer), [row], query, funnel)) == 1
    assert prompt_rows(text_format(tokenizer), [row], query - 1, funnel) == []
    assert funnel.dropped == {f"prompt longer than {query - 1} tokens": 1}


def test_inspection_prints_the_funnel_text_ids_and_mask(tiny_base, capsys):
    tokenizer = load_tokenizer(tiny_base)
    rows = [{**row, "where": f"f:{n}"} for n, row in enumerate(PAIRS)]
    funnel = Funnel(read=6)
    encoded = preference_rows(text_format(tokenizer), rows, 200, funnel)
    inspect_rows(text_format(tokenizer), encoded, funnel)
    printed = capsys.readouterr().out
    assert printed.startswith(funnel.table())
    assert printed.count("--- row") == 6
    for part in (
        "row 3, rejected",
        "问：问题2\n\n答：〖坏2</s>〗",
        "mask 0 0",
        " ".join(map(str, encoded[0]["query_ids"])),
    ):
        assert part in printed


def test_inspection_counts_lengths_of_all_rows_and_of_both_sides(tiny_base, capsys):
    tokenizer = load_tokenizer(tiny_base)
    prompt_format = text_format(tokenizer)
    texts = [("好" * (3 + n), "坏") for n in range(39)] + [("好" * 2000, "坏")]
    rows = [{"prompt": f"问{n}", "chosen": a, "rejected": b, "where": f"f:{n}"} for n, (a, b) in enumerate(texts)]
    longest = []
    for row in rows:
        pairs = [prompt_format.encode_answer([("user", row["prompt"])], row[side]) for side in ("chosen", "rejected")]
        longest.append(max(len(query) + len(answer) for query, answer in pairs))
    assert longest[-1] > 1024 > 512 > sorted(longest)[-2]

    funnel = Funnel(read=40)
    encoded = preference_rows(prompt_format, rows, 512, funnel)
    inspect_rows(prompt_format, encoded, funnel)
    printed = capsys.readouterr().out
    by_length = sorted(longest)
    assert f"half have at most {by_length[20]}, 95 % at most {by_length[38]}, the longest {by_length[39]}" in printed
    assert "lost by it: 2.5% at 512, 2.5% at 1024" in printed
    means = [sum(len(row[f"{side}_ids"]) for row in encoded) / 39 for side in ("chosen", "rejected")]
    assert f"chosen {means[0]:.0f}, rejected {means[1]:.0f}; chosen is the longer one in 100% of the pairs" in printed
    assert "may learn length" in printed


# ---- the real samples, at real size ----
def test_no_row_of_the_real_sample_breaks_the_prefix_rule(tokenizer_64k, shared_data):
    rows = json.loads((shared_data / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    broken = 0
    prompt_format = text_format(tokenizer_64k)
    for row in rows:
        prompt = f"{row['instruction']}\n{row['input']}".strip()
        query_ids, answer_ids = prompt_format.encode_answer([("user", prompt)], row["output"])
        whole = encode(tokenizer_64k, render(DEFAULT_TEMPLATE, prompt) + row["output"])
        broken += query_ids + answer_ids[:-1] != whole
    assert (broken, len(rows)) == (0, 1000)


def test_real_sft_rows_are_all_kept_but_for_duplicates(tokenizer_64k, shared_data):
    args = DataArguments(dataset_name=str(shared_data / "alpaca_zh_demo.json"))
    train, evaluation, funnel = load_splits(args, "sft", seed=0)
    rows = sft_rows(text_format(tokenizer_64k), train + evaluation, 2048, funnel)
    assert funnel.dropped == {"duplicate": 8}
    assert len(rows) == funnel.kept == 992
    assert len(evaluation) == 50
    decoded = tokenizer_64k.decode(rows[0]["input_ids"])
    assert decoded == f"问：{train[0]['prompt']}\n\n答：{train[0]['answer']}</s>"


def test_real_preferences_are_kept_or_counted_with_their_line(tokenizer_64k, shared_data):
    source = shared_data / "dpo_zh_demo.json"
    rows, funnel = load_rows(str(source), "preference")
    encoded = preference_rows(text_format(tokenizer_64k), rows, 512, funnel)
    assert funnel.read == 300
    assert len(encoded) == funnel.kept
    assert set(funnel.dropped) == {"duplicate", "longer than 512 tokens", "prompt longer than 512 tokens"}
    line = int(encoded[5]["where"].rsplit(":", 1)[1])
    around = source.read_text(encoding="utf-8").splitlines()[line - 1 :]
    assert json.dumps(encoded[5]["prompt"], ensure_ascii=False)[1:-1] in "\n".join(around[:20])


# ---- batches ----
def test_pairs_are_collated_chosen_first_and_padded_right():
    rows = [
        {"query_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 0, 2]},
        {"query_ids": [5], "chosen_ids": [2], "rejected_ids": [2]},
    ]
    batch = PairCollator(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 2, 0, 0],
        [5, 2, 0, 0, 0, 0],
        [5, 6, 8, 9, 0, 2],
        [5, 2, 0, 0, 0, 0],
    ]
    # A real token may have the pad's id: only the mask says where the padding is.
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 6, 2]
    assert batch["attention_mask"].dtype == torch.bool


def test_queries_are_padded_left():
    batch = collate_prompts([[5, 6, 7], [8]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [False, False, True]]


def padding_share(order, lengths, size):
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    padded = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    return 1 - sum(lengths) / padded


def test_the_sampler_covers_all_rows_saves_padding_and_differs_by_epoch():
    shuffler = random.Random(0)
    lengths = [shuffler.randint(1, 400) for _ in range(403)]
    sampler = LengthGroupedSampler(lengths, 8, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(403))
        assert padding_share(orders[-1], lengths, 8) < 0.1
        assert max(lengths) in [lengths[row] for row in orders[-1][:8]]
    assert orders[0] != orders[1] != orders[2]
    assert padding_share(list(range(403)), lengths, 8) > 0.3


def test_the_order_depends_on_seed_and_epoch_and_no_global_state():
    lengths = [number % 17 + 1 for number in range(100)]
    order = list(LengthGroupedSampler(lengths, 4, seed=3))
    random.seed(99)
    torch.manual_seed(99)
    assert list(LengthGroupedSampler(lengths, 4, seed=3)) == order
    assert list(LengthGroupedSampler(lengths, 4, seed=4)) != order


@pytest.mark.parametrize("processes", [1, 2])
def test_a_later_epoch_resumed_in_its_middle_goes_on_in_the_same_order(processes):
    rows = list(range(40))

    def loader():
        sampler = LengthGroupedSampler([row * 7 % 13 + 1 for row in rows], 4 * processes, seed=0)
        plain = DataLoader(rows, batch_size=4, sampler=sampler, collate_fn=list)
        return sampler, prepare_data_loader(plain, num_processes=processes, process_index=0, put_on_device=False)

    _, whole = loader()
    whole.set_epoch(2)
    wanted = list(whole)
    sampler, resumed = loader()
    resumed = skip_first_batches(resumed, 2)
    # What the stages' callback does: on several processes accelerate's own call does not reach the sampler here.
    sampler.set_epoch(2)
    resumed.set_epoch(2)
    assert list(resumed) == wanted[2:]


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9])
def test_few_rows_make_an_order_too(count):
    assert sorted(LengthGroupedSampler([1] * count, 4, seed=0)) == list(range(count))
