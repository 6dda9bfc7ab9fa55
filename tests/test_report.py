"Captions of models and files, scored; what is left behind is read by official tools and browsers"

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import clipcap, complaint
from PIL import Image

from clipcap.base.files import ClipcapError, lock
from clipcap.base.scenes import draw_dataset
from clipcap.evaluate import evaluate_captions
from clipcap.generate import GenerationOptions
from clipcap.methods.retrieval import make_random_clip, ranks, recall_table
from clipcap.tools.report import (
    evaluation_page,
    photo_ids,
    predict,
    read_evaluation,
    read_predictions,
    render_captions,
    write_coco,
    write_evaluation,
)

java = pytest.mark.skipif(
    not shutil.which('java'), reason='METEOR and the official tokenizer run on Java'
)
flickr8k = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data' / 'flickr8k'


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp('report') / 'drawn', 60)


@pytest.fixture(scope='module')
def people(drawn, tmp_path_factory):
    "The first caption of each test photo, as a predictions file"
    references = read_evaluation(drawn).references
    rows = [dict(image_id=name, caption=captions[0]) for name, captions in references.items()]
    file = tmp_path_factory.mktemp('report') / 'people.json'
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def broken(drawn, tmp_path):
    "The drawn data set, but the first test photo is truncated: the folder and that photo's name"
    folder = Path(shutil.copytree(drawn, tmp_path / 'broken'))
    name = next(iter(read_evaluation(folder).references))
    photo = folder / 'images' / name
    photo.write_bytes(photo.read_bytes()[:900])
    return folder, name


def captions_file(folder, **photos):
    "A captions file in COCO's layout: file stem -> id, two captions each"
    names = {f'{stem}.jpg': identity for stem, identity in photos.items()}
    images = [dict(id=identity, file_name=name) for name, identity in names.items()]
    annotations = [
        dict(id=2 * number + k, image_id=identity, caption=f'{text} {name[0]}')
        for number, (name, identity) in enumerate(names.items())
        for k, text in enumerate(('a thing called', 'here is'))
    ]
    file = folder / 'captions.json'
    file.write_text(json.dumps(dict(images=images, annotations=annotations)))
    return file


# ---- from captions
@pytest.mark.parametrize('data', ['', 'results.csv'])
def test_scores_of_a_predictions_file(data, drawn, people, tmp_path):
    references = read_evaluation(drawn).references
    file = tmp_path / 'new' / 'scores.json'
    arguments = ['--predictions', people, '-o', tmp_path / 'out', '--json', file, '--no-meteor']
    said, complaints = clipcap('evaluate', drawn / data, *arguments)
    scores = json.loads(file.read_text())
    ours = evaluate_captions(references, {name: c[0] for name, c in references.items()})
    assert not complaints and 'evaluation.html' in said
    for metric in ('BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr', 'CIDEr-D'):
        assert scores[metric] == pytest.approx(ours[metric])
        ends = ours.table.loc[metric, ['low', 'high']].tolist()
        assert scores['intervals'][metric] == pytest.approx(ends)
    assert scores['METEOR'] is None
    assert scores['photos'] == 6
    assert scores['BLEU-4'] == pytest.approx(1)


def test_old_names_of_options(drawn, people, tmp_path):
    arguments = ['--predictions', people, '--output', tmp_path, '--no-meteor', '--bootstrap', 0]
    assert '6 photos of drawn' in clipcap('evaluate', '--data', drawn, *arguments)[0]
    assert '6 photos of drawn' in clipcap('evaluate', *arguments, f'--data={drawn}')[0]
    said = complaint('evaluate', '--data', drawn, *arguments, '--clip', 'nowhere/at-all')
    assert 'nowhere/at-all' in said


@java
def test_meteor_comes_along_where_there_is_java(drawn, people, tmp_path):
    file = tmp_path / 'scores.json'
    arguments = ['--predictions', people, '-o', tmp_path, '--json', file, '--bootstrap', 50]
    clipcap('evaluate', drawn, *arguments)
    scores = json.loads(file.read_text())
    assert 0.5 < scores['METEOR'] <= 1
    assert scores['intervals']['METEOR'][0] <= scores['METEOR']


