"""The audit of a reward model as tables: verdict, degenerate answers, accuracy by which answer is longer."""

from rlhf.page.report_data import Run, Words, number
from rlhf.page.report_html import both, short, table, text

VERDICTS = {"pass": ("passed", "通过"), "fail": ("failed", "没有通过")}

# The degenerate answers that a reward model is attacked and hardened with.
KINDS = {
    "empty": ("nothing at all", "什么都没有"),
    "eos_only": ("the end at once", "立刻结束"),
    "one_token": ("one token", "一个 token"),
    "very_short": ("a few characters", "几个字"),
    "cut": ("cut off in the middle", "截断"),
    "repeated_sentence": ("one sentence repeated", "同一句话反复"),
    "repeated_token": ("one token repeated", "同一个 token 反复"),
    "copied_prompt": ("the prompt copied", "抄一遍提示"),
    "other_answer": ("another prompt's answer", "别的提示的回答"),
    "random_characters": ("shuffled characters", "打乱的字"),
    "doubled": ("the answer twice", "回答说两遍"),
    "thanks": ("the answer with thanks", "回答加感谢"),
}


def kind_words(kind: str) -> Words:
    """A kind of degenerate answer, in words."""
    return KINDS.get(kind, (kind, kind))


def audit(run: Run) -> str:
    """The audit of the reward model: verdict, reasons, attacks, accuracy by length."""
    # Whatever the file holds: a report should not fail on one that somebody has changed by hand.
    attacks = _object(run.audit, "attacks")
    verdict = _object(run.audit, "verdict")
    if not attacks and not verdict:
        return ""
    name = str(verdict.get("verdict", "?"))
    said = both(VERDICTS.get(name, (name, name)))
    reasons = map(str, [*_list(verdict.get("reasons")), *_list(verdict.get("notes"))])
    shown = f"<p>{both(('Verdict:', '结论：'))} <b>{said}</b></p>"
    shown += "".join(f"<p>{text(line)}</p>" for line in reasons)

    head = [
        both(("degenerate answer", "退化回答")), both(("prompts", "提示数")),
        both(("the real answer wins", "好回答获胜")), both(("95 % interval", "95 % 区间")),
    ]  # fmt: skip
    rows = [
        [both(kind_words(str(kind))), *_share(result)] for kind, result in attacks.items() if isinstance(result, dict)
    ]
    shown += table(head, rows, "numbers")

    sides = _object(_object(run.audit, "length"), "longer")
    parts = [(("all pairs", "全部数据对"), _object(run.audit, "accuracy"))]
    parts += [
        (("the better answer is longer", "更好的回答更长"), _object(sides, "chosen")),
        (("the worse answer is longer", "更差的回答更长"), _object(sides, "rejected")),
    ]
    # The second table has the columns of the first, under other names.
    head[0] = both(("accuracy on held-out pairs", "留出数据对上的准确率"))
    head[1] = both(("pairs", "数据对"))
    head[2] = both(("right", "对的比例"))
    return shown + table(head, [[both(label), *_share(result)] for label, result in parts if result], "numbers")


def _object(part: dict, name: str) -> dict:
    value = part.get(name)
    return value if isinstance(value, dict) else {}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _share(result: dict) -> list[str]:
    """Number, share with a bar, interval."""
    value = number(result.get("share"))
    count = number(result.get("n"))
    bounds = [number(bound) for bound in _list(result.get("interval"))]
    known = len(bounds) == 2 and None not in bounds
    meter = f'<meter min="0" max="1" value="{value:.3f}"></meter> {value:.0%}' if value is not None else "–"
    return [short(count) if count is not None else "–", meter, f"{bounds[0]:.0%} – {bounds[1]:.0%}" if known else "–"]
