"Training: killed runs, parts of a batch, several processes, half precision, what is reported"

import json
import multiprocessing
import os
import shutil
import socket
import time

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from small import Store, tokenizer, words
from small import small_model as fresh
from transformers import GPT2LMHeadModel

import clipcap.base.loop
from clipcap.base.files import ClipcapError, lock
from clipcap.base.loop import data_fingerprint, run_training
from clipcap.base.store import HASH, SIZE
from clipcap.model import CaptionModel, add_lora
from clipcap.train import TokenisedCaptions, TrainConfig, train, validation_loss

rng = np.random.default_rng(1)
table = pd.DataFrame(
    [
        dict(
            image=str(i),
            caption=' '.join(rng.choice(words[1:], rng.integers(2, 9))),
            split='val' if i % 10 == 0 else 'train',
        )
        for i in range(400)
        for _ in range(5)
    ]
)


def learn(folder, model=None, **config):
    "Train a fresh model on a part of the table: its history"
    return train(
        model or fresh(),
        table[:600],
        Store(),
        TrainConfig(**dict(epochs=1, batch_size=32) | config),
        folder,
        progress=False,
    )


def weights(folder):
    return load_file(folder / 'last.safetensors')


def same(a, b, atol=0.0):
    "Have two runs the same weights (and not only the same names)?"
    assert a.keys() == b.keys()
    return (
        max(float((a[k].float() - b[k].float()).abs().max()) for k in a if k.startswith('model.'))
        <= atol
    )


processes = multiprocessing.get_context(
    'forkserver'
)  # each begins as this module is after its imports
processes.set_forkserver_preload([__name__])


def start(target, *arguments):
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


# ---- killed and started again
@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    long_run(folder)
    return folder


def long_run(folder):
    torch.set_num_threads(1)
    train(
        fresh(0.1),
        table,
        Store(),
        TrainConfig(epochs=3, batch_size=32, save_every=7),
        folder,
        progress=False,
    )


def slow_run(folder):
    "The long run, a little slower, so that it can be killed anywhere"
    forward = CaptionModel.forward

    def slow(self, *arguments):
        time.sleep(0.01)
        return forward(self, *arguments)

    CaptionModel.forward = slow
    long_run(folder)


def same_run(one, other):
    "Are weights, the optimiser's memory and the history of two runs the same, to the last digit?"
    whole, resumed = weights(one), weights(other)
    assert whole.keys() == resumed.keys()
    for name, t in whole.items():
        assert t.equal(resumed[name]), name
    losses = [
        pd.read_csv(folder / 'history.csv').drop(columns='captions_per_second')
        for folder in (one, other)
    ]
    assert losses[0].equals(losses[1]) and len(losses[0]) == 3


def test_sigkill_and_resume(unbroken, tmp_path):
    folder, rng = tmp_path / 'run', np.random.default_rng(7)
    checkpoint = folder / 'last.safetensors'
    kills = 0
    for after in (0, 1, 3):  # before the first checkpoint, and a few later
        run, seen = start(slow_run, folder), set()
        while run.is_alive() and len(seen) < after:
            if checkpoint.exists():
                seen.add(checkpoint.stat().st_mtime_ns)
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.1)))
        kills += run.is_alive()
        run.kill()
        run.join()
    assert kills, 'the run ended before it could be killed'
    long_run(folder)
    same_run(unbroken, folder)
    names = ['best', 'history.csv', 'history.png', 'last.safetensors', 'settings.json']
    assert sorted(p.name for p in folder.iterdir()) == names
    assert not list(tmp_path.glob('.*'))  # neither locks nor halves of folders


@pytest.mark.parametrize('place', ['save_checkpoint', 'keep', 'history'])
def test_killed_while_an_epoch_is_closed(unbroken, tmp_path, monkeypatch, place):
    "At any moment between the last step of an epoch and its checkpoint"

    class Killed(BaseException):
        pass

    calls = iter(range(100))

    def fail(*arguments, **named):
        if next(calls) == 1:
            raise Killed
        return real(*arguments, **named)

    if place == 'keep':
        real = CaptionModel.save_pretrained
        monkeypatch.setattr(CaptionModel, 'save_pretrained', fail)
    else:
        name = {'save_checkpoint': 'save_checkpoint', 'history': 'write_file'}[place]
        real = getattr(clipcap.base.loop, name)
        monkeypatch.setattr(clipcap.base.loop, name, fail)
    with pytest.raises(Killed):
        long_run(tmp_path / 'run')
    monkeypatch.undo()
    long_run(tmp_path / 'run')
    same_run(unbroken, tmp_path / 'run')


