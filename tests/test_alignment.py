"Words and regions: score, loss, training, resuming, boxes, phrases, CLIP, and the commands"

import base64
import itertools
import json
import math
import os
import shutil
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import clipcap, complaint
from faults import fail_at_call
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcap.base.files import ClipcapError, lock
from clipcap.base.scenes import draw_dataset
from clipcap.base.store import FeatureStore
from clipcap.methods import alignment as alignment_module
from clipcap.methods import regions as regions_module
from clipcap.methods.alignment import (
    AlignConfig,
    Aligner,
    alignment_recall,
    load_aligner,
    make_vocabulary,
    pair_scores,
    photo_batches,
    ranking_loss,
    save_aligner,
    score_table,
    train_aligner,
    words_of,
)
from clipcap.methods.phrases import (
    ClipAligner,
    PhotoAligner,
    align_caption,
    align_dataset,
    draw_alignment,
    find_phrase,
    open_aligner,
    photos_and_regions,
    word_regions,
)
from clipcap.methods.regions import (
    Detector,
    RegionTower,
    TorchvisionDetector,
    cell_boxes,
    crop_boxes,
    draw_regions,
    make_random_detector,
    open_detector,
    open_regions,
    seen_part,
    top_boxes,
)
from clipcap.methods.retrieval import make_random_clip

small = AlignConfig(
    space=16, word_size=8, hidden=8, at_least=1, epochs=20, sum_epochs=20, batch_size=16, rate=2e-2
)
things = ['cat', 'dog', 'sun', 'car']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "60 made-up photos of four cells: two of them hold a thing each, and the captions name both"
    folder, rng, n = tmp_path_factory.mktemp('world'), np.random.default_rng(0), 60
    held, features = (
        [rng.choice(4, 2, replace=False) for _ in range(n)],
        rng.normal(size=(n, 4, 16)) * 0.05,
    )
    places = [rng.choice(4, 2, replace=False) for _ in range(n)]
    for i in range(n):
        features[i, places[i], held[i]] += 1
    names = [f'{i:02}.jpg' for i in range(n)]
    np.save(folder / 'features.npy', features.astype(np.float16))
    (folder / 'manifest.json').write_text(
        json.dumps(
            dict(
                whole=True,
                fingerprint='made-up',
                tower=dict(cells=4, dim=16),
                skipped={},
                names=names,
                identities=base64.b64encode(bytes(32 * n)).decode(),
            )
        )
    )
    rows = [
        (names[i], f'a {things[a]} and a {things[b]}', 'val' if i < 12 else 'train')
        for i in range(n)
        for a, b in (held[i], held[i][::-1])
    ]
    return (
        pd.DataFrame(rows, columns=['image', 'caption', 'split']),
        FeatureStore.open(folder),
        held,
        places,
    )


def new(table, store, config=small, seed=0):
    torch.manual_seed(seed)
    return Aligner(make_vocabulary(table.caption, 1), store.dim, True, config)


@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
    table, store, *_ = world
    aligner, folder = new(table, store), tmp_path_factory.mktemp('run')
    return aligner, train_aligner(aligner, table, store, folder, progress=False), folder


# ---- score and loss
def test_score_is_the_sum_over_words_of_the_best_region():
    rng = np.random.default_rng(1)
    for photos, regions, captions, words in itertools.product([1, 3], [1, 4], [1, 5], [1, 6]):
        v, s, lengths = (
            rng.normal(size=(photos, regions, 7)),
            rng.normal(size=(captions, words, 7)),
            rng.integers(1, words + 1, captions),
        )
        plain = [
            [
                sum(
                    max(float(np.dot(v[k, i], s[c, t])) for i in range(regions))
                    for t in range(lengths[c])
                )
                for c in range(captions)
            ]
            for k in range(photos)
        ]
        mask = torch.arange(words) < torch.tensor(lengths)[:, None]
        assert np.allclose(pair_scores(torch.tensor(v), torch.tensor(s), mask), plain, atol=1e-5)


