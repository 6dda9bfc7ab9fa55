"clipcap.base.captions: real captions, the drawn sample, tables as people and programs write them"

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
from conftest import refusal

from clipcap.base.captions import (
    find_dataset,
    read_captions,
    read_dataset,
    read_splits,
    read_table,
    split_name,
    with_splits,
)
from clipcap.base.files import write_json
from clipcap.base.photos import list_images, open_image
from clipcap.base.scenes import draw_dataset

root = Path(__file__).resolve().parent.parent
shared = root.parent / 'shared' / 'data'
real = pytest.mark.skipif(not shared.is_dir(), reason=f'needs the real captions in {shared}')


def pairs(table):
    "Images and captions, as a list"
    return table[['image', 'caption']].values.tolist()


# ---- real captions
@real
@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'name, rows, photos', [('flickr8k', 35_000, 7_000), ('flickr30k', 155_070, 31_014)]
)
def test_real_captions(name, rows, photos):
    start = time.process_time()
    table = read_captions(shared / name / 'results.csv')
    assert time.process_time() - start < 3
    assert len(table) == rows and table.image.nunique() == photos
    assert (table.image.value_counts() == 5).all()
    assert table.image.str.fullmatch(r'\d+(_[0-9a-f]+)?\.jpg').all()
    assert (table.caption == table.caption.str.strip()).all()
    if name == 'flickr30k':  # the row that has lost its second bar
        captions = table[table.image == '2199200615.jpg'].caption
        assert captions.iloc[4] == 'A dog runs across the grass.'


@real
def test_real_data_set():
    table, photos = read_dataset(shared / 'flickr8k')
    assert photos == shared / 'flickr8k' / 'images'
    counts = table.drop_duplicates('image').split.value_counts().to_dict()
    assert counts == dict(train=6_000, val=1_000)


# ---- the drawn sample
def test_the_sample_is_what_draw_dataset_draws(tmp_path):
    import numpy as np

    sample, drawn = root / 'data' / 'sample', draw_dataset(tmp_path / 'drawn', 60)
    assert find_dataset(root) == sample or (root / 'data' / 'raw').is_dir()
    for name in 'results.csv', 'splits.csv':
        assert (sample / name).read_text() == (drawn / name).read_text()
    ours, again = list_images(sample / 'images'), list_images(drawn / 'images')
    assert [p.name for p in ours] == [p.name for p in again]
    for one, other in zip(ours, again, strict=True):  # another libjpeg may round otherwise
        difference = np.asarray(open_image(one), int) - np.asarray(open_image(other), int)
        assert abs(difference).mean() < 2
    table, _ = read_dataset(sample)
    assert set(table.split) == {'train', 'val', 'test'} and (table.image.value_counts() == 5).all()


# ---- odd tables
@pytest.mark.filterwarnings('ignore')
def test_tables_as_people_write_them(tmp_path):
    file = tmp_path / 'table.csv'
    file.write_bytes(
        b'\xef\xbb\xbfimage;caption;split\r\na b.jpg;"A ""big"" dog; brown.";Validation\r\n'
        b'\r\nb.jpg;None;test\r\n'
    )
    with pytest.warns(UserWarning, match='1 of 3 rows .* line 3'):
        table = read_captions(file)
    rows = [['a b.jpg', 'A "big" dog; brown.', 'val'], ['b.jpg', 'None', 'test']]
    assert table.values.tolist() == rows
    file.write_text('image,caption,split\na.jpg,A dog.,holdout\n')
    assert 'holdout' in refusal(read_table, file)
    for content in (
        b'',
        b'\n\n',
        b'\xff\xfe\x00',
        b'image,caption\n',
        b'PK\x03\x04\xff',
        b'[]',
        b'{}',
        b'[{}]',
        b'{"images": 3}',
        b'{"images": ["a.jpg"]}',
        b'{"images": ["a.jpg"], "annotations": ["b"]}',
        b'{"images": [{"id": [], "file_name": "a.jpg"}], "annotations": []}',
        b'{"images": [{"filename": "a.jpg", "sentences": [{"raw": ["a dog"]}]}]}',
        b'{"images": [{"filename": 7, "sentences": [{"raw": "a dog"}]}]}',
        b'{"images": [{"filename": "a.jpg", "split": 3, "sentences": [{"raw": "a dog"}]}]}',
        b'[{"image": "a.jpg", "caption": 7}]',
        b'["a.jpg"]',
        b'[' * 1_000_000,
        b'{"images":' * 1_000_000,
        b'x' * 300_000 + b'|',
        b'image,caption\n"' + b'x' * 300_000,
    ):
        file.write_bytes(content)
        assert str(file) in refusal(read_captions, file)
    assert 'this is a folder' in refusal(read_captions, tmp_path)


