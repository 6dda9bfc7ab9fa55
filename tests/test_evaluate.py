"The tokenizer gives what the Java one gives; the scores are pycocoevalcap's and survive odd input"

import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from clipcap.base.captions import read_captions
from clipcap.base.files import ClipcapError
from clipcap.evaluate import compare, evaluate_captions, measure_variety, ptb_tokenize

shared = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
java = pytest.mark.skipif(
    not shutil.which('java'),
    reason='needs Java, which pycocoevalcap\'s own tokenizer and METEOR run on',
)

removed = "'' ' `` ` . ? ! , : - -- ... ;".split()  # punctuation, by pycocoevalcap


def java_tokenize(captions):
    return PTBTokenizer().tokenize({0: [dict(caption=c) for c in captions]})[0]


# captions and what the Java tokenizer made of them, one after another (a single letter's full stop hangs on the next caption)
recorded = {
    "A man's hat and the dogs' ball don't, can't, won't or ain't DON'T I'm you're they've we'll he'd": "a man 's hat and the dogs ball do n't ca n't wo n't or ai n't do n't i 'm you 're they 've we 'll he 'd",
    "gonna wanna gotta gimme lemme cannot 'tis 'twas dunno": "gon na wan na got ta gim me lem me can not 't is 't was dunno",
    "rock'n'roll, rock 'n' roll, 'em, 'til 'cause y'all ma'am ol' d'Artagnan L'Oreal O'Brien c'mon o'clock e'er": "rock 'n' roll rock 'n' roll 'em 'til 'cause y' all ma'am ol' d'artagnan l'oreal o'brien c'mon o'clock e'er",
    'the \'90s, \'80s-style \'90\'s \'70S \'90sa 90\'s, \'09 1990s 1960s-era 5\'6" tall': "the '90s '80s style 90 's '70s '90s a 90 's '09 1990s 1960s-era 5 6 tall",
    '"hello" he said, \'\'what?\'\' ``no\'\' \'hi there,\' \'wasted\'.': 'hello he said what no hi there wasted',
    '(a) [b] {c} <d> x < y': '-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <d> x < y',
    "black/white and/or 1/2 cup, 1 1/2 cups, 11/12/2005 24/7 km/h w/ w/o his/her's t-shirt/hat": "black/white and/or 1/2 cup 1\xa01/2 cups 11/12/2005 24/7 km/h w / w/o his/her 's t-shirt/hat",
    '$5 $5.00 5% £5 €5 ¥5 5¢ US$5 #1 no. 1 A$': '$ 5 $ 5.00 5 % # 5 $ 5 ¥ 5 5 cents us$ 5 # 1 no. 1 a$',
    'wait... wait.. wait .... no…yes and...and': 'wait wait wait no yes and and',
    '!! ??! ?! ! what?! What?!?': '!! ??! ?! what ?! what ?!?',
    "a - b -- c --- d – e — f a--b -a a- well-known, jack-o'-lantern bird's-eye-view": "a b c d e f a b a a well-known jack-o lantern bird 's eye-view",
    'Mr. Smith, Dr. Who and Mrs. Jones at St. John Ave. etc., i.e. Jr. Co. vs. Inc. at 4 p.m. in the U.S. with Ph.D. students': 'mr. smith dr. who and mrs. jones at st. john ave. etc. i.e. jr. co. vs. inc. at 4 p.m. in the u.s. with ph.d. students',
    'It lies in Wash. and wash. No. 5 says no. pp. 5 pp.': 'it lies in wash. and wash no. 5 says no pp. 5 pp',
    'They live in the U.S.': 'they live in the u.s.',
    'Turn into Wall St.': 'turn into wall st.',
    'cub scouts etc.': 'cub scouts etc.',
    'The letter P.': 'the letter p',
    'Then the letter P. lies': 'then the letter p. lies',
    'the letter "P".': 'the letter p',
    'e-mail me@example.com or see www.example.com, x.co.uk. and https://a.b/c?d=e.': 'e-mail me@example.com or see www.example.com x.co.uk and https://a.b/c?d=e',
    "AT&T H&M's R&B at&t Q&amp;A a & b &lt;3 &quot;hi&quot; &nbsp; M&amp;Ms": "at&t h&m 's r&b at & t q&a a & b < 3 hi m&m s",
    '3rd 2nd-floor 5-year-old 10:30 10:30am 4pm 3.5 .5 1,000 -5 +5 3-D 4x4 5k 1.5-mile 10,000th': '3rd 2nd-floor 5-year-old 10:30 10:30 am 4pm 3.5 .5 1,000 -5 +5 3-d 4x4 5k 1.5-mile 10,000 th',
    'too,can one coat,grey bib,girl road.An red,white-and-blue': 'too can one coat grey bib girl road.an red,white-and-blue',
    '@joe #fun #1 C# C++ A+ a+b a=b a*b ** \\ | ~ ^ _ a_b `': '@joe #fun # 1 c# c++ a + a + b a = b a * b ** \\ | ~ ^ _ a_b',
    'café naïve ½ ¾ cup 1½ ’tis don’t dog’s “hi” ‘hi’ „a“ «b» o’clock ’90s rock ’n’ roll': "café naïve 1/2 3/4 cup 1 1/2 tis do n't dog 's hi hi „ a b o’clock ’90s rock ’n’ roll",
    '&#39; &mdash; &copy;': '&#39; & copy',
    "日本語 текст ñandú Çelik É l'été x² 5°C ★ ♥ ™ → 😀 a🙂b": "日本語 текст ñandú çelik é l'été x ² 5 ° c ★ ♥ ™ → a b",
    ':) ;-) :( a :D :P <3 ^_^ -_- :-/': ':-rrb- ;--rrb- :-lrb- a :d :p < 3 ^_^ -_- /',
    'call 555-1234 or (555) 123-4567': 'call 555-1234 or -lrb-555-rrb-\xa0123-4567',
    "wow!wow a?b ¿que? ¡hola! U.S.-based non-U.S. citizens J.R.R. Tolkien C.D.'s A.M. ": "wow!wow a?b ¿ que ¡ hola u.s.-based non-u.s. citizens j.r.r. tolkien c.d. 's a.m.",
    "'S 's-eye-view 'AST 'Idol,' Gentlemen's' Hutchesons' 'n'": "'s 's eye-view ast idol gentlemen 's hutchesons 'n'",
    'A4 k-9 R2-D2 AK-47. MP3 (2) ... ). .). ".': 'a4 k-9 r2-d2 ak-47 mp3 -lrb- 2 -rrb- -rrb- -rrb-',
    'road , dog .p . Mr.Smith St.Louis': 'road dog p mr.smith st.louis',
}


