"""The roles of PPO on one base (policy, reference, reward model, judge, critic), and what each makes of a rollout."""

import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.damage import refused
from rlhf.artefacts.files import follow_umask, load_tensors, refuse_written
from rlhf.models.forward import backbone_of, enable_packing, forked_rng, forward, hidden_at, pack, scatter_by_mask
from rlhf.models.generation import Rollout, Sampling
from rlhf.models.linear import fuse_linears
from rlhf.models.loading import disable_dropout, load_base
from rlhf.models.lora import add_lora, lora_config, score_head_of
from rlhf.models.rollouts import by_length
from rlhf.models.scoring import score
from rlhf.ppo import selective_logprobs

VALUE_HEAD_FILE = "value_head.safetensors"

# Where a PPO directory keeps the adapter of a critic that has its own (--value_lora).
VALUE_ADAPTER_DIR = "value_adapter"


class Roles:
    """The roles of PPO on one set of base weights, each an adapter of the model.

    `use(role)` makes "policy", "reference", "reward" (further ones "reward_2" ...), "judge" or "value" the active
    adapter and always returns to the policy. Only the policy, and a critic's own adapter while it is active, take
    gradients; backward belongs inside the block, because an adapter that is not active gets none. A merged reference
    is a separate model beside this one.
    """

    def __init__(
        self, model: PeftModel, value_head: nn.Linear | None, score_heads: dict[str, nn.Linear], reference=None
    ):
        """Take the loaded models as they are (`load_roles`); `value_head` is None where advantages need no critic."""
        self.peft_model = model
        self.value_head = value_head
        self.score_heads = score_heads
        # peft replaces layers inside the base, so that the base itself computes with whatever adapter is active.
        self.model = model.get_base_model()
        self.separate_reference = reference
        self.value_adapter = "value" in model.peft_config
        self._activate("policy")

    def _activate(self, role: str) -> None:
        # Without inference_mode PEFT would make every adapter that it activates trainable.
        frozen = role not in ("policy", "value")
        self.peft_model.base_model.set_adapter(role, inference_mode=frozen)

    @contextmanager
    def use(self, role: str):
        """Yield the causal LM that plays `role` within the block; afterwards, even on error, the policy is active."""
        if role == "reference" and self.separate_reference is not None:
            yield self.separate_reference
            return
        # Without an SFT adapter the bare base is the reference.
        is_bare = role == "reference" and role not in self.peft_model.peft_config
        if role != "policy" and not is_bare:
            self._activate(role)
        try:
            with self.peft_model.disable_adapter() if is_bare else nullcontext():
                yield self.model
        finally:
            if role != "policy":
                self._activate("policy")

    def scores(self, input_ids: Tensor, attention_mask: Tensor, role: str = "reward") -> Tensor:
        """[B] float32: the score of each row by the reward model or, as role "judge", by the held-out one."""
        head = self.score_heads[role]
        with self.use(role) as model, torch.no_grad():
            return score(backbone_of(model), head, input_ids, attention_mask)

    def values(self, hidden: Tensor) -> Tensor:
        """[...] float32: the critic's estimate at each hidden state [..., H]; 0 without a critic."""
        if self.value_head is None:
            return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
        # The head is float32 on any base.
        return self.value_head(hidden.float()).squeeze(-1)

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """Name -> LoRA parameter of one role."""
        # Names go on with ".weight" after the role, except for LoRA on an embedding.
        own = re.compile(rf"\.lora_\w+\.{role}(\.|$)")
        return {name: p for name, p in self.peft_model.named_parameters() if own.search(name)}

    def critic(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of the value head and of the critic's own adapter, where there are such."""
        # The order is that of the optimizer's state in a checkpoint.
        parameters = self.adapter("value") if self.value_adapter else {}
        if self.value_head is not None:
            parameters |= self.value_head.named_parameters(prefix="value_head")
        return parameters

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that PPO trains: the policy adapter and the critic."""
        return self.adapter("policy") | self.critic()

    def enable_checkpointing(self) -> None:
        """Recompute activations in backward, in train() only; the reentrant kind would silently lose gradients."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> None:
        """train() lets gradient checkpointing work in the update; dropout is off in either mode."""
        self.model.train(mode)


def load_roles(
    base_dir,
    sft_dir,
    reward_dir,
    *,
    dtype,
    device,
    new_adapter=None,
    merged_sft_dir=None,
    policy_dir=None,
    judge_dir=None,
    more_rewards: dict | None = None,
    critic: str | None = "head",
    four_bit: bool = False,
    mesh=None,
) -> Roles:
    """Load the base once and put the SFT adapter (as policy and as reference) and the reward adapter on it.

    Args:
        sft_dir: None starts the policy as a fresh adapter (`new_adapter`: its flags, its seed). reward_dir: or None.
        merged_sft_dir: a merged model that plays the reference instead of the SFT adapter.
        policy_dir: a PPO directory whose policy and critic go on; by default SFT and a value head of zeros.
        judge_dir: a second reward adapter, for a judge that PPO does not train against.
        more_rewards: role -> directory of the further reward adapters of an ensemble.
        critic: "head" on the policy's hidden states, "adapter" for one with an adapter of its own (which starts as
            the reward model, as in Ouyang et al. 2022, arXiv:2203.02155), or None.
        four_bit: hold the base in 4 bits (and a merged reference as well). mesh: hold both in shards over it.
    Raises: ValueError where an adapter does not fit the base or the reward adapter has no score head.
    """
    # 1. The base, and on it the adapters of the roles.
    base = load_base(base_dir, dtype, device=device, four_bit=four_bit, mesh=mesh)
    # A policy that goes on comes from its checkpoint, and the reference from the SFT directory all the same.
    if policy_dir or sft_dir:
        model, _ = add_lora(base, policy_dir or sft_dir, "policy", trainable=True)
    else:
        # Seeded, so that every process begins with the same adapter, and a second run too.
        with forked_rng():
            torch.manual_seed(new_adapter.seed)
            model = PeftModel(base, lora_config(new_adapter, base, None), adapter_name="policy")
    if sft_dir and merged_sft_dir is None:
        add_lora(model, sft_dir, "reference", trainable=False)
    score_heads = _add_scorers(model, device, reward=reward_dir, **(more_rewards or {}), judge=judge_dir)

    # 2. The critic, where advantages need one.
    if critic == "adapter":
        critic_dir = Path(policy_dir) / VALUE_ADAPTER_DIR if policy_dir else reward_dir
        add_lora(model, critic_dir, "value", trainable=True)
    value_head = None
    if critic is not None:
        value_head = _value_head(base.config.get_text_config().hidden_size, policy_dir).to(device)

    # 3. A merged reference, a second model beside the base.
    reference = None
    if merged_sft_dir is not None:
        reference = load_base(merged_sft_dir, dtype, device=device, four_bit=four_bit, mesh=mesh)
        reference.eval().requires_grad_(False)

    # 4. Both models compute in fewer passes from here on: fused linear layers, packed rows.
    fuse_linears(model.get_base_model())
    for each in (model.get_base_model(), reference):
        if each is not None:
            enable_packing(backbone_of(each))

    # Dropout would make the recorded log-probabilities differ from those scored afterwards.
    roles = Roles(model, value_head, score_heads, reference)
    disable_dropout(roles.model)
    return roles


def _add_scorers(model: PeftModel, device, **folders) -> dict[str, nn.Linear]:
    """Put the adapters of `folders` (role -> directory, None: left out) on the model; returns role -> score head."""
    score_heads = {}
    for role, folder in folders.items():
        if folder is not None:
            # A score head is among the rest, as it is no LoRA weight.
            _, rest = add_lora(model, folder, role, trainable=False)
            score_heads[role] = score_head_of(rest, folder).to(device)
    return score_heads


def _value_head(hidden_size: int, policy_dir: str | Path | None) -> nn.Linear:
    """The fp32 value head [hidden] -> [1]: of a PPO directory, or zeros."""
    head = nn.Linear(hidden_size, 1)
    if policy_dir is not None:
        file = Path(policy_dir) / VALUE_HEAD_FILE
        with refused(str(file)):
            head.load_state_dict(load_tensors(file))
        return head

    # Random values would be noise in the first advantages.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def save_critic(roles: Roles, output_dir: str | Path) -> None:
    """Write value_head.safetensors (fp32 weight [1, hidden] and bias [1]) and the critic's own adapter, if any."""
    if roles.value_head is None:
        return

    tensors = {name: p.detach().cpu().contiguous() for name, p in roles.value_head.state_dict().items()}
    save_file(tensors, Path(output_dir) / VALUE_HEAD_FILE)
    refuse_written(Path(output_dir) / VALUE_HEAD_FILE, "the value head")
    follow_umask(Path(output_dir) / VALUE_HEAD_FILE)
    if roles.value_adapter:
        # In a folder of its own, because the policy's adapter is at the root.
        save_adapter(roles.peft_model, Path(output_dir) / VALUE_ADAPTER_DIR, "value")


def response_logprobs(model: PreTrainedModel, rollout: Rollout, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses under `model` and the same processors as at sampling, and the hidden states.

    Returns: [B, T] float32, nats (0 on padding; gradients flow), and hidden [N, H], one before each real token.
    """
    packed = pack(backbone_of(model), rollout.input_ids, rollout.attention_mask)
    # Logits only where a response token is predicted: over a whole batch they would be the largest tensor there is.
    places = packed.index(*rollout.predictors())
    logits, hidden = forward(model, places, **packed.inputs, use_cache=False)

    # Some processors depend on a token's place in its response.
    _, t = rollout.mask.nonzero(as_tuple=True)
    processed = sampling.process(logits, t)
    logprobs = selective_logprobs(processed, rollout.response_ids[rollout.mask])
    return scatter_by_mask(logprobs, rollout.mask), hidden


def response_hidden(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[N, H]: the hidden state before each real response token, without any logits; gradients flow."""
    backbone = backbone_of(model)
    packed = pack(backbone, rollout.input_ids, rollout.attention_mask)
    return hidden_at(backbone, packed, *rollout.predictors())


@torch.no_grad()
def critic_values(roles: Roles, rollout: Rollout, rows_at_once: int) -> Tensor:
    """[B, T] float32, 0 on padding: values by a critic that has an adapter of its own."""
    values = torch.zeros_like(rollout.logprobs)
    with roles.use("value") as model:
        for rows in by_length(rollout, rows_at_once):
            part = rollout.rows(rows)
            hidden = response_hidden(model, part)
            # `part` is as wide as its longest response, the rollout as wide as the longest of all.
            width = part.mask.shape[1]
            values[rows, :width] = scatter_by_mask(roles.values(hidden), part.mask)
    return values


@torch.no_grad()
def role_logprobs(
    roles: Roles, role: str, rollout: Rollout, sampling: Sampling, rows_at_once: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses under a role, and the value head's estimates from its hidden states.

    Returns: [B, T] float32 each, 0 on padding.
    """
    # Each row comes back in its own place, whatever batch it was in.
    logprobs = torch.zeros_like(rollout.logprobs)
    values = torch.zeros_like(rollout.values)
    with roles.use(role) as model:
        for rows in by_length(rollout, rows_at_once):
            part = rollout.rows(rows)
            width = part.mask.shape[1]
            part_logprobs, hidden = response_logprobs(model, part, sampling)
            logprobs[rows, :width] = part_logprobs
            values[rows, :width] = scatter_by_mask(roles.values(hidden), part.mask)
    return logprobs, values
