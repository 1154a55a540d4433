"""run.json and fingerprints: they record what a directory was made of, so that a later stage knows its inputs."""

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

# Fields of a model's configuration in which different models are likely to differ.
SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


# ---- fingerprints ----
def base_fingerprint(model_dir: str) -> dict:
    """Identity of a base model: its shape, and a hash over stored bytes of tensors spread over it."""
    config = AutoConfig.from_pretrained(model_dir).to_dict()
    shape = {name: config[name] for name in SHAPE_FIELDS if name in config}
    return {**shape, "weights": _weights_hash(Path(model_dir))}


def _weights_hash(model_dir: Path, tensors: int = 16, rows: int = 4) -> str:
    """Hash stored bytes, not cast values: the same file gives the same hash on every dtype and device."""
    stored = _stored_tensors(model_dir)
    # Rotary tables are computed, and some checkpoints store them.
    names = sorted(name for name in stored if not name.endswith("inv_freq"))
    if not names:
        raise FileNotFoundError(f"{model_dir} holds no weights (*.safetensors or pytorch_model*.bin)")

    digest = hashlib.sha256()
    # Tensors spread over the whole model, a few rows of each: seconds, not minutes, at 7B.
    stride = max(1, len(names) // tensors)
    for name in names[::stride]:
        file, tensor = stored[name]
        if tensor is None:
            with safe_open(file, "pt") as shard:
                head = shard.get_slice(name)[:rows]
        else:
            head = tensor[:rows]

        digest.update(name.encode() + str(head.dtype).encode())
        # As bytes: numpy has no bfloat16.
        content = head.contiguous().view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored_tensors(model_dir: Path) -> dict[str, tuple[Path, torch.Tensor | None]]:
    """Name -> (file, tensor) of all stored weights; the tensor is None in a .safetensors file, which is read by name.

    Where both formats are there, .bin files are left out, as they are when the model is loaded.
    """
    stored = {}
    shards = sorted(model_dir.glob("*.safetensors"))
    for file in shards:
        try:
            with safe_open(file, "pt") as shard:
                stored |= {name: (file, None) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(damaged(file, error)) from error
    if shards:
        return stored

    for file in sorted(model_dir.glob("pytorch_model*.bin")):
        # Mapped into memory: only the rows that are hashed are read.
        stored |= {name: (file, tensor) for name, tensor in load_tensors(file, mmap=True).items()}
    return stored


def padding_id(tokenizer) -> int:
    """The id that batches are padded with: the pad token, else another token that ends no answer, else 0.

    Masks decide what is real, so any id is right. One that a reader of a batch would not mistake for an end is better.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return tokenizer.pad_token_id
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != eos:
        return tokenizer.unk_token_id

    # In the order of their ids, so that every run of every stage takes the same token.
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        name = token.content.lower()
        spare = any(word in name for word in ("pad", "unused", "reserved", "extra", "mask"))
        if token.special and spare and index != eos:
            return index
    return 0


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash over the vocabulary, the special ids and how a probe text is split."""
    # Two tokenizers of one vocabulary may still differ in their rules: digits, line ends, full-width marks.
    probe = tokenizer("问：1+1等于几？\n\n答：2。 Hello, world!", add_special_tokens=False)["input_ids"]
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, padding_id(tokenizer)]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    content = json.dumps([vocabulary, specials, probe])
    # Half a surrogate pair may stand in a vocabulary, and UTF-8 would refuse it.
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def adapter_hash(adapter_dir) -> str | None:
    """The first 16 digits of the sha256 of a stored adapter; None where there is none."""
    file = Path(adapter_dir) / ADAPTER_FILE
    if not file.is_file():
        return None
    # All of the file: an adapter is small beside a base.
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


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
        parent_entries[role] = {"path": str(path), "adapter": adapter_hash(path)}

    # Packages whose version may change a result.
    packages = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
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
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
    }

    write_json(Path(output_dir) / "run.json", run)
    return run


def _git_commit() -> str | None:
    """The commit of this code; None where there is no git, or no repository."""
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