def test_loss_by_hand_and_by_loops():
    S = torch.tensor([[2.0, 1.5, 0], [0.5, 1, 3], [0, 0, 0]])
    # photo 0: .5; photo 1: .5 + 3; photo 2: 1 + 1
    # caption 0: 0 (by .5 - 2 + 1) and 0; caption 1: 1.5 + 0; caption 2: 1 + 4
    assert ranking_loss(S).item() == pytest.approx((0.5 + 3.5 + 2 + 1.5 + 5) / 3) and ranking_loss(
        S, hardest=True
    ).item() == pytest.approx((0.5 + 3 + 1 + 0 + 1.5 + 4) / 3)
    S, n = torch.randn(6, 6), 6
    for margin in (0.2, 1, 3):
        plain = (
            sum(
                max(0, S[k, j] - S[k, k] + margin) + max(0, S[j, k] - S[k, k] + margin)
                for k in range(n)
                for j in range(n)
                if k != j
            )
            / n
        )
        assert ranking_loss(S, margin).item() == pytest.approx(float(plain), rel=1e-5)
    assert ranking_loss(torch.ones(1, 1)) == 0


def test_padding_and_company_do_not_count(world):
    table, store, *_ = world
    aligner, features = new(table, store).eval(), torch.randn(5, 4, 16)
    texts = ['a cat', 'a dog and a sun and a car and a cat', 'sun', 'nonsense', '!']
    together = aligner(features, *aligner.encode(texts))
    for n, text in enumerate(texts):
        assert torch.allclose(
            aligner(features[2:3], *aligner.encode([text])), together[2:3, n : n + 1], atol=1e-5
        )
    ids, lengths = aligner.encode(texts)
    noise = torch.where(
        torch.arange(ids.shape[1]) < lengths[:, None], ids, torch.randint(2, 6, ids.shape)
    )  # anything where padding was
    assert torch.allclose(aligner(features, noise, lengths), together, atol=1e-5)


def test_gradients_reach_everything_that_learns(world):
    table, store, *_ = world
    aligner = new(table, store).train()
    ranking_loss(
        aligner(torch.randn(6, 4, 16), *aligner.encode(list(table.caption[:6])))
    ).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aligner.parameters())
    assert aligner.read.embedding.weight.grad[0].abs().sum() == 0


# ---- words and batches
def test_words():
    assert words_of('一只狗 Кот') == ['一', '只', '狗', 'кот']
    assert words_of(
        "Two DOGS' ball, dog’s 3-D café!"
    ) == "two dogs ball dog’s 3 d café".split() and words_of('') == ['?']
    assert make_vocabulary(['b b a', 'a c', '? ?'], 2) == ['', '?', 'a', 'b']


@pytest.mark.parametrize('size', [2, 3, 16])
def test_a_batch_never_holds_a_photo_twice(size):
    photos = np.random.default_rng(0).integers(0, 9, 60)
    batches = photo_batches(photos, size, 3, 1)
    assert all(1 < len(b) <= size and len(set(photos[b])) == len(b) for b in batches)
    used = np.concatenate(batches)
    assert len(set(used)) == len(used) > 40
    assert (
        [b.tolist() for b in batches]
        == [b.tolist() for b in photo_batches(photos, size, 3, 1)]
        != [b.tolist() for b in photo_batches(photos, size, 3, 2)]
    )


# ---- training
def test_it_finds_the_photos_and_the_regions(world, trained):
    "Chance: 10 of 12 photos for recall@10, and one region in four"
    table, store, held, places = world
    aligner, history, _ = trained
    assert len(history) == small.epochs
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] / 2
    right = 0
    with torch.inference_mode():
        for i in range(12):  # photos never learned from: each thing on its cell
            one, other = held[i]
            words, _ = aligner.read(*aligner.encode([f'a {things[one]} and a {things[other]}']))
            seen = aligner.see(torch.tensor(store[[i]], dtype=torch.float32))[0, 1:]
            found = [(seen @ words[0, t]).argmax().item() for t in (1, 4)]
            right += sum(a == b for a, b in zip(found, places[i], strict=True))
    assert right >= 12  # of 24; by chance 6, and 18 to 24 with five seeds, one thread and two


