"Captioner and find_model where a notebook does not reach: a model from a Hub, what is drawn"

import shutil
from pathlib import Path

import pytest
from hub import Hub
from PIL import Image

from clipcap.base.pictures import contact_sheet, draw_caption
from clipcap.image import Captioner, find_model

photo = Image.linear_gradient('L').resize((90, 60))


asking = '''
import sys
from clipcap.base.files import ClipcapError
from clipcap.image import Captioner, find_model
from PIL import Image
photo = Image.linear_gradient('L').resize((90, 60))
for name in sys.stdin:
    try:
        captions = Captioner(name.strip(), device='cpu').caption(photo)
        print(find_model(name.strip()), captions, sep='|', flush=True)
    except ClipcapError as error:
        print(error, flush=True)
'''


def test_a_model_of_the_hub(tmp_path):
    shutil.copytree(find_model('tiny'), tmp_path / 'hub' / 'tiny')
    for name in ('run_me.py', 'weights.bin', 'README.md'):
        (tmp_path / 'hub' / 'tiny' / name).write_text('not wanted')
    hub, home = Hub(tmp_path / 'hub'), tmp_path / 'home'
    expected = str(Captioner(device='cpu').caption(photo))
    with hub.asked(asking, home) as ask:
        folder, said = ask('someone/tiny').split('|')
        assert said == expected
        assert Path(folder).is_relative_to(home)
        assert not [p.name for p in Path(folder).rglob('*') if p.suffix in ('.py', '.bin', '.md')]
        assert 'someone/nothing' in ask('someone/nothing')
        hub.close()
        from_cache = ask('someone/tiny')
        assert from_cache.split('|') == [folder, expected]
        away = ask('someone/else')
        for part in ('someone/else', 'tiny', 'folder'):
            assert part in away


@pytest.mark.parametrize('width', [64, 200, 1000])
@pytest.mark.parametrize('size', [(1, 1), (90, 60), (20_000, 10), (10, 20_000)])
def test_captions_stay_on_the_strip(width, size):
    text = (
        'an uncommonlylongwordwithoutanyplacetobreakit '
        'and then a good many shorter ones, 犬 и собака'
    )
    picture = draw_caption(Image.new('RGB', size, 'red'), text, width)
    dark = (
        picture.convert('L').point(lambda v: 255 * (v < 60)).getbbox()
    )  # red is lighter than that
    assert picture.width == width and dark[0] > 0 and dark[2] < width and dark[3] < picture.height


def test_contact_sheet():
    sheet = contact_sheet([photo] * 5, ['one'] + ['two words'] * 4, columns=2, width=100)
    assert sheet.width == 2 * 100 + 3 * 5
    assert (
        contact_sheet([photo], [''], width=100).width == 110 and contact_sheet([], []).size[0] > 0
    )
    with pytest.raises(ValueError):
        contact_sheet([photo], [])
