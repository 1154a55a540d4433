"""A local page: compare versions of a model blind, vote, chat with them, and make the votes the next reward data.

In:  a base model with named adapters (and optionally a reward adapter) and prompts; or answers that compare.py wrote,
     with which voting needs no model.
Out: http://127.0.0.1:7860, and in --output_dir votes.sqlite. With --export_pairs: no page, but pairs for
     reward_modeling.py, edited answers for SFT and bad answers for the audit.

    python playground.py --base_model_name baichuan-inc/baichuan-7B --adapters sft=runs/sft rlhf20=runs/ppo/step_20
    python playground.py --answers runs/compare/answers.jsonl
    python playground.py --export_pairs runs/page/pairs.jsonl
"""

import secrets
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rlhf.compare.arguments import DEFAULT_PROMPTS, named_adapters
from rlhf.data.arguments import FormatFlags
from rlhf.flags import at_least, flag, parse
from rlhf.run import startup

# Addresses that only this machine reaches: everything else needs a token.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Sampling settings that are kept with each answer.
SAMPLING = ("do_sample", "temperature", "top_p", "max_new_tokens")


@dataclass(kw_only=True)
class ScriptArguments(FormatFlags):
    """Flags of playground.py."""

    # ---- artefacts ----
    base_model_name: str | None = flag(
        None,
        help="base model: directory or hub id; without it only the answers of --answers are voted on",
        group="artefacts",
        aliases=["--model_name", "--model_path"],
    )
    adapters: list[str] = flag(
        [], help="the versions, as NAME=DIR ..., e.g. sft=runs/sft rlhf20=runs/ppo/step_20", group="artefacts"
    )
    include_base: bool = flag(True, help="let the bare base answer too, as the version base", group="artefacts")
    tokenizer_name: str | None = flag(
        None, help="tokenizer directory or hub id, if not the adapters' own", group="artefacts"
    )
    reward_model_lora_path: str | None = flag(
        None, help="reward adapter of the same base, whose scores are shown after a vote", group="artefacts"
    )
    output_dir: str = flag("runs/page", help="directory of votes.sqlite and of what is exported", group="artefacts")
    # ---- votes ----
    prompts: list[str] = flag(
        DEFAULT_PROMPTS,
        help="prompts themselves, or files: .txt (one a line), .json or .jsonl (texts, or rows with a prompt column)",
        group="prompts",
    )
    answers: str | None = flag(
        None, help="answers.jsonl of compare.py: answers that are written already, to vote on", group="prompts"
    )
    prompt_template: str | None = flag(
        None,
        help="chat, or a text around {prompt}, \\n is a new line; by default the adapters' own format, else auto",
        group="prompts",
    )
    overlap: float = flag(
        0.2, help="share of the prompts that everybody votes on; the others get one vote each", group="prompts"
    )
    export_pairs: str | None = flag(
        None, help="write the votes to this file as pairs for reward_modeling.py, and open no page", group="data"
    )
    min_pairs: int = flag(20, help="fewer pairs than these are not exported", group="data")
    # ---- sampling ----
    do_sample: bool = flag(True, help="sample; False decodes greedily", group="sampling")
    temperature: float = flag(1.0, help="divisor of the logits; PPO samples at 1", group="sampling")
    top_p: float = flag(0.9, help="sample from the smallest set of tokens that holds this share", group="sampling")
    max_new_tokens: int = flag(256, help="longer answers are cut", group="sampling")
    seed: int = flag(0, help="seed of the sampling noise and of the order of versions", group="sampling")
    # ---- machine ----
    host: str = flag(
        "127.0.0.1", help="address to listen on; 0.0.0.0 lets others in, by a link with a token", group="machine"
    )
    port: int = flag(7860, help="port to listen on; 0 takes a free one", group="machine")
    token: str | None = flag(None, help="what the link must hold; made where --host lets others in", group="machine")
    bf16: bool = flag(True, help="bfloat16 weights; fp16 on a card without it, float32 on a CPU", group="machine")
    max_rows: int = flag(8, help="answers written at once", group="machine")

    def __post_init__(self):
        # 1. What is opened.
        self.versions = {}
        if self.base_model_name:
            self.versions = named_adapters(self.adapters, self.include_base)
        elif self.adapters or self.reward_model_lora_path:
            raise ValueError("--adapters and --reward_model_lora_path need their base: give --base_model_name")
        elif not (self.answers or self.export_pairs):
            raise ValueError("nothing to open: give --base_model_name and --adapters, or --answers, or --export_pairs")

        # 2. Ranges.
        if self.temperature <= 0:
            raise ValueError("--temperature must be over 0 (greedy decoding is --do_sample False)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be over 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"--overlap {self.overlap} must be a share, from 0 to 1")
        at_least(self, 1, "max_new_tokens", "max_rows", "min_pairs")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} must be from 0 to 65535")
        # It stands in a link and in a header: other characters would have to be escaped differently in each.
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii() or not self.token.isalnum()):
            raise ValueError("--token must have at least 8 letters and digits, and nothing else")
        super().__post_init__()


