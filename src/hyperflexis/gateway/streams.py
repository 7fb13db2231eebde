"""A request's way through the gateway: one ``Answer`` for an HTTP exchange, one ``Choice`` for each generation of it.

A choice asks the controller, goes where it is sent, and hands text to its answer. Its rules:

- When its instance is lost or gives it back, it goes on elsewhere from the tokens that it has (core/stream.py). Too
  many failures, or too long a wait for an instance, end the answer with one clear error.
- When it is handed over, it has a stream at both instances until one of them is done with it. Should that be the one
  that was to go on, it stays where it was, and the controller is told.
- The head of an answer waits for the first token: up to then every failure still has its proper status.
- The client's leaving, a stop string, or the failure of a sibling choice cancels it at the instance.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import assert_never

import msgspec

from .. import openai_api as api
from ..core import events
from ..core.effects import Decision, Dispatch, Handoff, Reject
from ..core.events import HandoffFailed, OpenRequest, RequestArrived, RequestFinished
from ..core.links import KvSource
from ..core.request import Request
from ..core.stream import Repetition, Sent, Stream, continued, due
from ..errors import ProtocolError
from ..metrics import GatewayMetrics, Outcome
from ..wire import Finish, Generate, TokenLogprob, pack_ids
from . import sse
from .http import Exchange
from .intake import Intake, Prompt
from .links import ControllerLink, InstanceLinks
from .placements import Placement, Placements
from .text import StopMatcher, Text

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What every answer uses."""

    gateway: str
    controller: ControllerLink
    instances: InstanceLinks
    metrics: GatewayMetrics
    resume_wait_s: float
    start_wait_s: float
    now: Callable[[], float]
    answer_ended: Callable[[Answer], None]


