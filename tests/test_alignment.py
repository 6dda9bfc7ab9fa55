"Words and regions: the score, the loss, training and resuming, boxes, phrases, CLIP, and the two commands"

import base64
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import clipcap, complaint
from PIL import Image

from clipcap.base.captions import read_dataset
from clipcap.base.files import ClipcapError
from clipcap.base.scenes import draw_dataset
from clipcap.base.store import FeatureStore
from clipcap.embed import VisionTower, embed_images
from clipcap.methods.alignment import (
    AlignConfig,
    Aligner,
    alignment_recall,
    load_aligner,
    make_vocabulary,
    pair_scores,
    photo_batches,
    ranking_loss,
    save_aligner,
    score_table,
    train_aligner,
    words_of,
)
from clipcap.methods.phrases import (
    ClipAligner,
    PhotoAligner,
    align_caption,
    align_dataset,
    draw_alignment,
    find_phrase,
    open_aligner,
    photos_and_regions,
    word_regions,
)
from clipcap.methods.regions import (
    Detector,
    RegionTower,
    TorchvisionDetector,
    cell_boxes,
    crop_boxes,
    draw_regions,
    open_regions,
    region_boxes,
    reopen_regions,
    seen_part,
    top_boxes,
)

small = AlignConfig(
    space=16, word_size=8, hidden=8, at_least=1, epochs=20, sum_epochs=20, batch_size=16, rate=2e-2
)
things = ['cat', 'dog', 'sun', 'car']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "60 made-up photos of four cells: two of them hold a thing, a feature of its own, and the captions name both"
    folder, rng, n = tmp_path_factory.mktemp('world'), np.random.default_rng(0), 60
    held, features = (
        [rng.choice(4, 2, replace=False) for _ in range(n)],
        rng.normal(size=(n, 4, 16)) * 0.05,
    )
    places = [rng.choice(4, 2, replace=False) for _ in range(n)]
    for i in range(n):
        features[i, places[i], held[i]] += 1
    names = [f'{i:02}.jpg' for i in range(n)]
    np.save(folder / 'features.npy', features.astype(np.float16))
    (folder / 'manifest.json').write_text(
        json.dumps(
            dict(
                whole=True,
                fingerprint='made-up',
                tower=dict(cells=4, dim=16),
                skipped={},
                names=names,
                identities=base64.b64encode(bytes(32 * n)).decode(),
            )
        )
    )
    rows = [
        (names[i], f'a {things[a]} and a {things[b]}', 'val' if i < 12 else 'train')
        for i in range(n)
        for a, b in (held[i], held[i][::-1])
    ]
    return (
        pd.DataFrame(rows, columns=['image', 'caption', 'split']),
        FeatureStore.open(folder),
        held,
        places,
    )


def new(table, store, config=small, seed=0):
    torch.manual_seed(seed)
    return Aligner(make_vocabulary(table.caption, 1), store.dim, True, config)


@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
    table, store, *_ = world
    aligner, folder = new(table, store), tmp_path_factory.mktemp('run')
    return aligner, train_aligner(aligner, table, store, folder, progress=False), folder


# ---- score and loss
def test_score_is_the_sum_over_words_of_the_best_region():
    rng = np.random.default_rng(1)
    for photos, regions, captions, words in itertools.product([1, 3], [1, 4], [1, 5], [1, 6]):
        v, s, lengths = (
            rng.normal(size=(photos, regions, 7)),
            rng.normal(size=(captions, words, 7)),
            rng.integers(1, words + 1, captions),
        )
        plain = [
            [
                sum(
                    max(float(np.dot(v[k, i], s[l, t])) for i in range(regions))
                    for t in range(lengths[l])
                )
                for l in range(captions)
            ]
            for k in range(photos)
        ]
        mask = torch.arange(words) < torch.tensor(lengths)[:, None]
        assert np.allclose(pair_scores(torch.tensor(v), torch.tensor(s), mask), plain, atol=1e-5)


