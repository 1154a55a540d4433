"""Sampling responses, with the log-probability, value and entropy of every token recorded on the way."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batches import collate_prompts
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.linear import cast_once
from rlhf.models.shared_decoding import decoder_of
from rlhf.ppo import selective_logprobs, token_entropy


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; whatever changes the distribution applies to the policy and to the reference."""

    stop_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int
    temperature: float = 1.0
    min_new_tokens: int = 0
    suppress_empty: bool = True
    top_k: int = 0
    top_p: float = 1.0
    cuda_graphs: bool = True

    @property
    def without_stop(self) -> int:
        """Response tokens, from the first one on, that cannot be a stop token."""
        return max(self.min_new_tokens, int(self.suppress_empty))

    def process(self, logits: Tensor, t: Tensor) -> Tensor:
        """Temperature and forbidden stop tokens, in place, on logits [N, V] of the response tokens at places t [N].

        Used at sampling and at every later scoring, so that ratio and KL compare like with like. In place is safe for
        autograd (no backward of an output layer reads its output) and spares a copy of the largest tensor there is.
        """
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        if self.without_stop:
            # Each on its own: a column is a view, so it is filled in place.
            for stop in self.stop_ids:
                logits[:, stop].masked_fill_(t < self.without_stop, -torch.inf)
        return logits


@dataclass
class Rollout:
    """One batch of queries with their responses. Queries pad left, responses right, so response token t is at Q + t.

    query_ids [B, Q], query_mask [B, Q], response_ids [B, T], mask [B, T]; logprobs, values and entropy [B, T] as they
    were while sampling, 0 on padding. The rest is filled in later: ref_logprobs, advantages, returns [B, T], and learn
    [B, T] bool, the tokens that the update learns from, where those are not all of `mask`.
    """

    query_ids: Tensor
    query_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    learn: Tensor | None = None

    @property
    def learnt(self) -> Tensor:
        """[B, T] bool: the tokens that the update learns from."""
        return self.mask if self.learn is None else self.learn

    @property
    def input_ids(self) -> Tensor:
        """[B, L] long, query and response joined."""
        return torch.cat([self.query_ids, self.response_ids], 1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, L] bool."""
        return torch.cat([self.query_mask, self.mask], 1)

    def predictors(self) -> tuple[Tensor, Tensor]:
        """Row and place, [N] long each, of the tokens whose logits predict the N of `response_ids[mask]`, in order.

        Places count a row's real tokens from 0.
        """
        row, t = self.mask.nonzero(as_tuple=True)
        # Less 1, for logits at a token predict the one after it: the query's last token predicts response token 0.
        return row, self.query_mask.sum(1)[row] - 1 + t

    def rows(self, index: Tensor) -> "Rollout":
        """The chosen rows, with the padding columns that none of them needs cut off."""
        queries = int(self.query_mask[index].sum(1).max())
        responses = int(self.mask[index].sum(1).max())
        chosen = {}
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                # Queries end in the same column and responses begin in the same one: each is cut at its other side.
                keep = slice(-queries, None) if field.name.startswith("query") else slice(None, responses)
                chosen[field.name] = tensor[index][:, keep]
        return Rollout(**chosen)

    def lengths(self) -> Tensor:
        """[B] long: real response tokens, the stop token included."""
        return self.mask.sum(1)

    def ended(self, stop_ids: tuple[int, ...]) -> Tensor:
        """[B] bool: whether a response ends with a stop token, not at the maximum length."""
        return (is_stop(self.response_ids, stop_ids) & self.mask).any(1)


def is_stop(ids: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """[...] bool: which of the token ids [...] end a response."""
    ended = ids == stop_ids[0]
    # One comparison an id: the set holds a few, and a tensor of them would have to be copied to the GPU each time.
    for stop in stop_ids[1:]:
        ended = ended | (ids == stop)
    return ended


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    values_of: Callable[[Tensor], Tensor] | None,
    query_ids: Tensor,
    query_mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample one response to each query; finished rows leave the batch.

    Args:
        model: the policy, in eval mode. values_of: critic, hidden [B, H] -> [B]; None records 0.
        query_ids: [B, Q] long, padded on the left. query_mask: [B, Q] bool.
        generator: random source on the model's device; None decodes greedily.
    Returns: a Rollout; a response keeps its first stop token, then pads; T is the longest response's length.
    Raises: ValueError for a model in train mode, FloatingPointError where the logits are not finite.
    """
    if model.training:
        # Under gradient checkpointing a layer in train mode takes no cache: every token would see itself alone.
        raise ValueError("generate needs the model in eval mode: call roles.train(False) first")

    rows = len(query_ids)
    device = query_ids.device
    total = sampling.max_new_tokens
    out = Rollout(
        query_ids=query_ids,
        query_mask=query_mask.bool(),
        response_ids=torch.full((rows, total), sampling.pad_token_id, device=device),
        mask=torch.zeros(rows, total, dtype=torch.bool, device=device),
        logprobs=torch.zeros(rows, total, device=device),
        values=torch.zeros(rows, total, device=device),
        entropy=torch.zeros(rows, total, device=device),
    )

    with cast_once(model):
        _sample(model, values_of, out, sampling, generator)
    return _without_rest(out, sampling.pad_token_id)


