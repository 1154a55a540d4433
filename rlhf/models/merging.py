"""A LoRA adapter merged into the files of its base, one tensor after the other: a model of any size, file by file.

    W  <-  W + scaling * B @ A        in float32, added in the dtype of the result, as peft's safe merge does it

A file of the base becomes a file of the same name, so that no more of the model than that file is ever in memory.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.factors import FACTORS, INSIDE_PEFT, layers_of, rank_of, scaling
from rlhf.artefacts.foreign import refuse_unshareable
from rlhf.models.loading import read_config


@dataclass(frozen=True)
class FileMerge:
    """An adapter, and the files of the base that it goes into.

    model: the base without weights, with all its settings. files: of the base, in the order of their names. deltas:
    name of a weight -> (A [r, in], B [out, r]), float32. scalings: name of a weight -> factor of its product.
    """

    model: PreTrainedModel
    files: list[Path]
    deltas: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]
    transposed: bool

    @classmethod
    def of(cls, base_dir: str, adapter_dir: str) -> "FileMerge | None":
        """For plain LoRA on matrices that the files hold under the model's own names; None for anything else."""
        config, weights = read_adapter(adapter_dir)
        model = _without_weights(base_dir)
        plain = _adds_products_alone(config, weights, adapter_dir)
        if not plain or getattr(model.config, "norm_head", False):
            return None
        files = sorted(Path(base_dir).glob("*.safetensors"))
        # By the heads of the files alone: nothing of the weights is read yet.
        held = list(chain.from_iterable(map(names_in, files)))
        known = model.state_dict().keys()
        deltas = {}
        scalings = {}
        for layer, (a, b) in layers_of(weights).items():
            if len(a) != rank_of(config, layer):
                # peft refuses such tensors when it loads them, on the way through memory.
                return None
            name = f"{layer.removeprefix(INSIDE_PEFT)}.weight"
            deltas[name] = (a.float(), b.float())
            scalings[name] = scaling(config, layer, len(a))
        # A converted architecture has other names in its files, and a name that stands twice has two values.
        same_names = len(held) == len(set(held)) and set(held) <= known and deltas.keys() <= set(held)
        # A second factor without its first makes the adapter one for the way through memory.
        if not deltas or not same_names or 2 * len(deltas) != len(weights):
            return None
        return cls(model, files, deltas, scalings, config.fan_in_fan_out)

    def fits(self, dtype: torch.dtype) -> bool:
        """Return True if the model takes half of this machine's memory at most, so that it can run as well."""
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
        else:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 2 * dtype.itemsize * sum(p.numel() for p in self.model.parameters()) <= total

    def delta(self, name: str) -> Tensor | None:
        """What the adapter adds to a weight, float32; None where it adds nothing."""
        if name not in self.deltas:
            return None
        # Made anew at each call: the products of all matrices would be a second model.
        a, b = self.deltas[name]
        change = b @ a
        return (change.T if self.transposed else change) * self.scalings[name]

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the merged files, and their index where there are several. Raises: ValueError for a broken weight."""
        index = {}
        size = 0
        for file in self.files:
            tensors = {}
            for name, tensor in stored_in(file):
                # Whole numbers, such as buffers of positions, have no other precision.
                tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
                change = self.delta(name)
                if change is not None and change.shape != tensor.shape:
                    shapes = f"{list(tensor.shape)}, and the adapter's {list(change.shape)}"
                    raise ValueError(f"the adapter does not fit this base: {name} is {shapes}")
                # Rounded before it is added, as peft does: the bytes are then those of a merge in memory.
                tensors[name] = tensor if change is None else tensor.add_(change.to(dtype))
                if not tensors[name].isfinite().all():
                    raise ValueError(f"{name} of {file} is not finite after the merge: base or adapter is broken")
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file.name)
            size += sum(tensor.nbytes for tensor in tensors.values())

        # What transformers would save beside the weights, in its own words.
        self.model.config.dtype = dtype
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        if len(self.files) > 1:
            content = {"metadata": {"total_size": size}, "weight_map": index}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def distance(self, folder: Path) -> float:
        """Largest distance of a written matrix from base + adapter in float32: root mean square over that of it."""
        largest = 0.0
        for file in self.files:
            with safe_open(folder / file.name, framework="pt", backend="pread") as written:
                for name, tensor in stored_in(file):
                    exact = tensor.float()
                    change = self.delta(name)
                    exact = exact if change is None else exact.add_(change)
                    off = (written.get_tensor(name).float() - exact).norm() / exact.norm().clamp(min=1e-30)
                    # Written so that NaN counts as the largest.
                    largest = max(largest, off.item()) if off.isfinite() else float("inf")
        return largest


def _adds_products_alone(config: PeftConfig, weights: dict[str, Tensor], adapter_dir: str) -> bool:
    """Return True for LoRA that adds a product to matrices of linear layers and changes nothing else."""
    try:
        refuse_unshareable(config, weights, adapter_dir)
    except ValueError:
        # What a shared base cannot carry is merged in memory, which says what it refuses in its own words.
        return False
    # DoRA scales what it has added, and a convolution's factors have four dimensions.
    linear = all(name.endswith(FACTORS[0]) and tensor.dim() == 2 for name, tensor in weights.items())
    return linear and not config.use_dora


def _without_weights(base_dir: str) -> PreTrainedModel:
    """The base on the meta device, with the settings that it has when it is loaded and saved."""
    config = read_config(base_dir)
    # As `load_base` leaves it.
    config.get_text_config().output_router_logits = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.use_cache = True
    if (Path(base_dir) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(base_dir)
    return model


def names_in(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file."""
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def stored_in(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, one after the other, each in memory of its own."""
    # Mapped pages of a whole file would stay in memory beside what is made of them.
    with safe_open(file, framework="pt", backend="pread") as stored:
        for name in list(stored.keys()):
            yield name, stored.get_tensor(name)
