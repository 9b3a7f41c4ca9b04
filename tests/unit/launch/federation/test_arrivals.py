"""Replies of nodes: one that is cut off is not waited for, and arrives when its last part does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from launch.federation import arrivals
from launch.federation.flower import find_flower

SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.app.message import remove_content_from_message
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from arrivals import Arrivals

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2
request = Message(RecordDict({}), dst_node_id=2, message_type="train")
request.metadata.__dict__["_message_id"] = "question"
reply = Message(RecordDict({"answer": ConfigRecord({"body": b"x" * 1000})}), reply_to=request)
reply.metadata.__dict__["_message_id"] = reply.object_id
parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
there = set(list(parts)[1:])  # the first part is missing

class Client:
    looks, confirmed = 0, []
    def PullMessages(self, wanted):
        self.looks += 1
        return SimpleNamespace(
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
        )
    def PullObject(self, wanted):
        found = wanted.object_id in there
        return PullObjectResponse(
            object_found=True, object_available=found, object_content=parts[wanted.object_id] if found else b""
        )
    def ConfirmMessageReceived(self, wanted):
        self.confirmed.append(wanted.message_object_id)
        return ConfirmMessageReceivedResponse()

client = Client()
made = Arrivals(SimpleNamespace(_runtime_client=client, node=Node(node_id=1), run=SimpleNamespace(run_id=1)))
start = time.monotonic()
assert made.pull_messages(["question"]) == [] and made.pull_messages(["question"]) == []
assert time.monotonic() - start < 1.0 and client.looks == 1 and not client.confirmed
there |= set(parts)
(found,) = made.pull_messages(["question"])
assert found.content.config_records["answer"]["body"] == b"x" * 1000
assert found.metadata.reply_to_message_id == "question"
assert client.confirmed == [reply.object_id]
print("WHOLE")
"""


@pytest.mark.slow
def test_a_reply_that_is_cut_off_is_not_waited_for() -> None:
    try:
        python = find_flower()
    except ConfigError as error:
        pytest.skip(str(error))
    command = [python, "-c", SCRIPT, str(Path(arrivals.__file__).parent)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.stdout.endswith("WHOLE\n"), done.stderr[-3000:]
