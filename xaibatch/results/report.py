"""A run in, one self-contained HTML file out: works offline, loads nothing, and says what it could not show.

Statistics come from `study`, figures from `figures` (as SVG), pictures from the run's data set, which is read again;
the templates lie in `templates/`.
"""

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from xaibatch.data.storage import is_remote
from xaibatch.results import captions, figures, report_tables
from xaibatch.results.cube import ScoreCube
from xaibatch.results.frames import Run, open_run
from xaibatch.results.overlay import KEY_ENDS, key_colours
from xaibatch.results.parts import RunFolder
from xaibatch.results.report_browser import browser_json
from xaibatch.results.report_facts import facts, failure_lines, notices
from xaibatch.results.report_figure import averaged_note, tile_grid
from xaibatch.results.report_findings import findings
from xaibatch.results.report_gallery import Gallery, ReportOptions, make_gallery
from xaibatch.results.study import Study, make_study, too_many_tests
from xaibatch.results.summary import ALIKE, counted

REPORT = "report.html"


def write_report(url: str, output: str | Path | None = None, options: ReportOptions | None = None) -> str:
    """Write the report into the run's folder (`report.html`) or to `output`, a file or any URL; returns where it is.

    Raises RunFolderError for a folder without a run or without scores. Images that can no longer be read are replaced
    by their maps alone, and the report says so.
    """
    run = open_run(url)
    content = render_report(run, options or ReportOptions()).encode()
    if output is None:
        run.folder.write_bytes(content, REPORT)
        return report_url(run.folder)
    if is_remote(str(output)):
        folder, _, name = str(output).rpartition("/")
        RunFolder(folder).write_bytes(content, name)
        return str(output)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return str(target)


def report_url(folder: RunFolder) -> str:
    """Where a run's own report is: a path, or a URL where the folder is one."""
    return folder.path(REPORT) if folder.is_local else f"{folder.url.rstrip('/')}/{REPORT}"


def has_report(run: Run) -> bool:
    """Whether the run's folder holds the report of the run as it is, and not one that was made before it ended."""
    return run.folder.exists(REPORT) and _stamp(run).encode() in run.folder.read_bytes(REPORT)


def _stamp(run: Run) -> str:
    """A line of the page that tells a finished run's report from earlier ones."""
    return f'<meta name="xaibatch-run-finished" content="{html.escape(str(run.record.get("finished") or "no"))}">'


def render_report(run: Run, options: ReportOptions) -> str:
    """The report as HTML text; the same run gives the same text."""
    made = make_study(run)
    gallery = make_gallery(run, made, options)
    predictions = run.predictions.arrow()
    class_names = tuple(run.record.get("model", {}).get("class_names", ()))
    seen = {*gallery.with_pixels} & {*gallery.material.pictures}
    context = {
        **_text_context(run, made, gallery.notes),
        **_picture_context(made, gallery),
        "sanity": report_tables.sanity(predictions, class_names, seed=made.seed),
        "browser_note": " ".join(
            [_browser_note(made.cube.num_images, len(gallery.with_maps), len(seen)), averaged_note(gallery.material)]
        ).strip(),
        "data": browser_json(
            gallery.material, gallery.with_maps, gallery.with_pixels, side=options.thumbnail, floor=made.floor
        ),
    }
    return _template("report.html.j2").render(context)


def _text_context(run: Run, made: Study, image_notes: tuple[str, ...]) -> dict[str, Any]:
    cube, record = made.cube, run.record
    everything = made.groups[0].title
    pairs = made.pairs[everything]
    by_metric = {m.label: m for m in cube.metrics}
    model = record.get("model", {}).get("name", "a model")
    written_by = " ".join(["Written by xaibatch", record.get("versions", {}).get("xaibatch", "")]).strip() + "."
    return {
        "css": _asset("report.css"),
        "js": _asset("report.js"),
        "stamp": _stamp(run),
        "title": f"{run.name}: explanations of {model}",
        "heading": f"Explanations of {model}",
        "lead": f"Run {run.name}: {counted(cube).split(',')[0]}, {len(cube.explainers)} explainers, "
        f"{len(cube.metrics)} metrics",
        "notices": [*notices(run, cube), *_tests_notice(made), *image_notes],
        "findings": findings(
            cube,
            made.summaries[everything],
            pairs,
            made.marks[everything],
            made.agreement,
            made.floor,
            made.titles,
        ),
        "num_tests": next((c.num_tests for c in pairs.values()), 0),
        "counted": counted(cube),
        "floor": made.floor,
        "undirected": any(not metric.sign for metric in cube.metrics),
        "alike": ALIKE
        if any(s.alike and s.num_scored for found in made.summaries.values() for s in found.values())
        or any(c.alike for c in pairs.values())
        else "",
        "scored_note": _scored_note(cube),
        "score_tables": [
            report_tables.score_table(cube, g, made.summaries[g.title], made.marks[g.title], made.titles)
            for g in made.groups
        ],
        "missing": report_tables.missing_table(cube, made.titles),
        "matrices": [report_tables.matrix(pairs, m, cube.explainers, made.titles) for m in cube.metrics],
        "pairs": report_tables.pair_table(pairs, by_metric, made.titles),
        "noise": report_tables.noise_table(made.noise, cube, made.titles) if made.noise else {"rows": ()},
        "agreement": report_tables.agreement_table(made.agreement, by_metric) if made.agreement else None,
        "facts": facts(run),
        "explainer_facts": report_tables.facts_table("Explainers", record.get("explainers", {}), _EXPLAINER_FACTS),
        "metric_facts": report_tables.facts_table("Metrics", record.get("metrics", {}), _METRIC_FACTS),
        "failures": failure_lines(run),
        "record_json": json.dumps(record, indent=1, ensure_ascii=False),
        "footer": f"{written_by} This file is complete in itself and loads nothing.",
    }


