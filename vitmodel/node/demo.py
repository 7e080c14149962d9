"""A demonstration: a node, an Orthanc as its PACS, and synthetic studies."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from pydicom import dcmread
from pynetdicom import AE
from sqlalchemy import select

from vitmodel.config import NodeConfig
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs.steps import run_step
from vitmodel.node.jobs import END_STAGES, POLL_SECONDS
from vitmodel.node.models import Job
from vitmodel.node.runner import Node
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

STUDIES = 3
"""Number of studies that are sent."""
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_SECONDS = 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RELEASE = ("synth {out} --patients 20 --size 256x208 --difficulty 0 --positives 0.5",)
MODEL = (
    "etl {folder}/release {out}/crops --size 64x32",
    "train {out}/crops/manifest.csv {out}/run --model vit_micro --epochs 3 --tokens 96 --val 0.25 --test 0.25 "
    "--wandb off",
)
"""Arguments of `vitmodel`: a model that shows how things work, not one that is any good."""


@dataclass(frozen=True)
class DemoOrthanc:
    """The Orthanc of the demonstration."""

    dicom_port: int
    http_port: int

    @property
    def url(self) -> str:
        return f"http://localhost:{self.http_port}"


def run_demo(config: NodeConfig) -> int:
    """Run the demonstration until it is interrupted; everything is written to `config.folder`.

    Raises:
        UsageError: Orthanc is not installed.
        VitmodelError: A step or Orthanc fails.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    with contextlib.suppress(KeyboardInterrupt), running_demo(config) as (node, orthanc):
        print(
            f"\nworklist: http://localhost:{node.web_port}/worklist\n"
            f"PACS:     {orthanc.url}/app/explorer.html (the results are in the studies)\n"
            f"press Ctrl-C to stop\n{NOT_A_MEDICAL_DEVICE}\n",
            flush=True,
        )
        try:
            watch(node)
        finally:
            print("stopping the node and the Orthanc; all files stay in", config.folder, flush=True)
    return 0


def _interrupt(*_: object) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave an Orthanc behind
    raise KeyboardInterrupt


def watch(node: Node) -> None:
    """Print each job that ends, until the node stops."""
    start = time.monotonic()
    shown: set[int] = set()
    while not node.stop.wait(POLL_SECONDS):
        with node.database.read() as session:
            ended = session.scalars(select(Job).where(Job.stage.in_(END_STAGES), Job.id.not_in(shown))).all()
        for job in ended:
            shown.add(job.id)
            state = "its results are in the PACS" if job.stage == "sent" else f"{job.stage} {job.error}".strip()
            print(f"study {len(shown)} of {STUDIES}, after {time.monotonic() - start:.0f} s: {state}", flush=True)


@contextlib.contextmanager
def running_demo(config: NodeConfig) -> Iterator[tuple[Node, DemoOrthanc]]:
    """Run a node and an Orthanc, and send the studies to both."""
    program = find_orthanc()
    folder = config.folder
    package = config.package
    if not (folder / "model").exists():
        print(
            "making synthetic mammograms and, on them, a model of no value; about a minute, the first time", flush=True
        )
    make_once(folder / "release", RELEASE)
    if not (package / "config.json").is_file():
        make_once(folder / "model", MODEL)
        package = folder / "model" / "run" / "package"
    port = usable_port(config.dicom_port)
    with running_orthanc(program, folder / "orthanc", config.ae_title, port) as orthanc:
        settings = replace(
            config,
            action="run",
            package=package,
            folder=folder / "node",
            dicom_port=port,
            port=usable_port(config.port),
            destination=f"dicom://ORTHANC@localhost:{orthanc.dicom_port}",
            pacs_web=f"{orthanc.url}/dicom-web",
            min_free_gb=0,
        )
        node = Node(settings)
        with node.running():
            studies = demo_studies(folder / "release")
            print(
                f"sending {len(studies)} images of {STUDIES} synthetic studies to the PACS and to the node", flush=True
            )
            for title, address in (("ORTHANC", orthanc.dicom_port), (config.ae_title, port)):
                send(studies, title, address)
            yield node, orthanc


def find_orthanc() -> str:
    """Return the path of Orthanc; raise UsageError with what to install without it."""
    program = shutil.which("Orthanc")
    if program is None or not PLUGIN.is_file():
        raise UsageError(
            "demo: needs Orthanc with its DICOMweb plug-in, which is not installed: "
            "on Debian or Ubuntu, sudo apt install orthanc orthanc-dicomweb"
        )
    return program


def make_once(target: Path, commands: Sequence[str]) -> None:
    """Run commands that write to `{out}`, which becomes `target` at their end; nothing is done if that exists."""
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted run
    for line in commands:
        run_step(*(word.format(out=part, folder=target.parent) for word in line.split()))
    part.rename(target)


def usable_port(wanted: int = 0) -> int:
    """Return the port, or a free one if it is 0 or in use: a Debian package of Orthanc listens on 8042, too."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as server:
            return int(server.getsockname()[1])
    raise VitmodelError("demo: no port is free; end some programs")


@contextlib.contextmanager
def running_orthanc(program: str, folder: Path, node_title: str, node_port: int) -> Iterator[DemoOrthanc]:
    """Run an Orthanc that only this machine can reach, with its data in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    orthanc = DemoOrthanc(usable_port(), usable_port())
    settings = {
        "StorageDirectory": str(folder.absolute() / "storage"),
        "IndexDirectory": str(folder.absolute() / "storage"),
        "HttpPort": orthanc.http_port,
        "DicomPort": orthanc.dicom_port,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowFind": True,
        "DicomModalities": {"node": [node_title, "127.0.0.1", node_port]},
        "Plugins": [str(PLUGIN)],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings, indent=2))
    with (folder / "orthanc.log").open("ab") as log:
        process = subprocess.Popen([*_with_parent(), program, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(orthanc):
            if process.poll() is not None or time.monotonic() > end:
                raise VitmodelError(f"demo: Orthanc does not start; see {folder / 'orthanc.log'}")
            time.sleep(0.1)
        yield orthanc
    finally:
        process.terminate()
        process.wait(30)


def _with_parent() -> list[str]:
    """Return the command that ends a program with this process, also if that is killed; empty without util-linux."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def _answers(orthanc: DemoOrthanc) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{orthanc.url}/system").status_code == 200
    return False


def demo_studies(release: Path) -> list[Path]:
    """Return the files of some studies of a synthetic release."""
    patients = sorted(path for path in (release / "train_images").iterdir() if path.is_dir())[:STUDIES]
    return [path for patient in patients for path in sorted(patient.glob("*.dcm"))]


def send(files: list[Path], title: str, port: int) -> None:
    """Send files by C-STORE, as a modality does; raise VitmodelError if one is not taken."""
    images = [dcmread(path) for path in files]
    ae = AE("MODALITY")
    for sop_class, syntax in sorted({(str(i.SOPClassUID), str(i.file_meta.TransferSyntaxUID)) for i in images}):
        ae.add_requested_context(sop_class, syntax)
    association = ae.associate("localhost", port, ae_title=title)
    if not association.is_established:
        raise VitmodelError(f"demo: {title} does not take the studies")
    try:
        for image in images:
            status = association.send_c_store(image)
            if not status or status.Status != 0:
                raise VitmodelError(f"demo: {title} did not take an image")
    finally:
        association.release()