def test_resume_is_refused_with_other_settings(tmp_path):
    learn(tmp_path)
    for other in dict(batch_size=16), dict(rate=1e-4), dict(accumulate=2):
        with pytest.raises(ClipcapError, match=next(iter(other))):
            learn(tmp_path, **other)
    assert len(learn(tmp_path, save_every=3)) == 1  # changes nothing in what is learned


def test_resume_is_refused_with_other_data(tmp_path):
    def run(table, store):
        config = TrainConfig(epochs=1, batch_size=32)
        return train(fresh(), table, store, config, tmp_path, progress=False)

    some = table[:600]
    run(some, Store())
    for other in (
        some.assign(caption=some.caption.iloc[::-1].tolist()),  # as many, and others
        some.assign(split=some.split.replace('val', 'test')),
        some[5:],
    ):
        with pytest.raises(ClipcapError, match='captions'):
            run(other, Store())
    other = Store()
    other.features = Store().features + np.float16(1)
    with pytest.raises(ClipcapError, match='other features'):
        run(some, other)
    assert len(run(some, Store())) == 1
    assert data_fingerprint(some) == data_fingerprint(some.reset_index(drop=True))


def test_two_runs_in_one_folder(tmp_path):
    with lock(tmp_path / 'run'):
        other = start(learn, tmp_path / 'run')
        other.join(300)
        assert other.exitcode == 1 and not (tmp_path / 'run').exists()


def test_a_deleted_best_is_made_again_or_said(tmp_path):
    learn(tmp_path, epochs=2, batch_size=64)
    before = load_file(tmp_path / 'best' / 'model.safetensors')
    shutil.rmtree(tmp_path / 'best')
    model = fresh()
    history = learn(tmp_path, model, epochs=2, batch_size=64)
    if history.val_loss.idxmin() == 1:
        again = load_file(tmp_path / 'best' / 'model.safetensors')
        assert all(t.equal(again[name]) for name, t in before.items())
    scores = iter([0.9, 0.1])
    config = TrainConfig(epochs=2, batch_size=64)

    def scored():
        return train(
            fresh(),
            table[:600],
            Store(),
            config,
            tmp_path / 'scored',
            progress=False,
            score=lambda model: next(scores),
        )

    scored()
    shutil.rmtree(tmp_path / 'scored' / 'best')
    with pytest.raises(ClipcapError, match='best/ is gone'):
        scored()


def test_files_have_the_rights_that_umask_gives(tmp_path):
    learn(tmp_path / 'run')
    (tmp_path / 'other').write_text('')
    mode = (tmp_path / 'other').stat().st_mode
    for file in (tmp_path / 'run').rglob('*'):
        assert file.is_dir() or file.stat().st_mode == mode, file


# ---- what is reported
def test_the_training_loss_is_the_mean_over_the_epochs_tokens(tmp_path):
    "With a rate of nearly nothing: that of the model as it was"
    model = fresh()
    history = learn(tmp_path, model, rate=1e-12, weight_decay=0.0)
    captions = TokenisedCaptions(table[:600].query('split == "train"'), Store(), tokenizer)
    assert history.train_loss.item() == pytest.approx(validation_loss(fresh_as(model), captions))


def fresh_as(model):
    "A fresh model that standardises as another one does"
    other = fresh()
    other.mapper.mean.copy_(model.mapper.mean)
    other.mapper.std.copy_(model.mapper.std)
    return other


def test_without_a_validation_split_there_is_no_validation_loss(tmp_path):
    with pytest.warns(UserWarning, match='no validation loss'):
        history = train(
            fresh(),
            table[:300].assign(split='train'),
            Store(),
            TrainConfig(epochs=2, batch_size=64),
            tmp_path,
            progress=False,
        )
    assert 'val_loss' not in history and len(history) == 2
    kept = CaptionModel.from_pretrained(tmp_path / 'best').mapper.state_dict()
    last = {name: t for name, t in weights(tmp_path).items() if name.startswith('model.mapper.')}
    for name, t in last.items():
        assert t.equal(kept[name.removeprefix('model.mapper.')])  # the last epoch's


