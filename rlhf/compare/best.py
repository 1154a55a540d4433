"""A column of best of n: of several answers of one version to a prompt, the one that the reward model likes most."""

from rlhf.compare.answers import Answer, Versions, row_seeds
from rlhf.run.progress import shown


def with_best(versions: Versions, columns: dict[str, list[Answer]], queries: list[list[int]], args) -> dict:
    """The columns with one more, "NAME best of N", right after that of the first adapter (of the base without any).

    Args:
        columns: version -> its answers, with scores. queries: ids of the prompts. args: best_of, seed, versions.
    """
    name = next((name for name, path in args.versions.items() if path), next(iter(columns)))
    widened = {}
    for version, cells in columns.items():
        widened[version] = cells
        if version == name:
            # With spaces in it: no version can have the same name.
            widened[f"{name} best of {args.best_of}"] = best_column(versions, name, queries, cells, args)
    return widened


def best_column(versions: Versions, name: str, queries: list[list[int]], first: list[Answer], args) -> list[Answer]:
    """The best by score of --best_of answers of a version to each query, of which its own column is the first."""
    best = list(first)
    for number in shown(range(1, args.best_of), f"{name}, best of {args.best_of}", "answers to each prompt"):
        # Seeds beyond those of the answers before: each is a draw of its own.
        seeds = row_seeds(args.seed, len(queries), first=number * len(queries))
        for place, answer in enumerate(versions.answers(name, queries, seeds)):
            if answer.score > best[place].score:
                best[place] = answer
    return best
