"""From one adapter to another in five points: score, judge, KL and length of their weighted sums.

Between an SFT adapter and a PPO adapter lie policies that no checkpoint of the run is: at the same KL from the first
they can score higher.

Source: Ramé et al. 2024, arXiv:2406.16768 (WARP), section 4.
"""

import csv
from pathlib import Path
from statistics import mean

import torch

from rlhf.compare.answers import Versions
from rlhf.compare.tables import Columns
from rlhf.run.pictures import BLACK, BLUE, GREEN, pyplot

SLIDE = "slide_"
HEADER = ("version", "score", "judge", "KL to the first", "tokens")


@torch.no_grad()
def answer_kl(versions: Versions, name: str, first: str, query: list[int], answer: tuple[int, ...]) -> float:
    """KL(version || first) along one answer, in nats.

        sum over its tokens t of  sum over words w of p(w | t) * (log p(w | t) - log q(w | t))

    The sum over all words is exact where the difference at the sampled word alone would be one draw of it. It is of
    the plain distributions, at temperature 1, however the answer was sampled.

    Args:
        query, answer: token ids; the answer with its stop token.
    """
    input_ids = torch.tensor([[*query, *answer]], device=versions.model.device)
    # The logits in front of each token of the answer.
    places = slice(len(query) - 1, -1)
    logprobs = []
    for version in (name, first):
        # The whole answer in one pass for each of the two: sampling has its logits, but of one version alone.
        with versions.use(version) as model:
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
        logprobs.append(logits[0, places].float().log_softmax(-1))
    p, q = logprobs
    # Summed over the tokens and not averaged: PPO's KL is of an answer too.
    return (p.exp() * (p - q)).sum().item()


def measure(versions: Versions, columns: Columns, queries: list[list[int]], first: str) -> list[dict]:
    """A row for each version, under the names of HEADER: means over the prompts, None where nothing scores."""
    rows = []
    for name, cells in columns.items():
        # Over each version's own answers: KL(version || first) is a mean under the version.
        distances = [
            answer_kl(versions, name, first, query, cell.ids) for query, cell in zip(queries, cells, strict=True)
        ]
        numbers = (
            _mean([cell.score for cell in cells]),
            _mean([cell.judge for cell in cells]),
            mean(distances),
            mean(cell.tokens for cell in cells),
        )
        rows.append(dict(zip(HEADER, (name, *numbers), strict=True)))
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


# ---- files ----
def write_slide(folder: Path, rows: list[dict]) -> None:
    """Write slide.csv, slide.md and slide.png."""
    # Without translation of line ends, as csv writes its own.
    with (folder / "slide.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, HEADER)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "slide.md").write_text("\n".join(table(rows)) + "\n", encoding="utf-8")
    draw(rows, folder / "slide.png")


def table(rows: list[dict]) -> list[str]:
    """The points as lines of a Markdown table; a column that nothing measured is left out."""
    names = [name for name in HEADER if any(row[name] is not None for row in rows)]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [row[name] if isinstance(row[name], str) else f"{row[name]:.3f}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rows: list[dict], file: Path) -> None:
    """Score, judge and length against the KL: the slide as a line, other versions as points with their names."""
    plt = pyplot()
    names = [name for name in ("score", "judge", "tokens") if any(row[name] is not None for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, constrained_layout=True)

    for axis, name, colour in zip(axes[0], names, (BLUE, BLACK, GREEN), strict=False):
        points = [(row["KL to the first"], row[name], row["version"]) for row in rows if row[name] is not None]
        # The line joins the weighted sums; a checkpoint of the run lies on no line between them.
        slide = [(kl, value) for kl, value, version in points if version.startswith(SLIDE)]
        axis.plot(*zip(*slide, strict=True), "o-", color=colour)
        for kl, value, version in points:
            if not version.startswith(SLIDE):
                axis.plot(kl, value, "s", color=colour, fillstyle="none")
            beside = {"textcoords": "offset points", "xytext": (4, 5), "fontsize": 8}
            axis.annotate(version.removeprefix(SLIDE), (kl, value), **beside)
        axis.set(xlabel="KL to the first (nats an answer)", title=name)
        axis.grid(alpha=0.3)
        axis.margins(0.1)
        # From 0, so that a small change of length looks small.
        if name == "tokens":
            axis.set_ylim(bottom=0)

    figure.savefig(file, dpi=100)
    plt.close(figure)
