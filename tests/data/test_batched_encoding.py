"""Rows encoded many at once have the ids, the order and the counts of rows encoded one by one."""

import random

import pytest
from chat_tokenizers import CHAT_FAMILIES, REAL_FAMILY, TEXT_FAMILIES, make
from tokenizers import AddedToken, pre_tokenizers

from rlhf.data import encoding
from rlhf.data.choose_format import text_format
from rlhf.data.control_tokens import ControlTokens
from rlhf.data.dialogues import Unusable
from rlhf.data.encoding import load_tokenizer, preference_rows, prompt_rows, sft_rows
from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.reading import load_rows
from rlhf.data.template import turns_of

FAMILIES = (*CHAT_FAMILIES, *TEXT_FAMILIES, *REAL_FAMILY)

WORDS = (
    "The", "capital", " of", "  France", "\n", "\n\n", "我喜欢", "红茶。", "I'm", "42", "3.14", "<|im_end|>", "</s>",
    "<eos>", "[/INST]", "<think>", "\u200b", "🙂", " ", "<|eot_id|>", "▁", "\t", "é",
)  # fmt: skip


def random_rows(count: int) -> list[dict]:
    """Pairs with an answer, some of them dialogues, their texts of words that tokenizers treat specially."""
    rng = random.Random(0)

    def said() -> str:
        return "x" + "".join(rng.choices(WORDS, k=rng.randint(1, 12)))

    rows = []
    for number in range(count):
        row = {name: said() for name in ("prompt", "chosen", "rejected", "answer")}
        if number % 3 == 0:
            roles = ("system", "user", "assistant", "user")[number % 2 :]
            row["turns"] = [(role, said()) for role in roles]
        rows.append({**row, "where": f"f:{number}"})
    return rows


def one_by_one(prompt_format: PromptFormat, rows: list[dict], sides: tuple[str, ...]) -> list:
    """Ids of each row from the tokenizer one text after the other; a reason in place of a row that is refused."""
    made = []
    for row in rows:
        turns = turns_of(row)
        try:
            made.append([prompt_format.encode_answer(turns, row[side]) for side in sides])
        except Unusable as reason:
            made.append(str(reason))
    return made


def formats_of(tokenizer) -> list[PromptFormat]:
    formats = [text_format(tokenizer), text_format(tokenizer, "Q: {prompt} A: "), text_format(tokenizer, "{prompt}")]
    if tokenizer.chat_template:
        chat = {"chat_template": tokenizer.chat_template}
        formats.append(PromptFormat(tokenizer, "chat", **chat))
        formats.append(PromptFormat(tokenizer, "chat", bos=False, **chat))
    return formats


def assert_equal_to_one_by_one(prompt_format: PromptFormat, rows: list[dict], monkeypatch) -> None:
    # Several calls, one of them of a single row.
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 13)
    sides = ("chosen", "rejected")
    single = one_by_one(prompt_format, rows, sides)
    usable = [(row, pair) for row, pair in zip(rows, single, strict=True) if not isinstance(pair, str)]

    funnel = Funnel(read=len(rows))
    kept = preference_rows(prompt_format, rows, 10_000, funnel)
    by_place = {row["where"]: row for row in kept}
    for row, ((query, chosen), (_, rejected)) in usable:
        # A pair of which the tokenizer leaves nothing, or twice the same, is counted and not kept.
        if row["where"] in by_place:
            encoded = by_place[row["where"]]
            ids = (encoded["query_ids"], encoded["chosen_ids"], encoded["rejected_ids"])
            assert ids == (query, chosen, rejected)
            assert {name: encoded[name] for name in row} == row
    assert len(kept) == funnel.kept
    refused = [pair for pair in single if isinstance(pair, str)]
    assert sum(funnel.dropped[reason] for reason in set(refused)) == len(refused)
    assert list(by_place) == [row["where"] for row, _ in usable if row["where"] in by_place]

    answers = [made[0] for made in one_by_one(prompt_format, rows, ("answer",)) if not isinstance(made, str)]
    # An answer without a token but for the stop token is counted and not kept.
    expected = [query + answer for query, answer in answers if len(answer) > 1]
    assert [row["input_ids"] for row in sft_rows(prompt_format, rows, 10_000, Funnel())] == expected

    prompts = prompt_rows(prompt_format, rows, 10_000, Funnel())
    assert [row["query_ids"] for row in prompts] == [prompt_format.query_ids(turns_of(row)) for row, _ in usable]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_many_rows_at_once_are_those_of_one_row_at_a_time(tokenizer_of, family, monkeypatch):
    rows = random_rows(40)
    for prompt_format in formats_of(tokenizer_of(family)):
        assert_equal_to_one_by_one(prompt_format, rows, monkeypatch)


def test_ids_at_once_are_those_of_a_python_tokenizer_too(tiny_base, monkeypatch):
    tokenizer = load_tokenizer(tiny_base)
    assert not tokenizer.is_fast
    assert_equal_to_one_by_one(text_format(tokenizer), random_rows(30), monkeypatch)


def test_a_tokenizer_that_looks_beyond_a_piece_gets_whole_texts(tokenizer_of, tmp_path, monkeypatch):
    # A token that takes the space after it, as Phi-3 has them.
    make("chatml", tmp_path / "parts").save_pretrained(tmp_path / "spaces")
    takes_space = load_tokenizer(str(tmp_path / "spaces"))
    takes_space.add_tokens(
        [AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True)], special_tokens=True
    )
    # A space in front of the first piece of a text alone, as Llama's newer files have it.
    make("mistral", tmp_path / "more").save_pretrained(tmp_path / "first")
    first = load_tokenizer(str(tmp_path / "first"))
    first.backend_tokenizer.normalizer = None
    first.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)

    for tokenizer in (takes_space, first):
        pieces = ControlTokens(tokenizer)
        pieces._cuts_freely = True
        marked = [("a<|im_end|> b", None), ("[INST]Paris[/INST]Paris", None)]
        # What these tokens would lose if they were cut all the same.
        assert any(pieces.encode(*text) != ids for text, ids in pieces.encode_all(marked).items())
        for prompt_format in formats_of(tokenizer):
            assert_equal_to_one_by_one(prompt_format, random_rows(30), monkeypatch)


def test_the_funnel_counts_a_chunk_in_the_order_of_its_rows(tokenizer_of):
    gemma = tokenizer_of("gemma")
    chat = PromptFormat(gemma, "chat", chat_template=gemma.chat_template)
    turns = [("system", "s"), ("user", "q")]
    rows = [
        {"prompt": "long " * 40, "answer": "a", "where": "f:1"},
        {"prompt": "q", "turns": turns, "answer": "a", "where": "f:2"},
    ]
    funnel = Funnel(read=2)
    assert sft_rows(chat, rows, 30, funnel) == []
    assert [list(places) for places in funnel.places.values()] == [["f:1"], ["f:2"]]
    assert next(iter(funnel.dropped)) == "prompt longer than 30 tokens"


@pytest.mark.parametrize("name", ["dpo_en_demo", "dpo_zh_demo"])
def test_real_pairs_at_once_are_those_one_by_one(tokenizer_of, shared_data, name, monkeypatch):
    family = "real" if "real" in FAMILIES else "qwen3"
    rows, _ = load_rows(str(shared_data / f"{name}.json"), "preference")
    rows = [{**row, "answer": row["chosen"]} for row in rows[:20]]
    for prompt_format in formats_of(tokenizer_of(family))[-2:]:
        assert_equal_to_one_by_one(prompt_format, rows, monkeypatch)
