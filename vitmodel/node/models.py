"""The tables of the node's database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

UID_LENGTH = 64
"""Most characters of a DICOM UID (PS3.5, section 9.1)."""
Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only for INTEGER


class Base(DeclarativeBase):
    """Base class of all tables. Times are seconds since 1970."""


class SchemaVersion(Base):
    """The version of the tables; one row."""

    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True)


class Study(Base):
    """A study of which at least one object was received."""

    __tablename__ = "studies"
    __table_args__ = (Index("ix_studies_arrival", "last_arrival", "study_uid"),)
    study_uid: Mapped[str] = mapped_column(String(UID_LENGTH), primary_key=True)
    patient_id: Mapped[str] = mapped_column(String(64), default="", index=True)
    issuer: Mapped[str] = mapped_column(String(64), default="")
    study_date: Mapped[str] = mapped_column(String(8), default="")
    accession: Mapped[str] = mapped_column(String(64), default="")
    first_arrival: Mapped[float]
    """Arrival of the first object that no decision has considered."""
    last_arrival: Mapped[float]
    pending: Mapped[bool] = mapped_column(default=True, index=True)
    """Whether objects have arrived since the last decision."""
    state: Mapped[str] = mapped_column(String(16), default="gathering")
    """gathering, or the last decision: ready, forced, late, refused or ignored."""
    reason: Mapped[str] = mapped_column(Text, default="")
    version: Mapped[int] = mapped_column(default=0)
    """Number of jobs that the study has had."""


class Instance(Base):
    """A received object, stored as it was sent."""

    __tablename__ = "instances"
    sop_uid: Mapped[str] = mapped_column(String(UID_LENGTH), primary_key=True)
    study_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_uid"), index=True)
    series_uid: Mapped[str] = mapped_column(String(UID_LENGTH), default="")
    sop_class: Mapped[str] = mapped_column(String(UID_LENGTH), default="")
    syntax: Mapped[str] = mapped_column(String(UID_LENGTH), default="")
    path: Mapped[str] = mapped_column(Text)
    """Relative to the node's folder."""
    size: Mapped[int] = mapped_column(Number)
    sha256: Mapped[str] = mapped_column(String(64))
    patient_id: Mapped[str] = mapped_column(String(64), default="")
    laterality: Mapped[str] = mapped_column(String(1), default="")
    view: Mapped[str] = mapped_column(String(16), default="")
    ignored: Mapped[str] = mapped_column(Text, default="")
    """Why the object is not scored; empty = it is."""
    source: Mapped[str] = mapped_column(String(64), default="")
    """AE title of the sender, or the way by which it was found."""
    received_at: Mapped[float]
    repeats: Mapped[int] = mapped_column(default=0)
    """How often the object was sent again."""


class Transfer(Base):
    """An open association that has sent objects of a study."""

    __tablename__ = "transfers"
    association: Mapped[str] = mapped_column(String(36), primary_key=True)
    study_uid: Mapped[str] = mapped_column(String(UID_LENGTH), primary_key=True, index=True)
    seen_at: Mapped[float]


class Job(Base):
    """The images of a study that are scored together with one package."""

    __tablename__ = "jobs"
    id: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of the sorted SOP Instance UIDs and the fingerprint of the package."""
    study_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_uid"), index=True)
    version: Mapped[int] = mapped_column(default=1)
    previous: Mapped[int | None] = mapped_column(Number, nullable=True)
    """The job of the study's previous version."""
    origin: Mapped[str] = mapped_column(String(16), default="ready")
    """The decision that made the job: ready, forced or late."""
    images: Mapped[str] = mapped_column(Text)
    """Sorted SOP Instance UIDs, separated by blanks."""
    stage: Mapped[str] = mapped_column(String(16), default="score", index=True)
    """score, send, or the end: sent, incomplete (the PACS accepts some kinds of results only), kept (there is no
    destination), unscored (every image was refused) or dead."""
    failed_stage: Mapped[str] = mapped_column(String(16), default="")
    """The stage to which `retry` returns a dead job."""
    priority: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    """Attempts at this stage, also those that found the destination unreachable."""
    failures: Mapped[int] = mapped_column(default=0)
    """Attempts at this stage that count towards the limit."""
    not_before: Mapped[float] = mapped_column(default=0.0)
    lease_owner: Mapped[str] = mapped_column(String(64), default="")
    lease_until: Mapped[float] = mapped_column(default=0.0)
    error: Mapped[str] = mapped_column(Text, default="")
    error_code: Mapped[str] = mapped_column(String(32), default="")
    created_at: Mapped[float]
    updated_at: Mapped[float]
    claimed_at: Mapped[float] = mapped_column(default=0.0)
    score_seconds: Mapped[float | None] = mapped_column(nullable=True)
    """Duration of the attempt that finished the stage."""
    send_seconds: Mapped[float | None] = mapped_column(nullable=True)
    fingerprint: Mapped[str] = mapped_column(String(64), default="")
    software: Mapped[str] = mapped_column(String(32), default="")
    threshold: Mapped[float | None] = mapped_column(nullable=True)
    probability: Mapped[float | None] = mapped_column(nullable=True)
    """The largest of the breasts' probabilities."""
    suspicious: Mapped[bool | None] = mapped_column(nullable=True)
    scores: Mapped[str] = mapped_column(Text, default="")
    """JSON: the rows of images and breasts."""
    scored_at: Mapped[float | None] = mapped_column(nullable=True)
    status: Mapped[str] = mapped_column(String(16), default="")
    """ok, warned or refused, of the images and breasts together; empty = not scored."""
    machines: Mapped[str] = mapped_column(Text, default="")
    """Imaging devices, separated by ';'."""

    __table_args__ = (
        Index("ix_jobs_claim", "stage", "not_before", "priority"),
        Index("ix_jobs_study_version", "study_uid", "version"),
        Index("ix_jobs_machines", "machines"),
    )


