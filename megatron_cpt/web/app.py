"""The routes: pages rendered here, JSON for what they show live, and JSON in for what they start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from megatron_cpt import __version__
from megatron_cpt.errors import CptError
from megatron_cpt.presets import presets
from megatron_cpt.web.actions import Actions
from megatron_cpt.web.forms import corpus_form, run_form
from megatron_cpt.web.guard import Guard, parse_body
from megatron_cpt.web.jobs import Jobs
from megatron_cpt.web.prepare import Allowed
from megatron_cpt.web.run_list import RunList
from megatron_cpt.web.series import CurveStore
from megatron_cpt.web.views import RunViews

_HERE = Path(__file__).parent


@dataclass
class Site:
    """What the pages show and start: the runs below `root`, with paths below the `allowed` folders."""

    root: Path
    allowed: Allowed
    known_runs: RunList = field(init=False)
    jobs: Jobs = field(init=False)
    curves: CurveStore = field(default_factory=CurveStore)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.known_runs = RunList(self.root)
        self.jobs = Jobs(self.root)


def make_app(site: Site, *, token: str, port: int, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> Guard:
    """Return the guarded application.

    Args:
        site: what it serves.
        token: the secret that every request must bring.
        port: on which it will listen.
        hosts: names by which it may be called.
    """
    views, actions = (
        RunViews(site.known_runs, site.curves),
        Actions(site.root, site.known_runs, site.jobs, site.allowed),
    )
    page = _Pages(site)
    one = _OneRun(site.known_runs)
    routes = [
        Route("/", page.shows("runs.html.jinja", "Runs")),
        Route("/runs/{run}", page.run),
        Route("/new", page.shows("new.html.jinja", "New run", form=run_form, presets=lambda: list(presets()))),
        Route("/data", page.shows("data.html.jinja", "Data", form=corpus_form)),
        Route("/jobs", page.shows("jobs.html.jinja", "Jobs")),
        Route("/jobs/{job}", page.job),
        Route("/api/runs", _reads(lambda request: views.listed())),
        Route("/api/runs/{run}", _reads(lambda request: views.status(one(request)))),
        Route("/api/runs/{run}/log", _reads(lambda request: views.log(one(request), request.query_params))),
        Route("/api/runs/{run}/config", _reads(lambda request: views.config(one(request), request.query_params))),
        Route("/api/runs/{run}/values", _reads(lambda request: views.values(one(request)))),
        Route("/api/runs/{run}/metrics.csv", _csv(one, views)),
        _post("/api/runs/{run}/curves", lambda request, body: views.curves(one(request), body)),
        _post(
            "/api/runs/{run}/{action}",
            lambda request, body: actions.on_run(one(request), _named(request, "action"), body),
        ),
        Route("/api/jobs", _reads(lambda request: [job.to_json() for job in site.jobs.listed()])),
        Route("/api/jobs/{job}", _reads(lambda request: actions.job(_named(request, "job"), _offset(request)))),
        _post("/api/jobs/{job}/stop", lambda request, body: actions.stop_job(_named(request, "job"), body)),
        _post("/api/preset", lambda request, body: actions.preset(body)),
        _post("/api/preview", lambda request, body: actions.preview(body)),
        _post("/api/start", lambda request, body: actions.start(body)),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, CptError: _cpt_error})
    return Guard(app, token, port, hosts)


class _Pages:
    """Pages from templates; what is live on them comes as JSON later."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.environment = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=select_autoescape(default_for_string=True, default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def render(self, template: str, title: str, **values: Any) -> HTMLResponse:
        text = self.environment.get_template(template).render(
            title=title, version=__version__, root=str(self.site.root), **values
        )
        return HTMLResponse(text)

    def shows(self, template: str, title: str, **values: Callable[[], Any]) -> Callable[[Request], Any]:
        async def show(request: Request) -> Response:
            return self.render(template, title, **{name: value() for name, value in values.items()})

        return show

    async def run(self, request: Request) -> Response:
        path = await run_in_threadpool(_OneRun(self.site.known_runs), request)
        name = self.site.known_runs.name_of(path)
        return self.render("run.html.jinja", name, run=request.path_params["run"], name=name)

    async def job(self, request: Request) -> Response:
        job = self.site.jobs.get(request.path_params["job"])
        if job is None:
            raise HTTPException(404, "there is no such job")
        return self.render("job.html.jinja", job.title, job=job)


class _OneRun:
    """Finds the folder of the run that a request names by its id."""

    def __init__(self, known_runs: RunList) -> None:
        self.known_runs = known_runs

    def __call__(self, request: Request) -> Path:
        path = self.known_runs.path(_named(request, "run"))
        if path is None:
            raise HTTPException(404, "there is no such run (any more)")
        return path


def _named(request: Request, name: str) -> str:
    """A part of the request's address."""
    value = request.path_params[name]
    assert isinstance(value, str)
    return value


def _reads(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """A handler that reads files in a thread and answers in JSON."""

    async def handle(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(answer, request))

    return handle


def _post(path: str, answer: Callable[[Request, dict[str, Any]], Any]) -> Route:
    """A route for a POST with a JSON object."""

    async def handle(request: Request) -> Response:
        try:
            body = parse_body(await request.body())
        except ValueError as error:
            raise HTTPException(400, f"not understood: {error}") from error
        return JSONResponse(await run_in_threadpool(answer, request, body))

    return Route(path, handle, methods=["POST"])


def _csv(one: Callable[[Request], Path], views: RunViews) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        text = await run_in_threadpool(lambda: views.csv(one(request)))
        headers = {"Content-Disposition": 'attachment; filename="metrics.csv"'}
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    return handle


def _offset(request: Request) -> int:
    text = request.query_params.get("offset", "0")
    return int(text) if text.isdecimal() else 0


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": error.detail}, error.status_code)
    return Response(f"{error.status_code}: {error.detail}\n", error.status_code, media_type="text/plain")


async def _cpt_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CptError)
    return JSONResponse({"error": error.message, "hint": error.hint}, 409)
