"""Packing: rows of different length in one sequence, so that no padding is computed.

    rows        a b c            ids [1, N]        a b c d e
                d e              positions [1, N]  0 1 2 0 1

Everything in a decoder but attention treats each token alone. Attention is told where the rows end, and computes them
one by one, or all at once where a GPU has a kernel for that. `enable_packing` tries whether a model obeys; the rows of
a model that does not are padded.
Source: Krell et al. 2021, arXiv:2107.02027 (packing without contamination across sequences).
"""

import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf.models.kernels import BY_ROW
from rlhf.models.shards import abandoned_on_error


# ---- running ----
def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head, whatever the architecture calls it."""
    return getattr(model, model.base_model_prefix)


def forward(model: PreTrainedModel, pick, input_ids: Tensor, **inputs) -> tuple[Tensor, Tensor]:
    """Logits and the hidden states they were made from, at chosen places only: [B, L, V] is never built.

    The places are chosen where hidden states enter the output layer, so models that scale or cap logits stay right,
    and any architecture will do.

    Args:
        model: a causal language model (adapters inside are whatever is active). pick: index into [B, L].
        input_ids: [B, L]. inputs: more arguments of the model (mask, positions, cache).
    Returns: logits [*, V] and hidden [*, H], `*` the shape of [B, L][pick], both in the model's dtype.
    """
    caught = []

    def choose(module, args):
        caught.append(args[0][pick])
        # What such a hook returns takes the place of the layer's arguments.
        return tuple(caught)

    # The hook is taken off whatever happens, or the model would go on choosing.
    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        # With one token a row, as in decoding, no place can be left out.
        with mlp_only_at(backbone_of(model), pick) if input_ids.shape[1] > 1 else nullcontext():
            logits = model(input_ids=input_ids, **inputs).logits
    finally:
        hook.remove()
    return logits, caught[0]


# A batch is computed in at most so many parts of rows of like length, none of them of fewer rows than pay.
PARTS = 4
PART_ROWS = 4

# Relative difference of hidden states that may be rounding; the influence of another row is many times as large.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@lru_cache(maxsize=64)
def accepts(forward_owner: type, name: str) -> bool:
    """Return True if `forward` of this module class takes an argument of that name (BLOOM has no position_ids)."""
    return name in inspect.signature(forward_owner.forward).parameters


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, L] long, counted over real tokens, so that a token's position does not depend on the padding beside it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def compact(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, W], W the longest row: real tokens moved together at the left, so that causal attention needs no mask.

    No token looks at what stands after it, so padding on the right changes nothing; positions count real tokens, and
    attention without a mask has the fastest kernels.
    """
    real = attention_mask.bool()
    # Stable, so that the real tokens keep their order.
    order = (~real).byte().argsort(dim=1, stable=True)
    return input_ids.gather(1, order[:, : int(real.sum(1).max())])


