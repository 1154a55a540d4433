"""Every row format becomes the examples it should, and what is no example says why."""

import pytest

from rlhf.data.columns import find_format
from rlhf.data.dialogues import BadRow, Unusable
from rlhf.data.formats import examples
from rlhf.data.template import DEFAULT_TEMPLATE, first_question, fold, render


def read(row, kind, columns=None, template=DEFAULT_TEMPLATE, **named):
    """The examples of one row whose columns are all there are."""
    return examples(row, find_format(set(columns or row), kind, named), template)


def sharegpt(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def openai(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


# ---- SFT ----
def test_hc3_gives_one_example_for_each_chatgpt_answer():
    row = {"id": "0", "question": "问", "human_answers": ["人"], "chatgpt_answers": ["甲", "乙"], "source": "baike"}
    assert read(row, "sft") == [{"prompt": "问", "answer": "甲"}, {"prompt": "问", "answer": "乙"}]


def test_hc3_without_an_answer_is_empty_not_malformed():
    with pytest.raises(Unusable, match="empty answer"):
        read({"question": "问", "chatgpt_answers": []}, "sft")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("prompt", "response"),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("question", "answer"),
        ("query", "response"),
        ("q", "a"),
        ("input", "output"),
        ("input", "target"),
    ],
)
def test_usual_names_of_pairs_are_found(prompt, answer):
    assert read({prompt: " 问 ", answer: "答\n", "source": "x"}, "sft") == [{"prompt": "问", "answer": "答"}]


def test_input_follows_the_instruction_where_it_holds_something():
    columns = {"instruction", "input", "output"}
    with_input = {"instruction": "翻译", "input": "你好", "output": "hello"}
    assert read(with_input, "sft")[0]["prompt"] == "翻译\n你好"
    for empty in ("", None):
        assert read(with_input | {"input": empty}, "sft")[0]["prompt"] == "翻译"
    assert read({"instruction": "翻译", "output": "hello"}, "sft", columns)[0]["prompt"] == "翻译"


def test_system_and_history_columns_come_before_the_prompt():
    row = {"instruction": "三", "input": "", "output": "四", "system": "你是猫", "history": [["一", "二"]]}
    assert read(row, "sft")[0]["prompt"] == "你是猫\n\n一\n\n答：二\n\n问：三"


def test_a_second_question_reads_like_a_first_one():
    dialogue = {"conversations": sharegpt("一", "二", "三", "四")}
    first, second = read(dialogue, "sft")
    assert first == {"prompt": "一", "answer": "二"}
    assert render(DEFAULT_TEMPLATE, second["prompt"]) == "问：一\n\n答：二\n\n问：三\n\n答："
    assert second["answer"] == "四"
    assert first_question(second["prompt"], DEFAULT_TEMPLATE) == "一"


def test_messages_and_conversations_fold_alike_in_any_template():
    template = "<u>{prompt}<a>"
    texts = ("一", "二", "三", "四")
    assert read({"messages": openai(*texts)}, "sft", template=template) == read(
        {"conversations": sharegpt(*texts)}, "sft", template=template
    )
    assert read({"messages": openai(*texts)}, "sft", template=template)[1]["prompt"] == "一<a>二\n\n<u>三"


def test_a_system_message_stands_before_the_first_question_and_neighbours_are_joined():
    messages = [
        {"role": "system", "content": "你是猫"},
        {"role": "user", "content": "一"},
        {"role": "user", "content": "二"},
        {"role": "assistant", "content": "三"},
    ]
    turns = [("system", "你是猫"), ("user", "一\n\n二")]
    assert read({"messages": messages}, "sft") == [{"prompt": "你是猫\n\n一\n\n二", "turns": turns, "answer": "三"}]


def test_a_dialogue_that_begins_with_an_answer_is_unusable():
    with pytest.raises(Unusable, match="begins with an answer"):
        read({"conversations": sharegpt("一", "二")[1:]}, "sft")
    with pytest.raises(Unusable, match="no answer"):
        read({"conversations": sharegpt("一")}, "sft")


def test_named_columns_win_over_found_ones():
    row = {"prompt": "错", "answer": "错", "问": "一", "答": "二"}
    assert read(row, "sft", prompt="问", answer="答") == [{"prompt": "一", "answer": "二"}]
    assert read({"prompt": "一", "chosen": "二", "rejected": "三"}, "sft", answer="chosen")[0]["answer"] == "二"


def test_answers_given_as_messages_are_read():
    row = {"prompt": openai("一"), "completion": [{"role": "assistant", "content": "二"}]}
    assert read(row, "sft") == [{"prompt": "一", "answer": "二"}]


