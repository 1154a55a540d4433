"""run.json: what a directory was made of, so that a later stage knows its inputs."""

import dataclasses
import json
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

from rlhf.artefacts.damage import refuse_types
from rlhf.artefacts.files import read_object, write_json
from rlhf.artefacts.fingerprints import parent_entry, tokenizer_fingerprint

# What a run.json of ours holds, whichever version wrote it. Older versions lack some of it.
KINDS = {
    "stage": str, "arguments": dict, "base": dict, "tokenizer": (str, type(None)), "data": dict, "parents": dict,
    "metrics": dict, "versions": dict, "prompt_template": (str, type(None)), "prompt_format": (dict, type(None)),
    "functions": list, "length_calibration": list,
}  # fmt: skip
FORMAT_KINDS = {
    "prompt_template": str, "sha256": str, "text": str, "chat_template_kwargs": (dict, type(None)),
    "system_prompt": (str, type(None)), "bos": bool, "stop_tokens": list, "stop_ids": list,
}  # fmt: skip

# The script of each stage.
SCRIPTS = {"sft": "sft_training.py", "reward": "reward_modeling.py", "ppo": "rl_training.py", "merge": "merge_lora.py"}

# Of a format, what a later stage could not do without.
FORMAT_NEEDED = ("prompt_template", "text", "chat_template_kwargs", "system_prompt", "bos", "stop_ids")


# ---- writing ----
def write_run(
    output_dir,
    *,
    stage,
    args,
    base,
    tokenizer,
    prompt_format,
    data=None,
    parents=None,
    functions=None,
    length_calibration=None,
    metrics=None,
) -> dict:
    """Write run.json, which later stages read to refuse what does not fit; returns what was written.

    Args:
        stage: "sft", "reward" or "ppo". args: the script's dataclass (no secrets are among the flags).
        base: of `base_fingerprint`. prompt_format: of `PromptFormat.record`, or None. data: fingerprint, funnel.
        parents: role -> directory. functions: of `record_of`, where functions score.
        length_calibration: of `length_file.hashes`, where length is taken out of a score.
    """
    # The fingerprint hides these ids, and a reader may want to know them.
    special_ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    # The hash tells a parent that was trained again since then from the one that was used.
    parent_entries = {}
    for role, path in (parents or {}).items():
        parent_entries[role] = parent_entry(path)

    # Packages whose version may change a result.
    run = {
        "stage": stage,
        "arguments": dataclasses.asdict(args),
        "command": command_of(stage, args),
        "base": base,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        # Once more by itself, as versions wrote it that recorded nothing else of the format.
        "prompt_template": prompt_format and prompt_format["prompt_template"],
        "prompt_format": prompt_format,
        "special_ids": special_ids,
        "data": data or {},
        "parents": parent_entries,
        "metrics": metrics or {},
        "versions": library_versions(),
        "git_commit": _git_commit(),
    }

    # Left out where there are none, as by versions that knew none: to a resume both are the same.
    if functions:
        run["functions"] = functions
    if length_calibration:
        run["length_calibration"] = length_calibration
    write_json(Path(output_dir) / "run.json", run)
    return run


def command_of(stage: str, args) -> str:
    """The command line of a stage, without the flags that are at their defaults.

    Args:
        args: the script's dataclass; what a stage has chosen for a flag left out stands there by now.
    """
    words = ["python", SCRIPTS.get(stage, stage)]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value is None or value == default:
            continue
        words += [f"--{field.name}", *map(_word, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _word(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run's numbers may depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate")}


def _git_commit() -> str | None:
    """The commit of this code; None where there is no git, or no repository."""
    # Of the directory of this code: a user's working directory may be another repository.
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    # A hanging git is no reason to lose a run.
    except (OSError, subprocess.SubprocessError):
        return None
    commit = result.stdout.strip()
    return commit if re.fullmatch(r"[0-9a-f]{40,64}", commit) else None


# ---- reading ----
def load_run(adapter_dir: str | Path) -> dict | None:
    """run.json of a stage's directory, or None for an adapter that was trained elsewhere.

    Raises: ValueError naming the field that this project would not have written so.
    """
    file = Path(adapter_dir) / "run.json"
    if not file.is_file():
        return None
    run = refuse_types(read_object(file), file, KINDS, required=("stage",))
    for entry in run.setdefault("parents", {}).values():
        refuse_types({"parents": entry}, file, {"parents": dict})
        refuse_types(entry, file, {"path": str, "adapter": (str, type(None)), "config": (str, type(None))})
    prompt_format = run.get("prompt_format")
    if prompt_format is not None:
        refuse_types(prompt_format, file, FORMAT_KINDS, required=FORMAT_NEEDED)
        if not all(type(token) is int for token in prompt_format["stop_ids"]):
            raise ValueError(f"{file}: its stop_ids are no token ids: it is damaged, or was changed by hand")
    # Readers need not ask what an older version left out; its own fields win.
    return {"arguments": {}, "base": {}, "data": {}, "metrics": {}, "versions": {}} | run