def test_saved_and_loaded(world, trained):
    table, store, *_ = world
    aligner, history, folder = trained
    best, about = load_aligner(folder)
    check = table[table.split == 'val']
    assert about is None and alignment_recall(best, check, store)[
        'recall@10'
    ].mean() == pytest.approx(history.score.max(), abs=1 / 24)
    save_aligner(aligner, folder / 'copy')
    again, _ = load_aligner(folder / 'copy')
    names, texts = sorted(check.image.unique()), list(check.caption[:7])
    assert np.allclose(
        score_table(again, store, names, texts),
        score_table(aligner, store, names, texts, 3),
        atol=1e-4,
    )
    assert {p.name for p in (folder / 'copy').iterdir()} == {
        'config.json',
        'model.safetensors',
        'vocabulary.json',
    }
    with pytest.raises(ClipcapError, match='without its vision tower'):
        PhotoAligner(folder / 'copy')
    for broken in 'config.json', 'model.safetensors', 'vocabulary.json':
        save_aligner(aligner, folder / 'copy')
        (folder / 'copy' / broken).write_text('{')
        with pytest.raises(ClipcapError, match='clipcap align'):
            load_aligner(folder / 'copy')


class Stop(Exception):
    pass


@pytest.mark.parametrize('step', [0, 2, 3, 6, 9])  # three steps per epoch
def test_a_run_goes_on_where_it_was_killed(step, world, tmp_path, monkeypatch):
    table, store, *_ = world
    config = replace(small, epochs=4, sum_epochs=2, save_every=1, dropout=0.3)
    unbroken = new(table, store, config)
    history = train_aligner(unbroken, table, store, tmp_path / 'unbroken', progress=False)
    assert len(history) == 4
    fail_at_call(monkeypatch, alignment_module, 'ranking_loss', step)
    with pytest.raises(KeyboardInterrupt):
        killed = new(table, store, config)
        train_aligner(killed, table, store, tmp_path / 'run', progress=False)
    monkeypatch.undo()
    again = new(table, store, config, seed=0 if step == 0 else 5)  # the checkpoint's weights count
    history_again = train_aligner(again, table, store, tmp_path / 'run', progress=False)
    same = [column for column in history if 'per_second' not in column]
    pd.testing.assert_frame_equal(history_again[same], history[same], check_exact=True)
    for name, weight in unbroken.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0, msg=name)
    best, best_again = (load_aligner(tmp_path / run)[0] for run in ('unbroken', 'run'))
    for name, weight in best.state_dict().items():
        torch.testing.assert_close(best_again.state_dict()[name], weight, rtol=0, atol=0, msg=name)


def test_other_settings_or_data_are_refused(world, trained):
    table, store, *_ = world
    _, _, folder = trained
    others = [
        (table, replace(small, rate=0.5)),
        (table, replace(small, margin=0.3)),
        (table.assign(caption=table.caption.str.replace('cat', 'dog')), small),
        (table[:-2], small),
    ]
    for captions, config in others:
        aligner = new(table, store, config)
        with pytest.raises(ClipcapError, match='otherwise'):
            train_aligner(aligner, captions, store, folder, progress=False)


def test_two_runs_in_one_folder(world, tmp_path):
    table, store, *_ = world
    refused = []

    def second():
        try:
            train_aligner(new(table, store), table, store, tmp_path / 'run', progress=False)
        except ClipcapError as fault:
            refused.append(str(fault))

    with lock(tmp_path / 'run'):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and 'in use' in refused[0]
    assert not (tmp_path / 'run' / 'last.safetensors').exists()


def test_without_validation_and_without_photos(world, tmp_path):
    table, store, *_ = world
    learn = table[table.split == 'train']
    config = AlignConfig(space=16, word_size=8, hidden=8, epochs=2, batch_size=16, precision='bf16')
    history = train_aligner(new(table, store, config), learn, store, tmp_path / 'a', progress=False)
    assert 'score' not in history and load_aligner(tmp_path / 'a')[0].config == config
    for some in learn[:2], learn[:0]:
        with pytest.raises(ClipcapError, match='two photos'):
            train_aligner(new(table, store), some, store, tmp_path / 'b', progress=False)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(batch_size=1),
        dict(dropout=1.0),
        dict(dropout=math.nan),
        dict(precision='int8'),
        dict(epochs=0),
        dict(rate=math.inf),
        dict(margin=math.inf),
        dict(clip=math.inf),
        dict(space=10**9),
        dict(seed=-1),
    ],
)
def test_absurd_settings_are_refused(wrong):
    with pytest.raises(ClipcapError, match=f'{next(iter(wrong))} must be'):
        AlignConfig(**wrong)


