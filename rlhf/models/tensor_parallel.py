"""Decoding over a base in shards, where they lie: activations move, the weights of a layer do not.

    cut by outputs    y = x W'  is there in parts: heads of the attention, units of the feed-forward part
    cut by inputs     y = sum over processes of  x W'  of their parts
    W_pack            its outputs are gathered, and each process takes its own heads of queries, keys and values

A twin of the model has the same norms, embeddings, adapters and heads, and of each matrix this process's shard. All
processes that share the base decode the rows of all of them together; each computes logits, and draws, for its own.
A layer moves two sums of [rows, hidden] for a token; gathering it would move all its weights.
Source: Shoeybi et al. 2019, arXiv:1909.08053; one set of weights for training and for decoding: Yao et al. 2023,
arXiv:2308.01320 (DeepSpeed-Chat), who move them between two layouts.
"""

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from rlhf.models.forward import TOLERANCE, backbone_of, forked_rng
from rlhf.models.linear import product
from rlhf.models.shards import cut_of, mesh_of, parallel_plan
from rlhf.run.launch import say

# How a plan may cut a linear layer, and whether its output is gathered, or its whole input cut first.
BY_OUTPUTS = ("colwise", "colwise_gather_output", "packed_thirds")
BY_INPUTS = ("rowwise", "rowwise_split_input")
GATHERED = ("colwise_gather_output", "packed_thirds")


