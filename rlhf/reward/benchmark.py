"""RewardBench-format files in --audit_only: accuracy by subset, with the questions of best-of-4 rows counted whole.

A row has `prompt`, `chosen`, `rejected` and `subset`; version 2 has lists of answers on both sides. A question counts
as right where every chosen answer scores above every rejected one.
Source: Lambert et al. 2024, arXiv:2403.13787; version 2: Malik et al. 2025, arXiv:2506.01937.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path

import numpy as np

from rlhf.artefacts.output_dir import real
from rlhf.artefacts.run_json import load_run
from rlhf.data import encoding
from rlhf.data.columns import Survey, find_format
from rlhf.data.dialogues import BadRow, Unusable
from rlhf.data.formats import examples
from rlhf.data.funnel import Funnel
from rlhf.data.located import Located
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows
from rlhf.data.sources import splits_of
from rlhf.data.template import opening
from rlhf.reward.statistics import ScoreRows, share
from rlhf.run.launch import say

SUBSET = "subset"

# Rows that show which columns a source has.
LOOK = 100


# ---- reading ----
def load(args, prompt_format: PromptFormat) -> Rows | None:
    """All pairs of --dataset_name, each with its subset and question, where it is a benchmark; else None.

    A data set with subsets that the reward adapter was trained on is none: its held-out rows alone count there.

    Raises: ValueError where a row is malformed, or none is left.
    """
    # Whoever names the evaluation rows gets those.
    if args.eval_dataset_name or args.eval_split:
        return None
    located, columns = _source(args)
    if SUBSET not in columns or _trained_on(args):
        return None
    fmt = find_format(columns - {SUBSET}, "preference", args.named_columns())
    # Pairs by a label or by rank are no benchmark of this form.
    if not fmt.chosen:
        return None

    funnel = Funnel(formats=[f"{fmt}, every row of it by {SUBSET}"])
    texts: list[dict] = []
    for where, row in located:
        texts += _pairs(where, row, fmt, args.prompt_template, funnel)
    rows = encoding.preference_rows(prompt_format, texts, args.max_length, funnel)
    rows = rows.select(_whole_questions(rows, funnel))
    say(f"{prompt_format.describe()}\n{funnel.table()}")
    # All of them may be longer than --max_length.
    if not rows:
        raise ValueError(f"{args.dataset_name} leaves no question to judge: {funnel.summary()}")
    return rows


def _source(args) -> tuple[Iterable[Located], set[str]]:
    """The rows of the split to audit, and its usual columns; a source of one split has it audited by any name."""
    splits = splits_of(args.dataset_name, args.dataset_config_name)
    name = next(iter(splits)) if len(splits) == 1 else args.train_split
    if name not in splits:
        # As where no benchmark is read: that names the splits there are.
        return [], set()
    return splits[name], Survey(islice(splits[name], LOOK)).usual_columns()


def _trained_on(args) -> bool:
    """True where the reward adapter says that it was trained on this very data set."""
    run = load_run(args.reward_model_lora_path)
    # By the name in run.json: an adapter trained elsewhere says nothing, and is audited as on a benchmark.
    theirs = run and run["arguments"].get("dataset_name")
    if not isinstance(theirs, str):
        return False
    return theirs == args.dataset_name or (Path(theirs).exists() and real(theirs) == real(args.dataset_name))


def _pairs(where: str, row, fmt, template: str, funnel: Funnel) -> Iterator[dict]:
    """Each chosen answer of a row against each rejected one, with what belongs together in `columns`."""
    funnel.read += 1
    if not isinstance(row, dict):
        # Stopped and not skipped: an accuracy over a part of a benchmark is none of that benchmark.
        raise ValueError(f"{where}: {row if isinstance(row, BadRow) else 'a row must be an object with named fields'}")
    sides = [_answers(row.get(name)) for name in (fmt.chosen, fmt.rejected)]
    count = len(sides[0]) * len(sides[1])
    # One row makes as many pairs as its sides have combinations.
    funnel.expanded += max(0, count - 1)
    # How many answers each side had, so that a question that lost one is recognised later.
    about = {SUBSET: str(row.get(SUBSET)), "question": funnel.read, "chosen": len(sides[0]), "rejected": len(sides[1])}
    for chosen, rejected in product(*sides):
        try:
            # Through the reader of the training data: a prompt is rendered here as the reward model has seen it.
            (pair,) = examples(row | {fmt.chosen: chosen, fmt.rejected: rejected}, fmt, template)
        except Unusable as reason:
            funnel.drop(str(reason), where)
            continue
        except BadRow as error:
            raise ValueError(f"{where}: {error}") from None
        yield pair | {"where": where, "opening": opening(pair, template), "columns": about}


def _answers(value) -> list:
    """The answers of one side: a list of texts holds several, a text or a list of messages is one."""
    return value if isinstance(value, list) and value and all(isinstance(item, str) for item in value) else [value]


def _whole_questions(rows: Rows, funnel: Funnel) -> list[int]:
    """Places of the rows whose question lost none of its pairs: a part of them would be easier than the whole."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        # By the number of the row in the file: two rows may ask the same.
        places.setdefault(row["columns"]["question"], []).append(place)

    whole = []
    for own in places.values():
        first = rows[own[0]]
        if len(own) == first["columns"]["chosen"] * first["columns"]["rejected"]:
            whole += own
            continue
        for _ in own:
            funnel.drop("another answer to the same question is dropped", first["where"])
    return whole


