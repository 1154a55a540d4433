"""Weighted sums of adapters of one base, as one adapter: the sum of their terms exactly, not of their factors.

    A = [w_1 s_1 A_1; w_2 s_2 A_2; ...],  B = [B_1, B_2, ...],  so that  B A = sum of w_i s_i B_i A_i,  s = alpha / r

A layer that an adapter leaves alone has zeros in its place. peft's own `add_weighted_adapter` with "cat" gives the
same where all adapters are plain; with rsLoRA, with layers chosen one by one and for a single adapter it gives another
sum, and it needs the base in memory.

Source: Ramé et al. 2024, arXiv:2401.12187 (reward models) and arXiv:2406.16768 (policies).
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from rlhf.artefacts import adapters, files, foreign, run_json
from rlhf.artefacts.damage import refuse_nonfinite
from rlhf.artefacts.factors import FACTORS, INSIDE_PEFT, layers_of, scaling
from rlhf.artefacts.fingerprints import parent_entry

# Largest difference from the weighted sum, as a part of the largest change of a weight: float32 leaves 1e-7.
BOUND = 1e-5

# Of the first adapter's run.json, what is true of their sum as well.
KEPT = ("base", "tokenizer", "prompt_template", "prompt_format", "special_ids")

# What a tokenizer's directory holds, whichever kind it is.
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One adapter of a sum: its weight, its directory, and what is stored there."""

    weight: float
    path: str
    config: LoraConfig
    tensors: dict[str, Tensor]


# ---- reading ----
def read_terms(parts: list[tuple[float, str]], flag: str) -> list[Term]:
    """Read (weight, directory) pairs; `flag` is named in messages.

    Raises: ValueError or FileNotFoundError for an adapter that is missing, damaged, or no plain LoRA.
    """
    terms = []
    for weight, path in parts:
        config, tensors = adapters.read_adapter(path)
        owner = f"{flag} {path}"
        foreign.refuse_unshareable(config, tensors, owner)
        refuse_nonfinite(tensors, owner)
        # Its magnitudes divide by a norm of the summed weights: no sum of two adapters is one.
        if config.use_dora:
            raise ValueError(f"{owner} is a DoRA adapter: a sum of them is none; merge it with merge_lora.py instead")
        if not layers_of(tensors):
            raise ValueError(f"{owner} holds no LoRA weights: there is nothing to sum")
        terms.append(Term(weight, path, config, tensors))
    _refuse_other_shapes(terms, flag)
    return terms


def _refuse_other_shapes(terms: list[Term], flag: str) -> None:
    """Raises: ValueError naming the first layer that two adapters have in different sizes."""
    first: dict[str, tuple] = {}
    for term in terms:
        for layer, (a, b) in layers_of(term.tensors).items():
            # The outer sizes alone: ranks may differ, and are stacked.
            size = (a.shape[1], b.shape[0])
            if first.setdefault(layer, size) != size:
                raise ValueError(
                    f"{flag} {term.path} was trained on another base than {terms[0].path}: {layer} is {size} there, "
                    f"not {first[layer]}"
                )


def refuse_unlike(paths: list[str], flag: str) -> dict | None:
    """Refuse adapters of different bases, formats or tasks; returns the first run.json, None where there is none.

    Raises: ValueError naming what differs.
    """
    runs = [run for path in paths if (run := run_json.load_run(path)) is not None]
    if not runs:
        return None
    # SFT and PPO adapters have the same task and may be mixed; a reward adapter has a head and may not.
    first = runs[0]
    stages = ("reward",) if first["stage"] == "reward" else ("sft", "ppo")
    for path in paths:
        run = adapters.check_adapter(
            path, stage=stages, base=first["base"], prompt_format=first.get("prompt_format"), flag=flag
        )
        if run is not None and run.get("tokenizer") != first.get("tokenizer"):
            raise ValueError(f"{flag} {path} was trained with another tokenizer than {paths[0]}")
    return first


