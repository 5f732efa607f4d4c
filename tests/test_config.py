"""The configuration: names and settings reach their methods, a mistake is one line, presets are listed and valid."""

from pathlib import Path

import pytest

from tests.toy import MODEL
from xaibatch.cli import main
from xaibatch.cli.evaluate import FIRST_RUN, config_path, named_configs
from xaibatch.config import ALIASES, load_config, parse_setting, select
from xaibatch.errors import ConfigError, UnknownNameError, UsageError
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.models.load import load_model


@pytest.mark.parametrize("written", ["[lime, random]", "lime, random", "{lime: , random: {}}", "[lime: {}, random]"])
def test_explainers_may_be_a_list_of_names(written: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"explainers: {written}\n")
    assert load_config(path).explainers == {"lime": {}, "random": {}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"explainers: {lime: 5}", "explainers.lime: expected options"),
        (b"explainers: 5", "explainers: expected names"),
        (b"explainers: [lime, lime]", "'lime' is named twice"),
        (b"metrics: [3]", "expected the name of a method, received 3"),
        (b"output: caf\xe9", "cannot read the configuration"),
        (b"model: {pretrained: true, untrained: true}", "configuration: model: pretrained and untrained exclude"),
    ],
)
def test_configuration_errors_are_one_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and "Value error" not in str(caught.value)


def test_a_record_s_own_check_reads_as_a_sentence() -> None:
    changed = {"std": (0.0, 0.1, 0.2)}
    with pytest.raises(ConfigError) as caught:
        load_model(MODEL["model.name"], model_options=MODEL["model.options"], preprocessing=changed)
    assert "Value error" not in str(caught.value) and ": :" not in str(caught.value)
    assert str(caught.value).startswith("preprocessing: ") and "{" not in str(caught.value)


def test_settings_reach_methods_whose_names_hold_dots() -> None:
    """A plug-in's `package.module:name` is one part of a key, before and after it is configured."""
    settings = {"explainers.my.pkg:maps.radius": 2, "explainers.my.pkg:maps.steps.first": 1, "metrics.a.b:C": {"x": 1}}
    config = load_config(None, settings)
    assert config.explainers == {"my.pkg:maps": {"radius": 2, "steps": {"first": 1}}}
    assert config.metrics == {"a.b:C": {"x": 1}}
    assert load_config(
        None, {"explainers": {"v1.2": {"use": "lime"}}, "explainers.v1.2.num_samples": 9}
    ).explainers == {"v1.2": {"use": "lime", "num_samples": 9}}


def test_an_alias_takes_the_preset_s_options() -> None:
    """Bare `attention_rollout` under the study's protocol is the study's rollout, not the default one."""
    paper = load_config(config_path("paper"), {"explainers.attention_rollout.discard_ratio": 0.25})
    chosen = select(paper, paper, explainers=["attention_rollout"]).explainers
    assert chosen == {"attention_rollout_mean": {"normalisation": "study", "discard_ratio": 0.25}}
    floor = load_config(config_path("paper"), dict([parse_setting("explainers.random={}")])).explainers
    assert floor == {**load_config(config_path("paper")).explainers, "random": {}}  # as paper.yaml's head has it
    for alias, name in ALIASES.items():
        assert resolve_explainer(alias) is resolve_explainer(name)


def test_a_share_of_more_than_one_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole number"):
        load_config(None, {"engine.gpus_per_replica": 1.5})


def test_a_setting_of_a_name_that_is_not_listed_is_refused() -> None:
    """Its options would have no effect."""
    base = load_config(config_path("default"))
    mistaken = load_config(config_path("default"), {"explainers.lmie.num_samples": 20})
    with pytest.raises(UnknownNameError, match=r"--set explainers 'lmie'. Did you mean 'lime'"):
        select(mistaken, base, explainers=["lime", "random"])
    other = load_config(config_path("default"), {"explainers.lime.num_samples": 20, "metrics.sparseness.abs": True})
    with pytest.raises(UsageError, match=r"--set explainers.lime: not among --explainers random"):
        select(other, base, explainers=["random"])
    assert list(select(other, base, explainers=["random", "lime"]).explainers) == ["random", "lime"]
    assert list(select(base, base, explainers=["random"], metrics=["sparseness"]).explainers) == ["random"]
    first = load_config(config_path("embedded"), FIRST_RUN)  # its own settings are no one's mistake
    assert list(select(first, first, explainers=["random"]).explainers) == ["random"]


def test_named_configurations_are_listed_and_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """`xaibatch list configs` shows what --config takes by name; other YAML files in jobs/ are none of them."""
    with pytest.raises(SystemExit) as exit_:
        main(["list", "configs"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert list(named_configs()) == ["default", "embedded", "paper"]
    assert all(f" {name} " in shown for name in named_configs()) and "rayjob" not in shown
    with pytest.raises(ConfigError, match="one of default, embedded, paper"):
        config_path("rayjob")
