"""The audit of a trained reward model, at the end of its training or alone."""

import torch

from rlhf.artefacts import adapter_hash, check_adapter
from rlhf.audit import audit, row_scorer
from rlhf.audit_report import table, write_audit
from rlhf.funnel import Funnel
from rlhf.launch import say
from rlhf.roles import add_lora, backbone_of, load_base, pick_dtype, score_head_of
from rlhf.splits import subset

# Held-out pairs that the audit's accuracy and calibration are measured on, at most.
AUDIT_PAIRS = 2000


def audit_model(args, backbone, head, tokenizer, eval_rows: list[dict], folder: str) -> dict[str, float]:
    """Attack a reward model on held-out prompts; audit.json, .md and .png in `folder`, the verdict in the log.

    Returns: what run.json keeps of it: audit_pass (1 or 0) and for each attack the share that the real answer wins.
    """
    device = next(head.parameters()).device
    rows = subset(eval_rows, AUDIT_PAIRS, args.seed, Funnel())
    found = audit(
        row_scorer(backbone, head, tokenizer.pad_token_id, args.per_device_eval_batch_size, device),
        rows, tokenizer, args.prompt_template, args.seed, args.max_length,
        attack_prompts=args.audit_prompts, padding=True,
    )  # fmt: skip
    write_audit(found | {"adapter": adapter_hash(folder)}, folder)
    say(table(found), f"audit written to {folder}/audit.md")
    shares = {f"audit/{kind}": result["share"] for kind, result in found["attacks"].items() if result["n"]}
    return {"audit_pass": float(found["verdict"]["verdict"] == "pass"), **shares}


def audit_adapter(args, model_dir: str, tokenizer, base: dict, eval_rows: list[dict]) -> None:
    """--audit_only: the audit of a reward adapter that is there already, as PPO will load it."""
    folder = args.reward_model_lora_path
    check_adapter(
        folder, stage="reward", flag="--reward_model_lora_path", base=base, tokenizer=tokenizer,
        template=args.prompt_template,
    )  # fmt: skip
    model = load_base(model_dir, pick_dtype(args.bf16), device="cuda" if torch.cuda.is_available() else "cpu")
    model, rest = add_lora(model, folder, "reward", trainable=False)
    head = score_head_of(rest, folder).to(model.device)
    audit_model(args, backbone_of(model.get_base_model()), head, tokenizer, eval_rows, folder)
