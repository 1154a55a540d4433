"""A base in shards: of every layer's matrices each process holds a part, and gathers the others' while the layer runs.

    processes 0 .. N - 1 share the first copy of the base, N .. 2N - 1 the second, ...        (--shard_base N)

PyTorch's FSDP2 gathers a layer before its forward and before its backward, and frees it afterwards. Nothing but the
layers' matrices is cut: embeddings, output layer, norms, adapters and heads are whole on every process, and so are the
numbers of a run those of unsharded processes. A matrix is cut as tensor parallelism cuts it, by its outputs or by its
inputs, so that decoding can use the parts where they lie (tensor_parallel.py).

Every forward is a matter of all processes that share a copy: one that has no rows runs one all the same.
Source: Zhao et al. 2023, arXiv:2304.11277 (FSDP); Shoeybi et al. 2019, arXiv:1909.08053 (cuts by outputs and inputs).
"""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from rlhf.run.environment import read_launch
from rlhf.run.sharing import processes_a_copy

# The name that peft knows weights by which are stored in parts, but computed with as a whole.
SHARDS = "fsdp"

# The `distributed_config` with which transformers leaves all placing to the class.
PLACED = DistributedConfig()


# ---- which processes ----
def base_mesh(shard_base: str) -> DeviceMesh | None:
    """The processes that share a copy of the base with this one, by --shard_base; None where each has its own.

    Collective: all processes of the run call it.
    """
    count = processes_a_copy(shard_base)
    if not count:
        return None
    # On a CPU the same code runs over gloo, for tests and for machines of much memory.
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        # Before the mesh is made, which takes the current card for this process's own.
        torch.cuda.set_device(read_launch().local_rank)
    if not dist.is_initialized():
        # One process has nobody to meet.
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Neighbouring ranks share a copy: on one machine they have the fastest links.
    sizes = (dist.get_world_size() // count, count)
    return init_device_mesh(kind, sizes, mesh_dim_names=("copies", SHARDS))[SHARDS]


def device_of(mesh: DeviceMesh) -> torch.device:
    """This process's own device of the mesh."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes that hold the shards of this model; None for a model that is whole."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def any_of(mesh: DeviceMesh, *marks: bool | int) -> list[int]:
    """For each mark the largest that any process of the mesh has. Collective."""
    largest = torch.tensor([int(mark) for mark in marks], device=mesh.device_type)
    # Several marks in one call, as each is a meeting of all.
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group())
    return largest.tolist()


def missing(mesh: DeviceMesh | None, own: int) -> int:
    """How many fewer forwards, or calls that make some, this process is about to make than another one. Collective.

    Those that are missing it has to make up for, without a row; 0 where each process has a base of its own.
    """
    return any_of(mesh, own)[0] - own if mesh is not None else 0


def from_first(value):
    """A value of the first process of the run, on all of them. Collective."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held)
    return held[0]


def trained_from_first(model: nn.Module) -> None:
    """Give all processes the first one's trained weights. Collective over all processes of the run."""
    for p in model.parameters():
        if p.requires_grad and dist.is_initialized():
            dist.broadcast(p.data, 0)


# ---- placing ----
def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder. Raises: ValueError where it has none that can be told."""
    count = backbone.config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        # The outermost list of that length: a layer may hold lists of its own.
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"--shard_base: no decoder layers were recognised in a {backbone.config.model_type} model")


def parallel_plan(config: PretrainedConfig) -> dict[str, str]:
    """Pattern of a module's name within the decoder -> how tensor parallelism cuts it ("colwise", "rowwise", ...)."""
    config = config.get_text_config()
    return (config.base_model_tp_plan or {}) | getattr(config, "packed_tp_plan", {})


def cut_of(plan: dict[str, str], name: str) -> str | None:
    """How the module of this name within the decoder is cut; None for one that the plan leaves out."""
    return next((how for pattern, how in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)


def place(backbone: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut the matrices of a decoder's layers over the processes of `mesh`, once, before adapters are put on it."""
    plan = parallel_plan(backbone.config)
    dims = {}
    for name, module in backbone.named_modules():
        # By the plan of tensor parallelism, though FSDP would do with any cut: the parts then serve for decoding where
        # they lie.
        by_inputs = isinstance(module, nn.Linear) and (cut_of(plan, name) or "").startswith("rowwise")
        # FSDP2 pads an uneven cut of the first dimension alone.
        dims[module] = 1 if by_inputs and module.in_features % mesh.size() == 0 else 0

    for layer in decoder_layers(backbone):
        matrices = {}
        for module in layer.modules():
            # Matrices in the dtype of the base: norms are vectors, and adapters, if any, are float32.
            own = [p for p in module.parameters(recurse=False) if p.dim() > 1 and p.dtype == backbone.dtype]
            matrices |= dict.fromkeys(own, dims[module])
        # Left out of FSDP, which would otherwise gather, and cast, what every process has anyway.
        whole = set(layer.parameters()) - matrices.keys()
        cuts = {id(p): Shard(dim) for p, dim in matrices.items()}
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole,
            shard_placement_fn=lambda p, cuts=cuts: cuts[id(p)],
        )  # fmt: skip

    # The root holds nothing. Backward gathers the layer before the one that runs; by itself FSDP2 would gather after
    # the first layer whatever ran last in a pass without gradients.
    fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()))
    layers = list(decoder_layers(backbone))
    for layer, before in zip(layers, [backbone, *layers], strict=False):
        layer.set_modules_to_backward_prefetch([before])


# ---- loading ----
def placing_class(kind: type[PreTrainedModel], mesh: DeviceMesh) -> type[PreTrainedModel]:
    """The class, whose `from_pretrained` reads into shards where it is given PLACED: each process its own slices.

    transformers builds a model without weights, asks its class to distribute it, and then reads of a tensor in shards
    what this process holds, through whatever conversion the architecture has.
    """

    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        # Taken off again: it would go into the saved configuration.
        model.config.distributed_config = None
        place(getattr(model, model.base_model_prefix), mesh)
        return model

    methods = {"maybe_distribute_model": classmethod(maybe_distribute_model), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), methods)


def own_memory(model: PreTrainedModel) -> None:
    """Copy what a CPU maps from files: the pages that a part was cut from would stay beside it."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    model.tie_weights()


# ---- running ----
def gathered_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Each layer in shards, its matrices whole as long as the caller looks at it. Collective."""
    for layer in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        layer.unshard()
        yield layer
        # At once, or a walk over the layers would end with the whole base in memory.
        layer.reshard()


def in_ddp(model: nn.Module, **settings) -> DistributedDataParallel:
    """The model in DDP over all processes, which reduces the gradients of what is whole: adapters and heads."""
    parts = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    # DDP would broadcast what it takes for copies, and shards are no copies of one another.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)
    device_ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    return DistributedDataParallel(model, device_ids=device_ids, **settings)


@contextmanager
def abandoned_on_error(model: nn.Module):
    """Let a forward that fails within the block leave the layers in shards: the next one then begins as always."""
    try:
        yield
    except Exception:
        roots = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if roots:
            roots[0].reset_iter_state()
        raise
