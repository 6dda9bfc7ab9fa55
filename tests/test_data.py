"clipcap.data on the real captions files, on the drawn sample that git holds, and on every kind of broken picture"

import http.server
import io
import os
import socket
import struct
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcap.base.captions import find_dataset, read_captions, read_dataset, read_table
from clipcap.base.files import ClipcapError
from clipcap.base.photos import list_images, open_image
from clipcap.base.scenes import draw_dataset

root = Path(__file__).resolve().parent.parent
shared = root.parent / 'shared' / 'data'
real = pytest.mark.skipif(not shared.is_dir(), reason=f'needs the real captions in {shared}')


def complaint(function, *args, **kwargs):
    "The single line with which `function` refuses"
    with pytest.raises(ClipcapError) as caught:
        function(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---- real captions
@real
@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'name, rows, photos', [('flickr8k', 35_000, 7_000), ('flickr30k', 155_070, 31_014)]
)
def test_real_captions(name, rows, photos):
    start = time.process_time()
    table = read_captions(shared / name / 'results.csv')
    assert time.process_time() - start < 2
    assert (
        len(table) == rows
        and table.image.nunique() == photos
        and (table.image.value_counts() == 5).all()
    )
    assert (
        table.image.str.fullmatch(r'\d+(_[0-9a-f]+)?\.jpg').all()
        and (table.caption == table.caption.str.strip()).all()
    )
    if name == 'flickr30k':  # the row that has lost its second bar
        assert (
            table[table.image == '2199200615.jpg'].caption.iloc[4] == 'A dog runs across the grass.'
        )


@real
def test_real_data_set():
    table, photos = read_dataset(shared / 'flickr8k')
    assert photos == shared / 'flickr8k' / 'images'
    assert table.drop_duplicates('image').split.value_counts().to_dict() == dict(
        train=6_000, val=1_000
    )


# ---- the drawn sample
def test_the_sample_is_what_draw_dataset_draws(tmp_path):
    sample, drawn = root / 'data' / 'sample', draw_dataset(tmp_path / 'drawn', 60)
    assert find_dataset(root) == sample or (root / 'data' / 'raw').is_dir()
    for name in 'results.csv', 'splits.csv':
        assert (sample / name).read_text() == (drawn / name).read_text()
    assert [p.name for p in list_images(sample / 'images')] == [
        p.name for p in list_images(drawn / 'images')
    ]
    for ours, again in zip(
        list_images(sample / 'images'), list_images(drawn / 'images')
    ):  # another libjpeg may round otherwise
        assert (
            abs(np.asarray(open_image(ours), int) - np.asarray(open_image(again), int)).mean() < 2
        )
    table, _ = read_dataset(sample)
    assert set(table.split) == {'train', 'val', 'test'} and (table.image.value_counts() == 5).all()


# ---- odd tables
@pytest.mark.filterwarnings('ignore:.*rows lack')
def test_tables_as_people_write_them(tmp_path):
    file = tmp_path / 'table.csv'
    file.write_bytes(
        '\ufeffimage;caption;split\r\na b.jpg;"A ""big"" dog; brown.";Validation\r\n\r\nb.jpg;None;test\r\n'.encode()
    )
    with pytest.warns(UserWarning, match='1 of 3 rows .* line 3'):
        table = read_captions(file)
    assert table.values.tolist() == [
        ['a b.jpg', 'A "big" dog; brown.', 'val'],
        ['b.jpg', 'None', 'test'],
    ]
    file.write_text('image,caption,split\na.jpg,A dog.,holdout\n')
    assert 'holdout' in complaint(read_table, file)
    for content in (
        b'',
        b'\n\n',
        b'\xff\xfe\x00',
        b'image,caption\n',
        b'PK\x03\x04\xff',
        b'[]',
        b'{}',
        b'{"images": 3}',
        b'x' * 300_000 + b'|',
        b'image,caption\n"' + b'x' * 300_000,
    ):
        file.write_bytes(content)
        assert str(file) in complaint(read_captions, file)
    assert 'Is a directory' in complaint(read_captions, tmp_path)


def test_splits_that_cannot_be_stored_are_the_same_every_time(tmp_path, monkeypatch):
    draw_dataset(tmp_path, 10)
    (tmp_path / 'splits.csv').unlink()

    def refuse(*args):
        raise PermissionError('read-only')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', refuse)
        first, _ = read_dataset(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'images',
        'results.csv',
    ]  # and nothing half-written
    again, _ = read_dataset(tmp_path)
    assert first.equals(again) and (tmp_path / 'splits.csv').exists()


