"""Flags of rl_training.py: how the policy samples, is rewarded, is updated and is watched."""

from dataclasses import dataclass

from rlhf.flags import Flags, at_least, flag

# Answers a prompt where --group_size is left out: a critic-free advantage needs others to compare with.
GROUP_SIZE = {"gae": 1, "rloo": 4, "grpo": 4}


@dataclass(kw_only=True)
class SamplingFlags(Flags):
    """Sampling of responses; the reference is scored under the same rules."""

    max_prompt_length: int = flag(
        512, help="longest query in tokens; longer ones are dropped and counted", group="data"
    )
    output_max_length: int = flag(128, help="longest response in tokens", group="sampling")
    # Off, sampling needs the least memory and takes the longest.
    batched_gen: bool = flag(
        True, help="sample the whole batch at once; False: one query at a time", group="sampling", expert=True
    )
    # One token is so little work for a GPU that starting its kernels one by one takes much of the time.
    cuda_graphs: bool = flag(
        True, help="record a decoding step on a GPU once and replay it", group="sampling", expert=True
    )
    # Unlike top_k and top_p, this changes the recorded log-probabilities as well: ratio and KL stay those of what
    # was sampled.
    temperature: float = flag(1.0, help="divisor of the logits, of policy and reference alike", group="sampling")
    # Where the reward model likes silence, an empty answer is the first thing that PPO finds.
    suppress_empty: bool = flag(
        True, help="forbid EOS as the first token (begin_suppress_tokens)", group="sampling", expert=True
    )
    min_new_tokens: int = flag(0, help="forbid EOS before this many tokens", group="sampling", expert=True)
    top_k: int = flag(
        0,
        help="sample among the k likeliest tokens; the KL does not account for it, so 0 is better",
        group="sampling",
        expert=True,
    )
    top_p: float = flag(
        1.0,
        help="sample within this probability mass; the KL does not account for it, so 1 is better",
        group="sampling",
        expert=True,
    )

    def __post_init__(self):
        at_least(self, 1, "output_max_length", "max_prompt_length")
        if self.temperature <= 0:
            raise ValueError(
                f"--temperature {self.temperature} must be above 0: PPO needs a distribution to sample from"
            )
        # No answer could ever end.
        if self.min_new_tokens >= self.output_max_length:
            raise ValueError("--min_new_tokens must be below --output_max_length")
        super().__post_init__()


@dataclass(kw_only=True)
class RewardFlags(Flags):
    """Reward of a response: its score, made comparable, minus the KL penalty."""

    # The sigmoid of a good reward model is near 1 for every answer, and teaches nothing.
    reward_transform: str = flag(
        "auto",
        help="transform of the score; standardize: by mean and std of the SFT model's own answers, clipped at 5; "
        "auto: standardize, but sigmoid with --merged_sft_model_path, as in the tutorial's command",
        group="reward",
        choices=["auto", "sigmoid", "raw", "standardize"],
    )
    reward_baseline: float = flag(
        0.0, help="number subtracted from the transformed score", group="reward", expert=True
    )
    score_clip: float = flag(0.0, help="bound on the result's absolute value; 0: none", group="reward", expert=True)
    missing_eos_penalty: float = flag(
        0.0, help="penalty for a response that hits the maximum length", group="reward", expert=True
    )
    init_kl_coef: float | None = flag(
        None, help="KL penalty: score per nat of KL; none: 0.2 for a standardized score, else 0.5", group="reward"
    )
    adap_kl_ctrl: bool = flag(False, help="adapt the KL penalty so that the KL stays at its target", group="reward")
    # The guard takes this as its budget with a fixed penalty as well.
    adap_kl_target: float = flag(
        6.0,
        help="target of --adap_kl_ctrl in nats per response; below it the guard ignores the KL",
        group="reward",
        expert=True,
    )
    adap_kl_horizon: int = flag(10000, help="horizon of --adap_kl_ctrl in responses", group="reward", expert=True)
    whiten_rewards: bool = flag(
        False, help="scale token rewards to unit variance over the batch", group="reward", expert=True
    )

    def __post_init__(self):
        # A negative penalty would reward what it should prevent.
        at_least(self, 0, "score_clip", "missing_eos_penalty", "init_kl_coef")
        super().__post_init__()


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
        at_least(self, 0, "lr_warmup_steps", "critic_warmup_steps")
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


@dataclass(kw_only=True)
class WatchFlags(Flags):
    """Watching a run besides its score, and reacting to a collapse."""

    judge_lora_path: str | None = flag(
        None,
        help="second reward adapter that PPO does not see; it chooses best/ at evaluations",
        group="watch",
        resume="path",
    )
    # Far from the SFT model a high score says little: the reward model was trained on no such answers.
    best_kl_budget: float = flag(
        10.0,
        help="without a judge, best/ is the best score within this KL, in nats per response",
        group="watch",
        expert=True,
    )
    reward_gate: str = flag(
        "warn",
        help="what to do where degenerate answers win in the reward model's audit (without one, in a quick audit)",
        group="watch",
        choices=["warn", "refuse"],
        resume="free",
    )
    # A script can tell a collapse from an error by the exit code.
    on_collapse: str = flag(
        "stop",
        help="what to do when length, emptiness, KL or entropy show a collapse: stop (exit code 3), rollback, or off",
        group="watch",
        choices=["stop", "rollback", "off"],
    )
    max_rollbacks: int = flag(3, help="rollbacks before the run stops", group="watch", expert=True)
    check: bool = flag(
        True,
        help="look for silent defects on one batch before the first step",
        group="watch",
        resume="free",
        expert=True,
    )
    eval_freq: int = flag(
        0, help="steps between evaluations on held-out prompts; 0: none, or every 10 with a judge", group="watch"
    )
    eval_prompts: int = flag(64, help="held-out prompts per evaluation, at most", group="watch", expert=True)
    sample_freq: int = flag(
        10,
        help="steps between printed samples (samples.jsonl keeps those batches whole)",
        group="watch",
        resume="free",
        expert=True,
    )

    def __post_init__(self):
        at_least(self, 1, "sample_freq", "eval_prompts")
        at_least(self, 0, "eval_freq", "max_rollbacks")
        # A judge that never judges would be loaded for nothing.
        if self.judge_lora_path and not self.eval_freq:
            self.eval_freq = 10
        super().__post_init__()
