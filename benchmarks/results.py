"""Train every family of captioners on the same photos, score them, and write nbs/results.json, which the last lesson shows.

python benchmarks/results.py DATA TOWER WORK [row ...]     DATA: Flickr8k's folder; TOWER: an ImageNet MobileNetV2; rows: all, where none is named

A killed run goes on. Rows may be trained side by side; the run that names none writes the table."""

import json
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from clipcap.base.captions import read_dataset
from clipcap.embed import embed_images
from clipcap.evaluate import compare, evaluate_captions, measure_variety
from clipcap.generate import GenerationOptions, generate_captions
from clipcap.image import find_model, load_tower
from clipcap.methods.image_lstm import ensemble
from clipcap.model import CaptionModel
from clipcap.tools.recipe import read_recipe, train_recipe
from clipcap.tools.report import write_text

SEEN = dict(
    features='pooled', image_size=224, precision='bf16', score_photos=200
)  # the default of 1000 tells epochs apart more surely
MLP = SEEN | dict(
    preset='clipcap-mlp', language='new-gpt', epochs=6, batch_size=128, rate=1.2e-3, warmup=0.05
)  # the LM is new, so with a new model's rate
TELL, LSTM = SEEN | dict(preset='show-and-tell'), SEEN | dict(preset='image-lstm')
FULL = LSTM | dict(
    features='hypercolumn', image_size=373, rate=2e-4, epochs=10
)  # more numbers a photo, so a slower mapper
BEST = FULL | dict(reward_steps=500, reward_dropout=0.35)
ROWS = {
    'Show and Tell': TELL,
    'Show and Tell, rewarded': TELL | dict(reward_steps=300),
    'LSTM, photo at every step': LSTM,
    'LSTM, photo at every step, seed 1': LSTM | dict(seed=1),
    'LSTM, photo at every step, seed 2': LSTM | dict(seed=2),
    'LSTM, rewarded': LSTM | dict(reward_steps=300),
    'LSTM, rewarded, seed 1': LSTM | dict(reward_steps=300, seed=1),
    'LSTM, rewarded, seed 2': LSTM | dict(reward_steps=300, seed=2),
    'LSTM, hypercolumn': FULL,
    'LSTM, hypercolumn, seed 1': FULL | dict(seed=1),
    'LSTM, hypercolumn, seed 2': FULL | dict(seed=2),
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
        return ' '.join(
            ['clipcap ensemble', *(f'DIR{n}/best' for n in range(len(row))), '--model-out DIR']
        )
    return 'clipcap train --data DATA --tower TOWER --model-out DIR ' + ' '.join(
        f"--{k.replace('_', '-')}" + f' {v}' * (v is not True) for k, v in row.items()
    )


@contextmanager
def stopwatch(file):
    "Add the minutes spent in the block to those in the file, however it ends"
    began = time.perf_counter()
    try:
        yield
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'{spent(file) + (time.perf_counter() - began) / 60:.2f}')


def spent(file):
    return float(file.read_text()) if file.exists() else 0.0


def learn(name, data, tower, work):
    "Train the model of a row, unless it is trained, and give its parts: model, features of the photos, minutes (those of the features not counted)"
    if isinstance(ROWS[name], tuple):
        models, stores, minutes = zip(*(learn(member, data, tower, work) for member in ROWS[name]))
        return ensemble(models), stores[0], sum(minutes)
    folder, (table, photos) = work / re.sub(r'\W+', '-', name), read_dataset(data)
    recipe = read_recipe(tower=str(tower), **ROWS[name]) if ROWS[name] else read_recipe()
    seeing, store = (
        load_tower(recipe.tower or find_model('tiny'), recipe.features, recipe.image_size),
        work / f'features-{recipe.features}-{recipe.image_size}',
    )
    features = embed_images(seeing, [photos / n for n in table.image.unique()], store, photos)
    if not ROWS[name]:
        return CaptionModel.from_pretrained(find_model('tiny')), features, None
    if not (folder / 'done').exists():
        with stopwatch(folder / 'minutes.txt'):
            train_recipe(
                recipe,
                data,
                folder,
                store,
                report=lambda h: print(name, h.iloc[-1].to_dict(), flush=True),
                progress=False,
            )
        (folder / 'done').touch()
    return CaptionModel.from_pretrained(folder / 'best'), features, spent(folder / 'minutes.txt')


def judge(model, features, references, training):
    "Beam 5 on the validation photos: its scores, and the rest of its line in the table"
    began = time.perf_counter()
    said = [
        c
        for (c,) in generate_captions(
            model, features[features.rows(list(references))], GenerationOptions(beams=5)
        )
    ]
    line = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        captions_per_second=round(len(said) / (time.perf_counter() - began), 1),
    )
    scores = evaluate_captions(
        references, dict(zip(references, said)), meteor=bool(shutil.which('java'))
    )
    return scores, line | dict(
        variety=measure_variety(said, training).round(4).to_dict(), scores=scores.as_dict()
    )


def main(data, tower, work, *names):
    rows, scored, (table, _), work = [], {}, read_dataset(data), Path(work)
    references, training = (
        table[table.split == 'val'].groupby('image').caption.apply(list).to_dict(),
        table[table.split == 'train'].caption.tolist(),
    )
    for name in names or ROWS:
        model, features, minutes = learn(name, data, tower, work)
        scored[name], line = judge(model, features, references, training)
        rows.append(
            dict(name=name, command=command(ROWS[name]) if ROWS[name] else None, minutes=minutes)
            | line
        )
        print(rows[-1], flush=True)
    for row in () if names else rows:
        row['against_mlp'] = (
            compare(scored[row['name']], scored['ClipCap MLP']).loc['CIDEr'].round(4).to_dict()
        )
    if not names:
        write_text(
            Path(__file__).parent.parent / 'nbs' / 'results.json', json.dumps(rows, indent=1) + '\n'
        )


if __name__ == '__main__':
    main(*sys.argv[1:])
