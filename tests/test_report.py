"Captions of models and of files, scored; what is left behind is what official tools and browsers read"

import base64
import contextlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import clipcap, complaint
from PIL import Image

from clipcap.base.files import ClipcapError
from clipcap.base.scenes import draw_dataset
from clipcap.evaluate import evaluate_captions
from clipcap.generate import GenerationOptions
from clipcap.methods.retrieval import ranks, recall_table
from clipcap.tools.report import (
    evaluation_page,
    photo_ids,
    predict,
    read_predictions,
    read_references,
    write_coco,
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
    file = tmp_path_factory.mktemp('report') / 'people.json'
    file.write_text(
        json.dumps(
            [
                dict(image_id=name, caption=captions[0])
                for name, captions in read_references(drawn)[0].items()
            ]
        )
    )
    return file


# ---- from captions
def test_scores_of_a_predictions_file(drawn, people, tmp_path):
    references = read_references(drawn)[0]
    for data in drawn, drawn / 'results.csv':
        said, complaints = clipcap(
            'evaluate',
            '--data',
            data,
            '--predictions',
            people,
            '--output',
            tmp_path / 'out',
            '--json',
            tmp_path / 'new' / 'scores.json',
            '--no-meteor',
        )
        told, ours = (
            json.loads((tmp_path / 'new' / 'scores.json').read_text()),
            evaluate_captions(references, {name: c[0] for name, c in references.items()}),
        )
        assert not complaints and 'evaluation.html' in said
        for metric in 'BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr', 'CIDEr-D':
            assert told[metric] == pytest.approx(ours[metric]) and told['intervals'][
                metric
            ] == pytest.approx(ours.table.loc[metric, ['low', 'high']].tolist())
        assert told['METEOR'] is None and told['photos'] == 6 and told['BLEU-4'] == pytest.approx(1)


@java
def test_meteor_comes_along_where_there_is_java(drawn, people, tmp_path):
    clipcap(
        'evaluate',
        '--data',
        drawn,
        '--predictions',
        people,
        '--output',
        tmp_path,
        '--json',
        tmp_path / 'scores.json',
        '--bootstrap',
        50,
    )
    told = json.loads((tmp_path / 'scores.json').read_text())
    assert 0.5 < told['METEOR'] <= 1 and told['intervals']['METEOR'][0] <= told['METEOR']


def test_without_java(drawn, people, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.which', lambda name: None)
    said, [line] = clipcap(
        'evaluate', '--data', drawn, '--predictions', people, '--output', tmp_path
    )
    assert 'METEOR' in line and 'Java' in line and 'CIDEr' in said
    assert 'Java' in complaint(
        'evaluate', '--data', drawn, '--predictions', people, '--output', tmp_path, '--meteor'
    )


@java
def test_official_tools_read_the_results_and_agree(drawn, people, tmp_path):
    from pycocoevalcap.eval import COCOEvalCap
    from pycocotools.coco import COCO

    clipcap(
        'evaluate', '--data', drawn, '--predictions', people, '--output', tmp_path, '--no-meteor'
    )
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            'pycocoevalcap.eval.Spice',
            type(
                'NoSpice',
                (),
                dict(
                    method=lambda self: '', compute_score=lambda self, gts, res: (0, [0] * len(gts))
                ),
            ),
        )  # it downloads
        coco = COCO(tmp_path / 'references.json')
        official = COCOEvalCap(coco, coco.loadRes(str(tmp_path / 'results.json')))
        official.evaluate()
    told = json.loads((tmp_path / 'scores.json').read_text())
    for theirs, ours in dict(
        Bleu_1='BLEU-1', Bleu_4='BLEU-4', ROUGE_L='ROUGE-L', CIDEr='CIDEr'
    ).items():
        assert official.eval[theirs] == pytest.approx(told[ours])


def test_numbers_of_coco_and_names_of_others(tmp_path):
    coco = dict(
        images=[dict(id=n, file_name=f'val_{n:03}.jpg') for n in (3, 5)],
        annotations=[
            dict(image_id=n, id=10 * n + k, caption=f'a {word} dog')
            for n in (3, 5)
            for k, word in enumerate(('red', 'big'))
        ],
    )
    (tmp_path / 'captions.json').write_text(json.dumps(coco))
    (tmp_path / 'said.json').write_text(
        json.dumps([dict(image_id=5, caption='a big dog'), dict(image_id=3, caption='a red cat')])
    )
    clipcap(
        'evaluate',
        '--data',
        tmp_path / 'captions.json',
        '--predictions',
        tmp_path / 'said.json',
        '--output',
        tmp_path / 'out',
        '--no-meteor',
    )
    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == [
        dict(image_id=3, caption='a red cat', file_name='val_003.jpg'),
        dict(image_id=5, caption='a big dog', file_name='val_005.jpg'),
    ]
    karpathy = dict(
        images=[
            dict(
                filename='a.jpg',
                filepath='val2014',
                cocoid=77,
                split='test',
                sentences=[dict(raw='A dog.')],
            ),
            dict(
                filename='b.jpg',
                filepath='val2014',
                cocoid=78,
                split='train',
                sentences=[dict(raw='A cat.')],
            ),
        ]
    )
    (tmp_path / 'dataset.json').write_text(json.dumps(karpathy))
    references, _, training = read_references(tmp_path / 'dataset.json')
    assert (
        references == {'val2014/a.jpg': ['A dog.']}
        and training == ['A cat.']
        and photo_ids(tmp_path / 'dataset.json', list(references)) == {'val2014/a.jpg': 77}
    )


def test_splits_beside_a_table(tmp_path):
    (tmp_path / 't.tsv').write_text('image\tcaption\na.jpg\tone\nb.jpg\ttwo\nc.jpg\tthree\n')
    assert list(read_references(tmp_path / 't.tsv', 'val')[0]) == ['a.jpg', 'b.jpg', 'c.jpg']
    (tmp_path / 'splits.csv').write_text('image_name,split\na.jpg,train\nb.jpg,dev\n')
    assert (
        read_references(tmp_path / 't.tsv', 'val')
        == ({'b.jpg': ['two']}, None, ['one'])
        == read_references(tmp_path / 't.tsv', 'dev')
        and 'c.jpg' not in read_references(tmp_path / 't.tsv', 'train')[0]
    )
    assert read_references(tmp_path, 'val')[0] == {'b.jpg': ['two']}  # a folder without photos
    with pytest.raises(ClipcapError, match=r"'test'.*train \(1 photos\), val"):
        read_references(tmp_path / 't.tsv')


def test_one_line_for_what_is_wrong(drawn, people, tmp_path):
    how = ['--output', tmp_path, '--no-meteor']
    assert 'holdout' in complaint(
        'evaluate', '--data', drawn, '--split', 'holdout', *how
    ) and 'photos' in complaint('evaluate', '--data', drawn / 'results.csv', *how)
    assert 'nothing' in complaint(
        'evaluate', '--data', tmp_path / 'nothing', *how
    ) and 'no.json' in complaint(
        'evaluate', '--data', drawn, '--predictions', tmp_path / 'no.json', *how
    )
    rows = json.loads(people.read_text())
    for wrong, why in [
        (rows[1:], 'no caption for'),
        ({}, 'result format'),
        ([dict(image_id=1)], 'result format'),
        (rows + rows[:1], 'two captions'),
        ([dict(image_id='x', caption='y')], 'no caption for any'),
        ([dict(rows[0], caption=3), *rows[1:]], 'as text'),
    ]:
        (tmp_path / 'bad.json').write_text(json.dumps(wrong))
        assert why in complaint(
            'evaluate', '--data', drawn, '--predictions', tmp_path / 'bad.json', *how
        )
    (tmp_path / 'bad.json').write_text('not json')
    assert 'result format' in complaint(
        'evaluate', '--data', drawn, '--predictions', tmp_path / 'bad.json', *how
    )
    assert 'nowhere/at-all' in complaint(
        'evaluate', '--data', drawn, '--predictions', people, '--clip', 'nowhere/at-all', *how
    )
    clipcap('evaluate', '--data', drawn, '--predictions', people, '--model', 'tiny', code=2)
    clipcap('evaluate', code=2)
    clipcap('evaluate', '--data', drawn, '--beams', 0, code=2)
    assert [p.name for p in tmp_path.iterdir()] == ['bad.json']


# ---- from models
def test_a_model_with_two_widths(drawn, tmp_path):
    said, complaints = clipcap(
        'evaluate',
        '--model',
        'tiny',
        '--data',
        drawn,
        '--split',
        'val',
        '--beams',
        1,
        5,
        '--output',
        tmp_path / 'out',
        '--json',
        tmp_path / 's.json',
        '--render',
        tmp_path / 'drawn',
        '--no-meteor',
        '--bootstrap',
        100,
        '--device',
        'cpu',
    )
    told = json.loads((tmp_path / 's.json').read_text())
    assert (
        not complaints
        and 'paired' in said
        and list(told['runs']) == ['tiny, beams 1', 'tiny, beams 5']
        and told['BLEU-1'] == told['runs']['tiny, beams 5']['BLEU-1']
    )
    for part in 'beams-1', 'beams-5':
        rows = json.loads((tmp_path / 'out' / part / 'results.json').read_text())
        captions = clipcap(
            'caption',
            *[drawn / 'images' / row['image_id'] for row in rows],
            '--beams',
            part[-1],
            '--format',
            'json',
            '--device',
            'cpu',
        )[0]
        assert [row['caption'] for row in rows] == [row['caption'] for row in json.loads(captions)]
        assert sorted(p.name for p in (tmp_path / 'drawn' / part).iterdir()) == sorted(
            row['image_id'] for row in rows
        )
        assert (
            list(pd.read_csv(tmp_path / 'out' / part / 'photos.csv').columns)
            == "image BLEU-1 BLEU-2 BLEU-3 BLEU-4 ROUGE-L CIDEr CIDEr-D caption".split()
        )


def test_whatever_has_caption(drawn):
    class Echo:
        def caption(self, images, options):
            return [f'{Path(image).stem} {options.beams}' for image in images]

    names = [f'scene_{n:05}.jpg' for n in range(7)]
    assert predict(
        Echo(), {n: drawn / 'images' / n for n in names}, GenerationOptions(beams=2), batch_size=3
    ) == {n: f'{n[:-4]} 2' for n in names}


# ---- the page
def test_the_page_is_whole_and_harmless(drawn):
    references, root, _ = read_references(drawn)
    names = list(references)
    references = references | {names[0]: ['<script>alert(1)</script>', '"quoted" & more']}
    said = dict.fromkeys(names, 'a red ball') | {
        names[0]: '<img src=x onerror=alert(1)>',
        names[1]: '',
    }
    page = evaluation_page(
        evaluate_captions(references, said, bootstrap=10),
        references,
        said,
        {n: root / n for n in names},
        'A <title>',
        2,
    )
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(page)
    pictures = [attrs['src'] for tag, attrs in tags if tag == 'img']
    assert (
        len(pictures) == 6
        and all(src.startswith('data:image/jpeg;base64,') for src in pictures)
        and not {'script', 'link'} & {tag for tag, _ in tags}
    )
    for src in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(src.split(',')[1]))).size == (128, 128)


