"""What a process that was forked from one with PyTorch in it has to do first."""

import torch


def own_pool() -> None:
    """Give this forked process its own pool of PyTorch's threads.

    PyTorch makes a new pool at a forked process's first use of one. That must not be by several threads at once, as
    where transformers reads weights: one of them would find none ("Invalid thread pool!").
    """
    torch.set_num_threads(torch.get_num_threads())
