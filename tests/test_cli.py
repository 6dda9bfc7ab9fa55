"The command: what it prints and where, its exit codes, and one line for whatever a user can cause"

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import clipcap, complaint
from PIL import Image

from clipcap.base.photos import list_images
from clipcap.base.scenes import draw_dataset

command = [sys.executable, '-m', 'clipcap.cli.main']
offline = dict(HTTP_PROXY='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9', NO_PROXY='')


def shell(*arguments, **how):
    "Run the command in a process of its own"
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, **how)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "A data set of 40 drawn scenes"
    return draw_dataset(tmp_path_factory.mktemp('cli') / 'scenes', 40)


@pytest.fixture(scope='module')
def photos(tmp_path_factory, scenes):
    "Three good photos in a folder, not made in the order of their names"
    folder = tmp_path_factory.mktemp('photos')
    for name, scene in zip(('b.jpg', 'c.png', 'a.jpg'), list_images(scenes / 'images')):
        Image.open(scene).save(folder / name)
    (folder / 'notes.txt').write_text('not captioned')
    return folder


# ---- the start
@pytest.mark.parametrize(
    'arguments',
    [
        ['-h'],
        ['--version'],
        ['caption', '-h'],
        ['demo', '-h'],
        ['data', '--help'],
        ['embed', '-h'],
        ['train', '-h'],
        ['evaluate', '-h'],
        ['caption', '--nonsense'],
    ],
)
def test_help_is_light(arguments):
    run = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'clipcap.cli.main', *arguments],
        capture_output=True,
        text=True,
    )
    assert run.returncode == (2 if '--nonsense' in arguments else 0)
    imported = set(re.findall(r'\|\s+(\w+)$', run.stderr, re.M))
    assert 'typer' in imported and not imported & set(
        "torch transformers numpy pandas PIL matplotlib huggingface_hub rich tqdm".split()
    )
    assert run.stdout.startswith(
        {'--version': 'clipcap 0', '--nonsense': ''}.get(arguments[-1], 'Usage: clipcap')
    )


def test_usage_errors():
    for wrong in (
        [],
        ['capton'],
        ['caption'],
        ['caption', 'a.jpg', '--format', 'xml'],
        ['caption', 'a.jpg', '--batch-size', 0],
        ['train', '--data', 'x'],
        ['data', '-n', 'many'],
    ):
        assert clipcap(*wrong, code=2)


# ---- captions
def test_text_one_line_a_photo_in_the_order_of_names(photos):
    said, complaints = clipcap('caption', photos)
    lines = [line.split('\t') for line in said.splitlines()]
    assert (
        [photo for photo, _ in lines] == [str(photos / n) for n in ('a.jpg', 'b.jpg', 'c.png')]
        and all(text for _, text in lines)
        and not complaints
    )
    assert clipcap('caption', photos / 'b.jpg')[0].splitlines() == [
        '\t'.join(lines[1])
    ]  # alone as in company, one photo as many
    assert (
        clipcap('caption', photos / '*.jpg', (photos / 'c.png').as_uri(), '--batch-size', 2)[
            0
        ].split('\t')[-1]
        == lines[2][1] + '\n'
    )
    assert len(clipcap('caption', photos / 'b.jpg', '--candidates', 3)[0].splitlines()) == 3


def test_json_and_csv(photos):
    plain = json.loads(clipcap('caption', photos, '--format', 'json')[0])
    assert [set(row) for row in plain] == [{'image', 'caption'}] * 3 and [
        Path(row['image']).name for row in plain
    ] == ['a.jpg', 'b.jpg', 'c.png']
    several = json.loads(clipcap('caption', photos, '--format', 'json', '--candidates', 4)[0])
    for row in several:
        scores = [c['score'] for c in row['candidates']]
        assert (
            len(scores) == 4
            and scores == sorted(scores, reverse=True)
            and max(scores) < 0
            and row['caption'] == row['candidates'][0]['caption']
        )
    table = list(csv.reader(io.StringIO(clipcap('caption', photos, '--format', 'csv')[0])))
    assert table == [['image', 'caption']] + [[row['image'], row['caption']] for row in plain]


def test_dice(photos):
    throw = lambda *how: clipcap('caption', photos, '--temperature', 1.2, *how)[0]
    assert throw('--seed', 1) == throw('--seed', 1) != throw('--seed', 2)
    assert throw('--top-k', 1) == clipcap('caption', photos, '--beams', 1)[0]
    assert (
        max(len(line.split('\t')[1].split()) for line in throw('--max-length', 3).splitlines()) <= 3
    )


