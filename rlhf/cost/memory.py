"""Memory of a run by role and by phase, from a model's shape, before any weight loads."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.ppo import ROWS_AT_ONCE

GIB = 2**30

# CUDA context, cuBLAS workspace and what the allocator cannot fill.
RUNTIME_BYTES = int(0.7 * GIB)

# In units of 1e9 bytes. Cards sold under these numbers hold a little more, so "fits" errs on the safe side.
CARDS_GB = (16, 24, 32, 40, 48, 80, 141)

# NF4 with double quantisation: 4 bits, one byte a block of 64, and 32 bits a block of 256 of those.
BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)

# Adapters, heads, gradients and both moments of Adam are float32.
FP32 = 4

# The gradient and Adam's two moments.
TRAINED_EXTRA = 3


@dataclass(frozen=True)
class ModelShape:
    """A decoder as memory sees it. `linear`: parameters of the matrices in its layers; `parameters`: all."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int
    linear: int

    @classmethod
    def of(cls, config, parameters: int, linear: int) -> "ModelShape":
        """From a configuration under transformers' usual names."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            # GPT-2 and BLOOM leave this out: their MLP is four times as wide as the hidden states.
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            # Without a number of its own, every head of the queries has keys and values to itself.
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            parameters=parameters,
            linear=linear,
        )


@dataclass(frozen=True)
class Precision:
    """Bytes of a number in weights and activations, and whether the layers' matrices are held in 4 bits."""

    size: int
    four_bit: bool = False


# ---- what stays ----
def weight_bytes(shape: ModelShape, precision: Precision) -> float:
    """The base: size * parameters, or BYTES_4BIT for the layers' matrices and `size` for the rest."""
    if not precision.four_bit:
        return precision.size * shape.parameters
    # Embeddings, norms and heads are never held in 4 bits.
    return BYTES_4BIT * shape.linear + precision.size * (shape.parameters - shape.linear)


def lora_parameters(targets: Sequence[tuple[int, int]], rank: int) -> int:
    """rank * (in + out) for every adapted matrix [out, in], given as (in, out)."""
    return rank * sum(inputs + outputs for inputs, outputs in targets)


def trained_bytes(parameters: int) -> int:
    """Gradient and optimizer state of trained float32 parameters, besides the parameters themselves."""
    return TRAINED_EXTRA * FP32 * parameters


def cache_bytes(shape: ModelShape, precision: Precision, rows: int, tokens: int) -> int:
    """Keys and values of a rollout: 2 * layers * kv_heads * head_dim * size for every token of every row."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * precision.size * rows * tokens


# ---- what comes and goes ----
def layer_bytes(shape: ModelShape, precision: Precision) -> int:
    """Bytes that one layer keeps of a token for backward, weights frozen and LoRA on the attention's input.

        8 * hidden                              both norms see their input in float32
      + 4 * hidden                              the adapter's input in float32 (in float32 it is the norm's output)
      + size * (2 * heads + 2 * kv_heads) * d   queries, keys, values and attention's output
      + 3 * size * intermediate                 gate, its activation, up

    Source: counted over `LlamaDecoderLayer`; a frozen matrix keeps no input.
    """
    # Numbers, not bytes: they are kept in the precision of the weights, as those of the MLP are.
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    # 12 are the 8 and 4 of the table's first two lines.
    return 12 * shape.hidden + precision.size * (attention + 3 * shape.intermediate)


def activation_bytes(shape: ModelShape, precision: Precision, tokens: int, checkpointing: bool) -> int:
    """Bytes that the layers keep of `tokens` (padding included) until backward.

    checkpointing: size * hidden for each layer's input, and one layer in full;  else every layer in full
    """
    # With checkpointing, backward computes one layer at a time once more, and that one is then there in full.
    full = layer_bytes(shape, precision) * tokens
    return shape.layers * precision.size * shape.hidden * tokens + full if checkpointing else shape.layers * full


def logits_bytes(shape: ModelShape, precision: Precision, positions: int, gradient: bool) -> int:
    """Logits as the model gives them and, in training, their gradient: size * 1 or 2 for every entry; and in float32
    the logits and the softmax of ROWS_AT_ONCE positions, all that `selective_logprobs` has of them at a time."""
    # Two float32 copies of a piece of the rows, however many rows there are.
    at_once = 2 * FP32 * min(ROWS_AT_ONCE, positions)
    return (precision.size * (1 + gradient) * positions + at_once) * shape.vocab


def forward_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """The widest moment of a layer without gradient: both halves of the MLP beside four copies of the states."""
    return precision.size * (2 * shape.intermediate + 4 * shape.hidden) * tokens


# ---- a stage ----
@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes by what stays in memory, and by phase what comes on top of it while that phase lasts."""

    roles: dict[str, float]
    phases: dict[str, float]

    def peak(self) -> float:
        """Bytes at the worst moment."""
        # Phases follow one another, so only the largest of them adds to what stays.
        return sum(self.roles.values()) + max(self.phases.values())

    def fits(self) -> dict[int, bool]:
        """Card's memory in GB -> whether the worst moment fits."""
        return {size: self.peak() <= size * 1e9 for size in CARDS_GB}


