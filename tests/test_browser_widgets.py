"The caption widget in JupyterLab: pick or upload a photo, move the sliders, read the captions"

import random
import re

import numpy as np
import pytest
from browser import command, opened
from PIL import Image

from clipcap.base.scenes import draw_scene

pytestmark = pytest.mark.browser

cells = [
    """
import time
from pathlib import Path
from clipcap.image import Candidate
from clipcap.widgets import CaptionWidget

class Echo:   # no model: says what it was asked, and is slow as one
    count = 0

    def candidates(self, images, options):
        time.sleep(.3)
        self.count += 1
        said = f'a <photo> of {images[0].width} x {images[0].height} at {options.temperature:.1f}'
        endings = [' once more' * n for n in range(options.candidates)]
        return [[Candidate(said + more, -.5 - n) for n, more in enumerate(endings)]]

echo = Echo()
widget = CaptionWidget(echo, 'pick' if Path('pick').is_dir() else ())
widget
"""
]


class Widget:
    "The widget on a page"

    def __init__(self, page):
        self.page = page
        self.area = page.locator('.clipcap-widget')

    def reads(self, text):
        "Wait until it says so"
        self.page.wait_for_function(
            'text => document.querySelector(".clipcap-widget")?.innerText.includes(text)', arg=text
        )

    def upload(self, photo):
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_role('button', name=re.compile('Upload a photo')).click()
        chooser.value.set_files(photo)


@pytest.fixture
def photos(tmp_path):
    "Small and large photos, and what is none"
    draw_scene(random.Random(2), 320)[0].save(tmp_path / 'scene.jpg')
    (tmp_path / 'words.jpg').write_text('this is no photo')
    noise = np.random.default_rng(0).integers(0, 255, (4200, 4200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'big.jpg', quality=90)
    assert (tmp_path / 'big.jpg').stat().st_size > 10 * 2**20
    (tmp_path / 'big.tif').write_bytes(bytes(11 * 2**20))
    return tmp_path


def test_upload_slide_read(lab, photos):
    url, folder = lab
    with opened(lab, cells) as page:
        widget = Widget(page)
        widget.upload(photos / 'scene.jpg')
        widget.reads('A <photo> of 320 x 320 at 0.0.')
        assert widget.area.locator('img').evaluate('image => image.naturalWidth') == 320
        assert widget.area.locator('img').get_attribute('alt') == 'scene.jpg'
        page.get_by_label('temperature').focus()
        for _ in range(7):
            page.keyboard.press('ArrowRight')
        widget.reads('at 0.7.')
        rows = widget.area.locator('tbody tr')
        assert rows.count() == 5
        assert '61 %' in rows.first.inner_text()
        page.screenshot(path=folder / 'caption-widget.png')
        widget.upload(photos / 'words.jpg')
        widget.reads('words.jpg: ')
        assert rows.count() == 0
        page.get_by_role('button', name='Surprise me').click()
        page.wait_for_timeout(500)
        widget.upload(photos / 'scene.jpg')
        page.wait_for_function(
            '() => /320 at (0\\.[789]|1\\.\\d)/'
            '.test(document.querySelector(".clipcap-widget").innerText)'
        )
        assert not [said for said in page.said if 'widget' in said.lower()], page.said


def test_a_photo_larger_than_a_message(lab, photos):
    "Jupyter takes messages of 10 MiB: a larger one would tear the connection"
    with opened(lab, cells) as page:
        widget = Widget(page)
        for _ in range(2):
            widget.upload(photos / 'big.jpg')
            widget.reads('2048 x 2048 at 0.0.')
            widget.reads('big.jpg: sent as 2048 x 2048 (was 4200 x 4200')
            widget.upload(photos / 'scene.jpg')
            widget.reads('320 x 320 at 0.0.')
        widget.upload(photos / 'big.tif')
        widget.reads('big.tif: 11.5 MB are too much to send')
        widget.upload(photos / 'scene.jpg')
        widget.reads('320 x 320 at 0.0.')


def test_the_same_photo_twice(lab, photos):
    with opened(lab, cells) as page:
        widget = Widget(page)
        widget.upload(photos / 'scene.jpg')
        widget.reads('320 x 320')
        # what is shown is forgotten, so that the second answer can be told from the first
        page.evaluate('() => { document.querySelector(".clipcap-sentence").textContent = "" }')
        widget.upload(photos / 'scene.jpg')
        widget.reads('A <photo> of 320 x 320')


def test_it_opens_with_the_first_photo_and_has_labels(lab, photos):
    url, folder = lab
    (folder / 'pick').mkdir(exist_ok=True)
    for n, name in enumerate(('a.png', 'b.png')):
        Image.new('RGB', (50 + n, 70), 'blue').save(folder / 'pick' / name)
    with opened(lab, cells) as page:
        widget = Widget(page)
        widget.reads('A <photo> of 50 x 70 at 0.0.')
        sliders = page.get_by_role('slider')
        names = [sliders.nth(n).evaluate('s => s.labels[0].innerText') for n in range(4)]
        assert names == ['temperature', 'top-p', 'beam size', 'candidates']
        beams = page.get_by_label('beam size')
        beams.focus()
        page.keyboard.press('Home')  # from one beam on
        assert beams.input_value() == '1'
        page.wait_for_function(
            '() => document.querySelectorAll(".clipcap-widget tbody tr").length == 1'
        )
        page.get_by_label('or pick').select_option(label='b.png')
        widget.reads('A <photo> of 51 x 70 at 0.0.')
        assert page.locator('.clipcap-sentence').get_attribute('aria-live') == 'polite'


@pytest.mark.parametrize('theme', ['JupyterLab Light', 'JupyterLab Dark'])
def test_it_can_be_read_in_both_themes(lab, theme):
    with opened(lab, cells) as page:
        Widget(page).reads('temperature')
        command(page, 'apputils:change-theme', theme=theme)
        page.wait_for_function('theme => document.body.dataset.jpThemeName == theme', arg=theme)
        colours = page.evaluate(
            """() => {
                const text = getComputedStyle(document.querySelector('.clipcap-widget')).color;
                const probe = document.createElement('div');
                probe.style.color = 'var(--jp-layout-color0)';
                document.body.append(probe);
                return [text, getComputedStyle(probe).color];
            }"""
        )
        text, behind = (np.mean([float(n) for n in re.findall(r'[\d.]+', c)[:3]]) for c in colours)
        assert abs(text - behind) > 120, colours
        command(page, 'apputils:change-theme', theme='JupyterLab Light')