def test_without_java_the_other_metrics_are_there(drawn, people, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    arguments = ['evaluate', drawn, '--predictions', people, '-o', tmp_path / 'out']
    said, [line] = clipcap(*arguments)
    assert 'METEOR' in line and 'Java' in line and 'CIDEr' in said
    said, [line] = clipcap(*arguments, '--meteor', code=1)  # what was asked for is missing
    assert 'METEOR is not available' in line and 'CIDEr' in said
    page = (tmp_path / 'out' / 'evaluation.html').read_text()
    assert 'METEOR needs Java' in page


@java
def test_official_tools_read_the_results_and_agree(drawn, people, tmp_path):
    from pycocoevalcap.eval import COCOEvalCap
    from pycocotools.coco import COCO

    class NoSpice:  # the real one downloads
        def method(self):
            return ''

        def compute_score(self, gts, res):
            return 0, [0] * len(gts)

    clipcap('evaluate', drawn, '--predictions', people, '-o', tmp_path, '--no-meteor')
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr('pycocoevalcap.eval.Spice', NoSpice)
        coco = COCO(tmp_path / 'references.json')
        official = COCOEvalCap(coco, coco.loadRes(str(tmp_path / 'results.json')))
        official.evaluate()
    scores = json.loads((tmp_path / 'scores.json').read_text())
    names = dict(Bleu_1='BLEU-1', Bleu_4='BLEU-4', ROUGE_L='ROUGE-L', CIDEr='CIDEr')
    for theirs, ours in names.items():
        assert official.eval[theirs] == pytest.approx(scores[ours])


# ---- which photo a row of a predictions file means
def read_keys(keys, ids, tmp_path, key='image_id', **how):
    "A predictions file whose captions repeat the keys: photo -> key"
    file = tmp_path / 'predictions.json'
    file.write_text(json.dumps([{key: k, 'caption': str(k)} for k in keys]))
    return read_predictions(file, ids, **how)


from_one = {f'{number}.jpg': number + 1 for number in range(5)}


def test_ids_are_not_taken_for_names(tmp_path):
    "Photos 0.jpg to 4.jpg have the ids 1 to 5"
    found = read_keys([1, 2, 3, 4, 5], from_one, tmp_path)
    assert found == {f'{number}.jpg': str(number + 1) for number in range(5)}
    found = read_keys([0, 1, 2, 3, 4], from_one, tmp_path)
    assert found == {f'{number}.jpg': str(number) for number in range(5)}
    # one photo of a split: 7 is the id of 12.jpg, and a stem; other rows tell which is meant
    ids = {'7.jpg': 3, '12.jpg': 7, '3.jpg': 20}
    assert read_keys([3, 7, 20], ids, tmp_path, wanted=['12.jpg']) == {'12.jpg': '7'}
    assert read_keys([3, 7, 12], ids, tmp_path, wanted=['7.jpg']) == {'7.jpg': '7'}


def test_ids_and_names_through_the_command(tmp_path):
    data = captions_file(tmp_path, a=3, b=7, c=20)
    rows = [
        dict(image_id=i, caption=f'here is {name}') for i, name in ((7, 'b'), (20, 'c'), (3, 'a'))
    ]
    (tmp_path / 'said.json').write_text(json.dumps(rows))
    arguments = ['--predictions', tmp_path / 'said.json', '-o', tmp_path / 'out', '--no-meteor']
    clipcap('evaluate', data, *arguments)
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results == [
        dict(image_id=i, caption=f'here is {name}', file_name=f'{name}.jpg')
        for i, name in ((3, 'a'), (7, 'b'), (20, 'c'))
    ]


def test_what_could_mean_two_photos_is_refused_or_said(tmp_path):
    swapped = {'1.jpg': 2, '2.jpg': 1}
    with pytest.raises(ClipcapError, match='could be identified by id or by name without suffix'):
        read_keys(['1', '2'], swapped, tmp_path)
    with pytest.warns(UserWarning, match="taken for the data set's id"):  # as COCO's format says
        assert read_keys([1, 2], swapped, tmp_path) == {'1.jpg': '2', '2.jpg': '1'}
    file = tmp_path / 'both.json'
    rows = [dict(image_id=k, file_name=f'{k}.jpg', caption='x') for k in (1, 2)]
    file.write_text(json.dumps(rows))
    with pytest.raises(ClipcapError, match='image_id 1 means 2.jpg, and 1.jpg 1.jpg'):
        read_predictions(file, swapped)
    assert read_predictions(file, {'1.jpg': 1, '2.jpg': 2}) == {'1.jpg': 'x', '2.jpg': 'x'}
    assert read_predictions(file, {'1.jpg': 77, '2.jpg': 78}) == {'1.jpg': 'x', '2.jpg': 'x'}


def test_a_last_part_that_two_photos_share_names_neither(tmp_path):
    ids = {name: name for name in ('a/1.jpg', 'b/1.jpg')}
    with pytest.raises(ClipcapError, match='no caption for'):
        read_keys(['1.jpg', '2.jpg'], ids, tmp_path)
    assert read_keys(['b/1.jpg', 'a/1.jpg'], ids, tmp_path)['a/1.jpg'] == 'a/1.jpg'
    assert read_keys(['x/b/1.jpg', 'x\\a\\1.jpg'], ids, tmp_path)['a/1.jpg'] == 'x\\a\\1.jpg'


@pytest.mark.parametrize('key', ['image', 'file_name', 'image_id'])
def test_paths_names_and_stems(key, tmp_path, monkeypatch):
    ids = {'été.jpg': 'été.jpg', 'b.v2.png': 'b.v2.png'}
    (tmp_path / 'images').mkdir()
    monkeypatch.chdir(tmp_path)
    for keys in (
        ['été.jpg', 'b.v2.png'],
        ['été', 'b.v2'],
        ['e\u0301te\u0301.jpg', 'b.v2.png'],
        ['images/été.jpg', './images/b.v2.png'],
        [str(tmp_path / 'images' / 'été.jpg'), str(tmp_path / 'images' / 'b.v2.png')],
        ['elsewhere/été.jpg', 'elsewhere/b.v2.png'],
    ):
        found = read_keys(keys, ids, tmp_path, key, folder=tmp_path / 'images')
        assert found == dict(zip(ids, keys, strict=True))


def test_names_with_and_without_dots(tmp_path):
    ids = {name: name for name in ('plain', 'a.jpg', 'a.b.jpg')}
    found = read_keys(['plain', 'a', 'a.b'], ids, tmp_path)
    assert found == {'plain': 'plain', 'a.jpg': 'a', 'a.b.jpg': 'a.b'}
    with pytest.raises(ClipcapError, match='no caption for plain'):
        read_keys(['other', 'a', 'a.b'], ids, tmp_path)


def test_captions_as_the_command_writes_them(tmp_path):
    ids = {'a.jpg': 'a.jpg', 'b.jpg': 'b.jpg'}
    candidates = [dict(caption='a dog', score=-0.5), dict(caption='a cat', score=-0.7)]
    rows = [dict(image=f'x/{k}', caption='a dog', score=-0.5, candidates=candidates) for k in ids]
    (tmp_path / 'c.json').write_text(json.dumps(rows))
    text = 'image,caption,score\nx/a.jpg,"a dog, red",-0.5\nx/a.jpg,a cat,-0.7\nx/b.jpg,a bird,-1\n'
    (tmp_path / 'c.csv').write_text(text)
    (tmp_path / 't.tsv').write_text('file_name\tcaption\na.jpg\t"stop" says it\nb.jpg\t" a dog\n')
    assert read_predictions(tmp_path / 'c.json', ids) == dict.fromkeys(ids, 'a dog')
    found = {'a.jpg': 'a dog, red', 'b.jpg': 'a bird'}
    assert read_predictions(tmp_path / 'c.csv', ids) == found
    found = {'a.jpg': '"stop" says it', 'b.jpg': '" a dog'}
    assert read_predictions(tmp_path / 't.tsv', ids) == found


def test_numbers_of_karpathy(tmp_path):
    def image(name, number, split, caption):
        names = dict(filename=name, filepath='val2014', cocoid=number)
        return names | dict(split=split, sentences=[dict(raw=caption)])

    images = [image('a.jpg', 77, 'test', 'A dog.'), image('b.jpg', 78, 'train', 'A cat.')]
    file = tmp_path / 'dataset.json'
    file.write_text(json.dumps(dict(images=images)))
    data = read_evaluation(file)
    assert data.references == {'val2014/a.jpg': ['A dog.']}
    assert data.training == ['A cat.']
    assert data.ids == {'val2014/a.jpg': 77, 'val2014/b.jpg': 78}


@pytest.mark.parametrize(
    'text',
    ['{"images": ["a.jpg"]}', '[]', '{}', '{"images": {}}', '[' * 100_000, 'null', '{"images"'],
)
def test_other_json_in_the_folder_has_no_ids(text, tmp_path):
    (tmp_path / 'config.json').write_text(text)
    assert photo_ids(tmp_path, ['a.jpg']) == {'a.jpg': 'a.jpg'}


# ---- splits
def test_splits_beside_a_table(tmp_path):
    table = tmp_path / 't.tsv'
    table.write_text('image\tcaption\na.jpg\tone\nb.jpg\ttwo\nc.jpg\tthree\n')
    assert list(read_evaluation(table, 'val').references) == ['a.jpg', 'b.jpg', 'c.jpg']
    (tmp_path / 'splits.csv').write_text('image_name,split\na.jpg,train\nb.jpg,dev\n')
    for split in ('val', 'dev', 'Validation'):
        data = read_evaluation(table, split)
        assert (data.references, data.folder, data.training) == ({'b.jpg': ['two']}, None, ['one'])
    assert list(read_evaluation(table, 'train').references) == ['a.jpg']
    assert list(read_evaluation(table, 'all').references) == ['a.jpg', 'b.jpg', 'c.jpg']
    assert read_evaluation(tmp_path, 'val').references == {'b.jpg': ['two']}  # without photos
    with pytest.raises(ClipcapError, match=r"'test'.*train \(1 photos\), val"):
        read_evaluation(table)
    with pytest.raises(ClipcapError, match='holdout'):
        read_evaluation(table, 'holdout')


# ---- what is wrong
def test_one_line_for_what_is_wrong(drawn, people, tmp_path):
    how = ['-o', tmp_path / 'out', '--no-meteor']
    assert 'holdout' in complaint('evaluate', drawn, '--split', 'holdout', *how)
    assert 'photos' in complaint('evaluate', drawn / 'results.csv', *how)
    assert 'nothing' in complaint('evaluate', tmp_path / 'nothing', *how)
    predictions = ['--predictions', tmp_path / 'no.json']
    assert 'no.json' in complaint('evaluate', drawn, *predictions, *how)
    clip = ['--predictions', people, '--clip-model', 'nowhere/at-all']
    assert 'nowhere/at-all' in complaint('evaluate', drawn, *clip, *how)
    clipcap('evaluate', drawn, '--predictions', people, '--model', 'tiny', code=2)
    clipcap('evaluate', drawn, '--predictions', people, '--beams', 5, code=2)
    clipcap('evaluate', code=2)
    clipcap('evaluate', drawn, '--beams', 0, code=2)
    clipcap('evaluate', drawn, '--bootstrap', -1, code=2)
    said, lines = clipcap('evaluate', drawn, '--render', drawn / 'images', *how, code=2)
    assert '--render' in lines[-1]
    said, lines = clipcap('evaluate', drawn, '-o', drawn, '--no-meteor', code=2)
    assert '--output' in lines[-1]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'change, why',
    [
        (lambda rows: rows[1:], 'no caption for'),
        (lambda rows: {}, 'result format'),
        (lambda rows: [dict(image_id=1)], 'result format'),
        (lambda rows: ['a.jpg'], 'result format'),
        (lambda rows: [], 'no captions'),
        (lambda rows: [dict(caption='x')], 'names no photo'),
        (lambda rows: [*rows, rows[0]], 'two captions'),
        (lambda rows: [dict(image_id='x', caption='y')], 'no caption for any'),
        (lambda rows: [dict(rows[0], caption=3), *rows[1:]], 'must be a text'),
        (lambda rows: [dict(rows[0], caption=None), *rows[1:]], 'must be a text'),
    ],
)
def test_odd_predictions(change, why, drawn, people, tmp_path):
    file = tmp_path / 'bad.json'
    file.write_text(json.dumps(change(json.loads(people.read_text()))))
    arguments = ['--predictions', file, '-o', tmp_path / 'out', '--no-meteor']
    line = complaint('evaluate', drawn, *arguments)
    assert why in line and 'bad.json' in line


