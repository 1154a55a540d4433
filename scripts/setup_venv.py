"""Makes .venv and installs a requirements file into it; setup_venv.sh calls this, then activates what was made.

    python3 scripts/setup_venv.py requirements-dev.txt

The standard library alone, and any Python from 3.8 on: it may have to say that a newer one is needed.
uv installs where it can be had, else pip. uv reads nothing of pip's configuration: that is read here and handed on.
requirements.lock bounds every package. Given again after an interruption, it goes on where it stopped.
"""

import ast
import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ENV = Path(".venv")
PYTHON = ENV / "bin" / "python"
OLDEST = (3, 11)
# The Python that uv brings where the machine's own is too old.
BROUGHT = "3.12"
# Packages that come with one build of torch, which names their versions itself: a build for another CUDA needs others.
OF_TORCH_BUILD = re.compile("nvidia-|cuda-|triton")
# Setting of pip -> variable of uv, and what uv wants between several values.
TOLD_TO_UV = {
    "index-url": ("UV_INDEX_URL", " "),
    "extra-index-url": ("UV_EXTRA_INDEX_URL", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
    "no-cache-dir": ("UV_NO_CACHE", " "),
}
# What the stages import of it, in modules.
IMPORTED = """torch, accelerate, datasets, matplotlib.pyplot, peft, trl.trainer.sft_trainer, transformers.hf_argparser,
transformers.trainer, transformers.models.llama.modeling_llama""".replace("\n", " ")
TOO_OLD = """Python 3.11 or newer is needed; {}: name a newer one with PYTHON=...
On Ubuntu 22.04 either of these helps; then give the same command again:
  python3 -m pip install --user uv     (no root needed; uv brings a Python 3.12 for .venv alone)
  sudo apt install python3.11-venv"""


def say(text):
    print(text, flush=True)


def heard(command, **options):
    """Exit code and output of `command`, stdout and stderr together; 127 where there is no such program."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace", **options}
    words = [str(word) for word in command]
    try:
        # close_fds=False: what is started here holds the lock as long as it runs (`only_one`).
        done = subprocess.run(words, stdin=subprocess.DEVNULL, check=False, close_fds=False, **options)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def shown(command, **options):
    """Exit code of `command`, whose output goes where this script's goes: uv and pip show what they fetch."""
    return heard(command, stdout=None, stderr=None, **options)[0]


def requirement_lines(file):
    """Requirements of a file and of those it names by -r, without comments."""
    lines = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            lines += requirement_lines(line[3:].strip())
        elif line:
            lines.append(line)
    return lines


# ---- the environment ----


def environment_works():
    """True where activating .venv gives its own Python, new enough, with the packages' folder of that version.

    It does not after a move of the directory, half a `python -m venv`, or an upgrade of the Python it was made with.
    """
    probe = (
        "import os, sys, sysconfig; own = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1]); "
        f"sys.exit(not (own and os.path.isdir(sysconfig.get_path('purelib')) and sys.version_info >= {OLDEST}))"
    )
    script = '. "$1/bin/activate" && exec python -c "$2" "$1"'
    return heard(["bash", "-c", script, "bash", ENV, probe])[0] == 0


def version_of(python):
    """(major, minor) of an interpreter; None where it does not run, as a shim without its version does not."""
    code, text = heard([python, "-c", 'import sys; print("%d.%d" % sys.version_info[:2])'])
    numbers = re.fullmatch(r"(\d+)\.(\d+)", text.strip())
    return tuple(map(int, numbers.groups())) if code == 0 and numbers else None


def choose_python():
    """Name of the first interpreter that is new enough (or None), and in words what the first name stands for."""
    named = os.environ.get("PYTHON")
    names = [named] if named else ["python3", "python3.13", "python3.12", "python3.11"]
    versions = [version_of(name) for name in names]
    fit = [name for name, version in zip(names, versions) if version and version >= OLDEST]
    installed = "{} is Python {}.{}".format(names[0], *versions[0]) if versions[0] else f"there is no {names[0]}"
    return (fit[0] if fit else None), installed


def find_uv():
    """Command that runs uv, or None. pip and uv's own installer put it where PATH may not lead."""
    places = (["uv"], [PYTHON, "-m", "uv"], [os.path.expanduser("~/.local/bin/uv")])
    return next((command for command in places if heard([*command, "--version"])[0] == 0), None)


def make_environment():
    """Make .venv by `python -m venv`, or by uv where Python is too old for the packages or has no venv."""
    if ENV.is_symlink():
        sys.exit(f"{ENV} is a link to {os.readlink(ENV)}, where no environment works: remove the link")
    if ENV.exists():
        say(f"{ENV} does not work (half made, moved, or its Python changed): making it anew")
        shutil.rmtree(ENV)

    python, installed = choose_python()
    uv = find_uv()
    if python:
        say(f"making {ENV}")
        # Python takes most of the time to unpack a pip, which `put_pip` has sooner.
        code, text = heard([python, "-m", "venv", ENV, "--without-pip"])
        if code == 0:
            return
        if not uv:
            sys.exit(f"{python} -m venv failed: {text.strip()}")
        shutil.rmtree(ENV, ignore_errors=True)
    elif uv:
        say(f"{installed}, and 3.11 or newer is needed: uv makes {ENV} with Python {BROUGHT}")
    else:
        sys.exit(TOO_OLD.format(installed))

    code, text = heard([*uv, "venv", "--python", python or BROUGHT, ENV])
    if code:
        last = (text.strip().splitlines() or ["no word of it"])[-1].strip()
        sys.exit(f"{installed}, and uv could make no environment with Python {python or BROUGHT}: {last}")


# ---- what is in it ----


def packages():
    """Folders that name the installed packages: numpy-2.4.6.dist-info."""
    return list((ENV / "lib").glob("python3*/site-packages/*.dist-info"))


def is_whole(info):
    """True where the list of a package's files is there, and every file in it, with its size."""
    record = info / "RECORD"
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else ["RECORD,,"]
    for line in filter(None, lines):
        name, _, size = line.rsplit(",", 2)
        file = info.parent / name.strip('"')
        if file.suffix != ".pyc" and not (file.is_file() and size in ("", str(file.stat().st_size))):
            return False
    return True


def forget_half_installed():
    """Remove the folder that names a package where a kill left the package half there: it is then installed again."""
    for info in packages():
        if not is_whole(info):
            say(f"{info.stem} is only half there: installing it again")
            shutil.rmtree(info)


def missing(requirements):
    """Requirements of a file that .venv lacks in their versions; a build of one (+cpu) is that version."""
    there = [info.stem.lower().replace("_", "-").split("-") for info in packages()]
    there = {f"{'-'.join(words[:-1])}=={words[-1].split('+')[0]}" for words in there}
    return [line for line in requirement_lines(requirements) if line.lower() not in there]


# ---- installing ----


def find_pip():
    """Command that runs a pip for .venv, or []. A new .venv has none yet: another Python's installs into it too."""
    own = [PYTHON, "-m", "pip"]
    beside = [sys.executable, "-m", "pip", "--python", PYTHON]
    for pip in (own, beside):
        if heard([*pip, "--version"])[0] == 0:
            return pip
    return own if heard([PYTHON, "-m", "ensurepip"])[0] == 0 else []


def told_to(pip):
    """What the user told pip by files and PIP_ variables, as {name: value}; without a pip only the variables count."""
    if not pip:
        told = [name for name in os.environ if name.startswith("PIP_")]
        return {name[4:].lower().replace("_", "-"): os.environ[name] for name in told}

    _, text = heard([*pip, "config", "list"], stderr=subprocess.DEVNULL)
    settings = {}
    for section in ("global.", "install.", ":env:."):
        for line in text.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section):
                settings[name[len(section) :]] = ast.literal_eval(value)
    return settings


