"""The chart of a PPO run: metrics over the steps, and reward score and judge against sqrt(KL)."""

import os
import warnings
from pathlib import Path

import numpy as np

from rlhf.artefacts.files import TOKEN
from rlhf.run.log import read_metrics
from rlhf.run.pictures import pyplot

# (key of metrics.jsonl, label, colour) of the panels over the steps.
PANELS = (
    ("score/mean", "score (transformed)", "tab:blue"),
    ("kl/mean", "KL to the reference\n(nats a response)", "tab:orange"),
    ("len/mean", "response length (tokens)", "tab:green"),
    ("entropy", "entropy (nats a token)", "tab:purple"),
)

# Evaluations below which no curve is fitted: the law has two unknowns.
MIN_POINTS = 4

# Name -> (sqrt(KL) [N], gain over the SFT model [N]) of N evaluations.
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def draw_run(output_dir: str | Path) -> Path | None:
    """Draw chart.png of a PPO directory from its metrics.jsonl; None if no step is logged yet or the disk is full.

    Four panels over the steps; with held-out evaluations a second column shows the score of the reward model PPO
    trains against (the proxy), and the judge's if there is one, against sqrt(KL).
    """
    # A run that ends before its first step has nothing to show.
    rows = read_metrics(output_dir)
    if not rows:
        return None

    # A figure is only drawn here; the file comes below.
    plt = pyplot()
    figure = _drawn(plt, rows)

    # A reader of chart.png sees the old chart or the new one, never half of one.
    file = Path(output_dir) / "chart.png"
    part = file.with_name(f".{file.name}.{TOKEN}{os.getpid()}")
    try:
        figure.savefig(part, dpi=100, format="png")
        os.replace(part, file)
    except OSError as error:
        # The chart is drawn while another error may be on its way up (a full disk above all), and must not hide it.
        warnings.warn(f"no chart could be written to {file} ({error})", stacklevel=2)
        return None
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)
    return file


def _drawn(plt, rows: list[dict]):
    """The figure of a run: PANELS in the first column, the curves against sqrt(KL) in the second, if there are any."""
    curves = overoptimization(rows)
    columns = 2 if curves else 1
    width = 12 if curves else 7
    figure = plt.figure(figsize=(width, 9), constrained_layout=True)
    grid = figure.add_gridspec(len(PANELS), columns)

    panels = [figure.add_subplot(grid[row, 0]) for row in range(len(PANELS))]
    draw_steps(panels, rows)

    # Proxy and judge share the second column's height.
    height = len(PANELS) // max(1, len(curves))
    for place, (name, points) in enumerate(curves.items()):
        top = place * height
        axis = figure.add_subplot(grid[top : top + height, 1])
        draw_against_kl(axis, {name: points})
    return figure


def draw_steps(axes: list, rows: list[dict]) -> None:
    """Draw PANELS over the steps, with a dashed line where the guard stepped in."""
    steps = [row["step"] for row in rows]
    guarded = [row["step"] for row in rows if "guard" in row]

    for axis, (key, label, colour) in zip(axes, PANELS, strict=True):
        # metrics.jsonl holds NaN and Inf as strings, which float() reads.
        heights = [float(row[key]) for row in rows]
        axis.plot(steps, heights, color=colour)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        for step in guarded:
            axis.axvline(step, color="tab:red", linestyle="--", linewidth=1)

    # Lengths start at 0, so that a collapse to short answers looks as large as it is.
    axes[2].set_ylim(bottom=0)
    axes[-1].set_xlabel("PPO step" + (" (dashed: the guard stepped in)" if guarded else ""))


# Metrics of an evaluation that the law of over-optimisation is drawn from.
EVALUATED = ("kl/mean", "score/mean", "judge/mean")


def overoptimization(rows: list[dict]) -> Curves:
    """{"proxy" and, with a judge, "judge": (sqrt(KL) [N], gain over the SFT model [N])} of a run's evaluations."""
    # The first step's record holds the SFT model's evaluation.
    first = rows[0].items()
    start = {name.removeprefix("eval_start/"): value for name, value in first if "eval_start/" in name}
    # metrics.jsonl holds NaN and Inf as strings: such an evaluation has no place in the picture.
    measured = [row for row in rows if "eval/kl/mean" in row]
    evaluations = [row for row in measured if not any(isinstance(row.get(f"eval/{key}"), str) for key in EVALUATED)]
    if not start or not evaluations:
        return {}

    # A KL estimated from samples can come out a little below 0.
    distance = np.sqrt([max(row["eval/kl/mean"], 0.0) for row in evaluations])
    curves = {}
    for name, key in {"proxy": "score/mean", "judge": "judge/mean"}.items():
        # Without a judge there is the proxy alone.
        if key in start:
            gain = [row[f"eval/{key}"] - start[key] for row in evaluations]
            curves[name] = (distance, np.array(gain))
    return curves


def fit_overoptimization(distance: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """alpha and beta, by least squares, of the law of reward model over-optimisation under RL.

        gain = d * (alpha - beta * log(d)),  d = sqrt(KL)

    Args:
        distance: [N] d, square root of nats. gain: [N] score above the one at d = 0.
    Source: Gao et al. 2022, arXiv:2210.10760, equation 2.
    """
    # The logarithm of 0 is -Inf; d log(d) goes to 0 there.
    distance = np.maximum(distance, 1e-6)
    terms = np.stack([distance, -distance * np.log(distance)], 1)
    alpha, beta = np.linalg.lstsq(terms, gain, rcond=None)[0]
    return float(alpha), float(beta)


def draw_against_kl(axis, curves: Curves) -> None:
    """Draw the points of each curve over sqrt(KL), with the fitted law where there are enough of them."""
    for number, (name, (distance, gain)) in enumerate(curves.items()):
        colour = f"C{number}"
        axis.plot(distance, gain, "o", markersize=4, color=colour, label=name)
        if len(distance) >= MIN_POINTS:
            alpha, beta = fit_overoptimization(distance, gain)
            d = np.linspace(1e-3, distance.max(), 100)
            fitted = d * (alpha - beta * np.log(d))
            law = f"d ({alpha:.2f} {-beta:+.2f} log d)"
            axis.plot(d, fitted, "--", linewidth=1, color=colour, label=law)

    axis.set_xlabel("d = sqrt(KL), KL in nats a response")
    axis.set_ylabel("gain over the SFT model")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
