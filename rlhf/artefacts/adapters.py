"""Adapters on disk: saved at the directory's root, read without running code, refused where they do not fit."""

import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from rlhf.artefacts.damage import refuse_types, refused
from rlhf.artefacts.files import (
    ADAPTER_FILE,
    TOKEN,
    follow_umask,
    load_tensors,
    nearest,
    read_object,
    readable_when_full,
    refuse_written,
    write_json,
)
from rlhf.artefacts.fingerprints import same_base, same_parent, tokenizer_fingerprint
from rlhf.artefacts.foreign import other_layout
from rlhf.artefacts.run_json import load_run


# ---- writing ----
def save_adapter(
    model: PeftModel, output_dir: str | Path, adapter_name: str = "default", state_dict: dict | None = None
) -> None:
    """Save one adapter at the root of `output_dir`, whatever its name in memory; lists in its config are sorted.

    `state_dict` replaces the model's own weights, where this process holds only a piece of them.

    With another name than "default" peft puts an adapter into a subfolder. Every artefact here is at its
    directory's root, so that plain `PeftModel.from_pretrained(base, output_dir)` finds it.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    # In a folder of its own first: peft writes in place, and a reader could find half a file.
    with (
        tempfile.TemporaryDirectory(dir=output_dir, prefix=f".adapter.{TOKEN}") as scratch,
        readable_when_full(Path(scratch), "the adapter"),
    ):
        model.save_pretrained(
            scratch, selected_adapters=[adapter_name], save_embedding_layers=False, state_dict=state_dict
        )
        saved = Path(scratch)
        if adapter_name != "default":
            saved = saved / adapter_name

        # Whatever asked for it: an adapter that is no number is never published.
        refuse_written(saved / ADAPTER_FILE, "the adapter")
        follow_umask(saved / ADAPTER_FILE)
        config = sorted_lists(json.loads((saved / "adapter_config.json").read_text(encoding="utf-8")))
        # The weights first, because a folder counts as an adapter from its config on.
        os.replace(saved / ADAPTER_FILE, output_dir / ADAPTER_FILE)
        write_json(output_dir / "adapter_config.json", config)


def sorted_lists(config: dict) -> dict:
    """Return a config with its lists of words sorted: peft keeps them as sets, whose order changes from run to run."""
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    return config


# ---- reading and checking ----
# What an adapter_config.json holds, of the fields that decide what is computed. None stands for a default.
NONE = type(None)
CONFIG_KINDS = {
    "peft_type": str, "task_type": (str, NONE), "r": int, "lora_alpha": float, "lora_dropout": float, "bias": str,
    "target_modules": (str, list, NONE), "exclude_modules": (str, list, NONE), "modules_to_save": (list, NONE),
    "layers_to_transform": (int, list, NONE), "layers_pattern": (str, list, NONE), "rank_pattern": (dict, NONE),
    "alpha_pattern": (dict, NONE), "fan_in_fan_out": bool, "use_rslora": bool, "use_dora": bool,
    "inference_mode": bool, "init_lora_weights": (bool, str),
}  # fmt: skip

# Lists of numbers, or of pairs of them; all others are of words.
NUMBERED = ("layers_to_transform", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")


def _refuse_strange_config(file: Path) -> None:
    """Raises: ValueError naming the field of an adapter_config.json that no adapter could have been saved with."""
    content = refuse_types(read_object(file), file, CONFIG_KINDS)
    for name, value in content.items():
        if isinstance(value, list) and name not in NUMBERED:
            words = {f"{name} {number}": word for number, word in enumerate(value)}
            refuse_types(words, file, dict.fromkeys(words, str))
        # Settings of a way to initialise, or of another library.
        if name.endswith("_config"):
            refuse_types(content, file, {name: (dict, NONE)})
        if name.endswith("_pattern") and isinstance(value, dict):
            kind = int if name == "rank_pattern" else float
            named = {f"{name}: {key}": number for key, number in value.items()}
            refuse_types(named, file, dict.fromkeys(named, kind))


def read_adapter(adapter_dir: str | Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Config and weights of an adapter; an old .bin is read with weights_only=True, so no pickle code runs."""
    folder = Path(adapter_dir)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no adapter directory: it has no adapter_config.json{other_layout(folder)}"
        )

    # peft takes whatever stands there, and fails much later.
    file = folder / "adapter_config.json"
    _refuse_strange_config(file)
    with refused(f"{folder}/adapter_config.json"):
        config = PeftConfig.from_pretrained(str(folder))

    # Where both are there, the one that can hold no code counts.
    for name in (ADAPTER_FILE, "adapter_model.bin"):
        if (folder / name).is_file():
            return config, load_tensors(folder / name)
    raise FileNotFoundError(f"{folder} has an adapter_config.json but no {ADAPTER_FILE}")


