"""The widgets without a browser: traits are set and messages sent as the page does, and the worker
is waited for; the captioner is made up, and slow where that matters"""

import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from clipcap.base.files import ClipcapError
from clipcap.image import Candidate
from clipcap.widgets import CaptionWidget, LatestOnly, SweepWidget, caption_many, score_drawn

photo = Image.linear_gradient('L').resize((60, 40)).convert('RGB')


class Echo:
    "Says what it was asked for; in which thread, is noted"

    def __init__(self, seconds=0):
        self.seconds = seconds
        self.asked = []
        self.threads = set()

    def candidates(self, images, options):
        self.asked.append(options)
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds)
        if options.seed == 13:
            raise RuntimeError('thirteen\nis too much')
        rng = np.random.default_rng([options.seed or 0, round(100 * options.temperature)])
        words = rng.choice(1 + round(10 * options.temperature), options.candidates)
        said = f'a <dog> & T={options.temperature:.1f}'
        return [[Candidate(f'{said} {word}', -1 - word / 10) for word in words] for _ in images]

    def caption(self, images, options):
        return [found[0].text for found in self.candidates(images, options)]


def upload(widget, name, content, note=''):
    "As the page does it"
    widget.receive(widget, dict(kind='photo', name=name, note=note), [memoryview(content)])
    widget.wait()


def jpeg(size=(60, 40)):
    data = io.BytesIO()
    Image.linear_gradient('L').resize(size).convert('RGB').save(data, 'JPEG')
    return data.getvalue()


@pytest.fixture
def widget():
    made = CaptionWidget(Echo())
    yield made
    made.close()


def test_it_opens_with_the_first_photo_captioned():
    widget = CaptionWidget(Echo(), [photo, photo])
    widget.wait()
    assert widget.sentence.startswith('A <dog> & T=0.0')
    assert widget.names == ['photo 1', 'photo 2']
    assert widget.pick == 0
    widget.close()


def test_upload_and_sliders(widget):
    assert not widget.captioner.asked
    upload(widget, 'a.jpg', jpeg())
    assert widget.captions[0]['text'].startswith('a <dog> & T=0.0')
    assert widget.captions[0]['probability'] == pytest.approx(np.exp(-1))
    assert (widget.status, widget.error) == ('', '')
    assert (widget.pick, widget.uploaded) == (-1, 'a.jpg')
    assert Image.open(io.BytesIO(widget.picture)).size == (60, 40)
    widget.temperature = 0.7
    widget.top_p = 0.5
    widget.candidates = 2
    widget.wait()
    last = widget.captioner.asked[-1]
    assert (last.temperature, last.top_p, last.candidates) == (0.7, 0.5, 2)
    assert 'T=0.7' in widget.sentence
    assert len(widget.captioner.threads) == 1
    assert threading.main_thread() not in widget.captioner.threads


def test_what_became_of_an_upload_is_said(widget):
    upload(widget, 'a.jpg', jpeg(), 'sent as 60 x 40 (was 6000 x 4000, 15.1 MB)')
    assert widget.status == 'a.jpg: sent as 60 x 40 (was 6000 x 4000, 15.1 MB)'
    widget.receive(widget, dict(kind='refused', name='b\n.tif', why='90 MB are too much'), [])
    widget.wait()
    assert widget.error == r'b\n.tif: 90 MB are too much'
    assert (widget.sentence, widget.captions) == ('', [])


def test_the_same_photo_twice_is_captioned_twice(widget):
    upload(widget, 'a.jpg', jpeg())
    upload(widget, 'a.jpg', jpeg())
    assert len(widget.captioner.asked) == 2


def test_surprise_is_another_seed():
    widget = CaptionWidget(Echo(), [photo])
    seeds = []
    for _ in range(3):
        widget.receive(widget, dict(kind='surprise'), [])
        widget.wait()
        seeds.append(widget.captioner.asked[-1].seed)
    assert len(set(seeds)) == 3
    assert widget.captioner.asked[-1].temperature >= 0.7
    widget.close()


def test_sliders_before_any_photo(widget):
    widget.temperature = 1.0
    widget.surprise()
    widget.wait()
    assert not widget.captioner.asked
    assert not widget.status


@pytest.mark.parametrize('beams', [1, 4, 10])
@pytest.mark.parametrize('candidates', [1, 5, 10])
@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_every_place_of_the_sliders_can_be_decoded(widget, temperature, candidates, beams):
    widget.beams = beams
    widget.temperature = temperature
    widget.candidates = candidates
    options = widget.options()
    assert options.candidates == (candidates if temperature else min(candidates, beams))
    assert options.width == (1 if temperature else beams)


def test_the_latest_wins():
    widget = CaptionWidget(Echo())
    answer, go = widget.captioner.candidates, threading.Event()
    widget.captioner.candidates = lambda *request: go.wait(60) and answer(*request)
    widget.take('photo', photo)
    for n in range(1, 20):
        widget.temperature = n / 10  # while the first is being worked on
    go.set()
    widget.wait()
    assert 'T=1.9' in widget.sentence
    assert len(widget.captioner.asked) <= 2
    assert not widget.status
    widget.close()