# ---- preferences ----
PAIR = {"prompt": "一", "chosen": "好", "rejected": "坏"}
HH = "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 三\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"instruction": "一", "chosen": "好", "rejected": "坏"},
        {"prompt": "\n\nHuman: 一\n\nAssistant:", "chosen": " 好", "rejected": " 坏"},
        {"prompt": "Human：一\n\nAssistant：", "chosen": "Assistant: 好", "rejected": "Assistant: 坏"},
        {"chosen": "\n\nHuman: 一\n\nAssistant: 好", "rejected": "\n\nHuman: 一\n\nAssistant: 坏"},
        {
            "conversations": sharegpt("一"),
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        {"prompt": openai("一"), "chosen": openai("", "好")[1:], "rejected": openai("", "坏")[1:]},
        {"prompt": "一", "chosen": openai("一", "好"), "rejected": openai("一", "坏")},
        {
            "context": [{"role": "human", "text": "一"}],
            "chosen": {"role": "assistant", "text": "好"},
            "rejected": {"role": "assistant", "text": "坏"},
        },
    ],
)
def test_every_shape_of_a_preference_is_the_same_pair(row):
    assert read(row, "preference") == [PAIR]


def test_hh_turns_are_folded_like_messages():
    folded = "一\n\n答：二\n\n问：三"
    assert read({"prompt": HH, "chosen": "好", "rejected": "坏"}, "preference")[0]["prompt"] == folded
    assert read({"chosen": HH + " 好", "rejected": HH + " 坏"}, "preference")[0]["prompt"] == folded
    assert fold([("user", "一"), ("assistant", "二"), ("user", "三")], DEFAULT_TEMPLATE) == folded


def test_a_tag_inside_ordinary_text_is_text():
    text = "Explain this:\n\nHuman: hi"
    assert read(PAIR | {"prompt": text}, "preference")[0]["prompt"] == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "好 "}, "chosen == rejected"),
        ({"chosen": "\n"}, "empty chosen"),
        ({"rejected": ""}, "empty rejected"),
        ({"prompt": " "}, "empty prompt"),
        ({"chosen": "Human: 一\n\nAssistant: 好", "rejected": "Human: 二\n\nAssistant: 坏"}, "differ in their prompt"),
    ],
)
def test_pairs_without_a_preference_are_unusable(change, reason):
    with pytest.raises(Unusable, match=reason):
        read(PAIR | change, "preference")


# ---- prompts ----
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "一"},
        {"text": "一"},
        PAIR,
        {"instruction": "一", "input": "", "output": "二"},
        {"conversations": sharegpt("一", "二")},
        {"chosen": "\n\nHuman: 一\n\nAssistant: 好", "rejected": "\n\nHuman: 一\n\nAssistant: 坏"},
    ],
)
def test_prompts_are_found_in_every_format(row):
    assert read(row, "prompt") == [{"prompt": "一"}]


def test_the_last_question_of_a_dialogue_is_what_ppo_answers():
    turns = [("user", "一"), ("assistant", "二"), ("user", "三")]
    expected = [{"prompt": "一\n\n答：二\n\n问：三", "turns": turns}]
    assert read({"messages": openai("一", "二", "三", "四")}, "prompt") == expected


# ---- refusals ----
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "field 'chosen' must be text or a list of messages, not None"),
        ({"chosen": 3.5}, "not a number"),
        ({"prompt": True}, "not true or false"),
        ({"rejected": [1]}, "must hold messages"),
        ({"rejected": [{"role": "user"}]}, "needs role and content"),
        ({"rejected": [{"role": "cat", "content": "喵"}]}, "unknown role 'cat'"),
        ({"rejected": [{"role": "assistant", "content": None}]}, "not None"),
        ({"prompt": "半\ud83d个"}, "half a surrogate pair at character 2"),
    ],
)
def test_malformed_values_name_their_field(change, reason):
    with pytest.raises(BadRow, match=reason):
        read(PAIR | change, "preference")


def test_a_missing_field_and_a_row_that_is_no_object_are_malformed():
    with pytest.raises(BadRow, match="field 'rejected' is missing"):
        read({"prompt": "一", "chosen": "好"}, "preference", columns=PAIR)
    with pytest.raises(BadRow, match="must be an object with named fields, not a list"):
        read(["一"], "preference", columns=PAIR)


def test_unknown_columns_are_listed_with_the_flags_that_name_them():
    with pytest.raises(ValueError, match="columns body, title: name them with --prompt_field, --answer_field"):
        find_format({"title", "body"}, "sft", {})
    with pytest.raises(ValueError, match="--chosen_field best is not among the columns chosen, prompt, rejected"):
        find_format(set(PAIR), "preference", {"chosen": "best"})
