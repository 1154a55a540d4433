"""Flags of several reward models at once: how they are combined, and how much disagreement stops the run."""

from dataclasses import dataclass

from rlhf.flags import Flags, at_least, flag


@dataclass(kw_only=True)
class EnsembleFlags(Flags):
    """What becomes of several --reward_model_lora_path; without effect on one."""

    reward_ensemble: str = flag(
        "mean",
        help="combination of several reward adapters, each standardized on the SFT model's own answers",
        group="reward",
        choices=["mean", "min", "mean_minus_std"],
        expert=True,
    )
    ensemble_penalty: float = flag(
        1.0, help="standard deviations over the members that mean_minus_std subtracts", group="reward", expert=True
    )
    # In the mini-world the spread of a batch strays to 1.35 times its start by chance (docs/reward.md).
    ensemble_spread_limit: float = flag(
        2.0,
        help="the guard steps in where the members' spread passes this many times its start while the score rises; "
        "0: never",
        group="watch",
        expert=True,
    )

    def __post_init__(self):
        at_least(self, 0, "ensemble_penalty", "ensemble_spread_limit")
        folders = list(self.reward_roles.values())
        # A flag that does nothing would be believed to work.
        if self.reward_ensemble != "mean" and len(folders) < 2:
            raise ValueError(
                f"--reward_ensemble {self.reward_ensemble} combines several reward adapters: give two or more after "
                "--reward_model_lora_path"
            )
        if self.ensemble_penalty != 1 and self.reward_ensemble != "mean_minus_std":
            raise ValueError("--ensemble_penalty is for --reward_ensemble mean_minus_std")
        twice = [folder for folder in folders if folders.count(folder) > 1]
        if twice:
            raise ValueError(f"--reward_model_lora_path has {twice[0]} twice: it would always agree with itself")
        super().__post_init__()
