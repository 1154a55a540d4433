"""The state that the functions of a PPO step share, and which prompts a step gets."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.prompt_format import PromptFormat
from rlhf.models.generation import Sampling
from rlhf.ppo import AdaptiveKLController, FixedKLController, masked_moments, moments_of
from rlhf.reward.length_calibration import LengthCalibration
from rlhf.rl.guard import CollapseGuard
from rlhf.rl.reward_functions import RewardFunction
from rlhf.rl.roles import Roles


@dataclass
class PPOLoop:
    """State that the functions of a step share: the roles, what trains them, and what a resumed run restores."""

    args: Any
    accelerator: Accelerator
    prompt_format: PromptFormat
    roles: Roles
    prompts: list[dict]
    eval_prompts: list[dict]
    sampling: Sampling
    optimizer: torch.optim.Optimizer
    kl_controller: FixedKLController | AdaptiveKLController
    guard: CollapseGuard
    # The policy's twin that decodes on the shards of the base where they lie (rlhf/models/tensor_parallel.py).
    twin: PreTrainedModel | None = None
    functions: list[RewardFunction] = field(default_factory=list)
    # What length alone adds to the score of each reward adapter; empty without --length_calibration.
    calibrations: list[LengthCalibration] = field(default_factory=list)
    # Parts of the score in the run's first step, emptied when it was said that one of them decides alone.
    first_parts: dict[str, float] | None = None
    # Mean and deviation of the SFT model's raw scores, for --reward_transform standardize.
    reward_stats: dict[str, float] = field(default_factory=dict)
    # Evaluation of the SFT model, before the first step.
    baseline: dict[str, float] = field(default_factory=dict)
    # Step, value and gain of the evaluation that best/ is of.
    best: dict[str, float] = field(default_factory=dict)
    rollbacks: int = 0
    # Steps left out because of NaN or Inf.
    left_out: int = 0
    # Weights and optimizer state to go back to after a collapse, as rlhf.rl.state.loop_weights copies them.
    last_good: tuple | None = None

    @property
    def tokenizer(self):
        """The tokenizer of the prompt format."""
        return self.prompt_format.tokenizer

    @property
    def sampler(self) -> PreTrainedModel:
        """What samples: the policy, or its twin."""
        return self.roles.model if self.twin is None else self.twin

    @property
    def processes(self) -> int:
        """Ranks of this run."""
        return self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        """PPO steps of the whole run: --steps counts responses, and the last batch is a whole one."""
        return -(-self.args.steps // (self.args.batch_size * self.processes))

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rate of a step; it depends on the step alone, so a restart needs no state of it."""
        args = self.args
        if step < args.lr_warmup_steps:
            # From a first step above 0: a learning rate of 0 would waste its rollout.
            factor = (step + 1) / (args.lr_warmup_steps + 1)
        else:
            decaying = max(1, self.total_steps - args.lr_warmup_steps)
            progress = (step - args.lr_warmup_steps) / decaying
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}
            factor = shapes[args.lr_scheduler_type]

        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * factor

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """A random source that depends on seed, step, rank and purpose alone, so a restart needs no stored state."""
        return seeded(self.accelerator.device, self.args.seed, step, self.accelerator.process_index, purpose)


def seeded(device, *place) -> torch.Generator:
    """A random source for one place in a run, unrelated to that of any other place."""
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    # Seven bytes always fit a seed, which is a signed number of 64 bits.
    seed = int.from_bytes(digest[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def next_prompts(loop: PPOLoop, step: int) -> list[dict]:
    """This rank's prompts of a step: consecutive slices of a fresh permutation of the data for each pass over it.

    With a group size above 1 each prompt stands that many times in a row.
    """
    # 1. Which places this rank has in the endless sequence of passes, as (pass, place within it).
    size = loop.args.batch_size // loop.args.group_size
    # The ranks' slices of a step lie side by side, so that no prompt comes twice in a pass.
    first = (step * loop.processes + loop.accelerator.process_index) * size
    places = [divmod(place, len(loop.prompts)) for place in range(first, first + size)]

    # 2. A batch may begin in one pass and end in the next, so it can need more than one order.
    orders = {}
    for epoch in {epoch for epoch, _ in places}:
        source = seeded("cpu", loop.args.seed, "prompts", epoch)
        orders[epoch] = torch.randperm(len(loop.prompts), generator=source)

    # 3. The prompts, each as often as a group needs it.
    prompts = []
    for epoch, index in places:
        prompt = loop.prompts[orders[epoch][index]]
        prompts += [prompt] * loop.args.group_size
    return prompts


def global_moments(accelerator: Accelerator, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the real entries of all ranks."""
    return moments_of(accelerator.reduce(masked_moments(x, mask), "sum"))