# ---- retrieval
def test_ranks_against_a_loop():
    rng = np.random.default_rng(0)
    agreement, photo_of = (
        rng.integers(0, 9, (12, 40)) / 9,
        np.r_[np.arange(12), rng.integers(0, 12, 28)],
    )
    of_photos, of_captions = ranks(agreement, photo_of)
    for caption, photo in enumerate(photo_of):
        assert of_captions[caption] == 1 + sum(
            agreement[other, caption] >= agreement[photo, caption]
            for other in range(12)
            if other != photo
        )
    for photo in range(12):
        best = max(agreement[photo, c] for c in range(40) if photo_of[c] == photo)
        assert of_photos[photo] == 1 + sum(
            agreement[photo, c] >= best for c in range(40) if photo_of[c] != photo
        )
    table = recall_table(np.eye(20), range(20))
    assert (table[['recall@1', 'recall@5', 'recall@10']] == 1).all(axis=None) and (
        table['median rank'] == 1
    ).all()


@pytest.fixture(scope='module')
def clip(drawn, tmp_path_factory):
    "A CLIP of random weights"
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder, words, small = (
        tmp_path_factory.mktemp('clip'),
        Tokenizer(models.WordLevel(unk_token='?')),
        dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        [c for some in read_references(drawn)[0].values() for c in some],
        trainers.WordLevelTrainer(special_tokens=['?', '<end>'], show_progress=False),
    )
    words.post_processor = processors.TemplateProcessing(
        single='$A <end>', special_tokens=[('<end>', 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token='<end>', pad_token='<end>'
    ).save_pretrained(folder)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=small
            | dict(
                vocab_size=words.get_vocab_size(),
                max_position_embeddings=9,
                eos_token_id=1,
                bos_token_id=1,
                pad_token_id=1,
            ),
            vision_config=small | dict(image_size=16, patch_size=8),
            projection_dim=8,
        )
    ).save_pretrained(folder)
    CLIPImageProcessor(
        size=dict(shortest_edge=16), crop_size=dict(height=16, width=16)
    ).save_pretrained(folder)
    return folder


