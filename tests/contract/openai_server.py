"""A small OpenAI-compatible server: deterministic, streamed, over real sockets, with what can go wrong on demand.

A prompt of ids (or a text, read as its bytes) is continued by a hash of all tokens before each one, as in a model.
"""

from __future__ import annotations

import asyncio
import json
from binascii import crc32
from contextlib import nullcontext
from typing import Any

from aiohttp import web

CONTEXT = 512


class OpenAIServer:
    """Serves model ``served`` at ``url`` once started. ``token_ids`` makes it speak them, as vLLM does; with a
    ``version`` it is one, and ``inside`` is what a scheduler in it tells; ``gives_kv``: it has a connector."""

    def __init__(self, token_ids: bool) -> None:
        self.token_ids = token_ids
        self.pace_s = 0.001
        self.open = 0
        self.bodies: list[dict[str, Any]] = []
        self.idle = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.fail_with: tuple[int, str] | None = None
        self.finish_reason: str | None = "length"
        self.cut_after: int | None = None
        self.garbage: bytes | None = None
        self.at_once: asyncio.Semaphore | None = None
        self.version: str | None = None
        self.inside: dict[str, Any] | None = None
        self.gives_kv = False
        self.stops_at_once = False
        self._seen: dict[tuple[int, ...], int] = {}
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        self.url = ""

    async def start(self) -> OpenAIServer:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "served", "max_model_len": CONTEXT}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text='vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="128"} 1.0\n'
        )

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version}, status=404 if self.version is None else 200)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["prompt"]
        return await self._answer(request, body, prompt if isinstance(prompt, list) else list(prompt.encode()), "text")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._answer(request, body, list(body["messages"][-1]["content"].encode()), "chat")

    async def _answer(
        self, request: web.Request, body: dict[str, Any], prompt: list[int], kind: str
    ) -> web.StreamResponse:
        self.bodies.append(body)
        if self.fail_with is not None:
            return web.json_response({"error": {"message": self.fail_with[1]}}, status=self.fail_with[0])
        if len(prompt) >= CONTEXT:
            return web.json_response({"error": {"message": f"{len(prompt)} tokens exceed {CONTEXT}"}}, status=400)
        self.open += 1
        self.idle.clear()
        try:
            async with self.at_once or nullcontext():
                return await self._generate(request, body, prompt, kind)
        finally:
            self.open -= 1
            if not self.open:
                self.idle.set()

    async def _generate(
        self, request: web.Request, body: dict[str, Any], prompt: list[int], kind: str
    ) -> web.StreamResponse:
        seed = body.get("seed", 0) if body.get("temperature", 1.0) else 0
        state = crc32(b"".join(token.to_bytes(4, "little") for token in prompt), seed)
        limit = body.get("max_tokens", 16)
        cached = self._seen.get(tuple(prompt), 0)
        self._seen[tuple(prompt)] = len(prompt) // 16 * 16
        if not body.get("stream"):
            choice = {"text": "!", "token_ids": [33] if self.token_ids else None, "finish_reason": "length"}
            if self.stops_at_once:
                choice["finish_reason"] = "stop"
            parameters = {"hyperflexis": self.inside} if "hfx_probe" in body.get("vllm_xargs", {}) else None
            if self.gives_kv and body.get("kv_transfer_params", {}).get("do_remote_decode"):
                parameters = {"do_remote_prefill": True, "remote_engine_id": self.url, "remote_block_ids": [[1, 2]]}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
            return web.json_response({"choices": [choice], "usage": usage, "kv_transfer_params": parameters})
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)
        for number in range(1, limit + 1):
            await self.go_on.wait()
            await asyncio.sleep(self.pace_s)
            token = 32 + state % 95
            state = crc32(token.to_bytes(4, "little"), state)
            choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason if number == limit else None}
            choice |= {"text": chr(token)} if kind == "text" else {"delta": {"content": chr(token)}}
            if self.token_ids and body.get("return_token_ids"):
                choice["token_ids"] = [token]
                if body.get("return_tokens_as_token_ids"):
                    top = {f"token_id:{token}": -0.5, f"token_id:{token + 1}": -1.5}
                    choice["logprobs"] = {
                        "tokens": [f"token_id:{token}"],
                        "token_logprobs": [-0.5],
                        "top_logprobs": [top],
                    }
            await self._event(out, {"choices": [choice]})
            if self.garbage is not None:
                await out.write(self.garbage)
            if number == self.cut_after:
                assert request.transport is not None
                request.transport.abort()
                return out
        if self.finish_reason is not None:
            usage = {"prompt_tokens": len(prompt), "completion_tokens": limit}
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
            await self._event(out, {"choices": [], "usage": usage})
            await out.write(b"data: [DONE]\r\n\r\n")
        return out

    async def _event(self, out: web.StreamResponse, event: dict[str, Any]) -> None:
        await out.write(b"data: " + json.dumps(event).encode() + b"\n\n")
