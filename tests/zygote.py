"""A process that has imported everything and forks a child for each run: a second a case in place of ten.

Jobs come as JSON lines on stdin: {"script", "argv", "log"} and, for a planted blow, "signum" with either "delay"
(seconds until it falls, wherever that is) or "target" ("module:name"), "when" ("before", "after", or "full" for a disk
without room), "call" (which call of it) and "caller" (only when called from this function). Each answer is the exit
status as a shell gives it (128 + signal).
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


def plant(job: dict) -> None:
    """Send this process `signum` before or after the `call`-th call of `target`, or after `delay` seconds."""
    if "delay" in job:

        def blow() -> None:
            time.sleep(job["delay"])
            os.kill(os.getpid(), job["signum"])

        threading.Thread(target=blow, daemon=True).start()
    if "target" not in job:
        return
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
        if due and job["when"] == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        found = real(*args, **kwargs)
        if due and job["when"] == "after":
            os.kill(os.getpid(), job["signum"])
        return found

    setattr(owner, name, struck)


def child(job: dict) -> None:
    """Run a stage script as from its command line; does not return."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = importlib.import_module(job["script"])
    sys.argv = [f"{job['script']}.py", *job["argv"]]
    code = 0
    try:
        plant(job)
        importlib.import_module("rlhf.launch").run_script(script.main, script.parse_args)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Import once, then fork as asked."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    for name in ("sft_training", "reward_modeling", "rl_training", "rlhf.launch"):
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(code if code >= 0 else 128 - code, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
