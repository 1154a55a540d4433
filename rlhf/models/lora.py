"""LoRA on a model: which modules get an adapter, stored adapters put on a shared base or trained further."""

import copy
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.damage import refuse_nonfinite, refused
from rlhf.artefacts.foreign import MERGE_IT, PATTERN_SECONDS, refuse_unshareable
from rlhf.artefacts.time_limits import within_seconds
from rlhf.models.linear import fuse_adapters

# Every linear layer of the decoder blocks, as --lora_target_models has it.
# Dettmers et al. 2023 (arXiv:2305.14314, section 4) found adapters on all of them to come close to full fine-tuning.
ALL_LINEAR = "all-linear"


# ---- new adapters ----
def lora_targets(model: PreTrainedModel, spec: str | None) -> list[str] | str:
    """Modules that get an adapter, as peft's target_modules.

    Args:
        spec: names as 'a|b'; "all-linear", every linear layer of the decoder blocks (of the attention in a mixture of
            experts); a regular expression for whole module names; None for W_pack on Baichuan (as the tutorial has it)
            and "all-linear" on any other model.
    Raises: ValueError naming a module that the model does not have.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if spec is None:
        spec = "W_pack" if any(name.endswith(".W_pack") for name in linear) else ALL_LINEAR
    if spec == ALL_LINEAR:
        return _linear_in_blocks(model, linear)

    # A dot could also be a regular expression's. Names are meant: they match the end of a module's name, an expression
    # has to match the whole.
    pieces = [piece.strip() for piece in spec.replace(",", "|").split("|")]
    wanted = [piece for piece in pieces if piece]
    present = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if all(re.fullmatch(r"[\w.]+", piece) for piece in wanted):
        # With the dot in front: proj is no match for q_proj, and attn.q_proj is one for layers.0.attn.q_proj.
        missing = [piece for piece in wanted if not any(f".{name}".endswith(f".{piece}") for name in linear)]
        if missing or not wanted:
            raise ValueError(f"--lora_target_models {spec}: no module {missing} in this model; it has {present}")
        return wanted

    # peft matches an expression with the whole name of a module.
    try:
        with within_seconds(PATTERN_SECONDS, computing=True):
            matches = any(re.fullmatch(spec, name) for name in linear)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"--lora_target_models {spec} is no regular expression ({error})") from None
    except TimeoutError:
        raise ValueError(f"--lora_target_models {spec} takes for ever on the name of a module: name them") from None
    if not matches:
        raise ValueError(f"--lora_target_models {spec} matches no linear layer; there is {linear[0]}, for one")
    return spec


def _linear_in_blocks(model: PreTrainedModel, linear: list[str]) -> list[str]:
    """Last names of the linear layers in the decoder blocks; the output layer and a score head stand outside them."""
    count = model.config.get_text_config().num_hidden_layers
    blocks = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # The outermost list of that length: a block may hold lists of its own.
    inside = [name for name in linear if blocks and name.startswith(blocks[0])]
    # Experts are fused tensors, and peft takes the names of their former layers for them: a mixture is adapted in its
    # attention.
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        inside = [name for name in inside if "attn" in name or "attention" in name]
    # peft matches a name at its end, so that one last name stands for the layer in every block.
    names = sorted({name.rsplit(".", 1)[-1] for name in inside})
    if not names:
        raise ValueError("--lora_target_models all-linear: no decoder blocks were recognised: name the modules")
    return names


def lora_config(args, model: PreTrainedModel, task_type: str | None, dropout: float = 0.0) -> LoraConfig:
    """The shape of a new adapter as the flags of `LoraArguments` say.

    Raises: ValueError for a rank above the base's width.
    """
    width = model.config.get_text_config().hidden_size
    # There the adapter has more parameters than the matrix that it stands in for.
    if args.lora_rank > width:
        raise ValueError(f"--lora_rank {args.lora_rank} is more than the base's width of {width}")
    return LoraConfig(
        task_type=task_type,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=dropout,
        use_rslora=args.use_rslora,
        target_modules=lora_targets(model, args.lora_target_models),
        # GPT-2's Conv1D holds its weight transposed; peft would set this itself, with a warning.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def new_adapter(args, model: PreTrainedModel, task_type: str) -> PeftModel:
    """The model with a new adapter as the flags of `LoraArguments` say, to be trained."""
    return for_training(get_peft_model(model, lora_config(args, model, task_type, args.lora_dropout)))


def for_training(model: PeftModel) -> PeftModel:
    """The model, whose adapted layers compute in fewer passes where they will run on a GPU."""
    # On a CPU peft's own order of operations stays, and with it every byte of a seed's run.
    if torch.cuda.is_available():
        fuse_adapters(model)
    return model


# ---- stored adapters ----
def refuse_misfit(stored: dict[str, Tensor], wanted: dict[str, Tensor], owner: str) -> None:
    """Refuse an adapter whose tensors are not those that this base takes.

    Args:
        stored, wanted: name -> tensor, of the file and of the model. owner: named in the message.
    Raises: ValueError naming the first tensor that is missing, left over or of another shape.
    """
    for name in sorted(stored.keys() | wanted.keys()):
        theirs, ours = (tuple(tensors[name].shape) if name in tensors else None for tensors in (stored, wanted))
        if theirs != ours:
            raise ValueError(f"{owner} does not fit this base: {name} is {theirs}, not {ours}")


def lora_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA weights among the tensors of an adapter: not a score head, not a saved module."""
    return {name: tensor for name, tensor in weights.items() if "lora_" in name}


