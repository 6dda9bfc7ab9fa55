"The LSTM language model: at once and step by step, beams, batches, folders; ensembles; the shell"

import json
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import clipcap, complaint, root
from small import assert_batches_change_no_caption

from clipcap.base.captions import read_captions
from clipcap.base.config import NEW_LANGUAGES
from clipcap.base.files import ClipcapError
from clipcap.base.scenes import draw_dataset
from clipcap.embed import VisionTower
from clipcap.generate import GenerationOptions, generate_captions, score_captions, start_decoding
from clipcap.methods.lstm import (
    LSTMLanguage,
    Vocabulary,
    caption_words,
    coverage,
    ensemble,
    load_vocabulary,
    make_lstm,
    photo_influence,
    word_tokenizer,
)
from clipcap.model import CaptionModel, MapperConfig, encode, token_logits
from clipcap.tools.recipe import new_language

words = word_tokenizer(Vocabulary(tuple('abcdefgh')))
both = pytest.mark.parametrize('every', [False, True], ids=['photo first', 'photo at every step'])


def make(every, seed=0, spread=1.0, kind='linear', feature_dim=6):
    "A small random captioner with decided opinions"
    torch.manual_seed(seed)
    language = make_lstm(words, every, hidden_size=16, initializer_range=spread)
    mapper = MapperConfig(kind, feature_dim=feature_dim, prefix_length=1)
    model = CaptionModel(language, words, mapper)
    if kind == 'linear':
        with torch.no_grad():
            model.mapper.net.net.weight.mul_(4)
    return model.eval()


def photos(n, seed=1):
    return torch.randn(n, 1, 6, generator=torch.Generator().manual_seed(seed))


def best_captions(model, features, **options):
    found = generate_captions(model, features, GenerationOptions(**options))
    return [best for (best,) in found]


# ---- words
def test_vocabulary_known_answers(tmp_path):
    captions = ["A dog's ball.", 'The dog runs!', 'a T-shirt, a DOG', '']
    assert caption_words(captions[0]) == ['a', "dog's", 'ball']
    assert caption_words('T-shirt (ｒｅｄ) №5 naïve') == ['t-shirt', 'red', 'no5', 'naïve']
    vocabulary = Vocabulary.from_captions(captions, threshold=2)
    assert vocabulary.words == ('a', 'dog')
    assert len(vocabulary) == 6
    everything = Vocabulary.from_captions(captions, threshold=1)  # commonest first, then by name
    assert everything.words == ('a', 'dog', 'ball', "dog's", 'runs', 't-shirt', 'the')
    tokenizer = word_tokenizer(vocabulary)
    assert encode(tokenizer, ['a dog runs', '']) == [[4, 5, 3, 2], [2]]
    assert tokenizer.decode([1, 4, 5, 3, 2, 0], skip_special_tokens=True) == 'a dog'
    vocabulary.save(tmp_path / 'v.json')
    assert load_vocabulary(tmp_path / 'v.json') == vocabulary


def test_coverage_known_answers():
    table = coverage(['a dog', 'a cat', 'a dog runs'], (1, 2, 3))
    assert table.words.tolist() == [4, 2, 1]
    assert table.tokens.tolist() == pytest.approx([1, 5 / 7, 3 / 7])
    assert table.captions.tolist() == pytest.approx([1, 1 / 3, 0])


@pytest.mark.parametrize(
    'text',
    ['{}', '[]', '{"words": ["a"], "split": "x"}', '{"words": ["a", "a"], "split": "plain"}', '{'],
)
def test_what_is_no_vocabulary_is_refused(text, tmp_path):
    (tmp_path / 'v.json').write_text(text)
    with pytest.raises(ClipcapError, match='v.json'):
        load_vocabulary(tmp_path / 'v.json')


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(ClipcapError, match='none.json'):
        load_vocabulary(tmp_path / 'none.json')


