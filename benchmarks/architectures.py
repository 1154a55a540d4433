"""Which architectures go through all stages: a tiny random model of each, trained, merged and compared; one table.

    python -m benchmarks.architectures       prints the table, and writes it into docs/running.md in both languages

"yes" is more than no error: log-probabilities, values and scores of the roles equal those of a plain transformers
forward of the unpadded row, to 1e-5.
"""

import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import compare
import merge_lora
import reward_modeling
import rl_training
import sft_training
from rlhf.baichuan import BaichuanConfig
from rlhf.data.batches import collate_prompts
from rlhf.data.choose_format import text_format
from rlhf.models.decoding import supports_static_cache
from rlhf.models.forward import backbone_of
from rlhf.models.generation import Sampling, generate
from rlhf.models.kernels import BY_ROW
from rlhf.models.loading import read_config, score_model_class
from rlhf.rl.roles import load_roles, role_logprobs
from rlhf.run.launch import silence_libraries

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("SFT", "reward", "PPO", "merge", "compare")
COLUMNS = ("architecture", *STAGES, "rows", "cache")
TOLERANCE = 1e-5
# Words of the data, tokens of the tokenizer, and those that stand for no text.
WORDS = 50
PIECES = 300
CONTROL = ["<pad>", "<s>", "</s>"]
TEMPLATE = "{prompt} t9"

