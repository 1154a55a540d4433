"""The set-up with real pip and uv: small wheels stand for torch and the rest, a server on this machine for the index.

Every project here lies in a path with a blank and Chinese letters.
"""

import ast
import http.server
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt", "requirements-optional.txt")
UV = Path(sys.prefix) / "bin" / "uv"
PIP = importlib.util.find_spec("pip")
TORCH = """
from types import SimpleNamespace
__version__ = "{version}"
cuda = SimpleNamespace(device_count=lambda: 0)
backends = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False))
"""

needs_installers = pytest.mark.skipif(PIP is None or not UV.is_file(), reason="this environment has no pip or no uv")


def load_setup():
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "scripts" / "setup_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A package of one module; torch's says enough of itself to be asked for its build and cards."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": TORCH.format(version=version) if name == "torch" else "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,{len(text)}\n" for file, text in files.items())
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


class Index(http.server.BaseHTTPRequestHandler):
    """Folders of wheels as package indexes: /<folder>/simple/<package>/. Torch's wheel waits for `server.open`."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["User-Agent"].split("/")[0]))
        folder, _, name = unquote(self.path).strip("/").partition("/")
        wheels = self.server.wheels / folder
        if name.endswith(".whl"):
            if name.startswith("torch"):
                self.server.open.wait(60)
            return self.answer((wheels / name).read_bytes(), "application/octet-stream")
        found = wheels.glob(f"{name.removeprefix('simple/').replace('-', '_')}-*.whl")
        links = "".join(f'<a href="/{folder}/{file.name.replace("+", "%2B")}">{file.name}</a>' for file in found)
        return self.answer(links.encode(), "text/html", 200 if links else 404)

    def do_HEAD(self):
        self.send_error(404)

    def answer(self, body, kind, code=200):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Two folders of wheels: all packages, and a CPU build of torch alone."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, version, needs in (
        ("torch", "1.5.0", ""), ("alpha", "1.0", "gamma"), ("beta", "1.0", "packaging"), ("packaging", "1.0", ""),
        ("gamma", "1.0", ""), ("gamma", "2.0", ""),
    ):  # fmt: skip
        write_wheel(folder / "all", name, version, needs)
    write_wheel(folder / "cpu", "torch", "1.5.0+cpu")
    return folder


@pytest.fixture
def server(wheels):
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    found.wheels = wheels
    found.asked = []
    found.open = threading.Event()
    found.open.set()
    found.address = f"http://127.0.0.1:{found.server_port}"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.open.set()
    found.shutdown()
    found.server_close()


class Project:
    """A folder with the set-up's files and small requirements, and a PATH that holds bash and python3 alone."""

    def __init__(self, root: Path):
        self.folder = root / "我的 项目"
        self.bin = root / "bin"
        self.bin.mkdir(parents=True)
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("setup_venv.sh", "setup_venv.py"):
            shutil.copy(ROOT / "scripts" / name, self.folder / "scripts" / name)
        self.write("requirements.txt", "# why\ntorch==1.5.0\nalpha==1.0\n")
        self.write("requirements-dev.txt", "-r requirements.txt\nbeta==1.0\n")
        pins = "torch==1.5.0 alpha==1.0 beta==1.0 gamma==1.0 packaging==1.0 nvidia-thing==1.0"
        self.write("requirements.lock", pins.replace(" ", "\n    # via something\n"))
        self.put("basename", f'exec "{shutil.which("basename")}" "$@"')
        self.put("bash", f'exec "{shutil.which("bash")}" "$@"')
        self.put_python()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHON"))}
        # No setting of this machine's pip: its user's by HOME, the machine's by PIP_CONFIG_FILE.
        told = {"PATH": str(self.bin), "HOME": str(root / "home"), "PIP_CONFIG_FILE": "/dev/null"}
        self.environment = kept | told | {"UV_CACHE_DIR": str(root / "uv cache"), "UV_HTTP_RETRIES": "0"}
        (root / "home").mkdir()

    def write(self, name, text):
        (self.folder / name).write_text(text, encoding="utf-8")

    def put(self, name, script):
        file = self.bin / name
        file.write_text(f"#!{shutil.which('bash')}\n{script}\n", encoding="utf-8")
        file.chmod(0o755)

    def put_python(self, version=""):
        """python3 as it is, but for `-m venv`: unpacking a pip takes seconds, so .venv gets a path to this one's."""
        shown = f'[ -n "{version}" ] && case "$2" in *print*) echo {version}; exit;; esac\n' if version else ""
        make = (
            "import sys, venv, pathlib; venv.create(sys.argv[1], symlinks=True); "
            "next(pathlib.Path(sys.argv[1]).glob('lib/python*/site-packages')).joinpath('pip.pth').write_text(sys.argv[2])"
        )
        # The folder holds pip and nothing beside it that would count as installed.
        beside = self.bin / "pip_alone"
        beside.mkdir(exist_ok=True)
        if PIP and not (beside / "pip").exists():
            (beside / "pip").symlink_to(Path(PIP.origin).parent)
        self.put(
            "python3",
            f'{shown}if [ "$2" = venv ]; then exec "{sys.executable}" -c "{make}" "$3" "{beside}"; fi\n'
            f'exec "{sys.executable}" "$@"',
        )

    def put_uv(self, script=""):
        self.put("uv", f'{script}\nexec "{UV}" "$@"')

    def start(self, requirements="requirements-dev.txt", **variables):
        script = 'set -euo pipefail; source scripts/setup_venv.sh "$1"; echo "active: $VIRTUAL_ENV"'
        return subprocess.Popen(
            [shutil.which("bash"), "-c", script, "setup", requirements], cwd=self.folder, text=True,
            env=self.environment | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def set_up(self, code=0, **variables) -> str:
        process = self.start(**variables)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == code, said
        assert "Traceback" not in said
        return said

    def installed(self) -> dict[str, str]:
        folders = (self.folder / ".venv").glob("lib/python3*/site-packages/*.dist-info")
        return dict(folder.name.removesuffix(".dist-info").split("-", 1) for folder in folders)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


ALL = {"torch": "1.5.0", "alpha": "1.0", "beta": "1.0", "gamma": "1.0", "packaging": "1.0"}


@needs_installers
def test_uv_installs_from_the_mirror_and_the_extra_index_that_pip_was_told_of(project, server, tmp_path):
    project.put_uv()
    (tmp_path / "pip.conf").write_text(f"[global]\nextra-index-url = {server.address}/cpu/simple\n", encoding="utf-8")
    told = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_INDEX_URL": f"{server.address}/all/simple"}
    said = project.set_up(**told)
    # The build that pip would take, the best of both indexes; gamma as the lock has it, not the newest.
    assert project.installed() == ALL | {"torch": "1.5.0+cpu"}
    assert {agent for _, agent in server.asked} == {"uv"}
    assert re.search(r"set up in \d+ s: \.venv \S+ GB, Python 3\S+, torch 1\.5\.0\+cpu, no GPU", said)
    assert said.rstrip().endswith(f"active: {project.folder}/.venv")

    # Installed is installed: nothing is asked and nothing said.
    server.asked.clear()
    assert project.set_up(**told) == f"active: {project.folder}/.venv\n"
    assert server.asked == []


@needs_installers
def test_a_folder_of_wheels_is_enough_without_a_network_and_without_uv(project, wheels):
    said = project.set_up(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels / "all"))
    assert "pip installs: uv cannot be had here" in said
    assert project.installed() == ALL


