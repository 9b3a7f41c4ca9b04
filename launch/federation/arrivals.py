"""Replies of nodes as they arrive whole, without waiting for one that is cut off.

Runs in the environment of Flower, beside `relay.py`. `HttpGrid.pull_messages` of 1.42 waits up to two hours for the
rest of a reply whose sender was killed while it sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Arrivals:
    """Sends messages and looks for replies of which all parts have arrived.

    Args:
        grid: Flower's `HttpGrid`, with a run.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._begun: dict[str, tuple[Any, Any]] = {}
        """Number of the request -> reply without content and the tree of its parts."""

    def push_messages(self, messages: Iterable[Any]) -> Sequence[str]:
        """Sends messages; returns their numbers, None for one that cannot be sent."""
        found: Sequence[str] = self._grid.push_messages(messages)
        return found

    def pull_messages(self, numbers: Sequence[str]) -> list[Any]:
        """Returns the whole replies to messages with these numbers that were not returned before."""
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        client = self._grid._runtime_client  # flwr 1.42 has no other way to it
        if new := [number for number in numbers if number not in self._begun]:
            found = client.PullMessages(PullAppMessagesRequest(message_ids=new))
            for reply, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._begun[reply.metadata.reply_to_message_id] = reply, tree
        whole = [self._whole(client, number) for number in numbers if number in self._begun]
        return [reply for reply in whole if reply is not None]

    def _whole(self, client: Any, number: str) -> Any | None:
        """Returns a reply; None while parts of it are missing."""
        from flwr.app import Message
        from flwr.supercore.inflatable import inflatable_protobuf_utils as calls
        from flwr.supercore.inflatable import inflatable_utils as objects

        reply, tree = self._begun[number]
        given = self._grid.node, self._grid.run.run_id
        try:
            message: Any = objects.pull_and_inflate_object_from_tree(
                tree,
                calls.make_pull_object_fn_protobuf(client.PullObject, *given),
                calls.make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, *given),
                return_type=Message,
                max_tries_per_object=1,
            )
        except objects.ObjectPullError:
            return None
        del self._begun[number]
        message.metadata.__dict__["_message_id"] = reply.metadata.message_id  # as in `node.py`
        return message