def fused_head_bytes(shape: ModelShape, positions: int) -> int:
    """TRL's fused output layer: one float32 tile of logits, 4 * min(4096, positions) * min(32768, vocab)."""
    # Both sizes are constants inside TRL: they are to be looked at when its version changes.
    return FP32 * min(4096, positions) * min(32768, shape.vocab)


def trainer_needs(
    shape: ModelShape, precision: Precision, adapter: int, tokens: int, checkpointing: bool, head: bool
) -> MemoryNeeds:
    """SFT (with an output `head`) or reward training (a score head only, which costs nothing).

    Args:
        adapter: trained parameters. tokens: of one forward pass, padding included.
    """
    roles = {
        "base": weight_bytes(shape, precision),
        "adapter": FP32 * adapter,
        "gradients and optimizer": trained_bytes(adapter),
        "runtime": RUNTIME_BYTES,
    }
    # Layers and output layer count together: backward begins at the logits, while all activations are still kept.
    update = activation_bytes(shape, precision, tokens, checkpointing)
    return MemoryNeeds(roles, {"update": update + (fused_head_bytes(shape, tokens) if head else 0)})


@dataclass(frozen=True)
class PpoSizes:
    """Rows and tokens of a PPO step on one process."""

    batch: int
    mini_batch: int
    forward_batch: int
    query: int
    response: int
    rows_sampled: int
    checkpointing: bool


def ppo_needs(
    shape: ModelShape, precision: Precision, adapters: dict[str, int], trained: int, sizes: PpoSizes, bases: int = 1
) -> MemoryNeeds:
    """PPO: `bases` copies of the base (2 with a merged reference), adapters on the first, three phases.

    Args:
        adapters: role -> parameters. trained: those that PPO trains, value head included.
    """
    # What counts as there for the whole run. The cache counts at its longest, query and response.
    length = sizes.query + sizes.response
    roles = {
        "base": weight_bytes(shape, precision),
        # Only a merged reference is a second copy: all adapters share the one base.
        **({"merged reference": (bases - 1) * weight_bytes(shape, precision)} if bases > 1 else {}),
        **{f"{role} adapter": FP32 * parameters for role, parameters in adapters.items()},
        "gradients and optimizer": trained_bytes(trained),
        "key-value cache": cache_bytes(shape, precision, sizes.rows_sampled, length),
        "runtime": RUNTIME_BYTES,
    }

    # What a phase needs on top of the roles, at its largest batch.
    scored = min(sizes.forward_batch, sizes.batch)
    update = activation_bytes(shape, precision, sizes.mini_batch * length, sizes.checkpointing)
    phases = {
        "rollout": forward_bytes(shape, precision, sizes.rows_sampled * sizes.query)
        + logits_bytes(shape, precision, sizes.rows_sampled, gradient=False),
        "score": forward_bytes(shape, precision, scored * length)
        + logits_bytes(shape, precision, scored * sizes.response, gradient=False),
        "update": update + logits_bytes(shape, precision, sizes.mini_batch * sizes.response, gradient=True),
    }
    return MemoryNeeds(roles, phases)
