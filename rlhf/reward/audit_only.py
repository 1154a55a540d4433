"""--audit_only: the audit of a reward adapter that is there already, as PPO will load it, and what goes with it."""

from collections.abc import Sequence

import torch

from rlhf.artefacts.adapters import check_adapter
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.forward import backbone_of
from rlhf.models.loading import load_base, pick_dtype
from rlhf.models.lora import add_lora, score_head_of
from rlhf.models.shards import base_mesh
from rlhf.reward import benchmark, best_of
from rlhf.reward.audit import row_scorer
from rlhf.reward.audit_report import audit_model, publish
from rlhf.run.launch import rank_and_size, say


def audit_adapter(args, model_dir: str, prompt_format: PromptFormat, base: dict, eval_rows: Sequence[dict]) -> None:
    """Audit --reward_model_lora_path on held-out pairs, by subset where they have one; and best of n (--best_of)."""
    folder = args.reward_model_lora_path
    # Before the base is loaded, so that a wrong adapter is refused within seconds.
    identity = {"base": base, "tokenizer": prompt_format.tokenizer, "prompt_format": prompt_format.record()}
    check_adapter(folder, stage="reward", flag="--reward_model_lora_path", **identity)
    if args.best_of:
        best_of.check_inputs(args, model_dir, identity)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A language model with the score head beside it, as in PPO.
    model = load_base(model_dir, pick_dtype(args.bf16), device=device, mesh=base_mesh(args.shard_base))
    model, rest = add_lora(model, folder, "reward", trainable=False)
    head = score_head_of(rest, folder).to(model.device)
    backbone = backbone_of(model.get_base_model())

    # What only this audit knows, for the same report.
    more = {}
    if benchmark.has_subsets(eval_rows):
        batch = args.per_device_eval_batch_size
        score_rows = row_scorer(backbone, head, prompt_format.pad_id, batch, model.device)
        more["subsets"] = benchmark.by_subset(score_rows, eval_rows)
    if args.best_of:
        more["best_of_n"] = best_of.run(args, model, head, prompt_format, eval_rows)
    results = audit_model(args, backbone, head, prompt_format, eval_rows, more)
    if rank_and_size()[0]:
        return
    publish(results, folder)
    for name, part in more.get("subsets", {}).items():
        say(f"{name}: right on {part['share']:.1%} of {part['n']:,} questions")
    say(f"audit written to {folder}/audit.md")
