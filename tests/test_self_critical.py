"Self-critical training: the reward, the samples and their gradient, resuming, what is left"

import math

import numpy as np
import pandas as pd
import pytest
import torch
from faults import fail_at_call
from pycocoevalcap.cider.cider import Cider
from small import Store, words
from small import small_model as make_model

from clipcap.base.files import ClipcapError
from clipcap.base.words import ptb_tokenize
from clipcap.methods.self_critical import (
    CiderReward,
    RewardConfig,
    blend,
    reward_loss,
    sample_tokens,
    self_critical,
    token_log_probabilities,
)
from clipcap.model import CaptionModel, MapperConfig

rng = np.random.default_rng(1)
table = pd.DataFrame(
    [
        dict(image=str(i), caption=' '.join(rng.choice(words[1:], 4)), split='train')
        for i in range(40)
        for _ in range(3)
    ]
)


short = RewardConfig(steps=5, photos=8, samples=3, rate=1e-2, max_length=6, save_every=2)


def run(model, config=short, folder=None, captions=table, store=None):
    return self_critical(model, captions, store or Store(), config, folder, progress=False)


def assert_same_weights(a, b):
    for name, weight in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], weight, rtol=0, atol=0, msg=name)


# ---- the reward
def test_reward_by_hand():
    two = pd.DataFrame(dict(image=['1', '2'], caption=['a b', 'c d']))
    reward = CiderReward(two)
    assert reward('a b', '1') == pytest.approx(7.5)  # runs of 1, 2 and 3 agree; there are none of 4
    assert reward('a b', '1', ended=False) == pytest.approx(  # of 2: only one of two
        10 * math.exp(-1 / 72) * (1 + 1 / math.sqrt(2)) / 4
    )
    assert CiderReward(two, end=False)('a b', '1') == pytest.approx(5)
    assert reward('c d', '1') == reward('', '1') == 0


def test_reward_is_what_papers_report_and_with_the_end_as_one_word_more():
    texts = ["A man's dog, running.", 'Two dogs run!', 'a cat sits on a mat', 'The "cat" sat.']
    captions = pd.DataFrame(dict(image=list('1122'), caption=texts) | dict(split='train'))
    guesses = {'1': 'two dogs are running.', '2': "the dog's cat sat on a mat"}
    for end, more in [(False, ''), (True, ' THE-END')]:
        references = {'1': texts[:2], '2': texts[2:]}
        theirs = Cider().compute_score(
            {k: [w + more for w in ptb_tokenize(some)] for k, some in references.items()},
            {k: [ptb_tokenize([one])[0] + more] for k, one in guesses.items()},
        )[1]
        reward = CiderReward(captions, end=end)
        ours = [reward(text, image) for image, text in guesses.items()]
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
        assert reward.score(list(guesses.values()), list(guesses)) == ours


def test_one_photo_has_no_reward():
    with pytest.raises(ClipcapError, match='two at least'):
        run(make_model(), captions=table[:3])


class Listening:
    "A reward that keeps what it was asked"

    def __init__(self):
        self.ended, self.texts = [], []

    def score(self, texts, images, ended):
        self.ended += ended
        self.texts += texts
        return [float(len(text)) for text in texts]


def test_only_captions_that_ended_get_the_end_token():
    reward, model = Listening(), make_model().eval()
    torch.manual_seed(0)
    features = torch.randn(20, 1, 16)
    config = RewardConfig(samples=5, max_length=3)
    reward_loss(model, features, [str(i) for i in range(20)], reward, config)
    lengths = [len(text.split()) for text in reward.texts]
    assert {True, False} == set(reward.ended)
    for length, ended in zip(lengths, reward.ended, strict=True):
        assert (length < 3) == ended


