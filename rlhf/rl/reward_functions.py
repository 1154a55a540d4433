"""Reward functions of the user's own: found, called on a batch, and held to what they promise.

A file of reward functions is the user's own code and runs as such, without a sandbox.
"""

import hashlib
import importlib.util
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from rlhf.artefacts.time_limits import within_seconds
from rlhf.reward import functions

# Names that --reward_functions takes without a file.
READY = ("overlong", "repetition", "exact_answer", "pattern")


@dataclass(frozen=True)
class RewardFunction:
    """A function of --reward_functions.

    Attributes:
        name: in metrics and samples. argument: the text behind "=", or None. sha256: of its file.
    """

    name: str
    argument: str | None
    call: Callable[[list[str], list[str], list[dict]], list]
    sha256: str


def record_of(functions_used: list[RewardFunction]) -> list[dict]:
    """What run.json keeps of the functions, for a resume to compare."""
    names = ("name", "argument", "sha256")
    return [{name: getattr(function, name) for name in names} for function in functions_used]


def files_of(specs: list[str]) -> dict[str, str]:
    """Flag with its value -> file, of the functions that are in files."""
    places = {spec: spec.partition("=")[0].rpartition(":")[0] for spec in specs}
    return {f"--reward_functions {spec}": file for spec, file in places.items() if file}


def load_functions(specs: list[str]) -> list[RewardFunction]:
    """The functions that FILE:FUNCTION, the name of a ready one, or either with =TEXT name.

    Raises: ValueError in one sentence where a file or a function is missing, or the file cannot be run.
    """
    functions = [_load(spec) for spec in specs]
    names = [function.name for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--reward_functions names {name} twice: its parts could not be told apart in the log")
    return functions


def _load(spec: str) -> RewardFunction:
    # Only what stands before the first "=" is searched for the colon: a regular expression behind it may hold both
    # signs.
    place, equals, text = spec.partition("=")
    file, colon, name = place.rpartition(":")
    if not colon:
        if place not in READY:
            ready = ", ".join(READY)
            raise ValueError(f"--reward_functions {spec}: write FILE:FUNCTION, or one of the ready ones: {ready}")
        module = functions
        name = place
        path = Path(functions.__file__)
    else:
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"--reward_functions {spec}: there is no file {path}")
        module = _run(path, path.read_bytes(), spec)

    function = getattr(module, name, None)
    if not callable(function):
        # What the file imports is among them: it is a hint, and not a list to choose from.
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"--reward_functions {spec}: {path} has no function {name}; it has {', '.join(own) or 'none'}"
        )
    # All of the file, not the function alone: what the function calls may stand anywhere in it.
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # By the sign and not by the text: an empty text behind "=" is a fourth argument too.
    call = (lambda *batch: function(*batch, text)) if equals else function
    return RewardFunction(name, text if equals else None, call, digest)


# The functions are loaded twice, for run.json and for the loop: the user's code must not run a second time for that.
# The contents are part of the key, so that a file which was changed meanwhile is not taken from here.
@lru_cache
def _run(path: Path, contents: bytes, spec: str) -> ModuleType:
    """The module that a file of these contents defines, run once. Raises: ValueError naming where it fails."""
    source = importlib.util.spec_from_file_location(f"reward_functions_{path.stem}", path)
    if source is None or source.loader is None:
        raise ValueError(f"--reward_functions {spec}: {path} is no Python file")
    module = importlib.util.module_from_spec(source)
    try:
        source.loader.exec_module(module)
    # Code of the user's own may raise anything, and all of it is the user's to mend.
    except Exception as error:
        raise ValueError(f"--reward_functions {spec}: {path} cannot be run ({_cause(error, path)})") from error
    return module


def call_function(
    function: RewardFunction, prompts: list[str], responses: list[str], rows: list[dict], timeout: float = 0.0
) -> Tensor:
    """[B] float32: a function's score of each response, NaN where it does not apply.

    Args:
        rows: as the function takes them. timeout: seconds that a call may take; 0: any.
    Raises: ValueError naming the function, the row and the value where it raises, takes too long, or gives anything
        but one finite number or None a response.
    """
    name = f"reward function {function.name}"
    try:
        with within_seconds(timeout):
            scores = function.call(prompts, responses, rows)
    except TimeoutError:
        raise ValueError(f"{name} took longer than --reward_timeout {timeout:g} seconds for a batch") from None
    except Exception as error:
        raise ValueError(f"{name} failed: {_cause(error)}") from error

    # Tensors, arrays and columns of a table alike; of a tensor on a GPU this is the one copy.
    if torch.is_tensor(scores) or hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple) or len(scores) != len(responses):
        given = f"{len(scores)} scores" if isinstance(scores, list | tuple) else type(scores).__name__
        raise ValueError(f"{name} gave {given} for {len(responses)} responses: it has to give one for each")
    for row, score in enumerate(scores):
        # True and False are scores: right or wrong is what such functions often say. NaN is not, as it would spread to
        # every mean of the batch without a word.
        if score is not None and not (isinstance(score, bool | int | float) and math.isfinite(score)):
            raise ValueError(f"{name} gave {score!r:.60} for row {row} ({responses[row]!r:.60}): not a finite number")
    return torch.tensor([math.nan if score is None else float(score) for score in scores])


def _cause(error: Exception, path: Path | None = None) -> str:
    """An error of the user's own code in a few words: kind, text, file and line."""
    # The deepest frame may lie inside a library: the last one in the user's file is the line to mend.
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is None or frame.filename == str(path)]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    # An error may quote a whole response.
    words = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}{': ' if words else ''}{words}{place}"