@needs_installers
def test_a_folder_of_wheels_is_enough_for_uv_with_a_home_that_takes_no_cache(project, wheels):
    project.put_uv()
    del project.environment["UV_CACHE_DIR"]
    project.set_up(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels / "all"), HOME="/dev/null")
    assert project.installed() == ALL


@needs_installers
@pytest.mark.parametrize("with_uv", [True, False])
def test_without_a_network_one_sentence_names_what_is_missing_and_the_next_try_goes_on(project, server, with_uv):
    if with_uv:
        project.put_uv()
    closed = "http://127.0.0.1:9/simple"
    said = project.set_up(1, PIP_INDEX_URL=closed, PIP_RETRIES="0")
    sentence = said.splitlines()[-1]
    assert ".venv lacks torch==1.5.0, alpha==1.0, beta==1.0" in sentence
    assert "pip reaches no package index and says: ERROR: No matching distribution found" in sentence
    assert "docs/running.md" in sentence
    assert len(said.splitlines()) <= 4
    if with_uv:
        project.set_up(PIP_INDEX_URL=f"{server.address}/all/simple")
        assert project.installed() == ALL


@needs_installers
def test_what_uv_cannot_do_pip_does(project, server):
    project.put_uv('[ "$1" = pip ] && echo "uv is unwell" && exit 2')
    said = project.set_up(PIP_INDEX_URL=f"{server.address}/all/simple")
    assert "pip installs: uv is unwell" in said
    assert project.installed() == ALL


