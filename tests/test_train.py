"Training: killed runs, parts of a batch, several processes, half precision, and what a run leaves behind"

import json
import multiprocessing
import os
import socket
import time

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from clipcap.base.files import ClipcapError
from clipcap.methods.self_critical import CiderReward, RewardConfig, blend, self_critical
from clipcap.model import CaptionModel, MapperConfig, add_lora
from clipcap.train import TrainConfig, train

words = ['<|endoftext|>', *'abcdefghij']
spell = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
spell.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=spell, eos_token=words[0], pad_token=words[0])


class Store:
    cells, dim, fingerprint = 1, 16, 'random'
    features = np.random.default_rng(0).standard_normal((400, 1, 16)).astype(np.float16)

    def rows(self, names):
        return np.array([int(n) for n in names])

    def __getitem__(self, rows):
        return self.features[rows]


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


def fresh(dropout=0.0):
    "A small model, always the same one"
    torch.manual_seed(0)
    language = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=11,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )
    return CaptionModel(
        language, tokenizer, MapperConfig('mlp', feature_dim=16, prefix_length=2, dropout=dropout)
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


def test_sigkill_and_resume(unbroken, tmp_path):
    kills, checkpoint = 0, tmp_path / 'run' / 'last.safetensors'
    for after in (1, 4):  # once early, once a few checkpoints later
        run, seen = start(long_run, tmp_path / 'run'), set()
        while run.is_alive() and len(seen) < after:
            if checkpoint.exists():
                seen.add(checkpoint.stat().st_mtime_ns)
            time.sleep(0.005)
        kills += run.is_alive()
        run.kill()
        run.join()
    assert kills, 'the run ended before it could be killed'
    (
        tmp_path / 'run' / '.best.left'
    ).mkdir()  # as a kill leaves it while the best model is being written
    long_run(tmp_path / 'run')
    whole, resumed = weights(unbroken), weights(tmp_path / 'run')
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    losses = [
        pd.read_csv(folder / 'history.csv').drop(columns='captions_per_second')
        for folder in (unbroken, tmp_path / 'run')
    ]
    assert losses[0].equals(losses[1]) and len(losses[0]) == 3
    assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == [
        'best',
        'history.csv',
        'history.png',
        'last.safetensors',
        'settings.json',
    ]


def test_resume_is_refused_with_other_settings(tmp_path):
    learn(tmp_path)
    for other in dict(batch_size=16), dict(rate=1e-4), dict(accumulate=2):
        with pytest.raises(ClipcapError, match=next(iter(other))):
            learn(tmp_path, **other)
    settings = json.loads((tmp_path / 'settings.json').read_text())
    for new in 'accumulate', 'language_rate', 'patience', 'processes':
        del settings[new]  # a run that an earlier version began
    (tmp_path / 'settings.json').write_text(json.dumps(settings))
    assert len(learn(tmp_path)) == 1


# ---- one step, in one piece and in many
def test_accumulated_batches_are_one_large_batch(tmp_path):
    learn(tmp_path / 'one', batch_size=32)
    learn(tmp_path / 'four', batch_size=8, accumulate=4)
    assert same(weights(tmp_path / 'one'), weights(tmp_path / 'four'), 1e-4)
    learn(tmp_path / 'other', batch_size=8)
    assert not same(weights(tmp_path / 'one'), weights(tmp_path / 'other'), 1e-2)


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
        assert same(weights(tmp_path / 'one'), weights(tmp_path / name), 1e-4)
        together = pd.read_csv(tmp_path / name / 'history.csv')
        assert np.allclose(
            alone[['train_loss', 'val_loss']], together[['train_loss', 'val_loss']], atol=1e-4
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
    assert (
        history.val_loss.is_monotonic_decreasing and next(model.parameters()).dtype == torch.float32
    )
    assert (
        abs(learn(tmp_path / 'full', epochs=2).val_loss.iloc[-1] - history.val_loss.iloc[-1]) < 0.05
    )
    assert not hasattr(model, '_original_forward') and not model.training
    assert (
        model(
            torch.zeros(1, 1, 16), torch.zeros(1, 3, dtype=int), torch.ones(1, 3, dtype=int)
        ).dtype
        == torch.float32
    )


def test_lora_is_merged_when_saved_and_resumes(tmp_path):
    model = add_lora(fresh(), 4)
    frozen = model.language.get_base_model().transformer.wte.weight.clone()
    learn(tmp_path, model, rate=1e-2, epochs=2)
    assert frozen.equal(model.language.get_base_model().transformer.wte.weight)
    assert all(
        'lora' in k or 'mapper' in k or k.startswith(('optimizer', 'dice'))
        for k in weights(tmp_path)
    )
    saved = CaptionModel.from_pretrained(tmp_path / 'best')
    assert type(saved.language) is GPT2LMHeadModel and not list(
        (tmp_path / 'best').rglob('adapter*')
    )
    batch = torch.randn(3, 1, 16), torch.randint(1, 11, (3, 5)), torch.ones(3, 5, dtype=int)
    torch.testing.assert_close(saved(*batch), model(*batch), atol=1e-4, rtol=1e-4)
    again = add_lora(fresh(), 4)
    learn(tmp_path, again, rate=1e-2, epochs=2)  # finished: only the checkpoint is read
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
    assert not list(tmp_path.with_name('none').rglob('events*'))


# ---- whole captions
def test_rates_of_their_own_and_dropout_in_self_critical_steps():
    model = fresh()
    before = {name: p.clone() for name, p in model.named_parameters()}
    self_critical(
        model,
        table[:600],
        Store(),
        RewardConfig(
            steps=3, photos=4, samples=3, rate=0, language_rate=1e-2, dropout=0.5, max_length=6
        ),
        progress=False,
    )
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert (
        moved
        and all(name.startswith('language.') for name in moved)
        and model.mapper.dropout.p == model.config.dropout
    )


def test_self_critical_steps_go_on_where_they_were_killed(tmp_path, monkeypatch):
    config = RewardConfig(steps=7, photos=8, samples=3, rate=1e-2, max_length=6, save_every=2)
    praise = lambda model, checkpoint: self_critical(
        model, table[:600], Store(), config, checkpoint, progress=False
    )
    unbroken, broken = fresh(0.3), fresh(0.3)
    rewards = praise(unbroken, None)
    real, calls = CiderReward.__call__, iter(range(10**6))

    def killed(self, text, image):
        if next(calls) == 8 * 3 * 5:
            raise KeyboardInterrupt  # within the sixth step, one after the last checkpoint
        return real(self, text, image)

    monkeypatch.setattr(CiderReward, '__call__', killed)
    with pytest.raises(KeyboardInterrupt):
        praise(broken, tmp_path / 'run.safetensors')
    monkeypatch.undo()
    again = fresh(0.3)
    assert praise(again, tmp_path / 'run.safetensors') == rewards and len(rewards) == 7
    for name, w in unbroken.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], w, rtol=0, atol=0, msg=name)


def test_a_blend_lies_between():
    before, after = fresh(), fresh()
    with torch.no_grad():
        [p.add_(1) for p in after.parameters()]
    for share in (0, 0.25, 1):
        middle = blend(before, after, share)
        for a, b in zip(before.parameters(), middle.parameters()):
            torch.testing.assert_close(b, a + share)
