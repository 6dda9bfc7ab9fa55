"A look-alike of the Hugging Face Hub on this machine, and a process that asks it"

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parent.parent
PROXIES = ('HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy')


class _Answers(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as files and snapshots need: owner/NAME is the sub-folder NAME"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split('?')[0].strip('/').split('/')
        if parts[:2] == ['api', 'models']:
            self._describe(*parts[2:4], tree='tree' in parts)
            return
        _, name, kind, _, *file = [*parts, '', '', ''] if len(parts) < 4 else parts
        folder = self.server.folder / name
        path = folder.joinpath(*file)
        if kind == 'resolve' and path.is_file():
            self._answer(path.read_bytes())
        elif kind == 'resolve' and name and folder.is_dir():
            self._answer(b'', 'EntryNotFound')
        else:
            self._answer(b'', 'RepoNotFound')

    def _describe(self, owner='', name='', tree=False):
        folder = self.server.folder / name
        if not name or not folder.is_dir():
            self._answer(b'', 'RepoNotFound')
            return
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*') if p.is_file()}
        if tree:
            found = [
                dict(type='file', path=path, oid='b' * 40, size=file.stat().st_size)
                for path, file in files.items()
            ]
        else:
            siblings = [dict(rfilename=path) for path in files]
            found = dict(id=f'{owner}/{name}', sha='a' * 40, siblings=siblings)
        self._answer(json.dumps(found).encode())

    def _answer(self, body, fault=None):
        self.send_response(404 if fault else 200)
        if fault:
            self.send_header('X-Error-Code', fault)
        else:
            self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header('X-Repo-Commit', 'a' * 40)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Hub:
    "A look-alike that hands out the sub-folders of a folder, until it is closed"

    def __init__(self, folder):
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Answers)
        self._server.folder = Path(folder)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def asked(self, program, home, **variables):
        "A process that reads a name a line and prints a line: a function that asks it"
        hidden = ('HF_HUB_OFFLINE', *PROXIES)
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env |= dict(
            HF_ENDPOINT=f'http://127.0.0.1:{self._server.server_port}',
            HF_HOME=str(home),
            HF_HUB_DISABLE_TELEMETRY='1',
        )
        with subprocess.Popen(
            [sys.executable, '-c', program],
            text=True,
            stdin=-1,
            stdout=-1,
            stderr=-1,
            env=env | variables,
            cwd=root,
        ) as run:

            def ask(name):
                run.stdin.write(name + '\n')
                run.stdin.flush()
                return run.stdout.readline().strip()

            yield ask
            run.stdin.close()
            errors = run.stderr.read()
        for unwanted in ('Traceback', 'Retrying', 'LOAD REPORT'):
            assert unwanted not in errors, errors
