"""Option records: frozen, keyword-only, unknown keys refused with the nearest known name."""

from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from xaibatch.errors import ConfigError


class Options(BaseModel):
    """Base of every option record of an explainer, a metric or the run's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


OptionsT = TypeVar("OptionsT", bound=BaseModel)


def validated(model: type[OptionsT], values: dict[str, Any], where: str) -> OptionsT:
    """Check `values` against an option record; raise ConfigError in one readable line otherwise.

    >>> class Blur(Options):
    ...     sigma: float = 1.0
    >>> validated(Blur, {"sigmma": 2}, "explainer 'blur'")
    Traceback (most recent call last):
    xaibatch.errors.ConfigError: explainer 'blur': unknown option 'sigmma'. Did you mean 'sigma'? Known: sigma
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_line(model, item, where) for item in error.errors())) from None


def _line(model: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        known = _known(model, item["loc"][:-1])
        name = str(item["loc"][-1])
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown option {path!r}.{hint} Known: {', '.join(known) or 'none'}"
    place = f"{where}: {path}" if path else where
    if item["type"] == "value_error":  # a record's own check, whose message stands alone; pydantic puts its prefix
        received = "" if isinstance(item["input"], dict) else f" (received {item['input']!r})"
        return f"{place}: {item['ctx']['error']}{received}"
    return f"{place}: {item['msg']} (received {item['input']!r})"


def _known(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
