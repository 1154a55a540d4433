"""length_calibration.json beside a reward adapter: what its score owes to length alone, for PPO to take out.

The audit fits it on its own held-out answers, those of both sides; `--length_calibration True` subtracts it in PPO.
"""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from rlhf.artefacts.damage import refuse_types
from rlhf.artefacts.files import read_object, write_json
from rlhf.artefacts.fingerprints import same_parent
from rlhf.reward.length_calibration import LengthCalibration, fit_length_calibration
from rlhf.reward.statistics import length_results, share

LENGTH_FILE = "length_calibration.json"
KINDS = {"lengths": list, "predicted": list, "mean": float, "impossible": str}


# ---- the audit ----
def calibrate(points: dict[str, list]) -> dict:
    """Fit score on length to the answers of an audit, and measure what is left of length once it is subtracted.

    Args:
        points: of `statistics.points`, [tokens, score] of some pairs' answers by side.
    Returns: lengths, predicted, mean (the fit), answers, and before and after with accuracy, debiased and spearman;
        or "impossible" alone, with the reason.
    """
    # [2, P]: chosen answers in the first row, rejected ones in the second.
    lengths = np.array([[tokens for tokens, _ in points[side]] for side in ("chosen", "rejected")])
    scores = np.array([[score for _, score in points[side]] for side in ("chosen", "rejected")])
    try:
        fit = fit_length_calibration(torch.tensor(lengths.ravel()), torch.tensor(scores.ravel()))
    except ValueError as error:
        # Written down all the same: PPO then says why, and not only that there is no file.
        return {"impossible": str(error)}

    subtracted = fit.correction(torch.tensor(lengths.ravel())).numpy().reshape(lengths.shape)
    # The fit is measured on the answers that it was made of: it has a few knots for thousands of answers.
    sides = {"before": _measured(scores, lengths), "after": _measured(scores - subtracted, lengths)}
    curve = {"lengths": fit.lengths, "predicted": fit.predicted, "mean": fit.mean}
    return {**curve, "answers": scores.size, **sides}


def _measured(scores: np.ndarray, lengths: np.ndarray) -> dict:
    """Accuracy, length-debiased accuracy and rank correlation with length of scores [2, P] of P pairs."""
    by_length = length_results(*scores, lengths.T)
    accuracy = share(scores[0] > scores[1])["share"]
    return {"accuracy": accuracy, "debiased": by_length["debiased"], "spearman": by_length["spearman"]}


def section(results: dict) -> list[tuple[str, list[list[str]]]]:
    """The table of an audit's report, in a list; an empty one where an older audit has none."""
    calibration = results.get("length_calibration")
    if calibration is None:
        return []
    if "impossible" in calibration:
        return [("Length calibration", [["none", calibration["impossible"]]])]
    rows = [[f"over {calibration['answers']:,} answers", "score", "score - what length predicts"]]
    names = {"spearman": "rank correlation with length", "accuracy": "accuracy", "debiased": "length-debiased"}
    for name, words in names.items():
        values = [calibration[when][name] for when in ("before", "after")]
        rows.append([words, *("-" if value is None else f"{value:.3f}" for value in values)])
    return [("Length calibration (PPO: --length_calibration True)", rows)]


def write_length_file(results: dict, folder: Path) -> None:
    """Write the fit of an audit, or why there is none, with the hashes of the adapter that it belongs to."""
    calibration = results.get("length_calibration")
    if calibration is not None:
        # An adapter that is trained again has other scores, and this fit is no longer its own.
        owner = {name: results[name] for name in ("adapter", "config") if name in results}
        write_json(folder / LENGTH_FILE, owner | calibration)


# ---- PPO ----
def read_length_file(folder: str | Path) -> LengthCalibration:
    """The calibration of a reward adapter.

    Raises: FileNotFoundError or ValueError, in one sentence, where there is none, it is of another state of the
        adapter, the fit was impossible, or the file is damaged.
    """
    file = Path(folder) / LENGTH_FILE
    again = f"make it with reward_modeling.py --audit_only True --reward_model_lora_path {folder}"
    if not file.is_file():
        raise FileNotFoundError(f"--length_calibration True: {folder} has no {LENGTH_FILE}: {again}")
    content = refuse_types(read_object(file), file, KINDS)
    # Before anything else of the file: what is of another adapter need not be judged.
    if "adapter" not in content or not same_parent(content, folder):
        raise ValueError(f"--length_calibration True: {file} is of another state of the adapter: {again}")
    if "impossible" in content:
        raise ValueError(f"--length_calibration True is not possible with {folder}: {content['impossible']}")

    refuse_types(content, file, KINDS, required=("lengths", "predicted", "mean"))
    for name in ("lengths", "predicted"):
        numbers = {f"{name} {number}": value for number, value in enumerate(content[name])}
        refuse_types(numbers, file, dict.fromkeys(numbers, float))
    # Between two equal lengths no line could be drawn.
    rises = all(one < other for one, other in pairwise(content["lengths"]))
    if not rises or len(content["lengths"]) != len(content["predicted"]) or len(content["lengths"]) < 2:
        raise ValueError(f"{file} holds no rising lengths with a score each: {again}")
    return LengthCalibration(content["lengths"], content["predicted"], content["mean"])


def calibrations(adapters: list[str]) -> list[LengthCalibration]:
    """The calibration of each reward adapter of a PPO run, in their order. Raises: as `read_length_file`."""
    return [read_length_file(folder) for folder in adapters]


def hashes(adapters: list[str]) -> list[str]:
    """The first 16 digits of the sha256 of each calibration, as run.json keeps them. Raises: as `read_length_file`."""
    calibrations(adapters)
    # By the bytes: an audit over other data makes another fit, and the scores of a resumed run would change with it.
    files = [Path(folder) / LENGTH_FILE for folder in adapters]
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
