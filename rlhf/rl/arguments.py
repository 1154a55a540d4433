"""Flags of rl_training.py: how the policy samples, is rewarded, is updated and is watched."""

from dataclasses import dataclass

from rlhf.flags import at_least, flag

# Answers a prompt where --group_size is left out: a critic-free advantage needs others to compare with.
GROUP_SIZE = {"gae": 1, "rloo": 4, "grpo": 4}


@dataclass(kw_only=True)
class SamplingFlags:
    """How the policy writes; the reference is scored under the same rules."""

    max_prompt_length: int = flag(512, help="queries of more tokens are dropped, and counted", group="data")
    output_max_length: int = flag(128, help="response tokens at most", group="sampling")
    batched_gen: bool = flag(True, help="sample the whole batch at once; False: one query at a time", group="sampling")
    cuda_graphs: bool = flag(True, help="on a GPU, record a decoding step once and replay it", group="sampling")
    temperature: float = flag(1.0, help="divides the logits, of policy and reference alike", group="sampling")
    suppress_empty: bool = flag(True, help="forbid EOS as first token (begin_suppress_tokens)", group="sampling")
    min_new_tokens: int = flag(0, help="forbid EOS before this many tokens", group="sampling")
    top_k: int = flag(0, help="sample among the k likeliest; not matched in the KL, so better 0", group="sampling")
    top_p: float = flag(1.0, help="sample within this mass; not matched in the KL, so better 1", group="sampling")

    def __post_init__(self):
        at_least(self, 1, "output_max_length", "max_prompt_length")
        if self.temperature <= 0:
            raise ValueError(
                f"--temperature {self.temperature} must be above 0: PPO needs a distribution to sample from"
            )
        if self.min_new_tokens >= self.output_max_length:
            raise ValueError("--min_new_tokens must be below --output_max_length")


@dataclass(kw_only=True)
class RewardFlags:
    """What a response is worth: its score, made comparable, minus the price of leaving the reference."""

    reward_transform: str = flag(
        "sigmoid",
        help="of the score; standardize: by mean and std of the SFT model's own answers, clipped at 5",
        group="reward",
        choices=["sigmoid", "raw", "standardize"],
    )
    reward_baseline: float = flag(0.0, help="subtracted from the transformed score", group="reward")
    score_clip: float = flag(0.0, help="the result stays within plus and minus this; 0: no limit", group="reward")
    missing_eos_penalty: float = flag(0.0, help="subtracted where a response hit the maximum length", group="reward")
    init_kl_coef: float = flag(0.5, help="price of one nat of KL to the reference", group="reward")
    adap_kl_ctrl: bool = flag(False, help="move the price so that the KL stays at its target", group="reward")
    adap_kl_target: float = flag(
        6.0, help="nats a response: target of --adap_kl_ctrl; the guard minds no KL under it", group="reward"
    )
    adap_kl_horizon: int = flag(10000, help="responses, for --adap_kl_ctrl", group="reward")
    whiten_rewards: bool = flag(False, help="scale token rewards to unit variance over the batch", group="reward")

    def __post_init__(self):
        at_least(self, 0, "score_clip", "missing_eos_penalty", "init_kl_coef")


