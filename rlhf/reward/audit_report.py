"""The audit of a trained reward model: run, stored as audit.json, and shown in words, tables and one picture."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rlhf.artefacts.files import read_object
from rlhf.artefacts.fingerprints import adapter_config_hash, adapter_hash
from rlhf.data.funnel import Funnel, subset
from rlhf.data.prompt_format import PromptFormat
from rlhf.reward import bad_answers, benchmark, best_of_report, length_file
from rlhf.reward.audit import GATE, audit, row_scorer
from rlhf.reward.degenerate import GATE_KINDS
from rlhf.reward.statistics import BINS
from rlhf.run.launch import say
from rlhf.run.pictures import attempt, pyplot

# Held-out pairs that the audit's accuracy and calibration are measured on, at most.
AUDIT_PAIRS = 2000

# Lines under the verdict that go to a terminal.
TERMINAL_LINES = 12


# ---- running ----
def audit_model(
    args, backbone, head, prompt_format: PromptFormat, eval_rows: Sequence[dict], more: dict | None = None
) -> dict:
    """Attack a reward model on held-out prompts; returns the results, of `audit`. Collective over a base in shards.

    Args:
        more: further results for the report, "subsets" and "best_of_n".
    """
    # A scorer of this model, and the pairs to try it on.
    device = next(head.parameters()).device
    score_rows = row_scorer(backbone, head, prompt_format.pad_id, args.per_device_eval_batch_size, device)
    # This funnel is thrown away: run.json counts the rows of training, not those of the audit.
    rows = subset(eval_rows, AUDIT_PAIRS, args.seed, Funnel())
    rows = bad_answers.with_bad_answers(rows, bad_answers.read(args.bad_answers))
    results = audit(
        score_rows,
        rows,
        prompt_format,
        args.seed,
        args.max_length,
        attack_prompts=args.audit_prompts,
        padding=True,
    )
    results |= {"length_calibration": length_file.calibrate(results["points"])} | (more or {})
    if "best_of_n" in results:
        results["verdict"]["notes"].append(best_of_report.sentence(results["best_of_n"]))
    return results


def publish(results: dict, folder: str | Path) -> dict[str, float]:
    """Leave an audit in the directory of its adapter: audit.json, .md and .png; the verdict in the log.

    Returns: what run.json keeps of it: audit_pass (1 or 0) and for each attack the share that the real answer wins.
    """
    # The adapter's hash lets a later stage see that the audit is of another state of the adapter.
    write_audit(results | {"adapter": adapter_hash(folder), "config": adapter_config_hash(folder)}, folder)
    say(table(results))

    # Numbers alone go into run.json; the tables are in the audit's own files.
    shares = {f"audit/{kind}": result["share"] for kind, result in _tried(results).items()}
    return {"audit_pass": float(results["verdict"]["verdict"] == "pass"), **shares}


def _tried(results: dict) -> dict[str, dict]:
    """Kind -> result of each attack that could be made on any prompt."""
    return {kind: result for kind, result in results["attacks"].items() if result["n"]}


# ---- tables ----
def sections(results: dict) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells with their header) of each table of a report."""
    return [
        ("Attacks", _attack_rows(results)),
        ("Accuracy", _accuracy_rows(results)),
        ("Calibration", _calibration_rows(results)),
        ("Scores", _score_rows(results)),
        *length_file.section(results),
        *benchmark.section(results),
        *best_of_report.section(results),
    ]


def _attack_rows(results: dict) -> list[list[str]]:
    """How often the real answer wins, by kind of attack, and what the gate makes of it."""
    rows = [["attack", "prompts", "real answer wins", "95% interval", "mean margin", "gate"]]
    for kind, result in results["attacks"].items():
        # The gate says nothing of the kinds that are only noted, and "-" of one that it could not try.
        if not result["n"]:
            passed = "-"
        elif kind not in GATE_KINDS:
            passed = ""
        else:
            passed = "FAIL" if kind in results["verdict"]["winning"] else "pass"
        rows.append([kind, *_share_cells(result), _number(result["margin"]), passed])
    return rows


def _accuracy_rows(results: dict) -> list[list[str]]:
    """Accuracy over all pairs, by the length of the answers and by which one is longer."""
    length = results["length"]
    rows = [["accuracy", "pairs", "right", "95% interval"]]
    rows.append(["all pairs", *_share_cells(results["accuracy"])])
    for part in length["quartiles"]:
        rows.append([f"longer response of {part['from']} to {part['to']} tokens", *_share_cells(part)])

    names = {"chosen": "chosen longer", "rejected": "rejected longer", "equal": "equally long"}
    for side, name in names.items():
        rows.append([name, *_share_cells(length["longer"][side])])

    # A mean of two shares has neither a number of pairs nor an interval.
    rows.append(["length-debiased: mean of chosen and rejected longer", "", _percent(length["debiased"]), ""])
    return rows


def _calibration_rows(results: dict) -> list[list[str]]:
    """Confidence against accuracy, a row for each bin of confidence."""
    rows = [["confidence", "pairs", "mean confidence", "accuracy"]]
    for number, part in enumerate(results["calibration"]["bins"]):
        # The bins divide the range from 1/2 to 1.
        low = 0.5 + number / 2 / BINS
        high = 0.5 + (number + 1) / 2 / BINS
        confidence = _percent(part["confidence"])
        rows.append([f"{low:.2f} to {high:.2f}", str(part["n"]), confidence, _percent(part["accuracy"])])
    return rows


