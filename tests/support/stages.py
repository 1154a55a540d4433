"""Small data files and command lines for the tests of the two Trainer stages."""

import json
import random
from pathlib import Path

# Short sentences of these words: lengths differ, and every piece is in the tiny tokenizer.
WHO = ["我", "你", "小猫", "老师", "医生", "妈妈", "朋友"]
WHAT = ["苹果", "红茶", "一本书", "晴天", "音乐", "跑步"]


def write_lines(path: Path, rows: list[dict]) -> str:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def write_answers(path: Path, count: int = 60) -> str:
    """(prompt, answer) rows of several lengths, all different."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        # The number makes each prompt unique: a stage drops prompts that stand on both sides of its split.
        prompt = f"{draw.choice(WHO)}喜欢什么？{number}"
        answer = f"喜欢{draw.choice(WHAT)}。" * draw.randint(1, 3)
        rows.append({"prompt": prompt, "answer": answer})
    return write_lines(path, rows)


def write_pairs(path: Path, count: int = 60) -> str:
    """Preference rows whose chosen answer ends with an exclamation mark, of several lengths, all different."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        answers = [f"{draw.choice(WHO)}喜欢{draw.choice(WHAT)}" * draw.randint(1, 3) for _ in range(2)]
        # A difference that even a tiny model learns within a few steps.
        chosen = answers[0] + "！"
        rejected = answers[1] + "。"
        rows.append({"prompt": f"{draw.choice(WHO)}？{number}", "chosen": chosen, "rejected": rejected})
    return write_lines(path, rows)


def words(flags: dict) -> list[str]:
    """A command line of {flag name: value}."""
    line = []
    for name, value in flags.items():
        line += [f"--{name}", str(value)]
    return line
