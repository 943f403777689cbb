from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.bulk_scoring import Requests, scored_by_model, with_targets
from serving.errors import InvalidRequestError
from serving.model import ServedModel
from tests.fakes import ScriptedEngine, fake_model


@pytest.fixture
def model() -> Iterator[ServedModel]:
    served = fake_model(ScriptedEngine())
    yield served
    served.engine.close()


def test_lines_and_targets_go_together() -> None:
    assert list(with_targets(["a", "b"], ["c", ""])) == [("a", "c"), ("b", "")]
    assert list(with_targets([], [])) == []


@pytest.mark.parametrize(
    ("lines", "targets", "message"),
    [
        (["a", "b"], ["c"], "^line 2: has no target: there are 1"),
        (["a"], ["c", "d"], "^targets: must be as many as lines, 1, not more"),
    ],
    ids=["few", "many"],
)
def test_pairs_before_one_that_is_not_whole_are_there(lines: list[str], targets: list[str], message: str) -> None:
    pairs = with_targets(lines, targets)
    assert next(pairs) == ("a", "c")
    with pytest.raises(InvalidRequestError, match=message):
        next(pairs)


def test_a_request_has_no_more_lines_than_it_may() -> None:
    requests = Requests(lines_per_request=8, in_flight=2)
    assert requests.of_at_most(4) == Requests(lines_per_request=4, in_flight=2)
    assert requests.of_at_most(20) == requests


def test_scores_come_in_the_order_of_the_lines(model: ServedModel) -> None:
    pairs = [("a", "x" * (number % 7)) for number in range(20)]
    scored = scored_by_model(pairs, model, Requests(lines_per_request=3, in_flight=4))
    assert [len(one.tokens) - 1 for one in scored] == [len(target) for _, target in pairs]


def test_languages_are_of_all_requests(model: ServedModel) -> None:
    requests = Requests(source_language="de", target_language="fr", lines_per_request=1, in_flight=1)
    with pytest.raises(InvalidRequestError, match=r"^target_language: .* not into 'fr'"):
        list(scored_by_model([("a", "b")], model, requests))