def parse_args(argv: list[str] | None = None) -> ScriptArguments:
    """Flags, with values and combinations checked (paths are checked by `main`)."""
    return parse(ScriptArguments, argv, __doc__)


# A wrong flag, --help and Ctrl-C end here: the libraries below take seconds to load.
if __name__ == "__main__":
    given = startup.begin(parse_args)

# No torch among these: voting on answers that are written opens in a moment, and on any machine.
from rlhf.page import answers_file, export
from rlhf.page.store import Store, Version
from rlhf.page.vote import Plan


# ---- what is voted on ----
def stored_answers(args: ScriptArguments, store: Store) -> list[Version]:
    """Put the answers of --answers into the store; the versions that wrote them."""
    rows = answers_file.read(args.answers)
    # The same prompt of several versions is one prompt of the store.
    ids = store.add_prompts([[("user", row["prompt"])] for row in rows], args.overlap)
    store.add_answers([row | {"prompt": prompt} for row, prompt in zip(rows, ids, strict=True)])
    return list(dict.fromkeys(row["version"] for row in rows))


# ---- the model: its rooms load torch, so they are imported where one is asked for ----
def open_model(args: ScriptArguments):
    """The engine with all versions on one base, its `Chat`, and the prompts that --prompts names as turns."""
    from rlhf.compare import answers, inputs
    from rlhf.data import template
    from rlhf.models import loading
    from rlhf.page import chat, engine

    # 1. Base, tokenizer and adapters have to belong together.
    base_dir = loading.resolve_model(args.base_model_name, "--base_model_name")
    prompt_format = inputs.format_of(args, base_dir, inputs.tokenizer_of(args, base_dir))
    print(prompt_format.describe(), flush=True)
    rows = inputs.read_prompts(args.prompts, prompt_format.template)
    room = inputs.room_for_prompt(base_dir, 0)
    for row in rows:
        # Tried before the model loads: a prompt that is too long should not show after minutes.
        inputs.encode_prompt(prompt_format, row, room - args.max_new_tokens)

    # 2. One base in memory, and one thread that owns it.
    versions = inputs.load_versions(args, base_dir, prompt_format, answers.AnswerSettings())
    names = list(args.versions)
    reward = versions.score_heads.get(answers.REWARD_MODEL)
    running = engine.Engine(versions.model, prompt_format, names, reward=reward, max_rows=args.max_rows)
    # Of the page as well as of the answers that are prepared, so that both are drawn alike.
    defaults = {name: getattr(args, name) for name in SAMPLING}
    talk = chat.Chat(running, prompt_format, names, defaults, room, has_reward=reward is not None)
    return talk, [template.turns_of(row) for row in rows]


def fingerprinted(args: ScriptArguments) -> list[Version]:
    """The versions in memory, each with the fingerprint of its adapter."""
    from rlhf.compare.answers_file import fingerprint

    return [Version(name, fingerprint(value) or "") for name, value in args.versions.items()]


