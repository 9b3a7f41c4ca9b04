"""Flower's SecAgg+ as the relay uses it: the mean of those who remain, also where devices vanish on the way."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from launch.federation import secure_sum
from launch.federation.flower import find_flower
from launch.federation.secure_sum import steps_of, threshold

try:
    FLOWER = find_flower()
    MISSING = ""
except ConfigError as error:
    FLOWER, MISSING = "", str(error)

PROTOCOL = """
import copy, json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
import secure_sum

SERVER, GONE = 99, {2, 5, 7}
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER
draw = np.random.default_rng(0)
vectors = {node: (draw.standard_normal(10_000) * 1e-4).astype("<f4") for node in range(1, 9)}
contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in vectors}
sent = []

class Grid:
    stage = 0
    def push_messages(self, messages):
        self.stage += 1
        self.replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            if self.stage >= 3 and node in GONE:
                continue
            TaskIdentity.node_id = node
            reply = secure_sum.answer_stage(
                copy.deepcopy(message), contexts[node], lambda head, body: vectors[node].tobytes()
            )
            sent.append(repr(reply.content).encode() + b"".join(
                b"".join(value) for record in reply.content.config_records.values() for value in record.values()
                if isinstance(value, list) and value and isinstance(value[0], bytes)
            ))
            self.replies.append(reply)
        TaskIdentity.node_id = SERVER
        return [str(number) for number in range(len(self.replies))]
    def pull_messages(self, numbers):
        waiting = list(numbers)
        for reply, number in zip(self.replies, sorted(waiting, key=int)):
            reply.metadata.__dict__["_reply_to_message_id"] = number
        return self.replies

least = int(sys.argv[2])
given = Grid(), Context(1, SERVER, {}, RecordDict(), {}), [str(node) for node in vectors], {}, b"x", 5.0, least
nodes, mean = secure_sum.mean_of(*given)
result = {"nodes": sorted(nodes)}
if nodes:
    expected = np.mean([vectors[int(node)] for node in nodes], axis=0, dtype=float)
    result["furthest"] = float(np.abs(np.frombuffer(mean, "<f8") - expected).max())
    plain = [vector.astype(kind).tobytes()[:64] for vector in vectors.values() for kind in ("<f4", "<f8")]
    result["plain"] = any(piece in message for piece in plain for message in sent)
print("RESULT" + json.dumps(result))
"""


def test_sums_of_all_devices_stay_below_the_modulus() -> None:
    for devices in (2, 3, 8, 9, 100, 1024):
        assert devices * steps_of(devices) <= 2**31
        assert devices * steps_of(devices) > 2**29


def test_more_than_half_must_reveal_shares() -> None:
    assert [threshold(3, devices) for devices in (3, 4, 8, 9)] == [3, 3, 5, 5]
    assert threshold(7, 8) == 7
    assert threshold(9, 8) == 8


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(("least", "left"), [(4, 5), (6, 0)])
def test_three_of_eight_vanish_between_keys_and_masks(least: int, left: int) -> None:
    folder = str(Path(secure_sum.__file__).parent)
    command = [FLOWER, "-c", PROTOCOL, folder, str(least)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("RESULT")[2])
    assert len(found["nodes"]) == left
    if left:
        assert found["nodes"] == ["1", "3", "4", "6", "8"]
        assert found["furthest"] < 2e-8
        assert not found["plain"]
