"""Readers of public data sets, on small made-up trees of their published shape."""

from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from xaibatch.data.dataset import DataSet, open_dataset
from xaibatch.data.findings import FindingOptions
from xaibatch.data.load import load_shard
from xaibatch.data.preprocess import Preprocessing
from xaibatch.data.sampling import shards
from xaibatch.data.storage import list_files
from xaibatch.errors import DataError
from xaibatch.types import ImageBatch

WHOLE = Preprocessing(image_size=(32, 32), resize_short=32, mean=(0.0,), std=(1.0,))


def write(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(noise if values is None else values).save(path)


def square(top: int, left: int, side: int = 8) -> np.ndarray:
    values = np.zeros((32, 32), np.uint8)
    values[top : top + side, left : left + side] = 255
    return values


def loaded(dataset: DataSet) -> ImageBatch:
    batch, failures = load_shard(shards(dataset.records, 99)[0], WHOLE, dataset.class_names, with_masks=True)
    assert failures == ()
    return batch


def ids(dataset: DataSet) -> list[str]:
    return [record.image_id for record in dataset.records]


# -- COVID-QU-Ex


@pytest.fixture
def covid_qu_ex(tmp_path: Path) -> Path:
    for part in ("Lung Segmentation Data", "Infection Segmentation Data"):
        for split in ("Train", "Val", "Test"):
            for name, stem in (("COVID-19", "covid_1"), ("Non-COVID", "non_COVID (1)"), ("Normal", "Normal (7)")):
                place = tmp_path / part / part / split / name
                write(place / "images" / f"{stem}.png")
                write(place / "lung masks" / f"{stem}.png", square(4, 4, 20))
                if part.startswith("Infection"):
                    write(place / "infection masks" / f"{stem}.png", square(8, 8, 5 if name == "COVID-19" else 0))
    return tmp_path


@pytest.mark.parametrize("below", ["", "Infection Segmentation Data"])
def test_covid_qu_ex_infection_part(covid_qu_ex: Path, below: str) -> None:
    dataset = open_dataset(str(covid_qu_ex / "Infection Segmentation Data" / below), split="Test")
    assert (dataset.layout, dataset.class_names) == ("covid-qu-ex", ("COVID-19", "Non-COVID", "Normal"))
    assert ids(dataset) == [
        "Test/COVID-19/images/covid_1.png",
        "Test/Non-COVID/images/non_COVID (1).png",
        "Test/Normal/images/Normal (7).png",
    ]
    assert dataset.mask_names == ("lesion", "lung")
    batch = loaded(dataset)
    np.testing.assert_array_equal(batch.masks["lung"], np.stack([square(4, 4, 20) > 0] * 3))
    np.testing.assert_array_equal(batch.masks["lesion"][0], square(8, 8, 5) > 0)
    assert not batch.masks["lesion"][1:].any()
    assert batch.has_mask["lesion"].all()


def test_covid_qu_ex_lung_part_and_splits(covid_qu_ex: Path) -> None:
    dataset = open_dataset(str(covid_qu_ex / "Lung Segmentation Data"))
    assert dataset.mask_names == ("lung",)
    assert sorted({str(record.split) for record in dataset.records}) == ["test", "train", "val"]
    assert len(dataset) == 9
    assert dataset.notes == ()
    lungs = covid_qu_ex / "Lung Segmentation Data" / "Lung Segmentation Data" / "Val" / "Normal" / "lung masks"
    (lungs / "Normal (7).png").unlink()
    assert open_dataset(str(covid_qu_ex / "Lung Segmentation Data")).notes == ("1 images have no lung mask",)


def test_covid_qu_ex_asks_for_one_part_and_names_what_is_missing(covid_qu_ex: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds both parts"):
        open_dataset(str(covid_qu_ex))
    (covid_qu_ex / "Lung Segmentation Data/Lung Segmentation Data/Val/Normal/images/Normal (7).png").unlink()
    with pytest.raises(DataError, match="class folder 'Val/Normal'"):
        open_dataset(str(covid_qu_ex / "Lung Segmentation Data"))
    write(tmp_path / "plain" / "a" / "1.png")
    with pytest.raises(DataError, match="has not the shape of COVID-QU-Ex"):
        open_dataset(str(tmp_path / "plain"), layout="covid-qu-ex")


def test_covid_qu_ex_from_an_object_store_equals_the_local_one(covid_qu_ex: Path) -> None:
    part = covid_qu_ex / "Infection Segmentation Data"
    memory = fsspec.filesystem("memory")
    for entry in list_files(str(part)):
        memory.pipe(f"/qu-ex/{entry.relative}", Path(entry.path).read_bytes())
    local, remote = open_dataset(str(part)), open_dataset("memory://qu-ex")
    assert remote.layout == "covid-qu-ex"
    assert remote.checksum == local.checksum
    np.testing.assert_array_equal(loaded(remote).masks["lung"], loaded(local).masks["lung"])


# -- NIH ChestX-ray14


NIH_ENTRIES = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
    "00000001_000.png,Cardiomegaly,0,1,058Y,M,PA,2682,2749,0.143,0.143,\n"
    "00000001_001.png,Cardiomegaly|Emphysema,1,1,058Y,M,PA,2894,2729,0.143,0.143,\n"
    "00000002_000.png,No Finding,0,2,081Y,M,PA,2500,2048,0.171,0.171,\n"
    "00000003_000.png,Infiltration,0,3,082Y,F,AP,2500,2048,0.168,0.168,\n"
    "00000004_000.png,Infiltration,0,4,082Y,F,AP,2500,2048,0.168,0.168,\n"
)
NIH_BOXES = (
    "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    "00000003_000.png,Infiltrate,256,512.0,128.0,64,,,\n"
    "00000003_000.png,Infiltrate,0,0,32,32,,,\n"
    "00000003_000.png,Mass,900,900,64,64,,,\n"
    "00000001_001.png,Emphysema,640,640,64,64,,,\n"
)


@pytest.fixture
def nih(tmp_path: Path) -> Path:
    (tmp_path / "Data_Entry_2017.csv").write_text(NIH_ENTRIES)
    (tmp_path / "BBox_List_2017.csv").write_text(NIH_BOXES)
    (tmp_path / "test_list.txt").write_text("00000003_000.png\n00000002_000.png")
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    for folder, names in (
        ("images_001", ("00000001_000", "00000001_001")),
        ("images_002", ("00000002_000", "00000003_000")),
    ):
        for name in names:
            write(tmp_path / folder / "images" / f"{name}.png")
    return tmp_path


def test_nih_single_findings_patients_splits_and_boxes(nih: Path) -> None:
    dataset = open_dataset(str(nih))
    assert dataset.layout == "nih"
    assert ids(dataset) == ["00000001_000.png", "00000002_000.png", "00000003_000.png"]
    assert [record.label for record in dataset.records] == ["Cardiomegaly", "No Finding", "Infiltration"]
    assert [record.patient for record in dataset.records] == ["1", "2", "3"]
    assert [record.split for record in dataset.records] == ["train_val", "test", "test"]
    assert dataset.patients_from == "column Patient ID of Data_Entry_2017.csv"
    assert dataset.notes == (
        "1 images of Data_Entry_2017.csv are not on disk",
        "1 images were left out: several findings",
    )
    batch = loaded(dataset)
    # Boxes of 1024 pixels on images of 32: x 256 to 384 is columns 8 to 11, y 512 to 576 rows 16 and 17.
    # The box of a mass is not of this image's class.
    expected = np.zeros((32, 32), bool)
    expected[16:18, 8:12] = True
    expected[0, 0] = True
    np.testing.assert_array_equal(batch.masks["lesion"][2], expected)
    assert batch.has_mask["lesion"].tolist() == [False, False, True]
    assert ids(open_dataset(str(nih), split="test")) == ["00000002_000.png", "00000003_000.png"]
    assert open_dataset(str(nih / "Data_Entry_2017.csv")).records == dataset.records


def test_nih_one_of_several_findings_by_priority(nih: Path) -> None:
    chosen = FindingOptions(classes=("Emphysema", "Cardiomegaly"), several="first")
    dataset = open_dataset(str(nih), findings=chosen)
    assert [(record.image_id, record.label) for record in dataset.records] == [
        ("00000001_000.png", "Cardiomegaly"),
        ("00000001_001.png", "Emphysema"),
    ]
    assert loaded(dataset).masks["lesion"][1, 20:22, 20:22].all()
    # A finding that is not asked for does not count as a second one.
    alone = open_dataset(str(nih), findings=FindingOptions(classes=("Emphysema",)))
    assert ids(alone) == ["00000001_001.png"]


def test_nih_says_what_is_missing(nih: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no finding 'Covid'. Findings: Cardiomegaly, Emphysema, Infiltration, No Finding"
    ):
        open_dataset(str(nih), findings=FindingOptions(classes=("Covid",)))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"no Data_Entry_2017.csv"):
        open_dataset(str(tmp_path / "bare"), layout="nih")
    (tmp_path / "bare" / "Data_Entry_2017.csv").write_text(NIH_ENTRIES)
    with pytest.raises(DataError, match="none of the images"):
        open_dataset(str(tmp_path / "bare"))
    (nih / "BBox_List_2017.csv").write_text(NIH_BOXES.replace("256,", "left,"))
    with pytest.raises(DataError, match="row 2: the box is not four numbers"):
        open_dataset(str(nih))


