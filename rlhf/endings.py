"""The last lines of a stage: what it made, how good that is in one number, and the command that goes on from it."""

import dataclasses
import shlex

from rlhf.data.template import AUTO, CHAT, DEFAULT_TEMPLATE
from rlhf.run.launch import say

# Flags that the stages of one model have in common: what was given to one is given to the next.
CARRIED = (
    "lora_target_models", "tokenizer_name", "prompt_template", "chat_template", "chat_template_kwargs",
    "system_prompt", "bos", "stop_tokens", "load_in_4bit", "gradient_checkpointing", "shard_base",
)  # fmt: skip

# Scripts that have these flags; compare.py and merge_lora.py read them from the adapter.
TRAINING = ("reward_modeling.py", "rl_training.py")


def say_end(made: str, quality: str | None, args, script: str, **flags: str | list[str] | None) -> None:
    """Print the last lines of a stage.

    Args:
        made: what lies where. quality: how good it is, None where nothing was measured.
        args: the stage's flags. script: the next one. flags: of the next command; None leaves one out.
    """
    say(made + (f": {quality}" if quality else ""), f"next: {next_command(args, script, **flags)}")


def next_command(args, script: str, **flags: str | list[str] | None) -> str:
    """The command of a stage that goes on from this one, with the flags that both must agree in."""
    words = ["python", script]
    # The other scripts read these settings from the adapter's run.json.
    carried = _carried(args) if script in TRAINING else {}
    for name, value in (flags | carried).items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _carried(args) -> dict:
    """Name -> value of the flags in CARRIED that are not at their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    given = {name: getattr(args, name) for name in CARRIED if name in defaults}
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    # What `auto` came to, it will come to again.
    if changed.get("prompt_template") in (AUTO, CHAT, DEFAULT_TEMPLATE):
        del changed["prompt_template"]
    return changed
