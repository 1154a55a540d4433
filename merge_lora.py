"""Merge an adapter into its base: a standalone model that needs no peft, and in Llama format no code of ours either.

In:  a base model, and an adapter of any stage (a reward adapter gives a sequence classification model, head included).
Out: <output_dir>: safetensors, config, tokenizer, run.json. Nothing is written unless the result proves equal.

    W  <-  W + (alpha / r) * B @ A,   and with --format llama   [W_q; W_k; W_v] = W_pack

    python merge_lora.py --base_model_name baichuan-inc/baichuan-7B --lora_path runs/sft --output_dir merged/sft
    python merge_lora.py --adapter_only True --lora_path runs/sft --output_dir merged/sft_qkv   # LoRA for q, k, v
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from rlhf.artefacts import adapters, files, output_dir, run_json
from rlhf.baichuan import to_fast_tokenizer, to_llama
from rlhf.data import encoding
from rlhf.flags import flag, parse
from rlhf.models import loading
from rlhf.run import launch

# Largest distance of the saved model from base + adapter. In float32: the difference of any one logit. In half
# precision, where merging rounds every weight once more: root mean square of the difference over that of the logits
# (0.008 to 0.023 in bfloat16 and 0.001 to 0.003 in float16 on random models of 2 to 32 layers).
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclass(kw_only=True)
class ScriptArguments:
    """Flags of merge_lora.py."""

    base_model_name: str | None = flag(
        None, help="base: directory or hub id", aliases=["--model_name", "--model_path"]
    )
    lora_path: str | None = flag(None, help="adapter to merge; without it the base alone is converted to --format")
    output_dir: str = flag(help="new or empty directory for the result")
    format: str | None = flag(
        None, help="llama: plain Llama without custom code; by default the base's own", choices=["baichuan", "llama"]
    )
    dtype: str = flag("bfloat16", help="dtype of the merged weights", choices=list(BOUNDS))
    adapter_only: bool = flag(False, help="write the W_pack adapter as a q_proj/k_proj/v_proj one; merge nothing")

    def __post_init__(self):
        if self.adapter_only and not self.lora_path:
            raise ValueError("--adapter_only True needs --lora_path, the adapter to convert")
        if not self.adapter_only and not self.base_model_name:
            raise ValueError("--base_model_name is missing: give the model the adapter was trained on")
        if not self.lora_path and not self.format:
            raise ValueError(
                "nothing to do: give --lora_path to merge an adapter, or --format llama to convert the base"
            )


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Parse and check the command line (values, not paths)."""
    return parse(ScriptArguments, argv, __doc__)


def check_format(base_dir: str, wanted: str | None) -> bool:
    """Return True if the weights must be turned into Llama's. Raises: ValueError where the base has no such format."""
    kind = AutoConfig.from_pretrained(base_dir).model_type
    if wanted not in (None, kind) and kind != "baichuan":
        raise ValueError(f"--format {wanted} does not fit a {kind} base: leave it out to keep the base's own format")
    return kind == "baichuan" and wanted == "llama"


# ---- merging ----
def merge(base_dir: str, lora_path: str | None, dtype: str, device: str):
    """The base with the adapter in its weights.

    Returns: the model on `device`, and what base + adapter, not merged, give on the probe (float32).
    """
    reward = lora_path is not None and adapters.read_adapter(lora_path)[0].task_type == "SEQ_CLS"
    head = "score" if reward else "causal"
    model = loading.load_base(base_dir, getattr(torch, dtype), head=head, device=device).eval()
    model.config.use_cache = True
    # A new score head is random, but it is replaced by the adapter's below.
    loading.refuse_nonfinite(model.state_dict(), f"base {base_dir}")
    if lora_path is None:
        return model, probe(model)

    wrapped, rest = loading.add_lora(model, lora_path, "default", trainable=False)
    for name, tensor in rest.items():
        with torch.no_grad():
            model.get_parameter(name.removeprefix("base_model.model.")).copy_(tensor)
    expected = probe(wrapped.eval())
    return wrapped.merge_and_unload(safe_merge=True), expected


