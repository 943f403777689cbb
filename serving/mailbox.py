"""Hands calls from other threads to an event loop, many for one wake-up.

Knows threads and asyncio; does not know what is handed over.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Mailbox:
    """Calls posted on any thread run on the loop's thread, in each thread's order.

    Waking a loop writes to a pipe, and a decode step finishes a token for every stream at once; so only the first post after the
    loop last looked wakes it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """A mailbox for ``loop``."""
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, call: Callable[[], None]) -> None:
        """Have ``call`` run on the loop soon. Once the loop is closed nobody waits for it, and it is dropped.

        No lock: a call is queued before ``_woken`` is read, and ``_run`` clears ``_woken`` before it empties the queue. Whichever
        comes first, either this post wakes the loop or the running ``_run`` takes the call; at worst the loop wakes once in vain.
        """
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:
                self._calls.clear()
                self._woken = False

    def _run(self) -> None:
        self._woken = False
        while self._calls:
            # Each is a call of the loop's own, so that one that raises does not take the others with it.
            self._loop.call_soon(self._calls.popleft())
