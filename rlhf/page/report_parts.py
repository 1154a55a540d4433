"""Tables of a report: what came out, what the run was made of, how the reward model was audited."""

import json
import shlex
from itertools import chain

from rlhf.page.report_audit import kind_words
from rlhf.page.report_data import Run, Words, number
from rlhf.page.report_html import MAX_VALUE, both, folded, short, table, text
from rlhf.page.report_words import ends, first_and_last

STAGES = {
    "sft": ("Supervised fine-tuning (SFT)", "监督微调（SFT）"),
    "reward": ("Reward model", "奖励模型"),
    "ppo": ("PPO", "PPO"),
    "merge": ("Merged model", "合并的模型"),
}
SCRIPTS = {"sft": "sft_training.py", "reward": "reward_modeling.py", "ppo": "rl_training.py", "merge": "merge_lora.py"}

# Metrics whose first and last values say most, by stage.
OUTCOMES = {
    "ppo": (
        ("score/mean", ("score", "得分")),
        ("eval/score/mean", ("score on held-out prompts", "留出提示上的得分")),
        ("eval/judge/mean", ("judge on held-out prompts", "裁判在留出提示上的评分")),
        ("kl/mean", ("KL, nats an answer", "KL（每个回答的 nat 数）")),
        ("len/mean", ("length, tokens", "长度（token）")),
        ("empty_frac", ("empty answers, share", "空回答的比例")),
        ("entropy", ("entropy, nats a token", "熵（每个 token 的 nat 数）")),
    ),
    "reward": (
        ("eval_accuracy", ("accuracy on held-out pairs", "留出数据对上的准确率")),
        ("eval_loss", ("loss on held-out pairs", "留出数据对上的损失")),
        ("eval_margin", ("margin on held-out pairs", "留出数据对上的得分差")),
        ("loss", ("training loss", "训练损失")),
    ),
    "sft": (
        ("eval_loss", ("loss on held-out answers", "留出回答上的损失")),
        ("loss", ("training loss", "训练损失")),
        ("mean_token_accuracy", ("token accuracy", "token 准确率")),
    ),
}
# Reasons of the data funnel, in Chinese.
MADE = "chosen against "
REASONS = {
    "duplicate": "重复",
    "malformed": "格式有误",
    "empty prompt": "提示为空",
    "empty answer": "回答为空",
    "chosen == rejected": "两个回答相同",
    "contradicts an earlier pair": "与前面的数据对矛盾",
    "prompt is in the evaluation rows": "提示在评估数据里",
    "beyond the subset": "超出所取的子集",
    "in the other half": "在另一半里",
}

# What the table of first and last values shows as 0.
TINY = 5e-4


# ---- what came out ----
def outcome(runs: list[Run]) -> str:
    """First and last value of the metrics that say most, a column a run; then all numbers of run.json."""
    stages = dict.fromkeys(run.stage for run in runs)
    wanted = dict.fromkeys(chain(*(OUTCOMES.get(stage, ()) for stage in stages)))
    rows = []
    for key, label in wanted:
        # A row where any of the runs has the metric.
        pairs = [_ends_of(run, key) for run in runs]
        if any(pairs):
            rows.append([both(label), *map(_change, pairs)])

    head = [both(("first → last", "首 → 末")), *(text(run.name) for run in runs)] if len(runs) > 1 else []
    return (table(head, rows, "outcome") if rows else "") + _all_numbers(runs)


def _ends_of(run: Run, key: str) -> tuple[float, float] | None:
    """First and last value of a metric; of single batches, which differ by chance, means over several."""
    if run.stage == "ppo" or key.startswith("eval"):
        return first_and_last(run, key)
    # Too few steps for two means: then the single values.
    return ends(run, key) or first_and_last(run, key)


