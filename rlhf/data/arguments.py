"""Flags of the data: which rows a stage reads, and the prompt format that they are put into."""

import json
import math
from dataclasses import dataclass

from rlhf.data.template import AUTO, CHAT, check_template
from rlhf.flags import Flags, flag

# The tutorial's two data sets; the first is read without the loading script that it has on the hub
# (rlhf/data/sources.py).
SFT_DATASET = "Hello-SimpleAI/HC3-Chinese"

PREFERENCE_DATASET = "beyond/rlhf-reward-single-round-trans_chinese"


@dataclass(kw_only=True)
class FormatFlags(Flags):
    """Flags of the prompt format: how a dialogue becomes a query, and what ends an answer."""

    # None is for scripts that take the adapters' own format where nothing is asked for.
    prompt_template: str | None = flag(
        AUTO,
        help="chat: the tokenizer's chat template; or a text around {prompt}, \\n is a new line; auto: chat where "
        "there is one, else 问：{prompt}\\n\\n答：",
        group="data",
    )
    chat_template: str | None = flag(
        None,
        help="file with a Jinja chat template in place of the tokenizer's",
        group="data",
        resume="path",
        expert=True,
    )
    # Text and not a dictionary: a command line, and run.json after it, hold it as it was typed.
    chat_template_kwargs: str | None = flag(
        None,
        help="""JSON object that the chat template is called with, such as '{"enable_thinking": false}'""",
        group="data",
    )
    system_prompt: str | None = flag(
        None, help="system message in front of every dialogue that has none", group="data", expert=True
    )
    # Three values: tokenizers differ in what they do by themselves, and None leaves it to them.
    bos: bool | None = flag(
        None, help="begin every query with the BOS token; by default as the tokenizer does", group="data", expert=True
    )
    stop_tokens: str | None = flag(None, help="further tokens that end an answer, as 'a|b'", group="data", expert=True)

    def __post_init__(self):
        # A shell passes backslash and n where a new line is meant.
        if self.prompt_template is not None:
            self.prompt_template = check_template(self.prompt_template.replace("\\n", "\n"))
        if self.chat_template_kwargs is not None:
            _refuse_no_object(self.chat_template_kwargs)
        for name in ("chat_template", "chat_template_kwargs"):
            # A flag that does nothing would be believed to work.
            if getattr(self, name) and self.prompt_template not in (AUTO, CHAT, None):
                raise ValueError(f"--{name} belongs to --prompt_template chat: leave one of the two out")
        super().__post_init__()


def _refuse_no_object(text: str) -> None:
    """Raises: ValueError unless --chat_template_kwargs is a JSON object of settings that the code does not make."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"""--chat_template_kwargs {text} is no JSON object: write '{{"enable_thinking": false}}', quotes too"""
        )
    reserved = sorted(
        # Jinja would take such a setting in place of ours, and every prompt would be rendered otherwise.
        settings.keys() & {"messages", "conversation", "tokenize", "add_generation_prompt", "chat_template"}
    )
    if reserved:
        raise ValueError(f"--chat_template_kwargs must not hold {reserved[0]}: every stage sets it by itself")


@dataclass(kw_only=True)
class DataArguments(FormatFlags):
    """Flags that say which rows a stage reads."""

    # A path may differ on a resume: the rows themselves are compared, by their fingerprint.
    dataset_name: str = flag(
        PREFERENCE_DATASET,
        help="hub id, save_to_disk directory, directory of data files, or one .json/.jsonl/.csv/.parquet file",
        group="data",
        resume="path",
    )
    dataset_config_name: str | None = flag(None, help="configuration of a hub data set", group="data", expert=True)
    train_split: str = flag("train", help="split to train on", group="data", expert=True)
    eval_split: str | None = flag(
        None, help="split to evaluate on; by default test or validation, else one is made", group="data", expert=True
    )
    eval_dataset_name: str | None = flag(
        None, help="source of the evaluation rows, instead of a split", group="data", resume="path"
    )
    # A share by default, so that a small data set keeps most of its rows for training.
    eval_size: float = flag(
        0.05,
        help="rows of an evaluation split made here: a share below 1, or their number; 0 for none",
        group="data",
        expert=True,
    )
    prompt_field: str | None = flag(
        None, help="column of the prompt, if not found by its name", group="data", expert=True
    )
    answer_field: str | None = flag(
        None, help="column of the answer, if not found by its name", group="data", expert=True
    )
    chosen_field: str | None = flag(
        None, help="column of the preferred answer, if not found by its name", group="data", expert=True
    )
    rejected_field: str | None = flag(
        None, help="column of the other answer, if not found by its name", group="data", expert=True
    )
    # Stop by default: a row that cannot be read is more often a mistake in all of them than in one.
    bad_rows: str = flag(
        "stop",
        help="malformed rows: stop and name them, or skip them into bad_rows.jsonl",
        group="data",
        choices=["stop", "skip"],
        expert=True,
    )
    # Free on a resume, since cached rows are those that the source would give.
    data_cache: str | None = flag(
        None,
        help="directory that encoded rows are kept in for later starts; by default that of datasets; none: keep none",
        group="data",
        resume="free",
        expert=True,
    )

    inspect_rows: int = flag(
        10_000,
        help="rows of each source, the first ones, that --inspect_data looks at; -1 for all",
        group="data",
        resume="free",
        expert=True,
    )

    def __post_init__(self):
        if self.inspect_rows < 1 and self.inspect_rows != -1:
            raise ValueError(f"--inspect_rows {self.inspect_rows} is no number of rows: give 1 or more, or -1 for all")
        if not 0 <= self.eval_size < math.inf:
            raise ValueError(f"--eval_size {self.eval_size} is no size: give a share below 1 or a number of rows")
        # Of another source a split of the same name holds other rows.
        if self.eval_split == self.train_split and not self.eval_dataset_name:
            raise ValueError(f"--eval_split {self.eval_split} is the split to train on: name another or leave it out")
        super().__post_init__()

    def row_limit(self) -> int | None:
        """Rows that are read of each source; None: all, as everywhere but under --inspect_data."""
        limited = getattr(self, "inspect_data", False) and self.inspect_rows != -1
        return self.inspect_rows if limited else None

    def named_columns(self) -> dict[str, str | None]:
        """The columns the user named, as `find_format` takes them."""
        roles = ("prompt", "answer", "chosen", "rejected", "margin")
        # Only preferences have a margin: the flag is the reward stage's.
        return {role: getattr(self, f"{role}_field", None) for role in roles}
