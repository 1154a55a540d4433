"""What the environment says about processes: read in one place, and refused in a sentence where it cannot be right.

A launcher (torchrun, accelerate launch) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together. One
of them alone is a remainder of another program: a run that believed it would print and save nothing, and end with 0.
"""

import os
import sys
import warnings
from dataclasses import dataclass

# What a launcher sets for each process that it starts.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

# What MPI's launchers set, under the names that accelerate would read: (rank, size).
MPI_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)

# Settings of accelerate that would change numbers unseen: here flags decide them.
LEFT_ASIDE = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_DEEPSPEED",
)  # fmt: skip
# Values of these that ask for nothing.
NOTHING = ("", "no", "false", "False", "0", "1", "NO")

# What Python takes its encoding from, in its order.
LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")


@dataclass(frozen=True)
class Launch:
    """This process among those of its launcher: its number from 0, how many there are, and both on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # True where a launcher started it; else this script may start processes itself.
    launched: bool = False


def read_launch(nproc: int = 0) -> Launch:
    """What the variables of a launcher say.

    Args:
        nproc: --nproc; above 1 it wins over a launcher's single process.
    Raises: ValueError naming the variable that is no number, missing or out of range.
    """
    _refuse_mpi()
    given = {name: _number(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    if not given:
        # accelerate launch sets none of them for a single process.
        alone = any(name.startswith("ACCELERATE_") for name in os.environ)
        return Launch(launched=alone and nproc <= 1)

    for name in ("WORLD_SIZE", "RANK"):
        if name not in given:
            values = ", ".join(f"{key}={value}" for key, value in given.items())
            raise ValueError(
                f"the environment has {values} without {name}: a launcher sets them together; unset "
                f"{' and '.join(given)}, or start with torchrun"
            )
    rank = given["RANK"]
    size = given["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise ValueError(f"the environment has RANK={rank}, WORLD_SIZE={size}: ranks count from 0; unset both")
    if size == 1:
        # torchrun with one process: a plain run but for the card, which it may have chosen.
        return Launch(local_rank=given.get("LOCAL_RANK", 0), launched=nproc <= 1)

    # Several processes need a card each, and an address at which they meet.
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"the environment has WORLD_SIZE={size} without {missing[0]}: a launcher sets them together; unset "
            "WORLD_SIZE and RANK, or start with torchrun"
        )
    # A launcher that leaves it out has all processes on one machine.
    local_size = _number("LOCAL_WORLD_SIZE") if os.environ.get("LOCAL_WORLD_SIZE") else size
    return Launch(rank, size, given["LOCAL_RANK"], local_size, launched=True)


def refuse_unusable() -> None:
    """Refuse settings of Python under which no script can work, before the libraries stumble over them.

    Raises: ValueError naming the variable to unset.
    """
    if sys.flags.optimize > 1:
        raise ValueError(
            "Python runs without docstrings (PYTHONOPTIMIZE=2, or -OO), which transformers cannot be loaded without: "
            "unset PYTHONOPTIMIZE"
        )
    encoding = sys.getfilesystemencoding()
    try:
        # The first character of the usual prompt; any Chinese one would tell.
        "\u95ee".encode(encoding)
    except UnicodeEncodeError:
        # Bytes of UTF-8 would be taken for other letters, or for none.
        if not all(word.isascii() for word in sys.argv):
            locale = next((f"{name}={os.environ[name]}" for name in LOCALE if os.environ.get(name)), "no locale")
            raise ValueError(
                f"the environment has {locale}, under which Python reads a command line as {encoding}: unset "
                "PYTHONUTF8, or set LC_ALL=C.UTF-8"
            ) from None


def leave_aside() -> list[str]:
    """Take settings out of the environment that would change numbers unseen, or end a run at a warning.

    Returns: a sentence on each of those that asked for something.
    """
    aside = []
    for name in LEFT_ASIDE:
        # Taken out and not only ignored, as accelerate reads them by itself, and so do processes that are started from
        # here.
        value = os.environ.pop(name, None)
        if value is not None and value not in NOTHING:
            aside.append(f"{name}={value} in the environment is left aside: the flags decide")

    # From PYTHONWARNINGS or -W: any library's remark on its next version would be the end.
    if any(option.startswith("error") for option in sys.warnoptions):
        options = ",".join(sys.warnoptions)
        aside.append(f"PYTHONWARNINGS={options} is left aside: no run ends at a warning")
        warnings.simplefilter("default")
        # As Python has it where nobody asks.
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        os.environ.pop("PYTHONWARNINGS", None)
    return aside


def _number(name: str) -> int:
    """Raises: ValueError where the variable is no whole number."""
    value = os.environ[name]
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"the environment has {name}={value!r}, which is no whole number: unset it") from None


def _refuse_mpi() -> None:
    """Raises: ValueError under an MPI launcher of several processes, which no torch process group would know of."""
    for rank_name, size_name in MPI_VARIABLES:
        size = os.environ.get(size_name, "1")
        if size not in ("1", "") and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"the environment has {size_name}={size}: this project is started by torchrun, accelerate launch or "
                "plain python (one process a GPU), not by an MPI launcher"
            )
        # Of one process: accelerate would take it for a launcher.
        if "WORLD_SIZE" not in os.environ:
            os.environ.pop(rank_name, None)
            os.environ.pop(size_name, None)
