"""Qdrant's messages come without the rest of its client, and do no harm to who wants all of it."""

from __future__ import annotations

import subprocess
import sys

ALONE = """
import sys
from catalens.engines.qdrant_messages import pb
assert pb.PointStruct().SerializeToString() == b""
assert not any(name.startswith(("qdrant_client.http", "qdrant_client.local")) for name in sys.modules), "all of it"
import qdrant_client
from qdrant_client import AsyncQdrantClient, grpc
assert grpc is pb, "registered twice"
assert "qdrant_client.http" in sys.modules
"""
AFTER = """
import qdrant_client
from catalens.engines.qdrant_messages import pb
assert qdrant_client.grpc is pb
"""


def test_the_messages_come_alone_and_all_of_it_can_be_had_later() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_who_has_all_of_it_keeps_it() -> None:
    subprocess.run([sys.executable, "-c", AFTER], check=True)