def test_a_name_must_not_lead_out_of_the_photo_folder(tmp_path):
    (tmp_path / 'images').mkdir()
    for name in '../x.jpg', 'a/../../x.jpg', '/etc/x.jpg', '..', 'a\\..\\x.jpg', 'C:x.jpg':
        (tmp_path / 'captions.csv').write_text(f'image,caption\n{name},A dog.\n')
        assert 'leads out' in complaint(read_dataset, tmp_path)


# ---- pictures
def png(width, height, depth=8, kind=2, data=b''):
    "A PNG with this header, whatever its pixels are"
    chunk = lambda name, body: (
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    )
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0))
        + chunk(b'IDAT', data)
        + chunk(b'IEND', b'')
    )


@pytest.fixture
def photo():
    "A scene whose quarters are red, green, blue and white"
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30, 0], pixels[:20, 30:, 1], pixels[20:, :30, 2], pixels[20:, 30:] = (
        255,
        255,
        255,
        255,
    )
    return Image.fromarray(pixels)


def quarters(image):
    return [image.getpixel((x, y)) for y in (10, 30) for x in (15, 45)]


def near(image, *colours):
    assert image.mode == 'RGB' and image.size == (60, 40)
    return all(
        abs(a - b) < 30
        for pixel, colour in zip(quarters(image), colours)
        for a, b in zip(pixel, colour)
    )


RGBW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image, format, **options):
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_good_pictures_of_every_kind(photo, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = dict(
        save_all=True, append_images=[photo.transpose(Image.Transpose.ROTATE_180)], duration=50
    )
    for data in (
        saved(photo, 'JPEG', quality=95),
        saved(photo.convert('CMYK'), 'JPEG', quality=95),
        saved(photo, 'PNG'),
        saved(photo.convert('P'), 'PNG'),
        saved(photo, 'BMP'),
        saved(photo, 'TIFF'),
        saved(photo, 'WEBP', lossless=True),
        saved(photo, 'GIF', **frames),
        saved(photo, 'WEBP', lossless=True, **frames),
        saved(photo.transpose(Image.Transpose.ROTATE_90), 'JPEG', quality=95, exif=turned),
    ):
        (tmp_path / 'photo').write_bytes(data)  # the name's end does not matter
        assert (
            near(open_image(data), *RGBW)
            and near(open_image(tmp_path / 'photo'), *RGBW)
            and near(open_image(io.BytesIO(data)), *RGBW)
        )
    once = open_image(saved(photo.transpose(Image.Transpose.ROTATE_90), 'JPEG', exif=turned))
    assert open_image(once).size == once.size  # a picture is turned upright once only
    assert near(open_image(saved(photo, 'JPEG', quality=95, exif=b'Exif\0\0MM\0*garbage')), *RGBW)


def test_see_through_and_grey_pictures(photo):
    clear = photo.convert('RGBA')
    clear.paste((0, 0, 0, 0), (0, 0, 30, 20))
    assert near(open_image(saved(clear, 'PNG')), (255, 255, 255), *RGBW[1:]) and near(
        open_image(clear), (255, 255, 255), *RGBW[1:]
    )
    palette = photo.convert('P', palette=Image.Palette.ADAPTIVE)
    assert near(
        open_image(saved(palette, 'PNG', transparency=palette.getpixel((10, 10)))),
        (255, 255, 255),
        *RGBW[1:],
    )
    grey = np.asarray(photo.convert('L'))
    shades = [(v, v, v) for v in (76, 150, 29, 255)]
    for image in (
        photo.convert('L'),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey.astype(np.int32) * 257),
        Image.fromarray(grey.astype(np.float32) / 255),
        Image.fromarray(grey.astype(np.float32)),
    ):
        assert near(open_image(image), *shades)
    assert near(open_image(saved(Image.fromarray(grey.astype(np.uint16) * 257), 'PNG')), *shades)
    assert near(
        open_image(photo.convert('1')),
        *[quarters(photo.convert('1').convert('RGB'))[i] for i in range(4)],
    )


