"""Which metrics a report draws, under which titles and beside which others."""

from dataclasses import dataclass, field
from itertools import chain
from statistics import mean

from rlhf.page.report_data import Points, Run, Words

# Colours and dashes that the style sheet has.
COLOURS, DASHES = 6, 3


@dataclass(frozen=True)
class Line:
    """One metric of one run: its label, its points, standard errors by step; `dots` marks a sparse one."""

    label: Words
    points: Points
    colour: int = 0
    dash: int = 0
    dots: bool = False
    errors: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis, under a title and a sentence that says how to read them."""

    title: Words
    hint: Words
    lines: list[Line]
    from_zero: bool = False


# (title, how to read it, (metric, label) of each line, axis from 0), by stage.
PPO_CHARTS = (
    (
        ("Score", "得分"),
        ("What PPO raises. It rises even while answers get worse.", "PPO 提高的就是它。回答变差时它也会涨。"),
        (("score/mean", ("score", "得分")), ("rewards/mean", ("score minus KL penalty", "得分减去 KL 惩罚"))),
        False,
    ),
    (
        ("Held-out score", "留出提示上的得分"),
        ("Prompts that PPO does not train on; bars: standard error.", "PPO 没有训练过的提示；竖线是标准误。"),
        (("eval/score/mean", ("score", "得分")),),
        False,
    ),
    (
        ("Judge", "裁判"),
        (
            "A reward model that PPO never sees. If it falls while the score rises, the score is being gamed.",
            "PPO 看不到的另一个奖励模型。得分上升而它下降，就是策略在钻空子。",
        ),
        (("eval/judge/mean", ("judge", "裁判")),),
        False,
    ),
    (
        ("KL", "KL"),
        (
            "Distance to the SFT model, nats an answer. A slow rise is normal, a jump is not.",
            "与 SFT 模型的距离（每个回答的 nat 数）。缓慢上升是正常的，突然跳高则不是。",
        ),
        (("kl/mean", ("KL", "KL")),),
        False,
    ),
    (
        ("Length", "长度"),
        ("Tokens of an answer. Watch for a steady fall or rise.", "回答的 token 数。留意持续的缩短或变长。"),
        (("len/mean", ("mean", "平均")), ("len/min", ("shortest", "最短"))),
        True,
    ),
    (
        ("Entropy", "熵"),
        (
            "Variety of the words, nats a token. A steep fall: a few set phrases.",
            "用词的变化（每个 token 的 nat 数）。急剧下降：只剩几句套话。",
        ),
        (("entropy", ("entropy", "熵")),),
        True,
    ),
    (
        ("Clip fraction", "裁剪比例"),
        (
            "Tokens whose update was cut short. Above 0.3 the steps are too large.",
            "被裁剪的 token 比例。超过 0.3 说明步子太大。",
        ),
        (("clipfrac", ("clip fraction", "裁剪比例")),),
        True,
    ),
)  # fmt: skip
SFT_CHARTS = (
    (
        ("Loss", "损失"),
        (
            "Nats a token of the answers. Held-out loss that rises again: too many epochs.",
            "回答每个 token 的 nat 数。留出数据上的损失又上升：训练轮数太多。",
        ),
        (("loss", ("training", "训练")), ("eval_loss", ("held out", "留出"))),
        False,
    ),
    (
        ("Token accuracy", "token 准确率"),
        ("Share of the answers' tokens that the model would have chosen.", "回答中模型自己也会选的 token 的比例。"),
        (("mean_token_accuracy", ("training", "训练")),),
        False,
    ),
    (
        ("Entropy", "熵"),
        ("How unsure the model is of the next token, in nats.", "模型对下一个 token 有多不确定（nat）。"),
        (("entropy", ("entropy", "熵")),),
        True,
    ),
)
REWARD_CHARTS = (
    (
        ("Loss", "损失"),
        (
            "0.69 is a coin. Held-out loss that rises again: too many epochs.",
            "0.69 等于抛硬币。留出数据上的损失又上升：训练轮数太多。",
        ),
        (("loss", ("training", "训练")), ("eval_loss", ("held out", "留出"))),
        False,
    ),
    (
        ("Accuracy", "准确率"),
        (
            "Share of held-out pairs whose chosen answer scores higher. 0.5 is a coin.",
            "留出的数据对里，更好的回答得分更高的比例。0.5 等于抛硬币。",
        ),
        (("eval_accuracy", ("held out", "留出")),),
        False,
    ),
    (
        ("Scores", "得分"),
        ("Mean score of the better and of the worse answers.", "更好和更差的回答的平均得分。"),
        (("eval_chosen_mean", ("chosen", "更好的")), ("eval_rejected_mean", ("rejected", "更差的"))),
        False,
    ),
)
CHARTS = {"ppo": PPO_CHARTS, "sft": SFT_CHARTS, "reward": REWARD_CHARTS}

# Keys that are no curve, or one that stands there under another name.
NO_CURVE = ("step", "epoch", "guard", "env/reward_mean")
MOST_FURTHER = 48

# Batches differ too much for a curve of single steps; the single steps are among the further curves.
SMOOTHED = ("loss", "mean_token_accuracy", "entropy")


# ---- which charts ----
def main_charts(runs: list[Run]) -> list[Chart]:
    """The charts of the runs' stages, in order; those without a point are left out."""
    charts = []
    stages = dict.fromkeys(run.stage for run in runs)
    kinds = chain(*(CHARTS.get(stage, ()) for stage in stages))
    # Once each, though stages share some charts: runs of two stages are then beside one another in them.
    for title, hint, keys, from_zero in dict.fromkeys(kinds):
        charts.append(Chart(title, hint, _lines(runs, keys), from_zero))
        if title == ("Score", "得分"):
            charts.append(_parts(runs))
    return _curves(charts)


