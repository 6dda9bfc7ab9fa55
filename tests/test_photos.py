"clipcap.base.photos on every kind of picture, broken or not; addresses; memory"

import ast
import http.server
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from clipcap.base.photos import (
    ClipcapError,
    fetch,
    list_images,
    open_image,
    photo_bytes,
    read_ahead,
)

posix = pytest.mark.skipif(os.name == 'nt', reason='what only POSIX has')
RGBW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
WHITE = (255, 255, 255)


def png(width, height, depth=8, kind=2, data=b''):
    "A PNG with this header, whatever its pixels are"

    def chunk(name, body):
        check = struct.pack('>I', zlib.crc32(name + body))
        return struct.pack('>I', len(body)) + name + body + check

    head = struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0)
    chunks = chunk(b'IHDR', head) + chunk(b'IDAT', data) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


@pytest.fixture
def photo():
    "A scene whose quarters are red, green, blue and white"
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30, 0] = 255
    pixels[:20, 30:, 1] = 255
    pixels[20:, :30, 2] = 255
    pixels[20:, 30:] = 255
    return Image.fromarray(pixels)


def quarters(image):
    return [image.getpixel((x, y)) for y in (10, 30) for x in (15, 45)]


def near(image, *colours):
    "Whether the quarters of an image have about these colours"
    assert image.mode == 'RGB' and image.size == (60, 40)
    pairs = zip(quarters(image), colours, strict=True)
    return all(abs(a - b) < 30 for pair in pairs for a, b in zip(*pair, strict=True))


def saved(image, format, **options):
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


