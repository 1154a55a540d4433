"""A process that has imported everything and forks a child for each run: a second a case in place of ten.

Jobs come as JSON lines on stdin: {"script", "argv", "log"} and, for a planted blow, "signum" with "target"
("module:name"), "when" ("before", "after", "twice" with a pause, "later" by "delay" seconds, or "full" for a disk
without room), "call" (which call of it) and "caller" (only when called from this function); a "delay" without a target
counts from the child's start. "environment" sets variables; "ranks" starts that many processes of one gloo group, the
blow falling on "rank" (0) alone. Each answer is the exit status as a shell gives it (128 + signal), of the first
process that failed; a process that stops itself (SIGSTOP) is answered likewise, and left as it is.
"""

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace


def blow_later(job: dict) -> None:
    """Send this process `signum` in `delay` seconds, wherever it will be by then; nothing without a delay."""

    def blow() -> None:
        time.sleep(job["delay"])
        os.kill(os.getpid(), job["signum"])

    if "delay" in job:
        threading.Thread(target=blow, daemon=True).start()


def plant(job: dict) -> None:
    """Send this process `signum` before, after or a while after the `call`-th call of `target`, or of its start."""
    if "target" not in job:
        return blow_later(job)
    module, name = job["target"].split(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, seen = getattr(owner, name), SimpleNamespace(calls=0)

    def struck(*args, **kwargs):
        here = "caller" not in job or sys._getframe(1).f_code.co_name == job["caller"]
        seen.calls += here
        due = here and seen.calls == job.get("call", 1)
        if due and job["when"] == "before":
            os.kill(os.getpid(), job["signum"])
        if due and job["when"] == "twice":
            os.kill(os.getpid(), job["signum"])
            time.sleep(1.2)
            os.kill(os.getpid(), job["signum"])
            time.sleep(60)
        if due and job["when"] == "later":
            blow_later(job)
        if due and job["when"] == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        found = real(*args, **kwargs)
        if due and job["when"] == "after":
            os.kill(os.getpid(), job["signum"])
        return found

    setattr(owner, name, struck)


def child(job: dict, rank: int) -> None:
    """Run a stage script as from its command line; does not return."""
    os.environ.update(job.get("environment", {}))
    if "ranks" in job:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = importlib.import_module(job["script"])
    sys.argv = [f"{job['script']}.py", *job["argv"]]
    code = 0
    try:
        if rank == job.get("rank", 0):
            plant(job)
        importlib.import_module("rlhf.run.launch").run_script(script.main, script.parse_args)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def first_failure(job: dict) -> int:
    """Fork the job's processes and wait for them; as under a launcher, the others are told to stop when one fails."""
    running = set()
    for rank in range(job.get("ranks", 1)):
        pid = os.fork()
        if pid == 0:
            child(job, rank)
        running.add(pid)
    first = 0
    while running:
        # Whoever else stops a process for a while is none of our business.
        pid, status = os.waitpid(-1, os.WUNTRACED if job.get("signum") == signal.SIGSTOP else 0)
        code = os.WSTOPSIG(status) + 128 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        if pid not in running:
            continue
        running.remove(pid)
        if code and not first:
            first = code
            for other in running:
                os.kill(other, signal.SIGTERM)
    return first


def main() -> None:
    """Import once, then fork as asked."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    for name in ("sft_training", "reward_modeling", "rl_training", "rlhf.run.launch"):
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(first_failure(job), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
