"""Streams through the official client, some of which a test waits for before it does harm."""

from __future__ import annotations

import asyncio

import openai


class Clients:
    """Greedy streams of ``tokens`` tokens through the official client, one a prompt."""

    def __init__(self, client: openai.AsyncOpenAI, prompts: list[list[int]], tokens: int) -> None:
        self._client, self._prompts, self._tokens = client, prompts, tokens
        self._begun = [asyncio.Event() for _ in prompts]

    def start(self) -> list[asyncio.Task[tuple[str, str | None]]]:
        """Text and finish_reason of each, when it ends."""
        for event in self._begun:
            event.clear()
        return [asyncio.create_task(self._stream(number)) for number in range(len(self._prompts))]

    async def answers(self) -> list[tuple[str, str | None]]:
        """Of all, once they have ended."""
        return await asyncio.gather(*self.start())

    async def have_begun(self, count: int) -> None:
        """The first ``count`` of those that were started last have begun to answer."""
        await asyncio.gather(*(event.wait() for event in self._begun[:count]))

    async def _stream(self, number: int) -> tuple[str, str | None]:
        text, finish = "", None
        answer = await self._client.completions.create(
            model="m",
            prompt=self._prompts[number],
            max_tokens=self._tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
            timeout=300,
        )
        async for event in answer:
            for choice in event.choices:
                text += choice.text
                finish = choice.finish_reason or finish
            self._begun[number].set()
        return text, finish
