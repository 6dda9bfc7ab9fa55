"The command: what it prints and where, its exit codes, and one line for whatever a user can cause"

import csv
import http.server
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from conftest import clipcap, complaint
from PIL import Image
from typer.main import get_command

from clipcap.base.photos import list_images
from clipcap.base.scenes import draw_dataset
from clipcap.cli.main import app
from clipcap.cli.models import new_command

command = [sys.executable, '-m', 'clipcap.cli.main']
offline = dict(HTTP_PROXY='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9', NO_PROXY='')


def shell(*arguments, **how):
    "Run the command in a process of its own"
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, **how)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "A data set of 40 drawn scenes"
    return draw_dataset(tmp_path_factory.mktemp('cli') / 'scenes', 40)


@pytest.fixture(scope='module')
def photos(tmp_path_factory, scenes):
    "Three good photos in a folder, not made in the order of their names"
    folder = tmp_path_factory.mktemp('photos')
    for name, scene in zip(
        ('b.jpg', 'c.png', 'a.jpg'), list_images(scenes / 'images'), strict=False
    ):
        Image.open(scene).save(folder / name)
    (folder / 'notes.txt').write_text('not captioned')
    return folder


# ---- the start
HEAVY = {'torch', 'transformers', 'numpy', 'pandas', 'PIL', 'matplotlib', 'huggingface_hub'}
HEAVY |= {'rich', 'tqdm', 'cv2', 'ipywidgets'}


@pytest.mark.parametrize(
    'arguments',
    [
        ['-h'],
        ['--version'],
        ['caption', '-h'],
        ['demo', '-h'],
        ['data', '--help'],
        ['embed', '-h'],
        ['train', '-h'],
        ['evaluate', '-h'],
        ['caption', '--nonsense'],
    ],
)
def test_help_is_light(arguments):
    run = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'clipcap.cli.main', *arguments],
        capture_output=True,
        text=True,
    )
    assert run.returncode == (2 if '--nonsense' in arguments else 0)
    imported = set(re.findall(r'\|\s+(\w+)$', run.stderr, re.M))
    assert 'typer' in imported
    assert not imported & HEAVY
    begins = {'--version': 'clipcap 0', '--nonsense': ''}
    assert run.stdout.startswith(begins.get(arguments[-1], 'Usage: clipcap'))


def test_the_package_is_light():
    program = 'import sys, clipcap; print(*sys.modules)'
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert not HEAVY & set(run.stdout.split())


def test_commands_stand_in_groups():
    groups = re.split(r'^(\w+):$', clipcap('-h')[0], flags=re.M)
    commands = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(commands) == ['Options', 'Caption', 'Train', 'Measure', 'Find', 'Models']
    for group, names in {
        'Caption': 'caption demo video webcam',
        'Train': 'data embed train ensemble align',
        'Measure': 'evaluate',
        'Find': 'search',
        'Models': 'models legacy',
    }.items():
        listed = re.findall(r'^  ([a-z]\S*)', commands[group], re.M)
        assert listed == names.split(), group
        assert '...' not in commands[group], 'a description is cut'


SHORT = {'--model': '-m', '--output': '-o', '--format': '-f', '--number': '-n'}


def test_one_name_for_one_thing():
    for name, command in get_command(app).commands.items():
        if command.hidden:
            continue
        given = [p for p in command.params if p.param_type_name == 'argument']
        assert not any(p.metavar == 'DATA' for p in given[1:]), f'{name}: DATA comes first'
        for option in command.params:
            if option in given:
                assert option.metavar == option.metavar.upper()
                continue
            for long, short in SHORT.items():
                assert (long in option.opts) == (short in option.opts), f'{name} {option.opts}'
            if option.metavar in ('NUMBER', 'SECONDS', 'PIXELS'):
                _, text = option.get_help_record(
                    command.make_context(name, [], resilient_parsing=True)
                )
                assert 'x<=' in text or 'x>=' in text, f'{name} {option.opts} has no bounds'