def add_lora(model, adapter_dir: str | Path, name: str, trainable: bool) -> tuple[PeftModel, dict[str, Tensor]]:
    """Put the LoRA weights of a stored adapter on `model` (bare base or PeftModel) under `name`.

    A reward adapter goes onto the language model like any other: its task type is dropped and its score head returned,
    because peft would lose the head there without a word.

    Returns: the PeftModel, and the stored tensors that are no LoRA weights (name -> tensor): a score head at most.
    Raises: ValueError where keys or shapes do not fit this base, or where a shared base cannot carry the adapter.
    """
    config, weights = read_adapter(adapter_dir)
    refuse_unshareable(config, weights, f"adapter {adapter_dir}")
    refuse_nonfinite(weights, f"adapter {adapter_dir}")
    return put_lora(model, config, weights, name, trainable, f"adapter {adapter_dir}")


def put_lora(
    model, config: LoraConfig, weights: dict[str, Tensor], name: str, trainable: bool, owner: str
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Put an adapter that is in memory on `model`; see `add_lora`. `owner`: named in messages."""
    config = copy.deepcopy(config)
    # The stored weights replace whatever it would begin with.
    config.init_lora_weights = True
    config.task_type = None
    # The score head is no module of a shared base: the caller reads it by `score_head_of`.
    config.modules_to_save = None
    # With a dropout two passes over the same tokens would differ, and with them ratio and KL.
    config.inference_mode = not trainable
    config.lora_dropout = 0.0
    lora = lora_weights(weights)

    with refused(f"{owner} on this base"):
        # Wrapped once: a second wrapper would name the modules within its own way, and stored names would no longer
        # fit.
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, adapter_name=name)

    # Without the embeddings, which peft adds where an adapter is on one of them.
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    refuse_misfit(lora, wanted, owner)
    set_peft_model_state_dict(model, lora, adapter_name=name)
    rest = {key: tensor for key, tensor in weights.items() if "lora_" not in key}
    return model, _own_modules(rest, model, owner)


def _own_modules(rest: dict[str, Tensor], model: PeftModel, owner: str) -> dict[str, Tensor]:
    """What an adapter holds beside LoRA weights, without copies of the base's own (peft may save an embedding).

    Raises: ValueError for a module that differs from the base's: a shared base cannot play both.
    """
    base = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    own = {}
    for name, tensor in rest.items():
        # peft saves an embedding that it adapts under the name it has inside the adapter.
        ours = base.get(name.replace(".base_layer", ""))
        if ours is None:
            own[name] = tensor
        elif ours.shape != tensor.shape or not torch.equal(ours.detach().cpu(), tensor.to(ours.dtype).cpu()):
            module = name.removeprefix("base_model.model.")
            shapes = f"{list(tensor.shape)}, not the base's {list(ours.shape)}"
            raise ValueError(f"{owner} holds a {module} of its own ({shapes}): {MERGE_IT}")
    return own


def score_head_of(rest: dict[str, Tensor], reward_dir: str | Path) -> nn.Linear:
    """The frozen fp32 score head [hidden] -> [1] among the tensors of a reward adapter that are no LoRA weights.

    Raises: ValueError where there is none.
    """
    heads = [tensor for tensor in rest.values() if tensor.dim() == 2 and tensor.shape[0] == 1]
    other = next((file.name for file in sorted(Path(reward_dir).glob("value_head.*"))), None)
    if not heads and other:
        raise ValueError(
            f"reward adapter {reward_dir} keeps its head in {other}, as LLaMA-Factory does: copy v_head.summary.weight"
            " from there into adapter_model.safetensors as base_model.model.score.weight (its bias moves all scores "
            "alike), or train it with reward_modeling.py"
        )
    if len(heads) != 1:
        raise ValueError(f"reward adapter {reward_dir} has no score head: was it written by reward_modeling.py?")
    head = nn.Linear(heads[0].shape[1], 1, bias=False).requires_grad_(False)
    head.weight.copy_(heads[0])
    return head


def continue_adapter(model, adapter_dir: str) -> PeftModel:
    """A stored adapter on `model`, trainable. Raises: ValueError where its tensors do not fit, naming the first."""
    config, weights = read_adapter(adapter_dir)
    refuse_unshareable(config, weights, f"--previous_lora_weights {adapter_dir}")
    config.init_lora_weights = True
    # An adapter of PPO names no task (see `add_lora`): the one that is saved again says what it is for.
    config.task_type = "CAUSAL_LM"
    config.inference_mode = False
    with refused(f"--previous_lora_weights {adapter_dir} on this base"):
        model = get_peft_model(model, config)

    refuse_misfit(weights, get_peft_model_state_dict(model), f"--previous_lora_weights {adapter_dir}")
    set_peft_model_state_dict(model, weights)
    return for_training(model)
