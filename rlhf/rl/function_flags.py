"""Flags of rewards in code: which functions score, how much each part counts."""

from dataclasses import dataclass

from rlhf.flags import Flags, at_least, flag

# Under standardize a part of the score counts in standard deviations of the SFT model's own answers, measured once
# before the first step: only so do weights compare parts of different scales.
TRANSFORMS = ("raw", "sigmoid", "standardize")


@dataclass(kw_only=True)
class FunctionFlags(Flags):
    """Reward functions beside a reward adapter, or in place of it."""

    reward_functions: list[str] = flag(
        [],
        help="functions that score answers: FILE.py:FUNCTION, or overlong, repetition, exact_answer, pattern=REGEX",
        group="reward",
        # A resumed run may find the file elsewhere: run.json compares the contents by their sha256.
        resume="path",
    )
    reward_weights: list[float] = flag(
        [], help="weight of each part of the score: reward adapter first, then functions (default: 1 each)",
        group="reward", expert=True,
    )  # fmt: skip
    function_transforms: list[str] = flag(
        [],
        help="transform of each function's score: raw (default), sigmoid or standardize; one for all, or one for each",
        group="reward",
        choices=list(TRANSFORMS),
        expert=True,
    )
    length_calibration: bool = flag(
        False,
        help="subtract what a reward model's score owes to length alone, by the length_calibration.json of its audit",
        group="reward",
        expert=True,
    )
    # Free to change on a resume: it decides whether a run ends, never what a score is.
    reward_timeout: float = flag(
        0.0, help="seconds that a function may take for one batch; 0: any", group="reward", resume="free", expert=True
    )
    # Yu et al. 2025 (DAPO, arXiv:2503.14476), section 3.2: where all answers of a group score alike, all its
    # advantages are 0 and its rollouts teach nothing.
    drop_dead_groups: bool = flag(
        False,
        help="replace groups whose answers all have one score by fresh prompts (rloo, grpo)",
        group="update",
        expert=True,
    )
    # Section 3.4 there: the score of a cut answer says more of the limit than of the answer.
    mask_truncated: bool = flag(
        False, help="learn nothing from answers that were cut at the maximum length", group="update", expert=True
    )
    # Liu et al. 2025 (arXiv:2503.20783): the division gives most weight to prompts whose answers hardly differ.
    scale_by_std: bool = flag(
        True, help="divide grpo's advantages by the deviation within the group", group="update", expert=True
    )
    # Section 3.1 of DAPO: under one bound for both sides a rare token can hardly gain probability, and entropy falls.
    cliprange_high: float | None = flag(
        None, help="clip range of the ratio above 1; none: --cliprange", group="update", expert=True
    )

    def __post_init__(self):
        at_least(self, 0, "reward_timeout", "cliprange_high")
        if not self.reward_functions and not self.reward_model_lora_path:
            raise ValueError("nothing scores the answers: give --reward_model_lora_path, or --reward_functions")

        parts = len(self.reward_functions) + bool(self.reward_model_lora_path)
        if self.reward_weights and len(self.reward_weights) != parts:
            raise ValueError(
                f"--reward_weights has {len(self.reward_weights)} numbers for {parts} parts: the reward adapter "
                "first, where there is one, then each function"
            )
        if self.function_transforms and len(self.function_transforms) not in (1, len(self.reward_functions)):
            raise ValueError(
                f"--function_transforms has {len(self.function_transforms)} names for {len(self.reward_functions)} "
                "functions: give one for all, or one for each"
            )
        if self.drop_dead_groups and self.advantage == "gae":
            raise ValueError("--drop_dead_groups True needs groups: give --advantage rloo or grpo")
        if self.length_calibration and not self.reward_model_lora_path:
            raise ValueError("--length_calibration True mends the score of a reward model: there is none")
        if self.value_lora and not self.reward_model_lora_path:
            raise ValueError("--value_lora True starts the critic as the reward adapter: there is none")
        super().__post_init__()