def test_completion_prints_a_script():
    program = 'from clipcap.cli.main import main; main()'
    env = os.environ | dict(_CLIPCAP_COMPLETE='source_bash')
    run = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True)
    assert 'complete -o default -F _clipcap_completion clipcap' in run.stdout
    env = os.environ | dict(
        _CLIPCAP_COMPLETE='complete_bash', COMP_WORDS='clipcap em', COMP_CWORD='1'
    )
    run = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True)
    assert run.stdout.split() == ['embed']


def test_usage_errors():
    for wrong in (
        [],
        ['capton'],
        ['caption'],
        ['caption', 'a.jpg', '--format', 'xml'],
        ['caption', 'a.jpg', '--format', 'csv,json'],
        ['caption', 'a.jpg', '--format', 'json', '--output', 'a.csv'],
        ['data', '-n', 'many'],
    ):
        assert clipcap(*wrong, code=2)


@pytest.mark.parametrize(
    'option, values',
    {
        '--batch-size': [0, -1, 10**9],
        '--temperature': [-1, 'inf', 1e9],
        '--top-p': [0, 1.1],
        '--top-k': [-1],
        '--beams': [0, 10**6],
        '--candidates': [0, 10**6],
        '--max-length': [0, 10**6],
        '--seed': [-1, 2**70],
    }.items(),
)
def test_every_number_has_bounds(option, values):
    for value in values:
        _, lines = clipcap('caption', 'a.jpg', option, value, code=2)
        assert option in lines[-1]
    assert option in clipcap('caption', 'a.jpg', option, 'nan', code=2)[1][-1]


def all_commands():
    from typer.main import get_command

    from clipcap.cli.main import app

    return sorted(name for name, found in get_command(app).commands.items() if not found.hidden)


@pytest.mark.parametrize('command', all_commands())
def test_every_command_has_debug(command):
    if command == 'legacy':  # hands its options on
        return
    assert '--debug' in clipcap(command, '-h')[0]


@pytest.mark.parametrize('way', ['before', 'after', 'environment'])
def test_debug_shows_the_traceback_behind_an_error(way, monkeypatch):
    arguments = ['caption', 'missing.jpg']
    quiet = clipcap(*arguments, code=1)[1]
    assert len(quiet) == 1
    if way == 'environment':
        monkeypatch.setenv('CLIPCAP_DEBUG', '1')
    else:
        arguments.insert(0 if way == 'before' else 2, '--debug')
    _, lines = clipcap(*arguments, code=1)
    assert lines[0].startswith('Traceback')
    assert any('list_images' in line for line in lines)
    assert lines[-1] == quiet[0]
    monkeypatch.delenv('CLIPCAP_DEBUG', raising=False)
    assert clipcap('caption', 'missing.jpg', code=1)[1] == quiet


# ---- captions
def test_text_one_line_per_photo_in_the_order_of_names(photos):
    said, complaints = clipcap('caption', photos)
    lines = [line.split('\t') for line in said.splitlines()]
    assert [photo for photo, _ in lines] == [str(photos / n) for n in ('a.jpg', 'b.jpg', 'c.png')]
    assert all(text for _, text in lines)
    assert not complaints
    # alone as in company, one photo as many
    assert clipcap('caption', photos / 'b.jpg')[0].splitlines() == ['\t'.join(lines[1])]
    uri = (photos / 'c.png').as_uri()
    several = clipcap('caption', photos / '*.jpg', uri, '--batch-size', 2)[0]
    assert several.split('\t')[-1] == lines[2][1] + '\n'
    assert len(clipcap('caption', photos / 'b.jpg', '--candidates', 3)[0].splitlines()) == 3


