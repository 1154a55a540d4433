"""What the network may not do: foreign sites, wrong names and tokens, paths, large bodies, slow clients."""

import http.client
import json
import socket
import sys
import time

import pytest
from pages import Playground, answer_rows, filled, prompts, served, write_rows

import playground
from rlhf.page import connections, guard
from rlhf.page.app import STATIC
from rlhf.page.guard import MAX_BODY

JSON = {"content-type": "application/json"}
NASTY = "<script>alert(1)</script>'; DROP TABLE votes; --\x00\x1b[31m"


@pytest.fixture
def site(tmp_path):
    with served(filled(tmp_path, answer_rows(prompts(5)))) as address:
        yield address.removeprefix("http://")


def ask(site: str, method: str, path: str, body=None, headers: dict | None = None) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(site, timeout=10)
    body = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def first_pair(site: str, person: str = "me") -> dict:
    return json.loads(ask(site, "GET", f"/page/next?person={person}&tab=t")[2])["pairs"][0]


def ballot(pair: int, **more) -> dict:
    return {"key": f"k{pair}", "pair": pair, "person": "me", "side": "left", "seconds": 1.5} | more


def votes_of(site: str) -> int:
    return json.loads(ask(site, "GET", "/page/results")[2])["votes"]


# ---- other sites ----
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON | {"origin": "http://evil.example"}, 403),
        (JSON | {"origin": "null"}, 403),
        (JSON | {"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({}, 415),
        (JSON | {"host": "evil.example"}, 421),
        (JSON, 200),
    ],
)
def test_a_write_of_another_site_is_refused(site, headers, status):
    pair = first_pair(site)["pair"]
    assert ask(site, "POST", "/page/vote", ballot(pair), headers)[0] == status
    assert votes_of(site) == (status == 200)


def test_a_write_of_the_page_itself_is_taken(site):
    headers = JSON | {"origin": f"http://{site}", "sec-fetch-site": "same-origin"}
    assert ask(site, "POST", "/page/vote", ballot(first_pair(site)["pair"]), headers)[0] == 200


def test_a_name_that_points_here_reads_nothing(site):
    status, _, content = ask(site, "GET", "/page/results", headers={"host": "rebound.example:7860"})
    assert status == 421 and b"votes" not in content
    port = site.split(":")[1]
    assert ask(site, "GET", "/", headers={"host": f"localhost:{port}"})[0] == 200


def test_every_answer_forbids_scripts_frames_and_guesses(site):
    for path in ("/", "/static/page.js", "/page/state", "/nowhere", "/page/next"):
        headers = {name.lower(): value for name, value in ask(site, "GET", path)[1].items()}
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_page_holds_no_script_or_style_of_its_own_and_names_no_other_host():
    texts = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
    html = texts["index.html"]
    assert "style=" not in html and "onclick" not in html and html.count("<script") == 1
    for name, text in texts.items():
        # The name space of SVG is no address.
        text = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text, name


