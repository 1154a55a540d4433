"""Loading models: from hub or directory to a model in an explicit dtype or in 4 bits."""

import re
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

import rlhf.baichuan  # noqa: F401 (registers the native Baichuan with the Auto classes)
from rlhf.artefacts.damage import refused
from rlhf.artefacts.files import nearest, read_object
from rlhf.models import shards
from rlhf.models.fusing import fuse, fuse_mlps, kernels_available
from rlhf.run.environment import read_launch

# Sizes in a config.json above which it is damaged or malicious: a skeleton of them alone would fill the memory.
SIZE_LIMITS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_local_experts"), 10_000)
SIZE_LIMITS |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size"), 50_000_000)

# Decoders that recur through all layers; hybrids with some attention are trained like any other model.
WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")


# ---- base model ----
def resolve_model(name: str, flag: str = "--model_name") -> str:
    """A model's local directory: the path itself, or the hub's snapshot (downloaded once, read offline ever after).

    Raises: FileNotFoundError in one sentence where neither exists.
    """
    name = _snapshot_of(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{flag} {name} has no config.json: give the directory of a base model")
        # transformers would put such an adapter on the base unasked, and compare's base column would not be the base.
        if (Path(name) / "adapter_config.json").exists():
            raise ValueError(
                f"{flag} {name} holds an adapter (adapter_config.json) beside the base's files: move it to a "
                "directory of its own"
            )
        # A kind of model that cannot be trained here is refused before anything else is looked at.
        read_config(str(name))
        return str(name)

    # A mistyped path must not become a question to the hub: its error would be about the network.
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{flag} {name} does not exist{nearest(name)}: give a model directory or a hub id (owner/name)"
        )

    try:
        # Weights twice, as safetensors and as .bin, would double the download.
        folder = snapshot_download(name, allow_patterns=["*.json", "*.model", "*.safetensors", "*.txt"])
        if not list(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, allow_patterns=["*.json", "*.model", "*.bin", "*.txt"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{flag} {name} is not a local directory and the hub cannot be reached ({type(error).__name__}): "
            "download the model once, or give its directory"
        ) from error
    return folder


def _snapshot_of(name: str) -> str:
    """The snapshot in a directory of the hub's cache (models--owner--name); any other name as it is."""
    newest = Path(name) / "refs" / "main"
    if not newest.is_file():
        return name
    folder = Path(name) / "snapshots" / newest.read_text(encoding="utf-8").strip()
    return str(folder) if folder.is_dir() else name


# ---- loading ----
def pick_dtype(bf16: bool) -> torch.dtype:
    """Dtype of the base weights: bfloat16 where asked and possible, float16 on a card without, float32 on a CPU."""
    if not bf16 or not torch.cuda.is_available():
        return torch.float32
    # By default PyTorch says yes for cards that only emulate it.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    warnings.warn("this card has no bfloat16: using float16 instead", stacklevel=2)
    return torch.float16


def load_base(
    model_dir: str, dtype: torch.dtype, head: str = "causal", device=None, four_bit: bool = False, mesh=None
) -> PreTrainedModel:
    """The base with a language model head ("causal") or a one-number score head ("score"), in an explicit dtype.

    transformers obeys the checkpoint's own dtype (often float16) unless told otherwise. With four_bit only the layers'
    matrices are quantised: heads, embeddings and norms stay as they are, and nothing is cast to float32 for training.
    With `mesh`, of `shards.base_mesh`, this process reads its own parts of the layers, and no process holds them all.
    """
    config = read_config(model_dir)
    # A mixture's router would hand its logits to a loss that we do not have.
    config.get_text_config().output_router_logits = False
    options = {"config": config, "dtype": dtype, "trust_remote_code": False}
    auto = AutoModelForCausalLM
    if head == "score":
        auto = score_model_class(config)
        config.num_labels = 1
    if mesh is not None:
        kind = auto if head == "score" else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        auto = shards.placing_class(kind, mesh)
        options["distributed_config"] = shards.PLACED
        device = shards.device_of(mesh)
    if device is not None and torch.device(device).type == "cuda" and not four_bit:
        # Straight to the card: the host holds one tensor at a time.
        options["device_map"] = {"": device}
        device = None
    if four_bit:
        # device_map places a quantised model while it loads, so it is not moved afterwards.
        options |= _in_four_bits(dtype, device)
        device = None

    with refused(f"the base {model_dir}", "install what it needs, or download it again"):
        model, loaded = auto.from_pretrained(model_dir, output_loading_info=True, **options)
    # A score head is new on a base, and only on a base: a merged reward model brings its own.
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith(("score.", "classifier.")))
    if missing:
        raise ValueError(f"{model_dir} lacks weights of its model, {missing[0]} for one: is the download complete?")

    # In training a cache is memory for nothing; sampling brings caches of its own.
    model.config.use_cache = False

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes repacks a matrix at its first use in eval(); from then on it passes no gradient.
            module.support_avx512bf16_for_cpu = False

    # Where there are shards, every part is in its place already.
    if mesh is not None and mesh.device_type == "cpu":
        shards.own_memory(model)
    model = model if device is None or mesh is not None else model.to(device)
    # After the move, for the trials have to run where the model will.
    fuse(model)
    # A layer in shards is whole, and can be tried, one at a time.
    for layer in shards.gathered_layers(model) if kernels_available() else ():
        fuse_mlps(layer)
    return model


