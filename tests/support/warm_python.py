"""A `python` for shell scripts under test that has imported everything: each start takes a moment in place of seconds.

`WarmPython` starts a server and writes an executable; that one hands its arguments, environment, directory and open
files to the server, which forks; it passes signals on and ends with the exit code of the fork.
"""

import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


class WarmPython:
    """An executable, `python`, that runs scripts in forks of one warm process."""

    def __init__(self):
        # A socket's path may have about 100 letters, less than some temporary folders of tests.
        self.folder = tempfile.TemporaryDirectory(prefix="warm")
        address = Path(self.folder.name) / "socket"
        self.python = Path(self.folder.name) / "python"
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{address}" "$@"\n')
        self.python.chmod(0o755)
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(address)], stdout=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline().strip() == "ready"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def run_script(job: dict, files: list[int]) -> None:
    """Be the process that `python <argv>` would have started; does not return."""
    for target, file in enumerate(files):
        os.dup2(file, target)
    # The server's own streams know what its files could do. Unbuffered, as in a terminal, what is printed is seen.
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = job["argv"]
    sys.path[0] = str(Path(job["argv"][0]).resolve().parent)

    importlib.import_module("rlhf.run.forks").own_pool()
    code = 0
    try:
        runpy.run_path(job["argv"][0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(client: socket.socket) -> None:
    """Run one client's script; tell the client its process, then its exit status as a shell gives it."""
    message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
    pid = os.fork()
    if pid == 0:
        client.close()
        run_script(json.loads(message), files)
    client.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    client.sendall(f"{code if code >= 0 else 128 - code}\n".encode())


def serve(address: str) -> None:
    """Import once, then fork for each client, as long as the process that started this one lives."""
    for name in ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare"):
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)

    # Nobody waits for the forks that answer.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(client)
            os._exit(0)
        client.close()


def ask(address: str, argv: list[str]) -> int:
    """Exit code of the script, run by the server as if this process had."""
    job = {"argv": argv, "cwd": os.getcwd(), "environment": dict(os.environ)}
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [json.dumps(job).encode()], [0, 1, 2])
    answers = server.makefile()
    pid = int(answers.readline())
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: os.kill(pid, signum))
    return int(answers.readline())


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
