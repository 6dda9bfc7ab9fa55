"""Train every family of captioners on the same photos, score them, and write nbs/results.json.

python benchmarks/results.py DATA TOWER WORK [ROW ...]

DATA is Flickr8k's folder, TOWER an ImageNet MobileNetV2; without rows, all are trained. A killed
run goes on. Rows may be trained side by side; the run that names none writes the table, which the
lesson nbs/12_results shows.
"""

import argparse
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from clipcap.base.captions import read_dataset
from clipcap.base.files import write_json, write_text
from clipcap.embed import embed_images
from clipcap.evaluate import compare, evaluate_captions, measure_variety
from clipcap.generate import GenerationOptions, generate_captions
from clipcap.image import find_model, load_tower
from clipcap.methods.lstm import ensemble
from clipcap.model import CaptionModel
from clipcap.tools.recipe import read_recipe, train_recipe

root = Path(__file__).resolve().parent.parent

# These rows were scored on 200 photos; the default of 1000 tells epochs apart more surely
POOLED = dict(features='pooled', image_size=224, precision='bf16', score_photos=200)
# The language model is new, so it learns at a new model's rate
MLP = POOLED | dict(
    preset='clipcap-mlp', language='new-gpt', epochs=6, batch_size=128, rate=1.2e-3, warmup=0.05
)
SHOW_AND_TELL = POOLED | dict(preset='show-and-tell')
LSTM = POOLED | dict(preset='image-lstm')
# More numbers per photo, so a slower mapper
HYPERCOLUMN = LSTM | dict(features='hypercolumn', image_size=373, rate=2e-4, epochs=10)
BEST = HYPERCOLUMN | dict(reward_steps=500, reward_dropout=0.35)
ROWS = {
    'Show and Tell': SHOW_AND_TELL,
    'Show and Tell, rewarded': SHOW_AND_TELL | dict(reward_steps=300),
    'LSTM, photo at every step': LSTM,
    'LSTM, photo at every step, seed 1': LSTM | dict(seed=1),
    'LSTM, photo at every step, seed 2': LSTM | dict(seed=2),
    'LSTM, rewarded': LSTM | dict(reward_steps=300),
    'LSTM, rewarded, seed 1': LSTM | dict(reward_steps=300, seed=1),
    'LSTM, rewarded, seed 2': LSTM | dict(reward_steps=300, seed=2),
    'LSTM, hypercolumn': HYPERCOLUMN,
    'LSTM, hypercolumn, seed 1': HYPERCOLUMN | dict(seed=1),
    'LSTM, hypercolumn, seed 2': HYPERCOLUMN | dict(seed=2),
    'LSTM, hypercolumn, rewarded': BEST,
    'LSTM, hypercolumn, rewarded, seed 1': BEST | dict(seed=1),
    'LSTM, hypercolumn, rewarded, seed 2': BEST | dict(seed=2),
    'best: three seeds in one': (
        'LSTM, hypercolumn, rewarded',
        'LSTM, hypercolumn, rewarded, seed 1',
        'LSTM, hypercolumn, rewarded, seed 2',
    ),
    'ClipCap MLP': MLP,
    'ClipCap transformer, LM frozen': MLP
    | dict(preset='clipcap-transformer', text_epochs=2, together=True),
    'MLP, label smoothing': MLP | dict(label_smoothing=0.1),
    'MLP, dropout on features': MLP | dict(dropout=0.3),
    'MLP, slower mapper': MLP | dict(rate=3e-4, language_rate=1.2e-3),
    'grid, transformer mapper': MLP
    | dict(features='grid', mapper='transformer', mapper_layers=2, mapper_heads=4),
    'MLP, rewarded': MLP | dict(reward_steps=300),
    'MLP, LoRA on the LM': MLP | dict(text_epochs=2, lora=16),
    'bundled tiny': None,
}


def command(row):
    "What a reader types to train it"
    if isinstance(row, tuple):
        members = ' '.join(f'DIR{n}/best' for n in range(len(row)))
        return f'clipcap ensemble {members} --output DIR'
    options = []
    for name, value in row.items():
        option = '--' + name.replace('_', '-')
        options.append(option if value is True else f'{option} {value}')
    return f'clipcap train DATA --tower TOWER --output DIR {" ".join(options)}'


