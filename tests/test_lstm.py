"The LSTM language model: in one go and step by step, beams, batches, folders; vocabularies; the photo at every step"

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import clipcap, complaint, root

from clipcap.base.captions import read_captions
from clipcap.base.config import NEW_LANGUAGES
from clipcap.base.files import ClipcapError
from clipcap.base.scenes import draw_dataset
from clipcap.embed import VisionTower
from clipcap.evaluate import evaluate_captions
from clipcap.generate import GenerationOptions, generate_captions, score_captions
from clipcap.methods.image_lstm import ensemble, photo_influence, temperature_study
from clipcap.methods.lstm import (
    LSTMLanguage,
    Vocabulary,
    coverage,
    load_vocabulary,
    make_lstm,
    split_words,
    word_tokenizer,
)
from clipcap.model import CaptionModel, MapperConfig, encode, token_logits
from clipcap.tools.recipe import new_language

words = word_tokenizer(Vocabulary(tuple('abcdefgh')))
both = pytest.mark.parametrize('every', [False, True], ids=['photo first', 'photo at every step'])


def make(every, seed=0, spread=1.0):
    "A small random captioner with decided opinions"
    torch.manual_seed(seed)
    model = CaptionModel(
        make_lstm(words, every, hidden_size=16, initializer_range=spread),
        words,
        MapperConfig('linear', feature_dim=6, prefix_length=1),
    )
    with torch.no_grad():
        model.mapper.net.net.weight.mul_(4)
    return model.eval()


def photos(n, seed=1):
    return torch.randn(n, 1, 6, generator=torch.Generator().manual_seed(seed))


# ---- words
def test_vocabulary_known_answers(tmp_path):
    captions = ["A dog's ball.", 'The dog runs!', 'a T-shirt, a DOG', '']
    assert split_words(captions[0]) == ['a', "dog's", 'ball'] and split_words(
        'T-shirt (ｒｅｄ) №5 naïve'
    ) == ['t-shirt', 'red', 'no5', 'naïve']
    vocabulary = Vocabulary.from_captions(captions, threshold=2)
    assert vocabulary.words == ('a', 'dog') and len(vocabulary) == 6
    assert Vocabulary.from_captions(captions, threshold=1).words == (
        'a',
        'dog',
        'ball',
        "dog's",
        'runs',
        't-shirt',
        'the',
    )  # commonest first, then by name
    tokenizer = word_tokenizer(vocabulary)
    assert encode(tokenizer, ['a dog runs', '']) == [[4, 5, 3, 2], [2]]
    assert tokenizer.decode([1, 4, 5, 3, 2, 0], skip_special_tokens=True) == 'a dog'
    vocabulary.save(tmp_path / 'v.json')
    assert load_vocabulary(tmp_path / 'v.json') == vocabulary and json.loads(
        (tmp_path / 'v.json').read_text()
    )['words'] == ['a', 'dog']
    table = coverage(captions, (1, 2, 3))
    assert (
        table.words.tolist() == [7, 2, 1]
        and table.tokens.tolist() == [1, 5 / 10, 3 / 10]
        and table.captions.tolist() == [1, 0, 0]
    )


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{}',
        '[]',
        '{"words": ["a", "a"], "split": "plain"}',
        '{"words": ["<end>"], "split": "plain"}',
        '{"words": ["a"], "split": "letters"}',
        '{"words": [1], "split": "plain"}',
    ],
)
def test_bad_vocabulary_files(tmp_path, text):
    (tmp_path / 'v.json').write_text(text)
    with pytest.raises(ClipcapError, match='v.json: no vocabulary'):
        load_vocabulary(tmp_path / 'v.json')
    with pytest.raises(ClipcapError, match='check the path'):
        load_vocabulary(tmp_path / 'none.json')


def test_tokenizer_cuts_as_the_vocabulary_counts():
    file = root.parent / 'shared' / 'data' / 'flickr8k' / 'results.csv'
    captions = (
        read_captions(file).caption.tolist()[::20]
        if file.exists()
        else [
            c
            for _, c in pd.read_csv(draw_dataset_csv(), sep='|', usecols=[0, 2]).itertuples(
                index=False
            )
        ]
    )
    vocabulary = Vocabulary.from_captions(captions, threshold=1)
    tokenizer = word_tokenizer(vocabulary)
    for caption, ids in zip(captions, tokenizer(captions).input_ids):
        assert tokenizer.convert_ids_to_tokens(ids) == split_words(caption)


def draw_dataset_csv():
    import tempfile

    return draw_dataset(tempfile.mkdtemp(), 50) / 'results.csv'


