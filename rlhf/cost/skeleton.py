"""A base without weights, from its config.json alone: its sizes, its operations, the size of adapters on it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import rlhf.baichuan  # noqa: F401 (registers the native Baichuan with the Auto classes)
from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.foreign import refuse_unshareable
from rlhf.cost.flops import FlopCounts, flop_counts
from rlhf.cost.memory import ModelShape, lora_parameters
from rlhf.models.loading import read_config
from rlhf.models.lora import lora_targets


@dataclass(frozen=True)
class Base:
    """A base without weights: its modules, its sizes, and what its operations are counted by (nothing is trained)."""

    model: nn.Module
    shape: ModelShape
    work: FlopCounts

    @classmethod
    def of(cls, name: str, flag: str) -> "Base":
        """From a directory or hub id, given by `flag`. Raises: FileNotFoundError where it has no config.json."""
        # Frozen, as a base is: `flop_counts` takes whatever needs a gradient for an adapter.
        model = skeleton(name, flag).requires_grad_(False)
        return cls(model, shape_of(model), flop_counts(model, model.config.get_text_config()))


def skeleton(name: str, flag: str) -> nn.Module:
    """The base without weights (meta device), from a directory's or hub id's config.json alone.

    Raises: FileNotFoundError where there is none.
    """
    try:
        config = read_config(name)
    except OSError as error:
        raise FileNotFoundError(f"{flag} {name} has no config.json that can be read: {error}") from error
    # A tensor on the meta device has a shape and no storage, so a model of any size takes no memory.
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes of a skeleton."""
    output = model.get_output_embeddings()
    # The output layer stays in full precision when the layers are held in 4 bits.
    matrices = [
        module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(module.weight.numel() for module in matrices)
    return ModelShape.of(model.config.get_text_config(), parameters, linear)


def adapter_parameters(model: nn.Module, rank: int, targets: str | Iterable[str] | None) -> int:
    """Parameters of an adapter; `targets` as on the command line ('a|b', None: the usual ones) or in its config."""
    # A configuration has its names as a list, and the flag as one text.
    names = lora_targets(model, targets if targets is None or isinstance(targets, str) else "|".join(targets))
    shapes = []
    for name, module in model.named_modules():
        # As peft matches them: an expression has to fit the whole name, a word its end.
        if isinstance(names, str):
            taken = re.fullmatch(names, name) is not None
        else:
            taken = any(f".{name}".endswith(f".{wanted}") for wanted in names)
        if taken and isinstance(module, nn.Linear):
            shapes.append((module.in_features, module.out_features))
        elif taken and isinstance(module, Conv1D):
            # GPT-2's layer calls its input nx and its output nf.
            shapes.append((module.nx, module.nf))
    return lora_parameters(shapes, rank)


def stored_adapter(model: nn.Module, folder: str, default_rank: int) -> int:
    """Parameters of the adapter in a directory; of a usual one where the stage before has yet to write it."""
    if not (Path(folder) / "adapter_config.json").is_file():
        # A command of a later stage can be planned before the earlier stages have run.
        return adapter_parameters(model, default_rank, None)
    # Of a stored adapter the file decides: the flags may be those of another one.
    config, weights = read_adapter(folder)
    refuse_unshareable(config, weights, f"adapter {folder}")
    # One rank for all: a rank_pattern, which adapters of this project never have, is not counted.
    return adapter_parameters(model, config.r, config.target_modules)
