"""The webcam widget in JupyterLab, driven in headless Chromium; the camera is a film whose frames
say their number in black and white squares"""

import random
import time

import numpy as np
import pytest
from browser import PATIENCE, command, opened
from PIL import Image

pytestmark = pytest.mark.browser
W, H, FRAMES = 160, 120, 256  # at 30 frames a second; red in the first half, blue in the second


def numbered(number):
    "Frame `number`: a colour, and below it the number in 8 squares"
    pixels = np.full((H, W, 3), (200, 20, 20) if number < FRAMES // 2 else (20, 20, 200), np.uint8)
    for bit in range(8):
        pixels[-H // 4 :, W // 8 * bit : W // 8 * (bit + 1)] = 255 * (number >> bit & 1)
    return Image.fromarray(pixels)


def write_camera(path, frames):
    "A film that Chromium takes for a camera (YUV4MPEG2, uncompressed, 30 frames a second)"
    with open(path, 'wb') as film:
        film.write(b'YUV4MPEG2 W%d H%d F30:1 Ip A1:1 C420jpeg\n' % frames[0].size)
        for frame in frames:
            y, u, v = frame.convert('YCbCr').split()
            film.write(b'FRAME\n' + y.tobytes() + u.reduce(2).tobytes() + v.reduce(2).tobytes())
    return path


def camera_flags(film):
    return ['--use-fake-device-for-media-stream', f'--use-file-for-fake-video-capture={film}']


# how many pictures were taken, the cameras that were opened, what the film shows at this moment;
# nextCaptions: [caption, number in the film when it appeared, pictures taken till then]
WATCH = """
window.snaps = 0;
window.tracks = [];
const toBlob = HTMLCanvasElement.prototype.toBlob;
HTMLCanvasElement.prototype.toBlob = function (...how) {
  window.snaps++;
  return toBlob.apply(this, how);
};
const devices = navigator.mediaDevices;
const ask = devices?.getUserMedia.bind(devices);
if (ask) devices.getUserMedia = async what => {
  const stream = await ask(what);
  window.tracks.push(...stream.getTracks());
  return stream;
};
window.numberNow = video => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 160, height: 120});
  const context = canvas.getContext('2d');
  context.drawImage(video, 0, 0, 160, 120);
  const bright = bit => context.getImageData(20*bit + 10, 105, 1, 1).data[0] > 127;
  return [...Array(8).keys()].reduce((sum, bit) => sum + bright(bit) * 2**bit, 0);
};
window.nextCaptions = (widget, count) => new Promise(done => {
  const found = [], caption = widget.querySelector('.clipcap-caption');
  const observer = new MutationObserver(() => {
    found.push([caption.textContent, numberNow(widget.querySelector('video')), window.snaps]);
    if (found.length === count) { observer.disconnect(); done(found); }
  });
  observer.observe(caption, {childList: true});
});
"""
LOOK = """
import time
import numpy as np
from clipcap.webcam import Webcam
calls = 0
def look(picture):
    global calls
    calls += 1
    row, side = np.asarray(picture)[-picture.height//8], picture.width//8
    bits = [row[side*bit + side//2].mean() > 127 for bit in range(8)]
    number = sum(int(bit) << n for n, bit in enumerate(bits))
    return f"{'red' if number < 128 else 'blue'} {number} {calls}"
def slow(picture):
    time.sleep(1)
    text = look(picture)
    if 'blue' in text:
        raise ValueError(f'too {text}')
    return text
"""


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    return write_camera(
        tmp_path_factory.mktemp('camera') / 'numbers.y4m', [numbered(n) for n in range(FRAMES)]
    )


def caption_of(widget):
    return widget.locator('.clipcap-caption').inner_text()


def complains(page, widget, words):
    page.wait_for_function(
        '([e, words]) => e.querySelector(".clipcap-error").textContent.includes(words)',
        arg=[widget.element_handle(), words],
    )


def has_released(page):
    page.wait_for_function(
        '() => tracks.length && tracks.every(track => track.readyState === "ended")'
    )


REFUSE = """() => {
  window.right = navigator.mediaDevices.getUserMedia;
  const gone = () => { throw new DOMException("", "NotFoundError"); };
  navigator.mediaDevices.getUserMedia = async () => gone();
}"""
RATE = """widget => /^[0-9.]+ captions per second$/.test(
  widget.querySelector(".clipcap-status").textContent)"""


def press(widget, what):
    widget.get_by_role('button', name=what).click()


def test_webcam(lab, film, tmp_path):
    with opened(lab, [LOOK, 'Webcam(look)', 'Webcam(slow)'], camera_flags(film), WATCH) as page:
        page.wait_for_function('() => document.querySelectorAll(".clipcap-webcam").length === 2')
        fast, slow = page.locator('.clipcap-webcam').all()

        press(fast, 'Start')  # nobody has allowed it
        complains(page, fast, 'The camera was refused')
        page.context.grant_permissions(['camera'])
        page.evaluate(REFUSE)
        press(fast, 'Start')
        complains(page, fast, 'No camera was found')
        page.evaluate('() => { navigator.mediaDevices.getUserMedia = window.right; }')

        press(fast, 'Start')  # captions change with the picture
        seen, end = set(), time.monotonic() + PATIENCE
        while seen != {'red', 'blue'} and time.monotonic() < end:
            [[text, *_]] = page.evaluate('widget => nextCaptions(widget, 1)', fast.element_handle())
            seen.add(text.split()[0])
        assert seen == {'red', 'blue'} and not fast.locator('.clipcap-error').inner_text()
        page.wait_for_function(RATE, arg=fast.element_handle())
        page.screenshot(path=tmp_path / 'fast.png')
        press(fast, 'Stop')  # the camera's light goes out
        has_released(page)
        assert fast.locator('video').evaluate('video => video.srcObject === null')
        assert fast.get_by_role('button', name='Start').is_enabled()
        assert fast.get_by_role('button', name='Stop').is_disabled()

        page.evaluate('() => { window.snaps = 0; window.tracks = []; }')
        first = int(caption_of(fast).split()[2])
        press(slow, 'Start')  # slow on purpose: nothing piles up
        complains(page, slow, 'ValueError: too blue')
        watched = page.evaluate('widget => nextCaptions(widget, 6)', slow.element_handle())
        ages = [(now - int(text.split()[1])) % FRAMES for text, now, _ in watched]  # frames
        print(watched, ages)
        assert np.median(ages) < FRAMES // 2
        for text, _, snaps in watched:
            assert snaps - (int(text.split()[2]) - first) <= 1
        page.screenshot(path=tmp_path / 'slow.png')
        assert page.evaluate('() => tracks.length === 1 && tracks[0].readyState === "live"')
        command(page, 'notebook:clear-all-cell-outputs')  # the widgets go, and with them the camera
        has_released(page)
        assert not [words for words in page.said if 'clipcap' in words]


def test_page_without_https(lab):
    with opened(
        lab,
        ['from clipcap.webcam import Webcam\nWebcam(str)'],
        ['--host-resolver-rules=MAP lab.example 127.0.0.1'],
        host='lab.example',
    ) as page:
        page.wait_for_selector('.clipcap-start').click()
        complains(page, page.locator('.clipcap-webcam'), 'https:// or localhost')


def test_bundled_model(lab, tmp_path):
    from pathlib import Path

    import matplotlib

    from clipcap.base.scenes import draw_scene

    people = (
        Image.open(Path(matplotlib.get_data_path(), 'sample_data', 'grace_hopper.jpg'))
        .convert('RGB')
        .resize((320, 240))
    )
    scene = draw_scene(random.Random(3), 320)[0].crop((0, 40, 320, 280))
    film = write_camera(tmp_path / 'camera.y4m', [people] * 90 + [scene] * 90)
    cells = [
        'from clipcap.generate import GenerationOptions',
        'from clipcap.image import Captioner\nfrom clipcap.webcam import Webcam',
        'Webcam(Captioner(), GenerationOptions(beams=1))',
    ]
    with opened(lab, cells, camera_flags(film), permissions=['camera']) as page:
        page.wait_for_selector('.clipcap-start').click()
        captions, end, shown = set(), time.monotonic() + PATIENCE, page.locator('.clipcap-caption')
        while len(captions) < 2 and time.monotonic() < end:
            page.wait_for_function(
                'old => !old.includes(document.querySelector(".clipcap-caption").textContent)',
                arg=[*captions, ''],
            )
            captions.add(shown.inner_text())
        page.screenshot(path=tmp_path / 'model.png')
        print(captions, page.locator('.clipcap-status').inner_text())
        assert all(len(text.split()) > 3 for text in captions)
