"""What a run leaves behind knows images by their ids: nothing of a DICOM header is in any of its files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.engine_cluster import KEYS
from tests.toy import CLASSES, Watch, toy_config
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate

pydicom = pytest.importorskip("pydicom")

SECRET = "Zzyzx"


def radiograph(path: Path, pixels_HW: np.ndarray) -> None:
    """A DICOM file whose header names a patient in every way it can."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.PatientName = f"{SECRET}^Anna"
    header.PatientID = f"{SECRET}-1"
    header.PatientBirthDate = "19380117"
    header.ReferringPhysicianName = f"{SECRET}^Doctor"
    header.StudyDescription = f"{SECRET} admitted"
    header.AccessionNumber = SECRET
    header.Rows, header.Columns = pixels_HW.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 8, 8, 7, 0
    header.PixelData = pixels_HW.tobytes()
    header.save_as(path)


def test_no_header_value_is_in_a_run(tmp_path: Path) -> None:
    """Tables, record, progress and report of a run over DICOM files, one of them broken: the names, dates and numbers
    of the headers are in none of them."""
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        radiograph(tmp_path / "data" / name / "0.dcm", generator.integers(0, 256, (40, 36), dtype=np.uint8))
    broken = tmp_path / "data" / "covid" / "1.dcm"
    broken.write_bytes((tmp_path / "data" / "covid" / "0.dcm").read_bytes()[:-700])
    Image.new("L", (40, 36)).save(tmp_path / "data" / "normal" / "1.png")
    config = toy_config(
        tmp_path / "data", tmp_path / "run", explainers={"random": {}}, metrics={"effective_complexity": {}}
    )
    outcome = evaluate(config, run_local, Watch())
    assert outcome.num_image_failures == 1 and outcome.folder.read("scores").num_rows == 4

    from xaibatch.results.report import write_report

    write_report(outcome.folder.url)
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes() and b"19380117" not in file.read_bytes(), file
    for table in KEYS:  # pages of Parquet are compressed
        text = str(outcome.folder.read(table).to_pydict())
        assert SECRET not in text and "19380117" not in text, table
