"""Video: odd files made here, times checked against films whose frames carry their own number,
subtitles and films read back by others"""

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import wave
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import clipcap, complaint
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image

from clipcap.base.decode import DECODERS, VideoReader, video_span
from clipcap.base.files import ClipcapError
from clipcap.base.subtitles import (
    FORMATS,
    Cue,
    draw_subtitle,
    format_cues,
    make_cues,
    merge_alike,
    write_cues,
)
from clipcap.tools.mux import burn, choose_writer, mux
from clipcap.video import (
    caption_samples,
    in_background,
    sample_moments,
    sample_scenes,
    spread,
)

av = pytest.importorskip('av', reason='needs PyAV to make odd videos')
real = Path(__file__).resolve().parents[1].parent / 'shared' / 'data' / 'videos'
if not real.is_dir():
    real = Path('/work/shared/data/videos')
videos = sorted(real.glob('*.*')) if real.is_dir() else []
needs_videos = pytest.mark.skipif(not videos, reason='needs the shared videos')
needs_fifo = pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
CUES = [Cue(0, 1500, 'A dog & a cat.'), Cue(1500, 4000, 'Ein Mädchen läuft.')]
# ms: a frame rate that varies much
VARIED = np.cumsum([0, *np.random.default_rng(0).integers(17, 400, 59)]).tolist()


