"""One base model and the roles that share it: policy, reference, reward model and value head."""

import copy
import os
import re
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

import rlhf.baichuan  # noqa: F401 (registers the native Baichuan with the Auto classes)
from rlhf.artefacts import read_adapter, save_adapter
from rlhf.disk import load_tensors
from rlhf.kernels import fuse_norms
from rlhf.linear import fuse_linears
from rlhf.rows import feed_forward_at, take_rows_side_by_side
from rlhf.scoring import score

VALUE_HEAD_FILE = "value_head.safetensors"
# Where a PPO directory keeps the adapter of a critic that has its own (--value_lora).
VALUE_ADAPTER_DIR = "value_adapter"


# ---- loading ----
def pick_dtype(bf16: bool) -> torch.dtype:
    """Dtype of the base weights: bfloat16 where asked and possible, float16 on a card without, float32 on a CPU."""
    if not bf16 or not torch.cuda.is_available():
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    warnings.warn("this card has no bfloat16: using float16 instead", stacklevel=2)
    return torch.float16


def load_base(
    model_dir: str, dtype: torch.dtype, head: str = "causal", device=None, four_bit: bool = False
) -> PreTrainedModel:
    """The base with a language model head ("causal") or a one-number score head ("score"), in an explicit dtype.

    transformers obeys the checkpoint's own dtype (often float16) unless told otherwise. In 4 bits are the matrices of
    the layers alone; heads, embeddings and norms stay as they are, and nothing is cast to float32 for training.
    """
    auto, extra = {
        "causal": (AutoModelForCausalLM, {}),
        "score": (AutoModelForSequenceClassification, {"num_labels": 1}),
    }[head]
    if four_bit:
        extra |= _in_four_bits(dtype, device)
        device = None
    model, loaded = auto.from_pretrained(model_dir, dtype=dtype, output_loading_info=True, **extra)
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith(("score.", "classifier.")))
    if missing:
        raise ValueError(f"{model_dir} lacks weights of its model, {missing[0]} for one: is the download complete?")
    model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes repacks a matrix at its first use in eval(); from then on it passes no gradient.
            module.support_avx512bf16_for_cpu = False
    model = model if device is None else model.to(device)
    fuse_norms(model)
    return model


def _in_four_bits(dtype: torch.dtype, device) -> dict:
    """Arguments of `from_pretrained` for NF4 with double quantisation, on `device` or this process's own."""
    if device is None:
        device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def lora_targets(model: nn.Module, spec: str | None) -> list[str]:
    """Names of the modules that get an adapter: 'a|b' split, or the attention projections of this architecture.

    Raises: ValueError naming a module that the model does not have.
    """
    present = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if spec is None:
        usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
        found = ["W_pack"] if "W_pack" in present else list(usual)
        if not found:
            raise ValueError(f"give --lora_target_models for {model.config.model_type}: some of {sorted(present)}")
        return found
    wanted = [name.strip() for name in spec.replace(",", "|").split("|") if name.strip()]
    missing = [name for name in wanted if name not in present]
    if missing or not wanted:
        raise ValueError(f"--lora_target_models {spec}: no module {missing} in this model; it has {sorted(present)}")
    return wanted


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that train() and eval() give the same log-probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def add_lora(model, adapter_dir: str | Path, name: str, trainable: bool) -> tuple[PeftModel, dict[str, Tensor]]:
    """Put the LoRA weights of a stored adapter on `model` (bare base or PeftModel) under `name`.

    A reward adapter goes onto the language model like any other: its task type is dropped and its score head returned,
    because peft would lose the head there without a word.

    Returns: the PeftModel, and the stored tensors that are no LoRA weights (name -> tensor).
    Raises: ValueError where keys or shapes do not fit this base.
    """
    config, weights = read_adapter(adapter_dir)
    config = copy.deepcopy(config)
    config.task_type, config.modules_to_save, config.inference_mode = None, None, not trainable
    config.lora_dropout = 0.0
    lora = {key: tensor for key, tensor in weights.items() if "lora_" in key}
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, adapter_name=name)
    except ValueError as error:
        raise ValueError(f"adapter {adapter_dir} does not fit this base: {error}") from error
    wanted = get_peft_model_state_dict(model, adapter_name=name)
    for key in sorted(wanted.keys() | lora.keys()):
        theirs, ours = lora.get(key), wanted.get(key)
        if theirs is None or ours is None or theirs.shape != ours.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (theirs, ours)]
            raise ValueError(f"adapter {adapter_dir} does not fit this base: {key} is {shapes[0]}, not {shapes[1]}")
    set_peft_model_state_dict(model, lora, adapter_name=name)
    return model, {key: tensor for key, tensor in weights.items() if "lora_" not in key}


