"""Flags of reward_modeling.py: the pairs to train on, the loss, and the audit."""

import re
from dataclasses import dataclass

from rlhf.flags import Flags, flag
from rlhf.reward.degenerate import kinds_of


@dataclass(kw_only=True)
class PairFlags(Flags):
    """Pairs to train on: half of the prompts, margins, degenerate answers, one or two sequences a pair."""

    split_half: int | None = flag(
        None, help="0 or 1: train on one half of the prompts only, so that another model can judge", group="data"
    )
    fold: str | None = flag(
        None,
        help="I/K: train on the I-th of K folds of the prompts only, as one of K reward models for PPO",
        group="data",
        metavar="I/K",
    )
    margin_field: str | None = flag(
        None,
        help="column that says how much better the chosen answer is; the loss asks for that margin",
        group="data",
        expert=True,
    )
    degenerate_frac: float = flag(
        0.0,
        help="hardening: further training pairs against degenerate answers, as a share of the data's pairs",
        group="data",
    )
    degenerate_kinds: str = flag(
        "all",
        help="kinds of degenerate answers for hardening, as 'eos_only|cut|...' (rlhf/reward/degenerate.py)",
        group="data",
        expert=True,
    )
    share_prompt: bool = flag(
        False,
        help="put a pair into one sequence, its prompt computed once: pays where prompts are long",
        group="training",
        expert=True,
    )

    @property
    def fold_numbers(self) -> tuple[int, int]:
        """I and K of --fold I/K; zeros for anything else."""
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.fold or "", re.ASCII)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    def __post_init__(self):
        # The two halves share no prompt, so each can judge a model of the other.
        if self.split_half not in (None, 0, 1):
            raise ValueError(f"--split_half {self.split_half} must be 0 or 1, or be left out")
        if self.fold is not None and not 1 <= self.fold_numbers[0] <= self.fold_numbers[1] > 1:
            raise ValueError(f"--fold {self.fold} must be I/K with two folds or more and I from 1 to K, as in 2/4")

        # Only to refuse an unknown kind before any data is read.
        kinds_of(self.degenerate_kinds)
        # More than 1 is allowed: rows are then taken more than once.
        if self.degenerate_frac < 0:
            raise ValueError(f"--degenerate_frac {self.degenerate_frac} must not be negative")
        # Each group of flags hands on to the next one, which checks its own.
        super().__post_init__()


@dataclass(kw_only=True)
class LossFlags(Flags):
    """Options of the pairwise loss."""

    label_smoothing: float = flag(
        0.0, help="share of pairs assumed to be labelled the wrong way round", group="loss", expert=True
    )
    center_rewards_coefficient: float = flag(
        0.0, help="weight of the squared sum of a pair's scores, which keeps scores near 0", group="loss", expert=True
    )

    def __post_init__(self):
        # With half of the labels wrong there is nothing to learn; with more, the model would learn the reverse.
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {self.label_smoothing} must be in [0, 0.5)")

        # A negative weight would reward scores for drifting away from 0.
        if self.center_rewards_coefficient < 0:
            raise ValueError(f"--center_rewards_coefficient {self.center_rewards_coefficient} must not be negative")
        super().__post_init__()


@dataclass(kw_only=True)
class AuditFlags(Flags):
    """The audit of the trained reward model, or of a stored one."""

    # The audit comes after training, so a resumed run may ask for another one.
    audit: bool = flag(
        True, help="attack the trained model on held-out prompts: audit.json, .md, .png", group="audit", resume="free"
    )
    audit_prompts: int = flag(
        200, help="held-out prompts to attack, at most", group="audit", resume="free", expert=True
    )
    bad_answers: str | None = flag(
        None,
        help="file of answers that people called bad (playground.py exports it): the audit attacks with them, too",
        group="audit",
        resume="free",
        expert=True,
    )
    audit_only: bool = flag(
        False, help="audit --reward_model_lora_path without training, and write the audit there", group="audit"
    )
    reward_model_lora_path: str | None = flag(
        None, help="reward adapter to audit, for --audit_only", group="audit", resume="path"
    )

    def __post_init__(self):
        # An adapter to audit would otherwise be ignored without a word, and a new one trained.
        if self.audit_only != bool(self.reward_model_lora_path):
            raise ValueError("--audit_only True and --reward_model_lora_path belong together: give both or neither")
        super().__post_init__()