SMALL = {
    "vocab_size": PIECES + 12,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
TWO_KEYS = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Model type, and settings beside SMALL.
ARCHITECTURES = {
    "Baichuan": ("baichuan", {}),
    "Llama (GQA)": ("llama", TWO_KEYS),
    "Llama (tied)": ("llama", {"tie_word_embeddings": True}),
    "Qwen2": ("qwen2", TWO_KEYS),
    "Qwen3": ("qwen3", TWO_KEYS | {"head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", TWO_KEYS | EXPERTS | {"head_dim": 8, "output_router_logits": True}),
    "Qwen3.5 (linear attention)": (
        "qwen3_5_text",
        TWO_KEYS
        | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "Mistral": ("mistral", TWO_KEYS | {"sliding_window": None}),
    "Mixtral": ("mixtral", TWO_KEYS | {"num_local_experts": 4, "output_router_logits": True}),
    "Gemma 2": ("gemma2", TWO_KEYS | {"head_dim": 8, "sliding_window": 64}),
    "Gemma 3 (text)": ("gemma3_text", TWO_KEYS | {"head_dim": 8, "sliding_window": 64}),
    "Phi-3": ("phi3", {}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": ("falcon", {}),
    "StableLM": ("stablelm", TWO_KEYS),
    "Cohere": ("cohere", TWO_KEYS),
    "OLMo 2": ("olmo2", {}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
        | {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "GLM-4": ("glm4", TWO_KEYS | {"head_dim": 8}),
    "Mamba": ("mamba", {"state_size": 4}),
    "T5": ("t5", {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}),
}


# ---- a tiny base ----
def write_base(kind: str, settings: dict, folder: Path) -> str:
    """Save a random model of this kind with a small tokenizer; returns the directory."""
    settings = SMALL | settings
    config = BaichuanConfig(**settings) if kind == "baichuan" else AutoConfig.for_model(kind, **settings)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)

    # Byte-level BPE, as which transformers reads the tokenizer of any of these kinds.
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator([f" t{number}" for number in range(WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- through the scripts ----
def run(script, **flags) -> None:
    """A script in this process, in silence."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script.main(script.parse_args(words))


def stages(base: str, folder: Path) -> dict:
    """Stage -> the script and its flags, in their order."""
    data = folder / "data.jsonl"
    rows = [f'{{"prompt": "t{n} t{n + 1}", "chosen": "t{n + 2} t3", "rejected": "t4"}}\n' for n in range(10, 40)]
    data.write_text("".join(rows), encoding="utf-8")
    trainer = {"model_name": base, "dataset_name": data, "max_steps": 2, "eval_size": 2, "prompt_template": TEMPLATE}
    trainer |= {"max_length": 64, "lora_dropout": 0, "learning_rate": 1e-2, "save_steps": 0, "eval_steps": 0}
    more = {"answer_field": "chosen", "sample_max_new_tokens": 0}
    ppo = {"base_model_name": base, "dataset_name": data, "prompt_template": TEMPLATE, "steps": 8, "batch_size": 8}
    ppo |= {"mini_batch_size": 4, "output_max_length": 12, "max_prompt_length": 32, "reward_transform": "raw"}
    ppo |= {"sft_model_lora_path": folder / "sft", "reward_model_lora_path": folder / "reward"}
    merge = {"base_model_name": base, "lora_path": folder / "ppo", "dtype": "float32"}
    table = {"base_model_name": base, "adapters": [f"sft={folder / 'sft'}", f"ppo={folder / 'ppo'}"]}
    table |= {"reward_model_lora_path": folder / "reward", "prompts": ["t5 t6", "t7"], "max_new_tokens": 8}
    return {
        "SFT": (sft_training, trainer | more | {"output_dir": folder / "sft"}),
        "reward": (reward_modeling, trainer | {"audit_prompts": 4, "output_dir": folder / "reward"}),
        "PPO": (rl_training, ppo | {"learning_rate": 1e-2, "output_dir": folder / "ppo"}),
        "merge": (merge_lora, merge | {"output_dir": folder / "merged"}),
        "compare": (compare, table | {"output_dir": folder / "table"}),
    }


def try_architecture(name: str, folder: Path) -> dict[str, str]:
    """The row of the table for one architecture, by column; the sentence of a refusal stands under "refused"."""
    kind, settings = ARCHITECTURES[name]
    base = write_base(kind, settings, folder / "base")
    row = {"architecture": name}

    for stage, (script, flags) in stages(base, folder).items():
        try:
            run(script, **flags)
        # What is no ValueError is a defect of this project, and ends the benchmark.
        except ValueError as error:
            return row | dict.fromkeys(COLUMNS[1:], "no") | {"refused": str(error).replace(base, "the base")}
        row[stage] = "yes"

    distance, row["rows"], row["cache"] = compare_with_plain(base, folder)
    if not distance <= TOLERANCE:
        raise ValueError(f"{name}: {distance:.2g} from a plain forward of the unpadded row")
    return row


# ---- proof ----
@torch.no_grad()
def compare_with_plain(base: str, folder: Path) -> tuple[float, str, str]:
    """Largest difference between the roles and plain transformers, row by row without padding.

    Returns: the difference of log-probabilities, values and scores; how rows are computed; which cache decodes.
    """
    roles = load_roles(
        base, folder / "sft", folder / "reward", dtype=torch.float32, device="cpu", policy_dir=folder / "ppo"
    )
    roles.train(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    form = text_format(tokenizer, TEMPLATE)
    queries = [form.query_ids([("user", said)]) for said in ("t5", "t6 t7 t8 t10", "t11 t12")]
    batch = collate_prompts(queries, form.pad_id)
    sampling = Sampling(form.stop_ids, form.pad_id, 12)
    generator = torch.Generator().manual_seed(0)
    rollout = generate(roles.model, roles.values, batch["input_ids"], batch["attention_mask"], sampling, generator)

    policy = PeftModel.from_pretrained(load_plain(base), folder / "ppo").eval().get_base_model()
    scorer = score_model_class(read_config(base)).from_pretrained(base, num_labels=1, dtype=torch.float32)
    scorer = PeftModel.from_pretrained(scorer, folder / "reward").eval()
    logprobs, values = role_logprobs(roles, "policy", rollout, sampling, 3)
    scores = roles.scores(rollout.input_ids, rollout.attention_mask)

    worst = 0.0
    for number, query in enumerate(queries):
        answer = rollout.response_ids[number][rollout.mask[number]]
        ids = torch.cat([torch.tensor(query), answer])[None]
        logits = sampling.process(policy(ids).logits[0, len(query) - 1 : -1], torch.arange(len(answer)))
        plain = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        hidden = backbone_of(policy)(ids).last_hidden_state[0, len(query) - 1 : -1]
        ours = logprobs[number][rollout.mask[number]]
        worst = max(worst, (ours - plain).abs().max().item())
        worst = max(worst, (rollout.logprobs[number][rollout.mask[number]] - plain).abs().max().item())
        worst = max(worst, (values[number][rollout.mask[number]] - roles.values(hidden)).abs().max().item())
        worst = max(worst, (scores[number] - scorer(ids).logits[0, 0]).abs().item())

    packed = "packed" if backbone_of(roles.model).config._attn_implementation == BY_ROW else "padded"
    return worst, packed, "static" if supports_static_cache(roles.model) else "growing"


def load_plain(base: str):
    """The base as transformers loads it, without anything of this project."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


# ---- the table ----
def table(rows: list[dict[str, str]]) -> str:
    """The table in Markdown, the refusals below it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows]
    refused = [f'- {row["architecture"]}: "{row["refused"]}"' for row in rows if "refused" in row]
    return "\n".join([*lines, "", *refused])


def write_table(page: Path, text: str) -> None:
    """Put the table between its marks in a page of the documents."""
    begin = "<!-- architectures -->\n"
    end = "<!-- end of architectures -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    """Try every architecture and write the table."""
    silence_libraries()
    rows = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_architecture(name, Path(folder)))
        print("  ".join(rows[-1].values()), flush=True)
    for page in (ROOT / "docs" / "running.md", ROOT / "docs" / "zh" / "running.md"):
        write_table(page, table(rows))


if __name__ == "__main__":
    main()
