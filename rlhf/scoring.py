"""The score of a response: one function for reward training, the audit and PPO."""

import inspect
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

# A batch is computed in at most so many parts of rows of like length, none of them of fewer rows than pay.
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


def states_at(backbone: nn.Module, ids: Tensor, pick) -> Tensor:
    """[*, H]: last hidden states of a decoder without a head at the places `pick` of rows padded on the right only."""
    with feed_forward_at(backbone, pick):
        return backbone(input_ids=ids, use_cache=False).last_hidden_state[pick]


@contextmanager
def feed_forward_at(backbone: nn.Module, pick):
    """Within the block the last layer's feed-forward part computes at the places `pick` of [B, L] only.

    Nothing comes after it that looks at other places: their last hidden states, which are wrong within the block, are
    those that nobody asks for. That spares two thirds of a layer for every prompt token, forward and backward.
    """
    part = _last_feed_forward(backbone)
    if part is None:
        yield
        return
    usual, replaced = part.forward, part.__dict__.get("forward")

    def chosen(x: Tensor) -> Tensor:
        found = usual(x[pick][None])[0]
        y = found.new_zeros(x.shape)
        y[pick] = found
        return y

    part.forward = chosen
    try:
        yield
    finally:
        if replaced is None:
            del part.forward
        else:
            part.forward = replaced


def _last_feed_forward(backbone: nn.Module) -> nn.Module | None:
    """The feed-forward part of the last layer, where there is one that takes hidden states and nothing else."""
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return None
    layer = layers[-1]
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        # It would be computed once more in backward, when the block is left.
        return None
    part = getattr(layer, "mlp", None)
    plain = part is not None and len(inspect.signature(type(part).forward).parameters) == 2
    return part if plain else None


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
    return states_at(backbone, ids, (torch.arange(len(ids), device=ids.device), lengths - 1))


def score_in_parts(backbone: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`score` of many rows, the longer ones apart from the shorter ones: less of it is padding.

    A pair's answers are seldom equally long, so that sorting the pairs by length leaves a third of a batch padding.

    Args: input_ids, attention_mask: [B, L], as for `score`. Returns: [B] float32, in the order of the rows.
    """
    parts = parts_by_length(attention_mask.sum(1))
    scores = torch.cat([score(backbone, head, input_ids[rows], attention_mask[rows]) for rows in parts])
    return scores[torch.cat(parts).argsort()]


def parts_by_length(lengths: Tensor) -> list[Tensor]:
    """Row indices, shortest rows first, in at most PARTS parts.

    Their number depends on that of the rows alone: every process has to call a sharded model equally often.
    """
    order = lengths.argsort(stable=True)
    return list(order.chunk(min(PARTS, max(1, len(order) // PART_ROWS))))


def apply_head(head: nn.Module, pooled: Tensor) -> Tensor:
    """[B] float32: the score head on the hidden states [B, H] of the last tokens, in the head's own precision."""
    # Under autocast a score would be rounded to three digits: close answers would tie.
    with torch.autocast(pooled.device.type, enabled=False):
        return head(pooled.to(next(head.parameters()).dtype)).squeeze(-1).float()


def forked_rng():
    """Context in which random numbers may be drawn without changing what training draws afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)
