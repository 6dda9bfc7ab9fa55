"""Webcam without a browser: the widget's Python half, the newest frame alone, cameras made of
files, and the command"""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import cv2
import numpy as np
import pytest
from conftest import clipcap, complaint
from PIL import Image

from clipcap.base.files import ClipcapError
from clipcap.webcam import Newest, Webcam, as_callable, open_camera

real = Path(__file__).resolve().parents[1].parent / 'shared' / 'data' / 'videos'
if not real.is_dir():
    real = Path('/work/shared/data/videos')
videos = sorted(real.glob('*.*')) if real.is_dir() else []


def jpeg(picture):
    data = io.BytesIO()
    picture.save(data, 'JPEG')
    return data.getvalue()


def browser(captioner, **traits):
    "A widget whose answers are collected instead of sent"
    camera, answers = Webcam(captioner, **traits), SimpleQueue()
    camera.send = answers.put
    return camera, answers


def send(camera, id, picture=None):
    picture = picture or Image.new('RGB', (64, 48))
    camera.receive(camera, dict(kind='frame', id=id), [memoryview(jpeg(picture))])


def film(path, frames=50, fps=25):
    "Frames of growing brightness: 20, and 4 times their number"
    video = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*'mp4v'), fps, (96, 64)
    )
    for number in range(frames):
        video.write(np.full((64, 96, 3), 20 + 4 * number, np.uint8))
    video.release()
    return path


def number_of(picture):
    return round((np.asarray(picture).mean() - 17) / 4)  # OpenCV's codec takes some 3 off


# ---- the widget
def test_each_frame_is_answered_once_and_the_main_thread_is_free():
    going = threading.Event()

    def captioner(picture):
        assert threading.current_thread() is not threading.main_thread() and going.wait(60)
        return f'{picture.mode} {picture.size}'

    camera, answers = browser(captioner)
    for id in 'abc':
        send(camera, id)  # three browsers
    assert answers.empty() and not camera.caption
    going.set()
    assert [answers.get(timeout=60) for _ in 'abc'] == [dict(kind='answer', id=id) for id in 'abc']
    assert camera.caption == 'RGB (64, 48)' and not camera.error and answers.empty()
    camera.receive(camera, dict(kind='something else'), [])
    camera.close()


@pytest.mark.parametrize(
    'fault, words',
    [
        (ValueError('first\nsecond'), 'ValueError: first'),
        (ClipcapError('photo: no'), 'photo: no'),
        (KeyError(), 'KeyError: '),
    ],
)
def test_an_error_is_one_line_and_the_next_frame_goes_well(fault, words):
    faults = [fault]

    def captioner(picture):
        if faults:
            raise faults.pop()
        return 'a dog'

    camera, answers = browser(captioner)
    send(camera, 1)
    answers.get(timeout=60)
    assert camera.error == words and not camera.caption
    send(camera, 2)
    answers.get(timeout=60)
    assert (camera.caption, camera.error) == ('a dog', '')
    send(camera, 3, Image.new('L', (5, 5)))
    answers.get(timeout=60)
    assert camera.caption == 'a dog'


def test_what_is_no_text_is_an_error():
    camera, answers = browser(lambda picture: 7)
    send(camera, 1)
    answers.get(timeout=60)
    assert camera.error.startswith('TraitError: ')


def test_captioners():
    class Captioner:
        def caption(self, images, options='own'):
            return [f'{len(images)} {options}']

    assert as_callable(len)('abc') == 3
    assert (
        as_callable(Captioner())('picture') == '1 own'
        and as_callable(Captioner(), 'greedy')('picture') == '1 greedy'
    )


def test_traits_are_checked():
    from traitlets import TraitError

    assert Webcam(str, pause=2, width=224).pause == 2
    for wrong in dict(pause=-1), dict(width=0):
        pytest.raises(TraitError, Webcam, str, **wrong)


def test_closing_ends_the_thread():
    camera, answers = browser(lambda picture: f'{threading.get_ident()}')
    send(camera, 1)
    answers.get(timeout=60)
    [thread] = [t for t in threading.enumerate() if f'{t.ident}' == camera.caption]
    camera.close()
    thread.join(60)
    assert not thread.is_alive()


def test_importing_it_imports_no_model():
    heavy = {'torch', 'transformers', 'cv2'}
    code = f'import sys, clipcap.webcam; assert not {heavy} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)


# ---- the newest
def test_newest_in_order_never_twice_and_the_last_one():
    newest, seen = Newest(), []

    def read():
        seen.extend(newest)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(20_000):
        newest.put(n)
    newest.close()
    for reader in readers:
        reader.join(60)
    assert len(set(seen)) == len(seen) and max(seen) == 19_999
    assert list(newest) == []


# ---- cameras
def test_a_file_is_played_at_its_own_speed_and_frames_are_dropped(tmp_path):
    path, began, seen = film(tmp_path / 'film.mp4'), time.monotonic(), []
    with open_camera(path) as pictures:
        for picture in pictures:
            seen.append(number_of(picture))
            time.sleep(0.2)  # five frames long
    assert time.monotonic() - began >= 49 / 25
    assert seen == sorted(set(seen)) and seen[-1] == 49 and len(seen) < 25, seen


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='looks into /proc')
def test_the_file_is_released(tmp_path):
    path = film(tmp_path.resolve() / 'film.mp4')

    def held():
        files = map(os.path.realpath, Path('/proc/self/fd').iterdir())
        return [file for file in files if file == str(path)]

    with open_camera(path) as pictures:
        next(pictures)
        assert held()
    assert not held()
    with pytest.raises(KeyError), open_camera(path) as pictures:
        raise KeyError
    assert not held()


