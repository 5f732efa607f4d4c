"""Run folders made of known numbers, for the tests of everything that reads one: who is better, by how much, and
where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from xaibatch.results.parts import RunFolder
from xaibatch.results.schema import FAILURES, MAPS, PREDICTIONS, SCORES

CLASSES = ("COVID-19", "Normal", "Pneumonia")


def _explainer(
    title: str, granularity: str, *, signed: bool = False, random: bool = False, method: str
) -> dict[str, Any]:
    return {
        "method": method,
        "title": title,
        "signed": signed,
        "granularity": granularity,
        "random": random,
        "paper": "-",
    }


def _metric(title: str, higher: bool, low: float, high: float | None, family: str) -> dict[str, Any]:
    return {"title": title, "higher_is_better": higher, "bounds": [low, high], "family": family, "paper": "-"}


EXPLAINERS: Mapping[str, Mapping[str, Any]] = {
    "transformer_lrp": _explainer("TransformerLRP", "token", method="transformer_lrp"),
    "attn_lrp": _explainer("AttnLRP", "token", signed=True, method="attn_lrp"),
    "lime": _explainer("LIME", "segment", random=True, method="lime"),
    "rollout": _explainer("Attention rollout", "token", method="rollout"),
    "random": _explainer("Random map", "token", random=True, method="random"),
}

METRICS: Mapping[str, Mapping[str, Any]] = {
    "faithfulness_correlation": _metric("Faithfulness correlation", True, -1.0, 1.0, "faithfulness"),
    "average_sensitivity": _metric("Average sensitivity", False, 0.0, None, "robustness"),
    "effective_complexity": _metric("Effective complexity", False, 0.0, 50176.0, "complexity"),
    "pointing_game": _metric("Pointing game", True, 0.0, 1.0, "localisation"),
}

MEANS = {
    "faithfulness_correlation": {
        "transformer_lrp": 0.47,
        "attn_lrp": 0.45,
        "lime": 0.35,
        "rollout": 0.12,
        "random": 0.0,
    },
    "average_sensitivity": {"transformer_lrp": 0.34, "attn_lrp": 0.36, "lime": 0.55, "rollout": 0.05, "random": 0.9},
    "effective_complexity": {
        "transformer_lrp": 30000.0,
        "attn_lrp": 31000.0,
        "lime": 9000.0,
        "rollout": 45000.0,
        "random": 49000.0,
    },
    "pointing_game": {"transformer_lrp": 0.8, "attn_lrp": 0.75, "lime": 0.6, "rollout": 0.35, "random": 0.3},
}
SPREADS = {"faithfulness_correlation": 0.12, "average_sensitivity": 0.1, "effective_complexity": 4000.0}


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a synthetic run holds. `images_per_patient` images share a patient and half of their noise."""

    num_images: int = 36
    images_per_patient: int = 1
    repeats: int = 1
    shard_size: int = 16
    seed: int = 0
    explainers: Sequence[str] = tuple(EXPLAINERS)
    metrics: Sequence[str] = tuple(METRICS)
    shifts: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(explainer, metric) -> added to each image's score, give or take a third."""
    lesion_only: frozenset[str] = frozenset({"pointing_game"})
    """Metrics that need a mask, which Normal images have not."""
    synthetic: bool = False
    pixels: str = ""
    """Folder to write radiographs, lesion masks, twins and a manifest into; empty: the run's images cannot be had."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Image number -> file name, where not its number."""


def make_run(url: str | Path, design: Design | None = None) -> dict[str, Any]:
    """Write images (grey squares with a bright disc), run.json and all parts; returns the record."""
    design = design or Design()
    folder = RunFolder(str(url))
    folder.create()
    images = image_facts(design)
    if design.pixels:
        write_images(Path(design.pixels), images)
    record = make_record(folder, design, images)
    folder.write_json(record, "run.json")
    for start in range(0, design.num_images, design.shard_size):
        shard = f"shard-{start // design.shard_size:05d}"
        chunk = images[start : start + design.shard_size]
        folder.write_part("predictions", shard, predictions(folder.name, chunk))
        folder.write_part("maps", shard, maps(folder.name, chunk, design))
        for metric in design.metrics:
            folder.write_part("scores", f"{metric}/{shard}", scores(folder.name, chunk, design, metric))
    failure = {
        "run": folder.name,
        "image_id": "Normal/broken.png",
        "stage": "read",
        "error": "ImageError",
        "message": "the file is empty",
    }
    folder.write_part("failures", "shard-00000", pa.Table.from_pylist([failure], schema=FAILURES))
    return record


