"""Scripts run in this process as their command lines run them."""

import importlib
import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from rlhf.run import launch


def run_here(script: str, *words: str) -> tuple[int, str, str]:
    """Exit code of `python <script>.py <words>`, and what it wrote to stdout and to stderr."""
    module = importlib.import_module(script)
    code = 0
    out = io.StringIO()
    err = io.StringIO()
    # A script's own signal handlers would stay in this process and swallow a Ctrl-C of the test run.
    with (
        mock.patch.object(launch, "listen", lambda: None),
        # A script prints warnings its own way, which must not stay in this process.
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", [f"{script}.py", *words]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            launch.run_script(module.main, module.parse_args)
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()
