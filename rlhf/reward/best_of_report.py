"""Best of n in words, as a table and as a chart: up to which n a reward model can be trusted."""

from pathlib import Path

from rlhf.run.pictures import BLUE, ORANGE, pyplot


def sentence(figures: dict) -> str:
    """One sentence on `best_of.summary`: up to which n the judge agrees with what the reward model likes."""
    last = figures["curve"][-1]
    most = figures["n"]
    if not figures["judged"]:
        # In deviations of single answers, so that reward models of different scales can be compared.
        gain = last["score_gain"] / max(figures["score_std"], 1e-12)
        return (
            f"best of n: the best of {most} answers scores {gain:.1f} standard deviations above a single one; whether "
            "it is better, only a judge can say: give --judge_lora_path"
        )

    by_size = {row["n"]: row for row in figures["curve"]}
    turn = figures["turns"]
    # Without a turn the largest value seen, which may lie before the last n by chance.
    best = by_size[turn] if turn else max(figures["curve"], key=lambda row: row["judged"])
    gain = f"{_deviations(figures, best):+.2f} standard deviations"
    if turn == 1:
        return (
            f"best of n: this reward model cannot be trusted at all: the judge likes the best of {most} less than a "
            f"random one ({_deviations(figures, last):+.2f} standard deviations)"
        )
    if turn:
        return (
            f"best of n: trust this reward model up to n = {turn} ({best['kl']:.1f} nats), where the judge's gain is "
            f"{gain}; beyond it the judge falls, to {_deviations(figures, last):+.2f} at n = {most}"
        )
    # A gain within its own interval may be chance.
    if best["n"] == 1 or best["judged_gain"] <= best["judged_gain_half"]:
        return f"best of n: up to n = {most} the judge sees neither gain nor loss in what this reward model likes"
    return (
        f"best of n: trust this reward model up to n = {most} ({last['kl']:.1f} nats) at least: the judge does not "
        f"fall, and gains {gain} at n = {best['n']}"
    )


def _deviations(figures: dict, row: dict, name: str = "judged") -> float:
    """Gain over a single answer in standard deviations of the answers to one prompt."""
    return row[f"{name}_gain"] / max(figures[f"{name}_std"], 1e-12)


def section(results: dict) -> list[tuple[str, list[list[str]]]]:
    """The table of an audit's report, in a list; an empty one where --best_of was not asked for."""
    figures = results.get("best_of_n")
    if figures is None:
        return []
    rows = [["n", "KL (nats)", "score of the best", "judge of the best", "judge's gain"]]
    for row in figures["curve"]:
        judged = ["-", "-"]
        if figures["judged"]:
            judged = [
                f"{row['judged']:.3f} ± {row['judged_half']:.3f}",
                f"{row['judged_gain']:+.3f} ± {row['judged_gain_half']:.3f}",
            ]
        rows.append([str(row["n"]), f"{row['kl']:.2f}", f"{row['score']:.3f} ± {row['score_half']:.3f}", *judged])
    return [(f"Best of n, over {figures['prompts']} prompts", rows)]


def draw(figures: dict, file: Path) -> None:
    """One chart: gains in score and judge against KL, with intervals, beside a random choice, which gains nothing."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    rows = figures["curve"]
    curves = [("score", "reward model, which chooses", ORANGE, "s--")]
    if figures["judged"]:
        curves.append(("judged", "judge", BLUE, "o-"))
    for name, label, colour, style in curves:
        draw_curve(axis, figures, (name, label, colour, style))

    axis.axhline(0, color="grey", linewidth=1, linestyle=":", label="a random choice")
    if figures["turns"]:
        turn = next(row for row in rows if row["n"] == figures["turns"])
        axis.axvline(turn["kl"], color=BLUE, linewidth=1, linestyle=":", label=f"the judge turns: n = {turn['n']}")
    label_sizes(axis, figures)
    axis.set_ylabel("gain over a single answer\n(standard deviations of the answers to one prompt)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def label_sizes(axis, figures: dict) -> None:
    """Name the places of the x axis by KL below, and by n above."""
    axis.set_xlabel("KL from the SFT model = log n - (n - 1) / n (nats)")
    # KL is where curves of different methods can be compared, n is what one can choose.
    above = axis.secondary_xaxis("top")
    above.set_xticks([row["kl"] for row in figures["curve"]], [str(row["n"]) for row in figures["curve"]])
    above.set_xlabel(f"best of n answers, {figures['prompts']} held-out prompts (bands: 95 %)")


def draw_curve(axis, figures: dict, curve: tuple[str, str, str, str]) -> None:
    """One curve with its band of 95 %: name in `figures`, label, colour and style of the line."""
    name, label, colour, style = curve
    # Both curves in deviations of single answers, or a judge of another scale would not fit into the picture.
    scale = max(figures[f"{name}_std"], 1e-12)
    kl = [row["kl"] for row in figures["curve"]]
    gains = [row[f"{name}_gain"] / scale for row in figures["curve"]]
    halves = [row[f"{name}_gain_half"] / scale for row in figures["curve"]]
    axis.plot(kl, gains, style, color=colour, markersize=5, label=label)
    low = [gain - half for gain, half in zip(gains, halves, strict=True)]
    high = [gain + half for gain, half in zip(gains, halves, strict=True)]
    axis.fill_between(kl, low, high, color=colour, alpha=0.15, linewidth=0)
