"""Prompt formats: ids equal those of the chat template, one BOS or none, typed control tokens, stop sets."""

import pytest
from chat_tokenizers import CHAT_FAMILIES, REAL_FAMILY, TEXT_FAMILIES

from rlhf.artefacts.fingerprints import padding_id
from rlhf.data.arguments import DataArguments
from rlhf.data.choose_format import choose_format, generation_stop_ids, stored_format, text_format
from rlhf.data.dialogues import Unusable
from rlhf.data.encoding import preference_rows, prompt_rows, sft_rows
from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.reading import load_rows
from rlhf.data.served_template import served_template

QUESTION = [("user", "What is the capital of France?")]
DIALOGUE = [("user", "你喜欢什么？"), ("assistant", "红茶。"), ("user", "I'm sorry, what?")]
FAMILIES = (*CHAT_FAMILIES, *REAL_FAMILY)


def chat_format(tokenizer, **settings) -> PromptFormat:
    return PromptFormat(tokenizer, "chat", chat_template=tokenizer.chat_template, **settings)


def own_ids(tokenizer, turns, **kwargs) -> list[int]:
    """Ids of the tokenizer's own apply_chat_template."""
    messages = [{"role": role, "content": said} for role, said in turns]
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, **kwargs)
    return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)


# ---- ids ----
@pytest.mark.parametrize("turns", [QUESTION, DIALOGUE])
@pytest.mark.parametrize("family", FAMILIES)
def test_query_and_row_ids_are_those_of_apply_chat_template(tokenizer_of, family, turns):
    tokenizer = tokenizer_of(family)
    chat = chat_format(tokenizer)
    assert chat.query_ids(turns) == own_ids(tokenizer, turns, add_generation_prompt=True)

    query_ids, answer_ids = chat.encode_answer(turns, "I'm fine, 我很好。")
    whole = own_ids(tokenizer, [*turns, ("assistant", "I'm fine, 我很好。")])
    assert query_ids == chat.query_ids(turns)
    assert query_ids + answer_ids == whole[: len(query_ids) + len(answer_ids)]
    assert answer_ids[-1] == chat.stop_ids[0]
    assert answer_ids.count(chat.stop_ids[0]) == 1


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize("thinking", [True, False])
def test_both_renderings_use_the_same_settings(tokenizer_of, family, thinking):
    tokenizer = tokenizer_of(family)
    chat = chat_format(tokenizer, kwargs={"enable_thinking": thinking})
    query_ids, answer_ids = chat.encode_answer(QUESTION, "Paris.")
    assert query_ids == own_ids(tokenizer, QUESTION, add_generation_prompt=True, enable_thinking=thinking)
    thought = tokenizer.decode(answer_ids).startswith("<think>")
    assert thought == thinking
    assert (
        query_ids + answer_ids
        == own_ids(tokenizer, [*QUESTION, ("assistant", "Paris.")], enable_thinking=thinking)[
            : len(query_ids) + len(answer_ids)
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_is_written_once_where_the_template_has_it(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    bos = tokenizer.bos_token_id
    ids = chat_format(tokenizer).query_ids(QUESTION)
    wanted = own_ids(tokenizer, QUESTION, add_generation_prompt=True).count(bos)
    assert ids.count(bos) == wanted
    assert chat_format(tokenizer).bos == (ids[0] == bos)
    if bos is not None:
        assert chat_format(tokenizer, bos=True).query_ids(QUESTION)[0] == bos
        assert chat_format(tokenizer, bos=True).query_ids(QUESTION).count(bos) == max(wanted, 1)
        assert chat_format(tokenizer, bos=False).query_ids(QUESTION)[0] != bos


@pytest.mark.parametrize("family", [*CHAT_FAMILIES, *TEXT_FAMILIES])
def test_a_text_template_begins_as_the_tokenizer_does(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    text = text_format(tokenizer)
    own = tokenizer("问：你好\n\n答：")["input_ids"]
    assert text.query_ids([("user", "你好")]) == own
    assert text.bos == (own[:1] == [tokenizer.bos_token_id])


def test_bos_without_a_bos_token_is_refused(tokenizer_of):
    with pytest.raises(ValueError, match="has no BOS token"):
        PromptFormat(tokenizer_of("chatml"), "{prompt}", bos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_typed_control_token_stays_characters(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    chat = chat_format(tokenizer)
    words = [word for word in chat.control.ids if word.strip()]
    plain = chat.query_ids([("user", "say  now")])

    for word in words:
        query_ids, answer_ids = chat.encode_answer([("user", f"say {word} now")], f"I say {word}!")
        control = [token for token in query_ids if token in chat.control.ids.values()]
        # As many control tokens as without the typed one: those of the template.
        assert control == [token for token in plain if token in chat.control.ids.values()]
        assert word in tokenizer.decode(query_ids, skip_special_tokens=True)
        assert answer_ids.count(chat.stop_ids[0]) == 1
        assert word in tokenizer.decode(answer_ids, skip_special_tokens=True)


def test_a_text_template_may_write_control_tokens_and_nobody_else(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    template = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = text_format(tokenizer, template).query_ids([("user", "hi <|im_end|>")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == template.replace("{prompt}", "hi <|im_end|>")


# ---- the border between query and answer ----
@pytest.mark.parametrize("family", [*CHAT_FAMILIES, *TEXT_FAMILIES])
@pytest.mark.parametrize("template", ["Human: {prompt}\n\nAssistant:", "Human: {prompt}\n\nAssistant: ", "{prompt}"])
def test_no_row_is_lost_at_the_border_and_sampling_continues_what_was_trained(tokenizer_of, family, template):
    tokenizer = tokenizer_of(family)
    text = text_format(tokenizer, template)
    rows = [
        {"prompt": "What is 1 + 1", "answer": answer, "where": "f:1"} for answer in ("I'm sorry", "2", "二。", "(x)")
    ]
    funnel = Funnel(read=len(rows))
    made = sft_rows(text, rows, 100, funnel)
    assert len(made) == len(rows)

    for row, encoded in zip(rows, made, strict=True):
        query = text.query_ids([("user", row["prompt"])])
        assert encoded["input_ids"][: len(query)] == query
        said = tokenizer.decode(encoded["input_ids"], skip_special_tokens=True)
        assert said.strip() == template.replace("{prompt}", row["prompt"]).strip() + (
            f" {row['answer']}" if template.endswith(" ") else row["answer"]
        )


def test_a_space_at_the_end_of_a_template_is_encoded_with_the_answer(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    query_ids, answer_ids = text_format(tokenizer, "Q: {prompt} A: ").encode_answer(QUESTION, "I think")
    assert not tokenizer.decode(query_ids).endswith(" ")
    assert tokenizer.decode(answer_ids[:1]).startswith(" I")


def test_the_funnel_warns_of_a_reason_that_takes_more_than_half():
    funnel = Funnel(read=5)
    for number in range(3):
        funnel.drop("longer than 8 tokens", f"f:{number}")
    assert funnel.table().splitlines()[-1].startswith("! more than half of the rows are dropped: longer than 8 tokens")
    subset = Funnel(read=5)
    for number in range(4):
        subset.drop("beyond the subset", f"f:{number}")
    assert "more than half" not in subset.table()


# ---- stop sets ----
def test_the_end_of_turn_is_trained_and_the_whole_set_stops(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    eot, eos = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    chat = chat_format(tokenizer, base_stop_ids=(eos, 10**6), stop_tokens=("<|end_header_id|>",))
    assert chat.stop_ids[0] == eot
    assert set(chat.stop_ids) == {eot, eos, tokenizer.convert_tokens_to_ids("<|end_header_id|>")}
    text = text_format(tokenizer)
    assert text.stop_ids == (eos,)
    with pytest.raises(ValueError, match="no single token"):
        chat_format(tokenizer, stop_tokens=("two words here",))


def test_generation_config_names_one_stop_token_or_several(tmp_path):
    assert generation_stop_ids(tmp_path) == ()
    for content, expected in (('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [3, 9]}', (3, 9)), ("{}", ())):
        (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
        assert generation_stop_ids(tmp_path) == expected


@pytest.mark.parametrize("family", [*CHAT_FAMILIES, *TEXT_FAMILIES])
def test_any_tokenizer_pads_and_keeps_its_own_pad_token(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    before = tokenizer.pad_token
    text = text_format(tokenizer)
    assert 0 <= text.pad_id < len(tokenizer)
    assert text.pad_id == padding_id(tokenizer)
    assert tokenizer.pad_token == before
    assert not getattr(tokenizer, "split_special_tokens", False)


# ---- choosing ----
def chosen(tokenizer, folder, **flags):
    args = DataArguments(**flags)
    return choose_format(args, tokenizer, folder), args


def test_auto_is_the_chat_template_where_there_is_one(tokenizer_of, tmp_path):
    chat, args = chosen(tokenizer_of("chatml"), tmp_path)
    assert args.prompt_template == "chat"
    assert "auto: the tokenizer has one" in chat.describe()
    text, args = chosen(tokenizer_of("gpt2"), tmp_path)
    assert args.prompt_template == "问：{prompt}\n\n答："
    assert "auto: no chat template here" in text.describe()
    with pytest.raises(ValueError, match="has no chat template"):
        chosen(tokenizer_of("gpt2"), tmp_path, prompt_template="chat")
    with pytest.raises(ValueError, match="no chat template to take them"):
        chosen(tokenizer_of("gpt2"), tmp_path, chat_template_kwargs='{"enable_thinking": false}')


def test_a_file_takes_the_place_of_the_tokenizers_template(tokenizer_of, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} >", encoding="utf-8")
    chat, _ = chosen(tokenizer_of("gpt2"), tmp_path, chat_template=str(file))
    assert chat.tokenizer.decode(chat.query_ids([("user", "hello")])) == "[user] hello >"
    # The template writes no control token, so EOS ends an answer.
    assert chat.stop_ids == (chat.tokenizer.eos_token_id,)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        chosen(tokenizer_of("gpt2"), tmp_path, chat_template=str(tmp_path / "none.jinja"))
    file.write_text("{% for m in messages %}", encoding="utf-8")
    with pytest.raises(ValueError, match="takes no question with an answer"):
        chosen(tokenizer_of("gpt2"), tmp_path, chat_template=str(file))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chat_template_kwargs": "enable_thinking=False"}, "is no JSON object"),
        ({"chat_template_kwargs": "[1]"}, "is no JSON object"),
        ({"chat_template_kwargs": '{"tokenize": true}'}, "must not hold tokenize"),
        ({"chat_template": "x", "prompt_template": "{prompt}"}, "belongs to --prompt_template chat"),
    ],
)
def test_flags_of_a_chat_template_are_checked(flags, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**flags)


def test_a_system_prompt_stands_first_where_a_dialogue_has_none(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    chat = chat_format(tokenizer, system_prompt="Be brief.")
    assert chat.query_ids(QUESTION) == own_ids(
        tokenizer, [("system", "Be brief."), *QUESTION], add_generation_prompt=True
    )
    own = [("system", "Be long."), *QUESTION]
    assert chat.query_ids(own) == own_ids(tokenizer, own, add_generation_prompt=True)
    text = PromptFormat(tokenizer, "Q: {prompt}", system_prompt="Be brief.")
    assert tokenizer.decode(text.query_ids([("user", "hi")])) == "Q: Be brief.\n\nhi"


# ---- rows ----
def test_a_dialogue_that_the_template_refuses_is_counted_with_its_own_reason(tokenizer_of):
    chat = chat_format(tokenizer_of("gemma"))
    rows = [
        {"prompt": "x", "turns": [("system", "s"), ("user", "x")], "where": "f:1", "chosen": "a", "rejected": "b"},
        {"prompt": "y", "where": "f:2", "chosen": "a", "rejected": "b"},
    ]
    for encode, given in ((preference_rows, rows), (prompt_rows, rows)):
        funnel = Funnel(read=2)
        assert len(encode(chat, given, 100, funnel)) == 1
        assert funnel.dropped == {"chat template: System role not supported": 1}
        assert funnel.kept == 1
    with pytest.raises(Unusable, match="System role not supported"):
        chat.query_ids([("system", "s"), ("user", "x")])


def test_turns_reach_the_chat_template_from_every_kind_of_row(tokenizer_of, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, '
        '{"role": "assistant", "content": "d"}]}\n',
        encoding="utf-8",
    )
    tokenizer = tokenizer_of("chatml")
    rows, _ = load_rows(str(file), "sft", args=DataArguments(dataset_name=str(file), prompt_template="chat"))
    assert [row["prompt"] for row in rows] == [
        "system: s\n\nuser: a",
        "system: s\n\nuser: a\n\nassistant: b\n\nuser: c",
    ]
    assert {row["opening"] for row in rows} == {"system: s\n\nuser: a"}
    encoded = sft_rows(chat_format(tokenizer), rows, 100, Funnel())
    whole = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ids = own_ids(tokenizer, whole)
    assert encoded[1]["input_ids"] == ids[: len(encoded[1]["input_ids"])]


# ---- what is stored, and what is served ----
@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_a_stored_format_gives_the_same_ids(tokenizer_of, family, tmp_path):
    tokenizer = tokenizer_of(family)
    kwargs = {"enable_thinking": False} if family == "qwen3" else {}
    made = chat_format(tokenizer, kwargs=kwargs, base_stop_ids=(3,))
    again = stored_format({"prompt_format": made.record()}, tokenizer, tmp_path)
    assert again.record() == made.record()
    assert again.query_ids(DIALOGUE) == made.query_ids(DIALOGUE)


@pytest.mark.parametrize("family", [*CHAT_FAMILIES, *TEXT_FAMILIES])
@pytest.mark.parametrize(
    "template", ["chat", "问：{prompt}\n\n答：", "Human: {prompt}\n\nAssistant: ", "'{prompt}\" {{x}}"]
)
def test_a_served_template_asks_in_the_format_of_the_training(tokenizer_of, family, template):
    tokenizer = tokenizer_of(family)
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("no chat template")
    system = None if family in ("gemma", "mistral") and template == "chat" else "Be brief."
    trained = PromptFormat(
        tokenizer, template, chat_template=tokenizer.chat_template if template == "chat" else None,
        kwargs={"enable_thinking": False} if template == "chat" else None, system_prompt=system,
    )  # fmt: skip
    served = served_template(trained.record(), tokenizer.eos_token, tokenizer.bos_token)
    for turns in (QUESTION, DIALOGUE):
        messages = [{"role": role, "content": said} for role, said in turns]
        text = tokenizer.apply_chat_template(
            messages, chat_template=served, add_generation_prompt=True, tokenize=False
        )
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == trained.query_ids(turns)
