"""run.json and fingerprints: what an output directory was made of, and how a later stage recognises its inputs."""

import dataclasses
import hashlib
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from rlhf.artefacts.files import ADAPTER_FILE, damaged, load_tensors, read_object, write_json

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


def base_fingerprint(model_dir: str) -> dict:
    """Identity of a base model: its shape, and a hash over stored bytes of tensors spread over it."""
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

    # Rotary tables are computed, and some checkpoints store them.
    names = sorted(name for name in where if not name.endswith("inv_freq"))
    if not names:
        raise FileNotFoundError(f"{model_dir} holds no weights (*.safetensors or pytorch_model*.bin)")

    digest = hashlib.sha256()

    # Tensors spread over the whole model, a few rows of each: seconds, not minutes, at 7B.
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
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return None
    return result.stdout.strip() or None


# ---- reading ----
def load_run(adapter_dir: str | Path) -> dict | None:
    """run.json of a stage's directory, or None for an adapter that was trained elsewhere."""
    file = Path(adapter_dir) / "run.json"
    if not file.is_file():
        return None
    return read_object(file)
