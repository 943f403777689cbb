from __future__ import annotations

import asyncio
from typing import Any

from serving.mailbox import Mailbox


async def test_a_mailbox_keeps_a_threads_order_and_wakes_the_loop_once_for_many() -> None:
    loop = asyncio.get_running_loop()
    mailbox = Mailbox(loop)
    seen: list[int] = []
    wakes = 0
    wake = loop.call_soon_threadsafe

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal wakes
        wakes += 1
        return wake(*arguments, **options)

    loop.call_soon_threadsafe = counted  # type: ignore[assignment]  # counts the wake-ups
    for number in range(100):
        mailbox.post(lambda number=number: seen.append(number))  # type: ignore[misc]  # a bound default
    assert seen == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (seen, wakes) == (list(range(100)), 1)
    mailbox.post(lambda: seen.append(100))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (seen[-1], wakes) == (100, 2)


async def test_a_call_that_raises_does_not_take_the_others_with_it() -> None:
    loop = asyncio.get_running_loop()
    complaints: list[str] = []
    loop.set_exception_handler(lambda _, context: complaints.append(str(context["exception"])))
    mailbox = Mailbox(loop)
    seen: list[str] = []

    def fail() -> None:
        raise RuntimeError("broken")

    mailbox.post(fail)
    mailbox.post(lambda: seen.append("after"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (seen, complaints) == (["after"], ["broken"])


def test_a_closed_loop_gets_nothing_and_its_workers_do_not_suffer() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    mailbox.post(lambda: None)
    mailbox.post(lambda: None)
