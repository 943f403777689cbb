"""A translator over an engine whose answers are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from serving.translator import Translator
from tests.fakes import ScriptedEngine, fake_preparer


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine()
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
async def translator(engine: ScriptedEngine) -> Translator:
    return Translator(fake_preparer(), engine, asyncio.get_running_loop())
