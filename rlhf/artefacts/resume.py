"""Resuming: which flags and inputs may differ from the checkpoint's, and how a finished run is recognised."""

import json
from dataclasses import asdict
from pathlib import Path

from rlhf.artefacts.checkpoint import read_manifest
from rlhf.artefacts.run_json import adapter_hash, load_run

# How a run is carried out and looked at, not what comes out of it: these may differ.
MACHINE_FLAGS = {
    "output_dir",
    "resume_from_checkpoint", "overwrite_output_dir", "allow_changes", "plan", "nproc", "local_rank", "log_with",
    "logging_steps", "sample_freq", "save_freq", "save_steps", "save_total_limit", "check", "reward_gate", "audit",
    "audit_prompts", "sample_max_new_tokens", "per_device_eval_batch_size", "eval_steps", "eval_first_step",
}  # fmt: skip

# Where things are, not what they are: fingerprints tell whether they are the same.
PATH_FLAGS = {
    "model_name", "base_model_name", "tokenizer_name", "dataset_name", "eval_dataset_name", "sft_model_lora_path",
    "reward_model_lora_path", "judge_lora_path", "merged_sft_model_path", "deepspeed",
}  # fmt: skip

# What may be extended: more steps of the same kind.
LENGTH_FLAGS = {"steps", "max_steps", "num_train_epochs"}


def differences(then: dict, args, ignored: set[str] = frozenset()) -> list[str]:
    """ "--name (was X, is Y)" of each flag that counts and differs between a run.json's arguments and these."""
    now = json.loads(json.dumps(asdict(args), default=str))
    return [
        f"--{name} (was {value}, is {now[name]})"
        for name, value in then.items()
        if name not in MACHINE_FLAGS | ignored and name in now and now[name] != value
    ]


def _other_inputs(before: dict, run: dict) -> list[str]:
    """Data, base and parents whose fingerprints are not what they were."""
    pairs = [("the data", before["data"].get("fingerprint"), run["data"].get("fingerprint"))]
    pairs.append(("the base", before["base"], run["base"]))
    for role, path in run.get("parents", {}).items():
        pairs.append((f"the {role} adapter", before["parents"].get(role, {}).get("adapter"), adapter_hash(path)))
    return [name for name, then, now in pairs if then != now]


def _only_longer(found: list[str], args) -> bool:
    """Whether all that differs is the run's length; where the learning rate depends on that, it does count."""
    return args.lr_scheduler_type == "constant" and all(words.split()[0][2:] in LENGTH_FLAGS for words in found)


def refuse_changes(folder: Path, args, run: dict, processes: int) -> None:
    """Refuse to go on from a checkpoint that was made under other flags, data or processes.

    A run may be made longer. Everything else is refused unless --allow_changes True, and then said aloud.

    Args:
        folder: a complete checkpoint. processes: of this run.
        run: what this command would write into run.json; its fingerprints are compared.
    Raises: ValueError naming what differs.
    """
    before, stage = load_run(folder), run.get("stage", "ppo")
    if before is None or before["stage"] != stage:
        raise ValueError(f"{folder} is no checkpoint of stage {stage}: its run.json is missing or of another stage")
    found = differences(before["arguments"], args, PATH_FLAGS)
    if _only_longer(found, args):
        found = []
    found += _other_inputs(before, run)
    then = read_manifest(folder).get("processes")
    if then != processes:
        found.append(f"the number of processes (was {then}, is {processes})")
    if found and not args.allow_changes:
        raise ValueError(
            f"{folder} was written by another command; different: {', '.join(found)}. Prompts, batches and random "
            "draws would no longer be those of an uninterrupted run: give the old values, another --output_dir, or "
            "--allow_changes True"
        )
    if found:
        print(f"going on from {folder} with changes, so not exactly: {', '.join(found)}", flush=True)


def finished_run(args, stage: str) -> dict | None:
    """run.json of this very run if it ended before and --resume_from_checkpoint True asks for it again, else None.

    Raises: ValueError naming what differs where output_dir holds the finished run of another command.
    """
    run = load_run(args.output_dir) if args.resume_from_checkpoint == "True" else None
    if run is None:
        return None
    if run["stage"] != stage:
        raise ValueError(f"--output_dir {args.output_dir} holds a run of stage {run['stage']}: give another directory")
    found = differences(run["arguments"], args)
    if found and _only_longer(found, args):
        return None
    if found:
        raise ValueError(
            f"--output_dir {args.output_dir} holds a finished run with another {', '.join(found)}: give "
            "--overwrite_output_dir True to train again, or another directory"
        )
    return run
