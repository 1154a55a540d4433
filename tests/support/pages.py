"""A page served in this process or in one of its own, answers to vote on, and a real browser."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from rlhf.page import connections
from rlhf.page.app import Page, create_app
from rlhf.page.store import Store, Version
from rlhf.page.vote import Plan

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this system")


# ---- answers ----
def answer_rows(prompts: list[str], versions: tuple[str, ...] = ("sft", "ppo"), **own) -> list[dict]:
    """Rows of answers.jsonl, all texts different; those of later versions have higher scores."""
    rows = []
    for number, prompt in enumerate(prompts):
        for place, version in enumerate(versions):
            text = f"{version} {number}: 你好，这是回答。"
            row = {"prompt": prompt, "version": version, "answer": text, "score": float(place), "seed": number}
            rows.append(row | {"sampling": {"temperature": 1.0}, "adapter": f"{version}-adapter"} | own)
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def filled(folder: Path, rows: list[dict], overlap: float = 0.0) -> Page:
    """A page over a new store that holds these answers."""
    store = Store(folder)
    ids = store.add_prompts([[("user", row["prompt"])] for row in rows], overlap)
    versions = [Version(row["version"], row["adapter"]) for row in rows]
    names = ("sampling", "seed", "score")
    made = []
    for row, prompt, version in zip(rows, ids, versions, strict=True):
        made.append(
            {name: row[name] for name in names} | {"prompt": prompt, "version": version, "text": row["answer"]}
        )
    store.add_answers(made)
    return Page(store, Plan(store, list(dict.fromkeys(versions)), 0), folder, min_pairs=1)


def give(plan: Plan, person: str, side: str, pair: int, **more) -> tuple[int, object]:
    """Vote without a browser; what `Plan.vote` returns."""
    fields = {"key": f"{person} {pair}", "pair": pair, "person": person, "side": side, "seconds": 1.0}
    return plan.vote(fields | {"margin": None, "reason": None, "edited": None} | more)


def prompts(count: int) -> list[str]:
    return [f"第 {number} 个问题？" for number in range(count)]


# ---- servers ----
@contextmanager
def served(page: Page):
    """The address of a page, served by a thread of this process."""
    config = uvicorn.Config(
        create_app(page), port=0, http=connections.PatientProtocol, ws="none", log_level="warning",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        page.store.close()


class Playground:
    """playground.py as a process; it may be killed, and started again on its port."""

    def __init__(self, *words: str, port: int = 0):
        command = [sys.executable, str(ROOT / "playground.py"), *words, "--port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
        )
        said = []
        # The line comes once the store is read and the socket is bound.
        for line in self.process.stdout:
            said.append(line)
            if found := re.search(r"open (http://[^ ]+?):(\d+)/(\S*)", line):
                self.port = int(found[2])
                self.address = f"http://127.0.0.1:{self.port}"
                self.link = f"{self.address}/{found[3]}"
                return
        raise AssertionError("".join(said))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- a browser ----
@pytest.fixture(scope="module")
def chromium():
    """A headless browser for the tests of a file: its event loop stays in this thread until it is closed."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this system")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A person with a browser window: what went wrong in it, and where it sent requests, is kept."""

    def __init__(self, browser, address: str, name: str = "", locale: str = "en-US", **window):
        self.context = browser.new_context(locale=locale, **({"viewport": {"width": 1280, "height": 800}} | window))
        self.page = self.context.new_page()
        self.address = address
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        if name:
            self.page.add_init_script(f"localStorage.setItem('person', {json.dumps(name)})")

    def open(self, view: str = "vote"):
        self.page.goto(f"{self.address}/#{view}")
        return self.page

    def close(self) -> None:
        self.context.close()

    def sides(self) -> tuple[str, str]:
        """Both answers on the screen."""
        return self.page.inner_text("#left"), self.page.inner_text("#right")

    def vote(self, key: str) -> None:
        """Press a key, and wait until the server has the vote."""
        with self.page.expect_response("**/page/vote"):
            self.page.keyboard.press(key)


@contextmanager
def visitor(browser, address: str, **more):
    """A visitor without a mishap: no error in the console, no request to anywhere but the page."""
    made = Visitor(browser, address, **more)
    try:
        yield made
        assert made.errors == []
        assert made.hosts <= {address.split("/")[2]}
    finally:
        made.close()


def random_votes(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(("left", "right", "tie", "bad", "skip")) for _ in range(count)]
