"""The collapse guard: length, empty answers, KL and entropy at every step, because the score hides a collapse."""

import math
from collections import deque
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor

# A mean length under this share of the first step's: answers shrink towards nothing.
MIN_LENGTH_SHARE = 0.3

# Share of empty answers.
MAX_EMPTY = 0.5

# A KL jumps if it is over KL_FACTOR times the median of the last KL_WINDOW steps. Near 0 a factor says little, so the
# KL has to be KL_MARGIN nats above the median as well.
KL_FACTOR = 3.0
KL_MARGIN = 1.0
KL_WINDOW = 10

# An entropy under this share of the first step's: the policy gives one answer to everything.
MIN_ENTROPY_SHARE = 0.2

# Standard errors of the difference that a judge's mean has to fall by: less may be chance.
JUDGE_ERRORS = 3.0

# Metrics in which NaN or Inf is a collapse.
NUMBERS = ("score/mean", "kl/mean", "entropy", "loss/policy", "loss/value", "grad_norm")

# What tells that answers have left what the reward models were trained on: their spread, and the score that hides it.
DISAGREEMENT = ("score/spread", "score/mean")

# Members that agree at the start do so by so little that a factor says nothing: the rise has to be this large as well.
SPREAD_MARGIN = 0.1


def disagreement(metrics: dict[str, float], start: dict[str, float], limit: float) -> str | None:
    """Say in one sentence that several reward models have come to disagree while their combined score rises, or None.

    Args:
        metrics, start: of a step and of the run's first. limit: how many times its start the spread may be; 0: any.
    """
    if not limit or "score/spread" not in metrics or "score/spread" not in start:
        return None
    spread, score = (metrics[name] for name in DISAGREEMENT)
    spread_before, score_before = (start[name] for name in DISAGREEMENT)
    if spread <= max(limit * spread_before, spread_before + SPREAD_MARGIN) or score <= score_before:
        return None
    return (
        f"the reward models disagree: their spread rose from {spread_before:.2f} to {spread:.2f} while their combined "
        f"score rose from {score_before:.2f} to {score:.2f}: the answers have left what they were trained on"
    )


class CollapseGuard:
    """Compares each step's metrics with the run's start and with its last steps.

    Stops on a mean length under 30 % of the first step's, more than half of the answers empty, a KL over 3 times the
    median of the last 10 steps and over 1 nat above it, an entropy under 20 % of the first's, a non-finite number,
    several reward models that disagree far more than at the start, or a held-out judge that likes the answers less
    than the SFT model's, the last two while the score rises.
    """

    def __init__(self, kl_budget: float = 0.0, spread_limit: float = 0.0):
        """Limits of the run's own.

        Args:
            kl_budget: nats a response under which no rise of the KL counts: at the start it grows from nothing.
            spread_limit: of --ensemble_spread_limit; 0 for none.
        """
        self.kl_budget = kl_budget
        self.spread_limit = spread_limit
        self.start: dict[str, float] = {}
        self.recent_kl: deque[float] = deque(maxlen=KL_WINDOW)

    def check_step(self, metrics: dict[str, float]) -> str | None:
        """Return why this step counts as a collapse, in one sentence, or None; a good step is remembered."""
        reason = self._reason(metrics)
        # A collapsed step must not become the measure of the next.
        if reason is None:
            names = ("len/mean", "entropy", *(DISAGREEMENT if "score/spread" in metrics else ()))
            self.start = self.start or {name: metrics[name] for name in names}
            self.recent_kl.append(metrics["kl/mean"])
        return reason

    def check_evaluation(self, metrics: dict[str, float], baseline: dict[str, float]) -> str | None:
        """Return why an evaluation counts as reward hacking, in one sentence, or None: score rose, judge's fell.

        The judge's mean has to be under the SFT model's by more than JUDGE_ERRORS standard errors of the difference.

        Args:
            metrics, baseline: of the policy now and of the SFT model before the first step, on the same prompts.
        """
        if "eval/judge/mean" not in metrics or metrics["eval/score/mean"] <= baseline["eval/score/mean"]:
            return None

        now = metrics["eval/judge/mean"]
        before = baseline["eval/judge/mean"]
        error = math.hypot(metrics["eval/judge/error"], baseline["eval/judge/error"])
        if now >= before - JUDGE_ERRORS * error:
            return None
        return (
            f"the reward model is being gamed: its score rose from {baseline['eval/score/mean']:.2f} to "
            f"{metrics['eval/score/mean']:.2f} while the judge's fell from {before:.2f} to {now:.2f}"
        )

    def _reason(self, metrics: dict[str, float]) -> str | None:
        """The first sign of a collapse in a step's metrics, in one sentence, or None."""
        # NaN first: it compares as False, so the tests below would let it pass.
        for name in NUMBERS:
            # Without a critic there is no value loss.
            number = metrics.get(name, 0.0)
            if not math.isfinite(number):
                return f"{name} is {number}"

        if metrics["empty_frac"] > MAX_EMPTY:
            return f"{metrics['empty_frac']:.0%} of the answers are empty"

        # The first step has nothing to be compared with.
        for name, share in (("len/mean", MIN_LENGTH_SHARE), ("entropy", MIN_ENTROPY_SHARE)):
            if self.start and metrics[name] < share * self.start[name]:
                return (
                    f"{name} fell to {metrics[name]:.2f}, under {share:.0%} of its {self.start[name]:.2f} at the start"
                )

        # A median of fewer steps is too rough to call anything a jump.
        if len(self.recent_kl) == KL_WINDOW:
            usual = median(self.recent_kl)
            limit = max(KL_FACTOR * usual, usual + KL_MARGIN, self.kl_budget)
            if metrics["kl/mean"] > limit:
                return f"KL jumped to {metrics['kl/mean']:.2f} nats from a median of {usual:.2f}"
        return disagreement(metrics, self.start, self.spread_limit)

    def state_dict(self) -> dict:
        """JSON-safe state for a checkpoint."""
        return {"start": self.start, "recent_kl": list(self.recent_kl)}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` gave."""
        self.start = dict(state["start"])
        self.recent_kl = deque(state["recent_kl"], maxlen=KL_WINDOW)


def refuse_non_finite(accelerator: Accelerator, quantities: dict[str, Tensor]) -> None:
    """Stop on all ranks together if any tensor ([B] or [B, T]) of any rank holds NaN or Inf.

    Raises: FloatingPointError naming the quantity and the rows of this rank's batch.
    """
    bad = {}
    for name, tensor in quantities.items():
        # [B] becomes [B, 1], so that both shapes have a row for each response.
        broken = ~tensor.isfinite().reshape(len(tensor), -1)
        rows = broken.any(1)
        if rows.any():
            bad[name] = rows.nonzero().flatten().tolist()

    # All ranks reduce, those without a bad row too: an error on one alone would leave the others waiting.
    count = torch.tensor([float(bool(bad))], device=accelerator.device)
    if accelerator.reduce(count, "sum").item():
        where = ", ".join(f"{name} in rows {rows}" for name, rows in bad.items()) or "on another process"
        raise FloatingPointError(f"not finite: {where} of the batch; nothing was learnt from it")