def _curves(charts: list[Chart]) -> list[Chart]:
    """Those of the charts that have a curve: of a single point the tables say all."""
    return [chart for chart in charts if any(len(line.points) > 1 for line in chart.lines)]


def _parts(runs: list[Run]) -> Chart:
    """The parts that a score is the sum of, where functions or several models score."""
    names = {}
    for run in runs:
        # A dictionary keeps the order of the log, which a set would lose.
        names |= {key: None for key in run.metrics() if key.startswith("reward/") and key.endswith("/mean")}
    labels = [(key, (key[len("reward/") : -len("/mean")],) * 2) for key in names]
    hint = ("Before weights and transforms, each in its own unit.", "加权和变换之前，各有各的单位。")
    return Chart(("Parts of the score", "得分的各部分"), hint, _lines(runs, labels))


def further_charts(runs: list[Run]) -> list[Chart]:
    """A chart for every other number of the logs, under its own name."""
    shown = set()
    for run in runs:
        for _, _, keys, _ in CHARTS.get(run.stage, ()):
            # A smoothed curve comes once more among the further ones, step by step.
            shown |= {key for key, _ in keys if not _is_smoothed(run, key)}
    names = {}
    for run in runs:
        names |= dict.fromkeys(run.metrics())
    # In the order of the log, which keeps what belongs together side by side.
    rest = [key for key in names if key not in shown and key not in NO_CURVE and not _stands_elsewhere(key)]
    charts = [
        Chart((key, key), ("", ""), _lines(runs, [(key, (key, key))], smooth=False)) for key in rest[:MOST_FURTHER]
    ]
    return _curves(charts)


def _stands_elsewhere(key: str) -> bool:
    # The SFT model's evaluation is the first point of another curve, errors are its bars.
    return key.startswith(("eval_start/", "reward/")) or key.endswith("/error")


def _lines(runs: list[Run], keys, smooth: bool = True) -> list[Line]:
    """A line for each key and run that has numbers: a colour a run where there are several, else a colour a key."""
    lines = []
    # Run by run, so that the legend groups what belongs to one.
    for place, run in enumerate(runs):
        for order, (key, label) in enumerate(keys):
            points = run.points(key)
            if not points:
                continue
            # Of several runs the colour says which run it is, in every chart the same.
            colour, dash = (place, order) if len(runs) > 1 else (order, 0)
            # Only means have a standard error, under a name of its own.
            errors = dict(run.points(key.replace("/mean", "/error"))) if key.endswith("/mean") else {}
            # Its label says so, or a reader would look for the single steps in the log.
            if smooth and _is_smoothed(run, key):
                points, label = _smoothed(points, label)
            named = label if len(runs) == 1 else (f"{run.name}: {label[0]}", f"{run.name}：{label[1]}")
            # Evaluations are far apart: without dots a line would look measured in between.
            dots = key.startswith("eval") or len(points) == 1
            lines.append(Line(named, points, colour % COLOURS, dash % DASHES, dots, errors))
    return lines


def _is_smoothed(run: Run, key: str) -> bool:
    # A step of PPO is a mean over many answers already.
    return key in SMOOTHED and run.stage != "ppo"


def _smoothed(points: Points, label: Words) -> tuple[Points, Words]:
    """Means over the last steps, a twentieth of all; the label says over how many."""
    # Means of the steps before a point and never after it, so that a running training draws the same curve later.
    width = len(points) // 20
    if width < 2:
        return points, label
    means = []
    for end in range(width, len(points) + 1):
        means.append((points[end - 1][0], mean(value for _, value in points[end - width : end])))
    return means, (f"{label[0]} (mean of {width} steps)", f"{label[1]}（{width} 步的平均）")


def step_range(charts: list[Chart]) -> tuple[int, int]:
    """First and last step of all charts: one axis, so that events stand below one another."""
    lines = list(chain(*(chart.lines for chart in charts)))
    low = min((line.points[0][0] for line in lines), default=0)
    high = max((line.points[-1][0] for line in lines), default=1)
    # A width of 0 would be a division by it.
    return low, max(high, low + 1)
