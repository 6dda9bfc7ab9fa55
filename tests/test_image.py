"Captioner and find_model where a notebook does not reach: a model from a Hub, what is drawn"

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from clipcap.base.pictures import contact_sheet, draw_caption
from clipcap.image import Captioner, find_model

root = Path(__file__).resolve().parent.parent
photo = Image.linear_gradient('L').resize((90, 60))


class LookAlike(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as a snapshot needs: someone/tiny is the bundled model, and more files"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, folder = self.path.split('?')[0].strip('/').split('/'), find_model('tiny')
        names = [p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()] + [
            'run_me.py',
            'weights.bin',
        ]
        if path[:4] == ['api', 'models', 'someone', 'tiny']:
            tree = [
                dict(
                    type='file',
                    path=n,
                    oid='b' * 40,
                    size=(folder / n).stat().st_size if (folder / n).exists() else 9,
                )
                for n in names
            ]
            self.answer(
                json.dumps(
                    tree
                    if 'tree' in path
                    else dict(
                        id='someone/tiny', sha='a' * 40, siblings=[dict(rfilename=n) for n in names]
                    )
                ).encode()
            )
        elif path[:3] == ['someone', 'tiny', 'resolve'] and (folder / '/'.join(path[4:])).is_file():
            self.answer((folder / '/'.join(path[4:])).read_bytes())
        else:
            self.answer(b'', 404)

    def answer(self, body, code=200):
        self.send_response(code)
        if code == 200:
            self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header('X-Repo-Commit', 'a' * 40)
        else:
            self.send_header('X-Error-Code', 'RepoNotFound')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *_):
        pass


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
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), LookAlike)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ('HF_HUB_OFFLINE', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy')
    }
    env |= dict(
        HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}',
        HF_HOME=str(tmp_path),
        HF_HUB_DISABLE_TELEMETRY='1',
    )
    with subprocess.Popen(
        [sys.executable, '-c', asking], text=True, stdin=-1, stdout=-1, stderr=-1, env=env, cwd=root
    ) as run:

        def ask(name):
            run.stdin.write(name + '\n')
            run.stdin.flush()
            return run.stdout.readline().strip().split('|')

        expected = str(Captioner(device='cpu').caption(photo))
        folder, said = ask('someone/tiny')
        assert said == expected and Path(folder).is_relative_to(tmp_path)
        assert not [p.name for p in Path(folder).rglob('*') if p.suffix in ('.py', '.bin', '.md')]
        assert 'someone/nothing' in ask('someone/nothing')[0]
        server.shutdown()
        server.server_close()
        assert ask('someone/tiny') == [folder, expected], 'without the Hub, from the cache'
        (away,) = ask('someone/else')
        assert 'someone/else' in away and 'tiny' in away and 'folder' in away
        run.stdin.close()
        errors = run.stderr.read()
    assert 'Traceback' not in errors and 'LOAD REPORT' not in errors, errors


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