def test_what_is_not_finite_ends_in_one_line(world, tmp_path):
    table, store, *_ = world
    aligner = new(table, store)
    aligner.region.weight.data[0, 0] = math.nan
    with pytest.raises(ClipcapError, match='step 1'):
        train_aligner(aligner, table, store, tmp_path / 'run', progress=False)
    assert not (tmp_path / 'run' / 'best').exists()
    with pytest.raises(ClipcapError, match='agree by nan'):
        alignment_recall(aligner.eval(), table[table.split == 'val'], store)


def drop(tensors):
    del tensors['read.out.bias']


def add(tensors):
    tensors['strange'] = torch.ones(2)


def spoil(tensors):
    tensors['read.out.weight'][0, 0] = math.nan


@pytest.mark.parametrize('change', [drop, add, spoil])
def test_damaged_weights_are_refused(change, world, tmp_path):
    table, store, *_ = world
    save_aligner(new(table, store), tmp_path / 'model')
    load_aligner(tmp_path / 'model')
    file = tmp_path / 'model' / 'model.safetensors'
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ClipcapError, match='damaged one .*clipcap align'):
        load_aligner(tmp_path / 'model')


@pytest.mark.parametrize(
    'file, text',
    [
        ('config.json', '[]'),
        ('config.json', '{}'),
        ('vocabulary.json', '{}'),
        ('vocabulary.json', '["", "?", 3]'),
        ('vocabulary.json', '["", "?", "a", "a", "and", "car", "cat"]'),
        ('vocabulary.json', '[]'),
    ],
)
def test_strange_json_is_refused(file, text, world, tmp_path):
    table, store, *_ = world
    save_aligner(new(table, store), tmp_path / 'model')
    (tmp_path / 'model' / file).write_text(text)
    with pytest.raises(ClipcapError, match='clipcap align'):
        load_aligner(tmp_path / 'model')


# ---- regions
@pytest.mark.parametrize('size', [(300, 200), (100, 400), (64, 64)])
def test_cells_lie_where_the_tower_looks(size):
    "Cells of the seen part, found again in what is left of a picture of coordinates"
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size=dict(shortest_edge=80),
        crop_size=dict(height=60, width=60),
        do_normalize=False,
        resample=0,
    )
    w, h = size
    picture = Image.fromarray(
        np.stack(
            [
                np.tile(np.arange(w) * 255 / (w - 1), (h, 1)),
                np.tile((np.arange(h) * 255 / (h - 1))[:, None], (1, w)),
                np.zeros((h, w)),
            ],
            2,
        )
        .round()
        .astype(np.uint8)
    )
    left = np.array(processor(images=[picture], return_tensors='np')['pixel_values'][0])
    boxes = cell_boxes(seen_part(size, processor), 9)
    for n, (rows, columns) in {
        0: (slice(0, 20), slice(0, 20)),
        5: (slice(20, 40), slice(40, 60)),
    }.items():
        x, y = left[0, rows, columns], left[1, rows, columns]
        assert np.allclose(boxes[n], [x.min(), y.min(), x.max(), y.max()], atol=0.025)


def test_crops():
    photo = Image.fromarray(np.arange(80 * 60 * 3).reshape(60, 80, 3).astype(np.uint8))
    [a, b, c, d] = crop_boxes(
        photo,
        np.array(
            [[0, 0, 1, 1], [0.25, 0.5, 0.75, 1], [-1, -1, 0.1, 0.1], [0.999, 0.2, 0.999, 0.2]]
        ),
    )
    assert (
        np.array_equal(a, photo)
        and np.array_equal(b, np.asarray(photo)[30:60, 20:60])
        and c.size == (8, 6)
        and d.size == (1, 1)
    )
    assert draw_regions(photo, np.zeros((0, 4)), [], 100).size == (100, 75)