def test_spacy_or_a_clear_line():
    try:
        import spacy
    except ImportError:
        with pytest.raises(ClipcapError, match='pip install spacy'):
            split_words('a dog', 'spacy')
        return
    assert split_words("Don't run, dog!", 'spacy') == ['do', "n't", 'run', ',', 'dog', '!']
    vocabulary = Vocabulary.from_captions(["don't run"], 1, 'spacy')
    assert word_tokenizer(vocabulary)(vocabulary.plain("Don't RUN")).input_ids == [4, 5, 6]


# ---- the model
@both
def test_at_once_is_step_by_step(every):
    model, ids = (
        make(every),
        torch.randint(4, 12, (3, 7), generator=torch.Generator().manual_seed(0)),
    )
    prefix = model.mapper(photos(3))
    at_once = token_logits(model, photos(3), ids, torch.ones_like(ids))
    step = model.language(inputs_embeds=prefix, use_cache=True)
    for t in range(7):
        torch.testing.assert_close(step.logits[:, -1], at_once[:, t], atol=1e-5, rtol=1e-5)
        step = model.language(
            input_ids=ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True
        )
    assert step.past_key_values.get_seq_length() == 8


@both
def test_padding_changes_nothing(every):
    model, captions = make(every), [['a b'], ['c d e f g h'], ['h']]
    alone = [score_captions(model, photos(3)[i : i + 1], [c])[0][0] for i, c in enumerate(captions)]
    assert np.allclose([s for (s,) in score_captions(model, photos(3), captions)], alone, atol=1e-5)


def slow_beams(model, feature, beams, longest):
    "Beam search, written down once more: whole captions through the model each time, no state"
    end, barred = words.eos_token_id, [words.pad_token_id, words.bos_token_id, words.unk_token_id]
    live, done = [((), 0.0)], []
    for step in range(longest):
        grown = []
        for tokens, score in live:
            ids = torch.tensor([[*tokens, end]])
            logits = token_logits(model, feature, ids, torch.ones_like(ids))[0, -1].log_softmax(-1)
            logits[barred] = -torch.inf
            grown += [
                (tokens + (k,), score + logits[k].item())
                for k in range(len(words))
                if k not in barred
            ]
        grown = sorted(grown, key=lambda one: -one[1])[: 2 * beams]
        done += [
            (tokens, score / len(tokens))
            for rank, (tokens, score) in enumerate(grown)
            if tokens[-1] == end and rank < beams
        ]
        live = [one for one in grown if one[0][-1] != end][:beams]
        done = sorted(done, key=lambda one: -one[1])[:beams]
        if len(done) == beams and done[-1][1] >= live[0][1] / (step + 1):
            break
    else:
        done += [(tokens, score / len(tokens)) for tokens, score in live]
    return words.decode(max(done, key=lambda one: one[1])[0], skip_special_tokens=True)


@both
@pytest.mark.parametrize('beams', [1, 3, 5])
def test_generate_is_plain_beam_search(every, beams):
    wanted, got = [], []
    with torch.inference_mode():
        for seed in range(6):
            model = make(every, seed)
            got += [
                c
                for (c,) in generate_captions(
                    model, photos(4), GenerationOptions(beams=beams, max_length=6)
                )
            ]
            wanted += [slow_beams(model, f[None], beams, 6) for f in photos(4)]
    assert got == wanted and len({*got}) > 12


@both
def test_one_photo_is_many(every):
    model, features = make(every), photos(9)
    for options in (
        GenerationOptions(beams=1),
        GenerationOptions(),
        GenerationOptions(beams=4, candidates=3),
    ):
        together = generate_captions(model, features, options)
        assert (
            together
            == generate_captions(model, features, options, batch_size=1)
            == generate_captions(model, features, options, batch_size=4)
        )
    dice = [
        generate_captions(model, features, GenerationOptions(temperature=1.0, seed=s))
        for s in (1, 1, 2)
    ]
    assert dice[0] == dice[1] != dice[2]


@both
def test_never_a_special_word(every):
    model = make(every)
    with torch.no_grad():
        model.language.head.bias[[0, 1, 3]] += 50  # it wants nothing else
    for options in GenerationOptions(), GenerationOptions(temperature=1.5, seed=0):
        assert not any(
            '<' in c or '  ' in c for (c,) in generate_captions(model, photos(5), options)
        )


