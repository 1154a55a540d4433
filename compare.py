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

import shlex
from dataclasses import dataclass
from pathlib import Path

from rlhf.compare.arguments import DEFAULT_PROMPTS, check_best_of, named_adapters, slide_versions
from rlhf.data.arguments import FormatFlags
from rlhf.flags import REQUIRED, flag, parse
from rlhf.run import startup
from rlhf.run.sharing import DecodeFlags, ShardFlags, processes_a_copy


@dataclass(kw_only=True)
class ScriptArguments(FormatFlags, ShardFlags, DecodeFlags):
    """Flags of compare.py."""

    # ---- artefacts ----
    base_model_name: str = flag(
        REQUIRED,
        help="base model: directory or hub id; a merged model will do",
        group="artefacts",
        aliases=["--model_name", "--model_path"],
    )
    adapters: list[str] = flag(
        [],
        help="the columns, as NAME=DIR ..., e.g. sft=runs/sft half=0.5*runs/sft+0.5*runs/ppo",
        group="artefacts",
    )
    include_base: bool = flag(True, help="show the bare base as the first column, named base", group="artefacts")
    slide: list[str] = flag(
        [],
        help="two adapters: five columns of their weighted sums, from the first to the second, with KL to the first",
        group="artefacts",
    )
    tokenizer_name: str | None = flag(
        None, help="tokenizer directory or hub id, if not the adapters' own", group="artefacts"
    )
    reward_model_lora_path: str | None = flag(
        None, help="reward adapter of the same base: each cell gets its raw score (no sigmoid)", group="artefacts"
    )
    judge_lora_path: str | None = flag(
        None, help="another reward adapter, which PPO did not see: each cell gets its score too", group="artefacts"
    )
    output_dir: str = flag("runs/compare", help="directory for comparison.md, .html and .csv", group="artefacts")
    # ---- prompts ----
    prompts: list[str] = flag(
        DEFAULT_PROMPTS,
        help="prompts themselves, or files: .txt (one a line), .json or .jsonl (texts, or rows with a prompt column)",
        group="prompts",
    )
    prompt_template: str | None = flag(
        None,
        help="chat, or a text around {prompt}, \\n is a new line; by default the adapters' own format, else auto",
        group="prompts",
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
    best_of: int = flag(
        0,
        help="a further column: of so many answers of the first adapter the best by --reward_model_lora_path; 0: none",
        group="sampling",
    )
    # ---- machine ----
    bf16: bool = flag(True, help="bfloat16 weights; fp16 on a card without it, float32 on a CPU", group="machine")
    batch_size: int = flag(8, help="prompts answered at once; changes speed, not answers", group="machine")
    nproc: int = flag(
        1, help="processes to start, which share the base by --shard_base; 0: one for each GPU", group="machine"
    )

    def __post_init__(self):
        if len(self.slide) not in (0, 2):
            raise ValueError(f"--slide goes from one adapter to another: give two, not {len(self.slide)}")
        # A slide is about the way between two adapters, which the bare base is far from.
        between = slide_versions(*self.slide) if self.slide else {}
        self.versions = between
        if self.adapters or not between:
            named = named_adapters(self.adapters, self.include_base and not between)
            if between.keys() & named.keys():
                raise ValueError("--adapters names a point of --slide: give that column another name")
            self.versions = between | named
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be over 0 (greedy decoding is --do_sample False)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be over 0 and at most 1")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        check_best_of(self)
        if self.nproc < 0 or (self.nproc != 1 and self.shard_base == "0"):
            raise ValueError(
                f"--nproc {self.nproc}: several processes are for a base in shards, give --shard_base True"
            )
        super().__post_init__()


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Flags, with values and combinations checked (paths are checked by `main`)."""
    return parse(ScriptArguments, argv, __doc__)


# A wrong flag, --help and Ctrl-C end here: the libraries below take seconds to load.
if __name__ == "__main__":
    given = startup.begin(parse_args)

from rlhf.compare import answers, answers_file, best, html_page, inputs, slide, tables
from rlhf.data.prompt_format import PromptFormat
from rlhf.models import loading, shards
from rlhf.run import launch


# ---- the table ----
def load_versions(args: ScriptArguments, base_dir: str, prompt_format: PromptFormat) -> answers.Versions:
    """The base once, with every adapter on it."""
    # Each setting is a flag of the same name.
    names = answers.AnswerSettings.__dataclass_fields__
    settings = answers.AnswerSettings(**{name: getattr(args, name) for name in names})
    return inputs.load_versions(args, base_dir, prompt_format, settings, shards.base_mesh(args.shard_base))


def origin(args: ScriptArguments, prompt_format: PromptFormat) -> list[tuple[str, str]]:
    """Settings that the table was made with, so that it can be made again."""
    how = "temperature {0.temperature}, top_p {0.top_p}, seed {0.seed}" if args.do_sample else "greedy"
    how += ", repetition_penalty {0.repetition_penalty}, max_new_tokens {0.max_new_tokens}"

    rows = [("base model", args.base_model_name)]
    rows += [(name, path) for name, path in args.versions.items() if path]
    if args.reward_model_lora_path:
        rows.append(("reward model (raw scores)", args.reward_model_lora_path))
    if args.judge_lora_path:
        rows.append(("judge (raw scores)", args.judge_lora_path))
    return rows + [("sampling", how.format(args)), ("prompt template", repr(prompt_format.template))]


# ---- talking ----
HELP = "/use NAME: talk to one version, /all: to all of them, /quit: leave. Every line is a conversation of its own."


def talk(versions: answers.Versions, args: ScriptArguments, prompt_format: PromptFormat, room: int) -> None:
    """Answer lines from the terminal until /quit or the end of the input; the versions never see earlier lines."""
    names = list(args.versions)
    turn = 0
    launch.say(f"versions: {', '.join(names)}. {HELP}")
    speakers = names

    while (line := ask(speakers)) is not None:
        if line.startswith("/"):
            speakers = chosen_speakers(line, names, speakers)
        elif line:
            # The seed moves on, so that asking again gives another answer.
            turn += 1
            try:
                query = inputs.encode_prompt(prompt_format, {"prompt": line}, room)
            except ValueError as error:
                launch.say(error)
                continue
            # One seed for all versions: a difference between their answers is theirs and not chance's.
            seeds = answers.row_seeds(args.seed, 1, first=turn - 1)
            said = {name: versions.answers(name, [query], seeds)[0] for name in speakers}
            if launch.rank_and_size()[0] == 0:
                tables.print_answers(said)


def ask(speakers: list[str]) -> str | None:
    """The next line, or None where the conversation ends (/quit, end of input, Ctrl-C); one line for all processes."""
    line = None
    if launch.rank_and_size()[0] == 0:
        try:
            line = input(f"[{', '.join(speakers)}] > ").strip()
        # Ctrl-C ends the conversation as /quit does, and not with an error.
        except (EOFError, KeyboardInterrupt):
            print()
    line = shards.from_first(line)
    return None if line == "/quit" else line


def chosen_speakers(command: str, names: list[str], speakers: list[str]) -> list[str]:
    """Versions that answer after a command; an unknown command changes nothing and lists the known ones."""
    word, _, name = command.partition(" ")
    if word == "/all":
        return names
    if word == "/use" and name.strip() in names:
        return [name.strip()]
    launch.say(f"{command}: unknown. Versions: {', '.join(names)}. {HELP}")
    return speakers


def main(args: ScriptArguments) -> None:
    """Check everything that can be checked without the model, then answer every prompt with every version."""
    processes_a_copy(args.shard_base)
    # 1. Base, tokenizer and adapters have to belong together.
    base_dir = loading.resolve_model(args.base_model_name, "--base_model_name")
    tokenizer = inputs.tokenizer_of(args, base_dir)
    prompt_format = inputs.format_of(args, base_dir, tokenizer)
    launch.say(prompt_format.describe())
    room = inputs.room_for_prompt(base_dir, args.max_new_tokens)
    if args.interactive:
        return talk(load_versions(args, base_dir, prompt_format), args, prompt_format, room)

    # 2. Prompts, and a place for the table.
    rows = inputs.read_prompts(args.prompts, prompt_format.template)
    queries = [inputs.encode_prompt(prompt_format, row, room) for row in rows]
    prompts = [row["prompt"] for row in rows]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    # 3. A column for each version, with the same random draws.
    versions = load_versions(args, base_dir, prompt_format)
    seeds = answers.row_seeds(args.seed, len(prompts))
    columns = {}
    for name in args.versions:
        launch.say(f"{name}: answering {len(prompts)} prompts")
        # Version by version: switching the adapter is dear, the next prompt is not.
        columns[name] = versions.answers(name, queries, seeds)

    wins = tables.wins_in_words(columns)
    if args.best_of:
        columns = best.with_best(versions, columns, queries, args)

    # 4. The table in all its forms, by the first process.
    points = slide.measure(versions, columns, queries, next(iter(args.versions))) if args.slide else []
    if launch.rank_and_size()[0]:
        return
    made = origin(args, prompt_format)
    tables.write_markdown(output_dir / "comparison.md", prompts, columns, made)
    html_page.write_html(output_dir / "comparison.html", prompts, columns, made)
    tables.write_csv(output_dir / "comparison.csv", prompts, columns)
    tables.print_table(prompts, columns)
    answers_file.write_answers(output_dir / answers_file.NAME, prompts, columns, seeds, args)
    print(f"\nwritten: {output_dir}/comparison.md, .html, .csv, {answers_file.NAME}")
    if args.slide:
        slide.write_slide(output_dir, points)
        print(*slide.table(points), f"written: {output_dir}/slide.md, .csv, .png", sep="\n")
    if wins:
        print(wins)
    # The same versions, as they were named.
    words = ["python", "compare.py", "--base_model_name", args.base_model_name]
    words += ["--adapters", *args.adapters] if args.adapters else []
    words += ["--slide", *args.slide] if args.slide else []
    vote = shlex.join(["python", "playground.py", "--answers", str(output_dir / answers_file.NAME)])
    print(f"next: open {output_dir}/comparison.html; vote without seeing the names: {vote}")
    print(f"or talk to them: {shlex.join([*words, '--interactive', 'True'])}")


if __name__ == "__main__":
    launch.run_main(main, given)