# ---- the tokenizer
def test_recorded_captions():
    assert dict(zip(recorded, ptb_tokenize(list(recorded)))) == recorded


@java
def test_recorded_captions_in_java():
    assert dict(zip(recorded, java_tokenize(list(recorded)))) == recorded


def test_stanfords_own_example():
    # https://nlp.stanford.edu/software/tokenizer.html, in small letters and without the punctuation that pycocoevalcap removes
    published = """`` Oh , no , '' she 's saying , `` our $ 400 blender ca n't handle something this hard ! ''"""
    caption = '"Oh, no," she\'s saying, "our $400 blender can\'t handle something this hard!"'
    assert ptb_tokenize([caption]) == [
        ' '.join(w for w in published.lower().split() if w not in removed)
    ]


def test_a_line_for_each_caption():
    assert ptb_tokenize([]) == []
    assert ptb_tokenize(['', ' ', 'a\r\ndog\u2028runs', '\t', '.']) == [
        '',
        '',
        'a dog runs',
        '',
        '',
    ]
    assert ptb_tokenize(['caf\u00ad\u00e9 \U0001f600 a\u00a0b']) == ['caf\u00e9 a b']


def test_no_caption_takes_long():
    "Patterns that go back and forth would take minutes for these"
    for unit in (
        'a',
        'a-',
        "a'",
        'a.',
        '1,',
        '1/',
        '<a ',
        'a@',
        'a_',
        "n't",
        '-',
        '&',
        'a&',
        'A+',
        '((',
        'http://a.',
        'a.b-',
        'é',
        '1 1',
        'a/b-',
    ):
        assert len(ptb_tokenize([unit * 2000])) == 1


@java
@pytest.mark.parametrize('seed', [0])
def test_captions_with_slips_of_the_pen(seed):
    "Punctuation strewn into drawn captions: at most 1 in 200 may differ (none does in the real ones)"
    rng, strewn = random.Random(seed), []
    with open(
        Path(__file__).parent.parent / 'data' / 'sample' / 'results.csv', encoding='utf-8'
    ) as f:
        captions = [line.rsplit('| ', 1)[1].strip() for line in list(f)[1:]]
    for caption in captions * 7:
        for _ in range(rng.choice([1, 1, 2, 3])):
            i = rng.randrange(len(caption) + 1)
            caption = (
                caption[:i]
                + rng.choice(
                    list(".,;:!?'\"-()[]{}/&#$%@*+=<>_~^|\\0123456789 ’“”é–—")
                    + ["'s", "n't", '...', '--']
                )
                + caption[i + rng.choice([0, 0, 1]) :]
            )
        strewn.append(caption.strip())
    ours, theirs = ptb_tokenize(strewn), java_tokenize(strewn)
    assert sum(a != b for a, b in zip(ours, theirs)) <= len(strewn) / 200


@pytest.mark.slow
@java
@pytest.mark.parametrize('name, number', [('flickr30k', 155_070), ('flickr8k', 35_000)])
def test_every_real_caption_as_in_java(name, number):
    if not shared.is_dir():
        pytest.skip(f'needs the real captions in {shared}')
    captions = read_captions(shared / name / 'results.csv').caption.tolist()
    assert len(captions) == number
    ours, theirs = ptb_tokenize(captions), java_tokenize(captions)
    assert len(ours) == len(theirs) == number
    assert [(c, a, b) for c, a, b in zip(captions, ours, theirs) if a != b] == []


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
