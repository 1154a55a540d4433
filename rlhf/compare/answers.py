"""Answers of several versions of a model from one base in memory; each cell is reproducible by itself."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.models.forward import backbone_of
from rlhf.models.loading import add_lora, load_base, score_head_of
from rlhf.models.scoring import score

BASE = "base"

# With a space, so that no column can be called the same.
REWARD_MODEL = "reward model"


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of sampling; the defaults of compare.py's flags of the same names."""

    max_new_tokens: int = 256
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    batch_size: int = 8


@dataclass
class Answer:
    """One answer: text, tokens (EOS included), whether it ended by itself, and its score if there is one."""

    text: str
    tokens: int
    ended: bool
    score: float | None = None

    def note(self) -> str:
        """Length, and score if any, as one phrase."""
        parts = [f"{self.tokens} tokens" + ("" if self.ended else ", cut")]
        return ", ".join(parts + ([] if self.score is None else [f"score {self.score:.3f}"]))


class GumbelSampler(LogitsProcessor):
    """Last processor of a greedy `generate`: adds each row's own Gumbel noise, so that the argmax is a draw (or not).

    The pad id is forbidden: otherwise a repetition penalty, which looks at padded prompts, would depend on the batch.
    """

    def __init__(self, seeds: list[int] | None, pad_token_id: int):
        self.pad_token_id = pad_token_id
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise FloatingPointError("the logits are not finite: this adapter (or the base) holds broken weights")
        scores[:, self.pad_token_id] = -torch.inf
        if self.generators is None:
            return scores
        # Drawn on the CPU: one seed gives one sequence of numbers whatever the device.
        draws = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(draws).clamp_min(1e-30).log().to(scores.device)


class Versions:
    """One base in memory with every adapter on it; `use(name)` makes one of them answer."""

    def __init__(self, base_dir: str, tokenizer, writing: AnswerSettings, dtype: torch.dtype, device: str):
        self.tokenizer = tokenizer
        self.writing = writing
        self.model: PreTrainedModel | PeftModel = load_base(base_dir, dtype, device=device)
        self.score_head: nn.Linear | None = None
        # A base directory's own sampling settings would otherwise fill in whatever is left unset.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=writing.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.model.eval().requires_grad_(False)

    def add(self, name: str, path: str) -> None:
        """Put an adapter on the base under `name`. Raises: ValueError where it does not fit, or is more than LoRA."""
        if self._add(name, path):
            raise ValueError(f"--adapters {name}: {path} holds more than LoRA weights: merge it, then compare")

    def add_reward_model(self, path: str) -> None:
        """Score every answer from now on with this reward adapter. Raises: ValueError where it has no score head."""
        self.score_head = score_head_of(self._add(REWARD_MODEL, path), path).to(self.model.device)

    def _add(self, name: str, path: str) -> dict[str, Tensor]:
        self.model, rest = add_lora(self.model, path, self._inner(name), trainable=False)
        self.model.eval()
        return rest

    @staticmethod
    def _inner(name: str) -> str:
        """The adapter's name in memory: module names may hold no dot and may not hide a method (as "train" would)."""
        return "version " + name.replace(".", "·")

    @contextmanager
    def use(self, name: str):
        """The causal LM, with this version's adapter active, or none for the bare base."""
        if not isinstance(self.model, PeftModel):
            yield self.model
            return
        bare = name == BASE
        if not bare:
            self.model.base_model.set_adapter(self._inner(name), inference_mode=True)
        with self.model.disable_adapter() if bare else nullcontext():
            yield self.model.get_base_model()

    @torch.no_grad()
    def answers(self, name: str, queries: list[list[int]], seeds: list[int]) -> list[Answer]:
        """One answer of version `name` to each query, in batches of --batch_size; the seeds are of the rows' noise."""
        cells = []
        for start in range(0, len(queries), self.writing.batch_size):
            rows = slice(start, start + self.writing.batch_size)
            cells += self._batch(name, queries[rows], seeds[rows])
        return cells

    def _batch(self, name: str, queries: list[list[int]], seeds: list[int]) -> list[Answer]:
        input_ids, attention_mask = self._padded(queries, left=True)

        with self.use(name) as model:
            written = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=self._processors(seeds),
            )[:, input_ids.shape[1] :].tolist()

        eos = self.tokenizer.eos_token_id
        cells = []
        finished = []

        for query, row in zip(queries, written, strict=True):
            ended = eos in row
            answer = row[: row.index(eos)] if ended else row
            cells.append(Answer(self.tokenizer.decode(answer).strip(), len(answer) + ended, ended))
            # The reward model has only seen answers that end: a cut one is scored as if it had ended there.
            finished.append(query + answer + [eos])

        if self.score_head is not None:
            with self.use(REWARD_MODEL) as model:
                scores = score(backbone_of(model), self.score_head, *self._padded(finished, left=False)).tolist()
            for cell, value in zip(cells, scores, strict=True):
                cell.score = value

        return cells

    def _processors(self, seeds: list[int]) -> LogitsProcessorList:
        writing = self.writing
        chosen = LogitsProcessorList()
        if writing.repetition_penalty != 1:
            chosen.append(RepetitionPenaltyLogitsProcessor(writing.repetition_penalty))
        if writing.do_sample and writing.temperature != 1:
            chosen.append(TemperatureLogitsWarper(writing.temperature))
        if writing.do_sample and writing.top_p < 1:
            chosen.append(TopPLogitsWarper(writing.top_p))
        chosen.append(GumbelSampler(seeds if writing.do_sample else None, self.tokenizer.pad_token_id))
        return chosen

    def _padded(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, L] of token id lists."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        gaps = [longest - len(row) for row in rows]
        pairs = list(zip(rows, gaps, strict=True))
        ids = [[pad] * gap + row if left else row + [pad] * gap for row, gap in pairs]
        mask = [[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in pairs]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def row_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """One noise seed a table row, far apart for neighbouring --seed values."""
    return [seed * 1_000_003 + first + row for row in range(count)]