def put_pip(uv):
    """Put pip into .venv, where users look for it: uv unpacks the wheel that Python brings in no time."""
    if heard([PYTHON, "-c", "import pip"])[0] == 0:
        return
    bundled = "import ensurepip, pathlib; print(*pathlib.Path(ensurepip.__file__).parent.glob('_bundled/pip-*.whl'))"
    wheel = heard([PYTHON, "-c", bundled])[1].strip()
    flags = ["--python", PYTHON, "--no-deps", "--no-index"]
    if not uv or not wheel.endswith(".whl") or heard([*uv, "pip", "install", *flags, wheel])[0]:
        heard([PYTHON, "-m", "ensurepip"])


def can_write(folder):
    """True where `folder` is there and takes files, or can be made where it belongs."""
    folder = Path(folder).absolute()
    return os.access(next(place for place in (folder, *folder.parents) if place.exists()), os.W_OK | os.X_OK)


def uv_environment(settings):
    """This process's environment with pip's settings for uv in it. A variable that the user set for uv stays.

    Variables, not flags: an address may hold a password, and everybody on the machine can read flags.
    """
    # pip takes the best version of all indexes, uv by itself that of the first index that has the package.
    given = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    certificates = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if certificates:
        given["SSL_CERT_FILE"] = certificates
    for name, (variable, between) in TOLD_TO_UV.items():
        if settings.get(name):
            given[variable] = between.join(map(os.path.expanduser, settings[name].split()))

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if settings.get("cache-dir"):
        cache = given["UV_CACHE_DIR"] = os.path.join(os.path.expanduser(settings["cache-dir"]), "uv")
    if not can_write(os.environ.get("UV_CACHE_DIR", cache)):
        given["UV_NO_CACHE"] = "1"
    return {**given, **os.environ}


