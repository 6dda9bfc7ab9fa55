"The scores are pycocoevalcap's and survive odd input"

import os
import shutil
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from clipcap.base.captions import read_captions
from clipcap.base.files import ClipcapError
from clipcap.base.words import ptb_tokenize
from clipcap.evaluate import (
    Scores,
    add_metric,
    compare,
    evaluate_captions,
    measure_variety,
    metric_words,
)

java = pytest.mark.skipif(not shutil.which('java'), reason='METEOR runs on Java')


# ---- the scores
@pytest.fixture(scope='module')
def world():
    "Drawn captions: four references and one prediction a photo"
    five = (
        read_captions(Path(__file__).parent.parent / 'data' / 'sample' / 'results.csv')
        .groupby('image')
        .caption.agg(list)
    )
    return {p: c[:4] for p, c in five.items()}, {p: c[4] for p, c in five.items()}


def tokenized(references, predictions):
    "As pycocoevalcap's scorers take them"
    words = {photo: ptb_tokenize(some) for photo, some in references.items()}
    return words, {photo: ptb_tokenize([caption]) for photo, caption in predictions.items()}


def test_figures_are_pycocoevalcaps(world):
    references, predictions = world
    predictions = predictions | {
        min(predictions): '',
        max(predictions): "Isn't it",
    }  # silence, and nothing right
    scores = evaluate_captions(references, predictions, bootstrap=20)
    gts, res = tokenized(references, predictions)
    bleu, each = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouges = Rouge().compute_score(gts, res)
    cider, ciders = Cider().compute_score(gts, res)
    names = ['BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr', 'CIDEr-D']
    assert list(scores.table.index) == list(scores.photos) == list(scores.draws) == names
    np.testing.assert_allclose(scores.table.score, [*bleu, rouge, cider, cider], rtol=1e-9)
    np.testing.assert_allclose(
        scores.photos, np.stack([*each, rouges, ciders, ciders], 1), rtol=1e-9, atol=1e-12
    )


def test_a_draw_scores_the_photos_it_drew(world):
    "The product of matrices is what a loop over the drawn photos gives"
    references, predictions = world
    n = len(references)
    scores = evaluate_captions(references, predictions, bootstrap=3, seed=5)
    gts, res = (list(words.values()) for words in tokenized(references, predictions))
    drawn_times = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), 3)
    for draw, times in zip(scores.draws.itertuples(index=False), drawn_times, strict=True):
        drawn = np.repeat(np.arange(n), times)
        bleu, _ = Bleu(4).compute_score(
            {i: gts[j] for i, j in enumerate(drawn)},
            {i: res[j] for i, j in enumerate(drawn)},
            verbose=0,
        )
        means = scores.photos[['ROUGE-L', 'CIDEr', 'CIDEr-D']].to_numpy()[drawn].mean(0)
        np.testing.assert_allclose(draw, [*bleu, *means], rtol=1e-9)


def test_many_draws_of_many_photos_fit_into_memory():
    "All draws at once would take 160 MB, and as much again"
    photos, draws = 20_000, 1000
    table = pd.DataFrame(dict(score=[0.0], low=[0.0], high=[0.0]), index=['none'])
    scores = Scores(
        table,
        pd.DataFrame(dict(none=np.zeros(photos))),
        pd.DataFrame(dict(none=np.zeros(draws))),
        seed=0,
    )
    tracemalloc.start()
    odd = add_metric(scores, 'odd', np.arange(photos) % 2).draws['odd']
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert odd.mean() == pytest.approx(0.5, abs=1e-3)
    assert odd.std() == pytest.approx(0.5 / photos**0.5, rel=0.2)


def test_published_examples_of_bleu_and_rouge():
    # Papineni et al. 2002: 17 of 18 words and 10 of 17 pairs right, 8 of 14 and 1 of 13
    guide = [
        'It is a guide to action that ensures that the military will forever heed Party commands',
        'It is the guiding principle which guarantees the military forces always being under the '
        'command of the Party',
        'It is the practical guide for the army always to heed the directions of the party',
    ]
    candidates = dict(
        a='It is a guide to action which ensures that the military always obeys the commands of '
        'the party',
        b='It is to insure the troops forever hearing the activity guidebook that party direct',
    )
    photos = evaluate_captions(dict.fromkeys('ab', guide), candidates, bootstrap=0).photos
    penalty = np.exp(1 - 16 / 14)
    assert photos['BLEU-1'].a == pytest.approx(17 / 18)
    assert photos['BLEU-2'].a == pytest.approx((17 / 18 * 10 / 17) ** 0.5)
    assert photos['BLEU-1'].b == pytest.approx(8 / 14 * penalty)
    assert photos['BLEU-2'].b == pytest.approx((8 / 14 * 1 / 13) ** 0.5 * penalty)
    # Lin 2004: police kill the gunman 3/4, the gunman kill police 2/4
    lin = evaluate_captions(
        dict.fromkeys('ab', ['police killed the gunman']),
        dict(a='police kill the gunman', b='the gunman kill police'),
        bootstrap=0,
    )
    assert lin.photos['ROUGE-L'].tolist() == pytest.approx([0.75, 0.5])


