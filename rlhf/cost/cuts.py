"""What a process holds of a base in shards, and what its layers exchange; from the configuration alone."""

from dataclasses import dataclass, replace

from torch import nn

from rlhf.cost.memory import MemoryNeeds
from rlhf.cost.skeleton import Base
from rlhf.models.forward import backbone_of, last_mlp
from rlhf.models.shards import cut_of, decoder_layers, parallel_plan
from rlhf.models.tensor_parallel import BY_INPUTS, GATHERED
from rlhf.run.environment import read_launch
from rlhf.run.startup import wanted_processes


@dataclass(frozen=True)
class Cuts:
    """The layers of a base as `count` processes share them.

    matrices: parameters of what is cut. exchanged: numbers that one token exchanges in decoding in place, each number
    of a sum counted twice; None where the base decodes over gathered layers. last: those in the last layer's
    feed-forward part, which a query computes at its last token only (`mlp_only_at`).
    """

    count: int
    matrices: int
    exchanged: int | None = None
    last: int = 0

    @classmethod
    def of(cls, model: nn.Module, count: int) -> "Cuts":
        """Of a base without adapters, with or without weights."""
        backbone = backbone_of(model)
        plan = parallel_plan(backbone.config)
        # Vectors stay whole: norms and biases are not worth a meeting.
        matrices = sum(p.numel() for p in decoder_layers(backbone).parameters() if p.dim() > 1)

        linear = {
            module: cut_of(plan, name) for name, module in backbone.named_modules() if isinstance(module, nn.Linear)
        }
        config = backbone.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        # As `twin_of` refuses them: such a base decodes over gathered layers.
        if None in linear.values() or heads % count or kv_heads % count:
            return cls(count, matrices)
        times = {module: 2 * (kind in BY_INPUTS) + (kind in GATHERED) for module, kind in linear.items()}
        numbers = {module: module.out_features * often for module, often in times.items()}
        # A query of many tokens computes the last feed-forward part once.
        part = last_mlp(backbone)
        last = sum(numbers.get(module, 0) for module in (part.modules() if part is not None else ()))
        return cls(count, matrices, sum(numbers.values()), last)

    @property
    def others(self) -> float:
        """Share of what is gathered that comes from other processes."""
        return (self.count - 1) / self.count

    def layers_once(self, size: int) -> float:
        """Bytes received for gathering every layer once; `size`: bytes of a number."""
        return self.others * size * self.matrices

    def in_place(self, rows: int, query: int, answer: int, size: int) -> float:
        """Bytes received for decoding so many rows of all processes in place; query, answer: tokens of each."""
        # The last token of an answer is drawn and never read.
        tokens = query + answer - 1
        return self.others * size * rows * (self.exchanged * tokens - self.last * (query - 1))


def count_of(args) -> int:
    """Processes that share a copy of the base; 0 where each has its own."""
    if args.shard_base != "True":
        return int(args.shard_base)
    launch = read_launch()
    # Without a launcher, the command would start the processes itself.
    return launch.local_size if launch.launched else wanted_processes(args.nproc)


def in_shards(needs: MemoryNeeds, base: Base, size: int, count: int) -> MemoryNeeds:
    """The memory of a process where `count` of them share a copy of the base; `size`: bytes of a number.

    Three layers are whole at a time: the one that runs, the next one, and the buffer that it arrives in.
    """
    if not count:
        return needs
    matrices = size * Cuts.of(base.model, count).matrices
    # A merged reference is cut as the base is; adapters and heads stay whole.
    saved = matrices * (1 - 1 / count)
    roles = {}
    for role, held in needs.roles.items():
        roles[role] = held - saved if role in ("base", "merged reference") else held
    return replace(needs, roles=roles | {"gathered layers": 3 * matrices / base.shape.layers})
