"""A device as a node of Flower, which looks for messages at an interval of its own.

Runs in the environment of Flower, beside `relay.py`. The program `flower-supernode` of 1.42 sleeps 3 s between looks
and 0.5 s before each reply, constants in its loop; this loop calls the same client of the SuperLink's Fleet API. The
app of a run is not fetched: a node asks for messages alone.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import Any, BinaryIO

RETRIES = 3
"""Tries of a call after the first, with pauses of 1, 2 and 4 s, before the connection counts as lost."""
FIRST_PAUSE = 0.1
"""Seconds until a part of a message that the server is still sending is asked for again; twice as long each time."""


def serve(server: str, poll_seconds: float, answer: Callable[[Any, Any], Any], parent: BinaryIO) -> None:
    """Answers messages of the SuperLink until the parent closes its stream.

    Args:
        server: HOST:PORT of the SuperLink, on the loopback.
        poll_seconds: between looks for a message.
        answer: receives a message and the node's context in its run; returns the reply.
        parent: stream on which nothing comes between messages; readable when the other side has ended.

    Raises:
        RuntimeError: the connection was lost; a new one is a new node.
    """
    if not _reachable(server, poll_seconds, parent):
        return
    from flwr.supernode.fleet_http_connection import http_request_response

    with http_request_response(server, insecure=True, max_retries=RETRIES) as connection:
        node = Node(connection)
        while not _ended(parent, 0.0 if node.step(answer) else poll_seconds):
            pass
        return
    raise RuntimeError("the connection to the SuperLink was lost")  # the context above logs errors and ends


class Node:
    """Pulls messages of one node and pushes the replies.

    Args:
        connection: of Flower's `http_request_response`: the node's number and the calls of the Fleet API.
    """

    def __init__(self, connection: tuple[Any, ...]) -> None:
        self._number, self._receive, self._send, _, _, self._pull, self._push, self._confirm = connection
        self._contexts: dict[int, Any] = {}
        """Run -> context, in which SecAgg+ keeps keys and shares between messages."""

    def step(self, answer: Callable[[Any, Any], Any]) -> bool:
        """Answers the next message; returns False where there is none."""
        from flwr.supercore.run import RunNotRunningException

        with contextlib.suppress(RunNotRunningException):  # the run ended meanwhile
            found = self._receive()
            if found is None:
                return False
            message, start = self._whole(*found), time.monotonic()
            reply = answer(message, self._context(message.metadata.run_id))
            self._reply(reply, time.monotonic() - start)
        return True

    def _whole(self, message: Any, tree: Any) -> Any:
        """Returns a message with its content, which is sent in parts."""
        from flwr.app import Message
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        run = message.metadata.run_id
        pull, confirm = functools.partial(self._pull, run), functools.partial(self._confirm, run)
        whole = pull_and_inflate_object_from_tree(tree, pull, confirm, return_type=Message, initial_backoff=FIRST_PAUSE)
        return Message(metadata=message.metadata, content=whole.content)

    def _context(self, run: int) -> Any:
        from flwr.app import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        if run not in self._contexts:
            self._contexts = {run: Context(run, self._number, {}, RecordDict(), {})}
            TaskIdentity.task_id = secrets.randbits(63)  # without these three Flower makes no message
            TaskIdentity.run_id, TaskIdentity.node_id = run, self._number
        return self._contexts[run]

    def _reply(self, message: Any, seconds: float) -> None:
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        # the only place for a message's own number in flwr 1.42, which sets it in this way wherever it sends one
        message.metadata.__dict__["_message_id"] = message.object_id
        wanted, session = self._send(message, get_object_tree(message), seconds)
        push = functools.partial(self._push, message.metadata.run_id, session)
        push_objects(get_all_nested_objects(message), push, object_ids_to_push=wanted)


def _ended(parent: BinaryIO, seconds: float) -> bool:
    """Waits, and returns whether the other side closed its stream."""
    return bool(select.select([parent], [], [], seconds)[0])


def _reachable(server: str, poll_seconds: float, parent: BinaryIO) -> bool:
    """Waits until a server listens; returns False where the parent ended before."""
    host, _, port = server.rpartition(":")
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 1.0):
            return True
        if _ended(parent, poll_seconds):
            return False
