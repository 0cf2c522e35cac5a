"""What another page, another machine or a broken client may try, each against the real server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_runs import write_run
from tests.web.server import Server

EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("web")
    (folder / "secret.log").write_text("a secret")
    write_run(folder / "elsewhere" / "hidden")
    write_run(folder / "runs" / "one", logs={"rank_0000.log": "a line\n"})
    write_run(folder / "runs" / "<script>alert(1)<" / "b>")
    (folder / "runs" / "link").symlink_to(folder / "elsewhere" / "hidden")
    (folder / "runs" / "one" / "logs" / "outside.log").symlink_to(folder / "secret.log")
    found = Server(folder)
    yield found
    found.kill()


def run_id(server: Server, name: str) -> str:
    return next(run["id"] for run in server.ask("/api/runs") if run["name"] == name)


def test_the_owner_is_let_in_and_the_token_leaves_the_address(server: Server) -> None:
    status, headers, _ = server.request(f"/?token={server.token}", Cookie=None)
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert cookie.startswith(server.cookie) and "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    status, headers, _ = server.request(f"/jobs?a=b&token={server.token}", Cookie=None)
    assert (status, headers["location"]) == (303, "/jobs?a=b")
    assert server.request("/")[0] == 200
    assert server.request("/", Cookie=None, Authorization=f"Bearer {server.token}")[0] == 200


@pytest.mark.parametrize(
    ("what", "path", "headers", "status"),
    [
        ("a name that points here (DNS rebinding)", "/", {"Host": "evil.example"}, 421),
        ("our address with another port", "/", {"Host": "127.0.0.1:1"}, 421),
        ("no name at all", "/", {"Host": ""}, 421),
        ("no token", "/", {"Cookie": None}, 403),
        ("no token for what is static", "/static/app.css", {"Cookie": None}, 403),
        ("a wrong token", "/?token=wrong", {"Cookie": None}, 403),
        ("a wrong token beside the right cookie", "/?token=wrong", {}, 403),
        ("another server's cookie", "/", {"Cookie": "megatron_cpt_1=x"}, 403),
        ("a token that is not ASCII", "/", {"Cookie": "a=b", "Authorization": "Bearer \xff"}, 403),
        ("a broken cookie", "/", {"Cookie": "=;;=\x01"}, 403),
        ("a path that climbs", "/static/../app.py", {}, 404),
        ("an encoded one", "/static/..%2f..%2fapp.py", {}, 404),
        ("one encoded twice", "/static/%252e%252e/app.py", {}, 404),
        ("an absolute one", "/static//etc/passwd", {}, 404),
        ("a run by its path", "/api/runs/..%2felsewhere%2fhidden", {}, 404),
        ("a run that climbs", "/api/runs/..", {}, 404),
        ("a job that climbs", "/jobs/..%2f..%2f..", {}, 404),
        ("a page that is not there", "/nothing", {}, 404),
    ],
)
def test_refused(server: Server, what: str, path: str, headers: dict[str, str | None], status: int) -> None:
    found, answered, body = server.request(path, **headers)
    assert found == status, (what, body)
    assert b"Traceback" not in body and b"secret" not in body
    assert "script-src 'self'" in answered["content-security-policy"]


def test_the_token_does_not_lead_to_another_server(server: Server) -> None:
    """A browser takes `//name` and `/\\name` in a redirect for another server's address."""
    for path in ("//evil.example", "/\\evil.example", "///evil.example"):
        status, headers, _ = server.request(f"{path}?token={server.token}", Cookie=None)
        assert status in (303, 404) and not headers.get("location", "/x").startswith(("//", "/\\", "http"))


@pytest.mark.parametrize(
    ("what", "headers", "body", "status"),
    [
        ("another page's form", {"Origin": EVIL}, b"{}", 403),
        ("a page without an origin", {"Origin": "null"}, b"{}", 403),
        ("no origin", {"Origin": None}, b"{}", 403),
        ("our origin over another scheme", {"Origin": "https://127.0.0.1"}, b"{}", 403),
        ("the token without its cookie's name", {"Cookie": "token=x"}, b"{}", 403),
        ("a form's encoding", {"Content-Type": "application/x-www-form-urlencoded"}, b"{}", 415),
        ("plain text that holds JSON", {"Content-Type": "text/plain"}, b"{}", 415),
        ("a body that is too long", {"Content-Length": str(2 << 20)}, b"", 413),
        ("a length that is none", {"Content-Length": "-1"}, b"", 400),
        ("no JSON", {}, b"{", 400),
        ("JSON that is no object", {}, b"[1]", 400),
        ("text that is not UTF-8", {}, b"\xff\xfe", 400),
        ("values of another kind", {}, b'{"kind": 1, "values": []}', 409),
        ("a kind that is none", {}, b'{"kind": "rm", "values": {}}', 409),
    ],
)
def test_a_start_is_refused(
    server: Server, what: str, headers: dict[str, str | None], body: bytes, status: int
) -> None:
    found, _, said = server.request("/api/start", "POST", body, **headers)
    assert found == status, (what, said)
    assert b"Traceback" not in said
    assert server.ask("/api/jobs") == []


