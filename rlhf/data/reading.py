"""Reading the rows of a stage: read, check and count them, and split them as the flags say.

    rows, funnel = load_rows(source, "sft" | "preference" | "prompt")   plain rows, each with "where" = "file:line"
    train, evaluation, funnel = load_splits(args, kind, seed)           no prompt in both

Every row that is read is kept or counted under a reason in the `Funnel`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rlhf.data.columns import Survey, find_format
from rlhf.data.dialogues import BadRow, Unusable
from rlhf.data.files import TEXT, has_mark, kind_of
from rlhf.data.formats import MAX_CHARACTERS, examples
from rlhf.data.funnel import Funnel, split_eval, without_overlap
from rlhf.data.located import GB18030_HINT, Located, write_bad_rows
from rlhf.data.rows import Rows, RowWriter
from rlhf.data.sources import EVAL_SPLITS, Again, splits_of
from rlhf.data.template import AUTO, DEFAULT_TEMPLATE, opening
from rlhf.run.progress import shown


# ---- reading ----
def load_rows(
    source: str,
    kind: str,
    split: str = "train",
    *,
    args=None,
    bad_rows_file: Path | str | None = None,
) -> tuple[Rows, Funnel]:
    """Read one split of a source, check its rows, and bring them to one form.

    Args:
        source: as `--dataset_name`.
        kind: "sft" -> {"prompt", "answer"}, "preference" -> {"prompt", "chosen", "rejected"}, "prompt" -> {"prompt"}.
        args: data flags of a script, or `ReadingOptions`; None for the defaults.
        bad_rows_file: where `--bad_rows skip` writes malformed rows.
    Returns: rows, each with "where" ("file:line") and "opening" (a dialogue's first question), and the funnel.
    Raises: ValueError naming malformed rows, or where nothing is left; OSError where the source cannot be read.
    """
    args = args or ReadingOptions()
    splits = splits_of(source, args.dataset_config_name)

    reader = _Reader(kind, args, bad_rows_file)
    rows = reader.rows(source, splits, split)
    reader.finish()
    return rows, reader.funnel


def load_splits(args, kind: str, seed: int, bad_rows_file: Path | str | None = None) -> tuple[Rows, Rows, Funnel]:
    """Training and evaluation rows as the flags say; no prompt is in both.

    Evaluation rows come from --eval_dataset_name, else --eval_split, else a split with a usual name, else they are set
    aside from the training rows. A training row whose prompt is in a given evaluation split is dropped.

    Returns: training rows, evaluation rows (none at --eval_size 0 without a split), one funnel for both.
    Raises: as `load_rows`.
    """
    reader = _Reader(kind, args, bad_rows_file)
    splits = splits_of(args.dataset_name, args.dataset_config_name)
    rows = reader.rows(args.dataset_name, splits, args.train_split)

    # Evaluation rows of a source are counted in the same funnel, and their malformed rows reported together.
    given = _evaluation_source(args, splits)
    evaluation = reader.rows(*given) if given else Rows([])
    reader.finish()

    if given:
        train = without_overlap(rows, evaluation, reader.funnel)
    elif args.eval_size:
        train, evaluation = split_eval(rows, args.eval_size, seed)
    else:
        train = rows
    return train, evaluation, reader.funnel


def _evaluation_source(args, splits: dict) -> tuple[str, dict, str] | None:
    """(source, its splits, split) of the evaluation rows that flags or data set give; None where neither does."""
    if args.eval_dataset_name:
        splits = splits_of(args.eval_dataset_name, flag="--eval_dataset_name")
        # A source for evaluation alone may call its only split "train".
        first = next(iter(splits), "train")
        usual = next((name for name in EVAL_SPLITS if name in splits), first)
        return args.eval_dataset_name, splits, args.eval_split or usual

    usual = next((name for name in EVAL_SPLITS if name in splits and name != args.train_split), None)
    split = args.eval_split or usual
    return (args.dataset_name, splits, split) if split else None


@dataclass(frozen=True)
class ReadingOptions:
    """The data flags that `load_rows` looks at, with their defaults; a script's own arguments have the same names."""

    dataset_config_name: str | None = None
    prompt_template: str = DEFAULT_TEMPLATE
    bad_rows: str = "stop"

    def row_limit(self) -> int | None:
        """Rows that are read of each source: all."""
        return None

    def named_columns(self) -> dict[str, str | None]:
        """The columns the user named, as `find_format` takes them: none."""
        return dict.fromkeys(("prompt", "answer", "chosen", "rejected", "margin"))


class _Reader:
    """Rows of one kind, from one or two sources into one funnel; `finish` reports malformed rows together."""

    def __init__(self, kind: str, args, bad_rows_file: Path | str | None):
        self.kind = kind
        self.args = args
        # The scripts have settled `auto` before they read; without a tokenizer it can only mean the text.
        self.template = DEFAULT_TEMPLATE if args.prompt_template == AUTO else args.prompt_template
        self.bad_rows_file = bad_rows_file
        self.funnel = Funnel()
        self.malformed: list[dict] = []

    def rows(self, source: str, splits: dict[str, Iterable[Located]], split: str) -> Rows:
        """The good rows of a split. Raises: ValueError where it is missing, or holds no row of this kind."""
        # A data set of several kinds of rows calls its splits train_sft, train_prefs and so on.
        alike = [name for name in splits if name.startswith(f"{split}_")]
        if split not in splits and len(alike) == 1:
            split = alike[0]
        if split not in splits:
            raise ValueError(f"{source} has no split {split!r}: it has {', '.join(sorted(splits))}")

        located = splits[split]
        limit = self.args.row_limit()
        if limit is not None:
            located = Again(islice, located, limit)

        # All rows once for their columns alone: only together do they show which are usual.
        # From the source once more below, so that no row has to be kept for it.
        survey = Survey(shown(located, "reading"))
        # Texts alone are prompts.
        if self.kind == "prompt" and survey.only_texts:
            located = ((where, {"prompt": text}) for where, text in located)
            columns = {"prompt"} if survey.count else set()
        elif kind_of(Path(source)) == TEXT:
            raise ValueError(f"{source}: a text file holds prompts, a line each: SFT and pairs need rows with columns")
        else:
            columns = survey.usual_columns()
        try:
            fmt = find_format(columns, self.kind, self.args.named_columns()) if columns else None
        except ValueError as error:
            raise ValueError(f"{source}: {error}{survey.hint()}") from None

        if fmt:
            self.funnel.formats.append(str(fmt))
        if survey.count == limit:
            self.funnel.formats.append(f"of {source} the first {limit:,} rows alone; --inspect_rows -1 reads all")

        # Duplicates are sought inside one source: `load_splits` treats a prompt in both by itself.
        seen: set[bytes] = set()
        writer = RowWriter()
        files: dict[str, None] = {}
        for where, row in shown(located, "checking", total=survey.count):
            files[where.rpartition(":")[0]] = None
            for example in self._examples(where, row, fmt, seen):
                writer.append(example)
        for name in files:
            if Path(name).is_file() and has_mark(Path(name)):
                self.funnel.formats.append(f"the byte order mark of {name} is left out")
        kept = writer.rows()

        # Where all rows are malformed, that is what to report.
        if not kept:
            self.finish()
            raise ValueError(f"{source} has no usable row ({self.funnel.summary()}): check the file")
        return kept

    def _examples(self, where: str, row, fmt, seen: set[bytes]) -> list[dict]:
        """The usable examples of one row; whatever else comes of it is counted."""
        self.funnel.read += 1

        try:
            # What the file reader refused is counted where other malformed rows are.
            if isinstance(row, BadRow):
                raise row
            # A row may make several examples: answers of HC3, turns of a dialogue.
            made = examples(row, fmt, self.template)
        except Unusable as reason:
            self.funnel.drop(str(reason), where)
            return []
        except BadRow as error:
            self.funnel.drop("malformed", where)
            self.funnel.bad_rows.append(f"{where}: {error}")
            # Of a row that could not be parsed, the error holds the raw text.
            content = error.row if error is row else row
            self.malformed.append({"where": where, "reason": str(error), "row": content})
            return []

        self.funnel.expanded += len(made) - 1
        good = [example for example in made if self._is_usable(example, where, seen)]
        for example in good:
            example.update(where=where, opening=opening(example, self.template))
            # Reward functions may look at any column.
            if getattr(self.args, "reward_functions", None):
                example["columns"] = row
        return good

    def _is_usable(self, example: dict, where: str, seen: set[bytes]) -> bool:
        """Return True if an example is neither empty nor huge nor seen before, else count it under the reason."""
        # Numbers such as a margin are left out: a pair that differs in its margin alone is a duplicate.
        texts = {name: value for name, value in example.items() if isinstance(value, str)}
        values = tuple(texts.values())
        # Hashes, because all texts of the data would fill the memory.
        own = _digest(values)

        reason = None
        if not all(values):
            reason = "empty " + next(name for name, text in texts.items() if not text)
        elif sum(map(len, values)) > MAX_CHARACTERS:
            reason = f"longer than {MAX_CHARACTERS} characters"
        elif own in seen:
            reason = "duplicate"
        elif "chosen" in example and _digest((example["prompt"], example["rejected"], example["chosen"])) in seen:
            reason = "contradicts an earlier pair"

        if reason:
            self.funnel.drop(reason, where)
            return False

        seen.add(own)
        return True

    def finish(self) -> None:
        """Stop at malformed rows, or write them down. Raises: ValueError naming the first ones."""
        if self.malformed and self.args.bad_rows == "stop":
            # Five places show a pattern; more would make a message that is not read, and so would one advice for each.
            bad_rows = self.funnel.bad_rows
            encoded = [words for words in bad_rows if GB18030_HINT in words]
            told = [words for words in bad_rows if words not in encoded[1:]][:5]
            first = "; ".join(told)
            more = f" (and {len(bad_rows) - len(told)} more)" if len(bad_rows) > len(told) else ""
            raise ValueError(f"malformed rows: {first}{more}: mend them, or leave them out with --bad_rows skip")

        if self.bad_rows_file:
            # Those of an earlier run are not this one's.
            if self.malformed:
                write_bad_rows(Path(self.bad_rows_file), self.malformed)
            else:
                Path(self.bad_rows_file).unlink(missing_ok=True)


def _digest(texts: tuple[str, ...]) -> bytes:
    """A hash of some texts, each with its length, so that no two rows run into one."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(content) + content)
    return digest.digest()


def fingerprints(rows: Sequence[dict], eval_rows: Sequence[dict]) -> dict[str, str]:
    """What run.json keeps to know the rows again: hashes of the training and of the evaluation rows."""
    return {"fingerprint": data_fingerprint(rows), "eval_fingerprint": data_fingerprint(eval_rows)}


def data_fingerprint(rows: Iterable[dict]) -> str:
    """sha256 of the rows' contents in their order, wherever their file lies."""
    digest = hashlib.sha256()
    for row in shown(rows, "fingerprint of the data"):
        # The turns of a dialogue are in its prompt too.
        content = {key: value for key, value in row.items() if key not in ("where", "turns")}
        line = json.dumps(content, sort_keys=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