def take_part(model: PreTrainedModel, sampling: Sampling, device) -> None:
    """Take part in the sampling of other processes that share the base in shards, without a row of one's own."""
    nothing = torch.zeros(0, 1, device=device)
    queries = nothing.long()
    total = nothing.expand(0, sampling.max_new_tokens)
    _sample(
        model, None, Rollout(queries, queries.bool(), total.long(), total.bool(), total, total, total), sampling, None
    )


def _sample(model: PreTrainedModel, values_of, out: Rollout, sampling: Sampling, generator) -> None:
    """Fill in what is sampled, token by token, until every row has ended."""
    rows, total = out.mask.shape
    device = out.mask.device
    decoder = decoder_of(model, out.query_ids, out.query_mask, total, static=sampling.cuda_graphs)
    # Rows leave the batch when they have ended: entry i is the row of `out` that row i of the batch writes to.
    alive = torch.arange(rows, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    logits, hidden = decoder.prefill()

    for t in range(total):
        # Here all rows are at one place; when they are scored later, every token brings its own.
        logits = sampling.process(logits.float(), torch.full_like(alive, t))
        # What is recorded is the probability before top-k and top-p: under the truncated one a token outside would
        # have none, and its ratio in the update no meaning.
        chosen = _choose(logits, sampling, generator)
        # `ended` still tells of the tokens before this one: a stop token is real itself, and what comes after it is
        # not.
        _write(out, (alive, t), chosen, ~ended, logits)
        if values_of is not None:
            # Of the hidden state that predicts token t, so the value is the one before this token, as `gae` takes it.
            out.values[alive, t] = values_of(hidden)
        ended = ended | is_stop(chosen, sampling.stop_ids)
        if t == total - 1:
            break
        if (t + 1) % decoder.every == 0:
            # What is sampled under a signal is thrown away; the caller asks all processes whether to stop.
            if not decoder.goes_on(ended):
                break
            going = (~ended).nonzero().squeeze(1)
            if len(going) <= decoder.shrink * len(alive) and len(going) < len(alive):
                alive = alive[going]
                chosen = chosen[going]
                ended = ended[going]
                decoder.keep(going)
        logits, hidden = decoder.next(chosen)


def _write(out: Rollout, place: tuple[Tensor, int], chosen: Tensor, real: Tensor, logits: Tensor) -> None:
    """Record one step's tokens at their `place`, the rows still in the batch and the column."""
    out.response_ids[place] = chosen
    out.mask[place] = real
    out.logprobs[place] = selective_logprobs(logits, chosen)
    out.entropy[place] = token_entropy(logits)


def _without_rest(out: Rollout, pad_token_id: int) -> Rollout:
    """Cut off what was sampled beyond the ends of the responses.

    Raises: FloatingPointError where the policy's logits were not finite.
    """
    # Looked at once, after the last token: a look at every token would wait for the GPU as often.
    if not torch.isfinite(out.logprobs[out.mask]).all():
        raise FloatingPointError("the policy's logits are not finite: the update before this one broke it")
    # Rows that had ended went on being sampled until they left the batch.
    out.response_ids = torch.where(out.mask, out.response_ids, pad_token_id)
    for name in ("logprobs", "values", "entropy"):
        setattr(out, name, torch.where(out.mask, getattr(out, name), 0))
    return out.rows(torch.arange(len(out.mask), device=out.mask.device))


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """[B] long: one token a row of logits [B, V]; truncation shapes the draw, never the recorded probability."""
    if generator is None:
        return logits.argmax(-1)

    if sampling.top_k > 0:
        # A vocabulary may be smaller than k, of which topk makes an error.
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)

    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        # The mass before a token decides, not its own: the first token always stays, and so does the one that crosses
        # top_p. (Holtzman et al. 2020, arXiv:1904.09751)
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)

    probs = logits.softmax(-1)
    # The draw of torch.multinomial, without its look at the numbers, for which a GPU would have to be waited for.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def greedy_answers(
    model: PreTrainedModel, prompt_format: PromptFormat, query_ids: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers as text; " ..." ends one that did not stop by itself, and an empty answer is allowed.

    Args:
        model: a language model in eval mode. query_ids: token ids of each query.
    """
    device = next(model.parameters()).device
    batch = collate_prompts(query_ids, prompt_format.pad_id)
    sampling = Sampling(prompt_format.stop_ids, prompt_format.pad_id, max_new_tokens, suppress_empty=False)
    rollout = generate(model, None, batch["input_ids"].to(device), batch["attention_mask"].to(device), sampling)

    answers = []
    ended = rollout.ended(prompt_format.stop_ids).tolist()
    for ids, mask, whole in zip(rollout.response_ids, rollout.mask, ended, strict=True):
        text = prompt_format.tokenizer.decode(ids[mask], skip_special_tokens=True)
        answers.append(text if whole else f"{text} ...")
    return answers