def test_json_and_csv(photos):
    plain = json.loads(clipcap('caption', photos, '--format', 'json')[0])
    assert [set(row) for row in plain] == [{'image', 'caption', 'score'}] * 3
    assert [Path(row['image']).name for row in plain] == ['a.jpg', 'b.jpg', 'c.png']
    several = json.loads(clipcap('caption', photos, '-f', 'json', '--candidates', 4)[0])
    for row in several:
        scores = [c['score'] for c in row['candidates']]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
        assert max(scores) < 0
        assert row['candidates'][0] == dict(caption=row['caption'], score=row['score'])
    table = list(csv.DictReader(io.StringIO(clipcap('caption', photos, '-f', 'csv')[0])))
    assert [row | dict(score=float(row['score'])) for row in table] == plain


def test_sampling(photos):
    def sample(*how):
        return clipcap('caption', photos, '--temperature', 1.2, *how)[0]

    assert sample('--seed', 1) == sample('--seed', 1) != sample('--seed', 2)
    assert sample('--top-k', 1) == clipcap('caption', photos, '--beams', 1)[0]
    lengths = [len(line.split('\t')[1].split()) for line in sample('--max-length', 3).splitlines()]
    assert max(lengths) <= 3


def test_output_files(photos, tmp_path):
    said, [line] = clipcap('caption', photos, '-o', tmp_path / 'new' / 'out', '-f', 'all')
    assert not said
    assert line.startswith('Written: ')
    folder = tmp_path / 'new' / 'out'
    assert sorted(p.name for p in folder.iterdir()) == [
        f'captions.{k}' for k in ('csv', 'json', 'txt')
    ]
    assert (folder / 'captions.txt').read_text() == clipcap('caption', photos)[0]
    assert (folder / 'captions.csv').read_text() == clipcap('caption', photos, '-f', 'csv')[0]
    clipcap('caption', photos, '-o', tmp_path / 'one.json')
    assert (tmp_path / 'one.json').read_text() == (folder / 'captions.json').read_text()


@pytest.mark.parametrize('kind', ['csv', 'json'])
def test_captions_can_be_read_back(kind, photos, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(photos, data / 'images')
    said = clipcap('caption', data / 'images', '-f', kind, '--candidates', 2)[0]
    (data / f'captions.{kind}').write_text(said)
    rows = 6 if kind == 'csv' else 3
    assert re.search(rf'^all +3 +{rows} ', clipcap('data', data)[0], re.M)
    people = tmp_path / 'people'
    shutil.copytree(photos, people / 'images')
    lines = [f'{name},a red ball\n' for name in ('a.jpg', 'b.jpg', 'c.png')]
    (people / 'captions.csv').write_text(''.join(['image,caption\n', *lines]))
    arguments = ['--predictions', data / f'captions.{kind}', '--split', 'all', '--bootstrap', 0]
    said = clipcap('evaluate', people, *arguments, '--output', tmp_path / 'out', '--no-meteor')[0]
    assert '3 photos' in said


def test_json_is_json_in_any_encoding(photos, tmp_path):
    photo = tmp_path / 'été 字 😀.jpg'
    shutil.copy(photos / 'a.jpg', photo)
    for encoding in 'ascii', 'cp1252', 'utf-8':
        env = os.environ | dict(PYTHONIOENCODING=encoding)
        run = subprocess.run(
            [*command, 'caption', photo, '-f', 'json'], env=env, capture_output=True
        )
        [row] = json.loads(run.stdout.decode(encoding))
        assert row['image'] == str(photo)
    env['PYTHONIOENCODING'] = 'ascii'
    run = subprocess.run(
        [*command, 'caption', photo, '-f', 'csv', '-o', tmp_path / 'a.csv'],
        env=env,
        capture_output=True,
    )
    assert str(photo) in (tmp_path / 'a.csv').read_text(encoding='utf-8')
    run = subprocess.run([*command, 'caption', photo, '-f', 'csv'], env=env, capture_output=True)
    assert b'lacks some letters' in run.stderr


def test_render(photos, tmp_path):
    (tmp_path / 'more').mkdir()
    shutil.copy(photos / 'a.jpg', tmp_path / 'more' / 'A.jpg')
    shutil.copy(photos / 'c.png', tmp_path / 'more' / 'a.png')
    drawn = tmp_path / 'new' / 'drawn'
    clipcap('caption', photos, tmp_path / 'more', '--render', drawn)
    names = ['A.jpg.jpg', 'a.jpg', 'a.png.jpg', 'b.jpg', 'c.jpg']
    assert sorted(p.name for p in drawn.iterdir()) == names
    for file in list_images(drawn):
        picture = Image.open(file)
        assert picture.format == 'JPEG'
        assert picture.width == 640
        assert picture.height > 660
    before = {p: p.read_bytes() for p in photos.iterdir()}
    itself = f'{photos}/../{photos.name}'
    _, lines = clipcap('caption', photos / 'a.jpg', '--render', itself, code=2)
    assert '--render' in lines[-1]
    assert before == {p: p.read_bytes() for p in photos.iterdir()}


class Photo(http.server.BaseHTTPRequestHandler):
    "Answers every address with the same photo"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.photo)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(photos):
    "The address of a server whose every address is a photo"
    made = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Photo)
    made.photo = (photos / 'a.jpg').read_bytes()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{made.server_port}'
    made.shutdown()
    made.server_close()