# ---- what is no number
class Known(Store):
    "Features whose photos are known by their bytes"

    def __init__(self):
        super().__init__()
        self.identities = np.arange(1600).reshape(400, 4)


def test_each_photo_s_own_bytes_count(tmp_path):
    some = table[:600]  # photos 0 to 119
    plain = data_fingerprint(some, Known())
    for row, column, counts in (
        (77, SIZE, True),
        (77, HASH, True),
        (77, 2, False),
        (300, 0, False),
    ):
        other = Known()
        other.identities[row, column] += 1
        changed = [k for k, v in data_fingerprint(some, other).items() if v != plain[k]]
        assert changed == (['photos_hash'] if counts else [])
    other = Known()
    other.rows = lambda names: np.array([int(n) - 1 for n in names]) % 400
    assert data_fingerprint(some, other)['photos_hash'] != plain['photos_hash']

    def run(store):
        config = TrainConfig(epochs=1, batch_size=32)
        return train(fresh(), some, store, config, tmp_path, progress=False)

    run(Store())  # a checkpoint that does not know the bytes, as of older versions
    assert len(run(Known())) == 1
    other = Known()
    other.features = other.features + np.float16(1)
    with pytest.raises(ClipcapError, match='features'):
        run(other)
    shutil.rmtree(tmp_path)
    run(Known())
    other = Known()
    other.identities[77, HASH] += 1
    with pytest.raises(ClipcapError, match='other photos'):
        run(other)


class Broken(CaptionModel):
    "A caption model whose loss is no number from some call on"

    left = 0

    def forward(self, *arguments):
        self.left -= 1
        loss = super().forward(*arguments)
        return loss * float('nan') if self.left < 0 else loss


@pytest.mark.parametrize('calls', [0, 5, 17])
def test_nan_ends_the_run_in_one_line(tmp_path, calls):
    "At the first step, at a later one (14 an epoch), and in the validation"
    model = fresh()
    model.__class__ = Broken
    model.left = calls
    with pytest.raises(ClipcapError, match=r'nan (at step|after epoch)') as fault:
        learn(tmp_path, model, epochs=2)
    assert len(str(fault.value).splitlines()) == 1
    assert not (tmp_path / 'best').exists()


def test_a_score_that_is_nan_is_never_the_best(tmp_path):
    with pytest.raises(ClipcapError, match='score is nan after epoch 1'):
        train(
            fresh(),
            table[:600],
            Store(),
            TrainConfig(epochs=2),
            tmp_path,
            progress=False,
            score=lambda model: float('nan'),
        )
    assert not (tmp_path / 'best').exists()


def test_features_that_are_no_numbers(tmp_path):
    store = Store()
    store.features[3] = np.nan
    with pytest.raises(ClipcapError, match='not finite'):
        train(fresh(), table[:600], store, TrainConfig(epochs=1), tmp_path, progress=False)


def test_one_photo_can_be_learned_by_heart(tmp_path):
    one = table[table.image == '1'].assign(split='train')
    config = TrainConfig(epochs=30, batch_size=8, rate=1e-2)
    with pytest.warns(UserWarning, match='validation'):
        history = train(fresh(), one, Store(), config, tmp_path, progress=False)
    assert np.isfinite(history.train_loss).all()
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]


