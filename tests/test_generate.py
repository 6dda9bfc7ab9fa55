"Decoding: the same tokens as the library, random numbers per photo, nothing that leaks in"

import math
import subprocess
import sys

import pytest
import torch
from conftest import root
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap.base.files import ClipcapError
from clipcap.generate import (
    CacheState,
    GenerationOptions,
    beam_search,
    generate_captions,
    generate_ids,
    score_ids,
    texts_of,
)
from clipcap.image import Captioner
from clipcap.methods.lstm import Vocabulary, word_tokenizer
from clipcap.model import CaptionModel, MapperConfig, token_logits

words = word_tokenizer(Vocabulary(tuple('abcdefghijklmnopqrstuvwxyz')))


def make(seed=0, positions=64, prefix_length=2, layers=2):
    "A small random captioner with decided opinions"
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(words),
        n_embd=32,
        n_layer=layers,
        n_head=2,
        n_positions=positions,
        initializer_range=0.6,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    mapper = MapperConfig('linear', feature_dim=6, prefix_length=prefix_length)
    return CaptionModel(GPT2LMHeadModel(config), words, mapper).eval()


def photos(n, seed=1):
    return torch.randn(n, 1, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('beams', [2, 5])
def test_our_beam_search_is_the_library_s(beams):
    "Token for token; where two captions are a near tie, the same score"
    options = GenerationOptions(beams=beams, candidates=beams, max_length=8)
    barred = [words.pad_token_id, words.bos_token_id, words.unk_token_id]
    with torch.inference_mode():
        for seed in range(4):
            model = make(seed)
            state = CacheState(model.language, model.mapper(photos(6)))
            found = beam_search(
                state,
                beams,
                words.eos_token_id,
                8,
                lambda logits: logits.index_fill(1, torch.tensor(barred), -math.inf),
            )
            library = generate_ids(model, photos(6), options)
            ours = [
                [words.decode(row, skip_special_tokens=True) for row in of_photo]
                for of_photo in found
            ]
            for n, (a, b) in enumerate(zip(ours, texts_of(model, library), strict=True)):
                if a != b:
                    scores = score_ids(model, photos(6)[[n]], library[n : n + 1])[0]
                    assert min(abs(x - y) for x in scores for y in scores if x is not y) < 1e-4


def test_the_library_s_own_settings_do_not_leak():
    "What the makers of a language model stored about decoding has no say"
    model = make()
    options = [
        GenerationOptions(beams=1),
        GenerationOptions(beams=3, candidates=2),
        GenerationOptions(temperature=1.0, seed=3),
    ]
    before = [generate_ids(model, photos(5), one) for one in options]
    stored = model.language.generation_config
    stored.temperature = 9.0
    stored.do_sample = True
    stored.repetition_penalty = 30.0
    stored.num_beams = 4
    stored.min_new_tokens = 9
    stored.no_repeat_ngram_size = 1
    stored.forced_eos_token_id = 7
    stored.length_penalty = -5.0
    stored.max_length = 3
    assert [generate_ids(model, photos(5), one) for one in options] == before
    assert model.language.generation_config is stored and stored.repetition_penalty == 30.0


@pytest.mark.parametrize('more', [{}, {'candidates': 3}, {'beams': 3}, {'top_p': 0.9, 'top_k': 9}])
def test_a_photo_has_random_numbers_of_its_own(more):
    "Neither batch size nor the photos beside it change what is sampled"
    model = make()
    options = GenerationOptions(temperature=1.5, seed=5, max_length=8, **more)
    together = generate_captions(model, photos(12), options)
    for size in (1, 5, 64):
        assert generate_captions(model, photos(12), options, batch_size=size) == together
    last = generate_captions(model, photos(12)[[11]], options, photo_indices=[11])
    assert last == together[11:]
    reordered = generate_captions(
        model, photos(12).flip(0), options, photo_indices=list(range(12))[::-1]
    )
    assert reordered[::-1] == together


def test_copies_of_a_photo_are_captioned_differently():
    model = make()
    copies = photos(1).expand(12, -1, -1)
    for size in (4, 64):
        options = GenerationOptions(temperature=2.0, seed=0, max_length=8)
        captions = generate_captions(model, copies, options, batch_size=size)
        assert len({caption for (caption,) in captions}) > 8


def test_sampling_follows_the_probabilities():
    model = make()
    options = GenerationOptions(temperature=1.3, candidates=1000, seed=0, max_length=1)
    with torch.no_grad():
        ids, mask = torch.tensor([[words.eos_token_id]]), torch.ones(1, 1, dtype=torch.long)
        logits = token_logits(model, photos(1), ids, mask)[0, 0]
    logits[[words.pad_token_id, words.bos_token_id, words.unk_token_id]] = -math.inf
    expected = (logits / 1.3).softmax(-1)
    drawn = torch.tensor(generate_ids(model, photos(1), options)).flatten()
    found = drawn.bincount(minlength=len(words)) / 1000
    assert (found - expected).abs().max() < 0.06  # four standard deviations
    assert found[expected == 0].sum() == 0


def test_the_program_s_random_state_is_left_alone():
    model, before = make(), torch.get_rng_state()
    options = GenerationOptions(temperature=1.0, seed=1, max_length=5)
    generate_captions(model, photos(3), options)
    assert torch.equal(before, torch.get_rng_state())


def test_scores_are_those_of_the_generated_tokens():
    "A caption that was cut is charged no end token; the others are"
    model = make()
    for longest in (1, 3, 20):
        ids = generate_ids(model, photos(4), GenerationOptions(max_length=longest))
        scores = score_ids(model, photos(4), ids)
        for feature, ((row,), (score,)) in zip(
            photos(4), zip(ids, scores, strict=True), strict=True
        ):
            tokens = torch.tensor([row])
            with torch.inference_mode():
                logits = token_logits(model, feature[None], tokens, torch.ones_like(tokens))
            logprobs = logits[0].log_softmax(-1).gather(1, tokens[0][:, None])
            assert score == pytest.approx(logprobs.mean().item(), abs=1e-4)
            assert len(row) <= longest and words.eos_token_id not in row[:-1]


@pytest.mark.parametrize(
    'wrong',
    [
        {'temperature': math.nan},
        {'temperature': math.inf},
        {'temperature': -1.0},
        {'top_p': math.nan},
        {'top_p': 0.0},
        {'top_k': -1},
        {'beams': 10**9},
        {'max_length': 0},
        {'max_length': 10**9},
        {'seed': -1},
        {'candidates': 2, 'beams': 1},
    ],
)
def test_options_have_bounds(wrong):
    with pytest.raises(ClipcapError, match=next(iter(wrong))):
        GenerationOptions(**wrong)


def test_lengths_the_model_has_no_positions_for():
    model = make(positions=16)
    for options in (
        GenerationOptions(max_length=300, temperature=5.0),
        GenerationOptions(max_length=15),
    ):
        with pytest.raises(
            ClipcapError, match='16 positions, 2 of them for the prefix: ask for 14'
        ):
            generate_captions(model, photos(2), options)
    fits = GenerationOptions(max_length=14, temperature=5.0, seed=0)
    generate_captions(model, photos(2), fits)
    generate_captions(model, photos(2))  # the default bends to what there is


def test_features_that_are_not_finite_are_named():
    features = photos(4)
    features[2, 0, 1] = math.nan
    with pytest.raises(ClipcapError, match='photo 2: its feature'):
        generate_captions(make(), features)


quiet_run = '''
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from clipcap.generate import GenerationOptions, clipcap_tokens, generate_captions
from clipcap.image import Captioner
torch.manual_seed(0)
config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
language = GPT2LMHeadModel(config).eval()
for beams in (1, 3):
    clipcap_tokens(language, torch.randn(2, 3, 32), beams=beams)
model = Captioner('tiny', 'cpu').model
features = torch.randn(2, 1, 512)
for options in ({}, {'beams': 1}, {'temperature': 1.0}, {'temperature': 1.0, 'beams': 2}):
    generate_captions(model, features, GenerationOptions(**options))
'''


def test_no_warning_on_the_way():
    run = subprocess.run(
        [sys.executable, '-W', 'always', '-c', quiet_run], capture_output=True, text=True, cwd=root
    )
    ours = [
        line for line in run.stderr.splitlines() if 'deprecat' in line or 'transformers]' in line
    ]
    assert run.returncode == 0 and not ours, run.stderr


def test_a_captioner_samples_alike_in_every_batch():
    from PIL import Image

    picture = Image.linear_gradient('L')
    captioner = Captioner('tiny', 'cpu')
    options = GenerationOptions(temperature=1.0, seed=2)
    found = []
    for size in (4, 12):
        captioner.batch_size = size
        found.append(captioner.caption([picture] * 12, options))
    assert found[0] == found[1] and len(set(found[0])) > 6
    bad = [picture, 'missing.jpg', picture]
    answers = [answer for _, answer in captioner.stream(bad, options)]
    assert answers[2][0].text == found[0][2]  # the third photo stays the third