def test_odd_names_do_not_end_a_run_that_draws(photos, server, tmp_path):
    folder = tmp_path / 'odd'
    folder.mkdir()
    names = ['x' * 246 + '.jpg', '字' * 80 + '.png', 'a\nb\tc.jpg', 'twice.jpg', 'twice.png']
    for name in names:
        shutil.copy(photos / 'a.jpg', folder / name)
    (folder / 'within').mkdir()
    shutil.copy(photos / 'b.jpg', folder / 'within' / 'twice.jpg')
    addresses = [
        f'{server}/{path}' for path in ('', 'a%00b.jpg', 'a%2F..%2Fb.jpg', '../..', '?a/b')
    ]
    drawn = {'--render': tmp_path / 'drawn', '--explain': tmp_path / 'why'}
    options = [part for pair in drawn.items() for part in pair]
    said, _ = clipcap('caption', folder, folder / 'within', *addresses, *options)
    assert len(said.splitlines()) == 6 + len(addresses)
    assert all(line.count('\t') == 1 for line in said.splitlines())
    for made in drawn.values():
        assert len(list(made.iterdir())) == 6 + len(addresses)
    inside = {'drawn', 'why', 'odd'}
    assert {p.name for p in tmp_path.iterdir()} == inside


def test_a_name_with_a_line_end_keeps_its_reason(tmp_path):
    (tmp_path / 'a\nb.jpg').write_text('no photo')
    line = complaint('caption', tmp_path / 'a\nb.jpg')
    assert r'a\nb.jpg' in line
    assert 'not a photo' in line


def test_a_name_that_is_too_long_is_one_line(photos):
    said, lines = clipcap('caption', 'x' * 300, photos / 'a.jpg', code=1)
    assert len(said.splitlines()) == 1
    assert 'xxx' in lines[0]
    assert '1 of 2' in lines[-1]


# ---- bad input
def bomb(side=60_000):
    "A PNG of a few hundred bytes that claims to be side x side"

    def chunk(kind, data):
        check = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + check

    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'\0' * 1000))
        + chunk(b'IEND', b'')
    )


@pytest.fixture
def mixed(photos, tmp_path):
    "A folder with every kind of bad photo among good ones"
    folder = tmp_path / 'mixed'
    folder.mkdir()
    shutil.copy(photos / 'a.jpg', folder / '0.jpg')
    shutil.copy(photos / 'b.jpg', folder / 'z.jpg')
    (folder / 'empty.jpg').touch()
    (folder / 'words.jpg').write_text('not a photo')
    (folder / 'bomb.png').write_bytes(bomb())
    Image.effect_noise((200, 200), 50).save(folder / 'half.jpg')
    os.truncate(folder / 'half.jpg', 4000)
    Image.new('RGB', (1, 1)).save(folder / 'one.png')
    Image.new('RGB', (20_000, 10)).save(folder / 'strip.png')
    return folder


