"""Preference pairs: collators, lengths, and pairs of rows to pairs of scores.

With --share_prompt a pair is one sequence, so that its prompt is computed once:

    query | chosen | rejected      positions of both answers continue from the query's end
    each answer sees the query and itself, never the other answer

The scores equal those of two separate rows; the query's tokens, and half of the padding, are saved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.data.batches import pad
from rlhf.models.forward import accepts, backbone_of
from rlhf.models.scoring import apply_head, last_states, score_in_parts


class PairCollator:
    """P rows of `preference_rows` as one batch of 2P sequences: the chosen ones first, then the rejected ones.

    Returns {"input_ids": [2P, L] long, "attention_mask": [2P, L] bool}, padded on the right; "margin" [P] float32
    where the rows have one (0 for those that have none); "mask" [P] bool where a row is blank, True on the real pairs.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        sides = [row["query_ids"] + row["chosen_ids"] for row in rows]
        sides += [row["query_ids"] + row["rejected_ids"] for row in rows]
        batch = pad(sides, self.pad_id, side="right")
        return batch | pair_columns(rows)


def pair_columns(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Columns for the loss beside the tokens of each pair: "margin" and "mask", where any row has them."""
    columns = {}
    if any("margin" in row for row in rows):
        columns["margin"] = torch.tensor([row.get("margin", 0.0) for row in rows])
    if any("blank" in row for row in rows):
        columns["mask"] = torch.tensor(["blank" not in row for row in rows])
    return columns


def blank_pair(token_id: int) -> dict:
    """A row of `preference_rows` that no loss counts."""
    return {"query_ids": [token_id], "chosen_ids": [token_id], "rejected_ids": [token_id], "blank": True}


def pair_length(row: dict) -> int:
    """Tokens of the longer side of a pair."""
    return len(row["query_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def shared_length(row: dict) -> int:
    """Tokens of a pair in one sequence."""
    return sum(len(row[f"{name}_ids"]) for name in ("query", "chosen", "rejected"))


def score_by_mask(model) -> None:
    """Let the model's `forward` be the score function of PPO, whatever its own would pool by, on right-padded rows.

    It has to be the `forward`: DistributedDataParallel only reduces the gradients of what goes through it.
    """

    def forward(input_ids=None, attention_mask=None, **batch):
        if "segments" in batch:
            return SequenceClassifierOutput(
                logits=score_pairs(backbone_of(model), model.score, {"input_ids": input_ids, **batch})
            )
        return SequenceClassifierOutput(
            logits=score_in_parts(backbone_of(model), model.score, input_ids, attention_mask)
        )

    model.forward = forward


QUERY = 1
CHOSEN = 2
REJECTED = 3

# Relative difference of hidden states above bfloat16's rounding, and below what another attention makes of them.
MAX_DIFFERENCE = 0.1


class SharedPromptCollator:
    """P rows of `preference_rows` as P sequences.

    Returns {"input_ids", "attention_mask" (True on real tokens), "position_ids", "segments"} [P, L], and "margin" and
    "mask" as PairCollator does; `segments` is QUERY, CHOSEN or REJECTED, and 0 on the padding at the right.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        parts = [[row[f"{name}_ids"] for name in ("query", "chosen", "rejected")] for row in rows]
        shape = (len(rows), max(sum(map(len, part)) for part in parts))
        batch = {"input_ids": torch.full(shape, self.pad_id), "position_ids": torch.zeros(shape, dtype=torch.long)}
        batch["segments"] = torch.zeros(shape, dtype=torch.long)

        for number, (query, chosen, rejected) in enumerate(parts):
            ids = torch.tensor(query + chosen + rejected)
            answers = [torch.arange(len(query), len(query) + len(answer)) for answer in (chosen, rejected)]
            sizes = torch.tensor([len(query), len(chosen), len(rejected)])
            batch["input_ids"][number, : len(ids)] = ids
            batch["position_ids"][number, : len(ids)] = torch.cat([torch.arange(len(query)), *answers])
            kinds = torch.tensor([QUERY, CHOSEN, REJECTED])
            batch["segments"][number, : len(ids)] = kinds.repeat_interleave(sizes)

        batch["attention_mask"] = batch["segments"] > 0
        return batch | pair_columns(rows)


def block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, 1, L, L] of `dtype`: 0 where a token (third axis) may look at another (fourth), the least number elsewhere.

    A token looks at earlier ones of its own segment and at the query; padding looks at itself, so that no row of the
    softmax is empty.
    """
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    query = (segments == QUERY)[:, None, :]
    seen = earlier & (same | query)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def score_pairs(backbone: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2P] float32 scores of a batch of `SharedPromptCollator`, those of the chosen answers first."""
    return apply_head(head, pair_states(backbone, batch))


def pair_states(backbone: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2P, H]: the hidden state of the last token of each answer; an empty one ends with the query's last token."""
    segments = batch["segments"]
    hidden = backbone(
        input_ids=batch["input_ids"],
        attention_mask=block_mask(segments, next(backbone.parameters()).dtype),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    columns = torch.arange(segments.shape[1], device=segments.device)
    rows = torch.arange(len(segments), device=segments.device)
    last = []
    for kind in (CHOSEN, REJECTED):
        own, query = (columns * (segments == part) for part in (kind, QUERY))
        last.append(torch.where((segments == kind).any(1), own.argmax(1), query.argmax(1)))
    return torch.cat([hidden[rows, column] for column in last])


def check_shareable(backbone: nn.Module, row: dict, pad_id: int) -> None:
    """See that a model takes a pair in one sequence for what it is, on its own states of one row (the longest).

    ALiBi counts columns, not positions; a sliding window would have to skip the other answer; flash attention takes no
    mask but a causal one.

    Raises: ValueError saying what is in the way.
    """
    kind = type(backbone).__name__
    attention = backbone.config._attn_implementation
    if not accepts(type(backbone), "position_ids") or getattr(backbone.config, "alibi", False):
        raise ValueError(f"--share_prompt True: {kind} does not let tokens have a position of their own: leave it out")

    if attention not in ("eager", "sdpa"):
        raise ValueError(f"--share_prompt True needs eager or sdpa attention, not {attention}")

    device = next(backbone.parameters()).device
    training = backbone.training
    pair, sides = (
        {name: tensor.to(device) for name, tensor in collator(pad_id)([row]).items()}
        for collator in (SharedPromptCollator, PairCollator)
    )

    with torch.no_grad():
        backbone.eval()
        shared = pair_states(backbone, pair).float()
        apart = last_states(backbone, sides["input_ids"], sides["attention_mask"]).float()
        backbone.train(training)

    difference = ((shared - apart).norm(dim=1) / apart.norm(dim=1)).max().item()
    # Not the other way round: a difference that is no number is none to train with.
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"--share_prompt True: the hidden states of {kind} differ by {difference:.0%} from those of separate rows "
            "(a sliding window?): leave it out"
        )