@dataclass(kw_only=True)
class UpdateFlags:
    """How the policy and its critic learn from one batch."""

    steps: int = flag(20000, help="responses in total, of all processes, rounded up to whole batches", group="update")
    batch_size: int = flag(32, help="responses a step and process", group="update")
    mini_batch_size: int = flag(1, help="responses a backward pass", group="update")
    gradient_accumulation_steps: int = flag(
        4, help="backward passes an optimizer step; a window may span epochs", group="update"
    )
    ppo_epochs: int = flag(4, help="passes over each batch", group="update")
    learning_rate: float = flag(1.41e-5, help="of adapters and value head", group="update")
    lr_scheduler_type: str = flag(
        "constant",
        help="of the learning rate over the run",
        group="update",
        choices=["constant", "linear", "cosine"],
    )
    lr_warmup_steps: int = flag(0, help="PPO steps in which the learning rate rises from 0", group="update")
    adafactor: bool = flag(False, help="Adafactor in place of Adam", group="update")
    max_grad_norm: float = flag(1.0, help="gradients are scaled down to this norm", group="update")
    early_stopping: bool = flag(False, help="leave out a batch's other epochs past 1.5 x target_kl", group="update")
    target_kl: float = flag(0.1, help="nats a token that one update may move, for --early_stopping", group="update")
    advantage: str = flag(
        "gae",
        help="gae: by the critic; rloo, grpo: against other answers to the same prompt, without critic, gamma and lam",
        group="update",
        choices=list(GROUP_SIZE),
    )
    group_size: int | None = flag(
        None, help="answers a prompt, within batch_size; 1 for gae, 4 for rloo and grpo unless given", group="update"
    )
    gamma: float = flag(1.0, help="discount", group="update")
    lam: float = flag(0.95, help="lambda of GAE", group="update")
    whiten_advantages: bool = flag(True, help="GAE's to mean 0 and variance 1 over the batch", group="update")
    cliprange: float = flag(0.2, help="of the ratio", group="update")
    cliprange_value: float = flag(0.2, help="of the value", group="update")
    vf_coef: float = flag(0.1, help="weight of the value loss", group="update")
    value_lora: bool = flag(
        False, help="critic on an adapter of its own, which starts as the reward adapter", group="update"
    )
    critic_warmup_steps: int = flag(0, help="first PPO steps, in which only the critic learns", group="update")
    old_logprobs: str = flag(
        "auto",
        help="as sampled, or recomputed before the update; auto: recomputed only in half precision",
        group="update",
        choices=["auto", "sampled", "recomputed"],
    )
    forward_batch_size: int = flag(32, help="rows at once in passes without gradient", group="machine")

    def __post_init__(self):
        at_least(self, 1, "steps", "batch_size", "mini_batch_size", "ppo_epochs", "gradient_accumulation_steps",
                 "forward_batch_size")  # fmt: skip
        at_least(self, 0, "lr_warmup_steps", "critic_warmup_steps")
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --mini_batch_size {self.mini_batch_size}"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.group_size is None:
            self.group_size = GROUP_SIZE[self.advantage]
        if self.group_size < (1 if self.advantage == "gae" else 2):
            raise ValueError(
                f"--group_size {self.group_size} is too few for --advantage {self.advantage}: "
                "answers to one prompt are compared with each other"
            )
        if self.batch_size % self.group_size:
            raise ValueError(f"--batch_size {self.batch_size} must be a multiple of --group_size {self.group_size}")
        if self.advantage != "gae" and (self.value_lora or self.critic_warmup_steps):
            raise ValueError(
                f"--advantage {self.advantage} has no critic: leave out --value_lora and --critic_warmup_steps"
            )


@dataclass(kw_only=True)
class WatchFlags:
    """What a run looks at besides the score, and what it does about a collapse."""

    judge_lora_path: str | None = flag(
        None, help="second reward adapter that PPO does not see: chooses best/ at evaluations", group="watch"
    )
    best_kl_budget: float = flag(
        10.0, help="without a judge best/ is the best score within this KL, nats a response", group="watch"
    )
    reward_gate: str = flag(
        "warn",
        help="where degenerate answers win in the audit of the reward model (without one, a quick one at the start)",
        group="watch",
        choices=["warn", "refuse"],
    )
    on_collapse: str = flag(
        "stop",
        help="when length, emptiness, KL or entropy tell of a collapse: stop (exit code 3), rollback, or off",
        group="watch",
        choices=["stop", "rollback", "off"],
    )
    max_rollbacks: int = flag(3, help="rollbacks before the run stops", group="watch")
    check: bool = flag(
        True, help="before the first step look for what makes PPO silently wrong, on one batch", group="watch"
    )
    eval_freq: int = flag(
        0, help="steps between evaluations on held-out prompts; 0: none, or every 10 with a judge", group="watch"
    )
    eval_prompts: int = flag(64, help="held-out prompts of an evaluation, at most", group="watch")
    sample_freq: int = flag(
        10, help="steps between printed samples (all of that batch go to samples.jsonl)", group="watch"
    )

    def __post_init__(self):
        at_least(self, 1, "sample_freq", "eval_prompts")
        at_least(self, 0, "eval_freq", "max_rollbacks")
        if self.judge_lora_path and not self.eval_freq:
            self.eval_freq = 10
