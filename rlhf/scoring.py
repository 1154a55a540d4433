"""The score of a response: one function for reward training, the audit and PPO."""

import inspect
from functools import lru_cache

import torch
from torch import Tensor, nn

# A batch is scored in at most so many parts of rows of like length, none of them of fewer rows than pay.
PARTS, PART_ROWS = 4, 4


@lru_cache(maxsize=64)
def accepts(forward_owner: type, name: str) -> bool:
    """Whether `forward` of this module class takes an argument of that name (BLOOM has no position_ids, for one)."""
    return name in inspect.signature(forward_owner.forward).parameters


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, L] long, counted over real tokens, so that a token's position does not depend on the padding beside it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def compact(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of each row moved together at the left, so that no mask is needed under causal attention.

    No token looks at what stands after it, so padding on the right changes nothing; positions count real tokens, and
    attention without a mask has the fastest kernels.

    Returns: ids [B, W], W the longest row, and lengths [B] long.
    """
    real = attention_mask.bool()
    lengths = real.sum(1)
    order = (~real).byte().argsort(dim=1, stable=True)
    return input_ids.gather(1, order[:, : int(lengths.max())]), lengths


def hidden_states(backbone: nn.Module, ids: Tensor) -> Tensor:
    """[B, W, H]: last hidden states of a decoder without a head, of rows that are padded on the right only."""
    return backbone(input_ids=ids, use_cache=False).last_hidden_state


def score(backbone: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score of each row: the head on the hidden state of the last real token.

    transformers' own classification models look for the rightmost id that is not the pad id, whatever the mask says;
    that misses an EOS which doubles as padding, and with it the difference between an empty and an unfinished answer.

    Args:
        backbone: causal decoder without a head, returning `last_hidden_state`. head: [hidden] -> [1].
        input_ids, attention_mask: [B, L], padding on either side; at least one real token a row.
    Returns: [B] float32.
    """
    return apply_head(head, last_states(backbone, input_ids, attention_mask))


def last_states(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, H]: the hidden state of the last real token of each row."""
    ids, lengths = compact(input_ids, attention_mask)
    return hidden_states(backbone, ids)[torch.arange(len(ids), device=ids.device), lengths - 1]


def score_in_parts(backbone: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`score` of many rows, the longer ones apart from the shorter ones: less of it is padding.

    A pair's answers are seldom equally long, so that sorting the pairs by length leaves a third of a batch padding.

    Args: input_ids, attention_mask: [B, L], as for `score`. Returns: [B] float32, in the order of the rows.
    """
    order = attention_mask.sum(1).argsort(stable=True)
    # Their number depends on B alone: every process has to call a sharded model equally often.
    parts = order.chunk(min(PARTS, max(1, len(order) // PART_ROWS)))
    scores = torch.cat([score(backbone, head, input_ids[rows], attention_mask[rows]) for rows in parts])
    return scores[order.argsort()]


def apply_head(head: nn.Module, pooled: Tensor) -> Tensor:
    """[B] float32: the score head on the hidden states [B, H] of the last tokens, in the head's own precision."""
    # Under autocast a score would be rounded to three digits: close answers would tie.
    with torch.autocast(pooled.device.type, enabled=False):
        return head(pooled.to(next(head.parameters()).dtype)).squeeze(-1).float()


def forked_rng():
    """Context in which random numbers may be drawn without changing what training draws afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)
