"""Flags of best of n in the audit: what PPO will find by a reward model, tried without PPO."""

from dataclasses import dataclass
from pathlib import Path

from rlhf.flags import Flags, at_least, flag


@dataclass(kw_only=True)
class BestOfFlags(Flags):
    """Best of n for --audit_only."""

    # None of them concerns a training that could be resumed.
    best_of: int = flag(
        0,
        help="answers of the SFT model to each held-out prompt; the audit follows the best of 1, 2, 4, ...; 0: none",
        group="audit",
        resume="free",
    )
    sft_model_lora_path: str | None = flag(
        None, help="SFT adapter that writes the answers of --best_of; none: the base", group="audit", resume="path"
    )
    judge_lora_path: str | None = flag(
        None, help="second reward adapter, which judges the best answers of --best_of", group="audit", resume="path"
    )
    best_of_prompts: int = flag(
        100, help="held-out prompts of --best_of, at most; -1: all", group="audit", resume="free", expert=True
    )
    output_max_length: int = flag(128, help="longest answer of --best_of in tokens", group="audit", expert=True)
    write_best: str | None = flag(
        None,
        help="file for the best answers of --best_of as SFT rows (rejection sampling), .jsonl",
        group="audit",
        resume="free",
        expert=True,
    )

    def __post_init__(self):
        at_least(self, 1, "output_max_length")
        # The best of one is every answer.
        if self.best_of < 0 or self.best_of == 1:
            raise ValueError(f"--best_of {self.best_of} must be at least 2, or 0 for none")
        if self.best_of_prompts < 1 and self.best_of_prompts != -1:
            raise ValueError(f"--best_of_prompts {self.best_of_prompts} must be a number of prompts, or -1 for all")
        if self.best_of and not self.audit_only:
            raise ValueError("--best_of asks a trained reward model: give --audit_only True too")

        # A flag that does nothing would be believed to work.
        for name in ("sft_model_lora_path", "judge_lora_path", "write_best"):
            if getattr(self, name) and not self.best_of:
                raise ValueError(f"--{name} is for the answers of --best_of: give it too, or leave --{name} out")
        self._check_file()
        super().__post_init__()

    def _check_file(self) -> None:
        if self.write_best is None:
            return
        if Path(self.write_best).suffix != ".jsonl":
            raise ValueError(f"--write_best {self.write_best} must be the name of a .jsonl file")
        # The same name alone: a file by another path is replaced as any output is.
        if self.write_best in (self.dataset_name, self.eval_dataset_name):
            raise ValueError(f"--write_best {self.write_best} would replace the data that the prompts come from")
