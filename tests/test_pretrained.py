"""clipcap.tools.published against the published algorithms, written down a second time

Downloads run against a Drive and a Hub on 127.0.0.1. The oracles know nothing of clipcap: they
read the published names, take one feature at a time, keep no cache and no batch."""

import hashlib
import http.server
import json
import os
import re
import sys
import threading

import pytest
import requests
import torch
from conftest import refusal
from hub import Hub
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from clipcap.embed import pixels_of
from clipcap.generate import (
    DECODINGS,
    GenerationOptions,
    PublishedDecoding,
    clip_gpt_tokens,
    clipcap_tokens,
    generate_captions,
)
from clipcap.image import Captioner
from clipcap.model import CaptionModel
from clipcap.tools.published import (
    CHECKPOINTS,
    Checkpoint,
    convert,
    fetch,
    find_published,
    known_models,
    read_checkpoint,
)

PHOTOS = 200  # random features a layout


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stand_in_tokenizer(folder):
    "GPT-2's 256 bytes at their places (the full stop is 13), made-up words, the end token at 50256"
    tokens = sorted(ByteLevel.alphabet()) + [f'Ġw{i}' for i in range(50000)] + ['<|endoftext|>']
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n')


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "A cache with the tokenizer, shared by the tests that only convert"
    folder = tmp_path_factory.mktemp('cache')
    stand_in_tokenizer(folder / 'gpt2')
    return folder


@pytest.fixture
def cache(kept, tmp_path, monkeypatch):
    "A cache of its own, with that tokenizer"
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'gpt2').symlink_to(kept / 'gpt2')
    monkeypatch.setenv('CLIPCAP_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


# ---- small random weights under the published names
def named(beginning, weights):
    return {beginning + name: w.detach().clone() for name, w in weights.items()}


def gpt2(width, vocabulary, layers=2, spread=0.3, tied=True):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=layers,
            n_head=width // 64 or 1,
            n_positions=256,
            initializer_range=spread,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=tied,
        )
    ).eval()


def older(weights, language, layers=2):
    "With the constants that transformers kept among the weights until 2023"
    for i in range(layers):
        weights[f'{language}transformer.h.{i}.attn.bias'] = torch.ones(
            256, 256, dtype=torch.uint8
        ).tril()[None, None]
        weights[f'{language}transformer.h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    if language == 'td.model.':
        weights['ie.model.embeddings.position_ids'] = torch.arange(
            weights['ie.model.embeddings.position_embedding.weight'].shape[0]
        )[None]
    return weights


def mlp_layout(width=32, k=10, size=24, vocabulary=40, tied=True):
    inner = nn.Linear(size, width * k // 2), nn.Linear(width * k // 2, width * k)
    return (
        named('gpt.', gpt2(width, vocabulary, tied=tied).state_dict())
        | named('clip_project.model.0.', inner[0].state_dict())
        | named('clip_project.model.2.', inner[1].state_dict())
    )


def transformer_layout(width=32, k=40, size=20, vocabulary=40, layers=3):
    weights = named('gpt.', gpt2(width, vocabulary).state_dict()) | named(
        'clip_project.linear.', nn.Linear(size, k * width).state_dict()
    )
    weights['clip_project.prefix_const'] = 0.3 * torch.randn(k, width)  # the photo matters
    weights['gpt.transformer.ln_f.bias'] = (
        1.3 * weights['gpt.transformer.wte.weight'][13]
    )  # and a full stop comes now and then
    for i in range(layers):
        block = {
            'norm1.weight': torch.rand(width) + 0.5,
            'norm1.bias': torch.randn(width),
            'norm2.weight': torch.rand(width) + 0.5,
            'norm2.bias': torch.randn(width),
            'attn.to_queries.weight': torch.randn(width, width) / 3,
            'attn.to_keys_values.weight': torch.randn(2 * width, width) / 3,
            'attn.project.weight': torch.randn(width, width) / 4,
            'attn.project.bias': torch.randn(width),
            'mlp.fc1.weight': torch.randn(2 * width, width) / 4,
            'mlp.fc1.bias': torch.randn(2 * width),
            'mlp.fc2.weight': torch.randn(width, 2 * width) / 4,
            'mlp.fc2.bias': torch.randn(width),
        }
        weights |= named(f'clip_project.transformer.layers.{i}.', block)
    return weights


def vision_tower(width, patch, **more):
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 64 or 1,
            image_size=224,
            patch_size=patch,
            **more,
        )
    )


