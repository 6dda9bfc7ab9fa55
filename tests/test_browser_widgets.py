"The caption + temperature widget in JupyterLab: upload a photo, move the slider, read the caption"

import re

import pytest
from browser import opened

from clipcap.base.scenes import draw_scene

pytestmark = pytest.mark.browser

cells = [
    """
import time
from clipcap.image import Candidate
from clipcap.widgets import CaptionWidget
class Echo:   # no model: says what it was asked, and is slow as one
    def candidates(self, images, options):
        time.sleep(.3)
        return [[Candidate(f'a <photo> of {im.width} x {im.height} at {options.temperature:.1f}' + ' once more'*n, -.5 - n) for n in range(options.candidates)] for im in images]
widget = CaptionWidget(Echo())
widget
"""
]


def test_upload_slide_read(lab, tmp_path):
    import random

    draw_scene(random.Random(2), 320)[0].save(tmp_path / 'scene.jpg')
    (tmp_path / 'words.jpg').write_text('this is no photo')
    url, folder = lab
    with opened(lab, cells) as page:

        def reads(text):
            page.wait_for_function(
                'text => document.querySelector(".jp-OutputArea").innerText.includes(text)',
                arg=text,
            )

        def upload(photo):
            with page.expect_file_chooser() as chooser:
                page.get_by_role('button', name=re.compile('Upload a photo')).click()
            chooser.value.set_files(photo)

        upload(tmp_path / 'scene.jpg')
        reads('A <photo> of 320 x 320 at 0.0.')
        assert (
            page.locator('.jp-OutputArea img').first.evaluate('image => image.naturalWidth') == 320
        )
        handle = page.locator('.noUi-handle').first  # the temperature's
        handle.focus()
        for _ in range(7):
            page.keyboard.press('ArrowRight')
        reads('at 0.7.')
        table = page.locator('.jp-OutputArea table')
        assert table.locator('tr').count() == 5 and '61%' in table.inner_text()
        page.screenshot(path=folder / 'caption-widget.png')
        upload(tmp_path / 'words.jpg')
        reads('words.jpg: not a photo, or damaged')
        page.get_by_role('button', name=re.compile('Surprise me')).click()
        page.wait_for_timeout(500)
        upload(tmp_path / 'scene.jpg')
        page.wait_for_function(
            '() => /320 at (0\\.[789]|1\\.\\d)/.test(document.querySelector(".jp-OutputArea").innerText)'
        )
        assert not [said for said in page.said if 'widget' in said.lower()], page.said
