"""A run in words: where it stands, and how a metric at its end differs from the start."""

import math
from statistics import mean

from rlhf.page.report_data import Run, Words, number

# Of the first and the last steps, this share (and at most that many) makes up "the start" and "the end".
ENDS_SHARE = 0.1
MOST_ENDS = 10

# Differences of fewer standard errors may be chance.
CLEAR = 2.0


# ---- numbers ----
def ends(run: Run, key: str) -> tuple[float, float] | None:
    """Means of a metric over the first and over the last steps; None with fewer than two."""
    values = [value for _, value in run.points(key)]
    if len(values) < 2:
        return None
    # Means over several steps: one batch differs from the next by chance.
    count = max(1, min(MOST_ENDS, int(ENDS_SHARE * len(values))))
    return mean(values[:count]), mean(values[-count:])


def first_and_last(run: Run, key: str) -> tuple[float, float] | None:
    """A metric's first and last value, the same where there is one only; None where there is none."""
    points = run.points(key)
    return (points[0][1], points[-1][1]) if points else None


def rose(run: Run, key: str) -> bool:
    """True where a metric is higher at the end than at the start."""
    pair = ends(run, key)
    return pair is not None and pair[1] > pair[0]


def argument(run: Run, name: str, otherwise: float) -> float:
    """A flag of the run that is a number."""
    value = number(run.part("arguments").get(name))
    return otherwise if value is None else value


# ---- what it came to ----
def gain(run: Run) -> Words | None:
    """The judge's gain over the SFT model where it is more than chance: the best that numbers can say of a PPO run."""
    judged = run.points("eval/judge/mean")
    errors = dict(run.points("eval/judge/error"))
    # Without the evaluation at step 0 there is nothing to compare with.
    if len(judged) < 2 or judged[0][0] != 0:
        return None
    # The last evaluation, as it is the adapter that the run leaves at the top of its directory.
    rise = judged[-1][1] - judged[0][1]
    error = math.hypot(errors.get(0, 0.0), errors.get(judged[-1][0], 0.0))
    if rise <= CLEAR * error:
        return None
    return (
        f"The judge, which PPO never sees, prefers the answers to the SFT model's: {rise:+.2f} on held-out prompts "
        f"(standard error {error:.2f}).",
        f"PPO 看不到的裁判认为回答比 SFT 模型的好：在留出的提示上 {rise:+.2f}（标准误 {error:.2f}）。",
    )


# ---- where it stands ----
def standing(run: Run) -> Words:
    """One sentence: finished, still going on, or ended before its result."""
    steps = run.rows[-1]["step"] if run.rows else 0
    if run.finished:
        return (f"The run is finished, {steps} steps are logged.", f"训练已完成，记录了 {steps} 步。")
    # Seems, because a process of that number may be another program by now.
    if run.writer is not None:
        return (
            f"The run seems to go on (process {run.writer}): {steps} steps are logged so far, the result is missing.",
            f"训练似乎还在进行（进程 {run.writer}）：目前记录了 {steps} 步，还没有最终结果。",
        )
    return (
        f"The run has no final result: it was stopped after {steps} logged steps, or goes on elsewhere.",
        f"没有最终结果：训练记录到第 {steps} 步后停下了，或者还在别处进行。",
    )