def clip_gpt_layout(width, patch, layers, spread):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True),
        layers,
        enable_nested_tensor=False,
    )
    tower = vision_tower(width, patch, initializer_factor=4.0)
    weights = named('ie.model.', getattr(tower, 'vision_model', tower).state_dict()) | named(
        'td.model.', gpt2(width, 50257, spread=spread).state_dict()
    )
    for name, w in encoder.state_dict().items():
        weights[f'mp.transformer_encoder.{name}'] = w + 0.1 * torch.randn_like(
            w
        )  # layers differ, and so do biases
    return weights | named(
        'mp.mapper.', {name: 3 * w for name, w in nn.Linear(width, 4 * width).state_dict().items()}
    )  # the photo matters


# ---- the published algorithms
def part(weights, beginning):
    return {name[len(beginning) :]: w for name, w in weights.items() if name.startswith(beginning)}


def last_logits(gpt, rows):
    "GPT-2 on embeddings (n, width), or several sequences of one length: what comes after the last"
    n, width = rows.shape[-2:]
    x = rows + gpt['transformer.wpe.weight'][:n]
    for i in range(2):
        p = part(gpt, f'transformer.h.{i}.')
        seen = (
            F.layer_norm(x, [width], p['ln_1.weight'], p['ln_1.bias']) @ p['attn.c_attn.weight']
            + p['attn.c_attn.bias']
        )
        q, k, v = (
            piece.unflatten(-1, (width // 64 or 1, -1)).transpose(-2, -3)
            for piece in seen.chunk(3, -1)
        )
        x = (
            x
            + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
            @ p['attn.c_proj.weight']
            + p['attn.c_proj.bias']
        )
        seen = (
            F.layer_norm(x, [width], p['ln_2.weight'], p['ln_2.bias']) @ p['mlp.c_fc.weight']
            + p['mlp.c_fc.bias']
        )
        x = x + F.gelu(seen, approximate='tanh') @ p['mlp.c_proj.weight'] + p['mlp.c_proj.bias']
    return (
        F.layer_norm(
            x[..., -1, :], [width], gpt['transformer.ln_f.weight'], gpt['transformer.ln_f.bias']
        )
        @ gpt['lm_head.weight'].T
    )


def mlp_prefix(weights, x):
    m = part(weights, 'clip_project.model.')
    y = m['2.weight'] @ torch.tanh(m['0.weight'] @ x + m['0.bias']) + m['2.bias']
    return y.reshape(-1, weights['gpt.transformer.wte.weight'].shape[1])


def transformer_prefix(weights, x, heads=8):
    m, layers = (
        part(weights, 'clip_project.'),
        len({n.split('.')[3] for n in weights if n.startswith('clip_project.transformer.')}),
    )
    k, width = m['prefix_const'].shape
    rows = torch.cat(
        [(m['linear.weight'] @ x + m['linear.bias']).reshape(k, width), m['prefix_const']]
    )
    for i in range(layers):
        p = part(m, f'transformer.layers.{i}.')
        seen = F.layer_norm(rows, [width], p['norm1.weight'], p['norm1.bias'])
        q = seen @ p['attn.to_queries.weight'].T
        keys, values = (seen @ p['attn.to_keys_values.weight'].T).split(width, 1)
        mixed = torch.zeros_like(rows)
        for h in range(heads):
            at = slice(h * width // heads, (h + 1) * width // heads)
            mixed[:, at] = (q[:, at] @ keys[:, at].T / (width // heads) ** 0.5).softmax(1) @ values[
                :, at
            ]
        rows = rows + mixed @ p['attn.project.weight'].T + p['attn.project.bias']
        seen = F.layer_norm(rows, [width], p['norm2.weight'], p['norm2.bias'])
        rows = (
            rows
            + torch.relu(seen @ p['mlp.fc1.weight'].T + p['mlp.fc1.bias']) @ p['mlp.fc2.weight'].T
            + p['mlp.fc2.bias']
        )
    return rows[-k:]


def published_greedy(gpt, prefix):
    said = []
    while len(said) < 67 and 13 not in said:
        said.append(
            last_logits(gpt, torch.cat([prefix, gpt['transformer.wte.weight'][said]]))
            .argmax()
            .item()
        )
    return said


def published_beam(gpt, prefix, width):
    "Slots (tokens, score, length, stopped) as in the published code: stopped ones draw token 0"
    words = gpt['transformer.wte.weight']
    start = last_logits(gpt, prefix).softmax(0).log().topk(width)
    slots = [([t], s, 1, t == 13) for s, t in zip(*(t.tolist() for t in start), strict=True)]
    for _ in range(66):
        if all(stopped for *_, stopped in slots):
            break
        offers, live = [], [slot for slot in slots if not slot[3]]
        after = iter(
            last_logits(
                gpt, torch.stack([torch.cat([prefix, words[tokens]]) for tokens, *_ in live])
            )
            .softmax(1)
            .log()
            .tolist()
        )
        for tokens, score, length, stopped in slots:
            if stopped:
                offers.append((score / length, tokens + [0], length, True))
                continue
            log_probabilities = next(after)
            offers += [
                ((score + value) / (length + 1), tokens + [t], length + 1, t == 13)
                for t, value in enumerate(log_probabilities)
            ]
        offers = sorted(offers, key=lambda offer: -offer[0])[:width]
        slots = [
            (tokens, mean * length, length, stopped) for mean, tokens, length, stopped in offers
        ]
    return [
        tokens[:length]
        for tokens, _, length, _ in sorted(slots, key=lambda slot: -slot[1] / slot[2])
    ]


def clip_gpt_prefix(
    weights, x
):  # one feature; attention over a sequence of one leaves values and projection
    m, layers, width = (
        part(weights, 'mp.'),
        len({n.split('.')[3] for n in weights if n.startswith('mp.transformer_encoder.')}),
        len(x),
    )
    for i in range(layers):
        p = part(m, f'transformer_encoder.layers.{i}.')
        value = (
            p['self_attn.in_proj_weight'][2 * width :] @ x
            + p['self_attn.in_proj_bias'][2 * width :]
        )
        x = F.layer_norm(
            x + p['self_attn.out_proj.weight'] @ value + p['self_attn.out_proj.bias'],
            [width],
            p['norm1.weight'],
            p['norm1.bias'],
        )
        inner = torch.relu(p['linear1.weight'] @ x + p['linear1.bias'])
        x = F.layer_norm(
            x + p['linear2.weight'] @ inner + p['linear2.bias'],
            [width],
            p['norm2.weight'],
            p['norm2.bias'],
        )
    return (m['mapper.weight'] @ x + m['mapper.bias']).reshape(4, -1)


def published_clip_gpt(weights, gpt, x):
    words, places = gpt['transformer.wte.weight'], gpt['transformer.wpe.weight']
    start, tokens = torch.cat([words[50256][None], clip_gpt_prefix(weights, x)]), []
    for _ in range(40):
        rows = torch.cat([start, words[tokens]]) if tokens else start
        for position in range(len(rows)):
            rows[position] += places[position]  # in place: at the first word into `start` itself
        tokens.append(last_logits(gpt, rows).argmax().item())
        if tokens[-1] == 50256:
            break
    return tokens


# ---- token for token
def saved(weights, folder, wrapped=False, zipped=True):
    file = folder / ('epoch_6.pt' if wrapped else 'model.pt')
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    state = dict(
        epoch=6,
        model_state_dict=weights,
        optimizer_state_dict=optimizer.state_dict(),
        scheduler_state_dict=schedule.state_dict(),
        scaler_state_dict=torch.amp.GradScaler('cpu').state_dict(),
        tloss=[2.5, 2.0],
        vloss=[2.6, 2.1],
    )
    torch.save(state if wrapped else weights, file, _use_new_zipfile_serialization=zipped)
    return file


def varied(rows, end, longest):
    "The cases are worth comparing: some captions end, some are cut, few are alike"
    lengths = [len(row) for row in rows]
    assert len({tuple(row) for row in rows}) > 0.5 * len(rows) and len(set(lengths)) > 5
    return sum(row[-1] == end for row in rows), sum(length == longest for length in lengths)


@pytest.mark.parametrize(
    'layout, prefix_of, how',
    [
        (mlp_layout, mlp_prefix, {}),
        (transformer_layout, transformer_prefix, dict(old=True)),
        (lambda: mlp_layout(width=128, tied=False), mlp_prefix, dict(zipped=False)),
    ],
    ids=['mlp', 'transformer old', 'mlp two heads, untied, unzipped'],
)
def test_clipcap_token_for_token(layout, prefix_of, how, cache, tmp_path):
    torch.manual_seed(3)
    weights = layout()
    if how.get('old'):
        older(weights, 'gpt.')
    convert(saved(weights, tmp_path, zipped=how.get('zipped', True)), tmp_path / 'model')
    model, gpt, size = (
        CaptionModel.from_pretrained(tmp_path / 'model'),
        part(weights, 'gpt.'),
        next(
            w.shape[1]
            for n, w in weights.items()
            if n.endswith(('model.0.weight', 'project.linear.weight'))
        ),
    )
    features = torch.randn(PHOTOS, 1, size)
    with torch.inference_mode():
        prefixes = [prefix_of(weights, x[0]) for x in features]
        torch.testing.assert_close(
            model.mapper(features), torch.stack(prefixes), atol=2e-4, rtol=1e-4
        )
        greedy = [published_greedy(gpt, prefix) for prefix in prefixes]
        assert [ids for (ids,) in clipcap_tokens(model.language, model.mapper(features))] == greedy
        ended, cut = varied(greedy, 13, 67)
        assert ended > 10
        few = range(PHOTOS) if how.get('zipped', True) else range(0, PHOTOS, 10)
        beams = [published_beam(gpt, prefixes[i], 5) for i in few]
        assert clipcap_tokens(model.language, model.mapper(features[list(few)]), beams=5) == beams
    assert [len({len(ids) for ids in five}) > 1 for five in beams].count(
        True
    ) > 2  # beams of several lengths in one race
    texts = generate_captions(model, features, batch_size=64)
    assert texts == [[model.tokenizer.decode(ids).strip()] for ids in greedy] and texts[
        :3
    ] == generate_captions(model, features[:3], GenerationOptions(published=True))
    several = generate_captions(
        model, features[list(few)[:9]], GenerationOptions(beams=5, candidates=3)
    )
    assert several == [
        [model.tokenizer.decode(ids).strip() for ids in five[:3]] for five in beams[:9]
    ]


@pytest.mark.parametrize(
    'width, patch, layers, spread, old',
    [(32, 32, 6, 0.5, True), (128, 14, 5, 0.25, False)],
    ids=['S raw old', 'L wrapped new'],
)
def test_clip_gpt_token_for_token(width, patch, layers, spread, old, cache, tmp_path, monkeypatch):
    torch.manual_seed(4)
    weights = clip_gpt_layout(width, patch, layers, spread)
    weights['td.model.transformer.wte.weight'][50256] *= 2.9  # the end token comes now and then
    weights['td.model.lm_head.weight'] = weights['td.model.transformer.wte.weight'].clone()
    if old:
        older(weights, 'td.model.')
    convert(saved(weights, tmp_path, wrapped=not old), tmp_path / 'model')
    model, gpt, features = (
        CaptionModel.from_pretrained(tmp_path / 'model'),
        part(weights, 'td.model.'),
        torch.randn(PHOTOS, 1, width),
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            model.mapper(features)[:, 1:],
            torch.stack([clip_gpt_prefix(weights, x[0]) for x in features]),
            atol=1e-4,
            rtol=1e-4,
        )
        expected = [published_clip_gpt(weights, gpt, x[0]) for x in features]
        assert clip_gpt_tokens(model.language, model.mapper(features)) == expected
    assert len({tuple(ids) for ids in expected}) > 5 and any(len(ids) > 5 for ids in expected)
    if old:
        varied(expected, 50256, 40)
    texts = [model.tokenizer.decode(ids[:-1]).strip() for ids in expected]
    assert generate_captions(model, features) == [[text[:1].upper() + text[1:]] for text in texts]
    # cut sooner: the last token is dropped, a word or not
    texts = [model.tokenizer.decode(ids[:5][:-1]).strip() for ids in expected]
    with monkeypatch.context() as patch_decodings:
        patch_decodings.setitem(DECODINGS, 'clip-gpt', PublishedDecoding('clip-gpt', 5))
        found = generate_captions(model, features)
    assert found == [[text[:1].upper() + text[1:]] for text in texts]
    # the tower inside the file, from its pixels on
    photos = [
        Image.effect_noise((300, 240), 60).convert('RGB'),
        Image.linear_gradient('L').convert('RGB'),
    ]
    captioner = Captioner(tmp_path / 'model', device='cpu')
    tower = vision_tower(width, patch).eval()
    getattr(tower, 'vision_model', tower).load_state_dict(
        part({n: w for n, w in weights.items() if 'position_ids' not in n}, 'ie.model.')
    )
    with torch.inference_mode():
        pixels = pixels_of(photos, captioner.tower.processor)
        seen = tower(pixel_values=pixels).pooler_output
        expected = [published_clip_gpt(weights, gpt, x) for x in seen]
    assert pixels.shape == (2, 3, 224, 224)
    said = [captioner.model.tokenizer.decode(ids[:-1]).strip() for ids in expected]
    assert captioner.caption(photos) == [text[:1].upper() + text[1:] for text in said]


def test_an_empty_caption_is_an_empty_text(cache, tmp_path):
    torch.manual_seed(5)
    weights = clip_gpt_layout(32, 32, 1, 0.3)
    weights['td.model.transformer.ln_f.bias'] = (
        9 * weights['td.model.transformer.wte.weight'][50256]
    )  # nothing but the end token
    convert(saved(weights, tmp_path), tmp_path / 'model')
    model = CaptionModel.from_pretrained(tmp_path / 'model')
    assert generate_captions(model, torch.randn(3, 1, 32)) == [['']] * 3


def test_options(cache, tmp_path):
    torch.manual_seed(6)
    convert(saved(mlp_layout(), tmp_path), tmp_path / 'model')
    model, features = CaptionModel.from_pretrained(tmp_path / 'model'), torch.randn(5, 1, 24)

    def say(**options):
        return generate_captions(model, features, GenerationOptions(**options))

    ours = say(published=False)
    assert '.' not in ''.join(text for (text,) in ours) and all(
        len(text) <= 40 * 8 for (text,) in ours
    )  # a full stop ends ours
    assert (
        say(temperature=1.0, seed=1)
        == say(temperature=1.0, seed=1, published=False)
        != say(temperature=1.0, seed=2)
    )
    assert say(max_length=4) == say(max_length=4, published=False)
    assert 'temperature' in refusal(
        lambda: say(temperature=1.0, published=True)
    ) and '67' in refusal(lambda: say(max_length=4, published=True))
    weights = load_file(
        tmp_path / 'model' / 'model.safetensors'
    )  # safetensors and JSON, and nothing that could run
    assert weights['net.net.0.weight'].shape == (160, 24) and {
        p.suffix for p in (tmp_path / 'model').rglob('*.*')
    } <= {'.json', '.safetensors', '.txt'}


# ---- files that are not what they should be
def test_bad_files(cache, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/sprung',)

    torch.save(dict(model_state_dict=Trap()), tmp_path / 'trap.pt')
    torch.save(Trap(), tmp_path / 'trap_old.pt', _use_new_zipfile_serialization=False)
    good = saved(mlp_layout(), tmp_path)
    for cut in 10, 1000, good.stat().st_size // 2, good.stat().st_size - 20:
        (tmp_path / f'cut{cut}.pt').write_bytes(good.read_bytes()[:cut])
    (tmp_path / 'quota.pt').write_text(
        '<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>'
    )
    (tmp_path / 'empty.pt').touch()
    (tmp_path / 'words.pt').write_text('these are no weights')
    torch.save({'conv1.weight': torch.ones(2)}, tmp_path / 'other.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    torch.save(torch.ones(3), tmp_path / 'tensor.pt')
    less = mlp_layout()
    less.pop('gpt.transformer.h.1.mlp.c_fc.bias')
    torch.save(less, tmp_path / 'less.pt')
    bent = mlp_layout()
    bent['clip_project.model.2.weight'] = torch.ones(3, 3)
    torch.save(bent, tmp_path / 'bent.pt')
    wordless = {n: w for n, w in mlp_layout().items() if not n.startswith('gpt.')}
    torch.save(wordless, tmp_path / 'wordless.pt')
    wanted = {
        'trap.pt': 'more than weights',
        'trap_old.pt': 'more than weights',
        'quota.pt': 'web page',
        'empty.pt': 'truncated',
        'words.pt': 'truncated',
        'other.pt': 'conv1.weight',
        'list.pt': 'layout',
        'tensor.pt': 'layout',
        'less.pt': 'h.1.mlp.c_fc.bias',
        'bent.pt': 'incomplete',
        'wordless.pt': 'incomplete',
        'missing.pt': 'no such file',
    }
    for name, why in (wanted | {p.name: 'truncated' for p in tmp_path.glob('cut*')}).items():
        line = refusal(find_published, tmp_path / name)
        assert name in line and why in line.lower(), line
    assert not (tmp_path / 'sprung').exists() and [p.name for p in cache.iterdir()] == [
        'gpt2'
    ]  # nothing run, nothing half-written
    assert 'h.0.ln_1.weight' in str([*read_checkpoint(good)])


# ---- downloads: Drive and the Hub, played on 127.0.0.1
class Drive(http.server.BaseHTTPRequestHandler):
    "Google Drive for files too large to scan: a page with a form, then the file, in ranges"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get('Range')))
        name = re.search(r'id=(\w+)', self.path)[1]
        if name == 'quota':
            return self.page(
                '<p class="uc-error-caption">Sorry</p><p class="uc-error-subcaption">'
                'Too many users have viewed or downloaded this file recently.</p>'
            )
        if name not in self.server.files:
            return self.page('<title>Error 404</title>', 404)
        if self.path.startswith('/uc'):
            return self.page(
                f'<form id="download-form" action="https://drive.usercontent.google.com/download">'
                f'<input type="hidden" name="id" value="{name}"></form>'
            )
        body, start = self.server.files[name], int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Disposition', f'attachment; filename="{name}.pt"')
        self.send_header('Content-Type', 'application/octet-stream')
        self.send_header('ETag', '"1"')
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.wfile.write(body[start:cut])

    def page(self, html, code=200):
        self.send_response(code)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.end_headers()
        self.wfile.write(html.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def drive(cache, monkeypatch):
    "Whatever is asked of Google goes there; waiting between attempts takes no time"
    pytest.importorskip('gdown', reason='pip install gdown')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Drive)
    server.files, server.cuts, server.asked = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    send = requests.adapters.HTTPAdapter.send

    def rerouted(adapter, request, **how):
        asked = request.url
        assert re.match(r'https://(drive|drive\.usercontent|docs)\.google\.com/', asked), asked
        request.url = re.sub(r'https://[\w.]+', f'http://127.0.0.1:{server.server_port}', asked)
        answer = send(adapter, request, **how | dict(proxies={}))
        answer.url = request.url = asked
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', rerouted)
    monkeypatch.setattr('random.uniform', lambda *_: 0.0)
    yield server
    server.shutdown()
    server.server_close()


def published(monkeypatch, drive, name='file', **facts):
    monkeypatch.setitem(CHECKPOINTS, 'mine', Checkpoint(name, 'me/mine', 'made up', 1, **facts))


def test_fetched_checked_and_converted_once(drive, cache, tmp_path, monkeypatch):
    torch.manual_seed(7)
    body = saved(mlp_layout(), tmp_path).read_bytes()
    drive.files['file'] = body
    published(monkeypatch, drive, size=len(body), sha256=hashlib.sha256(body).hexdigest())
    assert {row['name']: row['here'] for row in known_models()}['mine'] is False
    folder = find_published('mine')
    assert (
        folder == cache / 'mine'
        and CaptionModel.from_pretrained(folder).config.prefix_length == 10
        and {row['name']: row['here'] for row in known_models()}['mine']
    )
    times = len(drive.asked)
    assert (
        find_published('mine') == folder and len(drive.asked) == times == 2
    )  # the page, the file; then never again
    assert sorted(p.name for p in cache.iterdir() if p.suffix != '.lock') == ['gpt2', 'mine']


def test_cut_in_the_middle(drive, cache, monkeypatch):
    def spans():
        # gdown reads half a megabyte at a time, and goes on behind the last that was whole
        return [int(span[6:-1]) for _, span in drive.asked if span]

    body = os.urandom(2_000_000)
    drive.files['file'], drive.cuts = body, [700_000, 1_400_000]
    published(monkeypatch, drive)
    assert fetch('mine').read_bytes() == body  # cut twice, gone on with at once
    assert 0 < spans()[0] <= 700_000 < spans()[1] <= 1_400_000 and len(spans()) == 2
    (cache / 'mine.pt').unlink()
    drive.asked.clear()
    drive.cuts = [600_000] * 5
    line = refusal(fetch, 'mine')  # cut again and again: given up
    assert (
        'drive.google.com/file/d/file/view' in line
        and str(cache / 'mine.pt') in line
        and not (cache / 'mine.pt').exists()
    )
    drive.cuts.clear()
    drive.asked.clear()
    assert (
        fetch('mine').read_bytes() == body and 0 < spans()[-1] <= 600_000
    )  # the next start goes on from there
    assert not [p for p in cache.iterdir() if 'fetched' in p.name]


def test_what_is_not_the_file_is_not_kept(drive, cache, monkeypatch):
    drive.files.update(file=b'other weights', page=b'<html>sign in</html>')
    for name, facts, why in [
        ('file', dict(sha256='0' * 64), 'sha256'),
        ('file', dict(size=5), '13 bytes instead of 5'),
        ('page', {}, 'web page'),
        ('quota', {}, 'Too many users'),
        ('nothing', {}, ''),
    ]:
        published(monkeypatch, drive, name, **facts)
        line = refusal(fetch, 'mine')
        assert why in line and f'/{name}/view' in line and str(cache / 'mine.pt') in line, line
        assert sorted(p.name for p in cache.iterdir() if p.suffix != '.lock') == ['gpt2']
    (cache / 'mine.pt').write_text('<html>Quota exceeded')  # saved by hand, from a browser
    published(monkeypatch, drive)
    assert 'web page' in refusal(fetch, 'mine')
    (cache / 'mine.pt').write_bytes(b'by hand')
    drive.asked.clear()
    assert fetch('mine').read_bytes() == b'by hand' and not drive.asked


def test_no_network(cache, monkeypatch):
    pytest.importorskip('gdown')

    def nowhere(*_, **__):
        raise requests.exceptions.ConnectionError('Name or service not known')

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', nowhere)
    monkeypatch.setattr('random.uniform', lambda *_: 0.0)
    for name in 'coco', 'flickr30k-large':
        line = refusal(Captioner, name)
        assert CHECKPOINTS[name].drive in line and str(cache / f'{name}.pt') in line
    assert 'RN50x4' in refusal(Captioner, 'coco-transformer')
    (cache / 'gpt2').unlink()
    torch.save(mlp_layout(), cache / 'coco.pt')
    line = refusal(find_published, 'coco')  # HF_HUB_OFFLINE, see conftest.py
    assert 'openai-community/gpt2' in line and str(cache / 'gpt2') in line


def test_without_gdown(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    assert 'pip install gdown' in refusal(fetch, 'coco') and str(cache / 'coco.pt') in refusal(
        fetch, 'coco'
    )


hub_asking = '''
import sys, torch
torch.set_num_threads(1)
from clipcap.base.files import ClipcapError
from clipcap.image import Captioner
from PIL import Image
for name in sys.stdin:
    try:
        captioner = Captioner(name.strip(), 'cpu')
        captions = captioner.caption(Image.linear_gradient('L'))
        print(len(captions), captioner.tower.features, captioner.tower.dim, flush=True)
    except ClipcapError as error:
        print(error, flush=True)
'''


def test_the_tower_and_the_tokenizer_come_from_the_hub(kept, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(8)
    sees = dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
    )
    CLIPModel(
        CLIPConfig(
            text_config=dict(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                vocab_size=9,
                bos_token_id=0,
                eos_token_id=1,
            ),
            vision_config=sees,
            projection_dim=512,
        )
    ).save_pretrained(tmp_path / 'hub' / 'clip-vit-base-patch32')
    (tmp_path / 'hub' / 'clip-vit-base-patch32' / 'preprocessor_config.json').write_text(
        json.dumps(
            dict(
                image_processor_type='CLIPImageProcessor',
                size=dict(shortest_edge=64),
                crop_size=dict(height=64, width=64),
            )
        )
    )
    stand_in_tokenizer(tmp_path / 'hub' / 'gpt2')
    (tmp_path / 'hub' / 'gpt2' / 'config.json').write_text(json.dumps(dict(model_type='gpt2')))
    (tmp_path / 'hub' / 'mine').mkdir()
    torch.save(mlp_layout(size=512), tmp_path / 'hub' / 'mine' / 'weights.pt')
    hub = Hub(tmp_path / 'hub')
    cache = dict(CLIPCAP_CACHE=str(tmp_path / 'cache'))
    with hub.asked(hub_asking, tmp_path / 'home', **cache) as ask:
        assert ask('someone/mine/weights.pt') == '1 projected 512'
        assert 'someone/mine' in ask('someone/mine/nothing.pt')
        assert 'someone/nobody' in ask('someone/nobody/weights.pt')
        hub.close()
        from_cache = ask('someone/mine/weights.pt')
        assert from_cache == '1 projected 512'
