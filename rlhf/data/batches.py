"""Batches from encoded rows: padding, collators, and an order of rows that puts like lengths together."""

import random
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import Sampler


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """Token ids of unequal length as one batch.

    Args:
        sequences: B lists of token ids. side: "left" for queries, "right" for everything trained on.
    Returns:
        {"input_ids": [B, L] long, "attention_mask": [B, L] bool}, L the longest; padding holds pad_id and False.
    """
    length = max(len(ids) for ids in sequences)
    shape = (len(sequences), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    # The mask is no comparison with pad_id: a real token may have that id.
    attention_mask = torch.zeros(shape, dtype=torch.bool)

    for row, ids in enumerate(sequences):
        columns = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        input_ids[row, columns] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, columns] = True

    return {"input_ids": input_ids, "attention_mask": attention_mask}


def collate_prompts(query_ids: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Queries padded on the left, so that every response begins in the same column: [B, Q] ids and mask."""
    return pad(query_ids, pad_id, side="left")


def blank_answer(token_id: int) -> dict:
    """A row of `sft_rows` that no loss counts; two tokens, as one alone would leave nothing to predict."""
    return {"input_ids": [token_id, token_id], "completion_mask": [0, 0]}


def _pieces(rows: list[int], size: int) -> list[list[int]]:
    """`rows` cut into pieces of `size`, in their order; the last piece may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class LengthGroupedSampler(Sampler[int]):
    """Row numbers of an epoch, shuffled so that rows of one group are about equally long: little padding.

    The order depends on (lengths, group_size, seed, epoch) and nothing else, no global random state: a run resumed in
    its third epoch sees that epoch's order. accelerate calls `set_epoch`, but on several processes not after a resume:
    a callback must (rlhf/trainer/log.py).

    Args:
        lengths: tokens of each row.
        group_size: rows of one batch over all processes.
        filled: True fills the last group with row number len(lengths), a blank row that the dataset then has at its
            end. Every process needs a batch of its own: without blank rows some would get earlier rows again.
    """

    # Rows are sorted by length inside pools of this many groups: large enough to save padding, small enough to mix.
    POOL = 50

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int, filled: bool = False):
        # Of columns they are numpy's integers, which take four times the memory.
        self.lengths = list(map(int, lengths))
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0
        # -n % size is the number of rows that the last group lacks.
        self.blanks = -len(self.lengths) % group_size if filled else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def __iter__(self) -> Iterator[int]:
        # A generator of its own, seeded by a text: the same order on every process and after a resume.
        shuffler = random.Random(f"{self.seed} {self.epoch}")
        # Shuffled from the same start each time: the order of an epoch must not depend on the epochs before it.
        order = list(range(len(self.lengths)))
        shuffler.shuffle(order)

        # Sorting inside a random pool brings like lengths together, and still mixes the rows of an epoch.
        groups: list[list[int]] = []
        for pool in _pieces(order, self.POOL * self.group_size):
            by_length = sorted(pool, key=self.lengths.__getitem__, reverse=True)
            groups += _pieces(by_length, self.group_size)

        # The incomplete group, if any, stays last, or every batch after it would straddle two groups.
        rest: list[int] = []
        if groups and len(groups[-1]) < self.group_size:
            rest = groups.pop()
        shuffler.shuffle(groups)

        # The longest group comes first: if memory is short, that shows in the first step and not after an hour.
        if groups:
            longest_rows = [self._longest(group) for group in groups]
            longest = longest_rows.index(max(longest_rows))
            groups[0], groups[longest] = groups[longest], groups[0]

        # One blank row stands at the end of the dataset, under the first number behind the real ones.
        blank = [len(self.lengths)] * self.blanks
        return chain(*groups, rest, blank)

    def _longest(self, group: list[int]) -> int:
        return max(self.lengths[row] for row in group)