def test_render(photos, scenes, tmp_path):
    (tmp_path / 'more').mkdir()
    shutil.copy(photos / 'a.jpg', tmp_path / 'more' / 'A.jpg')
    shutil.copy(photos / 'c.png', tmp_path / 'more' / 'a.png')
    clipcap('caption', photos, tmp_path / 'more', '--render', tmp_path / 'new' / 'drawn')
    assert sorted(p.name for p in (tmp_path / 'new' / 'drawn').iterdir()) == [
        'A.jpg.jpg',
        'a.jpg',
        'a.png.jpg',
        'b.jpg',
        'c.jpg',
    ]
    for drawn in list_images(tmp_path / 'new' / 'drawn'):
        picture = Image.open(drawn)
        assert picture.format == 'JPEG' and picture.width == 640 and picture.height > 660
    before = {p: p.read_bytes() for p in photos.iterdir()}
    assert any(
        '--render' in line
        for line in clipcap(
            'caption', photos / 'a.jpg', '--render', f'{photos}/../{photos.name}', code=2
        )[1]
    )
    assert before == {p: p.read_bytes() for p in photos.iterdir()}


# ---- bad input
def bomb(side=60_000):
    "A PNG of a few hundred bytes that claims to be side x side"
    chunk = lambda kind, data: (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    )
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'\0' * 1000))
        + chunk(b'IEND', b'')
    )


@pytest.fixture
def mixed(photos, tmp_path):
    "A folder with every kind of bad photo among good ones"
    folder = tmp_path / 'mixed'
    folder.mkdir()
    shutil.copy(photos / 'a.jpg', folder / '0.jpg')
    shutil.copy(photos / 'b.jpg', folder / 'z.jpg')
    (folder / 'empty.jpg').touch()
    (folder / 'words.jpg').write_text('not a photo')
    (folder / 'bomb.png').write_bytes(bomb())
    Image.effect_noise((200, 200), 50).save(folder / 'half.jpg')
    os.truncate(folder / 'half.jpg', 4000)
    Image.new('RGB', (1, 1)).save(folder / 'one.png')
    Image.new('RGB', (20_000, 10)).save(folder / 'strip.png')
    return folder


def test_bad_photos_are_named_and_the_others_captioned(mixed):
    run = shell('caption', mixed, mixed / 'missing.jpg', mixed / 'nothing', '--format', 'json')
    assert run.returncode == 1 and [Path(row['image']).name for row in json.loads(run.stdout)] == [
        '0.jpg',
        'one.png',
        'strip.png',
        'z.jpg',
    ]
    *lines, last = run.stderr.splitlines()
    assert len(lines) == 6 and all(line.startswith('clipcap: ') for line in lines)
    for name in 'missing.jpg', 'nothing', 'empty.jpg', 'words.jpg', 'half.jpg', 'bomb.png':
        assert sum(name in line for line in lines) == 1, name
    assert '6 of 10' in last


def test_nothing_to_caption(mixed, tmp_path):
    assert 'missing.jpg' in complaint(
        'caption', mixed / 'missing.jpg'
    ) and 'empty.jpg' in complaint('caption', mixed / 'empty.jpg')
    assert 'folder' in complaint('caption', tmp_path) and '*.webp' in complaint(
        'caption', mixed / '*.webp'
    )
    assert 'http://127.0.0.1:9' in complaint('caption', 'http://127.0.0.1:9/a.jpg')
    assert clipcap('caption', mixed / 'missing.jpg', '--format', 'json', code=1)[0] == '[]\n'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_permissions(mixed):
    (mixed / 'z.jpg').chmod(0)
    assert 'z.jpg' in complaint('caption', mixed / 'z.jpg')


def test_models_and_options(photos, tmp_path):
    photo = photos / 'a.jpg'
    for name in 'tinny', tmp_path / 'nothing', 'someone/nothing':
        line = complaint('caption', photo, '--model', name)
        assert str(name) in line and 'tiny' in line and 'folder' in line
    assert 'config.json' in complaint('caption', photo, '--model', tmp_path)
    assert 'abacus' in complaint(
        'caption', photo, '--device', 'abacus'
    ) and 'candidates' in complaint('caption', photo, '--candidates', 7, '--beams', 2)
    assert 'temperature' in complaint(
        'caption', photo, '--temperature', -1
    ) and 'top_p' in complaint('caption', photo, '--top-p', 0)


