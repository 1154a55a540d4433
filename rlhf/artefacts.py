"""The contract between stages: adapter directories, run.json, fingerprints, refusing what does not fit together."""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from rlhf.disk import damaged, load_tensors, readable_when_full, write_json

ADAPTER_FILE = "adapter_model.safetensors"
SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
# What a run leaves at the top of its directory: all that --overwrite_output_dir removes, whatever else lies there.
RUN_FILES = ("run.json", "metrics.jsonl", "samples.jsonl", "value_head.safetensors", "bad_rows.jsonl", ADAPTER_FILE)
# Temporary names of our writers; a process that is killed cannot remove its own.
SCRATCH = re.compile(
    r"\.(step_\d+|best|adapter|run\.json|adapter_config\.json|MANIFEST\.json|state\.json|bad_rows\.jsonl|chart\.png)\.\w+"
)
RUN_FOLDERS = re.compile(r"(step_|checkpoint-)\d+|best")


# ---- base model ----
def resolve_model(name: str, flag: str = "--model_name") -> str:
    """A model's local directory: the path itself, or the hub's snapshot (downloaded once, read offline ever after).

    Raises: FileNotFoundError in one sentence where neither exists.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{flag} {name} has no config.json: give the directory of a base model")
        return str(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{flag} {name} does not exist: give a model directory or a hub id (owner/name)")
    try:
        found = snapshot_download(name, allow_patterns=["*.json", "*.model", "*.safetensors", "*.txt"])
        if not list(Path(found).glob("*.safetensors")):
            found = snapshot_download(name, allow_patterns=["*.json", "*.model", "*.bin", "*.txt"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{flag} {name} is not a local directory and the hub cannot be reached ({type(error).__name__}): "
            "download the model once, or give its directory"
        ) from error
    return found


def base_fingerprint(model_dir: str) -> dict:
    """What identifies a base model: its shape, and a hash over stored bytes of tensors spread over it."""
    config = AutoConfig.from_pretrained(model_dir).to_dict()
    shape = {name: config[name] for name in SHAPE_FIELDS if name in config}
    return {**shape, "weights": _weights_hash(Path(model_dir))}


def _weights_hash(model_dir: Path, tensors: int = 16, rows: int = 4) -> str:
    """Hash stored bytes, not cast values: the same file gives the same hash on every dtype and device."""
    where = {}
    for file in sorted([*model_dir.glob("*.safetensors"), *model_dir.glob("pytorch_model*.bin")]):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as shard:
                    where |= {name: (file, None) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            except SafetensorError as error:
                raise ValueError(damaged(file, error)) from error
        elif not list(model_dir.glob("*.safetensors")):
            where |= {name: (file, tensor) for name, tensor in load_tensors(file, mmap=True).items()}
    names = sorted(name for name in where if not name.endswith("inv_freq"))
    if not names:
        raise FileNotFoundError(f"{model_dir} holds no weights (*.safetensors or pytorch_model*.bin)")
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // tensors)]:
        file, tensor = where[name]
        if tensor is None:
            with safe_open(file, "pt") as shard:
                head = shard.get_slice(name)[:rows]
        else:
            head = tensor[:rows]
        digest.update(name.encode() + str(head.dtype).encode())
        digest.update(head.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash over the vocabulary, the special ids and how a probe text is split."""
    probe = tokenizer("问：1+1等于几？\n\n答：2。 Hello, world!", add_special_tokens=False)["input_ids"]
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    content = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), specials, probe])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ---- writing ----
def save_adapter(
    model: PeftModel, output_dir: str | Path, adapter_name: str = "default", state_dict: dict | None = None
) -> None:
    """Save one adapter at the root of `output_dir`, whatever its name in memory; lists in its config are sorted.

    `state_dict` replaces the model's own weights, where this process holds only a piece of them.

    peft puts an adapter that is not called "default" into a subfolder; every artefact here is at its directory's root,
    so that plain `PeftModel.from_pretrained(base, output_dir)` finds it.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=output_dir, prefix=".adapter.") as scratch,
        readable_when_full(Path(scratch), "the adapter"),
    ):
        model.save_pretrained(
            scratch, selected_adapters=[adapter_name], save_embedding_layers=False, state_dict=state_dict
        )
        saved = Path(scratch) if adapter_name == "default" else Path(scratch) / adapter_name
        config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
        for key, value in config.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                config[key] = sorted(value)
        # safetensors files are born readable by their owner alone.
        (saved / ADAPTER_FILE).chmod(0o644)
        os.replace(saved / ADAPTER_FILE, output_dir / ADAPTER_FILE)
        write_json(output_dir / "adapter_config.json", config)


def write_run(output_dir, *, stage, args, base, tokenizer, template, data=None, parents=None, metrics=None) -> dict:
    """Write run.json, which later stages read to refuse what does not fit; returns what was written.

    Args:
        stage: "sft", "reward" or "ppo". args: the script's dataclass (no secrets are among the flags).
        base: of `base_fingerprint`. template: prompt template. data: fingerprint, funnel. parents: role -> directory.
    """
    run = {
        "stage": stage,
        "arguments": dataclasses.asdict(args),
        "base": base,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompt_template": template,
        "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
        "data": data or {},
        "parents": {
            role: {"path": str(path), "adapter": adapter_hash(path)} for role, path in (parents or {}).items()
        },
        "metrics": metrics or {},
        "versions": {
            name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
        },
        "git_commit": _git_commit(),
    }
    write_json(Path(output_dir) / "run.json", run)
    return run


def adapter_hash(adapter_dir) -> str | None:
    """The first 16 digits of the sha256 of a stored adapter; None where there is none."""
    file = Path(adapter_dir) / ADAPTER_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return None
    return found.stdout.strip() or None


# ---- reading ----
def load_run(adapter_dir: str | Path) -> dict | None:
    """run.json of a stage's directory, or None for an adapter that was trained elsewhere."""
    file = Path(adapter_dir) / "run.json"
    if not file.is_file():
        return None
    return read_object(file)


