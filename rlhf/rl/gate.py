"""The gate before PPO: finds a reward model that likes degenerate answers before the policy does."""

import warnings
from pathlib import Path

import numpy as np

from rlhf.artefacts.damage import refuse_types
from rlhf.artefacts.fingerprints import same_parent
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.forward import backbone_of
from rlhf.models.generation import Rollout
from rlhf.reward.audit import CONSEQUENCES, attack_results, consequence, make_attacks, row_scorer, winning_attacks
from rlhf.reward.audit_report import read_audit
from rlhf.rl.experience import sample_responses
from rlhf.rl.loop import PPOLoop, seeded
from rlhf.run.launch import say

# Answers of the SFT model that a reward adapter without an audit is tried on.
QUICK_PROMPTS = 64


def stored_audit(reward_dir: str | Path) -> dict | None:
    """The audit in a reward adapter's directory, if it was made of the adapter as it is now.

    Raises: ValueError where the part that the gate decides by is not as an audit writes it.
    """
    audit = read_audit(reward_dir)
    # An adapter that was trained again since then has another hash.
    if audit is None or "adapter" not in audit or not same_parent(audit, reward_dir):
        return None

    file = Path(reward_dir) / "audit.json"
    verdict = refuse_types(audit, file, {"verdict": dict}, required=("verdict",))["verdict"]
    winning = refuse_types(verdict, file, {"winning": dict}, required=("winning",))["winning"]
    refuse_types(winning, file, dict.fromkeys(winning, float))
    unknown = sorted(winning.keys() - CONSEQUENCES.keys())
    if unknown:
        raise ValueError(f"{file} names an attack {unknown[0]!r:.40} that is none: audit the reward model again")
    return audit


def read_gate(reward_dir: str | Path, mode: str) -> None:
    """Warn of, or refuse, a reward adapter whose audit says that degenerate answers win; nothing is loaded.

    Args:
        mode: "warn" or "refuse".
    Raises: ValueError in mode "refuse", with the attacks that win and how to mend it.
    """
    audit = stored_audit(reward_dir)
    # Without an audit, `quick_gate` tries the adapter later, when the model is loaded.
    if audit is not None:
        _warn_or_refuse(reward_dir, audit["verdict"]["winning"], mode, "its audit")


def quick_gate(loop: PPOLoop, members: dict[str, str]) -> None:
    """Gate for adapters without an audit: compare their scores of degenerate answers against the SFT model's own.

    Every rank asks the same prompts with the same draws, so all of them come to one decision.

    Args:
        members: role -> directory of the adapters to be tried.
    """
    args = loop.args
    # 1. Answers of the SFT model, which is what the policy starts as. A prompt counts once, however many rows have it.
    prompts = list({row["prompt"]: row for row in loop.prompts}.values())[:QUICK_PROMPTS]
    loop.roles.train(False)
    # The seed leaves out the rank, which the loop's own generators depend on.
    rollout = sample_responses(loop, prompts, seeded(loop.accelerator.device, args.seed, "gate"))
    pairs = _whole_answers(loop.prompt_format, prompts, rollout)
    if not pairs:
        warnings.warn("no answer of the SFT model ended: the reward model could not be tried on any", stacklevel=2)
        return

    # 2. Scores of the real answers and of degenerate ones made from them.
    # Doubled and repeated answers are about twice as long as real ones; longer rows are left out.
    longest = rollout.input_ids.shape[1] * 2
    attacks = make_attacks(pairs, loop.prompt_format, args.seed, longest, len(pairs))

    # 3. The decision, the same on every rank.
    for role, folder in members.items():
        results = attack_results(attacks, *_scores(loop, role, pairs, attacks))
        shares = [f"{kind} {result['share']:.0%}" for kind, result in results.items() if result["n"]]
        name = "the reward model" + (f" {folder}" if len(args.reward_roles) > 1 else "")
        say(f"quick audit of {name}: the SFT model's own answer wins against {', '.join(shares)}")
        _warn_or_refuse(folder, winning_attacks(results), args.reward_gate, "a quick audit")


def _whole_answers(prompt_format: PromptFormat, prompts: list[dict], rollout: Rollout) -> list[dict]:
    """Rows of `prompts` with their answer as "chosen", where it ended and is not empty.

    A cut answer would be attacked as if it were whole.
    """
    pairs = []
    for row, ids, mask in zip(prompts, rollout.response_ids, rollout.mask, strict=True):
        # With its EOS, as the ids of a pair are.
        answer = ids[mask].tolist()
        text = prompt_format.decode(answer)
        if answer[-1] in prompt_format.stop_ids and text:
            pairs.append({**row, "chosen": text, "chosen_ids": answer})
    return pairs


def _scores(loop: PPOLoop, role: str, pairs: list[dict], attacks: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """A reward model's scores of the answers in `pairs` and of `attacks`, [N] and [M]."""
    # The reward adapter has to be active as long as rows are scored.
    with loop.roles.use(role) as model:
        # The audit's own way to score, so that gate and audit judge alike.
        score_rows = row_scorer(
            backbone_of(model),
            loop.roles.score_heads[role],
            loop.prompt_format.pad_id,
            loop.args.forward_batch_size,
            loop.accelerator.device,
        )
        real = score_rows([pair["query_ids"] + pair["chosen_ids"] for pair in pairs])
        degenerate = score_rows([row for _, _, row in attacks])
    return np.array(real), np.array(degenerate)


def _warn_or_refuse(reward_dir: str | Path, winning: dict[str, float], mode: str, source: str) -> None:
    """Act on the attacks that win, if there are any; `source` names what measured them.

    Raises: ValueError in mode "refuse".
    """
    if not winning:
        return
    words = (
        f"{source} says that the reward model {reward_dir} prefers degenerate answers: "
        + "; ".join(consequence(kind, part) for kind, part in winning.items())
        + ". Train it again with more of --degenerate_frac (0.2 to begin with; reward_modeling.py)"
    )
    if mode == "refuse":
        raise ValueError(f"{words}, or go on all the same with --reward_gate warn")

    warnings.warn(f"{words}; PPO goes on because of --reward_gate warn", stacklevel=2)
