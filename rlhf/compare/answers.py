"""Answers of several versions of a model, from one base in memory; each answer can be reproduced by itself."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.artefacts import averaging
from rlhf.compare.arguments import BASE, terms_of
from rlhf.compare.processors import GumbelSampler, RepetitionPenalty
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.forward import backbone_of
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora, put_lora, score_head_of
from rlhf.models.scoring import score
from rlhf.models.tensor_parallel import prepare, sampler_of

# With a space, so that no version can have the same name.
REWARD_MODEL = "reward model"
JUDGE = "judge model"


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of sampling, with the defaults of compare.py's flags of the same names."""

    max_new_tokens: int = 256
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    batch_size: int = 8


@dataclass
class Answer:
    """One answer: text, tokens (stop token included), whether it ended by itself, and its score if there is one."""

    text: str
    tokens: int
    ended: bool
    score: float | None = None
    judge: float | None = None
    # Token ids of the answer, stop token included where it ended by itself.
    ids: tuple[int, ...] = ()

    def note(self) -> str:
        """Length, and score if any, as one phrase."""
        parts = [f"{self.tokens} tokens"]
        if not self.ended:
            parts.append("cut")
        if self.score is not None:
            parts.append(f"score {self.score:.3f}")
        if self.judge is not None:
            parts.append(f"judge {self.judge:.3f}")
        return ", ".join(parts)