# -- CheXpert and MIMIC


CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Edema,Pneumonia\n"
    "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,\n"
    "CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg,Female,87,Frontal,AP,,,-1.0,-1.0,1.0\n"
    "CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg,Female,83,Frontal,AP,,,,1.0,0.0\n"
    "CheXpert-v1.0-small/train/patient00002/study1/view2_lateral.jpg,Female,83,Lateral,,,,,1.0,0.0\n"
    "CheXpert-v1.0-small/train/patient00003/study1/view1_frontal.jpg,Male,41,Frontal,AP,,,1.0,1.0,\n"
    "CheXpert-v1.0-small/train/patient00004/study1/view1_frontal.jpg,Male,41,Frontal,PA,,,,,\n"
)


@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    root = tmp_path / "CheXpert-v1.0-small"
    root.mkdir()
    (root / "train.csv").write_text(CHEXPERT)
    header, first, *_ = CHEXPERT.replace("/train/patient0000", "/valid/patient6454").splitlines()
    (root / "valid.csv").write_text(f"{header}\n{first}\n")
    for name in ("train.csv", "valid.csv"):
        for line in (root / name).read_text().splitlines()[1:]:
            write(tmp_path / line.partition(",")[0])
    return root


def test_chexpert_labels_patients_and_splits(chexpert: Path) -> None:
    dataset = open_dataset(str(chexpert))
    assert dataset.layout == "chexpert"
    assert [
        (record.image_id.partition("/")[2], record.label, record.patient, record.split) for record in dataset.records
    ] == [
        ("train/patient00001/study1/view1_frontal.jpg", "No Finding", "patient00001", "train"),
        ("train/patient00002/study1/view1_frontal.jpg", "Edema", "patient00002", "train"),
        ("valid/patient64541/study1/view1_frontal.jpg", "No Finding", "patient64541", "val"),
    ]
    assert dataset.notes == (
        "train.csv: 1 images were left out: a lateral view",
        "train.csv: 1 images were left out: an uncertain finding",
        "train.csv: 1 images were left out: no such finding",
        "train.csv: 1 images were left out: several findings",
    )
    assert len(loaded(dataset)) == 3
    assert len(open_dataset(str(chexpert), split="valid")) == 1
    assert len(open_dataset(str(chexpert / "train.csv"))) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"uncertain": "negative"}, {"00002/study2": "Pneumonia", "00002/study1": "Edema"}),
        ({"uncertain": "positive"}, {"00002/study1": "Edema"}),
        (
            {"uncertain": "positive", "several": "first"},
            {"00002/study2": "Cardiomegaly", "00002/study1": "Edema", "00003/study1": "Cardiomegaly"},
        ),
        ({"classes": ("Pneumonia",)}, {"00002/study2": "Pneumonia"}),
        (
            {"classes": ("Cardiomegaly", "Edema"), "several": "first"},
            {"00002/study1": "Edema", "00003/study1": "Cardiomegaly"},
        ),
        ({"classes": ("Edema",), "frontal_only": False}, {"00002/study1": "Edema", "00003/study1": "Edema"}),
    ],
)
def test_chexpert_uncertain_and_several_findings(chexpert: Path, options: dict, expected: dict[str, str]) -> None:
    dataset = open_dataset(str(chexpert / "train.csv"), findings=FindingOptions(**options))
    found = {record.image_id.split("patient")[1].rpartition("/")[0]: record.label for record in dataset.records}
    assert {key: label for key, label in found.items() if label != "No Finding"} == expected


