"""Run the parts of a node in this process and its workers, until a signal stops them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import SpawnProcess

from sqlalchemy import delete

from vitmodel.config import NodeConfig
from vitmodel.errors import VitmodelError
from vitmodel.jobs.workers import die_with_parent
from vitmodel.node.audit import Audit
from vitmodel.node.finding import OrthancFinder
from vitmodel.node.fingerprint import package_fingerprint
from vitmodel.node.inbox import STALE_TRANSFER_SECONDS, Inbox
from vitmodel.node.models import Transfer, Worker
from vitmodel.node.polling import Poller, PollingRules
from vitmodel.node.receiving import Listener, Receiver
from vitmodel.node.retention import delete_old_objects
from vitmodel.node.sending import Sender, record_report
from vitmodel.node.setup import gathering_rules, make_queue, open_database, worker_name
from vitmodel.node.sources import make_source
from vitmodel.utils import import_extra
from vitmodel.viewer.room import Model
from vitmodel.web.security import AccessPolicy, check_exposure

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.5
"""Pause between two looks at the studies that are not complete."""
CLEAN_SECONDS = 3600
HEADER_SECONDS, BODY_SECONDS = 10, 60
"""Time for the head of a request, and without progress of a body or an answer."""
STOP_SECONDS = 30
"""How long a worker may take for its current job when the node stops."""


def _fingerprint(config: NodeConfig) -> str:
    """Return the fingerprint of the packages; empty if this machine has none, because it only receives and shows."""
    try:
        return package_fingerprint(config)
    except VitmodelError:
        return ""


def keep_values_out_of_logs() -> None:
    """Silence pydicom's warnings, which quote values of headers."""
    warnings.filterwarnings("ignore", module=r"(pydicom|pynetdicom|highdicom)\.")
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


