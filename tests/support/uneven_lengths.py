"""rl_training.py with answers of one token on the first process and of any length on the others."""

import dataclasses
import os

from rl_training import main, parse_args
from rlhf.rl import experience

# A worker is started by its file, as a stage is.
__all__ = ["main", "parse_args"]

_generate = experience.generate


def generate(model, values_of, query_ids, query_mask, sampling, generator=None):
    """Sample as the loop does, on the first process one token only."""
    if os.environ["RANK"] == "0":
        sampling = dataclasses.replace(sampling, max_new_tokens=1)
    return _generate(model, values_of, query_ids, query_mask, sampling, generator)


experience.generate = generate
