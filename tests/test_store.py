"clipcap.base.store: photos known by their bytes, one writer at a time, killed anywhere, damage"

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from faults import Striking, interrupt, no_space, power_cut

from clipcap.base.files import ClipcapError, write_json
from clipcap.base.photos import read_file
from clipcap.base.store import FeatureStore, StoreWriter, file_state, is_current, photo_identity

posix = pytest.mark.skipif(os.name == 'nt', reason='what only POSIX has')
TOWER = dict(name='bytes', features='grid', cells=2, dim=3)


def features(data):
    "What this tower sees: the last three bytes of a photo, twice"
    return np.array([list(data[-3:])] * 2, np.float16)


def embed(store, photos, every=1):
    "Embed into a store, saved after every so many photos: the names that were embedded"
    photos = {path.name: path for path in photos}
    with StoreWriter(store, 'print', TOWER) as writer:
        todo = writer.todo(photos)
        for n, name in enumerate(todo):
            try:
                state, data = file_state(photos[name]), read_file(photos[name])
            except (OSError, ValueError) as fault:
                writer.skip(name, str(fault))
            else:
                writer.append([name], features(data)[None], [photo_identity(data, state)])
            if n % every == every - 1:
                writer.save()
    return todo


@pytest.fixture
def photos(tmp_path):
    "Nine photos in a folder"
    folder = tmp_path / 'photos'
    folder.mkdir()
    for i in range(9):
        (folder / f'{i}.jpg').write_bytes(b'photo %03d' % i)
    return sorted(folder.iterdir())


def check(store, photos):
    "Every row is of the photo that has its name now"
    opened = FeatureStore.open(store, 'print')
    rows = opened.rows([path.name for path in photos])
    for path, row in zip(photos, opened[rows], strict=True):
        assert np.array_equal(row, features(path.read_bytes())), path.name
    return opened


# ---- which photo
def test_a_replaced_photo_is_noticed_however_like_it_is(tmp_path, photos):
    store = tmp_path / 'store'
    embed(store, photos)
    times = photos[3].stat().st_atime_ns, photos[3].stat().st_mtime_ns
    photos[3].write_bytes(b'photo 033')  # as long as before
    os.utime(photos[3], ns=times)  # and as old
    other = tmp_path / 'other'
    other.write_bytes(b'photo 055')
    os.utime(other, ns=times)
    os.replace(other, photos[5])  # as rsync and mv do
    photos[7].write_bytes(b'a longer photo 777')
    assert embed(store, photos) == ['3.jpg', '5.jpg', '7.jpg']
    opened = check(store, photos)
    assert opened.names == [f'{i}.jpg' for i in (0, 1, 2, 4, 6, 8, 3, 5, 7)]
    assert embed(store, photos) == []


def test_other_photos_under_the_same_names_are_embedded(tmp_path, photos):
    embed(tmp_path / 'store', photos)
    second = tmp_path / 'second'
    second.mkdir()
    others = [second / path.name for path in photos]
    for i, path in enumerate(others):
        path.write_bytes(b'PHOTO %03d' % (100 + i))
    assert embed(tmp_path / 'store', others) == [path.name for path in others]
    check(tmp_path / 'store', others)
    assert sorted(os.listdir(tmp_path / 'store')) == ['features-2.npy', 'manifest.json']


def test_the_same_photos_elsewhere_are_the_same(tmp_path, photos):
    embed(tmp_path / 'store', photos)
    moved = [tmp_path / 'moved' / path.name for path in photos]
    shutil.copytree(photos[0].parent, tmp_path / 'moved')
    for path in moved:
        os.utime(path, (1, 1))
    known = {path.name: path for path in moved}
    assert not is_current(FeatureStore.open(tmp_path / 'store'), known)
    assert embed(tmp_path / 'store', moved) == []
    assert is_current(FeatureStore.open(tmp_path / 'store'), known)


def test_what_is_gone_or_unreadable_loses_its_row(tmp_path, photos):
    embed(tmp_path / 'store', photos)
    photos[0].unlink()
    photos[1].write_bytes(b'')
    if os.name != 'nt':
        photos[2].unlink()
        os.mkfifo(photos[2])
    gone = photos[: 2 + (os.name != 'nt')]
    assert embed(tmp_path / 'store', photos) == [path.name for path in gone]
    opened = check(tmp_path / 'store', photos[3:])
    assert set(opened.skipped) == {path.name for path in gone}
    assert 'lacks 1 of 1 photos: 0.jpg (' in refusal(opened.rows, ['0.jpg'])