@pytest.fixture(scope='module')
def detr(tmp_path_factory):
    return make_random_detector(tmp_path_factory.mktemp('detr'), 5, seed=1)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp('data') / 'scenes', 24, size=64)


def test_top_boxes():
    def three(photo):
        return np.array([[0.1, 0.1, 0.2, 0.2], [-0.5, 0, 1.5, 1], [0, 0, 0.3, 0.3]])

    whole = [0, 0, 1, 1]
    assert top_boxes(three, None, 2).tolist() == [whole, [0.1, 0.1, 0.2, 0.2], whole]
    assert top_boxes(three, None, 5)[4:].tolist() == [whole] * 2
    assert top_boxes(lambda photo: np.zeros((0, 4)), None, 1).tolist() == [whole] * 2


def test_boxes_of_a_detector_all_the_way(detr, scenes, tmp_path):
    "Detected, cut out, seen one by one, stored, aligned, saved with the detector, opened, searched"
    tower = open_regions('tiny', detr, 4, device='cpu')
    photo = Image.open(sorted((scenes / 'images').iterdir())[0]).convert('RGB')
    found, by_hand = (
        tower.boxes(photo),
        tower.detector.model(**tower.detector.processor(images=[photo], return_tensors='pt')),
    )
    sure = by_hand.logits.softmax(-1)[0, :, :-1].amax(-1).argmax()
    x, y, w, h = by_hand.pred_boxes[0, sure].tolist()
    assert found.shape == (5, 4) and np.allclose(
        found[1], np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 1), atol=1e-5
    )
    one = tower(tower.preprocess([photo]))[0]
    alone = torch.cat(
        [tower.tower(tower.tower.preprocess([part]))[0] for part in crop_boxes(photo, found)]
    )
    assert torch.allclose(one, alone, atol=1e-3)
    config = AlignConfig(space=16, word_size=8, hidden=8, at_least=1, epochs=1, batch_size=8)
    align_dataset(scenes, tmp_path / 'run', tower, config, progress=False)
    aligner = open_aligner(tmp_path / 'run', 'cpu')
    assert (
        aligner.aligner.whole is False
        and aligner.tower.fingerprint == tower.fingerprint
        and (tmp_path / 'run' / 'best' / 'vision' / 'detector').is_dir()
    )
    assert find_phrase(aligner, 'a red ball', [photo], top=3).box[0] in [
        tuple(np.round(b, 3)) for b in found
    ]


