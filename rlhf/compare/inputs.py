"""What the versions of a model are asked, and in which form: prompts, tokenizer, the format of all adapters."""

import sys
from pathlib import Path

import torch

from rlhf.artefacts import adapters, fingerprints, run_json
from rlhf.artefacts import files as files_on_disk
from rlhf.compare import answers
from rlhf.compare.arguments import terms_of
from rlhf.data import columns, dialogues, encoding, files, formats
from rlhf.data.choose_format import choose_format, stored_format
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.template import AUTO, turns_of
from rlhf.models import loading

PROMPT_FILES = (".txt", ".json", ".jsonl")


# ---- before the model loads ----
def adapters_of(args) -> list[tuple[str, str, tuple[str, ...]]]:
    """(flag, directory, stages it may be of) of every adapter that the flags name."""
    wanted = []
    for name, value in args.versions.items():
        # A column may be a sum of several.
        for _, path in terms_of(value) if value else ():
            wanted.append((f"--adapters {name}:", path, ("sft", "ppo")))
    for flag_name in ("reward_model_lora_path", "judge_lora_path"):
        # playground.py has no judge.
        if getattr(args, flag_name, None):
            wanted.append((f"--{flag_name}", getattr(args, flag_name), ("reward",)))
    return wanted


def tokenizer_of(args, base_dir: str):
    """The tokenizer that the adapters were trained with (--tokenizer_name), else the base's own."""
    if args.tokenizer_name:
        return encoding.load_tokenizer(args.tokenizer_name)
    for _, path, _ in adapters_of(args):
        run = run_json.load_run(path)
        if run and run["arguments"].get("tokenizer_name"):
            # A trained adapter has its tokenizer beside it.
            return encoding.load_tokenizer(path)
    return encoding.load_tokenizer(base_dir)


def format_of(args, base_dir: str, tokenizer) -> PromptFormat:
    """The prompt format that all adapters agree on.

    Raises: ValueError or FileNotFoundError for an adapter that is missing, of another base, stage or format.
    """
    runs = [run_json.load_run(path) for _, path, _ in adapters_of(args)]
    # The first adapter's format is asked of all: the check below refuses one that was trained in another.
    trained = next((run for run in runs if run), None)
    if args.prompt_template is None and trained:
        prompt_format = stored_format(trained, tokenizer, base_dir)
    else:
        args.prompt_template = args.prompt_template or AUTO
        prompt_format = choose_format(args, tokenizer, base_dir)

    base = fingerprints.base_fingerprint(base_dir)
    record = prompt_format.record()
    for flag_name, path, stages in adapters_of(args):
        adapters.check_adapter(
            path, stage=stages, base=base, tokenizer=tokenizer, prompt_format=record, flag=flag_name
        )
    return prompt_format


def read_prompts(values: list[str], template: str) -> list[dict]:
    """The prompts as rows {"prompt"}, of a dialogue with its "turns"; each value is one, or a file of them.

    Raises: ValueError where a file is empty or malformed.
    """
    rows = []
    for value in values:
        path = Path(value)
        suffix = path.suffix.lower()
        if not looks_like_file(path):
            rows.append({"prompt": value.strip()})
            continue
        if not path.is_file():
            hint = files_on_disk.nearest(value)
            raise FileNotFoundError(f"--prompts {value} does not exist{hint}: give a file, or the prompts themselves")
        if suffix not in PROMPT_FILES:
            raise ValueError(f"--prompts {value} is a file, but none of {', '.join(PROMPT_FILES)}: convert it")
        if suffix == ".txt":
            made = [{"prompt": line.strip()} for line in _lines(path) if line.strip()]
        else:
            made = _rows(path, template)
        if not made:
            raise ValueError(f"--prompts {value} is empty: put one prompt on a line")
        rows += made

    if not rows or not all(row["prompt"] for row in rows):
        raise ValueError("--prompts holds an empty prompt: leave the flag out for the built-in ones")
    return rows


def looks_like_file(path: Path) -> bool:
    """Return True for a file, and for what has the suffix of one: asking the model a file's name helps nobody."""
    try:
        # By the suffix too, or a mistyped file name would be asked as a prompt.
        return path.is_file() or path.suffix.lower() in PROMPT_FILES
    # A long prompt is too long for a file's name.
    except OSError:
        return False


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not UTF-8 text: convert it with iconv -t UTF-8") from None


def _rows(path: Path, template: str) -> list[dict]:
    """Prompts of a .json or .jsonl file: plain texts, or rows in any format that the stages read."""
    prompts = []

    for where, row in files.read_file(path):
        # An empty text among the texts of a file is an empty line, as in a .txt file.
        if isinstance(row, str):
            if not row.strip():
                continue
            row = {"prompt": row}
        try:
            if isinstance(row, dialogues.BadRow):
                raise row
            names = set(row) if isinstance(row, dict) else set()
            # Row by row, as prompts are few and may come from several files.
            row_format = columns.find_format(names, "prompt", {})
            prompts += formats.examples(row, row_format, template)
        except (dialogues.BadRow, dialogues.Unusable) as error:
            raise ValueError(f"{where}: {error}") from None
    return prompts


def encode_prompt(prompt_format: PromptFormat, row: dict, room: int) -> list[int]:
    """Query ids of a prompt. Raises: ValueError where it is longer than `room` tokens, so that no answer would fit."""
    prompt = row["prompt"]
    try:
        query = prompt_format.query_ids(turns_of(row))
    except dialogues.Unusable as error:
        raise ValueError(f"the prompt that begins with {prompt[:20]!r}: {error}") from None
    if len(query) > room:
        raise ValueError(
            f"the prompt that begins with {prompt[:20]!r} has {len(query)} tokens, but this base has room for {room} "
            "beside the answer: shorten it, or lower --max_new_tokens"
        )
    return query


def room_for_prompt(base_dir: str, max_new_tokens: int) -> int:
    """Tokens of a prompt that leave room for the longest answer within the positions of this base."""
    positions = getattr(loading.read_config(base_dir).get_text_config(), "max_position_embeddings", None)
    # A base that computes its positions has no limit that could be named here.
    return sys.maxsize if positions is None else positions - max_new_tokens


# ---- the model ----
def load_versions(
    args, base_dir: str, prompt_format: PromptFormat, settings: answers.AnswerSettings, mesh=None
) -> answers.Versions:
    """The base once, with every adapter that the flags name on it; in shards over a `mesh`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = answers.Versions(base_dir, prompt_format, settings, loading.pick_dtype(args.bf16), device, mesh)
    versions.in_place = mesh is not None and args.decode == "auto"
    for name, path in args.versions.items():
        if path is not None:
            versions.add(name, path)
    if args.reward_model_lora_path:
        versions.add_reward_model(args.reward_model_lora_path)
    if getattr(args, "judge_lora_path", None):
        versions.add_reward_model(args.judge_lora_path, answers.JUDGE)
    return versions
