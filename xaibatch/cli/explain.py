"""`xaibatch explain IMAGE...`: overlays of one or several explainers on given images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from xaibatch.config import parse_setting, set_value
from xaibatch.errors import ImageError, UsageError, XaibatchError

Option = typer.Option

SHIPPED = "classifier of synthetic radiographs, not for clinical use"
"""What overlays of the shipped model must say: it knows simulated lesions only."""


def add_to(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    images: Annotated[list[Path], typer.Argument(help="image files (PNG, JPEG, TIFF, DICOM, ...)")],
    explainer: Annotated[
        str, Option("--explainer", "-e", help="comma-separated names (xaibatch list explainers)")
    ] = "transformer_lrp",
    set_: Annotated[
        list[str] | None, Option("--set", help="an option of an explainer: lime.num_samples=200 (repeatable)")
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="folder for the overlays")] = Path("overlays"),
    model: Annotated[
        str | None, Option(help="timm model name; default: the shipped classifier of synthetic radiographs")
    ] = None,
    checkpoint: Annotated[str | None, Option(help="local path or URL of .safetensors or weights-only .pth")] = None,
    target: Annotated[str | None, Option(help="class to explain, by name; default: the predicted class")] = None,
    seed: Annotated[int, Option(help="seed of explainers that draw random numbers")] = 0,
) -> None:
    """Write one overlay per image and explainer: grey radiograph, colour by relevance, class and probability."""
    import torch

    import xaibatch
    from xaibatch.data.decode import decode_image
    from xaibatch.embedded import MODEL_NAME, model_path
    from xaibatch.explainers.explained_output import probabilities
    from xaibatch.explainers.resolve import resolve_explainer
    from xaibatch.maps import PlacedMapOptions, on_pixels
    from xaibatch.models.token_grid import token_grid_of
    from xaibatch.results.overlay import grey_image, write_overlay

    options = explainer_options(explainer, set_ or [])
    methods = {name: resolve_explainer(name)(**keywords) for name, keywords in options.items()}
    note = SHIPPED if model is None and checkpoint is None else ""
    remark = f"no --model: {note or f'the checkpoint is taken for {MODEL_NAME}'}" if model is None else ""
    if model is None:
        model, checkpoint = MODEL_NAME, checkpoint or str(model_path())
    elif checkpoint is None:
        raise UsageError(
            f"no weights for {model!r}: give --checkpoint, or leave out --model for the shipped classifier"
        )
    classifier = xaibatch.load_model(model, checkpoint=checkpoint)
    preprocessing = classifier.preprocessing
    if target is not None and target not in classifier.class_names:
        raise UsageError(f"the model has no class {target!r}. Its classes: {', '.join(classifier.class_names)}")
    grid = token_grid_of(classifier, preprocessing.image_size)
    failed = []
    for path, label in zip(images, output_labels(images), strict=True):
        try:
            pixels = decode_image(path.read_bytes())
            image_CHW = torch.from_numpy(preprocessing.apply(pixels))
        except (OSError, ImageError) as error:
            failed.append(f"{path}: {error}")
            continue
        with torch.inference_mode():
            probability_K = probabilities(classifier(image_CHW[None]).numpy())[0]
        explained = int(probability_K.argmax()) if target is None else classifier.class_names.index(target)
        for name, method in methods.items():
            try:
                maps_Bhw = xaibatch.explain(
                    classifier,
                    image_CHW[None],
                    name,
                    explained,
                    seed=seed,
                    image_ids=[path.name],
                    resolution="native",
                    **options[name],
                )
            except XaibatchError:
                raise
            except Exception as error:  # the explainer's own, on this image
                failed.append(f"{path}: {name}: {type(error).__name__}: {error}")
                continue
            map_hw = maps_Bhw[0].numpy()
            if map_hw.shape == grid.shape and grid.covered != preprocessing.image_size:
                map_hw = on_pixels(map_hw, preprocessing.image_size, PlacedMapOptions(grid=grid))
            where = output / f"{label}.{name.replace(':', '-')}.png"
            try:
                write_overlay(
                    where,
                    image_HW=grey_image(image_CHW.numpy(), preprocessing.mean, preprocessing.std),
                    map_hw=map_hw,
                    title=f"{classifier.class_names[explained]} (p = {float(probability_K[explained]):.2f})",
                    subtitle=f"{method.title}\n{note}".strip(),
                    signed=method.signed,
                )
            except OSError as error:
                raise UsageError(f"cannot write {where}: {error}; choose another --output") from None
            print(where)
    if remark:
        typer.echo(remark, err=True)
    for line in failed:
        typer.echo(f"error: {line}", err=True)
    if failed:
        raise SystemExit(1)


def explainer_options(names: str, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by explainer, in the order named: `a,b` and settings `a.key=value` with YAML values.

    >>> explainer_options("lime, captum:Occlusion", ["captum:Occlusion.arguments.sliding_window_shapes=[3, 16, 16]"])
    {'lime': {}, 'captum:Occlusion': {'arguments': {'sliding_window_shapes': [3, 16, 16]}}}
    """
    options: dict[str, dict[str, Any]] = {name: {} for part in names.split(",") if (name := part.strip())}
    if not options:
        raise UsageError("no explainer is named: xaibatch list explainers shows them")
    content: dict[str, Any] = {"explainers": options}
    for text in settings:
        key, value = parse_setting(text)
        if not any(key.startswith(f"{name}.") for name in options):
            raise UsageError(
                f"--set {text}: expected EXPLAINER.option=value for one of the explainers {', '.join(options)}"
            )
        set_value(content, f"explainers.{key}", value)
    return options


def output_labels(paths: Sequence[Path]) -> list[str]:
    """A different name for each image's overlays: the file's stem, with its ending and as much of its folders as it
    takes where stems are equal.

    >>> output_labels([Path("in/a.png"), Path("in/b.png")]), output_labels([Path("in/a.png"), Path("in/a.dcm")])
    (['a', 'b'], ['a.png', 'a.dcm'])
    >>> output_labels([Path("x/in/a.png"), Path("y/in/a.png")])
    ['x-in-a', 'y-in-a']
    """
    absolute = [path.absolute() for path in paths]
    if repeated := [str(path) for path in dict.fromkeys(absolute) if absolute.count(path) > 1]:
        raise UsageError(f"given twice: {', '.join(repeated)}")
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        for parts in ([path.with_suffix("").parts for path in absolute], [path.parts for path in absolute]):
            labels = [
                "-".join(part for part in each[-depth:] if part != path.anchor)
                for each, path in zip(parts, absolute, strict=True)
            ]
            if len(set(labels)) == len(labels):
                return labels
    return [f"{index}-{path.stem}" for index, path in enumerate(paths)]