def test_the_same_seed_gives_the_same_intervals_whatever_the_photos_are_called(world):
    references, predictions = world
    first, again, other = (evaluate_captions(references, predictions, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first.table, again.table)
    assert not first.draws.equals(other.draws) and np.allclose(
        first.table.low, other.table.low, rtol=0.1
    )
    numbered = dict(enumerate(references.values())), dict(enumerate(predictions.values()))
    assert np.array_equal(evaluate_captions(*numbered, seed=1).draws, first.draws)
    shuffled = dict(
        sorted(predictions.items(), key=lambda item: item[1])
    )  # the references' order counts
    pd.testing.assert_frame_equal(
        evaluate_captions(references, shuffled, seed=1).table, first.table
    )


def test_silent_and_small(world, capsys):
    assert evaluate_captions({'a': ['A dog.']}, {'a': 'a dog'})['BLEU-2'] == pytest.approx(1)
    evaluate_captions(*world, bootstrap=0)
    assert capsys.readouterr() == ('', '')


# ---- METEOR, which is another program
@java
def test_meteor_is_the_java_programs_own(world):
    references, predictions = world
    predictions = predictions | {min(predictions): ''}
    scores = evaluate_captions(references, predictions, bootstrap=50, meteor=True)
    overall, each = Meteor().compute_score(*tokenized(references, predictions))
    assert scores['METEOR'] == pytest.approx(overall) and np.allclose(scores.photos.METEOR, each)
    assert scores.table.low['METEOR'] < overall < scores.table.high['METEOR']
    assert scores.draws.METEOR.nunique() > 40


@java
def test_meteor_where_numbers_have_decimal_commas(world, monkeypatch):
    "As under LC_ALL=de_DE.UTF-8, which need not be installed here"
    first = evaluate_captions(*world, bootstrap=10, meteor=True)
    monkeypatch.setenv('JAVA_TOOL_OPTIONS', '-Duser.language=de -Duser.country=DE')
    again = evaluate_captions(*world, bootstrap=10, meteor=True)
    pd.testing.assert_frame_equal(first.table, again.table)


@pytest.mark.skipif(os.name == 'nt', reason='the stand-ins for Java are scripts of a shell')
@pytest.mark.parametrize(
    'script, why',
    [
        ('echo "no memory" >&2; exit 1', 'no memory'),
        ('exec sleep 100', 'no answer'),
        ('while read line; do echo 0,5; done', 'unexpected answer'),
        ('read line; echo 1 2 3; exit 0', 'ended early'),
        (None, 'needs Java'),
    ],
)
def test_a_meteor_that_fails_ends_nothing_else(world, tmp_path, monkeypatch, script, why):
    if script:
        (tmp_path / 'java').write_text(f'#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n')
        (tmp_path / 'java').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.warns(UserWarning, match=f'METEOR is not available.*{why}'):
        patience = 1 if 'sleep' in str(script) else 60
        scores = evaluate_captions(*world, bootstrap=10, meteor=True, patience=patience)
    assert why in scores.missing['METEOR'] and 'METEOR' not in scores.table.index
    pd.testing.assert_frame_equal(scores.table, evaluate_captions(*world, bootstrap=10).table)


# ---- what is not a number, and what is not a word
def test_nothing_but_finite_numbers_is_a_score(world):
    scores = evaluate_captions(*world, bootstrap=10)
    photo = scores.photos.index[3]
    for wrong in (np.nan, np.inf, -np.inf):
        values = np.ones(len(scores.photos))
        values[3] = wrong
        with pytest.raises(ClipcapError, match=f'^mine: {wrong} for photo {photo}:'):
            add_metric(scores, 'mine', values)
    scores.table.loc['CIDEr', 'score'] = np.nan
    with pytest.raises(ClipcapError, match='^CIDEr: nan for the overall score'):
        compare(scores, evaluate_captions(*world, bootstrap=10))
    with pytest.raises(ClipcapError, match='^CIDEr: nan'):
        Scores(scores.table, scores.photos, scores.draws, 0)
    with pytest.raises(ClipcapError, match='^bootstrap: -1'):
        evaluate_captions(*world, bootstrap=-1)


def test_captions_without_spaces_are_scored_by_signs():
    references = {'1.jpg': ['画面上有一个红色的气球。'], '2.jpg': ['画面上有两条白色的鱼。']}
    near = {'1.jpg': '画面上有一个蓝色的气球', '2.jpg': '画面上有两条黑色的鱼'}
    with pytest.warns(UserWarning, match='4 of 4 captions are written without spaces'):
        scores = evaluate_captions(references, near, bootstrap=0)
    assert scores['BLEU-1'] == pytest.approx(19 / 21)  # 11 and 10 signs, one of each is wrong
    assert metric_words(['一只狗。', "A dog's"]) == ['一 只 狗', "a dog 's"]
    variety = measure_variety(['一只狗', '一只猫'])
    assert (variety.vocabulary, variety.length) == (4, 3)


def test_english_captions_warn_of_nothing(world):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        evaluate_captions(*world, bootstrap=0)


def test_compare_needs_the_same_draws_of_the_same_photos(world):
    references, predictions = world
    ours = evaluate_captions(references, predictions)
    theirs = evaluate_captions(references, dict.fromkeys(predictions, 'a ball'))
    table = compare(ours, theirs)
    assert (table.low > 0).all() and (table.better == 1).all()
    assert np.allclose(table.difference, ours.table.score - theirs.table.score)
    fewer = {p: references[p] for p in list(references)[1:]}
    for other in (
        evaluate_captions(references, predictions, seed=1),
        evaluate_captions(references, predictions, bootstrap=10),
        evaluate_captions(fewer, {p: predictions[p] for p in fewer}),
    ):
        with pytest.raises(ClipcapError, match='evaluate both models'):
            compare(ours, other)


def test_variety_counts_words_as_the_metrics_do():
    variety = measure_variety(["The dog isn't here.", 'the DOG'], ['The dog!'])
    assert variety.to_dict() == pytest.approx(
        {'distinct-1': 5 / 7, 'distinct-2': 4 / 5, 'vocabulary': 5, 'novel': 0.5, 'length': 3.5}
    )
