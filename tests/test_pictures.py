"Pictures with captions in any script: the font that has the letters, lines, and what is written"

import importlib
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

import clipcap.base.pictures
from clipcap.base.files import ClipcapError
from clipcap.base.pictures import load_font, save_image, wrap_text


def make_font(path, letters):
    "A font whose letters are black squares, of all the height that there is"
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def square(low, high):
        pen = TTGlyphPen(None)
        pen.moveTo((50, low))
        for point in ((50, high), (950, high), (950, low)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = {ord(letter): f'letter{n}' for n, letter in enumerate(letters)}
    order = ['.notdef', *names.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(names)
    builder.setupGlyf({'.notdef': square(0, 10), **dict.fromkeys(order[1:], square(-100, 900))})
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable(dict(familyName='Squares', styleName='Regular'))
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def no_fonts(monkeypatch):
    "The module in a process that has just begun, on a machine without fonts but matplotlib's"
    monkeypatch.setenv('MPL_IGNORE_SYSTEM_FONTS', '1')
    monkeypatch.delenv('CLIPCAP_FONT', raising=False)
    monkeypatch.delitem(sys.modules, 'clipcap.base.pictures')
    module = importlib.import_module('clipcap.base.pictures')
    yield module
    monkeypatch.undo()
    clipcap.base.pictures = sys.modules['clipcap.base.pictures']


@pytest.fixture
def han(tmp_path, monkeypatch, no_fonts):
    "A font for four ideographs and a full stop, and nothing else, named by CLIPCAP_FONT"
    file = make_font(tmp_path / 'han.ttf', '红色的球。')
    monkeypatch.setenv('CLIPCAP_FONT', str(file))
    return no_fonts


def test_letters_that_dejavu_lacks_come_from_another_font(han):
    assert han.load_font(20, '红色的球').getname()[0] == 'Squares'
    assert han.load_font(20, 'a red ball').getname()[0] == 'DejaVu Sans'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        drawn = np.asarray(
            han.draw_caption(Image.new('RGB', (220, 20), 'white'), '红色的球。', 220)
        )
    # five squares of 10 pixels
    assert 350 < (drawn < 128).all(-1).sum() < 550


def test_one_text_in_two_fonts(han):
    font = han.TextFont(20, 'ball 球')
    assert font.getlength('球') == 20
    assert font.getlength('ball 球') == han.load_font(20).getlength('ball ') + 20
    both, latin = (
        np.asarray(han.draw_caption(Image.new('RGB', (220, 20)), text, 220)).sum()
        for text in ('ball 球', 'ball')
    )
    assert both < latin


def test_a_font_of_the_system_is_found(tmp_path):
    home = tmp_path / 'fonts'
    home.mkdir()
    make_font(home / 'han.ttf', '红色的球。')
    program = 'from clipcap.base.pictures import load_font; print(*load_font(20, "红球").getname())'
    env = {name: value for name, value in os.environ.items() if name != 'CLIPCAP_FONT'}
    env |= dict(XDG_DATA_HOME=str(tmp_path), MPLCONFIGDIR=str(tmp_path / 'cache'))
    # fontconfig may know another font with these letters; here only the folder is to be asked
    env |= dict(PATH=str(tmp_path), PYTHONIOENCODING='utf-8')
    run = subprocess.run(
        [sys.executable, '-c', program], env=env, capture_output=True, text=True, encoding='utf-8'
    )
    assert run.stdout.strip() == 'Squares Regular', run.stderr


def test_missing_letters_are_named_once(no_fonts):
    with pytest.warns(UserWarning, match='no font here has 球 红.*CLIPCAP_FONT') as told:
        for _ in range(3):
            no_fonts.draw_caption(Image.new('RGB', (20, 20)), 'ein Ball, 红球 红球', 220)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        no_fonts.draw_caption(Image.new('RGB', (20, 20)), 'ein Bällchen\u200d, собака', 220)
        no_fonts.draw_caption(Image.new('RGB', (20, 20)), '色', 220)  # the script was named


def test_a_font_file_that_is_none(tmp_path, monkeypatch, no_fonts):
    (tmp_path / 'words.ttf').write_text('no font')
    monkeypatch.setenv('CLIPCAP_FONT', str(tmp_path / 'words.ttf'))
    with pytest.raises(ClipcapError, match=r'words\.ttf: not a font'):
        no_fonts.load_font(20, '球')


@pytest.mark.parametrize('width', [40, 100, 333])
@pytest.mark.parametrize(
    'text',
    [
        '一只狗在草地上跑，旁边有一个红色的球。' * 3,
        'ภาพนี้มีลูกบอลสีแดงอยู่ตรงกลาง' * 2,
        'a dog 跑' * 8,
        'x' * 200,
        'e\u0301' * 60,
    ],
)
def test_lines_keep_every_letter_and_are_narrow_enough(text, width):
    font = load_font(20)
    lines = wrap_text(text, font, width)
    assert ''.join(lines).replace(' ', '') == text.replace(' ', '')
    assert all(font.getlength(line) <= width for line in lines)
    assert not any(line[0] in '，。\u0301' for line in lines)


def test_a_long_text_is_wrapped_at_once():
    import time

    begun = time.process_time()
    lines = wrap_text('word ' * 4000 + '字' * 4000, load_font(20), 300)
    assert len(lines) > 400
    assert time.process_time() - begun < 20


def test_a_picture_that_no_format_can_hold_is_one_line(tmp_path):
    with pytest.raises(ClipcapError, match=r'a\.jpg: cannot be written'):
        save_image(Image.new('RGB', (70_000, 1)), tmp_path / 'a.jpg')
    with pytest.raises(ClipcapError, match='shorter name'):
        save_image(Image.new('RGB', (1, 1)), tmp_path / f'{"x" * 260}.jpg')
    assert not list(tmp_path.iterdir())
