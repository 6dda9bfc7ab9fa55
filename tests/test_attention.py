"Attention: known answers, at once and step by step, batches, beams, folders, maps; the shell"

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import clipcap, complaint
from PIL import Image
from small import assert_batches_change_no_caption

from clipcap.base.files import ClipcapError
from clipcap.base.scenes import draw_dataset
from clipcap.generate import GenerationOptions, generate_captions, start_decoding
from clipcap.image import Captioner, load_tower
from clipcap.methods.attention import (
    AttentionLanguage,
    SoftAttention,
    attention_maps,
    doubly_stochastic_loss,
    draw_attention,
    make_attention_lstm,
)
from clipcap.methods.lstm import Vocabulary, word_tokenizer
from clipcap.methods.self_critical import token_log_probabilities
from clipcap.model import CaptionModel, MapperConfig, token_logits
from clipcap.tools.recipe import begin_model, read_recipe, train_recipe

words = word_tokenizer(Vocabulary(tuple('abcdefgh')))


def make(seed=0, cells=9, **settings):
    "A small random captioner with decided opinions"
    torch.manual_seed(seed)
    settings = dict(hidden_size=16, initializer_range=1.0) | settings
    language = make_attention_lstm(words, **settings)
    model = CaptionModel(language, words, MapperConfig('linear', feature_dim=6, cells=cells))
    with torch.no_grad():
        model.mapper.net.net.weight.mul_(4)
    return model.eval()


def photos(n, cells=9, seed=1):
    return torch.randn(n, cells, 6, generator=torch.Generator().manual_seed(seed))


def some_ids(rows=3, tokens=7):
    return torch.randint(4, 12, (rows, tokens), generator=torch.Generator().manual_seed(0))


def best_captions(model, features, **options):
    found = generate_captions(model, features, GenerationOptions(**options))
    return [best for (best,) in found]


# ---- attention
def test_known_answer():
    attention = SoftAttention(1)
    with torch.no_grad():
        attention.key.weight.fill_(1)
        attention.key.bias.fill_(0)
        attention.query.weight.fill_(1)
        attention.score.weight.fill_(2)
    places = torch.tensor([[[1.0], [-1.0]]])
    seen, weights = attention(places, attention.key(places), torch.zeros(1, 1))
    first = 1 / (1 + math.exp(-4 * math.tanh(1)))  # softmax of 2 tanh(1) and -2 tanh(1)
    assert weights[0].tolist() == pytest.approx([first, 1 - first], abs=1e-6)
    assert seen.item() == pytest.approx(2 * first - 1, abs=1e-6)
    _, turned = attention(places, attention.key(places), torch.full((1, 1), 1.0))
    first = 1 / (1 + math.exp(-2 * math.tanh(2)))  # keys 2 and 0
    assert turned[0, 0].item() == pytest.approx(first, abs=1e-6)


def test_weights_sum_to_one():
    model = make()
    weights = model.language.read_captions(model.mapper(photos(3)), some_ids()).attentions
    assert weights.shape == (3, 7, 9)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))


def test_order_of_the_places_changes_nothing():
    model, order = make(), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    prefix = model.mapper(photos(3))
    straight = model.language.read_captions(prefix, some_ids())
    mixed = model.language.read_captions(prefix[:, order], some_ids())
    torch.testing.assert_close(mixed.logits, straight.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed.attentions, straight.attentions[..., order])


def test_doubly_stochastic_by_hand():
    weights = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [9.0, 9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])  # sums 1, 0.5, 0.5 over the two tokens that count
    assert doubly_stochastic_loss(weights, mask).item() == pytest.approx(0.5 / 2)
    each_once = torch.eye(3)[None]
    assert doubly_stochastic_loss(each_once, torch.ones(1, 3)).item() == 0


def test_the_term_is_in_the_training_loss_alone():
    model = make(dropout=0.0)
    ids, mask = some_ids(), torch.ones(3, 7, dtype=torch.long)
    plain = model(photos(3), ids, mask)
    output = model.language.read_captions(model.mapper(photos(3)), ids)
    term = doubly_stochastic_loss(output.attentions, mask)
    for weight in (0.0, 0.5):
        model.language.config.doubly_stochastic = weight
        assert model.train()(photos(3), ids, mask).item() == pytest.approx(
            (plain + weight * term).item(), rel=1e-5
        )
        assert model.eval()(photos(3), ids, mask).item() == pytest.approx(plain.item(), rel=1e-5)


