"""Preference pairs: their lengths, their batches (collators), and the scores of a batch.

With --share_prompt a pair is one sequence, so that its prompt is computed once:

    query | chosen | rejected      positions of both answers continue from the query's end
    each answer sees the query and itself, never the other answer

The scores equal those of two separate rows; the query's tokens, and half of the padding, are saved.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.data.batches import pad
from rlhf.data.rows import Rows
from rlhf.models.forward import TOLERANCE, accepts, backbone_of
from rlhf.models.scoring import apply_head, last_states, score_in_parts


# ---- two rows a pair ----
class PairCollator:
    """P rows of `preference_rows` as one batch of 2P sequences: the chosen ones first, then the rejected ones.

    Returns {"input_ids": [2P, L] long, "attention_mask": [2P, L] bool}, padded on the right; "margin" [P] float32
    where the rows have one (0 for those that have none); "mask" [P] bool where a row is blank, True on the real pairs.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        # All chosen ones first, so that two halves of the scores are the two sides.
        sides = [row["query_ids"] + row["chosen_ids"] for row in rows]
        sides += [row["query_ids"] + row["rejected_ids"] for row in rows]
        batch = pad(sides, self.pad_id, side="right")
        return batch | pair_columns(rows)


def pair_columns(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Columns for the loss beside the tokens of each pair: "margin" and "mask", where any row has them."""
    columns = {}
    if any("margin" in row for row in rows):
        margins = [row.get("margin", 0.0) for row in rows]
        columns["margin"] = torch.tensor(margins)
    if any("blank" in row for row in rows):
        columns["mask"] = torch.tensor(["blank" not in row for row in rows])
    return columns


def blank_pair(token_id: int) -> dict:
    """A row of `preference_rows` that no loss counts."""
    # A side needs at least one token to be scored at.
    sides = {"query_ids": [token_id], "chosen_ids": [token_id], "rejected_ids": [token_id]}
    return sides | {"blank": True}


def pair_length(row: dict) -> int:
    """Tokens of the longer side of a pair."""
    longer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return len(row["query_ids"]) + longer


def pair_lengths(rows: Rows) -> np.ndarray:
    """[N]: `pair_length` of each row."""
    longer = np.maximum(rows.lengths("chosen_ids"), rows.lengths("rejected_ids"))
    return rows.lengths("query_ids") + longer


def shared_lengths(rows: Rows) -> np.ndarray:
    """[N]: `shared_length` of each row."""
    return sum(rows.lengths(f"{name}_ids") for name in ("query", "chosen", "rejected"))


def shared_length(row: dict) -> int:
    """Tokens of a pair in one sequence."""
    return sum(len(row[f"{name}_ids"]) for name in ("query", "chosen", "rejected"))


def score_by_mask(model) -> None:
    """Replace the model's `forward` by the score function of PPO, on right-padded rows.

    The model's own may look for the last token in another way, by the pad id for example.
    It has to be the `forward`: DistributedDataParallel only reduces the gradients of what goes through it.
    """

    def forward(input_ids=None, attention_mask=None, **batch):
        backbone = backbone_of(model)
        # Only a batch with shared prompts has segments.
        if "segments" in batch:
            scores = score_pairs(backbone, model.score, {"input_ids": input_ids, **batch})
        else:
            scores = score_in_parts(backbone, model.score, input_ids, attention_mask)
        return SequenceClassifierOutput(logits=scores)

    # On the instance alone: its class, and other models of it, stay as they are.
    model.forward = forward


# ---- one sequence a pair ----
# Values of `segments`; 0 is the padding.
QUERY = 1
CHOSEN = 2
REJECTED = 3

# Limit on the relative difference of hidden states, by dtype: above rounding, below what a wrong attention causes.
MAX_DIFFERENCE = TOLERANCE


class SharedPromptCollator:
    """P rows of `preference_rows` as P sequences.

    Returns {"input_ids", "attention_mask" (True on real tokens), "position_ids", "segments"} [P, L], and "margin" and
    "mask" as PairCollator does; `segments` is QUERY, CHOSEN or REJECTED, and 0 on the padding at the right.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        # Padding everywhere; the pairs are written over it.
        longest = max(map(shared_length, rows))
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.pad_id)
        position_ids = torch.zeros(shape, dtype=torch.long)
        segments = torch.zeros(shape, dtype=torch.long)

        for number, row in enumerate(rows):
            query = row["query_ids"]
            chosen = row["chosen_ids"]
            rejected = row["rejected_ids"]
            sizes = [len(query), len(chosen), len(rejected)]
            length = sum(sizes)

            # Each answer goes on from the query's end, as if it stood there alone.
            starts = [0, len(query), len(query)]
            positions = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
            kinds = torch.tensor([QUERY, CHOSEN, REJECTED])

            # Behind `length` the padding stays, in segment 0.
            input_ids[number, :length] = torch.tensor(query + chosen + rejected)
            position_ids[number, :length] = torch.cat(positions)
            segments[number, :length] = kinds.repeat_interleave(torch.tensor(sizes))

        # The Trainer counts real tokens by this mask; `pair_states` makes one of its own.
        batch = {"input_ids": input_ids, "position_ids": position_ids, "segments": segments}
        batch["attention_mask"] = segments > 0
        return batch | pair_columns(rows)