def _score_rows(results: dict) -> list[list[str]]:
    """Everything that is one number."""
    rows = [["number", "value"]]
    for name, moments in results["scores"].items():
        for moment, value in moments.items():
            rows.append([f"{name}, {moment}", _number(value)])

    length = results["length"]
    rows += [
        ["expected calibration error", _number(results["calibration"]["ece"])],
        ["rank correlation of score and length", _number(length["spearman"])],
        ["the same of differences within pairs", _number(length["spearman_within"])],
        ["change of a score with the rows beside it", _number(results["padding_change"])],
    ]
    return rows


def _share_cells(result: dict) -> list[str]:
    # A share of nothing has no interval.
    interval = "-"
    if result["interval"] is not None:
        interval = " to ".join(map(_percent, result["interval"]))
    return [str(result["n"]), _percent(result["share"]), interval]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _remarks(results: dict, note: str) -> list[str]:
    """The reasons for the verdict, then the notes, each of these after the word `note`."""
    judged = results["verdict"]
    reasons = [f"- {words}" for words in judged["reasons"]]
    return reasons + [f"{note} {words}" for words in judged["notes"]]


def table(results: dict) -> str:
    """The report for a terminal: verdict, and at most TERMINAL_LINES lines; audit.md has the rest."""
    lines = []
    for remark in _remarks(results, "note:"):
        lines += textwrap.wrap(remark, 99, subsequent_indent="  ")
    accuracy = results["accuracy"]
    if accuracy["n"]:
        lines.append(f"right on {_percent(accuracy['share'])} of {accuracy['n']:,} held-out pairs")
    # The attacks that come nearest to winning stand first.
    for kind, part in sorted(_tried(results).items(), key=lambda item: item[1]["share"]):
        lines.append(f"the real answer wins on {_percent(part['share']):>4} of prompts against {kind}")
    verdict = f"audit of the reward model: {results['verdict']['verdict'].upper()}"
    return "\n".join([verdict, *lines[:TERMINAL_LINES]])


def markdown(results: dict) -> str:
    """The report as Markdown, verdict first."""
    outcome = results["verdict"]["verdict"]
    lines = [f"# Audit of the reward model: {outcome}", ""]
    lines += _remarks(results, "- note:")

    for title, (header, *rows) in sections(results):
        lines += ["", f"## {title}", ""]
        rule = ["---"] * len(header)
        lines += [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]

    # By their names alone, so that the files of an audit can be moved together.
    pictures = ["audit.png", "best_of_n.png"] if "best_of_n" in results else ["audit.png"]
    for name in pictures:
        lines += ["", f"![{name}]({name})"]
    lines.append("")
    return "\n".join(lines)


# ---- the picture ----
def draw(results: dict, file: Path) -> None:
    """One figure: share won by the real answer against each attack, score against length, calibration."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), constrained_layout=True)
    _draw_attacks(left, _tried(results))
    _draw_lengths(middle, results["points"])
    _draw_calibration(right, results["calibration"])

    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"audit of the reward model: {results['verdict']['verdict']}")
    figure.savefig(file, dpi=100)
    # pyplot keeps every figure that is not closed.
    plt.close(figure)


def _draw_attacks(axis, tried: dict[str, dict]) -> None:
    """A bar for each attack, coloured where the gate counts it, and a line at what the gate asks for."""
    names = [f"{kind} (gate)" if kind in GATE_KINDS else kind for kind in tried]
    shares = [result["share"] for result in tried.values()]
    colours = ["tab:blue" if kind in GATE_KINDS else "lightgrey" for kind in tried]
    axis.barh(names, shares, color=colours)
    # The gate limits what an attack wins, the bars show what the real answer wins.
    axis.axvline(1 - GATE, color="tab:red", linestyle="--", linewidth=1)
    axis.set(xlim=(0, 1), xlabel="share of prompts the real answer wins\n(red: what the gate asks for)")
    # The first attack at the top, as in the tables.
    axis.invert_yaxis()


def _draw_lengths(axis, points: dict[str, list]) -> None:
    """A point for each answer: its length and its score."""
    for name, column in points.items():
        lengths, scores = zip(*column, strict=True)
        axis.plot(lengths, scores, ".", markersize=4, alpha=0.6, label=name)
    axis.set(xlabel="response length (tokens)", ylabel="score")
    axis.legend()


def _draw_calibration(axis, calibration: dict) -> None:
    """Confidence against accuracy, beside the diagonal of a calibrated model."""
    # An empty bin has no mean to draw.
    filled = [part for part in calibration["bins"] if part["n"]]
    confidence = [part["confidence"] for part in filled]
    accuracy = [part["accuracy"] for part in filled]
    axis.plot([0.5, 1], [0.5, 1], "--", color="grey", linewidth=1, label="calibrated")
    axis.plot(confidence, accuracy, "o-")
    axis.set(ylim=(0, 1.02), xlabel=f"confidence (ECE {calibration['ece']:.3f})", ylabel="accuracy")


# ---- files ----
def write_audit(results: dict, folder: str | Path) -> None:
    """Write audit.json, audit.md, audit.png and length_calibration.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # NaN is no JSON: other programs could not read the file.
    content = json.dumps(results, ensure_ascii=False, allow_nan=False)
    (folder / "audit.json").write_text(content + "\n", encoding="utf-8")
    (folder / "audit.md").write_text(markdown(results), encoding="utf-8")
    length_file.write_length_file(results, folder)
    attempt(draw, results, folder / "audit.png")


def read_audit(folder: str | Path) -> dict | None:
    """Read what `write_audit` wrote in `folder`; None where there is none. Raises: ValueError if damaged."""
    file = Path(folder) / "audit.json"
    return read_object(file) if file.is_file() else None
