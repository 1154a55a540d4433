"""Command lines of the stages, run in turn by one group of processes: one start for all of them.

in_turn.py FILE        a JSON list of {"script": module, "argv": command line, "uneven": true for answers that end
                       after two tokens on the first process and late on the others}
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator

from rlhf.rl import experience
from rlhf.run.launch import rank_and_size

_generate = experience.generate


def uneven(model, values_of, query_ids, query_mask, sampling, generator=None):
    """Sample as the loop does, with half of the vocabulary as stop tokens on the first process."""
    if rank_and_size()[0] == 0:
        sampling = dataclasses.replace(sampling, stop_ids=tuple(range(2, 300)))
    return _generate(model, values_of, query_ids, query_mask, sampling, generator)


def parse_args() -> SimpleNamespace:
    """The file of the command line."""
    return SimpleNamespace(jobs=json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def main(args: SimpleNamespace) -> None:
    """Run each command line; the group of processes outlives all but the last."""
    end = Accelerator.end_training
    Accelerator.end_training = Accelerator.wait_for_everyone
    for job in args.jobs:
        script = importlib.import_module(job["script"])
        experience.generate = uneven if job.get("uneven") else _generate
        script.main(script.parse_args(job["argv"]))
    end(Accelerator(cpu=True))