def test_a_python_that_is_too_old_is_named_with_the_two_commands_that_help(project):
    project.put_python("3.10")
    said = project.set_up(1)
    assert said.startswith("Python 3.11 or newer is needed; python3 is Python 3.10: name a newer one with PYTHON=...")
    assert "python3 -m pip install --user uv" in said
    assert "sudo apt install python3.11-venv" in said
    assert not (project.folder / ".venv").exists()


@needs_installers
def test_where_python_is_too_old_uv_makes_the_environment_with_its_own(project, wheels):
    project.put_python("3.10")
    venv = f'shift; echo "$*" > asked; exec "{UV}" venv --quiet --python "{sys.executable}" .venv'
    project.put_uv(f'if [ "$1" = venv ]; then {venv}; fi')
    said = project.set_up(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels / "all"))
    assert "python3 is Python 3.10, and 3.11 or newer is needed: uv makes .venv with Python 3.12" in said
    assert (project.folder / "asked").read_text() == "--python 3.12 .venv\n"
    assert ALL.items() <= project.installed().items()


def test_no_python_at_all_is_one_sentence(project):
    (project.bin / "python3").unlink()
    said = project.set_up(1)
    assert said.startswith("Python 3.11 or newer is needed, and there is no python3")
    assert len(said.splitlines()) == 1


@needs_installers
def test_the_environment_has_a_pip_of_its_own_that_nobody_waited_for(project, wheels):
    project.put("python3", f'exec "{sys.executable}" "$@"')
    project.put_uv()
    project.set_up(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels / "all"))
    assert project.installed().keys() - ALL.keys() == {"pip"}
    pip = project.folder / ".venv" / "bin" / "pip"
    said = subprocess.run([pip, "--version"], capture_output=True, text=True, check=True).stdout
    assert f"{project.folder}/.venv/" in said


def half_made(environment):
    (environment / "bin" / "activate").unlink()


def of_another_python(environment):
    folder = next(environment.glob("lib/python3*"))
    folder.rename(folder.with_name("python3.1"))


def without_its_python(environment):
    (environment / "bin" / "python").unlink()