def block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, 1, L, L] of `dtype`: 0 where a token (third axis) may look at another (fourth), the least number elsewhere.

    A token looks at earlier ones of its own segment and at the query; padding looks at itself, so that no row of the
    softmax is empty.
    """
    length = segments.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=segments.device)
    earlier = square.tril()
    same = segments[:, :, None] == segments[:, None, :]
    query = (segments == QUERY)[:, None, :]
    seen = earlier & (same | query)

    # Not -inf: a row of nothing else would make the softmax NaN. All heads share one mask.
    mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    return mask[:, None]


def score_pairs(backbone: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2P] float32 scores of a batch of `SharedPromptCollator`, those of the chosen answers first."""
    return apply_head(head, pair_states(backbone, batch))


def pair_states(backbone: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2P, H]: the hidden state of the last token of each answer; an empty one ends with the query's last token."""
    segments = batch["segments"]
    # The mask is added to attention scores, so it has to be of their dtype.
    dtype = next(backbone.parameters()).dtype
    # A model takes a mask of four dimensions as it is, and adds no causal one.
    hidden = backbone(
        input_ids=batch["input_ids"],
        attention_mask=block_mask(segments, dtype),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state

    # The product is the column inside a segment and 0 outside, so it is largest at the segment's last column.
    columns = torch.arange(segments.shape[1], device=segments.device)
    rows = torch.arange(len(segments), device=segments.device)
    query_end = (columns * (segments == QUERY)).argmax(1)

    states = []
    for kind in (CHOSEN, REJECTED):
        inside = segments == kind
        own_end = (columns * inside).argmax(1)
        last = torch.where(inside.any(1), own_end, query_end)
        states.append(hidden[rows, last])
    return torch.cat(states)


def check_shareable(backbone: nn.Module, row: dict, pad_id: int) -> None:
    """Refuse a model that does not take a pair in one sequence for two rows: its states of one row (the longest) tell.

    ALiBi counts columns, not positions; a sliding window would have to skip the other answer; flash attention takes no
    mask but a causal one.

    Raises: ValueError saying what is in the way.
    """
    # What the class and its settings already rule out.
    kind = type(backbone).__name__
    attention = backbone.config._attn_implementation
    takes_positions = accepts(type(backbone), "position_ids")
    if not takes_positions or getattr(backbone.config, "alibi", False):
        raise ValueError(f"--share_prompt True: {kind} does not let tokens have a position of their own: leave it out")

    # Only these two take a mask of any pattern.
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"--share_prompt True needs eager or sdpa attention, not {attention}")

    # The same row both ways, without dropout.
    device = next(backbone.parameters()).device
    training = backbone.training

    def batch_of(collator) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in collator([row]).items()}

    # States are compared and not scores, because single numbers may agree by chance.
    pair = batch_of(SharedPromptCollator(pad_id))
    sides = batch_of(PairCollator(pad_id))
    with torch.no_grad():
        backbone.eval()
        shared = pair_states(backbone, pair).float()
        apart = last_states(backbone, sides["input_ids"], sides["attention_mask"]).float()
        backbone.train(training)

    # Relative to their size, which differs from model to model.
    relative = (shared - apart).norm(dim=1) / apart.norm(dim=1)
    difference = relative.max().item()
    # Written this way round, the comparison refuses NaN, too.
    if not difference <= MAX_DIFFERENCE[backbone.dtype]:
        raise ValueError(
            f"--share_prompt True: the hidden states of {kind} differ by {difference:.2%} from those of separate rows "
            "(a sliding window?): leave it out"
        )