# ---- whose samples they are
def test_samples_come_from_the_distribution_that_gets_the_gradient():
    "How often each pair of tokens is sampled, and how likely the loss holds it to be"
    model = make_model().eval()
    with torch.no_grad():
        model.language.lm_head.weight.mul_(8)  # far from uniform
        prefix = model.mapper(torch.ones(1, 1, 16))
        torch.manual_seed(0)
        ids, mask = sample_tokens(model, prefix, 4000, 2)
        log_p = token_log_probabilities(model, prefix.expand(4000, -1, -1), ids, mask)
    likely = (log_p * mask).sum(1).exp()
    pairs = pd.DataFrame(dict(pair=list(map(tuple, (ids * mask).tolist())), p=likely.tolist()))
    found = pairs.groupby('pair').agg(p=('p', 'first'), share=('p', lambda some: len(some) / 4000))
    assert found.p.max() > 0.1
    noise = np.sqrt(found.p * (1 - found.p) / 4000)
    assert ((found.share - found.p).abs() < 5 * noise + 1e-3).all()


def test_one_dropout_mask_for_samples_and_gradient():
    model = make_model(0.5)
    model.eval()
    model.mapper.dropout.train()
    prefixes = []
    model.mapper.register_forward_hook(lambda module, given, prefix: prefixes.append(prefix))
    seen = []
    forward = model.language.forward

    def listening(*args, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            seen.append(inputs_embeds[:, :2].detach().clone())
        return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

    model.language.forward = listening
    config = RewardConfig(samples=3, max_length=4)
    reward_loss(model, torch.randn(4, 1, 16), list('0123'), Listening(), config)
    assert len(prefixes) == 1
    assert len(seen) >= 2  # while sampling, and for the gradient
    for prefix in seen:
        captions = len(prefix) // 4
        torch.testing.assert_close(prefix, prefixes[0].detach().repeat_interleave(captions, 0))


@pytest.mark.parametrize(
    'stored',
    [
        dict(temperature=0.1),
        dict(repetition_penalty=5.0),
        dict(top_k=1),
        dict(top_p=0.2),
        dict(suppress_tokens=[1, 2, 3]),
        dict(no_repeat_ngram_size=1, min_new_tokens=5),
        dict(num_beams=3),
    ],
)
def test_decoding_settings_of_the_language_model_do_not_leak(stored):
    plain, strange = make_model().eval(), make_model().eval()
    for name, value in stored.items():
        setattr(strange.language.generation_config, name, value)
    sampled = []
    for model in plain, strange:
        torch.manual_seed(0)
        with torch.no_grad():
            prefix = model.mapper(torch.ones(3, 1, 16))
        sampled.append(sample_tokens(model, prefix, 4, 6)[0].tolist())
    assert sampled[0] == sampled[1]
    for name, value in stored.items():  # and they are still there afterwards
        assert getattr(strange.language.generation_config, name) == value


def test_leave_one_out_by_hand():
    "The loss is minus the mean over tokens of (reward - mean of the others) * log-probability"
    model, config = make_model().eval(), RewardConfig(samples=3, max_length=4)
    features, reward = torch.randn(2, 1, 16), Listening()
    torch.manual_seed(3)
    loss, mean = reward_loss(model, features, ['0', '1'], reward, config)
    torch.manual_seed(3)
    prefix = model.mapper(features)
    ids, mask = sample_tokens(model, prefix, 3, 4)
    rewards = [float(len(text)) for text in reward.texts]
    total = 0.0
    log_p = token_log_probabilities(model, prefix.repeat_interleave(3, 0), ids, mask)
    for i in range(6):
        others = [rewards[j] for j in range(6) if j // 3 == i // 3 and j != i]
        total -= (rewards[i] - sum(others) / 2) * (log_p[i] * mask[i]).sum()
    torch.testing.assert_close(loss, total / mask.sum())
    assert mean == pytest.approx(np.mean(rewards))


# ---- the run
def test_rates_of_their_own_and_dropout():
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run(model, RewardConfig(**vars(short) | dict(rate=0.0, language_rate=1e-2, dropout=0.5)))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith('language.') for name in moved)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_everything_learns(precision):
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run(model, RewardConfig(**vars(short) | dict(precision=precision)))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in still if 'wpe' not in name}


class Stop(Exception):
    pass