# ---- films made here
def numbered(number, size=(128, 96)):
    "A frame that says its number in 8 squares"
    frame = np.full((size[1], size[0], 3), 90, np.uint8)
    width = size[0] // 8
    for bit in range(8):
        frame[-size[1] // 4 :, width * bit : width * bit + width] = 255 * (number >> bit & 1)
    return frame


def grey(number, size):
    return np.full((size[1], size[0], 3), 90, np.uint8)


def number_of(picture):
    pixels = np.asarray(picture.convert('L'))
    row, width = pixels[-picture.height // 8], picture.width / 8
    return sum(int(row[int(width * bit + width / 2)] > 127) << bit for bit in range(8))


def silence(out, seconds, begin=0, rate=8000, layout='mono', codec='aac'):
    "A stream of silence, and its packets"
    stream = out.add_stream(codec, rate=rate, layout=layout)
    packets, step = [], 1024
    channels = stream.codec_context.layout.nb_channels
    for sample in range(0, int(rate * seconds), step):
        tone = av.AudioFrame.from_ndarray(np.zeros((channels, step), np.float32), 'fltp', layout)
        tone.rate, tone.pts, tone.time_base = rate, int(begin * rate) + sample, Fraction(1, rate)
        packets += stream.encode(tone)
    return packets + stream.encode(None)


def film(
    path,
    times,  # ms: when its frames are shown
    size=(128, 96),
    codec='libx264',
    pixels=None,
    frame=numbered,
    sound=None,  # how to make `silence`
    coding=None,  # options of the encoder
    **options,  # of the container
):
    "A video of frames shown at `times`"
    with av.open(str(path), 'w', options=options) as out:
        stream = out.add_stream(codec, rate=25, options=coding or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixels or ('yuvj420p' if codec == 'mjpeg' else 'yuv420p')
        if Path(path).suffix != '.avi':
            stream.codec_context.time_base = Fraction(1, 1000)
        packets = silence(out, **sound) if sound else []
        for number, moment in enumerate(times):
            picture = av.VideoFrame.from_ndarray(frame(number, size), 'rgb24')
            picture.pts, picture.time_base = moment, Fraction(1, 1000)
            if Path(path).suffix == '.avi':
                picture.pts, picture.time_base = round(moment / 40), Fraction(1, 25)
            packets += stream.encode(picture)
        packets += stream.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return path


def turn(path, size=(128, 96)):
    "Let an MP4 say that it is to be turned by 90 degrees"
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 4 + 40
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, size[1] << 16, 0, 1 << 30)
    data[at : at + 36] = struct.pack('>9i', *matrix)
    path.write_bytes(data)
    return path


class Numbers:
    "A captioner that reads the squares"

    def caption(self, images, options=None):
        return [f'number {number_of(image)}' for image in images]


def cues_of(path, moments, decoder=None):
    reader = VideoReader(path, decoder)
    captions = list(caption_samples(sample_moments(reader, moments), Numbers(), batch_size=4))
    return make_cues(captions, reader.end), reader


@pytest.fixture
def numbers(monkeypatch):
    "The command's captions are numbers of frames"
    from clipcap import image

    monkeypatch.setattr(image, 'Captioner', lambda *_: Numbers())


@pytest.fixture(params=list(DECODERS))
def decoder(request):
    return request.param


@pytest.fixture(params=['pyav', 'ffmpeg'])
def writer(request):
    if request.param == 'ffmpeg' and not shutil.which('ffmpeg'):
        pytest.skip('needs the command ffmpeg')
    return request.param


# ---- times: one clock
@pytest.mark.parametrize('name', ['vfr.mp4', 'vfr.mkv', 'vfr.webm'])
def test_times_are_presentation_timestamps(tmp_path, name, decoder):
    codec = 'libvpx' if name.endswith('webm') else 'libx264'  # with B-frames: in another order
    path = film(tmp_path / name, VARIED, codec=codec)
    assert list(VideoReader(path, decoder)) == VARIED
    begin, end = video_span(path, decoder)
    assert begin == 0 and abs(end - VARIED[-1]) <= 400
    for moments in spread(begin, end, 13), range(0, 10**9, 700), range(0, 10**9):
        cues, reader = cues_of(path, moments, decoder)
        assert [VARIED[int(cue.text[7:-1])] for cue in cues] == [cue.start for cue in cues]
        assert cues[0].start == 0
        assert all(a.start < a.end == b.start for a, b in zip(cues, cues[1:], strict=False))
        assert VARIED[-1] < cues[-1].end == reader.end <= VARIED[-1] + 400
        assert all(isinstance(moment, int) for cue in cues for moment in (cue.start, cue.end))


@pytest.mark.parametrize(
    'name, codec',
    [('a.mp4', 'mpeg4'), ('a.mkv', 'libx264'), ('a.webm', 'libvpx-vp9'), ('a.avi', 'mjpeg')],
)
def test_both_decoders_see_the_same(tmp_path, name, codec):
    path = film(tmp_path / name, range(0, 2000, 40), codec=codec, size=(320, 192))
    seen = []
    for decoder in DECODERS:
        reader = VideoReader(path, decoder)
        frames = [
            (moment, number_of(reader.picture()), reader.pixels(160).shape) for moment in reader
        ]
        seen.append((frames, reader.end, reader.broken, video_span(path, decoder)))
    assert seen[0] == seen[1]
    assert [frame[:2] for frame in seen[0][0]] == [(40 * n, n) for n in range(50)]
    assert seen[0][1:] == (2000, False, (0, 2000)) and seen[0][0][0][2] == (96, 160, 3)


@pytest.mark.parametrize('suffix', ['mp4', 'mkv', 'ts'])
def test_a_picture_that_begins_late(tmp_path, suffix):
    path = film(tmp_path / f'late.{suffix}', range(3000, 9000, 100), sound=dict(seconds=9))
    reader = VideoReader(path, 'pyav')
    times = list(reader)
    # Matroska and TS move all by the sound's warming up (1024 samples of 8000 per second)
    assert len(times) == 60 and 3000 <= times[0] <= 3130 and 9000 <= reader.end <= 9260
    begin, end = video_span(path, 'pyav')
    assert begin == times[0] and abs(end - reader.end) < 150
    cues, _ = cues_of(path, [0, 6000], 'pyav')
    assert [cue.text for cue in cues][0] == 'Number 0.' and cues[0].start == times[0]
    with pytest.raises(ClipcapError, match='pip install av'):  # not wrong in silence
        list(VideoReader(path, 'opencv'))


def test_a_sound_that_begins_late_and_a_clock_that_does(tmp_path):
    late = film(tmp_path / 'a.mp4', range(0, 2000, 40), sound=dict(seconds=1, begin=1))
    assert list(VideoReader(late, 'pyav'))[:2] == [0, 40]
    recorded = film(tmp_path / 'b.webm', range(5000, 7000, 40), codec='libvpx')
    reader = VideoReader(recorded, 'pyav')
    assert list(reader) == list(range(0, 2000, 40)) and reader.end == 2000 and not reader.broken


def test_what_an_edit_list_leaves_out_is_not_shown(tmp_path, decoder):
    path = film(tmp_path / 'cut.mp4', range(-1000, 3000, 100), coding=dict(bf='0'))
    cues, _ = cues_of(path, range(0, 10_000, 100), decoder)
    assert [(cue.start, cue.text) for cue in cues[:2]] == [(0, 'Number 10.'), (100, 'Number 11.')]
    assert len(cues) == 30


def test_stills_beside_sound(tmp_path, decoder):
    # at 48000 samples per second a packet of sound lasts 21 ms: 4500 of them from still to still
    path = film(tmp_path / 'slides.mp4', [0, 95_000, 190_000], sound=dict(seconds=200, rate=48_000))
    cues, reader = cues_of(path, range(0, 10**6, 1000), decoder)
    assert [cue.start for cue in cues] == [0, 95_000, 190_000] and not reader.broken
    assert [cue.text for cue in cues] == ['Number 0.', 'Number 1.', 'Number 2.']
    if decoder == 'pyav':
        assert reader.end == pytest.approx(200_000, abs=50)  # it stands till the sound ends


def test_no_duration_and_uneven_frames(tmp_path, decoder):
    times = [0, 67, 134, 200, 267, 900, 967, 1034]
    path = film(tmp_path / 'recorded.webm', times, codec='libvpx', live='1')
    with av.open(str(path)) as made:
        assert made.duration is None
    reader = VideoReader(path, decoder)
    assert list(reader) == times and 1034 < reader.end <= 1250 and not reader.broken


def test_av1(tmp_path, numbers):
    path = film(tmp_path / 'clip.mp4', range(0, 2000, 40), codec='libsvtav1')
    cues, _ = cues_of(path, [0, 1000])
    assert [(cue.start, cue.text) for cue in cues] == [(0, 'Number 0.'), (1000, 'Number 25.')]
    clipcap('video', path, '-n', 2)


def test_av1_without_pyav_is_named(tmp_path, monkeypatch, numbers):
    path = film(tmp_path / 'clip.mp4', range(0, 400, 40), codec='libsvtav1')
    monkeypatch.setitem(sys.modules, 'av', None)
    import cv2

    if cv2.VideoCapture(str(path)).read()[0]:
        pytest.skip('this OpenCV decodes AV1 itself')
    line = complaint('video', path)
    assert 'AV01' in line and 'pip install av' in line and str(path) in line


def test_avi_frames_are_shown_in_the_order_of_their_packets(tmp_path):
    path = film(tmp_path / 'b.avi', range(0, 2000, 40), codec='mpeg4', coding=dict(bf='2'))
    reader = VideoReader(path, 'pyav')
    seen = [(moment, number_of(reader.picture())) for moment in reader]
    assert seen == [(40 * n, n) for n in range(len(seen))] and len(seen) >= 48


def test_turned_by_metadata(tmp_path, decoder):
    path = turn(film(tmp_path / 'phone.mp4', range(0, 1000, 40)))
    sample = next(sample_moments(VideoReader(path, decoder), [0]))
    assert sample.picture.size == (96, 128)
    # the squares of frame 0 are black, and now on the left
    assert np.asarray(sample.picture)[:, :20].max() < 60


def test_the_cover_of_a_record_is_no_picture(tmp_path, writer):
    with av.open(str(tmp_path / 'cover.m4a'), 'w', 'mp4') as out:
        cover = out.add_stream('mjpeg', rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, 'yuvj420p'
        cover.disposition = av.stream.Disposition.attached_pic.value
        packets = silence(out, 2)
        packets += cover.encode(av.VideoFrame.from_ndarray(grey(0, (64, 64)), 'rgb24'))
        for packet in [*packets, *cover.encode(None)]:
            out.mux(packet)
    for make, name in (mux, 'soft.mkv'), (burn, 'hard.mp4'):
        with pytest.raises(ClipcapError, match='cover.m4a'):
            make(tmp_path / 'cover.m4a', CUES, tmp_path / name, writer=writer)
    with pytest.raises(ClipcapError, match='sound alone'):
        VideoReader(tmp_path / 'cover.m4a', 'pyav')


def test_frames_chosen():
    assert list(spread(0, 10_000, 4)) == [0, 2500, 5000, 7500]
    assert list(spread(0, 3, 5)) == [0, 0, 1, 1, 2]
    assert list(spread(3000, 9000, 2)) == [3000, 6000]


def test_scenes_of_varying_length(tmp_path):
    cuts = [0, 14, 40, 47]
    colours = [(20, 20, 20), (240, 200, 200), (40, 0, 0), (250, 250, 90)]

    def frame(number, size):
        picture = numbered(number, size)
        picture[: -size[1] // 4] = colours[sum(number >= cut for cut in cuts) - 1]
        return picture

    path = film(tmp_path / 'scenes.mkv', VARIED, frame=frame, coding=dict(crf='10'))
    found = list(sample_scenes(VideoReader(path)))
    starts = [sample.start for sample in found]
    assert starts == [VARIED[cut] for cut in cuts]
    for sample, end in zip(found, [*starts[1:], VARIED[-1] + 1], strict=True):
        assert sample.start <= sample.time < end


# ---- odd files
def test_one_frame(tmp_path, decoder):
    cues, reader = cues_of(film(tmp_path / 'one.mp4', [0]), spread(0, 40, 10), decoder)
    assert [(cue.start, cue.text) for cue in cues] == [(0, 'Number 0.')]
    assert 0 < cues[0].end <= 1000 and not reader.broken


@pytest.fixture(scope='module')
def no_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('none')
    (folder / 'empty.mp4').touch()
    (folder / 'words.mkv').write_text('words ' * 1000)
    (folder / 'list.m3u8').write_text('#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n')
    film(folder / 'none.mp4', [])
    with wave.open(str(folder / 'sound.wav'), 'wb') as sound:
        sound.setparams((1, 2, 8000, 8000, 'NONE', ''))
        sound.writeframes(bytes(16000))
    with av.open(str(folder / 'sound.m4a'), 'w', 'mp4') as out:
        for packet in silence(out, 1):
            out.mux(packet)
    whole = film(folder / 'late index.mp4', range(0, 4000, 40)).read_bytes()
    (folder / 'late index.mp4').write_bytes(whole[: len(whole) // 2])
    return folder


NO_VIDEOS = ('empty.mp4', 'words.mkv', 'list.m3u8', 'none.mp4', 'sound.wav', 'sound.m4a')


@pytest.mark.parametrize('name', ['missing.mp4', *NO_VIDEOS, 'late index.mp4', '.'])
def test_what_is_no_video(no_videos, name, decoder):
    with pytest.raises(ClipcapError) as refused:
        list(VideoReader(no_videos / name, decoder))
    assert str(refused.value).startswith(str(no_videos / name))
    assert str(no_videos / name) in complaint('video', no_videos / name)
    assert not list(no_videos.glob('*_caption*'))


@needs_fifo
@pytest.mark.parametrize('command', [['video'], ['webcam', '--no-window', '--source']])
def test_pipes_and_devices_are_refused_at_once(tmp_path, command):
    os.mkfifo(tmp_path / 'pipe.mp4')
    for name in tmp_path / 'pipe.mp4', '/dev/zero':
        assert 'a pipe or a device' in complaint(*command, name)


@pytest.mark.parametrize('name', ['film.mp4', 'clip:1.mp4', '-clip.mp4', 'a,b%03d [x]*.mp4'])
def test_names_are_paths(tmp_path, monkeypatch, name, decoder, writer):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / 'made.mp4', [0, 40, 80], codec='mpeg4').rename(name)
    assert list(VideoReader(name, decoder)) == [0, 40, 80]
    assert list(VideoReader(mux(name, CUES, f'{name}.mkv', writer=writer))) == [0, 40, 80]
    assert list(VideoReader(burn(name, CUES, f'{name}.mp4', writer=writer))) == [0, 40, 80]


@pytest.mark.skipif(sys.platform != 'linux', reason='needs names of any bytes')
def test_names_that_are_not_utf8(tmp_path, decoder, writer, numbers):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b'/\xff'))
    folder.mkdir()
    name = Path(os.fsdecode(os.fsencode(folder) + b'/\xe9t\xe9.mp4'))
    film(tmp_path / 'made.mp4', [0, 40, 80], codec='mpeg4').rename(name)
    assert list(VideoReader(name, decoder)) == [0, 40, 80]
    assert list(VideoReader(mux(name, CUES, f'{name}.mkv', writer=writer))) == [0, 40, 80]
    assert list(VideoReader(burn(name, CUES, f'{name}.mp4', writer=writer))) == [0, 40, 80]
    printed, _ = clipcap('video', name, '-N', 1, '--mux', '--burn', '--frames', '--sheet')
    assert printed == '00:00:00,000\tNumber 0.\n'


@pytest.mark.parametrize('name, how', [('cut.mp4', dict(movflags='faststart')), ('cut.mkv', {})])
def test_truncated(tmp_path, name, how, numbers):
    path = film(tmp_path / name, range(0, 8000, 40), **how)
    whole = cues_of(path, spread(0, 8000, 8))[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    printed, (*_, last) = clipcap('video', path, '--every', 1, '--frames', code=1)
    assert 'truncated' in last and name in last and '8.0 s' in last
    rows = json.loads((tmp_path / 'cut_caption.json').read_text(encoding='utf-8'))
    kept = sorted((tmp_path / 'cut_captioning_frames').iterdir())
    assert 2 <= len(kept) < 8
    starts = [number_of(Image.open(path)) * 40 for path in kept]
    assert starts == [cue.start for cue in whole[: len(kept)]]
    assert rows[-1]['end'] < '00:00:07' and printed.count('\n') == len(rows)


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_sound_longer_than_the_picture_is_not_broken(tmp_path, suffix, decoder):
    path = film(tmp_path / f'a.{suffix}', range(0, 4000, 40), sound=dict(seconds=6))
    if decoder == 'opencv' and suffix == 'mkv':
        pytest.skip('OpenCV takes the whole length for the picture')
    cues, reader = cues_of(path, spread(0, 4000, 2), decoder)
    assert not reader.broken and cues[-1].end == pytest.approx(4000, abs=130)


def test_4k(tmp_path):
    path = film(tmp_path / '4k.mp4', range(0, 400, 40), size=(3840, 2160), codec='mpeg4')
    found = list(sample_moments(VideoReader(path), [0, 200]))
    assert [sample.picture.size for sample in found] == [(1280, 720)] * 2
    assert [number_of(sample.picture) for sample in found] == [0, 5]


# ---- memory and threads
def test_few_frames_are_alive_at_once(tmp_path):
    alive, most = set(), []

    def watched():
        for number, sample in enumerate(sample_moments(VideoReader(path), range(10**9))):
            alive.add(number)
            weakref.finalize(sample, alive.discard, number)
            yield sample

    class Counting(Numbers):
        def caption(self, images, options=None):
            most.append(len(alive))
            return super().caption(images)

    path = film(tmp_path / 'long.mp4', range(0, 20_000, 40), codec='mpeg4')
    assert sum(1 for _ in caption_samples(watched(), Counting(), batch_size=5)) == 500
    assert max(most) <= 5 * 4


def test_errors_of_the_thread_come_through():
    def steps():
        yield 1
        raise ClipcapError('broken')

    items = in_background(steps(), 3)
    assert next(items) == 1
    with pytest.raises(ClipcapError):
        next(items)


# ---- subtitles
def test_merging():
    texts = ['A dog runs.', 'A dog is running.', 'A cat.', 'The cat.', 'A dog runs.']
    assert [number for number, _ in merge_alike(enumerate(texts))] == [0, 2, 4]


CHINESE = [
    '一只狗在草地上跑。',
    '一个女人在唱歌。',
    '两个孩子在海边玩。',
    '一辆红色的汽车。',
    '男人骑着自行车。',
    '桌上有一只猫。',
]


def test_languages_without_spaces(tmp_path, monkeypatch):
    class Chinese:
        def caption(self, images, options=None):
            return [CHINESE[number_of(image) // 10] for image in images]

    from clipcap import image

    monkeypatch.setattr(image, 'Captioner', lambda *_: Chinese())
    path = film(tmp_path / 'six.mp4', range(0, 6000, 100))
    printed, _ = clipcap('video', path, '--every', 1, '--lang', 'zh', '--format', 'all')
    assert [line.split('\t')[1] for line in printed.splitlines()] == CHINESE
    rows = json.loads((tmp_path / 'six_caption.json').read_text(encoding='utf-8'))
    assert [(row['text'], row['lang']) for row in rows] == [(text, 'zh') for text in CHINESE]


def test_a_subtitle_fits_the_picture():
    for text in 'a dog', 'word ' * 30, '一只狗在草地上跑。' * 4:
        picture = draw_subtitle(Image.new('RGB', (320, 240), 'grey'), text)
        pixels = np.asarray(picture).astype(int)
        rows, columns = np.nonzero((abs(pixels - 128) > 60).any(2))
        assert columns.min() > 10 and columns.max() < 310 and rows.max() < 239
        assert pixels.max() == 255 and pixels.min() == 0


@pytest.mark.parametrize('kind', ['srt', 'vtt'])
def test_another_reader_reads_them(tmp_path, kind):
    path = write_cues(CUES, tmp_path / f'x.{kind}')
    with av.open(str(path)) as track:
        packets = [packet for packet in track.demux() if packet.size]
        found = [
            (
                round(packet.pts * packet.time_base * 1000),
                round((packet.pts + packet.duration) * packet.time_base * 1000),
                bytes(packet).decode().strip(),
            )
            for packet in packets
        ]
    texts = [cue.text.replace('&', '&amp;') if kind == 'vtt' else cue.text for cue in CUES]
    assert found == [(cue.start, cue.end, text) for cue, text in zip(CUES, texts, strict=True)]


def test_json_and_text():
    row = dict(start='00:00:01,500', end='00:00:04,000', lang='de', text=CUES[1].text)
    assert json.loads(format_cues(CUES, 'json', 'de'))[1] == row
    assert format_cues([], 'json') == '[]\n' and format_cues([], 'srt') == ''
    assert format_cues(CUES, 'txt').splitlines()[0] == '00:00:00,000\tA dog & a cat.'


# ---- into the video
def track_of(path):
    "The subtitle track of a film, and when its picture begins: (start in ms, text), language"
    with av.open(str(path)) as made:
        assert [stream.type for stream in made.streams][-1] == 'subtitle'
        language = made.streams.subtitles[0].metadata['language']
        packets = [packet for packet in made.demux(made.streams.subtitles[0]) if packet.size]
        found = [(round(p.pts * p.time_base * 1000), bytes(p).decode()) for p in packets]
    return found, language


def test_soft(tmp_path, writer):
    source = film(tmp_path / 'source.mp4', range(0, 4000, 40), sound=dict(seconds=4))
    made = mux(source, CUES, tmp_path / 'soft.mkv', 'de', writer)
    found, language = track_of(made)
    times = list(VideoReader(made))
    assert language == 'de' and len(times) == 100
    assert [(moment - times[0], text) for moment, text in found] == [
        (cue.start, cue.text) for cue in CUES
    ]


@pytest.mark.parametrize('suffix', ['mp4', 'mkv', 'ts'])
def test_soft_and_burned_where_the_picture_begins_late(tmp_path, writer, suffix):
    size = (320, 240)
    source = film(
        tmp_path / f'late.{suffix}',
        range(3000, 9000, 100),
        size=size,
        frame=grey,
        sound=dict(seconds=9),
    )
    times = list(VideoReader(source))
    cues = [Cue(times[30], times[-1] + 100, 'W' * 12)]
    soft = mux(source, cues, tmp_path / 'soft.mkv', writer=writer)
    [(shown, _)], _ = track_of(soft)
    assert abs(list(VideoReader(soft))[30] - shown) <= 30  # ms

    reader = VideoReader(burn(source, cues, tmp_path / 'hard.mp4', writer))
    bright = [int(reader.pixels().max()) > 200 for _ in reader]
    assert bright == [False] * 30 + [True] * 30
    begin, _ = video_span(tmp_path / 'hard.mp4')
    assert abs(begin - times[0]) <= 130  # the sound's warming up, at most


def test_stills_get_their_captions(tmp_path, writer):
    source = film(
        tmp_path / 'slides.mp4', [0, 95_000, 190_000], sound=dict(seconds=200, rate=48_000)
    )
    cues = [Cue(0, 95_000, 'One.'), Cue(95_000, 190_000, 'Two.'), Cue(190_000, 200_000, 'Three.')]
    soft = mux(source, cues, tmp_path / 'soft.mkv', writer=writer)
    found, _ = track_of(soft)
    times = list(VideoReader(soft))
    assert len(times) == 3
    for (moment, _), shown in zip(found, times, strict=True):
        assert abs(moment - shown) <= 30
    hard = VideoReader(burn(source, cues, tmp_path / 'hard.mp4', writer))
    assert list(hard) == [0, 95_000, 190_000]


def boxes_of(path):
    "The names of an MP4's outer boxes, in order"
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack('>I4s', data[at : at + 8])
        if size == 1:
            size = struct.unpack('>Q', data[at + 8 : at + 16])[0]
        names.append(name.decode())
        at += size
    return names


@pytest.mark.parametrize(
    'name, how',
    [
        ('odd.avi', dict(size=(161, 121), codec='mjpeg')),
        ('full colour.mkv', dict(size=(161, 121), pixels='yuv444p')),
        ('ten bits.mkv', dict(pixels='yuv420p10le')),
        ('sound.mkv', dict(sound=dict(seconds=1, rate=96_000, layout='5.1'))),
        ('tiny.mkv', dict(size=(1, 1), codec='ffv1', frame=grey)),
        ('uneven.webm', dict(codec='libvpx')),
    ],
)
def test_what_is_written_plays_everywhere(tmp_path, writer, name, how):
    times = VARIED[:10] if name.startswith('uneven') else range(0, 1000, 40)
    source = film(tmp_path / name, times, **how)
    hard = burn(source, CUES[:1], tmp_path / 'hard.mp4', writer)
    width, height = how.get('size', (128, 96))
    with av.open(str(hard)) as made:
        picture = made.streams.video[0].codec_context
        assert (picture.name, picture.pix_fmt) == ('h264', 'yuv420p')
        assert (picture.width, picture.height) == (
            max(2, width // 2 * 2),
            max(2, height // 2 * 2),
        )
        profile, level = bytes(picture.extradata)[1], bytes(picture.extradata)[3]
        assert profile in (66, 77, 100) and level <= 31  # baseline, main, high; small enough
        for stream in made.streams.audio:
            sound = stream.codec_context
            assert (sound.name, sound.sample_rate) == ('aac', 48_000)
            assert sound.layout.nb_channels <= 2
        assert bool(made.streams.audio) == ('sound' in how)
    boxes = boxes_of(hard)
    assert boxes.index('moov') < boxes.index('mdat')  # it begins to play before it is here
    shown = list(VideoReader(hard))
    assert len(shown) == len(times) and max(np.subtract(shown, list(times))) <= 40


def test_burned_letters_are_drawn_or_named(tmp_path, writer):
    source = film(tmp_path / 'a.mkv', [0, 40], size=(320, 240), frame=grey)
    shown = []
    for number, text in enumerate(['一只狗跑', '两个孩子']):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            hard = burn(source, [Cue(0, 80, text)], tmp_path / f'{number}.mp4', writer)
        shown.append(next(sample_moments(VideoReader(hard), [0])).picture)
    difference = abs(np.subtract(*(np.asarray(picture, float) for picture in shown))).max()
    # boxes look alike; a script that no font here has is named once in a process
    assert difference > 60 or caught or not can_draw('一只狗跑两个孩子')


def can_draw(text):
    letters = set()
    for path in findSystemFonts():
        with contextlib.suppress(RuntimeError, OSError):
            letters |= set(map(chr, FT2Font(path).get_charmap()))
    return set(text) <= letters


def test_a_frame_of_another_size(tmp_path, writer):
    parts = [film(tmp_path / f'{n}.ts', range(0, 400, 40), size=(64 * n, 64)) for n in (2, 3)]
    joined = tmp_path / 'joined.ts'
    joined.write_bytes(b''.join(part.read_bytes() for part in parts))
    with av.open(str(burn(joined, CUES, tmp_path / 'hard.mp4', writer))) as made:
        sizes = {(frame.width, frame.height) for frame in made.decode(video=0)}
    assert sizes == {(128, 64)}


def test_turned_stays_turned(tmp_path, writer):
    source = turn(film(tmp_path / 'phone.mp4', range(0, 1000, 40)))
    hard = burn(source, CUES, tmp_path / 'hard.mp4', writer)
    assert next(sample_moments(VideoReader(hard), [0])).picture.size == (96, 128)
    try:
        soft = mux(source, CUES, tmp_path / 'soft.mkv', writer=writer)
    except ClipcapError as refused:  # an older ffmpeg
        assert 'turned' in str(refused) and writer == 'ffmpeg'
        assert not (tmp_path / 'soft.mkv').exists()
    else:
        assert next(sample_moments(VideoReader(soft), [0])).picture.size == (96, 128)


def test_av1_is_copied(tmp_path, writer):
    source = film(tmp_path / 'clip.mp4', range(0, 1000, 40), codec='libsvtav1')
    made = mux(source, CUES, tmp_path / 'soft.mkv', writer=writer)
    assert list(VideoReader(made)) == list(range(0, 1000, 40))


def test_what_cannot_be_copied_is_one_line(tmp_path, writer):
    source = film(tmp_path / 'a.mp4', [0, 40])
    (tmp_path / 'words.mp4').write_text('words')
    for made in 'soft.mp4', 'soft.webm':
        with pytest.raises(ClipcapError, match='.mkv'):
            mux(source, CUES, tmp_path / made, writer=writer)
    for make, name in (mux, 'soft.mkv'), (burn, 'hard.mp4'):
        with pytest.raises(ClipcapError, match='words.mp4'):
            make(tmp_path / 'words.mp4', CUES, tmp_path / name, writer=writer)
    assert {path.name for path in tmp_path.iterdir()} == {'a.mp4', 'words.mp4'}


def test_no_writer_is_known_before_the_work(tmp_path, monkeypatch):
    path = film(tmp_path / 'a.mp4', [0, 40])
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ClipcapError, match='pip install av'):
        choose_writer()
    for option in '--mux', '--burn':
        assert 'pip install av' in complaint('video', path, option, '--model', 'no such model')
    assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']


# ---- the command
@pytest.mark.parametrize(
    'wrong',
    [
        [],
        ['a.mp4', '-N', 0],
        ['a.mp4', '-N', 99_999_999_999],
        ['a.mp4', '-N', 3, '--scenes'],
        ['a.mp4', '--every', 0],
        ['a.mp4', '--every', 'inf'],
        ['a.mp4', '--every', 'nan'],
        ['a.mp4', '--format', 'doc'],
        ['a.mp4', '--lang', 'no language'],
        ['a.mp4', '--temperature', 'inf'],
        ['a.mp4', '--batch-size', 10**9],
    ],
)
def test_usage(wrong):
    assert clipcap('video', *wrong, code=2)


def test_help_is_light():
    printed, _ = clipcap('video', '-h')
    for option in '--number', '--every', '--scenes', '--format', '--frames', '--mux', '--burn':
        assert option in printed
    assert 'v2c' not in clipcap('-h')[0]
    heavy = {'torch', 'cv2', 'numpy', 'av', 'scenedetect'}
    code = f'import sys, clipcap.cli.main; sys.exit(bool({heavy} & set(sys.modules)))'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_all_formats(tmp_path, numbers):
    path = film(tmp_path / 'clip.mp4', range(0, 1000, 40))
    clipcap('video', path, '--format', 'all', '--output', tmp_path / 'out')
    assert {file.name for file in (tmp_path / 'out').iterdir()} == {
        f'clip_caption.{kind}' for kind in FORMATS
    }


def test_many_videos_one_of_them_bad(tmp_path, numbers):
    good = [film(tmp_path / f'{name}.mp4', range(0, 1000, 40)) for name in 'ab']
    (tmp_path / 'bad.mp4').write_text('words')
    printed, lines = clipcap('video', good[0], tmp_path / 'bad.mp4', *good[1:], '-N', 1, code=1)
    assert printed.splitlines() == [f'{path}\t00:00:00,000\tNumber 0.' for path in good]
    assert [line for line in lines if 'bad.mp4' in line and 'Written' not in line]
    assert lines[-1] == 'clipcap: 1 of 3 videos could not be captioned, or not to their end'
    assert {path.name for path in tmp_path.glob('*.srt')} == {'a_caption.srt', 'b_caption.srt'}


def test_names_stay_apart(tmp_path, numbers):
    one = film(tmp_path / 'y.mp4', range(0, 1000, 40))
    other = film(tmp_path / 'y.avi', range(0, 2000, 40), codec='mjpeg')
    clipcap('video', one, '-N', 1, '--frames')
    first = (tmp_path / 'y_caption.srt').read_text(encoding='utf-8')
    clipcap('video', other, '-N', 1, '--frames')
    assert (tmp_path / 'y_caption.srt').read_text(encoding='utf-8') == first
    assert '00:00:02,000' in (tmp_path / 'y.avi_caption.srt').read_text(encoding='utf-8')
    assert (tmp_path / 'y.avi_captioning_frames').is_dir()
    for order in [one, other], [other, one]:
        out = tmp_path / order[0].suffix[1:]
        clipcap('video', *order, '-N', 1, '--output', out, '--format', 'srt')
        names = {path.name for path in out.iterdir()}
        assert names == {'y.mp4_caption.srt', 'y.avi_caption.srt'}


def test_again_takes_the_same_names(tmp_path, numbers):
    path = film(tmp_path / 'y.mp4', range(0, 1000, 40))
    for number in 5, 2:
        clipcap('video', path, '-N', number, '--frames', '--format', 'srt')
    assert {path.name for path in tmp_path.iterdir()} == {
        'y.mp4',
        'y_caption.srt',
        'y_captioning_frames',
    }
    assert len(list((tmp_path / 'y_captioning_frames').iterdir())) == 2


def test_frames_of_ones_own_stay(tmp_path, numbers):
    path = film(tmp_path / 'y.mp4', range(0, 1000, 40))
    folder = tmp_path / 'y_captioning_frames'
    folder.mkdir()
    own = [folder / name for name in ('frame_mine_5ms.jpg', 'frame_00077_3080ms.jpg', 'notes.txt')]
    for file in own:
        Image.new('RGB', (5, 5)).save(file, 'PNG' if file.suffix == '.txt' else 'JPEG')
    before = [file.read_bytes() for file in own]
    clipcap('video', path, '-N', 3, '--frames')
    [third] = folder.glob('frame_00002_*')
    clipcap('video', path, '-N', 2, '--frames')
    assert [file.read_bytes() for file in own] == before
    assert len(list(folder.iterdir())) == 3 + 2 and not third.exists()
    Image.new('RGB', (5, 5)).save(third)
    line = clipcap('video', path, '-N', 3, '--frames', code=1)[1][-1]
    assert third.name in line and Image.open(third).size == (5, 5)


def test_outputs_are_tried_before_the_work(tmp_path):
    path = film(tmp_path / 'y.mp4', [0, 40])
    (tmp_path / 'file').touch()
    (tmp_path / 'y_caption.mkv').mkdir()
    for options, named in [
        (['--output', tmp_path / 'file'], 'file'),
        (['--output', tmp_path / 'file' / 'folder'], 'file'),
        (['--mux'], 'y_caption.mkv'),
    ]:
        # no model of that name: the work had not begun
        line = complaint('video', path, *options, '--model', 'no such model')
        assert str(tmp_path / named) in line and 'model' not in line


def test_a_video_is_never_overwritten(tmp_path):
    path = film(tmp_path / 'y.mp4', [0, 40])
    other = film(tmp_path / 'y_caption.mp4', [0, 40])
    before = other.read_bytes()
    line = clipcap('video', path, other, '--burn', '--model', 'none', code=1)[1][0]
    assert 'y_caption.mp4' in line and other.read_bytes() == before


@pytest.mark.skipif(sys.platform == 'win32', reason='needs SIGTERM')
def test_nothing_stays_after_sigterm(tmp_path):
    path = film(tmp_path / 'long.mp4', range(0, 60_000, 40), size=(640, 480), frame=grey)
    for folder in 'tmp', 'out':
        (tmp_path / folder).mkdir()
    command = [sys.executable, '-m', 'clipcap.cli.main', 'video', path, '-N', '1', '--burn']
    command += ['--output', tmp_path / 'out', '--format', 'srt', '--device', 'cpu']
    environment = os.environ | dict(TMPDIR=str(tmp_path / 'tmp'))
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        end = time.monotonic() + 300
        begun = False  # the film is being written
        while not begun and run.poll() is None and time.monotonic() < end:
            begun = any(file.suffix == '.mp4' for file in (tmp_path / 'out').iterdir())
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        _, complaints = run.communicate(timeout=120)
    assert begun and run.returncode == 143 and 'Traceback' not in complaints, complaints
    assert [file.name for file in (tmp_path / 'out').iterdir()] == ['long_caption.srt']
    assert not list((tmp_path / 'tmp').iterdir())


def test_as_before(tmp_path, numbers):
    path = film(tmp_path / 'clip.mp4', range(0, 4000, 40))
    clipcap('v2c', '-V', path, '-N', 10)
    assert {file.name for file in tmp_path.iterdir()} == {
        'clip.mp4',
        'clip_caption.srt',
        'clip_caption.json',
        'clip_captioning_frames',
    }
    kept = sorted((tmp_path / 'clip_captioning_frames').iterdir())
    assert [number_of(Image.open(file)) for file in kept] == list(range(0, 100, 10))
    for cue in json.loads((tmp_path / 'clip_caption.json').read_text(encoding='utf-8')):
        assert list(cue) == ['start', 'end', 'lang', 'text'] and cue['lang'] == 'en'
        assert re.fullmatch(r'\d\d:\d\d:\d\d,\d{3}', cue['start'])


@needs_videos
@pytest.mark.parametrize('path', videos, ids=lambda path: path.name)
def test_real(path, tmp_path):
    options = ['-N', 4, '--format', 'all', '--frames', '--sheet', '--output', tmp_path]
    printed, lines = clipcap('video', path, *options)
    assert len(lines) == 1 and 'Written' in lines[0]
    text = (tmp_path / f'{path.stem}_caption.txt').read_text(encoding='utf-8')
    assert printed == text
    cues = json.loads((tmp_path / f'{path.stem}_caption.json').read_text(encoding='utf-8'))
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        if stream.duration:
            end = float(stream.duration * stream.time_base)
        else:
            packets = [packet for packet in source.demux(stream) if packet.pts is not None]
            end = max(float((p.pts + p.duration) * p.time_base) for p in packets)
    hours, minutes, seconds = cues[-1]['end'].replace(',', '.').split(':')
    assert abs(3600 * int(hours) + 60 * int(minutes) + float(seconds) - end) < 0.1
    assert len(list((tmp_path / f'{path.stem}_captioning_frames').iterdir())) == 4
    assert Image.open(tmp_path / f'{path.stem}_caption.png').width > 300