def read_object(file: Path) -> dict:
    """A JSON file that holds an object. Raises: ValueError in one sentence where it does not."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}): it is damaged, or was never finished") from error
    return found


def read_adapter(adapter_dir: str | Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Config and weights of an adapter; a .bin of old is read with weights_only=True, so no pickle code runs."""
    folder = Path(adapter_dir)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} is no adapter directory: it has no adapter_config.json")
    read_object(folder / "adapter_config.json")
    config = PeftConfig.from_pretrained(str(folder))
    for name in (ADAPTER_FILE, "adapter_model.bin"):
        if (folder / name).is_file():
            return config, load_tensors(folder / name)
    raise FileNotFoundError(f"{folder} has an adapter_config.json but no {ADAPTER_FILE}")


def check_adapter(
    adapter_dir, *, stage: str | tuple, base: dict, tokenizer=None, template: str | None = None, flag="adapter"
):
    """Refuse an adapter of another stage, base, tokenizer or template, naming the field that differs.

    Args:
        stage: the stage (or stages) whose adapter is wanted here. base: of `base_fingerprint`.
        tokenizer, template: what this run uses; None leaves the comparison out.
        flag: named in messages.
    Returns: its run.json, or None (with a warning) for an adapter that was trained elsewhere.
    """
    if not (Path(adapter_dir) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{flag} {adapter_dir} is no adapter directory: it has no adapter_config.json")
    run = load_run(adapter_dir)
    if run is None:
        warnings.warn(
            f"{flag} {adapter_dir} has no run.json: trained elsewhere, only its keys and shapes are checked",
            stacklevel=2,
        )
        return None
    stages = (stage,) if isinstance(stage, str) else stage
    if run.get("stage") not in stages:
        wanted = " or ".join(stages)
        raise ValueError(f"{flag} {adapter_dir} is of stage '{run.get('stage')}', but {wanted} is wanted here")
    pairs = [(f"base {name}", run.get("base", {}).get(name), value) for name, value in base.items()]
    if tokenizer is not None:
        pairs.append(("tokenizer", run.get("tokenizer"), tokenizer_fingerprint(tokenizer)))
    if template is not None:
        pairs.append(("prompt_template", run.get("prompt_template"), template))
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(f"{flag} {adapter_dir} was trained with another {name}: {theirs!r} there, {ours!r} here")
    return run


def check_merged(model_dir: str | Path, *, base: dict, sft_dir: str | Path, flag: str) -> None:
    """Refuse a merged model that merge_lora.py made from another base or adapter; one made elsewhere passes."""
    run = load_run(model_dir)
    if run is None or run.get("stage") != "merge":
        return
    for name, value in base.items():
        if run["base"].get(name) != value:
            raise ValueError(f"{flag} {model_dir} was merged into another base: {name} is {run['base'].get(name)!r}")
    parent = run["parents"].get("adapter", {})
    if parent.get("adapter") != adapter_hash(sft_dir):
        raise ValueError(
            f"{flag} {model_dir} was merged from {parent.get('path', 'no adapter at all')}, not from {sft_dir} as it "
            "is now: the KL would be measured from another model; merge again, or leave the flag out"
        )


# ---- output directory ----
LOCK_FILE = ".lock"
_locks: dict[Path, object] = {}


def lock(folder: Path) -> None:
    """Hold an output directory for this process until it ends, however it ends.

    Raises: FileExistsError where another process holds it, with its number.
    """
    if folder.resolve() in _locks:
        return
    handle = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        number = handle.read().strip() or "unknown"
        handle.close()
        raise FileExistsError(
            f"another run (process {number}) is writing into {folder}: wait for it, or give another --output_dir"
        ) from error
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    _locks[folder.resolve()] = handle


def sweep(folder: Path) -> None:
    """Remove what a killed run of ours left half written: hidden names that only our writers use.

    A folder that was set aside for a new one under its name, which never came, gets its place back.
    """
    for path in folder.glob(".*"):
        if SCRATCH.fullmatch(path.name):
            name = path.name.split(".")[1]
            if (path / name).is_dir() and not (folder / name).exists():
                os.replace(path / name, folder / name)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    return (path.is_file() and path.name != LOCK_FILE) or RUN_FOLDERS.fullmatch(path.name) is not None


def claim_output_dir(output_dir: str | Path, resume: bool, overwrite: bool) -> Path:
    """Make `output_dir` ready for a run; a directory in use needs `resume` or `overwrite`, and says so.

    Subfolders that hold other runs (runs/sft, runs/reward under runs/) do not count as use.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output_dir {folder} is a file: give a directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        sweep(folder)
    except OSError as error:
        # The lock's own refusal is a sentence already; the others are what the system says.
        if error.errno is None:
            raise
        raise OSError(f"--output_dir {folder} cannot be written ({error.strerror}): give another") from error
    used = [path for path in folder.iterdir() if _in_use(path)]
    if used and not (resume or overwrite):
        raise FileExistsError(
            f"--output_dir {folder} is not empty ({used[0].name}, ...): give --resume_from_checkpoint True to go on, "
            "--overwrite_output_dir True to start over, or another directory"
        )
    for path in used if overwrite else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name in RUN_FILES:
            path.unlink()
    return folder
