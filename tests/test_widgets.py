"The widgets without a browser: traits are set, buttons clicked, and the worker waited for; the captioner is made up, and slow where that matters"

import io
import struct
import threading
import time
import zlib
from datetime import datetime, timezone

import numpy as np
import pytest
from PIL import Image

from clipcap.base.files import ClipcapError
from clipcap.image import Candidate
from clipcap.widgets import (
    CaptionWidget,
    LatestOnly,
    SweepWidget,
    candidates_html,
    draw_captions,
    drift_html,
    measure_drawn,
    plot_sweep,
    sweep_temperature,
)

photo = Image.linear_gradient('L').resize((60, 40)).convert('RGB')


class Echo:
    "Says what it was asked for; in which thread, is noted"

    def __init__(self, seconds=0):
        self.seconds, self.asked, self.threads = seconds, [], set()

    def candidates(self, images, options):
        self.asked.append(options)
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds)
        if options.seed == 13:
            raise RuntimeError('thirteen\nis too much')
        words = np.random.default_rng([options.seed or 0, round(100 * options.temperature)]).choice(
            1 + round(10 * options.temperature), options.candidates
        )
        return [
            [
                Candidate(f'a <dog> & T={options.temperature:.1f} {word}', -1 - word / 10)
                for word in words
            ]
            for _ in images
        ]

    def caption(self, images, options):
        return [some[0].text for some in self.candidates(images, options)]


def upload(widget, name, content):
    widget.choice.upload.value = (
        dict(
            name=name,
            type='image/jpeg',
            size=len(content),
            content=memoryview(content),
            last_modified=datetime.now(timezone.utc),
        ),
    )


def jpeg(size=(60, 40)):
    Image.linear_gradient('L').resize(size).convert('RGB').save(data := io.BytesIO(), 'JPEG')
    return data.getvalue()


@pytest.fixture
def widget():
    made = CaptionWidget(Echo(), [photo])
    yield made
    made.close()


def test_upload_and_sliders(widget):
    assert not widget.captioner.asked
    upload(widget, 'a.jpg', jpeg())
    widget.worker.wait()
    assert (
        'a &lt;dog&gt; &amp; T=0.0' in widget.text.value
        and '<dog>' not in widget.text.value
        and '37%' in widget.text.value
        and not widget.status.value
    )
    assert Image.open(io.BytesIO(widget.picture.value)).size == (60, 40)
    widget.sliders.temperature.value = 0.7
    widget.sliders.top_p.value = 0.5
    widget.sliders.candidates.value = 2
    widget.worker.wait()
    last = widget.captioner.asked[-1]
    assert (last.temperature, last.top_p, last.candidates) == (
        0.7,
        0.5,
        2,
    ) and 'T=0.7' in widget.text.value
    assert (
        len(widget.captioner.threads) == 1
        and threading.main_thread() not in widget.captioner.threads
    )


def test_surprise_is_new_dice(widget):
    widget.choice.pick.index = 1
    widget.worker.wait()
    seeds = []
    for _ in range(3):
        widget.sliders.surprise.click()
        widget.worker.wait()
        seeds.append(widget.captioner.asked[-1].seed)
    assert len(set(seeds)) == 3 and widget.captioner.asked[-1].temperature >= 0.7


def test_sliders_before_any_photo(widget):
    widget.sliders.temperature.value = 1.0
    widget.sliders.surprise.click()
    widget.worker.wait()
    assert not widget.captioner.asked and not widget.status.value


@pytest.mark.parametrize('candidates', [1, 5, 10])
@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_every_place_of_the_sliders_can_be_decoded(widget, temperature, candidates):
    widget.sliders.beams.value = 1
    widget.sliders.temperature.value = temperature
    widget.sliders.candidates.value = candidates
    options = widget.sliders.options()
    assert options.candidates == candidates and (options.width >= candidates or options.width == 1)


def test_the_latest_wins():
    widget = CaptionWidget(Echo(), [photo])
    answer, go = widget.captioner.candidates, threading.Event()
    widget.captioner.candidates = lambda *request: go.wait(20) and answer(*request)
    widget.choice.pick.index = 1
    for n in range(1, 20):
        widget.sliders.temperature.value = n / 10  # while the first is being worked on
    go.set()
    widget.worker.wait()
    assert (
        'T=1.9' in widget.text.value
        and len(widget.captioner.asked) <= 2
        and not widget.status.value
    )
    widget.close()


def test_what_is_outdated_is_never_shown():
    shown, go = [], threading.Event()

    def work(n):
        if n == 0:
            go.wait(10)
        yield n

    worker = LatestOnly(work, shown.append, shown.append)
    worker.ask(0)
    worker.ask(1)
    worker.ask(2)
    go.set()
    worker.wait()
    assert shown in ([2], [0, 2]) and 0 not in shown