def _picture_context(made: Study, gallery: Gallery) -> dict[str, Any]:
    cube, everything = made.cube, made.groups[0].title
    by_metric = {m.label: m for m in cube.metrics}
    by_label = [g for g in made.groups if g.kind == "label"]
    grids = [tile_grid(choice, gallery.material) for choice in gallery.choices]
    context: dict[str, Any] = {
        "figure": grids[0] if grids else None,
        "cases": grids[1:],
        "colour_key": _colour_key(set(made.signed.values())),
        "explained": gallery.material.explained,
        "interval_caption": captions.intervals(
            made.summaries[everything].values(), made.marks[everything].values(), floor=made.floor is not None
        ),
        "distribution_caption": captions.DISTRIBUTIONS,
        "interval_svg": figures.svg(
            figures.interval_figure(cube, made.summaries[everything], made.marks[everything], made.floor, made.titles)
        ),
        "distribution_svg": figures.svg(figures.distribution_figure(cube, by_label, made.titles, made.floor))
        if by_label
        else None,
        "rank_svg": None,
    }
    if made.rankings:
        context["rank_caption"] = captions.RANKS
        context["critical_caption"] = captions.CRITICAL_DIFFERENCES
        context["critical_svg"] = figures.svg(figures.critical_difference_figure(made.rankings, by_metric, made.titles))
        context["rank_svg"] = figures.svg(figures.rank_figure(made.rankings, by_metric, made.titles))
    context["sections"] = [
        (anchor, name)
        for anchor, name in (
            ("findings", "Findings"), ("figure", "Figure"), ("scores", "Scores"), ("differences", "Differences"),
            ("ranks", "Ranks"), ("distributions", "Distributions"), ("cases", "Cases"), ("model", "Model"),
            ("browser", "All images"), ("run", "What was run"),
        )
        if (anchor != "figure" or grids) and (anchor != "ranks" or made.rankings)
    ]  # fmt: skip
    return context


_EXPLAINER_FACTS = (
    ("title", "method"), ("paper", "paper"), ("granularity", "granularity"), ("signed", "signed"),
    ("random", "draws random numbers"), ("cost", "cost"), ("options", "options"),
)  # fmt: skip
_METRIC_FACTS = (
    ("title", "metric"), ("family", "family"), ("paper", "paper"), ("higher_is_better", "higher is better"),
    ("bounds", "bounds"), ("options", "options"),
)  # fmt: skip


def _tests_notice(made: Study) -> list[str]:
    text = too_many_tests(made.pairs, made.cube.num_patients)
    return [f"{text[0].upper()}{text[1:]}."] if text else []


def _scored_note(cube: ScoreCube) -> str:
    missing = sum(n for statuses in cube.statuses.values() for s, n in statuses.items() if s != "ok")
    return "" if missing else "Every image was scored."


def _browser_note(num_images: int, num_maps: int, num_pixels: int) -> str:
    """What the browser has and what was left out of it."""
    text = f"All {num_images:,} images are listed with all their scores"
    if num_pixels == num_images:
        return f"{text}, maps and pixels. Choose one to see all its maps."
    maps = (
        "all"
        if num_maps == num_images
        else f"{num_maps:,} images (those shown above and a random sample of the others)"
    )
    return (
        f"{text}. The file holds the maps of {maps} and the pixels of {num_pixels:,}; a map without its pixels is "
        "drawn on black. `xaibatch report --images N --maps N` embeds more."
    )


def _colour_key(signed: set[bool]) -> str:
    """The colour bars of the overlays as CSS gradients over mid-grey."""
    keys = []
    for kind in sorted(signed):
        stops = ",".join(f"rgb({','.join(str(round(255 * part)) for part in rgb)})" for rgb in key_colours(kind, 21))
        low, high = (html.escape(end) for end in KEY_ENDS[kind])
        keys.append(f'<span>{low}<i style="background:linear-gradient(90deg,{stops})"></i>{high}</span>')
    return f'<p class="key">{"".join(keys)}</p>'


def _asset(name: str) -> str:
    return files("xaibatch.results").joinpath("templates", name).read_text("utf-8")


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset(name))
