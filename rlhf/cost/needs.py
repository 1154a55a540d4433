"""Memory of a stage from its flags: what it holds, what it trains, and the bytes of each phase."""

import torch

from rlhf.arguments import LoraArguments
from rlhf.cost.cuts import count_of, in_shards
from rlhf.cost.memory import MemoryNeeds, PpoSizes, Precision, ppo_needs, trainer_needs
from rlhf.cost.skeleton import Base, adapter_parameters, stored_adapter

# Answers of a row that a forward pass holds: the reward model reads both of a pair.
SIDES = {"sft": 1, "reward": 2}


def precision_of(args) -> Precision:
    """Precision as on a GPU, whatever this machine has."""
    return Precision(2 if args.bf16 else 4, args.load_in_4bit)


def precision_here(args) -> Precision:
    """Precision on this machine: a CPU computes in float32."""
    return precision_of(args) if torch.cuda.is_available() else Precision(4, args.load_in_4bit)


def adapters_of(args, base: Base, kind: str) -> dict[str, int]:
    """Role -> parameters of every adapter in memory; one that does not exist yet has its stage's default rank.

    Args:
        kind: "sft", "reward" or "ppo".
    """
    if kind != "ppo":
        # The one that training goes on with, or a new one.
        previous = getattr(args, "previous_lora_weights", None)
        if previous:
            return {"adapter": stored_adapter(base.model, previous, args.lora_rank)}
        return {"adapter": adapter_parameters(base.model, args.lora_rank, args.lora_target_models)}

    sft = args.sft_model_lora_path
    policy = adapter_parameters(base.model, args.lora_rank, args.lora_target_models)
    if sft:
        policy = stored_adapter(base.model, sft, args.lora_rank)
    adapters = {"policy": policy}
    # Without an SFT adapter the bare base is the reference.
    if sft and not args.merged_sft_model_path:
        adapters["reference"] = policy

    # The reward stage's own default rank is half of the SFT stage's. Score heads are a few thousand numbers.
    rank = LoraArguments().lora_rank // 2
    for role, folder in args.reward_roles.items():
        adapters[role] = stored_adapter(base.model, folder, rank)
    if args.judge_lora_path:
        adapters["judge"] = stored_adapter(base.model, args.judge_lora_path, rank)
    # A critic's own adapter starts as a copy of the reward adapter, so it has the same size.
    if args.value_lora:
        adapters["value"] = adapters["reward"]
    return adapters


def head_of(args, base: Base, kind: str) -> dict[str, int]:
    """Name -> parameters of the head that is trained whole in float32, if there is one."""
    if kind == "reward":
        return {"score head": base.shape.hidden}
    # A value head is one row of weights and a bias; advantages without a critic need none.
    return {"value head": base.shape.hidden + 1} if kind == "ppo" and args.advantage == "gae" else {}


def trained_of(args, base: Base, kind: str) -> int:
    """Parameters that the stage trains."""
    adapters = adapters_of(args, base, kind)
    trained = sum(size for role, size in adapters.items() if role in ("adapter", "policy", "value"))
    return trained + sum(head_of(args, base, kind).values())


def memory_of(args, base: Base, kind: str, precision: Precision | None = None) -> MemoryNeeds:
    """Bytes of the stage, every row at its longest; `precision`: as on a GPU unless given."""
    precision = precision or precision_of(args)
    trained = trained_of(args, base, kind)
    if kind != "ppo":
        tokens = args.per_device_train_batch_size * SIDES[kind] * args.max_length
        needs = trainer_needs(base.shape, precision, trained, tokens, args.gradient_checkpointing, head=kind == "sft")
        return in_shards(needs, base, precision.size, count_of(args))

    # Left out, it is what fits; one row is what a start falls back to.
    mini_batch = args.mini_batch_size or 1
    if args.tokens_per_backward:
        mini_batch = max(1, args.tokens_per_backward // (args.max_prompt_length + args.output_max_length))
    sizes = PpoSizes(
        batch=args.batch_size,
        mini_batch=mini_batch,
        forward_batch=args.forward_batch_size,
        query=args.max_prompt_length,
        response=args.output_max_length,
        rows_sampled=args.batch_size if args.batched_gen else 1,
        checkpointing=args.gradient_checkpointing,
    )
    # A merged reference is a second model in memory.
    bases = 2 if args.merged_sft_model_path else 1
    needs = ppo_needs(base.shape, precision, adapters_of(args, base, kind), trained, sizes, bases)
    return in_shards(needs, base, precision.size, count_of(args))