def check_adapter(
    adapter_dir, *, stage: str | tuple, base: dict, tokenizer=None, prompt_format: dict | None = None, flag="adapter"
):
    """Refuse an adapter of another stage, base, tokenizer or prompt format, naming the field that differs.

    Args:
        stage: the stage (or stages) whose adapter is wanted here. base: of `base_fingerprint`.
        tokenizer, prompt_format (`PromptFormat.record`): of this run; None leaves the comparison out.
        flag: named in messages.
    Returns: its run.json, or None (with a warning) for an adapter that was trained elsewhere.
    """
    # Most likely a path with a mistake in it.
    if not (Path(adapter_dir) / "adapter_config.json").is_file():
        place = Path(adapter_dir)
        hint = other_layout(place) if place.exists() else nearest(str(adapter_dir))
        raise FileNotFoundError(f"{flag} {adapter_dir} is no adapter directory: it has no adapter_config.json{hint}")

    # Without run.json there is nothing to compare by, and loading still refuses tensors of other shapes.
    run = load_run(adapter_dir)
    if run is None:
        warnings.warn(
            f"{flag} {adapter_dir} has no run.json: trained elsewhere, only its keys and shapes are checked",
            stacklevel=2,
        )
        return None

    # A reward adapter has the shapes of an SFT one, so only the stage tells them apart.
    stages = (stage,) if isinstance(stage, str) else stage
    if run.get("stage") not in stages:
        wanted = " or ".join(stages)
        raise ValueError(f"{flag} {adapter_dir} is of stage '{run.get('stage')}', but {wanted} is wanted here")

    # An adapter of another base, tokenizer or format would run here without an error, and answer nonsense.
    their_base = run.get("base", {})
    compared = [(f"base {name}", *values) for name, values in same_base(their_base, base).items()]
    if tokenizer is not None:
        compared.append(("tokenizer", run.get("tokenizer"), tokenizer_fingerprint(tokenizer)))
    if prompt_format is not None:
        compared += _format_fields(run, prompt_format)

    # The base comes first: with another one, the tokenizer often differs for the same reason.
    for name, theirs, ours in compared:
        if theirs != ours:
            raise ValueError(f"{flag} {adapter_dir} was trained with another {name}: {theirs!r} there, {ours!r} here")
    return run


def _format_fields(run: dict, ours: dict) -> list[tuple]:
    """(name, theirs, ours) of everything that a prompt format consists of."""
    theirs = run.get("prompt_format")
    names = ["prompt_template", "chat_template_kwargs", "system_prompt", "bos", "stop_tokens"]
    if theirs is None:
        # Before formats were recorded there were text templates only, without BOS, and EOS alone ended an answer.
        theirs = {"prompt_template": run.get("prompt_template"), "system_prompt": None, "bos": False}
        names = ["prompt_template", "system_prompt", "bos"]

    fields = [(name, theirs.get(name), ours[name]) for name in names]
    # Two chat templates are told apart by their hashes: the texts are pages long.
    if "sha256" in theirs and ours["prompt_template"] == "chat":
        fields.insert(1, ("chat template (its sha256)", theirs["sha256"], ours["sha256"]))
    return fields


def check_merged(model_dir: str | Path, *, base: dict, sft_dir: str | Path, flag: str) -> None:
    """Refuse a merged model that merge_lora.py made from another base or adapter; one made elsewhere passes."""
    run = load_run(model_dir)
    if run is None or run.get("stage") != "merge":
        return

    for name, (theirs, _) in same_base(run["base"], base).items():
        raise ValueError(f"{flag} {model_dir} was merged into another base: {name} is {theirs!r}")

    # By content, not by path: an SFT adapter that has been trained again is another one.
    parent = run["parents"].get("adapter", {})
    if not parent or not same_parent(parent, sft_dir):
        raise ValueError(
            f"{flag} {model_dir} was merged from {parent.get('path', 'no adapter at all')}, not from {sft_dir} as it "
            "is now: the KL would be measured from another model; merge again, or leave the flag out"
        )


def check_saved(model: PeftModel, output_dir: str) -> None:
    """Compare the file with the model in memory, the score head above all, which peft can lose without a word.

    Raises: ValueError naming the tensor that is missing or differs.
    """
    # Read back from the file: what the model has in memory proves nothing about it.
    saved = load_file(Path(output_dir) / ADAPTER_FILE)
    # The trained tensors under the names that peft gives them in a file.
    expected = get_peft_model_state_dict(model)
    # Asked by itself: if peft lost the head, `expected` would lack it as well.
    if not any(name.endswith("score.weight") for name in saved):
        raise ValueError(f"{output_dir}/{ADAPTER_FILE} was written without the score head")

    for name, tensor in expected.items():
        if name not in saved or not torch.equal(saved[name], tensor.detach().cpu()):
            raise ValueError(f"{output_dir}/{ADAPTER_FILE} does not hold {name} as it was trained")
