"""Merge an adapter into its base: a standalone model that needs no peft, and in Llama format no code of ours either.

In:  a base model, and an adapter of any stage (a reward adapter gives a sequence classification model, head included).
Out: <output_dir>: safetensors, config, tokenizer, run.json. Nothing is written unless the result proves equal.

    W  <-  W + (alpha / r) * B @ A,   and with --format llama   [W_q; W_k; W_v] = W_pack

    python merge_lora.py --base_model_name baichuan-inc/baichuan-7B --lora_path runs/sft --output_dir merged/sft
    python merge_lora.py --adapter_only True --lora_path runs/sft --output_dir merged/sft_qkv   # LoRA for q, k, v
    python merge_lora.py --average runs/rm_0 runs/rm_1 --output_dir runs/rm_average                     # one adapter
"""

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.flags import flag, parse
from rlhf.run import startup

# Largest distance of the saved model from base + adapter: root mean square of the difference over that of the logits
# (1e-7 to 1e-6 in float32; 0.008 to 0.023 in bfloat16 and 0.001 to 0.003 in float16, where merging rounds every weight
# once more; random models of 2 to 32 layers, and a real one of 135 M parameters).
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}


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
    tokenizer_name: str | None = flag(
        None, help="tokenizer directory or hub id, if not the one that the adapter was trained with"
    )
    adapter_only: bool = flag(False, help="write the W_pack adapter as a q_proj/k_proj/v_proj one; merge nothing")
    average: list[str] = flag(
        [], help="adapters of one base: write one adapter that is their average (or their sum by --weights), exactly"
    )
    weights: list[float] = flag([], help="weight of each adapter of --average; by default all count alike")

    def __post_init__(self):
        if self.average:
            return self._check_average()
        if self.weights:
            raise ValueError("--weights are the weights of --average: give the adapters too")
        if self.adapter_only and not self.lora_path:
            raise ValueError("--adapter_only True needs --lora_path, the adapter to convert")
        if not self.adapter_only and not self.base_model_name:
            raise ValueError("--base_model_name is missing: give the model the adapter was trained on")
        if not self.lora_path and not self.format:
            raise ValueError(
                "nothing to do: give --lora_path to merge an adapter, or --format llama to convert the base"
            )

    def _check_average(self):
        if self.lora_path or self.adapter_only or self.format:
            raise ValueError(
                "--average writes an adapter: --lora_path, --adapter_only and --format are for other uses"
            )
        self.weights = self.weights or [1 / len(self.average)] * len(self.average)
        if len(self.weights) != len(self.average) or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"--weights must be {len(self.average)} numbers, one for each adapter of --average")


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Parse and check the command line (values, not paths)."""
    return parse(ScriptArguments, argv, __doc__)


# A wrong flag, --help and Ctrl-C end here: the libraries below take seconds to load.
if __name__ == "__main__":
    given = startup.begin(parse_args)

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.artefacts import adapters, averaging, damage, files, fingerprints, foreign, output_dir, run_json
from rlhf.baichuan import to_fast_tokenizer, to_llama
from rlhf.data import encoding
from rlhf.data.choose_format import stored_format
from rlhf.data.served_template import served_template
from rlhf.models import loading, lora, merging
from rlhf.run import launch


def tokenizer_dir(args: ScriptArguments, base_dir: str, run: dict | None) -> str:
    """Where the tokenizer of the training is: beside the adapter, where --tokenizer_name chose it."""
    if args.tokenizer_name:
        return args.tokenizer_name
    # Every stage saves the tokenizer of its training beside the adapter.
    other = run is not None and run["arguments"].get("tokenizer_name")
    return args.lora_path if other else base_dir


def check_format(base_dir: str, wanted: str | None) -> bool:
    """Return True if the weights must be turned into Llama's. Raises: ValueError where the base has no such format."""
    kind = loading.read_config(base_dir).model_type
    if wanted not in (None, kind) and kind != "baichuan":
        raise ValueError(f"--format {wanted} does not fit a {kind} base: leave it out to keep the base's own format")
    return kind == "baichuan" and wanted == "llama"


def is_baichuan(base_dir: str) -> bool:
    """Return True for the native Baichuan format."""
    return loading.read_config(base_dir).model_type == "baichuan"


