import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clipcap.base.captions import read_dataset
from clipcap.base.files import ClipcapError, write_json
from clipcap.base.scenes import draw_dataset

root = Path(__file__).resolve().parent.parent
flickr8k = root.parent / 'shared' / 'data' / 'flickr8k'


def load_results():
    spec = importlib.util.spec_from_file_location('results', root / 'benchmarks' / 'results.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load_results()


def a_run(name='prefix MLP', seed=0, cider=(0.2, 0.4, 0.6, 0.8), **other):
    "What the file of one run holds"
    mean = float(np.mean(cider))
    scores = dict.fromkeys(results.METRICS, mean)
    scores['intervals'] = dict.fromkeys(results.METRICS, [mean - 0.1, mean + 0.1])
    is_ensemble = isinstance(results.ROWS[name], tuple)
    return (
        dict(
            row=name,
            seed=seed,
            protocol=results.PROTOCOL,
            data=dict(train=5000, tune=1000, dev=1000, digest='0' * 16),
            command=results.command(name, None if is_ensemble else seed),
            parameters=1000,
            minutes=2.5,
            chosen=dict(epoch=4, epochs=6, tune_greedy=0.4),
            versions=dict(clipcap='2', torch='2.6'),
            scores=scores,
            variety=dict(vocabulary=100.0),
            cider_of_photos=' '.join(map(str, cider)),
        )
        | other
    )


def write_runs(folder, *runs):
    for number, run in enumerate(runs):
        write_json(folder / f'{number}.json', run)
    return results.read_results(folder)


# ---- what is chosen on which photos
def test_tune_is_drawn_alike_in_any_order_and_other_by_another_seed():
    photos = [f'{number}.jpg' for number in range(50)]
    drawn = results.draw_tune(photos, 10)
    assert drawn == results.draw_tune(photos[::-1] * 5, 10) == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn != results.draw_tune(photos, 10, seed=1)


def test_the_listed_tune_photos_are_what_the_seed_gives():
    listed = results.read_tune()
    assert len(set(listed)) == 1000
    if not flickr8k.is_dir():
        pytest.skip(f'Flickr8k is not here: {flickr8k}')
    table, _ = read_dataset(flickr8k)
    assert listed == results.draw_tune(table[table.split == 'train'].image)


def test_runs_see_neither_dev_photos_nor_learn_from_tune():
    table = pd.DataFrame(
        dict(
            image=['a', 'a', 'b', 'c', 'd'],
            caption=['one', 'two', 'three', 'four', 'five'],
            split=['train', 'train', 'train', 'val', 'test'],
        )
    )
    seen = results.split_tune(table, ['b'])
    assert dict(zip(seen.image, seen.split, strict=True)) == {'a': 'train', 'b': 'val'}
    assert len(seen) == 3
    with pytest.raises(ClipcapError, match='c is no training photo'):
        results.split_tune(table, ['b', 'c'])


def test_a_control_differs_in_one_thing():
    together = [{'mapper', 'mapper_layers', 'mapper_heads'}, {'tower', 'image_size'}]
    for name, control in results.CONTROLS.items():
        if isinstance(results.ROWS[name], tuple):
            assert results.ROWS[name][0] == control
            continue
        ours, theirs = results.ROWS[name], results.ROWS[control]
        changed = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
        assert len(changed) == 1 or changed in together, (name, changed)


# ---- the table
def test_the_table_is_made_of_the_row_files(tmp_path):
    found = write_runs(
        tmp_path,
        a_run(seed=0, cider=[0.2, 0.4, 0.6, 0.8]),
        a_run(seed=2, cider=[0.4, 0.6, 0.8, 1.0]),
        a_run('prefix MLP, label smoothing', cider=[0.5, 0.7, 0.9, 1.1]),
    )
    table = results.make_table(found)
    mlp, smoothed = table['rows']
    assert mlp['name'] == 'prefix MLP' and mlp['seeds'] == [0, 2]
    assert mlp['scores']['CIDEr']['mean'] == pytest.approx(0.6)
    assert mlp['scores']['CIDEr']['spread'] == pytest.approx(0.14142)
    assert mlp['scores']['CIDEr']['low'] == pytest.approx(0.5)
    assert smoothed['scores']['CIDEr']['spread'] is None
    assert '--seed' not in mlp['command'] and '--label-smoothing 0.1' in smoothed['command']
    assert table['luck_of_seeds'] == pytest.approx(0.14142)
    lacking = {row['name']: row['seeds'] for row in table['missing']}
    assert lacking['prefix MLP'] == [1]
    assert lacking['prefix MLP, label smoothing'] == [1, 2]
    assert lacking['Show and Tell'] == [0, 1, 2]
    assert lacking['ensemble of three seeds'] == [0]
    json.dumps(table, allow_nan=False)


def test_a_difference_counts_photos_and_seeds():
    ours = [a_run(cider=[0.3, 0.5, 0.7, 0.9])]
    theirs = [a_run(cider=[0.2, 0.4, 0.6, 0.8])]
    # each photo gains the same: without seeds there is no doubt left
    alone = results.difference(ours, theirs, None)
    assert alone['low'] == pytest.approx(0.1) and alone['high'] == pytest.approx(0.1)
    one_seed = results.difference(ours, theirs, 0.02)
    assert one_seed['difference'] == pytest.approx(0.1)
    assert one_seed['high'] - 0.1 == pytest.approx(1.96 * 0.02 * np.sqrt(2))
    three = results.difference(ours * 3, theirs * 3, 0.02)
    assert three['high'] - 0.1 == pytest.approx(1.96 * 0.02 * np.sqrt(2 / 3))


def test_no_row_yet_is_a_table_of_what_is_missing(tmp_path):
    table = results.make_table(results.read_results(tmp_path))
    assert table['rows'] == [] and table['luck_of_seeds'] is None
    assert [row['name'] for row in table['missing']] == list(results.ROWS)


@pytest.mark.parametrize(
    'other, said',
    [
        (dict(protocol='dev 0'), "protocol 'dev 0'"),
        (dict(command='clipcap train DATA --epochs 3'), 'another command'),
        (dict(data=dict(train=6000, tune=0, dev=1000, digest='1' * 16)), 'other photos'),
        (dict(row='a row of before'), "no row 'a row of before'"),
        (dict(minutes='two'), 'minutes'),
    ],
)
def test_results_of_another_protocol_are_refused(tmp_path, other, said):
    with pytest.raises(ClipcapError, match=said):
        write_runs(tmp_path, a_run(), a_run(seed=1) | other)


def test_the_stored_table_is_that_of_the_stored_rows():
    if not results.read_results():
        pytest.skip('no run has been judged yet')
    stored = json.loads(results.table_file.read_text())
    assert stored == json.loads(json.dumps(results.make_table(results.read_results())))
    for name, runs in results.read_results().items():
        for seed, run in runs.items():
            assert json.loads(results.row_file(name, seed).read_text()) == run


# ---- a whole run
def test_a_run_is_trained_judged_and_kept(tmp_path, monkeypatch):
    data, work = tmp_path / 'scenes', tmp_path / 'work'
    draw_dataset(data, 60, seed=3, size=64)
    table, _ = read_dataset(data)
    tune = results.draw_tune(table[table.split == 'train'].image, 20)
    # METEOR takes seconds to begin
    monkeypatch.setattr(results.shutil, 'which', lambda program: None)
    small = dict(
        tower='tiny',
        preset='image-lstm',
        features='pooled',
        image_size=64,
        epochs=1,
        score_photos=20,
    )
    monkeypatch.setattr(results, 'read_tune', lambda: tune)
    monkeypatch.setattr(results, 'rows_folder', tmp_path / 'rows')
    monkeypatch.setattr(results, 'SEEDS', (0, 1))
    monkeypatch.setattr(results, 'CONTROLS', dict(rewarded='plain'))
    rows = dict(plain=small, rewarded=small | dict(reward_steps=2), both=('rewarded', (0, 1)))
    monkeypatch.setattr(results, 'ROWS', rows)

    towers = root / 'weights'
    results.train_all(data, towers, work, ['plain', 'rewarded'], [0])
    inside, _ = read_dataset(work / 'data')
    dev = set(table[table.split == 'val'].image)
    assert set(inside[inside.split == 'val'].image) == set(tune)
    assert not dev & set(inside.image)
    files = sorted(path.name for path in (tmp_path / 'rows').iterdir())
    assert files == ['plain-0.json', 'rewarded-0.json']

    # what has a result is left alone, whatever became of its run
    before = (tmp_path / 'rows' / 'plain-0.json').read_bytes()
    shutil.rmtree(work / 'data')
    results.train_all(data, towers, work, [], [0, 1])
    assert (tmp_path / 'rows' / 'plain-0.json').read_bytes() == before
    found = results.read_results(tmp_path / 'rows')
    assert {name: sorted(runs) for name, runs in found.items()} == {
        'plain': [0, 1],
        'rewarded': [0, 1],
        'both': [0],
    }
    assert found['both'][0]['parameters'] == 2 * found['plain'][0]['parameters']
    assert found['plain'][0]['data'] == dict(
        train=len(set(inside.image)) - 20,
        tune=20,
        dev=len(dev),
        digest=found['plain'][0]['data']['digest'],
    )
    assert 'shares' in found['rewarded'][0]['chosen']
    assert len(found['plain'][0]['cider_of_photos'].split()) == len(dev)
    table = results.make_table(found)
    assert not table['missing']
    assert [row['name'] for row in table['rows']] == ['plain', 'rewarded', 'both']
