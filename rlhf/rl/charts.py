"""The pictures of a PPO run: metrics over the steps, and reward score and judge against sqrt(KL)."""

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.artefacts.files import TOKEN
from rlhf.run.log import read_metrics
from rlhf.run.pictures import BLACK, BLUE, GREEN, ORANGE, PURPLE, pyplot

# (key of metrics.jsonl, title, colour) of the panels over the steps; a run has those that it has numbers for.
PANELS = (
    ("score/mean", "Score: what PPO raises (transformed)", BLUE),
    ("eval/score/mean", "Score on held-out prompts (raw)", BLUE),
    ("kl/mean", "KL: distance to the SFT model (nats a response)", ORANGE),
    ("eval/judge/mean", "Judge: a reward model that PPO never sees", BLACK),
    ("len/mean", "Length of an answer (tokens)", GREEN),
    ("entropy", "Entropy: variety of the words (nats a token)", PURPLE),
    ("score/spread", "Spread of the reward models (standard deviations)", BLUE),
)

# Evaluations below which no curve is fitted: the law has two unknowns.
MIN_POINTS = 4

# Name -> (sqrt(KL) [N], gain over the SFT model [N]) of N evaluations.
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Panel:
    """One metric over the steps: title, [N] steps, [N] values, colour; `dotted` marks the points of a sparse one."""

    title: str
    steps: list[int]
    values: list[float]
    colour: str
    dotted: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Event:
    """Steps that a line marks in every panel, and the words for it below the picture."""

    words: str
    steps: list[int]
    colour: str
    line: str


def draw_run(output_dir: str | Path) -> Path | None:
    """Draw chart.png of a PPO directory from its metrics.jsonl; None if no step is logged yet or the disk is full.

    A panel a metric over the steps, best/ and the guard's steps marked. With MIN_POINTS held-out evaluations also
    score_against_kl.png: the score of the reward model PPO trains against (the proxy) and the judge's, over sqrt(KL).
    """
    # A run that ends before its first step has nothing to show.
    output_dir = Path(output_dir)
    rows = read_metrics(output_dir)
    if not rows:
        return None

    plt = pyplot()
    curves = overoptimization(rows)
    below = "PPO step (0: the SFT model)" if curves else "PPO step"
    figure = draw_panels(plt, panels_of(rows), events_of(output_dir, rows), below)
    # Two points are no curve.
    if any(len(gain) >= MIN_POINTS for _, gain in curves.values()):
        save(plt, draw_curves(plt, curves), output_dir / "score_against_kl.png")
    return save(plt, figure, output_dir / "chart.png")


def save(plt, figure, file: Path) -> Path | None:
    """Write a figure and close it; None where the disk is full, with a warning."""
    # A reader of the picture sees the old one or the new one, never half of one.
    part = file.with_name(f".{file.name}.{TOKEN}{os.getpid()}")
    try:
        figure.savefig(part, dpi=100, format="png")
        os.replace(part, file)
    except OSError as error:
        # A picture is drawn while another error may be on its way up (a full disk above all), and must not hide it.
        warnings.warn(f"no chart could be written to {file} ({error})", stacklevel=2)
        return None
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)
    return file


# ---- over the steps ----
def panels_of(rows: list[dict]) -> list[Panel]:
    """PANELS of a run's metrics; what was evaluated has the SFT model's value at step 0."""
    panels = []
    for key, title, colour in PANELS:
        points = [(row["step"], float(row[key])) for row in rows if key in row]
        start = rows[0].get(key.replace("eval/", "eval_start/"))
        evaluated = key.startswith("eval/")
        if evaluated and points and start is not None:
            points.insert(0, (0, float(start)))
        if points:
            steps, values = zip(*points, strict=True)
            # Lengths start at 0, so that a collapse to short answers looks as large as it is.
            panels.append(Panel(title, list(steps), list(values), colour, evaluated, key == "len/mean"))
    return panels


def events_of(output_dir: Path, rows: list[dict]) -> list[Event]:
    """The step that best/ holds, if there is one, and the steps at which the guard stepped in."""
    events = []
    state = output_dir / "best" / "state.json"
    if state.is_file():
        best = json.loads(state.read_text(encoding="utf-8")).get("best")
        if best:
            events.append(Event(f"best evaluation, in best/ (step {best['step']})", [best["step"]], GREEN, "-"))

    guarded = [row["step"] for row in rows if "guard" in row]
    if guarded:
        events.append(Event("the guard stepped in", guarded, ORANGE, "--"))
    return events


def draw_panels(plt, panels: list[Panel], events: list[Event], below: str):
    """A figure of the panels in two columns, the events as lines in each; `below` names the steps."""
    height = math.ceil(len(panels) / 2)
    size = (11, 2.5 * height + 0.6)
    figure, axes = plt.subplots(height, 2, figsize=size, sharex=True, squeeze=False, constrained_layout=True)

    for axis, panel in zip(axes.flat, panels, strict=False):
        # A single point is no line.
        dotted = panel.dotted or len(panel.steps) == 1
        axis.plot(panel.steps, panel.values, color=panel.colour, marker="o" if dotted else "", markersize=4)
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.grid(alpha=0.3)
        if panel.from_zero:
            axis.set_ylim(0, 1.15 * max(panel.values))
        for event in events:
            for step in event.steps:
                axis.axvline(step, color=event.colour, linestyle=event.line, linewidth=1.2, alpha=0.8)

    # Half a step is none.
    for axis in axes[-1]:
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axis.set_xlabel(below)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)

    # What the lines mean stands below the panels, where it can cover no curve.
    if events:
        lines = [plt.Line2D([], [], color=event.colour, linestyle=event.line) for event in events]
        figure.legend(lines, [event.words for event in events], loc="outside lower center", ncols=len(events))
    return figure


# ---- against sqrt(KL) ----
# Names in the picture: who has not read the paper knows no proxy.
CURVE_NAMES = {"proxy": "the reward model that PPO trains against", "judge": "the judge, which PPO never sees"}
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


def draw_curves(plt, curves: Curves):
    """A figure of each curve against sqrt(KL), side by side: their scores have different units."""
    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), squeeze=False, constrained_layout=True)
    for number, (name, points) in enumerate(curves.items()):
        draw_against_kl(axes[0, number], {name: points}, number)
    figure.suptitle("What the distance from the SFT model buys")
    return figure


def draw_against_kl(axis, curves: Curves, first: int = 0) -> None:
    """Draw the points of each curve over sqrt(KL), with the fitted law where there are enough of them."""
    looks = ((BLUE, "o"), (ORANGE, "s"), (BLACK, "^"))
    for (name, (distance, gain)), (colour, marker) in zip(curves.items(), looks[first:], strict=False):
        axis.plot(distance, gain, marker, markersize=5, color=colour, label=CURVE_NAMES.get(name, name))
        if len(distance) >= MIN_POINTS:
            alpha, beta = fit_overoptimization(distance, gain)
            d = np.linspace(1e-3, distance.max(), 100)
            fitted = d * (alpha - beta * np.log(d))
            law = f"fitted: d ({alpha:.2f} {-beta:+.2f} log d)"
            axis.plot(d, fitted, "--", linewidth=1, color=colour, label=law)

    axis.set_xlabel("d = sqrt(KL), KL in nats a response")
    axis.set_ylabel("gain over the SFT model")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
