"""Flower's SecAgg+ (arXiv 1611.04482, 2009.11248) as the relay uses it: the server learns the mean alone.

Runs in the environment of Flower, beside `relay.py`. Devices mask their vectors for each other; nothing here is
cryptography of this package.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

MODULUS_BITS = 32
"""Masked values are added modulo 2³², which Flower's generator of masks gives."""
POLL_SECONDS = 0.2
RANGE = 1.0
"""Values are clipped to ±RANGE; devices scale their vectors by the clip norm before."""


def steps_of(devices: int) -> int:
    """Returns the number of steps between -RANGE and RANGE with which the sum of all devices stays below 2³²."""
    return 1 << (MODULUS_BITS - 1 - max(1, (devices - 1).bit_length()))


def mean_of(
    grid: Any, context: Any, nodes: Sequence[str], head: dict[str, Any], body: bytes, seconds: float, least: int
) -> tuple[list[str], bytes]:
    """Asks nodes for vectors through the four stages of SecAgg+.

    Args:
        grid: of Flower.
        context: of the ServerApp's run.
        nodes: at least two.
        head: of the request.
        body: of the request.
        seconds: in which each stage must be answered.
        least: number of devices without which no mask is removed.

    Returns:
        The nodes whose vectors are in the mean, and the mean as float64 in bytes; no nodes where too few answered.
    """
    from flwr.app import ConfigRecord, RecordDict
    from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server import LegacyContext
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

    found: dict[str, Any] = {}
    empty = ndarrays_to_parameters([])
    instructions = FitIns(empty, {"head": json.dumps(head), "body": body})

    def aggregate(number: int, results: list[Any], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        found["nodes"] = [str(proxy.node_id) for proxy, _ in results]
        found["mean"] = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}

    strategy = SimpleNamespace(
        configure_fit=lambda number, parameters, manager: [
            (SimpleNamespace(node_id=int(node)), instructions) for node in nodes
        ],
        aggregate_fit=aggregate,
    )
    manager = SimpleNamespace(num_available=lambda: len(nodes))
    legacy = LegacyContext(context, strategy=strategy, client_manager=manager)
    legacy.state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1}),
            MAIN_PARAMS_RECORD: compat.parameters_to_arrayrecord(empty, keep_input=True),
        }
    )
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=threshold(least, len(nodes)) / len(nodes),
        max_weight=1.0,
        clipping_range=RANGE,
        quantization_range=steps_of(len(nodes)),
        modulus_range=1 << MODULUS_BITS,
        timeout=seconds,
    )
    workflow(Polling(grid), legacy)
    return found.get("nodes", []), found["mean"].astype("<f8").tobytes() if found else b""


class Polling:
    """A grid that looks for replies more often than Flower's, which sleeps 3 s between looks."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def send_and_receive(self, messages: list[Any], timeout: float) -> list[Any]:
        """Returns the replies that arrive within `timeout` seconds."""
        waiting, found = {number for number in self._grid.push_messages(messages) if number}, []
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                found.append(reply)
            time.sleep(POLL_SECONDS)
        return found


def threshold(least: int, devices: int) -> int:
    """Returns how many devices must reveal shares: more than half, or the server could unmask one by asking twice."""
    return min(devices, max(least, devices // 2 + 1, 2))


def is_stage(message: Any) -> bool:
    """Returns whether a message is one of SecAgg+."""
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

    return RECORD_KEY_CONFIGS in message.content.config_records


def answer_stage(message: Any, context: Any, compute: Callable[[dict[str, Any], bytes], bytes]) -> Any:
    """Answers a message of SecAgg+; keys and shares are kept in `context`.

    Args:
        message: of one of the four stages.
        context: of the node in this run.
        compute: called in the third stage with head and body of the request; returns this device's vector as float32
            in bytes, which is masked before it leaves.
    """
    import numpy as np
    from flwr.app import Message
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common import recorddict_compat as compat

    def fit(request: Any, _context: Any) -> Any:
        given = compat.recorddict_to_fitins(request.content, keep_input=True).config
        vector = np.frombuffer(compute(json.loads(given["head"]), given["body"]), dtype="<f4").astype(np.float64)
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector]), 1, {})
        return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=request)

    return secaggplus_mod(message, context, fit)
