"""Make the database, the queue and the rules of a node from its configuration."""

from __future__ import annotations

import os
import socket
import uuid

from vitmodel.config import NodeConfig
from vitmodel.node.database import Database
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.jobs import Queue, QueueRules


def open_database(config: NodeConfig) -> Database:
    """Return the node's database."""
    return Database(config.database) if config.database else Database.in_folder(config.folder)


def make_queue(config: NodeConfig, database: Database) -> Queue:
    """Return the queue with the rules of the configuration."""
    rules = QueueRules(
        lease_seconds=config.lease_seconds,
        max_failures=config.attempts,
        first_wait=config.first_wait,
        longest_wait=config.longest_wait,
    )
    return Queue(database, rules)


def gathering_rules(config: NodeConfig) -> GatheringRules:
    """Return the rules of the configuration."""
    return GatheringRules(
        quiet_seconds=config.quiet_seconds, max_seconds=config.max_seconds, max_images=config.max_images
    )


def worker_name(role: str) -> str:
    """Return a name for a worker that no other one has, on any machine."""
    return f"{role}-{socket.gethostname()[:24]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