def test_bad_photos_are_named_and_the_others_captioned(mixed):
    run = shell('caption', mixed, mixed / 'missing.jpg', mixed / 'nothing', '--format', 'json')
    assert run.returncode == 1
    names = [Path(row['image']).name for row in json.loads(run.stdout)]
    assert names == ['0.jpg', 'one.png', 'strip.png', 'z.jpg']
    *lines, last = run.stderr.splitlines()
    assert len(lines) == 6
    assert all(line.startswith('clipcap: ') for line in lines)
    for name in 'missing.jpg', 'nothing', 'empty.jpg', 'words.jpg', 'half.jpg', 'bomb.png':
        assert sum(name in line for line in lines) == 1, name
    assert '6 of 10' in last


def test_one_bad_photo_among_many_that_are_drawn(mixed, tmp_path):
    options = ['--render', tmp_path / 'drawn', '--explain', tmp_path / 'why']
    said, lines = clipcap('caption', mixed, *options, code=1)
    assert len(said.splitlines()) == 4
    assert '4 of 8' in lines[-1]
    for folder in 'drawn', 'why':
        names = sorted(p.stem for p in (tmp_path / folder).iterdir())
        assert names == ['0', 'one', 'strip', 'z']


def test_nothing_to_caption(mixed, tmp_path):
    assert 'missing.jpg' in complaint('caption', mixed / 'missing.jpg')
    assert 'empty.jpg' in complaint('caption', mixed / 'empty.jpg')
    assert 'folder' in complaint('caption', tmp_path)
    assert '*.webp' in complaint('caption', mixed / '*.webp')
    assert 'http://127.0.0.1:9' in complaint('caption', 'http://127.0.0.1:9/a.jpg')
    assert clipcap('caption', mixed / 'missing.jpg', '-f', 'json', code=1)[0] == '[]\n'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_permissions(mixed):
    (mixed / 'z.jpg').chmod(0)
    assert 'z.jpg' in complaint('caption', mixed / 'z.jpg')


def test_models_and_options(photos, tmp_path):
    photo = photos / 'a.jpg'
    for name in 'tinny', tmp_path / 'nothing', 'someone/nothing':
        line = complaint('caption', photo, '--model', name)
        assert str(name) in line
        assert 'tiny' in line
        assert 'folder' in line
    assert 'config.json' in complaint('caption', photo, '--model', tmp_path)
    assert 'abacus' in complaint('caption', photo, '--device', 'abacus')
    assert 'candidates' in complaint('caption', photo, '--candidates', 7, '--beams', 2)


def test_one_bad_name_among_models():
    said, lines = clipcap('models', 'tinny', 'tiny', code=1)
    assert said.startswith('tiny\t')
    assert 'tinny' in lines[0]
    assert '1 of 2' in lines[-1]


def test_no_network(photos):
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'} | dict(
        HF_ENDPOINT='http://127.0.0.1:9'
    )
    run = shell('caption', photos / 'a.jpg', '--model', 'someone/nothing', env=env, timeout=100)
    assert run.returncode == 1
    assert not run.stdout
    [line] = run.stderr.splitlines()
    assert 'someone/nothing' in line


@pytest.mark.parametrize('option', ['--render', '--explain', '--output'])
def test_output_is_tried_before_the_work(option, photos, tmp_path):
    (tmp_path / 'file').touch()
    wrong = tmp_path / 'file' / 'drawn'
    # the model is unknown, too: the output is looked at first
    line = complaint('caption', photos / 'a.jpg', option, wrong, '--model', 'tinny')
    assert str(wrong) in line
    assert 'tinny' not in line
    assert not clipcap('caption', tmp_path / 'no.jpg', option, tmp_path / 'new', code=1)[0]
    assert not (tmp_path / 'new').exists() or option == '--output'


