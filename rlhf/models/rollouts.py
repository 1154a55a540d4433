"""Batches of rollouts: rows of similar length together, and several rollouts as one."""

import dataclasses

import torch
from torch import Tensor

from rlhf.models.generation import Rollout


def by_length(rollout: Rollout, rows_at_once: int) -> list[Tensor]:
    """Row indices in batches of `rows_at_once`, rows of similar length together: less padding is computed."""
    lengths = rollout.query_mask.sum(1) + rollout.mask.sum(1)
    # A stable sort, for the same batches on every machine.
    order = lengths.argsort(stable=True)
    return list(order.split(rows_at_once))


def by_tokens(rows: Tensor, lengths: Tensor, limit: int) -> list[Tensor]:
    """Row indices [N], the shortest first, cut where rows padded to the longest would hold more than `limit` tokens.

    Args:
        lengths: [B] long, tokens of every row. limit: a row that is longer has a pass of its own.
    """
    rows = rows[lengths[rows].argsort(stable=True)]
    sizes: list[int] = []
    # In rising order, the row that comes next is the longest of its pass.
    for length in lengths[rows].tolist():
        if sizes and (sizes[-1] + 1) * length <= limit:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return list(rows.split(sizes))


def join(parts: list[Rollout], pad_token_id: int) -> Rollout:
    """Several rollouts as one, padded to the widest query (on the left) and response (on the right)."""
    joined = {}
    for field in dataclasses.fields(Rollout):
        tensors = [getattr(part, field.name) for part in parts]
        # What a later phase fills in is in none of the parts yet.
        if any(tensor is None for tensor in tensors):
            continue
        width = max(tensor.shape[1] for tensor in tensors)
        # Elsewhere 0, which in a mask is False.
        value = pad_token_id if field.name.endswith("_ids") else 0
        left = field.name.startswith("query")
        joined[field.name] = torch.cat([_pad(tensor, width, value, left) for tensor in tensors])
    return Rollout(**joined)


def _pad(tensor: Tensor, width: int, value: int, left: bool) -> Tensor:
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)
