"""`xaibatch list explainers | metrics | configs`: what there is, from what each method says of itself."""

from enum import StrEnum

import typer
from rich.console import Console
from rich.table import Table


class What(StrEnum):
    """What can be listed."""

    explainers = "explainers"
    metrics = "metrics"
    configs = "configs"


def add_to(app: typer.Typer) -> None:
    app.command("list")(list_)


def list_(what: What) -> None:
    """Each method's paper, direction or sign, cost in forward passes and needs; or the named configurations."""
    table = {What.explainers: _explainers, What.metrics: _metrics, What.configs: _configs}[what]()
    console = Console()
    Console(width=console.width if console.is_terminal else 220).print(table)


def _explainers() -> Table:
    import xaibatch.explainers  # noqa: F401  registers the built-in explainers
    from xaibatch.explainers.base import EXPLAINERS

    table = Table("name", "title", "paper", "sign", "granularity", "cost per image", "needs", title="explainers")
    needs = {"vit": "plain timm ViT", "gradients": "gradients", "any": "any timm classifier"}
    for name in EXPLAINERS:
        explainer = EXPLAINERS[name]()
        sign = "signed" if explainer.signed else "positive"
        table.add_row(
            name,
            explainer.title,
            explainer.paper,
            sign,
            explainer.granularity,
            explainer.cost(),
            needs[explainer.needs],
        )
    table.caption = (
        "also: captum:<Class>, zennit:<composite> (convolutional models), package.module:function, "
        "entry points of the group xaibatch.explainers"
    )
    return table


def _metrics() -> Table:
    import xaibatch.metrics  # noqa: F401  registers the built-in metrics
    from xaibatch.metrics.base import METRICS

    table = Table("name", "title", "paper", "better", "range", "forward passes", "needs", title="metrics")
    for name in METRICS:
        metric = METRICS[name]()
        direction = {True: "higher ↑", False: "lower ↓", None: "-"}[metric.higher_is_better]
        low, high = (f"{bound:g}" for bound in metric.bounds)
        table.add_row(
            name,
            metric.title,
            metric.paper,
            direction,
            f"{low} .. {high}",
            metric.cost(),
            ", ".join(sorted(metric.needs)) or "map",
        )
    table.caption = (
        "also: quantus:<Class> with its keyword arguments (stock Quantus), package.module:Class, "
        "entry points of the group xaibatch.metrics. Sufficiency compares images with each other and so has no form of "
        "its own here: quantus:Sufficiency depends on how the images are cut into shards"
    )
    return table


def _configs() -> Table:
    from xaibatch.cli.evaluate import named_configs
    from xaibatch.config import load_config

    table = Table("name", "explainers", "metrics", "file", title="configurations (--config NAME)")
    for name, path in named_configs().items():
        config = load_config(path)
        table.add_row(name, ", ".join(config.explainers), ", ".join(config.metrics), str(path))
    return table
