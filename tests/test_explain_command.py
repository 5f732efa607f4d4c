"""`xaibatch explain` and `xaibatch list` as a user runs them, and what `xaibatch.explain` says to wrong arguments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import xaibatch
from tests.toy import toy_images
from xaibatch.cli import main
from xaibatch.cli.explain import SHIPPED
from xaibatch.data.decode import decode_image
from xaibatch.embedded import MODEL_NAME, model_path
from xaibatch.errors import ConfigError, ModelError, UsageError
from xaibatch.explainers.base import EXPLAINERS
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.models.classifier import Classifier
from xaibatch.results.overlay import grey_image, overlay_figure


@pytest.fixture(scope="module")
def shipped() -> Classifier:
    return xaibatch.load_model(MODEL_NAME, checkpoint=str(model_path()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return toy_images(tmp_path / "toy", 1) / "covid" / "0.png"


def pixels_of(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def run(*args: object) -> int:
    """The exit code of a command line."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("transformer_lrp", [], {}),
        ("gradcam", ["gradcam.relu=false"], {"relu": False}),
        ("lime", ["lime.num_samples=12", "lime.segmentation=grid"], {"num_samples": 12, "segmentation": "grid"}),
        (
            "captum:LayerGradientXActivation",
            ["captum:LayerGradientXActivation.layer=blocks.11.norm1"],
            {"layer": "blocks.11.norm1"},
        ),
        (
            "captum:Occlusion",
            ["captum:Occlusion.arguments.sliding_window_shapes=[3, 112, 112]",
             "captum:Occlusion.arguments.strides=[3, 112, 112]"],
            {"arguments": {"sliding_window_shapes": [3, 112, 112], "strides": [3, 112, 112]}},
        ),
    ],
)  # fmt: skip
def test_an_overlay_shows_map_class_probability_and_colour_bar(
    shipped: Classifier, image: Path, tmp_path: Path, name: str, settings: list[str], options: dict[str, Any]
) -> None:
    """Pixel by pixel the figure of the map that the options give, its title told by the model itself."""
    flags = [part for setting in settings for part in ("--set", setting)]
    assert run("explain", image, "--explainer", name, *flags, "--output", tmp_path / "out") == 0
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == f"0.{name.replace(':', '-')}.png"

    prepared = torch.from_numpy(shipped.preprocessing.apply(decode_image(image.read_bytes())))[None]
    probability = shipped(prepared).softmax(1)[0]
    predicted = int(probability.argmax())
    maps = xaibatch.explain(shipped, prepared, name, predicted, image_ids=["0.png"], resolution="native", **options)
    explainer = resolve_explainer(name)(**options)
    figure = overlay_figure(
        grey_image(prepared[0].numpy(), shipped.preprocessing.mean, shipped.preprocessing.std),
        maps[0].numpy(),
        title=f"{shipped.class_names[predicted]} (p = {probability[predicted]:.2f})",
        subtitle=f"{explainer.title}\n{SHIPPED}",
        signed=explainer.signed,
    )
    figure.savefig(tmp_path / "expected.png", dpi=200)
    np.testing.assert_array_equal(pixels_of(written), pixels_of(tmp_path / "expected.png"))
    assert len(figure.axes) == 3  # radiograph, overlay, colour bar
    ticks = [text.get_text() for text in figure.axes[2].get_yticklabels()]
    assert ticks == (["against", "0", "for"] if explainer.signed else ["0", "½", "max"])
    colourful = np.ptp(pixels_of(written).astype(int), axis=-1) > 30
    assert 0.01 < colourful.mean() < 0.6


