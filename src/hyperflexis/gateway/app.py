"""Endpoints: which request gets which answer."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

from .. import openai_api as api
from ..errors import HyperFlexisError
from ..metrics import CONTENT_TYPE, GatewayMetrics, Levels
from .config import ANONYMOUS, GatewayConfig, Tenant
from .http import Exchange, HttpRequest, HttpServer
from .intake import Intake, Intakes
from .links import ControllerLink, InstanceLinks
from .slo_sources import SloSources
from .streams import Answer, Services
from .text import Text, load

# Tokenising takes about 1.4 us a token of 4 bytes: this much holds the event loop for 0.7 ms at most, while a hop to
# a thread and back costs about 0.1 ms and contends for the interpreter besides.
INLINE_BODY_BYTES = 2048
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_JSON = ("content-type", "application/json")
_log = logging.getLogger(__name__)


class Gateway:
    """The process's collaborators, built here in one place, and the HTTP handler over them."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        limits = config.limits
        self.http = HttpServer(self.handle, limits)
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._instances = InstanceLinks(config.id, config.token, self._now)
        self.controller = ControllerLink(
            config.controller,
            config.id,
            config.token,
            limits.max_waiting_requests,
            limits.controller_wait_s,
            self._now,
            self._instances.evacuate,
        )
        self._metrics = GatewayMetrics(self._levels)
        self._intakes = Intakes(
            _load_texts(config),
            SloSources({c.name: c for c in config.classes}, config.default_class, config.service_tiers),
            limits.max_choices,
        )
        self._services = Services(
            gateway=config.id,
            controller=self.controller,
            instances=self._instances,
            metrics=self._metrics,
            resume_wait_s=limits.resume_wait_s,
            start_wait_s=limits.start_wait_s,
            now=self._now,
            answer_ended=self._answer_ended,
        )
        self._tenants = {t.name: t for t in config.tenants}
        self._answers: set[Answer] = set()
        self._reading = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        # Ids are unique in the fleet and over restarts of this process.
        self._boot = secrets.token_hex(4)
        self._numbers = count(1)
        self._created = int(time.time())

    def cut(self) -> None:
        """End all open answers with an error."""
        error = api.ApiError(503, "the gateway is shutting down", code="shutting_down", retry_after_s=1.0)
        for answer in list(self._answers):
            answer.fail(error)

    def close(self) -> None:
        """Let go of links and threads."""
        self._instances.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def handle(self, request: HttpRequest, exchange: Exchange) -> None:
        """Answer one request, now or later."""
        try:
            self._route(request, exchange)
        except api.ApiError as error:
            self._fail(exchange, error, _client_id(request))
        except Exception:
            _log.exception("%s %s", request.method, request.path)
            self._fail(exchange, api.ApiError(500, "internal error; the gateway's log has it"), _client_id(request))

    def _route(self, request: HttpRequest, exchange: Exchange) -> None:
        match request.path:
            case "/v1/chat/completions":
                _require(request, "POST")
                self._complete("chat", request, exchange)
            case "/v1/completions":
                _require(request, "POST")
                self._complete("completions", request, exchange)
            case "/v1/models":
                _require(request, "GET", "HEAD")
                self._tenant(request.headers)
                exchange.respond(200, [_JSON], api.encode(api.ModelList([self._card(m) for m in self._config.models])))
            case "/health":
                _require(request, "GET", "HEAD")
                exchange.respond(200, [_JSON], b'{"status":"ok"}')
            case "/ready":
                _require(request, "GET", "HEAD")
                self._ready(exchange)
            case "/metrics":
                _require(request, "GET", "HEAD")
                exchange.respond(200, [("content-type", CONTENT_TYPE)], self._metrics.render())
            case path if path.startswith("/v1/models/"):
                _require(request, "GET", "HEAD")
                self._tenant(request.headers)
                model = path.removeprefix("/v1/models/")
                if model not in self._config.models:
                    raise api.ApiError(404, f"no model is named {model!r}", param="model", code="model_not_found")
                exchange.respond(200, [_JSON], api.encode(self._card(model)))
            case path:
                raise api.ApiError(404, f"there is no {path[:100]}", code="not_found")

    def _complete(self, kind: api.Kind, request: HttpRequest, exchange: Exchange) -> None:
        arrived_at = self._now()
        tenant = self._tenant(request.headers)
        self.controller.check_room()
        limit = self._config.limits.max_open_requests
        if len(self._answers) + self._reading >= limit:
            message = f"this gateway has {limit} requests open, which is its limit"
            raise api.ApiError(429, message, code="overloaded", retry_after_s=1.0)
        fleet = self.controller.fleet
        if fleet is None:
            message = "the controller has not been reached yet"
            raise api.ApiError(503, message, code="controller_unavailable", retry_after_s=1.0)
        if len(request.body) <= INLINE_BODY_BYTES:
            intake = self._intakes.read(kind, request.body, request.headers, tenant, fleet.models)
            self._answer(intake, request, exchange, arrived_at)
            return
        self._reading += 1
        future = self._threads.submit(self._intakes.read, kind, request.body, request.headers, tenant, fleet.models)
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._was_read, done, request, exchange, arrived_at)
        )

    def _was_read(self, done: Future[Intake], request: HttpRequest, exchange: Exchange, arrived_at: float) -> None:
        self._reading -= 1
        if not exchange.is_open:
            return
        try:
            self._answer(done.result(), request, exchange, arrived_at)
        except api.ApiError as error:
            self._fail(exchange, error, _client_id(request))
        except Exception:
            _log.exception("%s %s", request.method, request.path)
            self._fail(exchange, api.ApiError(500, "internal error; the gateway's log has it"), _client_id(request))

    def _answer(self, intake: Intake, request: HttpRequest, exchange: Exchange, arrived_at: float) -> None:
        own = self._mint()
        client_id = _client_id(request)
        # A client may use an id twice, the fleet may not: its id leads, ours makes it unique.
        id = own if client_id is None else f"{client_id}~{own}"
        answer = Answer(self._services, exchange, intake, id, client_id or own, arrived_at)
        self._answers.add(answer)
        answer.start()

    def _mint(self) -> str:
        return f"{self._config.id}-{self._boot}-{next(self._numbers):x}"

    def _answer_ended(self, answer: Answer) -> None:
        self._answers.discard(answer)

    def _fail(self, exchange: Exchange, error: api.ApiError, client_id: str | None) -> None:
        self._metrics.error_answered(error.status, error.code)
        exchange.fail(error, [("x-request-id", client_id or self._mint())])

    def _tenant(self, headers: Mapping[str, str]) -> Tenant:
        keys = self._config.api_keys
        if not keys:
            return ANONYMOUS
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = keys.get(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            message = "no known API key: send the header Authorization: Bearer KEY"
            raise api.ApiError(401, message, param="authorization", code="invalid_api_key")
        return self._tenants[name]

    def _ready(self, exchange: Exchange) -> None:
        controller = self.controller
        missing = [m for m, number in self._num_ready().items() if number == 0 and not controller.awaits_launch(m)]
        if not self.controller.is_up:
            body = {"status": "not ready", "reason": "the controller is not connected", "missing": missing}
        elif missing:
            body = {"status": "not ready", "reason": "models without a ready instance", "missing": missing}
        else:
            exchange.respond(200, [_JSON], b'{"status":"ready"}')
            return
        exchange.respond(503, [_JSON, ("retry-after", "1")], api.encode(body))

    def _num_ready(self) -> dict[str, int]:
        statuses = {} if self.controller.fleet is None else self.controller.fleet.models
        return {m: len(statuses[m].ready) if m in statuses else 0 for m in self._config.models}

    def _card(self, model: str) -> api.ModelCard:
        status = None if self.controller.fleet is None else self.controller.fleet.models.get(model)
        return api.ModelCard(model, self._created, None if status is None else status.context_length)

    def _levels(self) -> Levels:
        return Levels(
            open_requests=len(self._answers) + self._reading,
            connections=len(self.http.connections),
            controller_up=self.controller.is_up,
            ready=self._num_ready(),
            reports=() if self.controller.fleet is None else self.controller.fleet.reports,
            scaled={} if self.controller.fleet is None else self.controller.fleet.scaled,
        )


def _load_texts(config: GatewayConfig) -> dict[str, Text | None]:
    texts: dict[str, Text | None] = {}
    for model, directory in config.models.items():
        try:
            texts[model] = None if directory is None else load(directory)
        except HyperFlexisError as error:
            raise HyperFlexisError(f"model {model}: {error}") from error
    return texts


def _client_id(request: HttpRequest) -> str | None:
    """The client's own request id, unless it could not stand in a header or a log."""
    id = request.headers.get("x-request-id", "")
    return id if _SANE_ID.fullmatch(id) else None


def _require(request: HttpRequest, *methods: str) -> None:
    if request.method not in methods:
        message = f"{request.path} takes {' or '.join(methods)}, not {request.method}"
        raise api.ApiError(405, message, code="method_not_allowed")
