"""Preference pairs whose prompt is computed once: query, chosen and rejected answer in one sequence.

    query | chosen | rejected      positions of both answers go on from the query's end
    each answer sees the query and itself, never the other one

The scores are those of two separate rows; the query's tokens, and half of the padding, are spared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.scoring import apply_head

QUERY, CHOSEN, REJECTED = 1, 2, 3


class SharedPromptCollator:
    """P rows of `preference_rows` as P sequences.

    Returns {"input_ids", "attention_mask" (True on real tokens), "position_ids", "segments"} [P, L] and "margin" [P]
    float32 where the rows have one; `segments` is QUERY, CHOSEN or REJECTED, and 0 on the padding at the right.
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
        if any("margin" in row for row in rows):
            batch["margin"] = torch.tensor([row.get("margin", 0.0) for row in rows])
        return batch


def block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, 1, L, L] of `dtype`: 0 where a token (third axis) may look at another (fourth), the least number elsewhere.

    A token looks at earlier ones of its own segment and at the query; padding looks at itself, so that no row of the
    softmax is empty.
    """
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same, query = segments[:, :, None] == segments[:, None, :], (segments == QUERY)[:, None, :]
    seen = earlier & (same | query)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def score_pairs(backbone: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2P] float32 scores, those of the chosen answers first: the head on the last token of each answer.

    An empty answer ends with the query's last token. Args: batch: of `SharedPromptCollator`.
    """
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
    return apply_head(head, torch.cat([hidden[rows, column] for column in last]))
