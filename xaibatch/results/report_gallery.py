"""A run and its study in, the chosen images with their pixels and maps out: what report and export show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from xaibatch.options import Options
from xaibatch.results.frames import Run
from xaibatch.results.report_choice import Choice, best_and_worst, disagreements, typical
from xaibatch.results.report_figure import Material, outline_of
from xaibatch.results.report_images import load_maps, load_pictures
from xaibatch.results.study import Study
from xaibatch.results.summary import column_digits
from xaibatch.seeding import keyed_generator

EXPLAINED: Mapping[str, str] = {
    "predicted": "Where an explainer tells classes apart, its map explains the class that the model predicts for that "
    "image; p is its probability.",
    "label": "Where an explainer tells classes apart, its map explains the true class of the image; p is the "
    "probability of the predicted one.",
}
"""What the pictures are of, by the run's `target`."""


class ReportOptions(Options):
    """How much a report shows."""

    num_typical: int = Field(default=6, ge=1)
    """Columns of the figure, shared out evenly over the classes."""

    num_extreme: int = Field(default=3, ge=1)
    """Best cases, and as many worst ones."""

    num_disputed: int = Field(default=6, ge=0)
    """Images on which explainers disagree."""

    max_pixels: int = Field(default=500, ge=0)
    """Images whose pixels are embedded for the browser, about 3 kB each."""

    max_maps: int = Field(default=2000, ge=1)
    """Images whose maps are embedded for the browser, about 0.3 kB each and explainer; at least those with pixels. All
    images are listed with all their scores, 5 bytes a score."""

    thumbnail: int = Field(default=160, ge=32)
    """Longer side of an embedded radiograph in the browser, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """choices: typical images first, then extreme and disputed ones, none empty; with_maps: ids whose maps the browser
    has; with_pixels: those of them whose pixels are embedded; notes: what the reader must know about missing pixels."""

    choices: tuple[Choice, ...]
    material: Material
    with_maps: tuple[str, ...]
    with_pixels: tuple[str, ...]
    notes: tuple[str, ...]


def make_gallery(run: Run, made: Study, options: ReportOptions) -> Gallery:
    """Choose the images, read their pixels again and their maps from the run."""
    cube = made.cube
    choices = [typical(cube, options.num_typical, made.floor), best_and_worst(cube, options.num_extreme, made.floor)]
    leading = [i for choice in choices if choice for i in choice.image_ids]
    with_maps = chosen_images(cube.image_ids, leading, max(options.max_maps, options.max_pixels), made.seed)
    maps = load_maps(run, with_maps)
    choices.append(disagreements(cube, maps, options.num_disputed, made.floor))
    kept = tuple(choice for choice in choices if choice is not None and choice.image_ids)
    shown = list(dict.fromkeys(i for choice in kept for i in choice.image_ids))
    with_pixels = chosen_images(with_maps, shown, options.max_pixels, made.seed)
    pictures = load_pictures(run, [*shown, *with_pixels])
    rows = run.predictions.arrow(["image_id", "predicted", "probabilities"]).to_pylist()
    entries = run.record.get("explainers", {})
    averaged = frozenset(e for e in cube.explainers if entries.get(e, {}).get("granularity", "token") != "token")
    upsampling = run.config.get("maps", {}).get("upsampling", "bilinear")
    summaries = made.summaries[made.groups[0].title]
    material = Material(
        cube=cube,
        pictures=pictures.found,
        maps=maps,
        probabilities=probabilities_of(rows, tuple(run.record.get("model", {}).get("class_names", ()))),
        titles=made.titles,
        signed=made.signed,
        digits={m.label: column_digits([summaries[e, m.label] for e in cube.explainers]) for m in cube.metrics},
        upsampling={e: "nearest" if e in averaged else upsampling for e in cube.explainers},
        averaged=averaged,
        explained=EXPLAINED.get(str(run.config.get("target")), ""),
        outline=outline_of(pictures.found.values()),
    )
    return Gallery(
        choices=kept,
        material=material,
        with_maps=tuple(with_maps),
        with_pixels=tuple(with_pixels),
        notes=pictures.notes,
    )


def chosen_images(image_ids: Sequence[str], first: Sequence[str], limit: int, seed: int) -> list[str]:
    """At most `limit` images: those of `first`, then a seeded sample of the others; in the order of `image_ids`."""
    if len(image_ids) <= limit:
        return list(image_ids)
    leading = list(dict.fromkeys(first))[:limit]
    others = sorted(set(image_ids) - set(leading))
    drawn = keyed_generator(seed, "", "report").permutation(len(others))[: limit - len(leading)]
    chosen = {*leading, *(others[k] for k in drawn)}
    return [image_id for image_id in image_ids if image_id in chosen]


def probabilities_of(rows: Sequence[Mapping[str, object]], class_names: Sequence[str]) -> dict[str, float]:
    """Probability of the predicted class, or of a model's only one, by image id, from rows of `predictions`."""
    found = {}
    for row in rows:
        values, name = row["probabilities"], class_names[0] if len(class_names) == 1 else row["predicted"]
        if isinstance(values, list) and name in class_names:
            found[str(row["image_id"])] = float(values[list(class_names).index(str(name))])
    return found
