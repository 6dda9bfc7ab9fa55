"Why a caption: a made-up model with a known answer, published layouts apart; and the command"

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import clipcap
from PIL import Image, ImageDraw

from clipcap.base.files import ClipcapError
from clipcap.explain import draw_explanation, explain_caption, hide_parts, score_words
from clipcap.generate import score_captions
from clipcap.image import Captioner, in_batches


@pytest.fixture(scope='module')
def tiny():
    return Captioner(device='cpu')


@pytest.fixture(scope='module')
def photo():
    made = Image.new('RGB', (120, 90), '#5f9a5a')
    ImageDraw.Draw(made).ellipse((10, 10, 50, 50), 'red')
    return made


@pytest.mark.parametrize('size', [(120, 90), (31, 200), (3, 3), (1, 1)])
@pytest.mark.parametrize('grid', [2, 7])
def test_all_is_hidden_once_and_no_more(size, grid):
    photo, seen = Image.effect_noise(size, 90).convert('RGB'), 0
    for hidden, cells in hide_parts(photo, grid):
        assert hidden.size == size and cells.sum() == 4
        seen = seen + cells
    assert np.shape(seen) == (grid, grid) and seen.min() >= 1


def test_words_add_up_to_the_caption(tiny):
    features, caption = torch.randn(3, 1, 512), 'a skateboarder somersaults, happily'
    words, scores = score_words(tiny.model, features, caption)
    # with the end token, whose score belongs to no word
    tokens = len(tiny.model.tokenizer.tokenize(caption)) + 1
    whole = np.array(score_captions(tiny.model, features, [[caption]] * 3))[:, 0] * tokens
    assert words == caption.split()
    assert scores.shape == (3, 4)
    assert (scores.sum(1) >= whole - 1e-3).all()
    # a word depends on those before it alone
    longer = score_words(tiny.model, features, caption + ' indeed')[1]
    assert np.allclose(longer[:, :4], scores, atol=1e-3)


def test_a_language_without_spaces_has_words_too(tiny):
    words, scores = score_words(tiny.model, torch.randn(2, 1, 512), '一只狗，跑。')
    assert words == ['一', '只', '狗', '跑']
    assert (scores < 0).all()


def test_the_cell_that_matters_is_found(tiny, photo):
    "A tower that sees redness alone: only where the ball is hidden do the scores change"

    def tower(pixels):
        red = (pixels[:, 0] - pixels[:, 1]).clamp(min=0).mean((1, 2))
        return torch.full((len(pixels), 1, 512), 0.5) * red[:, None, None] * 40

    def preprocess(photos):
        arrays = [np.asarray(photo.resize((60, 60))) / 255 for photo in photos]
        return torch.stack([torch.tensor(array).permute(2, 0, 1).float() for array in arrays])

    tower.preprocess = preprocess
    captioner = SimpleNamespace(tower=tower, model=tiny.model, batch_size=5)
    why = explain_caption(captioner, photo, 'a red ball')
    on = np.abs(why.heat).max(0)
    assert on[:4, :3].max() == on.max() > 0
    assert np.abs(on[5:, 5:]).max() < 1e-3 * on.max() + 1e-4


def test_a_picture_for_each_word(tiny, photo):
    why = explain_caption(tiny, photo)
    assert ' '.join(why.words) == tiny.caption(photo)[0]
    assert all(0 < probability <= 1 for probability in why.probabilities)
    picture = draw_explanation(photo, why, columns=len(why.words) + 1, width=100)
    assert picture.width == 5 + (len(why.words) + 1) * 105
    assert draw_explanation(photo, explain_caption(tiny, photo, ''), width=100).width == 110


def test_batches_fit_into_memory():
    tried = []

    def work(some, room):
        tried.append(len(some))
        if len(some) > room:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return some

    assert in_batches(lambda some: work(some, 3), [*range(20)], 16) == ([*range(20)], 2)
    assert tried[:4] == [16, 8, 4, 2]
    with pytest.raises(ClipcapError, match='memory'):
        in_batches(lambda some: work(some, 0), [1, 2], 2)
    with pytest.raises(RuntimeError, match='other'):
        in_batches(lambda some: (_ for _ in ()).throw(RuntimeError('other')), [1], 1)


def test_the_captioner_halves_its_batches(tiny, photo):
    narrow, tower, tried = Captioner(device='cpu'), tiny.tower, []

    def see(pixels):
        tried.append(len(pixels))
        if len(pixels) > 2:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return tower(pixels)

    see.preprocess, narrow.tower = tower.preprocess, see
    assert narrow.caption([photo] * 5) == tiny.caption([photo] * 5)
    assert tried == [5, 2, 2, 1]
    assert narrow.batch_size == 2


def test_command(tmp_path, photo):
    photo.save(tmp_path / 'my.ball.png')
    (tmp_path / 'bad.jpg').write_text('no photo')
    said, complaints = clipcap(
        'caption',
        tmp_path / 'my.ball.png',
        tmp_path / 'bad.jpg',
        '--explain',
        tmp_path / 'why',
        '--device',
        'cpu',
        code=1,
    )
    assert len(said.splitlines()) == 1
    assert [p.name for p in (tmp_path / 'why').iterdir()] == ['my.ball.png']
    assert Image.open(tmp_path / 'why' / 'my.ball.png').format == 'PNG'
    lines = clipcap('caption', tmp_path / 'my.ball.png', '--explain', tmp_path, code=2)[1]
    assert any('--explain' in line for line in lines)


def test_many_samples_with_beams_are_refused_in_one_line(tmp_path, photo):
    photo.save(tmp_path / 'a.png')
    said, [line] = clipcap(
        'caption', tmp_path / 'a.png', '--temperature', 1, '--beams', 2, '--candidates', 3, code=1
    )
    assert 'candidates' in line


def test_the_earlier_class(tmp_path, photo, tiny, capsys):
    from clipcap.tools.legacy import ImageCaptioner

    photo.save(tmp_path / 'a.b.png')
    old = ImageCaptioner(
        model_size='l', checkpoint_name='tiny', res_path=str(tmp_path / 'out'), temperature=0.0
    )
    old.set_image_path(str(tmp_path / 'a.b.png'))
    assert old.generate_caption(save_image=True) == tiny.caption(photo)[0]
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['a.b-RL.jpg']
    assert 'a.b-RL.jpg' in capsys.readouterr().out
    old.generate_caption(save_image=False)
    assert not capsys.readouterr().out
    with pytest.raises(ClipcapError, match='model_size'):
        ImageCaptioner('XL')