def test_every_weight_learns():
    model = make().train()
    model(photos(3), some_ids(), torch.ones(3, 7, dtype=torch.long)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


# ---- decoding
def test_step_by_step_is_at_once():
    model, ids = make(), some_ids()
    at_once = token_logits(model, photos(3), ids, torch.ones_like(ids))
    attended = model.language.read_captions(model.mapper(photos(3)), ids).attentions
    with torch.no_grad():
        state = start_decoding(model.language, model.mapper(photos(3)))
        for t in range(7):
            torch.testing.assert_close(state.logits, at_once[:, t], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(state.weights, attended[:, t], atol=1e-4, rtol=1e-4)
            state.append(ids[:, t])


def test_several_captions_of_a_photo_are_read_as_one_by_one():
    model, ids, which = make(), some_ids(5), torch.tensor([0, 0, 2, 1, 2])
    mask = torch.ones_like(ids)
    together = token_logits(model, photos(3), ids, mask, which)
    alone = token_logits(model, photos(3)[which], ids, mask)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    likely = token_log_probabilities(model, model.mapper(photos(3)[which]), ids, mask)
    wanted = alone.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(likely, wanted, atol=1e-4, rtol=1e-4)


def test_rows_of_the_state_go_their_own_ways():
    model = make()
    with torch.no_grad():
        together = start_decoding(model.language, model.mapper(photos(3)))
        together.select(torch.tensor([2, 0, 0]))
        together.append(torch.tensor([4, 5, 6]))
        together.select(torch.tensor([0, 2, 1]))
        for row, (photo, token) in enumerate([(2, 4), (0, 6), (0, 5)]):
            alone = start_decoding(model.language, model.mapper(photos(3)[photo : photo + 1]))
            alone.append(torch.tensor([token]))
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)


def test_a_photo_alone_and_among_others():
    assert_batches_change_no_caption(make(), photos(9))


def test_one_beam_is_greedy():
    model, state = make(), None
    with torch.no_grad():
        state = start_decoding(model.language, model.mapper(photos(1)))
        tokens = []
        for _ in range(6):
            logits = state.logits.index_fill(1, torch.tensor([0, 1, 3]), -math.inf)
            tokens.append(logits.argmax(-1))
            if tokens[-1] == words.eos_token_id:
                break
            state.append(tokens[-1])
    written = words.decode(torch.cat(tokens), skip_special_tokens=True)
    assert best_captions(model, photos(1), beams=1, max_length=6) == [written]


def test_a_folder_keeps_it(tmp_path):
    model = make(doubly_stochastic=0.25)
    model.save_pretrained(tmp_path / 'm')
    again = CaptionModel.from_pretrained(tmp_path / 'm')
    assert isinstance(again.language, AttentionLanguage)
    assert again.language.config.doubly_stochastic == 0.25
    assert again.language.head.weight is again.language.words.weight
    for options in ({}, dict(beams=1), dict(temperature=1.0, seed=0)):
        assert best_captions(again, photos(5), **options) == best_captions(
            model, photos(5), **options
        )


# ---- refusals
def one_line(call, *arguments, **named):
    with pytest.raises(ClipcapError) as refused:
        call(*arguments, **named)
    (line,) = str(refused.value).splitlines()
    return line


def test_pooled_features_are_refused():
    language = make().language
    assert 'grid' in one_line(language.begin, torch.zeros(2, 1, 16))
    line = one_line(read_recipe, 'show-attend-tell', features='pooled')
    assert 'features pooled' in line and 'grid' in line
    assert 'mapper' in one_line(read_recipe, 'show-attend-tell', mapper='transformer')
    pooled = load_tower('tiny', 'pooled', 96, 'cpu')
    recipe = read_recipe(language='new-attention-lstm')
    assert 'grid' in one_line(begin_model, recipe, pooled, ['a red ball'])


def test_a_weight_without_attention_is_refused():
    tower = load_tower('tiny', 'grid', 96, 'cpu')
    assert 'no effect' in one_line(read_recipe, language='new-lstm', doubly_stochastic=1.0)
    recipe = read_recipe(doubly_stochastic=1.0)
    assert 'no effect' in one_line(begin_model, recipe, tower)


def test_the_preset_with_another_language_model():
    writing = read_recipe('show-attend-tell', text_epochs=1)
    assert replace(writing, language='a folder', text_epochs=0).doubly_stochastic == 0.1
    other = read_recipe('show-attend-tell', language='new-lstm', features='pooled')
    assert other.doubly_stochastic is None


def test_a_model_without_attention_has_no_maps():
    photo = Image.new('RGB', (64, 64))
    line = one_line(attention_maps, Captioner('tiny', device='cpu'), photo, 'a dog')
    assert 'show-attend-tell' in line


# ---- with the rest of the project
@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('attention')
    draw_dataset(folder / 'scenes', 40, size=96)
    recipe = read_recipe(
        'show-attend-tell', tower='tiny', image_size=96, epochs=2, rate=1e-2, batch_size=32
    )
    history = train_recipe(recipe, folder / 'scenes', folder / 'run', device='cpu', progress=False)
    assert len(history) == 2 and np.isfinite(history.val_loss).all()
    return folder


def pictures(trained, n=3):
    return sorted((trained / 'scenes' / 'images').iterdir())[:n]


def test_maps_of_a_trained_model(trained):
    captioner = Captioner(trained / 'run', device='cpu')
    photo = pictures(trained)[0]
    maps = attention_maps(captioner, photo, 'a red ball')
    assert maps.words == ['a', 'red', 'ball']
    side = math.isqrt(captioner.tower.cells)
    assert maps.weights.shape == (3, side, side)
    np.testing.assert_allclose(maps.weights.sum((1, 2)), 1, atol=1e-5)
    assert all(0 < p < 1 for p in maps.probabilities)
    assert ' '.join(attention_maps(captioner, photo).words) == captioner.caption(photo)[0]
    assert draw_attention(maps, columns=2, width=60).width > 120
    assert attention_maps(captioner, photo, '').words == []
    assert len(attention_maps(captioner, photo, 'a red ball ' * 30).words) == 90


def test_the_command_line_trains_and_captions(trained, tmp_path):
    options = '--preset show-attend-tell --tower tiny --image-size 96 --epochs 1 --batch-size 32'
    options += ' --doubly-stochastic 0.5'
    where = ['--output', tmp_path / 'run', '--device', 'cpu']
    printed, _ = clipcap('train', trained / 'scenes', *options.split(), *where)
    assert 'epoch 1:' in printed
    model = CaptionModel.from_pretrained(tmp_path / 'run' / 'best')
    assert model.language.config.doubly_stochastic == 0.5
    how = ['--format', 'csv', '--device', 'cpu']
    out, complaints = clipcap('caption', *pictures(trained), '--model', tmp_path / 'run', *how)
    assert len(out.splitlines()) == 4
    assert not complaints
    pooled = ['--features', 'pooled', '--output', tmp_path / 'none']
    line = complaint('train', trained / 'scenes', '--preset', 'show-attend-tell', *pooled)
    assert 'grid' in line