def convert_adapter(args: ScriptArguments, target: Path) -> None:
    """Write the adapter for q, k and v in place of W_pack: for a base that was converted by --format llama."""
    config, weights = adapters.read_adapter(args.lora_path)
    loading.refuse_nonfinite(weights, f"adapter {args.lora_path}")
    config, weights = to_llama.split_adapter(config, weights)
    # The base it was trained on has no q_proj: the one it now fits is the Llama-format copy, if given.
    config.base_model_name_or_path = args.base_model_name
    with output_dir.staged(target) as folder:
        save_file(weights, folder / files.ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    print(f"adapter for q_proj, k_proj and v_proj written to {target}", flush=True)


def merge_into(args: ScriptArguments, target: Path) -> None:
    """Merge, save beside the target, load what was saved, compare, and only then move it into place."""
    base_dir = loading.resolve_model(args.base_model_name, "--base_model_name")
    # 1. Refuse what cannot be merged, before any model is loaded.
    llama = check_format(base_dir, args.format)
    fingerprint = run_json.base_fingerprint(base_dir)
    run = None
    tokenizer = encoding.read_tokenizer(base_dir)
    if args.lora_path is not None:
        loading.refuse_nonfinite(adapters.read_adapter(args.lora_path)[1], f"adapter {args.lora_path}")
        stages = ("sft", "reward", "ppo")
        run = adapters.check_adapter(args.lora_path, stage=stages, base=fingerprint, flag="--lora_path")

    # 2. Merge in memory.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, expected = merge(base_dir, args.lora_path, args.dtype, device)

    # 3. Save, and load what was saved: only that proves the files right.
    with output_dir.staged(target) as folder:
        merged = to_llama.to_llama(model) if llama else model
        merged.save_pretrained(folder)
        head = "score" if hasattr(model, "score") else "causal"
        # Only one model at a time has to fit.
        del model, merged
        if llama:
            to_fast_tokenizer.save_tokenizer(tokenizer, folder)
        else:
            tokenizer.save_pretrained(folder)
        saved = loading.load_base(str(folder), getattr(torch, args.dtype), head=head, device=device).eval()
        distance = check_parity(expected, probe(saved), args.dtype)
        run_json.write_run(
            folder, stage="merge", args=args, base=fingerprint, tokenizer=tokenizer,
            template=run and run["prompt_template"], metrics={"distance": distance, "bound": BOUNDS[args.dtype]},
            parents={"adapter": args.lora_path} if args.lora_path else {},
        )  # fmt: skip
    print(f"{target}: {distance:.2g} from base + adapter (bound {BOUNDS[args.dtype]} in {args.dtype})", flush=True)


# ---- proof ----
@torch.no_grad()
def probe(model) -> Tensor:
    """Logits, or scores, on 8 rows of 24 fixed token ids: float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (8, 24), generator=generator).to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()


def check_parity(expected: Tensor, found: Tensor, dtype: str) -> float:
    """Distance of the saved model from base + adapter, in the unit of BOUNDS. Raises: ValueError past the bound."""
    difference = found - expected
    if dtype == "float32":
        distance = difference.abs().max().item()
    else:
        distance = (difference.pow(2).mean() / expected.pow(2).mean()).sqrt().item()
    # Written so that NaN, which compares false with everything, is refused too.
    if not distance <= BOUNDS[dtype]:
        raise ValueError(
            f"the merged model is {distance:.2g} away from base + adapter (bound {BOUNDS[dtype]} in {dtype}): nothing "
            "was written; try --dtype float32"
        )
    return distance


def main(args: ScriptArguments) -> None:
    """Check the paths, then convert the adapter or merge it."""
    target = output_dir.refuse_used(args.output_dir)
    if args.adapter_only:
        convert_adapter(args, target)
    else:
        merge_into(args, target)


if __name__ == "__main__":
    launch.run_script(main, parse_args)
