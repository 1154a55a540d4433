"""One process of a distributed update: takes its share of a stored rollout, updates; rank 0 saves the parameters."""

import sys
from types import SimpleNamespace

import torch
from accelerate import Accelerator

import rl_training
from rlhf.models.generation import Rollout, Sampling
from rlhf.rl import update


def random_mini_batches(rollout, size, accumulation, generator):
    """Mini-batches of rows in random order, long beside short: nothing is sorted within a window."""
    return list(torch.randperm(len(rollout.mask), generator=generator).split(size))


def parse_args() -> SimpleNamespace:
    """The two files of the command line: stored inputs, and where the parameters go."""
    return SimpleNamespace(inputs=sys.argv[1], output=sys.argv[2])


def main(files: SimpleNamespace) -> None:
    """Update on rows rank::world of the rollout stored in `inputs`; the parameters go to `output`."""
    stored = torch.load(files.inputs, weights_only=True)
    args = rl_training.parse_args(stored["flags"])
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index

    # Every process takes its share of the rows, so that together they are the stored batch.
    share = slice(rank, None, accelerator.num_processes)
    rows = {name: tensor[share] for name, tensor in stored["rollout"].items()}
    rollout = Rollout(**rows)
    if stored["order"] == "random":
        update.mini_batches = random_mini_batches

    # The update alone, without the loop around it.
    roles = rl_training.make_roles(args, torch.device("cpu"), None)
    optimizer = torch.optim.Adam(roles.trainable().values(), lr=args.learning_rate, eps=1e-5)
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8, suppress_empty=False)
    generator = torch.Generator().manual_seed(rank)
    metrics = update.update(roles, optimizer, rollout, sampling, args, accelerator, generator)

    if accelerator.is_main_process:
        parameters = {name: p.detach() for name, p in roles.trainable().items()}
        torch.save({"parameters": parameters, "metrics": metrics}, files.output)
    accelerator.end_training()