def test_tokenizer_cuts_as_the_vocabulary_counts(tmp_path):
    file = root.parent / 'shared' / 'data' / 'flickr8k' / 'results.csv'
    if not file.exists():
        file = draw_dataset(tmp_path, 50) / 'results.csv'
    captions = [*read_captions(file).caption[::20], 'Die Mädchen läuft’s', '犬が走る', 'भारत में']
    tokenizer = word_tokenizer(Vocabulary.from_captions(captions, threshold=1))
    for caption, ids in zip(captions, tokenizer(captions).input_ids, strict=True):
        assert tokenizer.convert_ids_to_tokens(ids) == caption_words(caption)


def test_spacy_or_a_clear_line():
    try:
        import spacy  # noqa: F401
    except ImportError:
        with pytest.raises(ClipcapError, match='pip install spacy'):
            caption_words('a dog', 'spacy')
        return
    assert caption_words("Don't run, dog!", 'spacy') == ['do', "n't", 'run', ',', 'dog', '!']
    vocabulary = Vocabulary.from_captions(["don't run"], 1, 'spacy')
    assert word_tokenizer(vocabulary)(vocabulary.plain("Don't RUN")).input_ids == [4, 5, 6]


# ---- the model
@both
def test_at_once_is_step_by_step(every):
    model = make(every)
    ids = torch.randint(4, 12, (3, 7), generator=torch.Generator().manual_seed(0))
    at_once = token_logits(model, photos(3), ids, torch.ones_like(ids))
    with torch.no_grad():
        state = start_decoding(model.language, model.mapper(photos(3)))
        for t in range(7):
            torch.testing.assert_close(state.logits, at_once[:, t], atol=1e-5, rtol=1e-5)
            state.append(ids[:, t])


@both
def test_rows_of_the_state_go_their_own_ways(every):
    model = make(every)
    with torch.no_grad():
        together = start_decoding(model.language, model.mapper(photos(3)))
        together.select(torch.tensor([2, 0, 0]))
        together.append(torch.tensor([4, 5, 6]))
        for row, (photo, token) in enumerate([(2, 4), (0, 5), (0, 6)]):
            alone = start_decoding(model.language, model.mapper(photos(3)[photo : photo + 1]))
            alone.append(torch.tensor([token]))
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)


@both
def test_padding_changes_nothing(every):
    model, captions = make(every), [['a b'], ['c d e f g h'], ['h']]
    together = score_captions(model, photos(3), captions)
    for i, caption in enumerate(captions):
        alone = score_captions(model, photos(3)[i : i + 1], [caption])
        assert together[i][0] == pytest.approx(alone[0][0], abs=1e-5)


def slow_beams(model, feature, beams, longest):
    "Beam search, written down once more: whole captions through the model each time, no state"
    end, barred = words.eos_token_id, [words.pad_token_id, words.bos_token_id, words.unk_token_id]
    live, done = [((), 0.0)], []
    for step in range(longest):
        grown = []
        for tokens, score in live:
            ids = torch.tensor([[*tokens, end]])
            logits = token_logits(model, feature, ids, torch.ones_like(ids))[0, -1].log_softmax(-1)
            for k in range(len(words)):
                if k not in barred:
                    grown.append((tokens + (k,), score + logits[k].item()))
        grown = sorted(grown, key=lambda one: -one[1])[: 2 * beams]
        for rank, (tokens, score) in enumerate(grown):
            if tokens[-1] == end and rank < beams:
                done.append((tokens, score / len(tokens)))
        live = [one for one in grown if one[0][-1] != end][:beams]
        done = sorted(done, key=lambda one: -one[1])[:beams]
        if len(done) == beams and done[-1][1] >= live[0][1] / (step + 1):
            break
    else:
        done += [(tokens, score / len(tokens)) for tokens, score in live]
    tokens, score = max(done, key=lambda one: one[1])
    return words.decode(tokens, skip_special_tokens=True), score


@both
@pytest.mark.parametrize('beams', [1, 3, 5])
def test_generate_is_plain_beam_search(every, beams):
    captions = set()
    with torch.inference_mode():
        for seed in range(6):
            model = make(every, seed)
            found = best_captions(model, photos(4), beams=beams, max_length=6)
            captions.update(found)
            for photo, caption in zip(photos(4), found, strict=True):
                wanted, score = slow_beams(model, photo[None], beams, 6)
                if caption != wanted:  # a near tie may fall either way
                    ours = score_captions(model, photo[None], [[caption]])[0][0]
                    assert ours == pytest.approx(score, abs=1e-3)
    assert len(captions) > 3


