"""Take the picture of the caption widget in use that its lesson shows: JupyterLab in Chromium.

python tools/draw_widget.py [RUN]     writes nbs/images/widget.jpg

The captioner learns drawn scenes first (some minutes); RUN is a run that has."""

import random
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'tests'))
from browser import jupyterlab, opened  # noqa: E402

from clipcap.base.scenes import draw_dataset, draw_scene  # noqa: E402
from clipcap.tools.recipe import read_recipe, train_recipe  # noqa: E402

CELL = """
from clipcap import Captioner
from clipcap.widgets import CaptionWidget

CaptionWidget(Captioner({run!r}, device='cpu'), 'photos')
"""


def learn_scenes(folder):
    "The bundled model, trained further on drawn scenes: the folder of its run"
    data = draw_dataset(folder / 'scenes', 800, seed=3, size=160)
    recipe = read_recipe(epochs=10, batch_size=64)
    train_recipe(recipe, data, folder / 'run', device='cpu')
    return folder / 'run'


def photograph(run, folder):
    "The widget with the first of some scenes, as a picture"
    (folder / 'photos').mkdir(parents=True)
    for number, seed in enumerate((12, 4, 0), 1):
        scene, _ = draw_scene(random.Random(f'widget-{seed}'), 480)
        scene.save(folder / 'photos' / f'scene {number}.png')
    cells = [CELL.format(run=str(run))]
    with (
        jupyterlab(folder) as url,
        opened((url, folder), cells, device_scale_factor=1.25) as page,
    ):
        page.wait_for_selector('.clipcap-widget tbody tr')
        page.wait_for_timeout(500)
        data = page.locator('.clipcap-widget').screenshot()
    return Image.open(BytesIO(data)).convert('RGB')


def main(run=None):
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        picture = photograph(run or learn_scenes(place), place / 'lab')
    path = root / 'nbs' / 'images' / 'widget.jpg'
    picture.save(path, quality=85, optimize=True)
    print(f'{path}: {picture.size}, {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    main(*sys.argv[1:])
