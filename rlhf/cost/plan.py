"""--plan True: a stage in numbers, from its command line and the config.json of the base alone."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import rlhf.baichuan  # noqa: F401 (registers the native Baichuan with the Auto classes)
from rlhf.arguments import LoraArguments
from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.foreign import refuse_unshareable
from rlhf.cost.memory import (
    GIB,
    MemoryNeeds,
    ModelShape,
    PpoSizes,
    Precision,
    lora_parameters,
    ppo_needs,
    trainer_needs,
)
from rlhf.data.reading import load_rows
from rlhf.models.loading import read_config
from rlhf.models.lora import lora_targets
from rlhf.run.launch import is_launched, rank_and_size
from rlhf.run.startup import wanted_processes


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
    names = lora_targets(model, targets if targets is None or isinstance(targets, str) else "|".join(targets))
    shapes = []
    for name, module in model.named_modules():
        if isinstance(names, str):
            taken = re.fullmatch(names, name) is not None
        else:
            taken = any(f".{name}".endswith(f".{wanted}") for wanted in names)
        if taken and isinstance(module, nn.Linear):
            shapes.append((module.in_features, module.out_features))
        elif taken and isinstance(module, Conv1D):
            shapes.append((module.nx, module.nf))
    return lora_parameters(shapes, rank)


def stored_adapter(model: nn.Module, folder: str, default_rank: int) -> int:
    """Parameters of the adapter in a directory; of a usual one where the stage before has yet to write it."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return adapter_parameters(model, default_rank, None)
    config, weights = read_adapter(folder)
    refuse_unshareable(config, weights, f"adapter {folder}")
    return adapter_parameters(model, config.r, config.target_modules)


def processes(args) -> int:
    """Processes that this command would run in."""
    # Under a launcher its environment has the number; without one, the command would start the processes itself.
    return rank_and_size()[1] if is_launched() else wanted_processes(args.nproc)


def precision_of(args) -> Precision:
    """Precision as on a GPU, whatever this machine has."""
    return Precision(2 if args.bf16 else 4, args.load_in_4bit)


# ---- words ----
def number(parameters: int, trained: bool = False) -> str:
    return f"{parameters:,}" + (" (trained)" if trained else "")


def gib(needed: float) -> str:
    return f"{needed / GIB:.2f}"


def table(title: str, parameters: dict[str, str], needs: MemoryNeeds, steps: list[str]) -> str:
    """All that the plan says."""
    kinds = [("parameters", parameters)]
    kinds.append(("always in memory, GiB", {name: gib(size) for name, size in needs.roles.items()}))
    kinds.append(("on top while it lasts, GiB", {name: gib(size) for name, size in needs.phases.items()}))
    lines = [title]
    for kind, rows in kinds:
        lines += [f"{kind}:", *(f"  {name:<24} {value:>20}" for name, value in rows.items())]
    cards = ", ".join(f"{size} GB {'yes' if fits else 'no'}" for size, fits in needs.fits().items())
    lines.append(f"peak of a process: {gib(needs.peak())} GiB, in the {max(needs.phases, key=needs.phases.get)}")
    lines.append(f"fits a card of: {cards}")
    return "\n".join([*lines, *steps])


def title(args, script: str, base: str) -> str:
    """First line of the plan."""
    weights = "4-bit" if args.load_in_4bit else "bfloat16" if args.bf16 else "float32"
    checkpointing = "with" if args.gradient_checkpointing else "without"
    return f"plan of {script}: {base}, {weights} weights, {checkpointing} gradient checkpointing"


# ---- stages ----
def plan_trainer(args, script: str, sides: int) -> str:
    """The plan of SFT (`sides` 1) or of reward training (2: both answers of a pair in one forward)."""
    # The base without weights, and an adapter: the one that training goes on with, or a new one.
    model = skeleton(args.model_name, "--model_name")
    shape = shape_of(model)
    reward = sides == 2
    previous = getattr(args, "previous_lora_weights", None)
    adapter = (
        stored_adapter(model, previous, args.lora_rank)
        if previous
        else adapter_parameters(model, args.lora_rank, args.lora_target_models)
    )

    # The score head is trained whole, in float32.
    parameters = {"base": number(shape.parameters), "adapter": number(adapter, True)}
    if reward:
        parameters["score head"] = number(shape.hidden, True)

    # A batch of pairs holds both answers of each. Every row counts at its longest.
    needs = trainer_needs(
        shape,
        precision_of(args),
        adapter + (shape.hidden if reward else 0),
        args.per_device_train_batch_size * sides * args.max_length,
        args.gradient_checkpointing,
        head=not reward,
    )

    # All of it as text.
    return table(
        title(args, script, args.model_name),
        parameters,
        needs,
        trainer_steps(args, "pairs" if reward else "rows", sides),
    )


