"""Flags of rl_training.py: how the policy samples, is rewarded and is watched."""

from dataclasses import dataclass

from rlhf.flags import Flags, at_least, flag


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