# ---- merging ----
def load_pair(base_dir: str, lora_path: str | None, dtype: str, device: str):
    """Base and adapter as plain peft puts them together, which is what the merged model has to equal.

    Returns: the model on `device`, a PeftModel where there is an adapter.
    """
    config = weights = None
    if lora_path is not None:
        config, weights = adapters.read_adapter(lora_path)
    head = "score" if config is not None and config.task_type == "SEQ_CLS" else "causal"
    model = loading.load_base(base_dir, getattr(torch, dtype), head=head, device=device).eval()
    # `load_base` switched it off for training, and this configuration is saved for serving.
    model.config.use_cache = True
    # A new score head is random, but it is replaced by the adapter's below.
    damage.refuse_nonfinite(model.state_dict(), f"base {base_dir}")
    if config is None:
        return model

    foreign.refuse_unmergeable(config, weights, model, f"--lora_path {lora_path}")
    if foreign.changes_embeddings(config) and model.config.tie_word_embeddings:
        untie(model)
    with warnings.catch_warnings():
        # peft looks for a name in the base's config, and warns of tied embeddings, which are untied here.
        warnings.simplefilter("ignore")
        # Tensors of other shapes raise; layers that the base does not have are left out without a word.
        with damage.refused(f"adapter {lora_path} on this base", "it belongs to another one"):
            wrapped = PeftModel.from_pretrained(model, lora_path).eval()
    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    lora.refuse_misfit(lora.lora_weights(weights), lora.lora_weights(loaded), f"adapter {lora_path}")
    return wrapped


