"""Adapters with random weights, in directories as the stages write them: later stages need no training before."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.fingerprints import base_fingerprint
from rlhf.artefacts.run_json import write_run
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.models.loading import load_base
from rlhf.models.lora import lora_targets


@dataclass
class NoArguments:
    """Stands where run.json keeps the flags of a stage."""

    seed: int = 0


def random_adapter(
    base: str, folder: Path | str, stage: str = "sft", seed: int = 0, scale: float = 0.05, prompt_format=None
) -> str:
    """Write an adapter of `stage` ("sft" or "reward", which has a score head) with random weights.

    `prompt_format`: that it says it was trained in; None for the tutorial's text.
    """
    folder = Path(folder)
    scored = stage == "reward"
    head = "score" if scored else "causal"
    task = {"task_type": "CAUSAL_LM"}
    if scored:
        task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}

    # A test's own random draws must not depend on the adapters that it needs.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load_base(base, torch.float32, head=head)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model, None), **task)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Scores have to differ by more than rounding, so the score head gets large weights.
                is_head = scored and parameter.shape[0] == 1
                torch.nn.init.normal_(parameter, std=1.0 if is_head else scale)

    # What the stage itself would leave, run.json included: later stages check it.
    save_adapter(model, folder)
    write_run(
        folder,
        stage=stage,
        args=NoArguments(),
        base=base_fingerprint(base),
        tokenizer=load_tokenizer(base),
        prompt_format=(prompt_format or text_format(load_tokenizer(base))).record(),
    )
    return str(folder)


def that_ends(base: str, folder: Path) -> str:
    """A copy of a base in `folder` whose answers end after a few tokens, some sooner, some later."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    # Of an untrained model the stop token is as unlikely as any other; now it is very likely, or very unlikely.
    weights["lm_head.weight"][load_tokenizer(base).eos_token_id] *= 12
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