def test_images_of_one_name_get_an_overlay_each(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "toy" / "normal" / "0.png"
    assert run("explain", image, twin, "-e", "raw_attention,random", "-o", tmp_path / "out") == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = [f"{label}-0.{name}.png" for label in ("covid", "normal") for name in ("random", "raw_attention")]
    assert written == expected
    printed = capsys.readouterr()
    assert sorted(Path(line).name for line in printed.out.splitlines()) == expected
    assert printed.err == f"no --model: {SHIPPED}\n"


def test_a_bad_image_is_one_line_and_the_others_are_explained(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    assert run("explain", bad, tmp_path / "absent.png", image, "-e", "random", "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.random.png"]
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["no --model", "error", "error"]
    assert "Traceback" not in captured.err


def test_a_checkpoint_of_one_s_own_is_not_called_the_shipped_model(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", image, "--checkpoint", model_path(), "-e", "random", "-o", tmp_path / "own") == 0
    said = capsys.readouterr().err
    assert said == f"no --model: the checkpoint is taken for {MODEL_NAME}\n"
    assert run("explain", image, "-e", "random", "-o", tmp_path / "shipped") == 0
    own, shipped = (pixels_of(tmp_path / name / "0.random.png") for name in ("own", "shipped"))
    assert own.shape != shipped.shape or not np.array_equal(own, shipped)


def test_an_explainer_that_fails_on_an_image_is_one_line(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "breaks.py").write_text("def maps(model, images_BCHW, targets_B):\n    raise KeyError('mine')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("explain", image, "-e", "breaks:maps,random", "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.random.png"]
    assert "breaks:maps: KeyError: 'mine'" in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-e", "limee"], "Did you mean 'lime'?"),
        (["-e", ","], "no explainer is named"),
        (["--target", "flu"], "the model has no class 'flu'. Its classes: "),
        (["--model", "vit_tiny_patch16_224"], "no weights for 'vit_tiny_patch16_224': give --checkpoint"),
        (["-e", "lime", "--set", "lime.num_sample=3"], "unknown option 'num_sample'. Did you mean 'num_samples'?"),
        (["-e", "lime", "--set", "rise.num_masks=3"], "for one of the explainers lime"),
        (["-e", "lime", "--set", "lime.num_samples"], "a setting is written key.path=value"),
        (["-e", "captum:Occlusion"], "needs sliding_window_shapes among its `arguments`, on the command line --set"),
        (["-e", "captum:LayerGradCam"], "needs the option `layer`, a module's name"),
        (["-e", "captum:Saliency", "--set", "captum:Saliency.layer=blocks.0"], "leave out the option `layer`"),
        (
            ["-e", "captum:Occlusion", "--set", "captum:Occlusion.arguments.sliding_window_shapes=[8, 8]"],
            "captum:Occlusion refuses its arguments {'sliding_window_shapes': [8, 8]}: AssertionError",
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run("explain", image, "-o", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_one_image_given_twice_and_an_unwritable_output_are_refused(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", image, image, "-o", tmp_path / "out") == 2
    assert "given twice" in capsys.readouterr().err
    assert run("explain", image, "-e", "random", "-o", image) == 2
    assert "cannot write" in capsys.readouterr().err


def test_list_explainers_prints_what_each_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "explainers") == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if "│" in line]
    by_name = {cells[1]: cells for cells in lines if cells[1]}
    assert set(by_name) == set(EXPLAINERS)
    assert by_name["lime"][4:6] == ["signed", "segment"]
    assert by_name["transformer_lrp"][4:6] == ["positive", "token"]
    assert by_name["occlusion"][6].startswith("170 forward")
    assert by_name["rise"][7] == "any timm classifier"
    for form in ("captum:<Class>", "zennit:<composite>", "package.module:function"):
        assert form in " ".join(printed.split())


# -- xaibatch.explain


class Answers(nn.Module):
    """A classifier of three classes on 3x16x16 images that counts nothing and knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 3)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(images_BCHW.flatten(1))


IMAGES = torch.rand(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("images", "arguments", "error", "message"),
    [
        (IMAGES.numpy(), {}, UsageError, r"must be a tensor \(B,C,H,W\), received ndarray"),
        (IMAGES[0], {}, UsageError, r"at least one image, received shape \(3, 16, 16\)"),
        (IMAGES[:0], {}, UsageError, r"at least one image, received shape \(0, 3, 16, 16\)"),
        ((IMAGES * 255).to(torch.uint8), {}, UsageError, "normalised floats .* received torch.uint8"),
        (IMAGES[:, :1], {}, ModelError, r"cannot read images of shape \(C,H,W\) = \(1, 16, 16\)"),
        (IMAGES[..., :12], {}, ModelError, r"cannot read images of shape \(C,H,W\) = \(3, 16, 12\)"),
        (IMAGES[..., :12], {"targets": 0}, ModelError, r"cannot read images of shape \(C,H,W\) = \(3, 16, 12\)"),
        (IMAGES, {"targets": 3}, UsageError, "each 0 to 2; received 3"),
        (IMAGES, {"targets": [0, -1]}, UsageError, r"each 0 to 2; received \[0, -1\]"),
        (IMAGES, {"targets": [0, 1, 2]}, UsageError, r"one class or 2 \(one per image\)"),
        (IMAGES, {"targets": 0.7}, UsageError, "received torch.float32"),
        (IMAGES, {"targets": "covid"}, UsageError, "each 0 to 2; received 'covid'"),
        (IMAGES, {"image_ids": ["a"]}, UsageError, "one id for each of 2 images"),
        (IMAGES, {"batch_size": 0}, UsageError, "a batch size of at least 1"),
        (IMAGES, {"window": 0}, ConfigError, "window"),
    ],
)
def test_wrong_arguments_are_named(
    images: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        xaibatch.explain(Answers(), images, "occlusion", **arguments)


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(ModelError, match=r"must answer with logits \(B,K\), it gives shape \(2, 3, 16, 16\)"):
        xaibatch.explain(nn.Identity(), IMAGES, "random")


@pytest.mark.parametrize("targets", [1, [1, 2], torch.tensor([1, 2], dtype=torch.int32), np.array([0, 2])])
def test_targets_of_every_kind(targets: Any) -> None:
    model = Answers()
    maps = xaibatch.explain(model, IMAGES, "occlusion", targets, window=4, stride=4)
    for row, target in enumerate(np.broadcast_to(np.asarray(targets), 2).tolist()):
        alone = xaibatch.explain(model, IMAGES[row : row + 1], "occlusion", target, window=4, stride=4)
        torch.testing.assert_close(maps[row : row + 1], alone)
