"""The tree of errors that people see: each arrives whole in another process."""

import pickle
from collections.abc import Iterator

import pytest

from xaibatch import errors
from xaibatch.errors import ChangedWeightsError, NotScoredError, StoppedError, UnknownNameError, XaibatchError

MADE = {
    ChangedWeightsError: lambda: ChangedWeightsError("model.pt", "0" * 64, "1" * 64),
    UnknownNameError: lambda: UnknownNameError("explainer", "lume", ["lime", "random"]),
    NotScoredError: lambda: NotScoredError("missing_label", "there is none"),
    StoppedError: lambda: StoppedError("stopped by SIGTERM", 15),
}


def tree(kind: type[XaibatchError]) -> Iterator[type[XaibatchError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("kind", [kind for kind in tree(XaibatchError) if kind.__module__ == errors.__name__])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind: type[XaibatchError], protocol: int) -> None:
    """With its kind, text, exit code and attributes."""
    error = MADE[kind]() if kind in MADE else kind("what was received, expected, to do")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind and str(again) == str(error) and again.args == error.args
    assert again.exit_code == error.exit_code and vars(again) == vars(error)