def stop_at(monkeypatch, step, fault=Stop):
    "Let the reward fail within a step, from 0"
    fail_at_call(monkeypatch, CiderReward, 'score', step, fault)


@pytest.mark.parametrize('stops', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_the_model_is_given_back_without_dropout(stops, training, monkeypatch):
    model = make_model(0.3).train(training)
    config = RewardConfig(**vars(short) | dict(dropout=0.6))
    if stops:
        stop_at(monkeypatch, 2)
        with pytest.raises(Stop):
            run(model, config)
    else:
        run(model, config)
    assert model.mapper.dropout.p == 0.3
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize('step', [0, 1, 3, 4])
def test_a_run_goes_on_where_it_was_killed(step, tmp_path, monkeypatch):
    unbroken, killed, again = make_model(0.3), make_model(0.3), make_model(0.3)
    rewards = run(unbroken)
    stop_at(monkeypatch, step, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(killed, folder=tmp_path / 'run')
    monkeypatch.undo()
    assert run(again, folder=tmp_path / 'run') == rewards and len(rewards) == short.steps
    assert_same_weights(again, unbroken)
    finished = make_model(0.3)
    assert run(finished, folder=tmp_path / 'run') == rewards  # nothing left to do
    assert_same_weights(finished, unbroken)


def test_other_settings_or_data_are_refused(tmp_path):
    run(make_model(), folder=tmp_path / 'run')
    other_words = table.assign(caption=table.caption.str.replace('a', 'b'))
    others = [
        dict(config=RewardConfig(**vars(short) | dict(samples=4))),
        dict(config=RewardConfig(**vars(short) | dict(steps=9))),
        dict(captions=other_words),
        dict(captions=table[:90]),
        dict(store=Store(1)),
    ]
    for other in others:
        with pytest.raises(ClipcapError, match='run.*otherwise'):
            run(make_model(), folder=tmp_path / 'run', **other)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(samples=1),
        dict(steps=0),
        dict(photos=0),
        dict(rate=math.inf),
        dict(rate=math.nan),
        dict(rate=-1.0),
        dict(language_rate=math.inf),
        dict(dropout=1.0),
        dict(dropout=math.nan),
        dict(max_length=0),
        dict(clip=math.inf),
        dict(precision='int8'),
        dict(seed=-1),
    ],
)
def test_absurd_settings_are_refused(wrong):
    with pytest.raises(ClipcapError, match=f'{next(iter(wrong))} must be'):
        RewardConfig(**wrong)


@pytest.mark.parametrize('where', ['features', 'language', 'mapper'])
def test_what_is_not_finite_ends_the_run_in_one_line(where, tmp_path):
    store, model = Store(), make_model()
    with torch.no_grad():
        if where == 'features':
            store.features[::2] = np.inf
        elif where == 'language':
            model.language.lm_head.weight[2, 2] = np.nan
        else:
            next(model.mapper.parameters()).fill_(np.nan)
    with pytest.raises(ClipcapError, match='step|finite'):
        run(model, folder=tmp_path / 'run', store=store)
    assert not (tmp_path / 'run' / 'last.safetensors').exists()


def test_a_blend_lies_between():
    before, after = make_model(), make_model()
    with torch.no_grad():
        for p in after.parameters():
            p.add_(1)
    for share in (0, 0.25, 1):
        middle = blend(before, after, share)
        for a, b in zip(before.parameters(), middle.parameters(), strict=True):
            torch.testing.assert_close(b, a + share)


@pytest.mark.parametrize('image_every_step', [False, True])
def test_an_lstm_is_trained_the_same_way(image_every_step):
    from clipcap.methods.lstm import Vocabulary, make_lstm, word_tokenizer

    vocabulary = Vocabulary.from_captions(table.caption.tolist(), threshold=1)
    torch.manual_seed(0)
    tokenizer = word_tokenizer(vocabulary)
    language = make_lstm(tokenizer, image_every_step)
    model = CaptionModel(
        language, tokenizer, MapperConfig('linear', feature_dim=16, prefix_length=1)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    rewards = run(model)
    assert len(rewards) == short.steps and np.isfinite(rewards).all()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