def test_a_switch_is_not_laid_by_another_page(server: Server) -> None:
    run = run_id(server, "one")
    assert server.request(f"/api/runs/{run}/kill", "POST", b'{"sure": true}', Origin=EVIL)[0] == 403
    assert server.request(f"/api/runs/{run}/kill")[0] in (404, 405)
    assert not (server.folder / "runs" / "one" / "KILL").exists()


def test_a_body_in_pieces_without_a_length_is_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        head = (
            f"POST /api/start HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nCookie: {server.cookie}\r\n"
            f"Origin: http://127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        client.sendall(head.encode())
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with pytest.raises(OSError):
            for _ in range(2_000):  # 128 MiB, if anybody took them
                client.sendall(piece)
    assert server.request("/")[0] == 200


def test_a_linked_run_is_not_listed_and_a_linked_log_not_shown(server: Server) -> None:
    names = {run["name"] for run in server.ask("/api/runs")}
    assert names == {"one", "<script>alert(1)</b>"}
    run = run_id(server, "one")
    assert server.ask(f"/api/runs/{run}")["logs"] == ["rank_0000.log"]
    assert server.ask(f"/api/runs/{run}/log?name=rank_0000.log")["text"] == "a line\n"
    for name in ("outside.log", "../resolved.yaml", "..%2fresolved.yaml", "/etc/passwd", "%00.log"):
        assert server.ask(f"/api/runs/{run}/log?name={name}")["text"] == ""


def test_a_name_that_is_markup_is_text(server: Server) -> None:
    run = run_id(server, "<script>alert(1)</b>")
    _, _, page = server.request(f"/runs/{run}")
    assert b"<script>alert" not in page and b"&lt;script&gt;alert(1)&lt;/b&gt;" in page


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        ("train", {"model.init_from": "/etc"}, "model.init_from"),
        ("train", {"model.init_from": "runs/out"}, "model.init_from"),
        ("train", {"model.init_from": "random", "run_dir": "/tmp/x"}, "run_dir"),
        ("train", {"model.init_from": "random", "run_dir": "runs/../x"}, "run_dir"),
        ("train", {"model.init_from": "random", "data.validation": {"a": "../../x"}}, "data.validation"),
        ("preprocess", {"sources": [{"name": "a", "files": "/etc/*.conf"}]}, "sources"),
        ("preprocess", {"output_prefix": "/tmp/x"}, "output_prefix"),
        ("preprocess", {"tokenizer": "/etc"}, "tokenizer"),
    ],
)
def test_a_path_outside_is_refused_beside_its_key(
    server: Server, kind: str, values: dict[str, object], key: str
) -> None:
    out = server.folder / "runs" / "out"
    if not out.is_symlink():
        out.symlink_to("/etc")
    plain: dict[str, object] = {"job_name": "x", "data.train": [{"name": "a", "prefix": "data/a"}]}
    if kind == "preprocess":
        plain = {"output_prefix": "data/x", "tokenizer": "model", "sources": [{"name": "a", "files": "a.jsonl"}]}
    answer = server.ask("/api/start", {"kind": kind, "values": plain | values})
    assert answer["job"] is None and key in [problem["path"] for problem in answer["problems"]], answer
    assert server.ask("/api/jobs") == []


def test_nothing_reaches_a_shell(server: Server) -> None:
    """What is entered becomes an argument, whatever it looks like."""
    run = run_id(server, "one")
    data = "runs/$(touch pwned);`touch pwned`&touch pwned"
    answer = server.ask("/api/start", {"kind": "eval", "values": {"run": run, "data": data}})
    job = answer["job"]
    while server.ask(f"/api/jobs/{job['id']}")["state"] == "running":
        pass
    ended = server.ask(f"/api/jobs/{job['id']}")
    assert ended["state"] == "failed" and ended["exit_code"] not in (None, 0)
    assert "Traceback" not in ended["text"] and not list(server.folder.rglob("pwned"))
    (server.folder / "runs" / ".web" / "jobs" / job["id"] / "job.json").unlink()


def test_a_slow_client_and_a_hundred_at_once_hold_nobody_up(server: Server) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for client in slow:
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")  # and nothing more
    answers: list[int] = []

    def look() -> None:
        answers.append(server.request("/api/runs")[0])

    clients = [threading.Thread(target=look) for _ in range(100)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    for client in slow:
        client.close()
    assert answers == [200] * 100


def test_where_it_listens(tmp_path: Path, server: Server) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(AssertionError) as caught:
            Server(tmp_path, *arguments)
        return str(caught.value)

    assert "refusing to listen on 0.0.0.0" in refused("--bind", "0.0.0.0")
    token = tmp_path / "token"
    token.write_text("short\n")
    token.chmod(0o600)
    assert "16 or more" in refused("--bind", "0.0.0.0", "--token-file", str(token))
    token.write_text("x" * 20 + "\n")
    token.chmod(0o644)
    assert "can be read by others" in refused("--token-file", str(token))
    assert "cannot read the token" in refused("--token-file", str(tmp_path / "none"))
    assert f"cannot listen on 127.0.0.1:{server.port}" in refused("--port", str(server.port))
    assert json.loads(server.request("/api/jobs")[2]) == []
