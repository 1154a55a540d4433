"""Answers that people called bad, as one more kind of degenerate answer for the audit (--bad_answers)."""

from collections import defaultdict
from collections.abc import Sequence

from rlhf.data.reading import load_rows


def read(source: str | None) -> dict[str, list[str]]:
    """Prompt -> bad answers to it, of a file with prompts and answers (playground.py writes bad_answers.jsonl).

    Raises: as `load_rows`.
    """
    answers = defaultdict(list)
    if source is not None:
        rows, _ = load_rows(source, "sft")
        for row in rows:
            answers[row["prompt"]].append(row["answer"])
    return answers


def with_bad_answers(pairs: Sequence[dict], answers: dict[str, list[str]]) -> list[dict]:
    """The pairs, each with the "bad_answers" that `degenerate` may choose from.

    Those to its own prompt; where there are none, all of them: what is bad there is no answer here either.
    """
    everything = []
    for given in answers.values():
        everything += given
    # Without any there is no such kind of attack, and the pairs stay as they are.
    if not everything:
        return list(pairs)
    return [pair | {"bad_answers": answers.get(pair["prompt"]) or everything} for pair in pairs]