def uv_flags(settings):
    """What uv takes from pip's settings by flags alone."""
    flags = []
    for file in settings.get("constraint", "").split():
        flags += ["-c", os.path.expanduser(file)]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        flags.append("--no-index")
    return flags


def write_bounds():
    """Flags that bound every package by requirements.lock, except those that come with a build of torch."""
    lines = [line for line in requirement_lines("requirements.lock") if not OF_TORCH_BUILD.match(line)]
    (ENV / "constraints.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["-c", ENV / "constraints.txt"]


def why_uv_cannot(command, environment):
    """None where uv did what `command` says, else its words. Without a network its cache may hold everything."""
    trial = [*command, "--dry-run"]
    code, text = heard(trial, env=environment)
    if code:
        environment = {**environment, "UV_OFFLINE": "1"}
        if heard(trial, env=environment)[0]:
            return text.strip()
        say("no package index answers: uv installs what its cache holds")
    return "uv's words are above" if shown(command, env=environment) else None


def why_pip_cannot(pip):
    """None where pip can get one small package that is needed anyway, else its last words."""
    if not pip:
        return "there is no pip either"
    small = next(line for line in requirement_lines("requirements.lock") if line.startswith("packaging=="))
    code, text = heard([*pip, "install", "--quiet", "--retries", "1", "--no-deps", "--force-reinstall", small])
    lines = text.strip().splitlines() or ["nothing"]
    return f"pip reaches no package index and says: {lines[-1]}" if code else None


def stop(requirements, why):
    lacking = missing(requirements)
    names = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    sys.exit(
        f"the set-up stopped, and {ENV} lacks {names or 'what its packages need'} ({why}): what was fetched is kept, "
        "the same command goes on from it; without a network see docs/running.md, Offline use and mirrors"
    )


def install(requirements):
    """Install torch, then the rest: by uv, and by pip where uv cannot be had or cannot do it."""
    forget_half_installed()
    pip = find_pip()
    settings = told_to(pip)
    environment = uv_environment(settings)
    bounds = write_bounds()

    uv = find_uv()
    if pip and not uv:
        say("getting uv, which installs in a fraction of pip's time")
        heard([*pip, "install", "--quiet", "--retries", "1", *bounds, "uv"])
        uv = find_uv()

    # torch first and alone: a resolver that sees it together with the rest may prefer another build of it.
    torch = next(line for line in requirement_lines("requirements.txt") if line.startswith("torch=="))
    why_pip = "" if uv else "uv cannot be had here"
    for number, words in enumerate(([torch], ["-r", requirements]), 1):
        say(f"[{number}/2] installing {words[-1]}")
        if uv:
            command = [*uv, "pip", "install", "--python", PYTHON, *bounds, *uv_flags(settings), *words]
            why_pip = why_uv_cannot(command, environment)
            if not why_pip:
                continue

        # One small package shows in a second whether pip reaches anything.
        if why_pip:
            error = why_pip_cannot(pip)
            if error:
                stop(requirements, error)
            say(f"pip installs: {why_pip}")
        uv = None
        why_pip = ""
        if shown([*pip, "install", *bounds, *words]):
            stop(requirements, "pip's words are above")
    put_pip(uv)


# ---- the whole ----


@contextlib.contextmanager
def only_one():
    """Hold .venv.lock, one set-up at a time. What this one started holds it too, also after a kill of this process."""
    # Beside the environment itself: several checkouts may share one by links.
    with open(f"{os.path.realpath(ENV)}.lock", "w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up of {ENV} is at work: waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"this file system has no locks ({error}): do not set up twice at once")
        yield


def summary(seconds):
    """One line: seconds, size, Python, torch's build, the cards it can use. Ends here where torch does not import.

    What is imported for it is compiled by the way, also where Python may not do so later: there each start would take
    some 10 s longer. pip compiles all that it installs, which takes most of its time.
    """
    environment = {**os.environ}
    imported = IMPORTED if environment.pop("PYTHONDONTWRITEBYTECODE", "") else "torch"
    probe = f"import contextlib\nwith contextlib.suppress(Exception):\n    import {imported}\n"
    probe += """
import sys, torch
cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
if torch.backends.mps.is_available():
    cards.append("Apple GPU")
named = ", ".join(f"{cards.count(card)} x {card}" for card in sorted(set(cards))) or "no GPU that torch can use"
print("Python %d.%d.%d" % sys.version_info[:3], f"torch {torch.__version__}", named, sep=", ")
"""
    code, text = heard([PYTHON, "-c", probe], env=environment)
    lines = text.strip().splitlines() or ["no output"]
    if code:
        sys.exit(f"torch is installed in {ENV}, but does not import: {lines[-1]}")

    size = 0
    for folder, _, files in os.walk(ENV):
        size += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in files)
    return f"set up in {seconds():.0f} s: {ENV} {size / 1e9:.1f} GB, {lines[-1]}"


def main(requirements):
    begin = time.monotonic()
    files = (requirements, "requirements.txt", "requirements.lock")
    wanted = {line for file in files for line in requirement_lines(file)}

    def is_done():
        # What was installed for a longer list serves a shorter one.
        marks = ENV.glob("installed_*.txt")
        lists = [set(mark.read_text(encoding="utf-8").splitlines()) for mark in marks]
        return any(wanted <= lines for lines in lists) and environment_works()

    if is_done():
        return
    with only_one():
        # Whoever had to wait finds the work done.
        if is_done():
            return
        if not environment_works():
            make_environment()
        # No list is true any more as soon as a package changes.
        for mark in ENV.glob("installed_*.txt"):
            mark.unlink()
        install(requirements)
        line = summary(lambda: time.monotonic() - begin)
        (ENV / f"installed_{requirements}").write_text("\n".join(sorted(wanted)) + "\n", encoding="utf-8")
    say(line)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit("the set-up was interrupted: the same command goes on from there")
