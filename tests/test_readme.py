"""The README is kept true: its commands and its Python run, its tables name every notebook.

What is not to run is shown there in ```text"""

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
    "The code blocks of a language"
    return re.findall(rf'^```{language}\n(.*?)^```', readme, re.S | re.M)


def shell_lines():
    "Each line of the shell blocks; one that goes on after a backslash is joined"
    for block in blocks('sh'):
        yield from re.sub(r'\\\n\s*', ' ', block).splitlines()


commands = [line.strip() for line in shell_lines() if line.startswith('clipcap ')]


def draw_film(path, pictures):
    "A film of one second a picture"
    import cv2

    code = cv2.VideoWriter_fourcc(*'mp4v')
    film = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 5, (128, 128))
    for picture in pictures:
        frame = cv2.resize(cv2.imread(str(picture)), (128, 128))
        for _ in range(5):
            film.write(frame)
    film.release()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A reader's folder, all drawn: photo.jpg, photos/, clip.mp4, and flickr/ as the README says"
    from PIL import Image

    from clipcap.base.photos import list_images
    from clipcap.base.scenes import draw_dataset

    folder = tmp_path_factory.mktemp('reader')
    draw_dataset(folder / 'flickr', 20)
    photos = list_images(folder / 'flickr' / 'images')[:3]
    (folder / 'photos').mkdir()
    for photo in photos:
        shutil.copy(photo, folder / 'photos')
    Image.open(photos[0]).convert('RGB').save(folder / 'photo.jpg')
    draw_film(folder / 'clip.mp4', photos)
    return folder


def run(command, folder):
    "Run a command as the reader would, with `clipcap` on the PATH; what it printed"
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    env = os.environ | {'PATH': path}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
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
    assert commands
    assert blocks('python')
    assert 'TODO' not in readme
    links = re.findall(r'\]\((?!http)([^)#]+)\)', readme)
    assert not [link for link in links if not (root / link).exists()]


def test_make_targets():
    "Every `make ...` of the README is there, in its blocks and in its sentences"
    targets = set(re.findall(r'(?m)(?:^|`)make ([a-z][a-z-]*)', readme))
    assert {'demo', 'test', 'lock', 'test-newest', 'test-lowest'} <= targets
    for target in targets:
        dry = ['make', '-n', target, f'PYTHON={sys.executable}']
        subprocess.run(dry, cwd=root, check=True, capture_output=True)


def test_tables_name_every_notebook():
    of_parts = (root / 'nbs' / 'README.md').read_text(encoding='utf-8')
    row = r'(?m)^\| \[.*?\]\(([\w/]+\.ipynb)\)'
    linked = [name.removeprefix('nbs/') for name in re.findall(row, readme)]
    linked += re.findall(row, of_parts)
    nbs = root / 'nbs'
    names = [p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb')]
    assert sorted(linked) == sorted(n for n in names if not n.startswith('solutions/'))
