"""A person with a browser: from an empty folder to a finished run by clicks alone, watched, stopped and continued."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import VOCAB, write_model
from tests.tiny_runs import step, write_run
from tests.web.conftest import PICTURES, Watched
from tests.web.server import Server

MINUTE = 60_000  # milliseconds
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(400, VOCAB, seed=0), VOCAB)
    return tmp_path


@pytest.fixture
def opened(browser: Browser) -> Iterator[list[Watched]]:
    """Everything that was opened must have behaved in the end."""
    watched: list[Watched] = []
    yield watched
    assert [wrong for one in watched for wrong in one.wrong] == []


def open_page(browser: Browser, server: Server, opened: list[Watched], **context: object) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()  # type: ignore[arg-type]
    opened.append(Watched(page, f"http://127.0.0.1:{server.port}/"))
    page.goto(server.address)
    page.locator("body[data-ready]").wait_for()
    return page


def enter(page: Page, key: str, value: str) -> None:
    field = page.locator(f'.field[data-path="{key}"]')
    field.locator("input, select, textarea").first.fill(value)


def fill_run(page: Page, name: str, train_tokens: str) -> None:
    """Fill in the form for a run of the tiny model."""
    enter(page, "job_name", name)
    enter(page, "model.init_from", "model")
    row = page.locator('.field[data-path="data.train"] .row')
    row.locator('[data-column="name"]').fill("data")
    row.locator('[data-column="prefix"]').fill("data")
    for key, value in {
        "budget.train_tokens": train_tokens, "budget.warmup_tokens": "0", "batch.seq_length": "64",
        "batch.global_batch_size": "8", "checkpoint.save_every": "10 iters",
    }.items():  # fmt: skip
        enter(page, key, value)
    page.locator('.field[data-path="precision.dtype"] select').select_option("fp32")
    unfold(page, "data.max_epochs")
    enter(page, "data.max_epochs", "100000")
    unfold(page, "model.check_start")  # the weights are random
    page.locator('.field[data-path="model.check_start"] select').select_option("false")


def start_run(page: Page, server: Server, name: str, train_tokens: str) -> None:
    """Fill in the form of a new run, and start it."""
    page.goto(f"http://127.0.0.1:{server.port}/new")
    page.locator("body[data-ready]").wait_for()
    fill_run(page, name, train_tokens)
    page.locator("#start").click()


def unfold(page: Page, key: str) -> None:
    """Open the part of the form that holds a key."""
    page.locator("details", has=page.locator(f'.field[data-path="{key}"]')).locator("summary").click()


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_from_an_empty_folder_to_a_finished_run_by_clicks(
    browser: Browser, folder: Path, opened: list[Watched]
) -> None:
    server = Server(folder)
    page = open_page(browser, server, opened)
    expect(page.get_by_text("There is no run yet")).to_be_visible()
    page.get_by_role("link", name="Fill in a form").click()
    page.locator("body[data-ready]").wait_for()

    page.locator("#preview").click()  # nothing is filled in: each problem stands beside its field
    expect(page.locator('.field[data-path="job_name"] .problem')).to_contain_text("is missing")
    fill_run(page, "first", "10K")
    enter(page, "batch.global_batch_size", "many")
    page.locator("#preview").click()
    expect(page.locator('.field[data-path="batch.global_batch_size"] .problem')).to_be_visible()
    enter(page, "batch.global_batch_size", "8")
    page.locator("#preview").click()
    expect(page.get_by_text("Nothing speaks against it.")).to_be_visible(timeout=MINUTE)
    expect(page.locator("#command")).to_have_text("megatron-cpt train {job}/config.yaml")
    expect(page.locator("#files pre")).to_contain_text("train_tokens: 10K")
    expect(page.locator("#page")).to_contain_text("plan of first")
    assert not (folder / "runs" / "first").exists()

    page.locator("#start").click()
    page.wait_for_url("**/jobs/*")
    page.get_by_role("link", name="Watch the run").click(timeout=MINUTE)
    expect(page.locator("#cards .state")).to_have_text("finished", timeout=2 * MINUTE)
    expect(page.locator('[data-chart="loss"] canvas')).to_be_visible()
    expect(page.locator("#checkpoints")).to_contain_text("iter_0000020")
    page.locator("#logs summary").click()
    expect(page.locator("#log-text")).to_contain_text("rank 0")
    page.locator("#config summary").click()
    expect(page.locator("#config-text")).to_contain_text("job_name: first")
    with page.expect_download() as table:
        page.get_by_role("link", name="CSV").click()
    assert len(table.value.path().read_text().splitlines()) == 1 + 20
    with page.expect_download() as picture:
        page.locator('[data-chart="loss"] button').click()
    assert picture.value.path().read_bytes()[:4] == b"\x89PNG"

    page.locator("#export summary").click()
    page.locator("#convert button").click()
    page.wait_for_url("**/jobs/*")
    expect(page.locator("#state")).to_have_text("done", timeout=2 * MINUTE)
    assert (folder / "runs" / "first" / "export" / "hf" / "config.json").is_file()
    server.kill()


def test_a_run_outlives_the_server_and_is_stopped_and_continued(
    browser: Browser, folder: Path, opened: list[Watched]
) -> None:
    server = Server(folder)
    page = open_page(browser, server, opened)
    start_run(page, server, "long", "5M")
    page.wait_for_url("**/jobs/*")
    page.get_by_role("link", name="Watch the run").click(timeout=MINUTE)
    shown = page.locator("#cards .card", has_text="iteration").locator("b")
    expect(shown).not_to_have_text("0", timeout=MINUTE)
    seen = shown.inner_text()
    expect(shown).not_to_have_text(seen, timeout=MINUTE)  # without a reload

    other = open_page(browser, server, opened)  # a second person starts the same run
    start_run(other, server, "long", "5M")
    expect(other.locator("#message, #problems").filter(has_text="running").first).to_be_visible(timeout=MINUTE)
    refused = opened[-1].wrong
    assert len(refused) <= 1 and all("409" in text for text in refused), refused  # chromium's own word for the answer
    refused.clear()
    other.close()

    page.close()
    server.kill()
    before = len(rows(folder / "runs" / "long"))
    server = Server(folder)
    page = open_page(browser, server, opened)
    page.get_by_role("link", name="long").click()
    expect(page.locator("#cards .state")).to_contain_text("running", timeout=MINUTE)
    page.locator('[data-action="stop"]').click()
    expect(page.locator("#cards .state")).to_have_text("stopped", timeout=MINUTE)
    stopped = rows(folder / "runs" / "long")
    assert len(stopped) > before and stopped[-1]["event"] == "stopped"
    job = server.ask("/api/jobs")[0]
    assert (job["state"], job["exit_code"]) == ("failed", 75)

    page.locator('[data-action="continue"]').click()
    expect(page.locator("#cards .state")).to_contain_text("running", timeout=MINUTE)
    page.locator('[data-action="kill"]').click()
    page.get_by_role("button", name="No", exact=True).click()
    assert not (folder / "runs" / "long" / "KILL").exists()
    expect(shown_iteration(page)).not_to_have_text(str(stopped[-1]["iteration"]), timeout=MINUTE)
    page.locator('[data-action="kill"]').click()
    page.get_by_role("button", name="Kill it").click()
    expect(page.locator("#cards .state")).to_have_text("killed", timeout=MINUTE)
    iterations = [row["iteration"] for row in rows(folder / "runs" / "long") if "event" not in row]
    assert iterations == list(range(1, len(iterations) + 1))  # nothing was lost or done twice
    server.kill()


def shown_iteration(page: Page) -> object:
    return page.locator("#cards .card", has_text="iteration").locator("b")


def test_a_job_that_fails_at_once_shows_its_error_and_hint(
    browser: Browser, folder: Path, opened: list[Watched]
) -> None:
    server = Server(folder)
    page = open_page(browser, server, opened)
    page.goto(f"http://127.0.0.1:{server.port}/data")
    page.locator("body[data-ready]").wait_for()
    enter(page, "output_prefix", "out/corpus")
    enter(page, "tokenizer", "model")
    row = page.locator('.field[data-path="sources"] .row')
    row.locator('[data-column="name"]').fill("a")
    row.locator('[data-column="files"]').fill("nothing/*.jsonl")
    page.locator("#start").click()
    page.wait_for_url("**/jobs/*")
    expect(page.locator("#state")).to_have_text("failed", timeout=MINUTE)
    expect(page.locator("#text")).to_contain_text("error: ")
    expect(page.locator("#text")).to_contain_text("hint: ")
    server.kill()


def test_runs_compared_broken_and_vanishing(browser: Browser, tmp_path: Path, opened: list[Watched]) -> None:
    root = tmp_path / "runs"
    validation = [
        step(i, event="validation", name=name, loss=3.0 - i / 100)
        for i in (0, 50, 100)
        for name in ("domain", "general")
    ]
    saves = [step(i, event="saved") for i in (30, 60, 90)]
    ordered = sorted([*validation, *saves, *(step(i) for i in range(1, 101))], key=lambda row: row["iteration"])
    restarted = [*(step(i) for i in range(1, 61)), *(step(i, start=2, loss=4.0) for i in range(31, 101))]
    write_run(root / "one", ordered)
    write_run(root / "two", restarted)
    write_run(root / "gone", ordered)
    with (root / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"start": 2, "iteration": 101, "consumed_to')  # half a line
    (root / "broken").mkdir()
    (root / "broken" / "resolved.yaml").write_text("job_name: [")
    server = Server(tmp_path)
    page = open_page(browser, server, opened)
    expect(page.locator("#runs tbody tr")).to_have_count(4)
    expect(page.locator("#runs tbody tr", has_text="broken")).to_contain_text("unreadable")
    page.get_by_label("compare one").check()
    page.get_by_label("compare two").check()
    page.get_by_role("button", name="Compare the chosen").click()
    page.locator("body[data-ready]").wait_for()
    expect(page.locator("#legend li")).to_have_count(2)
    expect(page.locator('[data-chart="validation/"] canvas')).to_be_visible()
    page.get_by_label("time", exact=True).check()
    page.get_by_label("log scale of losses").check()
    page.locator("#events summary").click()
    page.locator('[data-chart="loss"] .u-over').hover()
    expect(page.locator('[data-chart="loss"] output')).not_to_be_empty()
    expect(page.locator('[data-chart="lr"] output')).not_to_be_empty()  # the cursors are linked

    page.goto(f"http://127.0.0.1:{server.port}/")
    page.get_by_role("link", name="gone").click()
    page.locator("body[data-ready]").wait_for()
    for path in sorted((root / "gone").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    opened[-1].wrong.clear()
    expect(page.locator("#message")).to_contain_text("there is no such run", timeout=MINUTE)
    wrong = opened[-1].wrong
    time.sleep(0.1)
    assert all("404" in text for text in wrong), wrong  # chromium's own word for the answer
    page.close()
    wrong.clear()
    server.kill()


@pytest.mark.parametrize(("scheme", "size"), list(itertools.product(("light", "dark"), SIZES)))
def test_every_page_fits_its_window(
    scheme: str, size: str, browser: Browser, tmp_path: Path, opened: list[Watched]
) -> None:
    write_run(tmp_path / "runs" / "a run with a name that is as long as names can be", [step(i) for i in range(1, 50)])
    server = Server(tmp_path)
    width, height = SIZES[size]
    page = open_page(browser, server, opened, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    run = server.ask("/api/runs")[0]["id"]
    for name, path in {"runs": "/", "run": f"/runs/{run}", "new": "/new", "data": "/data", "jobs": "/jobs"}.items():
        page.goto(f"http://127.0.0.1:{server.port}{path}")
        page.locator("body[data-ready]").wait_for()
        if name == "run":
            expect(page.locator('[data-chart="loss"] canvas')).to_be_visible()
        page.screenshot(path=PICTURES / f"{name}-{scheme}-{size}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    page.close()
    server.kill()


def test_the_keyboard_is_enough(browser: Browser, tmp_path: Path, opened: list[Watched]) -> None:
    write_run(tmp_path / "runs" / "one", [step(i) for i in range(1, 10)])
    server = Server(tmp_path)
    page = open_page(browser, server, opened)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.type"))
    assert reached[:6] == ["/", "/", "/new", "/data", "/jobs", "checkbox"]
    page.get_by_role("link", name="one").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/*")
    page.close()
    server.kill()