class Result(Base):
    """A DICOM result of a job, and what became of it at the destination."""

    __tablename__ = "results"
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sop_uid: Mapped[str] = mapped_column(String(UID_LENGTH), primary_key=True, index=True)
    sop_class: Mapped[str] = mapped_column(String(UID_LENGTH))
    path: Mapped[str] = mapped_column(Text)
    """Relative to the node's folder."""
    state: Mapped[str] = mapped_column(String(16), default="pending")
    """pending, stored (accepted, not confirmed yet), confirmed, refused or unsupported."""
    status: Mapped[str] = mapped_column(String(16), default="")
    """The last status of C-STORE or STOW, such as 0x0000."""
    message: Mapped[str] = mapped_column(Text, default="")
    transaction: Mapped[str] = mapped_column(String(UID_LENGTH), default="", index=True)
    """Transaction UID of the storage commitment that was requested last."""
    requested_at: Mapped[float] = mapped_column(default=0.0)
    """When that commitment was requested."""
    updated_at: Mapped[float]


class StoredReading(Base):
    """What a reader wrote about a study."""

    __tablename__ = "readings"
    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64))
    """Chosen by the page, so that an answer that got lost does not store a reading twice."""
    study_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_uid"), index=True)
    reader: Mapped[str] = mapped_column(String(64), index=True)
    content: Mapped[str] = mapped_column(Text)
    """JSON: a `viewer.readings.Reading`."""

    __table_args__ = (UniqueConstraint("reader", "id"),)


class Worker(Base):
    """A process that scores or sends."""

    __tablename__ = "workers"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    ready: Mapped[bool] = mapped_column(default=False)
    """Whether its packages are loaded."""
    seen_at: Mapped[float]


class AuditEntry(Base):
    """Who did what; it holds no names, and UIDs only as hashes."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(index=True)
    who: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(64), default="")
    """SHA-256 of a UID."""
    outcome: Mapped[str] = mapped_column(String(64), default="")


class Cursor(Base):
    """How far a source of studies has been read."""

    __tablename__ = "cursors"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class FoundStudy(Base):
    """A study that polling has found in a PACS, and how far it was fetched."""

    __tablename__ = "found_studies"
    source: Mapped[str] = mapped_column(String(256), primary_key=True)
    study_uid: Mapped[str] = mapped_column(String(UID_LENGTH), primary_key=True)
    count: Mapped[str] = mapped_column(String(16), default="")
    """Number of its objects as the PACS stated it; empty = not stated."""
    digest: Mapped[str] = mapped_column(String(64), default="")
    """SHA-256 of the sorted SOP Instance UIDs of its mammograms; empty = not all of them were fetched."""
    looked_at: Mapped[float]
    """When its objects were listed last."""
    failures: Mapped[int] = mapped_column(default=0)
    """Number of looks in a row that left an object unfetched."""
    not_before: Mapped[float] = mapped_column(default=0.0)


def as_dict(row: Base) -> dict[str, Any]:
    """Return the columns of a row by name."""
    return {column.key: getattr(row, column.key) for column in row.__mapper__.columns}
