"Distilling: whose features are learned, resuming, and what is refused"

import base64
import json
import math
import os

import numpy as np
import pytest
import torch
from faults import fail_at_call
from PIL import Image

import clipcap.methods.distill
from clipcap.base.files import ClipcapError
from clipcap.base.store import FeatureStore
from clipcap.methods.distill import (
    Distillation,
    DistillConfig,
    distill,
    feature_scale,
    fit_words,
    make_student,
    squash_photos,
)

n, cells, dim = 24, 4, 6


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    paths = []
    for i in range(n):
        paths.append(folder / f'{i:02}.png')
        Image.fromarray(rng.integers(0, 255, (70, 60, 3)).astype(np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(scope='module')
def pixels(photos, tmp_path_factory):
    return squash_photos(photos, tmp_path_factory.mktemp('squashed') / 'photos.npy', 64)


def make_store(folder, order=None, value=None):
    "The teacher's features of 24 photos, in this order"
    folder.mkdir()
    features = np.random.default_rng(1).normal(size=(n, cells, dim)).astype(np.float16)
    if value is not None:
        features[3] = value
    order = np.arange(n) if order is None else order
    np.save(folder / 'features.npy', features[order])
    names = [f'{i:02}.png' for i in order]
    tower = dict(cells=cells, dim=dim, name='made-up', features='grid')
    identities = base64.b64encode(bytes(32 * n)).decode()
    manifest = dict(whole=True, fingerprint='made-up', tower=tower, skipped={}, names=names)
    manifest['identities'] = identities
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    return FeatureStore(folder, manifest)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp('store') / 'teacher')


def make_distillation(store):
    torch.manual_seed(0)
    cells = torch.as_tensor(store.features.astype(np.float32))
    words = torch.nn.Linear(dim, 3).requires_grad_(False)
    return Distillation(make_student((8, 8, 8, 8), (1, 1, 1, 1)), feature_scale(cells), words)


brief = DistillConfig(
    steps=5, sizes=((0.0, 32), (0.5, 64)), batch_size=8, precision='fp32', save_every=2
)
evenly = np.ones(n, int)


def run(store, pixels, folder, config=brief, repeats=evenly, **more):
    model = make_distillation(store)
    log = distill(model, pixels, store, repeats, config, folder, progress=False, **more)
    return model.state_dict(), log


def assert_same(a, b):
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize('step', [0, 1, 3, 4])
def test_a_run_goes_on_where_it_was_killed(step, store, pixels, tmp_path, monkeypatch):
    unbroken, log = run(store, pixels, tmp_path / 'unbroken')
    fail_at_call(monkeypatch, clipcap.methods.distill, 'random_views', step)
    with pytest.raises(KeyboardInterrupt):
        run(store, pixels, tmp_path / 'run')
    monkeypatch.undo()
    again, log_again = run(store, pixels, tmp_path / 'run')
    assert_same(unbroken, again)
    assert log_again.equals(log)
    finished, log_again = run(store, pixels, tmp_path / 'run')  # nothing left to do
    assert_same(unbroken, finished)
    assert log_again.equals(log)


def test_other_settings_or_data_are_refused(store, pixels, tmp_path):
    run(store, pixels, tmp_path / 'run')
    twice = evenly.copy()
    twice[2] = 2
    for other in (
        dict(config=DistillConfig(**vars(brief) | dict(rate=1e-4))),
        dict(config=DistillConfig(**vars(brief) | dict(sizes=((0.0, 32), (0.6, 64))))),
        dict(repeats=twice),
        dict(pixels=pixels[::-1]),
        dict(store=make_store(tmp_path / 'other', value=1)),
    ):
        with pytest.raises(ClipcapError, match='run.*otherwise'):
            run(**dict(store=store, pixels=pixels, folder=tmp_path / 'run') | other)


def test_each_photo_learns_its_own_features_whatever_the_order_of_the_store(
    store, pixels, tmp_path
):
    order = np.random.default_rng(5).permutation(n)
    shuffled = make_store(tmp_path / 'shuffled', order)
    rows = shuffled.rows([f'{i:02}.png' for i in range(n)])
    plain, _ = run(store, pixels, tmp_path / 'a')
    model = make_distillation(store)
    distill(model, pixels, shuffled, evenly, brief, tmp_path / 'b', rows, progress=False)
    assert_same(plain, model.state_dict())


def test_squashed_photos_are_those_asked_for(photos, tmp_path):
    file = tmp_path / 'photos.npy'
    first = np.array(squash_photos(photos, file, 32))
    assert (squash_photos(photos, file, 32) == first).all()
    assert (squash_photos(photos[::-1], file, 32)[::-1] == first).all()
    assert squash_photos(photos[:3], file, 32).shape[0] == 3
    assert squash_photos(photos, file, 16).shape == (n, 16, 16, 3)
    copy = [tmp_path / path.name for path in photos[:2]]
    for path, new in zip(photos[:2], copy, strict=True):
        new.write_bytes(path.read_bytes())
    before = np.array(squash_photos(copy, file, 32))
    Image.new('RGB', (60, 70), 'red').save(copy[1])  # one photo is replaced
    os.utime(copy[1], ns=(1, 1))
    after = squash_photos(copy, file, 32)
    assert (after[0] == before[0]).all() and (after[1] == [255, 0, 0]).all()


def test_a_broken_photo_leaves_no_array(photos, tmp_path):
    broken = tmp_path / 'broken.png'
    broken.write_text('no photo')
    for some in [*photos[:2], broken], [*photos[:2], tmp_path / 'missing.png']:
        with pytest.raises(ClipcapError, match='broken.png|missing.png'):
            squash_photos(some, tmp_path / 'squashed' / 'photos.npy', 32)
    assert not list((tmp_path / 'squashed').glob('*')) if (tmp_path / 'squashed').exists() else True


def test_what_is_not_finite_ends_in_one_line(pixels, tmp_path):
    store = make_store(tmp_path / 'teacher', value=np.inf)
    model = make_distillation(store)
    model.scale[:] = 1
    with pytest.raises(ClipcapError, match='step|finite'):
        distill(model, pixels, store, evenly, brief, tmp_path / 'run', progress=False)
    with pytest.raises(ClipcapError, match='not finite'):
        fit_words(torch.full((40, 3), math.nan), [['a dog']] * 40)
    with pytest.raises(ClipcapError, match='no word'):
        fit_words(torch.zeros(4, 3), [['a dog']] * 4)


def test_words_of_any_language_count():
    captions = [['一只黑狗'] if i % 2 else ['красный шар'] for i in range(60)]
    layer = fit_words(torch.randn(60, 3), captions)
    assert layer.out_features == 4 + 2


@pytest.mark.parametrize(
    'wrong',
    [
        dict(sizes=()),
        dict(sizes=((0.0, 100),)),
        dict(sizes=((0.5, 96),)),
        dict(sizes=((0.0, 96), (1.0, 128))),
        dict(sizes=((0.0, math.inf),)),
        dict(sizes=((0.0, 96), (math.nan, 96))),
        dict(sizes=5),
        dict(steps=0),
        dict(batch_size=1),
        dict(rate=math.inf),
        dict(weight_decay=math.nan),
        dict(precision='int8'),
    ],
)
def test_absurd_settings_are_refused(wrong):
    with pytest.raises(ClipcapError, match=f'{next(iter(wrong))} must be'):
        DistillConfig(**wrong)


def test_sizes_that_do_not_fit_are_refused(store, pixels, tmp_path):
    with pytest.raises(ClipcapError, match='as many of each'):
        run(store, pixels[:5], tmp_path / 'run')
    with pytest.raises(ClipcapError, match='no photo is ever shown'):
        run(store, pixels, tmp_path / 'run', repeats=np.zeros(n, int))
