"""One process of those that share a base in shards: compares it with a whole one, and counts what the processes move.

shard_worker.py BASE ADAPTER REWARD COUNT
"""

import dataclasses
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.cost.cuts import Cuts
from rlhf.cost.shards import parts_of, rollout_bytes
from rlhf.cost.skeleton import Base
from rlhf.models.generation import Sampling, generate, take_part
from rlhf.models.shards import base_mesh, mesh_of
from rlhf.models.tensor_parallel import twin_of
from rlhf.rl.roles import load_roles, response_logprobs, role_logprobs

# Rows a process, tokens of a query, tokens of an answer.
ROWS = 8
QUERY = 5
ANSWER = 6
FLOAT = 4


class Traffic(TorchDispatchMode):
    """Bytes of numbers that this process receives, by kind of exchange, as a ring of processes exchanges them."""

    def __init__(self):
        super().__init__()
        self.received = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        share = (dist.get_world_size() - 1) / dist.get_world_size()
        # Counts and tokens are whole numbers.
        if name == "c10d::_allgather_base_" and args[0].is_floating_point():
            self.received += share * args[0].nbytes
        elif name == "c10d::allreduce_" and args[0][0].is_floating_point():
            self.received += 2 * share * args[0][0].nbytes
        elif name.startswith("c10d::") and name not in ("c10d::_allgather_base_", "c10d::allreduce_"):
            raise AssertionError(f"{name} was not expected")
        return function(*args, **(kwargs or {}))


def same_draws(whole, parts, twin, vocabulary: int) -> None:
    """Greedy and drawn rows of queries of several lengths, on half of the processes with answers that end early."""
    rank = dist.get_rank()
    source = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, vocabulary, (ROWS, QUERY), generator=source)
    mask = torch.arange(QUERY) >= torch.randint(0, QUERY, (ROWS, 1), generator=source)
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=12)
    if rank == 0:
        sampling = dataclasses.replace(sampling, stop_ids=tuple(range(2, vocabulary // 4)))
    for seed in (None, 7):
        rollouts = []
        for model in (whole.model, parts.model, *([twin] if twin else [])):
            draws = None if seed is None else torch.Generator().manual_seed(seed + rank)
            rollouts.append(generate(model, parts.values, ids, mask, sampling, draws))
        first, gathered, *in_place = rollouts
        # Over gathered layers every number is that of the whole model.
        for field in dataclasses.fields(first):
            one, other = getattr(first, field.name), getattr(gathered, field.name)
            assert (one is None and other is None) or torch.equal(one, other), (seed, field.name)
        for rollout in in_place:
            assert rollout.response_ids.tolist() == first.response_ids.tolist(), seed
            assert torch.equal(rollout.mask, first.mask)
            torch.testing.assert_close(rollout.logprobs, first.logprobs, atol=1e-4, rtol=0)

    # A process without rows takes part.
    for model in (parts.model, *([twin] if twin else [])):
        if rank:
            take_part(model, sampling, torch.device("cpu"))
        else:
            generate(model, None, ids, mask, sampling)


def moves(count, formula: float) -> None:
    """Assert that the call `count` moves the bytes of the formula."""
    with Traffic() as traffic:
        count()
    assert traffic.received == formula, (traffic.received, formula)


def same_bytes(base: str, parts, twin, vocabulary: int) -> None:
    """What sampling, scoring and the update move, against rlhf/cost/shards.py."""
    cuts = Cuts.of(Base.of(base, "--base").model, dist.get_world_size())
    ids = torch.randint(3, vocabulary, (ROWS, QUERY), generator=torch.Generator().manual_seed(1))
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    rollouts = []

    def sample(model) -> None:
        rollouts.append(generate(model, None, ids, ids > 0, sampling))

    assert parts_of(ROWS) == 2
    moves(lambda: sample(parts.model), rollout_bytes(cuts, FLOAT, ROWS, QUERY, ANSWER, False))
    if twin:
        moves(lambda: sample(twin), rollout_bytes(cuts, FLOAT, ROWS, QUERY, ANSWER, True))

    rollout = rollouts[0]
    once = cuts.layers_once(FLOAT)
    moves(lambda: role_logprobs(parts, "reference", rollout, sampling, 4), 2 * once)
    for checkpointing in (False, True):
        if checkpointing:
            parts.enable_checkpointing()
        parts.train(True)
        moves(lambda: response_logprobs(parts.model, rollout, sampling)[0].sum().backward(), 2 * once)


def parse_args() -> SimpleNamespace:
    """Whether bytes are counted, then base, adapter and reward adapter of each model."""
    count, *folders = sys.argv[1:]
    models = [folders[place : place + 3] for place in range(0, len(folders), 3)]
    return SimpleNamespace(count=count == "True", models=models)


def compare(base: str, adapter: str, reward: str, count: bool) -> None:
    """Load a base whole and in shards, and compare; print if it decodes in place, or why not."""
    loaded = {"dtype": torch.float32, "device": "cpu"}
    whole = load_roles(base, adapter, reward, **loaded)
    parts = load_roles(base, adapter, reward, **loaded, mesh=base_mesh("True"))
    assert mesh_of(whole.model) is None and mesh_of(parts.model).size() == dist.get_world_size()
    for roles in (whole, parts):
        roles.train(False)
    kind = whole.model.config.model_type
    try:
        twin = twin_of(parts.model)
        print(f"{kind} decodes in place\n", end="", flush=True)
    except ValueError as reason:
        twin = None
        print(f"{kind} decodes gathered: {reason}\n", end="", flush=True)

    vocabulary = whole.model.config.get_text_config().vocab_size
    same_draws(whole, parts, twin, vocabulary)
    if count:
        same_bytes(base, parts, twin, vocabulary)


def main(args: SimpleNamespace) -> None:
    """Compare every model."""
    for folders in args.models:
        compare(*folders, args.count)
    dist.barrier()
    dist.destroy_process_group()
