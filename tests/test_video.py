"Video: real files, odd files made here, times checked against films whose frames carry their own number, subtitles read back by others"

import json
import re
import shutil
import struct
import subprocess
import sys
import wave
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipcap.base.files import ClipcapError
from clipcap.base.subtitles import Cue, alike, format_cues, make_cues, merge_alike, write_cues
from clipcap.cli.main import app
from clipcap.video import (
    VideoReader,
    burn,
    caption_samples,
    in_background,
    mux,
    sample_moments,
    sample_scenes,
    spread,
    video_length,
)

av = pytest.importorskip('av', reason='needs PyAV to make odd videos')
real = Path(__file__).resolve().parents[1].parent / 'shared' / 'data' / 'videos'
if not real.is_dir():
    real = Path('/work/shared/data/videos')
videos = sorted(real.glob('*.*')) if real.is_dir() else []
needs_videos = pytest.mark.skipif(not videos, reason='needs the shared videos')
CUES = [Cue(0, 1500, 'A dog & a cat.'), Cue(1500, 4000, 'Ein Mädchen läuft.')]


def numbered(number, size=(128, 96)):
    "A frame that says its number in 8 squares"
    frame = np.full((size[1], size[0], 3), 90, np.uint8)
    w = size[0] // 8
    for bit in range(8):
        frame[-size[1] // 4 :, w * bit : w * bit + w] = 255 * (number >> bit & 1)
    return frame


def number_of(picture):
    grey = np.asarray(picture.convert('L'))
    w = picture.width / 8
    return sum(
        (int(grey[-picture.height // 8, int(w * bit + w / 2)]) > 127) << bit for bit in range(8)
    )


def film(path, times, size=(128, 96), codec='libx264', frame=numbered, sound=0, **options):
    "A video of frames shown at `times` (ms), perhaps with seconds of sound"
    with av.open(str(path), 'w', options=options) as out:
        v = out.add_stream(codec, rate=25)
        (v.width, v.height), v.pix_fmt, v.codec_context.time_base = (
            size,
            'yuvj420p' if codec == 'mjpeg' else 'yuv420p',
            Fraction(1, 1000),
        )
        if sound:
            a = out.add_stream('aac', rate=8000)
            tone = av.AudioFrame.from_ndarray(
                np.zeros((1, 8000 * sound), np.float32), 'fltp', 'mono'
            )
            tone.rate, tone.pts = 8000, 0
            for packet in [*a.encode(tone), *a.encode(None)]:
                out.mux(packet)
        for n, time in enumerate(times):
            picture = av.VideoFrame.from_ndarray(frame(n, size), 'rgb24')
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            for packet in v.encode(picture):
                out.mux(packet)
        for packet in v.encode(None):
            out.mux(packet)
    return path


class Numbers:
    "A captioner that reads the squares"

    def caption(self, images, options=None):
        return [f'number {number_of(image)}' for image in images]


def cues_of(path, moments):
    reader = VideoReader(path)
    said = list(caption_samples(sample_moments(reader, moments), Numbers(), batch_size=4))
    return make_cues(said, reader.end), reader


def clipcap(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name='clipcap')
    assert result.exit_code == code and not isinstance(result.exception, Exception), (
        result.exception,
        result.output,
    )
    return result.stdout, result.stderr.splitlines()


def complaint(*arguments):
    said, [line] = clipcap(*arguments, code=1)
    assert not said and line.startswith('clipcap: ')
    return line


varied = np.cumsum(
    [0, *np.random.default_rng(0).integers(17, 400, 59)]
).tolist()  # ms: a frame rate that varies much


# ---- times
@pytest.mark.parametrize('name', ['vfr.mp4', 'vfr.mkv', 'vfr.webm'])
def test_times_are_presentation_timestamps(tmp_path, name):
    path = film(
        tmp_path / name, varied, codec='libvpx' if name.endswith('webm') else 'libx264'
    )  # x264 with B-frames: stored in another order
    assert list(VideoReader(path)) == varied and abs(video_length(path) - varied[-1]) <= 400
    for moments in spread(video_length(path), 13), range(0, 10**9, 700), range(0, 10**9):
        cues, reader = cues_of(path, moments)
        assert [varied[int(c.text[7:-1])] for c in cues] == [c.start for c in cues]
        assert (
            cues[0].start == 0
            and all(a.start < a.end == b.start for a, b in zip(cues, cues[1:]))
            and varied[-1] < cues[-1].end == reader.end <= varied[-1] + 400
        )
        assert all(isinstance(t, int) for c in cues for t in (c.start, c.end))


def test_frames_chosen():
    assert spread(10_000, 4) == [0, 2500, 5000, 7500] and spread(3, 5) == [0, 0, 1, 1, 2]


def test_scenes_of_varying_length(tmp_path):
    times, cuts = varied, [0, 14, 40, 47]
    colours = [(20, 20, 20), (240, 200, 200), (40, 0, 0), (250, 250, 90)]

    def frame(n, size):
        picture = numbered(n, size)
        picture[: -size[1] // 4] = colours[sum(n >= cut for cut in cuts) - 1]
        return picture

    found = list(
        sample_scenes(VideoReader(film(tmp_path / 'scenes.mkv', times, frame=frame, crf='10')))
    )
    assert [s.start for s in found] == [times[cut] for cut in cuts]
    assert all(
        a.start <= a.time < b for a, b in zip(found, [*[s.start for s in found[1:]], times[-1] + 1])
    )


# ---- odd files
def test_one_frame(tmp_path):
    cues, reader = cues_of(film(tmp_path / 'one.mp4', [0]), spread(40, 10))
    assert (
        [(c.start, c.text) for c in cues] == [(0, 'Number 0.')]
        and 0 < cues[0].end <= 1000
        and not reader.broken
    )


def test_what_is_no_video(tmp_path):
    (tmp_path / 'empty.mp4').touch()
    (tmp_path / 'words.mkv').write_text('words ' * 1000)
    film(tmp_path / 'none.mp4', [])
    with wave.open(str(tmp_path / 'sound.wav'), 'wb') as sound:
        sound.setparams((1, 2, 8000, 8000, 'NONE', ''))
        sound.writeframes(bytes(16000))
    with av.open(str(tmp_path / 'sound.m4a'), 'w', 'mp4') as out:
        a = out.add_stream('aac', rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), 'fltp', 'mono')
        tone.rate, tone.pts = 8000, 0
        for packet in [*a.encode(tone), *a.encode(None)]:
            out.mux(packet)
    film(tmp_path / 'late index.mp4', range(0, 4000, 40))
    whole = (tmp_path / 'late index.mp4').read_bytes()
    (tmp_path / 'late index.mp4').write_bytes(whole[: len(whole) // 2])
    for name in (
        'missing.mp4',
        'empty.mp4',
        'words.mkv',
        'none.mp4',
        'sound.wav',
        'sound.m4a',
        'late index.mp4',
        '.',
    ):
        line = complaint('video', tmp_path / name)
        assert str(tmp_path / name) in line, line
    assert not list(tmp_path.glob('*_caption*'))


@pytest.mark.parametrize('name, how', [('cut.mp4', dict(movflags='faststart')), ('cut.mkv', {})])
def test_broken_off(tmp_path, name, how):
    path = film(tmp_path / name, range(0, 8000, 40), **how)
    whole = cues_of(path, spread(8000, 8))[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    said, (*_, last) = clipcap('video', path, '--every', 1, '--frames', code=1)
    assert 'breaks off' in last and name in last and '8.0 s' in last
    cues = json.loads((tmp_path / 'cut_caption.json').read_text())
    kept = sorted((tmp_path / 'cut_captioning_frames').iterdir())
    assert 2 <= len(kept) < 8 and [number_of(Image.open(p)) * 40 for p in kept] == [
        c.start for c in whole[: len(kept)]
    ]
    assert cues[-1]['end'] < '00:00:07' and said.count('\n') == len(cues)


def test_sound_longer_than_the_picture_is_not_broken(tmp_path):
    cues, reader = cues_of(
        film(tmp_path / 'sound.mp4', range(0, 4000, 40), sound=6), spread(4000, 2)
    )
    assert not reader.broken and cues[-1].end == 4000


def test_rotated_by_metadata(tmp_path):
    path = film(tmp_path / 'phone.mp4', range(0, 1000, 40))
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 4 + 40
    data[at : at + 36] = struct.pack('>9i', 0, 1 << 16, 0, -(1 << 16), 0, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(data)
    sample = next(sample_moments(VideoReader(path), [0]))
    assert sample.picture.size == (96, 128)
    assert np.asarray(sample.picture)[:, :20].max() < 60, (
        'the squares of frame 0 are black, and now on the left'
    )


def test_4k(tmp_path):
    path = film(tmp_path / '4k.mp4', range(0, 400, 40), size=(3840, 2160), codec='mpeg4')
    found = list(sample_moments(VideoReader(path), [0, 200]))
    assert [s.picture.size for s in found] == [(1280, 720)] * 2 and [
        number_of(s.picture) for s in found
    ] == [0, 5]


def test_names_with_dots_and_signs(tmp_path):
    path = film(tmp_path / "my clip's 1.2 %03d ü.mp4", [0, 40, 80], codec='mpeg4')
    assert list(VideoReader(path)) == [0, 40, 80]
    clipcap('video', path, '-N', 1, '--formats', 'srt')
    assert (tmp_path / "my clip's 1.2 %03d ü_caption.srt").exists()


# ---- memory and threads
def test_few_frames_are_alive_at_once(tmp_path):
    alive, most = set(), []

    def watched():
        for n, sample in enumerate(sample_moments(VideoReader(path), range(10**9))):
            alive.add(n)
            weakref.finalize(sample, alive.discard, n)
            yield sample

    class Slow(Numbers):
        def caption(self, images, options=None):
            most.append(len(alive))
            return super().caption(images)

    path = film(tmp_path / 'long.mp4', range(0, 20_000, 40), codec='mpeg4')
    assert (
        sum(1 for _ in caption_samples(watched(), Slow(), batch_size=5)) == 500
        and max(most) <= 5 * 4
    )


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
    assert (
        alike('A man walks.', 'a man walking')
        and not alike('a man', 'two dogs')
        and not alike('a red ball', 'a blue ball')
    )
    samples = [f'{n}' for n in range(5)]
    kept = [
        s
        for s, _ in merge_alike(
            zip(samples, ['A dog runs.', 'A dog is running.', 'A cat.', 'The cat.', 'A dog runs.'])
        )
    ]
    assert kept == ['0', '2', '4']


@pytest.mark.parametrize('kind', ['srt', 'vtt'])
def test_another_reader_reads_them(tmp_path, kind):
    path = write_cues(CUES, tmp_path / f'x.{kind}')
    with av.open(str(path)) as track:
        found = [
            (
                round(p.pts * p.time_base * 1000),
                round((p.pts + p.duration) * p.time_base * 1000),
                bytes(p).decode(),
            )
            for p in track.demux()
            if p.size
        ]
    texts = [c.text.replace('&', '&amp;') if kind == 'vtt' else c.text for c in CUES]
    assert [(a, b, t.strip()) for a, b, t in found] == [
        (c.start, c.end, t) for c, t in zip(CUES, texts)
    ]


def test_json_and_text():
    assert json.loads(format_cues(CUES, 'json', 'de'))[1] == dict(
        start='00:00:01,500', end='00:00:04,000', lang='de', text=CUES[1].text
    )
    assert (
        format_cues([], 'json') == '[]\n'
        and format_cues([], 'srt') == ''
        and format_cues(CUES, 'txt').splitlines()[0] == '00:00:00,000\tA dog & a cat.'
    )


@pytest.fixture(params=['ffmpeg', 'PyAV'])
def engine(request, monkeypatch):
    if request.param == 'PyAV':
        monkeypatch.setattr(shutil, 'which', lambda name: None)
    elif not shutil.which('ffmpeg'):
        pytest.skip('needs the command ffmpeg')
    return request.param


def test_mux(tmp_path, engine):
    source = film(tmp_path / 'source.mp4', range(0, 4000, 40), sound=4)
    with av.open(str(mux(source, CUES, tmp_path / 'soft.mkv', 'de'))) as made:
        assert [s.type for s in made.streams] == [
            'video',
            'audio',
            'subtitle',
        ] and made.streams.subtitles[0].metadata['language'] == 'de'
        v, _, s = made.streams
        found = [
            (p.stream, round(p.pts * p.time_base * 1000), bytes(p))
            for p in made.demux(v, s)
            if p.size
        ]
    begin = min(
        time for stream, time, _ in found if stream == v
    )  # of the picture: sound may begin before it
    assert [(time - begin, text.decode()) for stream, time, text in found if stream == s] == [
        (c.start, c.text) for c in CUES
    ] and list(VideoReader(tmp_path / 'soft.mkv')) == list(range(0, 4000, 40))


def test_burn(tmp_path, engine):
    source = film(
        tmp_path / 'source.mp4',
        varied[:20],
        size=(321 // 2 * 2, 240),
        sound=3,
        frame=lambda n, size: np.full((size[1], size[0], 3), 90, np.uint8),
    )
    shown = CUES[1].start
    burn(source, CUES[1:], tmp_path / 'hard.mp4')
    with av.open(str(tmp_path / 'hard.mp4')) as made:
        assert sorted(s.type for s in made.streams) == ['audio', 'video']
    bright = {
        s.time: int(np.asarray(s.picture).max()) > 200
        for s in sample_moments(VideoReader(tmp_path / 'hard.mp4'), range(10**9))
    }
    assert len(bright) >= 18 and all(
        white == (time >= shown)
        for time, white in bright.items()
        if abs(time - shown) > 40 and time < 4000
    )


def test_neither_ffmpeg_nor_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setitem(sys.modules, 'av', None)
    for make in mux, burn:
        with pytest.raises(ClipcapError, match='PyAV'):
            make(film_once(tmp_path), CUES, tmp_path / 'out.mkv')
    assert [p.name for p in tmp_path.iterdir()] == ['a.mp4']


def film_once(folder):
    path = folder / 'a.mp4'
    return path if path.exists() else film(path, [0, 40])


# ---- the command
def test_usage(tmp_path):
    for wrong in (
        ['video'],
        ['video', 'a.mp4', '-N', 0],
        ['video', 'a.mp4', '-N', 3, '--scenes'],
        ['video', 'a.mp4', '--every', 0],
        ['video', 'a.mp4', '--formats', 'doc'],
        ['v2c'],
    ):
        assert clipcap(*wrong, code=2)


def test_help_is_light():
    said, _ = clipcap('video', '-h')
    assert all(
        option in said
        for option in (
            '-N, --number',
            '--every',
            '--scenes',
            '--formats',
            '--frames',
            '--mux',
            '--burn',
            '--output',
        )
    )
    assert 'v2c' not in clipcap('-h')[0]
    subprocess.run(
        [
            sys.executable,
            '-c',
            "import sys, clipcap.cli.main; sys.exit(bool({'torch', 'cv2', 'numpy', 'av', 'scenedetect'} & set(sys.modules)))",
        ],
        check=True,
    )


def test_as_before(tmp_path):
    path = film(tmp_path / 'clip.mp4', range(0, 4000, 40))
    said, lines = clipcap('v2c', '-V', path, '-N', 10)
    assert {p.name for p in tmp_path.iterdir()} == {
        'clip.mp4',
        'clip_caption.srt',
        'clip_caption.json',
        'clip_captioning_frames',
    }
    kept = sorted((tmp_path / 'clip_captioning_frames').iterdir())
    assert [number_of(Image.open(p)) for p in kept] == list(range(0, 100, 10))
    for cue in json.loads((tmp_path / 'clip_caption.json').read_text()):
        assert (
            list(cue) == ['start', 'end', 'lang', 'text']
            and cue['lang'] == 'en'
            and re.fullmatch(r'\d\d:\d\d:\d\d,\d{3}', cue['start'])
        )


@needs_videos
@pytest.mark.parametrize('path', videos, ids=lambda p: p.name)
def test_real(path, tmp_path):
    said, lines = clipcap(
        'video',
        path,
        '-N',
        4,
        '--formats',
        'srt,vtt,json,txt',
        '--frames',
        '--sheet',
        '--output',
        tmp_path,
    )
    assert (
        len(lines) == 1
        and 'Written' in lines[0]
        and said == (tmp_path / f'{path.stem}_caption.txt').read_text()
    )
    cues = json.loads((tmp_path / f'{path.stem}_caption.json').read_text())
    with av.open(str(path)) as source:
        v = source.streams.video[0]
        end = (
            float(v.duration * v.time_base)
            if v.duration
            else max(
                float((p.pts + p.duration) * p.time_base)
                for p in source.demux(v)
                if p.pts is not None
            )
        )
    h, m, s = re.split(':', cues[-1]['end'].replace(',', '.'))
    assert abs(3600 * int(h) + 60 * int(m) + float(s) - end) < 0.1
    assert (
        len(list((tmp_path / f'{path.stem}_captioning_frames').iterdir())) == 4
        and Image.open(tmp_path / f'{path.stem}_caption.png').width > 300
    )