class Versions:
    """One base in memory with every adapter on it; `use(name)` makes one of them answer."""

    def __init__(
        self,
        base_dir: str,
        prompt_format: PromptFormat,
        writing: AnswerSettings,
        dtype: torch.dtype,
        device: str,
        mesh=None,
    ):
        self.prompt_format = prompt_format
        self.writing = writing
        self.model: PreTrainedModel | PeftModel = load_base(base_dir, dtype, device=device, mesh=mesh)
        # Over a base in shards: decode where they lie, by a twin of the model with all its adapters.
        self.in_place = False
        self.twin: PreTrainedModel | None = None
        # Beside the model, because an adapter on a language model has no place for a score head.
        self.score_heads: dict[str, nn.Linear] = {}
        # A base directory's own sampling settings would otherwise fill in whatever is left unset.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=writing.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(prompt_format.stop_ids),
            pad_token_id=prompt_format.pad_id,
        )
        self.model.eval().requires_grad_(False)

    def add(self, name: str, path: str) -> None:
        """Put an adapter, or a sum such as 0.4*runs/sft+0.6*runs/ppo, on the base under `name`.

        Raises: ValueError where it does not fit or is more than LoRA.
        """
        # Other weights, such as a trained head, would be left out of the answers without a word.
        if self._add(name, path):
            raise ValueError(f"--adapters {name}: {path} holds more than LoRA weights: merge it, then compare")

    def add_reward_model(self, path: str, name: str = REWARD_MODEL) -> None:
        """Score every answer from now on with this reward adapter, or with another one as the JUDGE.

        Raises: ValueError where it has no score head.
        """
        rest = self._add(name, path)
        self.score_heads[name] = score_head_of(rest, path).to(self.model.device)

    def _add(self, name: str, path: str) -> dict[str, Tensor]:
        """Add an adapter; returns its weights that are no LoRA weights."""
        parts = terms_of(path)
        if parts == [(1.0, path)]:
            self.model, rest = add_lora(self.model, path, self.adapter_name(name), trainable=False)
        else:
            summed = averaging.weighted_sum(averaging.read_terms(parts, "--adapters"))
            self.model, rest = put_lora(self.model, *summed, self.adapter_name(name), False, f"--adapters {name}")
        # The new layers, dropout among them, begin in training mode.
        self.model.eval()
        return rest

    @staticmethod
    def adapter_name(name: str) -> str:
        """The adapter's name in memory: module names may hold no dot and may not hide a method (as "train" would)."""
        return "version " + name.replace(".", "·")

    @contextmanager
    def use(self, name: str):
        """The causal LM, with this version's adapter active, or none for the bare base."""
        # No adapter has been added, so there is none to switch.
        if not isinstance(self.model, PeftModel):
            yield self.model
            return

        if name == BASE:
            with self.model.disable_adapter():
                yield self.model.get_base_model()
            return

        # Without inference_mode the adapter's weights would ask for gradients again.
        self.model.base_model.set_adapter(self.adapter_name(name), inference_mode=True)
        yield self.model.get_base_model()

    @torch.no_grad()
    def answers(self, name: str, queries: list[list[int]], seeds: list[int]) -> list[Answer]:
        """One answer of version `name` to each query, in batches of --batch_size; a seed for the noise of each row."""
        cells = []
        for start in range(0, len(queries), self.writing.batch_size):
            # A seed belongs to a prompt, so both are cut at the same places.
            rows = slice(start, start + self.writing.batch_size)
            cells += self._batch(name, queries[rows], seeds[rows])
        return cells

    def _batch(self, name: str, queries: list[list[int]], seeds: list[int]) -> list[Answer]:
        """Answers of one batch, scored where there is a reward model."""
        stops = self.prompt_format.stop_ids
        cells = []
        finished = []
        for query, row in zip(queries, self._generate(name, queries, seeds), strict=True):
            end = next((place for place, token in enumerate(row) if token in stops), None)
            answer = row[:end]
            ended = end is not None
            # Control tokens inside an answer stay visible: a model that writes them should not look better than it is.
            text = self.prompt_format.tokenizer.decode(answer).strip()
            cells.append(Answer(text, len(answer) + ended, ended, ids=tuple(row[: len(answer) + ended])))
            # The reward model has only seen answers that end: a cut one is scored as if it had ended there.
            finished.append(query + answer + [row[end] if ended else stops[0]])

        for scorer, field in ((REWARD_MODEL, "score"), (JUDGE, "judge")):
            if scorer in self.score_heads:
                for cell, value in zip(cells, self._scores(finished, scorer), strict=True):
                    setattr(cell, field, value)
        return cells

    def _generate(self, name: str, queries: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """New token ids of each row; after the stop token they are padding."""
        input_ids, attention_mask = self._padded(queries, left=True)
        with self.use(name) as model:
            rows = self._sampler(model).generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=self._processors(queries, seeds),
            )
        # `generate` gives the prompts back in front of the answers.
        return rows[:, input_ids.shape[1] :].tolist()

    def _sampler(self, model: PreTrainedModel) -> PreTrainedModel:
        """What writes the answers of the version that is active now: the model, or its twin."""
        if not self.in_place:
            return model
        if self.twin is None:
            self.twin = sampler_of(model)
            self.twin.generation_config = model.generation_config
        prepare(self.twin)
        return self.twin

    def _scores(self, rows: list[list[int]], name: str) -> list[float]:
        """Scores of a reward model, which is one more adapter on the same base."""
        input_ids, attention_mask = self._padded(rows, left=False)
        with self.use(name) as model:
            return score(backbone_of(model), self.score_heads[name], input_ids, attention_mask).tolist()

    def _processors(self, queries: list[list[int]], seeds: list[int]) -> LogitsProcessorList:
        """Processors in the order of transformers' own sampling; the noise comes last."""
        writing = self.writing
        chosen = LogitsProcessorList()
        # A processor that changes nothing is left out, because it would pass over the logits at every token.
        if writing.repetition_penalty != 1:
            longest = max(map(len, queries))
            padding = [longest - len(query) for query in queries]
            chosen.append(RepetitionPenalty(writing.repetition_penalty, padding))
        if writing.do_sample and writing.temperature != 1:
            chosen.append(TemperatureLogitsWarper(writing.temperature))
        if writing.do_sample and writing.top_p < 1:
            chosen.append(TopPLogitsWarper(writing.top_p))

        # Without sampling the last processor adds no noise, but still checks the logits and forbids the pad id.
        noise_seeds = seeds if writing.do_sample else None
        chosen.append(GumbelSampler(noise_seeds))
        return chosen

    def _padded(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, L] of token id lists.

        On the left for `generate`, whose new tokens follow the last column; on the right for the reward model.
        """
        longest = max(map(len, rows))
        ids = []
        mask = []
        for row in rows:
            gap = longest - len(row)
            padding = [self.prompt_format.pad_id] * gap
            # The mask alone says what is padding: a real token may have the pad id.
            hidden = [0] * gap
            seen = [1] * len(row)
            ids.append(padding + row if left else row + padding)
            mask.append(hidden + seen if left else seen + hidden)

        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def row_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """One noise seed a table row, far apart for neighbouring --seed values."""
    # Rows of two --seed values share a noise seed only in tables of over a million rows.
    start = seed * 1_000_003 + first
    return [start + row for row in range(count)]
