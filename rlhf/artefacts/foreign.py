"""Adapters made elsewhere: which of them a shared base can carry, and which are refused by name.

On one base several adapters take turns, so an adapter may add to layers and do nothing else: whatever replaces weights
of the base, or changes them when it is put on, would change every other role too. What passes here computes exactly
what plain peft computes with the adapter alone.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from peft import LoraConfig, PeftConfig
from torch import Tensor

from rlhf.artefacts.time_limits import within_seconds

# Fields that may have any value: they say where an adapter goes, and how strong it is.
ANY_VALUE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "runtime_config", "modules_to_save",
    "init_lora_weights", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip

# Ways to initialise that leave the base as it is; the others (pissa, olora, loftq, corda, lora_ga) take their part out
# of the base's own weights.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")

# CPU seconds that an expression may take on so many names of modules; a usual one takes microseconds.
PATTERN_SECONDS = 2.0
PATTERN_NAMES = 200

MERGE_IT = "merge it into a base of its own with merge_lora.py, and give that as the base"


def refuse_unshareable(config: PeftConfig, weights: dict[str, Tensor], owner: str) -> None:
    """Refuse an adapter that a shared base cannot carry.

    Args:
        config, weights: of `read_adapter`. owner: flag and directory, for the message.
    Raises: ValueError naming what it is, and the way out.
    """
    refuse_other_methods(config, owner)
    refuse_absurd_ranks(config, weights, owner)
    refuse_slow_patterns(config, weights, owner)

    # A way to initialise that takes its part out of the base would change what every other role computes.
    init = config.init_lora_weights
    if not any(init is known or init == known for known in HARMLESS_INITS):
        raise ValueError(
            f"{owner} was initialised with {init}, which changes the base when it is put on: save it with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain LoRA"
        )

    # A score head is read by itself; any other saved module would take the place of the base's.
    # Two names, because transformers calls the head of a classification model by either.
    saved = sorted(set(config.modules_to_save or ()) - {"score", "classifier"})
    if saved:
        raise ValueError(
            f"{owner} replaces whole modules of the base (modules_to_save {', '.join(saved)}): {MERGE_IT}"
        )

    # Compared with peft's own defaults, not with a list of what is forbidden: a field that a later peft adds is
    # refused until somebody has looked at what it does.
    defaults = {field.name: _default(field) for field in fields(LoraConfig)}
    for name, default in sorted(defaults.items()):
        value = getattr(config, name, default)
        # peft writes an empty list or dictionary for none.
        if name not in ANY_VALUE and value != default and (value or default):
            raise ValueError(f"{owner} uses {name} ({value!r:.60}), which a shared base cannot carry: {MERGE_IT}")


def refuse_unmergeable(config: PeftConfig, weights: dict[str, Tensor], model, owner: str) -> None:
    """Refuse an adapter that plain peft cannot put on this base, or that does not become weights of it.

    Raises: ValueError naming the cause.
    """
    refuse_other_methods(config, owner)
    refuse_absurd_ranks(config, weights, owner)
    refuse_slow_patterns(config, weights, owner)
    if config.bias != "none" or config.lora_bias:
        raise ValueError(f"{owner} trains biases, which this base has no place for: train it with bias none")
    if config.layer_replication or config.trainable_token_indices:
        raise ValueError(f"{owner} copies layers or trains single tokens: merge it with peft itself")

    for name, tensor in weights.items():
        if "lora_" not in name and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = model.get_input_embeddings().weight.shape[0]
            if len(tensor) != rows:
                raise ValueError(
                    f"{owner} was trained with a vocabulary of {len(tensor)} tokens, this base has {rows}: resize the "
                    "base's embeddings and save it with that tokenizer first"
                )


def other_layout(place: Path) -> str:
    """End of a sentence on a place that is no adapter directory: what another tool has left there; else nothing."""
    if place.is_file():
        return ": give the directory that the file lies in"
    # ms-swift keeps the states of a run in <run>/checkpoint-<n>, transformers in checkpoint-<n>.
    files = [*place.glob("*/adapter_config.json"), *place.glob("*/*/adapter_config.json")]
    inner = [file.parent for file in files]
    if inner:
        # By the numbers in the path: checkpoint-1000 comes after checkpoint-900.
        last = max(inner, key=lambda folder: [int(digits) for digits in re.findall(r"\d+", str(folder))])
        return f": give the adapter in it, {last}"
    if list(place.glob("*.gguf")):
        return ": GGUF files are for inference alone: save the adapter itself (unsloth: save_pretrained)"
    if (place / "config.json").is_file():
        return ": it holds a whole model (unsloth calls it merged): give that as the base"
    return ""


def changes_embeddings(config: LoraConfig) -> bool:
    """Return True if an adapter changes the input embedding or the output layer, which may be one tied matrix."""
    targets = config.target_modules or ()
    names = {targets} if isinstance(targets, str) else set(targets)
    names |= set(config.modules_to_save or ())
    # wte is GPT-2's name, embed_out GPT-NeoX's, word_embeddings BLOOM's.
    return bool(names & {"embed_tokens", "lm_head", "wte", "embed_out", "word_embeddings"})


def refuse_other_methods(config: PeftConfig, owner: str) -> None:
    """Raises: ValueError for an adapter of another method than LoRA."""
    if not isinstance(config, LoraConfig):
        # An enumeration in memory, and plain text where a newer peft wrote a kind that this one does not know.
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{owner} is of type {kind}, but this project trains and reads LoRA adapters")


def refuse_absurd_ranks(config: LoraConfig, weights: dict[str, Tensor], owner: str) -> None:
    """Refuse a rank that no stored tensor has, before layers of that rank are built. Raises: ValueError."""
    # A is [r, in] and B is [out, r]: the rank is the smaller side of either.
    stored = max(
        (min(tensor.shape) for name, tensor in weights.items() if "lora_" in name and tensor.dim() > 1), default=0
    )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if not all(isinstance(rank, int) for rank in ranks) or max(ranks) > max(stored, 1):
        raise ValueError(
            f"{owner}: adapter_config.json says rank {max(ranks)}, but its largest tensor has rank {stored}"
        )


def refuse_slow_patterns(config: LoraConfig, weights: dict[str, Tensor], owner: str) -> None:
    """Refuse a regular expression that is none, or that takes for ever on a name, before every module is tried on it.

    Raises: ValueError naming the field of adapter_config.json.
    """
    patterns = [(name, getattr(config, name)) for name in ("target_modules", "exclude_modules")]
    # A list holds plain names, which cost nothing to compare.
    patterns = [(name, value) for name, value in patterns if isinstance(value, str)]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += [(name, key) for key in getattr(config, name) or {}]
    layers = config.layers_pattern or []
    patterns += [("layers_pattern", value) for value in ([layers] if isinstance(layers, str) else layers)]

    # A name that almost fits is what costs most.
    names = [name.split(".lora_")[0] for name in sorted(weights)[:PATTERN_NAMES]]
    for field, pattern in patterns:
        try:
            with within_seconds(PATTERN_SECONDS, computing=True):
                for name in names:
                    # No name ends so: an expression that backtracks has to try every way before it gives up.
                    re.fullmatch(pattern, f"{name}!")
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{owner}: {field} {pattern!r:.60} is no regular expression ({error})") from None
        except TimeoutError:
            raise ValueError(
                f"{owner}: the regular expression in {field}, {pattern!r:.60}, takes for ever on the name of a "
                "module: write it without a repetition inside a repetition"
            ) from None


def _default(field):
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None
