"""Compare versions of a model: one base and several adapters, the same prompts, side by side.

In: a base model, named adapters of sft_training.py or rl_training.py, prompts (optionally a reward adapter).
Out: a table with a row a prompt and a column a version, as comparison.md, .html and .csv, and printed. With
`--interactive True`: a conversation in the terminal with any of the versions.

    token = argmax(log softmax(logits / temperature) + g),  g ~ Gumbel(0, 1) from (seed, row), one for all versions

So two columns of a row differ by their weights and never by luck, and a cell depends neither on the other versions in
the table nor on the batch it was written in.

    python compare.py --base_model_name baichuan-inc/baichuan-7B \\
        --adapters sft=runs/sft rlhf10=runs/ppo/step_10 rlhf100=runs/ppo/step_100 --prompts prompts.txt
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from rlhf.artefacts import adapters, run_json
from rlhf.compare import answers, tables
from rlhf.data import dialogues, encoding, files, formats
from rlhf.data.template import DEFAULT_TEMPLATE, check_template, render
from rlhf.flags import REQUIRED, flag, parse
from rlhf.models import loading
from rlhf.run import launch

PROMPT_FILES = (".txt", ".json", ".jsonl")

# One of each kind that shows a change of style: a translation, small talk, health, mood, an explanation.
DEFAULT_PROMPTS = [
    "帮我把“今晚的月亮真圆”翻译成英文",
    "你今天过得怎么样？",
    "天天坐办公室，怎样才能少生病？",
    "最近压力好大，晚上睡不着怎么办？",
    "用一两句话说说什么是大语言模型",
]


@dataclass(kw_only=True)
class ScriptArguments:
    """Flags of compare.py."""

    # ---- artefacts ----
    base_model_name: str = flag(
        REQUIRED,
        help="base model: directory or hub id; a merged model will do",
        group="artefacts",
        aliases=["--model_name", "--model_path"],
    )
    adapters: list[str] = flag(
        [], help="the columns, as NAME=DIR ..., e.g. sft=runs/sft rlhf10=runs/ppo/step_10", group="artefacts"
    )
    include_base: bool = flag(True, help="show the bare base as the first column, named base", group="artefacts")
    reward_model_lora_path: str | None = flag(
        None, help="reward adapter of the same base: each cell gets its raw score (no sigmoid)", group="artefacts"
    )
    output_dir: str = flag("runs/compare", help="directory for comparison.md, .html and .csv", group="artefacts")
    # ---- prompts ----
    prompts: list[str] = flag(
        DEFAULT_PROMPTS,
        help="prompts themselves, or files: .txt (one a line), .json or .jsonl (texts, or rows with a prompt column)",
        group="prompts",
    )
    prompt_template: str | None = flag(
        None, help="text around a prompt, \\n is a new line; by default the adapters' own", group="prompts"
    )
    interactive: bool = flag(False, help="talk to the versions in the terminal instead", group="prompts")
    # ---- sampling ----
    do_sample: bool = flag(True, help="sample; False decodes greedily", group="sampling")
    temperature: float = flag(1.0, help="divisor of the logits; PPO samples at 1", group="sampling")
    top_p: float = flag(0.9, help="sample from the smallest set of tokens that holds this share", group="sampling")
    repetition_penalty: float = flag(
        1.0, help="penalty on repeated tokens; above 1 makes what was said less likely", group="sampling"
    )
    max_new_tokens: int = flag(256, help="longer answers are cut, and marked so", group="sampling")
    seed: int = flag(0, help="seed of the sampling noise", group="sampling")
    # ---- machine ----
    bf16: bool = flag(True, help="bfloat16 weights; fp16 on a card without it, float32 on a CPU", group="machine")
    batch_size: int = flag(8, help="prompts answered at once; changes speed, not answers", group="machine")

    def __post_init__(self):
        self.versions = named_adapters(self.adapters, self.include_base)
        if self.prompt_template is not None:
            self.prompt_template = check_template(self.prompt_template.replace("\\n", "\n"))
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be over 0 (greedy decoding is --do_sample False)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be over 0 and at most 1")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")


def named_adapters(specs: list[str], include_base: bool) -> dict[str, str | None]:
    """Column name -> adapter directory, None for the bare base. Raises: ValueError for a bad or repeated name."""
    versions: dict[str, str | None] = {answers.BASE: None} if include_base else {}

    for spec in specs:
        name, equals, folder = spec.partition("=")
        if not equals or not folder or not re.fullmatch(r"[\w.()-]+", name):
            raise ValueError(f"--adapters {spec}: write NAME=DIR, the name without spaces, e.g. sft=runs/sft")
        if name in versions or name == answers.BASE:
            raise ValueError(
                f"--adapters names {name} twice ({answers.BASE} is the bare base): give each column its own name"
            )
        versions[name] = folder

    if not versions:
        raise ValueError("nothing to compare: give --adapters NAME=DIR, or leave --include_base at True")
    return versions


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Flags, with values and combinations checked (paths are checked by `main`)."""
    return parse(ScriptArguments, argv, __doc__)