# ---- running ----
def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head, whatever the architecture calls it."""
    return getattr(model, model.base_model_prefix)


def forward(model: PreTrainedModel, pick, input_ids: Tensor, **inputs) -> tuple[Tensor, Tensor]:
    """Logits and the hidden states they were made from, at chosen places only: [B, L, V] is never built.

    The places are chosen where hidden states enter the output layer, so models that scale or cap logits stay right,
    and any architecture will do.

    Args:
        model: a causal language model (adapters inside are whatever is active). pick: index into [B, L].
        input_ids: [B, L]. inputs: more arguments of the model (mask, positions, cache).
    Returns: logits [*, V] and hidden [*, H], `*` the shape of [B, L][pick], both in the model's dtype.
    """
    caught = []

    def choose(module, args):
        caught.append(args[0][pick])
        return tuple(caught)

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        with feed_forward_at(backbone_of(model), pick) if input_ids.shape[1] > 1 else nullcontext():
            logits = model(input_ids=input_ids, **inputs).logits
    finally:
        hook.remove()
    return logits, caught[0]


class Roles:
    """The four roles of PPO on one set of base weights.

    `use(role)` makes "policy", "reference", "reward", "judge" or "value" the active adapter and always returns to the
    policy. Only the policy, and a critic's own adapter while it is active, take gradients; backward belongs inside the
    block, because an adapter that is not active gets none. A separate merged reference model stands beside it.
    """

    def __init__(
        self, model: PeftModel, value_head: nn.Linear | None, score_heads: dict[str, nn.Linear], reference=None
    ):
        """`value_head` is None where advantages need no critic."""
        self.peft_model, self.value_head, self.score_heads = model, value_head, score_heads
        self.model = model.get_base_model()
        fuse_linears(self.model)
        self.separate_reference = reference
        for each in (self.model, reference):
            if each is not None:
                take_rows_side_by_side(backbone_of(each))
        self.value_adapter = "value" in model.peft_config
        self._activate("policy")

    def _activate(self, role: str) -> None:
        self.peft_model.base_model.set_adapter(role, inference_mode=role not in ("policy", "value"))

    @contextmanager
    def use(self, role: str):
        """The causal LM it gives plays `role` within the block; afterwards, even on error, the policy is active."""
        if role == "reference" and self.separate_reference is not None:
            yield self.separate_reference
            return
        if role != "policy":
            self._activate(role)
        try:
            yield self.model
        finally:
            if role != "policy":
                self._activate("policy")

    def scores(self, input_ids: Tensor, attention_mask: Tensor, role: str = "reward") -> Tensor:
        """[B] float32: the score of each row by the reward model or, as role "judge", by the held-out one."""
        with self.use(role) as model, torch.no_grad():
            return score(backbone_of(model), self.score_heads[role], input_ids, attention_mask)

    def values(self, hidden: Tensor) -> Tensor:
        """[...] float32: the critic's estimate at each hidden state [..., H]; 0 without a critic."""
        if self.value_head is None:
            return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
        return self.value_head(hidden.float()).squeeze(-1)

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """Name -> LoRA parameter of one role."""
        own = re.compile(rf"\.lora_\w+\.{role}(\.|$)")
        return {name: p for name, p in self.peft_model.named_parameters() if own.search(name)}

    def critic(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of the value head and of the critic's own adapter, where there are such."""
        head = {} if self.value_head is None else dict(self.value_head.named_parameters(prefix="value_head"))
        return (self.adapter("value") if self.value_adapter else {}) | head

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that PPO trains: the policy adapter and the critic."""
        return self.adapter("policy") | self.critic()

    def enable_checkpointing(self) -> None:
        """Recompute activations in backward, in train() only; the reentrant kind would silently lose gradients."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> None:
        """train() lets gradient checkpointing work in the update; dropout is off in either mode."""
        self.model.train(mode)


def score_head_of(rest: dict[str, Tensor], reward_dir: str | Path) -> nn.Linear:
    """The frozen fp32 score head [hidden] -> [1] among the tensors of a reward adapter that are no LoRA weights.

    Raises: ValueError where there is none.
    """
    heads = [tensor for tensor in rest.values() if tensor.dim() == 2 and tensor.shape[0] == 1]
    if len(heads) != 1:
        raise ValueError(f"reward adapter {reward_dir} has no score head: was it written by reward_modeling.py?")
    head = nn.Linear(heads[0].shape[1], 1, bias=False).requires_grad_(False)
    head.weight.copy_(heads[0])
    return head


def load_roles(
    base_dir,
    sft_dir,
    reward_dir,
    *,
    dtype,
    device,
    merged_sft_dir=None,
    policy_dir=None,
    judge_dir=None,
    critic: str | None = "head",
    four_bit: bool = False,
) -> Roles:
    """Load the base once and put the SFT adapter (as policy and as reference) and the reward adapter on it.

    Args:
        merged_sft_dir: a merged model that plays the reference instead of the SFT adapter.
        policy_dir: a PPO directory whose policy and critic go on; by default SFT and a value head of zeros.
        judge_dir: a second reward adapter, for a judge that PPO does not train against.
        critic: "head" on the policy's hidden states, "adapter" for one with an adapter of its own (which starts as
            the reward model, as in Ouyang et al. 2022, arXiv:2203.02155), or None.
        four_bit: hold the base in 4 bits (and a merged reference as well).
    Raises: ValueError where an adapter does not fit the base or the reward adapter has no score head.
    """
    base = load_base(base_dir, dtype, device=device, four_bit=four_bit)
    model, _ = add_lora(base, policy_dir or sft_dir, "policy", trainable=True)
    if merged_sft_dir is None:
        add_lora(model, sft_dir, "reference", trainable=False)
    score_heads = {}
    for role, folder in (("reward", reward_dir), ("judge", judge_dir)):
        if folder is not None:
            _, rest = add_lora(model, folder, role, trainable=False)
            score_heads[role] = score_head_of(rest, folder).to(device)
    if critic == "adapter":
        add_lora(model, Path(policy_dir) / VALUE_ADAPTER_DIR if policy_dir else reward_dir, "value", trainable=True)
    value_head = None if critic is None else _value_head(score_heads["reward"].in_features, policy_dir).to(device)
    reference = None
    if merged_sft_dir is not None:
        reference = load_base(merged_sft_dir, dtype, device=device, four_bit=four_bit).eval().requires_grad_(False)
    roles = Roles(model, value_head, score_heads, reference)
    disable_dropout(roles.model)
    return roles


def _value_head(hidden_size: int, policy_dir: str | Path | None) -> nn.Linear:
    """The fp32 value head [hidden] -> [1]: of a PPO directory, or zeros."""
    head = nn.Linear(hidden_size, 1)
    if policy_dir is not None:
        head.load_state_dict(load_tensors(Path(policy_dir) / VALUE_HEAD_FILE))
        return head
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def save_critic(roles: Roles, output_dir: str | Path) -> None:
    """Write value_head.safetensors (fp32 weight [1, hidden] and bias [1]) and the critic's own adapter, if any."""
    if roles.value_head is None:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in roles.value_head.state_dict().items()}
    save_file(tensors, Path(output_dir) / VALUE_HEAD_FILE)
    if roles.value_adapter:
        save_adapter(roles.peft_model, Path(output_dir) / VALUE_ADAPTER_DIR, "value")
