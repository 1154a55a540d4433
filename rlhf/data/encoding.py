"""Rows of token ids, the same in every stage: tokenizer, encoded rows, --inspect_data."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, repeat

from transformers import AutoTokenizer

import rlhf.baichuan  # noqa: F401  (registers the Baichuan classes with the Auto classes)
from rlhf.artefacts.damage import refused
from rlhf.data.control_tokens import Marked
from rlhf.data.dialogues import Unusable
from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows, RowWriter
from rlhf.data.template import turns_of
from rlhf.run.progress import shown
from rlhf.run.terminal import printable

# Rows and characters that are encoded in one call, at most: enough to keep the tokenizer's threads busy.
CHUNK_ROWS = 128
CHUNK_CHARACTERS = 1_000_000


# ---- tokenizer ----
def load_tokenizer(name_or_path: str):
    """The tokenizer as its files define it. Raises: ValueError, in one sentence, where it is missing or damaged."""
    with refused(f"the tokenizer of {name_or_path}", "give a directory with all its files, or a hub id"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        except OSError as error:
            raise ValueError(str(error)) from error
        # Some damage shows at the first use only.
        ids = tokenizer("问：1+1?", add_special_tokens=True)["input_ids"]
        tokenizer.decode(ids, skip_special_tokens=True)
        tokenizer.get_vocab()
    return tokenizer


# ---- rows ----
def sft_rows(prompt_format: PromptFormat, rows: Iterable[dict], max_length: int, funnel: Funnel) -> Rows:
    """{"input_ids", "completion_mask"}: query, answer, stop token; the mask is 1 on the answer and its stop token.

    A row longer than max_length tokens, or refused by the chat template, is dropped and counted in `funnel`.
    """
    kept = RowWriter()
    for row, pairs in _encoded(prompt_format, rows, ("answer",), funnel):
        if _fits(pairs, max_length, row["where"], funnel):
            query_ids, answer_ids = pairs[0]
            mask = [0] * len(query_ids) + [1] * len(answer_ids)
            kept.append({"input_ids": query_ids + answer_ids, "completion_mask": mask})
    return kept.rows()


def preference_rows(prompt_format: PromptFormat, rows: Iterable[dict], max_length: int, funnel: Funnel) -> Rows:
    """{"query_ids", "chosen_ids", "rejected_ids"}, both answers with their stop token, beside the row's own columns.

    A pair is dropped as a whole, and counted in `funnel`, if either side does not fit.
    """
    kept = RowWriter()
    for row, pairs in _encoded(prompt_format, rows, ("chosen", "rejected"), funnel):
        if _fits(pairs, max_length, row["where"], funnel):
            # Both sides have the same query.
            (query_ids, chosen_ids), (_, rejected_ids) = pairs
            ids = {"query_ids": query_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            kept.append({**row, **ids})
    return kept.rows()


def prompt_rows(prompt_format: PromptFormat, rows: Iterable[dict], max_length: int, funnel: Funnel) -> Rows:
    """{"prompt", "query_ids", "where"}, and "turns" of a dialogue; too long a query is dropped and counted."""
    kept = RowWriter()
    for row, (query_ids,) in _encoded(prompt_format, rows, (), funnel):
        if len(query_ids) > max_length:
            funnel.drop(f"prompt longer than {max_length} tokens", row["where"])
            continue
        columns = {name: row[name] for name in ("prompt", "turns", "where") if name in row}
        kept.append(columns | {"query_ids": query_ids})
    return kept.rows()


def _encoded(
    prompt_format: PromptFormat, rows: Iterable[dict], sides: tuple[str, ...], funnel: Funnel
) -> Iterator[tuple[dict, list]]:
    """Each row with (query ids, answer ids) of each of its sides, or its query ids alone where no side is named.

    A row that the chat template refuses is left out and counted. The texts of many rows are encoded in one call.
    """
    for chunk in _chunks(shown(rows, "encoding")):
        asked = [_texts(prompt_format, row, sides) for row in chunk]
        usable = [texts for texts in asked if not isinstance(texts, Unusable)]
        known = prompt_format.control.encode_all(chain.from_iterable(chain.from_iterable(usable)))

        # In the order of the rows, so that the funnel names its reasons in that order.
        for row, texts in zip(chunk, asked, strict=True):
            if isinstance(texts, Unusable):
                funnel.drop(str(texts), row["where"])
            elif sides:
                answers = [row[side] for side in sides]
                yield row, list(map(prompt_format.answer_ids, texts, answers, repeat(known)))
            else:
                yield row, [prompt_format.with_bos(known[texts[0][0]])]


def _texts(prompt_format: PromptFormat, row: dict, sides: tuple[str, ...]) -> list[tuple[Marked, ...]] | Unusable:
    """The texts to encode for each side of a row, or for its query alone; why not, where the template refuses it."""
    turns = turns_of(row)
    try:
        if not sides:
            return [(prompt_format.query_text(turns),)]
        return prompt_format.answer_texts(turns, [row[side] for side in sides])
    except Unusable as reason:
        return reason


def _chunks(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Rows in runs that are encoded together: a run's texts and ids are in memory at once."""
    chunk = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def _fits(pairs: list[tuple[list[int], list[int]]], max_length: int, where: str, funnel: Funnel) -> bool:
    """Return True if one or two encoded answers to one query can be trained on, else count the row in `funnel`."""
    # The first reason that holds is counted: each test relies on those before it.
    reason = None
    if any(len(answer_ids) == 1 for _, answer_ids in pairs):
        # Characters that the tokenizer's normaliser removes, such as zero-width ones.
        reason = "answer without a token"
    elif len(pairs[0][0]) >= max_length:
        reason = f"prompt longer than {max_length} tokens"
    elif max(len(query_ids) + len(answer_ids) for query_ids, answer_ids in pairs) > max_length:
        reason = f"longer than {max_length} tokens"
    elif len(pairs) == 2 and pairs[0] == pairs[1]:
        # Different texts may have equal ids, after the tokenizer's normaliser.
        reason = "chosen == rejected"

    if reason:
        funnel.drop(reason, where)
    return reason is None


