"""What a user sets for the plugin, and what is refused: no engine needed."""

import pytest

from flashhead_edge.errors import SettingsError
from flashhead_edge.integrations.vllm.settings import Settings, read_settings


@pytest.mark.parametrize("given", [{}, None, {"other": 1}, {"flashhead": {}}])
def test_nothing_set_is_the_default(given):
    assert read_settings(given) == Settings()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"enabled": "no"}, "enabled is 'no', expected true or false"),
        ({"crossover": 0}, "crossover is 0, expected auto, never or a batch from 1 on"),
        ({"crossover": "often"}, "crossover is 'often'"),
        ({"metrics_port": 70_000}, "metrics_port is 70000, expected 1 to 65535"),
        ({"score_all_rows": 1}, "score_all_rows is 1, expected true or false"),
        ({"exact_for": ["all"]}, r"exact_for is \('all',\), expected a list of constrained and logprobs"),
        ({"exact_for": "logprobs"}, "exact_for is 'logprobs', expected a list"),
        ({"speed": 1}, "the setting speed is not known, expected one of enabled, crossover, exact_for, score_all_rows, metrics_port"),
        ([], r"the settings are \[\], expected an object"),
    ],
)
def test_what_cannot_be_is_refused(given, text):
    with pytest.raises(SettingsError, match=text):
        read_settings({"flashhead": given})
