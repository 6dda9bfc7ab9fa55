"Recipes: presets, files, and the whole way from a folder to a captioner"

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import pandas as pd
import pytest
from safetensors.torch import load_file

from clipcap.base.files import ClipcapError
from clipcap.base.scenes import draw_dataset
from clipcap.model import CaptionModel
from clipcap.tools.recipe import PRESETS, Recipe, read_recipe, recipe_text, train_recipe


def test_presets_are_the_published_settings():
    small, large, mlp, transformer = (
        read_recipe(name) for name in ('small', 'large', 'clipcap-mlp', 'clipcap-transformer')
    )
    assert (
        small.tower,
        small.language,
        small.epochs,
        small.rate,
        small.batch_size,
        small.prefix_length,
    ) == ('openai/clip-vit-base-patch32', 'gpt2', 150, 3e-3, 64, 4)
    assert (
        large.tower,
        large.language,
        large.epochs,
        large.rate,
        large.batch_size,
        large.mapper_layers,
    ) == ('openai/clip-vit-large-patch14', 'gpt2-medium', 120, 5e-3, 32, 5)
    assert (mlp.mapper, mlp.prefix_length, mlp.freeze_language) == ('mlp', 10, False)
    assert (transformer.mapper, transformer.prefix_length, transformer.freeze_language) == (
        'transformer',
        40,
        True,
    )
    assert all(set(preset) <= set(asdict(Recipe())) for preset in PRESETS.values())


def test_file_round_trip(tmp_path):
    for n, recipe in enumerate(
        [
            Recipe(),
            *map(read_recipe, PRESETS),
            Recipe(lora=4, language_rate=1e-5, patience=2, precision='bf16'),
        ]
    ):
        (tmp_path / f'{n}.yaml').write_text(recipe_text(recipe))
        (tmp_path / f'{n}.json').write_text(json.dumps(asdict(recipe)))
        assert (
            recipe
            == read_recipe(file=tmp_path / f'{n}.yaml')
            == read_recipe(file=tmp_path / f'{n}.json')
        )


def test_later_settings_win(tmp_path):
    file = tmp_path / 'r.yaml'
    file.write_text('preset: clipcap-mlp\nrate: 1e-4\nepochs: 3\n')
    assert (
        read_recipe(file=file).rate,
        read_recipe(file=file, epochs=4).epochs,
        read_recipe(file=file).prefix_length,
    ) == (1e-4, 4, 10)
    assert read_recipe('small', file).prefix_length == 4


@pytest.mark.parametrize(
    'text',
    [
        'epoch: 3',
        'epochs: many',
        'epochs: 2.5',
        'freeze_language: 1',
        'rate: [1]',
        'epochs: null',
        '- epochs',
        'a: b: c',
        'preset: medium',
        '1: 2',
        'warmup: 1',
        'dropout: 1',
        'reward_dropout: 1.5',
        'dropout: -0.1',
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / 'r.yaml').write_text(text)
    with pytest.raises(ClipcapError) as refused:
        read_recipe(file=tmp_path / 'r.yaml')
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.slow
def test_two_processes_from_a_folder_to_a_captioner(tmp_path):
    draw_dataset(tmp_path / 'scenes', 40)
    how = [
        '-m',
        'clipcap.cli.main',
        'train',
        '--data',
        tmp_path / 'scenes',
        '--dropout',
        0,
        '--freeze-language',
        '--epochs',
        1,
    ]
    alone = [sys.executable, *how, '--batch-size', 32, '--model-out', tmp_path / 'one']
    several = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        2,
        *how,
        '--batch-size',
        16,
        '--model-out',
        tmp_path / 'two',
    ]
    said = [
        subprocess.run(
            [*map(str, command)],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        ).stdout
        for command in (alone, several)
    ]
    assert said[1].count('epoch 1:') == 1
    one, two = (load_file(tmp_path / run / 'last.safetensors') for run in ('one', 'two'))
    assert max(float((one[k] - two[k]).abs().max()) for k in one if k.startswith('model.')) < 1e-3
    losses = [pd.read_csv(tmp_path / run / 'history.csv').val_loss.item() for run in ('one', 'two')]
    assert abs(losses[0] - losses[1]) < 1e-3


def test_writing_first_and_rewards_after(tmp_path):
    draw_dataset(tmp_path / 'scenes', 130, size=48)
    how = dict(language='new-gpt', text_epochs=1, epochs=1, reward_steps=4, batch_size=64, lora=2)
    folder = tmp_path / 'run'

    def learn(**more):
        recipe = read_recipe(**how | more)
        return train_recipe(recipe, tmp_path / 'scenes', folder, device='cpu', progress=False)

    def files():
        return {path: path.stat().st_mtime_ns for path in folder.rglob('*.safetensors')}

    history = learn()
    assert list(pd.read_csv(folder / 'writer' / 'history.csv').epoch) == [1]
    assert list(history.epoch) == [1]
    kept = json.loads((folder / 'reward.json').read_text())
    assert len(kept['rewards']) == 4
    assert set(kept['scores']) >= ({'0', '0.5', '1'} if 'score' in history else {'1'})
    before = files()
    assert learn().equals(history) and files() == before  # all done: nothing is written again
    first, best = (CaptionModel.from_pretrained(folder / name) for name in ('before', 'best'))
    assert first.config == best.config
    with pytest.raises(ClipcapError, match='reward_steps 4, now 5'):
        learn(reward_steps=5)

    rewarded = load_file(folder / 'best' / 'model.safetensors')
    shutil.rmtree(folder / 'best')
    learn()  # the model before the rewards, and the rewards again
    again = load_file(folder / 'best' / 'model.safetensors')
    for name, weight in rewarded.items():
        assert weight.equal(again[name])
