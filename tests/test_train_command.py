"`clipcap train`: what it says, what it refuses, and what one bad item does to it"

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import clipcap, complaint
from PIL import Image

from clipcap.base.config import Recipe
from clipcap.base.files import lock
from clipcap.base.scenes import draw_dataset
from clipcap.cli.base import rename_options, with_settings
from clipcap.model import load_language
from clipcap.tools.recipe import new_language


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes') / 'set'
    draw_dataset(folder, 30)
    return folder


def small_set(folder, rows):
    "A data set of small drawn photos: (name, caption, split)"
    folder.mkdir()
    with open(folder / 'captions.csv', 'w', newline='') as file:
        table = csv.writer(file)
        table.writerows([('image', 'caption', 'split'), *rows])
    (folder / 'images').mkdir()
    for n, name in enumerate(sorted({name for name, *_ in rows})):
        pixels = np.random.default_rng(n).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / name)
    return folder


def test_train_says_what_differs_and_goes_on(scenes, tmp_path):
    how = ['train', scenes, '--output', tmp_path / 'run', '--epochs', 1, '--batch-size', 32]
    out, errors = clipcap(*how)
    *settings, epoch, last = out.splitlines()
    assert not errors and settings == ['epochs: 1', 'batch_size: 32']
    assert re.match(r'epoch 1: training loss \d\.\d+, validation loss \d', epoch)
    advice = re.search(r'clipcap caption photo.jpg --model (.+)$', last)[1]
    photo = next((scenes / 'images').iterdir())
    assert len(clipcap('caption', photo, '--model', advice)[0].splitlines()) == 1
    assert clipcap(*how)[0].splitlines() == [*settings, last]  # finished: nothing left to do
    old = ['train', '--data', scenes, '--model-out', tmp_path / 'run', '--clip', 1]
    _, lines = clipcap(*old, '--epochs', 2, '--batch-size', 32, code=1)
    assert 'epochs 1, now 2' in lines[-1]
    with lock(tmp_path / 'run', 'another run'):
        pass  # nothing of the runs above holds it

    shutil.rmtree(tmp_path / 'run' / 'best')
    out, _ = clipcap(*how)  # made again, from the checkpoint
    assert out.splitlines()[-1] == last and (tmp_path / 'run' / 'best' / 'config.json').exists()


@pytest.mark.parametrize(
    'wrong, said',
    [
        (['--preset', 'medium'], 'preset'),
        (['--mapper-layers', 3], 'mapper_layers'),
        (['--mapper-heads', 3], 'mapper_heads'),
        (['--lora', 4, '--freeze-language'], 'lora'),
        (['--language', 'nowhere/at-all'], 'nowhere/at-all'),
        (['--dropout', 1], 'dropout'),
        (['--warmup', 1], 'warmup'),
    ],
)
def test_what_does_not_fit_is_refused(scenes, tmp_path, wrong, said):
    _, lines = clipcap('train', scenes, '--output', tmp_path / 'x', *wrong, code=1)
    assert said in lines[-1] and not (tmp_path / 'x' / 'best').exists()


@pytest.mark.parametrize(
    'wrong',
    [
        ['--rate', 'inf'],
        ['--rate', 'nan'],
        ['--dropout', 'nan'],
        ['--image-size', 100_000],
        ['--epochs', 0],
        ['--epochs', 10**9],
        ['--clip', -1],
        ['--mapper-layers', 10**6],
        ['--seed', -1],
        ['--precision', 'fp8'],
    ],
)
def test_values_out_of_bounds_are_refused(scenes, tmp_path, wrong):
    clipcap('train', scenes, '--output', tmp_path / 'x', *wrong, code=2)
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('text', ['rate: .inf', 'rate: .nan', 'image_size: 100000', 'dropout: 2'])
def test_recipe_files_have_the_same_bounds(scenes, tmp_path, text):
    (tmp_path / 'r.yaml').write_text(text)
    config = ['--config', tmp_path / 'r.yaml']
    assert text.split(':')[0] in complaint('train', scenes, '--output', tmp_path / 'x', *config)


