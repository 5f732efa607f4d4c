"""`xaibatch train`: a folder or manifest in, a checkpoint that `xaibatch evaluate` takes, metrics and a picture out."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from xaibatch.cli.output import check_without_ray
from xaibatch.errors import ConfigError

Option = typer.Option


def add_to(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    data: Annotated[
        str | None, Option(help="folder (train/CLASS/..., val/CLASS/...) or manifest with a column split")
    ] = None,
    output: Annotated[
        str | None, Option("--output", "-o", help="folder of the run; the same call again resumes")
    ] = None,
    config: Annotated[Path | None, Option("--config", "-c", help="YAML file of options; flags win")] = None,
    model: Annotated[str | None, Option(help="any timm ViT, e.g. vit_tiny_patch16_224")] = None,
    pretrained: Annotated[bool, Option("--pretrained", help="start from timm's own weights")] = False,
    checkpoint: Annotated[str | None, Option(help="start from these weights: local path or URL")] = None,
    epochs: Annotated[int | None, Option(min=1)] = None,
    max_minutes: Annotated[
        float | None, Option(help="end after this wall time; the schedule follows the clock")
    ] = None,
    batch_size: Annotated[int | None, Option(min=1, help="images a step, over all workers")] = None,
    learning_rate: Annotated[float | None, Option(help="peak of the warm-up and cosine")] = None,
    seed: Annotated[int | None, Option(help="seed of initial weights and every random draw")] = None,
    num_workers: Annotated[int | None, Option(min=1, help="processes: one a GPU, or one or more on CPUs")] = None,
    cpus_per_worker: Annotated[int | None, Option(min=1, help="CPU threads of each")] = None,
    set_: Annotated[list[str] | None, Option("--set", help="any option: augmentation.mirror_probability=0.5")] = None,
    address: Annotated[str | None, Option(help="Ray cluster to join")] = None,
    no_ray: Annotated[bool, Option("--no-ray", help="train in this process, on one device")] = False,
) -> None:
    """Train or fine-tune a timm Vision Transformer on radiographs."""
    flags = {
        "data": data, "output": output, "model": model, "pretrained": pretrained or None, "checkpoint": checkpoint,
        "epochs": epochs, "max_minutes": max_minutes, "batch_size": batch_size, "learning_rate": learning_rate,
        "seed": seed, "num_workers": num_workers, "cpus_per_worker": cpus_per_worker,
    }  # fmt: skip
    options = options_from(config, {name: value for name, value in flags.items() if value is not None}, set_ or [])
    if no_ray:
        check_without_ray([] if address is None else ["--address"])
        from xaibatch.training.alone import train_alone

        train_alone(options)
    else:
        from xaibatch.cluster.train import train_on_ray

        train_on_ray(options, address=address)
    made = shlex.quote(f"{options.output}/model.safetensors")
    print(f"evaluate it: xaibatch evaluate --model {options.model} --checkpoint {made}")


def options_from(config: Path | None, flags: dict[str, Any], settings: list[str]) -> Any:
    """File, then --set, then flags, to TrainOptions; raises ConfigError for unknown keys and impossible values."""
    from xaibatch.cli.output import local_folder
    from xaibatch.config import parse_setting, read_yaml, set_value
    from xaibatch.options import validated
    from xaibatch.training.options import TrainOptions

    values = {} if config is None else read_yaml(config)
    for text in settings:
        set_value(values, *parse_setting(text))
    values |= flags
    for needed in ("data", "output"):
        if needed not in values:
            raise ConfigError(f"training needs --{needed}")
    values["output"] = str(local_folder(str(values["output"])))
    return validated(TrainOptions, values, "training")
