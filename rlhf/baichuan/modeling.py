"""Baichuan as Llama with one packed projection `W_pack` [3 * hidden, hidden] in place of q, k and v.

Everything but the attention is transformers' own Llama, so caches, padding, attention backends and gradient
checkpointing behave as they do there. `W_pack` is kept whole: adapters trained on it load as they are, and one LoRA
pair does the work of three.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import linear, normalize
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple

from rlhf.baichuan.configuration import BaichuanConfig


class BaichuanAttention(LlamaAttention):
    """Llama's attention whose queries, keys and values are the three thirds of one projection."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        # They would be three matrices that no checkpoint has weights for.
        del self.q_proj, self.k_proj, self.v_proj
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `hidden_states` [B, L, hidden] and the cache; returns ([B, L, hidden], attention weights)."""
        shape = hidden_states.shape[:-1]
        # [B, L, 3, heads, head_dim] into three of [B, heads, L, head_dim]. Taken apart before they are transposed, or
        # their gradients would be put together in one order and copied into another.
        thirds = self.W_pack(hidden_states).view(*shape, 3, -1, self.head_dim).unbind(2)
        query, key, value = (third.transpose(1, 2) for third in thirds)
        # A key goes into the cache with its position in it, and is not turned again.
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # Looked up at every call: `enable_packing` changes the name on a loaded model.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        # PyTorch's attention drops entries whenever it is told to, in eval() too.
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class BaichuanPreTrainedModel(LlamaPreTrainedModel):
    """Common part of the Baichuan classes: their config; the rotary table of old checkpoints is computed."""

    config: BaichuanConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list] = [r"rotary_emb\.inv_freq"]


class BaichuanModel(BaichuanPreTrainedModel, LlamaModel):
    """The decoder: Llama's, its layers' attention replaced."""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        # transformers' layers make Llama's attention by name, so it is replaced afterwards.
        for index, layer in enumerate(self.layers):
            layer.self_attn = BaichuanAttention(config, index)
        self.post_init()


class NormHead(nn.Linear):
    """Output head with rows of unit length (Baichuan2).

    A frozen head is normalised once when it is loaded; one in training has to be normalised at every forward.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A frozen head has unit rows since `from_pretrained`; to normalise it here would copy it for every token.
        weight = unit_rows(self.weight) if self.weight.requires_grad else self.weight
        return linear(hidden_states, weight)


def unit_rows(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [rows, columns] with every row scaled to length 1, measured in float32 and returned in its dtype."""
    # Thousands of squares, summed up in half precision, would make the lengths too rough.
    return normalize(weight.float(), dim=-1).to(weight.dtype)


class BaichuanForCausalLM(BaichuanPreTrainedModel, LlamaForCausalLM):
    """Language model over `BaichuanModel`; its head is a `NormHead` where the config says so."""

    def __init__(self, config: BaichuanConfig):
        # Llama's own constructor would build a LlamaModel only to throw it away.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        head = NormHead if config.norm_head else nn.Linear
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Tie weights as transformers does; a `NormHead` comes back normalised and frozen."""
        # With `output_loading_info` this is a pair, the model and a report.
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.norm_head:
            head = model.lm_head.requires_grad_(False)
            # Frozen by the line above, or autograd would refuse to have it written in place.
            head.weight.copy_(unit_rows(head.weight))
        return loaded


class BaichuanForSequenceClassification(BaichuanPreTrainedModel):
    """Scores whole sequences with `score`, a linear head on the last real token's state (a reward model)."""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BaichuanModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        """Score every sequence at its last real token, found by the mask and never by comparing ids with the pad id.

            logits = score(hidden[arange(B), last]),  last = the rightmost column where attention_mask is not 0

        Args:
            input_ids: [B, L] long, padded on either side (or `inputs_embeds` [B, L, hidden]).
            attention_mask: [B, L], nonzero on real tokens; None says that all of them are real.
            labels: [B]; when given the output carries the loss of `config.problem_type`.
        Returns:
            `logits` [B, num_labels]; of a row without any real token they mean nothing.
        """
        # 1. The last hidden state of every token.
        outputs = self.model(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden = outputs.last_hidden_state
        # Without a mask every token is real.
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)

        # 2. The score at the last real token, where the product is largest: the column, or 0 on padding.
        columns = torch.arange(attention_mask.shape[-1], device=hidden.device)
        last = (columns * (attention_mask != 0).to(hidden.device)).argmax(-1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        # 3. The reward stage makes its own loss of the scores; this one is for other callers, as transformers has it.
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
