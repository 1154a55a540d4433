"""The workload of benchmarks/gpu_7b.py: a Baichuan whose random weights are made on the card, adapters, rows."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.common import random_ids
from benchmarks.model import EOS, PAD
from rlhf.arguments import LoraArguments
from rlhf.artefacts.files import ADAPTER_FILE
from rlhf.baichuan import BaichuanConfig
from rlhf.cost.limits import Rows
from rlhf.models import loading
from rlhf.models.fusing import fuse
from rlhf.models.lora import for_training, lora_targets
from rlhf.rl import roles

if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
    # An older transformers than requirements.txt names has it under its old name.
    PreTrainedModel.activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable


@dataclass(frozen=True)
class Shape:
    """A model's sizes (where they are not baichuan-7B's) and what it is fed.

    mini_batch: rows of one backward of ppo; one of memory takes them all.
    """

    sft: Rows
    reward: Rows
    ppo: Rows
    mini_batch: int
    memory: Rows
    model: dict = field(default_factory=dict)

    def config(self) -> BaichuanConfig:
        """The model's config."""
        return BaichuanConfig(**self.model)


SHAPES = {
    "7b": Shape(
        sft=Rows(4, 128, 384), reward=Rows(10, 100, 200), ppo=Rows(64, 128, 256), mini_batch=16,
        memory=Rows(8, 256, 256),
    ),
    "tiny": Shape(
        sft=Rows(2, 4, 12), reward=Rows(2, 4, 8), ppo=Rows(4, 6, 8), mini_batch=2, memory=Rows(2, 4, 4),
        model={"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4},
    ),
}  # fmt: skip


# ---- model ----
def random_model(config: BaichuanConfig, head: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model as `load_base` gives it, its weights drawn where they stay: no float32 copy, none in host memory."""
    auto = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[head]
    settings = config.to_diff_dict()
    if head == "score":
        settings["num_labels"] = 1
    with torch.device(device):
        model = auto.from_config(BaichuanConfig(**settings), dtype=dtype)

    # As in `load_base`.
    model.config.use_cache = False
    fuse(model)
    return model


def to_four_bits(model: PreTrainedModel, device: str) -> None:
    """Quantise the matrices of the layers as `load_base` does with four_bit: NF4 with double quantisation."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    # A list, because the tree of modules changes on the way.
    for parent in list(model.model.layers.modules()):
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear:
                continue
            quantised = Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=model.dtype, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            # The move to the card is what quantises.
            quantised.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name, quantised.to(device))
            # `load_base` turns this path off, too.
            quantised.support_avx512bf16_for_cpu = False
    # peft looks at this name to choose its 4-bit layers.
    model.is_loaded_in_4bit = True


@contextmanager
def instead_of_a_checkpoint(config: BaichuanConfig, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the stages get random models where they load a base, whatever its name."""

    def load_base(model_dir, asked, head="causal", four_bit=False, **where):
        model = random_model(config, head, device, dtype)
        if four_bit:
            to_four_bits(model, device)
        return model

    with ExitStack() as stack:
        # roles.py looks the name up in itself, the scripts in the room that loads models.
        for owner in (roles, loading):
            stack.enter_context(patch.object(owner, "load_base", load_base))
        yield


def adapted(model: PreTrainedModel, rank: int, task_type: str = "CAUSAL_LM", dropout: float = 0.0):
    """`model` with a new adapter on the attention's packed projection."""
    lora = LoraConfig(
        task_type=task_type, r=rank, lora_alpha=LoraArguments.lora_alpha, lora_dropout=dropout,
        target_modules=lora_targets(model, None),
    )  # fmt: skip
    return for_training(get_peft_model(model, lora))


def write_adapter(config: BaichuanConfig, folder: Path, rank: int, score_head: bool) -> None:
    """Write an adapter with small random weights as a stage leaves it."""
    # On the meta device a base of 7B takes no memory, and its shape is all that is needed.
    base = random_model(config, "causal", "meta", torch.float32)
    model = adapted(base, rank)
    model.peft_config["default"].save_pretrained(str(folder))

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if score_head:
        shapes["base_model.model.score.weight"] = (1, config.hidden_size)
    # Small but not zero, as training leaves them.
    weights = {name: 1e-3 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, folder / ADAPTER_FILE)


# ---- rows ----
class Numbers:
    """Stands for a prompt format and its tokenizer: random ids are written as numbers."""

    pad_id = PAD
    stop_ids = (EOS,)

    @property
    def tokenizer(self) -> "Numbers":
        """What decodes."""
        return self

    def batch_decode(self, rows: list[list[int]], **kwargs) -> list[str]:
        """Each row's ids in words."""
        return [" ".join(map(str, row)) for row in rows]


def sft_rows(rows: Rows, count: int, vocabulary: int) -> list[dict]:
    """Encoded rows of that shape with a loss on the answer."""
    rng = random.Random(0)
    mask = [0] * rows.query + [1] * rows.answer
    encoded = []
    for _ in range(count):
        ids = random_ids(rng, rows.query + rows.answer, vocabulary)
        encoded.append({"input_ids": ids, "completion_mask": mask})
    return encoded


def pair_rows(rows: Rows, count: int, vocabulary: int) -> list[dict]:
    """Encoded preference pairs of that shape."""
    rng = random.Random(0)
    sizes = {"query_ids": rows.query, "chosen_ids": rows.answer, "rejected_ids": rows.answer}
    pairs = []
    for _ in range(count):
        pairs.append({name: random_ids(rng, size, vocabulary) for name, size in sizes.items()})
    return pairs


def prompt_rows(rows: Rows, vocabulary: int) -> list[dict]:
    """The prompts of a PPO step."""
    rng = random.Random(0)
    prompts = [random_ids(rng, rows.query, vocabulary) for _ in range(rows.count)]
    return [{"prompt": "", "query_ids": ids} for ids in prompts]