def test_loss_by_hand_and_by_loops():
    S = torch.tensor([[2.0, 1.5, 0], [0.5, 1, 3], [0, 0, 0]])
    # photo 0: .5; photo 1: .5 + 3; photo 2: 1 + 1. Caption 0: 0 (by .5 - 2 + 1) and 0; caption 1: 1.5 + 0; caption 2: 1 + 4
    assert ranking_loss(S).item() == pytest.approx((0.5 + 3.5 + 2 + 1.5 + 5) / 3) and ranking_loss(
        S, hardest=True
    ).item() == pytest.approx((0.5 + 3 + 1 + 0 + 1.5 + 4) / 3)
    S, n = torch.randn(6, 6), 6
    for margin in (0.2, 1, 3):
        plain = (
            sum(
                max(0, S[k, l] - S[k, k] + margin) + max(0, S[l, k] - S[k, k] + margin)
                for k in range(n)
                for l in range(n)
                if k != l
            )
            / n
        )
        assert ranking_loss(S, margin).item() == pytest.approx(float(plain), rel=1e-5)
    assert ranking_loss(torch.ones(1, 1)) == 0


def test_padding_and_company_do_not_count(world):
    table, store, *_ = world
    aligner, features = new(table, store).eval(), torch.randn(5, 4, 16)
    texts = ['a cat', 'a dog and a sun and a car and a cat', 'sun', 'nonsense', '!']
    together = aligner(features, *aligner.encode(texts))
    for n, text in enumerate(texts):
        assert torch.allclose(
            aligner(features[2:3], *aligner.encode([text])), together[2:3, n : n + 1], atol=1e-5
        )
    ids, lengths = aligner.encode(texts)
    noise = torch.where(
        torch.arange(ids.shape[1]) < lengths[:, None], ids, torch.randint(2, 6, ids.shape)
    )  # anything where padding was
    assert torch.allclose(aligner(features, noise, lengths), together, atol=1e-5)


def test_gradients_reach_everything_that_learns(world):
    table, store, *_ = world
    aligner = new(table, store).train()
    ranking_loss(
        aligner(torch.randn(6, 4, 16), *aligner.encode(list(table.caption[:6])))
    ).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aligner.parameters())
    assert aligner.read.embedding.weight.grad[0].abs().sum() == 0


# ---- words and batches
def test_words():
    assert words_of(
        "Two DOGS' ball, dog’s 3-D café!"
    ) == "two dogs ball dog’s 3 d café".split() and words_of('') == ['?']
    assert make_vocabulary(['b b a', 'a c', '? ?'], 2) == ['', '?', 'a', 'b']


@pytest.mark.parametrize('size', [2, 3, 16])
def test_a_batch_never_holds_a_photo_twice(size):
    photos = np.random.default_rng(0).integers(0, 9, 60)
    batches = photo_batches(photos, size, 3, 1)
    assert all(1 < len(b) <= size and len(set(photos[b])) == len(b) for b in batches)
    used = np.concatenate(batches)
    assert len(set(used)) == len(used) > 40
    assert (
        [b.tolist() for b in batches]
        == [b.tolist() for b in photo_batches(photos, size, 3, 1)]
        != [b.tolist() for b in photo_batches(photos, size, 3, 2)]
    )


# ---- training
def test_it_finds_the_photos_and_the_regions(world, trained):
    table, store, held, places = world
    aligner, history, _ = trained
    assert (
        len(history) == small.epochs
        and history.loss.iloc[-1] < history.loss.iloc[0] / 2
        and history.score.max() > 0.9
    )
    with torch.inference_mode():
        for i in range(12):  # photos never learned from: each thing on its cell
            words, mask = aligner.read(
                *aligner.encode([f'a {things[held[i][0]]} and a {things[held[i][1]]}'])
            )
            seen = aligner.see(torch.tensor(store[[i]], dtype=torch.float32))[0, 1:]
            assert [(seen @ words[0, t]).argmax().item() for t in (1, 4)] == places[i].tolist()


def test_saved_and_loaded(world, trained):
    table, store, *_ = world
    aligner, history, folder = trained
    best, about = load_aligner(folder)
    check = table[table.split == 'val']
    assert about is None and alignment_recall(best, check, store)[
        'recall@10'
    ].mean() == pytest.approx(history.score.max())
    save_aligner(aligner, folder / 'copy')
    again, _ = load_aligner(folder / 'copy')
    names, texts = sorted(check.image.unique()), list(check.caption[:7])
    assert np.allclose(
        score_table(again, store, names, texts),
        score_table(aligner, store, names, texts, 3),
        atol=1e-4,
    )
    assert {p.name for p in (folder / 'copy').iterdir()} == {
        'config.json',
        'model.safetensors',
        'vocabulary.json',
    }
    with pytest.raises(ClipcapError, match='without its vision tower'):
        PhotoAligner(folder / 'copy')
    for broken in 'config.json', 'model.safetensors', 'vocabulary.json':
        save_aligner(aligner, folder / 'copy')
        (folder / 'copy' / broken).write_text('{')
        with pytest.raises(ClipcapError, match='clipcap align'):
            load_aligner(folder / 'copy')