def moved(environment):
    script = environment / "bin" / "activate"
    script.write_text(script.read_text(encoding="utf-8").replace("我的 项目", "elsewhere"), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, wheels):
    """A project that is set up, with uv, from wheels; each test leaves it so."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.put_uv()
    project.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels / "all")}
    project.set_up()
    return project


@needs_installers
@pytest.mark.parametrize("damage", [half_made, of_another_python, without_its_python, moved])
def test_an_environment_that_does_not_work_is_made_anew(finished, damage):
    damage(finished.folder / ".venv")
    assert ".venv does not work (half made, moved, or its Python changed): making it anew" in finished.set_up()
    assert finished.installed() == ALL


@needs_installers
def test_a_link_to_an_environment_that_does_not_work_is_left_alone(project, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kept").touch()
    (project.folder / ".venv").symlink_to(tmp_path / "theirs")
    assert "remove the link" in project.set_up(1)
    assert (tmp_path / "theirs" / "kept").exists()


@needs_installers
def test_what_a_kill_left_half_installed_is_installed_again_and_the_rest_is_kept(finished):
    packages = next((finished.folder / ".venv").glob("lib/python3*/site-packages"))
    (packages / "alpha.py").unlink()
    (packages / "gamma-1.0.dist-info" / "RECORD").unlink()
    (finished.folder / ".venv" / "installed_requirements-dev.txt").unlink()
    before = (packages / "torch-1.5.0.dist-info").stat().st_ino
    said = finished.set_up()
    assert {"alpha-1.0 is only half there", "gamma-1.0 is only half there"} <= set(
        re.findall(r"^.* there", said, re.M)
    )
    assert (packages / "alpha.py").is_file()
    assert finished.installed() == ALL
    assert (packages / "torch-1.5.0.dist-info").stat().st_ino == before


@needs_installers
def test_a_longer_list_that_is_installed_serves_a_shorter_one(finished):
    process = finished.start("requirements.txt")
    assert process.communicate(timeout=60)[0] == f"active: {finished.folder}/.venv\n"


@needs_installers
def test_a_changed_lock_installs_again(finished):
    lock = (finished.folder / "requirements.lock").read_text(encoding="utf-8")
    finished.write("requirements.lock", lock.replace("gamma==1.0", "gamma==2.0"))
    finished.set_up()
    # gamma 1.0 no longer fits the lock.
    assert finished.installed() == ALL | {"gamma": "2.0"}
    finished.write("requirements.lock", lock)
    finished.set_up()
    assert finished.installed() == ALL


@needs_installers
def test_a_set_up_beside_another_waits_even_for_what_a_killed_one_left_running(project, server):
    project.put_uv()
    server.open.clear()
    told = {"PIP_INDEX_URL": f"{server.address}/all/simple"}
    first = project.start(**told)
    end = time.monotonic() + 60
    while not any(path.endswith(".whl") for path, _ in server.asked):
        assert time.monotonic() < end
        time.sleep(0.05)

    # uv waits for its download; the script above it is killed, and another one begins.
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    for pid in children.read_text().split() if children.exists() else []:
        os.kill(int(pid), signal.SIGKILL)
    first.kill()
    second = project.start(**told)
    assert "another set-up of .venv is at work" in second.stdout.readline()
    server.open.set()
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert "making .venv" not in said
    assert project.installed() == ALL
    first.communicate(timeout=60)


def test_variables_that_the_user_set_for_uv_stay(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("UV_", "PIP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UV_INDEX_URL", "https://mine/simple")
    monkeypatch.setenv("SSL_CERT_FILE", "mine.pem")
    told = load_setup().uv_environment(
        {"index-url": "https://pip/simple", "find-links": "one\ntwo", "cert": "pip.pem", "cache-dir": "/tmp/cache"}
    )
    assert told["UV_INDEX_URL"] == "https://mine/simple"
    assert told["SSL_CERT_FILE"] == "mine.pem"
    assert told["UV_FIND_LINKS"] == "one,two"
    assert told["UV_CACHE_DIR"] == "/tmp/cache/uv"


# ---- what is pinned ----


def pins(name: str) -> dict[str, str]:
    """{package: version} of a requirements file or the lock; every line must pin."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("-r ")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_the_lock_has_every_requirement_in_its_version(name):
    assert pins(name).items() <= pins("requirements.lock").items()


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_has_its_reason_above_it(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    bare = [line for above, line in pairwise(["", *lines]) if not above.startswith("#")]
    assert [line for line in bare if re.match(r"[\w.-]+==", line)] == []


def test_what_is_installed_is_what_the_lock_has():
    locked = pins("requirements.lock")
    installed = {re.sub(r"[-_.]+", "-", found.name).lower(): found for found in importlib.metadata.distributions()}
    # A build of torch (+cpu) is the version that is locked; what belongs to a build comes with it.
    own = load_setup().OF_TORCH_BUILD
    other = {
        name: (found.version, locked[name])
        for name, found in installed.items()
        if name in locked and not own.match(name) and found.version.split("+")[0] != locked[name]
    }
    assert other == {}
    assert installed.keys() >= pins("requirements.txt").keys()


def test_nothing_that_the_requirements_need_is_missing_from_the_lock():
    locked = pins("requirements.lock")
    for name in pins("requirements.txt"):
        for need in importlib.metadata.requires(name) or []:
            package, _, marker = need.partition(";")
            if not marker:
                assert re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", package)[0]).lower() in locked, need


def test_contributing_names_the_command_that_made_the_lock():
    command = re.search(r"uv pip compile .*", (ROOT / "requirements.lock").read_text(encoding="utf-8"))[0]
    assert command in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_github_runs_the_same_check_on_every_python_of_the_lock():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["steps"][-1]["run"] == "bash .ci/run"


def test_the_set_up_runs_on_a_python_that_is_too_old_for_the_rest():
    ast.parse((ROOT / "scripts" / "setup_venv.py").read_text(encoding="utf-8"), feature_version=(3, 8))
