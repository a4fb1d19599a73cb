"""HTTP client of an endpoint, which tells when the endpoint is silent or broken, and when it answers again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from openai import DefaultAsyncHttpxClient

_BROKEN = 500
"""Lowest status of an answer that is the server's own failure."""


class WatchedClient(DefaultAsyncHttpxClient):
    """The `openai` package's own client; one event when answers stop, one when they are back, however many requests wait."""

    def __init__(self, teacher: str, on_event: Callable[..., None], **options: Any) -> None:
        """Args: teacher: its name, for the events; on_event: called with their kind and fields."""
        super().__init__(**options)
        self._teacher = teacher
        self._on_event = on_event
        self._lost_at: float | None = None
        self._answered_at = 0.0
        self._failed = 0

    async def send(self, request: Any, **options: Any) -> Any:
        """Send one attempt of a request, as `openai` calls it. Raises: what the HTTP library does where none gets through."""
        began = time.monotonic()
        try:
            response = await super().send(request, **options)
        except Exception as error:
            self._note_lost(f"{type(error).__name__}: {error}".removesuffix(": "), began)
            raise
        if response.status_code >= _BROKEN:
            self._note_lost(f"status {response.status_code}", began)
        else:
            self._note_answer()
        return response

    def _note_lost(self, reason: str, began: float) -> None:
        """Note a failed attempt. Args: began: an answer to another one since then says that the endpoint is there again."""
        self._failed += 1
        if self._lost_at is None and began >= self._answered_at:
            self._lost_at = time.monotonic()
            self._on_event("endpoint_lost", teacher=self._teacher, reason=reason[:500])

    def _note_answer(self) -> None:
        self._answered_at = time.monotonic()
        if self._lost_at is not None:
            lost_s, failed = round(self._answered_at - self._lost_at, 1), self._failed
            self._lost_at, self._failed = None, 0
            self._on_event("endpoint_back", teacher=self._teacher, lost_s=lost_s, failed_attempts=failed)