def test_a_killed_run_goes_on(world, trained, tmp_path):
    table, store, *_ = world

    def killed(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_aligner(new(table, store), table, store, tmp_path, report=killed, progress=False)
    history = train_aligner(
        new(table, store, seed=5), table, store, tmp_path, progress=False
    )  # other weights: those of the checkpoint count
    assert np.allclose(history.loss, trained[1].loss, rtol=1e-3) and len(history) == small.epochs
    with pytest.raises(ClipcapError, match='other settings'):
        train_aligner(
            new(table, store, AlignConfig(space=16, word_size=8, hidden=8, rate=0.5)),
            table,
            store,
            tmp_path,
            progress=False,
        )


def test_without_validation_and_without_photos(world, tmp_path):
    table, store, *_ = world
    learn = table[table.split == 'train']
    config = AlignConfig(space=16, word_size=8, hidden=8, epochs=2, batch_size=16, precision='bf16')
    history = train_aligner(new(table, store, config), learn, store, tmp_path / 'a', progress=False)
    assert 'score' not in history and load_aligner(tmp_path / 'a')[0].config == config
    with pytest.raises(ClipcapError, match='two photos'):
        train_aligner(new(table, store), learn[:2], store, tmp_path / 'b', progress=False)
    for wrong in dict(batch_size=1), dict(dropout=1.0), dict(precision='int8'), dict(epochs=0):
        with pytest.raises(ClipcapError):
            AlignConfig(**wrong)


# ---- regions
@pytest.mark.parametrize('size', [(300, 200), (100, 400), (64, 64)])
def test_cells_lie_where_the_tower_looks(size):
    "The first and the last cell of the seen part, found again by what the processor leaves of a picture of coordinates"
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size=dict(shortest_edge=80),
        crop_size=dict(height=60, width=60),
        do_normalize=False,
        resample=0,
    )
    w, h = size
    picture = Image.fromarray(
        np.stack(
            [
                np.tile(np.arange(w) * 255 / (w - 1), (h, 1)),
                np.tile((np.arange(h) * 255 / (h - 1))[:, None], (1, w)),
                np.zeros((h, w)),
            ],
            2,
        )
        .round()
        .astype(np.uint8)
    )
    left = np.array(processor(images=[picture], return_tensors='np')['pixel_values'][0])
    boxes = cell_boxes(seen_part(size, processor), 9)
    for n, (rows, columns) in {
        0: (slice(0, 20), slice(0, 20)),
        5: (slice(20, 40), slice(40, 60)),
    }.items():
        x, y = left[0, rows, columns], left[1, rows, columns]
        assert np.allclose(boxes[n], [x.min(), y.min(), x.max(), y.max()], atol=0.025)


def test_crops():
    photo = Image.fromarray(np.arange(80 * 60 * 3).reshape(60, 80, 3).astype(np.uint8))
    [a, b, c, d] = crop_boxes(
        photo,
        np.array(
            [[0, 0, 1, 1], [0.25, 0.5, 0.75, 1], [-1, -1, 0.1, 0.1], [0.999, 0.2, 0.999, 0.2]]
        ),
    )
    assert (
        np.array_equal(a, photo)
        and np.array_equal(b, np.asarray(photo)[30:60, 20:60])
        and c.size == (8, 6)
        and d.size == (1, 1)
    )
    assert draw_regions(photo, np.zeros((0, 4)), [], 100).size == (100, 75)


