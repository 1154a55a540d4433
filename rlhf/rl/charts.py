"""The chart of a PPO run: metrics over the steps, and reward score and judge against sqrt(KL)."""

import os
import warnings
from pathlib import Path

import numpy as np

from rlhf.run.log import read_metrics
from rlhf.run.pictures import pyplot

# (key of metrics.jsonl, label, colour) of the panels over the steps.
PANELS = (
    ("score/mean", "score (transformed)", "tab:blue"),
    ("kl/mean", "KL to the reference\n(nats a response)", "tab:orange"),
    ("len/mean", "response length (tokens)", "tab:green"),
    ("entropy", "entropy (nats a token)", "tab:purple"),
)

# Evaluations below which no curve is fitted: it has two unknowns.
MIN_POINTS = 4


def draw_run(output_dir: str | Path) -> Path | None:
    """chart.png of a PPO directory from its metrics.jsonl; None where there is no step yet, or no room.

    Four panels over the steps; with held-out evaluations a second column shows the score of the reward model PPO
    trains against (the proxy), and the judge's if there is one, against sqrt(KL).
    """
    rows = read_metrics(output_dir)
    if not rows:
        return None

    plt = pyplot()
    curves = overoptimization(rows)
    figure = plt.figure(figsize=(7 + 5 * bool(curves), 9), constrained_layout=True)
    grid = figure.add_gridspec(len(PANELS), 1 + bool(curves))
    draw_steps([figure.add_subplot(grid[row, 0]) for row in range(len(PANELS))], rows)
    height = len(PANELS) // max(1, len(curves))
    for place, (name, points) in enumerate(curves.items()):
        draw_against_kl(figure.add_subplot(grid[place * height : (place + 1) * height, 1]), {name: points})

    file = Path(output_dir) / "chart.png"
    part = file.with_name(f".{file.name}.{os.getpid()}")

    try:
        figure.savefig(part, dpi=100, format="png")
        os.replace(part, file)
    except OSError as error:
        # What ended the run, a full disk above all, is the news, and not its chart.
        warnings.warn(f"no chart could be written to {file} ({error})", stacklevel=2)
        return None
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)

    return file


def draw_steps(axes: list, rows: list[dict]) -> None:
    """PANELS over the steps; a dashed line where the guard stepped in."""
    guarded = [row["step"] for row in rows if "guard" in row]
    for axis, (key, label, colour) in zip(axes, PANELS, strict=True):
        # Numbers that are not finite stand as words in the file.
        axis.plot([row["step"] for row in rows], [float(row[key]) for row in rows], color=colour)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        for step in guarded:
            axis.axvline(step, color="tab:red", linestyle="--", linewidth=1)
    axes[2].set_ylim(bottom=0)
    axes[-1].set_xlabel("PPO step" + (" (dashed: the guard stepped in)" if guarded else ""))


def overoptimization(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"proxy" and, with a judge, "judge": (sqrt(KL) [N], gain over the SFT model [N])} of a run's evaluations."""
    start = {name.removeprefix("eval_start/"): value for name, value in rows[0].items() if "eval_start/" in name}
    evaluations = [row for row in rows if "eval/kl/mean" in row]
    if not start or not evaluations:
        return {}
    distance = np.sqrt([max(row["eval/kl/mean"], 0.0) for row in evaluations])
    curves = {"proxy": "score/mean", "judge": "judge/mean"}
    return {
        name: (distance, np.array([row[f"eval/{key}"] - start[key] for row in evaluations]))
        for name, key in curves.items()
        if key in start
    }


def fit_overoptimization(distance: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """alpha and beta, by least squares, of the law of reward model over-optimisation under RL.

        gain = d * (alpha - beta * log(d)),  d = sqrt(KL)

    Args:
        distance: [N] d, square root of nats. gain: [N] score above the one at d = 0.
    Source: Gao et al. 2022, arXiv:2210.10760, equation 2.
    """
    distance = np.maximum(distance, 1e-6)
    terms = np.stack([distance, -distance * np.log(distance)], 1)
    alpha, beta = np.linalg.lstsq(terms, gain, rcond=None)[0]
    return float(alpha), float(beta)


def draw_against_kl(axis, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Points of each curve over sqrt(KL), with the fitted law where there are enough of them."""
    for number, (name, (distance, gain)) in enumerate(curves.items()):
        colour = f"C{number}"
        axis.plot(distance, gain, "o", markersize=4, color=colour, label=name)
        if len(distance) >= MIN_POINTS:
            alpha, beta = fit_overoptimization(distance, gain)
            d = np.linspace(1e-3, distance.max(), 100)
            law = f"d ({alpha:.2f} {-beta:+.2f} log d)"
            axis.plot(d, d * (alpha - beta * np.log(d)), "--", linewidth=1, color=colour, label=law)
    axis.set_xlabel("d = sqrt(KL), KL in nats a response")
    axis.set_ylabel("gain over the SFT model")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