class Answer:
    """One HTTP exchange, streamed or whole. ``id`` is unique in the fleet; ``client_id`` is what the client knows."""

    def __init__(
        self, services: Services, exchange: Exchange, intake: Intake, id: str, client_id: str, arrived_at: float
    ) -> None:
        self.services = services
        self.intake = intake
        self.arrived_at = arrived_at
        self._exchange = exchange
        self._id = ("chatcmpl-" if intake.kind == "chat" else "cmpl-") + id
        self._client_id = client_id
        self._created = int(time.time())
        self._begun = False
        self._ended = False
        choices = intake.num_choices
        prompts = [prompt for prompt in intake.prompts for _ in range(intake.n)]
        self._chunks = sse.Chunks(
            intake.kind, self._id, self._created, intake.model, intake.include_usage, choices if intake.stream else 0
        )
        self._choices = [
            Choice(self, i, id if choices == 1 else f"{id}-{i}", prompt) for i, prompt in enumerate(prompts)
        ]
        self._undone = choices
        exchange.on_disconnect = self._client_left

    def start(self) -> None:
        """Ask for all choices."""
        for choice in self._choices:
            choice.ask()

    def piece(self, choice: Choice, text: str, logprobs: list[TokenLogprob] | None) -> None:
        """Text of a choice, with the log-probabilities of the tokens it came with."""
        if not self.intake.stream:
            choice.pieces.append(text)
            if logprobs:
                choice.logprobs += logprobs
            return
        if not choice.sent:
            self._begin_choice(choice)
        if logprobs:
            entries = self._logprobs(choice, logprobs)
            self._exchange.write(self._chunks.text_with_logprobs(choice.index, text, entries))
        elif text:
            self._exchange.write(self._chunks.text(choice.index, text))

    def choice_done(self, choice: Choice, rest: str) -> None:
        """A choice has its finish reason; ``rest`` is the text that was held back."""
        self._undone -= 1
        if self._undone == 0:
            self._ended = True
        if self.intake.stream:
            if not choice.sent:
                self._begin_choice(choice)
            data = self._chunks.finish(choice.index, rest, choice.finish_reason)
            if self._ended:
                data += self._chunks.usage(self._usage()) + sse.DONE
            self._exchange.write(data)
            if self._ended:
                self._exchange.end()
        else:
            choice.pieces.append(rest)
            if self._ended:
                self._respond()
        if self._ended:
            self.services.answer_ended(self)

    def fail(self, error: api.ApiError, outcome: events.Outcome = "failed") -> None:
        """End everything with an error: by its status while nothing was sent, else by an event in the stream."""
        if self._ended:
            return
        self._ended = True
        for choice in self._choices:
            choice.abandon(outcome, error.message)
        self.services.metrics.error_answered(error.status, error.code)
        if self._begun:
            self._exchange.write(sse.error(error))
            self._exchange.end()
        else:
            self._exchange.fail(error, [("x-request-id", self._client_id)])
        self.services.answer_ended(self)

    def _client_left(self) -> None:
        if not self._ended:
            self._ended = True
            for choice in self._choices:
                choice.abandon("cancelled", "the client left")
            self.services.answer_ended(self)

    def _begin_choice(self, choice: Choice) -> None:
        choice.sent = True
        if not self._begun:
            self._begun = True
            self._exchange.begin(
                200,
                [
                    ("content-type", "text/event-stream; charset=utf-8"),
                    ("cache-control", "no-cache"),
                    *self._headers(choice),
                ],
            )
        if self.intake.kind == "chat":
            self._exchange.write(self._chunks.role(choice.index))

    def _headers(self, choice: Choice) -> list[tuple[str, str]]:
        headers = [("x-request-id", self._client_id)]
        if choice.dispatch is not None:
            decision = choice.dispatch.decision
            headers += [
                ("x-hfx-instance", _header(choice.dispatch.instance)),
                ("x-hfx-predicted-ttft-ms", f"{1e3 * decision.predicted_ttft_s:.0f}"),
                ("x-hfx-decision", _header(describe(decision))),
            ]
        return headers

    def _usage(self) -> api.Usage:
        prompt_tokens = sum(c.num_prompt_tokens for c in self._choices[:: self.intake.n])
        cached = sum(c.cached_tokens for c in self._choices[:: self.intake.n])
        return api.usage(prompt_tokens, sum(c.num_tokens for c in self._choices), cached)

    def _respond(self) -> None:
        chat: list[api.ChatChoice] = []
        plain: list[api.CompletionChoice] = []
        for choice in self._choices:
            text = "".join(choice.pieces)
            found = self._logprobs(choice, choice.logprobs) if self.intake.sampling.logprobs is not None else None
            if isinstance(found, api.CompletionLogprobs) or (found is None and self.intake.kind == "completions"):
                plain.append(api.CompletionChoice(choice.index, text, found, choice.finish_reason))
            else:
                chat.append(api.ChatChoice(choice.index, api.AnswerMessage(text), found, choice.finish_reason))
        name = "chat.completion" if self.intake.kind == "chat" else "text_completion"
        answer = api.Answer(self._id, name, self._created, self.intake.model, chat or plain, self._usage())
        headers = [("content-type", "application/json"), *self._headers(self._choices[0])]
        self._exchange.respond(200, headers, api.encode(answer))

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> api.ChatLogprobs | api.CompletionLogprobs:
        text = self.intake.text
        assert text is not None  # engines that take text are not asked for log-probabilities
        if self.intake.kind == "completions":
            return choice.completion_logprobs(text, entries)
        return api.ChatLogprobs([_chat_logprob(text, entry) for entry in entries])