def untie(model: PreTrainedModel) -> None:
    """Give the output layer a weight of its own: an adapter that changes one of two tied matrices changes one."""
    output = model.get_output_embeddings()
    if output is not None:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def convert_adapter(args: ScriptArguments, target: Path) -> None:
    """Write the adapter for q, k and v in place of W_pack: for a base that was converted by --format llama."""
    config, weights = adapters.read_adapter(args.lora_path)
    damage.refuse_nonfinite(weights, f"adapter {args.lora_path}")
    config, weights = to_llama.split_adapter(config, weights)
    # The base it was trained on has no q_proj: the one it now fits is the Llama-format copy, if given.
    config.base_model_name_or_path = args.base_model_name
    with output_dir.staged(target) as folder:
        save_file(weights, folder / files.ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    print(f"adapter for q_proj, k_proj and v_proj written to {target}", flush=True)


def average_into(args: ScriptArguments, target: Path) -> None:
    """Write the weighted sum of adapters as one adapter, once its difference to the sum of their terms is measured.

    Raises: ValueError where they do not belong to one base, or the difference is more than rounding.
    """
    # 1. Do they belong together, and to the base where one is given?
    first = averaging.refuse_unlike(args.average, "--average")
    if args.base_model_name and first:
        base = fingerprints.base_fingerprint(loading.resolve_model(args.base_model_name, "--base_model_name"))
        adapters.check_adapter(args.average[0], stage=first["stage"], base=base, flag="--average")
    parts = list(zip(args.weights, args.average, strict=True))
    terms = averaging.read_terms(parts, "--average")

    # 2. The sum, and the proof of it.
    config, tensors = averaging.weighted_sum(terms)
    difference, largest = averaging.difference(terms, tensors)
    if not difference <= averaging.BOUND * largest:
        raise ValueError(f"the sum is {difference:.2g} away from the adapters' own terms: nothing was written")

    # 3. Beside it what later stages ask for, as the first adapter has it.
    with output_dir.staged(target) as folder:
        averaging.write_sum(folder, config, tensors, args.average[0])
        if first:
            metrics = {"rank": config.r, "difference": difference, "largest_change": largest}
            averaging.write_run(folder, first, asdict(args), args.average, metrics)
    shown = " + ".join(f"{weight:.3g} * {path}" for weight, path in parts)
    print(f"{target} = {shown}: rank {config.r}", flush=True)
    proof = f"largest difference to the weighted sum of the terms {difference:.2g}"
    print(f"{proof}, largest change of a weight {largest:.2g}", flush=True)


def merge_into(args: ScriptArguments, target: Path) -> None:
    """Merge, save beside the target, load what was saved, compare, and only then move it into place."""
    base_dir = loading.resolve_model(args.base_model_name, "--base_model_name")
    # 1. Refuse what cannot be merged, before any model is loaded.
    llama = check_format(base_dir, args.format)
    fingerprint = fingerprints.base_fingerprint(base_dir)
    run = None
    if args.lora_path is not None:
        damage.refuse_nonfinite(adapters.read_adapter(args.lora_path)[1], f"adapter {args.lora_path}")
        stages = ("sft", "reward", "ppo")
        run = adapters.check_adapter(args.lora_path, stage=stages, base=fingerprint, flag="--lora_path")
    tokenizer = encoding.load_tokenizer(tokenizer_dir(args, base_dir, run))
    record = run and stored_format(run, tokenizer, base_dir).record()

    # 2. What base and adapter give before is what the result is measured by, if they fit into memory.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    by_file = None if llama or args.lora_path is None else merging.FileMerge.of(base_dir, args.lora_path)
    model = expected = None
    if by_file is None or by_file.fits(dtype):
        model = load_pair(base_dir, args.lora_path, args.dtype, device)
        expected = probe(model)
    if by_file is None and args.lora_path is not None:
        # Not every kind of LoRA is a change of weights.
        with damage.refused(f"adapter {args.lora_path} on this base", "it cannot be merged"):
            # Safe: peft refuses weights that come out as NaN.
            model = model.merge_and_unload(safe_merge=True)

    # 3. Save, and load what was saved: only that proves the files right.
    with output_dir.staged(target) as folder:
        head = "score" if hasattr(model, "score") else "causal"
        distance = 0.0
        if by_file is not None:
            # File by file, whatever the size of the model.
            model = None
            set_stop_tokens(by_file.model, record)
            by_file.write(folder, dtype)
            distance = check_distance(by_file.distance(folder), args.dtype)
        else:
            merged = to_llama.to_llama(model) if llama else model
            if head == "causal":
                # A model that only scores never stops, as it generates nothing.
                set_stop_tokens(merged, record)
            merged.save_pretrained(folder)
            # Only one model at a time has to fit.
            del model, merged
        save_tokenizer(tokenizer, folder, llama, record)
        if expected is not None:
            saved = loading.load_base(str(folder), dtype, head=head, device=device).eval()
            distance = check_parity(expected, probe(saved), args.dtype)
        run_json.write_run(
            folder, stage="merge", args=args, base=fingerprint, tokenizer=tokenizer, prompt_format=record,
            metrics={"distance": distance, "bound": BOUNDS[args.dtype]},
            parents={"adapter": args.lora_path} if args.lora_path else {},
        )  # fmt: skip
    print(f"{target}: {distance:.2g} from base + adapter (bound {BOUNDS[args.dtype]} in {args.dtype})", flush=True)
    print(how_to_serve(target, head, record, native=is_baichuan(base_dir) and not llama), flush=True)


# ---- what a server needs ----
def set_stop_tokens(model: PreTrainedModel, record: dict | None) -> None:
    """Let generation_config stop at every token that ended an answer in training, the trained one first."""
    if record is not None:
        # A single one as a number, the form in which every reader of the file knows it.
        stops = record["stop_ids"]
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    # A base may sample with settings that transformers refuses to save beside greedy decoding.
    if not model.generation_config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(model.generation_config, name, None)


def save_tokenizer(tokenizer, folder: Path, llama: bool, record: dict | None) -> None:
    """Write the tokenizer with the chat template that renders the format of the training."""
    if llama:
        to_fast_tokenizer.save_tokenizer(tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)

    # A server encodes the rendered template, whose control tokens have to be tokens.
    file = folder / "tokenizer_config.json"
    settings = files.read_object(file)
    settings.pop("split_special_tokens", None)
    settings.pop("chat_template", None)
    files.write_json(file, settings)
    if record is not None:
        template = served_template(record, tokenizer.eos_token, tokenizer.bos_token)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def how_to_serve(target: Path, head: str, record: dict | None, native: bool) -> str:
    """One line: the command that serves the model, and what its chat endpoint asks with."""
    if head == "score":
        return f"load it with AutoModelForSequenceClassification.from_pretrained({str(target)!r})"
    if native:
        return "to serve it with tools that do not know this project's Baichuan, merge with --format llama"
    asks = "its own chat template" if record is None else "the prompt format it was trained with"
    return f"serve it: vllm serve {target} (the chat endpoint asks in {asks}, and stops where training did)"


# ---- proof ----
@torch.no_grad()
def probe(model) -> Tensor:
    """Logits, or scores, on 8 rows of 24 fixed token ids: float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    # From 3 on, as the first ids are control tokens in most vocabularies.
    ids = torch.randint(3, model.config.vocab_size, (8, 24), generator=generator).to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()


def check_parity(expected: Tensor, merged: Tensor, dtype: str) -> float:
    """Distance of the saved model from base + adapter: root mean square of the difference over that of the output.

    Scores have a common offset that says nothing, so they count by their spread.

    Raises: ValueError past the bound of BOUNDS.
    """
    centred = expected - expected.mean() if expected.shape[-1] == 1 else expected
    return check_distance(((merged - expected).pow(2).mean() / centred.pow(2).mean()).sqrt().item(), dtype)


def check_distance(distance: float, dtype: str) -> float:
    """The distance itself. Raises: ValueError past the bound of BOUNDS."""
    # Written so that NaN, which compares false with everything, is refused too.
    if not distance <= BOUNDS[dtype]:
        advice = "" if dtype == "float32" else ": try --dtype float32"
        raise ValueError(
            f"the merged model is {distance:.2g} away from base + adapter (bound {BOUNDS[dtype]} in {dtype}): nothing "
            f"was written{advice}"
        )
    return distance


def main(args: ScriptArguments) -> None:
    """Check the paths, then convert the adapter or merge it."""
    target = output_dir.refuse_used(args.output_dir)
    if args.average:
        average_into(args, target)
    elif args.adapter_only:
        convert_adapter(args, target)
    else:
        merge_into(args, target)


if __name__ == "__main__":
    launch.run_main(main, given)