def test_outdated_errors_are_not_shown():
    shown, go = [], threading.Event()

    def work(n):
        if n == 0:
            go.wait(10)
            raise ClipcapError('old')
        yield n

    worker = LatestOnly(work, shown.append, shown.append)
    worker.ask(0)
    while worker.waiting:
        time.sleep(0.01)
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
        ('<script>.png', b'\x89PNG\r\n\x1a\n', '&lt;script&gt;.png'),
    ],
)
def test_bad_uploads_are_one_line(widget, name, content, says):
    upload(widget, name, content)
    widget.worker.wait()
    assert (
        says in widget.status.value
        and '<script>' not in widget.status.value
        and '\n' not in widget.status.value
        and '0x' not in widget.status.value
    )
    upload(widget, 'good.jpg', jpeg())
    widget.worker.wait()
    assert not widget.status.value and 'T=0.0' in widget.text.value


def test_huge_uploads_are_refused_before_they_are_decoded(widget):
    Image.new('1', (1, 1)).save(data := io.BytesIO(), 'PNG')
    header = b'IHDR' + struct.pack('>II', 30_000, 30_000) + data.getvalue()[24:29]
    upload(
        widget,
        'huge.png',
        data.getvalue()[:12]
        + header
        + struct.pack('>I', zlib.crc32(header))
        + data.getvalue()[33:],
    )
    widget.worker.wait()
    assert 'huge.png' in widget.status.value and 'pixels' in widget.status.value


def test_a_fault_of_the_captioner_is_one_line(widget):
    widget.choice.pick.index = 1
    widget.sliders.seed = 13
    widget.sliders.temperature.value = 1.0
    widget.worker.wait()
    assert 'RuntimeError: thirteen' in widget.status.value and 'too much' not in widget.status.value
    widget.sliders.temperature.value = 0.0
    widget.worker.wait()
    assert not widget.status.value and 'T=0.0' in widget.text.value


# ---- the sweep
def test_measures_have_known_answers():
    references = [
        ['a dog runs over grass', 'the dog is running'],
        ['two cats sleep on a bed', 'cats on a bed'],
    ]
    people = measure_drawn([[r[0], r[1]] for r in references], references)
    assert (
        people['BLEU-1'] == pytest.approx(1) and people['different'] == 2 and people['words'] == 13
    )
    wrong = measure_drawn([['purple'] * 2] * 2, references)
    assert wrong['CIDEr'] == 0 and wrong['BLEU-1'] < 0.01 and wrong['different'] == 1
    assert set(measure_drawn([['a dog']])) == {'different', 'words'}


def test_sweep():
    table = sweep_temperature(Echo(), [photo] * 3, [['a dog']] * 3, (0.0, 0.5, 2.0), draws=6)
    assert (
        list(table.index) == [0, 0.5, 2]
        and table.different[0] == 1
        and table.different.is_monotonic_increasing
        and {'BLEU-1', 'CIDEr', 'words'} <= {*table}
    )
    again = sweep_temperature(Echo(), [photo] * 3, [['a dog']] * 3, (0.0, 0.5, 2.0), draws=6)
    assert again.captions.tolist() == table.captions.tolist() and again['CIDEr'].equals(
        table['CIDEr']
    ), 'the same seed, the same table'
    assert '<dog>' not in drift_html(table) and drift_html(table).count('<tr') == 3
    assert plot_sweep(table).axes[0].get_ylabel().startswith('precision') and [
        len(line.get_xdata()) for line in plot_sweep(table).axes[0].lines
    ] == [3]


def test_draws_without_scores():
    class Plain:
        def caption(self, images, options):
            return [f'{options.seed} {n}' for n, _ in enumerate(images)]

    assert draw_captions(Plain(), [photo] * 2, 1.0, draws=3, seed=5) == [
        ['5 0', '6 0', '7 0'],
        ['5 1', '6 1', '7 1'],
    ]


def test_sweep_widget_stops_for_a_newer_sweep():
    widget = SweepWidget(Echo(0.1), [photo], temperatures=[0.0, 0.5, 1.0, 1.5])
    widget.button.click()
    while not widget.captioner.asked:
        time.sleep(0.01)
    widget.draws.value = 3
    widget.button.click()
    widget.worker.wait()
    assert (
        len(widget.captioner.asked) < 8
        and len(widget.table) == 4
        and {len(some[0]) for some in widget.table.captions} == {3}
    )
    assert widget.plot.value[:4] == b'\x89PNG' and not widget.status.value
    widget.close()


def test_probabilities():
    html = candidates_html([('one', 0.5, 1), ('two', 0.25, 3)])
    assert (
        '50%' in html
        and '25%' in html
        and 'width:50px' in html
        and 'x 3' in html
        and 'One.' in html
    )
