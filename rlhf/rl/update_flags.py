"""Flags of rl_training.py that say how one batch changes policy and critic."""

from dataclasses import dataclass

from rlhf.flags import Flags, at_least, flag

# Answers a prompt where --group_size is left out: a critic-free advantage needs others to compare with.
GROUP_SIZE = {"gae": 1, "rloo": 4, "grpo": 4}


@dataclass(kw_only=True)
class UpdateFlags(Flags):
    """Update of the policy and its critic from one batch."""

    # Responses, so that neither the batch size nor the number of processes changes how much is sampled.
    steps: int = flag(
        20000,
        help="responses to sample in total, over all processes, rounded up to whole batches",
        group="update",
        resume="longer",
    )
    # Of one process: with more processes a step is larger, and there are fewer of them.
    batch_size: int = flag(32, help="responses per step and process", group="update")
    # None, because what fits depends on the machine; the optimizer step stays that of a mini-batch of 1.
    mini_batch_size: int | None = flag(
        None, help="responses per backward pass; none: as many as fit, within an optimizer step", group="update"
    )
    # Rows of like length differ in number, where padded or long rows would fill the memory.
    tokens_per_backward: int = flag(
        0,
        help="tokens, queries' too, per backward pass, in place of mini_batch_size; the optimizer step stays as it is",
        group="update",
        expert=True,
    )
    gradient_accumulation_steps: int = flag(
        4,
        help="backward passes per optimizer step (responses, where mini_batch_size is left out); may span epochs",
        group="update",
    )
    ppo_epochs: int = flag(4, help="passes over each batch", group="update")
    learning_rate: float | None = flag(
        None, help="learning rate; none: 1.41e-5 at a hidden size of 4096, and as 1 / hidden size", group="update"
    )
    lr_scheduler_type: str = flag(
        "constant",
        help="schedule of the learning rate over the run",
        group="update",
        choices=["constant", "linear", "cosine"],
        expert=True,
    )
    lr_warmup_steps: int = flag(
        0, help="PPO steps in which the learning rate rises from 0", group="update", expert=True
    )
    adafactor: bool = flag(False, help="use Adafactor instead of Adam", group="update", expert=True)
    max_grad_norm: float = flag(1.0, help="gradients are scaled down to this norm", group="update", expert=True)
    early_stopping: bool = flag(
        False, help="skip a batch's remaining epochs once the policy moved by 1.5 x target_kl", group="update"
    )
    # A token's, where the other KLs here are a whole response's.
    target_kl: float = flag(
        0.1, help="nats per token that one update may move, for --early_stopping", group="update", expert=True
    )
    advantage: str = flag(
        "gae",
        help="gae: by the critic; rloo, grpo: against other answers to the same prompt, without critic, gamma and lam",
        group="update",
        choices=list(GROUP_SIZE),
    )
    # None, because the default depends on --advantage.
    group_size: int | None = flag(
        None, help="answers per prompt, within batch_size; 1 for gae, 4 for rloo and grpo unless given", group="update"
    )
    gamma: float = flag(1.0, help="discount of later rewards", group="update", expert=True)
    lam: float = flag(0.95, help="lambda of GAE", group="update", expert=True)
    whiten_advantages: bool = flag(
        True, help="scale GAE's advantages to mean 0 and variance 1 over the batch", group="update", expert=True
    )
    cliprange: float = flag(0.2, help="clip range of the probability ratio", group="update", expert=True)
    cliprange_value: float = flag(0.2, help="clip range of the value", group="update", expert=True)
    vf_coef: float = flag(0.1, help="weight of the value loss", group="update", expert=True)
    # Without it the value loss moves the policy's adapter too, whose hidden states the head reads.
    value_lora: bool = flag(
        False,
        help="give the critic an adapter of its own, which starts as the reward adapter",
        group="update",
        expert=True,
    )
    # A value head begins with zeros: its first advantages have no baseline.
    critic_warmup_steps: int = flag(
        0, help="first PPO steps, in which only the critic learns", group="update", expert=True
    )
    old_logprobs: str = flag(
        "auto",
        help="old log-probabilities: as sampled, or recomputed before the update; auto: recomputed in half precision",
        group="update",
        choices=["auto", "sampled", "recomputed"],
        expert=True,
    )
    forward_batch_size: int = flag(32, help="rows per pass without gradient", group="machine", expert=True)

    def __post_init__(self):
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"--learning_rate {self.learning_rate} must be above 0 and at most 1")
        self.mini_batch_size = self.mini_batch_size or None
        at_least(self, 1, "steps", "batch_size", "mini_batch_size", "ppo_epochs", "gradient_accumulation_steps",
                 "forward_batch_size")  # fmt: skip
        at_least(self, 0, "lr_warmup_steps", "critic_warmup_steps", "tokens_per_backward")
        # Every backward pass has as many rows as the others.
        rows = self.mini_batch_size or 1
        if self.batch_size % rows:
            raise ValueError(f"--batch_size {self.batch_size} must be a multiple of --mini_batch_size {rows}")
        self._check_groups()
        super().__post_init__()

    def _check_groups(self) -> None:
        # Set before run.json is written, so that a resumed run compares the number itself.
        if self.group_size is None:
            self.group_size = GROUP_SIZE[self.advantage]

        # The others of a group are the baseline, and one answer alone has no others.
        if self.group_size < (1 if self.advantage == "gae" else 2):
            raise ValueError(
                f"--group_size {self.group_size} is too few for --advantage {self.advantage}: "
                "answers to one prompt are compared with each other"
            )

        # A group stays whole, in one batch of one process.
        if self.batch_size % self.group_size:
            raise ValueError(f"--batch_size {self.batch_size} must be a multiple of --group_size {self.group_size}")

        # A flag that does nothing would be believed to work.
        if self.advantage != "gae" and (self.value_lora or self.critic_warmup_steps):
            raise ValueError(
                f"--advantage {self.advantage} has no critic: leave out --value_lora and --critic_warmup_steps"
            )
