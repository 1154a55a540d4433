"""The state that the functions of a PPO step share, and which prompts a step gets."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.generation import Sampling
from rlhf.ppo import AdaptiveKLController, FixedKLController, masked_moments, moments_of
from rlhf.rl.guard import CollapseGuard
from rlhf.rl.roles import Roles


@dataclass
class PPOLoop:
    """State that the functions of a step share: the roles, what trains them, and what a resumed run restores."""

    args: Any
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    roles: Roles
    prompts: list[dict]
    eval_prompts: list[dict]
    sampling: Sampling
    optimizer: torch.optim.Optimizer
    kl_controller: FixedKLController | AdaptiveKLController
    guard: CollapseGuard
    reward_stats: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    rollbacks: int = 0
    # Steps left out because of numbers that were not finite.
    left_out: int = 0
    # Weights and optimizer to go back to after a collapse, of rlhf.update.snapshot.
    last_good: tuple | None = None

    @property
    def processes(self) -> int:
        """Ranks of this run."""
        return self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        """PPO steps of the whole run: --steps counts responses, and the last batch is a whole one."""
        return -(-self.args.steps // (self.args.batch_size * self.processes))

    def set_learning_rate(self, step: int) -> None:
        """The learning rate of a step, a function of the step alone: a restart needs no state of it."""
        args = self.args
        if step < args.lr_warmup_steps:
            factor = (step + 1) / (args.lr_warmup_steps + 1)
        else:
            progress = (step - args.lr_warmup_steps) / max(1, self.total_steps - args.lr_warmup_steps)
            shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
            factor = shapes[args.lr_scheduler_type]
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * factor

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """A random source that depends on seed, step, rank and purpose alone, so a restart needs no stored state."""
        return seeded(self.accelerator.device, self.args.seed, step, self.accelerator.process_index, purpose)


def seeded(device, *place) -> torch.Generator:
    """A random source for one place in a run, unrelated to that of any other place."""
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def next_prompts(loop: PPOLoop, step: int) -> list[dict]:
    """This rank's prompts of a step: consecutive slices of a fresh permutation of the data for each pass over it.

    With a group size above 1 each prompt stands that many times in a row.
    """
    size = loop.args.batch_size // loop.args.group_size
    first = (step * loop.processes + loop.accelerator.process_index) * size
    places = [divmod(place, len(loop.prompts)) for place in range(first, first + size)]
    orders = {
        epoch: torch.randperm(len(loop.prompts), generator=seeded("cpu", loop.args.seed, "prompts", epoch))
        for epoch in {epoch for epoch, _ in places}
    }
    prompts = []
    for epoch, index in places:
        prompts += [loop.prompts[orders[epoch][index]]] * loop.args.group_size
    return prompts


def global_moments(accelerator: Accelerator, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the real entries of all ranks."""
    return moments_of(accelerator.reduce(masked_moments(x, mask), "sum"))
