"""Rows for tests/long/fuzz_data.py: valid ones of every format, and damage to them.

Every function takes its random source, and a row depends on that alone: the order of the draws must not change.
"""

import json
import random
from collections.abc import Callable
from itertools import chain


# ---- valid rows ----
def _said(draw: random.Random) -> str:
    length = draw.randint(1, 20)
    characters = [draw.choice("今天晴雨猫喜欢红茶吗，。？！ab 1\n") for _ in range(length)]
    # Never white space alone, which would make the row a bad one.
    return "".join(characters) + "呢"


def _sharegpt(draw: random.Random, count: int) -> list[dict]:
    speakers = ("human", "gpt")
    return [{"from": speakers[n % 2], "value": _said(draw)} for n in range(count)]


def _openai(draw: random.Random, count: int) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": _said(draw)} for n in range(count)]


def _hh_pair(draw: random.Random) -> dict:
    asked = f"\n\nHuman: {_said(draw)}\n\nAssistant: "
    return {"chosen": asked + _said(draw), "rejected": asked + _said(draw)}


def _message_pair(draw: random.Random) -> dict:
    # Each side is the assistant's message after the user's.
    sides = {side: _sharegpt(draw, 2)[1] for side in ("chosen", "rejected")}
    return {"conversations": _sharegpt(draw, 3), **sides}


def _hc3(draw: random.Random) -> dict:
    question = _said(draw)
    count = draw.randint(1, 3)
    return {"question": question, "chatgpt_answers": [_said(draw) for _ in range(count)]}


def _alpaca(draw: random.Random) -> dict:
    return {
        "instruction": _said(draw),
        "input": draw.choice(["", "其一"]),
        "output": _said(draw),
    }


def _pair(draw: random.Random) -> dict:
    texts = {name: _said(draw) for name in ("prompt", "chosen", "rejected")}
    # The one column of numbers, which a reward model may learn from.
    return texts | {"margin": 0.5}


SHAPES: dict[str, Callable[[random.Random], dict]] = {
    "HC3": _hc3,
    "alpaca": _alpaca,
    "answers": lambda draw: {"prompt": _said(draw), "answer": _said(draw)},
    "ShareGPT": lambda draw: {"conversations": _sharegpt(draw, draw.randint(2, 6))},
    "OpenAI": lambda draw: {"messages": _openai(draw, draw.randint(2, 6))},
    "HH": _hh_pair,
    "pairs": _pair,
    "message pairs": _message_pair,
    "prompts": lambda draw: {"prompt": _said(draw)},
}
# The kind of data that a shape is made for. Now and then it is read as one of the others.
KINDS = {name: "sft" for name in SHAPES} | dict.fromkeys(("HH", "pairs", "message pairs"), "preference")
KINDS["prompts"] = "prompt"


# ---- damage to rows ----
# Stand-ins for what json.dumps cannot write: brackets nested by the hundred, a number of thousands of digits.
NESTED = '"@nested"'
HUGE = '"@huge"'
# Values that a field may have by mistake.
JUNK = (
    None, 7, -0.0, 1e308, float("nan"), float("inf"), True, [], {}, [1], {"a": 1}, [[]], [None], [{}], ["文"], "",
    " \n", "\ud800", "\udc80字", "\u200b\ufeff", "\0", "\x1b[31m", "\u2028", "{prompt}", "Human: ",
    "\n\nHuman: x\n\nAssistant:",
    [{"role": "user"}], [{"role": "\ud800", "content": "文"}], [{"from": [1], "value": None}], "@nested", "@huge",
)  # fmt: skip
# Names that a column may get by mistake: of another format, without text, too long, with a line break.
NAMES = ("prompt", "answer", "chosen", "messages", "history", "system", "", " prompt", "\ud800", "名" * 5000, "a\nb")


def _swap_a_value(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and row:
        row[draw.choice(list(row))] = draw.choice(JUNK)


def _change_a_message(rows: list, draw: random.Random) -> None:
    values = chain.from_iterable(row.values() for row in rows if isinstance(row, dict))
    items = chain.from_iterable(value for value in values if isinstance(value, list))
    messages = [item for item in items if isinstance(item, dict) and item]
    if messages:
        message = draw.choice(messages)
        message[draw.choice(list(message))] = draw.choice(JUNK)


def _delete_a_key(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and row:
        del row[draw.choice(list(row))]


def _rename_a_key(rows: list, draw: random.Random) -> None:
    new = draw.choice(NAMES)
    everywhere = draw.random() < 0.3
    first = draw.choice(rows)
    old = draw.choice(list(first)) if isinstance(first, dict) and first else None
    # In one row alone, columns differ from row to row; in all of them, a column has another name.
    for row in rows if everywhere else [first]:
        if isinstance(row, dict) and old in row:
            row[new] = row.pop(old)


def _replace_a_row(rows: list, draw: random.Random) -> None:
    rows[draw.randrange(len(rows))] = draw.choice(JUNK)


def _repeat_a_row(rows: list, draw: random.Random) -> None:
    rows.append(json.loads(json.dumps(draw.choice(rows))))


def _turn_a_pair_round(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and "chosen" in row and "rejected" in row:
        rows.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})


def _make_a_row_long(rows: list, draw: random.Random) -> None:
    row = draw.choice(rows)
    if isinstance(row, dict) and row:
        # The middle one is just within MAX_CHARACTERS of rlhf/data/formats.py, the last one far beyond it.
        row[draw.choice(list(row))] = "长" * draw.choice((1000, 199_999, 1_000_000))


ROW_DAMAGE = (
    _swap_a_value, _change_a_message, _delete_a_key, _rename_a_key, _replace_a_row, _repeat_a_row, _turn_a_pair_round,
    _make_a_row_long,
)  # fmt: skip