def test_a_gradient_that_is_not_finite(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.Module()
    model.weight = weight
    with pytest.raises(ClipcapError, match='gradient is not finite at step 1 of 1'):
        run_training(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda epoch: [np.arange(4)],
            lambda part, run: run.model.weight.abs().sqrt().sum(),
            TrainConfig(),
            tmp_path,
            progress=False,
        )
    assert weight.item() == 0


def test_clip_0_clips_nothing(tmp_path):
    def moved(**config):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        run_training(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            lambda epoch: [np.arange(4)],
            lambda part, run: 100 * run.model(torch.ones(1, 1)).sum(),
            TrainConfig(warmup=0.0, rate=1.0, **config),
            tmp_path / str(config),
            progress=False,
        )
        return -model.weight.item()

    assert moved(clip=1.0) == pytest.approx(1.0)
    assert moved(clip=0.0) == pytest.approx(100.0)


# ---- one step, in one piece and in many
def test_accumulated_batches_are_one_large_batch(tmp_path):
    learn(tmp_path / 'one', batch_size=32)
    learn(tmp_path / 'four', batch_size=8, accumulate=4)
    one, four = (pd.read_csv(tmp_path / name / 'history.csv') for name in ('one', 'four'))
    columns = ['train_loss', 'val_loss']
    assert np.allclose(one[columns], four[columns], atol=1e-3)
    assert same(weights(tmp_path / 'one'), weights(tmp_path / 'four'), 2e-3)


def one_of_two(rank, port, folder, config):
    "What torchrun starts"
    os.environ |= dict(
        RANK=f'{rank}',
        LOCAL_RANK=f'{rank}',
        WORLD_SIZE='2',
        LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=f'{port}',
        OMP_NUM_THREADS='1',
    )
    learn(folder, **config)
    PartialState().destroy_process_group()


def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    alone = learn(tmp_path / 'one', batch_size=32)
    for name, config in dict(
        two=dict(batch_size=16), parts=dict(batch_size=8, accumulate=2)
    ).items():
        with socket.create_server(('127.0.0.1', 0)) as free:
            port = free.getsockname()[1]
        pair = [start(one_of_two, rank, port, tmp_path / name, config) for rank in (0, 1)]
        for process in pair:
            process.join(900)
        assert [process.exitcode for process in pair] == [0, 0]
        assert json.loads((tmp_path / name / 'settings.json').read_text())['processes'] == 2
        assert same(weights(tmp_path / 'one'), weights(tmp_path / name), 2e-3)
        together = pd.read_csv(tmp_path / name / 'history.csv')
        assert np.allclose(
            alone[['train_loss', 'val_loss']], together[['train_loss', 'val_loss']], atol=1e-3
        )
        CaptionModel.from_pretrained(tmp_path / name / 'best')
    with pytest.raises(ClipcapError, match='processes'):
        learn(tmp_path / 'two', batch_size=16)


# ---- how the weights move
def test_rates_of_mapper_and_language_model(tmp_path):
    before, model = fresh().state_dict(), fresh()
    learn(tmp_path, model, language_rate=0.0, weight_decay=0.0)
    moved = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert moved and all(k.startswith('mapper.') for k in moved)


def test_half_precision_trains_and_gives_the_model_back(tmp_path):
    model = fresh()
    history = learn(tmp_path, model, precision='bf16', epochs=2)
    assert history.val_loss.iloc[-1] < history.val_loss.iloc[0]
    assert next(model.parameters()).dtype == torch.float32
    full = learn(tmp_path / 'full', epochs=2)
    assert abs(full.val_loss.iloc[-1] - history.val_loss.iloc[-1]) < 0.1
    assert not model.training
    assert (
        model(
            torch.zeros(1, 1, 16), torch.zeros(1, 3, dtype=int), torch.ones(1, 3, dtype=int)
        ).dtype
        == torch.float32
    )


def test_lora_is_merged_when_saved_and_resumes(tmp_path):
    model = add_lora(fresh(), 4)
    frozen = model.language.get_base_model().transformer.wte.weight.clone()
    learn(tmp_path, model, rate=1e-2)  # one epoch: the best is the last
    assert frozen.equal(model.language.get_base_model().transformer.wte.weight)
    assert all(
        'lora' in k or 'mapper' in k or k.startswith(('optimizer', 'random'))
        for k in weights(tmp_path)
    )
    saved = CaptionModel.from_pretrained(tmp_path / 'best')
    assert type(saved.language) is GPT2LMHeadModel and not list(
        (tmp_path / 'best').rglob('adapter*')
    )
    batch = torch.randn(3, 1, 16), torch.randint(1, 11, (3, 5)), torch.ones(3, 5, dtype=int)
    torch.testing.assert_close(saved(*batch), model(*batch), atol=1e-4, rtol=1e-4)
    again = add_lora(fresh(), 4)
    learn(tmp_path, again, rate=1e-2)  # finished: only the checkpoint is read
    torch.testing.assert_close(again(*batch), model(*batch))


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        fresh(),
        table[:600],
        Store(),
        TrainConfig(epochs=1, batch_size=64),
        tmp_path,
        progress=False,
        tracker='tensorboard',
    )
    log = EventAccumulator(str(next(tmp_path.rglob('events*')).parent))
    log.Reload()
    assert {'loss', 'rate', 'val_loss'} <= set(log.Tags()['scalars']) and len(
        log.Scalars('loss')
    ) == 9
