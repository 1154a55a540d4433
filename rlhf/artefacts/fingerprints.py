"""Fingerprints of bases, tokenizers and adapters: by their contents, wherever they lie."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from rlhf.artefacts.damage import damaged
from rlhf.artefacts.files import ADAPTER_FILE, load_tensors, read_object

# Fields of a model's configuration in which different models are likely to differ.
SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


# Fields of a base's fingerprint that versions before this one did not record.
LATER_FIELDS = ("rows", "config")

# Fields of a configuration that change nothing of what is computed from ids.
BOOKKEEPING = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache",
    "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "_attn_implementation",
    "attn_implementation", "output_router_logits", "initializer_range", "is_encoder_decoder",
}  # fmt: skip

# Fields of an adapter's configuration that decide what its weights do.
ADAPTER_FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights",
)  # fmt: skip


# ---- fingerprints ----
def base_fingerprint(model_dir: str) -> dict:
    """Identity of a base model: its shape, and a hash over stored bytes of tensors spread over it."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).to_dict()
    shape = {name: config[name] for name in SHAPE_FIELDS if name in config}
    folder = Path(model_dir)
    # The shape and the first rows are what older versions recorded, and say more in a message than hashes do.
    return {**shape, "weights": _weights_hash(folder), "rows": _rows_hash(folder), "config": _config_hash(config)}


def same_base(theirs: dict, ours: dict) -> dict[str, tuple]:
    """The fields in which two fingerprints differ: name -> (theirs, ours). One of an older version lacks some."""
    # What an older version did not record cannot differ from it.
    names = [name for name in ours if name in theirs or name not in LATER_FIELDS]
    return {name: (theirs.get(name), ours[name]) for name in names if theirs.get(name) != ours[name]}


def _config_hash(config: dict) -> str:
    """Hash over everything in a configuration that may change what is computed."""
    # What is not known to be harmless counts: a new field of transformers refuses an adapter rather than let it pass
    # unseen.
    counted = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    return _hash_of(counted)


def _rows_hash(model_dir: Path, tensors: int = 64, rows: int = 4) -> str:
    """Hash over rows from all parts of many tensors, as stored."""
    stored = _stored_tensors(model_dir)
    names = sorted(name for name in stored if not name.endswith("inv_freq"))
    digest = hashlib.sha256()
    stride = max(1, len(names) // tensors)

    for name in names[::stride]:
        file, tensor = stored[name]
        if tensor is None:
            with safe_open(file, "pt") as shard:
                part = shard.get_slice(name)
                length = part.get_shape()[0] if part.get_shape() else 0
                # Slices of one row, so that of a file of gigabytes no more than these bytes are read.
                sampled = [part[place : place + 1] for place in _places(length, rows)]
        else:
            sampled = [tensor[place : place + 1] for place in _places(len(tensor) if tensor.dim() else 0, rows)]
        # Name and count go in as well, or rows moved from one tensor to the next would give the same stream of bytes.
        digest.update(f"{name} {len(sampled)}".encode())
        for row in sampled:
            digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _places(length: int, count: int) -> list[int]:
    """Up to `count` places from the first to the last of `length`, evenly."""
    if length <= count:
        return list(range(length))
    return [round(number * (length - 1) / (count - 1)) for number in range(count)]


def _hash_of(content) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


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
    # With the id that we pad with, not its own pad token: many tools save a tokenizer with EOS for padding, and it is
    # the same tokenizer all the same.
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


def adapter_config_hash(adapter_dir) -> str | None:
    """Hash over what an adapter's configuration does with its weights (lora_alpha and the like); None without one."""
    file = Path(adapter_dir) / "adapter_config.json"
    if not file.is_file():
        return None
    config = read_object(file)
    counted = {name: config.get(name) for name in ADAPTER_FIELDS}
    # Their order means nothing.
    for name, value in counted.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            counted[name] = sorted(value)
    return _hash_of(counted)


def parent_entry(path) -> dict:
    """What run.json keeps of a directory that a run was made from: its place, and what was in it.

    "adapter" is a hash of an adapter's weights, or of the weights of a whole model; "config" of an adapter's settings.
    """
    folder = Path(path)
    content = adapter_hash(folder)
    # A merged reference is a whole model, not an adapter.
    if content is None and (folder / "config.json").is_file():
        content = _weights_hash(folder)
    return {"path": str(path), "adapter": content, "config": adapter_config_hash(folder)}


def same_parent(entry: dict, path) -> bool:
    """Return True if a directory holds what an entry of `parent_entry` (of any version) recorded."""
    now = parent_entry(path)
    # Versions that recorded no config are believed by the weights alone.
    return all(now[name] == entry[name] for name in ("adapter", "config") if name in entry)
