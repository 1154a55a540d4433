"""Turning text into token ids, the same in every stage: tokenizer, `encode`, rows of ids, --inspect_data."""

from collections.abc import Iterable

from transformers import AutoTokenizer

import rlhf.baichuan  # noqa: F401  (registers the Baichuan classes with the Auto classes)
from rlhf.data.funnel import Funnel
from rlhf.data.template import render
from rlhf.run.terminal import printable


# ---- tokenizer ----
def read_tokenizer(name_or_path: str, **options):
    """The tokenizer as its files define it. Raises: ValueError, in one sentence, where it is missing or damaged."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **options)
    # SentencePiece raises RuntimeError for a file that it cannot parse.
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        said = str(error).strip()
        first = said.splitlines()[0][:200] if said else type(error).__name__
        raise ValueError(
            f"no tokenizer could be loaded from {name_or_path} ({first}): give a directory with its files or a hub id"
        ) from None


def load_tokenizer(name_or_path: str):
    """A tokenizer whose pad token is not EOS and that never turns text into control tokens.

    Raises: ValueError where there is none, where it has no EOS, or where it has nothing but EOS to pad with.
    """
    tokenizer = read_tokenizer(name_or_path, split_special_tokens=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name_or_path} has no EOS token: name its eos_token in its config")

    # A loss that leaves the pad id out would leave EOS out too, and the model would never learn to stop.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _unused_special_token(tokenizer, name_or_path)
    return tokenizer


def _unused_special_token(tokenizer, name_or_path: str) -> str:
    """A special token that exists, is not EOS, and stands for nothing; embeddings are never resized for one."""
    if tokenizer.unk_token is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        return tokenizer.unk_token

    # In the order of their ids, so that every run of every stage picks the same token.
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        name = token.content.lower()
        spare = any(word in name for word in ("pad", "unused", "reserved", "extra", "mask"))
        if token.special and spare and index != tokenizer.eos_token_id:
            return token.content

    raise ValueError(
        f"the tokenizer of {name_or_path} pads with its EOS token {tokenizer.eos_token!r} and has no unused special "
        "token: name another pad_token in its tokenizer_config.json, or the model never learns to stop"
    )


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`: no BOS or EOS added, and a `</s>` written in the text stays plain characters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_answer(tokenizer, query: str, answer: str) -> tuple[list[int], list[int]] | None:
    """Ids of a query and of its answer, as the model would have to continue it.

    Returns:
        (`encode(query)`, the rest of `encode(query + answer)` and the EOS id), or None where the first is no prefix of
        the second: there the answer begins inside a token of the query, and no sampling could reach it.
    """
    query_ids = encode(tokenizer, query)
    # One encoding of the whole: a tokenizer may merge characters or put a space where two texts meet.
    row_ids = encode(tokenizer, query + answer)
    if row_ids[: len(query_ids)] != query_ids:
        return None
    return query_ids, row_ids[len(query_ids) :] + [tokenizer.eos_token_id]


# ---- rows ----
def sft_rows(tokenizer, rows: Iterable[dict], template: str, max_length: int, funnel: Funnel) -> list[dict]:
    """{"input_ids", "completion_mask"}: query, answer, EOS; the mask is 1 on the answer and its EOS.

    A row longer than max_length tokens, or broken by its tokens, is dropped and counted in `funnel`.
    """
    kept = []
    for row in rows:
        query = render(template, row["prompt"])
        pair = encode_answer(tokenizer, query, row["answer"])
        if _fits([pair], max_length, row["where"], funnel):
            query_ids, answer_ids = pair
            mask = [0] * len(query_ids) + [1] * len(answer_ids)
            kept.append({"input_ids": query_ids + answer_ids, "completion_mask": mask})
    return kept


def preference_rows(tokenizer, rows: Iterable[dict], template: str, max_length: int, funnel: Funnel) -> list[dict]:
    """{"query_ids", "chosen_ids", "rejected_ids"}, both answers with their EOS, beside the row's own texts and margin.

    A pair is dropped as a whole, and counted in `funnel`, if either side does not fit.
    """
    kept = []
    for row in rows:
        query = render(template, row["prompt"])
        pairs = [encode_answer(tokenizer, query, row[side]) for side in ("chosen", "rejected")]
        if _fits(pairs, max_length, row["where"], funnel):
            # Both sides have the same query.
            (query_ids, chosen_ids), (_, rejected_ids) = pairs
            ids = {"query_ids": query_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            kept.append({**row, **ids})
    return kept


def prompt_rows(tokenizer, rows: Iterable[dict], template: str, max_length: int, funnel: Funnel) -> list[dict]:
    """{"prompt", "query_ids", "where"}; a query longer than max_length tokens is dropped and counted in `funnel`."""
    kept = []
    for row in rows:
        query_ids = encode(tokenizer, render(template, row["prompt"]))
        if len(query_ids) > max_length:
            funnel.drop(f"prompt longer than {max_length} tokens", row["where"])
        else:
            kept.append({"prompt": row["prompt"], "query_ids": query_ids, "where": row["where"]})
    return kept


def _fits(pairs: list[tuple[list[int], list[int]] | None], max_length: int, where: str, funnel: Funnel) -> bool:
    """Return True if one or two encoded answers to one query can be trained on, else count the row in `funnel`."""
    # The first reason that holds is counted: each test relies on those before it.
    reason = None
    if None in pairs:
        reason = "query is no prefix of its row"
    elif any(len(answer_ids) == 1 for _, answer_ids in pairs):
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
def inspect_rows(tokenizer, rows: list[dict], funnel: Funnel, count: int = 3) -> None:
    """Print the funnel and the first rows as the model will see them: text, ids, and 1 where there is a loss."""
    print(funnel.table())

    for number, row in enumerate(rows[:count], start=1):
        for name, ids, mask in _sequences(row):
            print(f"\n--- row {number}, {name}, {len(ids)} tokens")
            # Data may hold escape sequences, which would steer the terminal.
            print(printable(tokenizer.decode(ids)))
            print("ids ", *ids)
            print("mask", *mask)


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