QUOTES = {
    'a quote at the beginning': ('" a man on a bench', '" a man on a bench'),
    'a quote within': ('a man 6" tall', 'a man 6" tall'),
    'a quote at the end': ('the sign says "', 'the sign says "'),
    'words in quotes first': ('"stop" says the sign', '"stop" says the sign'),
    'words in quotes last': ('a sign says "stop"', 'a sign says "stop"'),
    'two pairs': ('"a" and "b"', '"a" and "b"'),
    'a quoted field': ('"a dog"', 'a dog'),
    'quotes in a quoted field': ('"a ""big"" dog"', 'a "big" dog'),
    'three quotes': ('"a" and "b', '"a" and "b'),
    'a line end in a quoted field': ('"a dog\non the grass"', 'a dog on the grass'),
    'quotes and line ends': ('"he says ""go""\nand ""stop"""', 'he says "go" and "stop"'),
    'an empty quoted field before': ('""', None),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mark', ['\t', ',', ';'])
@pytest.mark.parametrize('case', QUOTES)
def test_quotes_swallow_no_rows(tmp_path, mark, case):
    written, wanted = QUOTES[case]
    for order in (0, 1), (1, 0):
        lines = [('image', 'caption'), ('1.jpg', 'a cat'), ('2.jpg', written)]
        lines += [(f'{i}.jpg', 'a "red" cat') for i in range(3, 9)] + [('9.jpg', written)]
        text = ''.join(mark.join(line[i] for i in order) + '\n' for line in lines)
        (tmp_path / 'table.csv').write_text(text)
        found = dict(pairs(read_table(tmp_path / 'table.csv')))
        odd = {} if wanted is None else {'2.jpg': wanted, '9.jpg': wanted}
        assert found == {
            '1.jpg': 'a cat',
            **{f'{i}.jpg': 'a "red" cat' for i in range(3, 9)},
            **odd,
        }


def test_a_stray_quote_is_named_in_a_csv(tmp_path):
    rows = ['image,caption', 'a.jpg,a cat', 'b.jpg," a man', 'c.jpg,a dog', 'd.jpg,"a dog"', '']
    (tmp_path / 'a.csv').write_text('\n'.join(rows))
    with pytest.warns(UserWarning, match='never closed is taken as part of its caption: line 3'):
        table = read_table(tmp_path / 'a.csv')
    assert [caption for _, caption in pairs(table)] == ['a cat', '" a man', 'a dog', 'a dog']
    (tmp_path / 'a.tsv').write_text('\n'.join(rows).replace(',', '\t'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert pairs(read_table(tmp_path / 'a.tsv')) == pairs(table)


def test_marks_too_many_belong_to_the_caption(tmp_path):
    file = tmp_path / 'a.csv'
    file.write_text('caption,split,image\na cat, a dog, a bird,dev,a.jpg\na fish,test,b.jpg\n')
    table = read_table(file)
    wanted = [['a.jpg', 'a cat, a dog, a bird', 'val'], ['b.jpg', 'a fish', 'test']]
    assert table.values.tolist() == wanted
    file.write_text('image,caption,score\na.jpg,a dog, brown,-1.5\nb.jpg,a cat,-2,,\n')
    assert pairs(read_table(file)) == [['a.jpg', 'a dog, brown'], ['b.jpg', 'a cat']]


@pytest.mark.parametrize('mark', [',', '\t'])
def test_what_pandas_and_csv_write_comes_back(tmp_path, mark):
    captions = ['a "b" c', '"a', 'a"', 'a, b; c', "it's", 'é 鳥', '"a" b', '""', 'a "b']
    images = [f'{i} x.jpg' for i in range(len(captions))]
    table = pd.DataFrame(dict(image=images, caption=captions))
    table.to_csv(tmp_path / 'a.csv', sep=mark, index=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert pairs(read_table(tmp_path / 'a.csv')) == table.values.tolist()


def test_what_clipcap_caption_writes_is_read(tmp_path, monkeypatch):
    "Paths as they were given, from here or from the root; the best of several candidates"
    draw_dataset(tmp_path / 'set', 6)
    for name in 'results.csv', 'splits.csv':
        (tmp_path / 'set' / name).unlink()
    monkeypatch.chdir(tmp_path)
    for place in Path('set'), tmp_path / 'set':
        rows = [(str(path), f'a {path.stem}, "red"') for path in list_images(place / 'images')]
        for file in (tmp_path / 'set').glob('captions*'):
            file.unlink()
        text = pd.DataFrame(rows, columns=['image', 'caption']).assign(score=-1.5)
        text.to_csv(tmp_path / 'set' / 'captions.csv', index=False)
        listed = [
            dict(image=image, caption=caption, score=-1.5, candidates=[dict(caption='no')])
            for image, caption in rows
        ]
        for kind in 'csv', 'json':
            if kind == 'json':
                (tmp_path / 'set' / 'captions.csv').unlink()
                write_json(tmp_path / 'set' / 'captions.json', listed)
            table, photos = read_dataset(place)
            assert len(table) == 6 and all((photos / name).is_file() for name in table.image)
            assert table.caption.tolist() == [caption for _, caption in rows]
        (tmp_path / 'set' / 'captions.json').unlink()


def test_tables_from_windows(tmp_path):
    draw_dataset(tmp_path, 6)
    table = read_captions(tmp_path / 'results.csv')
    for name in 'results.csv', 'splits.csv':
        (tmp_path / name).unlink()
    (tmp_path / 'splits.csv').write_text('images\\scene_00000.jpg,dev\r\n')
    rows = [f'images\\{image},{caption}' for image, caption in pairs(table)]
    (tmp_path / 'mine.csv').write_text('\r\n'.join(['image,caption', *rows]))
    found, photos = read_dataset(tmp_path)
    assert photos == tmp_path / '.' and len(found) == 30
    assert set(found.image) == {f'images/scene_{i:05}.jpg' for i in range(6)}
    assert set(found.split[found.image == 'images/scene_00000.jpg']) == {'val'}


def test_a_name_must_not_lead_out_of_the_photo_folder(tmp_path):
    (tmp_path / 'images').mkdir()
    for name in ('../x.jpg', 'a/../../x.jpg', '/etc/x.jpg', '..', '..\\x.jpg', 'C:x.jpg', 'a/..'):
        (tmp_path / 'captions.csv').write_text(f'image,caption\n{name},A dog.\n')
        assert 'leads out' in refusal(read_dataset, tmp_path)
        (tmp_path / 'captions.csv').write_text('image,caption\nx.jpg,A dog.\n')
        (tmp_path / 'images' / 'x.jpg').touch()
        (tmp_path / 'splits.csv').write_text(f'{name},train\n')
        assert 'leads out' in refusal(read_dataset, tmp_path)
        (tmp_path / 'splits.csv').unlink()


# ---- splits
def test_split_names_are_the_same_for_all_readers(tmp_path):
    names = dict(Train='train', DEV='val', validation='val', valid='val', restval='train')
    names |= {' test ': 'test', 'training': 'train', 'Testing': 'test'}
    for name, wanted in names.items():
        assert split_name(name) == wanted
        (tmp_path / 'a.csv').write_text(f'image,caption,split\na.jpg,A dog.,{name}\n')
        sentences = [dict(raw='A dog.')]
        karpathy = dict(images=[dict(filename='a.jpg', split=name, sentences=sentences)])
        write_json(tmp_path / 'b.json', karpathy)
        write_json(tmp_path / 'c.json', [dict(image='a.jpg', caption='A dog.', split=name)])
        for file in 'a.csv', 'b.json', 'c.json':
            assert read_captions(tmp_path / file).split.tolist() == [wanted]
        (tmp_path / 'splits.csv').write_text(f'a.jpg,{name}\n')
        assert read_splits(tmp_path / 'splits.csv') == {'a.jpg': wanted}
        table = read_captions(tmp_path / 'a.csv').assign(split=None)
        assert with_splits(table, tmp_path / 'splits.csv').split.tolist() == [wanted]
    assert "unknown split 'holdout'" in refusal(split_name, 'holdout')


def test_splits_with_and_without_a_header(tmp_path):
    file = tmp_path / 'splits.csv'
    for text in 'a.jpg,train\nb.jpg,dev\n', 'photo;x,split\r\na.jpg,train\r\n\r\nb.jpg,dev\r\n':
        file.write_text(text)
        assert read_splits(file) == {'a.jpg': 'train', 'b.jpg': 'val'}
    file.write_text('image_name,split\na.jpg,train\na.jpg,val\n')
    assert 'give it one split' in refusal(read_splits, file)
    file.write_text('image_name,split\na.jpg,train,1\n')
    assert 'wanted two columns' in refusal(read_splits, file)


def test_one_row_speaks_for_all_rows_of_its_photo(tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.jpg').touch()
    rows = 'image,caption,split\na.jpg,x,test\na.jpg,y,\nb.jpg,x,\nb.jpg,y,train\n'
    (tmp_path / 'mine.csv').write_text(rows)
    assert read_dataset(tmp_path)[0].split.tolist() == ['test', 'test', 'train', 'train']
    assert not (tmp_path / 'splits.csv').exists()
    (tmp_path / 'mine.csv').write_text(rows + 'b.jpg,z,val\n')
    assert 'b.jpg is in more than one split' in refusal(read_dataset, tmp_path)


def test_splits_that_cannot_be_stored_are_the_same_every_time(tmp_path, monkeypatch):
    draw_dataset(tmp_path, 10)
    (tmp_path / 'splits.csv').unlink()

    def refuse(*args):
        raise PermissionError('read-only')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', refuse)
        first, _ = read_dataset(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['images', 'results.csv']  # and nothing half-written
    again, _ = read_dataset(tmp_path)
    assert first.equals(again) and (tmp_path / 'splits.csv').exists()


def test_coco_ids_that_two_images_share_are_refused(tmp_path):
    images = [dict(id=1, file_name='a.jpg'), dict(id=1, file_name='b.jpg')]
    notes = [dict(image_id=1, caption='a dog')]
    (tmp_path / 'a.json').write_text(json.dumps(dict(images=images, annotations=notes)))
    assert 'two images with the id 1' in refusal(read_captions, tmp_path / 'a.json')
    notes.append(dict(image_id=7, caption='a cat'))
    (tmp_path / 'a.json').write_text(json.dumps(dict(images=images[:1], annotations=notes)))
    with pytest.warns(UserWarning, match='1 of 2 rows .* caption 2'):
        assert pairs(read_captions(tmp_path / 'a.json')) == [['a.jpg', 'a dog']]


def test_missing_photos_are_named(tmp_path):
    draw_dataset(tmp_path, 4)
    (tmp_path / 'images' / 'scene_00002.jpg').unlink()
    with pytest.warns(UserWarning, match='1 of 4 photos are missing .*: scene_00002.jpg'):
        table, _ = read_dataset(tmp_path)
    assert table.image.nunique() == 3
    shutil.rmtree(tmp_path / 'images')
    assert 'none of the 4 photos is here' in refusal(read_dataset, tmp_path)


@pytest.mark.skipif(os.name == 'nt', reason='what only POSIX has')
def test_pipes_do_not_hang_anything(tmp_path):
    (tmp_path / 'images').mkdir()
    os.mkfifo(tmp_path / 'captions.csv')
    for read in read_captions, read_table:
        assert 'not a file' in refusal(read, tmp_path / 'captions.csv')
    assert 'not a file' in refusal(read_dataset, tmp_path)
    (tmp_path / 'captions.csv').unlink()
    (tmp_path / 'captions.csv').write_text('image,caption\na.jpg,a dog\n')
    (tmp_path / 'a.jpg').touch()
    os.mkfifo(tmp_path / 'splits.csv')
    assert 'not a file' in refusal(read_dataset, tmp_path)
    (tmp_path / 'splits.csv').unlink()
    (tmp_path / 'a.jpg').unlink()
    os.mkfifo(tmp_path / 'a.jpg')
    assert 'none of the 1 photos is here' in refusal(read_dataset, tmp_path)


def test_names_with_line_ends_come_back(tmp_path):
    rows = [['two\nlines.jpg', 'a dog'], ['tab\t.jpg', 'a "cat"'], ['c.jpg', 'a fish']]
    pd.DataFrame(rows, columns=['image', 'caption']).to_csv(tmp_path / 'a.csv', index=False)
    assert pairs(read_table(tmp_path / 'a.csv')) == rows
