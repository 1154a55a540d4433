"""PPO for a language model in one file, on the arithmetic of rlhf/ppo.py: to understand before using.

    python docs/minimal_ppo.py

A tiny recurrent policy writes answers over eight tokens. A rule scores them: 1 for each token of the kind that the
prompt names, at most 6, and nothing without an end. PPO raises the score while a KL penalty keeps the policy near the
frozen reference that it started as. rl_training.py does the same with a real model, a reward model and adapters.

B prompts, T response tokens, V vocabulary; `mask` is True on real response tokens, the first EOS included.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf import ppo

EOS = 0
VOCABULARY = 8
# A prompt is one token: it asks for tokens of its own kind, 1 or 2.
KINDS = 2
MAX_TOKENS = 10
BATCH = 64
MINI_BATCH = 16
EPOCHS = 4
KL_COEF = 0.02
GAMMA = 1.0
LAM = 0.95
CLIPRANGE = 0.2
VALUE_WEIGHT = 0.1


class Policy(nn.Module):
    """A recurrent language model with a value head on its hidden states."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.recurrent = nn.GRU(hidden, hidden, batch_first=True)
        self.output = nn.Linear(hidden, VOCABULARY)
        self.value_head = nn.Linear(hidden, 1)
        # A critic that says 0 until it has learned something.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, V] that predict the token after each of `input_ids` [B, L], and values [B, L] before it."""
        hidden, _ = self.recurrent(self.embedding(input_ids))
        return self.output(hidden), self.value_head(hidden).squeeze(-1)


# ---- 1. Sample ----
@torch.no_grad()
def sample(policy: Policy, prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Responses [B, T] to prompts [B], and their mask: each keeps its first EOS, then pads."""
    tokens = prompts[:, None]
    for _ in range(MAX_TOKENS):
        logits, _ = policy(tokens)
        chosen = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)

    responses = tokens[:, 1:]
    # A token is real if no EOS stands before it.
    ended = (responses == EOS).cumsum(1) - (responses == EOS).long()
    return responses, ended == 0


def evaluate(policy: Policy, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, values and logits of responses [B, T]; the prompt and all tokens but the last are read."""
    inputs = torch.cat([prompts[:, None], responses[:, :-1]], 1)
    logits, values = policy(inputs)
    return ppo.selective_logprobs(logits, responses), values, logits


# ---- 2. Score ----
def score(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    """[B]: the rule that stands in for a reward model; an answer without an end is worth nothing."""
    right = (responses % KINDS == prompts[:, None] % KINDS) & (responses != EOS) & mask
    ended = ((responses == EOS) & mask).any(1)
    return right.sum(1).clamp(max=6).float() * ended


# ---- 3. One step ----
def train_step(policy: Policy, reference: Policy, optimizer, generator: torch.Generator) -> dict[str, float]:
    """One step of PPO: sample, score, rewards and advantages, update. Returns what one would watch."""
    # Sample, and record what the policy thought of its tokens before it learns from them.
    prompts = torch.randint(1, 1 + KINDS, (BATCH,), generator=generator)
    responses, mask = sample(policy, prompts, generator)
    with torch.no_grad():
        old_logprobs, old_values, logits = evaluate(policy, prompts, responses)
        ref_logprobs, _, _ = evaluate(reference, prompts, responses)

    # The score stands on the last token; every token pays for leaving the reference.
    scores = score(prompts, responses, mask)
    rewards, kl = ppo.token_rewards(scores, old_logprobs, ref_logprobs, mask, KL_COEF)
    advantages, returns = ppo.gae(rewards, old_values, mask, GAMMA, LAM)
    advantages = ppo.whiten(advantages, mask)

    # Several passes over the batch; the clip range keeps each from going too far.
    for _ in range(EPOCHS):
        for rows in torch.randperm(BATCH, generator=generator).split(MINI_BATCH):
            logprobs, values, _ = evaluate(policy, prompts[rows], responses[rows])
            policy_loss, stats = ppo.policy_loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows], CLIPRANGE)
            value_loss, _ = ppo.value_loss(values, old_values[rows], returns[rows], mask[rows], CLIPRANGE)
            loss = policy_loss + VALUE_WEIGHT * value_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    return {
        "score": scores.mean().item(),
        "kl": kl.sum(1).mean().item(),
        "length": mask.sum(1).float().mean().item(),
        "entropy": ppo.masked_entropy(logits, mask).item(),
        "clipfrac": stats["clipfrac"].item(),
    }


def main(steps: int = 60, seed: int = 0, learning_rate: float = 5e-3) -> list[dict[str, float]]:
    """Train for `steps` steps and print every tenth; returns the metrics of all."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)

    history = []
    for step in range(steps):
        history.append(train_step(policy, reference, optimizer, generator))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1:>3}  " + "  ".join(f"{name} {value:.2f}" for name, value in history[-1].items()))
    return history


if __name__ == "__main__":
    main()
