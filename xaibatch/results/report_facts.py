"""A run's record in, what a reader must know before believing anything out: notices, facts, failures."""

from collections.abc import Iterator, Mapping
from typing import Any

from xaibatch.results.cube import ScoreCube, floor_explainer, is_synthetic, not_independent, unfinished
from xaibatch.results.frames import Run

MAX_FAILURES_LISTED = 50

_CLASSES_FROM_ELSEWHERE = {
    "the data": "class names were taken from the data in alphabetical order",
    "their indices": "its outputs are called by their numbers",
}
"""The record's `classes_from` where neither the caller nor the checkpoint names the classes."""


def notices(run: Run, cube: ScoreCube) -> Iterator[str]:
    """Sentences that belong above everything else: rendered images, unfinished runs, unreadable files, failures."""
    record = run.record
    if is_synthetic(record):
        yield (
            "The images are synthetic: rendered radiographs with simulated lesions. Intervals and p-values speak of "
            "the generator of images, not of patients."
        )
    for line in unfinished(record, cube):
        yield f"{line[0].upper()}{line[1:]}."
    failed = run.failures.arrow().num_rows
    if failed:
        yield f"{failed:,} {'entry' if failed == 1 else 'entries'} in the list of failures, below under “What was run”."
    if not cube.num_patients:
        yield (
            "Patients are unknown: images are resampled as if each were another patient. If they are not, the "
            "intervals are too narrow."
        )
    if dependent := not_independent(cube.metrics):
        yield f"{dependent}."
    if floor_explainer(cube.explainers, record) is None:
        yield "The run has no random map, so there is no floor that scores could be compared with."
    if mixed := _mixed_versions(record):
        yield f"Sessions of this run used different versions ({', '.join(mixed)}): its rows are of all of them."
    for path, problem in run.problems().items():
        yield f"Left out {path}: {problem}."
    yield from _data_notes(record)
    yield from _taken_from_elsewhere(record.get("model", {}))


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) pairs for a definition list."""
    record = run.record
    model, data, config = (record.get(key, {}) for key in ("model", "data", "config"))
    classes = ", ".join(f"{name} {number}" for name, number in (data.get("classes") or {}).items())
    found: list[tuple[str, Any]] = [
        ("run", run.name),
        ("made", " to ".join(str(record[key]) for key in ("created", "finished") if record.get(key))),
        ("model", model.get("name")),
        ("classes", ", ".join(model.get("class_names", ()))),
        ("weights", _source(model)),
        ("preprocessing", _flat(model.get("preprocessing", {}))),
        ("data", data.get("path") or data.get("root")),
        (
            "images",
            f"{data.get('num_images', 0):,}"
            + (f" of {data['num_patients']:,} patients" if data.get("num_patients") else ""),
        ),
        ("true classes", classes),
        ("data checksum", " of ".join(str(data[key]) for key in ("checksum", "checksum_of") if data.get(key))),
        ("explained class", config.get("target")),
        ("maps", _flat(config.get("maps", {}))),
        ("repeats", config.get("repeats")),
        ("seed", config.get("seed")),
        ("precision", _precision(record.get("precision", {}))),
        ("configuration hash", record.get("digest")),
        ("work", _work(record.get("sessions", ()))),
        ("versions", _flat(record.get("versions", {}))),
        ("code", _code(record.get("code", {}))),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "", {})]


def failure_lines(run: Run) -> list[str]:
    """One line a failure, the first MAX_FAILURES_LISTED."""
    rows = run.failures.arrow().sort_by("image_id").slice(0, MAX_FAILURES_LISTED + 1).to_pylist()
    lines = [f"{row['image_id']} ({row['stage']}): {row['message']}" for row in rows[:MAX_FAILURES_LISTED]]
    return [*lines, "and more: see the table `failures`"] if len(rows) > MAX_FAILURES_LISTED else lines


def _data_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """How the data set was read: files left out, findings chosen, columns not read. That images are synthetic is said
    already."""
    for note in record.get("data", {}).get("notes") or ():
        if "synthetic" not in note:
            yield f"Data: {note}."


def _taken_from_elsewhere(model: Mapping[str, Any]) -> Iterator[str]:
    """What a checkpoint does not record of itself."""
    source = model.get("source")
    if not isinstance(source, Mapping) or source.get("kind") != "checkpoint":
        return
    origin = _CLASSES_FROM_ELSEWHERE.get(str(source.get("classes_from")))
    if origin:
        yield (
            f"The checkpoint names no classes: {origin}, {', '.join(model.get('class_names', ()))}. Check that they "
            "are the model's own in this order: if not, every label and prediction here is wrong."
        )
    if model.get("preprocessing", {}).get("source") == "timm configuration":
        yield (
            "The checkpoint records no preprocessing: it was taken from timm's configuration. Check that it is the "
            "model's own (below under “What was run”): if not, predictions and scores are of images that the model "
            "was not trained for."
        )


def _mixed_versions(record: Mapping[str, Any]) -> list[str]:
    """What the sessions that did some work had in different versions: packages, Python, the platform, the code."""
    seen: dict[str, set[str]] = {}
    for session in record.get("sessions", ()):
        if session.get("num_cells"):
            versions = {**session.get("versions", {}), "code": session.get("code", {}).get("commit")}
            for name, version in versions.items():
                seen.setdefault(name, set()).add(str(version))
    return sorted(name for name, versions in seen.items() if len(versions) > 1)


def _source(model: Mapping[str, Any]) -> str:
    source = model.get("source") or {"checksum": model.get("checksum")}
    return _flat(source) if isinstance(source, Mapping) else str(source)


def _flat(entries: Mapping[str, Any]) -> str:
    """A mapping as one line.

    >>> _flat({"size": [224, 224], "grey": True, "none": None})
    'size 224 × 224, grey yes'
    """
    shown = []
    for key, value in entries.items():
        if value is None or value in ({}, [], ""):
            continue
        if isinstance(value, Mapping):
            text = f"({_flat(value)})"
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            text = " × ".join(map(str, value))
        else:
            text = str(value)
        shown.append(f"{str(key).replace('_', ' ')} {text}")
    return ", ".join(shown)


def _precision(precision: Mapping[str, Any]) -> str:
    chosen = precision.get("chosen", {})
    kinds = sorted(set(chosen.values()))
    return "; ".join(f"{kind}: {', '.join(label for label, k in chosen.items() if k == kind)}" for kind in kinds)


def _work(sessions: Any) -> str:
    if not sessions:
        return ""
    seconds = sum(float(session.get("seconds", 0)) for session in sessions)
    passes = sum(int(session.get("num_forward_passes", session.get("forward_passes", 0)) or 0) for session in sessions)
    text = f"{seconds:,.0f} s in {len(sessions)} session{'s' if len(sessions) > 1 else ''}"
    killed = sum(session.get("state") in ("killed", "running") for session in sessions)
    text += f" ({killed} killed: counted until shortly before)" if killed else ""
    return text + (f", {passes:,} forward passes" if passes else "")


def _code(code: Mapping[str, Any]) -> str:
    return (
        f"{code['commit'][:12]}{' with uncommitted changes' if code.get('dirty') else ''}" if code.get("commit") else ""
    )
