"""Small data files and command lines for the tests of the two Trainer stages."""

import json
import random
from pathlib import Path

WHO = ["我", "你", "小猫", "老师", "医生", "妈妈", "朋友"]
WHAT = ["苹果", "红茶", "一本书", "晴天", "音乐", "跑步"]


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_answers(path: Path, count: int = 60) -> str:
    """(prompt, answer) rows of several lengths, all different."""
    draw = random.Random(0)
    rows = [
        {"prompt": f"{draw.choice(WHO)}喜欢什么？{i}", "answer": f"喜欢{draw.choice(WHAT)}。" * draw.randint(1, 3)}
        for i in range(count)
    ]
    return write_lines(path, rows)


def write_pairs(path: Path, count: int = 60) -> str:
    """Preference rows whose chosen answer ends with an exclamation mark, of several lengths, all different."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        answers = [f"{draw.choice(WHO)}喜欢{draw.choice(WHAT)}" * draw.randint(1, 3) for _ in range(2)]
        rows.append({"prompt": f"{draw.choice(WHO)}？{i}", "chosen": answers[0] + "！", "rejected": answers[1] + "。"})
    return write_lines(path, rows)


def words(flags: dict) -> list[str]:
    """A command line of {flag name: value}."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
