"The README is kept true: its commands and its Python run, its table names every notebook. Show what is not to run in ```text"

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
readme = (root / 'README.md').read_text(encoding='utf-8')


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', readme, re.S | re.M)


shell = [
    line.strip() for block in blocks('sh') for line in re.sub(r'\\\n\s*', ' ', block).splitlines()
]
commands = [line for line in shell if line.startswith('clipcap ')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A reader's folder: photo.jpg, photos/ and flickr/ (a data set as in the README), all drawn, and clip.mp4"
    import cv2
    from PIL import Image

    from clipcap.base.photos import list_images
    from clipcap.base.scenes import draw_dataset

    folder = tmp_path_factory.mktemp('reader')
    draw_dataset(folder / 'flickr', 20)
    photos = list_images(folder / 'flickr' / 'images')
    (folder / 'photos').mkdir()
    for photo in photos[:3]:
        shutil.copy(photo, folder / 'photos')
    Image.open(photos[0]).convert('RGB').save(folder / 'photo.jpg')
    film = cv2.VideoWriter(
        str(folder / 'clip.mp4'), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*'mp4v'), 5, (128, 128)
    )
    for n in range(15):
        film.write(cv2.resize(cv2.imread(str(photos[n // 5])), (128, 128)))
    film.release()
    return folder


def run(command, folder):
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {'PATH': path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# one after the other, in the same folder: a later command may use what an earlier one wrote
@pytest.mark.parametrize('command', commands)
def test_command(command, folder):
    run(['bash', '-euo', 'pipefail', '-c', command], folder)


@pytest.mark.parametrize('code', blocks('python'))
def test_python(code, folder):
    assert run([sys.executable, '-c', code], folder)


def test_readme_is_complete():
    assert commands and blocks('python') and 'TODO' not in readme
    assert not [
        link for link in re.findall(r'\]\((?!http)([^)#]+)\)', readme) if not (root / link).exists()
    ]


def test_make_targets():
    targets = set(re.findall(r'\bmake ([a-z-]+)', '\n'.join(shell)))
    assert {'demo', 'test'} <= targets
    for target in targets:
        subprocess.run(['make', '-n', target], cwd=root, check=True, capture_output=True)


def test_tables_name_every_notebook():
    linked = re.findall(r'(?m)^\| \[.*?\]\(nbs/([\w/]+\.ipynb)\)', readme)
    nbs = root / 'nbs'
    assert sorted(linked) == sorted(p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb'))
