"clipcap.data on the real captions files, on the drawn sample that git holds, and on every kind of broken picture"

import os
import time
from pathlib import Path

import numpy as np
import pytest

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
