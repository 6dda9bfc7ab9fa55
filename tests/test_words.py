"Words of any language, cues that say the same, sentences; the tokenizer is the Java one's"

import json
import random
import shutil
from pathlib import Path

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from tokenizers import Regex, pre_tokenizers

from clipcap.base.captions import read_captions
from clipcap.base.words import (
    WORD,
    alike,
    as_sentence,
    end_sentence,
    is_unspaced,
    ptb_tokenize,
    split_words,
)

shared = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
java = pytest.mark.skipif(
    not shutil.which('java'),
    reason="pycocoevalcap's own tokenizer runs on Java",
)


def java_tokenize(captions):
    return PTBTokenizer().tokenize({0: [dict(caption=c) for c in captions]})[0]


# captions and what the Java tokenizer made of them, one after another (a single letter's full stop
# hangs on the next caption)
recorded = json.loads(Path(__file__).with_name('recorded_words.json').read_text(encoding='utf-8'))


# ---- words of any language
@pytest.mark.parametrize(
    'text, words',
    [
        ("A man's T-shirt, 2 o'clock!", ["a", "man's", "t-shirt", "2", "o'clock"]),
        ("don’t -x x- 'q' a--b snake_case", ['don’t', 'x', 'x', 'q', 'a', 'b', 'snake', 'case']),
        ('画面上有一个红色的气球。', list('画面上有一个红色的气球')),
        (
            '犬がフリスビーをキャッチする。',
            ['犬', 'が', 'フリスビー', 'を', 'キャッチ', 'す', 'る'],
        ),
        ('นั่งบน', ['นั่', 'ง', 'บ', 'น']),
        ('T恤 3只', ['t', '恤', '3', '只']),
        ('हिन्दी में लड़का।', ['हिन्दी', 'में', 'लड़का']),
        ('강아지가 뛰어다닌다.', ['강아지가', '뛰어다닌다']),
        ('كلب يركض؟', ['كلب', 'يركض']),
        ('می‌خواهم', ['می‌خواهم']),
        ('ＡＢ ｶﾒﾗ ﬁsh', ['ab', 'カメラ', 'fish']),
        ('cafe\u0301 İstanbul', ['café', 'i̇stanbul']),
        ('👨‍👩‍👧 ❤️ ... 🇩🇪', []),
        ('', []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_words_are_those_of_a_tokenizer_with_the_same_pattern():
    "Word-level language models cut with the pattern, in another library"
    cut = pre_tokenizers.Split(Regex(WORD), 'removed', invert=True)
    for text in (
        "the dog's ball_2 well-known",
        '一只狗 t恤',
        'แมวนั่ง',
        'हिन्दी ❤️',
        'می‌خواهم',
        'カメラー',
    ):
        assert [word for word, _ in cut.pre_tokenize_str(text)] == split_words(text)


def test_hyphens():
    assert split_words('a well-known T-shirt', hyphens=False) == [
        'a',
        'well',
        'known',
        't',
        'shirt',
    ]


def test_scripts_without_spaces():
    for text in ('画面上有一只蓝色的风筝', '犬がキャッチする', 'แมวนั่งบนโต๊ะ', 'ខ្មែរ', 'မြန်မာ'):
        assert is_unspaced(text)
    for text in ('', '...', 'a dog', 'chữ Việt', '한국어', 'एक कुत्ता', 'the sign says 狗', '12:30'):
        assert not is_unspaced(text)


# ---- cues
@pytest.mark.parametrize(
    'one, other',
    [
        ('A man walks.', 'a man walking'),
        ('run', 'runs'),
        ('run', 'running'),
        ('runs', 'running'),
        ('ride', 'riding'),
        ('carries', 'carrying'),
        ('dress', 'dresses'),
        ('dressed', 'dressing'),
        ('falls', 'falling'),
        ('stops', 'stopped'),
        ('plays', 'playing'),
        ('boxes', 'box'),
        ('sees', 'seeing'),
        ("the dog's ball", 'the dog’s ball'),
        ('一只狗在草地上跑。', '一只狗在草地上跑'),
        ('犬が走る。', '犬が走る'),
        ('собака бежит', 'Собака бежит.'),
        ('', ''),
    ],
)
def test_cues_that_say_the_same(one, other):
    assert alike(one, other) and alike(other, one)


@pytest.mark.parametrize(
    'one, other',
    [
        ('child', 'chicken'),
        ('a child eats', 'a chicken eats'),
        ('man', 'woman'),
        ('man', 'mane'),
        ('car', 'care'),
        ('plan', 'plane'),
        ('star', 'staring'),
        ('king', 'kin'),
        ('red', 'reading'),
        ('bed', 'be'),
        ('seed', 'see'),
        ('wing', 'w'),
        ('a man', 'two dogs'),
        ('a dog', 'two dogs'),
        ('a red ball', 'a blue ball'),
        ('a dog', ''),
        ('画面上有一个红色的气球。', '画面上有一座紫色的房子。'),
        ('画面上有一只蓝色的风筝。', '画面上有一只红色的风筝。'),
        ('赤い車', '青い車'),
        ('แมวสีแดง', 'แมวสีดำ'),
        ('красный мяч', 'синий мяч'),
    ],
)
def test_cues_that_differ(one, other):
    assert not alike(one, other) and not alike(other, one)


# ---- sentences
@pytest.mark.parametrize(
    'caption, sentence',
    [
        ('a dog runs', 'A dog runs.'),
        ('A dog runs.', 'A dog runs.'),
        (' a dog runs ', 'A dog runs.'),
        ('what?', 'What?'),
        ('wait …', 'Wait …'),
        ('he says "stop."', 'He says "stop."'),
        ('he says "stop"', 'He says "stop".'),
        ('"stop" says the sign', '"Stop" says the sign.'),
        ('3 dogs', '3 dogs.'),
        ('été', 'Été.'),
        ('画面上有一个红色的气球。', '画面上有一个红色的气球。'),
        ('画面上有一个红色的气球', '画面上有一个红色的气球。'),
        ('真的吗？', '真的吗？'),
        ('太好了！', '太好了！'),
        ('犬が走る｡', '犬が走る｡'),
        ('犬が走る', '犬が走る。'),
        ('كلب يركض؟', 'كلب يركض؟'),
        ('كلب يركض', 'كلب يركض.'),
        ('एक कुत्ता।', 'एक कुत्ता।'),
        ('एक कुत्ता', 'एक कुत्ता।'),
        ('แมวนั่ง', 'แมวนั่ง'),
        ('ძაღლი', 'ძაღლი.'),
        ('', ''),
        ('🙂', '🙂'),
    ],
)
def test_sentences(caption, sentence):
    assert as_sentence(caption) == sentence
    assert as_sentence(sentence) == sentence


def test_an_end_alone():
    assert end_sentence('a dog') == 'a dog.' and end_sentence('一只狗') == '一只狗。'


# ---- the tokenizer
def test_recorded_captions():
    assert ptb_tokenize(list(recorded)) == list(recorded.values())


@java
def test_recorded_captions_in_java():
    assert java_tokenize(list(recorded)) == list(recorded.values())


def test_stanfords_own_example():
    # https://nlp.stanford.edu/software/tokenizer.html, in lower case and without the punctuation
    caption = '"Oh, no," she\'s saying, "our $400 blender can\'t handle something this hard!"'
    words = "oh no she 's saying our $ 400 blender ca n't handle something this hard"
    assert ptb_tokenize([caption]) == [words]


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


@pytest.mark.parametrize(
    'unit',
    ['a', 'a-', "a'", 'a.', '1,', '1/', '<a ', 'a@', 'a_', "n't", '-', '&', 'a&', 'A+', '((']
    + ['http://a.', 'a.b-', 'é', '1 1', 'a/b-'],
)
def test_no_caption_takes_long(unit):
    "Patterns that go back and forth would take minutes for these"
    assert len(ptb_tokenize([unit * 2000])) == 1


@java
def test_captions_with_slips_of_the_pen():
    "Punctuation strewn into drawn captions: 1 in 100 differ (none in real ones), 1 in 50 may"
    rng = random.Random(0)
    slips = list(".,;:!?'\"-()[]{}/&#$%@*+=<>_~^|\\0123456789 ’“”é–—") + ["'s", "n't", '...', '--']
    sample = Path(__file__).parent.parent / 'data' / 'sample' / 'results.csv'
    strewn = []
    for caption in read_captions(sample).caption.tolist() * 7:
        for _ in range(rng.choice([1, 1, 2, 3])):
            start = rng.randrange(len(caption) + 1)
            end = start + rng.choice([0, 0, 1])
            caption = caption[:start] + rng.choice(slips) + caption[end:]
        strewn.append(caption.strip())
    ours, theirs = ptb_tokenize(strewn), java_tokenize(strewn)
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= len(strewn) / 50


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
    rows = zip(captions, ours, theirs, strict=True)
    assert [(caption, a, b) for caption, a, b in rows if a != b] == []
