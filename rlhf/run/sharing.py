"""--shard_base: which processes share one copy of the base. Standard library alone, as all that parses is."""

from dataclasses import dataclass

from rlhf.flags import Flags, flag
from rlhf.run.environment import read_launch


@dataclass(kw_only=True)
class ShardFlags(Flags):
    """How processes share a base that is larger than a card."""

    # A checkpoint holds no shards, and the numbers do not depend on them: a run goes on with others, or without.
    shard_base: str = flag(
        "0",
        help="processes that share one copy of the base, each with a part of it; True: all of a machine; 0: each has "
        "a copy of its own",
        group="machine",
        metavar="N|True",
        resume="free",
        expert=True,
    )

    def __post_init__(self):
        words = {"true": "True", "false": "0", "none": "0", "": "0"}
        self.shard_base = words.get(self.shard_base.lower(), self.shard_base)
        if self.shard_base != "True":
            if not (self.shard_base.isascii() and self.shard_base.isdecimal()) or len(self.shard_base) > 6:
                raise ValueError(
                    f"--shard_base {self.shard_base:.40}: give the number of processes that share a copy of the base, "
                    "True for all of a machine, or 0"
                )
            # "08" and "8" are one number to whoever compares commands.
            self.shard_base = str(int(self.shard_base))

        # Quantised weights lose their scales where FSDP2 takes them apart.
        if self.shard_base != "0" and getattr(self, "load_in_4bit", False):
            raise ValueError(
                "--shard_base and --load_in_4bit cannot be combined: a base of 70B in 4 bits fits one card of 80 GB, "
                "so give one of them"
            )
        if self.shard_base != "0" and getattr(self, "deepspeed", None):
            raise ValueError("--shard_base and --deepspeed both spread the base over processes: give one of them")
        super().__post_init__()


@dataclass(kw_only=True)
class DecodeFlags(Flags):
    """How a base in shards decodes."""

    # A layer that is gathered moves all its weights for every token.
    decode: str = flag(
        "auto",
        help="with --shard_base: sample on the shards where they lie (auto, if the heads divide by the processes), or "
        "over gathered layers, to the bytes of a run without shards",
        group="sampling",
        choices=["auto", "gathered"],
        expert=True,
    )


def processes_a_copy(shard_base: str) -> int:
    """Processes that share one copy of the base, by --shard_base; 0 where each has its own.

    Raises: ValueError where that number does not divide the processes of this run.
    """
    launch = read_launch()
    count = launch.local_size if shard_base == "True" else int(shard_base)
    if count and launch.size % count:
        raise ValueError(
            f"--shard_base {shard_base}: {count} processes a copy do not divide the {launch.size} of this run "
            "(--nproc starts more)"
        )
    return count