def test_a_store_without_identities_is_embedded_anew(tmp_path, photos):
    embed(tmp_path / 'store', photos)
    file = tmp_path / 'store' / 'manifest.json'
    manifest = json.loads(file.read_text())
    del manifest['identities'], manifest['rows']
    write_json(file, manifest)
    assert 'run `clipcap embed` into it again' in refusal(FeatureStore.open, tmp_path / 'store')
    photos[4].write_bytes(b'photo 444')
    with pytest.warns(UserWarning, match='embedded anew'):
        assert len(embed(tmp_path / 'store', photos)) == 9
    check(tmp_path / 'store', photos)


def test_a_million_photos_are_looked_through_in_seconds(tmp_path):
    count = 100_000
    (tmp_path / 'a.jpg').write_bytes(b'photo 000')
    identity = photo_identity(b'photo 000', file_state(tmp_path / 'a.jpg'))
    photos = {f'{i:06}.jpg': str(tmp_path / 'a.jpg') for i in range(count)}
    with StoreWriter(tmp_path / 'store', 'print', TOWER) as writer:
        start = time.process_time()
        assert len(writer.todo(photos)) == count
        rows = np.zeros((1000, 2, 3), np.float16)
        names = list(photos)
        for i in range(0, count, 1000):
            writer.append(names[i : i + 1000], rows, [identity] * 1000)
            writer.save_if_due()
    with StoreWriter(tmp_path / 'store', 'print', TOWER) as writer:
        assert writer.todo(photos) == []
    assert is_current(FeatureStore.open(tmp_path / 'store'), photos)
    assert time.process_time() - start < 15  # 2 on the machine this was written on


def test_a_store_stays_whole_while_nothing_is_added(tmp_path, photos):
    "Others may go on reading while a broken photo is tried again"
    photos[3].write_bytes(b'')
    embed(tmp_path / 'store', photos)
    with StoreWriter(tmp_path / 'store', 'print', TOWER) as writer:
        assert writer.todo({path.name: path for path in photos}) == ['3.jpg']
        assert len(FeatureStore.open(tmp_path / 'store')) == 8
        writer.skip('3.jpg', 'still empty')
    assert FeatureStore.open(tmp_path / 'store').skipped == {'3.jpg': 'still empty'}


