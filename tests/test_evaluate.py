"The scores are pycocoevalcap's and survive odd input"

import shutil
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
from clipcap.evaluate import compare, evaluate_captions, measure_variety

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


def test_figures_are_pycocoevalcaps(world):
    references, predictions = world
    predictions = predictions | {
        min(predictions): '',
        max(predictions): "Isn't it",
    }  # silence, and nothing right
    scores = evaluate_captions(references, predictions, bootstrap=20)
    gts, res = (
        {p: ptb_tokenize(c) for p, c in references.items()},
        {p: ptb_tokenize([c]) for p, c in predictions.items()},
    )
    (bleu, each), (rouge, rouges), (cider, ciders) = (
        Bleu(4).compute_score(gts, res, verbose=0),
        Rouge().compute_score(gts, res),
        Cider().compute_score(gts, res),
    )
    names = ['BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr', 'CIDEr-D']
    assert list(scores.table.index) == list(scores.photos) == list(scores.draws) == names
    np.testing.assert_allclose(scores.table.score, [*bleu, rouge, cider, cider], rtol=1e-9)
    np.testing.assert_allclose(
        scores.photos, np.stack([*each, rouges, ciders, ciders], 1), rtol=1e-9, atol=1e-12
    )


def test_a_draw_scores_the_photos_it_drew(world):
    "The product of matrices is what a loop over the drawn photos gives"
    references, predictions = world
    scores, n = evaluate_captions(references, predictions, bootstrap=3, seed=5), len(references)
    gts, res = (
        [ptb_tokenize(c) for c in references.values()],
        [ptb_tokenize([c]) for c in predictions.values()],
    )
    for draw, times in zip(
        scores.draws.itertuples(index=False),
        np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), 3),
    ):
        drawn = np.repeat(np.arange(n), times)
        bleu, _ = Bleu(4).compute_score(
            {i: gts[j] for i, j in enumerate(drawn)},
            {i: res[j] for i, j in enumerate(drawn)},
            verbose=0,
        )
        np.testing.assert_allclose(
            draw,
            [*bleu, *scores.photos[['ROUGE-L', 'CIDEr', 'CIDEr-D']].to_numpy()[drawn].mean(0)],
            rtol=1e-9,
        )


def test_published_examples_of_bleu_and_rouge():
    # Papineni et al. 2002: 17 of 18 words and 10 of 17 pairs right, 8 of 14 and 1 of 13
    guide = [
        'It is a guide to action that ensures that the military will forever heed Party commands',
        'It is the guiding principle which guarantees the military forces always being under the command of the Party',
        'It is the practical guide for the army always to heed the directions of the party',
    ]
    said = dict(
        a='It is a guide to action which ensures that the military always obeys the commands of the party',
        b='It is to insure the troops forever hearing the activity guidebook that party direct',
    )
    photos = evaluate_captions(dict.fromkeys(said, guide), said, bootstrap=0).photos
    assert photos['BLEU-1'].a == pytest.approx(17 / 18) and photos['BLEU-2'].a == pytest.approx(
        (17 / 18 * 10 / 17) ** 0.5
    )
    assert photos['BLEU-1'].b == pytest.approx(8 / 14 * np.exp(1 - 16 / 14)) and photos[
        'BLEU-2'
    ].b == pytest.approx((8 / 14 * 1 / 13) ** 0.5 * np.exp(1 - 16 / 14))
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


@java
def test_meteor_is_the_java_programs_own(world):
    references, predictions = world
    predictions = predictions | {min(predictions): ''}
    scores = evaluate_captions(references, predictions, bootstrap=50, meteor=True)
    gts, res = (
        {p: ptb_tokenize(c) for p, c in references.items()},
        {p: ptb_tokenize([c]) for p, c in predictions.items()},
    )
    overall, each = Meteor().compute_score(gts, res)
    assert scores['METEOR'] == pytest.approx(overall) and np.allclose(scores.photos.METEOR, each)
    assert (
        scores.table.low['METEOR'] < overall < scores.table.high['METEOR']
        and scores.draws.METEOR.nunique() > 40
    )


def test_compare_needs_the_same_draws_of_the_same_photos(world):
    references, predictions = world
    ours, theirs = (
        evaluate_captions(references, predictions),
        evaluate_captions(references, dict.fromkeys(predictions, 'a ball')),
    )
    table = compare(ours, theirs)
    assert (
        (table.low > 0).all()
        and (table.better == 1).all()
        and np.allclose(table.difference, ours.table.score - theirs.table.score)
    )
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