@pytest.mark.parametrize(
    'name, data, why',
    [
        ('p.json', b'not json', 'not JSON'),
        ('p.json', b'[' * 100_000, 'not JSON'),
        ('p.json', b'\xff\xfe', 'UTF-8'),
        ('p.csv', b'image,caption\n\xff,x\n', 'UTF-8'),
        ('p.csv', b'photo,words\na.jpg,x\n', 'line 2'),
        ('p.csv', b'', 'no captions'),
        ('p.csv', b'image,caption\na.jpg,"' + b'x' * 200_000, 'line'),
    ],
)
def test_unreadable_predictions(name, data, why, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ClipcapError, match=why):
        read_predictions(tmp_path / name, {'a.jpg': 'a.jpg'})


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='pipes with a name')
def test_pipes_are_refused(tmp_path):
    "In a process of its own, for it would wait for ever"
    code = """
import sys
from clipcap.base.files import refusal
from clipcap.tools.report import read_evaluation, read_predictions
for pipe in sys.argv[1:]:
    print(refusal(read_evaluation, pipe))
    print(refusal(read_predictions, pipe, {'a.jpg': 'a.jpg'}))
"""
    pipes = [tmp_path / name for name in ('pipe', 'pipe.csv', 'pipe.json')]
    for pipe in pipes:
        os.mkfifo(pipe)
    command = [sys.executable, '-c', code, *pipes]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert len(run.stdout.splitlines()) == 6