@both
def test_one_photo_is_many(every):
    assert_batches_change_no_caption(make(every), photos(9))


def test_a_seed_makes_sampling_repeatable():
    sampled = [best_captions(make(True), photos(9), temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@both
def test_never_a_special_word(every):
    model = make(every)
    with torch.no_grad():
        model.language.head.bias[[0, 1, 3]] += 50  # it wants nothing else
    for options in ({}, dict(beams=1), dict(temperature=1.5, seed=0)):
        captions = best_captions(model, photos(5), **options)
        assert not any('<' in caption or '  ' in caption for caption in captions)


@both
def test_folder_is_opened_by_a_process_that_knows_nothing_of_it(every, tmp_path):
    model = make(every)
    model.save_pretrained(tmp_path / 'm')
    again = CaptionModel.from_pretrained(tmp_path / 'm')
    assert isinstance(again.language, LSTMLanguage)
    assert again.language.config.image_every_step == every
    assert again.language.head.weight is again.language.words.weight
    assert generate_captions(again, photos(5)) == generate_captions(model, photos(5))
    code = """
import sys, torch
from clipcap.generate import generate_captions
from clipcap.model import CaptionModel
assert 'clipcap.methods.lstm' not in sys.modules
features = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(1))
print(generate_captions(CaptionModel.from_pretrained(sys.argv[1]), features))
"""
    command = [sys.executable, '-c', code, tmp_path / 'm']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(generate_captions(model, photos(5)))


def test_an_unknown_kind_of_language_model_is_refused(tmp_path):
    make(False).save_pretrained(tmp_path / 'm')
    config = tmp_path / 'm' / 'language' / 'config.json'
    config.write_text(config.read_text().replace('clipcap_lstm', 'clipcap_nowhere'))
    with pytest.raises(ClipcapError, match='language'):
        CaptionModel.from_pretrained(tmp_path / 'm')


def test_the_photo_is_read_at_every_step():
    model, other = make(True), photos(1, seed=9)
    with torch.no_grad():
        kept = start_decoding(model.language, model.mapper(photos(1)))
        swapped = start_decoding(model.language, model.mapper(photos(1)))
        for token in (4, 5, 6, 7, 8):
            swapped.memory.h, swapped.memory.c = kept.memory.h, kept.memory.c
            swapped.memory.image = model.mapper(other)[:, 0]
            kept.append(torch.tensor([token]))
            swapped.append(torch.tensor([token]))
            assert (kept.logits - swapped.logits).abs().max() > 0.1


def test_influence_known_answers():
    model, captions = make(True), ['a b', 'c d', 'e f g']
    assert max(photo_influence(model, photos(1).expand(3, -1, -1), captions)) < 1e-6
    assert min(photo_influence(model, photos(3), captions)) > 1e-6
    with pytest.raises(ClipcapError, match='two or more'):
        photo_influence(model, photos(1).numpy(), ['a'])


# ---- several as one
@both
def test_an_ensemble_expects_the_mean(every, tmp_path):
    models = [make(every, seed) for seed in range(3)]
    for model in models:
        model.mapper.mean.copy_(torch.randn(6))
        model.mapper.std.copy_(torch.rand(6) + 0.5)
    ensemble(models).save_pretrained(tmp_path / 'three')
    three = CaptionModel.from_pretrained(tmp_path / 'three')
    ids, mask = torch.randint(4, 12, (5, 7)), torch.ones(5, 7, dtype=torch.long)
    mean = sum(token_logits(model, photos(5), ids, mask) for model in models) / 3
    joined = token_logits(three, photos(5), ids, mask)
    torch.testing.assert_close(joined, mean, atol=1e-4, rtol=1e-4)
    assert mean.std() > 0.1
    assert three.language.config.hidden_size == 48
    alone = models[0]
    assert best_captions(ensemble([alone] * 2), photos(5), beams=1) == best_captions(
        alone, photos(5), beams=1
    )


@pytest.mark.parametrize(
    'others',
    [dict(every=False), dict(every=True, feature_dim=7)],
    ids=['another kind', 'other features'],
)
def test_what_does_not_fit_is_not_joined(others):
    with pytest.raises(ClipcapError, match='train them alike'):
        ensemble([make(True), make(**others)])


def test_other_mappers_are_not_joined():
    with pytest.raises(ClipcapError, match='linear mapper'):
        ensemble([make(True, kind='mlp')])


# ---- with the rest of the project
@pytest.mark.parametrize('kind', NEW_LANGUAGES)
def test_new_languages(kind):
    language, tokenizer = new_language(kind, ['a red ball', 'a blue kite'])
    assert language.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id is not None
    with pytest.raises(ClipcapError, match='no training captions'):
        new_language(kind, [])


def test_rare_words_are_left_out():
    _, tokenizer = new_language('new-lstm', ['a b'] * 6000 + ['a c'] * 4)
    assert len(tokenizer) == 6


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lstm')
    draw_dataset(folder / 'scenes', 40, size=96)
    options = '--preset image-lstm --tower tiny --epochs 2 --rate 1e-2 --batch-size 32'
    where = ['--output', folder / 'run', '--tracker', 'tensorboard', '--device', 'cpu']
    printed, _ = clipcap('train', folder / 'scenes', *options.split(), *where)
    assert 'epoch 2:' in printed
    return folder


def pictures(trained, n=3):
    return sorted((trained / 'scenes' / 'images').iterdir())[:n]


def test_command_line_takes_it_like_any_other(trained, tmp_path):
    how = ['--format', 'csv', '--device', 'cpu']
    out, complaints = clipcap('caption', *pictures(trained), '--model', trained / 'run', *how)
    assert len(out.splitlines()) == 4
    assert not complaints
    best = trained / 'run' / 'best'
    assert clipcap('caption', *pictures(trained), '--model', best, *how)[0] == out
    scores = tmp_path / 'scores.json'
    how = '--split val --no-meteor --bootstrap 10 --device cpu'.split()
    where = ['--model', trained / 'run', '--json', scores, '--output', tmp_path / 'evaluation']
    clipcap('evaluate', trained / 'scenes', *how, *where)
    assert 0 <= json.loads(scores.read_text())['BLEU-1'] <= 1


def test_a_video(trained, tmp_path):
    clip = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 96))
    for picture in pictures(trained, 10):
        writer.write(cv2.imread(str(picture)))
    writer.release()
    where = ['--model', trained / 'run', '--output', tmp_path / 'subtitles', '--device', 'cpu']
    clipcap('video', clip, '--number', 3, *where)
    assert [*(tmp_path / 'subtitles').glob('*.srt')]


def test_tensorboard_has_captions_and_words(trained):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = trained / 'run' / 'clipcap'
    events = EventAccumulator(str(board)).Reload()
    assert [e.step for e in events.Images('captions')] == [1, 2]
    assert [e.step for e in events.Tensors('captions/text_summary')] == [1, 2]
    assert len(events.Scalars('val_loss')) == 2
    assert "'<end>'" in (board / '00000' / 'words' / 'metadata.tsv').read_text()


def test_ensemble_in_the_shell(trained, tmp_path):
    best = trained / 'run' / 'best'
    clipcap('ensemble', best, best, '--output', tmp_path / 'both')
    how = ['--device', 'cpu', '--beams', 1]
    twice = clipcap('caption', *pictures(trained), '--model', tmp_path / 'both', *how)
    assert twice == clipcap('caption', *pictures(trained), '--model', best, *how)
    tower = VisionTower.from_pretrained(best / 'vision', 'pooled', 96, 'cpu')
    CaptionModel.from_pretrained(best).save_pretrained(tmp_path / 'other', tower)
    line = complaint('ensemble', best, tmp_path / 'other', '--output', tmp_path / 'none')
    assert 'sees with another tower' in line
    assert not (tmp_path / 'none').exists()
