"COCO as it is published: Karpathy's JSON beside the unzipped folders, and the one command on it"

import json

import numpy as np
import pytest
import torch
from conftest import clipcap
from PIL import Image
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from clipcap.base.captions import read_dataset
from clipcap.tools.tiny import make_tokenizer

SPLITS = ['train'] * 6 + ['restval'] * 3 + ['val'] * 2 + ['test'] * 2


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    rng = np.random.default_rng(0)
    images = []
    for number, split in enumerate(SPLITS):
        place = 'train2014' if split == 'train' else 'val2014'
        name = f'COCO_{place}_{number:012}.jpg'
        (folder / place).mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / place / name)
        sentences = [
            dict(
                tokens=['a', 'man', 'rides', 'horse', str(k)],
                raw=f'A man rides horse {k} in "annotations".',
                imgid=number,
                sentid=10 * number + k,
            )
            for k in range(5)
        ]
        images.append(
            dict(
                filepath=place,
                sentids=[sentence['sentid'] for sentence in sentences],
                filename=name,
                imgid=number,
                split=split,
                sentences=sentences,
                cocoid=number,
            )
        )
    text = json.dumps(dict(images=images, dataset='coco'))
    (folder / 'dataset_coco.json').write_text(text)
    # what else the archives bring
    (folder / 'annotations').mkdir()
    (folder / 'annotations' / 'captions_val2014.json').write_text('{"images": []}')
    return folder


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "A CLIP and a GPT-2 with random weights, as small as they may be"
    folder = tmp_path_factory.mktemp('parts')
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = CLIPConfig(
        text_config=dict(**small, vocab_size=9, bos_token_id=0, eos_token_id=1),
        vision_config=dict(**small, image_size=32, patch_size=16),
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder / 'clip')
    processor = dict(
        image_processor_type='CLIPImageProcessor',
        size=dict(shortest_edge=32),
        crop_size=dict(height=32, width=32),
    )
    (folder / 'clip' / 'preprocessor_config.json').write_text(json.dumps(processor))
    tokenizer = make_tokenizer(['a man rides a horse'] * 9, 300)
    tokenizer.save_pretrained(folder / 'gpt2')
    ends = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    gpt = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(gpt).save_pretrained(folder / 'gpt2')
    return folder


def test_the_published_json_and_folders_are_read_as_they_come(coco):
    table, photos = read_dataset(coco)
    assert photos == coco / '.'
    by_split = table.groupby('split').image.nunique().to_dict()
    assert by_split == dict(train=9, val=2, test=2)
    assert table.image[0] == 'train2014/COCO_train2014_000000000000.jpg'
    assert all((photos / name).is_file() for name in table.image.unique())
    assert len(table) == 5 * len(SPLITS)


@pytest.mark.parametrize('preset', ['clipcap-mlp', 'clipcap-transformer'])
def test_one_command_trains_on_it_and_another_scores_it(coco, parts, tmp_path, preset):
    small = ['--tower', parts / 'clip', '--language', parts / 'gpt2', '--epochs', 1]
    if preset == 'clipcap-transformer':
        small += ['--mapper-layers', 1, '--mapper-heads', 2, '--prefix-length', 4]
    run = tmp_path / 'run'
    said, _ = clipcap('train', '--preset', preset, '--data', coco, '--output', run, *small)
    assert 'epoch 1: training loss' in said
    settings = json.loads((run / 'settings.json').read_text())
    # restval is learned from, val and test are not
    assert settings['captions'] == 5 * (9 + 2)
    said, _ = clipcap(
        'evaluate', coco, '--model', run / 'best', '--split', 'test', '-o', tmp_path / 'scores'
    )
    assert 'CIDEr' in said
