"""Packages that only some flags need, and their files: looked at before anything loads (requirements-optional.txt)."""

import json
from importlib.util import find_spec
from pathlib import Path

# Flag -> the package it needs, in the version that was tried.
NEEDED = {"load_in_4bit": ("bitsandbytes", "0.50.2"), "deepspeed": ("deepspeed", "0.19.8")}


def require_optional(args) -> None:
    """Raises: ValueError in one sentence, with the command that helps, where a flag's package is not installed."""
    for flag, (package, version) in NEEDED.items():
        if getattr(args, flag, None) and find_spec(package) is None:
            raise ValueError(
                f"--{flag} {getattr(args, flag)} needs the package {package}, which is not installed: "
                f"pip install {package}=={version}"
            )
    if getattr(args, "deepspeed", None):
        check_deepspeed(args.deepspeed)


def check_deepspeed(file: str) -> None:
    """Refuse a DeepSpeed configuration that cannot be read, or under which checkpoints would hold empty adapters.

    Raises: FileNotFoundError, ValueError.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"--deepspeed {file} does not exist: give a JSON file such as scripts/deepspeed/zero2.json"
        )
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed {file} is not JSON: {error}") from error
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) > 2 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"--deepspeed {file} asks for ZeRO stage 3, under which checkpoints would hold empty adapters: set "
            "stage3_gather_16bit_weights_on_model_save to true, as scripts/deepspeed/zero3.json does"
        )
