"""The audit of a trained reward model: run, stored as audit.json, and shown in words, tables and one picture."""

import json
import textwrap
from pathlib import Path

import torch

from rlhf.artefacts.adapters import check_adapter
from rlhf.artefacts.run_json import adapter_hash
from rlhf.data.funnel import Funnel, subset
from rlhf.models.forward import backbone_of
from rlhf.models.loading import add_lora, load_base, pick_dtype, score_head_of
from rlhf.reward.audit import GATE, audit, row_scorer
from rlhf.reward.degenerate import GATE_KINDS
from rlhf.reward.statistics import BINS
from rlhf.run.launch import say
from rlhf.run.pictures import pyplot

# Held-out pairs that the audit's accuracy and calibration are measured on, at most.
AUDIT_PAIRS = 2000


def audit_model(args, backbone, head, tokenizer, eval_rows: list[dict], folder: str) -> dict[str, float]:
    """Attack a reward model on held-out prompts; audit.json, .md and .png in `folder`, the verdict in the log.

    Returns: what run.json keeps of it: audit_pass (1 or 0) and for each attack the share that the real answer wins.
    """
    device = next(head.parameters()).device
    rows = subset(eval_rows, AUDIT_PAIRS, args.seed, Funnel())
    results = audit(
        row_scorer(backbone, head, tokenizer.pad_token_id, args.per_device_eval_batch_size, device),
        rows, tokenizer, args.prompt_template, args.seed, args.max_length,
        attack_prompts=args.audit_prompts, padding=True,
    )  # fmt: skip
    write_audit(results | {"adapter": adapter_hash(folder)}, folder)
    say(table(results), f"audit written to {folder}/audit.md")
    shares = {f"audit/{kind}": result["share"] for kind, result in results["attacks"].items() if result["n"]}
    return {"audit_pass": float(results["verdict"]["verdict"] == "pass"), **shares}


def audit_adapter(args, model_dir: str, tokenizer, base: dict, eval_rows: list[dict]) -> None:
    """--audit_only: the audit of a reward adapter that is there already, as PPO will load it."""
    folder = args.reward_model_lora_path
    check_adapter(
        folder, stage="reward", flag="--reward_model_lora_path", base=base, tokenizer=tokenizer,
        template=args.prompt_template,
    )  # fmt: skip
    model = load_base(model_dir, pick_dtype(args.bf16), device="cuda" if torch.cuda.is_available() else "cpu")
    model, rest = add_lora(model, folder, "reward", trainable=False)
    head = score_head_of(rest, folder).to(model.device)
    audit_model(args, backbone_of(model.get_base_model()), head, tokenizer, eval_rows, folder)