@pytest.fixture(scope='module')
def detr(tmp_path_factory):
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    folder = tmp_path_factory.mktemp('detr')
    torch.manual_seed(1)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type='basic',
        out_features=['stage2'],
    )
    DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            num_queries=5,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_labels=3,
        )
    ).save_pretrained(folder)
    DetrImageProcessor(size=dict(shortest_edge=48, longest_edge=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp('data') / 'scenes', 24, size=64)


def test_top_boxes():
    three = lambda photo: np.array([[0.1, 0.1, 0.2, 0.2], [-0.5, 0, 1.5, 1], [0, 0, 0.3, 0.3]])
    assert (
        top_boxes(three, None, 2).tolist() == [[0, 0, 1, 1], [0.1, 0.1, 0.2, 0.2], [0, 0, 1, 1]]
        and top_boxes(three, None, 5)[4:].tolist() == [[0, 0, 1, 1]] * 2
    )
    assert top_boxes(lambda photo: np.zeros((0, 4)), None, 1).tolist() == [[0, 0, 1, 1]] * 2


def test_boxes_of_a_detector_all_the_way(detr, scenes, tmp_path):
    "Detected, cut out, seen one by one, stored, aligned, saved with the detector, opened, searched"
    tower = open_regions('tiny', detr, 4, device='cpu')
    photo = Image.open(sorted((scenes / 'images').iterdir())[0]).convert('RGB')
    found, by_hand = (
        tower.boxes(photo),
        tower.detector.model(**tower.detector.processor(images=[photo], return_tensors='pt')),
    )
    sure = by_hand.logits.softmax(-1)[0, :, :-1].amax(-1).argmax()
    x, y, w, h = by_hand.pred_boxes[0, sure].tolist()
    assert found.shape == (5, 4) and np.allclose(
        found[1], np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 1), atol=1e-5
    )
    one = tower(tower.preprocess([photo]))[0]
    alone = torch.cat(
        [tower.tower(tower.tower.preprocess([part]))[0] for part in crop_boxes(photo, found)]
    )
    assert torch.allclose(one, alone, atol=1e-3)
    config = AlignConfig(space=16, word_size=8, hidden=8, at_least=1, epochs=1, batch_size=8)
    align_dataset(scenes, tmp_path / 'run', tower, config, progress=False)
    aligner = open_aligner(tmp_path / 'run', 'cpu')
    assert (
        aligner.aligner.whole is False
        and aligner.tower.fingerprint == tower.fingerprint
        and (tmp_path / 'run' / 'best' / 'vision' / 'detector').is_dir()
    )
    assert find_phrase(aligner, 'a red ball', [photo], top=3).box[0] in [
        tuple(np.round(b, 3)) for b in found
    ]


