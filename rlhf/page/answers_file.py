"""answers.jsonl of compare.py: answers to vote on without a model. The standard library alone."""

import json
import math
from pathlib import Path

from rlhf.page.store import Version


def read(path: str) -> list[dict]:
    """The answers as {"prompt", "version", "text", "score", "seed", "sampling"}, ready for the store.

    Raises: FileNotFoundError; ValueError naming the line and what is wrong with it, or where there is nothing to
    compare.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--answers {path} does not exist: compare.py writes it into its --output_dir")
    try:
        # An editor on Windows may have put a byte order mark in front.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--answers {path} is not UTF-8 text: convert it with iconv -t UTF-8") from None

    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_answer(line, f"--answers {path}:{number}"))
    if len({row["version"] for row in rows}) < 2:
        raise ValueError(f"--answers {path} holds answers of fewer than two versions: there is nothing to compare")
    return rows


def _answer(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")

    for name in ("prompt", "version", "answer"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} must be a text")
    score = row.get("score")
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)
    ):
        raise ValueError(f"{where}: score must be a number or null")
    seed = row.get("seed", 0)
    # SQLite holds 64 bits.
    if not isinstance(seed, int) or abs(seed) >= 2**63 or not isinstance(row.get("sampling") or {}, dict):
        raise ValueError(f"{where}: seed must be a whole number, and sampling an object")

    # Half of a surrogate pair is no character, and no file could hold it.
    clean = {name: row[name].encode("utf-8", "replace").decode() for name in ("prompt", "version", "answer")}
    return {
        "prompt": clean["prompt"],
        "version": Version(clean["version"], str(row.get("adapter") or "")),
        "text": clean["answer"],
        "score": score,
        "seed": seed,
        "sampling": row.get("sampling") or {},
    }