@pytest.mark.skipif(not videos, reason='needs the shared videos')
@pytest.mark.parametrize('path', videos, ids=lambda p: p.name)
def test_real_files(path):
    with open_camera(path) as pictures:
        first, second = next(pictures), next(pictures)
    assert first.mode == 'RGB' and first.size == second.size and max(first.size) <= 1280


@pytest.mark.parametrize(
    'source, words',
    [
        ('99', 'camera 99: not found'),
        ('99999999999999999999', 'not found'),
        ('/dev/video99', 'camera 99: not found'),
        ('²', 'No such file'),
        ('-1', 'No such file'),
        ('missing.mp4', 'No such file'),
        ('text.mp4', 'not a video'),
        ('http://localhost:9/none', 'not found'),
        ('http://localhost:9/\udcff', 'an address begins with'),
        ('concat://a.mp4', 'an address begins with'),
        ('file:///etc/passwd', 'an address begins with'),
    ],
)
def test_what_is_no_camera(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    Path('text.mp4').write_text('no video' * 100)
    with pytest.raises(ClipcapError, match=words), open_camera(source):
        pass


def test_a_dripping_address_is_given_up(monkeypatch):
    import clipcap.webcam

    monkeypatch.setattr(clipcap.webcam, 'PATIENCE', 1000)  # ms
    with socket.create_server(('127.0.0.1', 0)) as server:

        def drip():
            with contextlib.suppress(OSError), server.accept()[0] as client:
                client.sendall(b'HTTP/1.0 200 OK\r\nContent-Type: video/mp4\r\n\r\n')
                while True:
                    client.sendall(b'\0')
                    time.sleep(0.2)

        threading.Thread(target=drip, daemon=True).start()
        address = f'http://127.0.0.1:{server.getsockname()[1]}/camera'
        with pytest.raises(ClipcapError, match='not found'), open_camera(address):
            pass


# ---- the command
@pytest.fixture
def fake(monkeypatch):
    "A captioner that tells the number of the frame, or which side is darker"
    from clipcap import image

    class Captioner:
        def caption(self, images, options):
            pixels = np.asarray(images[0]).mean((0, 2))
            if abs(pixels[0] - pixels[-1]) < 30:
                return [f'frame {number_of(images[0])}']
            return ['left' if pixels[0] < pixels[-1] else 'right']

    monkeypatch.setattr(image, 'Captioner', lambda *_: Captioner())


def printed_captions(source, *options):
    printed, complaints = clipcap('webcam', '--no-window', '--source', source, *options)
    rows = [line.split('\t') for line in printed.splitlines()]
    assert not complaints
    for moment, _ in rows:
        time.strptime(moment, '%H:%M:%S')
    return [text for _, text in rows]


def test_command_prints_what_changes(tmp_path, fake):
    captions = printed_captions(film(tmp_path / 'film.mp4'), '--captions', 5, '--pause', 0.1)
    assert 1 <= len(captions) <= 5 and len(set(captions)) == len(captions)
    assert all(text.startswith('Frame ') and text.endswith('.') for text in captions)
    still = tmp_path / 'still.mp4'
    code = cv2.VideoWriter_fourcc(*'mp4v')
    video = cv2.VideoWriter(str(still), cv2.CAP_FFMPEG, code, 25, (96, 64))
    row = np.linspace(0, 250, 96, dtype=np.uint8)[None, :, None]
    for _ in range(25):
        video.write(np.repeat(row, 64, 0).repeat(3, 2))
    video.release()
    assert printed_captions(still) == ['Left.']
    assert printed_captions(still, '--mirror') == ['Right.']


@pytest.mark.parametrize(
    'wrong',
    [('--pause', 'inf'), ('--pause', 'nan'), ('--beams', 10**9), ('--captions', 0)],
)
def test_usage(wrong):
    clipcap('webcam', '--no-window', *wrong, code=2)


def test_command_without_camera_or_display(monkeypatch, fake):
    line = complaint('webcam', '--no-window', '--source', 99)
    assert line.startswith('clipcap: camera 99: not found')
    for name in 'DISPLAY', 'WAYLAND_DISPLAY':
        monkeypatch.delenv(name, raising=False)
    if sys.platform.startswith('linux'):
        assert '--no-window' in complaint('webcam')
    monkeypatch.setenv('DISPLAY', ':987')  # where nobody listens
    if sys.platform.startswith('linux'):
        assert '--no-window' in complaint('webcam')


def heed_interrupts():
    # a shell's background jobs, CI's perhaps, are deaf to it
    signal.signal(signal.SIGINT, signal.SIG_DFL)


COMMAND = [sys.executable, '-m', 'clipcap.cli.main', 'webcam']


@pytest.mark.skipif(sys.platform == 'win32', reason='sends SIGINT')
def test_ctrl_c(tmp_path):
    source = film(tmp_path / 'film.mp4', frames=50, fps=1)
    command = [*COMMAND, '--no-window', '--beams', '1', '--source', source]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interrupts
    ) as run:
        assert run.stdout.readline().count('\t') == 1
        run.send_signal(signal.SIGINT)
        _, complaints = run.communicate(timeout=120)
    assert run.returncode == 130 and 'Traceback' not in complaints, complaints


@pytest.mark.skipif(not shutil.which('Xvfb'), reason='needs Xvfb')
def test_window(tmp_path):
    screen = ['Xvfb', '-displayfd', '1', '-screen', '0', '800x600x24']
    with subprocess.Popen(
        screen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            display = f':{server.stdout.readline().strip()}'  # once it is ready
            command = [*COMMAND, '--source', film(tmp_path / 'film.mp4', fps=5), '--captions', '3']
            environment = os.environ | dict(DISPLAY=display)
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=300
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
        finally:
            server.terminate()
