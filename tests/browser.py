"""A notebook, made on the spot, in JupyterLab in headless Chromium: what the browser tests share.

with opened(lab, ['code of a cell', ...]) as page:      # `lab` is a fixture
    page.wait_for_selector('.my-widget')"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
# s: how long anything may take on a busy machine; what comes sooner is not waited for
PATIENCE = int(os.environ.get('CLIPCAP_PATIENCE', 120))


def chromium():
    "The path of a Chromium, or None"
    found = map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])
    return next(filter(None, found), None)


def lacking():
    "What keeps browser tests from running here, or nothing"
    if not chromium():
        return 'needs Chromium (Debian: apt install chromium)'
    missing = [name for name in ('anywidget', 'jupyterlab', 'playwright') if not find_spec(name)]
    return f'needs {missing[0]} (pip install {missing[0]})' if missing else None


@contextmanager
def jupyterlab(folder):
    "JupyterLab over `folder`, with settings of its own: its address, ending in the port"
    own = {
        f'JUPYTER_{kind}_DIR': str(folder / '.jupyter' / kind.lower())
        for kind in ('CONFIG', 'DATA', 'RUNTIME')
    }
    path = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    env = os.environ | own | dict(IPYTHONDIR=str(folder / '.ipython'), PYTHONPATH=path)
    settings = {
        '@jupyterlab/apputils-extension:notification': dict(
            fetchNews='false', checkForUpdates=False
        )
    }
    (folder / '.jupyter' / 'config' / 'labconfig').mkdir(parents=True)
    (folder / '.jupyter' / 'config' / 'labconfig' / 'default_setting_overrides.json').write_text(
        json.dumps(settings)
    )
    command = [
        sys.executable,
        '-m',
        'jupyterlab',
        '--no-browser',
        '--allow-root',
        '--expose-app-in-browser',
        '--ServerApp.ip=127.0.0.1',
        '--ServerApp.port=0',
        '--IdentityProvider.token=',
        '--ServerApp.allow_remote_access=True',
        f'--ServerApp.root_dir={folder}',
    ]
    with open(folder / 'jupyterlab.log', 'w+') as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield _address(folder, server)
        finally:
            _end(server)


def _address(folder, server):
    "Where the server answers, once it does"
    from urllib.request import urlopen

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            [told] = (folder / '.jupyter' / 'runtime').glob('jpserver-*.json')
            url = f"http://localhost:{json.loads(told.read_text())['port']}"
            urlopen(f'{url}/api', timeout=5).close()
            return url
        except (OSError, ValueError):
            time.sleep(0.1)
    pytest.fail(f"JupyterLab does not start:\n{(folder / 'jupyterlab.log').read_text()[-3000:]}")


def _end(server):
    "The server ends its kernels; what is left of its session is killed"
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "(address, folder) of one JupyterLab for all browser tests"
    folder = tmp_path_factory.mktemp('jupyterlab')
    with jupyterlab(folder) as url:
        yield url, folder


def notebook(path, cells):
    "Write a notebook of code cells"
    cells = [
        dict(
            cell_type='code',
            id=f'cell-{n}',
            metadata={},
            source=source,
            execution_count=None,
            outputs=[],
        )
        for n, source in enumerate(cells)
    ]
    spec = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(json.dumps(dict(cells=cells, metadata=spec, nbformat=4, nbformat_minor=5)))


def command(page, name, **arguments):
    "Have JupyterLab run one of its commands, as its menus do"
    return page.evaluate(
        '([name, options]) => jupyterapp.commands.execute(name, options).then(() => null)',
        [name, arguments],
    )


@contextmanager
def opened(lab, cells, flags=(), script=None, host='localhost', run=True, **context):
    """A page with a notebook of `cells`, all run; `script` runs in the page before anything else.

    On failure, what the page looked like is kept beside the notebook."""
    from playwright.sync_api import sync_playwright

    url, folder = lab
    name = re.sub(
        r'\W+', '-', os.environ.get('PYTEST_CURRENT_TEST', 'notebook').split('::')[-1].split(' ')[0]
    )
    notebook(folder / f'{name}.ipynb', cells)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=['--no-sandbox', *flags], timeout=1000 * PATIENCE
        )
        page = browser.new_context(viewport=dict(width=1100, height=900), **context).new_page()
        page.said = []
        page.on(
            'console', lambda message: message.type == 'error' and page.said.append(message.text)
        )
        page.on('pageerror', lambda error: page.said.append(str(error)))
        page.set_default_timeout(1000 * PATIENCE)
        if script:
            page.add_init_script(script)
        try:
            _open(page, f"{url.replace('localhost', host)}/lab/tree/{name}.ipynb?reset", run)
            yield page
        except BaseException:
            page.screenshot(path=folder / f'{name}.png', full_page=True, timeout=20_000)
            print(f'\n{folder}/{name}.png shows the page. It said: {page.said[-5:]}')
            raise
        finally:
            page.evaluate('() => jupyterapp.serviceManager.sessions.shutdownAll()')
            browser.close()


def _open(page, url, run):
    page.goto(url)
    page.wait_for_function(
        '() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel'
    )
    page.evaluate('() => jupyterapp.shell.currentWidget.sessionContext.ready')
    page.wait_for_selector('.jp-Notebook .jp-CodeCell')
    if run:
        page.evaluate(
            "() => { jupyterapp.commands.execute('notebook:run-all-cells') }"
        )  # widgets appear while it runs
