"""A whole node, as `medseg-hospital run` starts it, between a scanner and a real PACS: the main promise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil
import pydicom
import pytest
import yaml
from dicom_series import LPS_TO_RAS, MR, classic
from hospital_node import EXPLICIT, send
from hospital_peers import HOST, OrthancPeer, free_port, wait_for
from pydicom.uid import ExplicitVRLittleEndian

import medseg

SAMPLE = Path(medseg.__file__).parent / "sample" / "imagesTr" / "hippocampus_025_0000.nii.gz"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
# two processes of ours load torch first
PATIENCE_S = 240.0


def sample_series(folder: Path) -> list[Path]:
    """The MR image that ships with medseg as slices of a scanner."""
    image = nib.load(SAMPLE)
    voxels = np.asarray(image.dataobj).astype(np.uint16)
    files = []
    folder.mkdir()
    for k, header in enumerate(classic(LPS_TO_RAS @ image.affine, voxels.shape)):
        header.PatientBirthDate, header.PatientSex, header.StudyID, header.AccessionNumber = "", "O", "1", "A1"
        header.StudyDate, header.StudyTime, header.ReferringPhysicianName = "20240229", "081500", ""
        header.SeriesDescription, header.Manufacturer, header.ImageType = "T1 Hippocampus", "x", ["ORIGINAL", "PRIMARY"]
        header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelData = np.ascontiguousarray(voxels[:, :, k].T).tobytes()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        files.append(folder / f"{k:03d}.dcm")
        header.save_as(files[-1], enforce_file_format=True)
    return files


@contextmanager
def running(folder: Path, pacs: OrthancPeer) -> Iterator[dict[str, Any]]:
    """`medseg-hospital run` with what ships as its settings, but for ports and folder; these settings."""
    settings: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "configs" / "hospital.yaml").read_text())
    settings["folder"] = str(folder / "node")
    settings["gateway"]["port"], settings["web"]["port"] = free_port(), free_port()
    settings["storage"]["least_free_gb"] = 0
    # on a machine that is busy slices of one study may come seconds apart
    settings["completeness"]["quiet_s"] = 8.0
    settings["peers"]["pacs"]["port"] = pacs.dicom_port
    (folder / "hospital.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "medseg_pipelines.hospital", "run", "-c", str(folder / "hospital.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        ready = f"http://{HOST}:{settings['web']['port']}/readyz"
        wait_for(lambda: _is_ready(ready, process, folder), seconds=PATIENCE_S)
        yield settings
    finally:
        parts = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    # nothing is left behind, and the end is a good one
    assert psutil.wait_procs(parts, 5)[1] == []
    assert process.returncode == 0


def metrics_of(settings: dict[str, Any]) -> str:
    """What the node tells of itself."""
    return httpx.get(f"http://{HOST}:{settings['web']['port']}/metrics").text


def _is_ready(url: str, process: subprocess.Popen[bytes], folder: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the node has ended: {(folder / 'log').read_text()[-3000:]}")
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_study_that_a_scanner_sends_comes_back_to_the_pacs_as_segmentation(
    tmp_path: Path, orthanc: OrthancPeer
) -> None:
    orthanc.clear()
    files = sample_series(tmp_path / "series")
    with running(tmp_path, orthanc) as settings:
        port = settings["gateway"]["port"]
        assert set(send(port, files, contexts=[(MR, EXPLICIT)])) == {0x0000}
        wait_for(lambda: len(orthanc.instances()) == 2, seconds=PATIENCE_S)
        wait_for(lambda: 'medseg_jobs{state="done",step="confirmed"} 1.0' in metrics_of(settings))
        # the same study again changes nothing: another job would begin when it is quiet
        assert set(send(port, files, contexts=[(MR, EXPLICIT)])) == {0x0000}
        wait_for(lambda: f'medseg_events_total{{event="received_again"}} {len(files)}.0' in metrics_of(settings))
        time.sleep(1.5 * settings["completeness"]["quiet_s"])
        metrics = metrics_of(settings)
    told = [line for line in metrics.splitlines() if line.startswith("medseg_jobs{") and not line.endswith(" 0.0")]
    assert told == ['medseg_jobs{state="done",step="confirmed"} 1.0']
    assert 'medseg_series{state="complete"} 1.0' in metrics
    assert len(orthanc.instances()) == 2
    made = tmp_path / "from_pacs.dcm"
    for uid in orthanc.instances():
        data = orthanc.file_of(uid)
        found = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data), stop_before_pixels=True)
        assert found.StudyInstanceUID == pydicom.dcmread(files[0]).StudyInstanceUID
        if found.SOPClassUID == SEG:
            made.write_bytes(data)
    # voxel for voxel what the command line makes of the same slices, on the scanner's own grid
    medseg.convert(made, tmp_path / "back.nii.gz")
    rule = settings["rules"][0]
    medseg.infer([tmp_path / "series"], [rule["model"]], tmp_path / "masks", medseg.InferOptions(device="cpu"))
    back, direct = nib.load(tmp_path / "back.nii.gz"), nib.load(tmp_path / "masks" / "series.nii.gz")
    assert sorted(np.unique(direct.dataobj)) == [0, 1, 2]
    assert _in_ras(back).tolist() == _in_ras(direct).tolist()
    # the patient of the slices stands nowhere but in files, the database and pages for those who are logged in
    told = b"".join(path.read_bytes() for path in [tmp_path / "log", *(tmp_path / "node" / "audit").iterdir()])
    assert b"Doe" not in told
    assert "Doe" not in metrics
    assert list((tmp_path / "node").rglob("*Doe*")) == []


def _in_ras(image: nib.Nifti1Image) -> np.ndarray[Any, Any]:
    """The voxels with their axes to the right, the front and the head."""
    return np.asarray(nib.as_closest_canonical(image).dataobj)


@pytest.mark.slow
def test_settings_that_are_wrong_end_the_whole_node_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hospital.yaml"
    path.write_text(f"folder: {tmp_path / 'node'}\nrules: [{{name: a, model: nowhere/run}}]\n")
    command = [sys.executable, "-m", "medseg_pipelines.hospital", "run", "-c", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert ended.returncode == 2
    assert "nowhere/run" in ended.stderr
    assert "Traceback" not in ended.stderr
