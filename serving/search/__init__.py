"""Search: from the model's best next tokens to hypotheses, for all the sources of a lane at once.

Knows candidates, scores and decoding options; does not know the runtime, the caches' arrays, rpc or time. It tells the owner of
the caches what to copy (`Fork`) and never touches them.
"""

from __future__ import annotations

from typing import Any

from serving.search.base import Advance, Fork, LaneSearch
from serving.search.beam import BeamSearch
from serving.search.greedy import GreedySearch

__all__ = ["Advance", "BeamSearch", "Fork", "GreedySearch", "LaneSearch", "make_lane_search"]


def make_lane_search(width: int, num_slots: int, eos_id: int, decoder_start_id: int) -> LaneSearch[Any]:
    """Make the search of a lane.

    Args:
        width: beams of each source; 1 decodes greedily.
        num_slots: sources that the lane holds at most.
        eos_id: the end-of-sentence token.
        decoder_start_id: the token that the decoder reads first.
    """
    search = GreedySearch if width == 1 else BeamSearch
    return search(width, num_slots, eos_id, decoder_start_id)
