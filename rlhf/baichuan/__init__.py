"""Native Baichuan for today's transformers; importing this package registers it with the Auto classes.

A registered local class wins over the checkpoint's `auto_map` whatever `trust_remote_code` says, so a directory in the
hub's shape loads with our code and none of its own is ever executed.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from rlhf.baichuan.configuration import BaichuanConfig
from rlhf.baichuan.modeling import BaichuanForCausalLM, BaichuanForSequenceClassification, BaichuanModel
from rlhf.baichuan.tokenization import BaiChuanTokenizer, BaichuanTokenizer

AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BaichuanConfig, BaichuanForSequenceClassification, exist_ok=True)
# A tokenizer is looked up by the class name in tokenizer_config.json: "BaiChuanTokenizer" in the first model,
# "BaichuanTokenizer" in the second; under an unknown name transformers silently builds a generic one with other ids.
# By name only: `AutoTokenizer.register` would also tie it to the config, and transformers 5 then runs the checkpoint's
# own tokenizer file when trust_remote_code is True.
for tokenizer in (BaiChuanTokenizer, BaichuanTokenizer):
    REGISTERED_TOKENIZER_CLASSES[tokenizer.__name__] = tokenizer

__all__ = [
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanForSequenceClassification",
    "BaichuanModel",
    "BaichuanTokenizer",
]
