"""Measure what a small captioner gets wrong about people, and what it makes of drawn scenes.

python benchmarks/bundled.py DATA [--model tiny]

DATA is a captioned data set such as Flickr8k; its split val is looked at. Of the photos whose
people all say "woman" (or all say "man"), how often does the model say the other? And of 200 drawn
scenes that no training draws, how often are a thing and its colour right?
"""

import argparse
import random
from pathlib import Path

import numpy as np

from clipcap.base.captions import read_dataset
from clipcap.base.scenes import THINGS, paint_scene, plan_scene
from clipcap.base.words import split_words
from clipcap.image import Captioner

WORDS = dict(
    woman=set('woman women lady ladies girl girls female'.split()),
    man=set('man men guy guys gentleman boy boys male'.split()),
)


def genders(caption):
    "Which of the two a caption speaks of"
    words = set(split_words(caption, hyphens=False))
    return {gender for gender, known in WORDS.items() if words & known}


def agreed(captions):
    "The one that every caption speaks of, and no other; None where there is none"
    found = [genders(caption) for caption in captions]
    first = found[0]
    return next(iter(first)) if len(first) == 1 and all(g == first for g in found) else None


def said(caption, truth):
    "right, other, both or neither"
    found = genders(caption)
    if len(found) == 2:
        return 'both'
    return ('right' if truth in found else 'other') if found else 'neither'


def interval(count, total):
    "Wilson's 95 % interval of a share"
    z, share = 1.96, count / total
    middle = share + z**2 / (2 * total)
    wide = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return (middle - wide) / scale, (middle + wide) / scale


def share(count, total):
    low, high = interval(count, total)
    return f'{count} of {total} ({count / total:.1%}, 95 %: {low:.1%} to {high:.1%})'


def bias(captioner, data):
    "One line for woman, one for man"
    table, photos = read_dataset(data)
    val = table[table.split == 'val'].groupby('image').caption.apply(list)
    truths = val.map(agreed).dropna()
    captions = captioner.caption([photos / name for name in truths.index])
    for gender in WORDS:
        answers = [
            said(caption, gender)
            for caption, truth in zip(captions, truths, strict=True)
            if truth == gender
        ]
        print(f'all say {gender}: {len(answers)} photos')
        for answer in ('right', 'other', 'both', 'neither'):
            print(f'  {answer:8}', share(answers.count(answer), len(answers)))


def names_rightly(scene, caption):
    "Whether one of the scene's things stands in the caption with its own colour"
    words = caption.lower().split()
    for placed in scene.things:
        names = {placed.thing, THINGS[placed.thing].plural or placed.thing + 's'}
        pairs = zip(words, words[1:], strict=False)
        if any(first == placed.colour and second in names for first, second in pairs):
            return True
    return False


def scenes(captioner, number=200, size=128):
    "One line"
    found = []
    for index in range(number):
        rng = random.Random(f'unseen-{index}')
        scene = plan_scene(rng)
        found.append((scene, paint_scene(scene, rng, size)))
    captions = captioner.caption([picture for _, picture in found])
    right = sum(names_rightly(s, c) for (s, _), c in zip(found, captions, strict=True))
    print('drawn scenes, a thing with its colour:', share(right, number))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path)
    parser.add_argument('--model', default='tiny')
    given = parser.parse_args()
    captioner = Captioner(given.model)
    bias(captioner, given.data)
    scenes(captioner)


if __name__ == '__main__':
    main()