# ---- paths and bodies ----
@pytest.mark.parametrize(
    "path",
    [
        "/static/../guard.py", "/static/%2e%2e/guard.py", "/static/..%2fstore.py", "//etc/passwd",
        "/static//etc/passwd",
        "/page/files/..%2fvotes.sqlite", "/page/files/votes.sqlite", "/page/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/page/files/pairs.jsonl%00.txt", "/static/", "/page/files/",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(site, path):
    status, _, content = ask(site, "GET", path)
    assert status in (307, 400, 404)
    assert b"root:" not in content and b"SQLite" not in content and b"import" not in content


def refused_early(site: str, body, **how) -> bool:
    """Return True where a vote is refused before all of it is read: by its status, or by hanging up meanwhile."""
    connection = http.client.HTTPConnection(site, timeout=10)
    try:
        connection.request("POST", "/page/vote", body, JSON, **how)
        return connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        return True
    finally:
        connection.close()


def test_a_body_that_is_too_long_is_refused_whether_it_says_so_or_not(site):
    pair = first_pair(site)["pair"]
    assert refused_early(site, json.dumps(ballot(pair, reason="x" * MAX_BODY)).encode())
    pieces = (b"x" * 65536 for _ in range(MAX_BODY // 65536 + 2))
    assert refused_early(site, pieces, encode_chunked=True)
    # The header alone is enough, and then the answer always arrives.
    assert ask(site, "POST", "/page/vote", b"{}", JSON | {"content-length": str(MAX_BODY + 1)})[0] == 413
    assert ask(site, "POST", "/page/vote", b"{}", JSON | {"content-length": "-1"})[0] in (400, 413)
    assert votes_of(site) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"\xff\xfe", b"[]", b"null", b"3", b"[" * 100_000, b'{"key": NaN}', b'{"a": 1e999}',
        {"pair": 1}, {"side": "left"},
    ],
)  # fmt: skip
def test_a_body_of_another_form_is_an_error_in_words(site, body):
    for path in ("/page/vote", "/page/undo", "/page/prompt", "/page/chat"):
        status, _, content = ask(site, "POST", path, body, JSON)
        assert status == 400 and json.loads(content)["error"]["message"]
        assert b"Traceback" not in content


@pytest.mark.parametrize(
    "field",
    [
        {"pair": 10**30}, {"pair": "1"}, {"pair": True}, {"pair": -1}, {"side": "both"}, {"side": ["left"]},
        {"person": ""},
        {"person": "x" * 61}, {"person": None}, {"key": {}}, {"margin": 4}, {"margin": 1.5}, {"margin": "2"},
        {"reason": 3}, {"reason": "x" * 2001}, {"edited": []}, {"seconds": -1}, {"seconds": "1"}, {"seconds": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_refused_and_named(site, field):
    pair = first_pair(site)["pair"]
    status, _, content = ask(site, "POST", "/page/vote", ballot(pair) | field, JSON)
    assert status == 400 and next(iter(field)) in json.loads(content)["error"]["message"]
    assert votes_of(site) == 0


def test_script_and_sql_in_every_field_are_kept_as_they_are(site):
    person = NASTY[:50]
    pair = first_pair(site)["pair"]
    given = ballot(pair, person=person, reason=NASTY, edited=NASTY + "\ud800", key=NASTY[:60])
    assert ask(site, "POST", "/page/vote", given, JSON)[0] == 200
    found = json.loads(ask(site, "GET", "/page/results")[2])
    assert found["people"] == [{"name": person, "votes": 1}]
    assert ask(site, "POST", "/page/export", {}, JSON)[0] == 200
    edited = json.loads(ask(site, "GET", "/page/files/sft.jsonl")[2])["answer"]
    assert edited == NASTY + "?"


def test_a_pair_that_there_is_not_is_not_found_and_other_methods_neither(site):
    assert ask(site, "POST", "/page/vote", ballot(999), JSON)[0] == 404
    assert ask(site, "POST", "/page/undo", {"vote": 7, "person": "me", "tab": "t"}, JSON)[0] == 400
    assert ask(site, "DELETE", "/page/vote", b"", JSON)[0] == 405
    assert ask(site, "GET", "/page/vote")[0] == 405
    assert ask(site, "POST", "/page/chat", {"turns": [["user", "hi"]]}, JSON)[0] == 400


# ---- slow clients ----
def test_slow_clients_hold_nobody_up_and_are_sent_away(site, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    host, port = site.split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(100)]
    for number, one in enumerate(slow):
        head = f"POST /page/vote HTTP/1.1\r\nHost: {site}\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
        one.sendall((head + ("\r\n{" if number % 2 else "X-Slow: ")).encode())
    begin = time.perf_counter()
    assert ask(site, "GET", "/")[0] == 200
    assert ask(site, "POST", "/page/vote", ballot(first_pair(site)["pair"]), JSON)[0] == 200
    assert time.perf_counter() - begin < 1
    for number, one in enumerate(slow):
        one.settimeout(5)
        answer = one.recv(4096)
        # A head that does not end is cut off, a body that does not come is told so.
        assert b" 408 " in answer if number % 2 else answer == b""
        one.close()


# ---- the token ----
def test_with_a_token_nothing_is_shown_without_it(tmp_path):
    page = filled(tmp_path, answer_rows(prompts(2)))
    page.token = "secret0123"
    with served(page) as address:
        site = address.removeprefix("http://")
        for path in ("/", "/page/state", "/static/page.js", "/?token=wrong0000", "/page/results?token=secret0123"):
            assert ask(site, "GET", path)[0] == 401, path
        assert ask(site, "GET", "/page/state", headers={"cookie": "playground=wrong"})[0] == 401
        status, headers, _ = ask(site, "GET", "/?token=secret0123")
        cookie = headers["set-cookie"]
        assert status == 303 and headers["location"] == "/" and "HttpOnly" in cookie and "SameSite=Lax" in cookie
        assert ask(site, "GET", "/page/state", headers={"cookie": cookie.split(";")[0], "host": "box"})[0] == 200
        assert ask(site, "GET", "/page/state", headers={"authorization": "Bearer secret0123"})[0] == 200
        # The cookie alone is not enough for another site's page.
        more = JSON | {"cookie": cookie.split(";")[0], "origin": "http://evil.example"}
        assert ask(site, "POST", "/page/vote", ballot(1), more)[0] == 403


def test_a_host_that_lets_others_in_gets_a_token(tmp_path):
    file = write_rows(tmp_path / "answers.jsonl", answer_rows(prompts(2)))
    server = Playground("--answers", file, "--output_dir", str(tmp_path / "page"), "--host", "0.0.0.0")
    try:
        assert ask(f"127.0.0.1:{server.port}", "GET", "/")[0] == 401
        token = server.link.partition("?token=")[2]
        assert len(token) == 32
        assert ask(f"127.0.0.1:{server.port}", "GET", f"/?token={token}")[0] == 303
    finally:
        server.kill()


# ---- the command line ----
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to open"),
        (["--adapters", "sft=x"], "give --base_model_name"),
        (["--answers", "x", "--overlap", "1.5"], "--overlap 1.5"),
        (["--answers", "x", "--temperature", "0"], "--do_sample False"),
        (["--answers", "x", "--top_p", "2"], "--top_p 2"),
        (["--answers", "x", "--min_pairs", "0"], "--min_pairs 0"),
        (["--answers", "x", "--port", "70000"], "--port 70000"),
        (["--answers", "x", "--token", "short"], "--token"),
        (["--base_model_name", "x", "--adapters", "base=y"], "names base twice"),
    ],
)
def test_wrong_flags_end_with_the_usage(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        playground.parse_args(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "fewer than two versions"),
        ("{", ":1 is not JSON"),
        ("[]", ":1 is no object"),
        ('{"prompt": "a", "version": "b"}', ":1: answer must be a text"),
        ('\n{"prompt": "a", "version": "b", "answer": "c", "score": "1"}', ":2: score must be a number"),
        ('{"prompt": "a", "version": "b", "answer": "c", "seed": 1e30}', "seed must be a whole number"),
        ('{"prompt": "a", "version": "b", "answer": "c"}', "fewer than two versions"),
    ],
)
def test_a_file_of_answers_that_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        playground.main(playground.parse_args(["--answers", str(file), "--output_dir", str(tmp_path / "page")]))


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    file = write_rows(tmp_path / "answers.jsonl", answer_rows(prompts(2)))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        flags = ["--answers", file, "--output_dir", str(tmp_path / "page"), "--port", str(held.getsockname()[1])]
        with pytest.raises(OSError, match="give another --port"):
            playground.main(playground.parse_args(flags))


def test_without_a_model_no_torch_is_loaded(tmp_path):
    file = write_rows(tmp_path / "answers.jsonl", answer_rows(prompts(2)))
    import subprocess

    code = (
        "import sys, playground\n"
        "from rlhf.page import app\n"
        "from rlhf.page.store import Store\n"
        f"args = playground.parse_args(['--answers', {file!r}, '--output_dir', {str(tmp_path / 'page')!r}])\n"
        "app.create_app(playground.open_page(args, Store(args.output_dir)))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
