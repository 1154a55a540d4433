"""run.json: what a directory was made of, so that a later stage knows its inputs."""

import dataclasses
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from rlhf.artefacts.files import read_object, write_json
from rlhf.artefacts.fingerprints import parent_entry, tokenizer_fingerprint


# ---- writing ----
def write_run(
    output_dir, *, stage, args, base, tokenizer, prompt_format, data=None, parents=None, metrics=None
) -> dict:
    """Write run.json, which later stages read to refuse what does not fit; returns what was written.

    Args:
        stage: "sft", "reward" or "ppo". args: the script's dataclass (no secrets are among the flags).
        base: of `base_fingerprint`. prompt_format: of `PromptFormat.record`, or None. data: fingerprint, funnel.
        parents: role -> directory.
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
        "base": base,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompt_template": prompt_format and prompt_format["prompt_template"],
        "prompt_format": prompt_format,
        "special_ids": special_ids,
        "data": data or {},
        "parents": parent_entries,
        "metrics": metrics or {},
        "versions": library_versions(),
        "git_commit": _git_commit(),
    }

    write_json(Path(output_dir) / "run.json", run)
    return run


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run's numbers may depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate")}


def _git_commit() -> str | None:
    """The commit of this code; None where there is no git, or no repository."""
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
    """run.json of a stage's directory, or None for an adapter that was trained elsewhere."""
    file = Path(adapter_dir) / "run.json"
    if not file.is_file():
        return None
    return read_object(file)