def base_as_asked(args, model_dir: str, head: str = "causal") -> PreTrainedModel:
    """The base of a Trainer stage by its flags: precision, 4 bits, shards; see `load_base`."""
    mesh = shards.base_mesh(args.shard_base)
    return load_base(model_dir, pick_dtype(args.bf16), head=head, four_bit=args.load_in_4bit, mesh=mesh)


def read_config(model_dir: str) -> PretrainedConfig:
    """The configuration of a decoder-only language model. Raises: ValueError, in one sentence, for any other model."""
    file = Path(model_dir) / "config.json"
    if file.is_file():
        _refuse_strange(read_object(file), file)
    with refused(str(file), "copy or download it again"):
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    # A model that also sees images keeps the sizes of its decoder one level down.
    text = config.get_text_config()
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{model_dir} is a {kind} model: this project trains decoder-only language models")
    if not getattr(text, "num_attention_heads", None) or kind in WITHOUT_ATTENTION:
        raise ValueError(
            f"{model_dir} is a {kind} model without attention: this project trains decoder-only language models with "
            "attention"
        )
    return config


def _refuse_strange(content: dict, file: Path) -> None:
    """Refuse a config.json that asks for code of its own, or for sizes that no model has. Raises: ValueError."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = ", and its own code (auto_map) is never run here" if "auto_map" in content else ""
        raise ValueError(f"{file}: model_type {kind!r:.60} is unknown to this version of transformers{own}")
    for name, limit in SIZE_LIMITS.items():
        value = content.get(name)
        if isinstance(value, int | float) and value > limit:
            raise ValueError(f"{file} says {name} {value:g}, which no model has: copy or download it again")


def refuse_small_base(model_dir: str, tokenizer, tokens: int, flags: str) -> None:
    """Refuse a base that has too few embeddings for the tokenizer, or too few learnt positions for the longest row.

    Args:
        tokens: of the longest row that the flags allow. flags: named in the message.
    Raises: ValueError.
    """
    config = read_config(model_dir)
    text = config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the base {model_dir} only {text.vocab_size}: they do not "
            "belong together"
        )
    # Their positions are scaled by the longest row of a batch: a row would depend on the rows beside it.
    rope = getattr(text, "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic") and switch and tokens > switch:
        raise ValueError(
            f"{flags}: a row may have {tokens} tokens, but beyond {switch} this base computes all positions of a "
            "batch otherwise: give less"
        )
    positions = _learnt_positions(config)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"{flags}: a row may have {tokens} tokens, but this base has {positions} positions and cannot read on: "
            "give less"
        )


def _learnt_positions(config: PretrainedConfig) -> int | None:
    """Positions of a model that has an embedding for each; None for one that computes them (rotary, ALiBi)."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None) or getattr(text, "alibi", False):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    table = model.get_input_embeddings()
    # wpe is GPT-2's name for the table, embed_positions OPT's.
    learnt = [
        # Some tables begin with rows for padding.
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not table and re.search(r"pos|wpe", name.rsplit(".", 1)[-1])
    ]
    return min(learnt, default=None)


def score_model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of this architecture with a score head, called `score` on a backbone under its usual name.

    transformers has one for half of its architectures; the others get the same class made from its own parts.
    """
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if known is not None:
        return known
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # The architecture's own base class: it knows how to load the backbone, and what its layers are called.
    parent = next(kind for kind in causal.__mro__ if PreTrainedModel in kind.__bases__)
    name = f"{causal.__name__.removesuffix('ForCausalLM')}ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, parent), {"config_class": type(config)})


def _in_four_bits(dtype: torch.dtype, device) -> dict:
    """Arguments of `from_pretrained` for NF4 with double quantisation, on `device` or this process's own."""
    if device is None:
        # A card for each process: left to itself, each would load onto the first one.
        device = read_launch().local_rank if torch.cuda.is_available() else "cpu"
    # As in QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # The name is of 8 bits, but 4 bits heed it too: heads keep their precision.
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that train() and eval() give the same log-probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention has its dropout as a number, not as a module.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
