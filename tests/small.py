"A very small caption model, its words and its features, and what holds for every model"

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from clipcap.generate import GenerationOptions, generate_captions
from clipcap.model import CaptionModel, MapperConfig

words = ['<|endoftext|>', *'abcdefghij']
spell = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
spell.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=spell, eos_token=words[0], pad_token=words[0])


class Store:
    "Random features of photos whose names are numbers"

    cells, dim, fingerprint = 1, 16, 'random'

    def __init__(self, seed=0, photos=400):
        features = np.random.default_rng(seed).standard_normal((photos, 1, 16))
        self.features = features.astype(np.float16)

    def rows(self, names):
        return np.array([int(n) for n in names])

    def __getitem__(self, rows):
        return self.features[rows]


def small_model(dropout=0.0):
    "Always the same one"
    torch.manual_seed(0)
    language = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words),
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
    mapper = MapperConfig('mlp', feature_dim=16, prefix_length=2, dropout=dropout)
    return CaptionModel(language, tokenizer, mapper)


def assert_batches_change_no_caption(model, features):
    "Greedy, beams and sampling: a photo alone gets the captions that it gets among others"
    for options in (
        GenerationOptions(beams=1),
        GenerationOptions(),
        GenerationOptions(beams=4, candidates=3),
        GenerationOptions(temperature=1.0, seed=3, candidates=2),
    ):
        together = generate_captions(model, features, options)
        assert together == generate_captions(model, features, options, batch_size=1)
        assert together == generate_captions(model, features, options, batch_size=4)