# ---- accuracy ----
def has_subsets(rows: Sequence[dict]) -> bool:
    """True for rows of `load`."""
    return bool(rows) and SUBSET in rows[0].get("columns", {})


def by_subset(score_rows: ScoreRows, rows: Sequence[dict]) -> dict[str, dict]:
    """Subset -> share of questions that are right, with its interval, and the share that chance would have right.

    Raises: ValueError for scores that are not finite.
    """
    sides = {name: [tuple(row["query_ids"] + row[f"{name}_ids"]) for row in rows] for name in ("chosen", "rejected")}
    # An answer of a best-of-4 question stands in several pairs, and is scored once.
    different = list(dict.fromkeys(sides["chosen"] + sides["rejected"]))
    scores = dict(zip(different, score_rows([list(ids) for ids in different]), strict=True))
    if not np.isfinite(list(scores.values())).all():
        raise ValueError("scores are not finite: no answer can be told from another by them")

    right: dict[tuple, bool] = {}
    chance = {}
    for row, chosen, rejected in zip(rows, *sides.values(), strict=True):
        about = row["columns"]
        question = about[SUBSET], about["question"]
        # Right only if every pair of the question is.
        right[question] = right.get(question, True) and scores[chosen] > scores[rejected]
        # By chance all chosen answers stand above all rejected ones in one order of so many.
        chance[question] = 1 / math.comb(about["chosen"] + about["rejected"], about["chosen"])

    subsets = {}
    for subset in sorted({name for name, _ in right}):
        own = [question for question in right if question[0] == subset]
        guessed = sum(chance[question] for question in own) / len(own)
        subsets[subset] = share(np.array([right[question] for question in own])) | {"chance": guessed}
    return subsets


def section(results: dict) -> list[tuple[str, list[list[str]]]]:
    """The table of an audit's report, in a list; an empty one where the rows have no subsets."""
    subsets = results.get("subsets")
    if subsets is None:
        return []
    rows = [["subset", "questions", "right", "95% interval", "by chance"]]
    for name, part in subsets.items():
        low, high = part["interval"]
        interval = f"{low:.1%} to {high:.1%}"
        rows.append([name, str(part["n"]), f"{part['share']:.1%}", interval, f"{part['chance']:.0%}"])
    # Over the subsets and not over the questions, as RewardBench has it: a large subset counts no more than a small
    # one.
    mean = sum(part["share"] for part in subsets.values()) / len(subsets)
    count = sum(part["n"] for part in subsets.values())
    rows.append(["mean of the subsets", str(count), f"{mean:.1%}", "", ""])
    return [("Accuracy by subset", rows)]