@contextmanager
def stopwatch(file):
    "Add the minutes spent in the block to those in the file, however it ends"
    began = time.perf_counter()
    try:
        yield
    finally:
        minutes = (time.perf_counter() - began) / 60
        write_text(file, f'{minutes_in(file) + minutes:.2f}')


def minutes_in(file):
    return float(file.read_text()) if file.exists() else 0.0


class Table:
    "The rows, trained and judged on one data set"

    def __init__(self, data, tower, work):
        self.data, self.tower, self.work = data, tower, work
        self.captions, self.photos = read_dataset(data)
        val = self.captions[self.captions.split == 'val']
        self.references = val.groupby('image').caption.apply(list).to_dict()
        self.training = self.captions[self.captions.split == 'train'].caption.tolist()

    def features(self, recipe):
        "Where the features of a recipe lie, and the store"
        tower = recipe.tower or find_model('tiny')
        folder = self.work / f'features-{recipe.features}-{recipe.image_size}'
        paths = [self.photos / name for name in self.captions.image.unique()]
        loaded = load_tower(tower, recipe.features, recipe.image_size)
        return folder, embed_images(loaded, paths, folder, self.photos)

    def learn(self, name):
        "Train the model of a row, unless it is trained: model, features, minutes of training"
        row = ROWS[name]
        if row is None:
            _, store = self.features(read_recipe())
            return CaptionModel.from_pretrained(find_model('tiny')), store, None
        if isinstance(row, tuple):
            models, stores, minutes = zip(*(self.learn(member) for member in row), strict=True)
            return ensemble(models), stores[0], sum(minutes)
        recipe = read_recipe(tower=str(self.tower), **row)
        folder = self.work / re.sub(r'\W+', '-', name)
        features, store = self.features(recipe)
        if not (folder / 'done').exists():

            def report(history):
                print(name, history.iloc[-1].to_dict(), flush=True)

            with stopwatch(folder / 'minutes.txt'):
                train_recipe(recipe, self.data, folder, features, report=report, progress=False)
            (folder / 'done').touch()
        model = CaptionModel.from_pretrained(folder / 'best')
        return model, store, minutes_in(folder / 'minutes.txt')

    def judge(self, model, store):
        "Beam 5 on the validation photos: its scores, and the rest of its line in the table"
        features = store[store.rows(list(self.references))]
        began = time.perf_counter()
        best = [c for (c,) in generate_captions(model, features, GenerationOptions(beams=5))]
        seconds = time.perf_counter() - began
        predictions = dict(zip(self.references, best, strict=True))
        java = shutil.which('java') is not None
        scores = evaluate_captions(self.references, predictions, meteor=java)
        line = dict(
            parameters=sum(p.numel() for p in model.parameters()),
            captions_per_second=round(len(best) / seconds, 1),
            variety=measure_variety(best, self.training).round(4).to_dict(),
            scores=scores.as_dict(),
        )
        return scores, line


def main(data, tower, work, names):
    table, rows, scored = Table(data, tower, work), [], {}
    for name in names or ROWS:
        model, store, minutes = table.learn(name)
        scored[name], line = table.judge(model, store)
        how = command(ROWS[name]) if ROWS[name] else None
        rows.append(dict(name=name, command=how, minutes=minutes) | line)
        print(rows[-1], flush=True)
    if names:
        return
    for row in rows:
        difference = compare(scored[row['name']], scored['ClipCap MLP']).loc['CIDEr']
        row['against_mlp'] = difference.round(4).to_dict()
    write_json(root / 'nbs' / 'results.json', rows, indent=1)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path)
    parser.add_argument('tower', type=Path)
    parser.add_argument('work', type=Path)
    parser.add_argument('rows', nargs='*', choices=[*ROWS, []], metavar='ROW')
    given = parser.parse_args()
    main(given.data, given.tower, given.work, given.rows)
