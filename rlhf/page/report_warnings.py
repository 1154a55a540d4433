"""What should make the owner of a run look twice, in both languages."""

from rlhf.page.report_audit import kind_words
from rlhf.page.report_data import Run, Words, number
from rlhf.page.report_ppo_warnings import PPO_CHECKS, PPO_REMARKS
from rlhf.page.report_words import first_and_last

# An accuracy that is little better than a coin, and one that is too good for pairs that people disagree on.
POOR = 0.6
PERFECT = 0.995

# A rank correlation of score and length above which the score is mostly length.
MOSTLY_LENGTH = 0.5

# A loss on held-out rows that is this many times its lowest.
OVERFITTED = 1.02

# Reasons for dropping a row that a flag asked for, as the data funnel names them.
ASKED_FOR = ("beyond the subset", "in the other half")


# ---- warnings of the other stages ----
def _overfitted(run: Run) -> Words | None:
    # With fewer than three a rise after a fall cannot be told from a rise alone.
    losses = [value for _, value in run.points("eval_loss")]
    if len(losses) < 3 or losses[-1] <= OVERFITTED * min(losses):
        return None
    return (
        f"The loss on held-out rows rose again, from {min(losses):.3f} to {losses[-1]:.3f}: fewer epochs would do.",
        f"留出数据上的损失又从 {min(losses):.3f} 升到 {losses[-1]:.3f}：训练轮数可以少一些。",
    )


def _nothing_held_out(run: Run) -> Words | None:
    if not run.rows or run.points("eval_loss"):
        return None
    return (
        "Nothing was measured on held-out rows (--eval_size).",
        "没有在留出的数据上评估过（--eval_size）。",
    )


def _not_better(run: Run) -> Words | None:
    pair = first_and_last(run, "eval_loss")
    if pair is None or len(run.points("eval_loss")) < 2 or pair[1] < pair[0]:
        return None
    return (
        f"Training did not lower the loss on held-out rows ({pair[0]:.3f} → {pair[1]:.3f}).",
        f"训练没有降低留出数据上的损失（{pair[0]:.3f} → {pair[1]:.3f}）。",
    )


def _accuracy(run: Run) -> Words | None:
    points = run.points("eval_accuracy")
    if points and points[-1][1] < POOR:
        return (
            f"Right on {points[-1][1]:.0%} of the held-out pairs: little better than a coin.",
            f"留出的数据对只对了 {points[-1][1]:.0%}：比抛硬币好不了多少。",
        )
    if points and points[-1][1] > PERFECT:
        return (
            "Right on nearly all held-out pairs: look whether one trait, such as length, tells them apart.",
            "留出的数据对几乎全对：看看是不是某一个特征（例如长度）就能区分它们。",
        )
    return None


def _audit(run: Run) -> Words | None:
    verdict = run.audit.get("verdict")
    named = verdict.get("winning") if isinstance(verdict, dict) else None
    if not isinstance(named, dict) or not named:
        return None
    english, chinese = zip(*map(kind_words, map(str, list(named)[:6])), strict=True)
    return (
        f"The audit failed: degenerate answers win ({', '.join(english)}). PPO would find them.",
        f"审计没有通过：退化回答会得逞（{'、'.join(chinese)}）。PPO 会找到它们。",
    )


def _score_is_length(run: Run) -> Words | None:
    length = run.audit.get("length")
    value = number(length.get("spearman")) if isinstance(length, dict) else None
    if value is None or abs(value) < MOSTLY_LENGTH:
        return None
    return (
        f"The reward model's score is largely length (rank correlation {value:.2f}).",
        f"奖励模型的得分在很大程度上只是长度（秩相关 {value:.2f}）。",
    )


# ---- warnings of every stage ----
def _rows_dropped(run: Run) -> Words | None:
    data = run.part("data")
    funnel = data["funnel"] if isinstance(data.get("funnel"), dict) else data
    # Rows that were made here are not counted: nobody lost them.
    read = number(funnel.get("read"))
    dropped = funnel.get("dropped")
    if not read or not isinstance(dropped, dict):
        return None
    # What a flag asked for is no loss.
    counts = {str(why): number(count) or 0.0 for why, count in dropped.items() if why not in ASKED_FOR}
    worst = max(counts, key=counts.get, default="")
    if not worst or counts[worst] <= read / 2:
        return None
    return (
        f"More than half of the rows were dropped: {worst} ({counts[worst]:,.0f} of {read:,.0f}).",
        f"一半以上的数据被丢弃：{worst}（{read:,.0f} 行中的 {counts[worst]:,.0f} 行）。",
    )


def _not_finite(run: Run) -> Words | None:
    # The first place is enough: from there on most numbers are not finite.
    for row in run.rows:
        for key, value in row.items():
            if value in ("nan", "inf", "-inf"):
                return (
                    f"{key} was {value} at step {row['step']}.",
                    f"第 {row['step']} 步的 {key} 是 {value}。",
                )
    return None


def _left_out(run: Run) -> Words | None:
    # The last is the largest: the log counts on.
    counts = [value for _, value in run.points("left_out")]
    if not counts or not counts[-1]:
        return None
    return (
        f"{counts[-1]:.0f} steps were left out because a number was NaN or infinite.",
        f"有 {counts[-1]:.0f} 步因出现 NaN/Inf 而被跳过。",
    )


COMMON = (_not_finite, _left_out, _rows_dropped)
CHECKS = {
    "ppo": (*PPO_CHECKS, _audit, _score_is_length, *PPO_REMARKS),
    "reward": (_audit, _accuracy, _score_is_length, _not_better, _overfitted, _nothing_held_out),
    "sft": (_not_better, _overfitted, _nothing_held_out),
}


def warnings_of(run: Run) -> list[Words]:
    """Everything that should make the run's owner look twice, the gravest first; then what could not be read."""
    sentences = [check(run) for check in (*CHECKS.get(run.stage, ()), *COMMON)]
    return [words for words in sentences if words is not None] + run.notes
