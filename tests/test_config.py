"Settings: one place for type, default, bounds and help; whatever does not fit ends in one line"

import subprocess
import sys
from dataclasses import MISSING, fields

import pytest

from clipcap.base.config import (
    PRESETS,
    LoopSettings,
    Recipe,
    TrainConfig,
    changed_settings,
    read_settings,
    settings_table,
    wanted,
)
from clipcap.base.files import ClipcapError

nothing = [float('nan'), float('inf'), float('-inf'), 10**400, -(10**400), 'x', [], True]


@pytest.mark.parametrize('one', fields(Recipe), ids=lambda one: one.name)
def test_every_setting_refuses_what_is_no_value_of_it(one):
    number = one.metadata['choices'] == () and 'number' in wanted(one)
    wrong = nothing if number else [3, float('nan'), []]
    if one.metadata['choices']:
        wrong = [*wrong, 'no such choice', '']
    for value in wrong:
        with pytest.raises(ClipcapError, match=one.name) as refused:
            Recipe(**{one.name: value})
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize('one', fields(Recipe), ids=lambda one: one.name)
def test_every_number_has_both_ends(one):
    if 'number' in wanted(one) and not one.metadata['choices']:
        known = one.metadata
        assert known['low'] is not None
        assert known['high'] is not None or known['below'] is not None
    assert one.default is not MISSING and one.metadata['help']


@pytest.mark.parametrize(
    'absurd',
    [
        dict(rate=1e38),
        dict(image_size=100_000),
        dict(mapper='transformer', mapper_layers=10**6),
        dict(epochs=10**9),
        dict(batch_size=10**9),
        dict(clip=-1.0),
        dict(weight_decay=1e9),
        dict(prefix_length=10**6),
        dict(seed=-1),
        dict(seed=2**32),
        dict(lora=10**6),
        dict(warmup=1.0),
        dict(rate=0.0),
    ],
)
def test_absurd_values(absurd):
    with pytest.raises(ClipcapError):
        Recipe(**absurd)


@pytest.mark.parametrize(
    'idle',
    [
        dict(mapper_layers=2),
        dict(mapper_heads=2),
        dict(mapper='mlp', mapper_layers=2),
        dict(reward_dropout=0.1),
        dict(language_rate=1e-4, freeze_language=True),
        dict(text_epochs=3),
        dict(lora=2, freeze_language=True),
        dict(model='other', tower='a', language='b'),
    ],
)
def test_settings_without_effect_are_refused(idle):
    with pytest.raises(ClipcapError, match='no effect'):
        Recipe(**idle)


def test_presets_are_recipes():
    for preset in PRESETS.values():
        changed = changed_settings(Recipe(**preset))
        assert all(preset[name] == value for name, value in changed.items())


def test_values_from_files():
    assert read_settings(TrainConfig, dict(epochs='3', rate='1e-4', warmup=0)).epochs == 3
    assert read_settings(TrainConfig, dict(epochs=3.0)).epochs == 3
    with pytest.raises(ClipcapError, match='did you mean epochs'):
        read_settings(TrainConfig, dict(epoch=3))
    assert set(settings_table(LoopSettings).index) < set(settings_table(TrainConfig).index)


def test_no_torch():
    program = 'import sys, clipcap.base.config; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0