def test_detectors_that_are_not_there(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    for name in tmp_path, 'no/such':
        with pytest.raises(ClipcapError, match='detector'):
            Detector(name)
    try:
        import torchvision
    except ImportError:
        with pytest.raises(ClipcapError, match='torchvision is not installed'):
            TorchvisionDetector()
    with pytest.raises(ClipcapError, match='pooled'):
        RegionTower(open_regions('tiny', device='cpu'), None)


# ---- phrases
def test_word_regions_against_every_way():
    rng = np.random.default_rng(2)
    for _ in range(30):
        words, regions, beta = rng.integers(1, 5), rng.integers(1, 4), rng.choice([0, 0.4, 3])
        agreement = rng.normal(size=(words, regions))
        worth = lambda way: (
            agreement[range(words), list(way)].sum() + beta * (np.diff(way) == 0).sum()
        )
        assert worth(word_regions(agreement, beta)) == pytest.approx(
            max(map(worth, itertools.product(range(regions), repeat=int(words))))
        )


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp('clip')
    torch.manual_seed(0)
    words = Tokenizer(
        models.WordLevel(
            {w: n for n, w in enumerate(['?', '<end>', '<start>', 'a', 'red', 'ball', 'star'])},
            unk_token='?',
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single='<start> $A <end>', special_tokens=[('<start>', 2), ('<end>', 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token='<start>', eos_token='<end>', pad_token='<end>'
    ).save_pretrained(folder)
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    CLIPModel(
        CLIPConfig(
            text_config=tiny
            | dict(
                vocab_size=7,
                max_position_embeddings=8,
                eos_token_id=1,
                bos_token_id=2,
                pad_token_id=1,
            ),
            vision_config=tiny | dict(image_size=32, patch_size=8),
            projection_dim=12,
        )
    ).save_pretrained(folder)
    CLIPImageProcessor(
        size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)
    ).save_pretrained(folder)
    return folder


def test_clip_through_the_same_score(clip, scenes):
    aligner, photos = open_aligner(clip, 'cpu'), sorted((scenes / 'images').iterdir())[:5]
    assert isinstance(aligner, ClipAligner)
    regions, (words, vectors) = aligner.regions(photos, 2), aligner.words('a red ball')
    assert (
        words == ['a', 'red', 'ball']
        and regions.shape == (5, 17, 12)
        and torch.allclose(regions[3:4], aligner.regions(photos[3:4]), atol=1e-5)
    )
    assert np.allclose(
        regions[:, 0], aligner.towers.photos(photos), atol=1e-5
    )  # the whole photo as CLIP sees it
    ends = aligner.model.text_model(
        **aligner.towers.tokenizer('a red ball', return_tensors='pt')
    ).last_hidden_state[0]
    assert np.allclose(
        torch.nn.functional.normalize(aligner.model.text_projection(ends)[-1], dim=-1).detach(),
        aligner.towers.captions(['a red ball'])[0],
        atol=1e-5,
    )
    found = find_phrase(aligner, 'a red ball', photos, top=9)
    plain = [sum(max(float(r @ w) for r in photo) for w in vectors) for photo in regions]
    assert len(found) == 5 and np.allclose(found.score, sorted(plain, reverse=True), atol=1e-5)
    aligned = align_caption(aligner, photos[0], 'a red ball')
    assert (
        list(aligned.word) == words and draw_alignment(photos[0], aligned, width=100).width == 100
    )
    assert aligner.words('a red ball a red ball a red ball a red')[1].shape == (
        6,
        12,
    )  # eight places, two of them start and end
    with pytest.raises(ClipcapError, match='no word'):
        aligner.words('')


# ---- commands
def test_commands(scenes, clip, tmp_path):
    learn = [
        'align',
        '--data',
        scenes,
        '--model-out',
        tmp_path / 'run',
        '--epochs',
        2,
        '--batch-size',
        8,
        '--cells',
        4,
        '--device',
        'cpu',
    ]
    said, _ = clipcap(*learn)
    assert 'epoch 2: loss' in said and 'median rank' in said and 'clipcap search' in said
    again, _ = clipcap(*learn)
    assert (
        again.splitlines()[-4:] == said.splitlines()[-4:] and 'epoch 2: loss' not in again
    )  # nothing left to learn
    assert 'other settings' in complaint(*learn, '--rate', 0.1)
    said, _ = clipcap(
        'search',
        'a red ball',
        scenes,
        '--model',
        tmp_path / 'run',
        '--top',
        3,
        '--sheet',
        tmp_path / 'found.png',
        '--store',
        tmp_path / 'run' / 'features',
        '--device',
        'cpu',
    )
    lines = [line.split('\t') for line in said.splitlines()]
    assert (
        len(lines) == 3
        and all(Path(photo).is_file() and len(box.split(',')) == 4 for photo, _, box in lines)
        and [float(s) for _, s, _ in lines] == sorted((float(s) for _, s, _ in lines), reverse=True)
    )
    assert Image.open(tmp_path / 'found.png').width > 900
    assert (
        len(
            clipcap(
                'search',
                'a star',
                scenes / 'images',
                '--model',
                clip,
                '--top',
                2,
                '--device',
                'cpu',
            )[0].splitlines()
        )
        == 2
    )
    assert 'no-model' in complaint('search', 'a', scenes, '--model', tmp_path / 'no-model')
    assert 'no captions file' in complaint(
        'align', '--data', tmp_path, '--model-out', tmp_path / 'x'
    )
    assert (
        'torchvision'
        in complaint(
            'align',
            '--data',
            scenes,
            '--model-out',
            tmp_path / 'x',
            '--detector',
            'fasterrcnn_resnet50_fpn',
        )
        or 'torchvision' in sys.modules
    )


def test_a_broken_photo_is_left_out(scenes, tmp_path):
    learn = tmp_path / 'photos'
    learn.mkdir()
    for photo in sorted((scenes / 'images').iterdir())[:3]:
        (learn / photo.name).write_bytes(photo.read_bytes())
    (learn / 'broken.jpg').write_text('no photo')
    tower = open_regions('tiny', cells=4, device='cpu')
    aligner = PhotoAligner.__new__(PhotoAligner)
    aligner.tower, aligner.aligner = tower, Aligner(['', '?', 'a'], tower.dim, True, small).eval()
    with pytest.warns(UserWarning, match='broken.jpg'):
        photos, regions = photos_and_regions(aligner, learn, progress=False)
    assert len(photos) == len(regions) == 3
