"""One answer while it is written: its own draws, its own end, its own text, whoever is beside it in the batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from rlhf.compare.answers import GumbelSampler
from rlhf.page.text_stream import TextStream

# Reasons why an answer ends, as OpenAI's API calls the first two.
STOP = "stop"
LENGTH = "length"
CANCELLED = "cancelled"

# Tokens in front of a continued text that decide how its first token is written.
BEFORE = 4

# Tokens among which nearly every distribution has its top_p share.
LIKELIEST = 512


@dataclass(frozen=True)
class Settings:
    """Settings of one answer.

    Attributes:
        stop: texts that end an answer, beside the format's own stop tokens.
        continues: the answer goes on the query's own text, so that the space in front of it counts.
        logprobs: keep the log-probability of each token, and of the `top_logprobs` most likely ones.
        score: let the reward model score the answer, where there is one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    do_sample: bool = True
    stop: tuple[str, ...] = ()
    continues: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    score: bool = True

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be over 0 (greedy decoding is do_sample False)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be over 0 and at most 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        # An empty text is found at once in any answer.
        if not all(self.stop):
            raise ValueError("a stop text is empty")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in nats, before temperature and top_p, and those of the most likely tokens."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Answer:
    """A finished answer.

    Attributes:
        token_ids: what was sampled, the stop token included. text: of it, without the stop token.
        finish_reason: "stop" (a stop token or text), "length" or "cancelled".
        logprobs: one a token, where they were asked for. score: of the reward model, None where there is none.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None


class TopP(LogitsProcessor):
    """transformers' TopPLogitsWarper without sorting the whole vocabulary, which takes as long as a small model."""

    def __init__(self, top_p: float):
        self.top_p = top_p
        self.usual = TopPLogitsWarper(top_p)

    def __call__(self, input_ids, scores: Tensor) -> Tensor:
        """Scores [1, V], those that are not among the likeliest tokens of this share at -inf."""
        best = scores.topk(min(LIKELIEST, scores.shape[1]))
        probs = (best.values - scores.logsumexp(-1, keepdim=True)).exp()
        likelier = probs.cumsum(-1) - probs
        # The share may end behind them: then all have to be sorted after all.
        if likelier[0, -1] + probs[0, -1] < self.top_p and scores.shape[1] > LIKELIEST:
            return self.usual(input_ids, scores)
        kept = best.values.masked_fill(likelier >= self.top_p, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(1, best.indices, kept)


@dataclass
class Row:
    """An answer that is being written.

    Attributes:
        adapters: name in memory -> weight. read: tokens of the query that are in the cache.
        cache: the row's own, until it joins a batch.
    """

    query_ids: list[int]
    adapters: dict[str, float]
    settings: Settings
    seed: int
    stop_ids: tuple[int, ...]
    tokenizer: object
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    read: int = 0
    cache: Cache | None = None

    def __post_init__(self):
        settings = self.settings
        self.processors = LogitsProcessorList()
        if settings.do_sample and settings.temperature != 1:
            # First the temperature and then top_p, in transformers' own order: the other way round the set of tokens
            # would differ.
            self.processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.do_sample and settings.top_p < 1:
            self.processors.append(TopP(settings.top_p))
        # Its noise comes from the row's own source: no draw depends on the rows beside it.
        self.processors.append(GumbelSampler([self.seed] if settings.do_sample else None))
        before = self.query_ids[-BEFORE:] if settings.continues else None
        self.stream = TextStream(self.tokenizer, settings.stop, before)

    def take(self, logits: Tensor) -> tuple[str, str | None]:
        """Choose the next token from logits [V]; returns the new text, and the reason where the answer ends with it.

        Raises: FloatingPointError where the logits are not finite.
        """
        # In float32: in half precision many tokens of the tail would share one probability.
        scores = self.processors(None, logits[None].float())
        token = int(scores.argmax())
        self.token_ids.append(token)
        # Of the logits as they are, before temperature and top_p, as the API has it.
        if self.settings.logprobs:
            self.logprobs.append(_logprob(logits, token, self.settings.top_logprobs))

        # A stop token is counted and not shown.
        if token in self.stop_ids:
            return self.stream.rest(), STOP
        text, stopped = self.stream.add(token)
        if stopped:
            return text, STOP
        # Last of all: an answer whose last allowed token ends it has ended by itself.
        if len(self.token_ids) == self.settings.max_new_tokens:
            return text + self.stream.rest(), LENGTH
        return text, None

    def whole(self) -> list[int]:
        """Query and answer as the reward model reads them: one that was cut is scored as if it had ended there."""
        ended = self.token_ids[-1:] and self.token_ids[-1] in self.stop_ids
        return self.query_ids + self.token_ids + ([] if ended else [self.stop_ids[0]])


def _logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """The token's own log-probability under logits [V], and the `top` most likely tokens with theirs."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))
