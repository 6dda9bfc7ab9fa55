"""Train captioners on the same photos, score them, and make nbs/results.json of what there is.

python benchmarks/results.py                              the table, of the files in benchmarks/rows
python benchmarks/results.py DATA TOWERS WORK [ROW ...]   trains what is missing, then the table

DATA is Flickr8k's folder, TOWERS a folder with the vision towers that the rows name, WORK keeps
features and runs. A row is trained from several seeds; each is one run, judged by itself, and one
file in benchmarks/rows, which is written as soon as the run is judged. A killed run goes on.

Everything is chosen (epochs, distances towards rewarded weights) on `tune`: 1,000 of the 6,000
training photos, listed in benchmarks/tune.txt. The runs never see more than the training photos:
WORK/data has no others. The dev photos are captioned once a run, at the end.
"""

import argparse
import hashlib
import platform
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

import clipcap
from clipcap.base.captions import read_dataset
from clipcap.base.config import changed_settings
from clipcap.base.files import (
    ClipcapError,
    end_cleanly_on_sigterm,
    lock,
    read_json,
    write_folder,
    write_json,
    write_text,
)
from clipcap.embed import embed_images
from clipcap.evaluate import evaluate_captions, measure_variety
from clipcap.generate import GenerationOptions, generate_captions
from clipcap.image import load_tower
from clipcap.methods.lstm import ensemble
from clipcap.model import CaptionModel
from clipcap.tools.recipe import (
    cider_score,
    read_recipe,
    reward_captions,
    train_recipe,
)

here = Path(__file__).resolve().parent
table_file = here.parent / 'nbs' / 'results.json'
rows_folder = here / 'rows'
tune_file = here / 'tune.txt'