def _change(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "–"
    # A KL of 1e-8 is rounding.
    first, last = (short(0.0 if abs(value) < TINY else value) for value in pair)
    return f"<b>{last}</b>" if first == last else f"{first} → <b>{last}</b>"


def _all_numbers(runs: list[Run]) -> str:
    names = dict.fromkeys(chain(*(_flat(run.part("metrics")) for run in runs)))
    rows = []
    for key in names:
        # A dash where a run has no such number: stages and versions differ in what they write.
        values = [_flat(run.part("metrics")).get(key, "–") for run in runs]
        rows.append([f"<code>{text(key)}</code>", *(text(value, MAX_VALUE) for value in values)])
    head = ["", *(text(run.name) for run in runs)] if len(runs) > 1 else []
    return folded(("All numbers of run.json", "run.json 里的全部数字"), table(head, rows)) if rows else ""


def _flat(part: dict) -> dict[str, str]:
    """Name -> value as text; an object within gives a name for each of its values."""
    flat = {}
    for key, value in part.items():
        # One level is unfolded, as deep as a stage writes; what lies deeper stays JSON.
        inner = value if isinstance(value, dict) else {"": value}
        for name, one in inner.items():
            flat[f"{key}/{name}" if name else str(key)] = _value(one)
    return flat


def _value(value) -> str:
    measured = number(value) if not isinstance(value, str) else None
    return short(measured) if measured is not None else _plain(value)


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- what it was ----
def origin(run: Run) -> str:
    """Stage, directory, base, parents, data, versions and command of a run."""
    rows: list[tuple[Words, str]] = [
        (("stage", "阶段"), both(STAGES.get(run.stage, (run.stage or "?",) * 2))),
        (("directory", "目录"), f"<code>{text(str(run.folder))}</code>"),
    ]
    if run.origin and not run.finished:
        rows.append((("described by", "说明来自"), f"<code>{text(run.origin)}</code>"))
    if base := run.part("base"):
        rows.append((("base", "基座"), _base(run, base)))
    for role, entry in run.part("parents").items():
        # Older versions kept the path alone.
        path = entry.get("path") if isinstance(entry, dict) else entry
        rows.append(((f"made from: {role}", f"来自：{role}"), f"<code>{text(str(path), MAX_VALUE)}</code>"))
    if template := run.about.get("prompt_template"):
        # As it would be typed, or the new lines of a template would be lost in the cell.
        shown = _plain(template).replace("\n", "\\n")
        rows.append((("prompt format", "提示格式"), f"<code>{text(shown, MAX_VALUE)}</code>"))
    versions = {str(name): _plain(value) for name, value in run.part("versions").items()}
    if versions:
        shown = ", ".join(f"{name} {value}" for name, value in versions.items())
        rows.append((("versions", "版本"), text(shown, MAX_VALUE)))
    if commit := run.about.get("git_commit"):
        rows.append((("commit", "提交"), f"<code>{text(_plain(commit), 40)}</code>"))

    made = table([], [[both(label), value] for label, value in rows], "facts")
    return made + _funnel(run) + _command(run)


def _base(run: Run, base: dict) -> str:
    # PPO calls the flag otherwise than the other stages.
    arguments = run.part("arguments")
    path = arguments.get("base_model_name") or arguments.get("model_name") or ""
    sizes = [
        f"{base[name]} {words}"
        for name, words in (("num_hidden_layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens"))
        if name in base
    ]
    kind = ", ".join([_plain(base.get("model_type", "?")), *sizes])
    mark = _plain(base.get("weights", ""))
    return f"<code>{text(_plain(path), MAX_VALUE)}</code> {text(f'{kind}; weights {mark}', MAX_VALUE)}"


def _funnel(run: Run) -> str:
    """What became of every row of the data."""
    data = run.part("data")
    # PPO keeps its counts beside the fingerprints, the other stages keep them apart.
    funnel = data["funnel"] if isinstance(data.get("funnel"), dict) else data
    if number(funnel.get("read")) is None:
        return ""
    rows = [(("read", "读入"), funnel["read"])]
    if number(funnel.get("expanded")):
        rows.append((("+ further answers or turns", "+ 同一行的其他回答或轮次"), funnel["expanded"]))
    for sign, name in (("+", "made"), ("−", "dropped")):
        counts = funnel.get(name)
        for reason, count in counts.items() if isinstance(counts, dict) else ():
            english, chinese = _reason(str(reason))
            rows.append(((f"{sign} {english}", f"{sign} {chinese}"), count))
    rows.append((("= kept", "= 保留"), funnel.get("kept")))
    if number(data.get("eval_rows")) is not None:
        rows.append((("of these for evaluation", "其中用于评估"), data["eval_rows"]))
    cells = [[both(label), _value(count)] for label, count in rows]
    cells = [[label, text(count)] for label, count in cells]
    return f"<h3>{both(('Data', '数据'))}</h3>{table([], cells, 'numbers')}"


def _reason(reason: str) -> Words:
    """Why rows were made or dropped, as the funnel names it, in both languages where it is known."""
    # Degenerate answers are counted by their kind, which the audit has words for.
    kind = reason.removeprefix(MADE)
    if kind != reason:
        english, chinese = kind_words(kind)
        return (f"{MADE}{english}", f"好回答对：{chinese}")
    return (reason, REASONS.get(reason, reason))


def _command(run: Run) -> str:
    """The command, flags at their defaults left out where run.json says which they are."""
    command = run.about.get("command")
    title = f"<h3>{both(('Command', '命令'))}</h3>"
    if isinstance(command, str):
        return f"{title}<pre>{text(command)}</pre>"

    # A run of an earlier version: every flag is written out.
    # Every flag, as defaults of the version that made it are not known here.
    words = ["python", SCRIPTS.get(run.stage, "")]
    for name, value in run.part("arguments").items():
        if value is not None and value != []:
            words += [f"--{name}", *map(_plain, value if isinstance(value, list) else [value])]
    if len(words) == 2:
        return ""
    full = f"<pre>{text(shlex.join(words), 20_000)}</pre>"
    return folded(("Command, with every flag", "命令（写出全部参数）"), full)


def flags(runs: list[Run]) -> str:
    """All flags of one run; of several, those in which they differ, and then all."""
    arguments = [{str(key): _plain(value) for key, value in run.part("arguments").items()} for run in runs]
    # Of all runs, as versions have different flags: a dash stands where one has none.
    names = sorted(set().union(*arguments))
    rows = []
    differing = []
    for name in names:
        values = [part.get(name, "–") for part in arguments]
        row = [f"<code>{text(name)}</code>", *(text(value, MAX_VALUE) for value in values)]
        rows.append(row)
        # What differs first: of a hundred flags those are the ones one looks for.
        if len(set(values)) > 1:
            differing.append(row)

    head = [both(("flag", "参数")), *(text(run.name) for run in runs)]
    every = folded(("All flags", "全部参数"), table(head, rows, "flags")) if rows else ""
    if len(runs) == 1:
        return every
    title = f"<h3>{both(('Flags that differ', '不同的参数'))}</h3>"
    same = f"<p>{both(('None.', '没有。'))}</p>"
    return title + (table(head, differing, "flags") if differing else same) + every