def test_detectors_that_are_not_there(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    for name in tmp_path, 'no/such':
        with pytest.raises(ClipcapError, match='detector'):
            Detector(name)
    with pytest.raises(ClipcapError, match='pooled'):
        RegionTower(open_regions('tiny', device='cpu'), None)


def test_torchvision(monkeypatch):
    "What is not installed is named; where it is, weights are read as weights and nothing else"
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(ClipcapError, match='torchvision is not installed: pip install torchvision'):
        TorchvisionDetector()
    asked = []

    class Model(torch.nn.Linear):
        def forward(self, photos):
            return [dict(boxes=torch.tensor([[4.0, 8, 20, 16]]))]

    def get_model(name, **options):
        asked.append((name, options, os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD')))
        return Model(1, 1)

    models = types.ModuleType('torchvision.models')
    models.detection = types.SimpleNamespace(fasterrcnn_resnet50_fpn=None)
    models.get_model = get_model
    monkeypatch.setitem(sys.modules, 'torchvision', types.ModuleType('torchvision'))
    monkeypatch.setitem(sys.modules, 'torchvision.models', models)
    detector = open_detector('fasterrcnn_resnet50_fpn', 'cpu')
    assert asked == [('fasterrcnn_resnet50_fpn', dict(weights='DEFAULT'), '1')]
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
    assert detector(Image.new('RGB', (40, 32))).tolist() == [[0.1, 0.25, 0.5, 0.5]]
    with pytest.raises(ClipcapError, match='none of that name'):
        open_detector('ssd_of_mine')


# ---- phrases
def test_word_regions_against_every_way():
    def worth(way, agreement, beta):
        return agreement[range(len(way)), list(way)].sum() + beta * (np.diff(way) == 0).sum()

    rng = np.random.default_rng(2)
    for _ in range(30):
        words, regions, beta = rng.integers(1, 5), rng.integers(1, 4), rng.choice([0, 0.4, 3])
        agreement = rng.normal(size=(words, regions))
        every_way = itertools.product(range(regions), repeat=int(words))
        best = max(worth(way, agreement, beta) for way in every_way)
        assert worth(word_regions(agreement, beta), agreement, beta) == pytest.approx(best)


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return make_random_clip(tmp_path_factory.mktemp('clip'), ['a red ball', 'a red star'])


def test_clip_through_the_same_score(clip, scenes):
    aligner, photos = open_aligner(clip, 'cpu'), sorted((scenes / 'images').iterdir())[:5]
    assert isinstance(aligner, ClipAligner)
    regions, (words, vectors) = aligner.regions(photos, 2), aligner.words('a red ball')
    assert (
        words == ['a', 'red', 'ball']
        and regions.shape == (5, 17, 16)
        and torch.allclose(regions[3:4], aligner.regions(photos[3:4]), atol=1e-5)
    )
    assert np.allclose(
        regions[:, 0], aligner.towers.photos(photos), atol=1e-5
    )  # the whole photo as CLIP sees it
    ends = aligner.model.text_model(
        **aligner.towers.tokenizer('a red ball', return_tensors='pt')
    ).last_hidden_state[0]
    assert np.allclose(
        torch.nn.functional.normalize(aligner.model.text_projection(ends)[-1], dim=-1).detach(),
        aligner.towers.captions(['a red ball'])[0],
        atol=1e-5,
    )
    found = find_phrase(aligner, 'a red ball', photos, top=9)
    plain = [sum(max(float(r @ w) for r in photo) for w in vectors) for photo in regions]
    assert len(found) == 5 and np.allclose(found.score, sorted(plain, reverse=True), atol=1e-5)
    aligned = align_caption(aligner, photos[0], 'a red ball')
    assert (
        list(aligned.word) == words and draw_alignment(photos[0], aligned, width=100).width == 100
    )
    long = ' '.join(['a red ball'] * 9)  # 24 places, two of them start and end
    assert aligner.words(long)[1].shape == (22, 16)
    with pytest.raises(ClipcapError, match='no word'):
        aligner.words('')


def test_words_that_were_never_learned_are_named(scenes):
    tower = open_regions('tiny', cells=4, device='cpu')
    aligner = PhotoAligner.__new__(PhotoAligner)
    aligner.tower = tower
    aligner.aligner = Aligner(['', '?', 'a', 'ball'], tower.dim, True, small).eval()
    photos = sorted((scenes / 'images').iterdir())[:3]
    for nothing in '', '...', 'zyx', 'zyx xyz':
        with pytest.raises(ClipcapError, match='no word that this model has learned'):
            find_phrase(aligner, nothing, photos)
    with pytest.warns(UserWarning, match='never learned.*: red'):
        assert len(find_phrase(aligner, 'a red ball', photos)) == 3
    with pytest.raises(ClipcapError, match='as many of each'):
        find_phrase(aligner, 'a ball', photos[:2], aligner.regions(photos))


# ---- commands
LEARN = ['--epochs', 2, '--batch-size', 8, '--cells', 4, '--device', 'cpu']


def with_a_broken_photo(scenes, folder):
    "A copy of a data set, one of its photos broken"
    shutil.copytree(scenes, folder)
    broken = sorted((folder / 'images').iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:200])
    return broken


def test_one_broken_photo_ends_neither_align_nor_search(scenes, clip, tmp_path):
    broken = with_a_broken_photo(scenes, tmp_path / 'data')
    run = tmp_path / 'run'
    shown, named = clipcap('align', tmp_path / 'data', '-o', run, *LEARN, code=1)
    assert 'epoch 2: loss' in shown and any(broken.name in line for line in named)
    assert (run / 'best' / 'model.safetensors').exists()
    for model in run, clip:
        search = ['search', tmp_path / 'data', 'a red ball', '-m', model, '-n', 30]
        shown, named = clipcap(*search, '--device', 'cpu', code=1)
        assert len(shown.splitlines()) == 23 and broken.name not in shown
        assert any(broken.name in line for line in named)


def test_older_names_of_options(scenes, tmp_path):
    run = tmp_path / 'run'
    clipcap('align', '--data', scenes, '--model-out', run, *LEARN)
    clipcap('align', f'--data={scenes}', f'--model-out={run}', *LEARN)
    old = ['--model', run, '--top', 2, '--sheet', tmp_path / 'found.png', '--device', 'cpu']
    shown, _ = clipcap('search', 'a red ball', scenes, *old)  # and their order
    assert len(shown.splitlines()) == 2 and (tmp_path / 'found.png').exists()


def test_places_that_cannot_be_written_are_refused_before_the_work(scenes, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot be written' in complaint('align', scenes, '-o', tmp_path / 'file', *LEARN)
    refused = complaint('search', scenes, 'a', '-m', 'none', '-o', tmp_path / 'file' / 'x.png')
    assert str(tmp_path / 'file') in refused


def test_commands(scenes, clip, tmp_path):
    learn = ['align', scenes, '--output', tmp_path / 'run', *LEARN]
    shown, _ = clipcap(*learn)
    assert 'epoch 2: loss' in shown and 'median rank' in shown and 'clipcap search' in shown
    again, _ = clipcap(*learn)  # nothing left to learn
    assert again.splitlines()[-4:] == shown.splitlines()[-4:] and 'epoch 2: loss' not in again
    assert 'otherwise' in complaint(*learn, '--rate', 0.1)
    clipcap(*learn, '--rate', 'inf', code=2)

    search = ['search', scenes, 'a red ball', '--model', tmp_path / 'run', '--device', 'cpu']
    sheet, store = tmp_path / 'found.png', tmp_path / 'run' / 'features'
    shown, _ = clipcap(*search, '-n', 3, '--output', sheet, '--store', store)
    lines = [line.split('\t') for line in shown.splitlines()]
    scores = [float(score) for _, score, _ in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    for photo, _, box in lines:
        assert Path(photo).is_file() and len(box.split(',')) == 4
    assert Image.open(sheet).width > 900
    by_clip = ['search', scenes / 'images', 'a star', '--model', clip, '-n', 2, '--device', 'cpu']
    assert len(clipcap(*by_clip)[0].splitlines()) == 2
    assert 'no-model' in complaint('search', scenes, 'a', '--model', tmp_path / 'no-model')
    assert 'no captions file' in complaint('align', tmp_path, '-o', tmp_path / 'x')


def test_a_broken_photo_is_left_out(scenes, tmp_path):
    learn = tmp_path / 'photos'
    learn.mkdir()
    for photo in sorted((scenes / 'images').iterdir())[:3]:
        (learn / photo.name).write_bytes(photo.read_bytes())
    (learn / 'broken.jpg').write_text('no photo')
    tower = open_regions('tiny', cells=4, device='cpu')
    aligner = PhotoAligner.__new__(PhotoAligner)
    aligner.tower, aligner.aligner = tower, Aligner(['', '?', 'a'], tower.dim, True, small).eval()
    with pytest.warns(UserWarning, match='broken.jpg'):
        photos, regions = photos_and_regions(aligner, learn, progress=False)
    assert len(photos) == len(regions) == 3


def test_labels_in_any_script_are_drawn_with_a_font_that_has_them(monkeypatch):
    asked = []
    real = regions_module.load_font

    def listening(size, text='', bold=False):
        asked.append(text)
        return real(size, text, bold)

    monkeypatch.setattr(regions_module, 'load_font', listening)
    draw_regions(Image.new('RGB', (40, 32)), np.array([[0, 0, 1, 1]]), ['красный шар'], 100)
    assert asked == ['красный шар']
