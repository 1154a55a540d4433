"""Which way this processor computes a model's products fastest: tried once, and kept.

A float32 product on a CPU goes through oneDNN, through MKL, or of a few rows through MKL with the weight on the left.
On one AMD machine oneDNN took 10 to 30 % less time than MKL, on another 10 to 14 % more. So each shape of a model's
large weights is tried, for some tenths of a second in all.

The ways round differently. So that a command gives the same bytes again, they are kept in a file, by processor,
threads and versions; a run that is resumed goes on with those of its checkpoint.
"""

import json
import os
import platform
import time
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import constants
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from rlhf.artefacts.files import write_json

# Elements of a weight from which on the way of a product matters.
LARGE = 1 << 17

# Rows up to which the weight may be better on the left, and rows and multiplications of a trial of many.
FEW = 4
MANY = 256
MULTIPLICATIONS = 1 << 28

# Times that each way is tried; the shortest counts, as other programs only ever add to it.
TIMES = 5
# Another way than the usual one has to save this share: less may be noise.
SHARE = 0.1

# PyTorch keeps this operator to itself: a version without that name takes the usual product.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# Number of rows -> way where nothing was tried: those of the machine that benchmarks/ was first measured on.
USUAL = {"one": "onednn", "few": "left", "many": "onednn"}

# "<rows> <out>x<in>" (of a weight, or of its transpose as in backward) -> way, where it is not the usual one.
_ways: dict[str, str] = {}


def through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b of x [N, in] and weight [out, in] by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def from_the_left(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by MKL as (W x')', and row after row in memory again, as the other ways give it."""
    return (weight @ x.T).T.contiguous() if bias is None else through_onednn(x, weight, bias)


WAYS = {"mkl": linear, "onednn": through_onednn, "left": from_the_left}


def rows_kind(rows: int) -> str:
    """The key of USUAL for a product of so many rows."""
    return "one" if rows == 1 else "few" if rows <= FEW else "many"


def way_of(x: Tensor, weight: Tensor):
    """Function that computes x W' + b."""
    kind = rows_kind(len(x))
    return WAYS[_ways.get(_key(kind, weight), USUAL[kind])]


def _key(kind: str, weight: Tensor) -> str:
    transposed = "" if weight.is_contiguous() else " transposed"
    return f"{kind} {weight.shape[0]}x{weight.shape[1]}{transposed}"


# ---- the trial ----
def use(kept: dict[str, str]) -> None:
    """Go on with the ways that a run began with (of `in_use`)."""
    _ways.clear()
    _ways.update(kept)


def in_use() -> dict[str, str]:
    """The ways that are not the usual ones, for the checkpoint of a run."""
    return dict(_ways)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Choose the ways of the products of a model's large weights."""
    weights = [_shape_of(module.weight) for module in model.modules() if type(module) is nn.Linear]
    large = [weight for weight in weights if _is_large(weight)]
    views = large + [weight.T for weight in large]
    shapes = {_key(kind, view): view for kind, view in product(USUAL, views)}
    known = _known(shapes) if shapes else {}
    use({key: known[key] for key in shapes if known[key] != USUAL[key.split()[0]]})


def _shape_of(weight: Tensor) -> Tensor:
    """The weight; of one in shards, which is whole while its layer runs, zeros of its shape, which take no memory."""
    return torch.zeros(weight.shape) if isinstance(weight, DTensor) and weight.is_cpu else weight


def _is_large(weight: Tensor) -> bool:
    return ONEDNN and weight.is_cpu and weight.dtype == torch.float32 and weight.numel() >= LARGE


def _known(shapes: dict[str, Tensor]) -> dict[str, str]:
    """The way of each shape on this machine: from its file, or tried now and written there.

    Where nothing can be kept nothing is tried: the next run would perhaps choose otherwise.
    """
    file = Path(constants.HF_HOME, "rlhf_kernels.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The processes of a run must not disturb each other's trial, and have to choose alike.
        with FileLock(f"{file}.lock", timeout=60):
            stored = _read(file)
            here = stored.setdefault(_machine(), {})
            missing = [key for key in shapes if here.get(key) not in WAYS]
            # Within the lock: of several processes one tries, and the others read what it found.
            if missing:
                here |= {key: fastest(key, shapes[key]) for key in missing}
                write_json(file, stored)
            return here
    except (OSError, Timeout):
        return {key: USUAL[key.split()[0]] for key in shapes}


def _read(file: Path) -> dict[str, dict[str, str]]:
    """What is kept; nothing where the file is not there, or is not what was written."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(stored, dict) and all(isinstance(entry, dict) for entry in stored.values())
    return stored if whole else {}


@lru_cache(maxsize=1)
def _machine() -> str:
    """What the times depend on: processor, cores, threads, version of PyTorch."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def fastest(key: str, weight: Tensor) -> str:
    """The name of the way that computes products with this weight in the shortest time, the usual one if in doubt."""
    kind = key.split()[0]
    rows = {"one": 1, "few": FEW, "many": max(16, min(MANY, MULTIPLICATIONS // weight.numel()))}[kind]
    # What stands in it does not matter to the time.
    x = torch.ones(rows, weight.shape[1])
    # A single row has no other side, and of many the result would have to be turned round.
    names = [name for name in WAYS if name != "left" or kind == "few"]

    seconds = dict.fromkeys(names, float("inf"))
    # In turn, so that what else the machine does falls on all of them. A way's first product also prepares the others.
    for _ in range(TIMES):
        for name in names:
            start = time.perf_counter()
            WAYS[name](x, weight)
            seconds[name] = min(seconds[name], time.perf_counter() - start)

    best = min(seconds, key=seconds.get)
    usual = USUAL[kind]
    return best if seconds[best] < (1 - SHARE) * seconds[usual] else usual
