"""Resuming: which flags and inputs may differ from the checkpoint's, and how a finished run is recognised."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from rlhf.artefacts.checkpoint import read_manifest
from rlhf.artefacts.fingerprints import adapter_hash, same_base, same_parent, tokenizer_fingerprint
from rlhf.artefacts.output_dir import RUN_FOLDERS
from rlhf.artefacts.run_json import library_versions, load_run
from rlhf.flags import resume_rules

# The role of a merged reference among a run's parents.
MERGED = "merged reference"


def differences(then: dict, args, ignored: tuple[str, ...] = ("free",)) -> list[str]:
    """List "--name (was X, is Y)" for each flag that differs between a run.json's arguments and these.

    `ignored`: rules of flags (`resume` in rlhf/flags.py) that are left out.
    """
    # Through JSON, as the old values came, so that a tuple equals its list.
    now = json.loads(json.dumps(asdict(args), default=str))
    rules = resume_rules(type(args))
    return [
        f"--{name} (was {value}, is {now[name]})"
        for name, value in then.items()
        # A flag that only one of the two versions knows cannot have been changed by the user.
        if name in now and rules[name] not in ignored and now[name] != value
    ]


def _other_inputs(before: dict, run: dict) -> list[str]:
    """List the data, base, format and parents whose contents have changed; older versions recorded fewer of them."""
    changed = []
    for name, words in (("fingerprint", "the data"), ("eval_fingerprint", "the evaluation rows")):
        if before["data"].get(name) is not None and before["data"].get(name) != run["data"].get(name):
            changed.append(words)
    if same_base(before["base"], run["base"]):
        changed.append("the base")
    if before.get("prompt_format") and before["prompt_format"] != run["prompt_format"]:
        changed.append("the prompt format")
    tokenizer = run.get("tokenizer")
    if tokenizer is not None and before.get("tokenizer") != tokenizer_fingerprint(tokenizer):
        changed.append("the tokenizer")

    # By name, argument and the hash of the file.
    if before.get("functions", []) != run.get("functions", []):
        changed.append("the reward functions")
    if before.get("length_calibration") != run.get("length_calibration"):
        changed.append("the length calibration")

    # A role that is left out counts too: without its judge a run would compare scores of two kinds.
    parents = run.get("parents", {})
    for role in sorted(parents.keys() | before["parents"].keys()):
        entry = before["parents"].get(role)
        # A merged reference is among the parents since formats are recorded.
        if entry is None and role == MERGED and not before.get("prompt_format"):
            continue
        if entry is None or role not in parents or not same_parent(entry, parents[role]):
            changed.append(f"the {role} adapter")
    return changed


def _other_paths(then: dict, args) -> bool:
    """Return True if a flag names another file or directory than it did, as far as the names tell."""
    rules = resume_rules(type(args))
    names = [name for name, rule in rules.items() if rule == "path" and name in then and name != "output_dir"]
    return any(_place(then[name]) != _place(getattr(args, name)) for name in names)


def _place(path: str | list[str] | None) -> str | list | None:
    """A path, or each of several, without what may be spelled in several ways; a hub id or None as it is."""
    if isinstance(path, list):
        return [_place(one) for one in path]
    return os.path.realpath(path) if isinstance(path, str) and os.path.exists(path) else path


def _only_longer(changes: list[str], args) -> bool:
    """Return True if only the run's length differs; it counts where the learning rate depends on the length."""
    rules = resume_rules(type(args))
    # Each entry of `differences` begins with "--" and the name.
    names = [words.split()[0][2:] for words in changes]
    # Any other schedule would have had other learning rates from the first step on.
    return args.lr_scheduler_type == "constant" and all(rules[name] == "longer" for name in names)


def refuse_changes(folder: Path | None, args, run: dict, processes: int) -> None:
    """Refuse to go on from a checkpoint that was made under other flags, data or processes.

    A run may be made longer. Everything else is refused unless --allow_changes True, and then said aloud.

    Args:
        folder: a complete checkpoint; None for a fresh start, which nothing is refused of. processes: of this run.
        run: what this command would write into run.json; its fingerprints are compared.
    Raises: ValueError naming what differs.
    """
    if folder is None:
        return
    # Flags of another stage could not be compared at all.
    before = load_run(folder)
    stage = run.get("stage", "ppo")
    if before is None or before["stage"] != stage:
        raise ValueError(f"{folder} is no checkpoint of stage {stage}: its run.json is missing or of another stage")

    # A path may differ, as directories are moved; data, base and parents are compared by content.
    changes = differences(before["arguments"], args, ignored=("free", "path"))
    if _only_longer(changes, args):
        changes = []
    changes += _other_inputs(before, run)
    # Each process has rows and random draws of its own, so their number belongs to the run.
    then = read_manifest(folder).get("processes")
    if then != processes:
        changes.append(f"the number of processes (was {then}, is {processes})")

    # All differences at once, so that one more try is enough.
    if changes and not args.allow_changes:
        raise ValueError(
            f"{folder} was written by another command; different: {', '.join(changes)}. Prompts, batches and random "
            "draws would no longer be those of an uninterrupted run: give the old values, another --output_dir, or "
            "--allow_changes True"
        )
    said = _other_versions(before)
    if said:
        print(f"going on from {folder} under other library versions: {', '.join(said)}", flush=True)
    if changes:
        print(f"going on from {folder} with changes, so not exactly: {', '.join(changes)}", flush=True)


def _other_versions(before: dict) -> list[str]:
    """List "torch (was 2.12.0, is 2.13.0)" for each library that has another version now."""
    now = library_versions()
    then = before.get("versions", {})
    return [f"{name} (was {then[name]}, is {now[name]})" for name in now if name in then and then[name] != now[name]]


def _refuse_other_stage(folder: Path, stage: str) -> None:
    """Refuse to resume in the directory of another stage, finished or not. Raises: ValueError."""
    # An unfinished run has its run.json in the checkpoints alone.
    inner = sorted(path for path in folder.glob("*") if RUN_FOLDERS.fullmatch(path.name))
    for place in (folder, *inner):
        run = load_run(place)
        if run is not None and run.get("stage") != stage:
            raise ValueError(f"--output_dir {folder} holds a run of stage {run.get('stage')}: give another directory")


def finished_run(args, stage: str, now: dict | None = None) -> dict | None:
    """run.json of this very run if it ended before, else None; also where only `now` could tell, and is None.

    Raises: ValueError naming what differs where output_dir holds the finished run of another command.
    """
    if args.resume_from_checkpoint != "True":
        return None
    _refuse_other_stage(Path(args.output_dir), stage)
    run = load_run(args.output_dir)
    if run is None:
        return None
    # Finished means that its files are there.
    if run["stage"] == stage and adapter_hash(args.output_dir) is None:
        return None

    changes = differences(run["arguments"], args, ignored=("free", "path"))
    inputs = _other_inputs(run, now) if now is not None else []
    # Another path may hold the same contents: that can be told once they are read, and this is asked again then.
    if now is None and not changes and _other_paths(run["arguments"], args):
        return None
    # A longer run goes on from the newest checkpoint, if there is one.
    if changes and not inputs and _only_longer(changes, args):
        return None
    if changes or inputs:
        raise ValueError(
            f"--output_dir {args.output_dir} holds a finished run of another command; different: "
            f"{', '.join(changes + inputs)}: give --overwrite_output_dir True to train again, or another directory"
        )
    return run
