"""Logits processors that make an answer depend on its own row alone: its noise, and the penalty on its repetitions."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor


class GumbelSampler(LogitsProcessor):
    """Last processor of a greedy `generate`: adds each row's own Gumbel noise, so that the argmax is a random draw.

    Without seeds it adds nothing, and the answers are greedy.
    """

    def __init__(self, seeds: list[int] | None):
        self.generators = None
        if seeds is not None:
            # A source for each row, so that no answer depends on the rows beside it.
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The argmax of NaN would be some token, and the answer would look like one.
        if scores.isnan().any():
            raise FloatingPointError("the logits are not finite: this adapter (or the base) holds broken weights")
        if self.generators is None:
            return scores

        # Drawn on the CPU: one seed gives one sequence of numbers whatever the device.
        draws = []
        for generator in self.generators:
            draw = torch.empty(scores.shape[1])
            draws.append(draw.exponential_(generator=generator))
        # Minus the logarithm of an exponential draw is Gumbel noise; a draw of 0 would make it infinite.
        noise = torch.stack(draws).clamp_min(1e-30).log()
        return scores - noise.to(scores.device)


class RepetitionPenalty(LogitsProcessor):
    """transformers' repetition penalty over the real tokens alone, so that a row does not depend on its padding."""

    def __init__(self, penalty: float, padding: list[int]):
        """`padding`: columns in front of each row that hold no token."""
        self.usual = RepetitionPenaltyLogitsProcessor(penalty)
        self.padding = padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            self.usual(input_ids[row : row + 1, start:], scores[row : row + 1])
            for row, start in enumerate(self.padding)
        ]
        return torch.cat(rows)