# ---- a layer ----
class PartLinear(nn.Module):
    """This process's part of a linear layer in shards, with the adapter that is active on it."""

    def __init__(self, owner: nn.Module, how: str, mesh: DeviceMesh):
        super().__init__()
        # In a tuple, or it would be a module of this one.
        self.owner = (owner,)
        self.how = how
        self.group = mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()
        self.adapters: list[tuple[Tensor, Tensor, float]] = []

    def prepare(self) -> None:
        """Take this process's parts of the adapters that are active now, in the precision of the weight."""
        owner = self.owner[0]
        base = owner.base_layer if isinstance(owner, LoraLayer) else owner
        self.weight = base.weight.to_local()
        self.bias = None if base.bias is None else base.bias.detach()
        if self.bias is not None and self.how == "colwise":
            self.bias = self.bias.chunk(self.size)[self.rank]

        self.adapters = []
        active = owner.active_adapters if isinstance(owner, LoraLayer) and not owner.disable_adapters else []
        for name in active:
            if name not in owner.lora_A:
                continue
            a = owner.lora_A[name].weight.detach().to(self.weight.dtype)
            b = owner.lora_B[name].weight.detach().to(self.weight.dtype)
            # Cut as the weight is; gathered outputs are whole when the adapter's are added.
            if self.how == "colwise":
                b = b.chunk(self.size, 0)[self.rank]
            elif self.how in BY_INPUTS:
                a = a.chunk(self.size, 1)[self.rank]
            self.adapters.append((a, b.T, owner.scaling[name]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., out or this process's part of it] of x [..., in or this process's part of it]."""
        if self.how == "rowwise_split_input":
            x = x.chunk(self.size, -1)[self.rank]
        flat = x.reshape(-1, x.shape[-1])
        by_outputs = self.how in BY_OUTPUTS
        y = product(flat, self.weight, self.bias if self.how == "colwise" else None)
        if by_outputs and self.how != "colwise":
            y = self.gathered(y)
        for a, b, scaling in self.adapters:
            # Of an input that is cut, this is a part of the adapter's term as well: the sum below completes both.
            y = y.addmm_(nn.functional.linear(flat, a), b, alpha=scaling)

        if not by_outputs:
            dist.all_reduce(y, group=self.group)
        if self.bias is not None and self.how != "colwise":
            # After the sum, or it would be added once for each process.
            y = y + self.bias
        if self.how == "packed_thirds":
            y = y.unflatten(-1, (3, self.size, -1))[:, :, self.rank].flatten(1)
        return y.view(*x.shape[:-1], -1)

    def gathered(self, y: Tensor) -> Tensor:
        """[N, out] of this process's outputs [N, out / size]."""
        return exchange(self.group, self.size, y).transpose(0, 1).reshape(len(y), -1)


def exchange(group: dist.ProcessGroup, size: int, x: Tensor) -> Tensor:
    """[size, N, *] of what each process has, x [N, *], which has one shape on all of them. Collective."""
    # The shapes must agree beforehand: a collective of unequal sizes hangs, or reads beyond its end.
    gathered = x.new_empty(size * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered.view(size, *x.shape)


# ---- the twin ----
def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model, in shards and with its adapters on, as a model that decodes on the shards of this process.

    The two share every tensor: what trains one changes the other.

    Raises: ValueError saying what keeps this architecture, or this number of processes, from it.
    """
    mesh = mesh_of(model)
    _refuse_uncuttable(model, mesh.size())
    with forked_rng(), torch.device("meta"):
        twin = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)](model.config).eval()
    ours = backbone_of(model)
    theirs = backbone_of(twin)
    plan = parallel_plan(model.config)

    for name, module in list(theirs.named_modules()):
        if list(module.children()) or not name:
            continue
        owner = ours.get_submodule(name)
        sharded = mesh_of(owner) is not None
        _put(theirs, name, PartLinear(owner, _kind_of(owner, cut_of(plan, name), name), mesh) if sharded else owner)
    for name, module in model.named_children():
        if module is not ours:
            setattr(twin, name, module)

    left = [name for name, tensor in [*twin.named_parameters(), *twin.named_buffers()] if tensor.is_meta]
    if left:
        raise ValueError(f"{left[0]} is no linear layer")
    _refuse_other_states(model, twin)
    # Where `decoder_of` looks.
    twin.decodes_over = mesh
    return twin


def sampler_of(model: PreTrainedModel) -> PreTrainedModel:
    """What to sample from: a model's twin, or the model itself over gathered layers, with a sentence that says why."""
    try:
        return twin_of(model)
    except ValueError as reason:
        say(f"--decode gathered, which is slow with a base in shards: {reason}")
        return model


def _refuse_uncuttable(model: PreTrainedModel, size: int) -> None:
    config = model.config.get_text_config()
    heads = {"attention heads": config.num_attention_heads}
    heads["heads of keys and values"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for words, count in heads.items():
        if count % size:
            raise ValueError(f"{count} {words} are not divided by {size} processes")


def _kind_of(owner: nn.Module, how: str | None, name: str) -> str:
    """How a linear layer is cut. Raises: ValueError where it is not one that this file can compute with."""
    base = owner.base_layer if isinstance(owner, LoraLayer) else owner
    if type(base) is not nn.Linear or how not in (*BY_OUTPUTS, *BY_INPUTS):
        raise ValueError(f"{name} ({type(base).__name__}) has no plan for tensor parallelism")
    placement = base.weight.placements[0]
    size = base.weight.device_mesh.size()
    if base.weight.shape[placement.dim] % size or (placement.dim == 1) != (how in BY_INPUTS):
        raise ValueError(f"{name} is not divided by {size} processes")
    return how


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


@torch.no_grad()
def _refuse_other_states(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Refuse a twin whose hidden states of a row are not the model's."""
    ids = torch.arange(12, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    usual = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    prepare(twin)
    try:
        sharded = backbone_of(twin)(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        # There are as many ways to take heads apart as architectures.
        raise ValueError(f"its layers cannot be computed in parts ({error})") from None
    finally:
        model.train(training)
    # Written so that NaN is refused.
    if not bool(((sharded - usual).norm(dim=1) <= TOLERANCE[model.dtype] * usual.norm(dim=1)).all()):
        raise ValueError("its layers computed in parts give other hidden states")


def prepare(twin: PreTrainedModel) -> None:
    """Take the adapters as they are now; every sampling begins with it."""
    for module in twin.modules():
        if isinstance(module, PartLinear):
            module.prepare()
