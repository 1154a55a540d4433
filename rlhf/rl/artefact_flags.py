"""Flags of PPO's artefacts: what it starts from, and where the result goes."""

from dataclasses import dataclass

from rlhf.flags import Flags, flag

# A directory of PPO's own: under the shared default it would lie among the other stages' runs.
OUTPUT_DIR = "runs/ppo"


@dataclass(kw_only=True)
class ArtefactFlags(Flags):
    """Directories that PPO reads and writes."""

    base_model_name: str = flag(
        help="base: directory or hub id", group="artefacts", aliases=["--model_name"], resume="path"
    )
    sft_model_lora_path: str | None = flag(
        None, help="SFT adapter to start from; none: a fresh one on a chat model", group="artefacts", resume="path"
    )
    # One path is a text, as in every run.json; several are a list.
    reward_model_lora_path: list[str] | str | None = flag(
        None,
        help="reward adapter with its score head, or several that score together; none: functions alone",
        group="artefacts",
        resume="path",
        nargs="+",
    )
    merged_sft_model_path: str | None = flag(
        None, help="merged SFT model as reference; none: the SFT adapter itself", group="artefacts", resume="path"
    )
    output_dir: str = flag(
        OUTPUT_DIR, help="directory for adapter, run.json, metrics.jsonl", group="artefacts", resume="free"
    )
    save_freq: int | None = flag(
        None, help="steps between checkpoints step_<n>; none: at the end only", group="artefacts", resume="free"
    )

    @property
    def reward_roles(self) -> dict[str, str]:
        """Role -> directory of each reward adapter: "reward", "reward_2" and so on; {} where functions alone score."""
        given = self.reward_model_lora_path or []
        folders = given if isinstance(given, list) else [given]
        return {f"reward_{number}" if number > 1 else "reward": path for number, path in enumerate(folders, 1)}

    def __post_init__(self):
        if isinstance(self.reward_model_lora_path, list) and len(self.reward_model_lora_path) == 1:
            self.reward_model_lora_path = self.reward_model_lora_path[0]
        super().__post_init__()
        if self.save_freq is not None and self.save_freq < 1:
            raise ValueError(f"--save_freq {self.save_freq} must be at least 1, or be left out")
        # Without an adapter to start from the policy is a fresh one on the base, and no other model can be its
        # reference.
        if self.merged_sft_model_path and not self.sft_model_lora_path:
            raise ValueError(
                "--merged_sft_model_path is the reference of a policy that starts from an SFT adapter: give "
                "--sft_model_lora_path too, or give the merged model as --base_model_name"
            )