@pytest.mark.skipif(sys.platform != 'linux', reason='names that are not UTF-8')
def test_odd_names_of_folders(drawn, people, tmp_path):
    folder = Path(shutil.copytree(drawn, os.fsdecode(os.fsencode(tmp_path) + b'/a\nb\xff')))
    predictions = Path(shutil.copy(people, folder / 'p\n\udcff.json'))
    arguments = ['--predictions', predictions, '-o', tmp_path / 'out', '--no-meteor']
    said, lines = clipcap('evaluate', folder, *arguments)
    assert r'p\n\xff: 6 photos of a\nb\xff' in said and not lines


def test_output_places_are_tried_first(drawn, people, tmp_path):
    (tmp_path / 'file').write_text('')
    for option in ('--output', '--json', '--render'):
        line = complaint('evaluate', drawn, option, tmp_path / 'file' / 'x', '--no-meteor')
        assert 'file' in line
    assert 'is a folder' in complaint('evaluate', drawn, '--json', tmp_path, '--no-meteor')


def test_one_evaluation_at_a_time_in_a_folder(drawn, people, tmp_path):
    ours = tmp_path / 'out'
    code = """
import sys
from clipcap.base.files import lock
with lock(sys.argv[1]):
    print(flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, '-c', code, ours], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        arguments = ['evaluate', drawn, '--predictions', people, '-o', ours, '--no-meteor']
        assert f'in use by process {other.pid}' in complaint(*arguments)
        other.stdin.close()
    clipcap(*arguments)
    with lock(ours):
        pass  # it has been given back


# ---- one bad photo
def test_a_truncated_photo_is_named_and_left_out(broken, tmp_path):
    folder, name = broken
    file = tmp_path / 's.json'
    how = ['--no-meteor', '--bootstrap', 20, '--device', 'cpu', '--json', file]
    arguments = ['-o', tmp_path / 'out', '--render', tmp_path / 'drawn', *how]
    said, lines = clipcap('evaluate', folder, *arguments, '--beams', 1, 2, code=1)
    assert sum(name in line for line in lines) == 1 and '1 of 6 photos' in lines[-1]
    assert '5 photos of broken' in said and 'paired' in said
    assert json.loads(file.read_text())['photos'] == 5
    rows = json.loads((tmp_path / 'out' / 'beams-2' / 'results.json').read_text())
    people = json.loads((tmp_path / 'out' / 'beams-2' / 'references.json').read_text())
    assert len(rows) == len(people['images']) == 5
    assert name not in {row['file_name'] for row in rows + people['images']}
    assert len(list((tmp_path / 'drawn' / 'beams-1').iterdir())) == 5


def test_no_photo_can_be_read(broken, tmp_path):
    folder, _ = broken
    for photo in (folder / 'images').iterdir():
        photo.write_bytes(b'no photo')
    line = complaint('evaluate', folder, '--no-meteor', '-o', tmp_path / 'out')
    assert 'images' in line


def test_captions_without_words(tmp_path):
    "References without words are named and left out; a prediction without words scores 0"
    (tmp_path / 'c.csv').write_text('image,caption\na.jpg,a dog\nb.jpg,...\nc.jpg,a cat\n')
    rows = [dict(image_id=name, caption='...') for name in ('a.jpg', 'b.jpg', 'c.jpg')]
    (tmp_path / 'p.json').write_text(json.dumps(rows))
    arguments = ['--predictions', tmp_path / 'p.json', '--no-meteor', '-o', tmp_path / 'out']
    said, lines = clipcap('evaluate', tmp_path / 'c.csv', *arguments, code=1)
    assert '2 photos of c.csv' in said
    assert 'b.jpg' in lines[0] and 'no words' in lines[0] and '1 of 3' in lines[-1]
    assert json.loads((tmp_path / 'out' / 'scores.json').read_text())['BLEU-1'] == 0


def test_predict_leaves_out_what_cannot_be_read(drawn):
    class Picky:
        def caption(self, images, options):
            for image in images:
                if image.stem.endswith('3'):
                    raise ClipcapError(f'{image}: no photo')
            return [image.stem for image in images]

    photos = {f'scene_{n:05}.jpg': drawn / 'images' / f'scene_{n:05}.jpg' for n in range(8)}
    skipped = {}
    found = predict(Picky(), photos, batch_size=3, skipped=skipped)
    assert list(skipped) == ['scene_00003.jpg'] and len(found) == 7
    with pytest.raises(ClipcapError, match='no photo'):
        predict(Picky(), photos, batch_size=3)
    only = {name: photo for name, photo in photos.items() if '3' in name}
    with pytest.raises(ClipcapError, match='no photo'):
        predict(Picky(), only, skipped={})


# ---- from models
def test_a_picture_that_cannot_be_drawn_changes_no_score(drawn, tmp_path):
    name = next(iter(read_evaluation(drawn).references))
    (tmp_path / 'pictures' / 'beams-1' / name).mkdir(parents=True)  # something lies in the way
    where = ['-o', tmp_path / 'out', '--render', tmp_path / 'pictures']
    how = ['--no-meteor', '--bootstrap', 10, '--device', 'cpu', '--beams', 1, 2]
    said, lines = clipcap('evaluate', drawn, *where, *how, code=1)
    assert said.count('6 photos of') == 2 and 'paired' in said
    assert name in lines[0] and '1 of 6' in lines[-1]


def test_a_model_with_two_beam_sizes(drawn, tmp_path):
    file = tmp_path / 's.json'
    where = ['--output', tmp_path / 'out', '--json', file, '--render', tmp_path / 'drawn']
    how = ['--no-meteor', '--bootstrap', 100, '--device', 'cpu', '--beams', 1, 5]
    said, lines = clipcap('evaluate', drawn, '--model', 'tiny', '--split', 'val', *how, *where)
    scores = json.loads(file.read_text())
    assert not lines and 'paired' in said
    assert list(scores['runs']) == ['tiny, beams 1', 'tiny, beams 5']
    assert scores['BLEU-1'] == scores['runs']['tiny, beams 5']['BLEU-1']
    for part in ('beams-1', 'beams-5'):
        rows = json.loads((tmp_path / 'out' / part / 'results.json').read_text())
        photos = [drawn / 'images' / row['image_id'] for row in rows]
        how = ['--beams', part[-1], '--format', 'json', '--device', 'cpu']
        captions = json.loads(clipcap('caption', *photos, *how)[0])
        assert [row['caption'] for row in rows] == [row['caption'] for row in captions]
        names = sorted(path.name for path in (tmp_path / 'drawn' / part).iterdir())
        assert names == sorted(row['image_id'] for row in rows)
        columns = list(pd.read_csv(tmp_path / 'out' / part / 'photos.csv').columns)
        assert columns[0] == 'image' and columns[-2:] == ['CIDEr-D', 'caption']


def test_whatever_has_caption(drawn):
    class Echo:
        def caption(self, images, options):
            return [f'{Path(image).stem} {options.beams}' for image in images]

    names = [f'scene_{n:05}.jpg' for n in range(7)]
    photos = {name: drawn / 'images' / name for name in names}
    found = predict(Echo(), photos, GenerationOptions(beams=2), batch_size=3)
    assert found == {name: f'{name[:-4]} 2' for name in names}


# ---- the page and the pictures
class Tags(HTMLParser):
    "The tags of a page, with their attributes"

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_is_whole_and_harmless(drawn):
    data = read_evaluation(drawn)
    names = list(data.references)
    references = data.references | {names[0]: ['<script>alert(1)</script>', '"quoted" & more']}
    captions = dict.fromkeys(names, 'a red ball')
    captions |= {names[0]: '<img src=x onerror=alert(1)>', names[1]: ''}
    scores = evaluate_captions(references, captions, bootstrap=10)
    page = evaluation_page(scores, references, captions, data.photos, 'A <title>', 2)
    tags = Tags(page).found
    pictures = [attrs['src'] for tag, attrs in tags if tag == 'img']
    assert len(pictures) == 6
    assert not {'script', 'link'} & {tag for tag, _ in tags}
    for source in pictures:
        kind, data = source.split(',')
        assert kind == 'data:image/jpeg;base64'
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 128)


def test_a_page_with_a_truncated_photo(broken, tmp_path):
    folder, name = broken
    data = read_evaluation(folder)
    captions = {photo: some[0] for photo, some in data.references.items()}
    scores = evaluate_captions(data.references, captions, bootstrap=10)
    write_evaluation(tmp_path, scores, data.references, captions, data.ids, data.photos)
    page = (tmp_path / 'evaluation.html').read_text()
    assert page.count('<img') > 0 and 'truncated' in page


def test_rendered_captions_never_share_a_name(drawn, tmp_path):
    photo = drawn / 'images' / 'scene_00000.jpg'
    names = ['a.png', 'a.jpg', 'A.JPG', 'a.jpg.png', 'é.png', 'e\u0301.png']
    render_captions(tmp_path / 'new', dict.fromkeys(names, photo), dict.fromkeys(names, 'x'))
    made = [path.name.casefold() for path in (tmp_path / 'new').iterdir()]
    assert len(set(made)) == len(names)


def test_a_picture_that_cannot_be_written_ends_nothing(drawn, tmp_path):
    photo = drawn / 'images' / 'scene_00000.jpg'
    long = 'x' * 300 + '.png'
    photos = {'x' * 250 + '.jpg': photo, long: photo, 'b.jpg': photo}
    skipped = {}
    render_captions(tmp_path, photos, dict.fromkeys(photos, 'a dog'), skipped=skipped)
    assert list(skipped) == [long]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ClipcapError):
        render_captions(tmp_path, {'b.jpg': tmp_path / 'nothing'}, {'b.jpg': 'a dog'})


# ---- retrieval
def test_ranks_against_a_loop():
    rng = np.random.default_rng(0)
    agreement = rng.integers(0, 9, (12, 40)) / 9
    photo_of = np.r_[np.arange(12), rng.integers(0, 12, 28)]
    of_photos, of_captions = ranks(agreement, photo_of)
    for caption, photo in enumerate(photo_of):
        others = [other for other in range(12) if other != photo]
        better = sum(agreement[other, caption] >= agreement[photo, caption] for other in others)
        assert of_captions[caption] == 1 + better
    for photo in range(12):
        best = max(agreement[photo, c] for c in range(40) if photo_of[c] == photo)
        others = [c for c in range(40) if photo_of[c] != photo]
        assert of_photos[photo] == 1 + sum(agreement[photo, c] >= best for c in others)
    table = recall_table(np.eye(20), range(20))
    assert (table[['recall@1', 'recall@5', 'recall@10']] == 1).all(axis=None)
    assert (table['median rank'] == 1).all()


@pytest.fixture(scope='module')
def clip(drawn, tmp_path_factory):
    "A CLIP of random weights"
    references = read_evaluation(drawn).references
    captions = [caption for some in references.values() for caption in some]
    folder = tmp_path_factory.mktemp('clip')
    make_random_clip(folder, captions)
    return folder


def test_two_towers_join_in(drawn, people, clip, tmp_path):
    file = tmp_path / 's.json'
    how = ['--no-meteor', '--bootstrap', 50, '--device', 'cpu', '-o', tmp_path, '--json', file]
    arguments = ['--predictions', people, '--clip-model', clip, *how]
    said, complaints = clipcap('evaluate', drawn, *arguments)
    scores = json.loads(file.read_text())
    assert not complaints
    assert 0 <= scores['CLIPScore'] <= 2.5
    assert scores['recall@1'] <= scores['recall@5'] <= scores['recall@10'] == 1  # six photos
    for metric in ('CLIPScore', 'RefCLIPScore', 'recall@1'):
        assert metric in said and len(scores['intervals'][metric]) == 2
    assert 'photos' in complaint('evaluate', drawn / 'results.csv', *arguments)


def test_two_towers_leave_out_a_truncated_photo(broken, people, clip, tmp_path):
    folder, name = broken
    how = ['--no-meteor', '--bootstrap', 50, '--device', 'cpu', '-o', tmp_path]
    for captions in (['--predictions', people], ['--model', 'tiny', '--beams', 1]):
        arguments = ['evaluate', folder, *captions, '--clip-model', clip, *how]
        said, lines = clipcap(*arguments, code=1)
        assert '5 photos of broken' in said and 'CLIPScore' in said
        assert name in lines[0] and '1 of 6' in lines[-1]


# ---- real photos
@pytest.mark.slow
@pytest.mark.skipif(not flickr8k.is_dir(), reason=f'needs {flickr8k}')
def test_people_against_people_on_flickr8k(tmp_path):
    "One caption of each dev photo against the other four, through files and the command"
    references = read_evaluation(flickr8k, 'val').references
    first = {name: captions[0] for name, captions in references.items()}
    write_coco(tmp_path, references, first, {name: name for name in references})
    rest = [(name, text) for name, captions in references.items() for text in captions[1:]]
    pd.DataFrame(rest, columns=['image', 'caption']).to_csv(tmp_path / 'rest.csv', index=False)
    file = tmp_path / 's.json'
    where = ['--predictions', tmp_path / 'results.json', '-o', tmp_path / 'out', '--json', file]
    clipcap('evaluate', tmp_path / 'rest.csv', '--no-meteor', *where)
    scores = json.loads(file.read_text())
    assert 0.6 < scores['BLEU-1'] < 0.7
    assert 0.75 < scores['CIDEr'] < 0.95