class Choice:
    """One generation: an ``Asker`` of the controller and a ``Reader`` of an instance."""

    def __init__(self, answer: Answer, index: int, id: str, prompt: Prompt) -> None:
        intake = answer.intake
        promise = intake.promise
        self.id = id
        self.index = index
        self.sent = False
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.num_tokens = 0
        self.num_prompt_tokens = prompt.num_tokens
        self.cached_tokens = 0
        self.finish_reason = ""
        self.dispatch: Dispatch | None = None
        self._answer = answer
        self._services = answer.services
        self._prompt = prompt
        self._request = Request(
            id=id,
            model=intake.model,
            tenant=intake.tenant.name,
            slo_class=promise.slo_class,
            slo=promise.slo,
            value=promise.value,
            weight=promise.weight,
            num_prompt_tokens=prompt.num_tokens,
            max_output_tokens=prompt.max_tokens,
            prefix_keys=prompt.prefix_keys,
            fail_fast=promise.fail_fast,
        )
        self._stream = Stream(prompt.max_tokens)
        self._placements = Placements(answer.services.instances, self)
        self._avoid: str | None = None
        self._done = False
        self._first_at: float | None = None
        self._last_at = 0.0
        self._base = 0  # tokens before the controller placed it last
        self._heard = 0  # the newest attempt that gave something new
        self._text_offset = 0
        self._detokenizer = None if intake.text is None else intake.text.detokenizer(prompt.tail)
        self._repetition = Repetition() if intake.text is None else None
        self._stops = StopMatcher(intake.stops) if intake.stops else None

    def ask(self) -> None:
        """Ask the controller where to go."""
        self._services.controller.ask(self)

    # Asker

    def arrival(self) -> RequestArrived:
        """See links.Asker."""
        sent, gateway = self._stream.sent(self._ttft_s()), self._services.gateway
        request = continued(self._request, sent)
        return RequestArrived(request, gateway, self._age_s(), self._stream.attempt, self._avoid, sent)

    def open_request(self) -> OpenRequest | None:
        """See links.Asker."""
        at = self._placements.newest
        if at is None:
            return None
        sent, order = self._sent(self._base), at.order
        request = continued(self._request, sent)
        return OpenRequest(request, self._age_s(), order.instance, order.epoch, self.num_tokens - self._base, sent)

    def wait_s(self) -> float | None:
        """See links.Asker."""
        services = self._services
        if services.controller.awaits_launch(self._request.model):
            return services.start_wait_s
        return services.resume_wait_s if self._stream.attempt else None

    def dispatched(self, dispatch: Dispatch) -> None:
        """See links.Asker."""
        self.dispatch = dispatch
        attempt = self._stream.begin()
        self._base = self._stream.first_of(attempt)
        self._placements.open(attempt, dispatch)

    def hand_over(self, handoff: Handoff) -> None:
        """See links.Asker."""
        at = self._placements.newest
        if at is None or (at.order.instance, at.order.epoch) != (handoff.source, handoff.source_epoch):
            return  # it has moved on since, of which the controller hears
        if self._repetition is not None:
            self._stays_at(at, "its engine gives no token ids")
        elif self._stream.is_handed_over:
            self._stays_at(at, "it is still on its way there")
        else:
            self._placements.open(self._stream.hand_over(), handoff)

    def rejected(self, reject: Reject) -> None:
        """See links.Asker."""
        self._end("rejected")
        self._answer.fail(_rejection(reject))

    def unanswered(self) -> None:
        """See links.Asker."""
        if self._services.controller.awaits_launch(self._request.model):
            message = f"no instance of {self._request.model!r} was ready within {self._services.start_wait_s:g} s"
            self._answer.fail(api.ApiError(503, message, code="no_instance_ready", retry_after_s=2.0))
            return
        if self._stream.attempt:
            message = f"its instance was lost and no other was ready within {self._services.resume_wait_s:g} s"
            self._answer.fail(api.ApiError(503, message, code="no_instance_ready", retry_after_s=2.0))
            return
        message = "the controller is away and did not come back in time"
        self._answer.fail(api.ApiError(503, message, code="controller_unavailable", retry_after_s=2.0))

    # Reader

    def generate(self, attempt: int, stream: int) -> Generate:
        """See links.Reader."""
        order, before = self._placements.order(attempt), self._stream.first_of(attempt)
        intake, slo, age_s = self._answer.intake, self._request.slo, self._age_s()
        expected = min(order.expected_output_tokens, float(self._prompt.max_tokens - before))
        due_s, pace_s = due(slo, before + expected, self._sent(before))
        seed = intake.sampling.seed
        sampling = msgspec.structs.replace(
            intake.sampling,
            max_tokens=self._prompt.max_tokens - before,
            # Choices of one seeded request must differ from each other.
            seed=None if seed is None else seed + self.index % intake.n,
        )
        hands_over, kv = False, None
        match order:
            case Dispatch():
                hands_over = order.hands_over
            case Handoff():
                kv = KvSource(order.kv_address, order.source, order.source_epoch)
            case _:
                assert_never(order)
        return Generate(
            stream=stream,
            request_id=self.id,
            epoch=order.epoch,
            # More may have come since from an instance that hands it over; the KV brings that along.
            token_ids=self._prompt.token_ids + pack_ids(self._stream.tokens[:before]),
            sampling=sampling,
            first_due_s=None if due_s == inf else due_s - age_s,
            pace_s=None if pace_s == inf else pace_s,
            last_due_s=None if slo.e2e_s is None else slo.e2e_s - age_s,
            value=order.value,
            slo_class=self._request.slo_class,
            expected_output_tokens=expected,
            salt=self._request.tenant,
            kind=intake.kind,
            body=intake.body,
            hands_over=hands_over,
            kv=kv,
            reported_before=before - self._base,
            sent_tokens=before,
        )

    def tokens(
        self, attempt: int, now: float, token_ids: list[int], text: str | None, logprobs: list[TokenLogprob] | None
    ) -> None:
        """See links.Reader."""
        fresh = self._stream.take(attempt, token_ids)
        if fresh is None:
            return
        if self._detokenizer is not None:
            if not fresh:
                return  # the other instance was faster
            self.num_tokens += len(fresh)
            piece = self._detokenizer.push(fresh)
            if logprobs:
                logprobs = logprobs[-len(fresh) :]
        else:
            assert self._repetition is not None
            self.num_tokens += 1
            try:
                piece = self._repetition.push(text or "")
            except ProtocolError as error:
                message = f"the stream's instance was lost, and it cannot go on elsewhere: {error}"
                self._answer.fail(api.ApiError(502, message, code="instance_lost"))
                return
        if attempt > self._heard:
            self._heard_from(attempt, now)
        self._last_at = now
        if self._stops is None:
            self._answer.piece(self, piece, logprobs)
            return
        piece, stopped = self._stops.push(piece)
        self._answer.piece(self, piece, logprobs)
        if stopped:
            self._finish("stop", "")

    def finish(self, attempt: int, finish: Finish) -> None:
        """See links.Reader."""
        if not self._stream.is_live(attempt):
            return
        before = self._stream.first_of(attempt)
        if attempt == 1 and finish.reason in ("stop", "length", "handed"):
            self.cached_tokens = finish.cached_tokens
        match finish.reason:
            case "stop" | "length":
                if self._repetition is not None and self._repetition.left:
                    self.instance_lost(attempt, "its new answer is shorter than what was sent")
                    return
                self.num_tokens = before + finish.num_output_tokens
                if self._detokenizer is None:
                    self.num_prompt_tokens = finish.num_prompt_tokens
                if attempt > self._heard and self.num_tokens:
                    self._heard_from(attempt, self._services.now())
                self._stream.finish(attempt)
                self._complete(finish.reason)
            case "invalid" if not before and isinstance(self._placements.order(attempt), Dispatch):
                self._answer.fail(api.ApiError(400, finish.message, code="invalid_request"))
            case "refused" if isinstance(self._placements.order(attempt), Handoff):
                # It did not get the KV, and may well get the request: that is not what to avoid.
                self._lose(attempt, f"refused: {finish.message}", failed=True)
            case "handed":
                self._lose(attempt, "handed over to an instance that was lost", failed=False)
            case "moved":
                self.instance_lost(attempt, finish.message, failed=False)
            case _:  # error, refused; or cancelled, which we did not ask for, or we would not read it
                self.instance_lost(attempt, f"{finish.reason}: {finish.message}")

    def instance_lost(self, attempt: int, reason: str, failed: bool = True) -> None:
        """See links.Reader."""
        if self._stream.is_live(attempt):
            self._avoid = self._placements.order(attempt).instance
            self._lose(attempt, reason, failed)

    def _lose(self, attempt: int, reason: str, failed: bool) -> None:
        """A live attempt is over before the answer is."""
        lost = self._placements.drop(attempt)
        if isinstance(lost.order, Handoff) and attempt > self._heard:
            self._services.metrics.handoff_failed(self._request.model)
        match self._stream.lose(attempt, failed):
            case None:
                other = self._placements.newest
                assert other is not None
                if other.attempt < attempt:
                    self._stays_at(other, reason)
            case "complete":
                self._complete("length")
            case "exhausted":
                message = f"{self._stream.failures} instances failed this request; the last: {reason}"
                self._answer.fail(api.ApiError(503, message, code="attempts_exhausted", retry_after_s=1.0))
            case "resume":
                _log.info("request %s goes on elsewhere after %d tokens: %s", self.id, self.num_tokens, reason)
                self._services.metrics.redispatched(self._request.model)
                self.dispatch = None
                if self._repetition is not None:
                    self._repetition.again()
                    self.num_tokens = 0
                self.ask()
            case loss:
                assert_never(loss)

    def _stays_at(self, at: Placement, reason: str) -> None:
        """It is not handed over."""
        self._services.controller.handoff_failed(HandoffFailed(self.id, at.order.instance, at.order.epoch, reason))

    def _heard_from(self, attempt: int, now: float) -> None:
        """An attempt's first tokens that are new, or its end."""
        self._heard = attempt
        if isinstance(self._placements.order(attempt), Handoff):
            gap_s = None if self._first_at is None else now - self._last_at
            self._services.metrics.handed_over(self._request.model, self._request.slo_class, gap_s)
        if self._first_at is None:
            self._first_at = now

    # ends

    def abandon(self, outcome: events.Outcome, detail: str) -> None:
        """The answer is over for another reason. Does nothing when this choice is over already."""
        self._placements.cancel()
        self._stream.stop()
        self._end(outcome, detail)

    def _complete(self, reason: str) -> None:
        """All tokens are there: out with what was held back."""
        rest = self._detokenizer.flush() if self._detokenizer is not None else ""
        if self._stops is not None:
            rest, stopped = self._stops.push(rest)
            if stopped:
                reason = "stop"
            else:
                rest += self._stops.flush()
        self._finish(reason, rest)

    def _finish(self, reason: str, rest: str) -> None:
        self.finish_reason = reason
        self._placements.cancel()
        self._stream.stop()
        # The last bytes leave before anything is told of them.
        self._answer.choice_done(self, rest)
        self._end("finished")

    def _end(self, outcome: Outcome, detail: str = "") -> None:
        if self._done:
            return
        self._done = True
        request, services = self._request, self._services
        e2e_s = self._age_s()
        ttft_s = self._ttft_s()
        services.metrics.request_ended(
            request.model,
            request.slo_class,
            outcome,
            request.slo,
            self.num_prompt_tokens,
            self.num_tokens,
            ttft_s,
            e2e_s,
        )
        if outcome != "rejected":  # the controller knows
            services.controller.finished(
                RequestFinished(self.id, outcome, self.num_tokens, ttft_s, e2e_s, self.cached_tokens, detail)
            )

    def _sent(self, num_tokens: int) -> Sent | None:
        """What the client had when it had that many tokens; None for nothing."""
        if not num_tokens:
            return None
        ttft_s = self._ttft_s()
        assert ttft_s is not None
        return Sent(num_tokens, ttft_s)

    def _ttft_s(self) -> float | None:
        return None if self._first_at is None else self._first_at - self._answer.arrived_at

    def _age_s(self) -> float:
        return self._services.now() - self._answer.arrived_at

    def completion_logprobs(self, text: Text, entries: list[TokenLogprob]) -> api.CompletionLogprobs:
        """In the form of ``/v1/completions``; offsets go on from the last call."""
        tokens, offsets = [], []
        for entry in entries:
            token = text.token(entry.token_id)
            tokens.append(token)
            offsets.append(self._text_offset)
            self._text_offset += len(token)
        top = [{text.token(id): logprob for id, logprob in entry.top} for entry in entries]
        return api.CompletionLogprobs(tokens, [entry.logprob for entry in entries], top, offsets)


