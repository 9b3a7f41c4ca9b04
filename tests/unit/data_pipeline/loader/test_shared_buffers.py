"""Buffers between workers and the training process."""

from __future__ import annotations

import numpy as np

from data_pipeline.loader.shared_buffers import SharedBuffers


def test_buffers_in_flight_are_apart_and_used_again_afterwards() -> None:
    buffers = SharedBuffers(workers=2, ahead=1, floats=6)
    places = [(worker, turn) for worker in range(2) for turn in range(3)]  # one more than what can be in flight
    arrays = {place: buffers.get(place, (2, 3)) for place in places}
    for number, array in enumerate(arrays.values()):
        assert array is not None
        array[:] = number
    assert [int(array[0, 0]) for array in arrays.values() if array is not None] == list(range(6))
    again = buffers.get((1, 3), (1, 4))
    assert again is not None
    np.testing.assert_array_equal(again, [[3.0] * 4])


def test_a_batch_that_is_larger_than_its_buffer_is_not_put_there() -> None:
    buffers = SharedBuffers(workers=1, ahead=1, floats=6)
    assert buffers.get((0, 0), (2, 4)) is None
    empty = buffers.get((0, 0), (0, 4))
    assert empty is not None
    assert empty.shape == (0, 4)
