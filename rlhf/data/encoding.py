"""Rows of token ids, the same in every stage: tokenizer and encoded rows."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path

from transformers import AutoTokenizer

import rlhf.baichuan  # noqa: F401  (registers the Baichuan classes with the Auto classes)
from rlhf.artefacts.damage import refused
from rlhf.artefacts.files import nearest
from rlhf.data.control_tokens import Marked
from rlhf.data.dialogues import Unusable
from rlhf.data.funnel import Funnel
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows, RowWriter
from rlhf.data.template import turns_of
from rlhf.run.progress import shown

# Rows and characters that are encoded in one call, at most: enough to keep the tokenizer's threads busy.
CHUNK_ROWS = 128
CHUNK_CHARACTERS = 1_000_000


# ---- tokenizer ----
def load_tokenizer(name_or_path: str):
    """The tokenizer as its files define it.

    Raises: FileNotFoundError, ValueError, in one sentence, where it is missing or damaged.
    """
    # No hub id has two slashes, or begins like a path.
    if not Path(name_or_path).exists() and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise FileNotFoundError(
            f"--tokenizer_name {name_or_path} does not exist{nearest(name_or_path)}: give a directory or a hub id"
        )
    with refused(f"the tokenizer of {name_or_path}", "give a directory with all its files, or a hub id"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        # `refused` lets errors of the system pass, and transformers raises one for any directory that it cannot read.
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
            # The stop token is a target like any other: without a loss on it the model would not learn to end an
            # answer.
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
            # The texts stay beside the ids: degenerate answers for training and for the audit are made of them.
            ids = {"query_ids": query_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            kept.append({**row, **ids})
    return kept.rows()


def prompt_rows(prompt_format: PromptFormat, rows: Iterable[dict], max_length: int, funnel: Funnel) -> Rows:
    """{"prompt", "query_ids", "where"}, and "turns" of a dialogue; too long a query is dropped and counted."""
    kept = RowWriter()
    # A prompt has no side, so its row comes with the ids of the query alone.
    for row, (query_ids,) in _encoded(prompt_format, rows, (), funnel):
        funnel.lengths.append(len(query_ids))
        if len(query_ids) > max_length:
            funnel.drop(f"prompt longer than {max_length} tokens", row["where"])
            continue
        columns = {name: row[name] for name in ("prompt", "turns", "where", "columns") if name in row}
        kept.append(columns | {"query_ids": query_ids})
    return kept.rows()


def _encoded(
    prompt_format: PromptFormat, rows: Iterable[dict], sides: tuple[str, ...], funnel: Funnel
) -> Iterator[tuple[dict, list]]:
    """Each row with (query ids, answer ids) of each of its sides, or its query ids alone where no side is named.

    A row that the chat template refuses is left out and counted. The texts of many rows are encoded in one call.
    """
    for chunk, asked, known in _with_ids(prompt_format, _chunks(shown(rows, "encoding")), sides):
        # In the order of the rows, so that the funnel names its reasons in that order.
        for row, texts in zip(chunk, asked, strict=True):
            if isinstance(texts, Unusable):
                funnel.drop(str(texts), row["where"])
            elif sides:
                answers = [row[side] for side in sides]
                yield row, list(map(prompt_format.answer_ids, texts, answers, repeat(known)))
            else:
                yield row, [prompt_format.with_bos(known[texts[0][0]])]


def _with_ids(
    prompt_format: PromptFormat, chunks: Iterable[list[dict]], sides: tuple[str, ...]
) -> Iterator[tuple[list[dict], list, dict[Marked, list[int]]]]:
    """Runs of rows, the texts of each row (of `_texts`), and the ids of all these texts.

    The tokenizer's threads encode one run while the texts of the next are made and the ids of the last are looked at.
    """
    with ThreadPoolExecutor(1) as encoder:
        ahead = None
        for chunk in chunks:
            asked = [_texts(prompt_format, row, sides) for row in chunk]
            usable = [texts for texts in asked if not isinstance(texts, Unusable)]
            texts = list(chain.from_iterable(chain.from_iterable(usable)))
            # Only one run is ahead: each is as large as memory should be asked for.
            following = chunk, asked, encoder.submit(prompt_format.control.encode_all, texts)
            if ahead:
                yield *ahead[:2], ahead[2].result()
            ahead = following
        if ahead:
            yield *ahead[:2], ahead[2].result()


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
        # A dialogue's turns are no text by themselves, but all of them stand in its prompt.
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def _fits(pairs: list[tuple[list[int], list[int]]], max_length: int, where: str, funnel: Funnel) -> bool:
    """Return True if one or two encoded answers to one query can be trained on, else count the row in `funnel`."""
    longest = max(len(query_ids) + len(answer_ids) for query_ids, answer_ids in pairs)
    # Rows that are dropped count too, or --inspect_data could not say what a limit costs.
    funnel.lengths.append(longest)
    # The first reason that holds is counted: each test relies on those before it.
    reason = None
    if any(len(answer_ids) == 1 for _, answer_ids in pairs):
        # Characters that the tokenizer's normaliser removes, such as zero-width ones.
        reason = "answer without a token"
    # A prompt as long as the limit is too long already: no token of an answer would fit.
    elif len(pairs[0][0]) >= max_length:
        reason = f"prompt longer than {max_length} tokens"
    elif longest > max_length:
        reason = f"longer than {max_length} tokens"
    elif len(pairs) == 2 and pairs[0] == pairs[1]:
        # Different texts may have equal ids, after the tokenizer's normaliser.
        reason = "chosen == rejected"

    if reason:
        funnel.drop(reason, where)
    return reason is None