def test_one_training_photo(tmp_path):
    rows = [
        ('1.jpg', 'a red ball lies on a table', 'train'),
        ('1.jpg', 'a ball', 'train'),
        ('2.jpg', 'a green kite', 'val'),
    ]
    data = small_set(tmp_path / 'one', rows)
    out, errors = clipcap('train', data, '--output', tmp_path / 'run', '--epochs', 2)
    assert not errors and 'nan' not in out
    losses = [float(loss) for loss in re.findall(r'training loss (\d+\.\d+)', out)]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_bad_items_are_named_and_left_out(tmp_path):
    rows = [(f'{n}.jpg', f'a thing {n}', 'train' if n < 6 else 'val') for n in range(30)]
    rows += [('7.jpg', '...', 'val'), ('8.jpg', '!', 'val'), ('2.jpg', '?', 'train')]
    rows = [row for row in rows if row != ('8.jpg', 'a thing 8', 'val')]  # 8: no other caption
    data = small_set(tmp_path / 'bad', rows)
    whole = (data / 'images' / '5.jpg').read_bytes()
    (data / 'images' / '5.jpg').write_bytes(whole[:300])
    out, errors = clipcap('train', data, '--output', tmp_path / 'run', '--epochs', 1, code=1)
    assert 'epoch 1' in out and 'CIDEr' in out and 'Now try' in out
    text = '\n'.join(errors)
    for name in ('7.jpg', '8.jpg', '2.jpg', '5.jpg'):
        assert name in text
    assert '4 photos or captions left out' in errors[-1]
    assert (tmp_path / 'run' / 'best' / 'config.json').exists()


def test_no_validation_split(tmp_path):
    data = small_set(tmp_path / 'all', [(f'{n}.jpg', f'a thing {n}', 'train') for n in range(4)])
    out, errors = clipcap('train', data, '--output', tmp_path / 'run', '--epochs', 1)
    assert 'validation loss' not in out and 'no validation loss' in errors[0]


def test_without_memory(scenes, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')

    monkeypatch.setattr('clipcap.model.CaptionModel.forward', full)
    _, lines = clipcap('train', scenes, '-o', tmp_path / 'run', '--batch-size', 48, code=1)
    assert 'batch_size (now 48)' in lines[-1] and 'accumulate' in lines[-1]


def test_embed_takes_a_data_set_with_a_stray_photo(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / 'set')
    shutil.copy(next((scenes / 'images').iterdir()), tmp_path / 'set' / 'stray.jpg')
    out, _ = clipcap('embed', tmp_path / 'set', '--output', tmp_path / 'features')
    assert '30 photos' in out


def test_a_model_with_code_of_its_own_is_refused_whatever_stdin_says(tmp_path, monkeypatch):
    "Nothing is asked, and nothing is run"
    language, tokenizer = new_language('new-gpt', ['a cat', 'a dog'])
    language.save_pretrained(tmp_path / 'model')
    tokenizer.save_pretrained(tmp_path / 'model')
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    config |= dict(
        model_type='of-its-own',
        auto_map=dict(AutoConfig='own.Config', AutoModelForCausalLM='own.Model'),
    )
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model' / 'own.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')

    def asked(*_):
        raise AssertionError('a question was asked')

    monkeypatch.setattr('builtins.input', asked)
    with pytest.raises(Exception, match='language model') as refused:
        load_language(str(tmp_path / 'model'))
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / 'ran').exists()


def test_older_names_of_options():
    old = {'--data': None, '--model-out': '--output'}
    assert rename_options(['-x', '--data', 'd', '--model-out=r'], old) == ['d', '-x', '--output=r']
    assert rename_options(['--data'], old) == []


def test_options_come_from_the_fields():
    @with_settings(Recipe)
    def command(data, **settings):
        return settings

    for name in ('rate', 'mapper', 'freeze_language', 'score_photos'):
        assert name in command.__annotations__
    assert 'settings' not in command.__annotations__