@both
def test_folder_is_opened_by_a_process_that_knows_nothing_of_it(every, tmp_path):
    model = make(every)
    model.save_pretrained(tmp_path / 'm')
    again = CaptionModel.from_pretrained(tmp_path / 'm')
    assert (
        isinstance(again.language, LSTMLanguage) and again.language.config.image_every_step == every
    )
    assert again.language.head.weight is again.language.words.weight
    assert generate_captions(again, photos(5)) == generate_captions(model, photos(5))
    code = (
        'import sys, torch; from clipcap.model import CaptionModel; from clipcap.generate import generate_captions; assert "clipcap.methods.lstm" not in sys.modules; '
        'print(generate_captions(CaptionModel.from_pretrained(sys.argv[1]), torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(1))))'
    )
    said = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'm'], capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == str(generate_captions(model, photos(5)))


def test_an_unknown_room_is_refused(tmp_path):
    make(False).save_pretrained(tmp_path / 'm')
    config = tmp_path / 'm' / 'language' / 'config.json'
    config.write_text(config.read_text().replace('clipcap_show_and_tell', 'clipcap_nowhere'))
    with pytest.raises(ClipcapError, match='damaged or incomplete'):
        CaptionModel.from_pretrained(tmp_path / 'm')


def test_the_photo_is_read_at_every_step():
    model, ids = make(True), torch.tensor([[4, 5, 6, 7, 8]])
    other = photos(1, seed=9)
    with torch.inference_mode():
        state = model.language(
            inputs_embeds=model.mapper(photos(1)), use_cache=True
        ).past_key_values
        for token in ids[0]:
            h, c = state.h.clone(), state.c.clone()
            as_is = model.language(
                input_ids=token.view(1, 1), past_key_values=state, use_cache=True
            )
            state.h, state.c, mine = h, c, state.image
            state.image = model.mapper(other)[:, 0]
            swapped = model.language(
                input_ids=token.view(1, 1), past_key_values=state, use_cache=True
            )
            assert (as_is.logits - swapped.logits).abs().max() > 0.1
            state = as_is.past_key_values
            assert state.image.equal(mine)
    # and through the whole caption: gradients reach the photo from each word directly
    embeddings = (
        torch.cat([model.mapper(photos(1)), model.language.words(ids)], 1).detach().requires_grad_()
    )
    weight = model.language.lstm.weight_ih_l0
    model.language(inputs_embeds=embeddings).logits[0, -1].sum().backward()
    assert (
        weight.shape[1] == 32
        and (weight.grad[:, 16:].abs().sum() > 0)
        and embeddings.grad[0, 0].abs().sum() > 0
    )


def test_influence_and_temperature_known_answers():
    model = make(True)
    assert (
        max(photo_influence(model, photos(1).expand(3, -1, -1).numpy(), ['a b', 'c d', 'e f g']))
        < 1e-6
        < min(photo_influence(model, photos(3).numpy(), ['a b', 'c d', 'e f g']))
    )
    with pytest.raises(ClipcapError, match='two or more'):
        photo_influence(model, photos(1).numpy(), ['a'])
    references = {str(i): ['a b c', 'a c'] for i in range(4)}
    table, said = temperature_study(model, photos(4), references, (0.0, 1.0), samples=3, seed=5)
    assert (
        all(len({*some}) == 1 for some in said[0.0])
        and table.different[0.0] == 1 / 3
        and [len(s) for s in said[1.0]] == [3] * 4
    )
    greedy = [c for (c,) in generate_captions(model, photos(4), GenerationOptions(beams=1))]
    assert table['BLEU-1'][0.0] == pytest.approx(
        evaluate_captions(references, dict(zip(references, greedy)), bootstrap=0)['BLEU-1']
    )


# ---- with the rest of the project
def test_new_languages():
    for kind in NEW_LANGUAGES:
        language, tokenizer = new_language(kind, ['a red ball', 'a blue kite'])
        assert language.config.vocab_size == len(tokenizer) and tokenizer.eos_token_id is not None
    assert len(new_language('new-lstm', ['a b'] * 6000 + ['a c'] * 4)[1]) == 6  # c is too rare
    with pytest.raises(ClipcapError, match='no training captions'):
        new_language('new-gpt', [])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lstm')
    draw_dataset(folder / 'scenes', 40, size=96)
    said, _ = clipcap(
        'train',
        '--preset',
        'image-lstm',
        '--data',
        folder / 'scenes',
        '--tower',
        'tiny',
        '--epochs',
        2,
        '--rate',
        1e-2,
        '--batch-size',
        32,
        '--model-out',
        folder / 'run',
        '--tracker',
        'tensorboard',
        '--device',
        'cpu',
    )
    assert 'new-image-lstm' in said and 'epoch 2:' in said
    return folder


