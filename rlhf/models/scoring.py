"""The score of a response: one function for reward training, the audit and PPO."""

import torch
from torch import Tensor, nn

from rlhf.models.forward import hidden_at, pack, parts_by_length
from rlhf.models.kernels import BY_ROW


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
    # Real tokens alone, or with padding on the right, at which no real token looks.
    packed = pack(backbone, input_ids, attention_mask)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    # Places count real tokens, so this is the last one wherever the padding is.
    return hidden_at(backbone, packed, rows, attention_mask.sum(1) - 1)


def score_in_parts(backbone: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`score` of many rows, the longer ones apart from the shorter ones: less at once, and less of it padding.

    A pair's answers are seldom equally long, so that sorting the pairs by length leaves a third of a batch padding.
    Packed rows have none: on a GPU, which small parts would leave idle, they are computed at once.

    Args: input_ids, attention_mask: [B, L], as for `score`. Returns: [B] float32, in the order of the rows.
    """
    if input_ids.is_cuda and backbone.config._attn_implementation == BY_ROW:
        return score(backbone, head, input_ids, attention_mask)
    # In as many parts on every process: under ZeRO-3 each forward pass is a meeting of all of them.
    parts = parts_by_length(attention_mask.sum(1))
    scores = torch.cat([score(backbone, head, input_ids[rows], attention_mask[rows]) for rows in parts])
    # The argsort of a permutation is its inverse.
    return scores[torch.cat(parts).argsort()]


def apply_head(head: nn.Module, pooled: Tensor) -> Tensor:
    """[B] float32: the score head on the hidden states [B, H] of the last tokens, in the head's own precision."""
    # Under autocast a score would be rounded to three digits: close answers would tie.
    with torch.autocast(pooled.device.type, enabled=False):
        return head(pooled.to(next(head.parameters()).dtype)).squeeze(-1).float()