def test_no_network(photos):
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'} | dict(
        HF_ENDPOINT='http://127.0.0.1:9'
    )
    run = shell('caption', photos / 'a.jpg', '--model', 'someone/nothing', env=env, timeout=100)
    assert (
        run.returncode == 1
        and not run.stdout
        and len(run.stderr.splitlines()) == 1
        and 'someone/nothing' in run.stderr
    )


def test_no_place_to_write(photos, tmp_path):
    (tmp_path / 'file').touch()
    assert 'file' in complaint('caption', photos / 'a.jpg', '--render', tmp_path / 'file' / 'drawn')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        assert 'large' in complaint('caption', photos / 'a.jpg', '--render', tmp_path / 'drawn')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / 'drawn').iterdir())


# ---- manners in a shell
def test_the_reader_has_seen_enough(scenes):
    run = subprocess.Popen(
        [*command, 'caption', scenes / 'images', '--batch-size', '1'],
        stdout=-1,
        stderr=-1,
        text=True,
    )
    assert 'scene_00000' in run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == '' and run.wait(60) in (0, 1)


def test_interrupted(scenes):
    run = subprocess.Popen(
        [*command, 'caption', *[scenes / 'images'] * 9, '--batch-size', '1', '--format', 'json'],
        stdout=-1,
        stderr=-1,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # it may be ignored here, where the tests run in the background
    begun = [run.stdout.readline() for _ in range(3)]
    run.send_signal(signal.SIGINT)
    said, complaints = run.stdout.read(), run.stderr.read()
    assert (
        run.wait(60) == 130
        and complaints.strip() == ''
        and 2 <= len(json.loads(''.join(begun) + said)) < 9 * 40
    )


without_network = '''
import socket, sys
def refuse(*_): raise AssertionError('no network, please')
socket.socket.connect = socket.getaddrinfo = refuse
from clipcap.cli.main import main
main()
'''


def test_demo_needs_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
    run = subprocess.run(
        [sys.executable, '-c', without_network, 'demo'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert run.returncode == 0 and run.stderr == '', run.stderr
    assert (
        run.stdout.startswith('grace_hopper.jpg')
        and 'clipcap-demo.png' in run.stdout.splitlines()[-1]
    )
    assert [p.name for p in tmp_path.iterdir()] == ['clipcap-demo.png'] and Image.open(
        tmp_path / 'clipcap-demo.png'
    ).width > 900


def test_demo_elsewhere(tmp_path):
    clipcap('demo', '--output', tmp_path / 'new')
    clipcap('demo', '--output', tmp_path / 'sheet.jpg')
    assert (
        Image.open(tmp_path / 'new' / 'clipcap-demo.png').size
        == Image.open(tmp_path / 'sheet.jpg').size
    )
    said, [line] = clipcap('demo', '--output', tmp_path / 'sheet.doc', code=1)
    assert 'sheet.doc' in line


# ---- data, features, training
def test_data(scenes, tmp_path):
    said, complaints = clipcap('data', scenes)
    assert re.search(r'^all +40 +200 +5', said, re.M) and not complaints
    drawn = clipcap('data', '--draw', tmp_path / 'drawn', '-n', 12, '--seed', 3)[0]
    assert len(list_images(tmp_path / 'drawn' / 'images')) == 12 and re.search(
        r'^all +12 +60', drawn, re.M
    )
    (tmp_path / 'drawn' / 'images' / 'scene_00003.jpg').unlink()
    said, [line] = clipcap('data', tmp_path / 'drawn')
    assert 'scene_00003.jpg' in line and re.search(r'^all +11 +55', said, re.M)
    (tmp_path / 'table').mkdir()
    (tmp_path / 'table' / 'captions.csv').write_text('photo,words\na.jpg,a dog\n')
    assert 'photo, words' in complaint('data', tmp_path / 'table') and 'caption' in complaint(
        'data', tmp_path / 'none'
    )


def test_embed(scenes, photos, tmp_path):
    assert clipcap('embed', scenes, '--output', tmp_path / 'scenes')[0].startswith(
        f'{tmp_path}/scenes: 40 photos'
    )
    assert clipcap('embed', photos, '--output', tmp_path / 'photos', '--features', 'grid')[
        0
    ].startswith(f'{tmp_path}/photos: 3 photos, 25 x ')
    assert json.loads((tmp_path / 'photos' / 'manifest.json').read_text())['names'] == [
        'a.jpg',
        'b.jpg',
        'c.png',
    ]
    assert 'photos' in complaint('embed', photos, '--output', tmp_path / 'photos')  # other features
    assert 'projected' in complaint(
        'embed', photos, '--output', tmp_path / 'x', '--features', 'projected'
    ) and 'nowhere' in complaint(
        'embed', photos, '--output', tmp_path / 'x', '--tower', 'nowhere/at-all'
    )
    shutil.copytree(photos, tmp_path / 'broken')
    (tmp_path / 'broken' / 'b.jpg').write_text('no photo')
    said, lines = clipcap('embed', tmp_path / 'broken', '--output', tmp_path / 'y', code=1)
    assert '2 photos' in said and 'b.jpg' in lines[0] and '1 photo' in lines[-1]


def test_train(scenes, photos, tmp_path):
    how = [
        'train',
        '--data',
        scenes,
        '--model-out',
        tmp_path / 'run',
        '--epochs',
        1,
        '--batch-size',
        32,
    ]
    run = shell(*how)
    assert run.returncode == 0 and run.stderr == '', run.stderr
    *recipe, epoch, last = run.stdout.splitlines()
    assert re.match(r'epoch 1: training loss \d', epoch) and {
        'epochs: 1',
        'batch_size: 32',
        'rate: 0.001',
        'language: null',
    } <= set(recipe)
    assert (tmp_path / 'run' / 'recipe.yaml').read_text().splitlines() == [
        line for line in recipe if line
    ]
    advice = re.search(r'clipcap caption photo.jpg --model (.+)$', last)[1]
    assert len(clipcap('caption', photos, '--model', advice)[0].splitlines()) == 3
    assert (
        clipcap('caption', photos / 'a.jpg', '--model', tmp_path / 'run')[0]
        == clipcap('caption', photos / 'a.jpg', '--model', advice)[0]
    )
    again = clipcap(*how)[0]  # finished: nothing left to do
    assert again.splitlines() == [*recipe, last]
    refused, [line] = clipcap(
        'train',
        '--data',
        scenes,
        '--model-out',
        tmp_path / 'run',
        '--epochs',
        2,
        '--batch-size',
        32,
        code=1,
    )
    assert 'epochs' in line


def test_train_a_new_mapper(scenes, photos, tmp_path):
    clipcap('embed', scenes, '--output', tmp_path / 'features', '--features', 'pooled')
    (tmp_path / 'recipe.yaml').write_text(
        'features: pooled\nmapper: transformer\nprefix_length: 3\nmapper_layers: 2\nepochs: 7\nfreeze_language: true\n'
    )
    how = [
        'train',
        '--data',
        scenes,
        '--store',
        tmp_path / 'features',
        '--config',
        tmp_path / 'recipe.yaml',
    ]
    clipcap(*how, '--model-out', tmp_path / 'run', '--epochs', 1)
    config = json.loads((tmp_path / 'run' / 'best' / 'config.json').read_text())
    assert (
        config['mapper']['kind'] == 'transformer'
        and config['mapper']['prefix_length'] == 3
        and config['mapper']['cells'] == 1
        and config['freeze_language']
    )
    assert not (tmp_path / 'run' / 'features').exists() and clipcap(
        'caption', photos / 'a.jpg', '--model', tmp_path / 'run'
    )
    wrong = lambda *options: clipcap(*how, '--model-out', tmp_path / 'x', *options, code=1)[1][-1]
    assert (
        'no-such' in wrong('--language', tmp_path / 'no-such')
        and 'preset' in wrong('--preset', 'medium')
        and 'lora' in wrong('--lora', 4)
    )


def test_train_without_memory(scenes, tmp_path):
    program = 'import torch, clipcap.train; from unittest import mock; from clipcap.cli.main import main\ndef full(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried")\n'
    program += 'with mock.patch("clipcap.train._one_step", full): main()'
    run = subprocess.run(
        [
            sys.executable,
            '-c',
            program,
            'train',
            '--data',
            scenes,
            '--model-out',
            tmp_path / 'run',
            '--batch-size',
            '48',
        ],
        capture_output=True,
        text=True,
    )
    assert (
        run.returncode == 1
        and len(run.stderr.splitlines()) == 1
        and 'batch_size (now 48)' in run.stderr
        and 'accumulate' in run.stderr
    ), run.stderr