# ---- the sum ----
def weighted_sum(terms: list[Term]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and float32 tensors of the one adapter that is the weighted sum of others; score heads are summed too.

    Raises: ValueError where one of them holds a head and another does not.
    """
    # 1. One rank for all layers: the sum of the adapters' largest.
    layers = [layers_of(term.tensors) for term in terms]
    ranks = [max((a.shape[0] for a, _ in own.values()), default=0) for own in layers]
    # A layer of smaller rank gets rows of zeros, which add nothing: peft would need a rank_pattern for anything else.
    rank = sum(ranks)
    names = sorted(set().union(*layers))

    # 2. Factors stacked, zeros up to the rank where an adapter has none.
    tensors = {}
    for name in names:
        stacked_a = []
        stacked_b = []
        for term, own in zip(terms, layers, strict=True):
            if name in own:
                a, b = own[name]
                # Weight and scale go into A alone: in both factors they would count twice.
                stacked_a.append(a.float() * (term.weight * scaling(term.config, name, a.shape[0])))
                stacked_b.append(b.float())
        a = torch.cat(stacked_a)
        b = torch.cat(stacked_b, dim=1)
        # At the end of both factors, where the zeros of one meet those of the other.
        missing = rank - a.shape[0]
        first, second = _endings(name, terms)
        tensors[name + first] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[name + second] = torch.nn.functional.pad(b, (0, missing)).contiguous()

    # 3. Alpha equal to the rank: the scale is in A already.
    config = dataclasses.replace(
        terms[0].config, r=rank, lora_alpha=rank, target_modules=_targets(terms, names), rank_pattern={},
        alpha_pattern={}, use_rslora=False, init_lora_weights=True, exclude_modules=None, layers_to_transform=None,
        layers_pattern=None,
    )  # fmt: skip
    return config, tensors | _heads(terms)


def _endings(layer: str, terms: list[Term]) -> tuple[str, str]:
    """The names that peft gives the two factors of a layer."""
    linear, embedding = FACTORS
    return linear if any(layer + linear[0] in term.tensors for term in terms) else embedding


def _targets(terms: list[Term], layers: list[str]) -> list[str]:
    """target_modules of the sum: the adapters' own short names, or every layer in full where those would not do."""
    configs = [term.config for term in terms]
    # Short names match in every layer; where an adapter is on some layers only, each has to be named in full.
    plain = all(
        isinstance(config.target_modules, list | set)
        and config.layers_to_transform is None
        and not config.exclude_modules
        for config in configs
    )
    if plain:
        return sorted(set().union(*(config.target_modules for config in configs)))
    return [layer.removeprefix(INSIDE_PEFT) for layer in layers]


def _heads(terms: list[Term]) -> dict[str, Tensor]:
    """The weighted sum of the score heads, the only other weights that an adapter may hold here."""
    rest = [{name: one for name, one in term.tensors.items() if "lora_" not in name} for term in terms]
    heads = {}
    for name in sorted(set().union(*rest)):
        for term, own in zip(terms, rest, strict=True):
            if name not in own or own[name].dim() != 2 or own[name].shape[0] != 1:
                raise ValueError(
                    f"{term.path}: {name} stands in some of the adapters or is no score head: only LoRA weights and "
                    "score heads can be summed"
                )
        # A head is linear in the states, but the states of summed adapters are no sums: the sum of heads is Ramé's, by
        # weights.
        heads[name] = sum(term.weight * own[name].float() for term, own in zip(terms, rest, strict=True))
    return heads


def difference(terms: list[Term], tensors: dict[str, Tensor]) -> tuple[float, float]:
    """Largest difference of the stacked adapter to the weighted sum of the terms, and the largest change of a weight.

    Both are of entries of B A over all layers, in float64.
    """
    largest = 0.0
    worst = 0.0
    for layer, (a, b) in layers_of(tensors).items():
        # In float64, so that what is measured is the rounding of the file and not that of the check.
        wanted = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
        for term in terms:
            factors = _factors(term.tensors, layer)
            if factors:
                scale = term.weight * scaling(term.config, layer, factors[0].shape[0])
                wanted += scale * (factors[1].double() @ factors[0].double())
        worst = max(worst, (b.double() @ a.double() - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    return worst, largest


def _factors(tensors: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """The factors of one layer, None where the adapter leaves it alone."""
    for first, second in FACTORS:
        if layer + first in tensors:
            return tensors[layer + first], tensors[layer + second]
    return None


# ---- writing ----
def write_sum(folder: Path, config: LoraConfig, tensors: dict[str, Tensor], first: str) -> None:
    """Write a sum as plain peft reads it, with the tokenizer that lies beside the first adapter."""
    save_file(tensors, folder / files.ADAPTER_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    # peft keeps lists as sets, whose order changes from run to run.
    file = folder / "adapter_config.json"
    files.write_json(file, adapters.sorted_lists(files.read_object(file)))
    for name in TOKENIZER_FILES:
        if (Path(first) / name).is_file():
            shutil.copyfile(Path(first) / name, folder / name)


def write_run(folder: Path, first: dict, arguments: dict, paths: list[str], metrics: dict) -> None:
    """Write run.json of a sum: base, tokenizer and format of the first adapter, all of them as parents.

    Args:
        first: run.json of the first adapter that has one. arguments: of this command. paths: the adapters.
    """
    # With a PPO adapter among them the sum is one too: it goes wherever a policy may.
    stages = [run["stage"] for path in paths if (run := run_json.load_run(path)) is not None]
    # A later stage looks there for a tokenizer of the training's own.
    arguments |= {"tokenizer_name": first["arguments"].get("tokenizer_name")}
    # What the terms agree in was checked before.
    kept = {name: first[name] for name in KEPT if name in first}
    run = {
        "stage": "ppo" if "ppo" in stages else first["stage"],
        "arguments": arguments,
        **kept,
        "data": {},
        "parents": {f"adapter {place}": parent_entry(path) for place, path in enumerate(paths, 1)},
        "metrics": metrics,
        "versions": run_json.library_versions(),
    }
    files.write_json(folder / "run.json", run)
