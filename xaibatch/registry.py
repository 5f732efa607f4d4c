"""Registries of named things: a dict and a decorator beside the classes; unknown names list the known ones."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from xaibatch.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes of one kind (`explainer`, `metric`).

    >>> colours: Registry[type] = Registry("colour")
    >>> @colours.register("red")
    ... class Red: ...
    >>> colours["red"].__name__, "red" in colours, sorted(colours)
    ('Red', True, ['red'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._items) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