def image_facts(design: Design) -> list[dict[str, Any]]:
    facts = []
    for i in range(design.num_images):
        label = CLASSES[(i // max(design.images_per_patient, 1)) % 3]
        draws = np.random.default_rng([design.seed, i, 1])
        predicted = label if draws.random() < 0.85 else CLASSES[int(draws.integers(3))]
        facts.append(
            {
                "image_id": f"{label}/{design.names.get(i, f'{i:05d}.png')}",
                "patient": f"p{i // design.images_per_patient:04d}" if design.images_per_patient > 1 else None,
                "label": label,
                "predicted": predicted,
                "number": i,
                "centre": (int(draws.integers(3, 11)), int(draws.integers(3, 11))),
            }
        )
    return sorted(facts, key=lambda fact: fact["image_id"])


def write_images(folder: Path, images: Sequence[Mapping[str, Any]]) -> None:
    """Two dark lungs on grey; images that are not Normal have a bright disc where their maps are brightest."""
    rows, columns = np.mgrid[:96, :96]
    lungs = ((rows - 48) / 34) ** 2 + ((abs(columns - 48) - 18) / 15) ** 2 < 1
    lines = ["image_id,path,label,patient,mask_lesion,twin"]
    for kind in ("images", "masks", "twins"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for fact in images:
        number, (y, x) = fact["number"], fact["centre"]
        disc = (rows - (y + 0.5) * 96 / 14) ** 2 + (columns - (x + 0.5) * 96 / 14) ** 2 < 100
        twin = np.where(lungs, 60, 150) + np.random.default_rng([13, number]).normal(0, 6, lungs.shape)
        has_lesion = fact["label"] != "Normal"
        grey = {"images": twin + 80 * (disc & has_lesion), "twins": twin, "masks": 255.0 * disc}
        for kind, values in grey.items():
            if kind != "masks" or has_lesion:
                Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{number}.png")
        mask = f"masks/{number}.png" if has_lesion else ""
        identity = '"' + fact["image_id"].replace('"', '""') + '"'
        lines.append(
            f"{identity},images/{number}.png,{fact['label']},{fact['patient'] or ''},{mask},twins/{number}.png"
        )
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def make_record(folder: RunFolder, design: Design, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    patients = {fact["patient"] for fact in images} - {None}
    return {
        "format": 1,
        "run": folder.name,
        "status": "finished",
        "created": "2026-01-02T03:04:05+00:00",
        "digest": "0" * 64,
        "config": {"seed": design.seed, "repeats": design.repeats, "target": "predicted",
                   "model": {"name": "vit_tiny_patch16_224"}, "data": {"path": None},
                   "maps": {"upsampling": "bilinear", "normalise": "none"}},
        "model": {"name": "vit_tiny_patch16_224", "class_names": list(CLASSES), "patch_size": 16, "checksum": "ab" * 32,
                  "preprocessing": {"image_size": [96, 96], "resize_short": 96}},
        "data": {"path": design.pixels or None, "root": design.pixels, "layout": "manifest",
                 "num_images": len(images), "num_patients": len(patients) or None,
                 "classes": {name: sum(f["label"] == name for f in images) for name in CLASSES}, "checksum": "cd" * 32,
                 "synthetic": design.synthetic},
        "explainers": {label: dict(EXPLAINERS[label]) for label in design.explainers},
        "metrics": {label: dict(METRICS[label]) for label in design.metrics},
        "precision": {"chosen": {}},
        "versions": {"xaibatch": "0.1.0", "python": "3.11.0", "torch": "2.15.0", "timm": "1.0.31"},
        "code": {},
        "sessions": [],
    }  # fmt: skip


def predictions(run: str, images: Sequence[Mapping[str, Any]]) -> pa.Table:
    rows = []
    for fact in images:
        draws = np.random.default_rng([7, fact["number"]])
        logits = draws.normal(size=3)
        best = CLASSES.index(fact["predicted"])
        logits[best] = logits.max() + draws.exponential(1.5)
        probabilities = np.exp(logits - logits.max())
        rows.append(
            {
                "run": run,
                "image_id": fact["image_id"],
                "patient": fact["patient"],
                "label": fact["label"],
                "predicted": fact["predicted"],
                "correct": fact["label"] == fact["predicted"],
                "probabilities": (probabilities / probabilities.sum()).tolist(),
                "logits": logits.tolist(),
                "path": fact["image_id"],
            }
        )
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


def maps(run: str, images: Sequence[Mapping[str, Any]], design: Design) -> pa.Table:
    rows = []
    grid_y, grid_x = np.mgrid[:14, :14]
    for fact in images:
        for e, label in enumerate(design.explainers):
            for repeat in range(design.repeats if EXPLAINERS[label]["random"] else 1):
                draws = np.random.default_rng([11, fact["number"], e, repeat])
                y, x = fact["centre"]
                bump = np.exp(-((grid_y - y) ** 2 + (grid_x - x) ** 2) / 8)
                grid = draws.random((14, 14)) if label == "random" else bump + 0.15 * draws.normal(size=(14, 14))
                grid = grid if EXPLAINERS[label]["signed"] else np.maximum(grid, 0)
                scale = float(np.abs(grid).max())
                rows.append(
                    {
                        "run": run, "image_id": fact["image_id"], "explainer": label, "repeat": repeat,
                        "target": fact["predicted"], "granularity": EXPLAINERS[label]["granularity"],
                        "rows": 14, "columns": 14,
                        "map": (grid / scale).astype(np.float16).ravel(), "scale": scale, "status": "ok",
                        "extras": [("r2", float(draws.random()))] if label == "lime" else [],
                    }
                )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=MAPS)


def scores(run: str, images: Sequence[Mapping[str, Any]], design: Design, metric: str) -> pa.Table:
    rows = []
    number = list(METRICS).index(metric)
    for fact in images:
        missing = metric in design.lesion_only and fact["label"] == "Normal"
        for explainer in design.explainers:
            for repeat in range(design.repeats):
                value = None if missing else draw_score(fact, design, explainer, metric, number, repeat)
                rows.append(
                    {
                        "run": run, "image_id": fact["image_id"], "patient": fact["patient"], "label": fact["label"],
                        "target": fact["predicted"], "predicted": fact["predicted"], "explainer": explainer,
                        "metric": metric,
                        "repeat": repeat, "score": value, "status": "missing_mask" if missing else "ok",
                        "reason": "the image has no 'lesion' mask" if missing else "",
                    }
                )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCORES)


def draw_score(fact: Mapping[str, Any], design: Design, explainer: str, metric: str, number: int, repeat: int) -> float:
    """Mean plus noise of the image (shared by all explainers), of the patient, of the explainer on it, and of the
    repeat."""
    place = list(EXPLAINERS).index(explainer)
    shift = design.shifts.get((explainer, metric), 0.0)
    mean = MEANS[metric][explainer] + shift * (1 + np.random.default_rng([17, fact["number"]]).normal() / 3)
    patient = fact["number"] // design.images_per_patient
    shared = np.random.default_rng([design.seed, 3, patient, number]).normal()
    own = np.random.default_rng([design.seed, 5, fact["number"], number, place]).normal()
    again = np.random.default_rng([design.seed, 9, fact["number"], number, place, repeat]).normal()
    noise = 0.5 * shared + 0.8 * own + (0.4 * again if EXPLAINERS[explainer]["random"] else 0.0)
    if metric == "pointing_game":
        return float(noise < 2.2 * (mean - 0.5) * 1.1)
    low, high = (v if v is not None else s * np.inf for s, v in zip((-1, 1), METRICS[metric]["bounds"], strict=True))
    return float(np.clip(mean + SPREADS[metric] * noise, low, high))
