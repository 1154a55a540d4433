"""Loading models: from hub or directory to a model in an explicit dtype or in 4 bits, adapters added or continued."""

import copy
import os
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

import rlhf.baichuan  # noqa: F401 (registers the native Baichuan with the Auto classes)
from rlhf.artefacts.adapters import read_adapter
from rlhf.models.kernels import fuse_norms


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


# ---- loading ----
def pick_dtype(bf16: bool) -> torch.dtype:
    """Dtype of the base weights: bfloat16 where asked and possible, float16 on a card without, float32 on a CPU."""
    if not bf16 or not torch.cuda.is_available():
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    warnings.warn("this card has no bfloat16: using float16 instead", stacklevel=2)
    return torch.float16


def load_base(
    model_dir: str, dtype: torch.dtype, head: str = "causal", device=None, four_bit: bool = False
) -> PreTrainedModel:
    """The base with a language model head ("causal") or a one-number score head ("score"), in an explicit dtype.

    transformers obeys the checkpoint's own dtype (often float16) unless told otherwise. In 4 bits are the matrices of
    the layers alone; heads, embeddings and norms stay as they are, and nothing is cast to float32 for training.
    """
    auto, extra = {
        "causal": (AutoModelForCausalLM, {}),
        "score": (AutoModelForSequenceClassification, {"num_labels": 1}),
    }[head]
    if four_bit:
        extra |= _in_four_bits(dtype, device)
        device = None

    model, loaded = auto.from_pretrained(model_dir, dtype=dtype, output_loading_info=True, **extra)
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith(("score.", "classifier.")))
    if missing:
        raise ValueError(f"{model_dir} lacks weights of its model, {missing[0]} for one: is the download complete?")

    model.config.use_cache = False

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes repacks a matrix at its first use in eval(); from then on it passes no gradient.
            module.support_avx512bf16_for_cpu = False

    model = model if device is None else model.to(device)
    fuse_norms(model)
    return model


def _in_four_bits(dtype: torch.dtype, device) -> dict:
    """Arguments of `from_pretrained` for NF4 with double quantisation, on `device` or this process's own."""
    if device is None:
        device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def lora_targets(model: nn.Module, spec: str | None) -> list[str]:
    """Names of the modules that get an adapter: 'a|b' split, or the attention projections of this architecture.

    Raises: ValueError naming a module that the model does not have.
    """
    present = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if spec is None:
        usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
        targets = ["W_pack"] if "W_pack" in present else list(usual)
        if not targets:
            raise ValueError(f"give --lora_target_models for {model.config.model_type}: some of {sorted(present)}")
        return targets
    wanted = [name.strip() for name in spec.replace(",", "|").split("|") if name.strip()]
    missing = [name for name in wanted if name not in present]
    if missing or not wanted:
        raise ValueError(f"--lora_target_models {spec}: no module {missing} in this model; it has {sorted(present)}")
    return wanted


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that train() and eval() give the same log-probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def refuse_misfit(stored: dict[str, Tensor], wanted: dict[str, Tensor], owner: str) -> None:
    """Refuse an adapter whose tensors are not those that this base takes.

    Args:
        stored, wanted: name -> tensor, of the file and of the model. owner: named in the message.
    Raises: ValueError naming the first tensor that is missing, left over or of another shape.
    """
    for name in sorted(stored.keys() | wanted.keys()):
        theirs, ours = (tuple(tensors[name].shape) if name in tensors else None for tensors in (stored, wanted))
        if theirs != ours:
            raise ValueError(f"{owner} does not fit this base: {name} is {theirs}, not {ours}")


def add_lora(model, adapter_dir: str | Path, name: str, trainable: bool) -> tuple[PeftModel, dict[str, Tensor]]:
    """Put the LoRA weights of a stored adapter on `model` (bare base or PeftModel) under `name`.

    A reward adapter goes onto the language model like any other: its task type is dropped and its score head returned,
    because peft would lose the head there without a word.

    Returns: the PeftModel, and the stored tensors that are no LoRA weights (name -> tensor).
    Raises: ValueError where keys or shapes do not fit this base.
    """
    config, weights = read_adapter(adapter_dir)
    config = copy.deepcopy(config)
    config.task_type = None
    config.modules_to_save = None
    config.inference_mode = not trainable
    config.lora_dropout = 0.0
    lora = {key: tensor for key, tensor in weights.items() if "lora_" in key}

    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, adapter_name=name)
    except ValueError as error:
        raise ValueError(f"adapter {adapter_dir} does not fit this base: {error}") from error

    refuse_misfit(lora, get_peft_model_state_dict(model, adapter_name=name), f"adapter {adapter_dir}")
    set_peft_model_state_dict(model, lora, adapter_name=name)
    return model, {key: tensor for key, tensor in weights.items() if "lora_" not in key}


def score_head_of(rest: dict[str, Tensor], reward_dir: str | Path) -> nn.Linear:
    """The frozen fp32 score head [hidden] -> [1] among the tensors of a reward adapter that are no LoRA weights.

    Raises: ValueError where there is none.
    """
    heads = [tensor for tensor in rest.values() if tensor.dim() == 2 and tensor.shape[0] == 1]
    if len(heads) != 1:
        raise ValueError(f"reward adapter {reward_dir} has no score head: was it written by reward_modeling.py?")
    head = nn.Linear(heads[0].shape[1], 1, bias=False).requires_grad_(False)
    head.weight.copy_(heads[0])
    return head


def continue_adapter(model, adapter_dir: str) -> PeftModel:
    """A stored adapter on `model`, trainable. Raises: ValueError where its tensors do not fit, naming the first."""
    config, weights = read_adapter(adapter_dir)
    config.task_type = "CAUSAL_LM"
    config.inference_mode = False
    model = get_peft_model(model, config)

    refuse_misfit(weights, get_peft_model_state_dict(model), f"--previous_lora_weights {adapter_dir}")
    set_peft_model_state_dict(model, weights)
    return model


# ---- proof ----
def refuse_nonfinite(weights: dict[str, Tensor], owner: str) -> None:
    """Raises: ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{owner} holds NaN or infinity in {name}: its training diverged, or the file is damaged")
