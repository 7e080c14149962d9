"""Options of the verb `node`: receive studies over DICOM, score them, and send the results back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from vitmodel.config.access import AccessConfig
from vitmodel.config.base import Config, Needs, require
from vitmodel.config.choices import DicomKind, ExplanationName
from vitmodel.config.scoring import PredictorConfig, check_dicom_kinds

Role = Literal["receive", "find", "gather", "score", "send", "web"]


@dataclass(frozen=True, kw_only=True)
class NodeActionConfig(Config):
    """What `vitmodel node` does; the first argument."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("action",)}

    action: Literal["run", "status", "retry", "drain", "demo"]
    """run = start the node; status = print its queue; retry = try dead jobs again; drain = score what has arrived
    without waiting, and return when the queue is empty; demo = run a node and an Orthanc with synthetic studies."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig(PredictorConfig, NodeActionConfig, AccessConfig):
    """Run a DICOM node: receive studies, score each once it is complete, and send the results back to the PACS.

    All settings can be in one YAML recipe: `vitmodel node run --config node.yaml`. Nothing but a folder is needed; a
    PostgreSQL server lets several machines share the work.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("folder", "database", "roles", "job"),
        "receiving": (
            *("ae_title", "dicom_host", "dicom_port", "calling", "check_called", "min_free_gb"),
            *("tls_certificate", "tls_key", "tls_ca"),
        ),
        "finding": ("find", "find_days", "find_seconds", "orthanc"),
        "gathering": ("quiet_seconds", "max_seconds", "max_images"),
        "queue": ("processes", "attempts", "lease_seconds", "first_wait", "longest_wait", "retention_days"),
        "sending": ("destination", "pacs_web", "confirm", "identity", "commitment_seconds"),
        "report": ("explain", "dicom"),
        "server": ("host", "port", "upload_limit", "connections"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "job": Needs("the action retry", lambda config: config.action == "retry"),
        "tls_key": Needs("--tls-certificate", lambda config: config.tls_certificate is not None),
        "find_days": Needs("--find", lambda config: bool(config.find)),
        "find_seconds": Needs("--find", lambda config: bool(config.find)),
        "pacs_web": Needs("--destination", lambda config: bool(config.destination)),
        "confirm": Needs("--destination", lambda config: bool(config.destination)),
        "identity": Needs("--destination", lambda config: bool(config.destination)),
        "commitment_seconds": Needs("--destination", lambda config: bool(config.destination)),
    }
    DEFAULTS: ClassVar[Mapping[str, str]] = {"database": "FOLDER/node.sqlite"}

    package: Path = Path("package")
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
    folder: Path = Path("node")
    """Folder of the received objects, the results and the SQLite database; of the action demo, all its files."""
    database: str = ""
    """Database of the queue, as a URL: sqlite:///PATH, or postgresql://USER:PASSWORD@HOST/NAME for several machines,
    which then also share FOLDER."""
    roles: tuple[Role, ...] = ("receive", "find", "gather", "score", "send", "web")
    """Parts of the node that this process runs; those without settings, such as find without FIND, do nothing.
    Machines that share a database can run different ones."""
    job: int | None = None
    """Number of the job to retry, as `status` prints it. none = all dead ones."""
    ae_title: str = "VITMODEL"
    """AE title of this node, at most 16 characters."""
    dicom_host: str = "127.0.0.1"
    """Address at which DICOM objects are received. 0.0.0.0 = all networks of this machine."""
    dicom_port: int = 11112
    """Port at which DICOM objects are received. 0 = any free port."""
    calling: tuple[str, ...] = ()
    """AE titles that may send. none = all."""
    check_called: bool = True
    """Reject peers that call this node by another AE title."""
    min_free_gb: float = 5.0
    """Refuse objects (status 0xA700) while less disk space than this is free, in gigabytes."""
    tls_certificate: Path | None = None
    """PEM file of the certificate; with it, only TLS connections are accepted. none = no TLS."""
    tls_key: Path | None = None
    """PEM file of the certificate's key. none = it is in the certificate's file."""
    tls_ca: Path | None = None
    """PEM file of the authorities whose certificates the senders, and a PACS dicoms://, must have. none = senders need
    no certificate."""
    find: tuple[str, ...] = ()
    """PACSs that are asked for new mammograms, for those that do not send them: dicom://AETITLE@HOST:PORT or dicoms://
    (C-FIND and C-MOVE to this node), or the DICOMweb root http(s)://USER:PASSWORD@HOST/PATH (QIDO-RS and WADO-RS). One
    process may have this role. none = objects are only received."""
    find_days: int = 7
    """Age in days of the oldest studies that are looked for, by StudyDate."""
    find_seconds: float = 30.0
    """Seconds between two looks. Below QUIET_SECONDS, a study that the PACS is still receiving is scored once."""
    orthanc: str = ""
    """Address of an Orthanc whose new objects are fetched, for one that is not set up to send them, such as
    http://USER:PASSWORD@HOST:8042; its list of changes is read, which costs it less than FIND. One process may have
    this role. none = objects are only received."""
    quiet_seconds: float = 60.0
    """A study is complete when nothing has arrived for this time. One with the four standard views is complete as soon
    as the sender hangs up."""
    max_seconds: float = 1800.0
    """A study of which objects keep arriving is scored after this time."""
    max_images: int = 500
    """Most images of a study; a larger one is refused."""
    processes: int = 1
    """Number of worker processes that score. Each holds its own copy of the model."""
    attempts: int = 5
    """Failed attempts after which a job is a dead letter, which waits for `vitmodel node retry`. A destination that is
    down does not count."""
    lease_seconds: float = 120.0
    """A job whose process gives no sign of life for this time is given to another one."""
    first_wait: float = 5.0
    """Seconds until the second attempt; each further wait is twice as long."""
    longest_wait: float = 600.0
    """Longest wait between attempts in seconds."""
    retention_days: float = 0.0
    """Delete the received objects of studies that were finished this many days ago. 0 = never delete."""
    destination: str = ""
    """Where results are sent: dicom://AETITLE@HOST:PORT, dicoms://AETITLE@HOST:PORT (TLS), or the DICOMweb root
    http(s)://HOST/PATH. none = they stay in FOLDER/jobs."""
    pacs_web: str = ""
    """DICOMweb root of the PACS for queries (QIDO-RS). none = that of a DESTINATION by DICOMweb."""
    confirm: Literal["auto", "commitment", "qido"] = "auto"
    """Proof that the PACS has a result, before it counts as sent: storage commitment or a query. auto = commitment for
    dicom://, qido for http(s)://."""
    identity: Literal["pacs", "image"] = "pacs"
    """Source of the patient's identity in the results: pacs = asked when they are sent, so that corrections reach them;
    image = the images as they were received."""
    commitment_seconds: float = 60.0
    """A storage commitment without an answer is requested again after this time."""
    explain: ExplanationName | None = "gradient"
    """Heat maps in the results; see `vitmodel predict --explain`. none = no heat maps."""
    dicom: tuple[DicomKind, ...] = ("sr", "sc")
    """Kinds of results; see `vitmodel predict --dicom`."""
    host: str = "127.0.0.1"
    """Address of the web pages. 127.0.0.1 = this machine only, 0.0.0.0 = all networks of this machine."""
    port: int = 8042
    """Port of the web pages. 0 = any free port."""
    upload_limit: int = 2000
    """Largest request to STOW-RS in megabytes."""
    connections: int = 200
    """Largest number of open connections to the pages."""

    def _check(self) -> None:
        super()._check()
        require(0 < len(self.ae_title.strip()) <= 16, "ae_title", "must have 1 to 16 characters")
        for name in ("dicom_port", "port"):
            require(0 <= getattr(self, name) <= 65535, name, "must lie between 0 and 65535")
        for name in ("quiet_seconds", "min_free_gb", "retention_days"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("processes", "attempts", "max_images", "upload_limit", "connections"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("lease_seconds", "first_wait", "commitment_seconds"):
            require(getattr(self, name) > 0, name, "must be above 0")
        require(self.longest_wait >= self.first_wait, "longest_wait", "must be at least FIRST_WAIT")
        require(self.max_seconds >= self.quiet_seconds, "max_seconds", "must be at least QUIET_SECONDS")
        require(bool(self.roles), "roles", "is empty; name at least one of receive, find, gather, score, send, web")
        web = not self.orthanc or self.orthanc.startswith(("http://", "https://"))
        require(web, "orthanc", "is no address; write http(s)://HOST:PORT")
        require(0 <= self.find_days <= 3650, "find_days", "must lie between 0 and 3650")
        require(1 <= self.find_seconds <= 86400, "find_seconds", "must lie between 1 and 86400")
        for address in self.find:
            check_pacs("find", address)
        require(len(set(self.find)) == len(self.find), "find", "names a PACS twice")
        check_dicom_kinds(self.dicom, self.explain)
        if self.destination:
            require(bool(self.dicom), "dicom", "is empty, so there is nothing to send; name at least sr")
            self._check_destination()

    def _check_destination(self) -> None:
        check_pacs("destination", self.destination)
        can_query = self.confirmation != "qido" or bool(self.web_root)
        require(can_query, "confirm", "qido needs --pacs-web, the DICOMweb root of the PACS")
        commits = self.confirmation != "commitment" or self.destination.startswith("dicom")
        require(commits, "confirm", "commitment needs a destination dicom://; use qido")

    @property
    def confirmation(self) -> str:
        """Return what proves that the PACS has a result: commitment or qido."""
        if self.confirm != "auto":
            return self.confirm
        return "qido" if self.destination.startswith("http") else "commitment"

    @property
    def web_root(self) -> str:
        """Return the DICOMweb root of the PACS; '' = there is none."""
        return (self.pacs_web or (self.destination if self.destination.startswith("http") else "")).rstrip("/")


def check_pacs(option: str, address: str) -> None:
    """Raise UsageError unless `address` is that of a PACS: dicom(s)://AETITLE@HOST:PORT or a DICOMweb root."""
    remedy = "write dicom://AETITLE@HOST:PORT or the DICOMweb root http(s)://HOST/PATH"
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        require(False, option, f"its port is no number; {remedy}")
        return
    require(url.scheme in ("dicom", "dicoms", "http", "https"), option, f"has no known scheme; {remedy}")
    require(bool(url.hostname), option, f"lacks the host; {remedy}")
    if url.scheme.startswith("dicom"):
        require(bool(url.username and port), option, f"lacks the AE title or port; {remedy}")
        require(len(url.username or "") <= 16, option, "its AE title has more than 16 characters")