# Raised whenever rows of before can no longer stand beside new ones
PROTOCOL = 'tune 1'
SEEDS = (0, 1, 2)
DEV_PHOTOS = 1000
METRICS = ('BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'METEOR', 'ROUGE-L', 'CIDEr')

# ---- the rows, the most telling ones first
POOLED = dict(tower='efficientnet_lite2_256', features='pooled', image_size=256, precision='bf16')
# The language model is new, so it learns at a new model's rate
MLP = POOLED | dict(
    preset='clipcap-mlp', language='new-gpt', epochs=6, batch_size=128, rate=1.2e-3, warmup=0.05
)
SHOW_AND_TELL = POOLED | dict(preset='show-and-tell')
LSTM = POOLED | dict(preset='image-lstm')
TRANSFORMER = MLP | dict(mapper='transformer', mapper_layers=2, mapper_heads=4)
HAS_READ = MLP | dict(text_epochs=2)
HYPERCOLUMN = LSTM | dict(features='hypercolumn')
REWARDED = dict(reward_steps=300)
ROWS = {
    'prefix MLP': MLP,
    'photo at every step': LSTM,
    'Show and Tell': SHOW_AND_TELL,
    'Show, Attend and Tell': POOLED | dict(preset='show-attend-tell', features='grid'),
    'photo at every step, rewarded': LSTM | REWARDED,
    'prefix MLP, label smoothing': MLP | dict(label_smoothing=0.1),
    'prefix MLP, feature dropout': MLP | dict(dropout=0.3),
    'prefix MLP, rewarded': MLP | REWARDED,
    'photo at every step, hypercolumn': HYPERCOLUMN,
    'photo at every step, MobileNetV2': LSTM | dict(tower='mobilenet_v2_1.0_224', image_size=224),
    'Show and Tell, rewarded': SHOW_AND_TELL | REWARDED,
    'photo at every step, hypercolumn, rewarded': HYPERCOLUMN | REWARDED,
    'prefix MLP, LM has read': HAS_READ,
    'prefix MLP, LM has read, frozen': HAS_READ | dict(freeze_language=True),
    'prefix MLP, LM has read, LoRA': HAS_READ | dict(lora=16),
    'prefix transformer': TRANSFORMER,
    'prefix transformer, grid': TRANSFORMER | dict(features='grid'),
    'ensemble of three seeds': ('photo at every step, rewarded', SEEDS),
}

# A row and the one that it differs from in one thing alone
CONTROLS = {
    'photo at every step': 'Show and Tell',
    'photo at every step, rewarded': 'photo at every step',
    'prefix MLP, label smoothing': 'prefix MLP',
    'prefix MLP, feature dropout': 'prefix MLP',
    'prefix MLP, rewarded': 'prefix MLP',
    'photo at every step, hypercolumn': 'photo at every step',
    'photo at every step, MobileNetV2': 'photo at every step',
    'Show and Tell, rewarded': 'Show and Tell',
    'photo at every step, hypercolumn, rewarded': 'photo at every step, hypercolumn',
    'prefix MLP, LM has read': 'prefix MLP',
    'prefix MLP, LM has read, frozen': 'prefix MLP, LM has read',
    'prefix MLP, LM has read, LoRA': 'prefix MLP, LM has read',
    'prefix transformer': 'prefix MLP',
    'prefix transformer, grid': 'prefix transformer',
    'ensemble of three seeds': 'photo at every step, rewarded',
}


def seeds_of(name):
    "The seeds that a row wants; an ensemble is made once, of all of them"
    return SEEDS if isinstance(ROWS[name], dict) else (0,)


def command(name, seed=None):
    "What a reader types to train it; DATA is the folder WORK/data of this script"
    row = ROWS[name]
    if isinstance(row, tuple):
        members = ' '.join(f'DIR{seed}/best' for seed in row[1])
        return f'clipcap ensemble {members} --output DIR'
    options = []
    for key, value in row.items():
        option = '--' + key.replace('_', '-')
        value = f'TOWERS/{value}' if key == 'tower' else value
        options.append(option if value is True else f'{option} {value}')
    if seed is not None:
        options.append(f'--seed {seed}')
    return f'clipcap train DATA --output DIR {" ".join(options)}'


def row_file(name, seed):
    "Where the result of one run stands"
    return rows_folder / f'{re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")}-{seed}.json'


# ---- the photos that everything is chosen on
def draw_tune(photos, number=1000, seed=0):
    "Some of the training photos, the same ones in whatever order they come; sorted"
    order = np.random.default_rng(seed).permutation(sorted(set(photos)))
    return sorted(order[:number].tolist())


def read_tune():
    return tune_file.read_text(encoding='utf-8').split()


def split_tune(table, tune):
    "The training captions alone, image, caption and split: val for those of the tune photos"
    table = table[table.split == 'train']
    unknown = set(tune) - set(table.image)
    if unknown:
        raise ClipcapError(
            f'{tune_file}: {min(unknown)} is no training photo of these data: give Flickr8k with '
            "its official splits, or write the list anew for data of your own (`draw_tune`)"
        )
    split = table.image.isin(tune).map({True: 'val', False: 'train'})
    return table.assign(split=split)


def write_training_data(table, photos, tune, folder):
    "A data set for `clipcap train` that lacks the dev photos"

    def write(new):
        columns = ['image', 'caption', 'split']
        text = split_tune(table, tune)[columns].to_csv(index=False, lineterminator='\n')
        write_text(new / 'captions.csv', text)
        (new / 'images').symlink_to(photos.resolve(), target_is_directory=True)

    if not folder.exists():
        write_folder(folder, write)


# ---- training and judging
@contextmanager
def stopwatch(file):
    "Add the processor's minutes spent in the block to those in the file, however it ends"
    began = time.process_time()
    try:
        yield
    finally:
        minutes = (time.process_time() - began) / 60
        write_text(file, f'{minutes_in(file) + minutes:.2f}')


def minutes_in(file):
    return float(file.read_text()) if file.exists() else 0.0


class Study:
    "Runs on one data set, each trained and judged by itself"

    def __init__(self, data, towers, work):
        self.towers, self.work = towers, work
        table, photos = read_dataset(data)
        # one test photo less or more is another table
        self.table, self.photos = table[table.split.isin(['train', 'val'])], photos
        self.tune = read_tune()
        write_training_data(self.table, photos, self.tune, work / 'data')

    def data(self):
        "What a result says of the data; only results that say the same stand in one table"
        texts = self.table.sort_values(['image', 'caption'])[['image', 'caption', 'split']]
        digest = hashlib.sha256(texts.to_csv(index=False).encode())
        digest.update('\n'.join(self.tune).encode())
        photos = self.table.groupby('split').image.nunique()
        return dict(
            train=int(photos['train']) - len(self.tune),
            tune=len(self.tune),
            dev=int(photos['val']),
            digest=digest.hexdigest()[:16],
        )

    def recipe(self, name, seed):
        row = ROWS[name]
        return read_recipe(**row | dict(tower=str(self.towers / row['tower']), seed=seed))

    def features(self, recipe):
        "Where the features of a recipe lie, the store, and the tower"
        tower = load_tower(recipe.tower, recipe.features, recipe.image_size, 'cpu')
        called = f'features-{Path(recipe.tower).name}-{recipe.features}-{recipe.image_size}'
        paths = [self.photos / name for name in self.table.image.unique()]
        folder = self.work / called
        return folder, embed_images(tower, paths, folder, self.photos, progress=False), tower

    def run_folder(self, recipe):
        # a setting that is new and left as it is makes no other run
        settings = repr(sorted(changed_settings(recipe).items()))
        return self.work / ('run-' + hashlib.sha256(settings.encode()).hexdigest()[:12])

    def train_words(self, recipe, say):
        "The epochs, without the rewards: the folder of the run"
        folder = self.run_folder(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        features, _, _ = self.features(recipe)

        def report(history):
            say(history.iloc[-1].round(4).to_dict())

        with stopwatch(folder / 'minutes.txt'):
            train_recipe(
                recipe,
                self.work / 'data',
                folder,
                features,
                'cpu',
                report=report,
                progress=False,
            )
        return folder

    def learn(self, name, seed, say):
        "Train the model of a run: its folder, and what there is to tell"
        recipe = self.recipe(name, seed)
        words = self.train_words(replace(recipe, reward_steps=0, reward_dropout=None), say)
        history = pd.read_csv(words / 'history.csv')
        best = history.loc[history.score.idxmax()]
        about = dict(
            minutes=minutes_in(words / 'minutes.txt'),
            chosen=dict(epoch=int(best.epoch), epochs=recipe.epochs, tune_greedy=best.score),
        )
        if not recipe.reward_steps:
            return words, about
        # as `clipcap train` does it; the epochs are shared with the row without rewards
        folder = self.run_folder(recipe)
        if not folder.exists():
            write_folder(folder, lambda new: shutil.copytree(words / 'best', new / 'best'))
        _, store, tower = self.features(recipe)
        table, _ = read_dataset(self.work / 'data')
        with lock(folder), stopwatch(folder / 'minutes.txt'):
            score = cider_score(table, store, recipe.score_photos, beams=5)
            reward_captions(recipe, table, store, folder, tower, score, progress=False)
        about['minutes'] += minutes_in(folder / 'minutes.txt')
        about['chosen']['shares'] = read_json(folder / 'reward.json', dict)['scores']
        return folder, about

    def judge(self, model, recipe):
        "Its captions of the dev photos, beam 5, scored"
        _, store, _ = self.features(recipe)
        dev = self.table[self.table.split == 'val']
        references = dev.groupby('image').caption.apply(list).to_dict()
        features = store[store.rows(list(references))]
        best = [c for (c,) in generate_captions(model, features, GenerationOptions(beams=5))]
        predictions = dict(zip(references, best, strict=True))
        java = shutil.which('java') is not None
        scores = evaluate_captions(references, predictions, meteor=java)
        learned = self.table[~self.table.image.isin([*self.tune, *references])]
        return dict(
            scores=scores.as_dict(),
            variety=measure_variety(best, learned.caption.tolist()).round(4).to_dict(),
            # for differences between rows, photo by photo
            cider_of_photos=' '.join(f'{value:.3f}' for value in scores.photos.CIDEr),
        )

    def result(self, name, seed):
        "All that is to be known of one run"

        def say(text):
            print(f'{name}, seed {seed}:', text, flush=True)

        row = ROWS[name]
        if isinstance(row, tuple):
            member, seeds = row
            runs = [self.learn(member, seed, say) for seed in seeds]
            recipe = self.recipe(member, seeds[0])
            models = [CaptionModel.from_pretrained(folder / 'best') for folder, _ in runs]
            model = ensemble(models)
            about = dict(minutes=sum(about['minutes'] for _, about in runs), chosen={})
        else:
            folder, about = self.learn(name, seed, say)
            recipe = self.recipe(name, seed)
            model = CaptionModel.from_pretrained(folder / 'best')
            models = [model]
        return dict(
            row=name,
            seed=seed,
            protocol=PROTOCOL,
            data=self.data(),
            command=command(name, seed if isinstance(row, dict) else None),
            # an ensemble has those of its members; the zeros between them are no weights
            parameters=sum(p.numel() for model in models for p in model.parameters()),
            minutes=round(about['minutes'], 2),
            chosen=about['chosen'],
            versions=dict(
                clipcap=clipcap.__version__,
                torch=torch.__version__,
                transformers=transformers.__version__,
                python=platform.python_version(),
            ),
        ) | self.judge(model, recipe)


# ---- the table
SHAPE = {
    'row': str,
    'seed': int,
    'protocol': str,
    'data': dict,
    'command': str,
    'parameters': int,
    'minutes': (int, float),
    'chosen': dict,
    'versions': dict,
    'scores': dict,
    'variety': dict,
    'cider_of_photos': str,
}


def read_results(folder=rows_folder):
    "The results of all runs, by row and seed; `ClipcapError` where they cannot stand in one table"
    found, first = {}, None
    for file in sorted(Path(folder).glob('*.json')):
        result = read_json(file, SHAPE)
        name, seed = result['row'], result['seed']
        if name not in ROWS:
            raise ClipcapError(f'{file}: there is no row {name!r} any more: delete the file')
        if result['protocol'] != PROTOCOL:
            raise ClipcapError(
                f'{file}: protocol {result["protocol"]!r}, and not {PROTOCOL!r}: run it again'
            )
        if result['command'] != command(name, seed if isinstance(ROWS[name], dict) else None):
            raise ClipcapError(f'{file}: was trained by another command: run it again')
        if first and result['data'] != first[1]['data']:
            raise ClipcapError(f'{file}: other photos or captions than {first[0]}: run it again')
        first = first or (file, result)
        found.setdefault(name, {})[seed] = result
    return found


def _of_photos(runs):
    "CIDEr of each photo, the mean over the seeds"
    return np.mean([np.array(run['cider_of_photos'].split(), float) for run in runs], 0)


def luck_of_seeds(found, metric='CIDEr'):
    "Standard deviation between seeds, pooled over the rows that have several; None without one"
    several = [[run['scores'][metric] for run in runs.values()] for runs in found.values()]
    spreads = [np.var(scores, ddof=1) for scores in several if len(scores) > 1]
    weights = [len(scores) - 1 for scores in several if len(scores) > 1]
    return float(np.sqrt(np.average(spreads, weights=weights))) if spreads else None


def difference(ours, theirs, luck):
    "CIDEr of one row less that of another: mean, and 95 % interval over photos and seeds"
    of_photos = _of_photos(ours) - _of_photos(theirs)
    variance = of_photos.var(ddof=1) / len(of_photos)
    if luck is not None:
        variance += luck**2 * (1 / len(ours) + 1 / len(theirs))
    mean, wide = of_photos.mean(), 1.96 * np.sqrt(variance)
    return dict(difference=mean, low=mean - wide, high=mean + wide)


def summary(runs):
    "One line of the table, of the runs of one row"
    scores = {}
    for metric in METRICS:
        values = [run['scores'][metric] for run in runs if metric in run['scores']]
        if len(values) == len(runs):
            ends = [run['scores']['intervals'][metric] for run in runs]
            low, high = np.mean(ends, 0)
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            scores[metric] = dict(mean=float(np.mean(values)), spread=spread, low=low, high=high)
    variety = pd.DataFrame([run['variety'] for run in runs]).mean().to_dict()
    return dict(
        parameters=runs[0]['parameters'],
        minutes=float(np.mean([run['minutes'] for run in runs])),
        scores=scores,
        variety=variety,
        chosen=[run['chosen'] for run in runs],
    )


def rounded(value):
    "The same with five digits after the point"
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(float(value), 5) if isinstance(value, (float, np.floating)) else value


def make_table(found):
    "What nbs/12_results shows: a line for each row with a run, and what is missing"
    luck = luck_of_seeds(found)
    rows, missing = [], []
    for name in ROWS:
        runs = found.get(name, {})
        lacking = [seed for seed in seeds_of(name) if seed not in runs]
        if lacking:
            missing.append(dict(name=name, seeds=lacking, command=command(name)))
        if not runs:
            continue
        row = dict(name=name, seeds=sorted(runs), command=command(name))
        row |= summary(list(runs.values()))
        control = CONTROLS.get(name)
        if control in found:
            against = difference(list(runs.values()), list(found[control].values()), luck)
            row['against'] = dict(row=control) | against
        rows.append(row)
    data = next((run['data'] for runs in found.values() for run in runs.values()), None)
    versions = [run['versions'] for runs in found.values() for run in runs.values()]
    return rounded(
        dict(
            protocol=PROTOCOL,
            data=data,
            luck_of_seeds=luck,
            versions=[dict(pairs) for pairs in sorted({tuple(v.items()) for v in versions})],
            rows=rows,
            missing=missing,
        )
    )


def train_all(data, towers, work, names, seeds):
    "One seed of every row, then the next; runs that have a result already are left out"
    study = Study(data, towers, work)
    for seed in seeds:
        for name in names or ROWS:
            file = row_file(name, seed)
            if seed in seeds_of(name) and not file.exists():
                write_json(file, study.result(name, seed), indent=1)
                print(f'{file.name} is written', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path, nargs='?')
    parser.add_argument('towers', type=Path, nargs='?')
    parser.add_argument('work', type=Path, nargs='?')
    parser.add_argument('rows', nargs='*', choices=[*ROWS, []], metavar='ROW')
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS, choices=SEEDS)
    given = parser.parse_args()
    if given.data and not given.work:
        parser.error('give DATA, TOWERS and WORK, or none of them')
    if given.data:
        end_cleanly_on_sigterm()  # the minutes of a run that is killed count, too
        train_all(given.data, given.towers, given.work, given.rows, given.seeds)
    write_json(table_file, make_table(read_results()), indent=1)


if __name__ == '__main__':
    main()