def test_a_full_disk_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / 'drawn').mkdir()
    Image.effect_noise((300, 300), 90).save(tmp_path / 'noise.png')
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
        arguments = ['caption', tmp_path / 'noise.png', '--render', tmp_path / 'drawn']
        said, [line] = clipcap(*arguments, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said
    assert 'large' in line
    assert not list((tmp_path / 'drawn').iterdir())


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has a device that is full')
@pytest.mark.parametrize('arguments', [['-h'], ['--version'], ['models'], ['caption']])
def test_a_full_stdout_is_one_line(arguments, photos):
    if arguments == ['caption']:
        arguments = ['caption', photos]
    with open('/dev/full', 'w') as full:
        run = subprocess.run([*command, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    [line] = [line for line in run.stderr.splitlines() if 'into' not in line]
    assert 'No space left' in line


# ---- manners in a shell
def test_the_reader_has_seen_enough(scenes):
    run = subprocess.Popen(
        [*command, 'caption', scenes / 'images', '--batch-size', '1'],
        stdout=-1,
        stderr=-1,
        text=True,
    )
    assert 'scene_00000' in run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == ''
    assert run.wait(600) in (0, 1)


def test_interrupted(scenes):
    run = subprocess.Popen(
        [*command, 'caption', *[scenes / 'images'] * 9, '--batch-size', '1', '--format', 'json'],
        stdout=-1,
        stderr=-1,
        text=True,
        # it may be ignored here, where the tests run in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    begun = [run.stdout.readline() for _ in range(3)]
    run.send_signal(signal.SIGINT)
    said, complaints = run.stdout.read(), run.stderr.read()
    assert run.wait(600) == 130
    assert complaints.strip() == ''
    assert 2 <= len(json.loads(''.join(begun) + said)) < 9 * 40


holding = """
import tempfile, time
from clipcap.cli.base import app
from clipcap.cli.main import main

@app.command()
def hold():
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        time.sleep(600)

main()
"""


def test_told_to_end_a_command_removes_its_temporary_folder():
    run = subprocess.Popen([sys.executable, '-c', holding, 'hold'], stdout=-1, stderr=-1, text=True)
    folder = Path(run.stdout.readline().strip())
    assert folder.is_dir()
    run.terminate()
    assert run.wait(600) == 143
    assert run.stderr.read() == ''
    assert not folder.exists()


without_network = """
import socket, sys
def refuse(*_): raise AssertionError('no network, please')
socket.socket.connect = socket.getaddrinfo = refuse
from clipcap.cli.main import main
main()
"""


def test_demo_needs_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
    run = subprocess.run(
        [sys.executable, '-c', without_network, 'demo'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ''
    assert run.stdout.startswith('grace_hopper.jpg')
    assert 'clipcap-demo.png' in run.stdout.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ['clipcap-demo.png']
    assert Image.open(tmp_path / 'clipcap-demo.png').width > 900


def test_demo_elsewhere(tmp_path):
    clipcap('demo', '--output', tmp_path / 'new')
    clipcap('demo', '--output', tmp_path / 'sheet.jpg')
    size = Image.open(tmp_path / 'new' / 'clipcap-demo.png').size
    assert size == Image.open(tmp_path / 'sheet.jpg').size
    assert 'sheet.doc' in complaint('demo', '--output', tmp_path / 'sheet.doc')
    assert 'written' in complaint('demo', '--output', tmp_path / 'sheet.jpg' / 'new')


# ---- data, features, training
def test_data(scenes, tmp_path):
    said, complaints = clipcap('data', scenes)
    assert re.search(r'^all +40 +200 +5', said, re.M) and not complaints
    drawn = clipcap('data', '--draw', tmp_path / 'drawn', '-n', 12, '--seed', 3)[0]
    assert len(list_images(tmp_path / 'drawn' / 'images')) == 12 and re.search(
        r'^all +12 +60', drawn, re.M
    )
    (tmp_path / 'drawn' / 'images' / 'scene_00003.jpg').unlink()
    said, [line] = clipcap('data', tmp_path / 'drawn')
    assert 'scene_00003.jpg' in line and re.search(r'^all +11 +55', said, re.M)
    (tmp_path / 'table').mkdir()
    (tmp_path / 'table' / 'captions.csv').write_text('photo,words\na.jpg,a dog\n')
    assert 'photo, words' in complaint('data', tmp_path / 'table') and 'caption' in complaint(
        'data', tmp_path / 'none'
    )


def test_embed(scenes, photos, tmp_path):
    assert clipcap('embed', scenes, '--output', tmp_path / 'scenes')[0].startswith(
        f'{tmp_path}/scenes: 40 photos'
    )
    assert clipcap('embed', photos, '--output', tmp_path / 'photos', '--features', 'grid')[
        0
    ].startswith(f'{tmp_path}/photos: 3 photos, 25 x ')
    assert json.loads((tmp_path / 'photos' / 'manifest.json').read_text())['names'] == [
        'a.jpg',
        'b.jpg',
        'c.png',
    ]
    assert 'photos' in complaint('embed', photos, '--output', tmp_path / 'photos')  # other features
    assert 'projected' in complaint(
        'embed', photos, '--output', tmp_path / 'x', '--features', 'projected'
    ) and 'nowhere' in complaint(
        'embed', photos, '--output', tmp_path / 'x', '--tower', 'nowhere/at-all'
    )
    shutil.copytree(photos, tmp_path / 'broken')
    (tmp_path / 'broken' / 'b.jpg').write_text('no photo')
    said, lines = clipcap('embed', tmp_path / 'broken', '--output', tmp_path / 'y', code=1)
    assert '2 photos' in said and 'b.jpg' in lines[0] and '1 photo' in lines[-1]


# ---- models, and the programs of an earlier project
def test_models_are_listed():
    printed, [where] = clipcap('models')
    [tiny] = [line for line in printed.splitlines() if line.startswith('tiny ')]
    assert ' here ' in tiny and ' MB ' in tiny
    assert 'fetched when it is first asked for' in where
    printed, lines = clipcap('models', 'tiny', 'tinny', code=1)
    assert printed.startswith('tiny\t')
    assert "model 'tinny'" in lines[0] and lines[-1].endswith('1 of 2 models could not be fetched')


@pytest.mark.parametrize(
    'old, new',
    {
        'image2caption.py -I a.jpg -R out -T 0.5 -S l': 'caption a.jpg --render out '
        '--temperature 0.5 --model flickr30k-large',
        'predict --img-path=a.jpg': 'caption a.jpg --model flickr30k-small',
        'v2c.py -V a.mp4 --num-frames 3': 'video a.mp4 --number 3 --model flickr30k-large --frames',
    }.items(),
)
def test_programs_of_an_earlier_project_have_new_names(old, new):
    program, *arguments = old.split()
    assert new_command(program, arguments) == new.split()


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['predit'], "'predit' is none of"),
        (['training.py', '-S', 'S'], 'clipcap train DATA'),
        (['predict', '-I'], "the value of '-I' is missing"),
        (['v2c', '-V', 'a.mp4', '-Q', '1'], "had no option '-Q'"),
    ],
)
def test_programs_that_are_none(arguments, reason):
    _, lines = clipcap('legacy', *arguments, code=2)
    assert reason in ' '.join(lines)


def test_help_of_the_earlier_programs():
    assert clipcap('legacy', '-h')[0].startswith('Usage: clipcap legacy')
