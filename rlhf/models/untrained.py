"""Stop tokens and turn markers that a base was never trained on: a defect of a chat format that LoRA cannot mend.

Base checkpoints ship the chat markers of their tuned versions, with embedding rows as they were initialised. LoRA
leaves embeddings alone, so such a model cannot learn to stop at one. Their rows look like those of ids that certainly
were never seen: padding of the vocabulary, reserved tokens.
"""

import re
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.prompt_format import PromptFormat

# Names of tokens that no training text held.
RESERVED = re.compile(r"reserved|unused|placeholder|extra_(id_)?\d|\[control_\d|<pad_\d|dummy", re.IGNORECASE)

# Fewer unused rows say nothing about what such rows are like.
MIN_UNUSED = 4

# Ordinary rows that are looked at, spread over the vocabulary; so many of the unused ones at most.
SAMPLED = 1000

# Where more ordinary tokens than this share look unused, the rows cannot tell the two apart.
MAX_CONFUSED = 0.02

# Added to the range of the unused rows' norms, as a share of the largest, and to that of their cosines.
SLACK = 0.05

# Mean cosine to their mean from which on unused rows have a direction in common.
COMMON = 0.5


def untrained_tokens(model: PreTrainedModel, prompt_format: PromptFormat) -> list[str]:
    """Control tokens of the format whose embedding rows cannot be told from those of unused ids.

    A token is named if it looks unused in every embedding matrix that can tell (input and output, or the tied one).
    Without unused ids to compare with, or where weights are elsewhere (ZeRO-3), nothing is named.
    """
    tokenizer = prompt_format.tokenizer
    wanted = prompt_format.marker_ids()
    # A token has to look unused in all of them: what training read shows in the input's rows, what it wrote in the
    # output's.
    matrices = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() == 2 and weight.numel():
            # Tied matrices are one tensor, and count once.
            matrices[weight.data_ptr()] = weight.detach()

    verdicts = [
        looks_unused(weight, wanted, _unused_ids(tokenizer, len(weight), wanted), len(tokenizer))
        for weight in matrices.values()
    ]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    if not verdicts:
        return []
    unused = torch.stack(verdicts).all(0).tolist()
    return [name for name, is_unused in zip(tokenizer.convert_ids_to_tokens(wanted), unused, strict=True) if is_unused]


def looks_unused(weight: Tensor, wanted: list[int], unused: list[int], vocabulary: int) -> Tensor | None:
    """[N] bool: which rows of an embedding [V, H] lie among those of unused ids, by norm and direction.

    Args:
        wanted: N ids. unused: ids never seen in training. vocabulary: ids below it have a token.
    Returns: None where too few ids are unused, or where ordinary rows look the same.
    """
    if len(unused) < MIN_UNUSED:
        return None
    apart = set(unused) | set(wanted)
    # Evenly over the ids: they are in the order in which a tokenizer learnt them, frequent ones first.
    step = max(1, vocabulary // SAMPLED)
    ordinary = [token for token in range(0, min(vocabulary, len(weight)), step) if token not in apart]

    # Rows that nothing has trained keep a common length, and what drift they have is common to all of them.
    never = weight[unused[:: max(1, len(unused) // SAMPLED)]].float()
    middle = never.mean(0)
    norms, cosines = _norm_and_cosine(never, middle)
    slack = SLACK * norms.max()
    # Rows still as they were drawn have no common direction, and only their length tells.
    least_cosine = cosines.min() - SLACK if cosines.mean() > COMMON else -1.0

    def inside(rows: Tensor) -> Tensor:
        norm, cosine = _norm_and_cosine(rows.float(), middle)
        return (norm >= norms.min() - slack) & (norm <= norms.max() + slack) & (cosine >= least_cosine)

    if not ordinary or inside(weight[ordinary]).float().mean() > MAX_CONFUSED:
        return None
    return inside(weight[wanted]).cpu()


def _norm_and_cosine(rows: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """[N] each: length of every row [N, H], and cosine of its angle to `direction` [H]."""
    return rows.norm(dim=1), torch.cosine_similarity(rows, direction[None], dim=1)


def _unused_ids(tokenizer, rows: int, wanted: list[int]) -> list[int]:
    """Ids below `rows` that no training text can have held: beyond the tokenizer's, or reserved by their name."""
    beyond = range(len(tokenizer), rows)
    reserved = [
        index
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if RESERVED.search(token.content) and index < rows
    ]
    return [token for token in (*reserved, *beyond) if token not in wanted]


def warn_of_untrained(model: PreTrainedModel, prompt_format: PromptFormat) -> None:
    """Warn, in one sentence, of stop tokens and markers that this base was never trained on, and say what helps."""
    names = untrained_tokens(model, prompt_format)
    if names:
        warnings.warn(
            f"this base was never trained on {', '.join(names)}: the embedding rows look like those of unused tokens, "
            "and LoRA does not change embeddings, so the model can hardly learn to stop: take the chat-tuned version "
            "of the base, or a text --prompt_template, whose answers end with EOS",
            stacklevel=2,
        )