def parts_by_length(lengths: Tensor) -> list[Tensor]:
    """Row indices, shortest rows first, in at most PARTS parts.

    Their number depends on that of the rows alone: every process has to call a sharded model equally often.
    """
    order = lengths.argsort(stable=True)
    return list(order.chunk(min(PARTS, max(1, len(order) // PART_ROWS))))


@dataclass
class Packed:
    """Inputs of a decoder for rows [B, L], and the places of their real tokens in its output.

    inputs: its arguments. starts: [B], where each row begins in one sequence; None where rows pad on the right.
    """

    inputs: dict[str, Any]
    starts: Tensor | None = None

    def index(self, row: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the hidden states of tokens; `row` and `place` (which counts real tokens from 0) are long."""
        if self.starts is None:
            return row, place
        # All rows are one row of the packed batch.
        return torch.zeros_like(row), self.starts[row] + place


def pack(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """The real tokens of rows [B, L], padded on either side, in the way this model is known to take them.

    Raises: ValueError for a row without a token, whose place would be that of its neighbour's.
    """
    # `enable_packing` set this name, if its trial showed that the model obeys.
    if backbone.config._attn_implementation != BY_ROW:
        return Packed({"input_ids": compact(input_ids, attention_mask)})

    real = attention_mask.bool()
    lengths = real.sum(1)
    row_lengths = lengths.tolist()
    if min(row_lengths) < 1:
        raise ValueError("a row has no token")

    inputs = {
        "input_ids": input_ids[real][None],
        "position_ids": position_ids(real)[real][None],
        "row_lengths": row_lengths,
        "row_bounds": pad(lengths.cumsum(0), (1, 0)).int(),
        # Of four dimensions, so that transformers makes no mask [N, N] that nobody would look at.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=real.device),
    }
    # Exclusive sums: each row begins where all the rows before it end.
    return Packed(inputs, lengths.cumsum(0) - lengths)


def hidden_at(backbone: nn.Module, packed: Packed, row: Tensor, place: Tensor) -> Tensor:
    """[*, H]: last hidden states of a decoder without a head at these places of rows; gradients flow."""
    pick = packed.index(row, place)
    with mlp_only_at(backbone, pick):
        return backbone(**packed.inputs, use_cache=False).last_hidden_state[pick]


def enable_packing(backbone: PreTrainedModel) -> bool:
    """Turn on packing for a decoder, if a trial shows that each packed row is computed as if it were alone."""
    config = backbone.config
    text = backbone.config.get_text_config()
    # What a window does shows in rows longer than it only.
    other_layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if other_layers or getattr(text, "sliding_window", None) or config._attn_implementation != "sdpa":
        return False

    # Without positions from outside, each row would count on from the row before it.
    if not accepts(type(backbone), "position_ids"):
        return False

    # Different tokens all over, so that a row which sees its neighbour has other hidden states.
    ids = torch.arange(14, device=next(backbone.parameters()).device).view(2, 7) % text.vocab_size
    training = backbone.training
    # Dropout alone would tell two passes of one row apart.
    backbone.eval()

    try:
        # The usual way first: a model may look at what its attention is called.
        alone = torch.cat([_states(backbone, {"input_ids": row[None]}) for row in (ids[0], ids[1, :4])])
        config._attn_implementation = BY_ROW
        if not _keeps_rows_apart(backbone, ids, alone):
            config._attn_implementation = "sdpa"
    finally:
        backbone.train(training)
    return config._attn_implementation == BY_ROW


def _keeps_rows_apart(backbone: PreTrainedModel, ids: Tensor, alone: Tensor) -> bool:
    """Return True if packed rows of 7 and 4 tokens of `ids` [2, 7] have the hidden states [11, H] of each alone."""
    mask = torch.ones_like(ids).bool()
    mask[1, 4:] = False
    try:
        with abandoned_on_error(backbone):
            difference = (_states(backbone, pack(backbone, ids, mask).inputs) - alone).norm(dim=1)
    except (TypeError, ValueError, IndexError, RuntimeError):
        # Takes no further arguments, or looks into the mask: there are as many ways as architectures.
        return False
    return bool((difference <= TOLERANCE[backbone.dtype] * alone.norm(dim=1)).all())


@torch.no_grad()
def _states(backbone: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[N, H] float32: the last hidden states of one sequence."""
    return backbone(**inputs, use_cache=False).last_hidden_state[0].float()


def scatter_by_mask(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] like `mask` with the N `values` at its True entries, in order, and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


# ---- only where it is asked for ----
@contextmanager
def mlp_only_at(backbone: nn.Module, pick):
    """Within the block the last layer's feed-forward part computes at the places `pick` of [B, L] only.

    Nothing comes after it that looks at other places: their last hidden states, which are wrong within the block, are
    those that nobody asks for. That spares two thirds of a layer for every prompt token, forward and backward.
    """
    # Without such a part all places are computed, which costs time and changes nothing.
    part = last_mlp(backbone)
    if part is None:
        yield
        return
    usual = part.forward
    replaced = part.__dict__.get("forward")

    # The places become one row of tokens: a feed-forward part treats each token alone.
    def chosen(x: Tensor):
        output = usual(x[pick][None])
        # Some mixtures of experts give back what their router found, too.
        states, *rest = output if isinstance(output, tuple) else (output,)
        # The residual is added to these zeros, and nobody asks for the sum.
        y = states.new_zeros(x.shape)
        y[pick] = states[0]
        return (y, *rest) if isinstance(output, tuple) else y

    # Deleting the attribute of the instance brings the method of its class back.
    part.forward = chosen
    try:
        yield
    finally:
        if replaced is None:
            del part.forward
        else:
            part.forward = replaced


def last_mlp(backbone: nn.Module) -> nn.Module | None:
    """The feed-forward part of the last layer, where there is one that takes hidden states and nothing else."""
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return None
    layer = layers[-1]
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        # It would be computed once more in backward, when the block is left.
        return None
    # Two parameters are `self` and the hidden states; `chosen` could not hand on any more.
    part = getattr(layer, "mlp", None)
    plain = part is not None and len(inspect.signature(type(part).forward).parameters) == 2
    return part if plain else None


def forked_rng():
    """Context in which random numbers may be drawn without changing what training draws afterwards."""
    # This process's card alone: the default is a copy of every visible card's state, and a warning.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)