def test_chexpert_says_what_is_wrong(chexpert: Path) -> None:
    path = chexpert / "train.csv"
    for old, new, message in (
        ("-1.0,1.0", "-1.0,maybe", r"row 3: Pneumonia is 'maybe', expected 1, 0, -1 or nothing"),
        ("CheXpert-v1.0-small/train/patient00001", "elsewhere/patient00001", "its first image lies neither at"),
        ("CheXpert-v1.0-small/train/patient00002/study1", "../../patient00002/study1", "outside the manifest's folder"),
    ):
        path.write_text(CHEXPERT.replace(old, new))
        with pytest.raises(DataError, match=message):
            open_dataset(str(path))
    path.write_text(CHEXPERT)
    with pytest.raises(DataError, match="no column 'Mass'"):
        open_dataset(str(path), findings=FindingOptions(classes=("Mass",)))


def test_a_mimic_table_with_paths(tmp_path: Path) -> None:
    rows = [
        "subject_id,study_id,dicom_id,ViewPosition,split,Path,Edema,No Finding",
        "10000032,50414267,aa,PA,train,files/p10/p10000032/s50414267/aa.jpg,1.0,",
        "10000032,50414267,bb,LATERAL,train,files/p10/p10000032/s50414267/bb.jpg,1.0,",
        "10000764,57375967,cc,AP,validate,files/p10/p10000764/s57375967/cc.jpg,,1.0",
    ]
    (tmp_path / "mimic.csv").write_text("\n".join(rows))
    write(tmp_path / "files/p10/p10000032/s50414267/aa.jpg")
    dataset = open_dataset(str(tmp_path / "mimic.csv"))
    assert [(record.label, record.patient, record.split) for record in dataset.records] == [
        ("Edema", "10000032", "train"),
        ("No Finding", "10000764", "val"),
    ]