def open_page(args: ScriptArguments, store: Store):
    """Everything that the application serves."""
    from rlhf.page import app

    versions = stored_answers(args, store) if args.answers else []
    talk = None
    if args.base_model_name:
        talk, prompts = open_model(args)
        # With a file of answers the prompts are the file's.
        if not args.answers:
            store.add_prompts(prompts, args.overlap)
        # A version of the file and the one in memory are the same if name and fingerprint are.
        versions = list(dict.fromkeys([*versions, *fingerprinted(args)]))
        # An export names it in the command that comes next.
        store.note("base", args.base_model_name)

    page = app.Page(
        store=store,
        plan=Plan(store, versions, args.seed),
        output_dir=Path(args.output_dir),
        min_pairs=args.min_pairs,
        base=store.noted("base"),
        token=args.token,
        chat=talk,
    )
    if talk:
        from rlhf.page import api, engine, prepare

        sampling = {name: getattr(args, name) for name in SAMPLING}
        # Programs talk to the same engine, each version a model name.
        page.more_routes = api.routes(talk.engine, default_tokens=args.max_new_tokens)
        page.preparer = prepare.Preparer(page.plan, talk, engine.Settings(**sampling), sampling, args.seed)
    return page


# ---- serving ----
def listen(args: ScriptArguments) -> socket.socket:
    """A socket at --host and --port. Raises: OSError in a sentence where the port is taken."""
    # Opened here and not by uvicorn, whose own message on a taken port is a log line and an exit code.
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    opened = socket.socket(family)
    # A restart may take the port at once, without waiting until the last connections are forgotten.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((args.host, args.port))
        # Whoever opens the link at once waits for an answer, and is not refused.
        opened.listen(128)
    except OSError as error:
        raise OSError(f"--host {args.host} --port {args.port}: {error.strerror}: give another --port") from None
    return opened


def link(args: ScriptArguments, port: int) -> str:
    """The address to open, with the token where there is one."""
    everywhere = args.host in ("0.0.0.0", "::")
    # 0.0.0.0 is an address to listen on, and none to open.
    host = socket.gethostname() if everywhere else f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{port}/" + (f"?token={args.token}" if args.token else "")


def serve(args: ScriptArguments, page) -> None:
    """Answer requests until the process is told to end."""
    import uvicorn

    from rlhf.page import app, connections

    opened = listen(args)
    config = uvicorn.Config(
        app.create_app(page),
        http=connections.PatientProtocol,
        # The page needs no WebSocket, and what is not there cannot be attacked.
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        # An answer that is being streamed would otherwise keep the process for as long as it is written.
        timeout_graceful_shutdown=2,
    )
    print(f"open {link(args, opened.getsockname()[1])} (Ctrl-C ends; votes are in {page.store.file})", flush=True)
    uvicorn.Server(config).run(sockets=[opened])


def export_votes(args: ScriptArguments, store: Store) -> None:
    """--export_pairs: the votes as data for training, what became of them, and the command that trains on it."""
    file = Path(args.export_pairs)
    votes = [dict(row) for row in store.votes()]
    made = export.write(votes, file, args.min_pairs)
    print(f"{args.output_dir}: what became of the votes\n{made.in_words()}")
    print(f"written: {file}\nnext: {export.training_command(made, file, args.base_model_name or store.noted('base'))}")


def main(args: ScriptArguments) -> None:
    """Export, or open the page."""
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing and not args.export_pairs:
        raise ValueError(f"the page needs {', '.join(missing)}: pip install -r requirements.txt")
    # Opening the store would make an empty one.
    if args.export_pairs and not (Path(args.output_dir) / "votes.sqlite").is_file():
        raise FileNotFoundError(f"--output_dir {args.output_dir} holds no votes.sqlite: give that of the page")
    # Whoever can reach the machine could otherwise vote, and read every answer.
    if args.host not in LOOPBACK and args.token is None:
        # Anew at each start, unless a fixed one is asked for.
        args.token = secrets.token_hex(16)

    store = Store(args.output_dir)
    try:
        if args.export_pairs:
            return export_votes(args, store)
        page = open_page(args, store)
        if page.chat:
            page.chat.engine.start()
        serve(args, page)
    finally:
        store.close()


def run(args: ScriptArguments) -> None:
    """`main` to its exit code; without a model also without the libraries that take seconds to load."""
    if args.base_model_name:
        from rlhf.run import launch

        return launch.run_main(main, args)
    # What `run_main` would do, without the import of its libraries.
    startup.hand_signals_back()
    try:
        main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"playground.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(given)