# ---- looking ----
def inspect_rows(prompt_format: PromptFormat, rows: Sequence[dict], funnel: Funnel, count: int = 3) -> None:
    """Print the funnel and the first rows as the model will see them: text, ids, and 1 where there is a loss."""
    print(f"{funnel.table()}\n{prompt_format.describe()}")

    for number, row in enumerate(rows[:count], start=1):
        for name, ids, mask in _sequences(row):
            print(f"\n--- row {number}, {name}, {len(ids)} tokens")
            print(_readable(prompt_format, ids))
            print("ids ", *ids)
            print("mask", *mask)


def _readable(prompt_format: PromptFormat, ids: list[int]) -> str:
    """Text of a row; on a terminal its control tokens have a colour, which tells them from typed ones."""
    tokenizer = prompt_format.tokenizer
    if not sys.stdout.isatty():
        return printable(tokenizer.decode(ids))

    control = set(prompt_format.control.ids.values())
    text = ""
    for is_control, group in groupby(ids, key=control.__contains__):
        # Data may hold escape sequences, which would steer the terminal.
        piece = printable(tokenizer.decode(list(group)))
        text += f"\033[36m{piece}\033[0m" if is_control else piece
    return text


def _sequences(row: dict) -> list[tuple[str, list[int], list[int]]]:
    """(name, ids, mask) of each sequence of an encoded row of any kind."""
    if "input_ids" in row:
        return [("query and answer", row["input_ids"], row["completion_mask"])]

    query = row["query_ids"]
    no_loss = [0] * len(query)
    sequences = []
    for name in ("chosen", "rejected"):
        if f"{name}_ids" in row:
            answer = row[f"{name}_ids"]
            sequences.append((name, query + answer, no_loss + [1] * len(answer)))
    # A row of PPO has its query alone.
    return sequences or [("query", query, no_loss)]
