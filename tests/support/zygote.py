"""A process that has imported everything and forks a child for each run: a second a case in place of ten.

Jobs come as JSON lines on stdin: {"script", "argv", "log"}. More keys of a job:

    signum       the signal that the child sends to itself
    target       "module:name" of the function at which it does so
    when         "before" or "after" the call, "twice" with a pause, "later" by "delay" seconds; "full": the call
                 raises the error of a disk without room instead
    call         which call of the target (1)
    caller       only calls from the function of this name count
    delay        without a target: seconds from the child's start
    seconds      after which the child gets SIGALRM, and bytes: of address space that it may take
    file_bytes   that a file may grow to, as under ulimit -f; the log is such a file too
    environment  variables of the child; PYTHONWARNINGS=error among them is obeyed, as Python does at its start
    encoding     of the child's stdout and stderr, strict, as under PYTHONIOENCODING
    cwd          directory of the child
    ranks, port  that many processes of one gloo group
    rank         the process that gets the signal (0)

Each answer is the exit status as a shell gives it (128 + signal), of the first process that failed. A process that
stops itself (SIGSTOP) gives 128 + SIGSTOP and is left as it is.
"""

import errno
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
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
    # A method: its class first.
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    seen = SimpleNamespace(calls=0)

    def struck(*args, **kwargs):
        here = "caller" not in job or sys._getframe(1).f_code.co_name == job["caller"]
        seen.calls += here
        if not here or seen.calls != job.get("call", 1):
            return real(*args, **kwargs)

        # The call that was meant.
        strike_before(job)
        output = real(*args, **kwargs)
        if job["when"] == "after":
            os.kill(os.getpid(), job["signum"])
        return output

    setattr(owner, name, struck)


def strike_before(job: dict) -> None:
    """Whatever a job wants to happen before its call."""
    me = os.getpid()
    if job["when"] == "before":
        os.kill(me, job["signum"])
    if job["when"] == "twice":
        # A second signal within a second would be taken for the first one, sent to the group as well.
        os.kill(me, job["signum"])
        time.sleep(1.2)
        os.kill(me, job["signum"])
        time.sleep(60)
    if job["when"] == "later":
        blow_later(job)
    if job["when"] == "full":
        raise OSError(errno.ENOSPC, "No space left on device")


def child(job: dict, rank: int) -> None:
    """Run a stage script as from its command line; does not return."""
    os.environ.update(job.get("environment", {}))
    signal.alarm(job.get("seconds", 0))
    for name, limit in (("bytes", resource.RLIMIT_AS), ("file_bytes", resource.RLIMIT_FSIZE)):
        if name in job:
            resource.setrlimit(limit, (job[name], resource.getrlimit(limit)[1]))
    # What a launcher would set.
    if "ranks" in job:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": job["port"]}
        variables = {name: str(value) for name, value in place.items()}
        os.environ.update(variables, MASTER_ADDR="127.0.0.1")

    # Stdout is where the zygote answers: the stage must not write there.
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # And stdin is where the zygote gets its jobs from.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)

    if "encoding" in job:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=job["encoding"], errors="strict")
    if os.environ.get("PYTHONWARNINGS") == "error":
        sys.warnoptions.append("error")
        warnings.simplefilter("error")

    importlib.import_module("rlhf.run.forks").own_pool()
    script = importlib.import_module(job["script"])
    sys.argv = [f"{job['script']}.py", *job["argv"]]
    if "cwd" in job:
        os.chdir(job["cwd"])
        # A launcher starts its workers by this name.
        sys.argv[0] = script.__file__
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

    # Without the handlers of the process that this one is a copy of.
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

    # Only a job that stops its own process waits for that: a debugger or a batch system may stop one as well.
    options = os.WUNTRACED if job.get("signum") == signal.SIGSTOP else 0
    first = 0
    while running:
        pid, status = os.waitpid(-1, options)
        # A process of an earlier job that was left stopped may end now.
        if pid not in running:
            continue
        running.remove(pid)
        code = shell_status(status)
        if code and not first:
            first = code
            for other in running:
                os.kill(other, signal.SIGTERM)
    return first


def shell_status(status: int) -> int:
    """Exit status as a shell gives it: 128 + signal for a process that was killed or stopped by one."""
    if os.WIFSTOPPED(status):
        return os.WSTOPSIG(status) + 128
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main() -> None:
    """Import once, then fork as asked."""
    # Set before the libraries read them.
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    for name in ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare", "rlhf.run.launch"):
        importlib.import_module(name)
    print("ready", flush=True)

    for line in sys.stdin:
        job = json.loads(line)
        print(first_failure(job), flush=True)


if __name__ == "__main__":
    # A Ctrl-C at the terminal reaches the whole group; the tests end this process themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
