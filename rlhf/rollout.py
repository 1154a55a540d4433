"""Sampling responses, recording the log-probability and value of every token on the way, and scoring them again."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.ppo import selective_logprobs, token_entropy
from rlhf.roles import Roles, backbone_of, forward
from rlhf.scoring import hidden_states
from rlhf.signals import received


@dataclass(frozen=True)
class Sampling:
    """How the policy writes. What changes the distribution here is part of the policy and of the reference alike."""

    eos_token_id: int
    pad_token_id: int
    max_new_tokens: int
    temperature: float = 1.0
    min_new_tokens: int = 0
    suppress_empty: bool = True
    top_k: int = 0
    top_p: float = 1.0

    def process(self, logits: Tensor, first: int = 0) -> Tensor:
        """Temperature and forbidden EOS, in place, on logits [B, T, V] of the response tokens first, first + 1, ...

        Used at sampling and at every later scoring, so that ratio and KL compare like with like. In place is safe for
        autograd (no backward of an output layer reads its output) and spares a copy of the largest tensor there is.
        """
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        without_eos = max(self.min_new_tokens, int(self.suppress_empty)) - first
        if without_eos > 0:
            logits[:, :without_eos, self.eos_token_id] = -torch.inf
        return logits


@dataclass
class Rollout:
    """One batch of queries with their responses. Queries pad left, responses right, so response token t is at Q + t.

    query_ids [B, Q], query_mask [B, Q], response_ids [B, T], mask [B, T]; logprobs, values and entropy [B, T] as they
    were while sampling, 0 on padding. The rest is filled in later: ref_logprobs, advantages, returns [B, T].
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

    @property
    def input_ids(self) -> Tensor:
        """[B, L] long, query and response joined."""
        return torch.cat([self.query_ids, self.response_ids], 1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, L] bool."""
        return torch.cat([self.query_mask, self.mask], 1)

    @property
    def columns(self) -> Tensor:
        """[T] long: the columns of `input_ids` whose logits predict the response tokens."""
        first = self.query_ids.shape[1] - 1
        return torch.arange(first, first + self.response_ids.shape[1], device=self.mask.device)

    def rows(self, index: Tensor) -> "Rollout":
        """The chosen rows, with the padding columns that none of them needs cut off."""
        queries = int(self.query_mask[index].sum(1).max())
        responses = int(self.mask[index].sum(1).max())
        chosen = {}
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                keep = slice(-queries, None) if field.name.startswith("query") else slice(None, responses)
                chosen[field.name] = tensor[index][:, keep]
        return Rollout(**chosen)

    def lengths(self) -> Tensor:
        """[B] long: real response tokens, the EOS included."""
        return self.mask.sum(1)

    def ended(self, eos_token_id: int) -> Tensor:
        """[B] bool: whether a response ends with EOS, not at the maximum length."""
        return ((self.response_ids == eos_token_id) & self.mask).any(1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    values_of: Callable[[Tensor], Tensor],
    query_ids: Tensor,
    query_mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample one response to each query; rows that have ended leave the batch, so nobody waits for the longest.

    Args:
        model: the policy, in eval mode. values_of: critic, hidden [B, H] -> [B].
        query_ids: [B, Q] long, padded on the left. query_mask: [B, Q] bool.
        generator: random source on the model's device; None decodes greedily.
    Returns: a Rollout; a response keeps its first EOS, then pads; T is the longest response's length.
    Raises: ValueError for a model in train mode, FloatingPointError where the logits are not finite.
    """
    if model.training:
        # Under gradient checkpointing a layer in train mode takes no cache: every token would see itself alone.
        raise ValueError("generate needs the model in eval mode: call roles.train(False) first")
    rows, device, total = len(query_ids), query_ids.device, sampling.max_new_tokens
    out = Rollout(
        query_ids=query_ids,
        query_mask=query_mask.bool(),
        response_ids=torch.full((rows, total), sampling.pad_token_id, device=device),
        mask=torch.zeros(rows, total, dtype=torch.bool, device=device),
        logprobs=torch.zeros(rows, total, device=device),
        values=torch.zeros(rows, total, device=device),
        entropy=torch.zeros(rows, total, device=device),
    )
    cache = DynamicCache(config=model.config)
    alive = torch.arange(rows, device=device)
    tokens, attention_mask = query_ids, out.query_mask
    for t in range(total):
        last = torch.tensor([tokens.shape[1] - 1], device=device)
        logits, hidden = forward(model, tokens, attention_mask, columns=last, cache=cache)
        logits = sampling.process(logits.float(), first=t)
        chosen = _choose(logits[:, -1], sampling, generator)
        out.response_ids[alive, t] = chosen
        out.mask[alive, t] = True
        out.logprobs[alive, t] = selective_logprobs(logits, chosen[:, None]).squeeze(1)
        out.entropy[alive, t] = token_entropy(logits[:, -1])
        out.values[alive, t] = values_of(hidden[:, -1])
        going = (chosen != sampling.eos_token_id).nonzero().squeeze(1)
        # What is sampled under a signal is thrown away; the caller asks all processes whether to stop.
        if len(going) == 0 or t == total - 1 or received():
            break
        if len(going) < len(alive):
            alive, chosen, attention_mask = alive[going], chosen[going], attention_mask[going]
            cache.batch_select_indices(going)
        tokens = chosen[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(alive), 1)], 1)
    return out.rows(torch.arange(rows, device=device))


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """[B] long: one token a row of logits [B, V]; truncation shapes the draw, never the recorded probability."""
    if generator is None:
        return logits.argmax(-1)
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)
    probs = logits.softmax(-1)
    if not torch.isfinite(probs).all():
        raise FloatingPointError("the policy's logits are not finite: the update before this one broke it")
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def join(parts: list[Rollout], pad_token_id: int) -> Rollout:
    """Several rollouts as one, padded to the widest query (on the left) and response (on the right)."""
    joined = {}
    for field in dataclasses.fields(Rollout):
        tensors = [getattr(part, field.name) for part in parts]
        if any(tensor is None for tensor in tensors):
            continue
        width = max(tensor.shape[1] for tensor in tensors)
        value = pad_token_id if field.name.endswith("_ids") else 0
        left = field.name.startswith("query")
        joined[field.name] = torch.cat([_pad(tensor, width, value, left) for tensor in tensors])
    return Rollout(**joined)