def trainer_steps(args, unit: str, sides: int) -> list[str]:
    """Effective batch, and steps as far as the number of rows is known: local data are counted, a hub's are not."""
    ranks = processes(args)
    batch = args.per_device_train_batch_size * ranks * args.gradient_accumulation_steps
    lines = [
        f"an optimizer step: {batch} {unit} = {args.per_device_train_batch_size} a device x {ranks} process(es) x "
        f"{args.gradient_accumulation_steps} accumulated; the longest of {args.max_length} tokens"
    ]
    # --max_steps overrules the number of epochs, as it does in the Trainer.
    if args.max_steps > 0:
        return [*lines, f"steps: {args.max_steps}, {args.max_steps * batch:,} {unit} with repetition"]

    # Rows on the hub would have to be downloaded before they could be counted.
    if not Path(args.dataset_name).exists():
        return [*lines, f"steps: {args.num_train_epochs:g} x {unit} / {batch}; {args.dataset_name} is not at hand"]

    kind = "preference" if sides == 2 else "sft"
    rows = len(load_rows(args.dataset_name, kind, args.train_split, args=args)[0])
    rows = min(rows, args.train_subset) if args.train_subset > 0 else rows
    # Rounded up: the last step of an epoch may have fewer rows than the others.
    steps = -(-rows // batch) * args.num_train_epochs
    return [*lines, f"steps: about {steps:.0f} for {rows:,} {unit}, before any is dropped or held out"]


def plan_ppo(args, script: str) -> str:
    """The plan of PPO; adapters that do not exist yet are taken to have the stages' own defaults."""
    # The base without weights, and on it the policy; the reference is one more adapter unless it is merged.
    model = skeleton(args.base_model_name, "--base_model_name")
    shape = shape_of(model)
    ranks = processes(args)
    policy = (
        stored_adapter(model, args.sft_model_lora_path, args.lora_rank)
        if args.sft_model_lora_path
        else adapter_parameters(model, args.lora_rank, args.lora_target_models)
    )
    # The reward stage's own default rank is half of the SFT stage's.
    reward = stored_adapter(model, args.reward_model_lora_path, LoraArguments().lora_rank // 2)
    adapters = {"policy": policy}
    # Without an SFT adapter the bare base is the reference.
    if args.sft_model_lora_path and not args.merged_sft_model_path:
        adapters["reference"] = policy

    # Reward model and judge count without their score heads, which are a few thousand numbers.
    adapters["reward"] = reward
    if args.judge_lora_path:
        adapters["judge"] = stored_adapter(model, args.judge_lora_path, LoraArguments().lora_rank // 2)

    # A critic's own adapter starts as a copy of the reward adapter, so it has the same size.
    if args.value_lora:
        adapters["value"] = reward

    # What PPO trains. A value head is one row of weights and a bias; advantages without a critic need none.
    head = shape.hidden + 1 if args.advantage == "gae" else 0
    trained = policy + head + adapters.get("value", 0)
    parameters = {"base": number(shape.parameters)}
    parameters |= {f"{role} adapter": number(size, role in ("policy", "value")) for role, size in adapters.items()}
    if head:
        parameters["value head"] = number(head, True)

    # The worst case: every query and every response at its longest.
    sizes = PpoSizes(
        batch=args.batch_size,
        mini_batch=args.mini_batch_size,
        forward_batch=args.forward_batch_size,
        query=args.max_prompt_length,
        response=args.output_max_length,
        rows_sampled=args.batch_size if args.batched_gen else 1,
        checkpointing=args.gradient_checkpointing,
    )

    # A merged reference is a second model in memory.
    bases = 2 if args.merged_sft_model_path else 1
    needs = ppo_needs(shape, precision_of(args), adapters, trained, sizes, bases)
    return table(title(args, script, args.base_model_name), parameters, needs, ppo_steps(args, ranks))


def ppo_steps(args, ranks: int) -> list[str]:
    """Steps, responses, and rows of an optimizer step."""
    batch = args.batch_size * ranks
    steps = -(-args.steps // batch)
    # Of one process. A window may begin in one epoch and end in the next, so all epochs are divided together.
    window = args.mini_batch_size * args.gradient_accumulation_steps
    updates = -(-args.batch_size * args.ppo_epochs // window)
    return [
        f"a step: {batch} responses = {args.batch_size} a process x {ranks} process(es), queries of at most "
        f"{args.max_prompt_length} and answers of at most {args.output_max_length} tokens",
        f"an optimizer step: {window * ranks} responses; {updates} of them a step ({args.ppo_epochs} epochs)",
        f"steps: {steps:,}, {steps * batch:,} responses in total",
    ]
