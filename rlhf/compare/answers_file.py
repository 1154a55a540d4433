"""answers.jsonl: the answers of all versions with what they were made by, for votes that need no model."""

import json
from pathlib import Path

from rlhf.artefacts.fingerprints import adapter_hash
from rlhf.compare.arguments import terms_of
from rlhf.compare.tables import Columns

NAME = "answers.jsonl"

# Flags that the answers depend on, beside the seed of each.
SAMPLING = ("do_sample", "temperature", "top_p", "repetition_penalty", "max_new_tokens")


def write_answers(path: Path, prompts: list[str], columns: Columns, seeds: list[int], args) -> None:
    """Write a row an answer: what `playground.py --answers` reads.

        {"prompt", "version", "answer", "score": number or null, "seed", "sampling": {...}, "adapter": hash or null}

    Args:
        seeds: of each prompt, which all versions share. args: flags of compare.py, `versions` among them.
    """
    sampling = {name: getattr(args, name) for name in SAMPLING}
    marks = {name: fingerprint(value) for name, value in args.versions.items()}
    with path.open("w", encoding="utf-8") as out:
        for number, prompt in enumerate(prompts):
            # A column of best of n is no version of its own.
            for name in args.versions:
                cell = columns[name][number]
                row = {"prompt": prompt, "version": name, "answer": cell.text, "score": cell.score}
                row |= {"seed": seeds[number], "sampling": sampling, "adapter": marks[name]}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def fingerprint(value: str | None) -> str | None:
    """Hash of a version's weights, of a sum the hashes with their weights; None for the bare base."""
    if value is None:
        return None
    parts = terms_of(value)
    if parts == [(1.0, value)]:
        return adapter_hash(value)
    return "+".join(f"{weight:g}*{adapter_hash(path)}" for weight, path in parts)