def _pad(tensor: Tensor, width: int, value: int, left: bool) -> Tensor:
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)


def response_logprobs(model: PreTrainedModel, rollout: Rollout, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses under `model` and the same processors as at sampling, and the hidden states.

    Returns: [B, T] float32, nats (anything on padding; gradients flow), and hidden [B, T, H], one before each token.
    """
    logits, hidden = forward(model, rollout.input_ids, rollout.attention_mask, columns=rollout.columns)
    return selective_logprobs(sampling.process(logits), rollout.response_ids), hidden


def response_hidden(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[B, T, H]: the hidden state before each response token, without any logits; gradients flow."""
    return hidden_states(backbone_of(model), rollout.input_ids, rollout.attention_mask)[:, rollout.columns]


@torch.no_grad()
def score_values(roles: Roles, rollout: Rollout, rows_at_once: int) -> Tensor:
    """[B, T] float32, 0 on padding: values by a critic that has an adapter of its own."""
    values = torch.zeros_like(rollout.logprobs)
    with roles.use("value") as model:
        for rows in by_length(rollout, rows_at_once):
            part = rollout.rows(rows)
            found = roles.values(response_hidden(model, part))
            values[rows, : part.mask.shape[1]] = torch.where(part.mask, found, 0)
    return values


@torch.no_grad()
def score_logprobs(
    roles: Roles, role: str, rollout: Rollout, sampling: Sampling, rows_at_once: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses under a role, and what the value head makes of its hidden states.

    Returns: [B, T] float32 each, 0 on padding.
    """
    logprobs, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.values)
    with roles.use(role) as model:
        for rows in by_length(rollout, rows_at_once):
            part = rollout.rows(rows)
            width = part.mask.shape[1]
            found, hidden = response_logprobs(model, part, sampling)
            logprobs[rows, :width] = torch.where(part.mask, found, 0)
            values[rows, :width] = torch.where(part.mask, roles.values(hidden), 0)
    return logprobs, values


def by_length(rollout: Rollout, rows_at_once: int) -> list[Tensor]:
    """Row indices in batches of `rows_at_once`, rows of like length together: less padding is computed."""
    lengths = rollout.query_mask.sum(1) + rollout.mask.sum(1)
    return list(lengths.argsort(stable=True).split(rows_at_once))