def test_command_line_takes_it_like_any_other(trained, tmp_path):
    pictures = sorted((trained / 'scenes' / 'images').iterdir())[:3]
    out, complaints = clipcap(
        'caption', *pictures, '--model', trained / 'run', '--format', 'csv', '--device', 'cpu'
    )
    assert len(out.splitlines()) == 4 and not complaints
    assert (
        out
        == clipcap(
            'caption',
            *pictures,
            '--model',
            trained / 'run' / 'best',
            '--format',
            'csv',
            '--device',
            'cpu',
        )[0]
    )
    clipcap(
        'evaluate',
        '--data',
        trained / 'scenes',
        '--split',
        'val',
        '--model',
        trained / 'run',
        '--no-meteor',
        '--bootstrap',
        10,
        '--json',
        tmp_path / 's.json',
        '--output',
        tmp_path / 'e',
        '--device',
        'cpu',
    )
    assert 0 <= json.loads((tmp_path / 's.json').read_text())['BLEU-1'] <= 1


def test_a_video(trained, tmp_path):
    cv2 = pytest.importorskip('cv2')
    pictures = sorted((trained / 'scenes' / 'images').iterdir())
    writer = cv2.VideoWriter(str(tmp_path / 'v.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 96))
    for p in pictures[:10]:
        writer.write(cv2.imread(str(p)))
    writer.release()
    clipcap(
        'video',
        tmp_path / 'v.avi',
        '-N',
        3,
        '--model',
        trained / 'run',
        '--output',
        tmp_path / 'subs',
        '--device',
        'cpu',
    )
    assert [*(tmp_path / 'subs').glob('*.srt')]


def test_tensorboard_has_captions_and_words(trained):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / 'run' / 'clipcap')).Reload()
    assert (
        [e.step for e in events.Images('captions')]
        == [1, 2]
        == [e.step for e in events.Tensors('captions/text_summary')]
    )
    assert len(events.Scalars('val_loss')) == 2
    assert (
        "'<end>'" in (trained / 'run' / 'clipcap' / '00000' / 'words' / 'metadata.tsv').read_text()
        and (trained / 'run' / 'clipcap' / 'projector_config.pbtxt').exists()
    )


# ---- several as one
@both
def test_an_ensemble_expects_the_mean(every, tmp_path):
    models = [make(every, seed) for seed in range(3)]
    for seed, model in enumerate(models):
        model.mapper.mean.copy_(torch.randn(6))
        model.mapper.std.copy_(torch.rand(6) + 0.5)
    ensemble(models).save_pretrained(tmp_path / 'three')
    three, seen = CaptionModel.from_pretrained(tmp_path / 'three'), photos(5)
    ids, mask = torch.randint(4, 12, (5, 7)), torch.ones(5, 7, dtype=torch.long)
    mean = sum(token_logits(model, seen, ids, mask) for model in models) / 3
    torch.testing.assert_close(token_logits(three, seen, ids, mask), mean, atol=1e-4, rtol=1e-4)
    assert mean.std() > 0.1 and three.language.config.hidden_size == 48
    twice = ensemble([models[0]] * 2)
    assert generate_captions(twice, seen, GenerationOptions(beams=3)) == generate_captions(
        models[0], seen, GenerationOptions(beams=3)
    )


def test_what_does_not_fit_is_not_joined():
    with pytest.raises(ClipcapError, match='train them alike'):
        ensemble([make(True), make(False)])
    wide = CaptionModel(
        make_lstm(words, True, hidden_size=16),
        words,
        MapperConfig('linear', feature_dim=7, prefix_length=1),
    )
    with pytest.raises(ClipcapError, match='train them alike'):
        ensemble([make(True), wide])
    with pytest.raises(ClipcapError, match='linear mapper'):
        ensemble(
            [
                CaptionModel(
                    make_lstm(words, True, hidden_size=16),
                    words,
                    MapperConfig('mlp', feature_dim=6, prefix_length=1),
                )
            ]
        )


def test_ensemble_in_the_shell(trained, tmp_path):
    pictures, best = sorted((trained / 'scenes' / 'images').iterdir())[:3], trained / 'run' / 'best'
    clipcap('ensemble', best, best, '--model-out', tmp_path / 'both')
    assert clipcap(
        'caption', *pictures, '--model', tmp_path / 'both', '--device', 'cpu'
    ) == clipcap(
        'caption', *pictures, '--model', best, '--device', 'cpu'
    )  # twice the same, the same
    CaptionModel.from_pretrained(best).save_pretrained(
        tmp_path / 'other', VisionTower.from_pretrained(best / 'vision', 'pooled', 96, 'cpu')
    )
    assert 'sees with another tower' in complaint(
        'ensemble', best, tmp_path / 'other', '--model-out', tmp_path / 'none'
    )
    assert not (tmp_path / 'none').exists()