def _chat_logprob(text: Text, entry: TokenLogprob) -> api.ChatLogprob:
    top = [api.TopLogprob(token := text.token(id), logprob, _bytes(token)) for id, logprob in entry.top]
    token = text.token(entry.token_id)
    return api.ChatLogprob(token, entry.logprob, _bytes(token), top)


def _bytes(token: str) -> list[int] | None:
    return None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())


def describe(decision: Decision) -> str:
    """Why a request is where it is, in a line."""
    text = (
        f"{decision.policy}: {'on time' if decision.on_time else 'demoted'}, best of {decision.candidates}, "
        f"queue {1e3 * decision.load_s:.0f} ms, gain {decision.gain:.3g}"
    )
    if decision.saved_s:
        text += f", {1e3 * decision.saved_s:.0f} ms saved by a cached prefix"
    return f"{text}, {decision.note}" if decision.note else text


def _header(text: str) -> str:
    return text if text.isascii() and text.isprintable() else ascii(text)


def _rejection(reject: Reject) -> api.ApiError:
    reason = reject.reason
    match reason:
        case "slo_infeasible" | "overloaded":
            status = 429
        case "no_instance_ready":
            status = 503
        case "unknown_model":
            return api.ApiError(404, reject.message, param="model", code="model_not_found")
        case _:
            assert_never(reason)
    return api.ApiError(status, reject.message, code=reason, retry_after_s=reject.retry_after_s)