# ---- one at a time
HOLDER = """
import sys
from clipcap.base.store import StoreWriter
with StoreWriter(sys.argv[1], 'print', dict(cells=2, dim=3)) as writer:
    print('holds', flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_told_who_works_there(tmp_path, photos):
    command = [sys.executable, '-c', HOLDER, tmp_path / 'store']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b'holds\n'
        told = refusal(embed, tmp_path / 'store', photos)
        assert f'in use by process {first.pid}' in told and 'give another folder' in told
        first.kill()
        first.wait()
    assert len(embed(tmp_path / 'store', photos)) == 9  # the dead hold nothing
    check(tmp_path / 'store', photos)


def test_who_reads_goes_on_reading_what_was_there(tmp_path, photos):
    "A row never becomes that of another photo under a reader: it stays, or the reader is told"
    embed(tmp_path / 'store', photos)
    reader = FeatureStore.open(tmp_path / 'store')
    before = reader[:]
    (photos[0].parent / 'new.jpg').write_bytes(b'photo new')
    embed(tmp_path / 'store', [*photos, photos[0].parent / 'new.jpg'])
    assert np.array_equal(reader[:], before)
    photos[0].write_bytes(b'photo 999')
    embed(tmp_path / 'store', photos)
    if os.name != 'nt':
        assert 'was changed while it was read' in refusal(reader.__getitem__, 3)


# ---- interrupted
@posix
@pytest.mark.parametrize('replaced', [False, True])
def test_killed_at_every_step_and_started_again_all_is_right(tmp_path, photos, replaced):
    first = tmp_path / 'first'
    embed(first, photos[:6], every=2)
    names = {path.name: path for path in photos}
    if replaced:
        photos[2].write_bytes(b'photo 222')
        photos[4].write_bytes(b'')
    shutil.copytree(first, tmp_path / 'unbroken')
    embed(tmp_path / 'unbroken', photos, every=2)
    whole = {path.name: path.read_bytes() for path in (tmp_path / 'unbroken').iterdir()}
    sound = [path for path in photos if path.stat().st_size]
    for at in range(1, 300):
        store = tmp_path / f'at-{at}'
        shutil.copytree(first, store)
        killed = False
        for again in 0, 3:  # and killed once more on the way to the end
            child = os.fork()
            if not child:
                with Striking(store, at + again, power_cut):
                    embed(store, photos, every=2)
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
            killed = killed or died
            try:
                opened = FeatureStore.open(store, 'print')
            except ClipcapError as fault:
                assert 'interrupted after' in str(fault)
            else:
                if is_current(opened, {n: p for n, p in names.items() if p in sound}):
                    check(store, sound)
        embed(store, photos, every=2)
        check(store, sound)
        assert {path.name: path.read_bytes() for path in store.iterdir()} == whole
        if not killed:
            break
    assert 10 < at < 299


@pytest.mark.parametrize('act', [no_space, interrupt])
def test_interrupted_or_full_at_every_step_all_is_right(tmp_path, photos, act):
    for at in range(1, 300):
        store = tmp_path / str(at) / 'store'
        photos[1].write_bytes(b'photo 001')
        embed(store, photos[:4], every=9)
        photos[1].write_bytes(b'photo %03d' % (at + 100))
        strike = Striking(store, at, act)
        try:
            with strike:
                embed(store, photos[:6], every=3)
        except (ClipcapError, KeyboardInterrupt) as fault:
            assert act is interrupt or 'No space left' in str(fault)
        embed(store, photos, every=9)
        check(store, photos)
        assert os.listdir(store.parent) == ['store'] and len(os.listdir(store)) == 2
        if not strike.struck:
            break
    assert 10 < at < 299


def test_a_disk_that_is_full_for_the_rows_is_one_line(tmp_path, photos, monkeypatch):
    real = os.fsync

    def fails(handle):
        if os.fstat(handle).st_size > 128:
            no_space()
        real(handle)

    embed(tmp_path / 'store', photos[:1])
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fails)
        assert 'free some space' in refusal(embed, tmp_path / 'store', photos)
    embed(tmp_path / 'store', photos)
    check(tmp_path / 'store', photos)


# ---- damage
def damaged(change):
    return pytest.param(change, id=change.__name__)


def names_twice(manifest):
    manifest['names'][1] = manifest['names'][0]


def names_are_numbers(manifest):
    manifest['names'] = list(range(len(manifest['names'])))


def one_name_is_null(manifest):
    manifest['names'][3] = None


def fewer_names(manifest):
    del manifest['names'][-1]
    manifest['identities'] = base64.b64encode(bytes(32 * len(manifest['names']))).decode()


def no_names(manifest):
    manifest['names'] = []
    manifest['identities'] = ''


def fewer_identities(manifest):
    manifest['identities'] = base64.b64encode(bytes(32)).decode()


def identities_are_noise(manifest):
    manifest['identities'] = '!!'


def rows_lie_elsewhere(manifest):
    manifest['rows'] = '../features.npy'


def no_tower(manifest):
    del manifest['tower']


def odd_tower(manifest):
    manifest['tower']['dim'] = 'three'


def skipped_is_a_list(manifest):
    manifest['skipped'] = []


def whole_is_a_text(manifest):
    manifest['whole'] = 'yes'


@pytest.mark.parametrize(
    'change',
    [
        damaged(change)
        for change in (
            names_twice,
            names_are_numbers,
            one_name_is_null,
            fewer_names,
            fewer_identities,
            identities_are_noise,
            rows_lie_elsewhere,
            no_tower,
            odd_tower,
            skipped_is_a_list,
            whole_is_a_text,
        )
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, photos, change):
    embed(tmp_path / 'store', photos)
    file = tmp_path / 'store' / 'manifest.json'
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    told = refusal(FeatureStore.open, tmp_path / 'store')
    assert 'no feature store, or a damaged one' in told
    assert refusal(embed, tmp_path / 'store', photos) == told


@pytest.mark.parametrize('content', [b'[]', b'{}', b'', b'{"names', b'[' * 100_000, b'\xff\xfe'])
def test_what_is_no_manifest_is_refused(tmp_path, photos, content):
    embed(tmp_path / 'store', photos)
    (tmp_path / 'store' / 'manifest.json').write_bytes(content)
    told = refusal(FeatureStore.open, tmp_path / 'store')
    assert refusal(embed, tmp_path / 'store', photos) == told


def test_rows_that_do_not_fit_are_refused(tmp_path, photos):
    embed(tmp_path / 'store', photos)
    file = tmp_path / 'store' / 'features.npy'
    sound = file.read_bytes()
    contents = [sound[:-1], b'', b'not an array']
    for array in (
        np.zeros((9, 2, 2), np.float16),
        np.zeros((8, 2, 3), np.float16),
        np.zeros((10, 2, 3), np.float16),
        np.zeros((9, 2, 3), np.float32),
        np.zeros((9, 6), np.float16),
        np.array([{}], dtype=object),
    ):
        np.save(data := io.BytesIO(), array, allow_pickle=True)
        contents.append(data.getvalue())
    for content in contents:
        file.write_bytes(content)
        told = refusal(FeatureStore.open, tmp_path / 'store')
        assert 'damaged' in told and refusal(embed, tmp_path / 'store', photos) == told
    file.write_bytes(sound)
    (tmp_path / 'store' / 'manifest.json').unlink()
    assert 'features.npy' in refusal(embed, tmp_path / 'store', photos)
    assert file.read_bytes() == sound  # somebody else's array is not written over


def test_rows_that_are_not_finite_or_cut_off_later_are_not_handed_out(tmp_path, photos):
    embed(tmp_path / 'store', photos)
    store = FeatureStore.open(tmp_path / 'store')
    rows = np.load(store.file, mmap_mode='r+')
    rows[4, 1, 2] = np.inf
    rows[6, 0, 0] = np.nan
    rows.flush()
    del rows
    assert store[[0, 3, 5]].shape == (3, 2, 3)
    assert 'the features of 4.jpg are not finite' in refusal(store.__getitem__, [5, 4])
    assert 'the features of 6.jpg are not finite' in refusal(store.__getitem__, 6)
    assert 'the features of 4.jpg' in refusal(store.__getitem__, np.array([[0, 1], [4, 6]]))
    data = store.file.read_bytes()
    store.file.write_bytes(data[:-1])
    assert 'was changed while it was read' in refusal(store.__getitem__, 8)


def test_a_large_store_opens_at_once_and_stays_on_disk(tmp_path):
    n, cells, dim = 100_000, 49, 512
    with open(tmp_path / 'features.npy', 'wb') as file:
        shape = dict(descr='<f2', fortran_order=False, shape=(n, cells, dim))
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + 2 * n * cells * dim)  # 5 GB, none of it written
    names = [f'{i:012}.jpg' for i in range(n)]
    manifest = dict(whole=True, fingerprint='f', tower=dict(cells=cells, dim=dim), skipped={})
    manifest['names'] = names
    manifest['identities'] = base64.b64encode(bytes(32 * n)).decode()
    write_json(tmp_path / 'manifest.json', manifest)

    def memory():
        return int(Path('/proc/self/statm').read_text().split()[1]) * 4096

    before, start = memory(), time.process_time()
    store = FeatureStore.open(tmp_path, 'f')
    rows = store.rows(names[::7])
    assert time.process_time() - start < 1 and rows[-1] == 99_995
    opened = memory()
    for batch in np.random.default_rng(0).permutation(rows)[:1024].reshape(-1, 64):
        assert store[batch].shape == (64, cells, dim)  # 51 MB
    assert opened - before < 60e6 and memory() - opened < 20e6, (
        f'{(opened - before) / 1e6:.0f} and {(memory() - opened) / 1e6:.0f} MB more'
    )


def test_names_in_any_script_or_none(tmp_path, photos):
    odd = [photos[0].with_name(name) for name in ('é鳥.jpg', 'two\nlines.jpg')]
    if os.name != 'nt':
        odd.append(photos[0].with_name(os.fsdecode(b'caf\xe9.jpg')))
    for i, path in enumerate(odd):
        path.write_bytes(b'photo %03d' % i)
    embed(tmp_path / 'store', odd)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check(tmp_path / 'store', odd)