def test_arrays_and_tensors(photo):
    torch = pytest.importorskip('torch')
    pixels = np.asarray(photo)
    for array in (
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float16),
        pixels.astype(np.uint16) * 257,
        pixels.transpose(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1),
        torch.tensor(pixels / 255, requires_grad=True),
        np.dstack([pixels, np.full((40, 60), 255, np.uint8)]),
        torch.tensor(pixels).permute(2, 0, 1).float() / 255,
    ):
        assert near(open_image(array), *RGBW)
    assert (
        open_image(torch.zeros(3, 5, 3)).size == (3, 5)
        and open_image(np.zeros((5, 3, 1))).size == (3, 5)
        and open_image(np.zeros((5, 3))).size == (3, 5)
    )
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
        assert complaint(open_image, array)


def test_odd_sizes(photo, tmp_path):
    for size in (1, 1), (20_000, 10), (10, 20_000):
        photo.resize(size).save(tmp_path / 'odd.png')
        assert open_image(tmp_path / 'odd.png').size == size
    assert '60 x 40' in complaint(open_image, photo, max_pixels=2399) and open_image(
        photo, max_pixels=2400
    ).size == (60, 40)


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
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        assert name in complaint(open_image, tmp_path / name) and complaint(open_image, data)
    assert 'truncated' in complaint(open_image, tmp_path / 'cut.jpg') and 'empty' in complaint(
        open_image, tmp_path / 'empty.jpg'
    )
    assert 'bomb' in complaint(open_image, tmp_path / 'bomb.png')
    assert 'No such file' in complaint(
        open_image, tmp_path / 'missing.jpg'
    ) and 'directory' in complaint(open_image, str(tmp_path))
    for nonsense in (None, 3, [], b'', 'a\0b', ''):
        assert complaint(open_image, nonsense)


@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything'
)
def test_a_picture_that_may_not_be_read(photo, tmp_path):
    photo.save(tmp_path / 'secret.png')
    (tmp_path / 'secret.png').chmod(0)
    assert 'Permission' in complaint(open_image, tmp_path / 'secret.png')


# ---- addresses
@pytest.fixture
def address(photo):
    "A server on this machine: /photo.png, /huge (more than is read), anything else is missing"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ('/photo.png', '/huge') else 404)
            self.end_headers()
            try:
                self.wfile.write(
                    saved(photo, 'PNG')
                    if self.path == '/photo.png'
                    else bytes(2**26 + 9)
                    if self.path == '/huge'
                    else b''
                )
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_pictures_behind_addresses(address, photo, tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    photo.save(tmp_path / 'a photo.png')
    assert near(open_image(f'{address}/photo.png'), *RGBW) and near(
        open_image((tmp_path / 'a photo.png').as_uri()), *RGBW
    )
    assert '404' in complaint(open_image, f'{address}/other.png') and '64 MB' in complaint(
        open_image, f'{address}/huge'
    )
    for wrong in (
        'http://127.0.0.1:9/x.png',
        'ftp://127.0.0.1/x.png',
        'http://',
        'file:///none.png',
        'file://elsewhere/x.png',
        'http://a b/x.png',
    ):
        assert wrong in complaint(open_image, wrong)


def test_a_slow_address_is_given_up(monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as silent:  # takes the call and never answers
        monkeypatch.setenv('no_proxy', '*')
        patient = urllib.request.urlopen
        monkeypatch.setattr(
            urllib.request,
            'urlopen',
            lambda *args, timeout: patient(*args, timeout=min(timeout, 0.2)),
        )
        assert 'timed out' in complaint(
            open_image, f'http://127.0.0.1:{silent.getsockname()[1]}/x.png'
        )


# ---- many photos
def test_folders_and_patterns(photo, tmp_path):
    for name in ('b.JPG', 'a.png', '.hidden.png', 'notes.txt', 'c[1].jpg'):
        photo.convert('RGB').save(tmp_path / name, 'PNG')
    (tmp_path / 'folder.jpg').mkdir()
    photo.save(tmp_path / 'folder.jpg' / 'd.jpg')
    names = lambda source: [p.name for p in list_images(source)]
    assert (
        names(tmp_path) == ['a.png', 'b.JPG', 'c[1].jpg']
        and names(tmp_path / 'c[1].jpg') == ['c[1].jpg']
        and names(tmp_path / 'notes.txt') == ['notes.txt']
    )
    assert names(str(tmp_path / '**' / '*.jpg')) == ['c[1].jpg', 'd.jpg']
    (tmp_path / 'none').mkdir()
    for nothing in ('none', 'missing.jpg', '*.tiff'):
        assert str(tmp_path / nothing) in complaint(list_images, tmp_path / nothing)