def test_two_towers_join_in(drawn, people, clip, tmp_path):
    said, complaints = clipcap(
        'evaluate',
        '--data',
        drawn,
        '--predictions',
        people,
        '--clip',
        clip,
        '--output',
        tmp_path,
        '--json',
        tmp_path / 's.json',
        '--no-meteor',
        '--bootstrap',
        50,
        '--device',
        'cpu',
    )
    told = json.loads((tmp_path / 's.json').read_text())
    assert (
        not complaints
        and 0 <= told['CLIPScore'] <= 2.5
        and told['recall@1'] <= told['recall@5'] <= told['recall@10'] == 1
    )  # six photos
    assert all(
        metric in said and len(told['intervals'][metric]) == 2
        for metric in ('CLIPScore', 'RefCLIPScore', 'recall@1')
    )
    assert 'photos' in complaint(
        'evaluate',
        '--data',
        drawn / 'results.csv',
        '--predictions',
        people,
        '--clip',
        clip,
        '--output',
        tmp_path,
        '--no-meteor',
    )


# ---- real photos
@pytest.mark.slow
@pytest.mark.skipif(not flickr8k.is_dir(), reason=f'needs {flickr8k}')
def test_people_against_people_on_flickr8k(tmp_path):
    "One caption of each dev photo against the other four, through files and the command"
    references = read_references(flickr8k, 'val')[0]
    write_coco(
        tmp_path, references, {n: c[0] for n, c in references.items()}, {n: n for n in references}
    )
    rest = pd.DataFrame(
        [(n, c) for n, some in references.items() for c in some[1:]], columns=['image', 'caption']
    )
    rest.to_csv(tmp_path / 'rest.csv', index=False)
    clipcap(
        'evaluate',
        '--data',
        tmp_path / 'rest.csv',
        '--predictions',
        tmp_path / 'results.json',
        '--output',
        tmp_path / 'out',
        '--no-meteor',
        '--json',
        tmp_path / 's.json',
    )
    told = json.loads((tmp_path / 's.json').read_text())
    assert 0.6 < told['BLEU-1'] < 0.7 and 0.75 < told['CIDEr'] < 0.95