# ---- pictures
def test_good_pictures_of_every_kind(photo, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    lying = photo.transpose(Image.Transpose.ROTATE_90)
    upside_down = photo.transpose(Image.Transpose.ROTATE_180)
    frames = dict(save_all=True, append_images=[upside_down], duration=50)
    for data in (
        saved(photo, 'JPEG', quality=95),
        saved(photo, 'MPO', quality=95, save_all=True, append_images=[upside_down]),
        saved(photo.convert('CMYK'), 'JPEG', quality=95),
        saved(photo, 'PNG'),
        saved(photo.convert('P'), 'PNG'),
        saved(photo, 'BMP'),
        saved(photo, 'TIFF'),
        saved(photo, 'PPM'),
        saved(photo, 'JPEG2000'),
        saved(photo, 'WEBP', lossless=True),
        saved(photo, 'GIF', **frames),
        saved(photo, 'WEBP', lossless=True, **frames),
        saved(lying, 'JPEG', quality=95, exif=turned),
    ):
        (tmp_path / 'photo').write_bytes(data)  # the name's end does not matter
        for source in data, tmp_path / 'photo', io.BytesIO(data), (tmp_path / 'photo').as_uri():
            assert near(open_image(source), *RGBW)
        assert photo_bytes((tmp_path / 'photo').as_uri()) == data
    once = open_image(saved(lying, 'JPEG', exif=turned))
    assert open_image(once).size == once.size  # a picture is turned upright once only


def test_all_eight_turns_are_undone(photo):
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(photo, 'PNG', exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert open_image(data).tobytes() == wanted.tobytes()


HEADLESS = (
    b'\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00'
)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize(
    'exif',
    {
        'headless': HEADLESS,
        'headless after its name': b'Exif\0\0' + HEADLESS,
        'as text': b"Exif\0\0b'Exif\\x00\\x00II*\\x00'",
        'garbage': b'Exif\0\0MM\0*garbage',
        'cut off': b'Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01',
        'empty': b'Exif\0\0',
        'far away': b'Exif\0\0II*\0\xff\xff\xff\xff',
        'text for a number': b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0up\0\0\0\0\0\0',
    }.items(),
    ids=lambda item: item[0],
)
def test_sound_pixels_are_opened_whatever_their_exif(photo, format, exif):
    options = dict(quality=95) if format == 'JPEG' else dict(lossless=True)
    data = saved(photo, format, exif=exif[1], **options)
    assert exif[1][6:] in data
    assert near(open_image(data), *RGBW)


@pytest.mark.parametrize(
    'name, body, check',
    [
        (b'pHYs', b'\0', None),
        (b'gAMA', b'', None),
        (b'iCCP', b'', None),
        (b'tEXt', b'a\0b', 1),
        (b'zTXt', b'k\0\0' + zlib.compress(bytes(2**21)), None),
        (b'acTL', b'\0', None),
        (b'fcTL', bytes(26), None),
    ],
)
def test_sound_pixels_are_opened_whatever_else_is_damaged(photo, name, body, check):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(photo.transpose(Image.Transpose.ROTATE_90), 'PNG', exif=exif)
    check = zlib.crc32(name + body) if check is None else check
    odd = struct.pack('>I', len(body)) + name + body + struct.pack('>I', check)
    assert near(open_image(data[:33] + odd + data[33:]), *RGBW)
    assert refusal(open_image, data[:33] + odd + data[33:-40])


def test_a_jpeg_with_a_damaged_header_of_its_program(photo):
    data = saved(photo, 'JPEG', quality=95)
    for odd in b'\xff\xe0\0\x07JFIF\0', b'\xff\xed\0\x17Photoshop 3.0\x008BIM\x04\x04\0':
        assert near(open_image(data[:2] + odd + data[2:]), *RGBW)


def test_see_through_and_grey_pictures(photo):
    clear = photo.convert('RGBA')
    clear.paste((0, 0, 0, 0), (0, 0, 30, 20))
    for source in saved(clear, 'PNG'), clear:
        assert near(open_image(source), WHITE, *RGBW[1:])
    palette = photo.convert('P', palette=Image.Palette.ADAPTIVE)
    holed = saved(palette, 'PNG', transparency=palette.getpixel((10, 10)))
    assert near(open_image(holed), WHITE, *RGBW[1:])
    grey = np.asarray(photo.convert('L'))
    shades = [(v, v, v) for v in (76, 150, 29, 255)]
    for image in (
        photo.convert('L'),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey.astype(np.int32) * 257),
        Image.fromarray(grey.astype(np.float32) / 255),
        Image.fromarray(grey.astype(np.float32)),
        saved(Image.fromarray(grey.astype(np.uint16) * 257), 'PNG'),
    ):
        assert near(open_image(image), *shades)
    bits = photo.convert('1')
    assert near(open_image(bits), *quarters(bits.convert('RGB')))


def test_arrays_and_tensors(photo):
    torch = pytest.importorskip('torch')
    pixels = np.asarray(photo)
    tensor = torch.tensor(pixels)
    for array in (
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float16),
        pixels.astype(np.uint16) * 257,
        pixels.transpose(2, 0, 1),
        tensor.permute(2, 0, 1),
        torch.tensor(pixels / 255, requires_grad=True),
        np.dstack([pixels, np.full((40, 60), 255, np.uint8)]),
        tensor.permute(2, 0, 1).float() / 255,
    ):
        assert near(open_image(array), *RGBW)
    assert open_image(torch.zeros(3, 5, 3)).size == (3, 5)
    assert open_image(np.zeros((5, 3, 1))).size == open_image(np.zeros((5, 3))).size == (3, 5)
    for array in (
        pixels * 2.0,
        pixels / -255,
        np.full((4, 4), np.nan),
        np.zeros((4, 4), int),
        np.zeros((2, 4, 4, 3)),
        np.zeros((7, 4, 5)),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.array('x'),
    ):
        assert refusal(open_image, array)


def test_odd_sizes(photo, tmp_path):
    for size in (1, 1), (20_000, 10), (10, 20_000):
        photo.resize(size).save(tmp_path / 'odd.png')
        assert open_image(tmp_path / 'odd.png').size == size
    assert '60 x 40' in refusal(open_image, photo, max_pixels=2399)
    assert open_image(photo, max_pixels=2400).size == (60, 40)