def test_what_is_outdated_is_never_shown():
    shown, go = [], threading.Event()

    def work(n):
        if n == 0:
            go.wait(60)
        yield n

    worker = LatestOnly(work, shown.append, shown.append)
    for n in range(3):
        worker.ask(n)
    go.set()
    worker.wait()
    assert shown == [2]


def test_outdated_errors_are_not_shown():
    shown, begun, go = [], threading.Event(), threading.Event()

    def work(n):
        begun.set()
        if n == 0:
            go.wait(60)
            raise ClipcapError('old')
        yield n

    worker = LatestOnly(work, shown.append, shown.append)
    worker.ask(0)
    begun.wait(60)
    worker.ask(1)
    go.set()
    worker.wait()
    assert shown == [1]


@pytest.mark.parametrize(
    'name, content, says',
    [
        ('empty.jpg', b'', 'empty'),
        ('words.txt', b'not a photo\n' * 9, 'not a photo'),
        ('half.jpg', jpeg((900, 900))[:3000], 'half.jpg'),
        ('<script>.png', b'\x89PNG\r\n\x1a\n', '<script>.png'),
        ('a\nb.jpg', b'', r'a\nb.jpg'),
    ],
)
def test_bad_uploads_are_one_line(widget, name, content, says):
    upload(widget, name, content)
    assert says in widget.error
    assert '\n' not in widget.error
    assert '0x' not in widget.error
    assert not widget.sentence
    upload(widget, 'good.jpg', jpeg())
    assert not widget.error
    assert 'T=0.0' in widget.sentence


def test_huge_uploads_are_refused_before_they_are_decoded(widget):
    data = io.BytesIO()
    Image.new('1', (1, 1)).save(data, 'PNG')
    begin, end = data.getvalue()[:12], data.getvalue()[33:]
    header = b'IHDR' + struct.pack('>II', 30_000, 30_000) + data.getvalue()[24:29]
    upload(widget, 'huge.png', begin + header + struct.pack('>I', zlib.crc32(header)) + end)
    assert 'huge.png' in widget.error
    assert 'pixels' in widget.error


def test_a_fault_of_the_captioner_is_one_line(widget):
    upload(widget, 'a.jpg', jpeg())
    widget.seed = 13
    widget.temperature = 1.0
    widget.wait()
    assert widget.error == 'RuntimeError: thirteen'
    widget.temperature = 0.0
    widget.wait()
    assert not widget.error
    assert 'T=0.0' in widget.sentence


def test_a_bad_photo_among_those_to_pick(tmp_path):
    (tmp_path / 'a.jpg').write_text('no photo')
    photo.save(tmp_path / 'b.jpg')
    widget = CaptionWidget(Echo(), tmp_path)
    widget.wait()
    assert 'a.jpg' in widget.error
    widget.pick = 1
    widget.wait()
    assert (widget.error, widget.picture_name) == ('', 'b.jpg')
    assert widget.sentence
    widget.close()


# ---- the sweep
def test_scores_have_known_answers():
    references = [
        ['a dog runs over grass', 'the dog is running'],
        ['two cats sleep on a bed', 'cats on a bed'],
    ]
    assert score_drawn(references, references)['BLEU-1'] == pytest.approx(1)
    wrong = score_drawn([['purple'] * 2] * 2, references)
    assert wrong['CIDEr'] == 0
    assert wrong['BLEU-1'] < 0.01


def test_many_captions_of_a_captioner_without_scores():
    class Plain:
        def caption(self, images, options):
            return [f'{options.seed} {n}' for n, _ in enumerate(images)]

    from clipcap.generate import GenerationOptions

    options = GenerationOptions(1, 1.0, candidates=3, seed=5)
    wanted = [['5 0', '6 0', '7 0'], ['5 1', '6 1', '7 1']]
    assert caption_many(Plain(), [photo] * 2, options) == wanted


def test_sweep_widget():
    widget = SweepWidget(Echo(), [photo] * 2, [['a dog']] * 2, (0.0, 0.5, 2.0), samples=6)
    widget.receive(widget, dict(kind='sweep'), [])
    widget.wait()
    assert [row['temperature'] for row in widget.rows] == ['0', '0.5', '2']
    assert [row['different'] for row in widget.table][0] == 1
    assert widget.table[-1]['different'] > 1
    assert {len(row['captions'][0]) for row in widget.table} == {6}
    assert bytes(widget.picture[:4]) == b'\x89PNG'
    assert not widget.status
    widget.close()


def test_sweep_widget_stops_for_a_newer_sweep():
    widget = SweepWidget(Echo(0.1), [photo], temperatures=(0.0, 0.5, 1.0, 1.5))
    widget.sweep()
    while not widget.captioner.asked:
        time.sleep(0.01)
    widget.samples = 3
    widget.sweep()
    widget.wait()
    assert len(widget.captioner.asked) < 8
    assert len(widget.table) == 4
    assert {len(row['captions'][0]) for row in widget.table} == {3}
    widget.close()