# ---- before the model loads ----
def choose_template(args: ScriptArguments, base_dir: str, tokenizer) -> str:
    """The prompt template all adapters agree on.

    Raises: ValueError or FileNotFoundError for an adapter that is missing, of another base, stage or template.
    """
    wanted = [(f"--adapters {name}:", path, ("sft", "ppo")) for name, path in args.versions.items() if path]
    if args.reward_model_lora_path:
        wanted.append(("--reward_model_lora_path", args.reward_model_lora_path, ("reward",)))

    runs = [run_json.load_run(path) for _, path, _ in wanted]
    trained_with = [run["prompt_template"] for run in runs if run]
    template = args.prompt_template or next(iter(trained_with), DEFAULT_TEMPLATE)

    base = run_json.base_fingerprint(base_dir)
    for name, path, stages in wanted:
        adapters.check_adapter(path, stage=stages, base=base, tokenizer=tokenizer, template=template, flag=name)
    return template


def read_prompts(values: list[str], template: str) -> list[str]:
    """The prompts: each value is one, or a file of them. Raises: ValueError where a file is empty or malformed."""
    prompts = []
    for value in values:
        path = Path(value)
        # A value with a space or another suffix is a prompt, not a file's name.
        if path.suffix not in PROMPT_FILES or re.search(r"\s", value):
            prompts.append(value.strip())
            continue
        if not path.is_file():
            raise FileNotFoundError(f"--prompts {value} does not exist: give a file, or the prompts themselves")
        lines = _lines(path) if path.suffix == ".txt" else _rows(path, template)
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {value} is empty: put one prompt on a line")
        prompts += lines

    if not prompts or not all(prompts):
        raise ValueError("--prompts holds an empty prompt: leave the flag out for the built-in ones")
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not UTF-8 text: convert it with iconv -t UTF-8") from None


def _rows(path: Path, template: str) -> list[str]:
    """Prompts of a .json or .jsonl file: plain texts, or rows in any format that the stages read."""
    prompts = []

    for where, row in files.read_file(path):
        if isinstance(row, str):
            row = {"prompt": row}
        try:
            if isinstance(row, dialogues.BadRow):
                raise row
            columns = set(row) if isinstance(row, dict) else set()
            row_format = formats.find_format(columns, "prompt", {})
            prompts += [example["prompt"] for example in formats.examples(row, row_format, template)]
        except (dialogues.BadRow, dialogues.Unusable) as error:
            raise ValueError(f"{where}: {error}") from None
    return prompts


def encode_prompt(tokenizer, prompt: str, template: str, room: int) -> list[int]:
    """Query ids of a prompt. Raises: ValueError where it is longer than `room` tokens, so that no answer would fit."""
    query = encoding.encode(tokenizer, render(template, prompt))
    if len(query) > room:
        raise ValueError(
            f"the prompt that begins with {prompt[:20]!r} has {len(query)} tokens, but this base has room for {room} "
            "beside the answer: shorten it, or lower --max_new_tokens"
        )
    return query


def room_for_prompt(base_dir: str, max_new_tokens: int) -> int:
    """Tokens of a prompt that leave room for the longest answer within the positions of this base."""
    positions = getattr(AutoConfig.from_pretrained(base_dir), "max_position_embeddings", None)
    return sys.maxsize if positions is None else positions - max_new_tokens