def test_broken_pictures_are_refused_in_one_line(photo, tmp_path):
    jpeg, whole = saved(photo.resize((300, 200)), 'JPEG'), saved(photo, 'PNG')
    broken = {
        'text.jpg': b'not a picture',
        'empty.jpg': b'',
        'zeros.jpg': bytes(5000),
        'cut.jpg': jpeg[: len(jpeg) // 2],
        'head.jpg': jpeg[:20],
        'cut.png': whole[: len(whole) // 2],
        'noise.png': png(60, 40, data=zlib.compress(b'12')),
        'rot.png': whole[:60] + bytes(40) + whole[100:],
        'bomb.png': png(50_000, 50_000),
        'cut.gif': saved(photo, 'GIF')[:40],
        'page.jpg': b'<!DOCTYPE html><html>404</html>',
        'none.webp': b'RIFF\x24\x00\x00\x00WEBPVP8 ',
        'phone.heic': b'\0\0\0\x18ftypheic\0\0\0\0mif1heic',
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        assert name in refusal(open_image, tmp_path / name)
        if data:
            assert refusal(open_image, data, name=name).startswith(f'{name}: ')
    assert 'truncated' in refusal(open_image, tmp_path / 'cut.jpg')
    assert 'empty' in refusal(open_image, tmp_path / 'empty.jpg')
    assert 'not a photo, or damaged' in refusal(open_image, tmp_path / 'text.jpg')
    assert 'No such file' in refusal(open_image, tmp_path / 'missing.jpg')
    assert 'directory' in refusal(open_image, str(tmp_path))
    for nonsense in (None, 3, [], b'', 'a\0b', ''):
        assert refusal(open_image, nonsense)
    odd = tmp_path / 'two\nlines.jpg'
    assert refusal(open_image, odd).endswith(r'two\nlines.jpg: No such file or directory')


def test_a_heic_photo_is_opened_or_told_how_to(photo, tmp_path):
    try:
        import pillow_heif
    except ImportError:
        data = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'
        assert 'pip install pillow-heif' in refusal(open_image, data)
    else:
        pillow_heif.register_heif_opener()
        assert near(open_image(saved(photo, 'HEIF', quality=95)), *RGBW)


@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything'
)
def test_a_picture_that_may_not_be_read(photo, tmp_path):
    photo.save(tmp_path / 'secret.png')
    (tmp_path / 'secret.png').chmod(0)
    assert 'Permission' in refusal(open_image, tmp_path / 'secret.png')


@posix
def test_no_other_program_is_started_for_a_picture(tmp_path):
    "PostScript, whatever the name says, makes Pillow run `gs`; this one would leave a trace"
    program, trace = tmp_path / 'bin' / 'gs', tmp_path / 'trace'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$0" "$@" >> {trace}\nexit 1\n')
    program.chmod(0o755)
    script = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
    dos = struct.pack('<IIIIIIIH', 0xC6D3D0C5, 30, len(script), 0, 0, 0, 0, 0xFFFF) + script
    files = []
    for name, data in {'x.jpg': script, 'x.eps': script, 'dos.png': dos}.items():
        (tmp_path / name).write_bytes(data)
        files.append(str(tmp_path / name))
    code = """
import sys
from PIL import Image
Image.init()
from clipcap.base.photos import ClipcapError, open_image
for name in sys.argv[1:]:
    for source in name, open(name, 'rb').read(), open(name, 'rb'):
        try: open_image(source)
        except ClipcapError as fault: print(fault)
"""
    env = os.environ | {'PATH': f'{program.parent}:{os.environ["PATH"]}'}
    command = [sys.executable, '-c', code, *files]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout.count('not a photo, or damaged') == 9, run
    assert not trace.exists()


def test_no_picture_is_opened_in_any_format():
    "`Image.open` names its formats wherever it is called"
    package = Path(sys.modules['clipcap.base.photos'].__file__).parent.parent
    calls = 0
    for path in package.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'Image.open':
                calls += 1
                assert 'formats' in [keyword.arg for keyword in node.keywords], path
    assert calls >= 2


# ---- memory
def test_refused_photos_do_not_stay_in_memory(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 1000, 3), dtype=np.uint8)
    data = saved(Image.fromarray(pixels).resize((3000, 2000)), 'JPEG', quality=60)
    (tmp_path / 'cut.jpg').write_bytes(data[: len(data) * 3 // 4])
    code = """
import resource, sys
from clipcap.base.photos import ClipcapError, open_image, read_ahead
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
kept = [r for b in read_ahead([sys.argv[1]]*4, open_image, 2, keep_faults=True) for _, r in b]
before = peak()
for batch in read_ahead([sys.argv[1]]*40, open_image, 4, keep_faults=True):
    kept += [result for _, result in batch]
for _ in range(20):
    try: open_image(sys.argv[1])
    except ClipcapError as fault: kept.append(fault)
assert len(kept) == 64 and all('truncated' in str(fault) for fault in kept), kept[:1]
print(peak() - before)
"""
    if os.name == 'nt':
        pytest.skip('measured where resource is')
    command = [sys.executable, '-c', code, tmp_path / 'cut.jpg']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 150, f'{run.stdout} MB more: 60 decoded photos would be 1,080'


# ---- addresses
class Handler(http.server.BaseHTTPRequestHandler):
    "/photo.png and /fotos/é.png, /huge (more than is read), /drip (a byte now and then) ..."

    def do_GET(self):
        if self.path == '/slow-head':
            self.wfile.write(b'HTTP/1.0 200 OK\r\n')
            self.drip(b'X-Slow: yes\r\n' * 99)
            return
        if self.path == '/elsewhere':
            self.send_response(302)
            self.send_header('Location', self.server.elsewhere)
            self.end_headers()
            return
        known = {'/photo.png', '/fotos/%C3%A9%20a.png?%C3%BC=1', '/huge', '/drip'}
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        if self.path == '/drip':
            self.drip(self.server.photo)
        elif self.path == '/huge':
            self.send(bytes(2**26 + 9))
        elif self.path in known:
            self.send(self.server.photo)

    def send(self, data):
        try:
            self.wfile.write(data)
        except OSError:
            self.server.gone.set()

    def drip(self, data):
        for byte in data:
            if self.server.gone.wait(0.2):
                return
            self.send(bytes([byte]))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(photo, monkeypatch):
    "A server on this machine"
    monkeypatch.setenv('no_proxy', '*')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.photo, server.gone = saved(photo, 'PNG'), threading.Event()
    server.address = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.gone.set()
    server.shutdown()
    server.server_close()


def test_pictures_behind_addresses(server, photo, tmp_path):
    photo.save(tmp_path / 'a photo é.png')
    assert near(open_image(f'{server.address}/photo.png'), *RGBW)
    assert near(open_image((tmp_path / 'a photo é.png').as_uri()), *RGBW)
    assert near(open_image(f'file://localhost{tmp_path}/a photo é.png'), *RGBW)
    assert '404' in refusal(open_image, f'{server.address}/other.png')
    assert '64 MB' in refusal(open_image, f'{server.address}/huge')
    for wrong in (
        'http://127.0.0.1:9/x.png',
        'http://',
        'http://127.0.0.1:99999/x.png',
        'http://[::1/x.png',
        'file:///none.png',
        'file://elsewhere/x.png',
        'http://a b/x.png',
        'ftp://127.0.0.1/x.png',
    ):
        assert wrong in refusal(open_image, wrong)


def test_addresses_with_letters_of_any_script(server):
    assert near(open_image(f'{server.address}/fotos/é a.png?ü=1'), *RGBW)
    assert near(open_image(f'{server.address}/fotos/%C3%A9%20a.png?%C3%BC=1'), *RGBW)
    unknown = refusal(open_image, 'http://bücher.invalid/é.png')
    assert unknown.startswith('http://bücher.invalid/é.png: ') and 'codec' not in unknown


def test_a_server_cannot_send_us_to_files(server, tmp_path, photo):
    photo.save(tmp_path / 'a.png')
    for place in (tmp_path / 'a.png').as_uri(), 'ftp://127.0.0.1/a.png':
        server.elsewhere = place
        assert refusal(open_image, f'{server.address}/elsewhere')


@pytest.mark.parametrize('path', ['/drip', '/slow-head'])
def test_a_server_that_drips_is_given_up(server, path):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match='not complete after 1 seconds'):
        fetch(server.address + path, seconds=1)
    assert time.monotonic() - start < 10


def test_a_silent_address_is_given_up(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    silent = socket.create_server(('127.0.0.1', 0))  # takes the call and never answers
    with silent, pytest.raises(TimeoutError):
        fetch(f'http://127.0.0.1:{silent.getsockname()[1]}/x.png', seconds=0.5)


# ---- many photos
def test_folders_and_patterns(photo, tmp_path):
    for name in ('b.JPG', 'a.png', '.hidden.png', 'notes.txt', 'c[1].jpg'):
        photo.convert('RGB').save(tmp_path / name, 'PNG')
    (tmp_path / 'folder.jpg').mkdir()
    photo.save(tmp_path / 'folder.jpg' / 'd.jpg')

    def names(source):
        return [path.name for path in list_images(source)]

    assert names(tmp_path) == ['a.png', 'b.JPG', 'c[1].jpg']
    assert names(tmp_path / 'c[1].jpg') == ['c[1].jpg']
    assert names(tmp_path / 'notes.txt') == ['notes.txt']
    assert names(str(tmp_path / '**' / '*.jpg')) == ['c[1].jpg', 'd.jpg']
    (tmp_path / 'none' / 'deeper').mkdir(parents=True)
    for nothing in ('none', 'missing.jpg', '*.tiff', 'a\0b'):
        assert str(tmp_path / 'none') in refusal(list_images, tmp_path / 'none')
        assert refusal(list_images, tmp_path / nothing)
    assert '**' in refusal(list_images, tmp_path / 'none')


def test_no_picture_is_passed_over_in_silence(photo, tmp_path):
    photo.save(tmp_path / 'a.jpg')
    for name in 'phone.HEIC', 'phone2.heif', 'old.JPE':
        (tmp_path / name).write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
    (tmp_path / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        names = [path.name for path in list_images(tmp_path)]
    assert names == ['a.jpg', 'gone.png', 'old.JPE', 'phone.HEIC', 'phone2.heif']
    for name in 'raw.NEF', 'drawing.svg', 'layers.psd':
        (tmp_path / name).touch()
    shutil.copy(tmp_path / 'a.jpg', tmp_path / 'without_suffix')
    (tmp_path / 'README').write_text('notes')
    for source in tmp_path, tmp_path / '*':
        with pytest.warns(UserWarning, match='4 pictures of other kinds.*drawing.svg') as said:
            assert len(list_images(source)) == 5
        assert len(said) == 1 and 'README' not in str(said[0].message)


@posix
def test_pipes_do_not_hang_anything(photo, tmp_path):
    photo.save(tmp_path / 'a.jpg')
    os.mkfifo(tmp_path / 'b.jpg')
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / 'c.jpg'))
    assert [path.name for path in list_images(tmp_path)] == ['a.jpg', 'b.jpg', 'c.jpg']
    for source in tmp_path / 'b.jpg', str(tmp_path / 'b.jpg'), (tmp_path / 'b.jpg').as_uri():
        assert 'not a file' in refusal(open_image, source)
    for source in tmp_path / 'c.jpg', '/dev/zero', 'file:///dev/zero':
        assert refusal(open_image, source)
    server.close()


@posix
def test_names_that_are_not_utf8(photo, tmp_path):
    name = os.fsdecode(b'caf\xe9.png')
    try:
        photo.save(tmp_path / name)
    except OSError:
        pytest.skip('this file system wants UTF-8')
    assert near(open_image(tmp_path / name), *RGBW)
    assert near(open_image((tmp_path / name).as_uri()), *RGBW)
    (tmp_path / name).write_bytes(b'x')
    told = refusal(open_image, list_images(tmp_path)[0])
    assert told.encode('utf-8').endswith(rb'caf\xe9.png: not a photo, or damaged')


def test_read_ahead_is_bounded_and_in_order():
    read, guard = [], threading.Lock()

    def note(source):
        with guard:
            read.append(source)
        if source == 5:
            raise ClipcapError('five')
        return -source

    batches = read_ahead(list(range(40)), note, batch_size=4, workers=3, keep_faults=True)
    for n, batch in enumerate(batches):
        time.sleep(0.01)
        assert len(read) <= 4 * (n + 3)
        assert [source for source, _ in batch] == list(range(4 * n, 4 * n + 4))
        assert all(result == -source or source == 5 for source, result in batch)
    assert len(read) == 40 and n == 9


def test_read_ahead_ends_soon_with_its_caller():
    read = []
    for _ in read_ahead(list(range(1000)), read.append, batch_size=10, workers=1):
        break
    assert len(read) <= 30