class Node:
    """The parts of a node that run in this process.

    Args:
        config: The node's configuration.

    Raises:
        VitmodelError: The database or the package cannot be opened.
    """

    def __init__(self, config: NodeConfig) -> None:
        keep_values_out_of_logs()
        if "web" in config.roles:
            check_exposure(config.host, config.api_key_file or config.trusted_proxy, config.insecure)
        self.config = config
        self.database = open_database(config)
        self.queue = make_queue(config, self.database)
        self.inbox = Inbox(self.database, config.folder, int(config.min_free_gb * 1e9))
        self.audit = Audit(self.database)
        self.stop = threading.Event()
        self.dicom_port = 0
        self.web_port = 0
        self._on_stop: list[Callable[[], object]] = []
        self._receiver: Receiver | None = None
        self._threads: list[threading.Thread] = []
        self._scorers: list[SpawnProcess] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the configured parts during the block."""
        roles = set(self.config.roles)
        try:
            if "gather" in roles:
                fingerprint = package_fingerprint(self.config)
                self._repeat(lambda: self.queue.gather(gathering_rules(self.config), fingerprint), GATHER_SECONDS)
                self._repeat(self.clean, CLEAN_SECONDS)
            if "receive" in roles:
                self.inbox.adopt()
                self._receiver = self.make_receiver()
                self.dicom_port = self._receiver.start()
            if "web" in roles:
                self._serve_pages()
            if "send" in roles and self.config.destination:
                self._start(self._send)
            if "find" in roles and self.config.orthanc:
                finder = OrthancFinder(self.config.orthanc, self.inbox, self.audit)
                self._start(lambda: finder.work(self.stop))
            if "find" in roles:
                for address in self.config.find:
                    poller = self._make_poller(address)
                    self._start(partial(poller.work, self.stop))
            if "score" in roles:
                self._start(self._supervise)
            yield
        finally:
            self.stop.set()
            for action in self._on_stop:
                action()
            if self._receiver is not None:
                self._receiver.stop()
            for thread in self._threads:
                thread.join(STOP_SECONDS + 5)
            self.database.close()

    def make_receiver(self) -> Receiver:
        """Return the DICOM server."""
        config = self.config
        listener = Listener(
            ae_title=config.ae_title,
            host=config.dicom_host,
            port=config.dicom_port,
            calling=config.calling,
            check_called=config.check_called,
            tls_certificate=config.tls_certificate,
            tls_key=config.tls_key,
            tls_ca=config.tls_ca,
        )
        return Receiver(
            self.inbox, listener, self.audit, lambda report: record_report(self.database, report, time.time())
        )

    def _make_poller(self, address: str) -> Poller:
        rules = PollingRules(days=self.config.find_days, seconds=self.config.find_seconds)
        return Poller(make_source(self.config, address, self.inbox, self.audit), self.inbox, rules)

    def _serve_pages(self) -> None:
        """Serve the pages in a thread.

        Raises:
            UsageError: The key file is not valid, or the port is in use.
        """
        import_extra("uvicorn", "node", "node")
        import_extra("fastapi", "node", "node")
        from vitmodel.node.pages import Site, create_app, needed_scope
        from vitmodel.web.connections import ConnectionLimits, raise_file_limit
        from vitmodel.web.server import make_server, open_socket

        config = self.config
        site = Site(
            inbox=self.inbox,
            queue=self.queue,
            audit=self.audit,
            web_root=config.web_root,
            max_body=config.upload_limit * 1_000_000,
            policy=AccessPolicy.of(config, needed_scope),
            load_model=self._load_model,
            fingerprint=_fingerprint(config),
        )
        limits = ConnectionLimits(raise_file_limit(config.connections), HEADER_SECONDS, BODY_SECONDS)
        listening = open_socket(config.host, config.port)
        self.web_port = listening.getsockname()[1]
        server = make_server(create_app(site), limits, STOP_SECONDS, lambda: None)
        self._start(lambda: server.run(sockets=[listening]))
        self._on_stop.append(lambda: setattr(server, "should_exit", True))

    def _load_model(self) -> Model:
        from vitmodel.node.scoring import load_model  # PyTorch is loaded when the first page is asked for

        return load_model(self.config)

    def clean(self) -> None:
        """Forget workers and associations that died, and delete received objects whose retention is over."""
        now = time.time()
        with self.database.write() as session:
            session.execute(delete(Transfer).where(Transfer.seen_at < now - STALE_TRANSFER_SECONDS))
            session.execute(delete(Worker).where(Worker.seen_at < now - 10 * self.config.lease_seconds))
        if self.config.retention_days:
            delete_old_objects(self.database, self.inbox, now - 86400 * self.config.retention_days)

    def _send(self) -> None:
        name = worker_name("send")
        try:
            Sender(self.config, self.queue, name).work(self.stop)
        finally:
            self.queue.sign_off(name)

    def _supervise(self) -> None:
        """Keep the processes that score; one that ends is replaced after a moment."""
        context = multiprocessing.get_context("spawn")
        while not self.stop.is_set():
            self._scorers = [process for process in self._scorers if process.is_alive()]
            while len(self._scorers) < self.config.processes:
                process = context.Process(target=score_forever, args=(self.config, worker_name("score")), daemon=True)
                process.start()
                self._scorers.append(process)
            self.stop.wait(1)
        for process in self._scorers:
            process.terminate()
        for process in self._scorers:
            process.join(STOP_SECONDS)
            process.kill()

    def _repeat(self, action: Callable[[], object], pause: float) -> None:
        """Run an action again and again in a thread; an error, such as a lost connection, ends one turn only."""

        def turns() -> None:
            while not self.stop.is_set():
                try:
                    action()
                except Exception as error:  # noqa: BLE001 (the node must go on)
                    logger.error("a turn of the node failed: %s", type(error).__name__)
                self.stop.wait(pause)

        self._start(turns)

    def _start(self, action: Callable[[], object]) -> None:
        thread = threading.Thread(target=self._contained(action), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _contained(self, action: Callable[[], object]) -> Callable[[], None]:
        """Return an action that is started again if it fails."""

        def run() -> None:
            while True:
                try:
                    action()
                    return
                except Exception as error:  # noqa: BLE001 (such as a database that is away)
                    logger.error("a part of the node failed and is started again: %s", type(error).__name__)
                    if self.stop.wait(5):
                        return

        return run


def score_forever(config: NodeConfig, name: str) -> None:
    """Score jobs until this process gets SIGTERM or its parent ends; the target of a worker process."""
    from vitmodel.node.scoring import Scorer, share_cores  # only workers load PyTorch

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=die_with_parent, daemon=True).start()
    keep_values_out_of_logs()
    share_cores(config.processes)
    database = open_database(config)
    queue = make_queue(config, database)
    queue.sign_on(name, "score", False)
    try:
        Scorer(config, queue, name).work(stop)
    finally:
        queue.sign_off(name)
        database.close()


def drain(node: Node) -> bool:
    """Score and send what has arrived, without waiting for more; return whether the queue is empty.

    Jobs that must wait, for example for a PACS that is down, are left.
    """
    from vitmodel.node.scoring import Scorer

    config, queue = node.config, node.queue
    queue.gather(gathering_rules(config), package_fingerprint(config), force=True)
    scorer = Scorer(config, queue, worker_name("score"))
    while scorer.score_next():
        pass
    queue.sign_off(scorer.owner)
    if config.destination:
        with contextlib.ExitStack() as stack:
            if "receive" in config.roles:
                with contextlib.suppress(Exception):  # a running node has the port, and takes the commitments
                    receiver = node.make_receiver()
                    receiver.start()
                    stack.callback(receiver.stop)
            sender = Sender(config, queue, worker_name("send"))
            while sender.send_next():
                pass
            queue.sign_off(sender.owner)
    counts = queue.counts()
    return not (counts["score"] or counts["send"])
