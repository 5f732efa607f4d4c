"""`xaibatch explain IMAGE...`: overlays of one or several explainers on given images."""

from pathlib import Path
from typing import Annotated

import typer

from xaibatch.errors import ImageError, UsageError

Option = typer.Option


def add_to(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    images: Annotated[list[Path], typer.Argument(help="image files (PNG, JPEG, TIFF, DICOM, ...)")],
    explainer: Annotated[
        str, Option("--explainer", "-e", help="comma-separated names (xaibatch list explainers)")
    ] = "transformer_lrp",
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
    from xaibatch.explainers.resolve import resolve_explainer
    from xaibatch.results.overlay import grey_image, write_overlay

    if model is None:
        model, checkpoint = MODEL_NAME, checkpoint or str(model_path())
    classifier = xaibatch.load_model(model, checkpoint=checkpoint)
    preprocessing = classifier.preprocessing
    if target is not None and target not in classifier.class_names:
        raise UsageError(f"the model has no class {target!r}. Its classes: {', '.join(classifier.class_names)}")
    failed = []
    for path in images:
        try:
            pixels = decode_image(path.read_bytes())
            image_CHW = torch.from_numpy(preprocessing.apply(pixels))
        except (OSError, ImageError) as error:
            failed.append(f"{path}: {error}")
            continue
        with torch.inference_mode():
            probabilities_K = classifier(image_CHW[None])[0].softmax(0)
        explained = int(probabilities_K.argmax()) if target is None else classifier.class_names.index(target)
        for name in (part.strip() for part in explainer.split(",")):
            kind = resolve_explainer(name)
            maps_Bhw = xaibatch.explain(
                classifier, image_CHW[None], name, explained, seed=seed, image_ids=[path.name], resolution="native"
            )
            where = output / f"{path.stem}.{name.replace(':', '-')}.png"
            write_overlay(
                where,
                image_HW=grey_image(image_CHW.numpy(), preprocessing.mean, preprocessing.std),
                map_hw=maps_Bhw[0].numpy(),
                title=f"{classifier.class_names[explained]} (p = {float(probabilities_K[explained]):.2f})",
                subtitle=kind.title,
                signed=kind.signed,
            )
            print(where)
    for line in failed:
        typer.echo(f"error: {line}", err=True)
    if failed:
        raise SystemExit(1)