def sections(results: dict) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells with their header) of each table of a report."""
    attacks = [["attack", "prompts", "real answer wins", "95% interval", "mean margin", "gate"]]
    for kind, result in results["attacks"].items():
        passed = "" if kind not in GATE_KINDS else "FAIL" if kind in results["verdict"]["winning"] else "pass"
        attacks.append([kind, *_share_cells(result), _number(result["margin"]), passed if result["n"] else "-"])

    # 2. Accuracy, by the length of the answers and by which one is longer.
    length = results["length"]
    accuracy = [["accuracy", "pairs", "right", "95% interval"], ["all pairs", *_share_cells(results["accuracy"])]]
    for part in length["quartiles"]:
        accuracy.append([f"longer response of {part['from']} to {part['to']} tokens", *_share_cells(part)])

    for side, name in (("chosen", "chosen longer"), ("rejected", "rejected longer"), ("equal", "equally long")):
        accuracy.append([name, *_share_cells(length["longer"][side])])

    accuracy.append(["length-debiased: mean of chosen and rejected longer", "", _percent(length["debiased"]), ""])
    # 3. Calibration: confidence against accuracy.
    calibrated = [["confidence", "pairs", "mean confidence", "accuracy"]]
    for number, part in enumerate(results["calibration"]["bins"]):
        edges = f"{0.5 + number / 2 / BINS:.2f} to {0.5 + (number + 1) / 2 / BINS:.2f}"
        calibrated.append([edges, str(part["n"]), _percent(part["confidence"]), _percent(part["accuracy"])])

    # 4. Everything that is one number.
    numbers = [["number", "value"]]
    for name, moments in results["scores"].items():
        numbers += [[f"{name}, {moment}", _number(value)] for moment, value in moments.items()]

    numbers += [
        ["expected calibration error", _number(results["calibration"]["ece"])],
        ["rank correlation of score and length", _number(length["spearman"])],
        ["the same of differences within pairs", _number(length["spearman_within"])],
        ["change of a score with the rows beside it", _number(results["padding_change"])],
    ]

    titles = "Attacks", "Accuracy", "Calibration", "Scores"
    return list(zip(titles, (attacks, accuracy, calibrated, numbers), strict=True))


def _share_cells(result: dict) -> list[str]:
    interval = "-" if result["interval"] is None else " to ".join(map(_percent, result["interval"]))
    return [str(result["n"]), _percent(result["share"]), interval]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def table(results: dict) -> str:
    """The report as plain text for a log, verdict first, at most 99 columns wide."""
    judged = results["verdict"]
    lines = [f"audit of the reward model: {judged['verdict'].upper()}"]
    for mark, words in [("-", words) for words in judged["reasons"]] + [("note:", words) for words in judged["notes"]]:
        lines += textwrap.wrap(f"{mark} {words}", 99, subsequent_indent="  ")
    for _, rows in sections(results):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for first, *rest in rows:
            cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def markdown(results: dict) -> str:
    """The report as Markdown, verdict first."""
    judged = results["verdict"]
    lines = [f"# Audit of the reward model: {judged['verdict']}", ""]
    lines += [f"- {words}" for words in judged["reasons"]] + [f"- note: {words}" for words in judged["notes"]]
    for title, (header, *rows) in sections(results):
        lines += ["", f"## {title}", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, "", "![audit.png](audit.png)", ""])


def draw(results: dict, file: Path) -> None:
    """One figure: share won by the real answer against each attack, score against length, calibration."""
    plt = pyplot()
    figure, (bars, points, reliability) = plt.subplots(1, 3, figsize=(17, 5), constrained_layout=True)
    tried = {kind: result["share"] for kind, result in results["attacks"].items() if result["n"]}
    colours = ["tab:blue" if kind in GATE_KINDS else "lightgrey" for kind in tried]
    bars.barh([f"{kind} (gate)" if kind in GATE_KINDS else kind for kind in tried], tried.values(), color=colours)
    bars.axvline(1 - GATE, color="tab:red", linestyle="--", linewidth=1)
    bars.set(xlim=(0, 1), xlabel="share of prompts the real answer wins\n(red: what the gate asks for)")
    bars.invert_yaxis()
    for name, column in results["points"].items():
        points.plot(*zip(*column, strict=True), ".", markersize=4, alpha=0.6, label=name)
    points.set(xlabel="response length (tokens)", ylabel="score")
    points.legend()
    filled = [part for part in results["calibration"]["bins"] if part["n"]]
    reliability.plot([0.5, 1], [0.5, 1], "--", color="grey", linewidth=1, label="calibrated")
    reliability.plot([part["confidence"] for part in filled], [part["accuracy"] for part in filled], "o-")
    reliability.set(ylim=(0, 1.02), xlabel=f"confidence (ECE {results['calibration']['ece']:.3f})", ylabel="accuracy")
    for axis in (bars, points, reliability):
        axis.grid(alpha=0.3)
    figure.suptitle(f"audit of the reward model: {results['verdict']['verdict']}")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write_audit(results: dict, folder: str | Path) -> None:
    """audit.json, audit.md and audit.png in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(
        json.dumps(results, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    (folder / "audit.md").write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "audit.png")


def read_audit(folder: str | Path) -> dict | None:
    """Read what `write_audit` wrote in `folder`; None where there is none."""
    file = Path(folder) / "audit.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