# ---- the table ----
def load_versions(args: ScriptArguments, base_dir: str, tokenizer) -> answers.Versions:
    """The base once, with every adapter on it."""
    # Each setting is a flag of the same name.
    names = answers.AnswerSettings.__dataclass_fields__
    settings = answers.AnswerSettings(**{name: getattr(args, name) for name in names})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = answers.Versions(base_dir, tokenizer, settings, loading.pick_dtype(args.bf16), device)
    for name, path in args.versions.items():
        if path is not None:
            versions.add(name, path)
    if args.reward_model_lora_path:
        versions.add_reward_model(args.reward_model_lora_path)
    return versions


def origin(args: ScriptArguments, template: str) -> list[tuple[str, str]]:
    """Settings that the table was made with, so that it can be made again."""
    how = "temperature {0.temperature}, top_p {0.top_p}, seed {0.seed}" if args.do_sample else "greedy"
    how += ", repetition_penalty {0.repetition_penalty}, max_new_tokens {0.max_new_tokens}"

    rows = [("base model", args.base_model_name)]
    rows += [(name, path) for name, path in args.versions.items() if path]
    if args.reward_model_lora_path:
        rows.append(("reward model (raw scores)", args.reward_model_lora_path))
    return rows + [("sampling", how.format(args)), ("prompt template", repr(template))]


# ---- talking ----
HELP = "/use NAME: talk to one version, /all: to all of them, /quit: leave. Every line is a conversation of its own."


def talk(versions: answers.Versions, args: ScriptArguments, template: str, room: int) -> None:
    """Answer lines from the terminal until /quit or the end of the input; the versions never see earlier lines."""
    names = list(args.versions)
    turn = 0
    print(f"versions: {', '.join(names)}. {HELP}", flush=True)
    speakers = names

    while (line := ask(speakers)) is not None:
        if line.startswith("/"):
            speakers = chosen_speakers(line, names, speakers)
        elif line:
            # The seed moves on, so that asking again gives another answer.
            turn += 1
            try:
                query = encode_prompt(versions.tokenizer, line, template, room)
            except ValueError as error:
                print(error)
                continue
            seeds = answers.row_seeds(args.seed, 1, first=turn - 1)
            tables.print_answers({name: versions.answers(name, [query], seeds)[0] for name in speakers})


def ask(speakers: list[str]) -> str | None:
    """The next line, or None where the conversation ends (/quit, end of input, Ctrl-C)."""
    try:
        line = input(f"[{', '.join(speakers)}] > ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == "/quit" else line


def chosen_speakers(command: str, names: list[str], speakers: list[str]) -> list[str]:
    """Versions that answer after a command; an unknown command changes nothing and lists the known ones."""
    word, _, name = command.partition(" ")
    if word == "/all":
        return names
    if word == "/use" and name.strip() in names:
        return [name.strip()]
    print(f"{command}: unknown. Versions: {', '.join(names)}. {HELP}")
    return speakers


def main(args: ScriptArguments) -> None:
    """Check everything that can be checked without the model, then answer every prompt with every version."""
    # 1. Base, tokenizer and adapters have to belong together.
    base_dir = loading.resolve_model(args.base_model_name, "--base_model_name")
    tokenizer = encoding.load_tokenizer(base_dir)
    template = choose_template(args, base_dir, tokenizer)
    room = room_for_prompt(base_dir, args.max_new_tokens)
    if args.interactive:
        return talk(load_versions(args, base_dir, tokenizer), args, template, room)

    # 2. Prompts, and a place for the table.
    prompts = read_prompts(args.prompts, template)
    queries = [encode_prompt(tokenizer, prompt, template, room) for prompt in prompts]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    # 3. A column for each version, with the same random draws.
    versions = load_versions(args, base_dir, tokenizer)
    seeds = answers.row_seeds(args.seed, len(prompts))
    columns = {}
    for name in args.versions:
        print(f"{name}: answering {len(prompts)} prompts", flush=True)
        columns[name] = versions.answers(name, queries, seeds)

    # 4. The table in all its forms.
    made = origin(args, template)
    tables.write_markdown(output_dir / "comparison.md", prompts, columns, made)
    tables.write_html(output_dir / "comparison.html", prompts, columns, made)
    tables.write_csv(output_dir / "comparison.csv", prompts, columns)
    tables.print_table(prompts, columns)
    print(f"\nwritten: {output_dir}/comparison.md, .html, .csv")


if __name__ == "__main__":
    launch.run_script(main, parse_args)
